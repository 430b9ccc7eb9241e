"""Pruned teachers: the teacher's own tower, words and heads, and only some layers of its language model, to be distilled again.

For a robot with a GPU, where a small network of its own kind would throw away what the teacher knows. After Shallow-pi (2026),
which goes from 18 layers to 6 and wins the rest back by distillation: `prune_depth` keeps every k-th layer and always the first
and the last, numbers them anew, so caches and masks find their layer, and tells the model's config, so the result is an ordinary
policy folder of the teacher's kind. It is distilled from there (`start.policy`), whole or with an adapter, quantized or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vla.backbones.hf import HFBackbone
from vla.backbones.hf_probe import probe
from vla.errors import UsageError
from vla.policy import VLAPolicy
from vla.policy.quantized import quantize

_OWN_TABLES = ("hidden_size_per_layer_input", "num_kv_shared_layers")
"""Settings by which layers depend on which number they have, or on one another."""


def prune_depth(policy: VLAPolicy, every: int | None = None, keep: Sequence[int] | None = None) -> VLAPolicy:
    """`policy` with every `every`-th layer of its language model, or those of `keep` (from 0), the first and the last among them.

    Changes it in place and returns it; its provenance says what was pruned from which fingerprint. Raises `UsageError` for a
    policy that has no such layers, whose layers depend on one another, or of which nothing would be left out.
    """
    if policy.adapter is not None:
        raise UsageError("prune", found="an adapter", expected="a whole policy",
                         fix="merge it first: vla merge ADAPTER --out DIR")  # fmt: skip
    if policy.config.backbone.kind == "student":
        raise UsageError("prune", found="a student", expected="a policy with a language model: nano, hf or prismatic",
                         fix="choose fewer layers: policy.backbone.layers, or preset: xs")  # fmt: skip
    owner, layers = layers_of(policy)
    kept = _chosen(len(layers), every, keep)
    configs = _configs(policy, owner, len(layers))
    before = policy.fingerprint
    for config in configs:
        _shorten(config, kept, len(layers))
    owner.layers = nn.ModuleList(layers[i] for i in kept)
    numbered: list[tuple[int, Any]] = [(at, module) for at, layer in enumerate(owner.layers) for module in layer.modules()]
    for place, module in numbered:
        if hasattr(module, "layer_idx"):
            module.layer_idx = place
    if policy.config.backbone.kind == "nano":
        backbone = policy.config.backbone.model_copy(update={"layers": len(kept)})
        policy.config = policy.config.model_copy(update={"backbone": backbone})
    if isinstance(policy.model, HFBackbone):  # what was found out about the whole model is found out again
        policy.model.layers_changed()
        policy.model.habits = probe(policy.model, policy.writer, getattr(policy.config.backbone, "probe_image", True))
    earlier = policy.provenance.get("pruned", [])
    policy.provenance = policy.provenance | {"pruned": [*earlier, {"layers": len(layers), "kept": kept, "from": before}]}
    policy.saved_meaning = None  # it is another policy now
    return policy


def layers_of(policy: VLAPolicy) -> tuple[Any, nn.ModuleList]:
    """The module that owns the language model's layers, and the layers. Raises `UsageError` where there is not one such list."""
    model = policy.model
    inner, text = _inner(policy)
    count = text.num_hidden_layers
    language = tuple(prefix.removeprefix("vlm.") for prefix in model.parts["language"])
    found = []
    for name, module in inner.named_modules():
        layers = getattr(module, "layers", None)
        inside = f"{name}.layers".startswith(language)
        if inside and isinstance(layers, nn.ModuleList) and len(layers) == count:
            found.append((module, layers))
    if len(found) != 1:
        raise UsageError("prune", found=f"{len(found)} lists of {count} layers in a {type(inner).__name__}",
                         expected="one language model with its layers in a list `layers`",
                         fix="report this family; another backbone can be pruned")  # fmt: skip
    return found[0]


def _inner(policy: VLAPolicy) -> tuple[Any, Any]:
    """The vision-language model itself, and its language model's config."""
    model: Any = policy.model
    return (model.vlm, model.vlm.config.get_text_config()) if isinstance(model, HFBackbone) else (model, model.config.text_config)


def _chosen(count: int, every: int | None, keep: Sequence[int] | None) -> list[int]:
    if (every is None) == (keep is None):
        raise UsageError("prune", found="both every and keep" if every else "neither every nor keep", expected="one of them",
                         fix="--every 2")  # fmt: skip
    wanted = set(range(0, count, max(every, 1))) if every is not None else set(keep or ())
    if outside := sorted(i for i in wanted if not 0 <= i < count):
        raise UsageError("prune: keep", found=outside, expected=f"layers 0 to {count - 1}", fix="leave them out")
    kept = sorted(wanted | {0, count - 1})
    if len(kept) == count:
        raise UsageError("prune", found=f"every={every}, keep={keep} of {count} layers", expected="fewer layers than there are",
                         fix="--every 2" if count > 2 else "nothing: the first and the last stay")  # fmt: skip
    return kept


def _configs(policy: VLAPolicy, owner: Any, count: int) -> list[Any]:
    """Every object that says how many layers there are: a model may keep copies of its config."""
    found = [_inner(policy)[1], *(module.config for module in owner.modules() if hasattr(module, "config"))]
    found = list({id(c): c for c in found if getattr(c, "num_hidden_layers", None) == count}.values())
    for config in found:
        if tied := [name for name in _OWN_TABLES if getattr(config, name, None)]:
            raise UsageError("prune", found=f"a {config.model_type}, whose layers have {', '.join(tied)}",
                             expected="layers that do not depend on their number", fix="a family without it")  # fmt: skip
        if listed := [name for name, value in _about_layers(config).items() if value and len(value) != count]:
            raise UsageError("prune", found=f"a {config.model_type}, which counts layers in {', '.join(listed)}",
                             expected="layers that do not depend on their number", fix="a family without it")  # fmt: skip
    return found


def _about_layers(config: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if "layer" in name and isinstance(value, (list, tuple))}


def _shorten(config: Any, kept: list[int], count: int) -> None:
    """Tell `config` of the layers that are left, in place."""
    lists = {name: [value[i] for i in kept] for name, value in _about_layers(config).items() if len(value) == count}
    config.num_hidden_layers = len(kept)
    for name, value in lists.items():
        setattr(config, name, value)
    if getattr(config, "max_window_layers", None) is not None:  # Qwen: from this layer on windows slide, told by layer_types too
        config.max_window_layers = sum(i < config.max_window_layers for i in kept)


@torch.no_grad()
def quantize_weights(policy: VLAPolicy, how: str) -> VLAPolicy:
    """The language model's linear layers in 8 or 4 bits ("int8", "int4", by torchao), to act with; in place, and returned.

    Nothing of it can be saved: the folder holds the whole numbers. Raises `MachineError` where it cannot be done (int4 off CUDA).
    """
    _, layers = layers_of(policy)
    names = [name for name, child in layers.named_modules() if isinstance(child, nn.Linear)]
    quantize(layers, how, names)
    return policy
