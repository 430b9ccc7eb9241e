"""What a student learns from a teacher: the losses of distillation, in place of the loss on demonstrations alone.

    soft          KL over action symbols (Hinton et al. 2015), over the teacher's k likeliest, at a temperature
    hard          the demonstration's own symbols, as without a teacher
    expectation   L1 between expected actions, in [-1, 1]: what is carried out is the expectation, not the symbol
    instruction   cosine distance between the student's sentence and the teacher's, by a learned projection
    pictures      the same between what they see

Everything is per symbol (B, N), so the number of valid symbols divides it as it does a policy's own loss. Where the teacher has
no say (`p` 0), a symbol is learned from the demonstration alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vla.batch import Batch
from vla.config import Config


class LessonConfig(Config):
    """Weights. Together about as much as the loss on demonstrations alone, for the loss that says where an episode ends stands
    beside them: from scratch it is what grounds a student, and under a lesson of three times the weight it did not
    (docs/results.md)."""

    soft: float = Field(default=0.5, ge=0)
    hard: float = Field(default=0.5, ge=0)
    expectation: float = Field(default=0.1, ge=0)
    instruction: float = Field(default=0.0, ge=0)
    pictures: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=1.0, gt=0)

    @property
    def features(self) -> bool:
        """Whether the teacher's hidden states are asked for."""
        return self.instruction > 0 or self.pictures > 0


class Lesson(nn.Module):
    """The losses; `widths` are the sizes of the teacher's two features, `hidden` the student's."""

    def __init__(self, config: LessonConfig, hidden: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.widths = config, widths
        self.maps = nn.ModuleList(nn.Linear(hidden, width) for width in widths) if config.features else None

    def forward(self, logits: Tensor, batch: Batch, hard: Tensor, centres: Tensor, output: Any) -> Tensor:
        """`logits` (B, N, K), `hard` (B, N) the loss on the demonstration, `output` the backbone's -> (B, N)."""
        config = self.config
        if not batch.mean.shape[1]:
            return hard  # held-out windows are measured without a teacher
        total, taught = config.hard * hard, torch.ones_like(hard, dtype=torch.bool)
        if batch.likely.shape[-1]:
            taught = batch.p.sum(-1) > 0
            if config.soft:
                total = total + config.soft * self._soft(logits, batch)
        if config.expectation:
            expected = (logits.softmax(-1) * centres).sum(-1)  # no matrix product: autocast would round it
            total = total + config.expectation * (expected - batch.mean).abs() / _SCALE
        if self.maps is not None and batch.features.shape[1]:
            total = total + self._features(batch, output)[:, None]
        return torch.where(taught, total, hard)

    def _soft(self, logits: Tensor, batch: Batch) -> Tensor:
        T = self.config.temperature
        p = batch.p.clamp(min=1e-6) ** (1 / T)
        p = p / p.sum(-1, keepdim=True)
        told = (logits / T).log_softmax(-1).gather(-1, batch.likely)
        return T * T * (p * (p.log() - told)).sum(-1)

    def _features(self, batch: Batch, output: Any) -> Tensor:
        assert self.maps is not None
        own, theirs = (output.sentence, output.seen), batch.features.split(list(self.widths), dim=-1)
        weights, distance = (self.config.instruction, self.config.pictures), 0.0
        for weight, project, mine, target in zip(weights, self.maps, own, theirs, strict=True):
            distance = distance + weight * (1 - F.cosine_similarity(project(mine).float(), target, dim=-1))
        return distance  # pyright: ignore[reportReturnType]


_SCALE = 0.1
"""An expected action this far off counts as much as one nat."""
