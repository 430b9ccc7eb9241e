"""Success over training: every checkpoint of a run on the same validation scenes, and how far neighbours differ.

One checkpoint of one seed is not a measurement: success can swing by tens of points between checkpoints whose losses
look alike. The spread is printed so that nobody has to take the best point for the truth.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla.errors import CheckpointError
from vla.evaluate import SimulatorPool, evaluate

CURVE_SEED = 500_000
"""First validation seed: disjoint from recorded scenes and from the reported ones."""


def success_curve(
    folder: Path, suite: str, tasks: Sequence[str] | None = None, episodes: int = 20, seed: int = CURVE_SEED, *,
    execute: int | None = None, decode: str | None = None, workers: int | None = None, progress: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Evaluate each `checkpoints/step_*/policy` of a run; one line per step and group in `eval/curve.jsonl`.

    Lines: step, suite, group, rate, low, high, n, seed. Steps that are there already (same suite, seed and n) are not
    run again, so an interrupted curve continues. Raises `CheckpointError` when the run has no checkpoint.
    """
    from vla.policy import load_policy

    policies = sorted(folder.glob("checkpoints/step_*/policy"))
    if not policies:
        raise CheckpointError(folder, found="no checkpoints/step_*/policy", expected="a run folder with checkpoints",
                              fix="train with run.save_every below run.steps, and run.keep=0 to keep them all")  # fmt: skip
    path = folder / "eval" / "curve.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    key = {"suite": suite, "seed": seed, "n": episodes}
    with SimulatorPool(workers) as pool:
        for policy in policies:
            step = int(policy.parent.name.removeprefix("step_"))
            if any(line["step"] == step and key.items() <= line.items() for line in lines):
                continue
            results = evaluate(load_policy(policy), suite, tasks, episodes, seed, ("policy",), execute=execute,
                               decode=decode, clips=0, progress=progress, pool=pool)  # fmt: skip
            for row in results["rows"]:
                lines.append({"step": step, "group": row["group"], "rate": row["rate"], "low": row["low"],
                              "high": row["high"], **key, "n": row["n"]})  # fmt: skip
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [line for line in lines if line["suite"] == suite and line["seed"] == seed]


def curve_table(lines: Sequence[dict[str, Any]]) -> str:
    """Steps down, groups across, and the spread over the last half of training in the last line."""
    groups = list(dict.fromkeys(line["group"] for line in lines))
    steps = sorted({line["step"] for line in lines})
    rates = {(line["step"], line["group"]): 100 * line["rate"] for line in lines}
    width = max(8, *(len(group) for group in groups))
    rows = [f"{'step':>8}  " + "  ".join(f"{group:>{width}}" for group in groups)]
    for step in steps:
        cells = [f"{rates[step, g]:.0f}" if (step, g) in rates else "-" for g in groups]
        rows.append(f"{step:>8}  " + "  ".join(f"{cell:>{width}}" for cell in cells))
    late = steps[len(steps) // 2 :]
    spans = [[rates[s, g] for s in late if (s, g) in rates] for g in groups]
    rows.append(f"{'spread':>8}  " + "  ".join(f"{f'{min(s):.0f}..{max(s):.0f}' if s else '-':>{width}}" for s in spans))
    return "\n".join(rows) + f"\n\nper cent of fresh validation scenes; spread over checkpoints from step {late[0]}"
