"""A student as the two graphs a robot runs, written so that a runtime has little to do: same weights, same results, less work.

What is known before the robot starts is computed before it starts. The pictures' scale, the coordinates and their bias become one
map added after the first convolution; a linear patch embedding and the projector become one matrix that reads bytes; the
queries' scale sits in their weights. The last layer computes only the steps that are spoken. One observation at a time, so that
every product has two dimensions.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.backbones.nano import Keypoints, coordinates
from vla.backbones.student import WORDS, Layer, Sentence, StudentNet
from vla.backbones.student_towers import ConvTower
from vla.policy import VLAPolicy


class SentenceGraph(nn.Module):
    """`ids` (1, L) int64, all of them words -> `sentence` (1, d): `StudentNet.text` of one sentence without gaps."""

    def __init__(self, text: Sentence) -> None:
        super().__init__()
        self.embed = text.embed
        if len(text.layers):
            self.positions, self.norm, self.mix = text.positions, text.norm, text.mix
        self.layers = nn.ModuleList(Attention(cast(Layer, layer)) for layer in text.layers)

    def forward(self, ids: Tensor) -> Tensor:
        words = self.embed(ids[0])
        bag = words.mean(0, keepdim=True)
        if not len(self.layers):
            return bag
        at = torch.arange(ids.shape[1]).clamp(max=WORDS - 1)
        x = words + self.positions[at]
        for layer in self.layers:
            x = layer(x)
        return bag + self.mix(self.norm(x).mean(0, keepdim=True))


class Attention(nn.Module):
    """A `Layer` over (T, d): the queries' scale is in their weights, keys come out ready to be multiplied."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        d = layer.out.in_features
        self.heads, self.width = layer.heads, d // layer.heads
        self.norm1, self.out, self.norm2, self.up, self.down = layer.norm1, layer.out, layer.norm2, layer.up, layer.down
        weight, bias = layer.qkv.weight.detach().clone(), layer.qkv.bias.detach().clone()
        weight[:d] *= self.width**-0.5
        bias[:d] *= self.width**-0.5
        self.qkv = _linear(weight, bias)

    def forward(self, x: Tensor, last: int = 0) -> Tensor:
        """(T, d) -> (T, d); with `last`, only that many rows at the end, which read all of them."""
        q, k, v = (part.view(-1, self.heads, self.width) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        if last:
            q, x = q[-last:], x[-last:]
        weights = (q.transpose(0, 1) @ k.permute(1, 2, 0)).softmax(-1)
        x = x + self.out((weights @ v.transpose(0, 1)).transpose(0, 1).reshape(-1, self.heads * self.width))
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class PolicyGraph(nn.Module):
    """images, slots, sentence, state, robot -> unit, symbols, confidence; see `vla/export/onnx.py` for shapes."""

    def __init__(self, policy: VLAPolicy) -> None:
        super().__init__()
        net = cast(StudentNet, policy.model)
        config = net.config
        self.steps, self.dims, self.hidden = config.chunk, policy.encoder.action_dim, config.hidden
        self.soft_tokens = config.soft_tokens
        self.eye = make_eye(net)
        self.points = KeypointsGraph(net.keypoints) if net.keypoints is not None else None
        self.cameras, self.said, self.robots, self.found = net.camera_positions, net.said, net.robots, net.found
        self.state_in = net.state_in
        self.queries = nn.Parameter(net.steps if net.end is None else torch.cat([net.end, net.steps]), requires_grad=False)
        self.layers = nn.ModuleList(Attention(cast(Layer, layer)) for layer in net.layers)
        self.norm, self.dimensions, self.speak, self.head = net.norm, net.dimensions, net.speak, net.head
        self.l1_head, self.mean = policy.l1_head, policy.config.decode == "mean"
        self.centres: Tensor
        self.register_buffer("centres", policy.centres.detach().clone().float())

    def forward(
        self, images: Tensor, slots: Tensor, sentence: Tensor, state: Tensor | None = None, robot: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        told = F.rms_norm(sentence, sentence.shape[-1:])
        tokens, mid = self.eye(images, told)  # (C, P, d)
        if self.points is not None:
            tokens = torch.cat([tokens, self.points(mid, told)[:, None]], dim=1)
        tokens = tokens + self.cameras[slots][:, None]
        parts = [tokens.reshape(-1, self.hidden), self.said(told)]
        if self.robots is not None and robot is not None:
            parts.append(self.robots(robot).view(self.soft_tokens, self.hidden))
        if self.state_in is not None and state is not None:
            parts.append(self.state_in(state))
        queries = self.queries if self.found is None else self.queries + self.found(tokens[:, -1].sum(0, keepdim=True))
        x = torch.cat([*parts, queries])
        for i, layer in enumerate(self.layers):
            x = layer(x, self.steps if i == len(self.layers) - 1 else 0)
        said = torch.relu(self.speak(self.norm(x))[:, None] + self.dimensions.weight).view(-1, self.hidden)  # (H * A, d)
        return self._choose(said)

    def _choose(self, said: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `vla.policy.choose.Chooser` does. (H * A, d) -> three of (H, A)."""
        shape = self.steps, self.dims
        if self.l1_head is not None:
            unit = self.l1_head(said[None])[0].clamp(-1, 1)
            # Which bin a number lies in is the codec's to say, on the host; here stands the nearest one.
            symbols = (unit[..., None] - self.centres).abs().argmin(-1)
            return unit, symbols, torch.full_like(unit, float("nan"))
        p = self.head(said).softmax(-1)
        symbols = p.argmax(-1)
        entropy = -(p * p.clamp(min=1e-12).log()).sum(-1)
        unit = p @ self.centres[:, None] if self.mean else self.centres[symbols]
        return unit.view(shape), symbols.view(shape), (1.0 - entropy / float(np.log(max(p.shape[-1], 2)))).view(shape)


class KeypointsGraph(nn.Module):
    """`Keypoints` for one sentence and several pictures."""

    def __init__(self, points: Keypoints) -> None:
        super().__init__()
        self.film, self.conv, self.value, self.out, self.loud = points.film, points.conv, points.value, points.out, points.loud

    def forward(self, mid: Tensor, sentence: Tensor) -> Tensor:
        """`mid` (C, c, h, w), `sentence` (1, d) -> (C, d)."""
        if self.loud:
            sentence = F.rms_norm(sentence, sentence.shape[-1:])
        scale, shift = self.film(sentence)[:, :, None, None].chunk(2, dim=1)
        modulated = torch.relu(mid * (1 + scale) + shift)
        h, w = mid.shape[-2:]
        weights = self.conv(modulated).flatten(2).softmax(-1)
        places = weights @ coordinates(h, w, torch.device("cpu")).flatten(1).T.contiguous()
        values = (weights * self.value(modulated).flatten(2)).sum(-1)
        return self.out(torch.cat([places.flatten(1), values], dim=-1))


# ------------------------------------------------------------------------------------------------------------ towers


def make_eye(net: StudentNet) -> nn.Module:
    """What turns bytes (C, s, s, 3) and the sentence into tokens (C, P, d) and the fine map."""
    if isinstance(net.tower, ConvTower):
        return PatchEye(net) if net.tower.linear and net.tower.learner is None else ConvEye(net)
    return Eye(net)


class Eye(nn.Module):
    """Any tower as it is."""

    def __init__(self, net: StudentNet) -> None:
        super().__init__()
        self.tower, self.projector, self.positions = net.tower, net.projector, net.patch_positions
        size = net.config.image_size
        self.grid: Tensor
        self.register_buffer("grid", coordinates(size, size, torch.device("cpu")))

    def forward(self, images: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        pixels = images.permute(0, 3, 1, 2).float() * (2.0 / 255.0) - 1.0
        mid, patches = self.tower(pixels, self.grid, sentence)
        return self.projector(patches) + self.positions, mid


class FirstConv(nn.Module):
    """A convolution over pixels and coordinates as one over bytes, and a map: what scale, shift, coordinates and bias add up to.

    The map is made by the convolution itself from a black picture, so that it is right at the border, where padding is.
    """

    def __init__(self, conv: nn.Conv2d, size: int) -> None:
        super().__init__()
        black = torch.cat([-torch.ones(3, size, size), coordinates(size, size, torch.device("cpu"))])[None]
        self.offset: Tensor
        self.register_buffer("offset", conv(black).detach())
        self.conv = nn.Conv2d(3, conv.out_channels, cast(Any, conv.kernel_size), cast(Any, conv.stride),
                              cast(Any, conv.padding), bias=False)  # fmt: skip
        self.conv.weight = nn.Parameter(conv.weight.detach()[:, :3] * (2.0 / 255.0), requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(C, 3, s, s) in 0..255 -> (C, c, h, w)."""
        return self.conv(pixels) + self.offset


class ConvEye(nn.Module):
    """`ConvTower`, its first convolution over bytes."""

    def __init__(self, net: StudentNet) -> None:
        super().__init__()
        tower, size = cast(ConvTower, net.tower), net.config.image_size
        self.early = _first_over_bytes(tower, size)
        self.late = FirstConv(cast(nn.Conv2d, tower.late), size) if tower.linear else tower.late
        self.linear, self.learner = tower.linear, tower.learner
        self.projector, self.positions = net.projector, net.patch_positions

    def forward(self, images: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        pixels = images.permute(0, 3, 1, 2).float()
        mid = self.early(pixels)
        patches = self.late(pixels if self.linear else mid)
        patches = patches.flatten(2).transpose(1, 2) if self.learner is None else self.learner(patches)
        return self.projector(patches) + self.positions, mid


class PatchEye(nn.Module):
    """The linear tower: patch embedding, projector and positions are one matrix over a patch's bytes, and one map."""

    def __init__(self, net: StudentNet) -> None:
        super().__init__()
        tower, size = cast(ConvTower, net.tower), net.config.image_size
        self.early = _first_over_bytes(tower, size)
        first = FirstConv(cast(nn.Conv2d, tower.late), size)
        weight, projector = first.conv.weight.detach(), net.projector
        self.patch, self.side = net.config.patch, size // net.config.patch
        joined = projector.weight.detach().double() @ weight.permute(0, 2, 3, 1).reshape(len(weight), -1).double()
        self.embed = _linear(joined.float(), None)
        self.offset: Tensor
        self.register_buffer("offset", (projector(first.offset.flatten(2).transpose(1, 2)) + net.patch_positions).detach())

    def forward(self, images: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        n, p = self.side, self.patch
        rows = images.view(-1, n, p, n, p * 3).transpose(2, 3).reshape(-1, p * p * 3).float()
        tokens = self.embed(rows).view(-1, n * n, self.offset.shape[-1]) + self.offset
        return tokens, self.early(images.permute(0, 3, 1, 2).float())


def _first_over_bytes(tower: ConvTower, size: int) -> nn.Sequential:
    first, *rest = tower.early
    return nn.Sequential(FirstConv(cast(nn.Conv2d, first), size), *rest)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
