"""What makes a policy, apart from data: sizes, codec, decoding, losses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vla.backbones.config import BackboneConfig, NanoConfig
from vla.batch import AugmentConfig
from vla.config import Config
from vla.normalize import Scheme

Decode = Literal["argmax", "mean", "sample"]
"""How a symbol becomes a number: the likeliest bin, the expectation over the bins (over the codes of `vq`; of `fast`, which has
none, the likeliest tokens), or a draw."""


class CodecConfig(Config):
    kind: Literal["bins", "fast", "vq"] = "bins"
    """`bins`: one symbol per number; `fast` (cosine transform, byte pairs) and `vq` (residual codebooks) say a chunk in fewer."""
    bins: int = Field(default=256, ge=2)
    variant: Literal["uniform", "openvla"] = "uniform"
    path: str | None = Field(default=None, min_length=1)
    """What `vla data tokenizer` wrote, for `fast` and `vq`. The policy folder holds its content; the file is read once."""

    @model_validator(mode="after")
    def _check(self) -> CodecConfig:
        if self.kind == "bins" and self.path:
            raise ValueError("codec.path is for kind: fast and kind: vq; bins are not fitted")
        if self.kind != "bins" and not self.path:
            raise ValueError(f"kind: {self.kind} needs path: what `vla data tokenizer DIR --kind {self.kind} --out FILE` wrote")
        if self.kind != "bins" and (self.bins, self.variant) != (256, "uniform"):
            raise ValueError(f"codec.bins and codec.variant are for kind: bins, not for {self.kind}")
        return self


class NormalizationConfig(Config):
    action: Scheme = "q99"
    state: Scheme = "bounds"


class PolicyConfig(Config):
    """Everything that makes a policy, apart from data."""

    backbone: BackboneConfig = NanoConfig()
    codec: CodecConfig = CodecConfig()
    normalization: NormalizationConfig = NormalizationConfig()
    chunk: int = Field(default=8, ge=1)
    """H: steps predicted at once."""
    chunk_seconds: float | None = Field(default=None, gt=0, le=60)
    """Time a chunk spans, for robots of different control rates: their actions are resampled to H steps and back
    (`vla/resample.py`). None: H steps of each robot's own."""
    execute: int = Field(default=4, ge=1)
    """Steps of a chunk (of its H) that are carried out before looking again."""
    decoding: Literal["parallel", "autoregressive"] = "parallel"
    head: Literal["symbols", "l1"] = "symbols"
    """`symbols`: probabilities over the codec's symbols, hence a confidence; `l1`: numbers straight from the hidden states, with
    an L1 loss (OpenVLA-OFT), parallel decoding only, no confidence."""
    decode: Decode = "mean"
    soft_sigma: float = Field(default=0.02, ge=0)
    """Standard deviation, in unit space, of the Gaussian around the true action that the bins are taught; 0: hard labels."""
    end_weight: float = Field(default=1.0, ge=0)
    """Weight of the auxiliary loss "where does this episode end", read off the demonstration itself; 0: no such query."""
    prompt: Literal["plain-1", "robot-1", "openvla-1", "openvla-v01"] = "plain-1"
    """Version in `vla/prompt.py`; `robot-1` names the robot."""
    soft_tokens: int = Field(default=0, ge=0, le=64)
    """Learned tokens per embodiment, the other way to tell a policy which robot it is. Needed to add a robot later."""
    state: Literal["token", "none"] = "token"
    """Whether the robot's state is a token of the prefix."""
    action_dim: int | None = Field(default=None, ge=1)
    """A: room for action dimensions; default: the widest robot of the mixture. A robot added later must fit."""
    state_dim: int | None = Field(default=None, ge=1)
    """S: likewise for the state."""
    answer_weight: float = Field(default=0.5, ge=0)
    """Weight of the loss on answers in words (`mixture.answers`)."""
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _check(self) -> PolicyConfig:
        if self.execute > self.chunk:
            raise ValueError(f"execute {self.execute} is more than the chunk of {self.chunk}")
        if self.head == "l1" and self.decoding != "parallel":
            raise ValueError("head: l1 needs decoding: parallel; numbers cannot be fed back as symbols")
        if self.head == "l1" and self.codec.kind != "bins":
            raise ValueError("head: l1 says no symbols: leave codec out")
        if self.backbone.kind == "student" and (self.decoding != "parallel" or self.codec.kind != "bins"):
            raise ValueError("a student says a chunk's bins at once: decoding: parallel and codec.kind: bins")
        return self
