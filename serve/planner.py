"""The slow role: goal, view and memory in, the next instruction out. No torch: whatever thinks is elsewhere.

    planner = ScriptedPlanner(["touch the red cube", "touch the blue cube"])
    plan = planner.plan(Asked("touch both", images={"front": frame}))
    plan.instruction, plan.valid_for, plan.memory      # the memory goes into the next `Asked`

A planner keeps nothing between two questions: whoever asks sends its memory along, so one planner serves many robots, an answer
that got lost costs nothing, and one that died is replaced by another. `serve/control.py` asks at about 1 Hz while a fast policy
acts on the last plan that is still valid. Elsewhere: `serve/remote_planner.py` (an OpenAI-compatible server, or our own).
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from serve.refusal import Refusal
from serve.speaking import Speaker
from serve.wire import Picture
from vla.errors import DataError, UsageError
from vla.prompt import DONE, clean_instruction, plan_prompt, progress_prompt

STATUSES = ("new", "running", "done", "stalled", "unsure", "help")
"""How the last instruction goes: there is none yet; it is followed; it is finished; nothing moves any more, or it takes too long;
the policy is not sure of itself; help was asked for."""
LONGEST = 4000
"""Characters of a memory, and of what a person said."""
MOST = 64
"""Instructions of a plan."""
VALID_FOR = 5.0
"""Seconds, where a planner was not told otherwise."""


@dataclass(frozen=True)
class Asked:
    """What a planner is asked."""

    goal: str
    images: Mapping[str, Picture] = field(default_factory=dict)
    """Camera -> what is seen now."""
    memory: str = ""
    """Of the plan before, as it was."""
    state: Any = None
    """(S,) robot units, or None."""
    last: str = ""
    """The instruction that is followed, or was."""
    status: str = "new"
    """Of `last`; one of `STATUSES`."""
    words: str = ""
    """What a person said since."""
    known: tuple[str, ...] = ()
    """The only instructions that will do; empty: the planner's own choice."""

    def __post_init__(self) -> None:
        wrong = [name for name in ("goal", "memory", "last", "words") if not isinstance(getattr(self, name), str)]
        if wrong or not self.goal.strip() or self.status not in STATUSES:
            raise DataError("question", found=f"{wrong[0]} is no text" if wrong else f"goal {self.goal[:40]!r}, {self.status!r}",
                            expected=f"a goal in words, status one of {STATUSES}", fix="say what is wanted")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a planner answered."""

    instruction: str
    """What to do next; empty when all is done."""
    remaining: tuple[str, ...] = ()
    """What it means to say after that, as far as it knows."""
    memory: str = ""
    """To be sent along with the next question."""
    done: bool = False
    """Whether the goal is reached."""
    confidence: float | None = None
    """0..1; None where nobody knows."""
    valid_for: float = VALID_FOR
    """Seconds, from when it was asked, that `instruction` may be followed."""
    reason: str = ""
    considered: tuple[tuple[str, float], ...] = ()
    """The likeliest instructions and how likely each is, where they were compared."""

    def to_json(self) -> dict[str, Any]:
        """What `plan_of` makes this plan of."""
        return {**vars(self), "remaining": list(self.remaining), "considered": [list(pair) for pair in self.considered]}


class Planner(Protocol):
    """May be asked from several threads at once. Raises `VLAError`; must come to an end."""

    def plan(self, asked: Asked) -> Plan: ...


def plan_of(entry: Any, where: str, known: Sequence[str] = (), valid_for: float | None = None) -> Plan:
    """A plan that came as JSON, believed only as far as it is one. Without `valid_for` it has to say how long it is good for.

    Raises `Refusal` (bad_answer) for anything else: a word that is unknown, a number that is none, an instruction that is none of
    `known`. What is no plan never becomes an instruction.
    """
    if not isinstance(entry, dict):
        raise nonsense(where, f"{type(entry).__name__}, no object")
    kinds: dict[str, tuple[Any, Any]] = {
        "instruction": ("", str), "remaining": ((), (list, tuple)), "memory": ("", str), "done": (False, bool),
        "confidence": (None, (int, float, type(None))), "valid_for": (valid_for, (int, float)), "reason": ("", str),
        "considered": ((), (list, tuple)),
    }  # fmt: skip
    said = {name: entry.get(name, default) for name, (default, _) in kinds.items()}
    wrong = [f"unknown {name!r}"[:60] for name in entry if name not in kinds]
    wrong += [f"{name}: {type(said[name]).__name__}" for name, (_, kind) in kinds.items() if not isinstance(said[name], kind)
              or isinstance(said[name], bool) and kind is not bool]  # fmt: skip
    if wrong:
        raise nonsense(where, ", ".join(wrong[:8]))
    if not said["done"] and not said["instruction"].strip():
        raise nonsense(where, "no instruction, and not done")
    if not 0 < said["valid_for"] <= 3600:
        raise nonsense(where, f"valid_for {said['valid_for']}")
    if said["confidence"] is not None and not 0 <= said["confidence"] <= 1:
        raise nonsense(where, f"confidence {said['confidence']}")
    if len(said["memory"]) > LONGEST or len(said["remaining"]) > MOST or len(said["considered"]) > MOST:
        raise nonsense(where, f"more than {LONGEST} characters of memory, or {MOST} instructions")
    try:
        instruction = "" if said["done"] else clean_instruction(said["instruction"])
        remaining = tuple(clean_instruction(text) for text in said["remaining"])
        considered = tuple((clean_instruction(text), float(share)) for text, share in said["considered"])
    except (DataError, TypeError, ValueError) as error:
        raise nonsense(where, str(getattr(error, "found", error))) from None
    if instruction == DONE:
        raise nonsense(where, "'done' as an instruction, and not done")
    if known and instruction and instruction not in (allowed := {clean_instruction(text) for text in known}):
        raise nonsense(where, f"instruction {instruction[:80]!r}", f"one of {len(allowed)} that are known")
    sure = None if said["confidence"] is None else float(said["confidence"])
    return Plan(instruction, remaining, said["memory"], said["done"], sure, float(said["valid_for"]),
                " ".join(said["reason"].split())[:500], considered)  # fmt: skip


def nonsense(where: str, found: str, expected: str = "a plan") -> Refusal:
    """What was said is no plan."""
    return Refusal("bad_answer", where=where, found=found[:300], expected=expected, fix="look at what the planner says")


def lines(memory: str) -> list[str]:
    """The instructions that a memory of ours says are done."""
    return [line for line in memory.splitlines() if line.strip()]


# ---------------------------------------------------------------------------------------------------- the sure one


class ScriptedPlanner:
    """Says the instructions of a list, the next one when the one before is done. Never wrong, never sees anything."""

    def __init__(self, subtasks: Sequence[str] | Mapping[str, Sequence[str]], valid_for: float = VALID_FOR) -> None:
        """`subtasks`: of every goal, or goal -> its own. Raises `DataError` for one that is no instruction."""
        goals = subtasks if isinstance(subtasks, Mapping) else {"*": subtasks}
        self._goals = {goal if goal == "*" else clean_instruction(goal): [clean_instruction(text) for text in script]
                       for goal, script in goals.items()}  # fmt: skip
        self.valid_for = valid_for

    @classmethod
    def load(cls, path: str | Path, valid_for: float = VALID_FOR) -> ScriptedPlanner:
        """From a text file, an instruction a line (`#` comments), or a JSON object goal -> list. Raises `UsageError`."""
        path = Path(path)
        try:
            text = path.read_text()
            script = json.loads(text) if path.suffix == ".json" else [
                line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]  # fmt: skip
            if isinstance(script, dict):
                script = {goal: [str(line) for line in one] for goal, one in script.items() if isinstance(one, list)}
            if not script or not isinstance(script, dict | list):
                raise ValueError("nothing in it")
            return cls(script, valid_for)
        except (OSError, UnicodeDecodeError, ValueError, DataError) as error:
            raise UsageError(path, found=str(getattr(error, "found", error))[:300],
                             expected="an instruction a line, or a JSON object goal -> list of instructions",
                             fix="write what is to be done, a line each") from error  # fmt: skip

    def plan(self, asked: Asked) -> Plan:
        script, done = self._goals.get(clean_instruction(asked.goal), self._goals.get("*")), lines(asked.memory)
        if script is None:
            raise DataError("goal", found=repr(asked.goal)[:80], expected=f"one of {sorted(self._goals)}", fix="write it down")
        if asked.status == "done" and len(done) < len(script) and clean_instruction(asked.last) == script[len(done)]:
            done.append(script[len(done)])
        memory = "\n".join(done)
        if asked.words:  # a person goes before any list
            return Plan(clean_instruction(asked.words), tuple(script[len(done) :]), memory, valid_for=self.valid_for,
                        reason="a person said so", confidence=1.0)  # fmt: skip
        left = script[len(done) :]
        if not left:
            return Plan("", (), memory, True, 1.0, self.valid_for, "all of the list is done")
        return Plan(left[0], tuple(left[1:]), memory, False, 1.0, self.valid_for, f"{len(done) + 1} of {len(script)}")


# ---------------------------------------------------------------------------------------------------- a policy's own words


class PolicyPlanner:
    """A policy that speaks, asked what to do next: the same checkpoint may plan and act (RT-2, pi0.5).

    Of instructions that are known it says the likeliest, each scored as its answer (SayCan); the confidence is its share among
    them. Else it says what it likes, and is as sure of it as the words are likely.
    """

    def __init__(
        self, speaker: Speaker, known: Sequence[str] | Callable[[], Sequence[str]] = (), *, valid_for: float = VALID_FOR,
        camera: str | None = None, finished: float = 0.8,
    ) -> None:  # fmt: skip
        """`known`: instructions the fast policy knows, or what says them; empty: anything may be said. `camera`: which picture
        it is asked about (default: the first). `finished`: how likely it has to hold it that an instruction is finished before
        it goes on by itself, from one look."""
        self.speaker, self.valid_for, self.camera, self.finished = speaker, valid_for, camera, finished
        self._known = known if callable(known) else lambda: known

    def plan(self, asked: Asked) -> Plan:
        done = lines(asked.memory)
        if asked.status == "done" and asked.last:
            done.append(clean_instruction(asked.last))
        known = [clean_instruction(text) for text in asked.known or self._known()]
        said = clean_instruction(asked.words) if asked.words.strip() else ""
        if said and said in known:
            return Plan(said, (), "\n".join(done), confidence=1.0, valid_for=self.valid_for, reason="a person said so")
        # Its prompt has no place for what a person says beside the goal; the newer of the two counts.
        question = plan_prompt(said or asked.goal, done, asked.last)
        picture = self._picture(asked.images)
        if known:
            shares = ranked(self.speaker, picture, question, [*known, DONE])
            (best, sure), reason = shares[0], f"the likeliest of {len(shares)}"
        else:
            text, likely = self.speaker.answer(picture, question)
            best, sure, shares, reason = text, math.exp(min(0.0, likely)), [], "its own words"
        if asked.status == "running" and asked.last and not said and best != (last := clean_instruction(asked.last)):
            # It means to go on before anybody told it that the last one is finished: then that has to be so, and is remembered.
            yes = dict(ranked(self.speaker, picture, progress_prompt(last), ["yes", "no"]))["yes"]
            if yes >= self.finished:
                done.append(last)
            else:
                best, sure, reason = last, 1 - yes, f"{best!r} comes next, but {last!r} is not finished"[:200]
        done_now = best.strip().lower() == DONE
        entry = {"instruction": best, "memory": "\n".join(done), "done": done_now, "confidence": sure, "reason": reason}
        return replace(plan_of(entry, "policy", valid_for=self.valid_for), considered=tuple(shares[:5]))

    def _picture(self, images: Mapping[str, Picture]) -> Picture | None:
        if self.camera is not None and self.camera not in images:
            raise DataError("images", found=f"cameras {sorted(images)}", expected=repr(self.camera), fix="send its picture")
        return images[self.camera] if self.camera is not None else next(iter(images.values()), None)


def ranked(speaker: Speaker, picture: Picture | None, question: str, candidates: Sequence[str]) -> list[tuple[str, float]]:
    """(candidate, its share in 0..1), the likeliest first: a softmax over the log-likelihoods of whole answers."""
    candidates = list(dict.fromkeys(candidates))
    scores = np.asarray(speaker.score(picture, question, candidates), np.float64)
    if scores.shape != (len(candidates),) or not np.isfinite(scores).all():
        raise nonsense("policy", f"scores {scores.tolist()[:8]}", f"{len(candidates)} finite ones")
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    return [(candidates[i], float(shares[i])) for i in order]


class Grounded:
    """What another planner proposes, weighed by what a policy holds likely here (SayCan: one says what helps, one what works)."""

    def __init__(self, planner: Planner, speaker: Speaker, known: Sequence[str], weight: float = 1.0) -> None:
        """`weight`: how much the policy's log-likelihoods count."""
        self.planner, self.speaker, self.known, self.weight = planner, speaker, tuple(map(clean_instruction, known)), weight
        if not self.known:
            raise UsageError("Grounded", found="no instruction", expected="what the fast policy knows", fix="known=[...]")

    def plan(self, asked: Asked) -> Plan:
        plan = self.planner.plan(asked)
        if plan.done:
            return plan
        known = [clean_instruction(text) for text in asked.known] or list(self.known)
        done = lines(plan.memory)
        shares = dict(ranked(self.speaker, next(iter(asked.images.values()), None), plan_prompt(asked.goal, done, asked.last),
                             known))  # fmt: skip
        # Not certain of anything: a planner that is sure and wrong would leave the policy no say.
        sure = min(0.99, 0.5 if plan.confidence is None else plan.confidence) if plan.instruction in known else 0.0
        prior = {text: sure if text == plan.instruction else (1 - sure) / max(1, len(known) - (sure > 0)) for text in known}
        weighed = {text: math.log(max(prior[text], 1e-9)) + self.weight * math.log(max(shares[text], 1e-12)) for text in known}
        top = max(weighed.values())
        total = sum(math.exp(value - top) for value in weighed.values())
        order = sorted(((text, math.exp(value - top) / total) for text, value in weighed.items()), key=lambda pair: -pair[1])
        (best, share), said = order[0], plan.instruction
        reason = plan.reason if best == said else f"{said!r} was proposed, the policy holds {best!r} likelier. {plan.reason}"
        return replace(plan, instruction=best, remaining=plan.remaining if best == said else (), confidence=share,
                       reason=reason[:500], considered=tuple(order[:5]))  # fmt: skip


# ---------------------------------------------------------------------------------------------------- a bad network


class Delayed:
    """A planner across a slow network: the answer comes `ms` later, or between two such numbers, drawn anew each time."""

    def __init__(self, planner: Planner, ms: float | tuple[float, float], seed: int = 0) -> None:
        self.planner, self._random = planner, random.Random(seed)
        self._ms = ms if isinstance(ms, tuple) else (ms, ms)

    def plan(self, asked: Asked) -> Plan:
        time.sleep(self.seconds())
        return self.planner.plan(asked)

    def seconds(self) -> float:
        """The next delay. Who counts time in steps asks `planner` itself, and lets its answer wait as long."""
        return self._random.uniform(*self._ms) / 1e3
