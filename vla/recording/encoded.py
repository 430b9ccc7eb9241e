"""One episode made ready to be written: its pictures as clips, its columns measured. Worker processes do this part."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from vla.recording.columns import timestamps
from vla.recording.statistics import PixelStats, column_stats
from vla.recording.video import encode
from vla.schema import Episode, Said


@dataclass
class EncodedEpisode:
    """An episode ready to be appended: clips, columns and statistics. Small enough to travel between processes."""

    clips: dict[str, bytes]  # camera -> MP4
    state: np.ndarray  # (T, S) float32
    action: np.ndarray  # (T, A) float32
    instruction: str
    success: bool
    task: str
    seed: int | None
    pixels: dict[str, np.ndarray]  # camera -> (3, 256) histogram
    stats: dict[str, dict] = field(default_factory=dict)  # feature -> statistics
    digests: dict[str, str] = field(default_factory=dict)  # camera -> sha256 of the frames; none unless they are kept exactly
    source: str = ""  # key in the dataset it was converted from
    split: str = ""  # `val`, ..., where that dataset has any
    several: bool = False  # more instructions there than the one kept
    language: tuple[Said, ...] = ()  # what is said while it goes on

    def __len__(self) -> int:
        return len(self.action)


def encode_episode(episode: Episode, fps: int, video: str = "lossless") -> EncodedEpisode:
    """Encode, count and measure one episode. Raises `DataError` on NaN, a wrong shape or an empty episode."""
    episode.validate(f"episode of {episode.task or episode.instruction!r}, seed {episode.seed}")
    T = len(episode)
    pixels = {camera: PixelStats.of(frames) for camera, frames in episode.images.items()}
    last = np.arange(T) == T - 1
    exact = episode.images if video == "lossless" else {}
    stats = {image_key(camera): counted.to_json() for camera, counted in pixels.items()}
    stats |= {"action": column_stats(episode.action), "next.done": column_stats(last),
              "next.success": column_stats(last & episode.success),
              "timestamp": column_stats(timestamps(T, fps)), "frame_index": column_stats(np.arange(T))}  # fmt: skip
    if episode.state.shape[1]:
        stats["observation.state"] = column_stats(episode.state)
    return EncodedEpisode(
        {camera: encode(frames, fps, video) for camera, frames in episode.images.items()},
        episode.state, episode.action, episode.instruction, episode.success, episode.task, episode.seed,
        {camera: counted.histogram for camera, counted in pixels.items()}, stats,
        {camera: hashlib.sha256(np.ascontiguousarray(frames).data).hexdigest() for camera, frames in exact.items()},
        language=episode.language,
    )  # fmt: skip


def image_key(camera: str) -> str:
    """`front` -> `observation.images.front`."""
    return f"observation.images.{camera}"
