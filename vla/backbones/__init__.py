"""Vision-language backbones. Importing this package registers the embedded default natively with transformers.

`protocol` says what a policy asks of one; `nano` is the embedded default, `hf` any Hugging Face model, `prismatic` OpenVLA's,
`student` a small network for the robot itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vla.backbones.config import BackboneConfig, HFConfig, NanoConfig, PrismaticConfig, StudentConfig
from vla.backbones.nano import NanoVLM, NanoVLMConfig
from vla.backbones.nano_processor import NanoProcessor, build_tokenizer
from vla.backbones.protocol import Backbone, Ids, Sizes, Writer
from vla.images import ImagePreparation, prepare_image

__all__ = ["Backbone", "BackboneConfig", "HFConfig", "Ids", "ImagePreparation", "NanoConfig", "NanoProcessor", "NanoVLM",
           "NanoVLMConfig", "PrismaticConfig", "Sizes", "StudentConfig", "Writer", "build_backbone", "build_tokenizer",
           "load_backbone", "prepare_image"]  # fmt: skip


def build_backbone(config: BackboneConfig, sizes: Sizes) -> tuple[Any, Writer]:
    """A backbone to learn with: a fresh nano one, or a pretrained one with room for actions. (model, writer)

    Draws from torch's global generator. Raises `VLAError`s for a pretrained model that cannot be had or does not fit.
    """
    return _module(config).build(config, sizes)


def load_backbone(
    folder: Path, config: BackboneConfig, sizes: Sizes, dtype: torch.dtype | None = None, attention: str | None = None
) -> tuple[Any, Writer]:
    """The backbone of a saved policy. `dtype` None: as stored (the nano one: float32); `attention` None: as configured."""
    return _module(config).load(folder, config, sizes, dtype, attention)


def _module(config: BackboneConfig) -> Any:
    match config:
        case NanoConfig():
            from vla.backbones import nano_processor as module
        case HFConfig():
            from vla.backbones import hf as module
        case PrismaticConfig():
            from vla.backbones import prismatic as module
        case StudentConfig():
            from vla.backbones import student as module
    return module
