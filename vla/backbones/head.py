"""A few rows of an output head, its adapter included: the whole vocabulary is never computed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def rows_of(head: nn.Module, rows: slice | Tensor) -> Tensor:
    """Rows (K, d) of a linear head's weight. Reading `.weight` past a LoRA layer would lose what it learned."""
    base = head.get_base_layer() if hasattr(head, "get_base_layer") else head  # pyright: ignore
    weight = base.weight[rows]  # pyright: ignore
    if base is not head and not head.disable_adapters and not head.merged:  # pyright: ignore
        for name in head.active_adapters:  # pyright: ignore
            if name in head.lora_A:  # pyright: ignore
                up, down = head.lora_B[name].weight[rows], head.lora_A[name].weight  # pyright: ignore
                weight = weight + ((up @ down) * head.scaling[name]).to(weight.dtype)  # pyright: ignore
    return weight


def head_logits(head: nn.Module, hidden: Tensor, rows: slice | Tensor) -> Tensor:
    """(..., d) -> (..., K): the head's logits at `rows` alone; a bias is not expected of a language model's head."""
    return F.linear(hidden, rows_of(head, rows))
