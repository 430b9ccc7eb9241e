"""What a teacher, a student, evaluation and a server share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from vla.embodiment import EmbodimentSpec
from vla.policy.config import Decode
from vla.schema import Observation


@dataclass(frozen=True)
class Chunk:
    """What a policy wants to do next."""

    actions: np.ndarray  # (H, A) float32, robot units
    confidence: np.ndarray  # (H, A) float32 in [0, 1]: 1 - entropy / log K
    symbols: np.ndarray  # (H, A) int64


@dataclass(frozen=True)
class Loss:
    """Sums and counts, so that ranks can divide by the *global* number of valid elements."""

    action: Tensor  # sum of cross-entropies over valid symbols
    action_count: Tensor
    end: Tensor  # sum of smooth-L1 over valid final-state dimensions
    end_count: Tensor
    correct: Tensor  # symbols whose argmax is right

    def total(self, end_weight: float, action_count: Tensor, end_count: Tensor) -> Tensor:
        """The scalar to minimise, given the counts to divide by."""
        return self.action / action_count.clamp(min=1) + end_weight * self.end / end_count.clamp(min=1)


class Policy(Protocol):
    """What a teacher, a student and a server's backend have in common."""

    embodiments: dict[str, EmbodimentSpec]
    chunk: int
    execute: int

    def act_batch(
        self, observations: Sequence[Observation], instructions: Sequence[str], embodiment: str,
        decode: Decode | None = None, seeds: Sequence[int] | None = None, drop_state: bool = False,
    ) -> list[Chunk]: ...  # fmt: skip
