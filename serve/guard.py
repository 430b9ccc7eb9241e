"""The robot contract: whatever a policy says, what is sent on is finite and inside the limits, or the robot holds still.

    guard = Guard(embodiment, jump={"arm": 0.1})
    guard.saw(observation, age=0.02)                    # before the policy is asked
    guard.said(chunk.actions)                           # after it answered
    verdict = guard.judge(action, confidence=c, late=0.001)    # once a control tick; `verdict.action` is what to send

A server, which answers with whole chunks, judges them whole instead: `verdict = guard.chunk(chunk.actions, chunk.confidence)`
after `guard.saw(...)`, and sends `verdict.actions`.

Nothing is repaired: an action that is not finite, beyond a limit or too far from the last one is not sent at all, and the
verdict says why. To hold is `vla.resample.standstill`: displacements and velocities 0, targets and grippers as they last were.
Holds that repeat, or low confidence that lasts, ask for help; from then on the robot holds until `resume()`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.bounds import TARGETS, Bounds, Unread, as_float32, numbers, quaternions
from serve.robot import Channel, Robot
from serve.seen import LONGEST_WORDS, Seen, see
from vla.errors import UsageError
from vla.resample import standstill

_MOTION = ("eef_delta", "joint_delta", "joint_velocity")
_FEW = 4
"""Faults of a chunk that are put into words."""
PAUSES = ("expired", "waiting", "asked")
"""Kinds of `why` that are nobody's fault: for the moment there is nothing to follow, or somebody was asked. Such ticks hold and
are not counted."""
SETTINGS = ("max_age", "repeats", "deadline", "longest", "window", "most_holds", "confidence")
"""Attributes of a guard that may be changed while it judges."""


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


@dataclass(frozen=True)
class ChunkVerdict:
    """What to answer with; as `Verdict`, for a chunk."""

    actions: np.ndarray
    """(n, A) float32: the chunk as it was, or as many steps that hold still."""
    hold: bool
    reason: str
    needs_help: str
    placed: bool


class Guard:
    """Judges observations, chunks and actions of one robot. Not thread-safe: one control loop, or one session, owns it.

    `on_event(guard, what, given, answer)`, where set, is told of each `saw`, `said`, `judge`, `chunk`, `reset` and `resume` after
    it: what came in, as it was read, and what was answered. It must not raise. `serve.audit` sets it."""

    def __init__(
        self, embodiment: Robot | Mapping[str, Any], *, jump: Mapping[str, float | Sequence[float] | None] | None = None,
        waive: Sequence[str] = (), max_age: float | None = 0.5, repeats: int | None = 3, deadline: float | None = None,
        longest: int | None = None, window: int = 20, most_holds: int = 10, confidence: float = 0.0,
        start: Sequence[float] | None = None, first_jump: float = 3.0,
    ) -> None:  # fmt: skip
        """`embodiment`: a `Robot` or its JSON, whose action channels carry limits, or are named in `waive`.

        `jump`: channel -> most change from one tick to the next, one number or one a dimension, in robot units; for a channel
        that is a rotation the angle in rad. Channels that are absolute targets need one, or None to waive it by name.
        `max_age` s of an observation when it is used; `repeats`: observations in a row that may equal the one before, pictures
        and state, None where nothing ever trembles (a simulator); one that differs from the one before in nothing but pixels
        where no glance falls may count as the first of a row (`serve/seen.py`). `deadline` s an action may be late; `longest`:
        most steps of a chunk. Help is asked for after `most_holds` holds among `window` ticks, and when the mean confidence of a
        whole window is below `confidence`. `start` (A,): where the robot stands, where its state does not tell. `first_jump`: how
        many jumps the first step of a chunk may be from where the robot is seen, since an arm trails behind its targets; see
        `chunk`.
        Raises `UsageError` naming all that is missing.
        """
        self.robot = embodiment if isinstance(embodiment, Robot) else Robot.from_json(embodiment, "guard: embodiment")
        self.max_age, self.repeats, self.deadline, self.longest = max_age, repeats, deadline, longest
        self.window, self.most_holds, self.confidence, self.first_jump = window, most_holds, confidence, first_jump
        self.on_event: Callable[[Guard, str, dict[str, Any], Any], None] | None = None
        self._bounds = Bounds(self.robot, jump, waive)
        self.low, self.high = self._bounds.low, self._bounds.high
        self._spans = self.robot.spans("action")
        self._motion = np.concatenate([np.full(len(c.dims), c.convention.startswith(_MOTION)) for c, _ in self._spans])
        self._find_in_state()
        problems = self._bounds.problems + self._read_start(start)
        if window < 1 or most_holds < 1:
            problems.append(f"window {window}, most_holds {most_holds}: at least 1 each")
        if not first_jump >= 1:
            problems.append(f"first_jump {first_jump}: at least 1")
        if problems:
            raise UsageError("guard", found="; ".join(problems),
                             expected="limits of every action channel and a jump of every absolute one, or each waived by name",
                             fix="complete the embodiment, or pass waive=[...], jump={channel: ...}, start=[...]")  # fmt: skip
        most = {name: most if most is None else np.asarray(most, np.float64).tolist() for name, most in (jump or {}).items()}
        self._given = {"jump": most, "waive": list(waive), "first_jump": first_jump,
                       "start": None if start is None else np.asarray(start, np.float64).tolist()}  # fmt: skip
        self.reset()

    # ------------------------------------------------------------------------------------------------ set-up

    def to_json(self) -> dict[str, Any]:
        """What `Guard(entry["robot"], **entry["options"])` makes this guard of, as it was before it judged anything."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        return {"robot": self.robot.to_json(), "options": {**self._given, **settings}}

    def _read_start(self, start: Sequence[float] | None) -> list[str]:
        self._start, rotations = None, self._bounds.rotations
        if start is not None:
            given = np.asarray(start, np.float32)
            if given.shape != self.low.shape or not np.isfinite(given).all():
                return [f"start has shape {given.shape}"]
            self._start = self._bounds.clip(given)
            return [f"start is no rotation where {self.robot.names('action')[dims.start]} begins" for dims, form in rotations
                    if np.isnan(quaternions(self._start[None, dims], form)).any()]  # fmt: skip
        turned, told = {dims.start for dims, _ in rotations}, {dims.start for dims, _, _ in self._in_state}
        return [f"the state does not tell where {c.name!r} is: start" for c, dims in self._spans
                if (c.convention in TARGETS or dims.start in turned) and dims.start not in told]  # fmt: skip

    def _find_in_state(self) -> None:
        """Which channels of the state tell where an action channel is: same convention, same name if possible.

        Where a robot *is* can be asked of the state before each chunk (`_poses`: positions, angles, rotations). What a gripper
        was *told* cannot: it stays open on what it holds, and to tell it what is measured would let go.
        """
        forms = {dims.start: form for dims, form in self._bounds.rotations}
        self._in_state: list[tuple[slice, slice, str]] = []
        """(dims of the action, dims of the state, form if it is a rotation)."""
        for channel, dims in self._spans:
            fits = [(c.name == channel.name, at) for c, at in self.robot.spans("state") if _same(c, channel)]
            if fits and not channel.convention.startswith(_MOTION):
                self._in_state.append((dims, max(fits, key=lambda fit: fit[0])[1], forms.get(dims.start, "")))
        targets = {dims.start for c, dims in self._spans if c.convention in TARGETS}
        self._poses = [told for told in self._in_state if told[2] or told[0].start in targets]
        posed, placed = np.zeros((2, self.robot.action_dim), bool)
        for kind, channels in ((posed, self._poses), (placed, self._in_state)):
            for dims, _, _ in channels:
                kind[dims] = True
        self._turned = [(at, form) for _, at, form in self._poses if form]
        self._first_posed, self._first_placed = (np.where(kind, self.first_jump, 1.0) for kind in (posed, placed))
        bounded = np.isfinite(self._bounds.jump)
        bounded[list(self._bounds.turn)] = True
        self._seam = bounded & ~posed
        """(A,) whose first change in a chunk is measured from the last one."""
        self._all = np.ones_like(self._motion)
        self._seams, self._stops = bool(self._seam.any()), bool((self._seam & self._motion).any())
        self._rest = standstill(self.robot, np.zeros(self.robot.action_dim, np.float32))

    def reach(self, target: np.ndarray) -> np.ndarray:
        """As far towards the action `target` (A,) as one tick may go after what was sent last: inside the limits and within a
        jump of it. Rotations are left as they are."""
        last, jump = self._last.astype(np.float64), np.nan_to_num(self._bounds.jump, nan=np.inf)
        for dims, _ in self._bounds.rotations:
            jump[dims] = np.inf
        return self._bounds.clip(last + np.clip(np.asarray(target, np.float64) - last, -jump, jump)).astype(np.float32)

    # ------------------------------------------------------------------------------------------------ judging

    def reset(self) -> None:
        """Another episode begins: nothing is known of where the robot is."""
        with np.errstate(invalid="ignore"):  # a waived channel has no middle
            middle = np.nan_to_num(self.low / 2 + self.high / 2)
        self._last = self._bounds.clip(np.where(self._motion, 0.0, middle)).astype(np.float32)
        self._known = self._motion.copy()
        self._placed = self._measured = False
        if self._start is not None:
            self._last, self._placed, self._known = self._start.copy(), True, self._all
        self._seen = self._said = ""
        self._sums, self._same = (-1, None), 0
        self._state: np.ndarray | None = None
        """The newest good state, if it is newer than the last command that was passed."""
        self._spent = False
        """Whether a command was passed since the last observation."""
        self._trail: tuple[np.ndarray, np.ndarray] | None = None
        """What came before the last chunk (A,) float64, NaN where unknown, and the chunk (n, A); None when `_last` is certain."""
        self._where: tuple[np.ndarray, bool] | None = None
        """`_whereabouts`, found while the policy is asked."""
        self._earlier = np.zeros((0, 0))
        """(m, A): all that may have come before it."""
        self._steps, self._executed = 1, None
        self._forgive()
        self._tell("reset", {}, None)

    def resume(self) -> None:
        """Help was given: holds and confidences are counted anew."""
        self._forgive()
        self._tell("resume", {}, None)

    def _forgive(self) -> None:
        self.needs_help = ""
        self._holds, self._sure = deque[bool](maxlen=self.window), deque[float](maxlen=self.window)

    def saw(self, observation: Any, age: float = 0.0, executed: int | None = None) -> str:
        """Judge an observation of `age` s before the policy is asked about it. Returns what is wrong, "" if nothing is; the
        robot holds until a better one comes. `executed`: how many steps of the last chunk were carried out; see `chunk`."""
        return self.judge_seen(self.see(observation), age, executed)

    def see(self, observation: Any) -> Seen:
        """What there is to judge in an observation. Changes nothing."""
        return see(self.robot, observation, self._turned, None if self.repeats == 0 else self._sums[0])

    def judge_seen(self, seen: Seen, age: float = 0.0, executed: int | None = None) -> str:
        """`saw`, where `see` has looked already."""
        self._seen, self._spent = self._judge_seen(seen, age), False
        told = _steps(executed)
        self._executed = None if told == -1 else told
        if told == -1:
            self._seen = "; ".join(filter(None, [self._seen, "executed: no number of steps"]))
        if not self._seen:
            self._state = seen.state
            if not self._placed:
                self._place()
        self._where = self._whereabouts()
        self._tell("saw", {"seen": seen, "age": age, "executed": told}, self._seen)
        return self._seen

    def _judge_seen(self, seen: Seen, age: float) -> str:
        if seen.problem:
            return seen.problem
        self._same = self._same + 1 if seen.again(*self._sums) else 0
        self._sums = seen.glance, seen.whole
        if self.max_age is not None and not age <= self.max_age:  # NaN is no age
            return f"stale: an observation of {age:.3f} s, at most {self.max_age:g}"
        if self.repeats is not None and self._same > self.repeats:
            return f"repeated: {self._same + 1} observations that are one and the same"
        return ""

    def _place(self) -> None:
        """The robot holds where it stands; a gripper nobody sees counts as half open until the first command."""
        for dims, at, _ in self._in_state:
            assert self._state is not None
            self._last[dims], self._known[dims] = np.clip(self._state[at], self.low[dims], self.high[dims]), True
        self._placed = self._measured = True

    def said(self, chunk: Any) -> str:
        """Judge the form of a chunk (n, A) before it is played. Returns what is wrong, "" if nothing is; the robot holds until a
        better one comes."""
        shape = np.shape(chunk) if isinstance(chunk, np.ndarray) else ()
        self._said = self._judge_shape(shape)
        self._tell("said", {"shape": shape}, self._said)
        return self._said

    def _judge_shape(self, shape: tuple[int, ...]) -> str:
        if len(shape) != 2 or shape[1] != self.robot.action_dim or not shape[0]:
            return f"chunk: shape {shape}, not (n, {self.robot.action_dim})"
        if self.longest is not None and shape[0] > self.longest:
            return f"overlong: a chunk of {shape[0]} steps, at most {self.longest}"
        return ""

    def judge(self, action: Any, *, confidence: Any = None, late: float = 0.0, why: str = "") -> Verdict:
        """What to send in this tick. `action` (A,) in robot units, None when there is none; `confidence` of it in 0..1, one
        number or one a dimension; `late` s after its time; `why`: what is known to be wrong already."""
        given, sure, why = numbers(action), _mean(confidence), why[:LONGEST_WORDS]
        if not isinstance(given, Unread):
            told = given.shape == self.low.shape
            given = as_float32(given) if told else Unread(f"shape {given.shape}, not ({self.robot.action_dim},)")
        reasons, command = self._wrong_already(why, late, self._said), self._last
        paused = why.split(":")[0] in PAUSES and isinstance(given, Unread)
        if isinstance(given, Unread):
            reasons += [] if paused else [given]
        else:
            before = np.where(self._known, self._last.astype(np.float64), np.nan)
            (command,), faults = self._bounds.judge(given[None], before)
            reasons += [fault for _, fault in faults]
        held, reason = self._conclude(reasons, sure, "ticks", counted=not (paused and len(reasons) == 1))
        if held:
            command = self._bounds.clip(standstill(self.robot, self._last))
        else:
            self._measured = False
            self._passed()
        self._last, self._trail, self._where = command.astype(np.float32), None, None
        verdict = Verdict(self._last.copy(), held, reason, self.needs_help, self._placed)
        self._tell("judge", {"action": given, "confidence": sure, "late": late, "why": why}, verdict)
        return verdict

    def chunk(self, actions: Any, confidence: Any = None, *, late: float = 0.0, why: str = "") -> ChunkVerdict:
        """What to answer with, for who answers with chunks: `actions` (n, A) in robot units, all of it or none. One fault in one
        step, counted from 0, and the answer is n steps (`longest`, where n cannot be read) that hold still. `confidence`, `late`,
        `why` as in `judge`; a chunk that is held counts as one hold. Every chunk needs an observation of its own.

        Each step is judged after the step before. Before the first nobody here knows which steps of the last chunk were carried
        out, so:
        - Positions, angles and rotations the state tells are measured from the newest state, and may be `first_jump` jumps away:
          an arm that follows trails behind its target.
        - The rest (grippers, velocities, what no state tells) must be within a jump of one step of the last chunk, the same step
          for all of them, or of the command before it; velocities also of standing still, as a client does whose steps ran out.
          A gripper never told anything may do anything. `executed`, which `saw` was told, leaves one step of these: a client
          whose state does not tell its targets should say it.
        A hold keeps poses at the command they had where that is certain (`executed`, or a hold before) and within `first_jump`
        jumps of the state, so that an arm that sags is not lowered by every hold, and else where the state sees them; the rest
        as in the last step.
        """
        given, sure, why = numbers(actions), _mean(confidence), why[:LONGEST_WORDS]
        if not isinstance(given, Unread):
            given = Unread(text) if (text := self._judge_shape(given.shape)) else as_float32(given)
        reasons = self._wrong_already(why, late, "")
        if self._spent:
            reasons.append("unseen: no observation since the last chunk")
        self._measured &= self._trail is None or self._executed == 0
        rows, certain = self._where or self._whereabouts()
        self._where = None
        steps = (self.longest or self._steps) if isinstance(given, Unread) else len(given)
        if isinstance(given, Unread):
            commands = before = np.zeros(0)
            reasons.append(given)
        else:
            before, first = self._before(rows, given[0])
            commands, faults = self._bounds.judge(given, before, first, _FEW)
            reasons += _numbered(faults)
        held, reason = self._conclude(reasons, sure, "chunks")
        if held:
            self._last, self._trail, self._known = self._stand(rows[0], certain), None, ~np.isnan(rows[0])
            commands = np.repeat(self._last[None], steps, 0)
        else:
            self._passed()
            self._last, self._trail, self._earlier = commands[-1].copy(), (before, commands.copy()), rows
        self._steps = steps
        verdict = ChunkVerdict(commands, held, reason, self.needs_help, self._placed)
        self._tell("chunk", {"actions": given, "confidence": sure, "late": late, "why": why}, verdict)
        return verdict

    def _whereabouts(self) -> tuple[np.ndarray, bool]:
        """The commands (m, A) the robot may be at, NaN where unknown, the likeliest first, and whether it is known which."""
        if self._trail is None:
            return np.where(self._known, self._last.astype(np.float64), np.nan)[None], True
        if self._executed == 0:
            return self._earlier, len(self._earlier) == 1
        before, commands = self._trail
        path = np.concatenate([before[None], commands])
        return (path[::-1], False) if self._executed is None else (path[[min(self._executed, len(path) - 1)]], True)

    def _before(self, rows: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The command (A,) a chunk that begins with `step` comes after, NaN where unknown, and the factors on its jumps."""
        if self._stops:
            rows = np.concatenate([rows, np.where(self._motion, self._rest, rows)])
        likeliest = self._bounds.may_follow(step, rows, self._seam) if self._seams and len(rows) > 1 else 0
        before = rows[likeliest].copy()
        if self._state is not None:
            for dims, at, form in self._poses:
                before[dims] = self._state[at] if form else np.clip(self._state[at], self.low[dims], self.high[dims])
        return before, self._first_placed if self._measured else self._first_posed

    def _stand(self, row: np.ndarray, certain: bool) -> np.ndarray:
        """The command (A,) that holds still after `row`; see `chunk`."""
        last = np.where(np.isnan(row), self._last, row).astype(np.float32)
        if self._state is not None:
            for dims, at, _ in self._poses:
                seen = np.clip(self._state[at], self.low[dims], self.high[dims])
                if not (certain and self._bounds.near(last[dims], seen, dims, self.first_jump)):
                    last[dims] = seen
        return self._bounds.clip(standstill(self.robot, last)).astype(np.float32)

    def _passed(self) -> None:
        """What was said is passed on."""
        self._known = self._all
        self._state, self._spent = None, True

    def _wrong_already(self, why: str, late: float, said: str) -> list[str]:
        reasons = [text for text in (why, self._seen, said) if text]
        if not self._placed:
            reasons.append("nothing seen yet")
        if self.deadline is not None and not late <= self.deadline:
            reasons.append(f"deadline: {late * 1e3:.1f} ms late, at most {self.deadline * 1e3:g}")
        return reasons

    def _conclude(self, reasons: list[str], sure: float | None, unit: str, counted: bool = True) -> tuple[bool, str]:
        """Whether to hold, and why."""
        if counted:
            self._holds.append(bool(reasons or self.needs_help))
        if sure is not None:
            self._sure.append(sure)
        if not self.needs_help:
            if sum(self._holds) >= self.most_holds:
                self.needs_help = f"held {sum(self._holds)} times in {len(self._holds)} {unit}"
            elif len(self._sure) == self.window and (mean := self._mean_sure()) < self.confidence:
                self.needs_help = f"confidence {mean:.2f} over {self.window} {unit}, at least {self.confidence:g}"
        held = bool(reasons or self.needs_help)  # the window may have ended with this very one
        return held, "; ".join(dict.fromkeys(reasons)) or (f"waiting for help: {self.needs_help}" if held else "")

    def _mean_sure(self) -> float:
        """Of a window; infinite where none of it is anywhere near too low, since to average costs more than to look."""
        near = self.confidence + 1e-6 * (1 + abs(self.confidence))
        return float(np.mean(self._sure)) if not min(self._sure) > near else math.inf

    def _tell(self, what: str, given: dict[str, Any], answer: Any) -> None:
        if self.on_event is not None:
            self.on_event(self, what, given, answer)


def _same(state: Channel, action: Channel) -> bool:
    return state.convention == action.convention and len(state.dims) == len(action.dims)


def _steps(executed: Any) -> int | None:
    """None when nobody said, -1 for nonsense."""
    if executed is None:
        return None
    count = isinstance(executed, int | np.integer) and not isinstance(executed, bool) and executed >= 0
    return min(int(executed), 1 << 31) if count else -1


def _mean(confidence: Any) -> float | None:
    """Of what is finite in it; None when nothing is. An L1 head says NaN: it knows nothing of its confidence."""
    sure = numbers(confidence)
    if not isinstance(sure, Unread) and sure.dtype == np.float32 and sure.size:  # of few numbers: their sum overflows nothing
        total = sum(sure.reshape(-1).tolist())
        if math.isfinite(total):
            return total / sure.size
    if isinstance(sure, Unread) or not (finite := np.isfinite(sure)).any():
        return None
    with np.errstate(over="ignore"):
        mean = float(sure[finite].astype(np.float64).mean())
    return mean if np.isfinite(mean) else None


def _numbered(faults: list[tuple[int, str]]) -> list[str]:
    """The kind stays in front, as in the reasons of a verdict."""
    said: list[str] = []
    for step, text in faults:
        if step < 0:
            said[-1] += f", {text}"
        else:
            said.append(text.replace(": ", f": step {step}, ", 1))
    return said
