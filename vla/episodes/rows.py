"""Reads the rows of a LeRobot dataset and finds every row's frame in its video, by demultiplexing alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.error import FFmpegError

from vla.episodes import layout_v2
from vla.episodes.language import Segments, read_segments
from vla.episodes.layout import ACTION, STATE, Layout, check_statistics
from vla.episodes.problems import RESTORE, Problems, only_numbers, short

_MOST_NAMED = 5
"""How many bad values of one kind are named one by one; the rest are counted."""
_EPISODE_COLUMNS = ("episode_index", "length", "data/chunk_index", "data/file_index")
_VIDEO_COLUMNS = ("from_timestamp", "to_timestamp", "chunk_index", "file_index")
"""Of `meta/episodes`; without the last two in v2.x, where a file's name says them."""


@dataclass
class Rows:
    """The numeric side of a dataset: E episodes, F frames in order."""

    episodes: list[dict[str, Any]]
    starts: np.ndarray  # (E + 1,) int64
    state: np.ndarray  # (F, S) float32
    action: np.ndarray  # (F, A) float32
    task: np.ndarray  # (F,) int32
    timestamp: np.ndarray  # (F,) float64, seconds since the start of the episode
    segments: Segments | None = None
    """Which subtask is under way where; None for who looks at a single episode's pictures."""


def read_rows(layout: Layout, problems: Problems) -> Rows | None:
    """Everything but the pictures; None when a file could not be read. Findings go to `problems`."""
    episodes = read_episodes(layout, problems)
    if episodes is None:
        return None
    columns = [c for c in (STATE, ACTION) if c in layout.info["features"]]
    columns += ["timestamp", "episode_index", "index", "task_index"]
    before = len(problems.found)
    tables = (layout_v2.read_tables if layout.is_v2 else _read_tables)(layout, episodes, columns, problems)
    if len(problems.found) > before:
        return None
    if not tables:
        problems.add(layout.root, found="0 episodes", expected="at least one",
                     fix="go on with the recording: run the same command")  # fmt: skip
        return None
    try:
        table = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        problems.add(layout.root / "data", found=short(error), expected="the same columns in every file", fix=RESTORE)
        return None
    F = layout.num_frames
    index = _column(table, "index", np.int64)
    order = np.argsort(index, kind="stable")
    order = order[index[order] < F]  # rows behind the last committed frame are an unfinished append
    lengths = np.array([row["length"] for row in episodes])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    belongs = _column(table, "episode_index", np.int64)[order]
    if starts[-1] != F or len(order) != F or not np.array_equal(belongs, np.repeat(np.arange(len(episodes)), lengths)):
        E = len(episodes)
        counts = np.bincount(np.clip(belongs, -1, E) + 1, minlength=E + 2)[1:-1]  # rows of no episode: at the ends
        first = next(iter(np.flatnonzero(counts != lengths).tolist()), "-")
        problems.add(layout.root / "data", found=f"{len(order)} rows; episode lengths sum to {starts[-1]}; "
                     f"first episode that differs: {first}",
                     expected=f"{F} rows as meta/info.json and meta/episodes say", fix=RESTORE)  # fmt: skip
        return None
    wide = {}
    for part, key, dims in (("state", STATE, layout.spec.state_names), ("action", ACTION, layout.spec.action_names)):
        values = _wide(layout, table, key, problems)
        if values is None:
            return None
        wide[part] = values = values[order]
        _check_finite(layout, key, values, starts, dims, problems)
        finite = np.isfinite(values)
        check_statistics(layout, key, values.min(0, initial=np.inf, where=finite),
                         values.max(0, initial=-np.inf, where=finite), problems)  # fmt: skip
    task = _column(table, "task_index", np.int32)[order]
    if layout.instructions and (task.min() < 0 or task.max() >= len(layout.instructions)):
        name = "tasks.jsonl" if layout.is_v2 else "tasks.parquet"
        problems.add(layout.root / "meta" / name, found=f"task_index up to {task.max()} in the data",
                     expected=f"below {len(layout.instructions)}, the number of tasks", fix=RESTORE)  # fmt: skip
    timestamp = _column(table, "timestamp", np.float64)[order]
    _check_rate(layout, timestamp, starts, problems)
    segments = read_segments(layout, episodes, starts, timestamp, problems)
    return Rows(episodes, starts, wide["state"], wide["action"], task, timestamp, segments)


def _read_tables(layout: Layout, episodes: list[dict[str, Any]], columns: list[str], problems: Problems) -> list[pa.Table]:
    tables = []
    for path in sorted({layout.path("data_path", row, "data") for row in episodes}):
        try:
            table = pq.read_table(path, columns=columns, page_checksum_verification=True)
            if only_numbers(path, table.schema, columns, problems):
                tables.append(table)
        except FileNotFoundError:
            problems.add(path, found="no such file", expected="the rows of its episodes", fix=RESTORE)
        except (OSError, pa.ArrowException) as error:
            problems.add(path, found=short(error), expected="a Parquet file with its footer", fix=RESTORE)
    return tables


def read_episodes(layout: Layout, problems: Problems) -> list[dict[str, Any]] | None:
    """One row per episode: its length and where its rows and pictures lie; None, and findings, when they do not add up."""
    if layout.is_v2:
        return layout_v2.read_episodes(layout, problems)
    files = sorted((layout.root / "meta" / "episodes").glob("*/*.parquet"))
    rows: list[dict[str, Any]] = []
    for path in files:
        try:
            names = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
            found = pq.read_table(path, columns=names, page_checksum_verification=True).to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: names or words that are no UTF-8
            problems.add(path, found=short(error), expected="a Parquet file with its footer", fix=RESTORE)
            return None
        lacking = [name for name in _EPISODE_COLUMNS if any(not isinstance(row.get(name), int) for row in found)]
        if lacking:
            problems.add(path, found=f"no whole numbers in {', '.join(lacking)}", expected="one row per episode, saying where "
                         "its rows lie", fix=RESTORE)  # fmt: skip
            return None
        rows += found
    rows = sorted(rows, key=lambda row: row["episode_index"])[: layout.num_episodes]
    if [row["episode_index"] for row in rows] != list(range(layout.num_episodes)):
        problems.add(layout.root / "meta" / "episodes", found=f"{len(rows)} episodes in {len(files)} files",
                     expected=f"episodes 0 to {layout.num_episodes - 1}, each once", fix=RESTORE)  # fmt: skip
        return None
    return rows


def _column(table: pa.Table, name: str, dtype: Any) -> np.ndarray:
    return table[name].combine_chunks().to_numpy(zero_copy_only=False).reshape(-1).astype(dtype)


def _wide(layout: Layout, table: pa.Table, key: str, problems: Problems) -> np.ndarray | None:
    """(rows, dims) float32 of a vector feature; nulls and ragged rows are findings."""
    if key not in table.column_names:
        return np.zeros((len(table), 0), np.float32)
    width = int(np.prod(layout.info["features"][key]["shape"]))
    column = table[key].combine_chunks()
    flat = column.flatten() if pa.types.is_nested(column.type) else column
    if len(flat) != len(column) * width or flat.null_count or column.null_count:
        problems.add(layout.root / "data", found=f"{key}: {len(flat)} numbers ({flat.null_count} null) in {len(column)} "
                     "rows", expected=f"{width} per row", fix=RESTORE)  # fmt: skip
        return None
    return flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, width)


def _check_finite(layout: Layout, key: str, values: np.ndarray, starts: np.ndarray, dims: list[str], problems: Problems) -> None:
    bad = np.argwhere(~np.isfinite(values))
    for n, (frame, d) in enumerate(bad[:_MOST_NAMED], 1):
        episode = int(np.searchsorted(starts, frame, "right")) - 1
        name = dims[d] if d < len(dims) else str(d)
        more = f" (and {len(bad) - n} more)" if n == _MOST_NAMED < len(bad) else ""
        problems.add(f"{layout.root}, episode {episode}, frame {frame - starts[episode]}, {key}[{d}] ({name})",
                     found=f"{values[frame, d]}{more}", expected="a finite number",
                     fix="repair or drop this episode; a NaN in an action would become a full-scale move")  # fmt: skip


def _check_rate(layout: Layout, timestamp: np.ndarray, starts: np.ndarray, problems: Problems) -> None:
    """Rows must follow each other by 1 / fps, give or take half of it."""
    steps = np.diff(timestamp)
    steps[starts[1:-1] - 1] = 1 / layout.fps  # from one episode to the next
    wrong = np.flatnonzero(~(np.abs(steps - 1 / layout.fps) <= 0.5 / layout.fps))
    if len(wrong):
        episode = int(np.searchsorted(starts, wrong[0], "right")) - 1
        problems.add(f"{layout.root}, episode {episode}, frame {wrong[0] - starts[episode]}, timestamp",
                     found=f"{steps[wrong[0]]:g} s to the next row ({len(wrong)} such steps)",
                     expected=f"{1 / layout.fps:g} s, since meta/info.json says {layout.fps:g} fps",
                     fix="correct fps in meta/info.json, or resample the episode")  # fmt: skip


@dataclass
class Span:
    """Where one episode's frames lie: `ticks[t]` is the presentation time of frame t in `path`'s own time base."""

    path: Path
    ticks: np.ndarray  # (T,) int64


PacketTimes = dict[Path, tuple[np.ndarray, float] | None]
"""Per video: presentation times in ticks, and seconds per tick; None when it cannot be read."""


def find_frames(layout: Layout, rows: Rows, camera: str, problems: Problems, known: PacketTimes | None = None) -> list[Span]:
    """One `Span` per episode of a video camera; videos that are cut short or do not fit the rows are findings.

    `known` remembers the packets of videos between calls, for whoever asks episode by episode.
    """
    key, half = layout.cameras[camera], 0.5 / layout.fps
    known = {} if known is None else known
    spans: list[Span] = []
    missing: dict[Path, list[int]] = {}
    needed: Counter[Path] = Counter()
    for number, row in enumerate(rows.episodes):
        prefix = f"videos/{key}"
        if any(row.get(f"{prefix}/{name}") is None for name in _VIDEO_COLUMNS[: 2 if layout.is_v2 else 4]):
            problems.add(layout.root / "meta" / "episodes", found=f"no columns {prefix}/...",
                         expected=f"where the video of camera {camera!r} lies", fix=RESTORE)  # fmt: skip
            return []
        path = layout.path("video_path", row, prefix, key)
        needed[path] += row["length"]
        if path not in known:
            known[path] = _packet_times(path, problems)
        entry = known[path]
        if entry is None:
            continue
        ticks, base = entry
        wanted = row[f"{prefix}/from_timestamp"] + rows.timestamp[rows.starts[number] : rows.starts[number + 1]]
        times = ticks * base
        at = np.clip(np.searchsorted(times, wanted - half), 0, max(len(times) - 1, 0))
        fits = len(times) > 0 and bool((np.abs(times[at] - wanted) <= half).all() and (np.diff(at) > 0).all())
        span = row[f"{prefix}/to_timestamp"] - row[f"{prefix}/from_timestamp"]
        if not fits or span * layout.fps < row["length"] - 1:
            missing.setdefault(path, []).append(row["episode_index"])
            continue
        spans.append(Span(path, ticks[at]))
    for path, numbers in missing.items():
        entry = known[path]
        frames = len(entry[0]) if entry else 0
        problems.add(path, found=f"{frames} frames; no frame at the time of some row in episodes {_list(numbers)}",
                     expected=f"{needed[path]} frames at {layout.fps:g} fps, one per row", fix=RESTORE)  # fmt: skip
    return spans


def _packet_times(path: Path, problems: Problems) -> tuple[np.ndarray, float] | None:
    """(presentation times in ticks, seconds per tick) of every packet of a video."""
    if not path.is_file():
        problems.add(path, found="no such file", expected="the video of its episodes", fix=RESTORE)
        return None
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream: Any = container.streams.video[0]
            if stream.codec_context is None:
                problems.add(path, found="a video in no format this FFmpeg can decode", expected="H.264, AV1, HEVC, ...",
                             fix=RESTORE)  # fmt: skip
                return None
            ticks = sorted(p.pts for p in container.demux(stream) if p.pts is not None and p.size)
            return np.array(ticks, np.int64), float(stream.time_base)
    except (FFmpegError, IndexError) as error:
        problems.add(path, found=f"a video that cannot be read, {short(error)}", expected="a complete MP4", fix=RESTORE)
        return None


def _list(numbers: Iterable[int]) -> str:
    numbers = list(numbers)
    more = len(numbers) - _MOST_NAMED
    return f"{numbers[:_MOST_NAMED]}" + (f" and {more} more" if more > 0 else "")
