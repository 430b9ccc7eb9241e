"""The numeric columns of a growing dataset and their statistics, in memory that does not grow with it.

Minimum, maximum, mean and standard deviation are exact at any size. Quantiles of state and action are exact up to
`MAX_KEPT_ROWS` frames and come from every k-th frame beyond (k the smallest power of two that fits). All other columns
follow from the lengths of the episodes, so theirs are exact at any size.

Everything depends on the episodes and their order alone, not on when they were committed: an interrupted dataset ends
with the same statistics as one written in one go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from vla.normalize import QUANTILES
from vla.recording.language import COLUMN, to_column

MAX_KEPT_ROWS = 1 << 20
_CHUNKS = 256


def timestamps(length: int, fps: int) -> np.ndarray:
    """(T,) float32 seconds from the episode's start."""
    return (np.arange(length) / fps).astype(np.float32)


@dataclass(frozen=True)
class EpisodeRows:
    """What the data file holds of one episode."""

    number: int
    start: int  # frames before it in the dataset
    task: int
    success: bool
    state: np.ndarray  # (T, S) float32
    action: np.ndarray  # (T, A) float32
    language: list[dict[str, Any]] | None = None  # rows of its column (`language.py`); None where the dataset has none

    def __len__(self) -> int:
        return len(self.action)

    @property
    def nbytes(self) -> int:
        """Size of its rows, uncompressed: state, action and the seven columns every dataset has. What is said is repeated in
        every row, and next to nothing on the disk."""
        return self.state.nbytes + self.action.nbytes + len(self) * (4 * 8 + 4 + 2)

    def columns(self, fps: int) -> dict[str, np.ndarray]:
        """Feature -> (T,) or (T, dims), in the order they are written."""
        T = len(self)
        last = np.arange(T) == T - 1
        state = {"observation.state": self.state} if self.state.shape[1] else {}
        return state | {
            "action": self.action, "next.done": last, "next.success": last & self.success,
            "timestamp": timestamps(T, fps), "frame_index": np.arange(T), "episode_index": np.full(T, self.number),
            "index": self.start + np.arange(T), "task_index": np.full(T, self.task),
        }  # fmt: skip


def to_table(episodes: Sequence[EpisodeRows], fps: int) -> pa.Table:
    """The rows of consecutive episodes."""
    parts = [episode.columns(fps) for episode in episodes]
    arrays = {}
    for key in parts[0]:
        values = np.concatenate([part[key] for part in parts])
        flat = pa.array(values.reshape(-1))
        wide = values.ndim == 2 and values.shape[1] > 1  # a feature of shape [1] is a plain column
        arrays[key] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1]) if wide else flat
    if episodes[0].language is not None:
        arrays[COLUMN] = to_column([episode.language or [] for episode in episodes], list(map(len, episodes)))
    return pa.table(arrays)


def from_table(table: pa.Table, number: int, lengths: list[int]) -> list[EpisodeRows]:
    """The episodes `number`, `number + 1`, ... of the given lengths, from the rows `to_table` made of them.

    Raises `KeyError`, `IndexError` or `ValueError` when the rows are not those.
    """

    def values(key: str) -> np.ndarray:
        column = table[key].combine_chunks()
        nested = pa.types.is_fixed_size_list(column.type)
        return (column.flatten() if nested else column).to_numpy(zero_copy_only=False)

    total = sum(lengths)
    action = values("action").reshape(len(table), -1)[:total]
    state = values("observation.state").reshape(len(table), -1)[:total] if "observation.state" in table.column_names else None
    state = np.zeros((total, 0), np.float32) if state is None else state
    index, task, success = values("index"), values("task_index"), values("next.success")
    said = table[COLUMN] if COLUMN in table.column_names else None
    episodes, at = [], 0
    for n, T in enumerate(lengths):
        rows = slice(at, at + T)
        solved = bool(success[at + T - 1])
        language = None if said is None else said[at].as_py()
        episodes.append(EpisodeRows(number + n, int(index[at]), int(task[at]), solved, state[rows], action[rows], language))
        at += T
    return episodes


@dataclass(frozen=True)
class _Vector:
    """Statistics of (F, D) float32 rows; every `stride`-th row is kept, F / stride <= `MAX_KEPT_ROWS`."""

    count: int = 0
    low: np.ndarray = field(default_factory=lambda: np.zeros(0))
    high: np.ndarray = field(default_factory=lambda: np.zeros(0))
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(0))  # sum of squared distances from the mean
    stride: int = 1
    kept: tuple[np.ndarray, ...] = ()

    def plus(self, episodes: list[np.ndarray]) -> _Vector:
        """With the rows of more episodes, added one episode at a time (so that rounding does not depend on commits)."""
        count, low, high, mean, squares = self.count, self.low, self.high, self.mean, self.squares
        stride, kept = self.stride, list(self.kept)
        held = sum(map(len, kept))
        for rows in episodes:
            wide = rows.astype(np.float64)
            n, centre = len(wide), wide.mean(0)
            spread = ((wide - centre) ** 2).sum(0)
            picked = rows[-count % stride :: stride]
            if count == 0:
                low, high, mean, squares = wide.min(0), wide.max(0), centre, spread
            else:
                low, high, gap = np.minimum(low, wide.min(0)), np.maximum(high, wide.max(0)), centre - mean
                mean = mean + gap * (n / (count + n))
                squares = squares + spread + gap**2 * (count * n / (count + n))
            count += n
            kept.append(np.array(picked))  # a copy: a view would keep the whole file it was cut from
            held += len(picked)
            while held > MAX_KEPT_ROWS:
                kept, stride = [np.concatenate(kept)[::2].copy()], stride * 2
                held = len(kept[0])
            if len(kept) > _CHUNKS:
                kept = [np.concatenate(kept)]
        return _Vector(count, low, high, mean, squares, stride, tuple(kept))

    def to_json(self) -> dict[str, list]:
        # One dimension at a time: all of them at once as float64 would be three times what is kept.
        columns = (np.concatenate([rows[:, d] for rows in self.kept]).astype(np.float64) for d in range(len(self.mean)))
        quantiles = np.stack([np.quantile(column, list(QUANTILES.values())) for column in columns], 1)
        std = np.sqrt(self.squares / self.count)
        moments = {"min": self.low, "max": self.high, "mean": self.mean, "std": std}
        return {**{k: v.tolist() for k, v in moments.items()}, "count": [self.count],
                **{q: row.tolist() for q, row in zip(QUANTILES, quantiles, strict=True)}}  # fmt: skip


def weighted_stats(values: np.ndarray, counts: np.ndarray) -> dict[str, list]:
    """What `column_stats(np.repeat(values, counts))` returns, without the array. `values` must be rising."""
    values, counts = np.asarray(values, np.float64)[counts > 0], counts[counts > 0]
    total, upto = int(counts.sum()), np.cumsum(counts)
    mean = float(values @ counts / total)
    std = float(np.sqrt((values - mean) ** 2 @ counts / total))
    entry: dict[str, list] = {"min": [float(values[0])], "max": [float(values[-1])], "mean": [mean], "std": [std]}
    entry["count"] = [total]
    for name, q in QUANTILES.items():
        place = q * (total - 1)
        below = int(place)
        left, right = (values[np.searchsorted(upto, min(n, total - 1), "right")] for n in (below, below + 1))
        entry[name] = [float(left + (right - left) * (place - below))]
    return entry


@dataclass(frozen=True)
class Running:
    """Statistics of all numeric columns of the episodes so far. Unchanging: `plus` makes the next one, so a commit that
    fails leaves nothing behind."""

    fps: int
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (E,)
    frames_of_task: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    successes: int = 0
    state: _Vector = field(default_factory=_Vector)
    action: _Vector = field(default_factory=_Vector)

    def plus(self, episodes: list[EpisodeRows]) -> Running:
        lengths = np.array([len(episode) for episode in episodes], np.int64)
        counts = np.bincount([episode.task for episode in episodes], lengths, len(self.frames_of_task)).astype(np.int64)
        counts[: len(self.frames_of_task)] += self.frames_of_task
        state = [episode.state for episode in episodes if episode.state.shape[1]]
        return replace(
            self, lengths=np.concatenate([self.lengths, lengths]), frames_of_task=counts,
            successes=self.successes + sum(episode.success for episode in episodes),
            state=self.state.plus(state), action=self.action.plus([episode.action for episode in episodes]),
        )  # fmt: skip

    def to_json(self) -> dict[str, dict[str, list]]:
        """Feature -> statistics, as `column_stats` of the whole column would give them."""
        E, frames = len(self.lengths), int(self.lengths.sum())
        longest = np.arange(int(self.lengths.max()))
        reached = E - np.cumsum(np.bincount(self.lengths, minlength=len(longest) + 1))[:-1]  # episodes with a frame t
        flags = np.arange(2)
        ramp = {"min": [0.0], "max": [frames - 1.0], "mean": [(frames - 1) / 2],
                "std": [float(np.sqrt((frames**2 - 1) / 12))], "count": [frames],
                **{name: [q * (frames - 1)] for name, q in QUANTILES.items()}}  # fmt: skip
        entries = {"observation.state": self.state.to_json()} if self.state.count else {}
        return entries | {
            "action": self.action.to_json(),
            "next.done": weighted_stats(flags, np.array([frames - E, E])),
            "next.success": weighted_stats(flags, np.array([frames - self.successes, self.successes])),
            "timestamp": weighted_stats(timestamps(len(longest), self.fps), reached),
            "frame_index": weighted_stats(longest, reached), "episode_index": weighted_stats(np.arange(E), self.lengths),
            "index": ramp, "task_index": weighted_stats(np.arange(len(self.frames_of_task)), self.frames_of_task),
        }  # fmt: skip
