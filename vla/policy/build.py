"""A fresh policy for the robots, sentences and statistics of a mixture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla.actions import BinCodec
from vla.backbones import NanoVLM, NanoVLMConfig, build_tokenizer
from vla.mixture import Mixture
from vla.normalize import Normalizer, Stats
from vla.policy.config import NormalizationConfig, PolicyConfig
from vla.policy.model import VLAPolicy
from vla.prompt import PROMPTS, act_prompt


def build_policy(config: PolicyConfig, mixture: Mixture) -> VLAPolicy:
    """A fresh policy for the robots, sentences and statistics of `mixture`. Draws from torch's global generator."""
    embodiments = mixture.embodiments
    codec = BinCodec(config.codec.bins, config.codec.variant)
    sentences = sorted({text for store in mixture.stores for text in store.instructions})
    corpus = [act_prompt(text, version) for text in sentences for version in PROMPTS]
    tokenizer = build_tokenizer(corpus, config.backbone.text_vocab)
    A = max(spec.action_dim for spec in embodiments.values())
    S = max(spec.state_dim for spec in embodiments.values())
    nano = config.backbone
    model = NanoVLM(NanoVLMConfig(
        text_config=dict(hidden_size=nano.hidden, num_hidden_layers=nano.layers, num_attention_heads=nano.heads,
                         num_key_value_heads=nano.heads, intermediate_size=nano.mlp),
        text_vocab_size=nano.text_vocab, num_slots=config.chunk * A, num_symbols=codec.size,
        image_size=nano.image_size, tower_channels=nano.tower_channels, keypoints=nano.keypoints, state_dim=S,
    ))  # fmt: skip
    model.set_attn_implementation("eager")  # SDPA's backward is slow for ~60 tokens on a CPU
    normalizers = {name: _normalizers(name, mixture, config.normalization) for name in embodiments}
    seeds: dict[str, dict[str, list[list[int]]]] = {}
    for store in mixture.stores:
        for task, numbers in store.recorded_seeds.items():
            ranges = seeds.setdefault(store.suite or store.spec.name, {}).setdefault(task, [])
            ranges += _ranges(numbers)
    datasets = [{"path": str(s.root), "robot": s.spec.name, "fingerprint": s.fingerprint, "episodes": s.num_episodes,
                 "frames": s.num_frames} for s in mixture.stores]  # fmt: skip
    provenance = {"datasets": datasets, "recorded_seeds": seeds, "instructions": sentences}
    return VLAPolicy(config, model, tokenizer, embodiments, normalizers, codec, provenance)


def _normalizers(robot: str, mixture: Mixture, config: NormalizationConfig) -> dict[str, Normalizer]:
    """Statistics of one robot: its dataset's own; recomputed exactly from the columns when it has several datasets."""
    stores = [store for store in mixture.stores if store.spec.name == robot]
    made = {}
    for part, feature in (("action", "action"), ("state", "observation.state")):
        where = f"{stores[0].root}/meta/stats.json: {feature}"
        if len(stores) == 1:
            stats = Stats.from_json(stores[0].stats[feature], where)
        else:
            stats = Stats.of(np.concatenate([getattr(store, part) for store in stores]))
        made[part] = Normalizer(stats, getattr(config, part), where=where)
    return made


def _ranges(numbers: Sequence[int]) -> list[list[int]]:
    """[1, 2, 3, 7] -> [[1, 3], [7, 7]]."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges
