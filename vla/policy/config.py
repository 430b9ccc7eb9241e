"""What makes a policy, apart from data: sizes, codec, decoding, losses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vla.batch import AugmentConfig
from vla.config import Config
from vla.normalize import Scheme

Decode = Literal["argmax", "mean", "sample"]
"""How a symbol becomes a number: the likeliest bin, the expectation over the bins, or a draw."""


class NanoConfig(Config):
    """Sizes of the embedded backbone."""

    kind: Literal["nano"] = "nano"
    hidden: int = Field(default=128, ge=16)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=2, ge=1)
    mlp: int = Field(default=384, ge=16)
    image_size: int = Field(default=64, ge=32, multiple_of=16)
    tower_channels: tuple[int, int, int] = (32, 64, 128)
    keypoints: int = Field(default=64, ge=0)
    """Channels of the instruction-FiLM-ed spatial-softmax token; 0 is the plain stem."""
    text_vocab: int = Field(default=512, ge=300)


class CodecConfig(Config):
    kind: Literal["bins"] = "bins"
    bins: int = Field(default=256, ge=2)
    variant: Literal["uniform", "openvla"] = "uniform"


class NormalizationConfig(Config):
    action: Scheme = "q99"
    state: Scheme = "bounds"


class PolicyConfig(Config):
    """Everything that makes a policy, apart from data."""

    backbone: NanoConfig = NanoConfig()
    codec: CodecConfig = CodecConfig()
    normalization: NormalizationConfig = NormalizationConfig()
    chunk: int = Field(default=8, ge=1)
    """H: steps predicted at once."""
    execute: int = Field(default=4, ge=1)
    """Steps of a chunk that are carried out before looking again."""
    decoding: Literal["parallel", "autoregressive"] = "parallel"
    decode: Decode = "mean"
    history_dropout: float = Field(default=0.5, ge=0, lt=1)
    """Autoregressive training: share of the true previous symbols that are hidden from the model, against copying them."""
    soft_sigma: float = Field(default=0.02, ge=0)
    """Standard deviation, in unit space, of the Gaussian around the true action that the bins are taught; 0: hard labels."""
    end_weight: float = Field(default=1.0, ge=0)
    """Weight of the auxiliary loss "where does this episode end", read off the demonstration itself."""
    prompt: str = "plain-1"
    augment: AugmentConfig = AugmentConfig()
