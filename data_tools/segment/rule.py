"""Where one subtask ends and the next begins, judged by how the hand moved. Plain numbers; no picture is looked at.

What a subtask is about happens where the hand is low (it touches, pushes, grasps, puts down), and what lies between two of them
is travel. So a boundary is put

- where the hand leaves: the last frame of a low visit, before it rises by `RISE`, unless it rises with something in the gripper;
- where a rise with something in the gripper ends (lifted), and not once more where that is put down within `SOON` seconds;
- where the hand comes to rest for `PAUSE` seconds, unless a boundary lies less than that before;
- of a robot whose hand's height is not known: where the gripper has closed or opened, and at rests.

Heights are judged against those of the whole dataset (5 % and 95 % quantile), since units and tables differ; something is in the
gripper where it stops between open and closed. Boundaries less than `APART` seconds after another are dropped. How well this
agrees with a simulator's own subtasks: docs/results.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla.embodiment import EmbodimentSpec

RISE, LOW, LEVEL = 0.24, 0.35, 0.05
"""Shares of the range of heights: a rise that counts; how high a low visit may be; what is level with its lowest frame."""
HELD = (0.2, 0.85)
"""Openings (0 closed, 1 open) between which something is in the gripper."""
PAUSE, APART, SOON = 0.5, 0.4, 1.5
"""Seconds; see above."""
STILL = 0.1
"""Share of an episode's brisk speed (its 90 % quantile) below which the hand rests."""


@dataclass(frozen=True)
class Scale:
    """How high the hand goes and how far the gripper opens in a dataset. None where a robot says neither."""

    height: tuple[float, float] | None
    opening: tuple[float, float] | None


@dataclass(frozen=True)
class Motion:
    """One episode: `speed` (T,) per second; `height` (T,), 0 low and 1 high; `opening` (T,), 0 closed and 1 open."""

    fps: float
    speed: np.ndarray
    height: np.ndarray | None = None
    opening: np.ndarray | None = None


def measure(spec: EmbodimentSpec, state: np.ndarray, action: np.ndarray) -> Scale:
    """Of all rows of a dataset, `state` (F, S) and `action` (F, A)."""
    height, opening = _height(spec, state), _opening(spec, state, action)
    ranges = [None if values is None else tuple(np.quantile(values, quantiles).tolist())
              for values, quantiles in ((height, (0.05, 0.95)), (opening, (0.01, 0.99)))]  # fmt: skip
    return Scale(*(pair if pair and pair[1] > pair[0] else None for pair in ranges))


def motion(spec: EmbodimentSpec, state: np.ndarray, action: np.ndarray, fps: float, scale: Scale) -> Motion:
    """Of one episode, `state` (T, S) and `action` (T, A)."""
    place = state[:, _place(spec)].astype(np.float64)
    speed = np.linalg.norm(np.diff(place, axis=0, prepend=place[:1]), axis=1) * fps
    scaled = []
    for values, limits in ((_height(spec, state), scale.height), (_opening(spec, state, action), scale.opening)):
        scaled.append(None if values is None or limits is None else (values - limits[0]) / (limits[1] - limits[0]))
    return Motion(fps, speed, *scaled)


def _place(spec: EmbodimentSpec) -> list[int]:
    """Dimensions of the state that say where the hand is; all of it where no convention says so."""
    for convention in ("eef_position", "joint_position"):
        if dims := spec.dims_with("state", convention):
            return list(dims)
    return list(range(spec.state_dim))


def _height(spec: EmbodimentSpec, state: np.ndarray) -> np.ndarray | None:
    dims = list(spec.dims_with("state", "eef_position"))
    return state[:, dims[2]].astype(np.float64) if len(dims) == 3 else None


def _opening(spec: EmbodimentSpec, state: np.ndarray, action: np.ndarray) -> np.ndarray | None:
    """Larger is more open. What was measured, else what was asked for."""
    for part, values in (("state", state), ("action", action)):
        for convention, sign in (("gripper_open_positive", 1), ("gripper_closed_positive", -1)):
            dims = list(spec.dims_with(part, convention))
            if len(dims) == 1:
                return sign * values[:, dims[0]].astype(np.float64)
    return None


def boundaries(move: Motion) -> list[int]:
    """Frames at which another subtask begins, rising, never 0."""
    found = _visits(move) if move.height is not None else _gripper(move)
    for rest in _rests(move):
        if not any(0 <= rest - at < PAUSE * move.fps + 1 for at in found):
            found.append(rest)
    kept: list[int] = []
    for at in sorted(found):
        if at > 0 and (not kept or at - kept[-1] >= APART * move.fps):
            kept.append(at)
    return kept


def _visits(move: Motion) -> list[int]:
    """Where the hand leaves a low visit, or ends a rise with something in the gripper."""
    height, held = move.height, _held(move)
    assert height is not None
    found: list[int] = []
    lifted = -np.inf
    turns = _turns(height, RISE)
    for low, high in ((a, b) for a, b in zip(turns[:-1], turns[1:], strict=True) if height[a] < height[b]):
        level = np.flatnonzero(height[low:high] <= height[low] + LEVEL)
        leaves = low + int(level[-1])
        top = low + int(np.flatnonzero(height[low : high + 1] >= height[high] - LEVEL)[0])
        if height[low] > LOW:
            continue
        if held[top] and held[leaves:top].mean() > 0.4:
            found.append(top)
            lifted = top
        elif low - lifted > SOON * move.fps or not held[max(low - 2, 0)]:
            found.append(leaves)
    return found


def _turns(height: np.ndarray, rise: float) -> list[int]:
    """Frames where the height turns, each `rise` or more from the one before; lowest and highest ones in turn, ends included."""
    turns, best, up = [0], 0, None
    for t, value in enumerate(height):
        if up is None:
            if abs(value - height[0]) >= rise:
                up, best = bool(value > height[0]), t
        elif (value > height[best]) == up and value != height[best]:
            best = t
        elif abs(value - height[best]) >= rise:
            turns.append(best)
            up, best = not up, t
    return [*turns, best] if up is not None else turns


def _held(move: Motion) -> np.ndarray:
    """(T,) bool: something is in the gripper."""
    if move.opening is None:
        return np.zeros(len(move.speed), bool)
    return (move.opening > HELD[0]) & (move.opening < HELD[1])


def _gripper(move: Motion) -> list[int]:
    """Where the gripper has closed, or has begun to open."""
    if move.opening is None:
        return []
    shut = move.opening < 0.5
    return (1 + np.flatnonzero(shut[1:] != shut[:-1])).tolist()


def _rests(move: Motion) -> list[int]:
    """First frames of rests."""
    brisk = float(np.quantile(move.speed, 0.9))
    still = np.concatenate([[False], move.speed[1:] < STILL * brisk, [False]]) if brisk > 0 else np.zeros(1, bool)
    edges = np.flatnonzero(still[1:] != still[:-1]) + 1
    return [int(a) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= PAUSE * move.fps]


def agreement(found: list[list[int]], true: list[list[int]], within: int) -> dict[str, float]:
    """Precision, recall and F1 of boundaries: those of an episode are matched one to one, nearest first, at most `within` frames
    apart."""
    hits = 0
    for mine, theirs in zip(found, true, strict=True):
        pairs = sorted((abs(a - b), i, j) for i, a in enumerate(mine) for j, b in enumerate(theirs) if abs(a - b) <= within)
        taken: tuple[set[int], set[int]] = set(), set()
        for _, i, j in pairs:
            if i not in taken[0] and j not in taken[1]:
                taken[0].add(i)
                taken[1].add(j)
        hits += len(taken[0])
    mine, theirs = sum(map(len, found)), sum(map(len, true))
    precision, recall = hits / mine if mine else 0.0, hits / theirs if theirs else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"found": mine, "true": theirs, "precision": precision, "recall": recall, "f1": f1}
