"""The further files of an OpenVLA-OFT folder: action head, state projector, and towers with FiLM and their adapter.

Each is one file `NAME--STEP_checkpoint.pt` (or the same converted to `.safetensors`), with the `module.` that data-parallel
training puts before each name.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vla.backbones.prismatic_zip import read_torch_zip
from vla.errors import CheckpointError

_ALPHA = 16  # OFT's rule: an adapter's alpha is the smaller of its rank and this


def component(folder: Path, name: str) -> dict[str, Tensor] | None:
    """The tensors of `NAME--STEP_checkpoint.*`, without `module.`; None when there is no such file.

    Raises `CheckpointError` for several steps of one, or a file that is no table of tensors.
    """
    found = sorted(p for p in folder.glob(f"{name}--*_checkpoint.*") if p.suffix in (".pt", ".safetensors"))
    if not found:
        return None
    if len({p.stem for p in found}) > 1:
        raise CheckpointError(folder, found=f"{', '.join(p.name for p in found)}", expected=f"one {name}",
                              fix="keep the step you mean, move the others away")  # fmt: skip
    path = next((p for p in found if p.suffix == ".safetensors"), found[0])
    tensors = load_file(path) if path.suffix == ".safetensors" else read_torch_zip(path)
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}


def read_further(folder: Path) -> dict[str, Tensor]:
    """State projector and FiLM-ed towers of an OFT folder under a `PrismaticVLM`'s names; empty for OpenVLA's own folders.

    Raises `CheckpointError` for a diffusion head, which is not supported.
    """
    if list(folder.glob("noisy_action_projector--*")):
        raise CheckpointError(folder, found="noisy_action_projector: a diffusion head", expected="an L1 head or symbols",
                              fix="use OFT's L1 checkpoints")  # fmt: skip
    further = {f"proprio_projector.{k}": v for k, v in (component(folder, "proprio_projector") or {}).items()}
    towers = component(folder, "vision_backbone")
    return further | (_towers(towers, folder) if towers else {})


def read_action_head(folder: Path) -> dict[str, Tensor] | None:
    """The weights of the policy's `L1Head`, or None."""
    return component(folder, "action_head")


def _towers(tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """`vision_backbone.featurizer.blocks.0.block.attn.qkv.base_layer.weight` and its like -> our names, adapters merged."""
    merged: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        down, up = (tensors.get(name.replace(".base_layer.weight", f".lora_{ab}.default.weight")) for ab in "AB")
        if name.endswith(".base_layer.weight") and down is not None and up is not None:
            tensor = _with_adapter(tensor, down, up)
        merged[_our_name(name.replace(".base_layer.", "."))] = tensor
    if not merged.keys() - {n for n in merged if n.startswith("film.")}:
        raise CheckpointError(where, found=f"vision_backbone file with {sorted(tensors)[:3]} ...", expected="towers",
                              fix="copy the file again")  # fmt: skip
    return merged


def _our_name(name: str) -> str:
    name = name if name.startswith("vision_backbone.") else f"vision_backbone.{name}"
    film = re.fullmatch(r"vision_backbone\.(\w+)\.blocks\.(\d+)\.((?:scale|shift)\.(?:weight|bias))", name)
    if film:
        return "film." + ".".join(film.groups())
    return re.sub(r"(\.blocks\.\d+)\.block\.", r"\1.", name)


def _with_adapter(base: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """W + alpha / r * up @ down, in float32; of a convolution the same over its window."""
    rank = down.shape[0]
    delta = (up.float().flatten(1) @ down.float().flatten(1)).reshape(base.shape) * (min(rank, _ALPHA) / rank)
    return (base.to(torch.float32) + delta).to(base.dtype)
