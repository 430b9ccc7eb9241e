"""Linear layers in oneDNN's own order of weights, for acting on a CPU: products of several rows need not reorder them each time.

A second copy of those weights is kept, since single rows (one observation, symbol by symbol) are read faster from the first.
What is computed is the same product, added up in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vla.errors import MachineError
from vla.policy.model import VLAPolicy

_ROWS = 4
"""Fewer rows than this go to the plain weights (in float32; in bfloat16 oneDNN is no slower with one)."""


class packing:
    """`with packing(module): ...` acts with the packed weights of every linear layer in `module`; they must not change since."""

    def __init__(self, module: nn.Module) -> None:
        """Raises `MachineError` where this torch has no oneDNN, or the weights are not on the CPU."""
        self._layers: list[tuple[nn.Linear, Callable[[Tensor], Tensor]]] = []
        for layer in module.modules():
            if type(layer) is nn.Linear:
                if not torch.backends.mkldnn.is_available() or layer.weight.device.type != "cpu":
                    raise MachineError("packing", found=f"weights on {layer.weight.device.type}", expected="a CPU with oneDNN",
                                       fix="act without packing")  # fmt: skip
                self._layers.append((layer, _forward(layer)))

    def __enter__(self) -> packing:
        for layer, forward in self._layers:
            layer.forward = forward  # pyright: ignore
        return self

    def __exit__(self, *_: Any) -> None:
        for layer, _forward in self._layers:
            del layer.forward  # the class's own is found again


def use_packed(policy: VLAPolicy, on: bool = True) -> VLAPolicy:
    """Act with packed weights from now on, or stop. Returns the policy. Only for acting: no gradient passes through them."""
    known: packing | None = policy.__dict__.pop("_packed", None)
    if known is not None:
        known.__exit__()
    if on:
        policy.__dict__["_packed"] = packing(policy.model).__enter__()
    return policy


def _forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    with torch.no_grad():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    least = _ROWS if weight.dtype == torch.float32 else 1

    def forward(x: Tensor) -> Tensor:
        if x.numel() < least * x.shape[-1]:
            return nn.functional.linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return forward
