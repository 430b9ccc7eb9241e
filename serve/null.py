"""A policy that knows nothing: what a server costs without a model, and a server to write a robot's side against.

`null:ROBOT?ms=100&each=1` stands where a policy's path does: it holds still, `ms` ms a batch (a look, with `each=1`). ROBOT is a
file of `configs/embodiments/`, or a path to one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import numpy as np

from serve.robot import Robot
from vla.errors import UsageError


class NullPolicy:
    """Answers zeros (H, A), H = 8, within the limits."""

    fingerprint = "null"
    instructions: Sequence[str] = ()

    def __init__(self, path: Path, ms: float = 0.0, each: bool = False) -> None:
        from vla.embodiment import load_embodiment

        spec = load_embodiment(path)
        self.robot, self.embodiment = spec.key, spec.model_dump(mode="json")
        self.robots = {self.robot: spec}
        self._known = Robot.from_json(self.embodiment, str(path))
        low, high = spec.limits("action")
        self._actions = np.tile(np.clip(np.zeros_like(low), low, high), (8, 1))
        self._sure, self._symbols = np.ones_like(self._actions), np.zeros(self._actions.shape, np.int64)
        self._seconds, self._each = ms / 1e3, each

    @classmethod
    def parse(cls, text: str) -> NullPolicy:
        """From `null:ROBOT?ms=100`. Raises `UsageError`."""
        from vla.config import CONFIGS

        name, _, query = text.removeprefix("null:").partition("?")
        asked = parse_qs(query)
        path = Path(name) if name.endswith(".yaml") else CONFIGS / "embodiments" / f"{name}.yaml"
        try:
            if unknown := asked.keys() - {"ms", "each"}:
                raise ValueError(f"unknown {sorted(unknown)}")
            ms, each = float(asked.get("ms", ["0"])[0]), bool(int(asked.get("each", ["0"])[0]))
            if not 0 <= ms < 1e6:
                raise ValueError(f"ms={ms}")
        except ValueError as error:
            raise UsageError(text, found=error, expected="null:ROBOT, null:ROBOT?ms=100 or null:ROBOT?ms=100&each=1",
                             fix="null:tabletop") from error  # fmt: skip
        return cls(path, ms, each)

    def steps(self, robot: str) -> tuple[int, int]:
        """(8, 8)."""
        return len(self._actions), len(self._actions)

    def act_batch(
        self, observations: Sequence[Any], instructions: Sequence[str], robot: str, seeds: Sequence[int] | None = None
    ) -> list[Any]:  # fmt: skip
        """As `vla.policy.VLAPolicy.act_batch`; observations are checked as there."""
        for observation in observations:
            self._known.check_observation(observation, f"observation for {robot!r}")
        if self._seconds:
            time.sleep(self._seconds * (len(observations) if self._each else 1))
        return [SimpleNamespace(actions=self._actions.copy(), confidence=self._sure, symbols=self._symbols) for _ in observations]
