"""Detectors that look at hidden states, as a robot runs them: a distance to what went well, and a small network. Numpy only.

Fitted by `vla/handoff/learning.py`, kept as safetensors beside the policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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

    def arrays(self) -> dict[str, np.ndarray]:
        return {f"gauss.{name}": getattr(self, name) for name in ("mean", "axes", "std", "rest")}


@dataclass(frozen=True)
class Head:
    """M small networks (d -> h -> 1, ReLU) on standardised hidden states; what they say is the mean of their logits."""

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

    def arrays(self) -> dict[str, np.ndarray]:
        names = ("mean", "std", "inner", "inner_bias", "outer", "outer_bias")
        return {f"head.{name}": getattr(self, name) for name in names}


def to_arrays(gauss: Gauss | None, head: Head | None) -> dict[str, np.ndarray]:
    """Both as float32 arrays by name, to be stored."""
    both = {**(gauss.arrays() if gauss else {}), **(head.arrays() if head else {})}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in both.items()}


def from_arrays(arrays: dict[str, np.ndarray]) -> tuple[Gauss | None, Head | None]:
    """What `to_arrays` was given. Raises `KeyError` or `ValueError` where they do not fit together."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        kind, _, field = name.partition(".")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite")
        parts.setdefault(kind, {})[field] = array
    try:
        gauss = Gauss(**parts["gauss"]) if "gauss" in parts else None
        head = Head(**parts["head"]) if "head" in parts else None
    except TypeError as error:
        raise ValueError(str(error)) from error
    if gauss is not None:
        gauss(gauss.mean[None])
    if head is not None:
        head(head.mean[None])
    return gauss, head
