"""Reads back what a `LeRobotWriter` had committed, so that it can go on, and clears away what it had not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.stats import PixelStats
from vla.durable import TEMPORARY
from vla.embodiment import EmbodimentSpec, explain
from vla.errors import DataError, UsageError

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_AFRESH = "or record into another folder"


@dataclass
class Committed:
    """A writer's memory of E committed episodes."""

    index: list[dict[str, Any]]  # per episode: where it lies (no statistics)
    open_rows: pa.Table  # the episodes file being filled, whole
    columns: dict[str, list[np.ndarray]]  # feature -> one array per episode
    pixels: dict[str, PixelStats]
    generation: dict[str, Any]  # of meta/pixels.json
    recorded: list[dict[str, Any]]
    tasks: list[str]


def locate(root: Path, template: str, row: Mapping[str, Any], prefix: str, key: str = "") -> Path:
    """The file an episode row points to. `prefix` is `data`, `meta/episodes` or `videos/<key>`."""
    chunk, file = row[f"{prefix}/chunk_index"], row[f"{prefix}/file_index"]
    return root / template.format(chunk_index=chunk, file_index=file, video_key=key)


def read_committed(root: Path, info: dict[str, Any], spec: EmbodimentSpec, header: dict[str, Any]) -> Committed | None:
    """What `info.json` says is committed; None for 0 episodes.

    Raises `UsageError` when the dataset was begun with another robot or `header`, `DataError` when a file is missing or
    this writer did not make the dataset.
    """
    meta, E = root / "meta", int(info["total_episodes"])
    try:
        begun_spec = EmbodimentSpec.model_validate_json((meta / "embodiment.json").read_text())
        recording = json.loads((meta / "recording.json").read_text()) if E else header
        generations = json.loads((meta / "pixels.json").read_text()) if E else []
    except (OSError, ValueError) as error:
        raise DataError(meta, found=error, expected="a dataset begun by this writer",
                        fix=f"restore the file, {_AFRESH}; foreign datasets are not continued") from error  # fmt: skip
    begun = {key: value for key, value in recording.items() if key not in ("tasks", "episodes")}
    differences = explain(begun_spec, spec)
    differences += [f"{key}: {begun.get(key)} against {header.get(key)}" for key in sorted(begun.keys() | header.keys())
                    if begun.get(key) != header.get(key)]  # fmt: skip
    if differences:
        raise UsageError(root, found="; ".join(differences), expected="the settings it was begun with",
                         fix=f"repeat the first command exactly, {_AFRESH}")  # fmt: skip
    if not E:
        return None
    try:
        files = {path: pq.read_table(path) for path in sorted((meta / "episodes").glob("*/*.parquet"))}
        light = [name for name in next(iter(files.values())).column_names if not name.startswith("stats/")]
        index = [row for table in files.values() for row in table.select(light).to_pylist()][:E]
        generation = next(g for g in generations if g["episodes"] == E)
        tasks = pq.read_table(meta / "tasks.parquet").to_pydict()["task"][: info["total_tasks"]]
        data = [pq.read_table(path) for path in dict.fromkeys(locate(root, DATA_PATH, row, "data") for row in index)]
        last = locate(root, EPISODES_PATH, index[-1], "meta/episodes")
        before = sum(locate(root, EPISODES_PATH, row, "meta/episodes") != last for row in index)
        open_rows = files[last].slice(0, E - before)
    except (OSError, pa.ArrowException, StopIteration, KeyError, IndexError) as error:
        raise DataError(root, found=f"{type(error).__name__}: {error}", expected="the files of the last commit",
                        fix=f"restore them, {_AFRESH}") from error  # fmt: skip
    frames = index[-1]["dataset_to_index"]
    pixels = {camera: PixelStats(np.array(h), frames) for camera, h in generation["histograms"].items()}
    columns = _split(pa.concat_tables(data), [row["dataset_to_index"] for row in index])
    return Committed(index, open_rows, columns, pixels, generation, recording["episodes"][:E], tasks)


def _split(table: pa.Table, stops: list[int]) -> dict[str, list[np.ndarray]]:
    columns = {}
    for key in table.column_names:
        column = table[key].combine_chunks()
        nested = pa.types.is_fixed_size_list(column.type)
        values = (column.flatten() if nested else column).to_numpy(zero_copy_only=False)
        if nested or key in ("action", "observation.state"):
            values = values.reshape(len(column), -1)
        columns[key] = np.split(values[: stops[-1]], stops[:-1])
    return columns


def sweep(root: Path, index: list[dict[str, Any]], video_keys: list[str]) -> list[str]:
    """Remove the files no committed episode points to and half-written ones; return their names."""
    wanted = set()
    for row in index:
        wanted.add(locate(root, DATA_PATH, row, "data"))
        wanted.add(locate(root, EPISODES_PATH, row, "meta/episodes"))
        wanted.update(locate(root, VIDEO_PATH, row, f"videos/{key}", key) for key in video_keys)
    removed = []
    for folder in ("data", "videos", "meta"):
        for path in sorted((root / folder).rglob("*")):
            shard = path.suffix in (".parquet", ".mp4") and path.parent != root / "meta"
            if path.is_file() and (TEMPORARY in path.name or (shard and path not in wanted)):
                path.unlink()
                removed.append(str(path.relative_to(root)))
    return removed
