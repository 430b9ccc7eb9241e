"""Decoding: the prefix once, then one symbol after the other from a cache that is allocated once; or all at once.

Nothing but action symbols can be said, and only their rows of the head are computed; of a sequence codec only symbols that
still make a whole chunk (`vla/policy/choose.py`). Masks and positions of all steps are made before the first. With `use_graphs`
(CUDA) a whole chunk, image towers included, is one CUDA graph: at batch 1 a large model otherwise waits for its launches.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from vla.actions import is_sequence
from vla.batch import Batch
from vla.policy.choose import Choose

if TYPE_CHECKING:
    from vla.policy.model import VLAPolicy

_MOST_GRAPHS = 8  # shapes (batch, prompt length, pictures) kept captured; each holds its own activations


class Room(DynamicLayer):
    """Keys and values of one layer in a buffer of the final length: a step writes its own place, nothing is copied."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.end = length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(*key_states.shape[:2], self.length, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], self.length, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values, start = self.keys, self.values, self.end
        assert keys is not None and values is not None
        self.end += key_states.shape[-2]
        keys[:, :, start : self.end] = key_states
        values[:, :, start : self.end] = value_states
        return keys[:, :, : self.end], values[:, :, : self.end]

    def get_seq_length(self) -> int:
        return self.end


def new_cache(model: Any, length: int) -> Cache:
    """The model's own cache; with preallocated room for `length` tokens where all its layers are plain ones."""
    cache: Any = model.new_cache()
    if type(cache) is DynamicCache and cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [Room(length) for _ in cache.layers]  # pyright: ignore[reportAttributeAccessIssue]
    return cache


def decode_steps(policy: VLAPolicy, batch: Batch, choose: Choose, dims: int) -> None:
    """Constrained decoding into `choose`; `dims` is the robot's own number of action dimensions, at most A."""
    if choose.decode != "sample" and not choose.waits:
        # What is fed back is the likeliest: no number leaves the device before the end.
        choose(_logits(policy, batch, dims, lambda: greedy_logits(policy, batch, dims)))
    else:
        steps(policy, batch, choose, dims, lambda: choose.done)


def decode_parallel(policy: VLAPolicy, batch: Batch, choose: Choose) -> None:
    """A whole chunk in one pass into `choose`."""
    choose(_logits(policy, batch, 0, lambda: policy.action_logits(batch)))


def _logits(policy: VLAPolicy, batch: Batch, dims: int, plain: Callable[[], Tensor]) -> Tensor:
    """By the policy's graphs where it has some, else by `plain`; for good by `plain` once a graph cannot be captured."""
    graphs = graphs_of(policy)
    if graphs is None:
        return plain()
    try:
        return graphs(policy, batch, dims)
    except CaptureError as error:
        use_graphs(policy, False)
        warnings.warn(f"acting without CUDA graphs from now on: {error}", RuntimeWarning, stacklevel=2)
        return plain()


def steps(
    policy: VLAPolicy, batch: Batch, choose: Callable[[Tensor], Tensor], dims: int, done: Callable[[], bool] = lambda: False
) -> None:
    """`choose` gets logits (B, 1, K) and says symbols (B, 1), N times or until `done`."""
    A, sequence = policy.encoder.action_dim, is_sequence(policy.codec)
    zero = 0 if sequence else int(policy.codec.encode(np.zeros((1, 1)))[0])
    B, N = batch.symbols.shape
    T = batch.ids.shape[1] + 1  # the prefix and `act`, which is read with it
    model, ids = policy.model, policy.writer.ids
    mask, positions = policy.attention(batch, N)
    cache = new_cache(model, T + N - 1)
    start = torch.full((B, 1), ids.act, device=batch.ids.device)
    hidden = model.hidden(
        torch.cat([batch.ids, start], dim=1), batch.images, batch.state, slots=batch.slots, robots=batch.robot,
        attention_mask=mask[:, :, :T, :T], position_ids=positions[..., :T], past_key_values=cache, use_cache=True,
    ).last_hidden_state[:, -1:]  # fmt: skip
    for i in range(N):
        symbols = choose(model.symbol_logits(hidden))
        if i == N - 1 or done():
            break
        if not sequence and i % A >= dims:  # training fed a padded dimension's zero here, so acting does too
            symbols = torch.full_like(symbols, zero)
        at = slice(T + i, T + i + 1)
        hidden = model.hidden(
            ids.of_symbols(symbols), attention_mask=mask[:, :, at, : T + i + 1], position_ids=positions[..., at],
            past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip


def greedy_logits(policy: VLAPolicy, batch: Batch, dims: int) -> Tensor:
    """(B, N, K), each step having read the likeliest symbols of those before."""
    said: list[Tensor] = []

    def likeliest(logits: Tensor) -> Tensor:
        said.append(logits)
        return logits.float().softmax(-1).argmax(-1)  # as `Chooser`: among equals in float32 probability, the first

    steps(policy, batch, likeliest, dims)
    return torch.cat(said, dim=1)


def parallel_logits(policy: VLAPolicy, batch: Batch, tail: Tensor) -> Tensor:
    """(B, N, K) in one pass; `tail` (M,) are the ids at the action positions, on the device."""
    mask, positions = policy.attention(batch, len(tail))
    T, N = batch.ids.shape[1], batch.symbols.shape[1]
    hidden = policy.model.hidden(
        torch.cat([batch.ids, tail.expand(len(batch), -1)], dim=1), batch.images, batch.state, slots=batch.slots,
        robots=batch.robot, attention_mask=mask, position_ids=positions,
    ).last_hidden_state  # fmt: skip
    return policy.model.symbol_logits(hidden[:, T : T + N])


class CaptureError(RuntimeError):
    """A chunk that cannot be a CUDA graph: something in it asks the device a question, or allocates where it may not."""


class Graphs:
    """CUDA graphs of whole chunks, one per shape of batch; the weights may change their numbers, not their places."""

    def __init__(self) -> None:
        self._captured: OrderedDict[tuple, tuple[Any, Batch, Tensor]] = OrderedDict()

    def __call__(self, policy: VLAPolicy, batch: Batch, dims: int) -> Tensor:
        """(B, N, K); the tensor is overwritten by the next call with the same shapes. Raises `CaptureError`."""
        key = (policy.config.decoding, dims, *(tuple(getattr(batch, f.name).shape) for f in fields(batch)))
        if key not in self._captured:
            try:
                self._captured[key] = self._capture(policy, batch, dims)
            except Exception as error:  # CUDA, torch and models say it in many ways
                raise CaptureError(f"{type(error).__name__}: {error}") from error
            if len(self._captured) > _MOST_GRAPHS:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        graph, own, logits = self._captured[key]
        for f in fields(batch):
            getattr(own, f.name).copy_(getattr(batch, f.name), non_blocking=True)
        graph.replay()
        return logits

    @torch.inference_mode()
    def _capture(self, policy: VLAPolicy, batch: Batch, dims: int) -> tuple[Any, Batch, Tensor]:
        own = replace(batch, **{f.name: getattr(batch, f.name).clone() for f in fields(batch)})
        if policy.config.decoding == "parallel":
            tail = policy.tail_of(batch)

            def run() -> Tensor:
                return parallel_logits(policy, own, tail)
        else:

            def run() -> Tensor:
                return greedy_logits(policy, own, dims)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # lazy initialisations (workspaces, autotuning) must not fall into the capture
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = run()
        return graph, own, logits


def use_graphs(policy: VLAPolicy, on: bool = True) -> VLAPolicy:
    """Capture chunks as CUDA graphs from now on (or stop). Returns the policy; does nothing off CUDA.

    For backbones whose picture path never asks the device a question (Prismatic without FiLM); others say so once, at the first
    chunk, and act without.
    """
    policy.__dict__["_graphs"] = Graphs() if on and policy.device.type == "cuda" else None
    return policy


def graphs_of(policy: VLAPolicy) -> Graphs | None:
    return policy.__dict__.get("_graphs")
