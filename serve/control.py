"""Two speeds: a planner thinks about once a second, a student moves the robot at its control rate; neither waits for the other.

    loop = TwoSpeed(student, robot_io, ServerPlanner("http://gpu-box:8000", token), "touch every cube", hz=10, guard=guard)
    report = loop.run(steps=600)              # another thread: loop.say("not that one"), loop.resume(), loop.stop()

The student follows the last instruction while it is valid: `valid_for` seconds from when the planner was *asked*, since that is
what it saw. Then the robot holds ("expired") until there is another; whatever becomes of planner and network, it never moves by
an instruction that has expired. The planner is asked every second, and at once when something happens: the instruction is
finished, nothing moves any more, the policy is unsure, help is called for, a person speaks. What it says of a moment before that
is thrown away. After a finished instruction, and after a person's word, the robot waits for what the planner makes of it.

Somebody who watches may make it stand still (`hold`, until `release`), or command in the policy's place (`command`): through the
same loop and the same guard, and the planner is not asked meanwhile. `serve/station.py` does both.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from serve.desk import ROUNDING, Desk, Inline, Reply, Threaded
from serve.guard import Guard, Verdict
from serve.loop import Acts, Clock, ControlLoop, Order, Report, RobotIO, percentiles
from serve.planner import Asked, Plan, Planner
from serve.progress import Progress, Told
from vla.errors import UsageError

logger = logging.getLogger(__name__)

_KEPT = 100_000
"""Ticks that are remembered."""


class Tick(NamedTuple):
    """What happened in one control tick."""

    number: int
    at: float
    """s on the loop's clock, when it was decided what to do in it."""
    instruction: str
    """That was in force; empty before the first."""
    valid_until: float
    hold: str
    """Why nothing moved; empty when the instruction was followed."""
    by: str = ""
    """Who commanded in the policy's place."""


class Looked(NamedTuple):
    """A look of the student's at the instruction in force."""

    tick: int
    """Control tick its chunk begins at."""
    begun: int
    """Instructions begun so far: another number, another instruction, be it the same in words."""
    observation: Any
    chunk: Any


@dataclass
class TwoSpeedReport:
    """How it went. Times in seconds on the loop's clock."""

    loop: Report
    done: bool = False
    """Whether the planner said that the goal is reached."""
    asked: int = 0
    answered: int = 0
    """Plans that came in time and were followed."""
    late: int = 0
    """Plans that had expired when they came, or were not waited for any longer."""
    outdated: int = 0
    """Plans of a moment before something happened."""
    failed: Counter[str] = field(default_factory=Counter)
    """Kind of error -> questions that ended in it."""
    events: Counter[str] = field(default_factory=Counter)
    """What the planner was asked at once for -> how often."""
    followed: list[tuple[int, str]] = field(default_factory=list)
    """(tick, instruction) from which on it was in force; the newest of them, where a run has no end."""
    thinking: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    """From question to answer."""
    ticks: deque[Tick] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def to_json(self) -> dict[str, Any]:
        """Counts, the loop's own report, and p50, p95, p99 and max of a plan in ms."""
        return {
            "done": self.done, "asked": self.asked, "answered": self.answered, "late": self.late, "outdated": self.outdated,
            "failed": dict(self.failed), "events": dict(self.events), "followed": [list(pair) for pair in self.followed],
            "planning_ms": percentiles(self.thinking), "loop": self.loop.to_json(),
        }  # fmt: skip


class TwoSpeed:
    """See the module. One run at a time; `say`, `resume`, `pursue` and `stop` from any thread."""

    def __init__(
        self, student: Acts, robot_io: RobotIO, planner: Planner, goal: str, hz: float, guard: Guard, *, every: float = 1.0,
        patience: float = 15.0, progress: Progress | None = None, finished: float = 0.5, unsure: float = 0.0,
        window: int = 5, doubt: Callable[[Mapping[str, Any], Any], str] | None = None, least: float = 0.0,
        asynchronous: bool = True,
        clock: Clock | None = None, execute: int | None = None, ensemble: float | None = None,
        on_verdict: Callable[[Verdict], None] | None = None, on_plan: Callable[[Plan], None] | None = None,
        on_look: Callable[[Looked], None] | None = None, on_event: Callable[[str], None] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """`student`, `robot_io`, `hz`, `guard`, `execute`, `ensemble`: as `serve.loop.ControlLoop`. The robot may be looked at
        between two looks of the student's.

        `every` s between questions where nothing happens; `patience` s an answer is waited for. `progress` says when an
        instruction is finished (from a probability of `finished` on) or stalled; `doubt(observation, chunk)` why the policy is
        not to be trusted just now, "" if it is; so does a mean confidence of `window` chunks below `unsure`. A plan less certain
        than `least` is not followed.
        `on_plan` is told each plan that is; `on_look` each look at the instruction in force that has not finished it, before what
        was said of it is played on; `on_event` what the planner is asked at once for. `before` is called when a tick begins. All
        from the loop's thread; any of them may call `hold`, `release` or `command`, which then count for this very tick.

        Not `asynchronous`: planner and student think inside the tick, which takes no time on the clock of a simulator; a
        `serve.planner.Delayed` planner's answers are heard as much later. Raises `UsageError`.
        """
        if not (every > 0 and patience > 0 and window >= 1):
            raise UsageError("TwoSpeed", found=f"every={every}, patience={patience}, window={window}",
                             expected="seconds more than 0, at least one chunk", fix="leave them out")  # fmt: skip
        self.planner, self.goal, self.every, self.patience = planner, goal, every, patience
        self.progress, self.finished, self.doubt, self.unsure, self.least = progress, finished, doubt, unsure, least
        self.asynchronous, self._on_verdict, self.on_plan = asynchronous, on_verdict, on_plan
        self.on_look, self.on_event, self.before = on_look, on_event, before
        self._student, self._io = _Heard(student), _Seen(robot_io)
        self._loop = ControlLoop(self._student, self._io, hz, guard, execute=execute, ensemble=ensemble, clock=clock,
                                 asynchronous=asynchronous, on_verdict=self._judged, orders=self._orders)  # fmt: skip
        Asked(goal)  # refuses what is no goal before anything moves
        self._said: deque[tuple[str, str]] = deque()
        self._sure = deque[float](maxlen=window)
        self._forget()

    def _forget(self) -> None:
        self._desk: Desk = Threaded(self.planner, self.patience) if self.asynchronous else Inline(self.planner)
        self._plan, self._valid_until, self._memory = None, -np.inf, ""
        self._status, self._words, self._wait = "new", "", "a plan"
        self._epoch = self._accepted = self._tick = 0
        self._event, self._next, self._help = "begin", -np.inf, ""
        self._held, self._by, self._commands, self._anew = "", "", None, False
        self._sure.clear()
        self._student.heard.clear()
        self._io.fresh, self._at = False, 0.0

    # ------------------------------------------------------------------------------------------------ from anywhere

    @property
    def instruction(self) -> str:
        """In force, or the last that was."""
        return "" if self._plan is None else self._plan.instruction

    def say(self, words: str) -> None:
        """A person says something: the robot waits for what the planner makes of it."""
        self._said.append(("words", words))

    def pursue(self, goal: str) -> None:
        """Another goal from now on; nothing of the one before is remembered."""
        Asked(goal)
        self._said.append(("goal", goal))

    def resume(self) -> None:
        """Help was given."""
        self._said.append(("resume", ""))

    def stop(self) -> None:
        """End the run before its next tick."""
        self._loop.stop()

    @property
    def live(self) -> Report:
        """The loop's own report of the run that goes on, for callbacks."""
        return self._loop.report

    @property
    def valid_until(self) -> float:
        """s on the loop's clock: as long as the instruction may be followed."""
        return self._valid_until

    # ------------------------------------------------------------------------------------------------ from callbacks

    def hold(self, why: str) -> None:
        """Stand still from now on, whatever is planned, until `release`. From a callback."""
        self._held, self._by, self._commands = why, "", None

    def command(self, by: str, act: Callable[[Mapping[str, Any]], np.ndarray | None]) -> None:
        """From now on `by` commands in the policy's place, until `hold` or `release`: `act(observation)` says the action (A,) of
        each tick, None to hold it; it has to answer at once. From a callback."""
        self._held, self._by, self._commands = "", by, act

    def release(self, anew: bool = True) -> None:
        """The policy goes on, with the last plan as far as that is valid. `anew`: nothing that was seen of the instruction before
        counts for its progress. From a callback."""
        self._held, self._by, self._commands = "", "", None
        self._student.begun += 1
        if anew and self.progress is not None and self._plan is not None:
            self.progress.begin(self.instruction, self._loop.clock.now())

    # ------------------------------------------------------------------------------------------------ the run

    def run(self, steps: int | None = None) -> TwoSpeedReport:
        """Until the planner says that the goal is reached, the robot that it is over, `steps` ticks have passed, or `stop()`.
        Whatever ends it, the robot stands still. As `ControlLoop.run`, what is wrong with the first look of all is raised."""
        self._forget()
        self.report = TwoSpeedReport(Report(self._loop.period))
        self.report.loop = self._loop.run("", steps)
        return self.report

    def _orders(self) -> Order:
        """Asked by the loop before each tick: what to follow now. Never waits for anybody."""
        now = self._at = self._loop.clock.now()
        self._student.tick = self._tick
        if self.before is not None:
            self.before()
        self._listen()
        while self._student.heard:
            self._looked(*self._student.heard.popleft(), now)
        self._found_out(now)
        self._hear(now)
        if not (self._held or self._by) and (self._event or now + ROUNDING >= self._next):
            self._ask(now)
            self._hear(now)  # an answer may be there at once
        if self._commands is not None:
            return Order(self.instruction, "", self._student.begun, self._commands)
        if self._held:
            pause = f"asked: {self._held}"
        elif self.report.done:
            self._loop.stop()
            pause = "waiting: the goal is reached"
        elif self._wait:
            pause = f"waiting: for {self._wait}"
        else:  # an action lasts a tick, to whose end its instruction has to be valid
            valid = now + self._loop.period <= self._valid_until + ROUNDING
            pause = "" if valid else "expired: the last plan is not valid any more"
        return Order(self.instruction, pause, self._student.begun)

    def _listen(self) -> None:
        while self._said:
            what, text = self._said.popleft()
            if what == "resume":
                self._loop.guard.resume()
                if (resume := getattr(self._student.policy, "resume", None)) is not None:
                    threading.Thread(target=resume, name="resume", daemon=True).start()  # a network may be in between
                if self._status == "help":
                    self._status = "running"
                self._help = ""
                continue
            if what == "goal":
                self.goal, self._memory, self._plan, self._status = text, "", None, "new"
            self._words = text if what == "words" else ""
            self._happened(what, wait="what the planner makes of a person's words" if what == "words" else "a plan")

    def _found_out(self, now: float) -> None:
        """A judge that is asked elsewhere answers when it can; the robot does not go on until its next look."""
        heard = getattr(self.progress, "heard", None)
        if heard is None or self._plan is None or self._wait or self._held or self._by:
            return
        if heard(now) >= self.finished:
            self._happened("done", wait="what comes next")

    def _looked(self, observation: Any, chunk: Any, begun: int, tick: int, now: float) -> None:
        """The student has looked."""
        if begun != self._student.begun or self._plan is None or self._wait or self._held or self._by:
            return
        told = Told() if self.progress is None else self.progress.saw(observation, chunk, now)
        confidence = np.asarray(chunk.confidence, np.float64)
        if np.isfinite(confidence).any():  # an L1 head knows nothing of its confidence
            self._sure.append(float(np.nanmean(confidence)))
        doubt = "" if self.doubt is None else self.doubt(observation, chunk)
        unsure = len(self._sure) == self._sure.maxlen and float(np.mean(self._sure)) < self.unsure
        if told.done >= self.finished:
            self._happened("done", wait="what comes next")
        elif told.stalled and self._status != "stalled":
            self._happened("stalled")
        elif (doubt or unsure) and self._status == "running":
            self._sure.clear()
            self._happened("unsure")
        if self.on_look is not None and not self._wait:
            self.on_look(Looked(tick, begun, observation, chunk))

    def _happened(self, event: str, wait: str = "") -> None:
        """The planner has to know at once. Where the robot waits for what it says, it is not said of the time before."""
        self.report.events[event] += 1
        if self.on_event is not None:
            self.on_event(event)
        if event not in ("words", "goal"):
            self._status = event
        self._event = event
        if wait:
            self._epoch += 1
            self._wait = wait

    # ------------------------------------------------------------------------------------------------ the planner

    def _ask(self, now: float) -> None:
        if not self._desk.free(urgent=bool(self._event)):
            return
        observation = self._io.observe()
        images = observation.get("images") or {}
        if self.asynchronous:  # drivers reuse their buffers
            images = {camera: np.array(frame) if isinstance(frame, np.ndarray) else frame for camera, frame in images.items()}
        state = None if observation.get("state") is None else np.array(observation["state"], np.float32)
        asked = Asked(self.goal, images, self._memory, state, self.instruction, self._status, self._words)
        self.report.asked += 1
        self._event, self._next = "", now + self.every
        self._desk.ask(asked, now, self._epoch)

    def _hear(self, now: float) -> None:
        for reply in self._desk.heard(now):
            self.report.thinking.append(reply.seconds)
            if reply.plan is None:
                self.report.failed[reply.error] += 1
                self.report.late += reply.error == "late"
            elif reply.epoch != self._epoch or reply.number <= self._accepted:
                self.report.outdated += 1
            elif now >= reply.at + reply.plan.valid_for:
                self.report.late += 1
            elif reply.plan.confidence is not None and reply.plan.confidence < self.least:
                self.report.failed["doubtful"] += 1
            else:
                self._accept(reply, reply.plan, now)

    def _accept(self, reply: Reply, plan: Plan, now: float) -> None:
        self._accepted = reply.number
        self._valid_until, self._memory = reply.at + plan.valid_for, plan.memory
        self.report.answered += 1
        self.report.done = plan.done
        another = plan.instruction != self.instruction or self._wait or self._status == "stalled"
        if not plan.done:
            if plan.instruction != self.instruction:
                self.report.followed = [*self.report.followed[1 - _KEPT :], (self._tick, plan.instruction)]
            self._plan = plan
            # Asked again before it expires, whatever the pace.
            self._next = min(self._next, reply.at + plan.valid_for / 2)
            if another:
                self._sure.clear()
                self._student.begun += 1
                if self.progress is not None:
                    self.progress.begin(plan.instruction, now)
        self._wait, self._words, self._status = "", "", "help" if self._help else "running"
        if self.on_plan is not None:
            self.on_plan(plan)

    def _judged(self, verdict: Verdict) -> None:
        """The loop has acted, or held."""
        self.report.ticks.append(Tick(self._tick, self._at, self.instruction, self._valid_until, verdict.reason, self._by))
        self._tick += 1
        if verdict.needs_help and verdict.needs_help != self._help:
            self._happened("help")
        self._help = verdict.needs_help
        self._io.fresh = False
        if self._on_verdict is not None:
            self._on_verdict(verdict)


class _Heard:
    """The student, whose chunks are heard by who watches the progress."""

    def __init__(self, policy: Acts) -> None:
        self.policy: Any = policy
        self.heard: deque[tuple[Any, Any, int, int]] = deque(maxlen=100)
        self.begun = self.tick = 0
        """Instructions begun so far: what was seen under one says nothing of the next, be it the same in words."""
        if (reset := getattr(policy, "reset", None)) is not None:
            self.reset = reset

    def act(self, observation: Any, instruction: str, robot: str | None = None) -> Any:
        begun, tick = self.begun, self.tick
        chunk = self.policy.act(observation, instruction, robot)
        if not getattr(chunk, "hold", False):
            self.heard.append((observation, chunk, begun, tick))
        return chunk

    def steps(self, robot: str) -> tuple[int, int]:
        return self.policy.steps(robot)


class _Seen:
    """The robot, which is not asked twice in a tick what it sees."""

    def __init__(self, io: RobotIO) -> None:
        self.io = io
        self.fresh = False
        """Whether what was seen last is of this tick."""
        self._last: Mapping[str, Any] = {}

    def observe(self) -> Mapping[str, Any]:
        if not self.fresh:
            self._last, self.fresh = self.io.observe(), True
        return self._last

    def act(self, action: np.ndarray) -> bool | None:
        return self.io.act(action)
