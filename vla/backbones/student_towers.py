"""What a student sees with: a picture -> a fine map for places, and a few tokens.

`conv`: a small convolutional stem, GroupNorm, cheap at any size. `patch`: a linear patch embedding (ViT, Dosovitskiy et al. 2021)
beside that stem's fine map. Anything else is a timm name of the EfficientNet and MobileNet families, FiLM after each stage as in
RT-1 (Brohan et al. 2022). `tokens` condenses a picture into that many (TokenLearner, Ryoo et al. 2021).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vla.errors import MachineError, UsageError


class Tower(nn.Module):
    """`mid_channels` of the fine map, `out_channels` of each of the `tokens` tokens."""

    mid_channels: int
    out_channels: int
    tokens: int

    def load_pretrained(self) -> None:
        """Take over pretrained weights. Raises `UsageError`: our own towers have none."""
        raise UsageError("policy.backbone.pretrained", found="true", expected="a timm tower, which has pretrained weights",
                         fix="pretrained: false, or tower: mobilenetv4_conv_small")  # fmt: skip


def make_tower(config: Any) -> Tower:
    """The tower of a `StudentNetConfig`. Raises `UsageError` for a name timm does not know or cannot be steered."""
    if config.tower in ("conv", "patch"):
        return ConvTower(config.image_size, config.patch, config.channels, config.tower == "patch", config.tokens)
    return MobileTower(config.tower, config.image_size, config.hidden, config.tokens)


class ConvTower(Tower):
    """Stem of stride `patch / 4` to the fine map, and from there (or, `linear`, from the pixels) one token per patch."""

    def __init__(self, size: int, patch: int, channels: tuple[int, int, int], linear: bool, tokens: int) -> None:
        super().__init__()
        c0, c1, c2 = channels
        stem, side = patch // 8, size // patch
        self.early = nn.Sequential(
            nn.Conv2d(5, c0, 2 * stem + 1, stride=stem, padding=stem), nn.GroupNorm(4, c0), nn.ReLU(),
            nn.Conv2d(c0, c1, 3, stride=2, padding=1), nn.GroupNorm(4, c1), nn.ReLU(),
        )  # fmt: skip
        self.late = nn.Conv2d(5, 4 * c2, patch, stride=patch) if linear else nn.Sequential(
            nn.Conv2d(c1, c2, 3, stride=2, padding=1), nn.GroupNorm(8, c2), nn.ReLU(),
            nn.Conv2d(c2, c2, 3, padding=1), nn.GroupNorm(8, c2), nn.ReLU(), nn.PixelUnshuffle(2),
        )  # fmt: skip
        self.linear = linear
        self.mid_channels, self.out_channels, self.tokens = c1, 4 * c2, tokens or side * side
        self.learner = TokenLearner(self.out_channels, tokens) if tokens else None

    def forward(self, pixels: Tensor, grid: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        """`pixels` (I, 3, s, s) in [-1, 1], `grid` (2, s, s), `sentence` (I, d) -> (I, C1, s', s') and (I, P, C)."""
        whole = torch.cat([pixels, grid.expand(len(pixels), -1, -1, -1)], dim=1)
        mid = self.early(whole)
        patches = self.late(whole if self.linear else mid)
        return mid, patches.flatten(2).transpose(1, 2) if self.learner is None else self.learner(patches)


class MobileTower(Tower):
    """A timm network made of `conv_stem`, `bn1` and `blocks`, steered by FiLM after each stage."""

    def __init__(self, name: str, size: int, hidden: int, tokens: int) -> None:
        super().__init__()
        self.name = name
        net = _timm(name)
        self.conv_stem, self.bn1, self.blocks = net.conv_stem, net.bn1, net.blocks
        mean, std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
        self.scale = [0.5 / s for s in std]  # pixels arrive in [-1, 1]
        self.shift = [(0.5 - m) / s for m, s in zip(mean, std, strict=True)]
        shapes = _shapes(net, size)
        self.films = nn.ModuleList(Film(channels, hidden) for channels, _ in shapes)
        fine = [i for i, (_, side) in enumerate(shapes) if side >= size // 8]
        self.fine = fine[-1] if fine else 0
        self.mid_channels, (self.out_channels, side) = shapes[self.fine][0], shapes[-1]
        self.tokens = tokens or side * side
        self.learner = TokenLearner(self.out_channels, tokens) if tokens else None

    def load_pretrained(self) -> None:
        net = _timm(self.name, pretrained=True)
        for part in ("conv_stem", "bn1", "blocks"):
            getattr(self, part).load_state_dict(getattr(net, part).state_dict())

    def forward(self, pixels: Tensor, grid: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = (pixels.new_tensor(v).view(3, 1, 1) for v in (self.scale, self.shift))
        x, mid = self.bn1(self.conv_stem(pixels * scale + shift)), pixels
        for i, (stage, film) in enumerate(zip(self.blocks, self.films, strict=True)):
            x = film(stage(x), sentence)
            if i == self.fine:
                mid = x
        return mid, x.flatten(2).transpose(1, 2) if self.learner is None else self.learner(x)


class LinearFrom(nn.Linear):
    """A linear layer whose weights begin with a standard deviation of its own (`StudentNet._init_weights`)."""

    def __init__(self, features_in: int, features_out: int, init_std: float) -> None:
        super().__init__(features_in, features_out)
        self.init_std = init_std


class Film(nn.Module):
    """Scale and shift of each channel by the sentence; at first it changes nothing, so pretrained features survive (RT-1)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.both = LinearFrom(hidden, 2 * channels, 0.0)

    def forward(self, x: Tensor, sentence: Tensor) -> Tensor:
        scale, shift = self.both(sentence)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class TokenLearner(nn.Module):
    """(I, C, h, w) -> (I, M, C): M maps of where to look, and the mean of the features there."""

    def __init__(self, channels: int, tokens: int) -> None:
        super().__init__()
        maps = nn.Conv2d(channels // 4, tokens, 1, bias=False)  # a softmax over places takes a bias away again
        self.where = nn.Sequential(nn.Conv2d(channels, channels // 4, 1), nn.ReLU(), maps)

    def forward(self, x: Tensor) -> Tensor:
        return self.where(x).flatten(2).softmax(-1) @ x.flatten(2).transpose(1, 2)


def _timm(name: str, pretrained: bool = False) -> Any:
    import timm

    if name not in timm.list_models(module="efficientnet") + timm.list_models(module="mobilenetv3"):
        raise UsageError("policy.backbone.tower", found=repr(name),
                         expected="conv, patch, or a timm name of the EfficientNet and MobileNet families",
                         fix="for example tower: mobilenetv4_conv_small; all: python -c \"import timm; "
                         "print(timm.list_models(module='mobilenetv3'))\"")  # fmt: skip
    try:
        net: Any = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:
        raise MachineError(f"pretrained weights of {name}", found=f"{type(error).__name__}: {error}",
                           expected="a download from the Hub, or its cache",
                           fix="go online once, or pretrained: false") from error  # fmt: skip
    return net


def _shapes(net: Any, size: int) -> list[tuple[int, int]]:
    """(channels, side) after each stage of a `size` picture; on the meta device, so nothing is computed."""
    meta, found = copy.deepcopy(net).to("meta").eval(), []
    x = meta.bn1(meta.conv_stem(torch.zeros(1, 3, size, size, device="meta")))
    for stage in meta.blocks:
        x = stage(x)
        found.append((x.shape[1], x.shape[2]))
    return found
