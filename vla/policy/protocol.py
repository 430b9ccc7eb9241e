"""What a teacher, a student, evaluation and a server share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from vla.embodiment import EmbodimentSpec
from vla.policy.config import Decode
from vla.schema import Observation


@dataclass(frozen=True)
class Chunk:
    """What a policy wants to do next."""

    actions: np.ndarray  # (H, A) float32, robot units, at the robot's own control rate
    confidence: np.ndarray  # (H, A) float32 in [0, 1]: 1 - entropy / log K; mean over the symbols a number is made of
    symbols: np.ndarray  # (H, A) int64; repeated where a policy step spans several of the robot's; (n,) of a sequence codec


@dataclass(frozen=True)
class Loss:
    """Sums and counts, so that ranks can divide by the *global* number of valid elements."""

    action: Tensor  # sum of cross-entropies over valid symbols
    action_count: Tensor
    end: Tensor  # sum of smooth-L1 over valid final-state dimensions
    end_count: Tensor
    correct: Tensor  # symbols whose argmax is right
    answer: Tensor  # sum of cross-entropies over the words of answers
    answer_count: Tensor

    @property
    def counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """What there is of each in this batch; several ranks divide by their sum."""
        return self.action_count, self.end_count, self.answer_count

    def total(self, weights: LossWeights, counts: Iterable[Tensor]) -> Tensor:
        """The scalar to minimise, given how many (actions, end dimensions, answer words) to divide by."""
        action, end, answer = (count.clamp(min=1) for count in counts)
        return self.action / action + weights.end * self.end / end + weights.answer * self.answer / answer


class LossWeights(NamedTuple):
    """How much the losses beside the actions' count."""

    end: float
    answer: float


class Policy(Protocol):
    """What a teacher, a student and a server's backend have in common."""

    embodiments: dict[str, EmbodimentSpec]

    def steps(self, embodiment: str) -> tuple[int, int]: ...
    def act_batch(
        self, observations: Sequence[Observation], instructions: Sequence[str], embodiment: str,
        decode: Decode | None = None, seeds: Sequence[int] | None = None, drop_state: bool = False,
    ) -> list[Chunk]: ...  # fmt: skip
