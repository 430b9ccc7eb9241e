"""Folders that others made, judged before any of them is believed: no pickle, no code, no key that asks for code, no link to
elsewhere, every file of weights whole.

Only names, sizes, first bytes and small JSON files are looked at; nothing here imports what could run them. The rules are the
same for a policy, a foreign vision-language model and an adapter's base, here and on the Hub (`vla/fetch.py`), and for what
`vla push` sends. Chat templates are data: transformers renders them in jinja's immutable sandbox.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from vla.errors import CheckpointError

logger = logging.getLogger(__name__)

PICKLES = frozenset((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".h5", ".hdf5", ".keras"))
"""Names of formats that run code when they are read, or may."""
CODE = frozenset((".py", ".pyc", ".pyw", ".so", ".pyd", ".dll", ".dylib"))
REMOTE = ("auto_map", "trust_remote_code", "custom_pipelines", "_attn_implementation_internal")
"""Keys that ask transformers or diffusers for code that lies beside the weights, or on the Hub (CVE-2026-4372)."""
OPENVLA = ("auto_map", "custom_pipelines", "*.py", "*_checkpoint.pt")
"""What OpenVLA's own folders carry and the native reader never runs: keys, modules, and OFT's further files, whose tensors
vla/backbones/prismatic_zip.py reads without their pickle."""
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation",
            "_experts_implementation_internal")  # fmt: skip
"""Keys under which `user/name` is code from the Hub; the value may be one for each part of a model."""
_CLASSES = ("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type", "video_processor_type")
_DATA = ("tokenizer.json", "vocab.json", "added_tokens.json", "manifest.json", "dataset_statistics.json")  # keys are words
_MAX_HEADER = 100_000_000  # bytes, safetensors' own limit
_MOST = 20  # problems named in one message


def is_openvla(folder: Path) -> bool:
    """Whether `folder` is in OpenVLA's layout, and no policy folder of ours."""
    if (folder / "policy.json").is_file():
        return False
    try:
        return json.loads((folder / "config.json").read_bytes())["model_type"] == "openvla"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def refuse_unsafe(folder: Path, allow_ignored: tuple[str, ...] = ()) -> None:
    """Raise `CheckpointError` naming every file and key of `folder` that could run code, leads out of it, or is not whole.

    `allow_ignored`: remote-code keys and names of code files (patterns) the caller promises never to use. OpenVLA's own are
    passed over, since its reader is native; that reader also judges whether its weights are whole, and says what it left out.
    """
    native = is_openvla(folder)
    ignored = (*allow_ignored, *OPENVLA) if native else allow_ignored
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    problems = judge_names(files, ignored)
    problems += [f"{name}: a link {bad}" for name, path in files.items() for bad in [_bad_link(path, folder)] if bad]
    if not problems:  # nothing is opened in a folder that has a file of a forbidden kind or leads elsewhere
        problems += judge_keys(folder, ignored, quiet=native)
        for name, path in files.items():
            if not (native and (path.suffix == ".safetensors" or fnmatch(name, OPENVLA[-1]))):
                problems += [f"{name}: {found}" for found in [judge_content(path)] if found]
        if not native:
            problems += judge_indices(folder, files)
    complain(folder, problems)


def complain(where: object, problems: list[str]) -> None:
    """Raise `CheckpointError` with these lines, if there are any."""
    if problems:
        more = f"; and {len(problems) - _MOST} more" if len(problems) > _MOST else ""
        raise CheckpointError(where, found="; ".join(problems[:_MOST]) + more,
                              expected="whole safetensors, JSON and text only: no pickle, no remote code, no link to elsewhere",
                              fix="a file nobody needs (training_args.bin): delete it; one cut short: get it again; code: ask "
                              "the author for a folder that works without")  # fmt: skip


def judge_names(names: Iterable[str], allow_ignored: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with files for their names alone, one line each."""
    problems, passed = [], []
    for name in sorted(names):
        path = PurePosixPath(name)
        ending = path.suffix.lower()
        allowed = any(fnmatch(path.name, pattern) for pattern in allow_ignored if "." in pattern)
        if ending in PICKLES and not (allowed and fnmatch(path.name, OPENVLA[-1])):
            problems.append(f"{name}: {ending} files can run code when they are read")
        elif ending in CODE:
            if allowed:
                passed.append(name)
            else:
                problems.append(f"{name}: code beside the weights")
    if passed:
        logger.info("never run, passed over: %s", ", ".join(passed))
    return problems


def judge_keys(folder: Path, allow_ignored: tuple[str, ...] = (), quiet: bool = False) -> list[str]:
    """Keys of the JSON files in `folder` that ask for code, at any depth: `config.json: auto_map`, one line each.

    What is allowed is said in a log line, unless `quiet`.
    """
    problems, passed = [], []
    for path in sorted(folder.rglob("*.json")):
        if not path.is_file() or path.name in _DATA or path.name.endswith(".index.json") or _hidden(path, folder):
            continue
        where = path.relative_to(folder).as_posix()
        try:
            tree = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{where}: not JSON ({error})")
            continue
        for at, key, value in _walk(tree):
            if key in REMOTE and value:
                (passed if key in allow_ignored else problems).append(f"{where}: {at}")
            elif key in _KERNELS and (kernels := [text for text in _texts(value) if "/" in text]):
                problems.append(f"{where}: {at}, which names code on the Hub ({', '.join(kernels)})")
            elif key in _CLASSES and value and not (isinstance(value, str) and value.isidentifier()):
                problems.append(f"{where}: {at}, which names the class {value!r} of other code")
    if passed and not quiet:
        logger.warning("%s: remote code is never run here; ignored: %s", folder, ", ".join(passed))
    return problems


def _walk(tree: Any) -> Iterator[tuple[str, str, Any]]:
    """(path, key, value) of every key, at any depth, without recursion."""
    waiting = [("", tree)]
    while waiting:
        at, node = waiting.pop()
        if isinstance(node, dict):
            for key, value in node.items():
                yield f"{at}{key}", key, value
                waiting.append((f"{at}{key}.", value))
        elif isinstance(node, list):
            waiting += [(f"{at}{i}.", value) for i, value in enumerate(node)]


def _texts(tree: Any) -> Iterator[str]:
    """Every string of a value, at any depth: transformers also takes {"": "user/name", "text_config": ...}."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            waiting += [*node, *node.values()]
        elif isinstance(node, list):
            waiting += node


def judge_content(path: Path) -> str | None:
    """What is wrong with a file's first bytes, whatever it is called; for safetensors also whether it is whole."""
    if path.suffix == ".safetensors":
        return judge_safetensors(path)
    with open(path, "rb") as file:
        start = file.read(6)
        if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            return "a pickle under another name"
        if start[:4] == b"PK\x03\x04" and any(name.endswith((".pkl", ".pickle", ".py")) for name in _zipped(path)):
            return "a zip archive with a pickle in it"
        if start == b"\x93NUMPY" and b"O'" in file.read(4096).partition(b"\n")[0]:
            return "a numpy file of Python objects, which are a pickle"
    return None


def _zipped(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return [".pkl"]  # an archive that cannot be looked into is not one to trust
    return [*names, *([".pkl"] if any(name.endswith(".npy") for name in names) else [])]  # .npz may hold objects


def judge_safetensors(path: Path) -> str | None:
    """`expected N bytes, found M` for a file that is cut short or longer than its header promises; nothing is loaded."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and length > _MAX_HEADER:
            return "a pickle under another name"
        if size < 8 or length > _MAX_HEADER:
            return f"no safetensors header in its {size} bytes"
        if length > size - 8:
            return f"expected at least {8 + length} bytes, found {size}"
        try:
            header = json.loads(file.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return "no safetensors header"
    end = 8 + length + max(ends, default=0)
    return None if size == end else f"expected {end} bytes, found {size}"


def judge_indices(folder: Path, names: Iterable[str]) -> list[str]:
    """Indices of sharded weights that name a shard which is missing or elsewhere; `names` are the files there are."""
    problems, there = [], set(names)
    for path in sorted(folder.glob("*.index.json")):
        if path.is_dir():  # no loader takes it for an index
            continue
        try:
            shards = set(json.loads(path.read_bytes())["weight_map"].values())
            if any(not isinstance(shard, str) for shard in shards):
                raise TypeError("a shard's name is text")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            problems.append(f"{path.name}: no weight_map of shards ({type(error).__name__})")
            continue
        for shard in sorted(shards):
            if PurePosixPath(shard).name != shard or "\\" in shard:
                problems.append(f"{path.name}: the shard {shard!r} is not beside it")
            elif shard not in there:
                problems.append(f"{path.name}: the shard {shard} is missing")
    return problems


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if not _hidden(path, folder) and (path.is_symlink() or path.is_file()):
            yield path


def _hidden(path: Path, folder: Path) -> bool:
    """Inside a hidden folder, such as `.git` or `.cache`, where no loader looks."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts[:-1])


def _bad_link(path: Path, folder: Path) -> str | None:
    """What is wrong with where a file lies, if it is a link or below one."""
    try:
        target, root = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError):  # dangling, or a circle
        return "that leads nowhere"
    # The Hub's cache keeps contents once, in blobs/ beside snapshots/<commit>/, and links to them.
    in_cache = root.parent.name == "snapshots" and target.is_relative_to(root.parent.parent / "blobs")
    if not (target.is_relative_to(root) or in_cache):
        return "that leads out of the folder"
    return "to a folder, whose files would not be looked at" if target.is_dir() else None
