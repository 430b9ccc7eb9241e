"""The folder a robot is given: graphs, tokenizer, what the numbers mean, and what was measured. Whole, or not there at all.

`export.json` is written last, names every other file with its sha256, and is all a runtime reads beside the graphs.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vla.backbones.student import WORDS, StudentNet
from vla.durable import check_place, clear_stale, digest_of, disk_full, flush, is_disk_full, replace_file, temporary_name
from vla.errors import UsageError
from vla.evaluate import versions
from vla.export.actor import OnnxPolicy
from vla.export.onnx import OPSET, RUNTIMES, check_opset, check_student, compare, require_onnx, write_graphs
from vla.policy import VLAPolicy

MEANING = "export.json"

Further = Callable[[Path, dict[str, Any]], None]
"""(the folder being written, export.json's content so far): adds graphs, measurements, the card."""


def export_onnx(policy: VLAPolicy, folder: Path, opset: int = OPSET, further: Further | None = None) -> dict[str, Any]:
    """Write a student into the new folder `folder`; returns the content of export.json.

    `further` is called once the float32 graphs agree with the policy, before anything is published; what it raises leaves
    nothing behind. Raises `UsageError` (no student, a wrong opset, a folder that is not empty), `CheckpointError` (graphs that do
    not do what the policy does) and `MachineError` (a full disk, packages that are missing).
    """
    net = check_student(policy)
    check_opset(opset)
    require_onnx()
    with whole_folder(folder) as temporary:
        policy = (policy if policy.dtype == torch.float32 else copy.deepcopy(policy).float()).eval()
        graphs = write_graphs(policy, temporary, opset)
        policy.writer.tokenizer.backend_tokenizer.save(str(temporary / "tokenizer.json"))  # pyright: ignore
        (temporary / "requirements.txt").write_text(requirements(opset))
        meaning = meaning_of(policy, net, opset)
        meaning["graphs"] = {"sentence": graphs["sentence"], "policy": {"float32": graphs["policy"]}}
        meaning["difference"] = compare(policy, OnnxPolicy(temporary, meaning))
        if further is not None:
            further(temporary, meaning)
        seal(temporary, meaning)
    return meaning


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A place to write what is `folder` once the block has ended well; when it does not, nothing is left of it.

    Raises `UsageError` where `folder` is there and not empty, `MachineError` on a full disk.
    """
    check_empty(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_stale(folder)
    temporary = temporary_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
        flush(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            raise disk_full(folder, error, "nothing was published") from error
        raise


def check_empty(folder: Path) -> None:
    """Raise `UsageError` for a place where something is, or where nothing can be."""
    check_place(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(folder, found="files", expected="a folder that is new or empty", fix="give another --out")


def seal(folder: Path, meaning: dict[str, Any]) -> None:
    """Write export.json: `meaning` with every other file's sha256."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MEANING)
    for path in files:
        flush(path)
    meaning["files"] = {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in files}
    write_meaning(folder, meaning)


def write_meaning(folder: Path, meaning: dict[str, Any]) -> None:
    """Write export.json with the digest by which a runtime knows that nobody has edited it since."""
    meaning["digest"] = digest_of(meaning)
    replace_file(folder / MEANING, json.dumps(meaning, indent=1, allow_nan=False))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def meaning_of(policy: VLAPolicy, net: StudentNet, opset: int) -> dict[str, Any]:
    """Everything of export.json that is known before a graph is written."""
    said = policy.saved_meaning or policy.describe()
    return {
        "format": 1, "embodiments": said["embodiments"], "normalizers": said["normalizers"], "codec": said["codec"],
        "image": said["image"], "prompt": said["prompt"], "chunk": policy.chunk, "execute": policy.execute,
        "chunk_seconds": policy.config.chunk_seconds, "decode": policy.config.decode, "head": policy.config.head,
        "action_dim": policy.encoder.action_dim, "state_dim": policy.encoder.state_dim, "symbols": policy.codec.size,
        "state_token": net.state_in is not None, "robots": list(policy.embodiments), "instructions": list(policy.instructions),
        "recorded_seeds": policy.recorded_seeds, "text": {"vocab": net.config.text_vocab_size, "positions": WORDS},
        "opset": opset, "files": {}, "graphs": {}, "runtime": {"graph": "float32", "threads": 1}, "policy": policy.fingerprint,
        "versions": versions() | {package: version(package) for package in ("onnx", "onnxruntime")},
    }  # fmt: skip


def requirements(opset: int) -> str:
    """requirements.txt: what a robot installs, with the oldest versions that will do."""
    return f"onnxruntime>={RUNTIMES[opset]}\nnumpy>=2.0\ntokenizers>=0.22\npillow>=11\n"
