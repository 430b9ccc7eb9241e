"""LeRobot v2.0, v2.1 and v3.0 as a `Source`: every numeric column in its own dtype, every picture decoded.

What training reads directly (`vla.episodes.EpisodeStore`) needs no conversion; this is for those who want another layout,
a robot's own channels, or one v3.0 dataset out of several things. The rules of reading are the same: one piece of code
(`vla/episodes/layout.py`, `rows.py`) says where an episode lies and which picture belongs to which row.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from PIL import Image

from data_tools.sources import RawEpisode, SourceInfo
from vla.episodes.layout import Layout, read_layout
from vla.episodes.problems import RESTORE, Problems, short
from vla.episodes.rows import PacketTimes, Rows, Span, find_frames, read_episodes
from vla.errors import DataError

_HELD_BYTES = 256 * 2**20
"""A data file up to this size is read once and kept for the episodes that follow; a larger one is read episode by episode."""
_NOT_NUMBERS = ("string", "video", "image", "language")


class LeRobotSource:
    """One LeRobot folder. `read` is what the files hold: nothing is renamed, scaled or turned.

    Beside the numbers, `RawEpisode.attributes` carries `task` and `seed` where the dataset remembers them, `split` where it
    has any but `train`, and `instructions` when an episode has more than one (`instruction` is the one of its first row).
    """

    kind: str
    root: Path
    info: SourceInfo
    damage: list[DataError]
    missing = 0

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.layout, problems = read_layout(self.root, None, need_stats=False)
        self.kind = f"lerobot-{self.layout.version}"
        self._rows = read_episodes(self.layout, problems)
        self.damage = [DataError(where, found=found, expected=expected, fix=fix)
                       for where, found, expected, fix in problems.found]  # fmt: skip
        self._count = len(self._rows or [])
        self.info = _describe(self.layout)
        self._splits = _split_of(self.layout.info.get("splits"), self._count)
        self._forget()

    def _forget(self) -> None:
        self._table: tuple[Path, pa.Table] | None = None
        self._packets: PacketTimes = {}

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """A folder with LeRobot's `meta/info.json`, or with what is left of one (`meta/episodes.jsonl`)."""
        info = Path(path) / "meta" / "info.json"
        try:
            if not info.is_file():
                return (info.parent / "episodes.jsonl").exists()
            return "codebase_version" in json.loads(info.read_text())
        except (OSError, ValueError):
            return info.is_file() and (Path(path) / "data").is_dir()

    @classmethod
    def open(cls, path: str | Path) -> LeRobotSource:
        """Raises `DataError` when there is no LeRobot dataset, or its version is not read here."""
        return cls(path)

    def keys(self) -> list[str]:
        """`episode_000000`, ... in order."""
        return [f"episode_{number:06d}" for number in range(self._count)]

    def read(self, key: str, only: Collection[str] | None = None) -> RawEpisode:
        """One episode, whole whatever `only` says. Raises `DataError` naming the file when its rows or videos are missing,
        damaged or of another length."""
        row, problems = self.episode(key), Problems(self.root)
        table = self.table(key)
        where = f"{self.layout.path('data_path', row, 'data')}, episode {row['episode_index']}"
        fields, images = self.numbers(table, where), {}
        for camera, name in self.layout.cameras.items():
            if self.layout.is_video(camera):
                span = self._span(row, camera, fields["timestamp"], problems)
                problems.raise_if_any()
                frames = list(_decode(span))
            else:
                frames = list(_unpack(table[name], f"{where}, {name}"))
            height, width = self.info.images[name]
            if any(frame.shape != (height, width, 3) for frame in frames):
                raise DataError(f"{where}, {name}", found=f"a picture of {frames[0].shape}", expected=(height, width, 3),
                                fix="correct the shape of this feature in meta/info.json")  # fmt: skip
            images[name] = np.stack(frames)
            self._as_recorded(row, camera, images[name])
        return RawEpisode(fields, images, *self._said(row, fields, where), key=key, attributes=self._attributes(row, fields))

    def _as_recorded(self, row: dict[str, Any], camera: str, frames: np.ndarray) -> None:
        """Damaged video often decodes without complaint: recordings made here carry the hash of their pixels."""
        expected = self.layout.pixel_hash(camera, row["episode_index"])
        if expected and hashlib.sha256(np.ascontiguousarray(frames).data).hexdigest() != expected:
            key, video = self.layout.cameras[camera], self.layout.is_video(camera)
            file = self.layout.path("video_path" if video else "data_path", row, f"videos/{key}" if video else "data", key)
            raise DataError(f"{file}, episode {row['episode_index']}, camera {camera!r}", found="other pixels than were recorded",
                            expected=f"frames with sha256 {expected}", fix=RESTORE)  # fmt: skip

    def table(self, key: str) -> pa.Table:
        """The rows of one episode as the file has them, in order of time. Raises `DataError` as `read` does."""
        problems = Problems(self.root)
        table = self._columns(self.episode(key), problems)
        problems.raise_if_any()
        assert table is not None
        return table

    def numbers(self, table: pa.Table, where: str) -> dict[str, np.ndarray]:
        """Field -> (T, ...) array of a `table`. Raises `DataError` naming a column with gaps or ragged rows."""
        return {name: _numbers(table[name], self.info.fields[name], f"{where}, {name}") for name in self.info.fields}

    def episode(self, key: str) -> dict[str, Any]:
        """What the metadata says of one episode: its length and where it lies."""
        if self._rows is None:  # in another process
            self._rows = read_episodes(self.layout, Problems(self.root)) or []
        return self._rows[int(key.removeprefix("episode_"))]

    def _columns(self, row: dict[str, Any], problems: Problems) -> pa.Table | None:
        path, number = self.layout.path("data_path", row, "data"), row["episode_index"]
        wanted = [*self.info.fields, *(k for c, k in self.layout.cameras.items() if not self.layout.is_video(c))]
        try:
            if self._table is None or self._table[0] != path:
                self._table = None
                names = pq.read_schema(path).names
                if lacking := [name for name in wanted if name not in names]:
                    problems.add(path, found=f"no column {', '.join(lacking)}", expected="every feature of meta/info.json",
                                 fix=RESTORE)  # fmt: skip
                    return None
                if path.stat().st_size <= _HELD_BYTES:
                    self._table = path, pq.read_table(path, columns=wanted, page_checksum_verification=True)
            table = self._table[1] if self._table else pq.read_table(
                path, columns=wanted, filters=[("episode_index", "==", number)], page_checksum_verification=True)  # fmt: skip
        except FileNotFoundError:
            problems.add(path, found="no such file", expected="the rows of its episodes", fix=RESTORE)
            return None
        except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: names or words that are no UTF-8
            problems.add(path, found=short(error), expected="a Parquet file with its footer", fix=RESTORE)
            return None
        at = np.flatnonzero(table["episode_index"].to_numpy() == number)
        if "frame_index" in table.column_names:
            at = at[np.argsort(table["frame_index"].to_numpy()[at], kind="stable")]
        if len(at) != row["length"]:
            problems.add(f"{path}, episode {number}", found=f"{len(at)} rows", expected=f"{row['length']}, as its metadata says",
                         fix=RESTORE)  # fmt: skip
            return None
        return table.slice(at[0], len(at)) if np.array_equal(at, np.arange(at[0], at[0] + len(at))) else table.take(at)

    def _span(self, row: dict[str, Any], camera: str, timestamp: np.ndarray, problems: Problems) -> Span:
        if len(self._packets) > 64:
            self._packets.clear()
        T, empty = row["length"], np.zeros((0, 0), np.float32)
        alone = Rows([row], np.array([0, T]), empty, empty, np.zeros(T, np.int32), timestamp.astype(np.float64).reshape(-1))
        try:
            spans = find_frames(self.layout, alone, camera, problems, self._packets)
        finally:  # a video that could not be read is tried, and named, again for the next episode
            self._packets = {path: entry for path, entry in self._packets.items() if entry is not None}
        problems.raise_if_any()
        return spans[0]

    def _said(self, row: dict[str, Any], fields: dict[str, np.ndarray], where: str) -> tuple[str, str]:
        task, known = int(fields["task_index"].reshape(-1)[0]), self.layout.instructions
        if not 0 <= task < len(known):
            raise DataError(f"{where}, task_index", found=task, expected=f"below {len(known)}, the number of tasks", fix=RESTORE)
        return known[task], where

    def _attributes(self, row: dict[str, Any], fields: dict[str, np.ndarray]) -> dict[str, Any]:
        recorded, number = self.layout.recording.get("episodes", []), row["episode_index"]
        attributes = {k: v for k, v in (recorded[number] if number < len(recorded) else {}).items() if k in ("task", "seed")}
        if split := self._splits.get(number):
            attributes["split"] = split
        tasks = [int(t) for t in dict.fromkeys(fields["task_index"].reshape(-1).tolist())]
        if len(tasks) > 1:
            attributes["instructions"] = [self.layout.instructions[t] for t in tasks if t < len(self.layout.instructions)]
        return attributes

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None, "_table": None, "_packets": {}}


def _describe(layout: Layout) -> SourceInfo:
    features = layout.info["features"]
    fields, images, left_out = {}, {}, []
    for name, feature in features.items():
        shape = tuple(int(n) for n in feature["shape"])
        if name in layout.cameras.values():
            named = feature.get("names") or []
            images[name] = (shape[1:] if named and str(named[0]).startswith("channel") else shape)[:2]
        elif feature["dtype"] in _NOT_NUMBERS:
            left_out.append(name)
        else:
            fields[name] = (feature["dtype"], () if shape == (1,) else shape)
    for name, dtype in (("timestamp", "float32"), ("episode_index", "int64"), ("task_index", "int64")):
        fields.setdefault(name, (dtype, ()))
    attributes = {
        "robot_type": layout.info.get("robot_type"), "instructions": layout.instructions, "left_out": left_out,
        "names": {name: feature.get("names") for name, feature in features.items()}, "total_frames": layout.num_frames,
    }  # fmt: skip
    if (layout.root / "meta" / "embodiment.json").is_file():
        attributes["embodiment"] = layout.spec.model_dump(mode="json")
    return SourceInfo(layout.fps, fields, images, attributes)


def _split_of(splits: Any, count: int) -> dict[int, str]:
    """Episode -> split, of those that are not for training: `{"train": "0:90", "val": "90:95,98:100"}`."""
    found: dict[int, str] = {}
    for name, text in splits.items() if isinstance(splits, dict) else ():
        for first, last in re.findall(r"(\d+):(\d+)", str(text)) if name != "train" else ():
            found |= dict.fromkeys(range(int(first), min(int(last), count)), str(name))
    return found


def _numbers(column: pa.ChunkedArray, said: tuple[str, tuple[int, ...]], where: str) -> np.ndarray:
    """(T, ...) in the file's own dtype, whatever info.json calls it."""
    array, T = column.combine_chunks(), len(column)
    if isinstance(array, pa.ExtensionArray):  # two-dimensional features of Hugging Face datasets
        array = array.storage
    while pa.types.is_nested(array.type) and not pa.types.is_struct(array.type):
        if array.null_count:
            break
        array = array.flatten()
    size = int(np.prod(said[1], dtype=np.int64))
    if array.null_count or len(array) != T * size or pa.types.is_nested(array.type) or pa.types.is_string(array.type):
        raise DataError(where, found=f"{len(array)} values of {array.type} ({array.null_count} null) in {T} rows",
                        expected=f"{size} numbers per row", fix=RESTORE)  # fmt: skip
    return array.to_numpy(zero_copy_only=False).reshape(T, *said[1])


def _decode(span: Span) -> Iterator[np.ndarray]:
    """(h, w, 3) uint8 of every tick of `span`, read forward from the keyframe before it."""
    reformatter, at = VideoReformatter(), 0
    try:
        with av.open(str(span.path), metadata_errors="ignore") as container:
            stream: Any = container.streams.video[0]
            stream.codec_context.thread_count = 1
            container.seek(int(span.ticks[0]), stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts is None or frame.pts < span.ticks[at]:
                    continue
                if frame.is_corrupt or frame.pts != span.ticks[at]:
                    break
                # Planar RGB needs no colour conversion.
                yield (frame if frame.format.name == "gbrp" else reformatter.reformat(frame, format="rgb24")).to_ndarray()
                at += 1
                if at == len(span.ticks):
                    return
    except FFmpegError as error:
        raise DataError(span.path, found=short(error), expected="a video that decodes to its end", fix=RESTORE) from error
    raise DataError(span.path, found=f"no whole picture at {span.ticks[at]} ticks",
                    expected="a video that decodes without errors", fix=RESTORE)  # fmt: skip


def _unpack(column: pa.ChunkedArray, where: str) -> Iterator[np.ndarray]:
    """Pictures stored inside the Parquet file."""
    for number, value in enumerate(column.to_pylist()):
        try:
            with Image.open(io.BytesIO(value["bytes"])) as image:
                yield np.asarray(image.convert("RGB"))
        except (OSError, TypeError, KeyError) as error:
            raise DataError(f"{where}, row {number}", found=short(error), expected="an encoded picture", fix=RESTORE) from error
