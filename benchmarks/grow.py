"""A larger nano policy that begins as a smaller one: how the 34 M teacher of `configs/distill/` comes to see in minutes.

    python benchmarks/grow.py models/nano-base --mixture configs/train/teacher.yaml --out runs/teacher-start

Function-preserving growth (Net2Net, Chen et al. 2016; bert2BERT, Chen et al. 2022): the small model's numbers in the first rows
and columns, new numbers where they read what is not written yet, zeros where they would write. New layers begin as the identity.
An RMS norm over twice the width halves what it divides by, which the norms' weights take back. Only robots of the config's
mixture are kept, and its action and state dimensions, so what is preserved are tower, keypoints, words and layers; what the
larger one says with them (one symbol after the other, as the config asks) is trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from vla.backbones.nano_processor import NanoWriter
from vla.config import load_config
from vla.mixture import open_mixture
from vla.policy import PolicyConfig, VLAPolicy, build_policy, load_policy, save_policy
from vla.policy.build import normalizers_of
from vla.train import TrainConfig


def put(new: Tensor, old: Tensor, *, keep_rows: bool = False, keep_columns: bool = False) -> None:
    """`old` into the first rows and columns of `new`. Further rows become zero unless they may write (`keep_rows`); further
    columns of the old rows become zero unless what they read is zero now (`keep_columns`)."""
    rows, columns = old.shape
    if not keep_rows:
        new[rows:] = 0
    if not keep_columns:
        new[:rows, columns:] = 0
    new[:rows, :columns] = old


def mlp(new: nn.Module, old: nn.Module, reads_stream: bool = False, scale: float = 1.0) -> None:
    """Linear, ReLU, Linear: hidden units may be new, what is written to the stream is not."""
    (first, last), (was_first, was_last) = ([m for m in x if isinstance(m, nn.Linear)] for x in (new, old))  # pyright: ignore
    put(first.weight, was_first.weight * scale, keep_rows=True, keep_columns=reads_stream)
    first.bias[: len(was_first.bias)] = was_first.bias
    put(last.weight, was_last.weight)
    last.bias.zero_()
    last.bias[: len(was_last.bias)] = was_last.bias


@torch.no_grad()
def grow(base: VLAPolicy, config: PolicyConfig, mixture) -> VLAPolicy:
    """A fresh policy for `mixture` with `base` inside."""
    known = {}
    for key in mixture.embodiments:
        theirs = normalizers_of(key, mixture, config.normalization)
        known[key] = {part: one.completed(theirs[part]) for part, one in base.normalizers[key].items()}
    torch.manual_seed(0)
    policy = build_policy(config, mixture, known)
    old, new = base.model.float(), policy.model
    d, D = old.hidden_size, new.hidden_size
    ratio = (d / D) ** 0.5  # an RMS norm over D numbers of which d are not zero
    policy.writer = policy.encoder.writer = NanoWriter(new.config, base.writer.tokenizer, config.state == "token", True)
    new.tower.load_state_dict(old.tower.state_dict())
    for part in ("conv", "value"):
        getattr(new.keypoints, part).load_state_dict(getattr(old.keypoints, part).state_dict())
    mlp(new.keypoints.film, old.keypoints.film, reads_stream=True, scale=ratio)
    mlp(new.keypoints.out, old.keypoints.out)
    mlp(new.projector, old.projector)
    first = old.state_in[0]
    narrowed = nn.Sequential(nn.Linear(new.state_dim, d), nn.ReLU(), old.state_in[2])
    narrowed[0].weight.copy_(first.weight[:, : new.state_dim])
    narrowed[0].bias.copy_(first.bias)
    mlp(new.state_in, narrowed)
    for name in ("patch_positions", "camera_positions"):
        put(getattr(new, name), getattr(old, name))
    tokens, rows = config.soft_tokens, [list(base.embodiments).index(key) for key in mixture.embodiments]
    put(new.robots.weight.view(-1, D), old.robots.weight[rows].view(len(rows) * tokens, d))
    # The same words, control ids and symbols; of the slots those of the dimensions there still are.
    a, A, N = policy.encoder.action_dim, base.encoder.action_dim, new.num_slots
    words = new.config.slot_ids.start
    slots = [words + h * A + i for h in range(policy.chunk) for i in range(a)]
    symbols = old.config.action_ids
    at = [*range(words), *slots, *range(symbols.start, symbols.stop)]
    assert len(at) == new.config.text_config.vocab_size and N == len(slots)
    embed = new.language_model.embed_tokens.weight
    put(embed, old.language_model.embed_tokens.weight[at])
    put(new.lm_head.weight, old.lm_head.weight[at], keep_columns=True)
    for i, layer in enumerate(new.language_model.layers):
        if i >= len(old.language_model.layers):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            continue
        was = old.language_model.layers[i]
        for name in ("input_layernorm", "post_attention_layernorm"):
            _norm(getattr(layer, name).weight, getattr(was, name).weight, ratio)
        for name in ("q_proj", "k_proj", "v_proj"):
            put(getattr(layer.self_attn, name).weight, getattr(was.self_attn, name).weight, keep_rows=True, keep_columns=True)
        for name in ("gate_proj", "up_proj"):
            put(getattr(layer.mlp, name).weight, getattr(was.mlp, name).weight, keep_rows=True, keep_columns=True)
        put(layer.self_attn.o_proj.weight, was.self_attn.o_proj.weight)
        put(layer.mlp.down_proj.weight, was.mlp.down_proj.weight)
    _norm(new.language_model.norm.weight, old.language_model.norm.weight, ratio)
    end = base.end_head
    assert end is not None and policy.end_head is not None
    fewer = nn.Sequential(end[0], nn.ReLU(), nn.Linear(d, new.state_dim))
    fewer[2].weight.copy_(end[2].weight[: new.state_dim])
    fewer[2].bias.copy_(end[2].bias[: new.state_dim])
    mlp(policy.end_head, fewer, reads_stream=True)
    policy.provenance["grown_from"] = {"fingerprint": base.fingerprint, "parameters": sum(p.numel() for p in base.parameters())}
    return policy.eval()


def _norm(new: Tensor, old: Tensor, ratio: float) -> None:
    new.fill_(ratio)
    new[: len(old)] = old * ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--mixture", required=True, help="a training config, for its datasets")
    parser.add_argument("--out", type=Path, required=True)
    for name, value in {"hidden": 512, "layers": 9, "heads": 8, "mlp": 1536}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    base = load_policy(args.base, "cpu")
    sizes = {name: getattr(args, name) for name in ("hidden", "layers", "heads", "mlp")}
    changed = {"backbone": base.config.backbone.model_dump() | sizes, "decoding": "autoregressive", "action_dim": None,
               "state_dim": None}  # fmt: skip
    config = PolicyConfig.model_validate(base.config.model_dump() | changed)
    mixture, _ = open_mixture(load_config(args.mixture, [], TrainConfig).mixture, config.chunk, 0)
    policy = grow(base, config, mixture)
    window = mixture.window_at(0, 0, 0)
    seen, ends = {"images": window.images, "state": window.state}, []
    for p in (base, policy):  # the end query reads pictures, words, robot and state through all layers
        batch = p.collate([p.encoder.observation(seen, window.instruction, window.embodiment)])
        out = p.model.hidden(batch.ids, batch.images, batch.state, slots=batch.slots, robots=batch.robot).last_hidden_state
        assert p.end_head is not None
        ends.append(p.end_head(out[:, -1])[0, : window.state.shape[0]].detach())
    off = float((ends[0] - ends[1]).abs().max())
    assert off < 1e-3, f"not preserved: the end of the episode is told {off} apart"
    save_policy(policy, args.out)
    print(f"{sum(p.numel() for p in policy.parameters()) / 1e6:.1f} M parameters around "
          f"{sum(p.numel() for p in base.parameters()) / 1e6:.1f} M, told apart by {off:.1e}: {args.out}")  # fmt: skip


if __name__ == "__main__":
    main()
