"""The operator's station: a planner and a policy on one robot, a gate above them, and a person who is asked. No torch.

    stage = OneRobot(robot_io, planner, demonstrator=teleop)
    with Station(student, stage, Guard(robot, jump={...}), gate=Gate.load("runs/demo/policy"), recorder=recorder) as station:
        station.run("clear the table")
        snapshot = station.snapshot()                         # any thread: what goes on, and the question if one is open
        station.answer(snapshot["question"]["number"], "take_over")

A run is one `serve.control.TwoSpeed` run in the station's own thread, the only one that ever touches the robot. When the gate
says ask, hold or retreat, or the guard calls for help, a question is opened and the robot holds until a person answers: it goes
on, follows another instruction, is driven by a demonstrator, moves back, or stops. What happened around it is an incident
(`vla.handoff.incidents`), what a demonstrator did a correction, each answer a line of `answers.jsonl`. `serve/station_app.py`
shows all of it to a browser.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from serve.answering import AnswerLog, Judge
from serve.board import Board
from serve.guard import Guard
from serve.loop import Acts, Clock
from serve.planner import LONGEST, Asked
from serve.refusal import Refusal
from serve.shown import facts_of
from serve.stage import OneRobot, Stage
from serve.station_run import ENDED, Run
from vla.errors import UsageError
from vla.handoff.incidents import Recorder
from vla.prompt import clean_instruction

__all__ = ["OneRobot", "Stage", "Station"]
logger = logging.getLogger(__name__)

_IDLE = 0.25
"""Seconds between two pictures while nothing runs."""
_REST = 20.0
"""Seconds a run may take to end when the station is closed."""
_PATIENCE = 2.0
"""Seconds whoever stops a run waits for its end."""


class Station:
    """See the module. Every method from any thread; a context manager, which starts it and puts it to rest."""

    def __init__(
        self, student: Acts, stage: Stage, guard: Guard, *, gate: Judge | None = None, recorder: Recorder | None = None,
        answers: str | Path | None = None, name: str = "", hz: float | None = None, asynchronous: bool = True,
        execute: int | None = None, back: float = 2.0, grace: float = 3.0,
        clock: Callable[[Callable[[], bool]], Clock] | None = None, two_speed: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """`student`, `guard`, `hz` (default: the robot's), `asynchronous`, `execute`: as `TwoSpeed`; `two_speed`: more of its
        options. `gate`: `vla.handoff.gate.Gate`, or None for nobody to ask for doubt; a student's chunk carries `features` and
        `samples` where the gate's detector needs them. `recorder`: of the robot's spec, closed here; `answers`: the file every
        answer is appended to. `back` s of an instruction's motion a retreat undoes; `grace` s after an answer in which the gate
        is not listened to, so that a person who says go on is not asked the same at the next look. `clock(asking)`: of a run,
        for simulators. Raises `UsageError`.
        """
        if not (back > 0 and grace >= 0):
            raise UsageError("station", found=f"back {back}, grace {grace}", expected="seconds", fix="leave them out")
        self.student, self.stage, self.guard, self.gate, self.recorder = student, stage, guard, gate, recorder
        self.name, self.hz, self.asynchronous, self.execute = name, hz or guard.robot.control_hz, asynchronous, execute
        self.back, self.grace, self.two_speed = back, grace, dict(two_speed or {})
        self.clock = clock or (lambda asking: Clock())
        self.answers = AnswerLog(Path(answers)) if answers is not None else None
        self.board = Board(guard.robot.cameras)
        self.lock = threading.Lock()
        """Held for moments: by who answers, and by a run that opens or closes a question."""
        self.asked = 0
        """Questions so far."""
        self._run: Run | None = None
        self._runs = 0
        self._wanted: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="station", daemon=True)

    # ------------------------------------------------------------------------------------------------ its life

    def __enter__(self) -> Station:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the run, with the robot still; write what is left. Waits for both, for a driver that hangs twenty seconds."""
        with self.lock:
            first, self._closing, run = not self._closing, True, self._run
        if run is not None:
            run.stop()
        if first:
            self._wanted.put(None)
        if self._thread.is_alive():
            self._thread.join(_REST)
            if self._thread.is_alive():
                logger.warning("a driver, or a policy, has not come back for %g s: it is left behind", _REST)
        if first and self.recorder is not None:
            self.recorder.close()
        self.board.close()

    def _work(self) -> None:
        while True:
            try:
                run = self._wanted.get(timeout=_IDLE)
            except queue.Empty:
                self._look()
                continue
            if run is None:
                break
            run.go()
        try:
            self.stage.close()
        except Exception:  # others' drivers; there is nobody left to tell but the log
            logger.exception("the stage")

    def _look(self) -> None:
        try:
            if images := self.stage.idle(self.board.watched):
                self.board.show(images)
        except Exception:  # a camera that fails while nothing runs is found when something does
            logger.debug("a picture while nothing runs", exc_info=True)

    # ------------------------------------------------------------------------------------------------ what is asked of it

    def snapshot(self) -> dict[str, Any]:
        """As `GET /v1/station` (docs/operating.md)."""
        robot, recorder = self.guard.robot, self.recorder
        with self.lock:
            run = self._run
            now = {"number": 0, "state": "idle", "goal": "", "instruction": "", "valid_for": None, "hold": "", "step": 0,
                   "seconds": 0.0, "success": None, "error": "", "by": "",
                   "plan": {"done": [], "now": "", "remaining": [], "reason": "", "confidence": None}}  # fmt: skip
            if run is not None:
                now = run.to_json()
            question = run.question.to_json() if run is not None and run.question is not None else None
        return {
            "name": self.name,
            "robot": {"key": robot.key, "hz": self.hz, "cameras": list(robot.cameras), "action": _dimensions(self.guard)},
            "run": now, "question": question,
            "goals": list(self.stage.goals), "instructions": list(self.stage.instructions),
            "incidents": {
                "written": recorder.written if recorder else 0, "corrections": recorder.corrected if recorder else 0,
                "lost": recorder.lost if recorder else 0, "folder": str(recorder.root) if recorder else "",
            },
            "loop": facts_of((), (), 0, 0) if run is None else dict(run.loop_facts), "last": self.board.last,
        }  # fmt: skip

    def run(self, goal: str, scene: int | None = None) -> dict[str, Any]:
        """Begin a run towards `goal`; the snapshot. Raises `Refusal` (conflict) while another goes on, `VLAError` for what is no
        goal here."""
        Asked(goal)
        if len(goal) > LONGEST:
            raise UsageError("goal", found=f"{len(goal):,} characters", expected=f"at most {LONGEST:,}", fix="say it shorter")
        self.stage.check(goal, scene)
        if (before := self._run) is not None and before.state in ENDED:
            before.ended.wait(_PATIENCE)  # it is over, and about to have put away its things
        with self.lock:
            if self._closing:
                raise Refusal(
                    "unavailable", where="run", found="a station that is closed", expected="one that runs", fix="start it"
                )
            if self._run is not None and not self._run.ended.is_set():
                raise Refusal(
                    "conflict", where="run", found=f"run {self._run.number} goes on", expected="none", fix="stop it first"
                )
            self._runs += 1
            run = self._run = Run(self, self._runs, goal, scene)
            self._wanted.put(run)  # under the lock: after `close` has left its word nobody would take it up
        return self.snapshot()

    def say(self, words: str) -> dict[str, Any]:
        """A person's words to the planner of the running goal; the snapshot. Raises `Refusal` where nothing runs."""
        if not words.strip() or len(words) > LONGEST:
            raise UsageError(
                "words", found=f"{len(words):,} characters", expected=f"1 to {LONGEST:,}", fix="say something, briefly"
            )
        clean_instruction(words)  # a planner would refuse, again and again, what is none
        self._going("say").say(words)
        return self.snapshot()

    def answer(self, question: int, answer: str, instruction: str = "", by: str = "person") -> dict[str, Any]:
        """Answer the question that is open; the snapshot. Raises `Refusal`: `conflict` when it is not open any more,
        `bad_request` for an answer that is none of its own; `DataError` for an instruction that is none."""
        run = self._going("answer", question)
        with self.lock:
            said = run.answer(question, answer, instruction, by)
        asked = said.question
        if answer == "stop":
            run.stop()
        if self.answers is not None:
            self.answers.add({
                "run": run.number, "goal": run.goal, "question": asked.number, "say": asked.say, "reason": asked.reason,
                "scores": dict(asked.scores), "instruction": asked.instruction, "answer": answer, "told": said.instruction,
                "by": by,
            })  # fmt: skip
        if answer == "stop":
            run.ended.wait(_PATIENCE)
        return self.snapshot()

    def hand_back(self) -> dict[str, Any]:
        """The policy goes on in the place of whoever took over; the snapshot. Raises `Refusal` where nobody did."""
        self._going("hand_back").hand_back()
        return self.snapshot()

    def stop(self) -> dict[str, Any]:
        """End the run, if there is one; the snapshot, within two seconds whatever the robot does."""
        run = self._run
        if run is not None and not run.ended.is_set():
            run.stop()
            run.ended.wait(_PATIENCE)
        return self.snapshot()

    def _going(self, what: str, question: int | None = None) -> Run:
        run = self._run
        if run is None or run.state in ENDED:
            raise Refusal("conflict", where=what if question is None else f"question {question}", found="no run that goes on",
                          expected="one", fix="POST /v1/station/run")  # fmt: skip
        return run


def _dimensions(guard: Guard) -> list[dict[str, Any]]:
    """The action's dimensions, for plots; limits nobody gave are None."""
    units = [channel.unit for channel, dims in guard.robot.spans("action") for _ in range(dims.stop - dims.start)]
    limits = zip(guard.robot.names("action"), units, guard.low.tolist(), guard.high.tolist(), strict=True)
    return [{"name": name, "unit": unit, "low": low if abs(low) < 1e30 else None, "high": high if abs(high) < 1e30 else None}
            for name, unit, low, high in limits]  # fmt: skip
