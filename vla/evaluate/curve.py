"""Success over training: every checkpoint of a run on the same validation scenes, and how far neighbours differ.

One checkpoint of one seed is not a measurement: success can swing by tens of points between checkpoints whose losses
look alike. The spread is printed so that nobody has to take the best point for the truth.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vla.durable import read_lines, replace_file
from vla.embodiment import load_embodiment
from vla.errors import CheckpointError
from vla.evaluate import SimulatorPool, evaluate
from vla.report.lines import interval, percent, spread
from vla.resample import chunk_steps

CURVE_SEED = 500_000
"""First validation seed: disjoint from recorded scenes and from the reported ones."""

KEY = ("suite", "group", "tasks", "seed", "n", "decode", "execute", "policy")
"""What a line is a measurement of; only an equal key makes it the same one. `policy` is the fingerprint of the checkpoint."""


def success_curve(
    folder: Path, suite: str, tasks: Sequence[str] | None = None, episodes: int = 20, seed: int = CURVE_SEED, *,
    execute: int | None = None, decode: str | None = None, workers: int | None = None, progress: bool = True,
    sims: str = "vla.sims",
) -> list[dict[str, Any]]:  # fmt: skip
    """Evaluate each `checkpoints/step_*/policy` of a run; one line per step and group, all of them in `eval/curve.jsonl`.

    A line is {step, rate, low, high} and its `KEY`. A measurement that is there already is not made again, so an
    interrupted curve continues and a longer one costs only what is new. Returns the lines of this call's settings, by
    step. Raises `CheckpointError` when the run has no checkpoint, and what `evaluate` raises.
    """
    from vla.policy import load_policy

    module: Any = importlib.import_module(sims)
    groups: dict[str, list[str]] = {}
    for task in module.expand_tasks(suite, list(tasks) if tasks else None):
        groups.setdefault(module.SUITES[suite].group(task), []).append(task)
    found = {int(path.parent.name.removeprefix("step_")): path for path in sorted(folder.glob("checkpoints/step_*/policy"))}
    if not found:
        raise CheckpointError(folder, found="no checkpoints/step_*/policy", expected="a run folder with checkpoints",
                              fix="train with run.save_every below run.steps, and run.keep=0 to keep them all")  # fmt: skip
    room = module.SUITES[suite]
    keys = {step: _keys(path, room, groups, seed, episodes, decode, execute) for step, path in found.items()}
    path = folder / "eval" / "curve.jsonl"
    lines = [line for line in read_lines(path)[0] if {"step", "rate", "low", "high", *KEY} <= line.keys()]
    lines = _of_this_training(lines, {step: some[0]["policy"] for step, some in keys.items()})
    with SimulatorPool(workers, sims) as pool:
        for step, wanted in keys.items():
            there = [{name: line[name] for name in KEY} for line in lines if line["step"] == step]
            lacking = [task for key in wanted if key not in there for task in key["tasks"]]
            if not lacking:
                continue
            results = evaluate(load_policy(found[step]), suite, lacking, episodes, seed, ("policy",), execute=execute,
                               decode=decode, clips=0, progress=progress, pool=pool, sims=sims)  # fmt: skip
            rows = {row["group"]: row for row in results["rows"]}
            lines += [{"step": step, **{name: rows[key["group"]][name] for name in ("rate", "low", "high")}, **key}
                      for key in wanted if key["group"] in rows]  # fmt: skip
            lines.sort(key=lambda line: line["step"])
            replace_file(path, "".join(json.dumps(line) + "\n" for line in lines))
    return [line for line in lines if {name: line[name] for name in KEY} in keys.get(line["step"], ())]


def _keys(policy: Path, room: Any, groups: Mapping[str, list[str]], seed: int, episodes: int, decode: str | None,
          execute: int | None) -> list[dict[str, Any]]:  # fmt: skip
    """The key of each group's line at this checkpoint. Read without its weights: most often nothing is left to do."""
    try:
        meaning = json.loads((policy / "policy.json").read_text())
        config, fingerprint = meaning["config"], meaning["fingerprint"]
        seconds = config.get("chunk_seconds")
        hz = meaning["embodiments"][load_embodiment(room.embodiment).key]["control_hz"] if seconds else 1.0
        decode = decode or config["decode"]
        execute = execute or chunk_steps(seconds, config["chunk"], config["execute"], hz)[1]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(policy / "policy.json", found=f"{type(error).__name__}: {error}", expected="a policy's description",
                              fix=f"remove {policy.parent}, it is no whole checkpoint") from error  # fmt: skip
    rest = {"seed": seed, "n": episodes, "decode": decode, "execute": execute, "policy": fingerprint}
    return [{"suite": room.name, "group": group, "tasks": members, **rest} for group, members in groups.items()]


def _of_this_training(lines: list[dict[str, Any]], policies: Mapping[int, str]) -> list[dict[str, Any]]:
    """`lines` without those of an earlier training in the same folder, which the report would draw into the same curve.

    A checkpoint that was measured and has other weights now betrays one. Without such a sign, lines of checkpoints
    that are gone stay: `run.keep` removes old ones while a run goes on.
    """
    if all(policies.get(line["step"], line["policy"]) == line["policy"] for line in lines):
        return lines
    return [line for line in lines if policies.get(line["step"]) == line["policy"]]


def curve_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Steps down, groups across, and the spread over the last half of training in the last line."""
    groups = list(dict.fromkeys(line["group"] for line in lines))
    steps = sorted({line["step"] for line in lines})
    at = {(line["step"], line["group"]): line for line in lines}
    rows = [["step", *groups]]
    for step in steps:
        cells = [at.get((step, group)) for group in groups]
        rows.append([str(step), *(f"{percent(cell['rate'])} {interval(cell)}" if cell else "-" for cell in cells)])
    spans = [spread([line for line in lines if line["group"] == group]) for group in groups]
    rows.append(["spread", *(f"{percent(span[1])}..{percent(span[2])}" if span else "-" for span in spans)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    late = sorted({span[0] for span in spans if span})
    said = f"; spread over the checkpoints from step {late[0]}" if late else ""
    return f"{table}\n\nper cent of fresh validation scenes with the Wilson 95 % interval{said}"
