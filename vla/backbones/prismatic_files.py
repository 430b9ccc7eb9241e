"""OpenVLA's folder on disk: sharded safetensors read tensor by tensor, and written again in the same layout.

Reading goes straight from the file into each parameter's own memory: a model is made without storage and never holds more than
its weights and the tensor under way. Everything wrong with a folder is said at once, with names.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from vla.backbones.prismatic_model import PrismaticModelConfig, PrismaticVLM
from vla.errors import CheckpointError, UsageError

logger = logging.getLogger(__name__)

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
           "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
_REMOTE = ("auto_map", "custom_pipelines")
_MOST = 20  # names of one kind in a message
_MAX_HEADER = 100_000_000  # bytes, safetensors' own limit


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    path: Path
    at: int  # bytes from the file's beginning
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it has in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(self, scratch: Tensor | None = None) -> Tensor:
        """The tensor as stored: in memory of its own, or in the first bytes of `scratch`."""
        if scratch is None:
            tensor = torch.empty(self.shape, dtype=self.dtype)
        else:
            tensor = scratch[: self.nbytes].view(self.dtype).view(self.shape)
        if tensor.numel():
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.at)
                view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore
                done = 0
                while done < len(view) and (n := file.readinto(view[done:])):
                    done += n
            if done < len(view):
                raise CheckpointError(self.path, found=f"{self.at + done} bytes", expected=f"at least {self.at + len(view)}",
                                      fix="copy the file again")  # fmt: skip
        return tensor


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Raises `CheckpointError` for a file that is missing or holds no JSON object."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
        return found
    except OSError:
        raise CheckpointError(path.parent, found=f"no {path.name}", expected=what, fix="copy the whole folder again") from None
    except ValueError as error:
        raise CheckpointError(path, found=str(error), expected=what, fix="copy the file again") from error


def read_config(folder: Path, **own: Any) -> PrismaticModelConfig:
    """config.json and preprocessor_config.json of a folder in OpenVLA's layout; `own` are our sizes.

    Remote code that the folder names is not run, and said once. Raises `CheckpointError` for what is not supported.
    """
    path = folder / "config.json"
    fields = read_json(path, "the model's sizes")
    fields.pop("norm_stats", None)  # the policy's business
    ignored = sorted({key for key in _REMOTE if fields.pop(key, None)} | {p.name for p in folder.glob("*.py")})
    if ignored:
        logger.warning("%s: remote code is never run here; not read: %s", folder, ", ".join(ignored))
    problems = []
    if fields.get("model_type") != PrismaticModelConfig.model_type:
        problems.append(f"model_type {fields.get('model_type')!r}")
    missing = [k for k in ("text_config", "timm_model_ids", "image_sizes", "pad_to_multiple_of") if k not in fields]
    problems += [f"no {', '.join(missing)}"] if missing else []
    if fields.get("image_resize_strategy", "resize-naive") != "resize-naive":
        problems.append(f"image_resize_strategy {fields['image_resize_strategy']!r}")
    towers, sizes = fields.get("timm_model_ids", []), fields.get("image_sizes", [])
    if (
        not 1 <= len(towers) <= 2
        or len(set(sizes)) > 1
        or fields.get("use_fused_vision_backbone", len(towers) == 2) != (len(towers) == 2)
    ):
        problems.append(f"towers {towers} of picture sizes {sizes}")
    problems += [f"timm has no {name!r}" for name in towers if not timm.is_model(str(name).split(".")[0])]
    if problems:
        raise CheckpointError(path, found="; ".join(problems),
                              expected="model_type openvla, one or two timm towers of one picture size, resize-naive, "
                              "text_config and pad_to_multiple_of",
                              fix="copy the folder again, or use `backbone.kind: hf`")  # fmt: skip
    images = read_json(folder / "preprocessor_config.json", "how pictures are normalised")
    for key in ("means", "stds"):
        if len(images.get(key, ())) != len(towers):
            raise CheckpointError(folder / "preprocessor_config.json", found=f"{key}: {images.get(key)}",
                                  expected=f"one for each of {len(towers)} tower(s)", fix="copy the file again")  # fmt: skip
    fields |= {"image_means": images["means"], "image_stds": images["stds"]}
    fields.pop("model_type", None)
    try:
        return PrismaticModelConfig(**{**fields, **own})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(path, found=f"{type(error).__name__}: {error}", expected="OpenVLA's fields",
                              fix="copy the file again") from error  # fmt: skip


def empty_model(config: PrismaticModelConfig, attention: str | None = None) -> PrismaticVLM:
    """A model without storage (its buffers have some). Raises `UsageError` for an attention that takes no mask."""
    if attention == "flash_attention_2":
        raise UsageError("backbone.attention", found=attention, expected="sdpa or eager: who reads whom in a chunk is a mask, "
                         "and flash_attention_2 takes none", fix="leave backbone.attention out")  # fmt: skip
    config._attn_implementation = attention or "sdpa"
    with init_empty_weights(include_buffers=False):
        return PrismaticVLM(config).eval()


def read_weights(
    model: PrismaticVLM, folder: Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    fresh: tuple[str, ...] = (), other: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Fill `model` from the shards of `folder`, tensor by tensor; `dtype` None keeps each as stored.

    Parameters whose names begin with one of `fresh` are drawn when the folder lacks them; those in `other` come from there.
    Raises `CheckpointError` naming every tensor that is missing, unexpected or of another shape.
    """
    entries, other = find_tensors(folder), other or {}
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    head = _tied_head(model)
    wanted = {name: shape for name, shape in wanted.items() if name != head or name in entries}
    shapes = {name: entry.shape for name, entry in entries.items()} | {name: tuple(t.shape) for name, t in other.items()}
    missing = sorted(wanted.keys() - shapes.keys())
    drawn = [name for name in missing if name.startswith(fresh)] if fresh else []
    check_names(folder, wanted, shapes, drawn)
    some = torch.get_default_dtype()
    scratch = _scratch(entries, device, dtype)
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].path, pair[1].at)):
        if name not in other:
            tensor = entry.read(scratch)
            _assign(model, name, tensor if scratch is None else tensor.to(device=device, dtype=dtype, copy=True))
            some = dtype or entry.dtype
    for name, tensor in other.items():
        _assign(model, name, tensor.to(device=device, dtype=dtype or some))
    for name in drawn:
        _assign(model, name, torch.empty(wanted[name], dtype=dtype or some, device=device))
    model.draw(drawn)
    finish(model, device)


def _scratch(entries: Mapping[str, Entry], device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor | None:
    """Room for the largest tensor, through which all pass that end elsewhere or in another dtype; None when none do."""
    there = torch.device(device or "cpu")
    if there.type == "cpu" and all(entry.dtype == (dtype or entry.dtype) for entry in entries.values()):
        return None
    size = max((entry.nbytes for entry in entries.values()), default=0)
    return torch.empty(size, dtype=torch.uint8, pin_memory=there.type == "cuda")


def finish(model: PrismaticVLM, device: torch.device | str | None) -> None:
    """What has no tensor of its own: tied heads, and buffers on the right device."""
    if (head := _tied_head(model)) is not None:
        model.language_model.get_output_embeddings().weight = model.get_input_embeddings().weight
        assert head
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and device is not None:
                module._buffers[name] = buffer.to(device)


def _tied_head(model: PrismaticVLM) -> str | None:
    """Name of the head's weight where it is the embedding's."""
    if not getattr(model.config.text_config, "tie_word_embeddings", False):
        return None
    head = model.language_model.get_output_embeddings()
    return next(f"language_model.{name}.weight" for name, m in model.language_model.named_modules() if m is head)


def check_names(
    where: object, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], drawn: list[str] | None = None
) -> None:
    """Raise `CheckpointError` when `found` are not the tensors `wanted`, saying every difference at once."""
    missing = sorted(wanted.keys() - found.keys() - set(drawn or ()))
    unexpected = sorted(found.keys() - wanted.keys())
    shapes = [f"{n}: {tuple(found[n])} instead of {tuple(wanted[n])}" for n in sorted(wanted.keys() & found.keys())
              if tuple(found[n]) != tuple(wanted[n])]  # fmt: skip
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    lines = [f"{len(names)} {kind}: {', '.join(names[:_MOST])}{' ...' if len(names) > _MOST else ''}"
             for kind, names in kinds.items() if names]  # fmt: skip
    if lines:
        raise CheckpointError(where, found="; ".join(lines), expected=f"the {len(wanted)} tensors config.json describes",
                              fix="copy the folder again; config.json and the weights must be of one model")  # fmt: skip


def find_tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder's safetensors, by name. Raises `CheckpointError` naming every shard that is not whole."""
    if (folder / INDEX).is_file():
        table = read_json(folder / INDEX, "which shard holds which tensor").get("weight_map")
        if not isinstance(table, dict) or any(not isinstance(n, str) or Path(n).name != n for n in table.values()):
            raise CheckpointError(folder / INDEX, found="no weight_map of file names beside it",
                                  expected="tensor -> shard", fix="copy the file again")  # fmt: skip
        names = sorted(set(table.values()))
    else:
        table, names = None, ["model.safetensors"]
        if not (folder / names[0]).is_file():
            pickles = sorted(p.name for p in folder.glob("*.bin"))
            raise CheckpointError(folder, found=f"no {names[0]}" + (f", but {', '.join(pickles)}" if pickles else ""),
                                  expected="safetensors; pickle files are never opened",
                                  fix="convert them on a machine you can lose: `model.save_pretrained(folder)` writes "
                                  "safetensors")  # fmt: skip
    found: dict[str, Entry] = {}
    problems = []
    for name in names:
        try:
            for tensor, entry in _header(folder / name):
                found[tensor] = entry
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{name}: {error.strerror if isinstance(error, OSError) and error.strerror else error}")
    if table is not None and not problems:
        absent = [f"{shard} has no {tensor}" for tensor, shard in table.items()
                  if tensor not in found or found[tensor].path.name != shard]  # fmt: skip
        problems += absent[:_MOST]
    if problems:
        raise CheckpointError(folder, found="; ".join(problems), expected=f"{len(names)} whole safetensors file(s)",
                              fix="copy the files named above again")  # fmt: skip
    return found


def _header(path: Path) -> Iterator[tuple[str, Entry]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, max(size - 8, 0)):
            raise ValueError(f"expected at least {8 + length} bytes, found {size}")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != end:
        raise ValueError(f"expected {end} bytes, found {size}")
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is of dtype {entry['dtype']}")
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        if start < 0 or any(n < 0 for n in shape) or stop - start != count * dtype.itemsize:
            raise ValueError(f"{name}: {stop - start} bytes for shape {shape}")
        yield name, Entry(path, 8 + length + start, dtype, shape)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(parent)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[last] = tensor


def write_weights(tensors: Mapping[str, Tensor], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Safetensors in shards of at most `shard_bytes` (a larger tensor has one of its own); several have an index."""
    shards: list[dict[str, Tensor]] = [{}]
    size, total = 0, 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    for old in [*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors", folder / INDEX]:
        old.unlink(missing_ok=True)
    table = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in shard.items()}, folder / name, metadata={"format": "pt"})
        table |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def save_model(model: PrismaticVLM, folder: str | os.PathLike) -> None:
    """config.json with all our fields, and the weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    write_weights(weights_of(model), folder)


def weights_of(model: PrismaticVLM) -> dict[str, Tensor]:
    """The tensors a folder holds: everything, a tied head once."""
    head = _tied_head(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name != head}
