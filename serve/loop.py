"""Plays chunks at a robot's control rate: one action a tick, a new look every few, the guard in between, and how punctual it was.

    loop = ControlLoop(policy, robot_io, hz=10, guard=Guard(...))
    report = loop.run("push the red cube left", steps=200)     # another thread may call loop.stop()
    print(report.to_json()["late_ms"])

Ticks lie on a grid of the monotonic clock, so that lateness never adds up. The policy thinks inside the tick, or with
`asynchronous=True` in a thread of its own while the chunk before is played on; the steps that passed meanwhile are skipped.

A policy may be a server (`serve.client.Client`). Its `reset()` is called when a run begins; it is told when an observation was
taken, and how many steps of its last chunk were carried out; a chunk that is a hold stops the robot until there is another.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from serve.guard import Guard, Verdict
from vla.ensemble import Ensemble
from vla.errors import UsageError, VLAError
from vla.resample import rotations_of

logger = logging.getLogger(__name__)

_KEPT = 100_000
"""Ticks whose times are remembered."""


class Acts(Protocol):
    """What a loop asks of a policy; `serve.edge.EdgePolicy` and `serve.client.Client` are."""

    def act(self, observation: Any, instruction: str, robot: str | None = None) -> Any: ...
    def steps(self, robot: str) -> tuple[int, int]: ...


class RobotIO(Protocol):
    """A robot, as its driver shows it."""

    def observe(self) -> Mapping[str, Any]:
        """`{"images": {camera: (h, w, 3) uint8}, "state": (S,) float32}`; with "time" (s on `time.monotonic`) where the driver
        knows when it was taken."""
        ...

    def act(self, action: np.ndarray) -> bool | None:
        """Carry out one action (A,) for one tick; True when there is nothing more to do."""
        ...


class Order(NamedTuple):
    """What a loop is to do in a tick."""

    instruction: str
    pause: str = ""
    """Why to hold instead, as a reason of `serve.guard.PAUSES`; empty to go on."""
    number: int = 0
    """Another one, and it is begun anew, be it the same in words."""
    command: Callable[[Mapping[str, Any]], np.ndarray | None] | None = None
    """Somebody else's hand in the policy's place: told what is seen, it says the action (A,) of this tick, None to hold. Guarded
    like any other; it must answer at once, since the loop waits for it. It goes before `pause`."""


class Clock:
    """Waits on the monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    def wait_until(self, due: float, stop: threading.Event) -> None:
        """Returns at `due`, or as soon as `stop` is set."""
        if (left := due - time.monotonic()) > 0:
            stop.wait(left)


class Hurried(Clock):
    """Never waits and is never late: for simulators, whose time is counted in steps."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def wait_until(self, due: float, stop: threading.Event) -> None:
        self._now = max(self._now, due)


class Player:
    """The chunks of one episode, one action a tick."""

    def __init__(self, execute: int, ensemble: Ensemble | None = None) -> None:
        """`execute`: ticks after which to look again. `ensemble` averages the chunks that speak of the same tick."""
        self.execute, self.ensemble = execute, ensemble
        self.step = 0
        """The tick that comes next."""
        self.delay = 0
        """The most ticks a chunk came after its observation."""
        self._looked: int | None = None
        self._start, self._actions, self._confidence = 0, np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32)

    @property
    def due(self) -> bool:
        """Whether to look now. Who answers late is asked early enough that the chunk before still lasts."""
        if self._looked is None:
            return True
        lasts = max(1, len(self._actions) + self._start - self._looked - self.delay)
        return self.step - self._looked >= (min(self.execute, lasts) if self.delay else self.execute) or not self.left

    @property
    def left(self) -> int:
        """Steps there are still to play."""
        return max(0, len(self._actions) - (self.step - self._start))

    def looking(self) -> None:
        """The observation of this tick is with the policy."""
        self._looked = self.step

    @property
    def passed(self) -> int:
        """Steps of the chunk that lie behind, the skipped ones as well."""
        return self.step - self._start

    def drop(self) -> None:
        """Nothing that was said is good any more: look again, and until then there is nothing to play."""
        self._looked, self._actions = None, self._actions[:0]
        if self.ensemble is not None:
            self.ensemble.reset()

    def unheard(self) -> None:
        """Nothing came of the last look: the next tick looks again."""
        self._looked = None

    def said(self, chunk: Any, at: int) -> None:
        """`chunk` was said of the observation of tick `at`; what lies before the present tick is skipped."""
        passed = self.step - at
        self.delay = max(self.delay, passed)
        self._looked, self._start = at, at
        self._actions, self._confidence = np.asarray(chunk.actions), np.asarray(chunk.confidence)
        if self.ensemble is not None and passed < len(self._actions):
            # As many as can be wanted before the next chunk; a long chunk's every step would cost more than the network.
            wanted = min(len(self._actions), passed + 2 * self.execute + self.delay)
            self._actions = self.ensemble(at, self._actions, wanted)

    def next(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """(action (A,), confidence (A,)) of this tick, None when nobody has spoken of it; the next tick comes."""
        at = self.step - self._start
        self.step += 1
        return (self._actions[at], self._confidence[at]) if 0 <= at < len(self._actions) else (None, None)

    def skip(self, ticks: int) -> None:
        """Ticks that passed without anything being sent."""
        self.step += ticks


@dataclass
class Report:
    """How a run of the loop went. Times in seconds, of the last 100,000 ticks."""

    period: float
    ticks: int = 0
    missed: int = 0
    """Ticks nothing was sent in, since the one before took too long."""
    looks: int = 0
    holds: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Kind of reason -> ticks held for it."""
    needs_help: str = ""
    over: bool = False
    """Whether the robot said so."""
    wall: float = 0.0
    woke: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    """From when a tick was due to when the loop was awake."""
    sent: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    """From when a tick was due to when its action was sent."""
    between: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    """From one action to the next."""
    thinking: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    """Of the policy, a look."""
    confidence: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    """Mean over a step's dimensions."""

    def add(self, other: Report) -> None:
        """Take another run of the same loop in."""
        for name in ("ticks", "missed", "looks", "holds", "wall"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("woke", "sent", "between", "thinking", "confidence"):
            getattr(self, name).extend(getattr(other, name))
        self.reasons += other.reasons

    def to_json(self) -> dict[str, Any]:
        """Counts, rates in Hz, and p50, p95, p99 and max in ms."""
        jitter = [abs(gap - self.period) for gap in self.between]
        return {
            "hz": 1 / self.period, "rate_hz": self.ticks / self.wall if self.wall else None, "ticks": self.ticks,
            "missed": self.missed, "looks": self.looks, "holds": self.holds, "reasons": dict(self.reasons),
            "needs_help": self.needs_help, "late_ms": percentiles(self.woke), "sent_ms": percentiles(self.sent),
            "jitter_ms": percentiles(jitter), "inference_ms": percentiles(self.thinking),
            "confidence": float(np.mean(self.confidence)) if self.confidence else None,
        }  # fmt: skip


def percentiles(seconds: Iterable[float]) -> dict[str, float] | None:
    """{p50, p95, p99, max} in ms; None of nothing."""
    values = np.fromiter(seconds, np.float64) * 1e3
    if not len(values):
        return None
    return {**{f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 95, 99)}, "max": round(float(values.max()), 3)}


class ControlLoop:
    """See the module. One run at a time."""

    def __init__(
        self, policy: Acts, robot_io: RobotIO, hz: float, guard: Guard, *, execute: int | None = None,
        ensemble: float | None = None, asynchronous: bool = False, clock: Clock | None = None,
        on_verdict: Callable[[Verdict], None] | None = None, orders: Callable[[], Order] | None = None,
    ) -> None:  # fmt: skip
        """`hz`: ticks a second; chunks are at the robot's own rate, and another is warned of. `execute`: ticks of a chunk played
        before the next look (default: the policy's); with `ensemble`, a decay (`vla.ensemble`), overlapping chunks are averaged.
        `guard` says which robot it is. A guard without a `deadline` is given one tick. `orders`, where somebody above decides
        what to do, is asked before each tick: nothing said of another instruction, or before a pause, is played."""
        self.policy: Any = policy
        self.io: Any = robot_io
        self.guard, self.period = guard, 1.0 / hz
        self.robot = guard.robot.key
        steps, own = policy.steps(self.robot)
        self.execute = own if execute is None else execute
        if not 1 <= self.execute <= steps:
            raise UsageError("execute", found=self.execute, expected=f"1..{steps}, the policy's chunk",
                             fix=f"leave it out for {own}")  # fmt: skip
        if ensemble is not None and self.execute == steps:
            raise UsageError("ensemble", found=f"execute {steps}, the whole chunk", expected="chunks that overlap",
                             fix=f"execute={max(1, steps // 2)}, or no ensemble")  # fmt: skip
        if abs(hz - guard.robot.control_hz) > 0.01 * guard.robot.control_hz:
            logger.warning("a loop of %g Hz plays chunks meant for %g Hz: motion is that much faster or slower", hz,
                           guard.robot.control_hz)  # fmt: skip
        if guard.deadline is None:
            guard.deadline = self.period
        self.decay, self.asynchronous, self.clock, self.on_verdict = ensemble, asynchronous, clock or Clock(), on_verdict
        if ensemble is not None:
            Ensemble(ensemble)  # refuses what is no decay before anything moves
        self._stop = threading.Event()
        self.orders, self._order = orders, Order("")
        self.report = Report(self.period)
        """Of the run that goes on, or was the last."""
        self._pending: tuple[Future[tuple[Any, float]], int, bool] | None = None
        """What is asked, at which tick, and whether it is still of use."""
        self._forget()

    def _forget(self) -> None:
        self._held = self._help = ""
        """Why the policy itself holds, and why it wants somebody to look."""
        self._executed: int | None = None
        """Steps of its last chunk that were carried out, when that is certain."""

    def stop(self) -> None:
        """End the run before its next tick; from any thread, or a signal handler."""
        self._stop.set()

    def run(self, instruction: str, steps: int | None = None) -> Report:
        """Control the robot until it says that it is done, `steps` ticks have passed, or `stop()`.

        Raises what the first look raises (a wrong camera, an empty instruction) before anything moves; later the robot holds
        instead. Whatever ends the run, the last thing sent is to stand still, unless the robot itself said it was over.
        """
        rotations = rotations_of(self.guard.robot)
        player = Player(self.execute, None if self.decay is None else Ensemble(self.decay, rotations))
        report, began = Report(self.period), time.perf_counter()
        self.report = report
        self._stop.clear()
        self._pending, self._order = None, Order(instruction)
        self._forget()
        self.guard.reset()
        if (reset := getattr(self.policy, "reset", None)) is not None:
            reset()
        with ThreadPoolExecutor(1, "policy") as thinker:
            try:
                self._first(player, report)
                began = time.perf_counter()
                self._tick(player, report, steps, thinker)
            finally:
                report.wall = time.perf_counter() - began
                thinker.shutdown(wait=False, cancel_futures=True)
                if report.ticks and not report.over and (last := self.guard.judge(None, why="stopped")).placed:
                    self.io.act(last.action)
        return report

    def _first(self, player: Player, report: Report) -> None:
        observation = self._observe()
        order = self._obey(player)
        if order.pause or order.command:
            return
        chunk, seconds = self._think(observation, self._order.instruction)
        report.thinking.append(seconds)
        report.looks += 1
        if not (self._why or self._holds(chunk, player) or self.guard.said(chunk.actions)):
            player.said(chunk, 0)

    def _obey(self, player: Player) -> Order:
        """What to do in this tick; of another instruction than before, and from before a pause, nothing is left."""
        if self.orders is not None:
            order = self.orders()
            if order.pause or order.command or (order.instruction, order.number) != (self._order.instruction, self._order.number):
                player.drop()
                self._pending = None if self._pending is None else (*self._pending[:2], False)
            self._order = order
        return self._order

    def _tick(self, player: Player, report: Report, steps: int | None, thinker: ThreadPoolExecutor) -> None:
        clock, due, last = self.clock, self.clock.now(), None
        while steps is None or player.step < steps:
            clock.wait_until(due, self._stop)
            if self._stop.is_set():
                return
            woke = clock.now()
            order = self._obey(player)
            pause = "" if order.command else order.pause
            why = self._collect(player, report)
            if player.due and self._pending is None and not pause and not order.command:
                why = self._look(player, report, thinker) or why
            action, confidence = player.next()
            if order.command:
                action, why = self._commanded(order.command)
            verdict = self.guard.judge(action, confidence=confidence, late=clock.now() - due, why=pause or why or self._held)
            if self._help and not verdict.needs_help:
                verdict = replace(verdict, needs_help=self._help)
            self._executed = None if verdict.hold or player.ensemble is not None else player.passed
            sent = clock.now()
            if verdict.placed:
                report.over = bool(self.io.act(verdict.action))
            self._note(report, verdict, confidence, woke - due, sent - due, None if last is None else sent - last)
            if report.over:
                return
            last, due = sent, due + self.period
            if (late := clock.now() - due) > self.period:  # whole ticks are gone: the grid stays, they are left out
                gone = int(late / self.period)
                report.missed += gone
                due += gone * self.period
                if self.asynchronous:  # the robot went on meanwhile; a robot that waits for the policy stood still
                    player.skip(gone)

    def _observe(self) -> Mapping[str, Any]:
        observation = self.io.observe()
        taken = observation.get("time") if isinstance(observation, Mapping) else None
        self._why = self.guard.saw(observation, 0.0 if taken is None else time.monotonic() - float(taken))
        return observation

    def _commanded(self, command: Callable[[Mapping[str, Any]], np.ndarray | None]) -> tuple[np.ndarray | None, str]:
        """(the action of whoever commands instead of the policy, or why there is none)."""
        observation = self._observe()
        if self._why:
            return None, self._why
        action = command(observation)
        if action is not None:
            self.guard.said(np.asarray(action)[None])  # what was at fault with the policy's last chunk is not so any more
        return action, "waiting: for whoever commands" if action is None else ""

    def _think(self, observation: Any, instruction: str) -> tuple[Any, float]:
        began = time.perf_counter()
        return self.policy.act(observation, instruction, self.robot), time.perf_counter() - began

    def _look(self, player: Player, report: Report, thinker: ThreadPoolExecutor) -> str:
        """Observe and ask the policy; what is wrong, if anything is. An observation the guard refuses is never asked about."""
        observation = self._observe()
        if self._why:
            return self._why
        observation, instruction = {**observation, "executed": self._executed}, self._order.instruction
        player.looking()
        answer = Future[tuple[Any, float]]()
        if self.asynchronous:
            frames = {camera: np.array(frame) for camera, frame in observation["images"].items()}  # drivers reuse their buffers
            state = None if observation.get("state") is None else np.array(observation["state"])
            answer = thinker.submit(self._think, {**observation, "images": frames, "state": state}, instruction)
        else:
            try:
                answer.set_result(self._think(observation, instruction))
            except Exception as error:
                answer.set_exception(error)
        self._pending = answer, player.step, True
        return "" if self.asynchronous else self._collect(player, report)

    def _collect(self, player: Player, report: Report) -> str:
        """Hand the chunk that is ready to the player; what the policy had to complain about, if it had."""
        if self._pending is None or not self._pending[0].done():
            return ""
        answer, at, good = self._pending
        self._pending = None
        if not good:
            self._executed = 0 if answer.exception() is None else None
            player.unheard()
            return ""
        try:
            chunk, seconds = answer.result()
        except VLAError as error:
            if getattr(error, "code", "") == "needs_help":
                self._help = error.found
            player.unheard()
            return f"policy: {error.where}: {error.found}".replace("; ", ", ")
        report.thinking.append(seconds)
        report.looks += 1
        if self._holds(chunk, player):
            return self._held
        if why := self.guard.said(chunk.actions):
            player.unheard()
        else:
            player.said(chunk, at)
            self._executed = None
        return why

    def _holds(self, chunk: Any, player: Player) -> bool:
        """Whether a policy that is a server, with a guard of its own, said to hold still."""
        held = bool(getattr(chunk, "hold", False))
        self._held = f"server: {chunk.reason}".replace("; ", ", ") if held else ""
        self._help = str(getattr(chunk, "needs_help", ""))
        if held:
            player.drop()
        return held

    def _note(self, report: Report, verdict: Verdict, confidence: Any, woke: float, sent: float, between: float | None) -> None:
        report.ticks += 1
        report.woke.append(woke)
        report.sent.append(sent)
        if between is not None:
            report.between.append(between)
        if confidence is not None:
            report.confidence.append(float(np.mean(confidence)))
        if verdict.hold:
            report.holds += 1
            report.reasons.update({part.split(":")[0] for part in verdict.reason.split("; ")})
        if verdict.needs_help and not report.needs_help:
            report.needs_help = verdict.needs_help
        if self.on_verdict is not None:
            self.on_verdict(verdict)
