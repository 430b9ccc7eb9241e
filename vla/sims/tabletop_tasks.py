"""The tabletop's rules: when a task is done or spoilt, and what the scripted expert does. Plain numbers, no MuJoCo.

Both look only at the hand, the fingers and the cubes now (and where the cubes began), so an expert's label is clean at
any disturbed state and any task can be judged on any rollout.
"""

from __future__ import annotations

import math

import numpy as np

from vla.sims.suites import COLOURS

STEP = 0.02
"""Metres the hand moves per control step at action 1."""
TOUCH_WITHIN, PUSH_BY, PUSH_ASIDE, LIFT_BY, SPOILT_BY = 0.025, 0.035, 0.025, 0.03, 0.015
"""Metres: hand to centre; push that way; at most sideways; lift; another cube moved by."""
AXES = {"left": (0.0, 1.0), "right": (0.0, -1.0), "away": (1.0, 0.0)}
"""Unit vectors (x, y) in the robot's frame."""
TRAVEL = 0.075
"""Height of the hand between places: above every cube by more than a touch."""


class Judge:
    """Says once and for all whether `task` was done (1) or spoilt (-1); 0 while it is still open."""

    def __init__(self, task: str, start: np.ndarray) -> None:
        self.task = task
        self.verb, colour, *direction = task.split("-")
        self.named = COLOURS.index(colour)
        self.others = [i for i in range(len(COLOURS)) if i != self.named]
        self.axis = AXES[direction[0]] if direction else None
        self.start = start
        self.status = 0

    def update(self, hand: np.ndarray, cubes: np.ndarray) -> int:
        """Judge the world as it is: `hand` (3,) and `cubes` (4, 3) in metres, in the order of `COLOURS`."""
        if self.status == 0:
            self.status = getattr(self, f"_{self.verb}")(hand, cubes)
        return self.status

    def _touch(self, hand: np.ndarray, cubes: np.ndarray) -> int:
        near = [math.dist(hand, cube) < TOUCH_WITHIN for cube in cubes]
        if any(near[i] for i in self.others):
            return -1
        return int(near[self.named])

    def _push(self, hand: np.ndarray, cubes: np.ndarray) -> int:
        assert self.axis is not None
        if self._others_moved(cubes):
            return -1
        x, y, _ = cubes[self.named] - self.start[self.named]
        along, aside = x * self.axis[0] + y * self.axis[1], x * self.axis[1] - y * self.axis[0]
        return int(along >= PUSH_BY and abs(aside) < PUSH_ASIDE)

    def _lift(self, hand: np.ndarray, cubes: np.ndarray) -> int:
        if self._others_moved(cubes):
            return -1
        return int(cubes[self.named, 2] - self.start[self.named, 2] >= LIFT_BY)

    def _others_moved(self, cubes: np.ndarray) -> bool:
        return any(math.dist(cubes[i], self.start[i]) > SPOILT_BY for i in self.others)


def expert(task: str, hand: np.ndarray, opening: float, cubes: np.ndarray) -> np.ndarray:
    """(4,) float32 in [-1, 1]: the next action towards `task`. `hand` (3,), `opening` 0..1, `cubes` (4, 3), metres."""
    verb, colour, *direction = task.split("-")
    cube = cubes[COLOURS.index(colour)]
    if verb == "touch":
        goal, close = _above(hand, cube[:2], low=float(cube[2]) + 0.012, funnel=0.012), 1.0
    elif verb == "lift":
        goal, close = _lift(hand, opening, cube)
    else:
        goal, close = _push(hand, cube, AXES[direction[0]]), 1.0
    return np.clip([*((goal - hand) / STEP), close], -1, 1).astype(np.float32)


def _above(hand: np.ndarray, place: np.ndarray, low: float, funnel: float) -> np.ndarray:
    """Where to go next in order to come down vertically on `place` (2,) to height `low`: up, across, down."""
    off = math.dist(hand[:2], place)
    height = min(TRAVEL, low + max(0.0, off - funnel) * 3)  # a funnel: the nearer, the lower
    across = place if hand[2] > height - 0.02 else hand[:2]
    return np.array([across[0], across[1], height])


def _lift(hand: np.ndarray, opening: float, cube: np.ndarray) -> tuple[np.ndarray, float]:
    """The next place of the hand and the finger command: above it open, down, close, up."""
    off = math.dist(hand[:2], cube[:2])
    around = off < 0.013 and abs(hand[2] - cube[2]) < 0.014
    if around and opening < 0.8:  # a cube between the fingers keeps them at 0.55 to 0.75
        return np.array([hand[0], hand[1], hand[2] + STEP]), 1.0
    if around:
        return np.array([cube[0], cube[1], max(cube[2] - 0.003, 0.012)]), 1.0
    if opening < 0.9 and hand[2] < cube[2] + 0.03 and off < 0.04:  # closed too early or lost it: open above, not beside
        return np.array([hand[0], hand[1], cube[2] + 0.045]), -1.0
    return _above(hand, cube[:2], low=max(float(cube[2]) - 0.003, 0.012), funnel=0.006), -1.0


def _push(hand: np.ndarray, cube: np.ndarray, axis: tuple[float, float]) -> np.ndarray:
    """The next place of the hand: behind the cube, down, then straight through it."""
    x, y = hand[0] - cube[0], hand[1] - cube[1]
    along, aside = x * axis[0] + y * axis[1], x * axis[1] - y * axis[0]
    low = 0.016
    if hand[2] < 0.03 and along < -0.022 and abs(aside) < 0.012:
        step = STEP
        # One unit along the axis, and back onto the cube's centre line.
        return np.array([
            hand[0] + axis[0] * step - axis[1] * aside, hand[1] + axis[1] * step + axis[0] * aside, low,
        ])  # fmt: skip
    behind = 0.043
    place = np.array([cube[0] - axis[0] * behind, cube[1] - axis[1] * behind])
    return _above(hand, place, low=low, funnel=0.01)
