"""Single frames straight from a dataset's videos, without a cache of decoded frames.

Demultiplexing once yields a table of packets: where each lies in its file, when it is shown, and whether it is a
keyframe. A frame is then read without opening, seeking or demultiplexing anything: the bytes from its keyframe to itself
go to a decoder that is kept. The table is memory-mapped and shared by all processes; it holds 32 bytes per frame.

Decoders belong to one thread of one process. They are made anew in a forked or spawned child, and bytes are read with
`pread`, which knows no file position, so nothing of the parent's can be disturbed (a decoder shared across `fork` fails or,
worse, returns other frames).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from vla.episodes.layout import RESTORE
from vla.errors import DataError

PACKET = np.dtype([("offset", "<i8"), ("ticks", "<i8"), ("size", "<i4")])
"""One packet of a video, in decoding order. `ticks`: presentation time in the file's own time base."""
PLACE = np.dtype([("file", "<i4"), ("first", "<i4"), ("last", "<i4")])
"""Where a frame is: its file, and the packets [first, last] (of all files' packets) that must be decoded for it."""

_DECODERS, _FILES = 8, 32
"""Open decoders and files per thread. Files of one encoder and size share a decoder."""


class Index:
    """Packets of one camera's videos while they are being collected; `places` and `packets` are what is kept."""

    def __init__(self) -> None:
        self.files: list[dict[str, str]] = []
        self._numbers: dict[Path, int] = {}
        self._packets: list[np.ndarray] = []
        self._lookup: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._places: list[np.ndarray] = []
        self._count = 0

    def add(self, root: Path, path: Path, ticks: np.ndarray) -> None:
        """Append one episode: its frames are those shown at `ticks` of the video `path`.

        Raises `DataError` when the video has no such frame, or cannot be read packet by packet.
        """
        if path not in self._numbers:
            self._numbers[path] = len(self.files)
            packets, keys, decoder = read_packets(path)
            self.files.append({"path": path.relative_to(root).as_posix(), "decoder": decoder})
            order = np.argsort(packets["ticks"], kind="stable")
            first = _keyframes(packets, keys)
            self._lookup.append((packets["ticks"][order], order + self._count, first[order] + self._count))
            self._packets.append(packets)
            self._count += len(packets)
        file = self._numbers[path]
        shown, last, first = self._lookup[file]
        at = np.clip(np.searchsorted(shown, ticks), 0, len(shown) - 1)
        if not np.array_equal(shown[at], ticks):
            raise DataError(path, found="no packet at the time of some row", expected="one per row", fix=RESTORE)
        places = np.empty(len(ticks), PLACE)
        places["file"], places["first"], places["last"] = file, first[at], last[at]
        self._places.append(places)

    @property
    def packets(self) -> np.ndarray:
        """(P,) `PACKET`."""
        return np.concatenate([np.empty(0, PACKET), *self._packets])

    @property
    def places(self) -> np.ndarray:
        """(F,) `PLACE`."""
        return np.concatenate([np.empty(0, PLACE), *self._places])


def read_packets(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """(packets in decoding order, which of them are keyframes, a name of the decoder they need).

    Raises `DataError` when the container does not hold its packets as they go to the decoder.
    """
    rows, keys = [], []
    try:
        with av.open(str(path), metadata_errors="ignore") as container, open(path, "rb") as file:
            stream: Any = container.streams.video[0]
            context = stream.codec_context
            colour = context.color_range, context.colorspace, context.color_primaries, context.color_trc
            extra = bytes(context.extradata or b"").hex()
            decoder = f"{context.name} {context.width}x{context.height} {context.pix_fmt} {colour} {extra}"
            for packet in container.demux(stream):
                if not packet.size or packet.pts is None:
                    continue
                if os.pread(file.fileno(), packet.size, packet.pos or 0) != bytes(packet):
                    raise DataError(path, found=f"a packet at {packet.pts} ticks that is not stored in one piece",
                                    expected="an MP4 that can be read frame by frame",
                                    fix="set mixture.frames=raw or mixture.frames=jpeg")  # fmt: skip
                rows.append((packet.pos, packet.pts, packet.size))
                keys.append(packet.is_keyframe)
    except (FFmpegError, IndexError, AttributeError) as error:
        raise DataError(path, found=f"a video that cannot be read, {type(error).__name__}: {error}",
                        expected="a complete MP4", fix=RESTORE) from error  # fmt: skip
    if not rows or not keys[0]:
        raise DataError(path, found=f"{len(rows)} packets, the first not a keyframe" if rows else "no packet",
                        expected="a video that begins with a keyframe", fix=RESTORE)  # fmt: skip
    return np.array(rows, PACKET), np.array(keys), decoder


def _keyframes(packets: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(P,) the packet at which decoding must begin to see each packet.

    That is the last keyframe before it, unless the packet is shown before that keyframe (a leading picture of an open
    group): it may need the group before.
    """
    number = np.arange(len(packets))
    last = np.maximum.accumulate(np.where(keys, number, 0))
    leading = packets["ticks"] < packets["ticks"][last]
    before = np.concatenate([[0], last[:-1]])[last]  # the keyframe before each packet's own
    return np.where(leading, before, last)


class VideoFrames:
    """Frames of one camera, decoded when they are asked for.

    `files` as in `Index.files` with paths below `root`; `packets` (P,) `PACKET` and `places` (F,) `PLACE`.
    """

    def __init__(self, root: Path, files: list[dict[str, str]], packets: np.ndarray, places: np.ndarray) -> None:
        self._files = [(str(root / file["path"]), file["decoder"]) for file in files]
        self._packets, self._places = packets, places

    def frame(self, index: int) -> np.ndarray:
        """Frame `index` as (h, w, 3) uint8, newly allocated. Raises `DataError` when the video does not decode."""
        file, first, last = self._places[index].tolist()
        ticks = int(self._packets["ticks"][last])
        for _, picture in self._decode(file, first, last, {ticks}):
            return picture
        raise AssertionError("_decode yields every wanted picture or raises")

    def frames(self, indices: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        """Frames `indices` into `out` (n, h, w, 3) uint8, each group of pictures decoded once however many are wanted."""
        places = self._places[np.asarray(indices)]
        groups: dict[tuple[int, int], dict[int, list[int]]] = {}
        for slot, (file, first, last) in enumerate(places.tolist()):
            groups.setdefault((file, first), {}).setdefault(last, []).append(slot)
        for (file, first), wanted in sorted(groups.items()):
            slots = {int(self._packets["ticks"][last]): at for last, at in wanted.items()}
            for ticks, picture in self._decode(file, first, max(wanted), set(slots)):
                out[slots[ticks]] = picture

    def _decode(self, file: int, first: int, last: int, wanted: set[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(ticks, picture) of each of `wanted`, from packets [first, last] of a file."""
        path, name = self._files[file]
        mine = _mine()
        left = set(wanted)
        try:
            decoder, descriptor = mine.decoder(name, path), mine.descriptor(path)
            decoder.flush_buffers()
            for offset, ticks, size in self._packets[first : last + 1].tolist():
                data = os.pread(descriptor, size, offset)
                if len(data) != size:
                    raise DataError(path, found=f"{len(data)} of {size} bytes at {offset}", expected="a file that did not shrink",
                                    fix=RESTORE)  # fmt: skip
                packet = av.Packet(data)
                packet.pts = ticks
                yield from _pictures(decoder.decode(packet), left, path, mine.reformatter)
            if left:  # a decoder that reorders holds pictures back until it is told that nothing follows
                yield from _pictures(decoder.decode(None), left, path, mine.reformatter)
        except (FFmpegError, OSError) as error:
            raise DataError(path, found=f"{type(error).__name__}: {error}", expected="a video that decodes to its end",
                            fix=RESTORE) from error  # fmt: skip
        if left:
            raise DataError(path, found=f"no frame at {min(left)} ticks, though the file lists one",
                            expected="a video that decodes to its end", fix=RESTORE)  # fmt: skip


def _pictures(decoded: Any, left: set[int], path: str, reformatter: VideoReformatter) -> Iterator[tuple[int, np.ndarray]]:
    for frame in decoded:
        if frame.is_corrupt:  # FFmpeg has painted over a hole and would say nothing
            raise DataError(path, found=f"a damaged picture at {frame.pts} ticks",
                            expected="a video that decodes without errors", fix=RESTORE)  # fmt: skip
        if frame.pts in left:
            left.discard(frame.pts)
            yield frame.pts, to_rgb(frame, reformatter)


def to_rgb(frame: Any, reformatter: VideoReformatter) -> np.ndarray:
    """(h, w, 3) uint8 of a decoded frame; the one conversion of the house, so that every way to a frame gives its pixels."""
    # Planar RGB needs no colour conversion; a converter per frame would cost as much as decoding it, and its threads more
    # than they save.
    return (frame if frame.format.name == "gbrp" else reformatter.reformat(frame, format="rgb24", threads=1)).to_ndarray()


class _Mine(threading.local):
    """Decoders and descriptors of one thread of one process, the longest unused closed first."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.reformatter = VideoReformatter()
        self._decoders: OrderedDict[str, tuple[Any, Any, str]] = OrderedDict()
        self._opened: OrderedDict[str, BinaryIO] = OrderedDict()

    def decoder(self, name: str, path: str) -> Any:
        """The decoder called `name`; `path` is a file it is made from when there is none."""
        if name in self._decoders:
            self._decoders.move_to_end(name)
            return self._decoders[name][1]
        while len(self._decoders) >= _DECODERS:
            self._decoders.popitem(last=False)[1][0].close()
        # The container stays open: it owns what the codec context was configured with.
        container = av.open(path, metadata_errors="ignore")
        context: Any = container.streams.video[0].codec_context
        context.thread_count = 1  # small frames: threads only contend, and a thread does not survive a fork
        if context.name == "libdav1d":
            context.options = {"max_frame_delay": "1"}
        context.open(strict=False)
        self._decoders[name] = container, context, path
        return context

    def descriptor(self, path: str) -> int:
        """An open file descriptor of `path`."""
        if path in self._opened:
            self._opened.move_to_end(path)
        else:
            while len(self._opened) >= _FILES:
                self._opened.popitem(last=False)[1].close()
            self._opened[path] = open(path, "rb", buffering=0)
        return self._opened[path].fileno()


    def forget(self, path: str) -> None:
        opened = self._opened.pop(path, None)
        if opened is not None:
            opened.close()
        for name in [name for name, (_, _, source) in self._decoders.items() if source == path]:
            self._decoders.pop(name)[0].close()


def forget(path: str) -> None:
    """Close what this thread holds open of `path`, so that a file which is about to be removed gives its space back.

    That is its descriptor and the decoders made from it; the next file that needs such a decoder makes another.
    """
    _mine().forget(path)


_KEPT = [_Mine()]


def _mine() -> _Mine:
    if _KEPT[0].process != os.getpid():
        _KEPT.insert(0, _Mine())  # the parent's stay where they are: they are not ours to close
    return _KEPT[0]
