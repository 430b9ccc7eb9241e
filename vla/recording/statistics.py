"""Statistics of a LeRobot dataset, with the keys and shapes `lerobot` writes, computed exactly instead of estimated.

`lerobot` estimates quantiles from a 5,000-bin histogram per episode and averages them. Here numeric columns are small
enough to be sorted, and pixels have 256 values, so a histogram of them *is* the data: everything below is exact, and
merges exactly.
"""

from __future__ import annotations

import numpy as np

from vla.normalize import QUANTILES, Stats

MAX_SORTED_ROWS = 2_000_000
"""Quantiles of a column with more rows use every k-th row (k the smallest that fits); min, max, mean and std use
all."""


def column_stats(values: np.ndarray) -> dict[str, list]:
    """Statistics of a numeric column (F,) or (F, D) as JSON lists of length D, with `count` as `[F]`.

    Raises `DataError` on a non-finite value.
    """
    table = np.asarray(values, np.float64).reshape(len(values), -1)
    entry = Stats.of(table[:: -(-len(table) // MAX_SORTED_ROWS)]).to_json()
    if len(table) > MAX_SORTED_ROWS:
        whole = {"min": table.min(0), "max": table.max(0), "mean": table.mean(0), "std": table.std(0)}
        entry |= {k: v.tolist() for k, v in whole.items()}
    return _ordered(entry, len(table))


def constant_stats(value: float, count: int) -> dict[str, list]:
    """What `column_stats(np.full(count, value))` returns, without the work."""
    entry = {key: [float(value)] for key in ("min", "max", "mean", *QUANTILES)}
    return _ordered(entry | {"std": [0.0]}, count)


def ramp_stats(first: int, base: dict[str, list]) -> dict[str, list]:
    """Statistics of `first + arange(n)` from those of `arange(n)`."""
    return {key: value if key in ("std", "count") else [value[0] + first] for key, value in base.items()}


def _ordered(entry: dict, count: int) -> dict[str, list]:
    moments = {key: entry[key] for key in ("min", "max", "mean", "std")}
    return moments | {"count": [count]} | {q: entry[q] for q in QUANTILES}


class PixelStats:
    """Statistics of RGB frames in 0..1, shape (3, 1, 1), from a (3, 256) histogram. Quantiles are the smallest pixel
    value whose cumulative share reaches q (numpy's `inverted_cdf`)."""

    def __init__(self, histogram: np.ndarray | None = None, frames: int = 0) -> None:
        self.histogram = np.zeros((3, 256), np.int64) if histogram is None else np.asarray(histogram, np.int64)
        self.frames = frames

    @classmethod
    def of(cls, images: np.ndarray) -> PixelStats:
        """Of (T, h, w, 3) uint8."""
        flat = images.reshape(-1, 3)
        return cls(np.stack([np.bincount(flat[:, c], minlength=256) for c in range(3)]), len(images))

    def __add__(self, other: PixelStats) -> PixelStats:
        return PixelStats(self.histogram + other.histogram, self.frames + other.frames)

    def to_json(self) -> dict[str, list]:
        values, weights = np.arange(256) / 255.0, self.histogram / self.histogram.sum(1, keepdims=True)
        mean = weights @ values
        std = np.sqrt(np.maximum(weights @ values**2 - mean**2, 0.0))
        present = self.histogram > 0
        cumulative = np.cumsum(self.histogram, 1)
        entry = {
            "min": values[present.argmax(1)], "max": values[255 - present[:, ::-1].argmax(1)], "mean": mean, "std": std,
        }  # fmt: skip
        for name, q in QUANTILES.items():
            # Integers are compared, so a share of exactly q is not lost to rounding.
            entry[name] = values[(cumulative >= np.ceil(q * cumulative[:, -1:] - 1e-9)).argmax(1)]
        shaped = {key: value.reshape(3, 1, 1).tolist() for key, value in entry.items()}
        return _ordered(shaped, self.frames)
