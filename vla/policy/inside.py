"""A chunk together with what a detector of failures wants to know of it: the hidden states behind it, and other draws.

    for look in act_inside(policy, observations, instructions, "tabletop", samples=8):
        look.chunk, look.features, look.samples

The chunk is the one `act_batch` gives. In parallel decoding all of it comes of one pass; symbol by symbol the hidden states cost
one more pass (everything said is read once again, at once) and every draw another decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from vla.actions import is_sequence
from vla.batch import Batch
from vla.policy.choose import Chosen
from vla.policy.config import Decode
from vla.policy.model import VLAPolicy
from vla.policy.protocol import Chunk
from vla.randomness import mix
from vla.schema import Observation


class Inside(NamedTuple):
    """One look of a policy."""

    chunk: Chunk
    features: np.ndarray
    """(d,) float32: the mean of the hidden states from which the robot's own symbols were read."""
    samples: np.ndarray
    """(K, n, A) float32, robot units: K draws of the same chunk (`decode="sample"`)."""


@torch.inference_mode()
def act_inside(
    policy: VLAPolicy, observations: Sequence[Observation], instructions: Sequence[str], embodiment: str,
    decode: Decode | None = None, seeds: Sequence[int] | None = None, samples: int = 0,
) -> list[Inside]:  # fmt: skip
    """As `act_batch`, with features and `samples` draws; a draw is a function of the observation's seed and its own number.

    An L1 head draws nothing: its samples are its chunk."""
    batch = policy.batch_of(observations, instructions, embodiment)
    seeds = range(len(batch)) if seeds is None else seeds
    acts = policy.acts(batch) if policy.config.decoding == "parallel" else None
    chosen = policy.decide(batch, decode, seeds, acts)
    features = _pooled(policy, batch, chosen, acts)
    draws = [policy.chunks(policy.decide(batch, "sample", [mix(seed, k) for seed in seeds], acts), embodiment)
             for k in range(samples)]  # fmt: skip
    chunks = policy.chunks(chosen, embodiment)
    return [
        Inside(
            chunk,
            features[i],
            np.stack([draw[i].actions for draw in draws]) if draws else np.zeros((0, *chunk.actions.shape), np.float32),
        )
        for i, chunk in enumerate(chunks)
    ]


def _pooled(policy: VLAPolicy, batch: Batch, chosen: Chosen, acts: torch.Tensor | None) -> np.ndarray:
    """(B, d): the mean over the action positions that are the robot's own, or were said."""
    sequence, width = is_sequence(policy.codec), batch.unit.shape[-1]
    B, N = batch.symbols.shape
    own = np.arange(N)[None] % width < batch.dims.cpu().numpy()[:, None]  # (B, N)
    if sequence:
        own = np.arange(N)[None] < np.array([[len(row)] for row in chosen[2]])
    if acts is None:
        said = (
            np.zeros((B, N), np.int64) if sequence else np.full((B, N), int(policy.codec.encode(np.zeros((1, 1)))[0]), np.int64)
        )
        for row, symbols in enumerate(chosen[2]):
            flat = np.asarray(symbols).reshape(-1)
            said[row, : len(flat)] = np.where(own[row, : len(flat)], flat, said[row, : len(flat)])
        acts = policy.acts(replace(batch, symbols=torch.from_numpy(said).to(batch.symbols.device)))
    weight = torch.from_numpy(own).to(acts.device, torch.float32)[..., None]
    return ((acts.float() * weight).sum(1) / weight.sum(1)).cpu().numpy()
