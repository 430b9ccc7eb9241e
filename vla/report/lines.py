"""How the rows of a `results.json` become the lines of its table, in the terminal and in the report alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MEANING = {
    "policy": "the policy on fresh scenes",
    "train": "the policy on scenes it was trained on: memorisation would show here",
    "swap: does the given": "same scenes, told to do something else: does what it is told",
    "swap: does the original": "same scenes, told to do something else: does what the scene was drawn for",
    "blank": "the image replaced by mean grey",
    "nostate": "the robot's own state removed",
    "replay": "a recorded demonstration of the same instruction, from another scene, played back",
    "random": "uniform actions, each held for 8 steps",
    "expert": "the simulator's scripted expert",
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


def percent(rate: float) -> str:
    """0..1 as whole per cent; 199 of 200 is `99.5`, never `100`."""
    whole = f"{100 * rate:.0f}"
    return f"{100 * rate:.1f}" if whole in ("0", "100") and 0 < rate < 1 else whole


def interval(part: Mapping[str, Any]) -> str:
    """`[94, 99]`, per cent."""
    return f"[{percent(part['low'])}, {percent(part['high'])}]"
