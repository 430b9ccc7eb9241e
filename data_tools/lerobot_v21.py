"""Writes LeRobot v2.1, which openpi and GR00T read, from any LeRobot dataset this project reads.

    from data_tools.lerobot_v21 import write_v21
    report = write_v21(Path("data/button"), Path("data/button-v21"), workers=2, progress=True)

One Parquet file and one MP4 per camera and episode; videos are cut by copying packets where that loses nothing
(`data_tools/clips.py`), and the report says where it did not. Numbers and instructions are those of the source, whose
quantiles v2.1 has no room for. Beside lerobot's files: `meta/modality.json`, with which GR00T finds the robot's channels.

An interruption costs the episode being written: each is finished by a small file in `meta/parts`, the same command goes
on behind the last one, and `meta/info.json`, without which it is no dataset, is written last.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_tools.clips import cut, frames
from data_tools.convert_pool import Job, Pool
from data_tools.sources.lerobot import LeRobotSource
from vla.durable import TEMPORARY, replace_file
from vla.embodiment import EmbodimentSpec
from vla.episodes.cache import content_hash, default_cache
from vla.episodes.layout import Layout, read_layout
from vla.episodes.layout_v2 import CHUNK_EPISODES, DATA_PATH, VIDEO_PATH
from vla.episodes.rows import Rows, Span, find_frames, read_rows
from vla.errors import UsageError
from vla.recording.statistics import PixelStats, column_stats
from vla.recording.video import describe

VERSION = "v2.1"
_MOMENTS = ("min", "max", "mean", "std", "count")
_BEGUN, _PARTS = "meta/source.json", "meta/parts"


def write_v21(source_root: Path, out: Path, *, workers: int = 0, progress: bool = True) -> dict[str, Any]:
    """The dataset at `source_root` (v2.0, v2.1 or v3.0) as v2.1 in `out`, which is absent, empty, or this very conversion
    interrupted. `workers` processes; 0 works in this one.

    Returns `episodes`, `frames`, `clips_copied`, `clips_encoded` (and `encoded_episodes`, which), `left_out` (columns that are
    not numbers), `resumed` (episodes that were there already) and `seconds`.

    Raises `DataError` naming every problem of the source before anything is written, `UsageError` when `out` is something
    else, `MachineError` when the disk is full (what is finished is kept).
    """
    began, out = time.monotonic(), Path(out)
    layout, problems = read_layout(Path(source_root), None, need_stats=False)
    rows = read_rows(layout, problems)
    videos = [camera for camera in layout.cameras if layout.is_video(camera)]
    spans = {camera: find_frames(layout, rows, camera, problems) for camera in videos} if rows is not None else {}
    problems.raise_if_any()
    assert rows is not None
    fingerprint = content_hash(layout.root, default_cache())
    lock, done = _claim(out, fingerprint)
    try:
        if done is not None:
            return done | {"resumed": layout.num_episodes, "seconds": round(time.monotonic() - began, 2)}
        source = LeRobotSource(layout.root)
        parts = _finished(out)
        resumed = len(parts)
        pictures = _known_pixels(layout)
        jobs = (EpisodeJob(e, {c: spans[c][e] for c in videos}, {k: one for k, entry in pictures.items() if (one := entry[e])})
                for e in range(layout.num_episodes) if e not in parts)  # fmt: skip
        with tqdm(total=layout.num_episodes, initial=resumed, unit="episode", desc=f"v2.1 {out.name}",
                  disable=not progress, leave=False) as bar:  # fmt: skip
            with Pool(workers, Job(source, None, 0, "lossless")) as pool:
                for number, part in pool.ordered(_there, ((out, job, int(rows.starts[job.episode])) for job in jobs)):
                    parts[number] = part
                    bar.update()
        encoded = {e: cameras for e, part in sorted(parts.items()) if (cameras := part["encoded"])}
        report = {
            "out": str(out), "episodes": layout.num_episodes, "frames": layout.num_frames,
            "clips_copied": sum(part["copied"] for part in parts.values()),
            "clips_encoded": sum(map(len, encoded.values())), "encoded_episodes": list(encoded),
            "left_out": source.info.attributes["left_out"],
        }  # fmt: skip
        _finish(layout, rows, out, [parts[e] for e in range(layout.num_episodes)], report["left_out"])
        replace_file(out / _BEGUN, json.dumps({"fingerprint": fingerprint, "report": report}), "the dataset is complete")
        shutil.rmtree(out / _PARTS, ignore_errors=True)
    finally:
        os.close(lock)
    return report | {"resumed": resumed, "seconds": round(time.monotonic() - began, 2)}


def modality(spec: EmbodimentSpec, cameras: dict[str, str]) -> dict[str, Any]:
    """GR00T's `meta/modality.json`: which dimensions of state and action are which channel, and which video is which camera.

    `cameras` maps camera names to feature keys. Two channels of one name are told apart by their convention.
    """
    described: dict[str, Any] = {}
    for part in ("state", "action"):
        described[part], at = {}, 0
        for channel in getattr(spec, part):
            name = channel.name if channel.name not in described[part] else f"{channel.name}_{channel.convention}"
            described[part][name] = {"start": at, "end": at + len(channel.dims)}
            at += len(channel.dims)
    described["video"] = {camera: {"original_key": key} for camera, key in cameras.items()}
    described["annotation"] = {"human.task_description": {"original_key": "task_index"}}
    return described


@dataclass
class EpisodeJob:
    """One episode to write."""

    episode: int
    spans: dict[str, Span]  # camera -> where its pictures lie
    pixels: dict[str, dict[str, Any]]  # feature -> statistics of its pictures, where the source has them


def refuse_other_things(out: Path) -> None:
    """Raise `UsageError` unless `out` is absent, empty, or was begun by `write_v21`."""
    if out.exists() and not out.is_dir():
        raise UsageError(out, found="a file", expected="a folder", fix="choose another destination")
    if out.is_dir() and any(out.iterdir()) and not (out / _BEGUN).is_file():
        raise UsageError(out, found="a folder of other things", expected="no folder, or an empty one",
                         fix="choose another destination, or empty the folder")  # fmt: skip


def _claim(out: Path, fingerprint: str) -> tuple[int, dict[str, Any] | None]:
    """Lock `out` and make sure that it is ours to write; the report of this very conversion when it was finished before."""
    refuse_other_things(out)
    out.mkdir(parents=True, exist_ok=True)
    lock, known = os.open(out, os.O_RDONLY), {}
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(out, found="another process is writing it", expected="one writer at a time",
                             fix="wait for it, or choose another destination") from error  # fmt: skip
        begun = out / _BEGUN
        if not begun.is_file():
            replace_file(begun, json.dumps({"fingerprint": fingerprint}), "nothing has been written yet")
        elif (known := json.loads(begun.read_text())).get("fingerprint") != fingerprint:
            raise UsageError(out, found="the conversion of another dataset, or of this one before it changed",
                             expected="the same source as when it was begun",
                             fix=f"remove it (rm -r {out}), or choose another destination")  # fmt: skip
        for path in [*out.rglob(f".*{TEMPORARY}*")]:
            path.unlink()
    except BaseException:
        os.close(lock)
        raise
    return lock, known.get("report")


def _finished(out: Path) -> dict[int, dict[str, Any]]:
    return {int(path.stem): json.loads(path.read_text()) for path in (out / _PARTS).glob("*.json")}


def _known_pixels(layout: Layout) -> dict[str, list[dict[str, Any] | None]]:
    """Per picture feature, per episode: the statistics the source keeps; None where they must be computed."""
    E = layout.num_episodes
    known: dict[str, list[dict[str, Any] | None]] = {key: [None] * E for key in layout.cameras.values()}
    if layout.version == "v2.0":
        return known
    if layout.is_v2:
        path = layout.root / "meta" / "episodes_stats.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []
        entries = [(line["episode_index"], key, line["stats"].get(key)) for line in lines for key in known]
    else:
        entries = []
        for path in sorted((layout.root / "meta" / "episodes").glob("*/*.parquet")):
            names = pq.read_schema(path).names
            mine = [key for key in known if all(f"stats/{key}/{name}" in names for name in _MOMENTS)]
            columns = ["episode_index", *(f"stats/{key}/{name}" for key in mine for name in _MOMENTS)]
            for row in pq.read_table(path, columns=columns).to_pylist():
                entries += [(row["episode_index"], key, {n: row[f"stats/{key}/{n}"] for n in _MOMENTS}) for key in mine]
    for episode, key, entry in entries:
        if 0 <= episode < E and entry and all(np.shape(entry.get(n)) == (3, 1, 1) for n in _MOMENTS[:4]):
            known[key][episode] = {name: entry[name] for name in _MOMENTS}
    return known


def _there(job: Job, out: Path, part: EpisodeJob, start: int) -> tuple[int, dict[str, Any]]:
    assert isinstance(job.source, LeRobotSource)
    return part.episode, _write_episode(job.source, out, part, start)


def _write_episode(source: LeRobotSource, out: Path, job: EpisodeJob, start: int) -> dict[str, Any]:
    """Write one episode's files, then its part, which says that they are whole."""
    key, layout = f"episode_{job.episode:06d}", source.layout
    safe = "the episodes finished so far are kept; the same command goes on"
    numbers: dict[str, Any] = {"episode_index": job.episode, "episode_chunk": job.episode // CHUNK_EPISODES}
    table = source.table(key)
    T = len(table)
    fields = source.numbers(table, f"{layout.root}, episode {job.episode}")
    fields |= {"index": start + np.arange(T), "frame_index": np.arange(T)}
    stats = {name: _moments(column_stats(np.asarray(values, np.float64))) for name, values in fields.items()}
    encoded, copied, info = [], 0, {}
    for camera, feature in layout.cameras.items():
        if camera in job.spans:
            clip, exact = cut(job.spans[camera])
            copied, encoded = copied + exact, encoded + ([] if exact else [camera])
            replace_file(out / VIDEO_PATH.format(video_key=feature, **numbers), clip, safe)
            info[feature] = describe(clip) if job.episode == 0 else None
        if feature in job.pixels:
            stats[feature] = job.pixels[feature]
        else:
            pictures = frames(job.spans[camera]) if camera in job.spans else source.read(key).images[feature]
            stats[feature] = _moments(PixelStats.of(pictures).to_json())
    stored = [feature for camera, feature in layout.cameras.items() if camera not in job.spans]
    replace_file(out / DATA_PATH.format(**numbers), _parquet(fields, {name: table[name] for name in stored}), safe)
    part = {"stats": stats, "copied": copied, "encoded": encoded, "info": info}
    replace_file(out / _PARTS / f"{job.episode:06d}.json", json.dumps(part, allow_nan=False), safe)
    return part


def _moments(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in _MOMENTS}


def _parquet(fields: dict[str, np.ndarray], pictures: dict[str, pa.ChunkedArray]) -> memoryview:
    """Columns as `lerobot` writes them, with the note from which Hugging Face `datasets` knows pictures and lengths."""
    arrays: dict[str, Any] = dict(pictures)
    features: dict[str, Any] = {name: {"_type": "Image"} for name in pictures}
    for name, values in fields.items():
        value = {"dtype": str(values.dtype), "_type": "Value"}
        array, features[name] = pa.array(values.reshape(-1)), value
        for size in reversed(values.shape[1:]):
            array = pa.FixedSizeListArray.from_arrays(array, size)
            features[name] = {"feature": features[name], "length": size, "_type": "Sequence"}
        arrays[name] = array
    noted = {"huggingface": json.dumps({"info": {"features": features}})}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays).replace_schema_metadata(noted), sink, compression="snappy", write_page_checksum=True)
    return memoryview(sink.getvalue())


def _finish(layout: Layout, rows: Rows, out: Path, parts: list[dict[str, Any]], left_out: list[str]) -> None:
    """The metadata, info.json last."""
    E, meta, safe = layout.num_episodes, out / "meta", "every episode is written; the same command ends the work"
    tasks = [{"task_index": n, "task": task} for n, task in enumerate(layout.instructions)]
    episodes = []
    for e, row in enumerate(rows.episodes):
        here = dict.fromkeys(rows.task[rows.starts[e] : rows.starts[e + 1]].tolist())
        episodes.append({"episode_index": e, "tasks": [layout.instructions[t] for t in here], "length": row["length"]})
    stats = [{"episode_index": e, "stats": part["stats"]} for e, part in enumerate(parts)]
    for name, lines in (("tasks", tasks), ("episodes", episodes), ("episodes_stats", stats)):
        replace_file(meta / f"{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), safe)
    replace_file(meta / "modality.json", json.dumps(modality(layout.spec, layout.cameras), indent=4), safe)
    for name in ("embodiment.json", "recording.json"):
        if (layout.root / "meta" / name).is_file():
            replace_file(meta / name, (layout.root / "meta" / name).read_bytes(), safe)
    features = {}
    for name, feature in layout.info["features"].items():
        if name in left_out:
            continue
        features[name] = {k: v for k, v in feature.items() if k not in ("info", "video_info", "fps")}
        if feature["dtype"] == "video":
            features[name]["info"] = parts[0]["info"].get(name) or {}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        features.setdefault(name, {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None})
    clips = sum(feature["dtype"] == "video" for feature in features.values())
    info = {
        "codebase_version": VERSION, "robot_type": layout.info.get("robot_type"), "total_episodes": E,
        "total_frames": layout.num_frames, "total_tasks": len(tasks), "total_videos": clips * E,
        "total_chunks": -(-E // CHUNK_EPISODES), "chunks_size": CHUNK_EPISODES, "fps": layout.info["fps"],
        "splits": layout.info.get("splits") or {"train": f"0:{E}"}, "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if clips else None, "features": features,
    }  # fmt: skip
    replace_file(meta / "info.json", json.dumps(info, indent=4, ensure_ascii=False), safe)
