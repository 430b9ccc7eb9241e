"""Which vision-language model a policy is built on, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from vla.config import Config


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

    @model_validator(mode="after")
    def _check(self) -> NanoConfig:
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden {self.hidden} must be a multiple of 2 x heads = {2 * self.heads} (rotary pairs)")
        if any(c % groups for c, groups in zip(self.tower_channels, (4, 4, 8), strict=True)):
            raise ValueError(f"tower_channels {self.tower_channels} must be multiples of 4, 4 and 8 (group normalisation)")
        return self


class HFConfig(Config):
    """Any `AutoModelForImageTextToText` with its `AutoProcessor`."""

    kind: Literal["hf"]
    path: Annotated[str, Field(min_length=1)]
    """Folder or Hub id (`user/name` or `user/name@revision`) of the pretrained model."""
    image_size: int | None = Field(default=None, ge=16)
    """Side of the square a camera's frame becomes before the model's own image processor; default: what that one wants."""
    symbols: Literal["least-used", "new"] = "least-used"
    """Where action symbols live: the least-used ids of the vocabulary (spare rows first), or rows of their own."""
    chat: Literal["auto", "template", "plain"] = "auto"
    """Speak through the processor's chat template, or plainly; auto: the template when there is one."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """transformers' kernels that take a mask of our own."""
    probe_image: bool = True
    """Refuse a model whose logits do not depend on its image, at load."""


class PrismaticConfig(Config):
    """A Prismatic model (fused DINOv2 and SigLIP towers, projector, causal language model), as OpenVLA is one."""

    kind: Literal["prismatic"]
    path: Annotated[str, Field(min_length=1)]
    """Folder or Hub id in OpenVLA's layout (`openvla/openvla-7b`), or an OFT folder."""
    crop: float = Field(default=1.0, gt=0, le=1)
    """Share of the area of the centre crop when acting; 0.9 for checkpoints that were trained with random crops."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    probe_image: bool = True


class StudentConfig(Config):
    """A small network for the robot's own computer (`vla/backbones/student.py`); sizes by budget in `vla/students/`."""

    kind: Literal["student"]
    tower: str = Field(default="conv", min_length=1)
    """`conv`, `patch`, or a timm name of the EfficientNet and MobileNet families."""
    pretrained: bool = False
    """A timm tower with its weights from the Hub."""
    image_size: int = Field(default=224, ge=32)
    patch: int = Field(default=32, ge=16, multiple_of=8)
    """Side of what becomes one token, for `conv` and `patch`."""
    channels: tuple[int, int, int] = (32, 64, 128)
    """Of the stem's stages, for `conv` and `patch`."""
    keypoints: int = Field(default=64, ge=0)
    """Places the instruction asks for in the fine map, said by one token; 0: none."""
    tokens: int = Field(default=0, ge=0)
    """Tokens a picture is condensed into (TokenLearner); 0: one per patch."""
    hidden: int = Field(default=256, ge=16)
    layers: int = Field(default=8, ge=1)
    heads: int = Field(default=4, ge=1)
    mlp: int = Field(default=704, ge=16)
    """Gated: two products go up to it, one comes down."""
    text_layers: int = Field(default=1, ge=0)
    """Layers of the text encoder, computed once per instruction."""
    text_vocab: int = Field(default=512, ge=300)

    @model_validator(mode="after")
    def _check(self) -> StudentConfig:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} must be a multiple of heads {self.heads}")
        if self.tower in ("conv", "patch") and self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch {self.patch}")
        if any(c % groups for c, groups in zip(self.channels, (4, 4, 8), strict=True)):
            raise ValueError(f"channels {self.channels} must be multiples of 4, 4 and 8 (group normalisation)")
        if self.tower == "patch" and not self.keypoints:
            raise ValueError("tower: patch has its fine map for the keypoints alone: keypoints of 1 or more, or tower: conv")
        return self


def _kind(value: Any) -> str:
    return value.get("kind", "nano") if isinstance(value, dict) else getattr(value, "kind", "nano")


BackboneConfig = Annotated[
    Annotated[NanoConfig, Tag("nano")] | Annotated[HFConfig, Tag("hf")] | Annotated[PrismaticConfig, Tag("prismatic")]
    | Annotated[StudentConfig, Tag("student")],
    Discriminator(_kind),
]
"""Which one is said by `kind`; nano when it is not said."""
