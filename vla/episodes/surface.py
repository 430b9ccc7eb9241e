"""What reading a dataset looks like, wherever it lies: `EpisodeStore` has it here, `StreamingStore` fetches it."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vla.embodiment import EmbodimentSpec
from vla.episodes.layout import Layout


class Store(ABC):
    """E episodes of F frames, memory-mapped: a forked or spawned worker shares the pages of its parent.

    `state` (F, S) and `action` (F, A) are read-only float32 in robot units; row `t` of an episode is what the robot saw
    before `action[t]`. `episode_starts` is (E + 1,) int64. `task_of_episode` (E,) and `task_of_frame` (F,) index
    `instructions`; they agree unless a dataset changes its instruction inside an episode.
    """

    root: Path
    """Where it lies on this machine."""
    spec: EmbodimentSpec
    fingerprint: str
    """sha256 of the dataset's content; equal for a copy elsewhere."""
    cameras: list[str]
    instructions: list[str]
    stats: dict[str, dict[str, Any]]
    """Feature -> {min, max, mean, std, count, q01, q10, q50, q90, q99}, as in meta/stats.json."""
    suite: str
    """Simulator suite the demonstrations were recorded in, "" when they came from elsewhere."""
    notes: list[str]
    """What was made good while opening, e.g. statistics without quantiles that were computed."""
    recorded_seeds: dict[str, list[int]]
    """Task -> reset seeds, {} when the dataset did not come from a simulator here."""
    state: np.ndarray
    action: np.ndarray
    episode_starts: np.ndarray
    task_of_frame: np.ndarray
    task_of_episode: np.ndarray
    _keys: dict[str, str]
    _MAPPED: ClassVar[frozenset[str]] = frozenset({"state", "action", "episode_starts", "task_of_frame", "task_of_episode"})
    """What `_map` makes: whoever unpickles maps it again, and only names travel."""

    def _describe(self, layout: Layout, exact: Mapping[str, dict[str, Any]], compute_stats: bool, progress: bool) -> None:
        """Take over what `layout` says; `exact` statistics where those of the dataset are not wanted or not enough."""
        self.spec, self.cameras = layout.spec, list(layout.spec.cameras)
        self.instructions, self._keys = layout.instructions, layout.cameras
        self.stats = layout.stats | {k: v for k, v in exact.items() if compute_stats or k in layout.to_compute}
        self.suite, self.recorded_seeds = str(layout.recording.get("suite", "")), layout.seeds
        self.notes = list(layout.notes)
        if progress and self.notes:
            print("\n".join(self.notes), file=sys.stderr)

    @abstractmethod
    def _map(self) -> None:
        """Map the columns of `_MAPPED`, and whatever else a process must have of its own."""

    @property
    def num_episodes(self) -> int:
        """E."""
        return len(self.episode_starts) - 1

    @property
    def num_frames(self) -> int:
        """F."""
        return len(self.action)

    @property
    def shards(self) -> np.ndarray | None:
        """(P + 1,) int64: frames `shards[p] .. shards[p + 1]` are cheap to read together; None when all frames are."""
        return None

    def prefetch(self, *shards: int) -> threading.Thread | None:  # noqa: B027  nothing to do is an answer
        """Begin to fetch `shards` in the background, where there is anything to fetch; returns at once."""

    def camera_key(self, camera: str) -> str:
        """The dataset's own feature name of a camera, e.g. `observation.images.front`."""
        return self._keys[camera]

    @abstractmethod
    def frame(self, camera: str, index: int) -> np.ndarray:
        """Frame `index` (0 <= index < F) as (h, w, 3) uint8."""

    @abstractmethod
    def frames(self, camera: str, indices: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Frames `indices` as (n, h, w, 3) uint8, written to `out` when given. Raises as `frame` does."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in self._MAPPED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()
