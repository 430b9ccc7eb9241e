"""Subtasks: which sentence of LeRobot's column `language_persistent` holds at which frame.

The column says the same at every frame of an episode (all its rows, each with the time from which it holds), so one frame of each
is read. Only style `subtask` is looked at here; `vla/recording/language.py` says what else is in it. A subtask that is named
twice in a row (touch it, touch it again) is two segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.episodes.problems import RESTORE, Problems, short

if TYPE_CHECKING:
    from vla.episodes.layout import Layout

COLUMN = "language_persistent"


@dataclass
class Segments:
    """F frames cut into G segments, none of them in two episodes: segment g is frames `starts[g]` .. `starts[g + 1]`."""

    starts: np.ndarray  # (G + 1,) int64
    subtask: np.ndarray  # (G,) int32, an index into `names`; -1 where nothing is said
    names: list[str]


def unspoken(starts: np.ndarray) -> Segments:
    """One segment per episode, nothing said. `starts` (E + 1,)."""
    return Segments(np.array(starts, np.int64), np.full(len(starts) - 1, -1, np.int32), [])


def has_language(layout: Layout) -> bool:
    """Whether the dataset has the column; v2.x has none."""
    return not layout.is_v2 and layout.info["features"].get(COLUMN, {}).get("dtype") == "language"


def read_segments(
    layout: Layout, episodes: list[dict[str, Any]], starts: np.ndarray, timestamp: np.ndarray, problems: Problems
) -> Segments:
    """The segments of a whole dataset; `starts` (E + 1,) and `timestamp` (F,) are its rows'. Findings go to `problems`."""
    if not has_language(layout):
        return unspoken(starts)
    said = read_said(layout, episodes, problems)
    names: dict[str, int] = {}
    cuts, subtask = [], []
    for number, rows in enumerate(said):
        first, last = int(starts[number]), int(starts[number + 1])
        at = [(first, -1)]
        for row in rows:
            frame = first + frame_of(row["timestamp"], timestamp[first:last])
            if frame >= last:
                problems.add(f"{layout.root}, episode {number}, {COLUMN}", found=f"{row['content']!r} at {row['timestamp']:g} s",
                             expected=f"a time within its {timestamp[last - 1]:g} s", fix=RESTORE)  # fmt: skip
                break
            at.append((frame, names.setdefault(row["content"], len(names))))
        for (frame, name), (following, _) in zip(at, [*at[1:], (last, -1)], strict=True):
            if frame < following:  # of two at one frame, the later counts
                cuts.append(frame)
                subtask.append(name)
    return Segments(np.array([*cuts, int(starts[-1])], np.int64), np.array(subtask, np.int32), list(names))


def frame_of(time: float, timestamp: np.ndarray) -> int:
    """The first frame of an episode that is not before `time`, give or take a quarter of a frame. `timestamp` (T,), rising."""
    slack = float(np.diff(timestamp[:2]).sum()) / 4
    return int(np.searchsorted(timestamp, time - slack))


def read_said(
    layout: Layout, episodes: list[dict[str, Any]], problems: Problems, style: str | None = "subtask"
) -> list[list[dict[str, Any]]]:
    """Per episode the rows of one style, in order of time, each with its text and a time; None: all rows, as they are."""
    found: dict[int, list[dict[str, Any]]] = {}
    for path in sorted({layout.path("data_path", row, "data") for row in episodes}):
        try:
            file = pq.ParquetFile(path)
            kind: Any = file.schema_arrow.field(COLUMN).type if COLUMN in file.schema_arrow.names else None
            if not (isinstance(kind, pa.ListType | pa.LargeListType) and pa.types.is_struct(kind.value_type)):
                problems.add(f"{path}, {COLUMN}", found=kind or "no such column", expected="lists of {role, content, ...}",
                             fix=RESTORE)  # fmt: skip
                continue
            for batch in file.iter_batches(4096, columns=["episode_index", COLUMN]):
                numbers, at = np.unique(batch.column(0).to_numpy(), return_index=True)
                for number, row in zip(numbers.tolist(), at.tolist(), strict=True):
                    if number not in found:
                        found[number] = _of_style(batch.column(1)[row].as_py(), style, path, number, problems)
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            problems.add(path, found=short(error), expected=f"a column {COLUMN}", fix=RESTORE)
    return [found.get(number, []) for number in range(len(episodes))]


def _of_style(rows: Any, style: str | None, path: Path, number: int, problems: Problems) -> list[dict[str, Any]]:
    wanted = []
    if style is None:
        return list(rows or [])
    for row in rows or []:
        if not isinstance(row, dict) or row.get("style") != style:
            continue
        text, time = row.get("content"), row.get("timestamp")
        if not (isinstance(text, str) and text.strip()) or not (isinstance(time, float) and np.isfinite(time)):
            problems.add(f"{path}, episode {number}, {COLUMN}", found=f"{style} {str(text)[:60]!r} at {time}",
                         expected="a sentence and the time from which it holds", fix=RESTORE)  # fmt: skip
            continue
        wanted.append({**row, "content": " ".join(text.split())})
    return sorted(wanted, key=lambda row: row["timestamp"])
