"""The verb: which episodes are cut how, what their parts are called, how far the rule agrees with what is known."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.segment.copying import copy_with_language
from data_tools.segment.rule import agreement, boundaries, measure, motion
from vla.durable import check_place
from vla.episodes.language import frame_of, has_language, read_said
from vla.episodes.layout import Layout, read_layout
from vla.episodes.problems import Problems
from vla.episodes.rows import Rows, read_rows
from vla.errors import DataError, UsageError
from vla.prompt import DONE, clean_instruction
from vla.recording.language import COLUMN, STYLES, in_turn, narrate, to_rows

HOW = ("auto", "columns", "motion")
WITHIN = 3
"""Frames by which a boundary may be off to count as found."""
_TAIL = 1.0
"""Seconds after the last boundary up to which nothing is done any more."""


def segment(
    root: str | Path, out: str | Path, *, how: str = "auto", names: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """Write a copy of the v3.0 dataset `root` to `out`, with the subtasks of every episode in its language column.

    `how`: `columns` takes those the dataset names, `motion` those the rule finds, `auto` (default) the first where an episode has
    any. `names` calls the parts that the rule finds: sentence of an episode -> its subtasks in order; they are used where as many
    were found, else a part is called by the sentence and its number.

    Returns `{"out", "episodes", "columns", "motion" (episodes cut either way), "segments", "named", "unnamed" (episodes of the
    rule), "agreement" (of the rule with the dataset's own, {found, true, precision, recall, f1, within}; None without any)}`.
    Raises `UsageError` for an `out` that exists, `DataError` for a damaged dataset, or one without subtasks for `columns`.
    """
    root, out = Path(root), Path(out)
    if how not in HOW:
        raise UsageError("--how", found=how, expected=f"one of {', '.join(HOW)}", fix="leave it out")
    if out.exists():
        raise UsageError(out, found="something there already", expected="a new folder: nothing is changed in place",
                         fix="choose another --out")  # fmt: skip
    check_place(out)
    layout, problems = read_layout(root, None, need_stats=False)
    if layout.is_v2:
        raise UsageError(root, found=f"LeRobot {layout.version}", expected="v3.0, which has language columns",
                         fix=f"vla data convert {root} {root.name}-v3")  # fmt: skip
    rows = read_rows(layout, problems)
    problems.raise_if_any()
    assert rows is not None
    own, found = _own(layout, rows), _found(layout, rows)
    named, known = _check_names(names or {}), _everything(layout, rows)
    told: Counter[str] = Counter()
    said: dict[int, list[dict[str, Any]]] = {}
    segments = 0
    for e in range(len(rows.episodes)):
        use = "columns" if own[e] is not None and how != "motion" else "motion" if how != "columns" else ""
        told[use] += 1
        times, kept, parts = rows.timestamp[rows.starts[e] : rows.starts[e + 1]], known[e], own[e] or ([], [])
        if use == "motion":
            texts, by_name = _texts(found[e], len(times), layout.fps, _sentence(layout, rows, e), named)
            told["named" if by_name else "unnamed"] += 1
            kept, parts = [row for row in kept if row["style"] not in STYLES], ([0, *found[e]], texts)
        segments += len(parts[0])
        have = {row["style"] for row in kept}
        new = [row for row in to_rows(narrate(in_turn(*parts)), times) if row["style"] not in have]
        said[e] = sorted([*kept, *new], key=lambda row: row["timestamp"])
    if how == "columns" and not told["columns"]:
        raise DataError(root, found=f"no subtasks: neither a column {COLUMN} nor instructions that change", fix="--how motion",
                        expected="subtasks that the dataset names itself")  # fmt: skip
    counts = {name: told[name] for name in ("columns", "motion", "named", "unnamed")}
    copy_with_language(root, out, said, {"segmented": {"how": how, "episodes": counts}})
    labelled = [e for e, parts in enumerate(own) if parts is not None]
    true = [[at for at in (own[e] or ([], []))[0] if at > 0] for e in labelled]
    agree = agreement([found[e] for e in labelled], true, WITHIN) | {"within": WITHIN} if labelled else None
    return {"out": str(out), "episodes": len(rows.episodes), **counts, "segments": segments, "agreement": agree}


def _everything(layout: Layout, rows: Rows) -> list[list[dict[str, Any]]]:
    """Per episode every row of the language column, whatever its style; empty where there is no such column."""
    if not has_language(layout):
        return [[] for _ in rows.episodes]
    problems = Problems(layout.root)
    found = read_said(layout, rows.episodes, problems, style=None)
    problems.raise_if_any()
    return found


def _own(layout: Layout, rows: Rows) -> list[tuple[list[int], list[str]] | None]:
    """Per episode (first frames, subtasks) as the dataset names them: its column, else instructions that change inside it."""
    problems = Problems(layout.root)
    said = read_said(layout, rows.episodes, problems) if has_language(layout) else [[] for _ in rows.episodes]
    problems.raise_if_any()
    out: list[tuple[list[int], list[str]] | None] = []
    for e, some in enumerate(said):
        span = slice(rows.starts[e], rows.starts[e + 1])
        task = rows.task[span]
        turns = [0, *(1 + np.flatnonzero(np.diff(task))).tolist()]
        if some:
            out.append(([frame_of(row["timestamp"], rows.timestamp[span]) for row in some], [row["content"] for row in some]))
        elif len(turns) > 1 and layout.instructions:
            out.append((turns, [layout.instructions[task[at]] for at in turns]))
        else:
            out.append(None)
    return out


def _found(layout: Layout, rows: Rows) -> list[list[int]]:
    scale, found = measure(layout.spec, rows.state, rows.action), []
    for a, b in zip(rows.starts[:-1], rows.starts[1:], strict=True):
        found.append(boundaries(motion(layout.spec, rows.state[a:b], rows.action[a:b], layout.fps, scale)))
    return found


def _texts(
    found: list[int], length: int, fps: float, sentence: str, named: Mapping[str, Sequence[str]]
) -> tuple[list[str], bool]:
    """What the parts of an episode are called, and whether `named` says so."""
    over = bool(found) and length - found[-1] <= _TAIL * fps
    parts = len(found) + 1 - over
    known = list(named.get(sentence, ()))
    texts = known if len(known) == parts else [f"{sentence} part {n + 1}" for n in range(parts)]
    return [*texts, DONE] if over else texts, len(known) == parts


def _sentence(layout: Layout, rows: Rows, episode: int) -> str:
    return clean_instruction(layout.instructions[rows.task[rows.starts[episode]]])


def _check_names(names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    fits = isinstance(names, Mapping)
    wrong = [key for key, texts in names.items() if not isinstance(texts, list | tuple) or not texts] if fits else []
    if wrong or not fits:
        raise DataError("--names", found=f"{wrong or type(names).__name__}", fix="list the subtasks of each sentence, in order",
                        expected='{"the sentence of an episode": ["its first subtask", "its second", ...], ...}')  # fmt: skip
    return {clean_instruction(key): [clean_instruction(text) for text in texts] for key, texts in names.items()}


# ---- the command ----


def add_segment_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add `segment` to the `vla data` sub-commands; `run` carries it out."""
    parser = subparsers.add_parser(
        "segment", help="cut episodes into subtasks and write them as language columns, into a new dataset",
        description=segment.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  vla data segment data/kitchen --out data/kitchen-subtasks\n"
        "  vla data segment data/long --how motion --names names.json --json\n"
        "then, in a training config:  datasets: [{path: data/kitchen-subtasks, language: subtask}]",
    )  # fmt: skip
    add = parser.add_argument
    add("root", type=Path, metavar="DATASET", help="a LeRobot v3.0 dataset")
    add("--out", type=Path, metavar="DIR", help="the new dataset (default: DATASET-subtasks)")
    add("--how", choices=HOW, default="auto", help="subtasks the dataset names, those its motion shows, or (auto, the default) "
        "the first where there are any")  # fmt: skip
    add("--names", type=Path, metavar="FILE", help="JSON: sentence of an episode -> names of its subtasks in order")
    add("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry out `vla data segment`."""
    names = None
    if args.names:
        try:
            names = json.loads(args.names.read_text())
        except (OSError, ValueError) as error:
            raise DataError(
                args.names, found=f"{type(error).__name__}: {error}", expected="a JSON object", fix="correct it"
            ) from error
    root = args.root
    summary = segment(root, args.out or root.with_name(f"{root.name}-subtasks"), how=args.how, names=names)
    print(json.dumps(summary) if args.json else _words(summary))
    return 0


def _words(summary: dict[str, Any]) -> str:
    lines = [f"{summary['out']}: {summary['episodes']} episodes in {summary['segments']} segments; {summary['columns']} as the "
             f"dataset names them, {summary['motion']} by motion"]  # fmt: skip
    if summary["unnamed"]:
        lines.append(f"  {summary['unnamed']} episodes have numbered parts (`... part 2`): --names calls them by what they are")
    if agree := summary["agreement"]:
        lines.append(f"  the rule against {agree['true']} boundaries the dataset names, at most {agree['within']} frames apart: "
                     f"F1 {agree['f1']:.3f}, precision {agree['precision']:.3f}, recall {agree['recall']:.3f}")  # fmt: skip
    return "\n".join(lines)
