"""A simulator in ten lines of physics and a policy for it, for tests of evaluation: three coloured targets, one point
that moves.

Its own module because simulator processes import it by name. The picture tells where each colour is (one pixel each);
the point moves in x and y, and the target nearest in x when it arrives at y = 0.2 is the one that was "reached".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from vla.embodiment import load_embodiment
from vla.errors import MachineError, UsageError
from vla.evaluate import SimulatorPool, evaluate
from vla.evaluate.jobs import Demo, Demos
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


class FakePolicy:
    """Goes to the colour it is told, found in the picture; `blind` always goes to the middle, `deaf` always to red."""

    def __init__(self, kind: str = "honest", instructions: tuple[str, ...] | None = None) -> None:
        self.kind = kind
        self.embodiments = {"tabletop": load_embodiment("tabletop")}
        self.chunk, self.image_size, self.decode, self.fingerprint = 8, 64, "mean", "f" * 64
        self.recorded_seeds = {s: {t: [[0, 9], [20, 29]] for t in TASKS} for s in ("fake", "lone")}
        self.instructions = list(instructions if instructions is not None else (f"reach {c}" for c in COLOURS))
        self.batches: list[int] = []
        self.saw: list[tuple] = []

    def steps(self, embodiment: str) -> tuple[int, int]:
        return self.chunk, 4

    def act_batch(self, observations, instructions, embodiment, *, decode=None, seeds=None, drop_state=False):
        assert seeds is not None and len(observations) == len(instructions) == len(seeds)
        self.batches.append(len(observations))
        chunks = []
        for observation, instruction, seed in zip(observations, instructions, seeds, strict=True):
            picture = observation["images"]["front"]
            grey = bool((picture == 127).all())
            self.saw.append((seed, instruction, grey, drop_state))
            colour = "red" if self.kind == "deaf" else instruction.removeprefix("reach ")
            x = 0.0 if self.kind == "blind" or grey else (int(picture[0, COLOURS.index(colour), 0]) - 127) / 500
            at, actions = np.array(observation["state"][:2], np.float64), []
            for _ in range(self.chunk):
                actions.append(go_to(x, at))
                at = at + 0.02 * actions[-1][:2]
            rows = np.stack(actions)
            chunks.append(SimpleNamespace(actions=rows, confidence=np.full(rows.shape, 0.5, np.float32),
                                          symbols=((rows + 1) * 127).astype(int)))  # fmt: skip
        return chunks


@contextmanager
def fake_pool(workers: int = 2) -> Iterator[SimulatorPool]:
    """Processes of this simulator; they inherit sys.path and import this module from it."""
    sys.path.insert(0, os.path.dirname(__file__))
    try:
        with SimulatorPool(workers, "fake_sims") as running:
            yield running
    finally:
        sys.path.remove(os.path.dirname(__file__))


CONDITIONS = ("policy", "train", "swap", "blank", "nostate", "replay", "random", "expert")


def run(policy, pool, conditions=CONDITIONS, suite="fake", episodes=30, **kw) -> dict[str, Any]:
    """`evaluate` here, with something to replay."""
    kw.setdefault("demos", Demos({t: [Demo(np.full((12, 4), 0.5, np.float32))] for t in TASKS}))
    return evaluate(policy, suite, episodes=episodes, conditions=conditions, pool=pool, sims="fake_sims", progress=False, **kw)


def row(results: dict[str, Any], condition: str, group: str = "reach") -> dict[str, Any]:
    """One row of the results."""
    return next(r for r in results["rows"] if (r["condition"], r["group"]) == (condition, group))
