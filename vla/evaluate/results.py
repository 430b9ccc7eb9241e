"""From finished episodes to figures: Wilson intervals, the rows of `results.json`, and the table for a terminal.

`results.json` (schema 1): {schema, suite, seed, episodes, tasks, conditions, execute, chunk, decode, ensemble, policy, versions,
rows, per_task, records, clips, notes, wall_s, cpu_s, created}.
A row is {group, condition, successes, n, rate, low, high, original, mean_steps, failures: {failure, timeout}}; `original`
is {successes, n, rate, low, high} for swapped instructions ("did what the scene was drawn for") and null otherwise.
Where the swapped instruction cannot be judged in the scene, successes, rate, low, high and failures are null.
Rates are fractions in 0..1; `mean_steps` is over successful episodes, in control steps, null without one.
`per_task` has the rows of the policy's own episodes by task, `records` one entry per episode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vla.evaluate.jobs import CONDITIONS, Job, Outcome
from vla.report.lines import interval, lines_of, pairing, percent

Z95 = 1.959963984540054


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The Wilson 95 % interval (low, high) of a rate, in 0..1; (0, 1) when n is 0.

    Source: E. B. Wilson 1927, without continuity correction. Unlike the normal interval it is honest at 0 and at n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    rate, z2 = successes / n, Z95 * Z95
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    # At the ends the bound is exact; rounding must not move it past the rate itself.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)


def proportion(successes: int, n: int) -> dict[str, Any]:
    """{successes, n, rate, low, high}; the rate of no episode is null."""
    low, high = wilson(successes, n)
    return {"successes": successes, "n": n, "rate": successes / n if n else None, "low": low, "high": high}


def make_row(group: str, condition: str, played: Sequence[tuple[Job, Outcome]]) -> dict[str, Any]:
    """One row of the table from its episodes."""
    outcomes = [outcome for _, outcome in played]
    won = [o for o in outcomes if o.success]
    row: dict[str, Any] = {"group": group, "condition": condition, **proportion(len(won), len(outcomes))}
    originals = [o.original for o in outcomes if o.original is not None]
    row["original"] = proportion(sum(originals), len(originals)) if originals else None
    row["mean_steps"] = round(sum(o.steps for o in won) / len(won), 2) if won else None
    failed = sum(o.failure for o in outcomes if not o.success)
    row["failures"] = {"failure": failed, "timeout": len(outcomes) - len(won) - failed}
    if played and not all(job.judged for job, _ in played):
        row |= {"successes": None, "rate": None, "low": None, "high": None, "failures": None, "mean_steps": None}
    return row


def make_rows(jobs: Sequence[Job], outcomes: Mapping[int, Outcome]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows by group and condition, rows of the condition `policy` by task)."""
    cells: dict[tuple[str, str], list[tuple[Job, Outcome]]] = {}
    tasks: dict[str, list[tuple[Job, Outcome]]] = {}
    for job in jobs:
        played = (job, outcomes[job.id])
        cells.setdefault((job.group, job.condition), []).append(played)
        if job.condition == "policy":
            tasks.setdefault(job.task, []).append(played)
    rows = [make_row(group, condition, played) for (group, condition), played in cells.items()]
    rows.sort(key=lambda row: list(CONDITIONS).index(row["condition"]))
    per_task = []
    for task, played in tasks.items():
        row = make_row(played[0][0].group, "policy", played)
        per_task.append({"task": task, "instruction": played[0][0].instruction, **row})
    return rows, per_task


def make_records(jobs: Sequence[Job], outcomes: Mapping[int, Outcome]) -> list[dict[str, Any]]:
    """One entry per episode, in the order of the jobs."""
    records = []
    for job in jobs:
        outcome = outcomes[job.id]
        entry = {"condition": job.condition, "group": job.group, "task": job.task, "seed": job.seed,
                 "success": outcome.success if job.judged else None, "failure": outcome.failure,
                 "steps": outcome.steps}  # fmt: skip
        if job.condition == "swap":
            entry |= {"given": job.given, "instruction": job.instruction, "original": outcome.original}
        records.append(entry)
    return records


def cell(part: Mapping[str, Any] | None) -> str:
    """`195/200  98 [94, 99]`: successes of n, per cent, Wilson 95 % interval."""
    if part is None or part["rate"] is None:
        return "-"
    return f"{part['successes']}/{part['n']}  {percent(part['rate']):>3} {interval(part)}"


def text_table(results: Mapping[str, Any]) -> str:
    """The result for a terminal: conditions down, groups across (the other way round when groups are many)."""
    lines = lines_of(results["rows"])
    groups = list(dict.fromkeys(row["group"] for row in results["rows"]))
    columns = ["", *groups]
    body = [[label, *(cell(parts.get(group)) for group in groups)] for label, parts in lines]
    if len(groups) > 5:
        columns = ["", *(label for label, _ in lines)]
        body = [[group, *(cell(parts.get(group)) for _, parts in lines)] for group in groups]
    widths = [max(len(row[i]) for row in [columns, *body]) for i in range(len(columns))]
    last = results["seed"] + results["episodes"] - 1
    head = (
        f"{results['suite']}: {results['episodes']} episodes per group, seeds {results['seed']}..{last}, "
        f"decode {results['decode'] or 'default'}, {results['execute']} of {results['chunk']} steps executed"
        + (f", overlapping chunks averaged (decay {results['ensemble']:g})" if results.get("ensemble") is not None else "")
    )
    rule = "  ".join("-" * width for width in widths)
    text = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [columns, *body]]
    tail = [f"per cent of episodes with the Wilson 95 % interval; {pairing(results['rows'])}"]
    tail += [f"note: {note}" for note in results["notes"]]
    tail.append(f"{len(results['records'])} episodes in {results['wall_s']:.1f} s ({results['cpu_s']:.1f} CPU s)")
    return "\n".join([head, "", text[0], rule, *text[1:], "", *tail])
