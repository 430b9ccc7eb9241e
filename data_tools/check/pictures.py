"""Decodes every picture of a dataset once, in order, and keeps of each episode what the checks and the report need."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vla.episodes import cache
from vla.episodes.layout import RESTORE, Layout, Problems
from vla.episodes.rows import PacketTimes, Rows, Span, find_frames
from vla.errors import DataError

GRID = 16
"""Side of the block means that pictures are compared by: layout and colours survive, noise and codec artefacts do not."""
THUMB = 112
"""Longest side of a thumbnail."""


@dataclass
class Film:
    """One camera in one episode of T frames."""

    mean: np.ndarray  # (GRID, GRID, 3) float32: the average picture
    still: np.ndarray  # (T,) bool: no block differs from the frame before by more than one level
    same: np.ndarray  # (T,) bool: the frame before, to the byte
    changing: float  # share of blocks that change from frame to frame, on average
    digest: str  # sha256 of the decoded frames
    thumbs: list[bytes]  # JPEG


def watch(
    layout: Layout, rows: Rows, problems: Problems, progress: bool, keep: int, decode: bool = True
) -> dict[str, list[Film | None]]:
    """Every camera's films; None for an episode that could not be decoded, which is then among `problems`.

    One frame is held at a time. Without `decode`, only whether every row has its frame is judged, by demultiplexing.
    """
    films: dict[str, list[Film | None]] = {}
    total = layout.num_frames * len(layout.cameras) * decode
    with tqdm(total=total, unit=" frames", desc="pictures", disable=not progress or not decode, leave=False) as bar:
        for camera in layout.cameras:
            spans = _spans(layout, rows, camera, problems) if layout.is_video(camera) else None
            if decode:
                films[camera] = _films(layout, rows, camera, spans, problems, keep, bar)
    return films


def _films(
    layout: Layout, rows: Rows, camera: str, spans: list[Span | None] | None, problems: Problems, keep: int, bar: Any
) -> list[Film | None]:
    """The films of one camera. Behind a damaged episode its video is opened again; pictures in Parquet files are not."""
    films: list[Film | None] = []
    frames: Iterator[np.ndarray] | None = None if spans is not None else cache.unpack_pictures(layout, rows, camera)
    for e in range(len(rows.episodes)):
        if spans is not None and spans[e] is None:
            films.append(None)
            frames = None
            continue
        if spans is not None and frames is None:
            stop = next((n for n in range(e, len(spans)) if spans[n] is None), len(spans))
            frames = cache.decode_spans([span for span in spans[e:stop] if span is not None], layout.root)
        assert frames is not None
        try:
            films.append(_judge(layout, camera, e, frames, int(rows.starts[e + 1] - rows.starts[e]), problems, keep, bar))
        except DataError as error:
            problems.add(f"episode {e}, {error.where}", found=error.found, expected=error.expected, fix=error.fix)
            films.append(None)
            frames = None
            if spans is None:
                return films + [None] * (len(rows.episodes) - e - 1)
    return films


def _spans(layout: Layout, rows: Rows, camera: str, problems: Problems) -> list[Span | None]:
    """One per episode; None where the video does not fit the rows."""
    before = len(problems.found)
    spans = find_frames(layout, rows, camera, problems)
    if len(spans) == len(rows.episodes):
        return list(spans)
    found: list[Span | None] = []
    known: PacketTimes = {}
    for e, row in enumerate(rows.episodes):  # one by one, to know which are whole
        cut = slice(int(rows.starts[e]), int(rows.starts[e + 1]))
        starts = np.array([0, cut.stop - cut.start])
        one = Rows([row], starts, rows.state[cut], rows.action[cut], rows.task[cut], rows.timestamp[cut])
        here = find_frames(layout, one, camera, Problems(layout.root), known)
        found.append(here[0] if here else None)
    if len(problems.found) == before:
        problems.add(
            layout.root / "videos",
            found=f"camera {camera!r}: frames of {len(spans)} episodes",
            expected=f"{len(rows.episodes)}",
            fix=RESTORE,
        )
    return found


def _judge(
    layout: Layout, camera: str, episode: int, frames: Iterator[np.ndarray], count: int, problems: Problems, keep: int, bar: Any
) -> Film | None:
    """Take `count` frames. Raises `DataError` where one of them cannot be had."""
    expected, digest = layout.pixel_hash(camera, episode), hashlib.sha256()
    size = layout.spec.cameras.get(camera)
    blocks = np.empty((count, GRID, GRID, 3), np.uint8)
    same = np.zeros(count, bool)
    chosen = set(np.linspace(0, count - 1, keep).round().astype(int).tolist()) if keep else set()
    thumbs, before = [], None
    for t in range(count):
        frame = next(frames, None)
        if frame is None or (size is not None and frame.shape[:2] != (size.height, size.width)):
            raise DataError(
                f"frame {t}, camera {camera!r}",
                found="no picture" if frame is None else f"one of {frame.shape[:2]}",
                expected="one picture per row, as large as meta/info.json says",
                fix=f"{RESTORE}; or correct the shape in meta/info.json",
            )
        frame = np.ascontiguousarray(frame)
        digest.update(frame.data)
        picture = Image.fromarray(frame)
        blocks[t] = np.asarray(picture.resize((GRID, GRID), Image.Resampling.BOX))
        same[t] = before is not None and np.array_equal(frame, before)
        before = frame
        if t in chosen:
            thumbs.append(_thumbnail(picture))
        bar.update()
    if expected and digest.hexdigest() != expected:
        problems.add(
            f"episode {episode}, camera {camera!r}",
            found="other pixels than were recorded",
            expected=f"frames with sha256 {expected}",
            fix=RESTORE,
        )
    moved = np.abs(np.diff(blocks.astype(np.int16), axis=0)).max(-1) > 1
    still = np.concatenate([[False], ~moved.any((1, 2))])
    changing = float(moved.mean()) if len(moved) else 0.0
    return Film(blocks.mean(0, dtype=np.float32), still, same, changing, digest.hexdigest(), thumbs)


def _thumbnail(picture: Image.Image) -> bytes:
    small = picture.copy()
    small.thumbnail((THUMB, THUMB))
    sink = io.BytesIO()
    small.save(sink, "JPEG", quality=85)
    return sink.getvalue()
