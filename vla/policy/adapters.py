"""Adapters: a policy that is a base somebody else has, and a few per cent of weights of its own.

LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024) and QLoRA (Dettmers et al. 2023) come from peft; what
is ours is what a robot needs around them. An adapted policy is a policy: it has its own statistics, robots and codec, it knows
which base it was trained on by that base's numbers, not by its name, and on another base it refuses to load.

What is trained beside the adapter: the tables (symbols, slots, robots; `Backbone.tables`) and the heads.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vla.config import Config
from vla.errors import CheckpointError, UsageError
from vla.policy.model import VLAPolicy
from vla.policy.quantized import LoraLayer, peft, quantize

Target = Literal["all-linear", "all", "attention", "openvla"]
NAME = "default"
"""The adapter's name inside peft while it is the only one."""


class AdapterConfig(Config):
    """What is trained instead of the whole model."""

    rank: int = Field(default=32, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    """Scale of the update is alpha / rank (rsLoRA: alpha / sqrt(rank)). Default: min(rank, 16), OpenVLA's."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Target | tuple[str, ...] = "all-linear"
    """`all-linear`: every linear layer but the output head. `all`: convolutions too. `attention`: q, k, v and output of every
    attention. `openvla`: OpenVLA's published recipe, which is every linear layer, the output head and the patch embeddings.
    Or a list of regular expressions, each to match somewhere in a module's name."""
    dora: bool = False
    rslora: bool = False
    init: Literal["default", "gaussian"] = "default"
    quantize: Literal["none", "nf4", "int8", "int4"] = "none"
    """Store the frozen linear layers in fewer bits: nf4 by bitsandbytes, int8 and int4 by torchao (int4 on CUDA only)."""

    @property
    def scale(self) -> float:
        """alpha."""
        return min(self.rank, 16) if self.alpha is None else self.alpha


@dataclass
class Adapter:
    """What an adapted policy knows of itself and of its base."""

    config: AdapterConfig
    base: dict[str, Any]
    """`path` and `fingerprint` of the base; `kind`: a policy folder, or a pretrained `model`."""
    trained: tuple[str, ...] = ()
    """Names of all parameters that are the adapter's: its matrices, the tables, the heads."""

    def describe(self) -> dict:
        """What `policy.json` says of it."""
        return {"config": self.config.model_dump(mode="json"), "base": self.base}


def adapt(policy: VLAPolicy, config: AdapterConfig, base: dict[str, Any], known: str | None = None) -> VLAPolicy:
    """`policy` with a fresh adapter, everything else frozen; changes it in place and returns it.

    `base` says where the frozen part came from (`kind`, `path`); its fingerprint is taken here, before anything is quantized,
    unless it is `known`: then `policy` is quantized already where `config` says so.
    Draws from torch's global generator. Raises `UsageError` when nothing matches the targets or there is an adapter already.
    """
    if policy.adapter is not None:
        raise UsageError("adapter", found="a policy that has one already", expected="a whole policy",
                         fix="merge the first one with `vla merge`, and adapt the result")  # fmt: skip
    base = base | {"fingerprint": known or base_fingerprint(policy)}
    if known is None:
        quantize_base(policy, config)
    module = policy.model.adapted
    inject(module, config, target_modules(module, config.targets), NAME)
    trained = []
    for name, parameter in policy.named_parameters():
        own = ("lora_" in name or own_name(policy, name)) and parameter.is_floating_point()
        parameter.requires_grad_(own)
        trained += [name] * own
    policy.adapter = Adapter(config, base, tuple(trained))
    policy.saved_meaning = None  # it is another policy now
    return policy


def quantize_base(policy: VLAPolicy, config: AdapterConfig) -> None:
    """Store the layers an adapter of `config` goes to, but for the output head, in fewer bits, if it says so."""
    if config.quantize != "none":
        module = policy.model.adapted
        names = [n for n in target_modules(module, config.targets) if n not in _heads_of(module)]
        # A table may be a linear layer too (OpenVLA's of the state): what is learned itself keeps its numbers.
        quantize(module, config.quantize, [n for n in names if not own_name(policy, f"{n}.weight")])


def own_name(policy: VLAPolicy, name: str) -> bool:
    """Whether a parameter of this name is every policy's own, beside an adapter too: a table or a head."""
    return name.startswith(_HEADS) or base_name(name).removeprefix("model.") in policy.model.tables


_HEADS = ("end_head.", "l1_head.")


def target_modules(module: nn.Module, targets: Target | tuple[str, ...]) -> list[str]:
    """Full names of the modules an adapter goes to. Raises `UsageError` when there are none."""
    heads = _heads_of(module)
    found = []
    for name, child in module.named_modules():
        linear, last = isinstance(child, nn.Linear), name.rpartition(".")[2]
        match targets:
            case "all-linear":
                chosen = linear and name not in heads
            case "all":
                chosen = (linear or isinstance(child, nn.Conv2d)) and name not in heads
            case "attention":
                chosen = linear and last in _ATTENTION
            case "openvla":
                chosen = linear or (isinstance(child, nn.Conv2d) and name.endswith("patch_embed.proj"))
            case _:
                chosen = (linear or isinstance(child, nn.Conv2d)) and any(re.search(t, name) for t in targets)
        if chosen:
            found.append(name)
    if not found:
        kinds = sorted({n.rpartition(".")[2] for n, c in module.named_modules() if isinstance(c, (nn.Linear, nn.Conv2d))})
        raise UsageError("adapter.targets", found=targets, expected=f"something that is there; its layers end in {kinds}",
                         fix="adapter.targets=all-linear")  # fmt: skip
    return found


_ATTENTION = frozenset("q_proj k_proj v_proj o_proj out_proj qkv qkv_proj proj q k v query key value".split())


def _heads_of(module: nn.Module) -> set[str]:
    """Names of the output head and whatever shares its weight."""
    get = getattr(module, "get_output_embeddings", None)
    head = get() if get else None
    return {name for name, child in module.named_modules() if head is not None and child is head}


def lora_config(config: AdapterConfig, names: list[str]) -> peft.LoraConfig:
    """peft's own description of the adapter."""
    return peft.LoraConfig(
        r=config.rank, lora_alpha=config.scale, lora_dropout=config.dropout, target_modules=names,  # pyright: ignore
        use_dora=config.dora, use_rslora=config.rslora,
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
    )  # fmt: skip


def inject(module: nn.Module, config: AdapterConfig, names: list[str], adapter: str) -> None:
    """Put fresh matrices beside the named layers of `module`."""
    with warnings.catch_warnings():  # that int8 cannot be merged; what is merged here is the whole base (`vla merge`)
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")
        peft.inject_adapter_in_model(lora_config(config, names), module, adapter)
    for name, parameter in module.named_parameters():
        if f".{adapter}." in name and "lora_" in name and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()  # peft's own habit: small updates need the mantissa


def base_fingerprint(policy: VLAPolicy) -> str:
    """sha256 over what an adapter of `policy` would rely on but not bring: names, shapes and numbers, however they are stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted((base_name(n), p) for n, p in policy.named_parameters() if "lora_" not in n):
        if not own_name(policy, name):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_name(name: str) -> str:
    """A parameter's name before peft wrapped its layer."""
    return name.replace(".base_layer.", ".")


def trained_tensors(policy: VLAPolicy) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the adapter's matrices under peft's names, everything else it trains under the policy's)."""
    assert policy.adapter is not None
    matrices = peft.get_peft_model_state_dict(policy.model.adapted, adapter_name=NAME, save_embedding_layers=False)
    others = {n: p.detach() for n, p in policy.named_parameters() if n in policy.adapter.trained and "lora_" not in n}
    return {f"base_model.model.{n}": t.detach() for n, t in matrices.items()}, others


def load_trained(policy: VLAPolicy, matrices: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Inverse of `trained_tensors`; raises `ValueError` naming every tensor that is missing, unknown or of another shape."""
    assert policy.adapter is not None
    want_matrices, want_others = trained_tensors(policy)
    problems = []
    for wanted, given in ((want_matrices, matrices), (want_others, others)):
        problems += [f"{name} missing" for name in sorted(wanted.keys() - given.keys())]
        problems += [f"{name} unknown" for name in sorted(given.keys() - wanted.keys())]
        problems += [f"{name} is {tuple(given[name].shape)}, not {tuple(wanted[name].shape)}"
                     for name in sorted(wanted.keys() & given.keys()) if wanted[name].shape != given[name].shape]  # fmt: skip
    if problems:
        raise ValueError("; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else ""))
    peft.set_peft_model_state_dict(
        policy.model.adapted, {n.removeprefix("base_model.model."): t for n, t in matrices.items()}, adapter_name=NAME
    )
    parameters = dict(policy.named_parameters())
    with torch.no_grad():
        for name, tensor in others.items():
            parameters[name].copy_(tensor)


def write_adapter(policy: VLAPolicy, folder: Path) -> None:
    """The adapter alone: its matrices in peft's own files, the tables and heads beside them. No weight of the base."""
    assert policy.adapter is not None
    matrices, others = trained_tensors(policy)
    save_file({name: tensor.contiguous() for name, tensor in matrices.items()}, folder / "adapter_model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in others.items()}, folder / "tables.safetensors")
    policy.model.adapted.peft_config[NAME].save_pretrained(folder)


def read_adapter(
    policy: VLAPolicy, folder: Path, entry: dict, unquantized: bool = False, known: str | None = None
) -> None:
    """Put the adapter of `folder` on `policy`, whose weights are a base; `entry` is `policy.json`'s.

    `known` is that base's fingerprint where it was taken before (see `adapt`).
    Raises `CheckpointError` when the base is not the one it was trained on, or a file does not fit.
    """
    base, config = entry["base"], AdapterConfig.model_validate(entry["config"])
    if unquantized:
        config = config.model_copy(update={"quantize": "none"})
    adapt(policy, config, {k: v for k, v in base.items() if k != "fingerprint"}, known)
    assert policy.adapter is not None
    if (found := policy.adapter.base["fingerprint"]) != base["fingerprint"]:
        raise CheckpointError(folder, found=f"a base with fingerprint {found[:12]} at {base['path']}",
                              expected=f"{base['fingerprint'][:12]}, which this adapter was trained on",
                              fix="give the right one: load_policy(..., base=PATH), or --base PATH")  # fmt: skip
    load_trained(policy, load_file(folder / "adapter_model.safetensors"), load_file(folder / "tables.safetensors"))


def merge(policy: VLAPolicy, probe: Callable[[VLAPolicy], Tensor], source: str) -> float:
    """Fold the adapter into the weights, in float32, in place; returns the largest difference of `probe`'s logits.

    `probe` gives logits of the policy on fixed input. Raises `CheckpointError` when there is nothing to merge, or when the
    logits change by more than 1e-3 of their largest value.
    """
    adapter = policy.adapter
    if adapter is None:
        raise CheckpointError(source, found="merged already" if "merged" in policy.provenance else "a policy without an adapter",
                              expected="an adapter", fix="merge an adapter folder, once")  # fmt: skip
    if adapter.config.quantize != "none":
        raise CheckpointError(source, found=f"a base quantized to {adapter.config.quantize}", expected="the base in float32",
                              fix="load it with unquantized=True")  # fmt: skip
    if policy.shares_base:
        raise CheckpointError(source, found="one of several adapters on one base in memory", expected="an adapter loaded alone",
                              fix="load_policy(...) and merge that: the others would change with it")  # fmt: skip
    policy.float().eval()
    before = probe(policy)
    module = policy.model.adapted
    for name, layer in lora_layers(module).items():
        layer.merge(safe_merge=True)  # pyright: ignore
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent) if parent else module, last, layer.get_base_layer())
    difference = (probe(policy) - before).abs().max().item()
    if not difference <= 1e-3 * max(1.0, before.abs().max().item()):
        raise CheckpointError(source, found=f"logits that differ by {difference:.2e} after merging",
                              expected="the same policy", fix="keep using the adapter; report this")  # fmt: skip
    if hasattr(module, "peft_config"):
        del module.peft_config
    policy.adapter, policy.saved_meaning = None, None
    policy.provenance = policy.provenance | {"merged": {"adapter": adapter.describe(), "difference": difference}}
    for parameter in policy.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return difference


def lora_layers(module: nn.Module) -> dict[str, LoraLayer]:
    """Name -> layer that carries an adapter."""
    return {name: child for name, child in module.named_modules() if isinstance(child, LoraLayer)}
