"""Reads back what a `LeRobotWriter` had committed, so that it can go on, and clears away what it had not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.durable import TEMPORARY
from vla.embodiment import EmbodimentSpec, explain
from vla.errors import DataError, UsageError
from vla.recording.columns import EpisodeRows, Running, from_table
from vla.recording.statistics import PixelStats

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_AFRESH = "or record into another folder"


@dataclass
class Committed:
    """A writer's memory of E committed episodes. Of files that are full, nothing but statistics is left."""

    running: Running
    pixels: dict[str, PixelStats]
    generation: dict[str, Any] | None = None  # of meta/pixels.json
    last: dict[str, Any] | None = None  # the last episode's row of meta/episodes, without statistics
    open_rows: pa.Table | None = None  # the episodes file being filled, whole
    open_data: list[EpisodeRows] = field(default_factory=list)  # the episodes of the data file being filled
    tasks: dict[str, int] = field(default_factory=dict)
    recorded: list[dict[str, Any]] = field(default_factory=list)

    @property
    def frames(self) -> int:
        """F."""
        return self.last["dataset_to_index"] if self.last else 0


def locate(root: Path, template: str, row: Mapping[str, Any], prefix: str, key: str = "") -> Path:
    """The file an episode row points to. `prefix` is `data`, `meta/episodes` or `videos/<key>`."""
    chunk, file = row[f"{prefix}/chunk_index"], row[f"{prefix}/file_index"]
    return root / template.format(chunk_index=chunk, file_index=file, video_key=key)


def read_committed(root: Path, info: dict[str, Any], spec: EmbodimentSpec, header: dict[str, Any]) -> Committed | None:
    """What `info.json` says is committed; None for 0 episodes. One data file at a time is held in memory.

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
        generation = next(g for g in generations if g["episodes"] == E)
        tasks = pq.read_table(meta / "tasks.parquet").to_pydict()["task"][: info["total_tasks"]]
        index = _index(root)
        place = _places(index, "data")[:E]
        lengths = index["length"].to_numpy()[:E]
        running, episodes, first = Running(header["fps"]), [], 0
        for at in dict.fromkeys(place):
            count = place.count(at)
            table = pq.read_table(root / DATA_PATH.format(chunk_index=at[0], file_index=at[1]))
            episodes = from_table(table, first, lengths[first : first + count].tolist())
            running = running.plus(episodes)
            first += count
        last = index.slice(E - 1, 1).to_pylist()[0]
        files = _places(index, "meta/episodes")
        table = pq.read_table(locate(root, EPISODES_PATH, last, "meta/episodes"))
        open_rows = table.slice(0, files[:E].count(files[E - 1]))
        recorded = recording["episodes"][:E]
        if len(recorded) != E or first != E:
            raise ValueError(f"{len(recorded)} and {first} of {E} episodes")
    except (OSError, pa.ArrowException, StopIteration, LookupError, ValueError) as error:
        raise DataError(root, found=f"{type(error).__name__}: {error}", expected="the files of the last commit",
                        fix=f"restore them, {_AFRESH}") from error  # fmt: skip
    pixels = {camera: PixelStats(np.array(h), last["dataset_to_index"]) for camera, h in generation["histograms"].items()}
    numbers = {task: n for n, task in enumerate(tasks)}
    return Committed(running, pixels, generation, last, open_rows, episodes, numbers, recorded)


def _index(root: Path) -> pa.Table:
    """Where every episode lies, committed or not."""
    tables = []
    for path in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
        light = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
        tables.append(pq.read_table(path, columns=light))
    return pa.concat_tables(tables)


def _places(index: pa.Table, prefix: str) -> list[tuple[int, int]]:
    columns = (index[f"{prefix}/{kind}_index"].to_pylist() for kind in ("chunk", "file"))
    return list(zip(*columns, strict=True))


def sweep(root: Path, video_keys: list[str], episodes: int) -> list[str]:
    """Remove the files none of the first `episodes` episodes points to and half-written ones; return their names."""
    wanted = set()
    if episodes:
        index = _index(root)[:episodes]
        templates = {"data": DATA_PATH, "meta/episodes": EPISODES_PATH, **{f"videos/{key}": VIDEO_PATH for key in video_keys}}
        for prefix, template in templates.items():
            for chunk, file in set(_places(index, prefix)):
                key = prefix.removeprefix("videos/")
                wanted.add(root / template.format(chunk_index=chunk, file_index=file, video_key=key))
    removed = []
    for folder in ("data", "videos", "meta"):
        for path in sorted((root / folder).rglob("*")):
            shard = path.suffix in (".parquet", ".mp4") and path.parent != root / "meta"
            if path.is_file() and (TEMPORARY in path.name or (shard and path not in wanted)):
                path.unlink()
                removed.append(str(path.relative_to(root)))
    return removed
