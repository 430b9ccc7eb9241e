"""A question to a person, what may be answered, and what becomes of an instruction a person gave. No torch.

question = Question(3, "ask", "learned: 2.1, above 1.4", instruction="push the red cube left")
led = Led(planner)                       # a planner, but a person's own instruction goes before it until it is finished
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Protocol

from serve.planner import Asked, Plan, Planner
from vla.errors import DataError, UsageError
from vla.prompt import clean_instruction

logger = logging.getLogger(__name__)

Say = Literal["ask", "hold", "retreat", "help"]
ANSWERS = ("go_on", "instruct", "take_over", "retreat", "stop")
"""go_on: the policy goes on; instruct: it does so under a person's instruction; take_over: a demonstrator drives; retreat: back a
little, and asked again; stop: the run ends."""


@dataclass(frozen=True)
class Question:
    """The robot holds until it is answered."""

    number: int
    say: Say
    """What the gate said; `help` where the guard, or who drives, called for somebody."""
    reason: str
    score: str = ""
    """Detector it is by."""
    value: float | None = None
    threshold: float | None = None
    instruction: str = ""
    """That was in force."""
    answers: tuple[str, ...] = ANSWERS
    """Those possible here."""
    scores: Mapping[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)

    def to_json(self) -> dict[str, Any]:
        """As `GET /v1/station` says it."""
        return {
            "number": self.number, "say": self.say, "reason": self.reason, "score": self.score, "value": self.value,
            "threshold": self.threshold, "instruction": self.instruction, "seconds": round(time.monotonic() - self.since, 2),
            "answers": list(self.answers),
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What a person said to a question."""

    question: Question
    answer: str
    instruction: str = ""
    by: str = "person"


class Judge(Protocol):
    """What a station asks of a gate; `vla.handoff.gate.Gate` is one, and `Drill`."""

    def look(self, chunk: Any, step: int | None = None, features: Any = None, samples: Any = None) -> Any:
        """What to do after a look, as `vla.handoff.gate.Ruling`, in finite numbers. Whatever it raises stops the robot and calls
        for somebody."""
        ...

    def reset(self) -> None:
        """A run, or another instruction, begins."""
        ...

    def answered(self) -> None:
        """Somebody has answered: what was said before counts no more."""
        ...


class Drill:
    """A gate that asks every so many looks, whatever it sees: to practise, and to see a station at work."""

    needs = ""

    def __init__(self, every: int) -> None:
        """Raises `UsageError` for less than one look."""
        if every < 1:
            raise UsageError("drill", found=every, expected="at least 1 look", fix="drill=20")
        self.every, self._looks = every, 0

    def reset(self) -> None:
        """Looks are counted over a whole run."""

    def answered(self) -> None:
        self._looks = 0

    def look(self, chunk: Any, step: int | None = None, features: Any = None, samples: Any = None) -> Any:
        self._looks += 1
        asks, looks = self._looks > self.every, float(self._looks)
        return SimpleNamespace(
            say="ask" if asks else "fine", score="drill", value=looks, threshold=float(self.every), scores={"drill": looks},
            reason=f"a drill, every {self.every} looks" if asks else "",
        )  # fmt: skip


class Led:
    """A planner, but a person goes before it: an instruction a person gave is followed until it is finished or stalled.

    Other planners forget what a person said with their next answer. One run's."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self._lock = threading.Lock()
        self._ordered = ""

    def order(self, instruction: str) -> str:
        """Follow this from the next question on; as it will be followed. Raises `DataError` for what is none."""
        ordered = clean_instruction(instruction)
        with self._lock:
            self._ordered = ordered
        return ordered

    def plan(self, asked: Asked) -> Plan:
        with self._lock:
            ordered = self._ordered
        words = _cleaned(asked.words)
        if ordered and words not in ("", ordered):
            ordered = self._forget(ordered)
        if ordered and asked.last == ordered and asked.status in ("done", "stalled"):
            ordered = self._forget(ordered)
        if ordered:
            return Plan(ordered, (), asked.memory, confidence=1.0, reason="a person said so")
        plan = self.planner.plan(asked)
        if words and not plan.done and plan.instruction == words:
            self.order(plan.instruction)
            return replace(plan, reason=plan.reason or "a person said so")
        return plan

    def _forget(self, ordered: str) -> str:
        with self._lock:
            if self._ordered == ordered:
                self._ordered = ""
        return ""


def _cleaned(words: str) -> str:
    """As an instruction; empty where it is none."""
    try:
        return clean_instruction(words) if words.strip() else ""
    except DataError:
        return ""


class AnswerLog:
    """An append-only file of JSON lines: every answer, durable before whoever answered hears of it."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self.problem = ""
        """Why the first line that could not be written was not."""

    def add(self, line: Mapping[str, Any]) -> None:
        """A full disk stops nobody: see `problem`."""
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a") as file:
                    file.write(json.dumps({"time": round(time.time(), 3), **line}, allow_nan=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except (OSError, ValueError) as error:
                if not self.problem:
                    logger.warning("answers are not kept in %s: %s", self.path, error)
                self.problem = self.problem or f"{type(error).__name__}: {error}"
