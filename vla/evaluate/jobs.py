"""Which episodes an evaluation runs: one `Job` per episode, for the policy and for every matched control.

A success rate alone does not say why a policy succeeds. Each control takes one explanation away (it saw nothing, it was
told something else, it replayed a demonstration) on *the same task and seed* as the policy's own episode, so the rows
of the table are paired and differ in one thing only.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from vla.embodiment import EmbodimentSpec
from vla.errors import UsageError
from vla.report.lines import CONDITIONS
from vla.schema import Observation
from vla.sims.suites import same_scenes

if TYPE_CHECKING:
    from vla.recording import EncodedEpisode

REPORT_SEED = 900_000
"""First seed of reported episodes; 500000+ is for choosing a checkpoint or a decoder."""


class Actor(Protocol):
    """What evaluation needs of a policy; `vla.policy.VLAPolicy` is one."""

    @property
    def embodiments(self) -> Mapping[str, EmbodimentSpec]: ...
    @property
    def decode(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def recorded_seeds(self) -> Mapping[str, Mapping[str, Sequence[Sequence[int]]]]: ...
    @property
    def instructions(self) -> Sequence[str]: ...

    def steps(self, embodiment: str) -> tuple[int, int]:
        """(length of a chunk, steps carried out before looking again), at the robot's control rate."""
        ...

    def act_batch(
        self, observations: list[Observation], instructions: list[str], embodiment: str, *, decode: Any = None,
        seeds: list[int] | None = None, drop_state: bool = False,
    ) -> list[Any]: ...  # fmt: skip


class Demo(NamedTuple):
    """The actions (T, A) of one recorded demonstration and the seed of its scene (None when unknown)."""

    actions: np.ndarray
    seed: int | None = None


@dataclass(frozen=True)
class Demos:
    """What the replay control can play: demonstrations by task, and why others are lacking (said in a note)."""

    by_task: Mapping[str, Sequence[Demo]]
    lacking: Sequence[str] = ()
    """One reason per dataset that gave nothing, such as `data/demo: no such folder`."""


class Keep(NamedTuple):
    """How an episode is encoded for a dataset: frames per second, and one of `vla.recording.VIDEO`."""

    fps: int
    video: str = "lossless"


@dataclass(frozen=True)
class Job:
    """One episode. `task` and `seed` draw the scene; `given`, when set, is the task that is judged instead of `task`."""

    id: int
    condition: str
    group: str
    task: str
    seed: int
    instruction: str
    """What the policy is told."""
    given: str | None = None
    controller: str = "policy"
    """`policy`, `random`, `expert` or `replay`."""
    judged: bool = True
    """False when the told instruction cannot be judged in this scene; the scene's own success is "the original" then."""
    blank: bool = False
    drop_state: bool = False
    actions: np.ndarray | None = field(default=None, compare=False)
    """(T, A) of the replayed demonstration."""
    record: int = 0
    """Side of the clip's pictures in pixels; 0 records none."""
    takeover: int | None = None
    """Control steps after which the policy is relieved (`vla/evaluate/taken_over.py`); None: never."""
    controller_after: str = "expert"
    """Who relieves it: `expert` or `policy`, another one."""
    keep: Keep | None = None
    """How to store what was done after the takeover."""


@dataclass(frozen=True)
class Outcome:
    """How one `Job` ended."""

    id: int
    success: bool
    failure: bool
    """A definite failure, as against running out of steps."""
    steps: int
    original: bool | None = None
    """Whether the originally named task was done; None when nothing was swapped."""
    clip: bytes | None = field(default=None, repr=False)
    """mp4, when the job asked for it."""
    fps: float = 0.0
    stride: int = 1
    """Control steps per picture of the clip."""
    kept: EncodedEpisode | None = field(default=None, repr=False)
    """What was done after the takeover, when that succeeded."""


def check_conditions(conditions: Sequence[str]) -> list[str]:
    """The conditions in table order, without repetition; `UsageError` for an unknown one or none at all."""
    if not conditions:
        raise UsageError("conditions", found="none", expected=f"any of {', '.join(CONDITIONS)}", fix="--conditions policy")
    for name in conditions:
        if name not in CONDITIONS:
            near = difflib.get_close_matches(name, CONDITIONS, 1)
            raise UsageError("conditions", found=repr(name), expected=f"any of {', '.join(CONDITIONS)}",
                             fix=f"did you mean {near[0]!r}?" if near else "remove it")  # fmt: skip
    return [name for name in CONDITIONS if name in set(conditions)]


def check_seeds(policy: Actor, suite: str, seed: int, episodes: int) -> None:
    """Raise `UsageError` when an evaluation seed was recorded for training, in any task of the suite or of one with its scenes.

    In any task, because in a language-conditioned suite the scene depends on the seed and not on the task.
    """
    if shown := trained_on(policy, suite, seed, episodes):
        raise UsageError(
            f"evaluation seeds {seed}..{seed + episodes - 1} of suite {suite!r}",
            found=f"seeds the policy was trained on ({shown})",
            expected="seeds disjoint from every recorded seed",
            fix=f"--seed {REPORT_SEED} (or drop --seed)",
        )


def trained_on(policy: Actor, suite: str, seed: int, episodes: int) -> str:
    """Which of the seeds from `seed` on the policy was trained on, in words; "" when none of them."""
    last = seed + episodes - 1
    clashes = [
        f"{task}: {max(seed, low)}" + (f"..{min(last, high)}" if max(seed, low) < min(last, high) else "")
        for name in same_scenes(suite)
        for task, ranges in policy.recorded_seeds.get(name, {}).items()
        for low, high in ranges
        if low <= last and seed <= high
    ]
    return "; ".join(clashes[:5]) + (f"; and {len(clashes) - 5} more" if len(clashes) > 5 else "")


def make_jobs(
    policy: Actor,
    suite: Any,
    tasks: Sequence[str],
    episodes: int,
    seed: int,
    conditions: Sequence[str],
    demos: Demos | None,
) -> tuple[list[Job], list[str]]:
    """All episodes of an evaluation, and one note per condition that could not be run in full.

    Episodes are per group and dealt round-robin over the group's tasks: episode i has task i mod len and seed + i.
    """
    groups: dict[str, list[str]] = {}
    for task in tasks:
        groups.setdefault(suite.group(task), []).append(task)
    jobs: list[Job] = []
    notes: Notes = {}
    for condition in conditions:
        for group, members in groups.items():
            drawn = [(members[i % len(members)], seed + i, i // len(members)) for i in range(episodes)]
            if condition == "train":
                drawn = _training_scenes(policy, suite.name, members, drawn, notes)
            for task, at, turn in drawn:
                job = Job(len(jobs), condition, group, task, at, suite.instruction(task))
                changed = _apply(job, policy, suite, turn, demos, notes)
                if changed is not None:
                    jobs.append(changed)
    return jobs, [reason.replace("TASKS", _shortened(list(concerned)), 1) for reason, concerned in notes.items()]


Notes = dict[str, dict[str, None]]
"""A sentence with TASKS in it -> the tasks it holds for."""


def _shortened(tasks: list[str]) -> str:
    return ", ".join(tasks[:4]) + (f" and {len(tasks) - 4} more" if len(tasks) > 4 else "")


def _apply(job: Job, policy: Actor, suite: Any, turn: int, demos: Demos | None, notes: Notes) -> Job | None:
    """`job` with what its condition changes; None, with a note, when the condition has nothing to work with."""

    def note(reason: str) -> None:
        notes.setdefault(reason, {})[job.task] = None

    change = dict(job.__dict__)
    match job.condition:
        case "policy" | "train":
            if policy.instructions and job.instruction not in policy.instructions:
                note("the policy was not trained on the instruction of TASKS")
        case "blank":
            change["blank"] = True
        case "nostate":
            change["drop_state"] = True
        case "random" | "expert":
            change["controller"] = job.condition
        case "replay":
            demo = pick_demo(demos, job.task, job.seed, turn)
            if demo is None:
                reasons = ("no dataset was given",) if demos is None else demos.lacking
                note("replay: no recorded demonstration of TASKS" + (f" ({'; '.join(reasons)})" if reasons else ""))
                return None
            change |= {"controller": "replay", "actions": demo}
        case "swap":
            others = _siblings(job.task, suite, policy)
            if others:
                given = others[turn % len(others)]
                change |= {"given": given, "instruction": suite.instruction(given)}
            else:
                told = _other_instructions(job, policy, suite)
                if not told:
                    note("swap: the policy knows no other instruction than that of TASKS")
                    return None
                note("swap: another instruction has no meaning in the scene of TASKS and cannot be judged there; only whether "
                     "the policy still does the original is (low: it listens)")  # fmt: skip
                change |= {"instruction": told[turn % len(told)], "judged": False}
    return Job(**change)


def _siblings(task: str, suite: Any, policy: Actor) -> list[str]:
    """Tasks of the same scene that differ in one word of their name (`push-red-left`: other colours, other directions), or
    those the suite names itself."""
    words = task.split("-")
    same = [t for t in suite.tasks if t != task and suite.group(t) == suite.group(task)]
    if suite.swaps:
        same = [t for t in suite.swaps(task) if t in suite.tasks]
    if policy.instructions:
        same = [t for t in same if suite.instruction(t) in policy.instructions]
    near = [t for t in same if not suite.swaps and len(t.split("-")) == len(words)
            and sum(a != b for a, b in zip(t.split("-"), words, strict=True)) == 1]  # fmt: skip
    return near or same


def _other_instructions(job: Job, policy: Actor, suite: Any) -> list[str]:
    """Instructions the policy knows besides the job's own, those of the same suite first if there are any."""
    own = [i for t in suite.tasks if (i := suite.instruction(t)) != job.instruction and i in policy.instructions]
    return own or sorted(i for i in policy.instructions if i != job.instruction)


def _training_scenes(
    policy: Actor, suite: str, members: list[str], drawn: list[tuple[str, int, int]], notes: Notes
) -> list[tuple[str, int, int]]:
    """The drawn episodes moved to recorded seeds of the same task, spread evenly over what was recorded."""
    out = []
    for task in members:
        turns = [turn for name, _, turn in drawn if name == task]
        recorded = sorted({s for low, high in policy.recorded_seeds.get(suite, {}).get(task, ()) for s in range(low, high + 1)})
        if not recorded:
            notes.setdefault("train: the policy has no recorded seeds of TASKS", {})[task] = None
            continue
        count = min(len(turns), len(recorded))
        out += [(task, recorded[turn * len(recorded) // count], turn) for turn in range(count)]
    return out


def pick_demo(demos: Demos | None, task: str, seed: int, turn: int) -> np.ndarray | None:
    """The actions (T, A) of a demonstration of `task` from a scene other than `seed`, by rotation; None without one."""
    found = [] if demos is None else demos.by_task.get(task, [])
    usable = [d for d in found if d.seed != seed and len(d.actions)]
    return np.asarray(usable[turn % len(usable)].actions, np.float32) if usable else None
