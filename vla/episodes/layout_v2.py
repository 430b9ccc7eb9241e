"""What differs in LeRobot v2.0 and v2.1: JSON lines instead of Parquet metadata, and one file per episode.

Read as `lerobot` 0.3.3 (v2.1) and the demonstration sets of GR00T (v2.0) have them: `video_info` or `info` per camera,
float32 or float64 actions, statistics per episode (v2.1, `episodes_stats.jsonl`) or of the whole (v2.0, `stats.json`),
neither with quantiles. Everything here is turned into what `layout.py` and `rows.py` know from v3.0, so nothing behind
them asks for the version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.episodes.problems import RESTORE, Problems, only_numbers, short
from vla.normalize import QUANTILES

if TYPE_CHECKING:
    from vla.episodes.layout import Layout

DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
CHUNK_EPISODES = 1000
"""Episodes per chunk where info.json does not say."""


def read_lines(path: Path, problems: Problems) -> list[dict[str, Any]] | None:
    """Every line of a JSON lines file; None, and a finding with its line, when it is absent or one is no object."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        problems.add(path, found="no such file", expected="one JSON object per line", fix=RESTORE)
        return None
    except (OSError, UnicodeDecodeError) as error:
        problems.add(path, found=short(error), expected="one JSON object per line", fix=RESTORE)
        return None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            row = short(error)
        if not isinstance(row, dict):
            problems.add(f"{path}, line {number}", found=str(row)[:100], expected="a JSON object", fix=RESTORE)
            return None
        rows.append(row)
    return rows


def read_tasks(root: Path, problems: Problems) -> list[str]:
    """Instructions by `task_index`; "" for a number that `tasks.jsonl` leaves out, which `read_tables` then refuses."""
    path = root / "meta" / "tasks.jsonl"
    rows = read_lines(path, problems)
    if rows is None:
        return []
    try:
        by_index = {int(row["task_index"]): str(row["task"]) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        problems.add(path, found=short(error), expected="task_index and task on every line", fix=RESTORE)
        return []
    if by_index and not 0 <= min(by_index) <= max(by_index) <= 10 * len(rows) + 1000:
        problems.add(path, found=f"task_index {min(by_index)} to {max(by_index)}", expected="numbers from 0 on", fix=RESTORE)
        return []
    return [by_index.get(number, "") for number in range(max(by_index, default=-1) + 1)]


def read_stats(root: Path, version: str, problems: Problems) -> dict[str, dict[str, Any]]:
    """Feature -> {min, max, mean, std, count} of the whole dataset; {} when there are none.

    v2.1 keeps them per episode: minima and maxima merge exactly, means and deviations by count. A `stats.json` beside them
    counts for features of which it has quantiles, as `vla data stats --write` leaves it.
    """
    path = root / "meta" / "stats.json"
    try:
        stats = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        problems.add(path, found=f"not JSON: {error}", expected="a JSON object", fix=RESTORE)
        return {}
    stats = stats if isinstance(stats, dict) else {}
    path = root / "meta" / "episodes_stats.jsonl"
    if version == "v2.0" or not path.is_file():
        return stats
    rows = read_lines(path, problems)
    try:
        merged = _merge([row["stats"] for row in rows]) if rows else {}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problems.add(path, found=short(error), expected="min, max, mean, std and count per feature", fix=RESTORE)
        return {}
    return merged | {key: entry for key, entry in stats.items() if isinstance(entry, dict) and QUANTILES.keys() <= entry.keys()}


def _merge(episodes: list[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    merged = {}
    for key in episodes[0]:
        entries = [entry[key] for entry in episodes if key in entry]
        low, high, mean, std = (np.array([e[name] for e in entries], np.float64) for name in ("min", "max", "mean", "std"))
        count = np.array([np.reshape(e["count"], -1)[0] for e in entries], np.float64).reshape(-1, *[1] * (mean.ndim - 1))
        total = np.maximum(count.sum(), 1)
        centre = (mean * count).sum(0) / total
        spread = np.sqrt(((std**2 + (mean - centre) ** 2) * count).sum(0) / total)
        merged[key] = {"min": low.min(0).tolist(), "max": high.max(0).tolist(), "mean": centre.tolist(),
                       "std": spread.tolist(), "count": [int(count.sum())]}  # fmt: skip
    return merged


def read_episodes(layout: Layout, problems: Problems) -> list[dict[str, Any]] | None:
    """One row per episode with the columns v3.0 has; an episode's video begins at 0."""
    path = layout.root / "meta" / "episodes.jsonl"
    rows = read_lines(path, problems)
    if rows is None:
        return None
    try:
        rows = sorted(({**row, "episode_index": int(row["episode_index"]), "length": int(row["length"])} for row in rows),
                      key=lambda row: row["episode_index"])[: layout.num_episodes]  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        problems.add(path, found=short(error), expected="episode_index and length on every line", fix=RESTORE)
        return None
    if [row["episode_index"] for row in rows] != list(range(layout.num_episodes)) or any(r["length"] < 1 for r in rows):
        problems.add(path, found=f"{len(rows)} episodes", fix=RESTORE,
                     expected=f"episodes 0 to {layout.num_episodes - 1}, each once and at least one step long")  # fmt: skip
        return None
    start = 0
    for row in rows:
        row |= {"dataset_from_index": start, "dataset_to_index": start + row["length"]}
        start += row["length"]
        for key in layout.cameras.values():
            row |= {f"videos/{key}/from_timestamp": 0.0, f"videos/{key}/to_timestamp": row["length"] / layout.fps}
    return rows


def read_tables(layout: Layout, episodes: list[dict[str, Any]], columns: list[str], problems: Problems) -> list[pa.Table]:
    """The wanted columns of every episode's own file, in order of `frame_index`, with `index` counted anew. Files that are
    missing, damaged or of another length are findings."""
    tables = []
    for row in episodes:
        path, number = layout.path("data_path", row, "data"), row["episode_index"]
        try:
            file = pq.ParquetFile(path, page_checksum_verification=True)
            names = set(file.schema_arrow.names)
            lacking = [c for c in columns if c not in names and c != "index"]
            if lacking:
                problems.add(path, found=f"no column {', '.join(lacking)}", expected=f"columns {columns}", fix=RESTORE)
                continue
            if not only_numbers(path, file.schema_arrow, [*columns, "frame_index"], problems):
                continue
            wanted = [c for c in [*columns, "frame_index"] if c in names and c != "index"]
            table = file.read(columns=list(dict.fromkeys(wanted)))
        except FileNotFoundError:
            problems.add(path, found="no such file", expected="the rows of its episode", fix=RESTORE)
            continue
        except (OSError, pa.ArrowException) as error:
            problems.add(path, found=short(error), expected="a Parquet file with its footer", fix=RESTORE)
            continue
        if len(table) != row["length"]:
            problems.add(path, found=f"{len(table)} rows", expected=f"{row['length']}, as meta/episodes.jsonl says", fix=RESTORE)
            continue
        if "frame_index" in names:
            table = table.sort_by("frame_index").drop_columns(["frame_index"])
        belongs = np.unique(table["episode_index"].to_numpy())
        if belongs.tolist() != [number]:
            problems.add(path, found=f"rows of episodes {belongs.tolist()[:5]}", expected=f"episode {number}", fix=RESTORE)
            continue
        index = np.arange(row["dataset_from_index"], row["dataset_to_index"])
        tables.append(_alike(table.append_column("index", pa.array(index)).select(columns)))
        nameless = [t for t in np.unique(table["task_index"].to_numpy())
                    if 0 <= t < len(layout.instructions) and not layout.instructions[t]]  # fmt: skip
        if nameless:
            problems.add(layout.root / "meta" / "tasks.jsonl", found=f"no task {nameless[0]}, which episode {number} has",
                         expected="an instruction per task_index", fix=RESTORE)  # fmt: skip
    return tables


def _alike(table: pa.Table) -> pa.Table:
    """Vectors as lists of float64, so that files of several writers (fixed and free lengths, both precisions) join."""
    for at, field in enumerate(table.schema):
        if pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type) or pa.types.is_large_list(field.type):
            table = table.set_column(at, field.name, table[field.name].cast(pa.list_(pa.float64())))
    return table
