"""Proves a conversion: every written episode is read back and compared with the source, read again through its card.

This file shares nothing with the writer but the layout's path templates: rows come from the Parquet files, pictures are
decoded from the MP4 files at the place `meta/episodes` names. Actions and states must be equal bit by bit, pictures by
sha256 (`lossless`) or close (`PSNR_LIMIT`) and not shifted in time; also lengths, instructions, timestamps and indices.
One episode at a time is held in memory per worker.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from data_tools.convert_pool import Job, Pool
from vla.embodiment import EmbodimentSpec
from vla.errors import DataError
from vla.recording.committed import DATA_PATH, VIDEO_PATH, locate
from vla.recording.video import decode
from vla.schema import Episode

PSNR_LIMIT = {"rgb": 30.0, "yuv420p": 22.0}
"""dB over an episode of one camera, below which a lossy copy counts as other pictures. Loose on purpose: 4:2:0 costs
saturated pictures most, a swapped camera or colour channel still falls below."""


def verify_episodes(
    pool: Pool, root: Path, spec: EmbodimentSpec, recorded: list[dict[str, Any]], video: str, progress: bool
) -> dict[str, Any]:
    """Compare all episodes of the dataset at `root` with the keys `recorded` names (`source`).

    Returns `{"episodes", "pictures", "pictures_identical", "worst_psnr", "psnr_limit", "differences"}`; a difference is
    `{"key", "where", "found", "expected"}`.
    """
    cameras, result = list(spec.cameras), {"episodes": 0, "pictures": 0}
    differences, worst = [], np.inf
    calls = ((root, row, entry["source"], cameras, spec.state_dim) for row, entry in zip(_rows(root), recorded, strict=True))
    with tqdm(total=len(recorded), unit="ep", desc="verifying", disable=not progress) as bar:
        for found, frames, psnr in pool.ordered(_compare, calls):
            result["episodes"] += 1
            result["pictures"] += frames
            worst = min(worst, psnr)
            differences += found
            bar.update()
    exact = video == "lossless"
    return result | {
        "pictures_identical": exact and not differences, "worst_psnr": round(worst, 2) if np.isfinite(worst) else None,
        "psnr_limit": PSNR_LIMIT.get(video), "differences": differences,
    }  # fmt: skip


def _rows(root: Path) -> Iterator[dict[str, Any]]:
    """Episode rows without their statistics, a few at a time."""
    for path in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
        file = pq.ParquetFile(path)
        light = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
        for batch in file.iter_batches(64, columns=light):
            yield from batch.to_pylist()


# ---- in a worker ----


def _compare(
    job: Job, root: Path, row: dict[str, Any], key: str, cameras: list[str], state_dim: int
) -> tuple[list[dict[str, str]], int, float]:
    """(differences, pictures compared, worst PSNR) of one episode."""
    where, differences = f"{root}, episode {row['episode_index']} (source {key})", []

    def differ(what: str, found: object, expected: object) -> None:
        differences.append({"key": key, "where": f"{where}, {what}", "found": str(found), "expected": str(expected)})

    try:
        raw, episode = job.read(key)
    except DataError as damage:
        differ("source", f"cannot be read a second time: {damage.found}", "the episode that was converted")
        return differences, 0, np.inf
    T = len(episode)
    if row["length"] != T or row["tasks"] != [episode.instruction]:
        differ("meta/episodes", (row["length"], row["tasks"]), (T, [episode.instruction]))
    if row["dataset_to_index"] - row["dataset_from_index"] != T:
        differ("length", row["dataset_to_index"] - row["dataset_from_index"], T)
        return differences, 0, np.inf
    times = raw.fields.get("timestamp") if job.source.kind.startswith("lerobot") else None
    if times is not None and len(times) == T:
        late = float(np.abs(times.astype(np.float64).reshape(-1) - times[0] - np.arange(T) / job.fps).max())
        if late > 0.5 / job.fps:
            differ("timestamp", f"rows up to {late:g} s beside the source's own times", f"within {0.5 / job.fps:g} s")
    _compare_columns(root, row, episode, job.fps, state_dim, differ)
    worst, frames = np.inf, 0
    for camera in cameras:
        psnr = _compare_frames(root, row, camera, episode.images[camera], job, differ)
        worst, frames = min(worst, psnr), frames + T
    return differences, frames, worst


def _compare_columns(root: Path, row: dict[str, Any], episode: Episode, fps: int, state_dim: int, differ: Any) -> None:
    T, start, number = len(episode), row["dataset_from_index"], row["episode_index"]
    path = locate(root, DATA_PATH, row, "data")
    table = _data(path, path.stat().st_mtime_ns)
    index = table["index"].to_numpy()
    at = int(np.searchsorted(index, start))
    table = table.slice(at, T)
    last = np.arange(T) == T - 1
    expected = {
        "action": episode.action, "timestamp": (np.arange(T) / fps).astype(np.float32), "frame_index": np.arange(T),
        "episode_index": np.full(T, number), "index": start + np.arange(T), "next.done": last,
        "next.success": last & episode.success,
    }  # fmt: skip
    if state_dim:
        expected["observation.state"] = episode.state
    for name, values in expected.items():
        column = table[name].combine_chunks()
        flat = column.flatten() if hasattr(column.type, "list_size") else column
        found = flat.to_numpy(zero_copy_only=False)
        if len(found) != values.size or found.dtype != values.dtype:
            differ(name, f"{found.dtype}, {len(found)} numbers", f"{values.dtype}, {values.size}")
            continue
        unequal = np.flatnonzero((_bits(found) != _bits(values)).any(1))
        if len(unequal):
            at, wide = unequal[0], values.size // T
            differ(f"{name}[{at // wide}, {at % wide}]", f"{found[at]!r} ({len(unequal)} numbers differ)",
                   repr(values.reshape(-1)[at]))  # fmt: skip
    path = root / "meta" / "tasks.parquet"
    tasks = _tasks(path, path.stat().st_mtime_ns)
    wrong = {int(task) for task in table["task_index"].to_numpy()} - {tasks.get(episode.instruction)}
    if wrong:
        differ("task_index", sorted(wrong), f"{tasks.get(episode.instruction)} ({episode.instruction!r})")


def _compare_frames(root: Path, row: dict[str, Any], camera: str, frames: np.ndarray, job: Job, differ: Any) -> float:
    """PSNR in dB of one camera, infinite when the pictures are identical."""
    key = f"observation.images.{camera}"
    path, first = locate(root, VIDEO_PATH, row, f"videos/{key}", key), row[f"videos/{key}/from_timestamp"]
    wanted, got, t = hashlib.sha256(), hashlib.sha256(), -1
    errors = np.zeros(3)  # against the picture before, the picture itself, the picture after
    counted = np.zeros(3, np.int64)
    try:
        for t, frame in enumerate(decode(path, round(first * job.fps), len(frames), job.fps)):
            wanted.update(np.ascontiguousarray(frames[t]).data)
            got.update(np.ascontiguousarray(frame).data)
            if frame.shape != frames[t].shape:
                differ(f"camera {camera!r}, frame {t}", frame.shape, frames[t].shape)
                return np.inf
            if job.video == "lossless":
                continue
            for n, other in enumerate((t - 1, t, t + 1)):
                if 0 <= other < len(frames):
                    errors[n] += np.mean((frame.astype(np.float32) - frames[other]) ** 2)
                    counted[n] += 1
    except DataError as error:
        differ(f"camera {camera!r}", f"after frame {t}: {error.found}", error.expected)
        return np.inf
    if wanted.digest() == got.digest():
        return np.inf
    if job.video == "lossless":
        differ(f"camera {camera!r}", f"frames with sha256 {got.hexdigest()}", wanted.hexdigest())
        return np.inf
    mean = errors / np.maximum(counted, 1)
    psnr = float(10 * np.log10(255**2 / max(mean[1], 1e-12)))
    if psnr < PSNR_LIMIT[job.video]:
        differ(f"camera {camera!r}", f"PSNR {psnr:.1f} dB", f"{PSNR_LIMIT[job.video]:g} dB or more")
    for n, word in ((0, "before"), (2, "after")):
        if counted[n] and mean[n] < 0.9 * mean[1]:
            differ(f"camera {camera!r}", f"pictures nearer to the one {word} than to their own", "no shift in time")
    return psnr


def _bits(values: np.ndarray) -> np.ndarray:
    """(n, bytes per number): equal only if the numbers are, -0.0 and NaN included."""
    return np.ascontiguousarray(values).reshape(-1, 1).view(np.uint8)


# The last file read is kept, since episodes come in its order; the time of writing tells a file from its successor.


@functools.lru_cache(maxsize=1)
def _data(path: Path, written: int) -> Any:
    return pq.read_table(path, page_checksum_verification=True)


@functools.lru_cache(maxsize=1)
def _tasks(path: Path, written: int) -> dict[str, int]:
    table = pq.read_table(path).to_pydict()
    return dict(zip(table["task"], table["task_index"], strict=True))
