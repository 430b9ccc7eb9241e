"""What a run folder holds, read without complaint about what it does not hold: an interrupted run gets a report too."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from vla.durable import read_lines

MARKS = ("config.yaml", "metrics.jsonl", "STATUS.json", "policy", "checkpoints", "eval")
"""What makes a folder a run: any of these."""

ROW = {"group", "condition", "successes", "n", "rate", "low", "high", "original"}
"""What a row of `results.json` must have to be shown."""


@dataclass
class Gathered:
    """Everything the report is made of. Empty where the folder has nothing."""

    root: Path
    train: list[dict[str, Any]] = field(default_factory=list)
    """Lines of `metrics.jsonl` of kind "train", by step; later lines replace earlier ones of the same step."""
    heldout: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    evals: list[dict[str, Any]] = field(default_factory=list)
    """`results.json` of every evaluation, with `label` (file stem) and `folder` (where its clips' paths begin)."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    parameters: int | None = None
    problems: list[str] = field(default_factory=list)
    """Files that are there and could not be read; shown in the report, since silence would read as absence."""


def gather(root: Path) -> Gathered:
    """Read a run folder."""
    run = Gathered(root)
    lines = _lines(run, root / "metrics.jsonl")
    run.train, run.heldout = (_by_step(lines, kind) for kind in ("train", "heldout"))
    run.status = _object(run, root / "STATUS.json")
    run.policy = _object(run, root / "policy" / "policy.json")
    run.config = _text(run, root / "config.yaml")
    run.curve = [line for line in _lines(run, root / "eval" / "curve.jsonl") if {"step", "group", "rate"} <= line.keys()]
    for path in sorted((root / "eval").glob("*.json")):
        results = _object(run, path)
        rows = results.get("rows")
        if "suite" in results and isinstance(rows, list) and all(isinstance(r, dict) and ROW <= r.keys() for r in rows):
            run.evals.append({**results, "label": path.stem, "folder": path.parent})
        elif results:
            run.problems.append(f"{path.name}: not the result of an evaluation")
    run.evals.sort(key=lambda r: (r["label"] != r["suite"], r["label"]))  # the plain ones first, labelled variants after
    run.evals.sort(key=lambda r: r["suite"] != "tabletop")
    run.parameters = count_parameters(root / "policy" / "model.safetensors")
    return run


def count_parameters(path: Path) -> int | None:
    """Elements in a safetensors file, from its header alone; None when there is no readable one."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
        total = 0
        for name, entry in header.items():
            if name != "__metadata__":
                size = 1
                for side in entry["shape"]:
                    size *= side
                total += size
        return total
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
        return None


def number(value: Any) -> float | None:
    """`value` as a finite float, else None; a diverged run has NaN in its metrics."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if isfinite(value) else None


def _text(run: Gathered, path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        run.problems.append(f"{path.name}: {error.strerror}")
        return ""


def _object(run: Gathered, path: Path) -> dict[str, Any]:
    text = _text(run, path)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        run.problems.append(f"{path.name}: not JSON ({error})")
        return {}
    return value if isinstance(value, dict) else {}


def _lines(run: Gathered, path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file. A last line cut short by a kill is dropped; any other bad line is counted."""
    try:
        lines, bad = read_lines(path)
    except OSError as error:
        run.problems.append(f"{path.name}: {error.strerror}")
        return []
    if bad:
        run.problems.append(f"{path.name}: {bad} unreadable line{'s' if bad > 1 else ''}")
    return lines


def _by_step(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    found = {int(line["step"]): line for line in lines if line.get("kind") == kind and number(line.get("step")) is not None}
    return [found[step] for step in sorted(found)]
