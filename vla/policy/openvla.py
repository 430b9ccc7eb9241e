"""OpenVLA's and OpenVLA-OFT's folders as policies: one robot for each of their statistics.

A folder says the model, the tokenizer and the statistics of each dataset. It does not say what a robot is: channels are what
OpenVLA's own rules make of the mask, and cameras are called `image`, or for OFT what its server calls them. What an OFT folder
leaves out (steps of a chunk, cameras, how numbers are normalised) has to be given, by hand or by one of the `OFT_SETUPS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla.actions import BinCodec
from vla.backbones import PrismaticConfig
from vla.backbones.prismatic import open_folder
from vla.backbones.prismatic_files import check_names, read_json
from vla.backbones.prismatic_oft import read_action_head
from vla.backbones.prismatic_writer import prompt_of
from vla.embodiment import Camera, Channel, EmbodimentSpec
from vla.errors import CheckpointError, DataError, UsageError
from vla.fetch import fetch_model
from vla.normalize import Normalizer, Scheme, Stats
from vla.policy.config import CodecConfig, NormalizationConfig, PolicyConfig
from vla.policy.model import VLAPolicy
from vla.policy.sizes import sizes_of

STATISTICS = "dataset_statistics.json"
_OFT_FILES = ("action_head", "proprio_projector", "vision_backbone", "noisy_action_projector")
_EEF = [True] * 6 + [False]
_R6 = [True] * 9 + [False]


@dataclass(frozen=True)
class OFT:
    """What an OFT folder does not record. K, D and P of the paper: `chunk`; D and P are read from weights and statistics."""

    chunk: int
    cameras: tuple[str, ...]
    normalization: Scheme
    proprio: bool = True


OFT_SETUPS = {
    "libero": OFT(8, ("full_image", "wrist_image"), "q99"),
    "aloha": OFT(25, ("full_image", "left_wrist_image", "right_wrist_image"), "bounds"),
    "bridge": OFT(5, ("full_image",), "q99"),
}
"""The settings OpenVLA-OFT's own code picks by words on its command line."""


def read_openvla(
    folder: str | Path, *, oft: OFT | str | None = None, crop: float = 1.0, control_hz: float = 5.0,
    device: str | torch.device | None = None, dtype: torch.dtype | None = None, attention: str | None = None,
    probe_image: bool = True,
) -> VLAPolicy:  # fmt: skip
    """The policy a folder in OpenVLA's layout is. Folder or Hub id (`openvla/openvla-7b`).

    Its robots are the keys of `dataset_statistics.json`, or where there is none of `norm_stats` in config.json. `crop` 0.9 for
    checkpoints trained with random crops (not openvla-7b). `control_hz` is only written down: the folder does not say it.
    Weights go straight to `device` (default: the CPU), tensor by tensor, as stored or as `dtype`.
    Raises `CheckpointError` for a folder that is not whole or lacks statistics, `UsageError` when OFT's facts are missing.
    """
    if attention == "flash_attention_2":
        raise UsageError("attention", found=attention, expected="sdpa or eager", fix="leave it out")
    folder = fetch_model(str(folder))
    setup = _oft_setup(folder, oft)
    stats = read_statistics(folder)
    config = _policy_config(folder, setup, crop, attention, probe_image)
    embodiments, normalizers = {}, {}
    for key, entry in stats.items():
        state = setup is not None and setup.proprio
        embodiments[key], normalizers[key] = _robot(key, entry, config, setup, control_hz, state, folder)
    codec = BinCodec(config.codec.bins, config.codec.variant)
    backbone = config.backbone
    assert isinstance(backbone, PrismaticConfig)
    model, writer = open_folder(backbone, sizes_of(config, embodiments, codec), device, dtype)
    policy = VLAPolicy(config, model, writer, embodiments, normalizers, codec, _provenance(folder, stats))
    policy.to(policy.device)
    if policy.l1_head is not None:
        tensors = read_action_head(folder) or {}
        shapes = {k: tuple(v.shape) for k, v in policy.l1_head.state_dict().items()}
        check_names(f"{folder}: action_head", shapes, {k: tuple(v.shape) for k, v in tensors.items()})
        policy.l1_head.load_state_dict(tensors)
        policy.l1_head.to(device=policy.device, dtype=policy.dtype)
    return policy.eval()


def _policy_config(folder: Path, setup: OFT | None, crop: float, attention: str | None, probe_image: bool) -> PolicyConfig:
    fields = read_json(folder / "config.json", "the model's sizes")
    chunk = setup.chunk if setup else 1
    backbone: dict[str, Any] = {"kind": "prismatic", "path": str(folder), "crop": crop, "probe_image": probe_image}
    return PolicyConfig(
        backbone=PrismaticConfig.model_validate(backbone | ({"attention": attention} if attention else {})),
        codec=CodecConfig(bins=int(fields.get("n_action_bins", 256)), variant="openvla"),
        normalization=NormalizationConfig(action=setup.normalization if setup else "q99",
                                          state=setup.normalization if setup else "q99"),
        chunk=chunk, execute=chunk, decoding="parallel" if setup else "autoregressive",
        head="l1" if setup and component_exists(folder, "action_head") else "symbols",
        decode="argmax", soft_sigma=0.0, end_weight=0.0, prompt=prompt_of(str(fields.get("llm_backbone_id", ""))),
        state="token" if setup and setup.proprio else "none",
    )  # fmt: skip


def component_exists(folder: Path, name: str) -> bool:
    """Whether an OFT folder has this further file."""
    return bool(list(folder.glob(f"{name}--*_checkpoint.*")))


def _oft_setup(folder: Path, oft: OFT | str | None) -> OFT | None:
    files = [name for name in _OFT_FILES if component_exists(folder, name)]
    if isinstance(oft, str):
        if oft not in OFT_SETUPS:
            raise UsageError("oft", found=oft, expected=f"one of {sorted(OFT_SETUPS)}, or an OFT(...)", fix="oft='libero'")
        oft = OFT_SETUPS[oft]
    if files and oft is None:
        raise UsageError(folder, found=f"an OpenVLA-OFT folder ({', '.join(files)}) and no settings for it",
                         expected="what its files do not record: steps of a chunk (K), cameras in their order, and whether "
                         "numbers were normalised by q99 or bounds",
                         fix="`vla export FOLDER --to policy --oft libero --out DIR` (or aloha, bridge) makes a policy folder of "
                         "it once; in Python read_openvla(folder, oft=OFT(chunk=8, cameras=('full_image', 'wrist_image'), "
                         "normalization='q99'))")  # fmt: skip
    if oft is None:
        return None
    has = "proprio_projector" in files
    return replace(oft, proprio=has)


def read_statistics(folder: Path) -> dict[str, dict]:
    """dataset -> statistics. A fine-tuned folder's own file replaces those of the base that its config.json still holds."""
    path = folder / STATISTICS
    if path.is_file():
        found: Any = read_json(path, "statistics of each dataset")
    else:
        path = folder / "config.json"
        found = read_json(path, "the model's sizes").get("norm_stats")
    if not isinstance(found, dict) or not found or not all(isinstance(e, dict) and isinstance(e.get("action"), dict)
                                                            for e in found.values()):  # fmt: skip
        raise CheckpointError(path, found="missing statistics: " + ("none" if not found else f"{str(found)[:80]}"),
                              expected='norm_stats in config.json, or dataset_statistics.json: {dataset: {"action": {q01, q99, '
                              "mask, ...}}}", fix="copy dataset_statistics.json beside the weights; without it an action has no "
                              "unit")  # fmt: skip
    return found


def _robot(
    key: str, entry: Mapping[str, Any], config: PolicyConfig, setup: OFT | None, control_hz: float, state: bool, folder: Path
) -> tuple[EmbodimentSpec, dict[str, Normalizer]]:
    where = f"{folder}: statistics of {key!r}"
    try:
        action = _normalizer(entry["action"], config.normalization.action, entry.get("num_transitions", 0), f"{where}, action")
        if state and not isinstance(entry.get("proprio"), dict):
            raise DataError(where, found="no proprio", expected="statistics of the state", fix="copy the file again")
        proprio = _normalizer(entry["proprio"], config.normalization.state, entry.get("num_transitions", 0),
                              f"{where}, proprio") if state else nothing()  # fmt: skip
    except (DataError, TypeError, ValueError) as error:
        raise CheckpointError(where, found=f"missing statistics: {getattr(error, 'found', error)}",
                              expected=f"what {config.normalization.action!r} needs, finite, one number a dimension",
                              fix="copy dataset_statistics.json again") from error  # fmt: skip
    cameras = setup.cameras if setup else ("image",)
    return EmbodimentSpec(
        name=key, robot="named by its dataset; channels as OpenVLA's mask tells them", control_hz=control_hz,
        cameras={name: Camera(height=224, width=224) for name in cameras}, action=_channels(action, "action"),
        state=_channels(proprio, "state") if state else (),
    ), {"action": action, "state": proprio}  # fmt: skip


def nothing() -> Normalizer:
    """Of a state without dimensions."""
    return Normalizer(Stats({name: np.zeros(0) for name in ("min", "max", "mean", "std", "q01", "q99")}, 0), "q99")


def _normalizer(block: Mapping[str, Any], scheme: Scheme, count: int, where: str) -> Normalizer:
    values = {k: v for k, v in block.items() if k != "mask"}
    return Normalizer(Stats.from_json(values | {"count": count}, where), scheme, block.get("mask"), where)


def _channels(normalizer: Normalizer, part: str) -> tuple[Channel, ...]:
    """A 6-D motion of the hand and a gripper where the mask is OpenVLA's for it; else numbers."""
    values = normalizer.stats.values
    low = np.minimum(values.get("min", normalizer.low), normalizer.low).astype(float)
    high = np.maximum(values.get("max", normalizer.high), normalizer.high).astype(float)
    low, high = np.where(normalizer.mask, low, -1.0), np.where(normalizer.mask, high, 1.0)
    high = np.where(high > low, high, low + 1.0)

    def channel(name: str, dims: str, convention: str, unit: str, at: int) -> Channel:
        names = tuple(dims.split())
        rows = slice(at, at + len(names))
        return Channel(name=name, dims=names, convention=convention, unit=unit, low=tuple(low[rows]), high=tuple(high[rows]))

    if part == "action" and normalizer.mask.tolist() == _EEF:
        return (channel("eef_position", "x y z", "eef_delta_position", "m/step", 0),
                channel("eef_rotation", "roll pitch yaw", "eef_delta_euler_xyz", "rad/step", 3),
                channel("gripper", "open", "gripper_open_positive", "1", 6))  # fmt: skip
    if part == "action" and normalizer.mask.tolist() == _R6:
        return (channel("eef_position", "x y z", "eef_delta_position", "m/step", 0),
                channel("eef_rotation", "a1 a2 a3 b1 b2 b3", "eef_delta_rot6d", "1", 3),
                channel("gripper", "open", "gripper_open_positive", "1", 9))  # fmt: skip
    return (channel(part, " ".join(f"d{i}" for i in range(normalizer.dims)), "scalar", "1", 0),)


def _provenance(folder: Path, stats: dict[str, dict]) -> dict:
    """Where it comes from; and what of its statistics a policy does not use, so that it can be written again."""
    datasets = [{"path": key, "robot": key, "fingerprint": f"{folder.name}:{key}", "episodes": int(e.get("num_trajectories", 0)),
                 "frames": int(e.get("num_transitions", 0))} for key, e in stats.items()]  # fmt: skip
    other = {key: {k: v for k, v in e.items() if k not in ("action", "num_transitions", "num_trajectories")}
             for key, e in stats.items()}  # fmt: skip
    return {"datasets": datasets, "recorded_seeds": {}, "instructions": [], "openvla": other}
