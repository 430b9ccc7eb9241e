"""Temporal ensembling: overlapping chunks of one episode become one action a step (ACT, Zhao et al. 2023, section 4.2).

A policy that looks again before its chunk is played out has said several things about the same moment. What is done is their
weighted mean, the i-th oldest weighing exp(-decay * i): with a small positive decay nearly all count the same, the oldest a
little more, and motion stays smooth where a fresh chunk would jump. Numpy only: a robot's own computer uses this too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla.errors import DataError, UsageError
from vla.rotation import from_quat, to_quat

DECAY = 0.01
"""ACT's own."""


class Ensemble:
    """The chunks of one episode that still reach into the future.

        ensemble = Ensemble()
        for step in range(0, most, execute):
            actions = ensemble(step, chunk_of(observation), execute)  # (execute, A) to carry out now

    An object per episode, or `reset()` between two.
    """

    def __init__(self, decay: float = DECAY, rotations: Sequence[tuple[Sequence[int], str]] = ()) -> None:
        """`decay`: 0 weighs all alike, above it the oldest most, below it the newest. `rotations`: dimensions that are one
        rotation together, and its form as `vla.rotation` names it; the mean of angles either side of pi is no rotation between
        them. `vla.resample.rotations_of` finds them for a robot. Raises `UsageError` when `decay` is no number."""
        if not np.isfinite(decay):
            raise UsageError("ensemble", found=decay, expected="a finite decay", fix=f"leave it out for ACT's {DECAY}")
        self.decay, self.rotations = float(decay), tuple((list(dims), form) for dims, form in rotations)
        self._chunks: list[tuple[int, np.ndarray]] = []

    def reset(self) -> None:
        """Forget everything: another episode begins."""
        self._chunks = []

    def __call__(self, step: int, chunk: np.ndarray, steps: int) -> np.ndarray:
        """(steps, A) float32: what to do at `step` and the ones after it, now that `chunk` (n, A) has been said at `step`.

        Robot units, at the robot's own rate. Raises `UsageError` when the chunk is too short, or said before an earlier one.
        """
        chunk = np.asarray(chunk)
        if not 1 <= steps <= len(chunk):
            raise UsageError("ensemble", found=f"{steps} steps of a chunk of {len(chunk)}", expected=f"1 to {len(chunk)}",
                             fix="carry out no more steps than a chunk has")  # fmt: skip
        if self._chunks and step <= self._chunks[-1][0]:
            raise UsageError("ensemble", found=f"step {step} after step {self._chunks[-1][0]}", expected="a later step",
                             fix="reset() at the start of an episode")  # fmt: skip
        self._chunks = [(start, said) for start, said in self._chunks if start + len(said) > step] + [(step, chunk)]
        return np.stack([self._at(at) for at in range(step, step + steps)])

    def _at(self, step: int) -> np.ndarray:
        said = np.stack([chunk[step - start] for start, chunk in self._chunks if step - start < len(chunk)]).astype(np.float64)
        weights = np.exp(-self.decay * np.arange(len(said)))
        weights /= weights.sum()
        mean = weights @ said
        if len(said) > 1:
            for dims, form in self.rotations:
                mean[dims] = _mean_rotation(said[:, dims], weights, form, mean[dims])
        return mean.astype(np.float32)


def _mean_rotation(said: np.ndarray, weights: np.ndarray, form: str, otherwise: np.ndarray) -> np.ndarray:
    """The rotation nearest to all (Markley et al. 2007), written as the newest is; `otherwise` where one of them is none."""
    try:
        quats = to_quat(said, form)
    except DataError:  # an untrained policy may say anything
        return otherwise
    mean = np.linalg.eigh(np.einsum("n,ni,nj->ij", weights, quats, quats))[1][:, -1]  # a quaternion and its negative are one
    out, newest = from_quat(mean, form), said[-1]
    if form.startswith("euler"):
        return out + 2 * np.pi * np.round((newest - out) / (2 * np.pi))
    if form.startswith("quat"):
        return out if out @ newest >= 0 else -out
    if form == "axis_angle":
        other = out * (1 - 2 * np.pi / max(float(np.linalg.norm(out)), 1e-9))
        return min(out, other, key=lambda v: float(np.linalg.norm(v - newest)))
    return out
