"""One episode's video cut out of a shared file: by copying packets where that loses nothing, else by encoding anew.

Copying is exact when the episode begins with a keyframe and its packets follow each other in decoding order, as both
`lerobot` and our own writer leave them. Otherwise the pictures are decoded and encoded again in the same pixel format
without loss (H.264 at qp 0): larger, but every decoder sees the same pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from vla.episodes.problems import RESTORE, short
from vla.episodes.rows import Span
from vla.errors import DataError


def cut(span: Span) -> tuple[bytes, bool]:
    """(an MP4 whose first picture is at 0 s, whether packets were copied).

    Raises `DataError` when the video is damaged or lacks a picture of the episode.
    """
    try:
        clip = _copy(span)
        if clip is not None and _times(clip) == _wanted(span):
            return clip, True
        clip = _encode(span)
    except FFmpegError as error:
        raise DataError(span.path, found=short(error), expected="a video that decodes to its end", fix=RESTORE) from error
    if _times(clip) != _wanted(span):
        raise DataError(span.path, found=f"a clip of {len(_times(clip))} pictures at other times",
                        expected=f"{len(span.ticks)} pictures", fix="convert to v3.0 with --video yuv420p first")  # fmt: skip
    return clip, False


def _wanted(span: Span) -> list[int]:
    """Microseconds of every picture of the clip."""
    with av.open(str(span.path), metadata_errors="ignore") as container:
        base: Any = container.streams.video[0].time_base
    return [round((tick - int(span.ticks[0])) * base * 1_000_000) for tick in span.ticks.tolist()]


def _times(clip: bytes) -> list[int]:
    with av.open(io.BytesIO(clip), "r") as container:
        stream: Any = container.streams.video[0]
        shown = (p.pts for p in container.demux(stream) if p.pts is not None and p.size)
        return sorted(round(pts * stream.time_base * 1_000_000) for pts in shown)


def _copy(span: Span) -> bytes | None:
    first, last, wanted = int(span.ticks[0]), int(span.ticks[-1]), set(span.ticks.tolist())
    with av.open(str(span.path), metadata_errors="ignore") as container:
        stream: Any = container.streams.video[0]
        container.seek(first, stream=stream, backward=True)
        packets: list[Any] = []
        for packet in container.demux(stream):
            if packet.pts is None or not packet.size:
                continue
            if packet.is_keyframe and packet.pts <= first:
                packets = []
            elif packet.is_keyframe and packet.pts > last:
                break
            packets.append(packet)
            if len(packets) == len(wanted):
                break
        whole = len(packets) == len(wanted) and {p.pts for p in packets} == wanted
        if not whole or not packets[0].is_keyframe or packets[0].pts != first:
            return None
        sink = io.BytesIO()
        with av.open(sink, "w", format="mp4") as out:
            target: Any = out.add_stream_from_template(stream, opaque=True)  # a decoder's name is no encoder's
            target.time_base = stream.time_base
            for packet in packets:
                packet.stream = target
                packet.time_base = stream.time_base
                packet.pts -= first
                packet.dts -= first
                out.mux(packet)
        return sink.getvalue()


def _encode(span: Span) -> bytes:
    sink = io.BytesIO()
    with av.open(str(span.path), metadata_errors="ignore") as container:
        source: Any = container.streams.video[0]
        rgb = source.pix_fmt == "gbrp"
        with av.open(sink, "w", format="mp4") as out:
            options = {"qp": "0", "preset": "veryfast", "g": "2", "bf": "0"}
            stream: Any = out.add_stream("libx264rgb" if rgb else "libx264", rate=source.average_rate or 1, options=options)
            stream.height, stream.width, stream.pix_fmt = source.height, source.width, source.pix_fmt
            context, given = stream.codec_context, source.codec_context
            context.thread_count, context.time_base = 1, Fraction(source.time_base)
            for name in ("color_range", "colorspace", "color_primaries", "color_trc"):
                setattr(context, name, getattr(given, name))
            for frame in _pictures(container, source, span):
                frame.pts -= int(span.ticks[0])
                frame.pict_type = 0  # the source's types are not ours to repeat
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
    return sink.getvalue()


def frames(span: Span) -> np.ndarray:
    """(T, h, w, 3) uint8, every picture of the episode. Raises `DataError` as `cut` does."""
    try:
        with av.open(str(span.path), metadata_errors="ignore") as container:
            return np.stack([f.to_ndarray(format="rgb24") for f in _pictures(container, container.streams.video[0], span)])
    except FFmpegError as error:
        raise DataError(span.path, found=short(error), expected="a video that decodes to its end", fix=RESTORE) from error


def _pictures(container: Any, stream: Any, span: Span) -> Iterator[Any]:
    stream.codec_context.thread_count = 1
    container.seek(int(span.ticks[0]), stream=stream, backward=True)
    at = 0
    for frame in container.decode(stream):
        if frame.pts is None or frame.pts < span.ticks[at]:
            continue
        if frame.is_corrupt or frame.pts != span.ticks[at]:
            break
        yield frame
        at += 1
        if at == len(span.ticks):
            return
    raise DataError(span.path, found=f"no whole picture at {span.ticks[at]} ticks",
                    expected="a video that decodes without errors", fix=RESTORE)  # fmt: skip
