"""A station's robot as those see it who watch: pictures to the board, steps to who keeps them, figures of the loop. No torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from serve.board import Board
from serve.loop import percentiles

logger = logging.getLogger(__name__)


class Shown:
    """A robot's driver (`serve.loop.RobotIO`), shown to who watches, and each step of it to who keeps it."""

    def __init__(self, io: Any, board: Board, keep: Callable[[Mapping[str, Any], np.ndarray], None]) -> None:
        """`keep(observation, action)` is called before each action is carried out; what it raises stops none."""
        self.io, self._board, self._keep = io, board, keep
        self._seen: Mapping[str, Any] | None = None
        self.state: np.ndarray | None = None
        """(S,) robot units, before the last action; None where it has none."""
        self._last = -np.inf
        self._failed = ""
        """Why the first step that could not be kept was not."""

    def observe(self) -> Mapping[str, Any]:
        seen = self._seen = self.io.observe()
        return seen

    def act(self, action: np.ndarray) -> bool | None:
        try:
            seen = self.io.observe() if self._seen is None else self._seen
            state = seen.get("state")
            self.state = None if state is None else np.array(state, np.float32)
            try:
                self._keep(seen, action)
            finally:  # what cannot be kept can be seen
                self.publish(seen)
        except Exception as error:  # whatever becomes of pictures and records: the command is sent
            if not self._failed:
                logger.exception("a step is not kept, or not shown")
            self._failed = self._failed or f"{type(error).__name__}: {error}"
        self._seen = None
        return self.io.act(action)

    def publish(self, seen: Mapping[str, Any] | None = None, always: bool = False) -> None:
        """The newest pictures, at most ten times a second; large ones only where somebody looks."""
        board, now = self._board, time.monotonic()
        if not always and now - self._last < 0.095:
            return
        self._last = now
        if (show := getattr(self.io, "show", None)) is not None and (always or board.watched):
            board.show(show())
        else:
            board.show((seen or self.io.observe()).get("images") or {})


def finite(value: Any) -> float | None:
    """As JSON has it: None for what is unknown, or no number."""
    return None if value is None or not np.isfinite(value) else float(value)


def facts_of(gaps: Iterable[float], thinking: Iterable[float], missed: int, ticks: int) -> dict[str, Any]:
    """`loop` of `GET /v1/station`, in ms, of `gaps` between ticks and planners' `thinking` in seconds."""
    jitter, planner = percentiles(gaps), percentiles(thinking)
    return {
        "jitter_ms_p50": jitter["p50"] if jitter else None, "jitter_ms_p99": jitter["p99"] if jitter else None,
        "missed": missed, "ticks": ticks, "planner_ms_p50": planner["p50"] if planner else None,
    }  # fmt: skip
