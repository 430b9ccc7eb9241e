"""Tensors out of torch's zip files (`*.pt`), without running the pickle inside.

Such a file is a zip of raw storages and one pickle that says which storage is which tensor. The pickle's instructions are read
as data by a machine that knows a few of them: dictionaries, tuples, numbers, and "a tensor of this shape on that storage".
Nothing is imported and nothing is called; any other instruction or name is refused, with its name.
"""

from __future__ import annotations

import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla.errors import CheckpointError

_STORAGES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16,
             "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
             "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool}  # fmt: skip
_NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
          *(f"torch {name}" for name in _STORAGES)}  # fmt: skip
_MAX_PICKLE = 64_000_000  # bytes
_MARK = object()


@dataclass(frozen=True)
class _Name:
    """A name the pickle mentions; only compared, never looked up."""

    text: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _View:
    """A tensor to be: where it lies on its storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Refused(ValueError):
    pass


def read_torch_zip(path: Path) -> dict[str, Tensor]:
    """A saved `state_dict`: name -> tensor. Raises `CheckpointError` for anything else, before a byte of it has run."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            if len(names) != 1:
                raise _Refused(f"{len(names)} entries named data.pkl")
            root = names[0].removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and _stored(archive, f"{root}byteorder") != b"little":
                raise _Refused("big-endian numbers")
            if archive.getinfo(names[0]).file_size > _MAX_PICKLE:
                raise _Refused(f"{archive.getinfo(names[0]).file_size} bytes of description")
            table = _run(_stored(archive, names[0]))
            if not isinstance(table, dict) or not all(isinstance(k, str) and isinstance(v, _View) for k, v in table.items()):
                raise _Refused("something else than a dictionary of tensors")
            return {name: _tensor(archive, root, view) for name, view in table.items()}
    except (_Refused, zipfile.BadZipFile, KeyError, IndexError, ValueError, TypeError, EOFError, OverflowError) as error:
        raise CheckpointError(path, found=str(error), expected="a state_dict of tensors as torch saves it, and nothing else; "
                              "no pickle is ever run", fix="convert it where it was made, and put the result beside it: "
                              "`safetensors.torch.save_file(state_dict, 'NAME--STEP_checkpoint.safetensors')`"
                              ) from error  # fmt: skip


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """An entry that is stored as it is: one that is packed could be larger than any memory."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise _Refused(f"{name} is compressed")
    return archive.read(name)


def _tensor(archive: zipfile.ZipFile, root: str, view: _View) -> Tensor:
    storage = view.storage
    data = _stored(archive, f"{root}data/{storage.key}")
    last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True) if n)
    if (
        len(data) < storage.numel * storage.dtype.itemsize
        or min((*view.size, *view.stride, view.offset), default=0) < 0
        or (0 not in view.size and last >= storage.numel)
    ):
        raise _Refused(f"a tensor of {view.size} beyond its {len(data)} bytes")
    if 0 in view.size:
        return torch.empty(view.size, dtype=storage.dtype)
    flat = torch.frombuffer(bytearray(data), dtype=storage.dtype)
    return flat.as_strided(view.size, view.stride, view.offset).contiguous()


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        at = len(stack) - 1 - next(i for i, item in enumerate(reversed(stack)) if item is _MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[int(argument or 0)] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[int(argument or 0)])
            case "SETITEM" | "SETITEMS":
                pairs = to_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                _dictionary(stack[-1]).update(zip(pairs[::2], pairs[1::2], strict=True))
            case "GLOBAL":
                if argument not in _NAMES:
                    raise _Refused(f"the name {argument!r}")
                stack.append(_Name(str(argument)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, name = stack.pop(), stack.pop()
                stack.append(_made(name, arguments))
            case "BUILD":  # a state_dict's versions, which say nothing of its tensors
                stack.pop()
                _dictionary(stack[-1])
            case "STOP":
                return stack.pop()
            case other:
                raise _Refused(f"the instruction {other}")
    raise _Refused("a description without an end")


def _dictionary(item: Any) -> dict:
    if not isinstance(item, dict):
        raise _Refused(f"a change to a {type(item).__name__}")
    return item


def _storage(identity: Any) -> _Storage:
    match identity:
        case ("storage", _Name(text), str(key), str(), int(numel)) if text.removeprefix("torch ") in _STORAGES:
            return _Storage(key, _STORAGES[text.removeprefix("torch ")], numel)
    raise _Refused("a storage of another kind")


def _made(name: Any, arguments: Any) -> Any:
    match name, arguments:
        case _Name("collections OrderedDict"), ():
            return {}
        case _Name("torch._utils _rebuild_tensor_v2"), (_Storage() as storage, int(offset), tuple(size), tuple(stride), *_):
            if len(size) == len(stride) and all(isinstance(n, int) for n in (*size, *stride)):
                return _View(storage, offset, size, stride)
        case _Name("torch._utils _rebuild_parameter"), (_View() as view, *_):
            return view
    raise _Refused("a call of another kind")
