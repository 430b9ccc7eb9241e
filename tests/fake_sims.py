"""A simulator in ten lines of physics, for tests of evaluation: three coloured targets, one point that moves.

Its own module because simulator processes import it by name. The picture tells where each colour is (one pixel each);
the point moves in x and y, and the target nearest in x when it arrives at y = 0.2 is the one that was "reached".
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from vla.embodiment import load_embodiment
from vla.errors import MachineError, UsageError
from vla.sims.suites import Suite

COLOURS = ("red", "green", "blue")
TASKS = tuple(f"reach-{c}" for c in COLOURS)
SUITES = {
    "fake": Suite("fake", "tabletop", TASKS, TASKS, lambda task: "reach", lambda task: f"reach {task[6:]}"),
    "lone": Suite("lone", "tabletop", ("reach-red",), TASKS, lambda task: task, lambda task: f"reach {task[6:]}"),
}


def expand_tasks(suite: str, tasks: list[str] | None) -> list[str]:
    """As `vla.sims.expand_tasks`."""
    return list(tasks or SUITES[suite].tasks)


def make_sim(suite: str, task: str, *, image_size: int = 64) -> FakeSim:
    """As `vla.sims.make_sim`; the environment variable FAKE_SIM makes it fail in one of three ways."""
    match os.environ.get("FAKE_SIM"):
        case "die":
            print("no GPU, goodbye", flush=True)
            os._exit(7)
        case "refuse":
            raise MachineError("renderer", found="none", expected="egl", fix="apt-get install libegl1")
        case "bug":
            raise ZeroDivisionError("a bug in the simulator")
    return FakeSim(task, image_size)


class FakeSim:
    """One task; a definite failure is declared early (y > 0.1, off course), before another target can be reached."""

    max_steps = 40

    def __init__(self, task: str, image_size: int) -> None:
        self.task, self.image_size, self.spec = task, image_size, load_embodiment("tabletop")

    def reset(self, *, seed: int, options: dict[str, Any]) -> tuple[dict, dict]:
        if options.keys() - {"task", "watch", "render"}:
            raise UsageError("reset", found=str(options), expected="task, watch, render", fix="-")
        self.task = options.get("task", self.task)
        self.watched = dict.fromkeys(options.get("watch", ()), False)
        self.x: dict[str, float] = dict(zip(COLOURS, np.random.default_rng(seed).permutation([-0.2, 0.0, 0.2]), strict=True))
        self.at, self.steps = np.zeros(2), 0
        return self.see(options.get("render", True)), {}

    def see(self, render: bool) -> dict[str, Any]:
        picture = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        picture[0, :3, 0] = [round(127 + 500 * self.x[c]) for c in COLOURS]
        return {"images": {"front": picture} if render else {}, "state": np.array([*self.at, 0, 0], np.float32)}

    def step(self, action: np.ndarray, render: bool = True) -> tuple[dict, float, bool, bool, dict]:
        self.at = self.at + 0.02 * np.clip(action[:2], -1, 1)
        self.steps += 1
        arrived = self.at[1] >= 0.2
        reached = min(COLOURS, key=lambda c: abs(self.x[c] - self.at[0])) if arrived else ""
        self.watched = {t: done or reached == t[6:] for t, done in self.watched.items()}
        success = reached == self.task[6:]
        failure = self.at[1] > 0.1 and abs(self.at[0] - self.x[self.task[6:]]) > 0.1 and not success
        info = {"success": success, "failure": failure, "watched": self.watched}
        return self.see(render), 0.0, success or failure, self.steps >= self.max_steps, info

    def expert(self) -> np.ndarray:
        return go_to(self.x[self.task[6:]], self.at)

    def frame(self, size: int = 240) -> np.ndarray:
        picture = np.full((size, size, 3), 230, np.uint8)
        row, column = (int(np.clip(v, 0, 1) * (size - 8)) for v in (1 - self.at[1] * 4, self.at[0] * 2 + 0.5))
        picture[row : row + 8, column : column + 8] = 0
        return picture

    def close(self) -> None:
        pass


def go_to(x: float, at: np.ndarray) -> np.ndarray:
    """Sideways first, then forward."""
    dx = x - float(at[0])
    return np.array([np.clip(dx * 50, -1, 1), float(abs(dx) < 0.03), 0, 0], np.float32)
