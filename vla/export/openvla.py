"""OpenVLA's layout: `vla export POLICY --to openvla --out DIR`.

config.json, safetensors in shards, tokenizer, preprocessor and statistics as OpenVLA's own checkpoints have them, for
vLLM's native class and OpenVLA's client code. `auto_map`, by which the original asks transformers to run code beside the weights,
is left out: who wants that code adds it knowingly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vla.backbones.config import PrismaticConfig
from vla.errors import UsageError
from vla.export.folder import whole_folder
from vla.normalize import Normalizer
from vla.policy import VLAPolicy

_KEPT = ("vision_backbone_id", "llm_backbone_id", "arch_specifier", "image_resize_strategy", "hf_llm_id", "llm_max_length",
         "output_projector_states", "n_action_bins")  # fmt: skip
_STATISTICS = ("mean", "std", "max", "min", "q01", "q99")
_NOT_SIZES = ("architectures", "transformers_version", "_name_or_path", "dtype")


def export_openvla(policy: VLAPolicy, folder: Path, shard_bytes: int | None = None) -> Path:
    """Write a Prismatic policy into the new folder `folder` in OpenVLA's layout; returns it.

    Reading it again (`read_openvla`) gives the same weights to the bit and the same statistics. Raises `UsageError` naming all
    that OpenVLA's layout has no place for, and for a folder that is not empty.
    """
    from vla.backbones.prismatic_files import SHARD_BYTES, weights_of, write_weights

    _check_openvla(policy)
    stats = statistics_of(policy)
    with whole_folder(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(openvla_config(policy, stats), indent=2))
        (temporary / "dataset_statistics.json").write_text(json.dumps(stats, indent=2))
        policy.writer.save_pretrained(temporary)
        write_weights(weights_of(policy.model), temporary, shard_bytes or SHARD_BYTES)
    return folder


def _check_openvla(policy: VLAPolicy) -> None:
    config, no = policy.config, []
    if not isinstance(config.backbone, PrismaticConfig):
        no.append(f"a {config.backbone.kind} backbone")
    codec = policy.codec.to_json()
    for name, found, wanted in (
        ("policy.decoding", config.decoding, "autoregressive"), ("policy.head", config.head, "symbols"),
        ("policy.chunk", config.chunk, 1), ("policy.codec", (codec["kind"], codec.get("variant")), ("bins", "openvla")),
        ("policy.state", config.state, "none"), ("policy.soft_tokens", config.soft_tokens, 0),
        ("policy.end_weight", config.end_weight, 0), ("policy.prompt", config.prompt.startswith("openvla"), True),
        ("policy.normalization.action", config.normalization.action, "q99"),
    ):  # fmt: skip
        if found != wanted:
            no.append(f"{name}: {getattr(config, name.split('.')[1], found)}")
    no += [f"{key}: {len(spec.cameras)} cameras" for key, spec in policy.embodiments.items() if len(spec.cameras) != 1]
    if not no and policy.model.config.film:
        no.append("FiLM")
    if no:
        raise UsageError("--to openvla", found=", ".join(no),
                         expected="what OpenVLA's layout says: a Prismatic model, a picture and an instruction in, one "
                         "action of bins out, symbol by symbol",
                         fix="fine-tune with OpenVLA's settings for what is named above, or keep the policy folder")  # fmt: skip


def openvla_config(policy: VLAPolicy, stats: dict[str, dict]) -> dict[str, Any]:
    """config.json, without `auto_map`."""
    own = policy.model.config
    text = {k: v for k, v in own.text_config.to_dict().items() if k not in _NOT_SIZES and v is not None}
    rope = text.get("rope_parameters") or {}
    if "rope_theta" in rope:
        text["rope_theta"] = rope["rope_theta"]  # where transformers 4 looks for it
    dtype = str(policy.dtype).removeprefix("torch.")
    towers = {"timm_model_ids": own.timm_model_ids, "timm_override_act_layers": own.timm_override_act_layers,
              "image_sizes": own.image_sizes, "use_fused_vision_backbone": len(own.timm_model_ids) > 1}  # fmt: skip
    towers |= {"tower_args": own.tower_args} if own.tower_args else {}  # only for sizes timm does not know
    kept = {k: getattr(own, k) for k in _KEPT if getattr(own, k, None) is not None}
    return {
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla", **kept, **towers,
        "image_resize_strategy": "resize-naive", "n_action_bins": policy.codec.size, "pad_token_id": own.pad_token_id,
        "pad_to_multiple_of": own.pad_to_multiple_of, "torch_dtype": dtype,
        "text_config": {**text, "torch_dtype": dtype}, "norm_stats": stats,
    }  # fmt: skip


def statistics_of(policy: VLAPolicy) -> dict[str, dict]:
    """`norm_stats`: dataset -> statistics, as OpenVLA writes them."""
    counted = {d["robot"]: d for d in policy.provenance.get("datasets", [])}
    other = policy.provenance.get("openvla", {})
    stats = {}
    for key, parts in policy.normalizers.items():
        action = _block(parts["action"]) | {"mask": parts["action"].mask.tolist()}
        zeros = {name: [0.0] * parts["action"].dims for name in _STATISTICS}
        stats[key] = {
            "action": action, "proprio": zeros, **other.get(key, {}),
            "num_transitions": parts["action"].stats.count, "num_trajectories": counted.get(key, {}).get("episodes", 0),
        }  # fmt: skip
    return stats


def _block(normalizer: Normalizer) -> dict[str, list[float]]:
    return {name: normalizer.stats.values[name].tolist() for name in _STATISTICS if name in normalizer.stats.values}
