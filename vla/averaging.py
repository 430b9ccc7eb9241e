"""Averaged weights (EMA): what is evaluated and saved as the policy, beside the weights that learn."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def update_average(ema: dict[str, Tensor], names: dict[Tensor, str], decay: float) -> None:
    """Move each average towards its parameter: `average += (1 - decay) * (parameter - average)`, in place."""
    torch._foreach_lerp_([ema[name] for name in names.values()], [p.detach() for p in names], 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


class averaged:
    """Inside the block the policy has its averaged weights."""

    def __init__(self, names: dict[Tensor, str], ema: dict[str, Tensor]) -> None:
        self.pairs = [(parameter.data, ema[name]) for parameter, name in names.items()] if ema else []

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    def _swap(self) -> None:
        for live, average in self.pairs:
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)
