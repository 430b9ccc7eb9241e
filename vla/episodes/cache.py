"""Decodes a dataset once into files that can be memory-mapped, under a name that is the content's own hash.

Layout of an entry: `state.npy`, `action.npy`, `task.npy`, `starts.npy`; where subtasks are named, `segments.npy`, `subtask.npy`
and `subtasks.json`; per camera `frames-<n>.arrow` (Hugging Face
`datasets`, one binary column) or, for `video`, the tables `packets-<n>.npy` and `places-<n>.npy`, or, for `none`, nothing; and
`cache.json`, written last. An entry is built in a temporary folder and renamed, so it is whole or absent; a lock makes a
second process wait instead of decoding the same videos again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from tqdm import tqdm

from vla.durable import TEMPORARY, flush, is_disk_full, replace_file, temporary_name
from vla.episodes.language import has_language
from vla.episodes.layout import RESTORE, STATE, Layout, Problems, check_statistics
from vla.episodes.rows import Rows, Span, find_frames, read_rows
from vla.episodes.surface import save_segments
from vla.episodes.video import Index, to_rgb
from vla.errors import DataError, MachineError
from vla.normalize import Stats

FORMAT = 3
"""Part of every key: raise it when the layout above changes."""

_BATCH_BYTES, _BATCH_FRAMES = 32 * 2**20, 4096
_JPEG = {"full colour": {"quality": 95, "subsampling": 0}, "half colour": {"quality": 90, "subsampling": 2}}
"""A video whose colour has half the resolution already (4:2:0) loses little by being kept so, and decodes in 60% of the
time; other pictures keep all of theirs. Figures: docs/results.md."""
_SEEK_BEYOND = 64
"""Frames that are decoded and thrown away rather than seeking past them."""


def default_cache() -> Path:
    """`$VLA_CACHE`, else `tendon-vla/episodes` in the user's cache folder."""
    if os.environ.get("VLA_CACHE"):
        return Path(os.environ["VLA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tendon-vla" / "episodes"


def content_hash(root: Path, cache_dir: Path) -> str:
    """sha256 over the name, size and sha256 of every file of the dataset; independent of where it lies.

    A file's own hash is remembered by (path, size, modification time) in `cache_dir`, so only new files are read.
    """
    memory_path = cache_dir / "hashes" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.json"
    known: dict[str, list] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(memory_path.read_text())
    digest, seen = hashlib.sha256(), {}
    for folder in ("meta", "data", "videos"):
        for path in sorted((root / folder).rglob("*")):
            if not path.is_file() or path.name.startswith("."):
                continue
            name, status = path.relative_to(root).as_posix(), path.stat()
            stamp = [status.st_size, status.st_mtime_ns]
            entry = known.get(name)
            if entry is None or entry[:2] != stamp:
                with open(path, "rb") as file:
                    entry = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
            seen[name] = entry
            digest.update(f"{name}\0{entry[0]}\0{entry[2]}\n".encode())
    if seen != known:
        # A convenience only: a read-only or full cache folder costs time, not correctness.
        with contextlib.suppress(OSError, MachineError):
            replace_file(memory_path, json.dumps(seen))
    return digest.hexdigest()


def ensure(layout: Layout, problems: Problems, fingerprint: str, cache_dir: Path, frames: str, progress: bool) -> Path:
    """The cache entry of this dataset, built if need be. Raises `DataError` with every problem found, or
    `MachineError`."""
    if frames == "video":
        for camera in (c for c in layout.spec.cameras if c in layout.cameras and not layout.is_video(c)):
            problems.add(f"{layout.root}, camera {camera!r}", found="pictures inside the Parquet files",
                         expected="a video, to read its frames directly", fix="set mixture.frames=jpeg")  # fmt: skip
    shape = layout.spec.model_dump_json(include={"cameras"}), layout.spec.state_dim, layout.spec.action_dim
    options = (FORMAT, frames, _JPEG if frames == "jpeg" else None, sorted(layout.cameras.items()), shape)
    options += ("language",) if has_language(layout) else ()
    key = hashlib.sha256(f"{fingerprint} {options}".encode()).hexdigest()
    entry = cache_dir / key[:32]
    if (entry / "cache.json").is_file():
        # The rows were judged when the entry was built, but perhaps for a reader that did not care for statistics.
        for name, exact in read_manifest(entry)["stats"].items():
            check_statistics(layout, name, np.array(exact["min"]), np.array(exact["max"]), problems)
        problems.raise_if_any()
        return entry
    # Everything is judged before anything is written.
    rows = read_rows(layout, problems)
    spans: dict[str, list[Span]] = {}
    for camera in layout.spec.cameras:
        if frames != "none" and camera in layout.cameras and layout.is_video(camera) and rows is not None:
            spans[camera] = find_frames(layout, rows, camera, problems)
    problems.raise_if_any()
    assert rows is not None
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{key[:32]}.lock"):
            if not (entry / "cache.json").is_file():
                _build(layout, rows, spans, entry, frames, progress)
    except OSError as error:
        if is_disk_full(error):
            need = layout.num_frames * sum(c.height * c.width * 3 for c in layout.spec.cameras.values()) / 2**30
            raise MachineError(cache_dir, found=f"{error.strerror} while decoding", expected=f"room for {need:.2f} GiB",
                               fix="free some space, set VLA_CACHE to a larger disk, or cache as jpeg") from error  # fmt: skip
        raise
    return entry


def read_manifest(entry: Path) -> dict[str, Any]:
    """`cache.json` of an entry: `frames`, `cameras`, `num_frames` and the exact `stats` of state and action."""
    return json.loads((entry / "cache.json").read_text())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(layout: Layout, rows: Rows, spans: dict[str, list[Span]], entry: Path, frames: str, progress: bool) -> None:
    for stale in entry.parent.glob(f".{entry.name}{TEMPORARY}*"):  # we hold the lock: whoever made it is gone
        shutil.rmtree(stale, ignore_errors=True)
    temporary = temporary_name(entry)
    temporary.mkdir()
    try:
        cameras = list(layout.spec.cameras)
        manifest = {"format": FORMAT, "frames": frames, "cameras": cameras, "num_frames": layout.num_frames,
                    "stats": computed_stats(rows), "videos": []}  # fmt: skip
        pictured = cameras if frames != "none" else []
        with tqdm(total=layout.num_frames * len(pictured), unit="frame", desc=f"decoding {layout.root.name}",
                  disable=not (progress and pictured), leave=False) as bar:  # fmt: skip
            for n, camera in enumerate(pictured):
                if frames == "video":
                    _write_index(temporary, n, layout, rows, camera, spans[camera], manifest, bar)
                    continue
                size = layout.spec.cameras[camera]
                decoded = decode_spans(spans[camera], layout.root) if camera in spans else unpack_pictures(layout, rows, camera)
                decoded = _as_recorded(decoded, layout, rows, camera)
                jpeg = _JPEG["half colour" if camera in spans and _has_half_colour(spans[camera][0].path) else "full colour"]
                _write_frames(temporary / f"frames-{n}.arrow", decoded, layout.num_frames, (size.height, size.width, 3),
                              jpeg if frames == "jpeg" else None, f"{layout.root}, camera {camera!r}", bar)  # fmt: skip
        for name in ("state", "action", "task", "starts"):
            np.save(temporary / f"{name}.npy", getattr(rows, name), allow_pickle=False)
        save_segments(rows.segments, temporary)
        (temporary / "cache.json").write_text(json.dumps(manifest))
        for path in temporary.iterdir():
            flush(path)
        flush(temporary)
        os.replace(temporary, entry)
        flush(entry.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_index(
    entry: Path, n: int, layout: Layout, rows: Rows, camera: str, spans: list[Span], manifest: dict[str, Any], bar: tqdm,
) -> None:  # fmt: skip
    index = Index()
    for span in spans:
        index.add(layout.root, span.path, span.ticks)
    np.save(entry / f"packets-{n}.npy", index.packets, allow_pickle=False)
    np.save(entry / f"places-{n}.npy", index.places, allow_pickle=False)
    manifest["videos"].append(index.files)
    if any(layout.pixel_hash(camera, number) for number in range(layout.num_episodes)):
        # Only decoding shows that these are the pixels that were recorded. Once, now; later reads trust the file's hash.
        for _ in _as_recorded(decode_spans(spans, layout.root), layout, rows, camera):
            bar.update()
    else:
        bar.update(layout.num_frames)


def _has_half_colour(path: Path) -> bool:
    """Whether a video stores colour at half its height and width."""
    with av.open(str(path), metadata_errors="ignore") as container:
        context: Any = container.streams.video[0].codec_context
        return context.format is not None and (context.format.chroma_width(256), context.format.chroma_height(256)) == (128, 128)


def computed_stats(rows: Rows) -> dict[str, Any]:
    """Exact statistics of state and action, for those who ask for them instead of the dataset's own."""
    columns = {STATE: rows.state, "action": rows.action}
    return {key: Stats.of(values).to_json() for key, values in columns.items() if values.shape[1]}


def _write_frames(
    path: Path, decoded: Iterator[np.ndarray], count: int, shape: tuple[int, int, int], jpeg: dict[str, int] | None,
    where: str, bar: tqdm,
) -> None:  # fmt: skip
    size = int(np.prod(shape))
    batch = max(1, min(_BATCH_FRAMES, _BATCH_BYTES // size))
    features = datasets.Features({"frame": datasets.Value("binary")})
    with ArrowWriter(path=str(path), features=features, writer_batch_size=batch) as writer:
        held: list[Any] = []
        for n, frame in enumerate(decoded):
            if frame.shape != shape:
                raise DataError(f"{where}, frame {n}", found=frame.shape, expected=f"{shape} as meta/info.json says",
                                fix="correct the shape of this feature in meta/info.json")  # fmt: skip
            held.append(frame if jpeg is None else _to_jpeg(frame, jpeg))
            if len(held) == batch or n == count - 1:
                array = _binary(np.stack(held), size) if jpeg is None else pa.array(held, pa.binary())
                writer.write_table(pa.table({"frame": array}))
                bar.update(len(held))
                held = []
        writer.finalize()


def _binary(stack: np.ndarray, size: int) -> pa.Array:
    """(n, h, w, 3) -> n binary values over the same memory, without a Python object per frame."""
    offsets = np.arange(len(stack) + 1, dtype=np.int32) * size
    return pa.Array.from_buffers(pa.binary(), len(stack), [None, pa.py_buffer(offsets), pa.py_buffer(stack)])


def _to_jpeg(frame: np.ndarray, options: dict[str, int]) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(frame).save(sink, "JPEG", **options)
    return sink.getvalue()


def decode_spans(spans: list[Span], root: Path) -> Iterator[np.ndarray]:
    """Every frame of every span, in order, reading each video forward and seeking only where the order demands it."""
    path, container, frames, last, step = None, None, iter(()), -1, 1
    try:
        for span in spans:
            if span.path != path:
                if container is not None:
                    container.close()
                path, container, last = span.path, av.open(str(span.path), metadata_errors="ignore"), -1
                container.streams.video[0].codec_context.thread_count = 1  # small frames: threads only contend
                frames = _forward(container)
            assert container is not None
            step = span.ticks[1] - span.ticks[0] if len(span.ticks) > 1 else step
            if span.ticks[0] <= last or span.ticks[0] - last > _SEEK_BEYOND * step:
                container.seek(int(span.ticks[0]), stream=container.streams.video[0], backward=True)
                frames = _forward(container)
            for tick in span.ticks:
                for last, frame in frames:  # noqa: B007  `last` is read by the next span
                    if last >= tick:
                        break
                else:
                    last = -1
                if last != tick:
                    raise DataError(path, found=f"no frame at {tick} ticks, though the file lists one",
                                    expected="a video that decodes to its end", fix=RESTORE)  # fmt: skip
                yield frame
    except FFmpegError as error:
        raise DataError(path, found=f"{type(error).__name__}: {error}", expected="a video that decodes to its end",
                        fix=RESTORE) from error  # fmt: skip
    finally:
        if container is not None:
            container.close()


def _as_recorded(frames: Iterator[np.ndarray], layout: Layout, rows: Rows, camera: str) -> Iterator[np.ndarray]:
    """`frames`, each episode held against the hash of what was recorded: damaged video often decodes without complaint."""
    for number, row in enumerate(rows.episodes):
        expected, digest = layout.pixel_hash(camera, number), hashlib.sha256()
        for t in range(row["length"]):
            frame = next(frames, None)
            if frame is None:
                raise DataError(f"{layout.root}, episode {number}, camera {camera!r}", found=f"{t} pictures",
                                expected=f"{row['length']}, one per row", fix=RESTORE)  # fmt: skip
            if expected:
                digest.update(np.ascontiguousarray(frame).data)
                if t == row["length"] - 1 and digest.hexdigest() != expected:
                    source = f"videos/{layout.cameras[camera]}" if layout.is_video(camera) else "data"
                    template = "video_path" if layout.is_video(camera) else "data_path"
                    path = layout.path(template, row, source, layout.cameras[camera])
                    raise DataError(f"{path}, episode {number}, camera {camera!r}", found="other pixels than were recorded",
                                    expected=f"frames with sha256 {expected}", fix=RESTORE)  # fmt: skip
            yield frame


def _forward(container: Any) -> Iterator[tuple[int, np.ndarray]]:
    reformatter = VideoReformatter()
    for frame in container.decode(container.streams.video[0]):
        if frame.is_corrupt:  # FFmpeg has painted over a hole and would say nothing
            raise DataError(container.name, found=f"a damaged picture at {frame.pts} ticks",
                            expected="a video that decodes without errors", fix=RESTORE)  # fmt: skip
        if frame.pts is None:
            continue
        yield frame.pts, to_rgb(frame, reformatter)


def unpack_pictures(layout: Layout, rows: Rows, camera: str) -> Iterator[np.ndarray]:
    """Frames of a camera stored as pictures inside the Parquet files (`dtype: image`)."""
    key, number = layout.cameras[camera], 0
    for path in dict.fromkeys(layout.path("data_path", row, "data") for row in rows.episodes):
        for batch in pq.ParquetFile(path).iter_batches(256, columns=[key]):
            for value in batch.column(0).to_pylist():
                if number == layout.num_frames:
                    return
                try:
                    with Image.open(io.BytesIO(value["bytes"])) as image:
                        yield np.asarray(image.convert("RGB"))
                except (OSError, TypeError, KeyError) as error:
                    raise DataError(f"{path}, row {number}, {key}", found=f"{type(error).__name__}: {error}",
                                    expected="an encoded picture", fix=RESTORE) from error  # fmt: skip
                number += 1
