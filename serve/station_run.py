"""One run of a station: the two-speed loop with a gate above it, questions and what becomes of their answers. No torch.

Everything here but `answer`, `say`, `hand_back` and `stop` happens in the run's own thread, between two ticks; those four only
leave word, and the next tick finds it. So no browser, disk or person is ever waited for, and the robot holds while a question is
open.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from serve.answering import ANSWERS, Answer, Led, Question, Say
from serve.board import Board
from serve.control import Looked, TwoSpeed
from serve.guard import PAUSES, Guard, Verdict
from serve.planner import Plan, lines
from serve.refusal import Refusal
from serve.retreat import Trail
from serve.shown import Shown, facts_of, finite
from serve.stage import Scene
from vla.errors import VLAError
from vla.handoff.incidents import POLICY
from vla.prompt import clean_instruction

logger = logging.getLogger(__name__)

PERSON, RETREAT = "person", "retreat"
"""Who commands in the policy's place."""
_ASKED = "as a person asked"
ENDED = ("done", "stopped", "failed")
_SAID = 5.0
"""Seconds between two complaints about a planner."""
_RECENT = 600
"""Ticks that the loop's figures are about."""
_EVERY = 5
"""Ticks after which they are reckoned again."""


class Run:
    """See the module."""

    def __init__(self, station: Any, number: int, goal: str, scene: int | None) -> None:
        self.station, self.number, self.goal, self.wanted = station, number, goal, scene
        self.state, self.error, self.success = "running", "", None
        self.question: Question | None = None
        self.ended = threading.Event()
        self._stopping = False
        self._word = deque[Any]()
        """What was left for the next tick: `Answer`s, words to the planner, None to take the robot back from a demonstrator."""
        self._board: Board = station.board
        self._guard: Guard = station.guard
        self._loop: TwoSpeed | None = None
        self._scene: Scene | None = None
        self._trail = Trail(self._guard.robot, station.back)
        self._way: list[np.ndarray] = []
        self._left = 0
        """Ticks a way back may still take."""
        self._begun: int | None = 0
        self._calm = -np.inf
        """s on the loop's clock: until then the gate's last answer stands."""
        self._bad = False
        self._told, self._fresh = "", 0
        """The instruction that is followed, and the last tick before it was, or in which the robot waited."""
        self._failed, self._said = 0, -np.inf
        """Plans that came to nothing, and until when that is not said again."""
        self._doubt: dict[str, float] = {}
        self._threshold: float | None = None
        self._plan: dict[str, Any] = {"done": [], "now": "", "remaining": [], "reason": "", "confidence": None}
        self._gaps, self._thinking = deque[float](maxlen=_RECENT), deque[float](maxlen=100)
        self._thought = 0
        self.by = ""
        self._step, self._hold, self._seconds = 0, "waiting: for the robot", 0.0
        self._valid: float | None = None
        self.loop_facts: dict[str, Any] = facts_of((), (), 0, 0)

    # ------------------------------------------------------------------------------------------------ from anywhere

    def to_json(self) -> dict[str, Any]:
        """`run` of `GET /v1/station`."""
        loop = self._loop
        return {
            "number": self.number, "state": self.state, "goal": self.goal, "instruction": loop.instruction if loop else "",
            "valid_for": self._valid, "hold": self._hold, "step": self._step, "seconds": round(self._seconds, 2),
            "success": self.success, "error": self.error, "plan": self._plan, "by": self.by or POLICY,
        }  # fmt: skip

    def answer(self, number: int, answer: str, instruction: str, by: str) -> Answer:
        """Under the station's lock. Raises `Refusal`, `DataError`; then the question stays open."""
        question = self.question
        if question is None or question.number != number:
            now = "none" if question is None else f"question {question.number}"
            raise Refusal("conflict", where=f"question {number}", found=f"{now} open", expected="the question that is open",
                          fix="look at GET /v1/station")  # fmt: skip
        if answer not in question.answers:
            raise Refusal("bad_request", where="answer", found=repr(answer)[:40], expected=f"one of {list(question.answers)}",
                          fix="choose one of them")  # fmt: skip
        if instruction and answer != "instruct":
            raise Refusal("bad_request", where="instruction", found=f"one beside {answer!r}", expected="one with 'instruct'",
                          fix="leave it out")  # fmt: skip
        said = Answer(question, answer, clean_instruction(instruction) if answer == "instruct" else "", by)
        self._word.append(said)  # before the question is closed: a tick that finds neither would open another
        self.question, self.state, self._hold = None, "running", "waiting: for the next tick"
        return said

    def say(self, words: str) -> None:
        """A person's words to the planner, at the next tick: there may be no loop yet, while a scene is made."""
        self._word.append(words)

    def hand_back(self) -> None:
        """Raises `Refusal` where nobody drives but the policy."""
        if self.by != PERSON:
            raise Refusal("conflict", where="hand_back", found="the policy drives", expected="somebody who took over",
                          fix="answer a question with take_over first")  # fmt: skip
        self._word.append(None)

    def stop(self) -> None:
        """End it at the next tick, with the robot still."""
        self._stopping = True
        if (loop := self._loop) is not None:
            loop.stop()

    # ------------------------------------------------------------------------------------------------ the run

    def go(self) -> None:
        """From its beginning to its end, in the thread the robot belongs to. Raises nothing."""
        self._board.say("run", state="running", goal=self.goal)
        over = False
        try:
            over = self._play()
        except VLAError as error:
            self.error = f"{error.where}: {error.found}"[:500]
        except Exception as error:  # drivers, planners and policies are written by others as well
            logger.exception("run %d", self.number)
            self.error = f"{type(error).__name__}: {error}"[:500]
        state = "failed" if self.error else "done" if over else "stopped"
        with self.station.lock:  # who answers from now on is told that it is too late; who did so before is heard
            self.question = None
        try:
            self._end(state)
        except Exception as error:  # a camera, a disk: the run is over all the same, and whoever watches hears what is lost
            logger.exception("the end of run %d", self.number)
            self._board.say("event", what="not kept", reason=f"{type(error).__name__}: {error}"[:300])
        with self.station.lock:
            self.state, self._hold, self.by, self._valid = state, "", "", None
        told = {} if self.success is None else {"success": self.success}
        self._board.say("run", state=state, goal=self.goal, **told, **({"error": self.error} if self.error else {}))
        self.ended.set()

    def _play(self) -> bool:
        """Whether it came to an end by itself."""
        station = self.station
        scene = self._scene = station.stage.begin(self.goal, self.wanted)
        self.led, self.io = Led(scene.planner), Shown(scene.io, self._board, self.recorded)
        if station.recorder is not None:
            station.recorder.begin(self.goal, scene.task, scene.seed)
        if station.gate is not None:
            station.gate.reset()
        self._clock = station.clock(lambda: self.question is not None)
        loop = self._loop = TwoSpeed(
            station.student, self.io, self.led, self.goal, station.hz, self._guard, progress=scene.progress, clock=self._clock,
            asynchronous=station.asynchronous, execute=station.execute, on_verdict=self._judged, on_plan=self._planned,
            on_look=self._looked, on_event=lambda what: self._board.say("event", what=what), before=self._before,
            **station.two_speed,
        )  # fmt: skip
        self._began = self._clock.now()
        report = loop.run()
        self.success = getattr(scene.io, "success", None)
        if report.done and self.success is False:
            self.error = "the planner says that the goal is reached, the robot's own judge does not"
        elif report.loop.over and self.success is False:
            self.error = getattr(scene.io, "verdict", "") or "it ended without success"
        return report.done or report.loop.over

    def _end(self, state: str) -> None:
        """What is left to keep and to show; a camera or a disk may fail at it."""
        while self._word:  # an answer that ended the run, between its last tick and here
            if isinstance(word := self._word.popleft(), Answer):
                self._heard(word)
        if state == "failed":
            self._incident("failure", self.error)
        if (recorder := self.station.recorder) is not None:
            recorder.end(success=state == "done")
        if self._loop is not None:
            self.loop_facts = facts_of(self._gaps, self._thinking, self._loop.live.missed, self._loop.live.ticks)
        if state == "done" and (last := self._plan["now"]):  # the robot said that it is over before the planner was asked again
            self._plan = {**self._plan, "done": [*self._plan["done"], last], "now": "", "reason": ""}
            self._board.say("plan", **self._plan)
        if self._scene is not None:
            self.io.publish(always=True)

    # ------------------------------------------------------------------------------------------------ between two ticks

    def _before(self) -> None:
        """A tick begins."""
        assert self._loop is not None
        while self._word:
            word = self._word.popleft()
            if word is None:
                self._take_back()
            elif isinstance(word, str):
                self._loop.say(word)
            else:
                self._apply(word)
        if self._stopping:
            self._loop.hold("to stop")
            self._loop.stop()

    def _apply(self, said: Answer) -> None:
        loop, scene, gate = self._loop, self._scene, self.station.gate
        assert loop is not None and scene is not None
        question = said.question
        self._heard(said)
        if said.answer == "stop":
            self.stop()
            return
        if gate is not None:
            gate.answered()
        if question.say == "help" or self._guard.needs_help:
            loop.resume()
        self._calm, self._begun = self._clock.now() + self.station.grace, None
        if said.answer != "go_on" and (helped := getattr(scene.io, "helped", None)) is not None:
            helped()
        match said.answer:
            case "instruct":
                self.led.order(said.instruction)
                loop.say(said.instruction)
                loop.release(anew=False)  # it begins anew with what the planner makes of it
            case "take_over":
                assert scene.demonstrator is not None
                scene.demonstrator.begin(loop.instruction or self.goal)
                self._trail.clear()  # the way back began where the policy stopped
                self.by = PERSON
                loop.command(PERSON, self._demonstrate)
            case "retreat":
                self._go_back(_ASKED, question)
            case _:
                loop.release()

    def _heard(self, said: Answer) -> None:
        """An answer is shown and kept."""
        told = {"instruction": said.instruction} if said.instruction else {}
        self._board.say("answer", **{"question": said.question.number, "answer": said.answer, "by": said.by, **told})
        self._incident("handoff", f"answered: {said.answer}", quiet=True, question=said.question.number, answer=said.answer,
                       asked=said.question.reason, by=said.by, **told)  # fmt: skip

    def _demonstrate(self, observation: Mapping[str, Any]) -> np.ndarray | None:
        assert self._loop is not None and self._scene is not None and self._scene.demonstrator is not None
        try:
            action = self._scene.demonstrator.act(observation)
        except VLAError as error:
            self._ask("help", f"who drives gave up: {error.found}"[:300])
            return None
        except Exception as error:
            logger.exception("who drives")
            self._ask("help", f"who drives failed: {type(error).__name__}: {error}"[:300])
            return None
        if action is None:
            self._drove("finished")
            if self.station.recorder is not None:  # it succeeded at what it was asked for, whatever becomes of the rest
                self.station.recorder.end(success=True)
                self.station.recorder.begin(self.goal, self._scene.task, self._scene.seed)
        return action

    def _take_back(self) -> None:
        if self.by == PERSON:
            self._drove("taken back")

    def _drove(self, how: str) -> None:
        """Nobody drives in the policy's place any more."""
        assert self._loop is not None
        self.by, self._begun = "", None
        self._calm = self._clock.now() + self.station.grace
        self._trail.clear()
        self._board.say("event", what="handed back", reason=how)
        self._loop.release(anew=False)  # what was done while somebody else drove counts

    def _go_back(self, reason: str, question: Question) -> None:
        """Back first, then the question, with the robot where it is safe."""
        assert self._loop is not None and self._scene is not None
        self._way = [] if self._scene.retreat is not None else self._trail.back()
        self._left = 3 * max(len(self._way), round(10 * self.station.hz) if self._scene.retreat is not None else 0)
        self.by = RETREAT

        def back(observation: Mapping[str, Any]) -> np.ndarray | None:
            try:
                action = self._back(observation)
            except Exception as error:  # of a driver's own way: as for who drives, a person is asked where the robot is
                logger.exception("the way back")
                self._ask("help", f"the way back failed: {type(error).__name__}: {error}"[:300], question)
                return None
            if action is None:
                why = question.reason if question.say == RETREAT and reason != _ASKED else reason
                self._ask(RETREAT, f"moved back: {why}", question)
            return action

        self._loop.command(RETREAT, back)

    def _back(self, observation: Mapping[str, Any]) -> np.ndarray | None:
        """The next action of the way back, None when it is over."""
        assert self._scene is not None
        self._left -= 1
        if self._left < 0:
            return None
        if self._scene.retreat is not None:
            return self._scene.retreat(observation)
        if not self._way:
            return None
        action = self._guard.reach(self._way[0])
        if self._left < len(self._way) or np.allclose(action, self._way[0], atol=1e-5):
            self._way.pop(0)
        return action

    # ------------------------------------------------------------------------------------------------ what the loop tells

    def _looked(self, look: Looked) -> None:
        gate, another = self.station.gate, look.begun != self._begun and self._begun is not None
        self._begun = look.begun
        if another:
            self._trail.clear()  # no way back leads to before the instruction: it might undo the one before
        if gate is None:
            return
        if another:
            gate.reset()
        try:
            ruling = gate.look(look.chunk, look.tick, getattr(look.chunk, "features", None), getattr(look.chunk, "samples", None))
        except Exception as error:  # a gate that cannot judge is no reason to go on
            logger.exception("the gate")
            self._ask("help", f"the gate cannot judge: {getattr(error, 'found', error)}"[:300])
            return
        value, self._threshold = finite(ruling.value), finite(ruling.threshold)
        self._doubt = {} if value is None else {ruling.score: value}
        if self._clock.now() < self._calm:
            return
        scores = {name: score for name, one in ruling.scores.items() if (score := finite(one)) is not None}
        asked = Question(0, ruling.say, ruling.reason, ruling.score, value, self._threshold, scores=scores)
        if value is None:  # of actions that are no numbers, say: nothing is above a threshold then, and nothing is fine
            self._ask("help", f"the gate cannot judge: {ruling.score} is {ruling.value}"[:300], asked)
        elif ruling.say == "fine":
            return
        elif ruling.say == RETREAT:
            self._incident("handoff", f"{RETREAT}: {ruling.reason}", scores=dict(asked.scores))
            self._go_back(ruling.reason, asked)
        else:
            self._ask(ruling.say, ruling.reason, asked)

    def _ask(self, say: Say, reason: str, about: Question | None = None) -> None:
        """Open a question: from now on the robot holds."""
        assert self._loop is not None and self._scene is not None
        possible = {"take_over": self._scene.demonstrator is not None,
                    "retreat": self._scene.retreat is not None or len(self._trail) > 0}  # fmt: skip
        about = about or Question(0, say, reason)
        self._loop.hold(reason)
        self.by = ""
        with self.station.lock:
            self.station.asked += 1
            question = self.question = Question(
                self.station.asked, say, reason, about.score, about.value, about.threshold, self._loop.instruction,
                tuple(answer for answer in ANSWERS if possible.get(answer, True)), about.scores,
            )  # fmt: skip
            self.state = "asking"
        self._incident("hold" if say == "hold" else "handoff", f"{say}: {reason}", question=question.number,
                       scores=dict(about.scores))  # fmt: skip
        self._board.say("question", **{name if name != "number" else "question": value
                                       for name, value in question.to_json().items()})  # fmt: skip
        self._board.say("run", state="asking", goal=self.goal)

    def _incident(self, kind: Any, reason: str, quiet: bool = False, **facts: Any) -> None:
        if self.station.recorder is None:
            return
        self.station.recorder.incident(kind, reason, **{name: value for name, value in facts.items() if value != {}})
        if not quiet:
            self._board.say("incident", what=kind, reason=reason)

    def _planned(self, plan: Plan) -> None:
        self._plan = {"done": lines(plan.memory)[-64:], "now": plan.instruction, "remaining": list(plan.remaining)[:64],
                      "reason": plan.reason, "confidence": finite(plan.confidence)}  # fmt: skip
        self._board.say("plan", **self._plan)

    def _judged(self, verdict: Verdict) -> None:
        """A tick is over."""
        loop, live = self._loop, self._loop.live if self._loop else None
        assert loop is not None and live is not None
        moved = not verdict.hold
        if moved and not self.by:
            self._trail.add(self.io.state, verdict.action)
        paused = verdict.hold and verdict.reason.split(":")[0] in PAUSES
        if paused or loop.instruction != self._told:
            self._told, self._fresh = loop.instruction, live.ticks
        # The policy's first look at another instruction is waited for: that is no incident.
        first = verdict.reason == "no action" and live.ticks - self._fresh <= self.station.hz
        bad = verdict.hold and not paused and not first
        if bad and not self._bad:
            self._incident("hold", verdict.reason)
        self._bad = bad
        now = self._clock.now()
        if (failed := sum(loop.report.failed.values())) != self._failed and now >= self._said:
            self._failed, self._said = failed, now + _SAID
            self._board.say("event", what="no plan", reason=", ".join(f"{n} x {kind}" for kind, n in loop.report.failed.items()))
        # A server that asked for help says so until it has heard of it.
        if verdict.needs_help and self.question is None and not self._word and now >= self._calm:
            self._ask("help", verdict.needs_help)
        sure = live.confidence[-1] if moved and not self.by and live.confidence else None
        self._step, self._hold = live.ticks, verdict.reason
        self._seconds = now - self._began
        left = loop.valid_until - now
        self._valid = round(max(0.0, left), 3) if np.isfinite(left) else None
        self._board.tick({
            "step": live.ticks, "action": [round(float(v), 5) for v in verdict.action] if moved else None,
            "confidence": None if sure is None or not np.isfinite(sure) else round(sure, 4), "doubt": dict(self._doubt),
            "threshold": self._threshold, "hold": verdict.reason, "by": self.by or POLICY,
        })  # fmt: skip
        if live.between:
            self._gaps.append(abs(live.between[-1] - live.period))
        if len(loop.report.thinking) and loop.report.asked != self._thought:
            self._thought = loop.report.asked
            self._thinking.append(loop.report.thinking[-1])
        if live.ticks % _EVERY == 1:
            self.loop_facts = facts_of(self._gaps, self._thinking, live.missed, live.ticks)

    def recorded(self, seen: Mapping[str, Any], action: np.ndarray) -> None:
        """Called before each action is carried out."""
        recorder = self.station.recorder
        if recorder is None or self.question is not None:  # nothing moves while a question is open: there is nothing to keep
            return
        told = self._loop.instruction if self._loop is not None else ""
        recorder.tick(seen, action, PERSON if self.by == PERSON else POLICY, told or self.goal)
