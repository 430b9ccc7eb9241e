"""Two parts of a nano teacher as graphs: its vision tower, and one step of its decoding with a key/value cache.

    vision.onnx   images (C, s, s, 3) uint8, slots (C,) int64, sentence (1, d): the mean of the words' embeddings
                  -> tokens (C, P, d), as they stand in the sentence
    decode.onnx   ids (1,) int64: what was said last; position (1,) int64; keys and values (layers, heads, T, d / heads)
                  -> logits (1, K) over the codec's symbols; keys and values with T + 1

Reading the prefix, and who says what when, stay with the policy: a teacher on a robot is a student's job.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from vla.backbones.nano import NanoVLM, coordinates
from vla.errors import CheckpointError, UsageError
from vla.export.folder import seal, whole_folder
from vla.export.onnx import OPSET, TOLERANCE, check_opset, noise, open_graph, require_onnx, trace
from vla.policy import VLAPolicy


class VisionGraph(nn.Module):
    """Pictures of one sentence -> their tokens, places in the picture and camera included."""

    def __init__(self, model: NanoVLM) -> None:
        super().__init__()
        self.tower, self.projector, self.keypoints = model.tower, model.projector, model.keypoints
        self.patches, self.cameras = model.patch_positions, model.camera_positions
        size = model.config.image_size
        self.grid: Tensor
        self.register_buffer("grid", coordinates(size, size, torch.device("cpu")))

    def forward(self, images: Tensor, slots: Tensor, sentence: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float() * (2.0 / 255.0) - 1.0
        mid, patches = self.tower(torch.cat([pixels, self.grid.expand(pixels.shape[0], -1, -1, -1)], dim=1))
        tokens = self.projector(patches.transpose(1, 2)) + self.patches + self.cameras[slots][:, None]
        if self.keypoints is None:
            return tokens
        return torch.cat([tokens, self.keypoints(mid, sentence)[:, None]], dim=1)


class DecodeGraph(nn.Module):
    """One symbol after the others: Llama's layers for one position, the cache handed in and out."""

    def __init__(self, policy: VLAPolicy) -> None:
        super().__init__()
        model = cast(NanoVLM, policy.model)
        text, ids = model.config.text_config, model.config.ids
        self.shared = text.num_attention_heads // cast(int, text.num_key_value_heads)
        self.embed, self.norm = model.language_model.embed_tokens, model.language_model.norm
        self.layers = model.language_model.layers
        rows = model.lm_head.weight.detach()[ids.symbols.start : ids.symbols.stop].clone()
        self.head, self.turns = nn.Parameter(rows, requires_grad=False), model.language_model.rotary_emb.inv_freq

    def forward(self, ids: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angles = (position.float()[:, None] * self.turns).repeat(1, 2)  # (1, d / heads)
        cos, sin = angles.cos(), angles.sin()
        x, kept_keys, kept_values = self.embed(ids), [], []
        for i, layer in enumerate(self.layers):
            layer = cast(Any, layer)
            h, attention = layer.input_layernorm(x), layer.self_attn
            q, k, v = (p(h).view(-1, 1, len(self.turns) * 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            q, k = q * cos + _half(q) * sin, k * cos + _half(k) * sin  # (heads, 1, d / heads)
            k, v = torch.cat([keys[i], k], dim=1), torch.cat([values[i], v], dim=1)
            kept_keys.append(k)
            kept_values.append(v)
            every_k, every_v = (t.repeat_interleave(self.shared, 0) if self.shared > 1 else t for t in (k, v))
            weights = (q @ every_k.transpose(1, 2) * attention.scaling).softmax(-1)
            x = x + attention.o_proj((weights @ every_v).reshape(1, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.norm(x) @ self.head.T, torch.stack(kept_keys), torch.stack(kept_values)


def _half(x: Tensor) -> Tensor:
    """Llama's rotation partner: (x1, x2) -> (-x2, x1)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def check_nano(policy: VLAPolicy) -> NanoVLM:
    """Raises `UsageError` saying what of another policy is not possible."""
    config, no = policy.config, []
    if not isinstance(policy.model, NanoVLM):
        no.append(f"a {config.backbone.kind} backbone: its towers and its cache are another library's, of many forms")
    if config.decoding != "autoregressive":
        no.append("parallel decoding: there is no step to export")
    if policy.adapter is not None:
        no.append("an adapter: merge it first")
    if no:
        raise UsageError("--parts", found="; ".join(no), expected="an autoregressive nano policy",
                         fix="export a student whole (without --parts); distil others into one (vla distill)")  # fmt: skip
    return cast(NanoVLM, policy.model)


@torch.inference_mode()
def export_parts(policy: VLAPolicy, folder: Path, opset: int = OPSET) -> dict[str, Any]:
    """Write vision.onnx and decode.onnx into the new folder `folder`, each compared with the policy; returns export.json.

    Raises `UsageError` for other policies, `CheckpointError` for a graph that does something else.
    """
    model = check_nano(policy)
    check_opset(opset)
    require_onnx()
    policy = policy.eval()
    with whole_folder(folder) as temporary:
        text, size, d = model.config.text_config, model.config.image_size, model.hidden_size
        cameras, length = torch.export.Dim("cameras", min=1, max=model.max_cameras), torch.export.Dim("read", min=1, max=8192)
        trace(VisionGraph(model), {"images": torch.zeros(2, size, size, 3, dtype=torch.uint8), "slots": torch.arange(2),
                                   "sentence": torch.ones(1, d)}, ["tokens"],
              {"images": {0: cameras}, "slots": {0: cameras}, "sentence": None}, temporary / "vision.onnx", opset)  # fmt: skip
        cache = torch.zeros(text.num_hidden_layers, cast(int, text.num_key_value_heads), 5, d // text.num_attention_heads)
        said = {"ids": torch.zeros(1, dtype=torch.long), "position": torch.full((1,), 5), "keys": cache, "values": cache + 1}
        shapes = {"ids": None, "position": None, "keys": {2: length}, "values": {2: length}}
        trace(DecodeGraph(policy), said, ["logits", "keys_after", "values_after"], shapes, temporary / "decode.onnx", opset)
        differences = _compare(policy, temporary)
        meaning = {"format": 1, "parts": True, "opset": opset, "policy": policy.fingerprint, "differences": differences,
                   "graphs": {"vision": "vision.onnx", "decode": "decode.onnx"}, "codec": policy.codec.to_json(),
                   "ids": {"symbols": model.config.ids.symbols.start, "act": model.config.ids.act}}  # fmt: skip
        seal(temporary, meaning)
    return meaning


def _compare(policy: VLAPolicy, folder: Path) -> dict[str, float]:
    """Largest difference of each graph's output from the policy's own, on noise, three symbols deep."""
    model, robot = cast(NanoVLM, policy.model), next(iter(policy.embodiments))
    batch = policy.collate([policy.encoder.observation(noise(policy, robot, 0), (policy.instructions or ["go"])[0], robot)])
    ids = batch.ids
    embedded = model.embed(ids, batch.images, batch.state, batch.slots, batch.robot)
    words = ids < model.config.text_vocab_size
    if not model.config.steered_by_words:
        words |= ids == model.config.special_id("soft")
    plain = model.embed(ids, None, None, None, batch.robot)
    sentence = (plain * words[..., None]).sum(1) / words.sum(-1, keepdim=True).clamp(min=1)
    wanted = embedded[ids == model.config.special_id("image")]
    feed = {"images": np.ascontiguousarray(batch.images.permute(0, 2, 3, 1).numpy()), "slots": batch.slots.numpy(),
            "sentence": sentence.numpy()}  # fmt: skip
    tokens = open_graph(folder / "vision.onnx").run(None, feed)[0]
    found = {"vision": float(np.abs(tokens.reshape(wanted.shape) - wanted.numpy()).max())}

    start, cache = torch.full((1, 1), policy.writer.ids.act), DynamicCache()
    mask, positions = policy.attention(batch, 4)
    T = ids.shape[1] + 1
    hidden = model.hidden(torch.cat([ids, start], 1), batch.images, batch.state, slots=batch.slots, robots=batch.robot,
                          attention_mask=mask[:, :, :T, :T], position_ids=positions[..., :T], past_key_values=cache,
                          use_cache=True).last_hidden_state  # fmt: skip
    assert hidden is not None
    symbols, step = model.symbol_logits(hidden[:, -1:]).argmax(-1), open_graph(folder / "decode.onnx")
    keys, values = (np.stack([getattr(layer, side)[0].numpy() for layer in cache.layers]) for side in ("keys", "values"))
    found["decode"] = 0.0
    for i in range(3):
        said = policy.writer.ids.of_symbols(symbols)
        logits, keys, values = step.run(None, {"ids": said[0].numpy(), "position": positions[0, T + i : T + i + 1].numpy(),
                                               "keys": keys, "values": values})  # fmt: skip
        hidden = model.hidden(said, attention_mask=mask[:, :, T + i : T + i + 1, : T + i + 1],
                              position_ids=positions[..., T + i : T + i + 1], past_key_values=cache,
                              use_cache=True).last_hidden_state  # fmt: skip
        assert hidden is not None
        own = model.symbol_logits(hidden)[0]
        found["decode"] = max(found["decode"], float(np.abs(logits - own.numpy()).max()))
        symbols = own.argmax(-1)[None]
    for name, difference in found.items():
        if not difference < TOLERANCE:
            raise CheckpointError(f"{name}.onnx", found=f"{difference:.2e} off", expected=f"the policy's own to {TOLERANCE}",
                                  fix="nothing was published; try another --opset")  # fmt: skip
    return found
