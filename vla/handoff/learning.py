"""Fits detectors to rollouts, and finds out by cross-validation which to trust, and how to sum it up over an episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vla.errors import DataError
from vla.handoff.detectors import FUSED, Fitted, Gauss, Head
from vla.handoff.measures import detection, values_of
from vla.handoff.rollouts import Rollouts
from vla.handoff.scores import DETECTORS, Kind

MEMBERS, HIDDEN, EPOCHS, BATCH, FOLDS = 4, 32, 150, 256, 5
RATE, DECAY, DROPOUT = 1e-2, 0.1, 0.3
KINDS: tuple[Kind, ...] = ("max", "mean")


def fit(rollouts: Rollouts, seed: int = 0) -> Fitted:
    """A distance to the hidden states of successes, and networks told which episodes succeeded, on hidden states and on scores;
    without what there is nothing to fit to: no hidden states, no draws, episodes that all end alike."""
    good, mixed = rollouts.success[rollouts.of_episode], 0 < rollouts.success.sum() < len(rollouts)
    features = rollouts.features
    scores = [rollouts.scores[name] for name in FUSED if name in rollouts.scores]
    return Fitted(
        gauss=None if features is None or good.sum() < 2 else Gauss.fit(features[good]),
        head=fit_head(rollouts, features, seed) if mixed and features is not None else None,
        fused=fit_head(rollouts, np.stack(scores, -1), seed) if mixed and len(scores) == len(FUSED) else None,
    )


def fit_head(
    rollouts: Rollouts, inputs: np.ndarray, seed: int = 0, members: int = MEMBERS, hidden: int = HIDDEN, epochs: int | None = None
) -> Head:  # fmt: skip
    """On `inputs` (L, d), as SAFE's (Gu et al. 2025): every look is labelled with how its episode ends. Episodes count alike,
    whatever their length, and so do failures and successes. Dropout and weight decay, since a few hundred episodes are few."""
    x = torch.tensor(inputs, dtype=torch.float32)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-4)
    x = ((x - mean) / std).clamp(-10, 10)
    failed, of = ~rollouts.success, rollouts.of_episode
    weight = np.where(failed, 0.5 / max(1, failed.sum()), 0.5 / max(1, (~failed).sum()))[of] / rollouts.looks[of]
    y, w = torch.from_numpy(failed[of].astype(np.float32)), torch.from_numpy((weight * len(weight)).astype(np.float32))
    generator = torch.Generator().manual_seed(seed)
    d = x.shape[1]
    inner = (torch.randn(members, d, hidden, generator=generator) * d**-0.5).requires_grad_()
    outer = (torch.randn(members, hidden, generator=generator) * hidden**-0.5).requires_grad_()
    inner_bias, outer_bias = torch.zeros(members, hidden, requires_grad=True), torch.zeros(members, requires_grad=True)
    epochs = epochs or EPOCHS
    optimizer = torch.optim.AdamW([inner, inner_bias, outer, outer_bias], lr=RATE, weight_decay=DECAY)
    batches = max(1, len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).tensor_split(batches):
            seen = torch.baddbmm(inner_bias[:, None], x[rows].expand(members, -1, -1), inner).relu()
            kept = (torch.rand(members, len(rows), hidden, generator=generator) > DROPOUT) / (1 - DROPOUT)
            logits = ((seen * kept) @ outer[..., None])[..., 0] + outer_bias[:, None]
            loss = (
                (F.binary_cross_entropy_with_logits(logits, y[rows].expand(members, -1), reduction="none") * w[rows])
                .mean(1)
                .sum()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    arrays = (mean, std, inner, inner_bias, outer, outer_bias)
    return Head(*(np.ascontiguousarray(a.detach().numpy(), np.float32) for a in arrays))


def cross_validated(rollouts: Rollouts, folds: int = FOLDS, seed: int = 0) -> Rollouts:
    """The rollouts, every look scored by detectors that have not seen its episode."""
    fold = np.random.default_rng(seed).permutation(len(rollouts)) % folds
    said: dict[str, np.ndarray] = {}
    for k in range(folds):
        held = rollouts.where(fold == k)
        for name, score in fit(rollouts.where(fold != k), seed + k).said(held.features, held.scores).items():
            said.setdefault(name, np.full(len(rollouts.step), np.nan))[(fold == k)[rollouts.of_episode]] = score
    whole = {name: score for name, score in said.items() if np.isfinite(score).all()}
    return replace(rollouts, scores={**rollouts.scores, **whole})


def choose(rollouts: Rollouts, among: Sequence[str] = tuple(DETECTORS)) -> tuple[dict[str, Kind], dict[str, dict[str, Any]]]:
    """Detector -> how it is summed up, best first by the `matched` figure; and all the figures.

    By `matched`, since a detector that only notices how late it is asks when there is little left to help with."""
    figures: dict[str, dict[str, Any]] = {}
    for name in among:
        if name in rollouts.scores:
            for kind in KINDS:
                whole, matched = detection(rollouts, values_of(rollouts, name, kind))
                figures.setdefault(name, {})[kind] = {"auroc": whole.value, "matched": matched.value}
    if not figures:
        raise DataError(
            "the rollouts", found="no scores", expected=f"some of {', '.join(among)}", fix="vla handoff collect again"
        )
    best: dict[str, Kind] = {name: max(KINDS, key=lambda kind: found[kind]["matched"]) for name, found in figures.items()}
    order = sorted(best, key=lambda name: -figures[name][best[name]]["matched"])
    return {name: best[name] for name in order}, figures
