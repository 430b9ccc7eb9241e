"""`EpisodeStore`: demonstrations as whole columns and single frames, cheap to hand to loader workers."""

from __future__ import annotations

import io
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets.table import MemoryMappedTable
from PIL import Image

from vla.embodiment import EmbodimentSpec
from vla.episodes.cache import content_hash, default_cache, ensure, read_manifest
from vla.episodes.layout import read_layout
from vla.episodes.surface import Store
from vla.episodes.video import VideoFrames
from vla.errors import DataError, UsageError

try:  # a third less time than Pillow, and the same pixels: both are libjpeg-turbo
    import simplejpeg  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:
    simplejpeg = None


class EpisodeStore(Store):
    """E episodes of F frames that lie on this machine, their frames decoded into the cache or read from their videos."""

    _entry: Path
    _MAPPED = Store._MAPPED | {"_batches", "_tables", "_videos"}

    @classmethod
    def open(
        cls, root: str | Path, cache_dir: str | Path | None = None, frames: Literal["raw", "jpeg", "video", "none"] = "raw",
        progress: bool = True, *, embodiment: EmbodimentSpec | None = None, compute_stats: bool = False,
    ) -> EpisodeStore:  # fmt: skip
        """Open a LeRobot dataset (v2.0, v2.1, v3.0), decoding it into the cache the first time.

        `frames`: `raw` is fastest; `jpeg` about ten times smaller (quality 90 at 4:2:0 for videos that have no more colour
        than that, else quality 95 at 4:4:4); `video` keeps no frames and decodes each from its video when it is asked for,
        which needs no time at first and next to no disk, and is slowest; `none` looks at no picture and no video, for who
        wants the columns only: `frame` raises, and damage to pictures stays unseen. `embodiment` overrides
        `meta/embodiment.json`; without either, a spec is derived from the features. `compute_stats` replaces the state
        and action statistics by exact ones; so does a dataset whose statistics lack quantiles (`notes` says so).
        Otherwise missing or foreign statistics are an error, never a guess.

        Raises `DataError` naming every problem at once (nothing is written then), `MachineError` when the disk is full.
        """
        root = Path(root)
        cache = Path(cache_dir) if cache_dir else default_cache()
        layout, problems = read_layout(root, embodiment, need_stats=not compute_stats)
        fingerprint = content_hash(root, cache)
        entry = ensure(layout, problems, fingerprint, cache, frames, progress)
        self = cls()
        self.root, self.fingerprint, self._entry = root, fingerprint, entry
        self._describe(layout, read_manifest(entry)["stats"], compute_stats, progress)
        self._map()
        return self

    def _map(self) -> None:
        _allow_many_files()

        def column(name: str) -> np.ndarray:
            # A plain view: indexing an np.memmap itself costs microseconds.
            return np.load(self._entry / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)

        self.state, self.action, self.episode_starts = column("state"), column("action"), np.array(column("starts"))
        self.task_of_frame = column("task")
        self.task_of_episode = np.array(self.task_of_frame[self.episode_starts[:-1]])
        self._map_segments(self._entry)
        manifest = read_manifest(self._entry)
        self._jpeg, self._blind = manifest["frames"] == "jpeg", manifest["frames"] == "none"
        self._videos = {
            camera: VideoFrames(self.root, files, column(f"packets-{n}"), column(f"places-{n}"))
            for n, (camera, files) in enumerate(zip(self.cameras, manifest["videos"], strict=False))
        }
        # Per camera: frames per batch, and per batch an array (raw) or (bytes, offsets) (jpeg) over the mapped file.
        self._batches: dict[str, tuple[int, list[Any]]] = {}
        self._tables = []  # keeps the mappings alive
        for n, camera in enumerate(self.cameras if not (self._videos or self._blind) else ()):
            table = MemoryMappedTable.from_file(str(self._entry / f"frames-{n}.arrow")).table
            self._tables.append(table)
            size, batches = self.spec.cameras[camera], []
            chunks = [chunk for chunk in table.column("frame").chunks if len(chunk)]
            for chunk in chunks:
                _, offsets, data = chunk.buffers()
                offsets = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
                pixels = np.frombuffer(data, np.uint8)
                if not self._jpeg:
                    pixels = pixels[offsets[0] : offsets[-1]].reshape(-1, size.height, size.width, 3)
                batches.append((pixels, offsets) if self._jpeg else pixels)
            # `frame` finds a batch by division: all have one length but the last.
            assert len({len(chunk) for chunk in chunks[:-1]} | {len(chunks[0])}) == 1, f"{self._entry}: uneven batches"
            self._batches[camera] = (len(chunks[0]), batches)

    def frame(self, camera: str, index: int) -> np.ndarray:
        """Frame `index` (0 <= index < F) as (h, w, 3) uint8; for `raw` a read-only view into the mapped file.

        Raises `DataError` for `video` when the file does not decode there, `UsageError` for `none`.
        """
        if self._blind:
            raise UsageError(f"{self.root}, camera {camera!r}, frame {index}", found="a store opened without its pictures",
                             expected="one opened with them", fix="open it with frames=raw, jpeg or video")  # fmt: skip
        if self._videos:
            return self._videos[camera].frame(index)
        per_batch, batches = self._batches[camera]
        batch, at = divmod(index, per_batch)
        if not self._jpeg:
            return batches[batch][at]
        data, offsets = batches[batch]
        try:
            return _from_jpeg(data[offsets[at] : offsets[at + 1]])
        except (ValueError, OSError) as error:
            raise DataError(f"{self._entry}, camera {camera!r}, frame {index}", found=f"{type(error).__name__}: {error}",
                            expected="the JPEG that was written", fix=f"rm -r {self._entry}") from error  # fmt: skip

    def frames(self, camera: str, indices: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Frames `indices` as (n, h, w, 3) uint8, written to `out` when given.

        Frames of one video that lie near each other are decoded in one forward pass. Raises as `frame` does.
        """
        size = self.spec.cameras[camera]
        if out is None:
            out = np.empty((len(indices), size.height, size.width, 3), np.uint8)
        if self._videos:
            self._videos[camera].frames(indices, out)
        else:
            for slot, index in enumerate(indices):
                out[slot] = self.frame(camera, int(index))
        return out

    def __repr__(self) -> str:
        return (f"EpisodeStore({str(self.root)!r}: {self.num_episodes} episodes, {self.num_frames} frames, "
                f"cameras {self.cameras}, {len(self.instructions)} instructions)")  # fmt: skip


def _from_jpeg(data: Any) -> np.ndarray:
    if simplejpeg is not None:
        return simplejpeg.decode_jpeg(data)
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def _allow_many_files() -> None:
    """A mapped file keeps a descriptor: a few hundred datasets would need more than the usual limit of 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
