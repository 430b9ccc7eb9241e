"""Detectors that are fitted, as a robot runs them: a distance to what went well, and small networks. Numpy only.

Fitted by `vla/handoff/learning.py`, kept as safetensors beside the policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

FUSED = ("entropy", "entropy_max", "overlap", "spread", "stac")
"""The scores that are weighed together."""
KEPT = 64
"""Most directions of the hidden states whose spread is kept one by one."""


@dataclass(frozen=True)
class Gauss:
    """A normal distribution of hidden states: its widest directions one by one, the rest as one (probabilistic PCA)."""

    mean: np.ndarray  # (d,)
    axes: np.ndarray  # (r, d), orthonormal
    std: np.ndarray  # (r,)
    rest: np.ndarray  # (1,): standard deviation along every other direction

    @classmethod
    def fit(cls, features: np.ndarray, kept: int = KEPT) -> Gauss:
        """Of (n, d)."""
        wide = np.asarray(features, np.float64)
        n, d = wide.shape
        mean = wide.mean(0)
        _, singular, axes = np.linalg.svd(wide - mean, full_matrices=False)
        variance = singular**2 / max(1, n - 1)
        r = min(kept, max(1, n // 4), d, len(variance))
        rest = variance[r:].sum() / max(1, d - r)
        floor = max(rest, 1e-6 * variance[0], 1e-12)  # a direction that never varied there is no proof by itself
        arrays = (mean, axes[:r], np.sqrt(np.maximum(variance[:r], floor)), np.sqrt([floor]))
        return cls(*(np.asarray(a, np.float32) for a in arrays))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(n, d) -> (n,): the distance, in standard deviations per direction."""
        off = np.asarray(features, np.float64) - self.mean
        along = off @ self.axes.T.astype(np.float64)
        beyond = np.maximum((off**2).sum(-1) - (along**2).sum(-1), 0)
        d = off.shape[-1]
        return np.sqrt((((along / self.std) ** 2).sum(-1) + beyond / self.rest[0] ** 2) / d)


@dataclass(frozen=True)
class Head:
    """M small networks (d -> h -> 1, ReLU) on standardised inputs; what they say is the mean of their logits."""

    mean: np.ndarray  # (d,)
    std: np.ndarray  # (d,)
    inner: np.ndarray  # (M, d, h)
    inner_bias: np.ndarray  # (M, h)
    outer: np.ndarray  # (M, h)
    outer_bias: np.ndarray  # (M,)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(n, d) -> (n,): the logit of failure. Not its sigmoid: two sure alarms would be equally sure."""
        x = ((np.asarray(features, np.float32) - self.mean) / self.std).clip(
            -10, 10
        )  # a thing never seen is not a thousand times worse
        inner = np.maximum(np.einsum("nd,mdh->mnh", x, self.inner) + self.inner_bias[:, None], 0)
        return (np.einsum("mnh,mh->mn", inner, self.outer) + self.outer_bias[:, None]).mean(0).astype(np.float64)


@dataclass(frozen=True)
class Fitted:
    """All that is fitted to rollouts; each may be missing."""

    gauss: Gauss | None = None
    head: Head | None = None
    """On hidden states."""
    fused: Head | None = None
    """On the scores `FUSED`."""

    def said(self, features: np.ndarray | None, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Detector -> (n,), of n looks: `features` (n, d) and `scores` (n,) each."""
        found = {}
        if features is not None and self.gauss is not None:
            found["distance"] = self.gauss(features)
        if features is not None and self.head is not None:
            found["learned"] = self.head(features)
        if self.fused is not None and all(name in scores for name in FUSED):
            found["fused"] = self.fused(np.stack([scores[name] for name in FUSED], -1))
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as float32 arrays by name, to be stored."""
        parts = {"gauss": self.gauss, "head": self.head, "fused": self.fused}
        return {f"{part}.{name}": np.ascontiguousarray(array, np.float32) for part, kept in parts.items() if kept is not None
                for name, array in kept.__dict__.items()}  # fmt: skip

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Fitted:
        """What `arrays` gave. Raises `ValueError` where they do not fit together."""
        parts: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            part, _, field = name.partition(".")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} is not finite")
            parts.setdefault(part, {})[field] = array
        kinds = {"gauss": Gauss, "head": Head, "fused": Head}
        try:
            found = {part: kinds[part](**fields) for part, fields in parts.items()}
            for kept in found.values():
                kept(kept.mean[None])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return cls(**found)
