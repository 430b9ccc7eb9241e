"""What a robot may be told: numbers that are finite, inside its limits, and near the command before. No state, no time.

    bounds = Bounds(robot, jump={"arm": 0.1})
    commands, faults = bounds.judge(steps, before)      # steps (n, A) float32; faults [(0, "jump: arm.a by 0.6, at most 0.1")]

A chunk of few numbers is looked through, a larger one judged with a few numpy calls; words are found only for what is wrong.
`serve.guard` remembers what came before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from serve.robot import Robot
from vla.errors import DataError
from vla.resample import rotations_of
from vla.rotation import to_quat

TARGETS = ("eef_position", "joint_position")
_SLACK = 1e-3
"""Share of a range within which a number beyond its limit is rounding, and is clipped."""
_NEAR = 1e-6
"""Share of a jump, or rad of a turn, that float32 may add."""
_FEW = 256
"""Numbers of a chunk that are looked through sooner than numpy begins."""


class Unread(str):
    """What came where numbers should be: the words that say so."""


def numbers(value: Any) -> np.ndarray | Unread:
    """`value` as an array of numbers of whatever shape, or what is wrong with it. Never raises."""
    if type(value) is np.ndarray and value.dtype == np.float32:
        return value
    if value is None:
        return Unread("no action")
    if isinstance(value, Unread):
        return value
    try:
        given = np.asarray(value)
    except Exception:  # a stranger's object may raise anything when it is asked for its numbers
        given = np.array(None)
    return given if given.dtype.kind in "biuf" else Unread(f"no numbers: {type(value).__name__[:100]}")


def as_float32(given: np.ndarray) -> np.ndarray:
    """A copy in float32; what does not fit is infinite, and so found."""
    if given.dtype == np.float32:
        return given.copy()
    with np.errstate(all="ignore"):
        return given.astype(np.float32)


class Bounds:
    """Limits and jumps of one robot's action channels."""

    def __init__(self, robot: Robot, jump: Mapping[str, Any] | None = None, waive: Sequence[str] = ()) -> None:
        """See `serve.guard.Guard` for `jump` and `waive`; what is missing or senseless is in `problems`, not raised."""
        self.names = np.array(robot.names("action"))
        self._spans = robot.spans("action")
        self.rotations = [(slice(dims[0], dims[-1] + 1), form) for dims, form in rotations_of(robot)]
        self.turn: dict[int, float] = {}
        """Where an absolute rotation begins -> most rad from one step to the next; a waived one is missing."""
        self.problems = self._read_limits(tuple(waive)) + self._read_jumps(dict(jump or {}))
        low, high = self.low.astype(np.float64), self.high.astype(np.float64)  # a range as wide as float32's own would overflow
        room = np.where(np.isfinite(low), _SLACK * (high - low), 0.0)
        self._lowest, self._highest = low - room, high + room
        self._most = self.jump * (1 + _NEAR)
        most = np.finfo(np.float32).max
        self._inside = np.maximum(self.low, -most), np.minimum(self.high, most)
        """What is between these is finite, too."""
        self._moves = bool(np.isfinite(self.jump).any())
        self._ends = [bounds.tolist() for bounds in (*self._inside, self._most)]

    def _read_limits(self, waive: tuple[str, ...]) -> list[str]:
        names, problems = [c.name for c, _ in self._spans], []
        self.low, self.high = (np.full(len(self.names), v, np.float32) for v in (-np.inf, np.inf))
        for channel, dims in self._spans:
            if channel.name in waive:
                continue
            low, high = np.array(channel.low, np.float32), np.array(channel.high, np.float32)
            if not (len(low) == len(high) == len(channel.dims) and np.isfinite([*low, *high]).all() and (low < high).all()):
                problems.append(f"channel {channel.name!r} has limits {channel.low}..{channel.high}")
                continue
            self.low[dims], self.high[dims] = low, high
        return problems + [f"waive {name!r}: no such channel among {names}" for name in waive if name not in names]

    def _read_jumps(self, jump: dict[str, Any]) -> list[str]:
        problems, turned = [], {dims.start for dims, _ in self.rotations}
        self.jump = np.full(len(self.names), np.inf)
        """(A,) most change from one step to the next."""
        for channel, dims in self._spans:
            rotation = dims.start in turned
            if channel.name not in jump:
                if rotation or channel.convention in TARGETS:
                    problems.append(f"no jump for {channel.name!r}, which is an absolute target")
                continue
            if (most := jump.pop(channel.name)) is None:
                continue
            most = np.asarray(most, np.float64)
            if most.shape not in ([()] if rotation else [(), (len(channel.dims),)]) or not (most > 0).all():
                form = "one angle above 0" if rotation else "one number above 0, or one a dimension"
                problems.append(f"jump of {channel.name!r} is {most.tolist()}, not {form}")
            elif rotation:
                self.turn[dims.start] = float(most)
            else:
                self.jump[dims] = most
        return problems + [f"jump {name!r}: no such channel" for name in jump]

    # ------------------------------------------------------------------------------------------------ judging

    def clip(self, command: np.ndarray) -> np.ndarray:
        """(..., A) inside the limits."""
        return np.clip(command, self.low, self.high)

    def judge(
        self, given: np.ndarray, before: np.ndarray, first: np.ndarray | None = None, few: int | None = None
    ) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """Steps `given` (n, A) float32 after the command `before` (A,) float64, NaN where nobody knows it -> the same with
        rounding clipped, and [(step, fault)] in the order of steps. `first` (A,): factor of 1 or more on what the first step may
        change. After `few` faults only their number is told: the last pair is (-1, "and 12 more"). Commands mean something when
        there are no faults."""
        if not self.turn and 0 < given.size <= _FEW and self._nothing_wrong(given.T.tolist(), before.tolist()):
            return given, []
        with np.errstate(all="ignore"):
            told = _Told(few)
            least, most = self._inside
            commands = given if ((given >= least) & (given <= most)).all() else self._judge_limits(given, told)
            if not (self._moves or self.turn):
                return commands, told.faults()
            path = np.concatenate([before[None], commands])
            if self._moves and ((change := np.abs(path[1:] - path[:-1])) > self._most).any():
                far = change > self._most
                if first is not None:
                    far[0] = change[0] > self._most * first
                told.add(far, lambda s, d: f"jump: {self.names[d]} by {change[s, d]:.4g}, at most "
                                           f"{self.jump[d] * (first[d] if first is not None and not s else 1):.4g}")  # fmt: skip
            for dims, form in self.rotations:
                if dims.start in self.turn:
                    factor = 1.0 if first is None else float(first[dims.start])
                    self._judge_turns(path[:, dims], dims, form, factor, told)
            return commands, told.faults()

    def _nothing_wrong(self, columns: list[list[float]], before: list[float]) -> bool:
        """At first sight: every dimension is finite, inside its limits, and in all of the chunk moves no further than it may in
        one step. What is not may be right all the same."""
        if not math.isfinite(sum(map(sum, columns))):
            return False
        for column, last, low, high, most in zip(columns, before, *self._ends, strict=True):
            least, greatest = min(column), max(column)
            if not (low <= least and greatest <= high):
                return False
            if last < least:  # NaN, where nobody knows it, is neither
                least = last
            elif last > greatest:
                greatest = last
            if greatest - least > most:
                return False
        return True

    def _judge_limits(self, given: np.ndarray, told: _Told) -> np.ndarray:
        """The same steps with rounding clipped, and NaN for those that are not finite: no further fault is found in these."""
        finite = np.isfinite(given)
        if not finite.all():
            broken = np.asarray((~finite).any(1, keepdims=True))
            told.add(broken, lambda s, _: "not finite: " + ", ".join(self.names[~finite[s]]))
            given = np.where(broken, np.float32(np.nan), given)
        beyond = (given < self._lowest) | (given > self._highest)
        told.add(beyond, lambda s, d: f"limit: {self.names[d]} = {given[s, d]:.4g}, {self.low[d]:.4g}..{self.high[d]:.4g}")
        return self.clip(given)

    def _judge_turns(self, path: np.ndarray, dims: slice, form: str, factor: float, told: _Told) -> None:
        name, quats = self.names[dims.start], quaternions(path, form)
        most = np.full(len(path) - 1, self.turn[dims.start])
        most[0] *= factor
        if np.isnan(quats).any():  # NaN is what is not known, or found already; the rest is no rotation
            broken = np.asarray(np.isnan(quats).any(1) & np.isfinite(path).all(1))
            told.add(broken[1:], lambda s, _: f"no rotation: {name} ... = {path[s + 1].tolist()}")
            if broken[0]:
                told.add(np.arange(len(most)) < 1, lambda s, _: f"no rotation: {name} ... was {path[0].tolist()}")
        angle = turns(quats[1:], quats[:-1])
        told.add(angle > most + _NEAR, lambda s, _: f"jump: {name} ... turns by {angle[s]:.4g} rad, at most {most[s]:.4g}")

    def may_follow(self, step: np.ndarray, rows: np.ndarray, dims: np.ndarray) -> int:
        """Which of `rows` (m, A) float64 the command `step` (A,) may follow best, by the channels with `dims` (A,) true."""
        with np.errstate(all="ignore"):
            step = self.clip(step).astype(np.float64)
            wrong = ((np.abs(step - rows) > self._most) & dims).sum(1)
            for span, form in self.rotations:
                if dims[span.start] and (most := self.turn.get(span.start)) is not None:
                    angle = turns(quaternions(rows[:, span], form), quaternions(step[None, span], form))
                    wrong += angle > most + _NEAR
        return int(wrong.argmin())

    def near(self, a: np.ndarray, b: np.ndarray, dims: slice, factor: float) -> bool:
        """Whether a channel's `a` and `b` (d,) are within `factor` times its jump."""
        form = next((form for span, form in self.rotations if span == dims), None)
        if form is None:
            return bool((np.abs(a.astype(np.float64) - b) <= self._most[dims] * factor).all())
        angle = turns(*quaternions(np.stack([a, b]), form))
        return bool(angle <= self.turn.get(dims.start, np.inf) * factor + _NEAR)


class _Told:
    """Faults as they are found: counted, and only the first few put into words."""

    def __init__(self, few: int | None) -> None:
        self.few, self.count, self.words = few, 0, list[tuple[int, str]]()

    def add(self, wrong: np.ndarray, word: Callable[[int, int], str]) -> None:
        """`wrong` (n,) or (n, A); `word` says one of them by its step and dimension."""
        if wrong.any():
            found = np.argwhere(wrong)
            self.count += len(found)
            self.words += [(int(at[0]), word(int(at[0]), int(at[-1]))) for at in found[: self.few]]

    def faults(self) -> list[tuple[int, str]]:
        self.words.sort(key=lambda fault: fault[0])
        kept = self.words[: self.few]
        more = self.count - len(kept)
        return [*kept, (-1, f"and {more} more")] if more else kept


def quaternions(rows: np.ndarray, form: str) -> np.ndarray:
    """(n, d) of `form` -> (n, 4) unit quaternions, NaN where a row is no rotation."""
    try:
        return to_quat(rows, form)
    except DataError:
        if len(rows) == 1:
            return np.full((1, 4), np.nan)
        return np.concatenate([quaternions(row[None], form) for row in rows])


def turns(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(...) rad between unit quaternions, to about 3e-8: what `vla.rotation.angle_between` says, twenty times sooner."""
    return 2 * np.arccos(np.minimum(np.abs((a * b).sum(-1)), 1.0))
