"""Where a policy lies, here or on the Hub, and why a folder is refused before any of it is believed.

Nothing that can run code is ever opened: no pickle, no module beside the weights, no key that asks for one. On the Hub the list
of files is judged first, then the small JSON files, and only then are weights downloaded; a folder here is judged the same way.
Chat templates are data: transformers renders them in jinja's immutable sandbox.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from vla.durable import is_disk_full
from vla.episodes import hub
from vla.errors import CheckpointError, DataError, MachineError

logger = logging.getLogger(__name__)

PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.md", "*.jinja", "*.model")
"""What a policy consists of, and all that is downloaded: `.jinja` are chat templates, `.model` sentencepiece vocabularies."""
PICKLES = frozenset((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".h5", ".hdf5", ".keras"))
"""Names of formats that run code when they are read, or may."""
CODE = frozenset((".py", ".pyc", ".pyw", ".so", ".pyd", ".dll", ".dylib"))
REMOTE = ("auto_map", "trust_remote_code", "custom_pipelines")
"""Keys that ask transformers or diffusers for code that lies beside the weights."""
OPENVLA = ("auto_map", "custom_pipelines", "*.py")
"""What OpenVLA's own folders carry and the native reader never looks at."""
_OFT = "*_checkpoint.pt"  # OFT's further files, which vla/backbones/prismatic_zip.py reads without running their pickle
_CLASSES = ("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type", "video_processor_type")
_DATA = ("tokenizer.json", "vocab.json", "added_tokens.json", "policy.json", "manifest.json", "dataset_statistics.json")
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_MAX_HEADER = 100_000_000  # bytes, safetensors' own limit
_MOST = 20  # problems named in one message


def fetch_policy(
    path: str | Path, allow_ignored: tuple[str, ...] = (), cache: str | Path | None = None, progress: bool = True
) -> Path:
    """The policy folder of a path (a policy or run folder) or of `user/name`, `user/name@revision`, `hub:user/name@revision`.

    `allow_ignored`: remote-code keys and names of code files (patterns) the caller promises never to use; they are named in a log
    line instead of refused, pickles never. OpenVLA's own folders have theirs ignored, since our reader is native.
    `cache` is as in `vla.episodes.hub.resolve`. A commit that is already there needs no network, and anything else on the Hub is
    printed to stderr with the line that pins it.

    Raises `CheckpointError` for what is not there, cannot be reached or is refused, `UsageError` for a malformed name,
    `MachineError` on a full disk.
    """
    name = hub_name(path)
    if name is None:
        folder = Path(path)
        folder = folder / "policy" if (folder / "policy" / "policy.json").is_file() else folder
        if any((folder / one).is_file() for one in ("policy.json", "config.json", "adapter_config.json")):
            refuse_unsafe(folder, allow_ignored)
        return folder
    folder = _download(name, allow_ignored, cache, progress)
    if not name.pinned:
        print(f"{name.repo} is commit {folder.name} today; to pin it: {name.repo}@{folder.name}", file=sys.stderr)
    return folder


def hub_name(path: str | Path) -> hub.HubName | None:
    """What `path` names on the Hub; None for a folder, and for what can be none."""
    name = hub.parse(path)
    if name is None and not Path(path).exists() and _NAME.fullmatch(str(path)):
        name = hub.HubName(str(path), None)
    return name


def _download(name: hub.HubName, allow_ignored: tuple[str, ...], cache: str | Path | None, progress: bool) -> Path:
    from huggingface_hub import HfApi, errors, snapshot_download

    def snapshot(patterns: Iterable[str], revision: str | None, **options: Any) -> Path:
        found = snapshot_download(
            name.repo, revision=revision, allow_patterns=list(patterns), endpoint=hub.endpoint(),
            cache_dir=Path(cache) / "hub" if cache else None, tqdm_class=None if progress else hub.quiet(), **options,
        )  # fmt: skip
        return Path(found)

    def cached() -> Path:
        folder = snapshot(PATTERNS, name.revision, local_files_only=True)
        refuse_unsafe(folder, allow_ignored)
        return folder

    with explained(name, missing="no such folder here, and on the Hub: "):
        if name.pinned:
            with suppress(errors.LocalEntryNotFoundError, CheckpointError):  # not there, or not all of it: looked at again below
                if any((folder := cached()).glob("*.safetensors")):
                    return folder
        try:
            info = HfApi(endpoint=hub.endpoint()).model_info(name.repo, revision=name.revision)
        except errors.HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
            return cached()
        except (OSError, ValueError, RuntimeError) as error:  # no connection, or told to have none: perhaps it is here already
            logger.info("%s: %s", name, error)
            return cached()
        except Exception as error:
            if not type(error).__module__.startswith("httpx"):  # which httpx depends on the version of the client
                raise
            return cached()
        names = sorted(entry.rfilename for entry in info.siblings or [])
        _need_policy(name, names)
        first = snapshot([n for n in names if n.endswith(".json") and "/" not in n], info.sha)
        ignored = (*allow_ignored, *_openvla(first))
        _complain(name, [*judge_names(names, ignored), *judge_keys(first, ignored), *_judge_indices(first, names)])
        folder = snapshot([*PATTERNS, *([_OFT] if _OFT in ignored else [])], info.sha)
    refuse_unsafe(folder, allow_ignored)
    return folder


def _need_policy(name: hub.HubName, names: list[str]) -> None:
    if not {"policy.json", "config.json"} & set(names):
        raise CheckpointError(name, found=f"no policy.json among its {len(names)} files", expected="a policy folder",
                              fix="choose a repository that `vla push` wrote")  # fmt: skip


def _openvla(folder: Path) -> tuple[str, ...]:
    """What is passed over in `folder` without being asked to: nothing, unless it is in OpenVLA's layout."""
    if (folder / "policy.json").is_file() or not (folder / "config.json").is_file():
        return ()
    from vla.backbones.prismatic_files import is_openvla_folder

    return (*OPENVLA, _OFT) if is_openvla_folder(folder) else ()


# --------------------------------------------------------------------------------------------------------- refusals


def refuse_unsafe(folder: Path, allow_ignored: tuple[str, ...] = ()) -> None:
    """Raise `CheckpointError` naming every file and key of `folder` that could run code, leads out of it, or is not whole.

    A folder in OpenVLA's layout is left to its own reader (vla/backbones/prismatic_files.py), which refuses the same and more.
    """
    if _openvla(folder):
        return
    ignored = allow_ignored
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    problems = judge_names(files, ignored)
    problems += [f"{name}: a link that leads out of the folder" for name, path in files.items() if not _inside(path, folder)]
    if not problems:  # nothing is opened in a folder that has a file of a forbidden kind or leads elsewhere
        problems += judge_keys(folder, ignored)
        for name, path in files.items():
            if not fnmatch(name, _OFT):
                problems += [f"{name}: {found}" for found in [judge_content(path)] if found]
        problems += _judge_indices(folder, files)
    _complain(folder, problems)


def _complain(where: object, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _MOST} more" if len(problems) > _MOST else ""
        raise CheckpointError(where, found="; ".join(problems[:_MOST]) + more,
                              expected="whole safetensors, JSON and text only: no pickle, no remote code, no link to elsewhere",
                              fix="ask its author for safetensors without code beside them; a file that is cut short: get it "
                              "again")  # fmt: skip


def judge_names(names: Iterable[str], allow_ignored: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with files for their names alone, one line each."""
    problems, passed = [], []
    for name in sorted(names):
        path = PurePosixPath(name)
        ending = path.suffix.lower()
        if ending in PICKLES and not (_OFT in allow_ignored and fnmatch(path.name, _OFT)):
            problems.append(f"{name}: {ending} files can run code when they are read")
        elif ending in CODE:
            if any(fnmatch(path.name, pattern) for pattern in allow_ignored if "." in pattern):
                passed.append(name)
            else:
                problems.append(f"{name}: code beside the weights")
    if passed:
        logger.info("never run, passed over: %s", ", ".join(passed))
    return problems


def judge_keys(folder: Path, allow_ignored: tuple[str, ...] = ()) -> list[str]:
    """Keys of the JSON files in `folder` that ask for remote code, at any depth: `config.json: auto_map`, one line each."""
    problems, passed = [], []
    for path in sorted(folder.rglob("*.json")):
        if path.name in _DATA or path.name.endswith(".index.json") or _hidden(path, folder):
            continue
        where = path.relative_to(folder).as_posix()
        try:
            tree = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: not JSON ({error})")
            continue
        for at, key, value in _walk(tree):
            if key in REMOTE and value:
                (passed if key in allow_ignored else problems).append(f"{where}: {at}")
            elif key in _CLASSES and value and not (isinstance(value, str) and value.isidentifier()):
                problems.append(f"{where}: {at}, which names the class {value!r} of other code")
    if passed:
        logger.warning("%s: remote code is never run here; ignored: %s", folder, ", ".join(passed))
    return problems


def _walk(tree: Any, at: str = "") -> Iterator[tuple[str, str, Any]]:
    """(path, key, value) of every key, at any depth, without recursion."""
    waiting = [(at, tree)]
    while waiting:
        at, node = waiting.pop()
        if isinstance(node, dict):
            for key, value in node.items():
                yield f"{at}{key}", key, value
                waiting.append((f"{at}{key}.", value))
        elif isinstance(node, list):
            waiting += [(f"{at}{i}.", value) for i, value in enumerate(node)]


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
        length = int.from_bytes(file.read(8), "little")
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


def _judge_indices(folder: Path, names: Iterable[str]) -> list[str]:
    """Indices of sharded weights that name a shard which is missing or elsewhere; `names` are the files there are."""
    problems, there = [], set(names)
    for path in sorted(folder.glob("*.index.json")):
        try:
            shards = set(json.loads(path.read_bytes())["weight_map"].values())
            if any(not isinstance(shard, str) for shard in shards):
                raise TypeError("a shard's name is text")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
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


def _inside(path: Path, folder: Path) -> bool:
    target, root = path.resolve(), folder.resolve()
    if target.is_relative_to(root):
        return True
    # The Hub's cache keeps contents once, in blobs/ beside snapshots/<commit>/, and links to them.
    return root.parent.name == "snapshots" and target.is_relative_to(root.parent.parent / "blobs")


# ----------------------------------------------------------------------------------------------------------- errors


@contextmanager
def explained(name: hub.HubName, kind: str = "policy", missing: str = "") -> Iterator[None]:
    """`vla.episodes.hub.explained`, which speaks of datasets, for a repository of this `kind` ("policy" or "dataset").

    A policy that cannot be had is a `CheckpointError`, also without a connection; `missing` begins what it says it found.
    """
    try:
        with hub.explained(name):
            yield
    except (DataError, MachineError) as error:
        if kind == "dataset" or isinstance(error.__cause__, DataError | None) or is_disk_full(error.__cause__):
            raise
        raise CheckpointError(name, found=missing + _of_policies(error.found), expected=_of_policies(error.expected),
                              fix=("check the path; " if missing else "") + _of_policies(error.fix)) from error  # fmt: skip


def _of_policies(text: str) -> str:
    return re.sub(r"(?<![\w/-])dataset(?![\w/-])", "policy", text.replace(" --repo-type dataset", "").replace("/datasets/", "/"))
