"""What reading a dataset looks like, wherever it lies: `EpisodeStore` has it here, `StreamingStore` fetches it."""

from __future__ import annotations

import copy
import json
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from vla.embodiment import EmbodimentSpec
from vla.episodes.language import Segments, unspoken
from vla.episodes.layout import Layout
from vla.errors import DataError

Language = Literal["task", "subtask"]


def save_segments(found: Segments | None, folder: Path) -> None:
    """Keep `found` where a store maps its columns from; nothing where nothing is said."""
    if found is not None and found.names:
        np.save(folder / "segments.npy", found.starts, allow_pickle=False)
        np.save(folder / "subtask.npy", found.subtask, allow_pickle=False)
        (folder / "subtasks.json").write_text(json.dumps(found.names))


class Store(ABC):
    """E episodes of F frames, memory-mapped: a forked or spawned worker shares the pages of its parent.

    `state` (F, S) and `action` (F, A) are read-only float32 in robot units; row `t` of an episode is what the robot saw
    before `action[t]`. `episode_starts` is (E + 1,) int64. `task_of_episode` (E,) and `task_of_frame` (F,) index
    `instructions`; they agree unless a dataset changes its instruction inside an episode. Where it names subtasks (G segments,
    `vla/episodes/language.py`), `speaking("subtask")` is the same store, told those.
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
    subtasks: list[str]
    """Every subtask that is named; [] where none is."""
    segment_starts: np.ndarray
    """(G + 1,) int64 frame numbers; a segment lies in one episode."""
    subtask_of_segment: np.ndarray
    """(G,) int32 into `subtasks`; -1 where nothing is said."""
    language: Language = "task"
    """What `told` says."""
    _keys: dict[str, str]
    _MAPPED: ClassVar[frozenset[str]] = frozenset({"state", "action", "episode_starts", "task_of_frame", "task_of_episode",
                                                   "segment_starts", "subtask_of_segment"})  # fmt: skip
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

    def _map_segments(self, folder: Path) -> None:
        """The segments that `save_segments` left in `folder`; without them, one per episode that says nothing."""
        found = unspoken(self.episode_starts)
        if (folder / "subtasks.json").is_file():
            starts, subtask = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("segments", "subtask"))
            found = Segments(starts, subtask, json.loads((folder / "subtasks.json").read_text()))
        self.segment_starts, self.subtask_of_segment, self.subtasks = found.starts, found.subtask, found.names

    def speaking(self, language: Language) -> Self:
        """The same demonstrations, told the sentence of the whole (`task`) or that of the subtask under way (`subtask`).

        Raises `DataError` when no subtask is named."""
        if language == "subtask" and not (self.subtask_of_segment >= 0).any():
            raise DataError(self.root, found="no subtask in it (a column language_persistent with rows of style subtask)",
                            expected="subtasks, to be told them (language: subtask)",
                            fix=f"vla data segment {self.root} --out NEW finds and writes them; or language: task")  # fmt: skip
        other = copy.copy(self)
        other.language = language
        return other

    def told(self, at: int, stop: int) -> tuple[str, int]:
        """What is said at frame `at` of an episode that ends before frame `stop`, and before which frame that ends."""
        if self.language == "subtask":
            segment = int(np.searchsorted(self.segment_starts, at, "right")) - 1
            name, stop = int(self.subtask_of_segment[segment]), int(self.segment_starts[segment + 1])
            if name >= 0:
                return self.subtasks[name], stop
        return self.instructions[self.task_of_frame[at]], stop

    @property
    def sentences(self) -> list[str]:
        """Everything `told` may say."""
        if self.language == "task":
            return list(self.instructions)
        silent = np.flatnonzero(self.subtask_of_segment < 0)
        tasks = np.unique(self.task_of_frame[self.segment_starts[silent]]) if len(silent) else np.zeros(0, int)
        return [*self.subtasks, *(self.instructions[task] for task in tasks.tolist())]

    def stretches(self, episodes: np.ndarray) -> np.ndarray:
        """Lengths of what is told as one in `episodes`: of the episodes themselves, or of their segments."""
        if self.language == "task":
            return np.diff(self.episode_starts)[episodes]
        inside = np.searchsorted(self.episode_starts, self.segment_starts[:-1], "right") - 1
        return np.diff(self.segment_starts)[np.isin(inside, episodes)]

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
