"""The policy folder: weights, processor and `policy.json`. It can act by itself, or loading says what is missing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vla.actions import ActionCodec, codec_from_json
from vla.backbones import build_backbone, load_backbone
from vla.config import validate
from vla.embodiment import EmbodimentSpec
from vla.errors import CheckpointError, DataError, UsageError, VLAError
from vla.fetch import fetch_policy
from vla.judging import is_openvla, refuse_unsafe
from vla.normalize import Normalizer
from vla.policy.adapters import read_adapter, write_adapter
from vla.policy.config import PolicyConfig
from vla.policy.model import VLAPolicy
from vla.policy.sizes import sizes_of

Below = Callable[[Path, dict, PolicyConfig, dict[str, EmbodimentSpec], ActionCodec], tuple[VLAPolicy, str]]
"""(folder, `policy.json`'s entry, what the adapted policy is) -> a base for it to go on, and the base's fingerprint."""


def save_policy(policy: VLAPolicy, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a policy folder, its weights as `dtype` (default: as they are). Not atomic by itself: `checkpoint.publish` wraps it.

    A policy saved as bfloat16 is that policy rounded, and its fingerprint is the rounded one's.
    """
    if dtype is not None and dtype != policy.dtype:
        policy = copy.deepcopy(policy).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    if policy.adapter is not None:
        write_adapter(policy, folder)
    else:
        policy.model.save_pretrained(folder)
        policy.writer.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in _head_tensors(policy).items()}, folder / "heads.safetensors")
    meaning = policy.describe()
    meaning["fingerprint"] = policy.fingerprint_with(meaning)
    (folder / "policy.json").write_text(json.dumps(meaning, indent=1))


def _head_tensors(policy: VLAPolicy) -> dict[str, torch.Tensor]:
    """The heads' weights under the names files have: the end head's bare, for it was alone once."""
    return {name.removeprefix("end."): tensor for name, tensor in policy.heads.state_dict().items()}


def read_policy(
    folder: Path, dtype: torch.dtype | None = None, attention: str | None = None, base: str | Path | None = None,
    unquantized: bool = False, below: Below | None = None,
) -> VLAPolicy:  # fmt: skip
    """Read a policy folder; raises `CheckpointError` naming what is missing, unsafe or does not fit. See `load_policy`.

    `below` gives the base of an adapter where it is in memory already (`vla/policy/sharing.py`).
    """
    if folder.is_dir():
        refuse_unsafe(folder)  # here too, for a run's checkpoints come this way
    meaning = read_meaning(folder)
    try:
        config = validate(meaning["config"], PolicyConfig, f"{folder / 'policy.json'}: config")
        where = f"{folder / 'policy.json'}: normalizers"
        normalizers = {
            robot: {part: Normalizer.from_json(entry, f"{where}.{robot}.{part}") for part, entry in parts.items()}
            for robot, parts in meaning["normalizers"].items()
        }
        embodiments = {k: EmbodimentSpec.model_validate(v) for k, v in meaning["embodiments"].items()}
        codec = codec_from_json(meaning["codec"])
    except (UsageError, DataError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(folder / "policy.json", found=f"{type(error).__name__}: {error}", expected="what save_policy wrote",
                              fix="copy the folder again; policy.json is not meant to be edited") from error  # fmt: skip
    if short := [robot for robot in embodiments if normalizers.get(robot, {}).keys() != {"action", "state"}]:
        raise CheckpointError(folder / "policy.json", found=f"no statistics of {', '.join(short)}",
                              expected="statistics of action and state of each of its robots",
                              fix="copy the folder again; without them nobody knows what its actions mean")  # fmt: skip
    try:
        # The fingerprint is that of the stored numbers, so they are read as stored and converted afterwards.
        if adapter := meaning.get("adapter"):
            under, known = (
                (base_of(adapter["base"], folder, base, config, embodiments, codec, attention), None)
                if below is None else below(folder, adapter, config, embodiments, codec)
            )  # fmt: skip
            if more := len(embodiments) - len(under.embodiments):
                under.model.add_robots(more)
            policy = VLAPolicy(config, under.model, under.writer, embodiments, normalizers, codec, meaning["provenance"])
            read_adapter(policy.adopt(under), folder, adapter, unquantized, known)
        else:
            model, writer = load_backbone(folder, config.backbone, sizes_of(config, embodiments, codec), None, attention)
            policy = VLAPolicy(config, model, writer, embodiments, normalizers, codec, meaning["provenance"])
            heads = load_file(folder / "heads.safetensors")
            policy.heads.load_state_dict({k if k.startswith("l1.") else f"end.{k}": v for k, v in heads.items()})
    except VLAError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds; all of them mean "cannot be read"
        raise CheckpointError(folder, found=f"{type(error).__name__}: {error}",
                              expected="readable model.safetensors, heads.safetensors, tokenizer.json, config.json",
                              fix="copy the folder again, or use an older checkpoint") from error  # fmt: skip
    if (found := policy.fingerprint_with(meaning)) != meaning["fingerprint"]:
        raise CheckpointError(folder, found=f"fingerprint {found[:12]}",
                              expected=f"{str(meaning['fingerprint'])[:12]}, as policy.json says",
                              fix="weights and policy.json are not of one save: copy the whole folder again")  # fmt: skip
    policy.saved_meaning = meaning
    return (policy if dtype is None else policy.to(dtype)).eval()


def base_of(
    base: dict, folder: Path, given: str | Path | None, config: PolicyConfig, embodiments: dict[str, EmbodimentSpec],
    codec: ActionCodec, attention: str | None,
) -> VLAPolicy:  # fmt: skip
    """The policy below an adapter: where it was when the adapter was trained, or the `given` one."""
    if base["kind"] == "model":  # a pretrained model, whose tables and heads the adapter brings
        path = str(given or base["path"])  # at its commit, which the settings may not name
        config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"path": path})})
        model, writer = build_backbone(config.backbone, sizes_of(config, embodiments, codec))
        return VLAPolicy(config, model, writer, embodiments, {}, codec)
    beside = folder / base["path"]
    path = given or (beside if beside.exists() else base["path"])
    below = fetch_policy(path)
    # Said before anything is loaded: adapters whose bases lead round in a circle would be loaded without an end.
    own = below.resolve() == folder.resolve()
    if own or ((below / "policy.json").is_file() and read_meaning(below).get("adapter") is not None):
        raise CheckpointError(folder, found=f"an adapter that is its own base ({path})" if own else f"a base that is an adapter "
                              f"itself ({path})", expected="a whole policy below an adapter",
                              fix="give its base: load_policy(..., base=PATH); or `vla merge` the base first")  # fmt: skip
    return load_policy(below, "cpu", attention=attention)


def read_meaning(folder: Path) -> dict:
    """What `policy.json` says; `CheckpointError` when it is no policy's."""
    path = folder / "policy.json"
    try:
        meaning = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(folder, found="no policy.json", expected="a policy folder (weights, processor, policy.json)",
                              fix="give a run folder or its policy/ folder") from None  # fmt: skip
    except (OSError, ValueError, RecursionError) as error:  # OSError: a folder of that name, or not ours to read
        raise CheckpointError(path, found=str(error), expected="JSON", fix="copy the folder again") from error
    if not isinstance(meaning, dict):
        raise CheckpointError(path, found=f"{str(meaning)[:40]!r}", expected="a JSON object", fix="copy the folder again")
    needed = ("config", "embodiments", "normalizers", "codec", "prompt", "provenance", "fingerprint")
    if missing := [key for key in needed if key not in meaning]:
        raise CheckpointError(path, found=f"no {missing}", expected=f"keys {list(needed)}",
                              fix="weights without these are not a policy; save it again")  # fmt: skip
    entry = meaning.get("adapter")
    base = entry.get("base") if isinstance(entry, dict) and isinstance(entry.get("config"), dict) else None
    if entry is not None and not (
        isinstance(base, dict) and all(isinstance(base.get(key), str) for key in ("kind", "path", "fingerprint"))
    ):
        raise CheckpointError(path, found=f"adapter: {str(entry)[:80]}", expected="its config, and kind, path and fingerprint of "
                              "its base", fix="copy the folder again; policy.json is not meant to be edited")  # fmt: skip
    return meaning


def load_policy(
    path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None, attention: str | None = None,
    base: str | Path | None = None, unquantized: bool = False,
) -> VLAPolicy:  # fmt: skip
    """A policy from a policy folder, a run folder, a folder in OpenVLA's layout or a name on the Hub
    (`user/name`, `user/name@revision`), ready to act.

    `device` defaults to CUDA where there is one, `dtype` to that of the weights (the nano model's: float32), `attention`
    (transformers' `attn_implementation`) to what the policy was trained with.
    `base`: where the base of an adapter is now, if not where it was; `unquantized`: keep that base's weights
    whole. Raises `CheckpointError` when it cannot be had, is not whole, or is an adapter of another base.
    """
    folder = fetch_policy(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if is_openvla(folder):
        from vla.policy.openvla import read_openvla

        return read_openvla(folder, device=device, dtype=dtype, attention=attention)
    return read_policy(folder, dtype, attention, base, unquantized).to(device)
