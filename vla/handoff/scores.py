"""What a look says of how things go: one number per detector and look, all of them the higher the worse. No torch.

    scorer = Scorer(scale)                     # one per episode, or reset() between two
    scores = scorer(step, chunk, features, samples)

A detector's value at a look is its `Running` maximum or mean so far; an episode is judged by the largest of those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from vla.handoff.detectors import Fitted

DETECTORS: dict[str, str] = {
    "entropy": "mean entropy of the chunk's symbols (1 - confidence)",
    "entropy_max": "entropy of the least certain symbol",
    "overlap": "how far this chunk departs from what the one before said of the same steps, in units of the action range",
    "spread": "standard deviation over draws of the chunk, in units of the action range",
    "stac": "energy distance between draws of this chunk and draws of the one before, over the steps both speak of (after STAC)",
    "fused": "a small network on the five scores above, trained on episodes labelled by success",
    "distance": "Mahalanobis distance of the hidden states to those of successful episodes",
    "learned": "a small network on the hidden states, trained on episodes labelled by success (after SAFE)",
}
"""Name -> what it is."""
NEEDS = {"spread": "samples", "stac": "samples", "fused": "samples", "distance": "features", "learned": "features"}
"""What a detector needs beside the chunk: draws, or hidden states."""
Kind = Literal["max", "mean"]


class Running:
    """The largest, or the mean, of what a detector has said in an episode so far."""

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self.value, self._sum, self._count = -np.inf, 0.0, 0

    def __call__(self, score: float) -> float:
        """With one more look."""
        self._sum, self._count = self._sum + score, self._count + 1
        self.value = self._sum / self._count if self.kind == "mean" else max(self.value, score)
        return self.value


def running(scores: Iterable[float], kind: Kind) -> np.ndarray:
    """(L,): the running value after each look."""
    so_far = Running(kind)
    return np.array([so_far(float(score)) for score in scores])


class Scorer:
    """Scores the looks of one episode."""

    def __init__(self, scale: np.ndarray, fitted: Fitted | None = None) -> None:
        """`scale` (A,): half the range of each action dimension, robot units; 0 where it never moves."""
        self.scale = np.asarray(scale, np.float64)
        self._moves = self.scale > 0
        self.fitted = fitted or Fitted()
        self.reset()

    def reset(self) -> None:
        """Another episode begins, or somebody else has moved the robot."""
        self._before: tuple[int, np.ndarray, np.ndarray | None] | None = None

    def __call__(
        self, step: int, chunk: Any, features: np.ndarray | None = None, samples: np.ndarray | None = None
    ) -> dict[str, float]:
        """Detector -> score, of those that can be had. `step`: the control step the chunk begins at; `chunk` has `actions` (n, A)
        and `confidence` (n, A), NaN where it knows none; `samples` (K, n, A)."""
        actions, sure = np.asarray(chunk.actions, np.float64), np.asarray(chunk.confidence, np.float64)
        samples = None if samples is None or len(samples) < 2 else np.asarray(samples, np.float64)
        scores: dict[str, float] = {}
        if np.isfinite(sure).any():
            scores |= {"entropy": 1 - float(np.nanmean(sure)), "entropy_max": 1 - float(np.nanmin(sure))}
        scores["overlap"] = 0.0  # nothing was said before, so nothing is contradicted
        if samples is not None:
            scores |= {"spread": self._mean(samples.std(0)), "stac": 0.0}
        if self._before is not None:
            at, earlier, drawn = self._before
            ahead = step - at
            if (shared := min(len(earlier) - ahead, len(actions))) > 0 and ahead >= 0:
                scores["overlap"] = self._mean(np.abs(earlier[ahead : ahead + shared] - actions[:shared]))
                if samples is not None and drawn is not None:
                    scores["stac"] = self._energy(drawn[:, ahead : ahead + shared], samples[:, :shared])
        self._before = step, actions, samples
        row = None if features is None else np.asarray(features)[None]
        told = self.fitted.said(row, {name: np.array([score]) for name, score in scores.items()})
        return scores | {name: float(value[0]) for name, value in told.items()}

    def _mean(self, difference: np.ndarray) -> float:
        """Over steps and the dimensions that move, in units of the range."""
        return float((difference[..., self._moves] / self.scale[self._moves]).mean()) if self._moves.any() else 0.0

    def _energy(self, one: np.ndarray, other: np.ndarray) -> float:
        """Energy distance (Szekely and Rizzo 2013) of two sets of draws (K, s, A); at least 0."""
        flat = [(part[..., self._moves] / self.scale[self._moves]).reshape(len(part), -1) for part in (one, other)]
        if not flat[0].shape[1]:
            return 0.0

        def apart(a: np.ndarray, b: np.ndarray) -> float:
            return float(np.linalg.norm(a[:, None] - b[None], axis=-1).mean()) / np.sqrt(a.shape[1])

        return max(0.0, 2 * apart(*flat) - apart(flat[0], flat[0]) - apart(flat[1], flat[1]))


def scale_of(normalizer: Any) -> np.ndarray:
    """(A,) half ranges by the statistics a policy was trained with (`vla.normalize.Normalizer` of its actions)."""
    dims = normalizer.dims
    return (normalizer.from_unit(np.ones(dims)) - normalizer.from_unit(-np.ones(dims))) / 2


def usable(detectors: Iterable[str], features: bool, samples: bool) -> list[str]:
    """Those that can be computed from what there is."""
    have: Mapping[str, bool] = {"features": features, "samples": samples}
    return [name for name in detectors if have.get(NEEDS.get(name, ""), True)]
