"""Episodes as small H.264 clips, and clips joined into the shared MP4 files of LeRobot v3.0 without re-encoding.

Every episode is encoded on its own, so its bytes depend on its frames alone: not on the worker that made it, nor on
the file it lands in, nor on whether the recording was interrupted. Joining copies packets.

Three ways to store a frame. At 64 pixels chroma sub-sampling costs more than any other choice (figures:
docs/results.md):
- `lossless` (default): H.264 in RGB (gbrp) at qp 0. The recorded pixels exactly, in every decoder, since no colour
  conversion takes place.
- `rgb`: the same at crf 12, for pictures large enough that size matters.
- `yuv420p`: what browsers and hardware decoders play; 30 dB at 64 pixels, fine from about 224 on.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from vla.errors import DataError

_COMMON = {"g": "2", "bf": "0", "sc_threshold": "0"}
VIDEO: dict[str, tuple[str, str, dict[str, str]]] = {
    "lossless": ("libx264rgb", "rgb24", {**_COMMON, "preset": "veryfast", "qp": "0"}),
    "rgb": ("libx264rgb", "rgb24", {**_COMMON, "preset": "veryfast", "crf": "12"}),
    "yuv420p": ("libx264", "yuv420p", {**_COMMON, "preset": "veryfast", "crf": "18"}),
}
"""Name -> (encoder, pixel format, options). A group of 2 pictures keeps random access cheap (lerobot's own choice)."""

_TICKS = 1024
"""MP4 time units per frame: any multiple works; a power of two keeps every timestamp exact."""


def encode(frames: np.ndarray, fps: int, video: str = "lossless") -> bytes:
    """(T, h, w, 3) uint8 -> one MP4 clip. `yuv420p` needs even h and w."""
    codec, pix_fmt, options = VIDEO[video]
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        stream.codec_context.thread_count = 1  # recording runs one process per core; threads would only contend
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return sink.getvalue()


def join(clips: Iterable[tuple[bytes | Path, int | None]], fps: int) -> memoryview:
    """One MP4 of all `clips`, each (MP4 bytes or file, number of leading frames to copy; None for all). They must be
    `joinable`.

    Raises `ValueError` when one is not, or has fewer frames than asked for.
    """
    sink = io.BytesIO()
    at, header = 0, None
    with av.open(sink, "w", format="mp4") as out:
        stream: Any = None
        for data, limit in clips:
            with _open(data) as clip:
                source: Any = clip.streams.video[0]
                if stream is None:
                    stream, header = out.add_stream_from_template(source), source.codec_context.extradata
                    stream.time_base = Fraction(1, fps * _TICKS)
                elif source.codec_context.extradata != header:
                    raise ValueError("clips of different encoder settings")
                count = 0
                for packet in clip.demux(source):
                    if packet.size == 0 or (limit is not None and count >= limit):
                        continue
                    packet.stream = stream
                    packet.time_base = Fraction(1, fps * _TICKS)
                    packet.pts = packet.dts = at * _TICKS  # no B-frames: decoding order is showing order
                    packet.duration = _TICKS
                    out.mux(packet)
                    at, count = at + 1, count + 1
                if limit is not None and count < limit:
                    raise ValueError(f"{count} frames where {limit} were recorded")
    return sink.getbuffer()


def decode(path: Path, first: int, count: int, fps: int) -> Iterator[np.ndarray]:
    """Frames `first` .. `first + count - 1` of an MP4 made by `join`, each (h, w, 3) uint8.

    Raises `DataError` when the file cannot be decoded or one of them is missing.
    """
    wanted, end = first, first + count
    try:
        with av.open(str(path)) as container:
            stream: Any = container.streams.video[0]
            stream.codec_context.thread_count = 1
            container.seek(round(first / fps / stream.time_base), stream=stream, backward=True)
            for frame in container.decode(stream):
                at = round(frame.pts * stream.time_base * fps)
                if at < first:
                    continue
                if at != wanted or frame.is_corrupt:
                    break
                yield frame.to_ndarray() if frame.format.name == "gbrp" else frame.to_ndarray(format="rgb24")
                wanted += 1
                if wanted == end:
                    return
    except (FFmpegError, OSError, IndexError) as error:
        raise DataError(path, found=f"{type(error).__name__}: {error}", expected="a video that decodes to its end",
                        fix="convert or record it again") from error  # fmt: skip
    raise DataError(path, found=f"no whole frame {wanted}", expected=f"frames {first} to {end - 1}",
                    fix="convert or record it again")  # fmt: skip


def _open(data: bytes | Path) -> Any:
    return av.open(str(data) if isinstance(data, Path) else io.BytesIO(data), "r")


def joinable(first: bytes | Path, second: bytes | Path) -> bool:
    """Whether both clips carry the same decoder header (same encoder build and settings)."""
    headers = []
    for data in (first, second):
        with _open(data) as clip:
            stream: Any = clip.streams.video[0]
            headers.append((stream.codec_context.extradata, stream.height, stream.width))
    return headers[0] == headers[1]


def describe(data: bytes | Path) -> dict[str, Any]:
    """The `info` entry LeRobot keeps per camera in info.json."""
    with _open(data) as clip:
        stream: Any = clip.streams.video[0]
        return {
            "video.height": stream.height, "video.width": stream.width, "video.codec": stream.codec.canonical_name,
            "video.pix_fmt": stream.pix_fmt, "video.is_depth_map": False, "video.fps": int(stream.average_rate),
            "video.channels": 3, "has_audio": False,
        }  # fmt: skip
