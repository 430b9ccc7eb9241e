"""Statistics of a channel, and the one object that maps robot units to [-1, 1] and back.

One `Normalizer` serves both directions, is saved with the policy, and is compared by fingerprint: two normalisers that
differ are the most expensive silent bug of the field (trains fine, NaN or wild moves on the robot).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vla.errors import DataError

Scheme = Literal["q99", "bounds", "meanstd"]
"""`q99`: q01..q99 -> [-1, 1] (OpenVLA, clipped); `bounds`: min..max (OFT for absolute joints); `meanstd`: +-3 std -> [-1, 1]."""

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_NEEDS = {"q99": ("q01", "q99"), "bounds": ("min", "max"), "meanstd": ("mean", "std")}
_STDS = 3.0
_RELATIVE_FLOOR = 1e-6
"""A range below this share of the dimension's magnitude is a constant: dividing by it would only amplify rounding."""


@dataclass(frozen=True)
class Stats:
    """Per-dimension statistics, each (D,) float64, in robot units."""

    values: Mapping[str, np.ndarray]
    count: int

    @classmethod
    def of(cls, column: np.ndarray) -> Stats:
        """Exact statistics of `column` (F, D). Raises `DataError` on a non-finite value."""
        column = np.asarray(column, np.float64)
        if not np.isfinite(column).all():
            at = np.argwhere(~np.isfinite(column))[0].tolist()
            raise DataError(f"statistics, row {at[0]}, dimension {at[1]}", found=column[tuple(at)],
                            expected="finite numbers", fix="repair or drop the episode")  # fmt: skip
        quantiles = np.quantile(column, list(QUANTILES.values()), axis=0)
        values = dict(zip(QUANTILES, quantiles, strict=True))
        values |= {"min": column.min(0), "max": column.max(0), "mean": column.mean(0), "std": column.std(0)}
        return cls(values, len(column))

    @classmethod
    def from_json(cls, entry: Mapping, where: str) -> Stats:
        """From one feature's entry of `meta/stats.json`. Raises `DataError` if it holds no numbers of equal length."""
        values = {k: np.asarray(v, np.float64).reshape(-1) for k, v in entry.items() if k != "count"}
        if not values or len({len(v) for v in values.values()}) != 1:
            raise DataError(where, found={k: v.shape for k, v in values.items()}, expected="statistics of equal length",
                            fix="recompute them with `vla data stats DIR --write`")  # fmt: skip
        return cls(values, int(np.asarray(entry.get("count", 0)).reshape(-1)[0]))

    def to_json(self) -> dict:
        return {**{k: v.tolist() for k, v in self.values.items()}, "count": self.count}


class Normalizer:
    """Robot units <-> [-1, 1] for D dimensions.

    `from_unit(to_unit(x)) == x` (to float32 rounding) for x inside the statistics' range; outside it `to_unit` clips.
    `mask[d]` False means dimension d passes through unchanged, clipped to [-1, 1] (OpenVLA's gripper). A constant
    dimension becomes 0 in unit space and its constant on the way back.
    """

    def __init__(self, stats: Stats, scheme: Scheme, mask: np.ndarray | list[bool] | None = None, where: str = "statistics"):
        missing = [key for key in _NEEDS[scheme] if key not in stats.values]
        if missing:
            raise DataError(where, found=f"no {missing} among {sorted(stats.values)}", expected=f"what {scheme!r} needs",
                            fix="recompute them with `vla data stats DIR --write`")  # fmt: skip
        first, second = (stats.values[key] for key in _NEEDS[scheme])
        low, high = (first - _STDS * second, first + _STDS * second) if scheme == "meanstd" else (first, second)
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
            raise DataError(where, found=f"low {low.tolist()}, high {high.tolist()}", expected="finite low <= high",
                            fix="recompute the statistics; one of them is broken")  # fmt: skip
        self.stats = stats
        self.scheme: Scheme = scheme
        self.low, self.high = low.astype(np.float32), high.astype(np.float32)
        self.mask = np.ones(len(low), bool) if mask is None else np.asarray(mask, bool)
        if self.mask.shape != self.low.shape:
            raise DataError(where, found=f"mask of {self.mask.size}", expected=f"{self.low.size} entries",
                            fix="give one mask entry per dimension")  # fmt: skip
        # Ranges are formed in float64 and compared with the magnitude, so that denormals and 0.3 vs 0.3+eps are constants.
        magnitude = np.maximum(np.abs(low), np.abs(high))
        spread = self.high.astype(np.float64) - self.low.astype(np.float64)
        self.constant = self.mask & (spread <= np.maximum(_RELATIVE_FLOOR * magnitude, 1e-12))
        self._half = np.where(self.constant | ~self.mask, 1.0, spread / 2)
        self._mid = np.where(self.mask, (self.low.astype(np.float64) + self.high.astype(np.float64)) / 2, 0.0)

    @property
    def dims(self) -> int:
        """D."""
        return len(self.low)

    def to_unit(self, x: np.ndarray) -> np.ndarray:
        """(..., D) robot units -> (..., D) float32 in [-1, 1]. Raises `DataError` on a wrong width or a non-finite value."""
        x = np.asarray(x)
        self._check(x)
        unit = np.clip((x - self._mid) / self._half, -1.0, 1.0)
        return np.where(self.constant, 0.0, unit).astype(np.float32)

    def from_unit(self, unit: np.ndarray) -> np.ndarray:
        """(..., D) in [-1, 1] -> (..., D) float32 robot units."""
        unit = np.asarray(unit)
        self._check(unit)
        return np.where(self.constant, self._mid, unit * self._half + self._mid).astype(np.float32)

    def clipped_fraction(self, x: np.ndarray) -> np.ndarray:
        """(D,) share of rows of x (F, D) that `to_unit` would clip."""
        outside = (x < self.low) | (x > self.high)
        return np.where(self.mask, outside.mean(0), (np.abs(x) > 1).mean(0))

    def completed(self, other: Normalizer) -> Normalizer:
        """This one, with `other`'s statistics for the dimensions that are constant here and vary there; itself if there are none.

        What was learned through this one stays as it is: a constant dimension was 0 to the model, and nothing it could say. But
        what it says there means another number now: the middle of the new range, until it has learned better.
        """
        late = self.constant & ~other.constant
        if not late.any() or self.scheme != other.scheme:
            return self
        both = self.stats.values.keys() & other.stats.values.keys()
        values = {key: np.where(late, other.stats.values[key], self.stats.values[key]) for key in sorted(both)}
        return Normalizer(Stats(values, self.stats.count), self.scheme, self.mask)

    def _check(self, x: np.ndarray) -> None:
        if x.shape[-1:] != self.low.shape:
            raise DataError("normaliser", found=f"shape {x.shape}", expected=f"(..., {self.dims})",
                            fix="use the statistics of this embodiment")  # fmt: skip
        if not np.isfinite(x).all():
            at = np.argwhere(~np.isfinite(x))[0].tolist()
            raise DataError(f"normaliser, index {at}", found=x[tuple(at)], expected="a finite number",
                            fix="repair the data; NaN is never normalised")  # fmt: skip

    def to_json(self) -> dict:
        return {"scheme": self.scheme, "mask": self.mask.tolist(), "stats": self.stats.to_json()}

    @classmethod
    def from_json(cls, entry: Mapping, where: str) -> Normalizer:
        for key in ("scheme", "mask", "stats"):
            if key not in entry:
                raise DataError(where, found=f"keys {sorted(entry)}", expected=f"{key!r} as well",
                                fix="save the policy again; a normaliser is never guessed")  # fmt: skip
        return cls(Stats.from_json(entry["stats"], where), entry["scheme"], entry["mask"], where)

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that changes what a number means."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
