"""Films of a few episodes: successes and failures, with the action symbols and confidences behind them.

Which episodes are worth a film is known only when all have ended, so those are played once more with a larger picture.
The verdict written beside a film is the one of the filmed run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vla.durable import replace_file
from vla.embodiment import EmbodimentSpec
from vla.evaluate.jobs import Job, Outcome
from vla.evaluate.pool import Trace

SIDE = 240
"""Pixels of a film's picture."""

PER_GROUP = 2
"""Successes, and failures, filmed of one group: more of the same teaches nothing."""

Play = Callable[[Sequence[Job], Callable[[], object]], tuple[dict[int, Outcome], dict[int, Trace]]]


def choose(jobs: Sequence[Job], outcomes: Mapping[int, Outcome], most: int) -> list[Job]:
    """Up to `most` episodes: per group a success and a failure of the policy, then the same scenes swapped, then more.

    The swapped film shares its scene with the successful one, so that the two differ in the instruction alone.
    """
    groups = list(dict.fromkeys(job.group for job in jobs))
    own = {g: [job for job in jobs if job.group == g and job.condition == "policy"] for g in groups}
    won = {g: [job for job in own[g] if outcomes[job.id].success] for g in groups}
    lost = {g: [job for job in own[g] if not outcomes[job.id].success] for g in groups}
    swapped = {(job.group, job.seed): job for job in jobs if job.condition == "swap" and job.judged}
    picked: dict[int, Job] = {}
    for turn in range(min(most, PER_GROUP)):
        for group in groups:
            twins = [swapped[group, job.seed] for job in won[group][:1] if (group, job.seed) in swapped]
            for some in (won[group], lost[group], twins):
                for job in some[turn : turn + 1]:
                    picked.setdefault(job.id, job)
    return list(picked.values())[:most]


def save_clips(
    jobs: Sequence[Job], outcomes: Mapping[int, Outcome], play: Play, spec: EmbodimentSpec, out: Path, most: int
) -> list[dict[str, Any]]:
    """Film up to `most` episodes into `<out without .json>-clips/`; their entries of `results.json`.

    An entry: {file (relative to out's folder), condition, group, task, instruction, given (the judged task when
    swapped, else null), seed, success, failure, steps, fps, stride, action_names (A), actions, confidence, symbols (T x A
    each; symbols null when the codec does not give one per element), decisions (steps at which the policy looked)}.
    Raises `MachineError` on a full disk.
    """
    chosen = [replace(job, record=SIDE) for job in choose(jobs, outcomes, most)]
    if not chosen:
        return []
    filmed, traces = play(chosen, lambda: None)
    folder = out.parent / f"{out.stem}-clips"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.mp4"):
        old.unlink()
    entries = []
    for number, job in enumerate(chosen):
        outcome, trace = filmed[job.id], traces[job.id]
        assert outcome.clip is not None
        verdict = "success" if outcome.success else "failure"
        path = folder / re.sub(r"[^\w.-]+", "-", f"{number:02d}-{job.given or job.task}-{verdict}.mp4")
        replace_file(path, outcome.clip)
        entries.append({
            "file": f"{folder.name}/{path.name}", "condition": job.condition, "group": job.group, "task": job.task,
            "instruction": job.instruction, "given": job.given, "seed": job.seed, "success": outcome.success,
            "failure": outcome.failure, "steps": outcome.steps, "fps": outcome.fps, "stride": outcome.stride,
            "action_names": spec.action_names, **_trace(trace, outcome.steps),
        })  # fmt: skip
    return entries


def _trace(trace: Trace, steps: int) -> dict[str, Any]:
    """The executed rows of a trace as lists, at most `steps` long, and the steps at which a chunk began."""
    begins = np.cumsum([0, *(len(part) for part in trace.actions)])[:-1]
    symbols = [part for part in trace.symbols if part is not None]
    whole = len(symbols) == len(trace.symbols)
    return {
        "actions": np.concatenate(trace.actions)[:steps].round(4).tolist(),
        "confidence": _json_numbers(np.concatenate(trace.confidence)[:steps].round(3)),
        "symbols": np.concatenate(symbols)[:steps].astype(int).tolist() if whole else None,
        "decisions": [int(step) for step in begins],
    }


def _json_numbers(values: np.ndarray) -> list:
    """NaN (a continuous head has no confidence) as null: JSON knows no NaN."""
    return [[None if value != value else value for value in row] for row in values.tolist()]
