"""`StreamingStore`: a dataset on the Hub read while it is being fetched, video file by video file.

Opening downloads `meta/` and the rows (`data/`, some hundred bytes per frame), never a video; those come when a frame of
theirs is asked for and go again when the folder grows past its bound (`fetched.py`). To profit from that, ask shard by
shard: all frames of a shard lie in the same few files. Frames are decoded on demand from their keyframe (`video.py`), so a
streamed run is as fast as reading videos directly, once they are there. A dataset that is read more than once or twice and
fits on the disk is better downloaded (`hub.resolve`) and cached.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy as np

from vla.durable import TEMPORARY, flush, replace_file, temporary_name
from vla.embodiment import EmbodimentSpec
from vla.episodes.cache import computed_stats, default_cache
from vla.episodes.fetched import Ahead, FetchedFiles
from vla.episodes.hub import HubName, announce, endpoint, explained, parse, snapshot
from vla.episodes.language import has_language
from vla.episodes.layout import Layout, check_statistics, read_info, read_layout
from vla.episodes.problems import RESTORE, Problems
from vla.episodes.rows import Rows, find_frames, read_rows
from vla.episodes.surface import Store, save_segments
from vla.episodes.video import Index, VideoFrames, forget
from vla.errors import DataError, UsageError

FORMAT = 1
"""Part of the folder's name: raise it when what is kept changes."""
SHARD_BYTES = 64 * 2**20
"""Consecutive episodes with small files of their own (v2.x) share a shard up to this size of videos."""
_HELD = 24
"""Video files a process keeps at hand: several shards of several cameras, since samples alternate between them."""
_PART = 1000
"""Episodes whose metadata share a file: it is needed only when a video is seen for the first time."""


class StreamingStore(Store):
    """E episodes of F frames of a Hub dataset.

    Rows are here whole. A shard is the frames of the same few video files, and begins with an episode. `root` holds the rows
    and whatever videos are here now; `fingerprint` equals that of a full download, unless the Hub keeps the videos outside
    of LFS. Safe in any number of forked or spawned workers, which share what they fetch.
    """

    name: HubName
    files: FetchedFiles
    _layout: Layout
    _MAPPED = Store._MAPPED | {"_shard_starts", "_timestamp", "_file", "_offset", "_paths", "_starts", "_rows", "_process",
                               "_lock", "_ahead", "_readers", "_finally"}  # fmt: skip

    @classmethod
    def open(
        cls, path: str, cache_dir: str | Path | None = None, max_gb: float = 20.0, progress: bool = True, *,
        embodiment: EmbodimentSpec | None = None, compute_stats: bool = False,
    ) -> StreamingStore:  # fmt: skip
        """Open `hub:user/name@revision`. Videos are kept up to `max_gb`, beside the few files that are in use.

        Raises `UsageError` when `path` is no name on the Hub, `DataError` with every problem of the dataset's metadata and
        rows, or when its pictures are not in videos, `MachineError` without a connection or room. Damage inside a video
        is found only when it is read, then as a `DataError` from `frame`.
        """
        named = parse(path)
        if named is None:
            raise UsageError(f"dataset {str(path)!r}", found="a folder" if Path(path).exists() else "no name on the Hub",
                             expected="hub:user/name@<commit or tag>", fix="leave out stream: true")  # fmt: skip
        cache = Path(cache_dir) if cache_dir else default_cache()
        folder = snapshot(named, cache_dir, ("meta/*",), progress)
        read_info(folder)
        name = HubName(named.repo, folder.name)
        if not named.pinned:
            print(announce(named, folder.name), file=sys.stderr)
        layout, problems = read_layout(folder, embodiment, need_stats=not compute_stats)
        pictures = [camera for camera in layout.spec.cameras if camera in layout.cameras and not layout.is_video(camera)]
        if pictures:
            raise DataError(name, found=f"cameras {pictures} inside the Parquet files", expected="cameras as videos",
                            fix="download it whole: stream: false")  # fmt: skip
        snapshot(name, cache_dir, ("meta/*", "data/*"), progress)
        self = cls()
        self.name, self._layout = name, replace(layout, recording={}, stats={})
        told = " language" if has_language(layout) else ""
        key = f"{FORMAT} {sorted(layout.cameras.items())} {list(layout.spec.cameras)}{told}"
        key = hashlib.sha256(key.encode()).hexdigest()[:8]
        self.root = cache / "stream" / f"{name.repo.replace('/', '--')}@{folder.name[:12]}-{key}"
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (self.root / "rows" / "manifest.json").is_file():
                _prepare(self.root, name, layout, problems)
        manifest = json.loads((self.root / "rows" / "manifest.json").read_text())
        for feature, exact in manifest["stats"].items():
            check_statistics(layout, feature, np.array(exact["min"]), np.array(exact["max"]), problems)
        problems.raise_if_any()
        self.fingerprint = manifest["fingerprint"]
        self.files = FetchedFiles(name, self.root, {k: tuple(v) for k, v in manifest["files"].items()}, int(max_gb * 2**30))
        self._describe(layout, manifest["stats"], compute_stats, progress)
        self._map()
        return self

    def _map(self) -> None:
        def column(name: str) -> np.ndarray:
            return np.load(self.root / "rows" / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)

        self.state, self.action, self.episode_starts = column("state"), column("action"), np.array(column("starts"))
        self.task_of_frame, self._shard_starts = column("task"), np.array(column("shards"))
        self.task_of_episode = np.array(self.task_of_frame[self.episode_starts[:-1]])
        self._map_segments(self.root / "rows")
        self._timestamp, self._file, self._offset = column("timestamp"), column("file"), column("offset")
        self._paths: list[str] = json.loads((self.root / "rows" / "paths.json").read_text())
        # As Python numbers: a search among few of those is quicker than a call of numpy.
        self._starts = self.episode_starts.tolist()
        self._rows = {camera: row for row, camera in enumerate(self.cameras)}
        self._forget_readers()

    def _forget_readers(self) -> None:
        self._process, self._lock, self._ahead = os.getpid(), threading.RLock(), Ahead(self.files)
        self._readers: OrderedDict[int, _Reader] = OrderedDict()
        self._finally = weakref.finalize(self, _let_go, self._readers, self._process)

    @property
    def shards(self) -> np.ndarray:
        """(P + 1,) int64: frames `shards[p] .. shards[p + 1]` lie in the same video files, and begin with an episode."""
        return self._shard_starts

    def frame(self, camera: str, index: int) -> np.ndarray:
        """Frame `index` (0 <= index < F) as (h, w, 3) uint8, newly allocated; its video is fetched first if it is not here.

        Raises `DataError` when the video is damaged or does not fit the rows, `MachineError` when it cannot be fetched.
        """
        if not 0 <= index < self.num_frames:
            raise IndexError(f"frame {index} of {self.num_frames}")
        episode = bisect_right(self._starts, index) - 1
        row = self._rows[camera]
        at = int(self._offset[row, episode]) + index - self._starts[episode]
        return self._read(int(self._file[row, episode]), row, lambda frames: frames.frame(at))

    def frames(self, camera: str, indices: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Frames `indices` as (n, h, w, 3) uint8, written to `out` when given. Raises as `frame` does."""
        size = self.spec.cameras[camera]
        if out is None:
            out = np.empty((len(indices), size.height, size.width, 3), np.uint8)
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and not (0 <= wanted.min() and wanted.max() < self.num_frames):
            raise IndexError(f"frame {wanted.min()} to {wanted.max()} of {self.num_frames}")
        episodes = np.searchsorted(self.episode_starts, wanted, "right") - 1
        row = self._rows[camera]
        files = self._file[row, episodes]
        at = self._offset[row, episodes] + wanted - self.episode_starts[episodes]
        for file in np.unique(files):
            mine = np.flatnonzero(files == file)
            part = np.empty((len(mine), size.height, size.width, 3), np.uint8)
            self._read(int(file), row, lambda frames, at=at[mine], part=part: frames.frames(at, part))
            out[mine] = part
        return out

    def prefetch(self, *shards: int) -> threading.Thread:
        """Begin to fetch the videos of `shards` (of 0 .. P - 1) in the background; returns at once, in any process or thread.

        A daemon thread per process takes one call after the other; one that waits gives way to a newer one. Files that
        another process is fetching are left to it. What fails is met again, and said, when a frame of it is asked for.
        """
        if self._process != os.getpid():
            self._forget_readers()
        files: dict[int, None] = {}  # a set in order
        for shard in shards:
            first, last = np.searchsorted(self.episode_starts, self.shards[[shard, shard + 1]])
            files |= dict.fromkeys(np.unique(self._file[:, first:last]).tolist())
        return self._ahead.want([self._paths[file] for file in files])

    def _read(self, file: int, row: int, ask: Callable[[VideoFrames], Any]) -> Any:
        while True:
            reader = self._reader(file, row)
            try:
                return ask(reader.frames)
            except DataError:
                if reader.held.exists():
                    raise
            # Another thread had no more room for this file at hand: it is taken up again.

    def _reader(self, file: int, row: int) -> _Reader:
        if self._process != os.getpid():
            self._forget_readers()  # a forked child: what the parent holds is the parent's to give back
        with self._lock:
            if file in self._readers:
                self._readers.move_to_end(file)
                return self._readers[file]
            while len(self._readers) >= max(_HELD, 6 * len(self.cameras)):
                self._give_back(self._readers.popitem(last=False)[1])
            held = self.files.hold(self._paths[file])
            try:
                packets, places, decoder = self._index(file, row, held)
            except BaseException:
                self.files.release(held)
                raise
            frames = VideoFrames(held.parent, [{"path": held.name, "decoder": decoder}], packets, places)
            self._readers[file] = _Reader(held, frames)
            return self._readers[file]

    def _give_back(self, reader: _Reader) -> None:
        forget(str(reader.held))
        self.files.release(reader.held)

    def _index(self, file: int, row: int, held: Path) -> tuple[np.ndarray, np.ndarray, str]:
        """Packets and places of a video file (see `video.py`), made once and kept when the file itself is gone."""
        kept = self.root / "index" / f"{file:06d}"
        if not (kept / "decoder.json").is_file():
            path = self._layout.root / self._paths[file]
            with av.open(str(held), metadata_errors="ignore") as container:
                stream: Any = container.streams.video[0]
                ticks = sorted(p.pts for p in container.demux(stream) if p.pts is not None and p.size)
                base = float(stream.time_base)
            problems, index, camera = Problems(self.root), Index(), self.cameras[row]
            for rows in self._rows_in(np.flatnonzero(self._file[row] == file)):
                spans = find_frames(self._layout, rows, camera, problems, {path: (np.array(ticks, np.int64), base)})
                problems.raise_if_any()
                index.add(held.parent, held, spans[0].ticks)
            temporary = temporary_name(kept)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            np.save(temporary / "packets.npy", index.packets, allow_pickle=False)
            np.save(temporary / "places.npy", index.places, allow_pickle=False)
            (temporary / "decoder.json").write_text(json.dumps(index.files[0]["decoder"]))
            try:
                os.replace(temporary, kept)
            except OSError:  # another worker was first
                shutil.rmtree(temporary, ignore_errors=True)
        columns = [np.load(kept / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("packets", "places")]
        return columns[0].view(np.ndarray), columns[1].view(np.ndarray), json.loads((kept / "decoder.json").read_text())

    def _rows_in(self, episodes: np.ndarray) -> Iterator[Rows]:
        """What `find_frames` needs to know of each of `episodes`."""
        empty, part, known = np.zeros((0, 0), np.float32), -1, []
        for episode in episodes.tolist():
            if episode // _PART != part:
                part = episode // _PART
                known = json.loads((self.root / "rows" / "episodes" / f"{part}.json").read_text())
            first, last = self.episode_starts[episode : episode + 2]
            yield Rows([known[episode % _PART]], np.array([0, last - first]), empty, empty, np.zeros(0, np.int32),
                       np.array(self._timestamp[first:last]))  # fmt: skip

    def __repr__(self) -> str:
        return (f"StreamingStore({str(self.name)!r}: {self.num_episodes} episodes, {self.num_frames} frames in "
                f"{len(self.shards) - 1} shards, cameras {self.cameras})")  # fmt: skip


@dataclass
class _Reader:
    held: Path
    frames: VideoFrames


def _let_go(readers: OrderedDict[int, _Reader], process: int) -> None:
    if process == os.getpid():
        for reader in readers.values():
            forget(str(reader.held))
            reader.held.unlink(missing_ok=True)


def _prepare(root: Path, name: HubName, layout: Layout, problems: Problems) -> None:
    """Judge metadata and rows, and keep what reading needs under `root/rows`. Raises `DataError` with every finding."""
    rows = read_rows(layout, problems)
    listed = _listing(name)
    paths: dict[str, int] = {}
    if rows is None:
        problems.raise_if_any()
        raise AssertionError("rows that cannot be read are a finding")
    E, cameras = len(rows.episodes), list(layout.spec.cameras)
    file, offset = np.zeros((len(cameras), E), np.int32), np.zeros((len(cameras), E), np.int64)
    for row, camera in enumerate(cameras):
        if camera not in layout.cameras:
            continue
        key, before = layout.cameras[camera], {}
        for e, episode in enumerate(rows.episodes):
            if episode.get(f"videos/{key}/from_timestamp") is None:
                problems.add(layout.root / "meta" / "episodes", found=f"no columns videos/{key}/...", fix=RESTORE,
                             expected=f"where the video of camera {camera!r} lies")  # fmt: skip
                break
            path = layout.path("video_path", episode, f"videos/{key}", key).relative_to(layout.root).as_posix()
            file[row, e], offset[row, e] = paths.setdefault(path, len(paths)), before.get(path, 0)
            before[path] = int(offset[row, e]) + episode["length"]
    for path in paths:
        if path not in listed:
            problems.add(f"{name}, {path}", found="no such file on the Hub", expected="the video of its episodes", fix=RESTORE)
    problems.raise_if_any()
    sizes = np.array([listed[path][0] for path in paths], np.int64)
    temporary = temporary_name(root / "rows")
    for stale in root.glob(f".rows{TEMPORARY}*"):
        shutil.rmtree(stale, ignore_errors=True)
    (temporary / "episodes").mkdir(parents=True)
    columns = {"state": rows.state, "action": rows.action, "task": rows.task, "starts": rows.starts, "file": file,
               "timestamp": rows.timestamp, "offset": offset, "shards": _shards(rows.starts, file, sizes)}  # fmt: skip
    for column, values in columns.items():
        np.save(temporary / f"{column}.npy", values, allow_pickle=False)
    save_segments(rows.segments, temporary)
    for first in range(0, E, _PART):
        part = [{k: v for k, v in row.items() if k != "tasks"} for row in rows.episodes[first : first + _PART]]
        (temporary / "episodes" / f"{first // _PART}.json").write_text(json.dumps(part))
    (temporary / "paths.json").write_text(json.dumps(list(paths)))
    manifest = {"stats": computed_stats(rows), "fingerprint": _fingerprint(layout.root, listed),
                "files": {path: listed[path] for path in paths}}  # fmt: skip
    replace_file(temporary / "manifest.json", json.dumps(manifest))
    flush(temporary)
    os.replace(temporary, root / "rows")
    flush(root)


def _shards(starts: np.ndarray, file: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(P + 1,) frame boundaries: a new shard where an episode needs a file the shard does not have, once it is large enough."""
    boundaries, have, total = [0], set(file[:, 0].tolist()), 0
    total = int(sizes[sorted(have)].sum()) if len(sizes) else 0
    for e in range(1, file.shape[1]):
        new = set(file[:, e].tolist()) - have
        more = int(sizes[sorted(new)].sum()) if new else 0
        if new and total + more > SHARD_BYTES:
            boundaries.append(int(starts[e]))
            have, total = set(file[:, e].tolist()), 0
            total = int(sizes[sorted(have)].sum())
        else:
            have |= new
            total += more
    return np.array([*boundaries, int(starts[-1])], np.int64)


def _listing(name: HubName) -> dict[str, tuple[int, str]]:
    """Every file of the revision: path -> (size, sha256; "" for small files that the Hub keeps as they are)."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with explained(name):
        entries = HfApi(endpoint=endpoint()).list_repo_tree(name.repo, recursive=True, revision=name.revision,
                                                            repo_type="dataset")  # fmt: skip
        return {e.path: (e.size, e.lfs.sha256 if e.lfs else "") for e in entries if isinstance(e, RepoFile)}


def _fingerprint(folder: Path, listed: dict[str, tuple[int, str]]) -> str:
    """What `cache.content_hash` gives for a full download."""
    digest = hashlib.sha256()
    for part in ("meta", "data", "videos"):
        mine = [PurePosixPath(path) for path in listed if path.startswith(f"{part}/") and not Path(path).name.startswith(".")]
        for path in sorted(mine):
            size, sha = listed[str(path)]
            if not sha and (folder / path).is_file():
                sha = hashlib.sha256((folder / path).read_bytes()).hexdigest()
            digest.update(f"{path}\0{size}\0{sha}\n".encode())
    return digest.hexdigest()
