"""The rules of `tabletop-long`: what is done of a goal, when it is spoilt, what the expert does next. Plain numbers, no MuJoCo.

Subtasks are judged by the tabletop's own `Judge`, begun anew where the one before was done, so that cubes count from where they
lie by then. Of a stage that may be done in any order all open ones are judged at once: the first that is done counts, and the
goal is spoilt when none of them can be done any more (the wrong cube was touched, a cube was moved that nobody asked for).

Between two subtasks the hand has to leave the cube it was at: until it is `CLEAR` of it nothing is judged, and that cube counts
from where it was left. So the second of two touches is a second touch, and a lifted cube may be put down.
"""

from __future__ import annotations

import math

import numpy as np

from vla.sims.suites import COLOURS, tabletop_instruction
from vla.sims.tabletop_goals import GOALS
from vla.sims.tabletop_tasks import AXES, PUSH_BY, STEP, Judge, expert

STEPS_EACH = 40
"""Control steps allowed per subtask of a goal; the expert needs about 15."""
CLEAR = 0.045
"""Metres between hand and cube beyond which the hand has left it."""
ROOM = 0.05
"""Metres other cubes keep from the way of hand and cube where nothing is in the way."""
_BEHIND, _BEYOND = 0.043, 0.02
"""Metres: where the hand comes down behind a cube it pushes; how far a cube is pushed beyond what is asked for."""
_RESTING = 0.021
"""Height below which the centre of a cube lies on the table, give or take a few millimetres."""


class GoalJudge:
    """Says once and for all whether `goal` was reached (1) or spoilt (-1), 0 while it is open; and how far it is."""

    def __init__(self, goal: str, start: np.ndarray) -> None:
        """`start` (4, 3): where the cubes lie, in metres, in the order of `COLOURS`."""
        self.goal, self.subtasks = goal, GOALS[goal].subtasks
        ends = np.cumsum([len(stage) for stage in GOALS[goal].stages]).tolist()
        self._stages = [range(end - len(stage), end) for end, stage in zip(ends, GOALS[goal].stages, strict=True)]
        self.done: list[int] = []
        """Numbers of the subtasks done so far, in the order they were."""
        self.status = 0
        self.leaving: int | None = None
        """Number (in `COLOURS`) of the cube whose subtask was just done and that the hand has not left yet."""
        self._start = start.copy()
        self._order = self._open_stage()
        self._judges: dict[int, Judge] = {}
        self._begin()

    @property
    def left(self) -> list[int]:
        """Numbers of the subtasks still to do, those of the open stage first and in the order preferred."""
        return [*self._order, *(n for n in range(len(self.subtasks)) if n not in self.done and n not in self._order)]

    @property
    def now(self) -> int | None:
        """Number of the subtask to do now: of the open stage the one with the most room, as listed where there is enough for
        several. None when none is left."""
        return next(iter([n for n, judge in self._judges.items() if judge.status == 0] or self.left), None)

    def update(self, hand: np.ndarray, cubes: np.ndarray) -> int:
        """Judge the world as it is: `hand` (3,) and `cubes` (4, 3) in metres."""
        if self.status == 0 and self.leaving is not None:
            self._start[self.leaving] = cubes[self.leaving]
            if math.dist(hand, cubes[self.leaving]) <= CLEAR:
                return 0
            self.leaving = None
            self._begin()
        if self.status == 0:
            found = {n: judge.update(hand, cubes) for n, judge in self._judges.items()}
            finished = next((n for n, status in found.items() if status > 0), None)
            if finished is not None:
                self._finish(finished, cubes)
            elif all(status < 0 for status in found.values()):
                self.status = -1
        return self.status

    def _finish(self, number: int, cubes: np.ndarray) -> None:
        self.done.append(number)
        self.leaving, self._start, self._judges = self._judges[number].named, cubes.copy(), {}
        self._order = self._open_stage()
        self.status = int(not self._order)

    def _open_stage(self) -> list[int]:
        """What is left of the first stage that has anything left: as listed, but what has something in its way (a cube behind
        another) later."""
        stage = next((left for stage in self._stages if (left := [n for n in stage if n not in self.done])), [])
        room = {n: _room(self.subtasks[n], self._start) for n in stage}
        return sorted(stage, key=lambda n: -min(room[n], ROOM))

    def _begin(self) -> None:
        self._judges = {n: Judge(self.subtasks[n], self._start.copy()) for n in self._order}


def goal_expert(judge: GoalJudge, hand: np.ndarray, opening: float, cubes: np.ndarray) -> np.ndarray:
    """(4,) float32 in [-1, 1]: the next action towards the goal: leave the last cube upwards, then as the tabletop's expert.

    When the goal is reached: away from the cube that was pushed or touched, and still; a lifted cube stays in the hand.
    """
    last = judge.subtasks[judge.done[-1]] if judge.done else ""
    if judge.leaving is not None:
        return _leave(last, bool(judge.left), hand, opening, cubes[judge.leaving])
    now = judge.now
    assert now is not None
    return expert(judge.subtasks[now], hand, opening, cubes)


def _leave(last: str, more: bool, hand: np.ndarray, opening: float, cube: np.ndarray) -> np.ndarray:
    """Up from `cube`, which `last` was about; a lifted one is put down first if there is `more` to do."""
    up, close = 0.0 if math.dist(hand, cube) > CLEAR else 1.0, 1.0
    if last.startswith("lift"):
        held = opening < 0.8 and math.dist(hand[:2], cube[:2]) < 0.02
        if not more:
            up = 0.0
        elif held and cube[2] > _RESTING:
            up = -min(1.0, float(cube[2] - _RESTING + 0.003) / STEP)
        else:
            up, close = (up, -1.0) if opening > 0.9 else (0.0, -1.0)
    return np.array([0.0, 0.0, up, close], np.float32)


def _room(task: str, cubes: np.ndarray) -> float:
    """Metres between the way that hand and cube take in `task` and the nearest other cube."""
    _, colour, *direction = task.split("-")
    named = COLOURS.index(colour)
    place = cubes[named, :2]
    axis = np.array(AXES[direction[0]] if direction else (0.0, 0.0))
    low, high = (-_BEHIND, PUSH_BY + _BEYOND) if direction else (0.0, 0.0)
    gaps = [other[:2] - place - np.clip((other[:2] - place) @ axis, low, high) * axis
            for i, other in enumerate(cubes) if i != named]  # fmt: skip
    return float(np.linalg.norm(gaps, axis=1).min())


def progress(judge: GoalJudge) -> dict[str, object]:
    """What `info` says of a goal: `subtask` ({index, task, instruction} of what is to be done now, None at the end), `done` and
    `plan` (tasks; the plan begins with that of `subtask`)."""
    now = judge.now
    rest = [now, *(n for n in judge.left if n != now)] if now is not None else []
    task = "" if now is None else judge.subtasks[now]
    return {
        "subtask": None if now is None else {"index": now, "task": task, "instruction": tabletop_instruction(task)},
        "done": [judge.subtasks[n] for n in judge.done], "plan": [judge.subtasks[n] for n in rest],
    }  # fmt: skip
