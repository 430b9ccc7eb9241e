"""Frozen weights in fewer bits (QLoRA, Dettmers et al. 2023): nf4 by bitsandbytes, int8 and int4 by torchao.

Only what an adapter leaves frozen is stored so; the base on disk, its fingerprint and a merge are of the whole numbers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vla.errors import MachineError

if TYPE_CHECKING:
    import peft
    from peft.tuners.lora import LoraLayer
else:
    # peft imports bitsandbytes, which on a CPU fetches native code from the Hub where the package `kernels` is installed, and
    # runs it. Nothing that lies beside weights is ever run here, so while it is imported there is no such package.
    _kernels = sys.modules.get("kernels", ...)
    sys.modules["kernels"] = None
    try:
        peft = importlib.import_module("peft")
        LoraLayer = importlib.import_module("peft.tuners.lora").LoraLayer
    finally:
        del sys.modules["kernels"]
        if _kernels is not ...:
            sys.modules["kernels"] = _kernels

__all__ = ["LoraLayer", "peft", "quantize"]

INT4_GROUP = 128
"""Weights of a row that share a scale; a layer whose rows do not divide into such groups keeps its numbers."""


def quantize(module: nn.Module, how: str, names: Sequence[str]) -> None:
    """Replace the weights of the named linear layers of `module` by `how` ("nf4", "int8", "int4"), in place.

    Raises `MachineError` where the package or the device for it is missing; nothing is replaced then.
    """
    layers = {name: child for name, child in module.named_modules() if name in set(names) and isinstance(child, nn.Linear)}
    if how == "nf4":
        _nf4(module, layers)
    else:
        _torchao(layers, how)


def _torchao(layers: dict[str, nn.Linear], how: str) -> None:
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_  # pyright: ignore
    except ImportError as error:
        raise MachineError("adapter.quantize", found=f"{how}, and no torchao ({error})", expected="torchao",
                           fix='pip install "tendon-vla[quant]", or adapter.quantize=none') from error  # fmt: skip
    if how == "int8":
        for layer in layers.values():
            quantize_(layer, Int8WeightOnlyConfig())
        return
    # torchao's packings of int4 are kernels for CUDA: on a CPU each of them fails, some only once they are used.
    layers = {name: layer for name, layer in layers.items() if not layer.in_features % INT4_GROUP}
    device = next((layer.weight.device.type for layer in layers.values()), "cpu")
    if device != "cuda":
        raise MachineError("adapter.quantize", found=f"int4 on {device}, for which torchao has no int4 kernel",
                           expected="a CUDA device",
                           fix="adapter.quantize=nf4, four bits on a CPU too, or adapter.quantize=int8")  # fmt: skip
    try:
        for layer in layers.values():
            quantize_(layer, Int4WeightOnlyConfig(group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d"))  # pyright: ignore
    except (ImportError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise MachineError("adapter.quantize", found=f"int4: {type(error).__name__}: {error}",
                           expected="bfloat16 weights on a CUDA device torchao packs int4 for",
                           fix="adapter.quantize=nf4 or adapter.quantize=int8") from error  # fmt: skip


def _nf4(module: nn.Module, layers: dict[str, nn.Linear]) -> None:
    try:
        bnb: Any = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise MachineError("adapter.quantize", found=f"nf4, and no bitsandbytes ({error})", expected="bitsandbytes",
                           fix='pip install "tendon-vla[quant]", or adapter.quantize=int8') from error  # fmt: skip
    where = "cuda" if torch.cuda.is_available() else "cpu"
    for name, old in layers.items():
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, old.bias is not None, compute_dtype=old.weight.dtype,
                                quant_type="nf4")  # fmt: skip
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new)
        new.bias = old.bias
        # Its CPU kernel repacks the weight in place when first used for acting, and from then on no gradient passes.
        new.support_avx512bf16_for_cpu = False
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent) if parent else module, last, new.to(where))
