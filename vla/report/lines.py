"""What an evaluation plays, and how the rows of a `results.json` become the lines of its table, in the terminal and in
the report alike. The words are here and nowhere else, so that help, table and report cannot disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CONDITIONS: dict[str, str] = {
    "policy": "the policy on fresh scenes",
    "train": "the policy on scenes it was trained on: memorisation would show here",
    "swap": "the same scenes, told to do something else",
    "blank": "the image replaced by mean grey",
    "nostate": "the robot's own state removed",
    "replay": "a recorded demonstration of the same instruction, from another scene, played back",
    "random": "uniform actions, each held for 8 steps",
    "expert": "the simulator's scripted expert",
}
"""Every condition of an evaluation and what it means, in the order of the table."""

SWAPPED = {"given": "does what it is told", "original": "does what the scene was drawn for"}
"""The two lines of the condition `swap`, which is judged twice."""

MEANING = {
    label: words
    for condition, said in CONDITIONS.items()
    for label, words in (
        [(condition, said)] if condition != "swap" else [(f"swap: does the {end}", f"{said}: {w}") for end, w in SWAPPED.items()]
    )
}
"""Every line of the table."""

KIND = {"policy": "own", "train": "own", "swap: does the given": "own", "expert": "plain", "nostate": "plain"}
"""What a line is: the policy at work ("own"), neutral ("plain"), or, all others, a control that should be low."""


def lines_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Mapping[str, Any]]]]:
    """The table's lines (label, {group: {successes, n, rate, low, high}}); a swapped instruction gives two of them."""
    lines: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        condition, group = row["condition"], row["group"]
        if condition != "swap":
            lines.setdefault(condition, {})[group] = row
            continue
        if row["rate"] is not None:
            lines.setdefault("swap: does the given", {})[group] = row
        if row["original"] is not None:
            lines.setdefault("swap: does the original", {})[group] = row["original"]
    order = list(MEANING)
    return sorted(lines.items(), key=lambda line: order.index(line[0]) if line[0] in MEANING else len(order))


def pairing(rows: Sequence[Mapping[str, Any]]) -> str:
    """What makes the lines of these rows comparable, as half a sentence."""
    paired = "every line plays the same tasks on the same seeds"
    return f"{paired}, only `train` the same tasks on recorded ones" if any(r["condition"] == "train" for r in rows) else paired


def percent(rate: float) -> str:
    """0..1 as whole per cent; 199 of 200 is `99.5`, never `100`."""
    whole = f"{100 * rate:.0f}"
    return f"{100 * rate:.1f}" if whole in ("0", "100") and 0 < rate < 1 else whole


def interval(part: Mapping[str, Any]) -> str:
    """`[94, 99]`, per cent."""
    return f"[{percent(part['low'])}, {percent(part['high'])}]"


def spread(points: Sequence[Mapping[str, Any]]) -> tuple[int, float, float] | None:
    """(first step, lowest rate, highest rate) over the second half of the steps at which `points` ({step, rate}) were
    measured; None for fewer than two of them, which cannot differ."""
    steps = sorted({point["step"] for point in points})
    late = steps[len(steps) // 2 :]
    rates = [point["rate"] for point in points if point["step"] in late]
    return (late[0], min(rates), max(rates)) if len(late) > 1 else None
