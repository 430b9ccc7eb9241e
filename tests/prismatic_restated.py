"""OpenVLA and OpenVLA-OFT once more, from the tensors of a checkpoint alone: plain torch, no timm, no transformers, no `vla`.

Written from the description of the checkpoint's layout. What `vla.backbones.prismatic` computes must equal this.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torchvision.transforms.functional as TVF
from PIL import Image
from torch import Tensor

Weights = dict[str, Tensor]
MEANS = {"dino": [0.485, 0.456, 0.406], "siglip": [0.5, 0.5, 0.5]}
STDS = {"dino": [0.229, 0.224, 0.225], "siglip": [0.5, 0.5, 0.5]}
EPS = 1e-6


def dense(t: Weights, name: str, x: Tensor) -> Tensor:
    return x @ t[f"{name}.weight"].T + (t[f"{name}.bias"] if f"{name}.bias" in t else 0)


def layer_norm(t: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]


def rms_norm(t: Weights, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * t[f"{name}.weight"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """(heads, T, d) each."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)).softmax(-1) @ v


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.reshape(len(x), heads, -1).transpose(0, 1)


def joined(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


def tower(t: Weights, prefix: str, pixels: Tensor, heads: int, film: Weights | None, sentence: Tensor | None) -> Tensor:
    """(3, s, s) -> (patches, width): the second-to-last block's output, prefix tokens dropped."""
    kernel = t[f"{prefix}patch_embed.proj.weight"]
    size = kernel.shape[-1]
    rows = [pixels[:, y : y + size, x : x + size].flatten() for y in range(0, pixels.shape[1], size)
            for x in range(0, pixels.shape[2], size)]  # fmt: skip
    x = torch.stack(rows) @ kernel.flatten(1).T + t[f"{prefix}patch_embed.proj.bias"] + t[f"{prefix}pos_embed"][0]
    before = [t[f"{prefix}{name}"][0] for name in ("cls_token", "reg_token") if f"{prefix}{name}" in t]
    x, dropped = torch.cat([*before, x]), sum(len(b) for b in before)
    depth = 1 + max(int(name.removeprefix(f"{prefix}blocks.").split(".")[0]) for name in t if name.startswith(f"{prefix}blocks."))
    for i in range(depth - 1):
        at = f"{prefix}blocks.{i}."
        q, k, v = (heads_of(part, heads) for part in dense(t, f"{at}attn.qkv", layer_norm(t, f"{at}norm1", x)).chunk(3, -1))
        x = x + dense(t, f"{at}attn.proj", joined(attend(q, k, v))) * t.get(f"{at}ls1.scale_factor", 1.0)
        if film is not None and sentence is not None:
            x = x * (1 + dense(film, f"{at}scale", sentence)) + dense(film, f"{at}shift", sentence)
        inner = gelu(dense(t, f"{at}mlp.fc1", layer_norm(t, f"{at}norm2", x)))
        x = x + dense(t, f"{at}mlp.fc2", inner) * t.get(f"{at}ls2.scale_factor", 1.0)
    return x[dropped:]


def see(t: Weights, frame: np.ndarray, side: int, kinds: list[str], heads: int, film: Weights | None = None,
        sentence: Tensor | None = None) -> Tensor:  # fmt: skip
    """A camera's frame (h, w, 3) uint8 -> (patches, d): resized naively, normalised for each tower, projected."""
    small = TVF.resize(Image.fromarray(frame), [side, side], TVF.InterpolationMode.BICUBIC, antialias=True)  # pyright: ignore
    parts = []
    for kind, name in zip(kinds, ("featurizer", "fused_featurizer"), strict=False):
        pixels = TVF.normalize(TVF.to_tensor(small), MEANS[kind], STDS[kind])  # pyright: ignore
        parts.append(tower(t, f"vision_backbone.{name}.", pixels, heads, film, sentence))
    x = torch.cat(parts, -1)
    x = dense(t, "projector.fc2", gelu(dense(t, "projector.fc1", x)))
    return dense(t, "projector.fc3", gelu(x)) if "projector.fc3.weight" in t else x


def rotate(x: Tensor) -> Tensor:
    """Rotary positions of (heads, T, d), halves paired as Llama's checkpoints pair them."""
    T, d = x.shape[1:]
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def llama(t: Weights, x: Tensor, heads: int, causal: bool = True) -> Tensor:
    """Embeddings (T, d) -> hidden states (T, d), final norm included."""
    p = "language_model.model."
    allowed = torch.ones(len(x), len(x), dtype=torch.bool).tril() if causal else None
    layers = 1 + max(int(name.removeprefix(f"{p}layers.").split(".")[0]) for name in t if name.startswith(f"{p}layers."))
    for i in range(layers):
        at = f"{p}layers.{i}."
        y = rms_norm(t, f"{at}input_layernorm", x)
        q, k, v = (heads_of(dense(t, f"{at}self_attn.{n}_proj", y), heads) for n in "qkv")
        x = x + dense(t, f"{at}self_attn.o_proj", joined(attend(rotate(q), rotate(k), v, allowed)))
        y = rms_norm(t, f"{at}post_attention_layernorm", x)
        gate = dense(t, f"{at}mlp.gate_proj", y)
        x = x + dense(t, f"{at}mlp.down_proj", gate * torch.sigmoid(gate) * dense(t, f"{at}mlp.up_proj", y))
    return rms_norm(t, f"{p}norm", x)


def openvla(t: Weights, patches: Tensor, ids: list[int], heads: int, vocab: int, n: int = 7) -> tuple[Tensor, list[int]]:
    """Logits (n, padded vocabulary) and n action ids, greedily among the last 256 of `vocab`; `ids` end in the empty piece."""
    table, said, logits = t["language_model.model.embed_tokens.weight"], list(ids), []
    for _ in range(n):
        words = table[torch.tensor(said)]
        hidden = llama(t, torch.cat([words[:1], patches, words[1:]]), heads)
        logits.append(dense(t, "language_model.lm_head", hidden[-1]))
        said.append(vocab - 256 + int(logits[-1][vocab - 256 : vocab].argmax()))
    return torch.stack(logits), said[len(ids) :]


def oft_hidden(t: Weights, seen: Tensor, ids: list[int], heads: int, n: int) -> Tensor:
    """Hidden states (n, d) of OFT's action positions: zero embeddings, everything reads everything, one place to the left."""
    table = t["language_model.model.embed_tokens.weight"]
    words, end = table[torch.tensor(ids)], table[2][None]
    hidden = llama(t, torch.cat([words[:1], seen, words[1:], torch.zeros(n, table.shape[1]), end]), heads, causal=False)
    start = len(seen) + len(ids) - 1
    return hidden[start : start + n]


def action_head(t: Weights, hidden: Tensor, dims: int) -> Tensor:
    """(K * D, d) -> (K, D): `L1RegressionActionHead`, its LayerNorms with torch's own epsilon."""

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]

    x = hidden.reshape(len(hidden) // dims, -1)
    x = dense(t, "model.fc1", norm("model.layer_norm1", x)).relu()
    for i in range(2):
        at = f"model.mlp_resnet_blocks.{i}.ffn."
        x = x + dense(t, f"{at}1", norm(f"{at}0", x)).relu()
    return dense(t, "model.fc2", norm("model.layer_norm2", x))
