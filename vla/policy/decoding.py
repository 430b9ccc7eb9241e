"""One symbol after the other: the prefix once, then a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vla.batch import Batch
from vla.policy.choose import Chooser

if TYPE_CHECKING:
    from vla.policy.model import VLAPolicy


def decode_steps(policy: VLAPolicy, batch: Batch, choose: Chooser, dims: int) -> None:
    """Constrained greedy (or sampled) decoding into `choose`; nothing but action symbols can be said.

    `dims` is the robot's own number of action dimensions, at most A.
    """
    A, zero = policy.encoder.action_dim, int(policy.codec.encode(np.zeros((1, 1)))[0])
    B, N = batch.symbols.shape
    T = batch.ids.shape[1]
    model, ids = policy.model, policy.writer.ids
    mask, positions = policy.attention(batch, N)
    cache = model.new_cache()
    model.hidden(
        batch.ids, batch.images, batch.state, slots=batch.slots, robots=batch.robot, attention_mask=mask[:, :, :T, :T],
        position_ids=positions[..., :T], past_key_values=cache, use_cache=True,
    )  # fmt: skip
    last = torch.full((B, 1), ids.act, device=batch.ids.device)
    for i in range(N):
        hidden = model.hidden(
            last, attention_mask=mask[:, :, T + i : T + i + 1, : T + i + 1], position_ids=positions[..., T + i : T + i + 1],
            past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        symbols = choose(model.symbol_logits(hidden))
        if i % A >= dims:  # training fed a padded dimension's zero here, so acting does too
            symbols = torch.full_like(symbols, zero)
        last = ids.of_symbols(symbols)
