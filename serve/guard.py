"""The robot contract: whatever a policy says, what is sent on is finite and inside the limits, or the robot holds still.

    guard = Guard(embodiment, jump={"arm": 0.1})
    guard.saw(observation, age=0.02)                    # before the policy is asked
    guard.said(chunk.actions)                           # after it answered
    verdict = guard.judge(action, confidence=c, late=0.001)    # once a control tick; `verdict.action` is what to send

Nothing is repaired: an action that is not finite, beyond a limit or too far from the last one is not sent at all, and the
verdict says why. To hold is `vla.resample.standstill`: displacements and velocities 0, targets and grippers as they last were.
Holds that repeat, or low confidence that lasts, ask for help; from then on the robot holds until `resume()`.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.robot import Channel, Robot
from vla.errors import DataError, UsageError
from vla.resample import rotations_of, standstill
from vla.rotation import angle_between, to_quat

_SLACK = 1e-3
"""Share of a range within which a number beyond its limit is rounding, and is clipped."""
_TARGETS = ("eef_position", "joint_position")
_MOTION = ("eef_delta", "joint_delta", "joint_velocity")


@dataclass(frozen=True)
class Verdict:
    """What to do in this control tick."""

    action: np.ndarray
    """(A,) float32, robot units: finite, inside the limits, whatever came in."""
    hold: bool
    reason: str
    """Why it holds; empty when it does not."""
    needs_help: str
    """Why somebody should look; empty when nobody has to."""
    placed: bool
    """False before the guard was shown where the robot is: nothing may be sent then, since targets would be guesses."""


class Guard:
    """Judges observations, chunks and actions of one robot. Not thread-safe: one control loop owns it."""

    def __init__(
        self, embodiment: Robot | Mapping[str, Any], *, jump: Mapping[str, float | Sequence[float] | None] | None = None,
        waive: Sequence[str] = (), max_age: float | None = 0.5, repeats: int | None = 3, deadline: float | None = None,
        longest: int | None = None, window: int = 20, most_holds: int = 10, confidence: float = 0.0,
        start: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        """`embodiment`: a `Robot` or its JSON, whose action channels carry limits, or are named in `waive`.

        `jump`: channel -> most change from one tick to the next, one number or one a dimension, in robot units; for a channel
        that is a rotation the angle in rad. Channels that are absolute targets need one, or None to waive it by name.
        `max_age` s of an observation when it is used; `repeats`: observations in a row that may equal the one before (a camera
        that froze), None where nothing ever trembles (a simulator); `deadline` s an action may be late; `longest`: most steps of
        a chunk. Help is asked for after `most_holds` holds among `window` ticks, and when the mean confidence of a whole window
        is below `confidence`. `start` (A,): where the robot stands, where its state does not tell.
        Raises `UsageError` naming all that is missing.
        """
        self.robot = embodiment if isinstance(embodiment, Robot) else Robot.from_json(embodiment, "guard: embodiment")
        self.max_age, self.repeats, self.deadline, self.longest = max_age, repeats, deadline, longest
        self.window, self.most_holds, self.confidence = window, most_holds, confidence
        self._spans = self.robot.spans("action")
        self._rotations = [(slice(dims[0], dims[-1] + 1), form) for dims, form in rotations_of(self.robot)]
        self._motion = np.concatenate([np.full(len(c.dims), c.convention.startswith(_MOTION)) for c, _ in self._spans])
        self._from_state = self._find_in_state()
        problems = self._read_limits(tuple(waive)) + self._read_jumps(dict(jump or {})) + self._read_start(start)
        if window < 1 or most_holds < 1:
            problems.append(f"window {window}, most_holds {most_holds}: at least 1 each")
        if problems:
            raise UsageError("guard", found="; ".join(problems),
                             expected="limits of every action channel and a jump of every absolute one, or each waived by name",
                             fix="complete the embodiment, or pass waive=[...], jump={channel: ...}, start=[...]")  # fmt: skip
        self.reset()

    # ------------------------------------------------------------------------------------------------ set-up

    def _read_limits(self, waive: tuple[str, ...]) -> list[str]:
        names, problems = [c.name for c, _ in self._spans], []
        self.low, self.high = (np.full(self.robot.action_dim, v, np.float32) for v in (-np.inf, np.inf))
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
        problems, turned = [], {dims.start: form for dims, form in self._rotations}
        self._jump, self._turn = np.full(self.robot.action_dim, np.inf), dict[int, float]()
        for channel, dims in self._spans:
            rotation = dims.start in turned
            if channel.name not in jump:
                if rotation or channel.convention in _TARGETS:
                    problems.append(f"no jump for {channel.name!r}, which is an absolute target")
                continue
            if (most := jump.pop(channel.name)) is None:
                continue
            most = np.asarray(most, np.float64)
            if most.shape not in ([()] if rotation else [(), (len(channel.dims),)]) or not (most > 0).all():
                form = "one angle above 0" if rotation else "one number above 0, or one a dimension"
                problems.append(f"jump of {channel.name!r} is {most.tolist()}, not {form}")
            elif rotation:
                self._turn[dims.start] = float(most)
            else:
                self._jump[dims] = most
        return problems + [f"jump {name!r}: no such channel" for name in jump]

    def _read_start(self, start: Sequence[float] | None) -> list[str]:
        self._start = None
        if start is not None:
            given = np.asarray(start, np.float32)
            if given.shape != self.low.shape or not np.isfinite(given).all():
                return [f"start has shape {given.shape}"]
            self._start = np.clip(given, self.low, self.high)
            return []
        rotations = {dims.start for dims, _ in self._rotations}
        return [f"the state does not tell where {c.name!r} is: start" for c, dims in self._spans
                if (c.convention in _TARGETS or dims.start in rotations) and dims.start not in self._from_state]  # fmt: skip

    def _find_in_state(self) -> dict[int, slice]:
        """Where an action channel begins -> the state's channel that tells where it is now: same convention, name if possible."""
        found = {}
        for channel, dims in self._spans:
            fits = [(c.name == channel.name, at) for c, at in self.robot.spans("state") if _same(c, channel)]
            if fits and not channel.convention.startswith(_MOTION):
                found[dims.start] = max(fits, key=lambda fit: fit[0])[1]
        return found

    # ------------------------------------------------------------------------------------------------ judging

    def reset(self) -> None:
        """Another episode begins: nothing is known of where the robot is."""
        with np.errstate(invalid="ignore"):  # a waived channel has no middle
            middle = np.nan_to_num(self.low / 2 + self.high / 2)
        self._last = np.clip(np.where(self._motion, 0.0, middle), self.low, self.high).astype(np.float32)
        self._known = self._motion.copy()
        self._placed = False
        if self._start is not None:
            self._last, self._placed, self._known = self._start.copy(), True, np.ones_like(self._motion)
        self._seen = self._said = ""
        self._picture, self._same = -1, 0
        self.resume()

    def resume(self) -> None:
        """Help was given: holds and confidences are counted anew."""
        self.needs_help = ""
        self._holds, self._sure = deque[bool](maxlen=self.window), deque[float](maxlen=self.window)

    def saw(self, observation: Any, age: float = 0.0) -> str:
        """Judge an observation of `age` s before the policy is asked about it. Returns what is wrong, "" if nothing is; the
        robot holds until a better one comes."""
        self._seen = self._judge_observation(observation, age)
        if not self._seen and not self._placed:
            self._place(np.asarray(observation["state"], np.float32) if self._from_state else None)
        return self._seen

    def _judge_observation(self, observation: Any, age: float) -> str:
        try:
            self.robot.check_observation(observation, "observation")
        except DataError as error:
            return f"observation: {error.found}".replace("; ", ", ")  # which parts the reasons of a verdict
        digest = zlib.crc32(np.asarray(observation.get("state"), np.float32).tobytes() if self.robot.state else b"")
        for camera in self.robot.cameras:
            digest = zlib.crc32(np.ascontiguousarray(observation["images"][camera]).data, digest)
        self._same = self._same + 1 if digest == self._picture else 0
        self._picture = digest
        if self.max_age is not None and not age <= self.max_age:  # NaN is no age
            return f"stale: an observation of {age:.3f} s, at most {self.max_age:g}"
        if self.repeats is not None and self._same > self.repeats:
            return f"repeated: {self._same + 1} observations that are one and the same"
        return ""

    def _place(self, state: np.ndarray | None) -> None:
        """The robot holds where it stands; a gripper nobody sees counts as half open until the first command."""
        for start, at in self._from_state.items():
            dims = slice(start, start + at.stop - at.start)
            assert state is not None
            self._last[dims], self._known[dims] = np.clip(state[at], self.low[dims], self.high[dims]), True
        self._placed = True

    def said(self, chunk: Any) -> str:
        """Judge the form of a chunk (n, A) before it is played. Returns what is wrong, "" if nothing is; the robot holds until a
        better one comes."""
        shape = np.shape(chunk) if isinstance(chunk, np.ndarray) else ()
        self._said = ""
        if len(shape) != 2 or shape[1] != self.robot.action_dim or not shape[0]:
            self._said = f"chunk: shape {shape}, not (n, {self.robot.action_dim})"
        elif self.longest is not None and shape[0] > self.longest:
            self._said = f"overlong: a chunk of {shape[0]} steps, at most {self.longest}"
        return self._said

    def judge(self, action: Any, *, confidence: Any = None, late: float = 0.0, why: str = "") -> Verdict:
        """What to send in this tick. `action` (A,) in robot units, None when there is none; `confidence` of it in 0..1, one
        number or one a dimension; `late` s after its time; `why`: what is known to be wrong already."""
        reasons = [text for text in (why, self._seen, self._said) if text]
        if not self._placed:
            reasons.append("nothing seen yet")
        if self.deadline is not None and not late <= self.deadline:
            reasons.append(f"deadline: {late * 1e3:.1f} ms late, at most {self.deadline * 1e3:g}")
        command = self._last
        if action is None:
            reasons.append("no action")
        else:
            command, faults = self._judge_action(action)
            reasons += faults
        self._count(bool(reasons or self.needs_help), confidence)
        held = bool(reasons or self.needs_help)  # the window may have ended with this very tick
        if held:
            command = np.clip(standstill(self.robot, self._last), self.low, self.high)
        else:
            self._known[:] = True
        self._last = command.astype(np.float32)
        reason = "; ".join(dict.fromkeys(reasons)) or (f"waiting for help: {self.needs_help}" if held else "")
        return Verdict(self._last.copy(), held, reason, self.needs_help, self._placed)

    def _judge_action(self, action: Any) -> tuple[np.ndarray, list[str]]:
        try:
            given = np.asarray(action)
        except (TypeError, ValueError, OverflowError):
            given = np.array(None)
        if given.dtype.kind not in "biuf":
            return self._last, [f"no numbers: {type(action).__name__}"]
        with np.errstate(all="ignore"):
            command = given.astype(np.float32)
        if command.shape != self.low.shape:
            return self._last, [f"shape {command.shape}, not ({self.robot.action_dim},)"]
        names = self.robot.names("action")
        if not (finite := np.isfinite(command)).all():
            return self._last, ["not finite: " + ", ".join(np.array(names)[~finite])]
        with np.errstate(invalid="ignore"):  # a waived channel's range is infinite
            room = np.where(np.isfinite(self.low), _SLACK * (self.high - self.low), 0.0)
        beyond = (command < self.low - room) | (command > self.high + room)
        faults = [f"limit: {names[d]} = {command[d]:.4g}, {self.low[d]:.4g}..{self.high[d]:.4g}" for d in np.flatnonzero(beyond)]
        command = np.clip(command, self.low, self.high)
        change = np.abs(command.astype(np.float64) - self._last)
        for d in np.flatnonzero(self._known & (change > self._jump * (1 + 1e-6))):
            faults.append(f"jump: {names[d]} by {change[d]:.4g}, at most {self._jump[d]:.4g}")
        for dims, form in self._rotations:
            most = self._turn.get(dims.start)
            if most is None or not self._known[dims.start]:
                continue
            try:
                angle = float(angle_between(to_quat(self._last[dims], form), to_quat(command[dims], form)))
            except DataError:
                faults.append(f"no rotation: {names[dims.start]} ... = {command[dims].tolist()}")
                continue
            if not angle <= most + 1e-6:
                faults.append(f"jump: {names[dims.start]} ... turns by {angle:.4g} rad, at most {most:.4g}")
        return command, faults

    def _count(self, held: bool, confidence: Any) -> None:
        self._holds.append(held)
        try:
            sure = np.asarray(confidence)
        except (TypeError, ValueError):
            sure = np.array(None)
        if sure.dtype.kind in "biuf" and np.isfinite(sure).any():  # an L1 head says NaN: it knows nothing of its confidence
            self._sure.append(float(sure[np.isfinite(sure)].astype(np.float64).mean()))
        if self.needs_help:
            return
        if sum(self._holds) >= self.most_holds:
            self.needs_help = f"held {sum(self._holds)} times in {len(self._holds)} ticks"
        elif len(self._sure) == self.window and (mean := float(np.mean(self._sure))) < self.confidence:
            self.needs_help = f"confidence {mean:.2f} over {self.window} ticks, at least {self.confidence:g}"


def _same(state: Channel, action: Channel) -> bool:
    return state.convention == action.convention and len(state.dims) == len(action.dims)
