"""A writer of LeRobotDataset v3.0 that an interruption cannot break.

Format: `meta/info.json`, `meta/stats.json`, `meta/tasks.parquet` (pandas index `task`), `meta/episodes/**.parquet`,
`data/**.parquet`, one MP4 per camera with many episodes in it. Checked against the real `lerobot` by
`benchmarks/lerobot_roundtrip.py`. Beside it, ignored by lerobot: `meta/embodiment.json`, `meta/recording.json`,
`meta/pixels.json`.

Every commit *replaces* files (temporary file, fsync, rename) by ones that have the same beginning and more at the end,
and `info.json`, which says how many episodes count, goes last. So at any moment, SIGKILL and a full disk included, a
reader that believes `info.json` sees the last commit; what lies behind it is cut off by the next one.

Memory and the time of a commit do not grow with the dataset: files that are full are closed for good, and of what was
committed only the rows of the open data file, running statistics (`columns.py`) and one line per episode
(`meta/recording.json`, under 1 KB) are held.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.durable import disk_full, is_disk_full, replace_file
from vla.embodiment import EmbodimentSpec
from vla.errors import DataError, MachineError, UsageError
from vla.recording.columns import EpisodeRows, Running, timestamps, to_table
from vla.recording.committed import DATA_PATH, EPISODES_PATH, VIDEO_PATH, Committed, locate, read_committed, sweep
from vla.recording.encoded import EncodedEpisode, encode_episode, image_key
from vla.recording.language import COLUMN, FEATURE, to_rows
from vla.recording.statistics import PixelStats, constant_stats, ramp_stats
from vla.recording.video import VIDEO, describe, join, joinable
from vla.schema import Episode

VERSION = "v3.0"
CHUNK_FILES = 1000
_DEFAULTS = {"next.done": "bool", "next.success": "bool", "timestamp": "float32", "frame_index": "int64",
             "episode_index": "int64", "index": "int64", "task_index": "int64"}  # fmt: skip
_EPISODES_PER_META_FILE = 2000
_COMMIT_SECONDS, _COMMIT_SHARE, _COMMIT_BYTES = 10.0, 20.0, 64 << 20
_GROUP_ROWS = 1 << 16


class LeRobotWriter:
    """Appends episodes to `root`, creating it when it is absent or empty.

    `spec.cameras` must carry the size of the frames. `header` is kept in `meta/recording.json` and must be the same
    when a dataset is continued. With `language`, there is a column for what is said while an episode goes on.

    Commits happen by themselves: at most every 10 s and so seldom that they cost under 5 % of the time, but at the latest
    when 64 MiB of clips are waiting; `close()` makes the last one. One process at a time: a second writer is refused.

    Raises `UsageError` when the folder is something else or was begun with other settings, `MachineError` when the
    disk is full (all committed episodes stay readable).
    """

    def __init__(
        self, root: Path, spec: EmbodimentSpec, *, fps: int | None = None, video: str = "lossless",
        header: dict[str, Any] | None = None, resume: bool = True, data_mb: int = 32, video_mb: int = 100,
        language: bool = False,
    ) -> None:  # fmt: skip
        if video not in VIDEO:
            raise UsageError("video", found=video, expected=f"one of {sorted(VIDEO)}", fix="choose one of these")
        self.root, self.spec, self.video = Path(root), spec, video
        self.fps = fps or max(1, round(spec.control_hz))
        self.header = {"version": 1, "video": video, "fps": self.fps, **(header or {})} | ({"language": True} if language else {})
        self.language = language
        self.limits = {"data": data_mb * 2**20, "videos": video_mb * 2**20}
        self.orphans: list[str] = []
        """Files an interrupted writer had left, removed on opening."""
        self.recorded: list[dict[str, Any]] = []
        """`{"episode_index", "task", "seed", "pixels", "source", "split", "several"}` of every episode, committed or pending;
        `pixels` maps cameras to the sha256 of their frames, which a reader checks what it decoded against (`lossless`
        only); `source` is the key in the dataset it was converted from, `several` that it had more instructions there."""
        self.tried: dict[str, int] = {}
        self.committed = 0
        self._pending: list[EncodedEpisode] = []
        self._pending_bytes = 0
        self._done = Committed(Running(self.fps), {camera: PixelStats() for camera in spec.cameras})
        self._last_commit, self._commit_cost = time.monotonic(), 0.0
        info = self.root / "meta" / "info.json"
        if self.root.exists() and not self.root.is_dir():
            raise UsageError(self.root, found="a file", expected="a folder", fix="choose another --out")
        if self.root.is_dir() and any(self.root.iterdir()) and not info.is_file():
            raise UsageError(self.root, found="a folder of other things", expected="a LeRobot dataset or no folder",
                             fix="choose another --out, or empty the folder")  # fmt: skip
        if info.is_file() and not resume:
            raise UsageError(self.root, found="a dataset", expected="no dataset yet",
                             fix="continue it (resume), remove it, or choose another --out")  # fmt: skip
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(self.root, error, "nothing has been recorded yet") from error
            raise
        self._lock = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise UsageError(self.root, found="another process is recording into it", expected="one writer at a time",
                             fix="wait for it, or choose another --out") from error  # fmt: skip
        try:
            if info.is_file():
                self._resume(json.loads(info.read_text()))
            else:
                self._put(self.root / "meta" / "embodiment.json", _json(spec.model_dump(mode="json")))
                self._put(info, _json(self._info()))
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def num_episodes(self) -> int:
        """Committed and pending."""
        return len(self.recorded)

    @property
    def num_frames(self) -> int:
        """Committed."""
        return self._done.frames

    @property
    def tasks(self) -> list[str]:
        """Instructions, committed, by `task_index`."""
        return list(self._done.tasks)

    def add(self, episode: EncodedEpisode | Episode) -> None:
        """Append one episode; commit if it is time to. Raises `DataError` when it does not fit the embodiment."""
        encoded = encode_episode(episode, self.fps, self.video) if isinstance(episode, Episode) else episode
        found = (sorted(encoded.clips), encoded.state.shape[1:], encoded.action.shape[1:])
        expected = (sorted(self.spec.cameras), (self.spec.state_dim,), (self.spec.action_dim,))
        if found != expected:
            raise DataError(f"{self.root}, episode {self.num_episodes}", found=f"cameras, state, action {found}",
                            expected=f"{expected}, as {self.spec.name!r} has", fix="record with that robot")  # fmt: skip
        if encoded.language and not self.language:
            raise DataError(f"{self.root}, episode {self.num_episodes}", found="subtasks, or other sentences of its frames",
                            expected="an episode with one instruction", fix="open the writer with language=True")  # fmt: skip
        entry = {"episode_index": self.num_episodes, "task": encoded.task or encoded.instruction, "seed": encoded.seed}
        entry |= {"pixels": encoded.digests} if encoded.digests else {}
        entry |= {name: value for name in ("source", "split", "several") if (value := getattr(encoded, name))}
        self.recorded.append(entry)
        self._pending.append(encoded)
        self._pending_bytes += sum(map(len, encoded.clips.values()))
        waited = time.monotonic() - self._last_commit
        if self._pending_bytes > _COMMIT_BYTES or waited > max(_COMMIT_SECONDS, _COMMIT_SHARE * self._commit_cost):
            self.commit()

    def commit(self) -> None:
        """Make everything added so far durable. Raises `MachineError` when the disk is full; the last commit stays."""
        if not self._pending:
            return
        began = time.monotonic()
        self._write()
        self.committed, self._pending, self._pending_bytes = self.num_episodes, [], 0
        self._last_commit = time.monotonic()
        self._commit_cost = self._last_commit - began

    def close(self) -> None:
        """Commit and release the folder."""
        if self._lock < 0:
            return
        try:
            self.commit()
        finally:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, MachineError):
            self._pending = []  # the disk is full: trying once more would only hide the first message
        self.close()

    # What follows turns pending episodes into files. `rows` are their lines in meta/episodes. `self._done` is replaced
    # at the very end, so that a commit that fails can be tried again.

    def _write(self) -> None:
        done, tasks, frames = self._done, dict(self._done.tasks), self._done.frames
        rows, stats, episodes, pixels = [], [], [], dict(done.pixels)
        for number, episode in enumerate(self._pending, start=self.committed):
            task, T = tasks.setdefault(episode.instruction, len(tasks)), len(episode)
            said = to_rows(episode.language, timestamps(T, self.fps)) if self.language else None
            episodes.append(EpisodeRows(number, frames, task, episode.success, episode.state, episode.action, said))
            for camera in pixels:
                pixels[camera] = pixels[camera] + PixelStats(episode.pixels[camera], T)
            entries = episode.stats | {
                "episode_index": constant_stats(number, T), "task_index": constant_stats(task, T),
                "index": ramp_stats(frames, episode.stats["frame_index"]),
            }  # fmt: skip
            rows.append({"episode_index": number, "tasks": [episode.instruction], "length": T,
                         "dataset_from_index": frames, "dataset_to_index": frames + T})  # fmt: skip
            stats.append({f"stats/{feature}/{k}": v for feature, entry in entries.items() for k, v in entry.items()})
            frames += T
        self._write_videos(rows)
        open_data = self._write_data(rows, episodes)
        meta, running = self.root / "meta", done.running.plus(episodes)
        self._put(meta / "tasks.parquet", _parquet(_task_table(list(tasks))))
        open_rows = self._write_episodes(rows, stats)
        entries = running.to_json() | {image_key(camera): counted.to_json() for camera, counted in pixels.items()}
        self._put(meta / "stats.json", _json(entries))
        generation = {"episodes": self.num_episodes, "histograms": {c: p.histogram.tolist() for c, p in pixels.items()}}
        # Two generations, so that whichever info.json survives a crash finds its own.
        self._put(meta / "pixels.json", json.dumps([g for g in (done.generation, generation) if g]))
        self._put(meta / "recording.json", json.dumps(self._recording()))
        self._put(meta / "info.json", _json(self._info(self.num_episodes, frames, len(tasks), rows[-1])))
        self._done = Committed(running, pixels, generation, rows[-1], open_rows, open_data, tasks)

    def _write_videos(self, rows: list[dict[str, Any]]) -> None:
        for key in map(image_key, self.spec.cameras):
            at, frames, size, last = (0, 0), 0, 0, self._done.last
            clips: list[tuple[bytes | Path, int | None]] = []
            if last:
                at = (last[f"videos/{key}/chunk_index"], last[f"videos/{key}/file_index"])
                frames = round(last[f"videos/{key}/to_timestamp"] * self.fps)
                path = self._path(VIDEO_PATH, at, key)
                clips.append((path, frames))
                size = path.stat().st_size if path.is_file() else 0
            for episode, row in zip(self._pending, rows, strict=True):
                clip = episode.clips[key.removeprefix(image_key(""))]
                if clips and (size + len(clip) > self.limits["videos"] or not self._fits(clips[-1][0], clip)):
                    if any(limit is None for _, limit in clips):  # else the file is full as it is
                        self._put_video(key, at, clips)
                    at, frames, size, clips = _next_file(at), 0, 0, []
                clips.append((clip, None))
                size += len(clip)
                row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"] = at
                row[f"videos/{key}/from_timestamp"] = frames / self.fps
                frames += len(episode)
                row[f"videos/{key}/to_timestamp"] = frames / self.fps
            self._put_video(key, at, clips)

    def _fits(self, first: bytes | Path, second: bytes) -> bool:
        try:
            return joinable(first, second)
        except (OSError, ValueError) as error:
            raise _lost(first, error) from error

    def _put_video(self, key: str, at: tuple[int, int], clips: list[tuple[bytes | Path, int | None]]) -> None:
        path = self._path(VIDEO_PATH, at, key)
        try:
            joined = join(clips, self.fps)
        except (ValueError, FileNotFoundError) as error:
            raise _lost(path, error) from error
        self._put(path, joined)

    def _write_data(self, rows: list[dict[str, Any]], episodes: list[EpisodeRows]) -> list[EpisodeRows]:
        """Write the data files the pending episodes touch; return the episodes of the one still being filled."""
        held, at, last = list(self._done.open_data), (0, 0), self._done.last
        if last:
            at = (last["data/chunk_index"], last["data/file_index"])
        size = sum(episode.nbytes for episode in held)
        for row, episode in zip(rows, episodes, strict=True):
            if held and size + episode.nbytes > self.limits["data"]:
                if held[-1].number >= self.committed:  # else the file is full as it is
                    self._put(self._path(DATA_PATH, at), _data_file(held, self.fps))
                at, held, size = _next_file(at), [], 0
            row["data/chunk_index"], row["data/file_index"] = at
            held.append(episode)
            size += episode.nbytes
        self._put(self._path(DATA_PATH, at), _data_file(held, self.fps))
        return held

    def _write_episodes(self, rows: list[dict[str, Any]], stats: list[dict[str, Any]]) -> pa.Table:
        """Write the episodes files the pending episodes touch; return the one still being filled."""
        table, at, last = self._done.open_rows, (0, 0), self._done.last
        if last:
            at = (last["meta/episodes/chunk_index"], last["meta/episodes/file_index"])
        new = list(zip(rows, stats, strict=True))
        while new:
            if table is not None and len(table) >= _EPISODES_PER_META_FILE:
                table, at = None, _next_file(at)
            room = _EPISODES_PER_META_FILE - (len(table) if table is not None else 0)
            for row, _ in new[:room]:
                row["meta/episodes/chunk_index"], row["meta/episodes/file_index"] = at
            more = pa.Table.from_pylist([row | entry for row, entry in new[:room]])
            table = more if table is None else pa.concat_tables([table, more.select(table.column_names)])
            self._put(self._path(EPISODES_PATH, at), _parquet(table))
            new = new[room:]
        assert table is not None
        return table

    def _put(self, path: Path, data: str | bytes | memoryview) -> None:
        replace_file(path, data, f"{self.committed} episodes are safe and readable")

    def _path(self, template: str, at: tuple[int, int], key: str = "") -> Path:
        return self.root / template.format(chunk_index=at[0], file_index=at[1], video_key=key)

    def _info(self, episodes: int = 0, frames: int = 0, tasks: int = 0, last: dict[str, Any] | None = None) -> dict[str, Any]:
        features: dict[str, Any] = {}
        for name, camera in self.spec.cameras.items():
            key = image_key(name)
            features[key] = {"dtype": "video", "shape": [camera.height, camera.width, 3],
                             "names": ["height", "width", "channels"]}  # fmt: skip
            if last:
                newest = locate(self.root, VIDEO_PATH, last, f"videos/{key}", key)
                features[key]["info"] = describe(newest)
        for key, names in (("observation.state", self.spec.state_names), ("action", self.spec.action_names)):
            if names:
                features[key] = {"dtype": "float32", "shape": [len(names)], "names": names}
        features |= {key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in _DEFAULTS.items()}
        features |= {COLUMN: FEATURE} if self.language else {}
        return {
            "codebase_version": VERSION, "fps": self.fps, "features": features, "total_episodes": episodes,
            "total_frames": frames, "total_tasks": tasks, "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": max(1, self.limits["data"] // 2**20),
            "video_files_size_in_mb": max(1, self.limits["videos"] // 2**20),
            "data_path": DATA_PATH, "video_path": VIDEO_PATH if self.spec.cameras else None,
            "robot_type": self.spec.name, "splits": splits(self.recorded[:episodes]),
        }  # fmt: skip

    def _recording(self) -> dict[str, Any]:
        kept = Counter(entry["task"] for entry in self.recorded)
        tasks = {task: {"tried": max(self.tried.get(task, 0), kept[task]), "kept": kept[task]}
                 for task in sorted(kept.keys() | self.tried.keys())}  # fmt: skip
        return self.header | {"tasks": tasks, "episodes": self.recorded}

    def _resume(self, info: dict[str, Any]) -> None:
        found = read_committed(self.root, info, self.spec, self.header)
        if found is not None:
            self._done, self.recorded, self.committed = found, found.recorded, len(found.recorded)
        self.orphans = sweep(self.root, [image_key(camera) for camera in self.spec.cameras], self.committed)


def splits(recorded: list[dict[str, Any]]) -> dict[str, str]:
    """`{"train": "0:90", "val": "90:100"}`, half open; a split that lies in several places has several ranges."""
    found: dict[str, list[list[int]]] = {}
    for n, entry in enumerate(recorded):
        ranges = found.setdefault(entry.get("split", "train"), [])
        if ranges and ranges[-1][1] == n:
            ranges[-1][1] = n + 1
        else:
            ranges.append([n, n + 1])
    return {name: ",".join(f"{a}:{b}" for a, b in ranges) for name, ranges in found.items()} or {"train": "0:0"}


def _lost(where: object, error: BaseException) -> DataError:
    return DataError(where, found=error, expected="the video of the episodes recorded so far",
                     fix="restore the file, or record into another folder")  # fmt: skip


def _next_file(at: tuple[int, int]) -> tuple[int, int]:
    return (at[0], at[1] + 1) if at[1] + 1 < CHUNK_FILES else (at[0] + 1, 0)


def _task_table(tasks: list[str]) -> pa.Table:
    import pandas as pd  # half a second, and workers never need it

    names = pd.DataFrame({"task_index": np.arange(len(tasks))}, index=pd.Index(tasks, name="task"))
    return pa.Table.from_pandas(names)


def _json(value: object) -> str:
    return json.dumps(value, indent=4, allow_nan=False)


def _parquet(table: pa.Table) -> memoryview:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="snappy", write_page_checksum=True)
    return memoryview(sink.getvalue())


def _data_file(episodes: list[EpisodeRows], fps: int) -> memoryview:
    """A data file in row groups of whole episodes, so that only one group at a time exists as a table."""
    sink, writer, first, rows = pa.BufferOutputStream(), None, 0, 0
    for n, episode in enumerate(episodes):
        rows += len(episode)
        if rows >= _GROUP_ROWS or n == len(episodes) - 1:
            table = to_table(episodes[first : n + 1], fps)
            writer = writer or pq.ParquetWriter(sink, table.schema, compression="snappy", write_page_checksum=True)
            writer.write_table(table, row_group_size=max(len(table), 1))
            first, rows = n + 1, 0
    assert writer is not None
    writer.close()
    return memoryview(sink.getvalue())
