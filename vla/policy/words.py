"""Answers in words: said one word after the other, or scored where it is known what may be said.

A planner needs both. What is said freely is judged by how likely it was; where only some answers will do (the instructions a
robot knows, yes or no), each is teacher-forced and its log-likelihood compared with the others' (SayCan, Ahn et al. 2022). An
answer may be said in parts, so that somebody who shares the model waits no longer for it than one part takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from vla.answers import Question
from vla.errors import DataError

if TYPE_CHECKING:
    from vla.policy.model import VLAPolicy


@dataclass(frozen=True)
class Said:
    """An answer, or the beginning of one."""

    ids: tuple[int, ...]
    """Of its words, without the one that ends it."""
    likely: float
    """Log-likelihood of what was added to it, its end included."""
    ended: bool
    text: str


@torch.inference_mode()
def say(policy: VLAPolicy, image: np.ndarray | None, question: str, said: Sequence[int] = (), most: int = 64) -> Said:
    """The likeliest next word until the answer ends, at most `most` words beyond those of `said`."""
    example, ids, likely = policy.encoder.question(Question(image, question, "")), list(said), 0.0
    for _ in range(most):
        words = np.concatenate([example.ids, np.array(ids, np.int64)])
        causal = np.concatenate([example.causal, np.ones(len(ids), bool)])
        grown = replace(example, ids=words, causal=causal, labels=np.full(len(words), -100, np.int64))
        hidden = policy._hidden(policy.collate([grown]).to(policy.device))
        chances = policy.model.word_logits(hidden[:, len(words) - 1])[0].float().log_softmax(-1)
        word = int(chances.argmax())
        likely += float(chances[word])
        if word == policy.writer.ids.eos:
            return Said(tuple(ids), likely, True, policy.writer.text(ids))
        ids.append(word)
    return Said(tuple(ids), likely, False, policy.writer.text(ids))


@torch.inference_mode()
def score(policy: VLAPolicy, image: np.ndarray | None, question: str, candidates: Sequence[str], batch: int = 32) -> np.ndarray:
    """(n,) float64: the log-likelihood of each of `candidates` as the whole answer, `batch` of them at a time.

    Raises `DataError` for a candidate that is empty.
    """
    examples = [policy.encoder.question(Question(image, question, candidate)) for candidate in candidates]
    if empty := [i for i, example in enumerate(examples) if (example.labels == -100).all()]:
        raise DataError("candidates", found=f"nothing as number {empty[0]}", expected="answers in words", fix="leave it out")
    found = []
    for at in range(0, len(examples), batch):
        together = policy.collate(examples[at : at + batch]).to(policy.device)
        labels = together.labels
        hidden = policy._hidden(together)[:, : labels.shape[1]]
        row, column = (labels != -100).nonzero(as_tuple=True)
        chances = policy.model.word_logits(hidden[row, column]).float().log_softmax(-1)
        each = chances.gather(-1, labels[row, column][:, None])[:, 0].double()
        found.append(torch.zeros(len(labels), dtype=torch.double, device=each.device).index_add_(0, row, each).cpu().numpy())
    return np.concatenate(found) if found else np.zeros(0)
