"""Questions that are with a planner: asked without waiting, heard when they are answered, given up when they take too long."""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass
from typing import Any, Protocol

from serve.planner import Asked, Delayed, Plan, Planner
from vla.errors import VLAError

logger = logging.getLogger(__name__)

ROUNDING = 1e-6
"""Seconds a sum of ticks may be off."""
_AT_ONCE = 2
"""Questions that may be out when something happens; otherwise one."""
_LOST = 8
"""Threads that may hang in a planner that never comes back; then nobody asks it any more until one does."""


@dataclass(frozen=True)
class Reply:
    """What became of a question."""

    number: int
    """Of the question, from 1 on."""
    epoch: int
    at: float
    """When it was asked."""
    seconds: float
    """That it took."""
    plan: Plan | None
    error: str = ""
    """Its kind, where there is no plan."""


class Desk(Protocol):
    """One run's questions. All from one thread, which never waits."""

    def free(self, urgent: bool) -> bool:
        """Whether another question may be asked now."""
        ...

    def ask(self, asked: Asked, now: float, epoch: int) -> None: ...

    def heard(self, now: float) -> list[Reply]:
        """What has come since."""
        ...


class Threaded:
    """Each question in a thread of its own: a planner that hangs costs a thread, never a tick."""

    def __init__(self, planner: Planner, patience: float) -> None:
        self._planner, self._patience = planner, patience
        self._out: dict[int, tuple[int, float]] = {}
        self._number, self._threads = 0, 0
        self._came: queue.SimpleQueue[tuple[int, Plan | None, str]] = queue.SimpleQueue()

    def free(self, urgent: bool) -> bool:
        return len(self._out) < (_AT_ONCE if urgent else 1) and self._threads < _LOST

    def ask(self, asked: Asked, now: float, epoch: int) -> None:
        self._number += 1
        self._threads += 1
        self._out[self._number] = epoch, now
        threading.Thread(target=self._think, args=(self._number, asked), name="planner", daemon=True).start()

    def _think(self, number: int, asked: Asked) -> None:
        self._came.put((number, *_answer(self._planner, asked)))

    def heard(self, now: float) -> list[Reply]:
        replies = []
        while True:
            try:
                number, plan, error = self._came.get_nowait()
            except queue.Empty:
                break
            self._threads -= 1
            if (out := self._out.pop(number, None)) is not None:
                replies.append(Reply(number, *out, now - out[1], plan, error))
        for number, (epoch, at) in list(self._out.items()):
            if now - at > self._patience:
                del self._out[number]
                replies.append(Reply(number, epoch, at, now - at, None, "late"))
        return replies


class Inline:
    """The planner thinks while the clock stands still, as a simulator's does; a `Delayed` one's answer is heard as much later."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._out: list[tuple[float, Reply]] = []
        self._number = 0

    def free(self, urgent: bool) -> bool:
        return len(self._out) < (_AT_ONCE if urgent else 1)

    def ask(self, asked: Asked, now: float, epoch: int) -> None:
        planner: Any = self._planner
        seconds = 0.0
        while isinstance(planner, Delayed):
            seconds, planner = seconds + planner.seconds(), planner.planner
        self._number += 1
        plan, error = _answer(planner, asked)
        self._out.append((now + seconds, Reply(self._number, epoch, now, seconds, plan, error)))

    def heard(self, now: float) -> list[Reply]:
        now += ROUNDING
        came = [reply for due, reply in self._out if due <= now]
        self._out = [(due, reply) for due, reply in self._out if due > now]
        return came


def _answer(planner: Planner, asked: Asked) -> tuple[Plan | None, str]:
    """(plan, "") or (None, kind of error)."""
    try:
        plan = planner.plan(asked)
        if isinstance(plan, Plan) and (plan.done or plan.instruction.strip()) and plan.valid_for > 0:
            return plan, ""
        logger.warning("the planner said what is no plan: %.200r", plan)
        return None, "bad_answer"
    except VLAError as error:
        logger.warning("no plan: %s: %.300s", error.where, error.found)
        return None, str(getattr(error, "code", "")) or "refused"
    except Exception:  # planners are written by others as well
        logger.exception("no plan")
        return None, "broken"
