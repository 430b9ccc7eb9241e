"""A run's folder: atomic saves, exact resume, one owner.

    run/  config.yaml  metrics.jsonl  STATUS.json  report.html  policy/
          checkpoints/step_00001200/{policy/, state.safetensors, training.json, manifest.json}

A save writes a temporary folder, flushes every file, writes `manifest.json` (sha256 and size of each file) last, and
renames. Safetensors and JSON only. Loading takes the newest folder whose manifest holds, names what it passed over, and
fails only when none is left. A crash at any moment leaves the last good state.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vla.errors import CheckpointError, MachineError, UsageError

MANIFEST = "manifest.json"


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Make `folder` hold exactly what `write(temporary)` wrote, or leave everything as it was.

    Raises `MachineError` on a full disk or a file-size limit; the temporary folder is removed and the old one untouched.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {}
        for path in files:
            _flush(path)
            manifest[str(path.relative_to(temporary))] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        (temporary / MANIFEST).write_text(json.dumps({"files": manifest}, indent=1))
        _flush(temporary / MANIFEST)
        _flush(temporary)
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        _flush(folder.parent)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            raise MachineError(folder, found=f"{error}", expected="room for one more save",
                               fix=f"free disk space (df -h {folder.parent}); the last save is intact") from error  # fmt: skip
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` is ENOSPC, EDQUOT or EFBIG; safetensors reports them as text only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(words in str(error) for words in ("No space left", "File too large", "quota exceeded", "StorageFull"))


def verify(folder: Path) -> list[str]:
    """What is wrong with a published folder, one line per file; empty when the manifest holds."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{MANIFEST}: {error}"]
    problems = []
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name}: {path.stat().st_size} bytes, not {entry['bytes']}")
        elif _sha256(path) != entry["sha256"]:
            problems.append(f"{name}: sha256 differs")
    return problems


def write_atomic(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text)
        _flush(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise MachineError(path, found=str(error), expected="room for a small file", fix="free disk space") from error
        raise


class Run:
    """A training run's folder, owned by one process (rank 0) at a time."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._lock: Any = None

    # -------------------------------------------------------------------------------------------- ownership

    def claim(self) -> None:
        """Take the folder, or raise `UsageError` naming who has it. The lock dies with the process."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.root / ".lock", "a+")  # noqa: SIM115 - held until release()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            raise UsageError(self.root, found=f"in use by {owner}", expected="a run folder nobody is writing",
                             fix="wait for it, stop it, or choose another run.out") from None  # fmt: skip
        self._lock.truncate(0)
        self._lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()
        for leftover in [*self.root.glob(".*.tmp-*"), *self.checkpoints.glob(".*.tmp-*"), *self.checkpoints.glob(".*.old-*")]:
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)

    def release(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    # -------------------------------------------------------------------------------------------- small files

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def status(self, state: str, **facts: Any) -> None:
        """Write STATUS.json: `running`, `finished`, `preempted`, `failed` or `diverged`, and what goes with it."""
        write_atomic(self.root / "STATUS.json", json.dumps({"state": state, "time": time.time(), **facts}, indent=1))

    def read_status(self) -> dict:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.root / "STATUS.json").read_text())
        return {}

    def log(self, record: dict) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.root / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def trim_log(self, step: int) -> None:
        """Drop log lines after `step`: they will be written again."""
        path = self.root / "metrics.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            write_atomic(path, "".join(line + "\n" for line in kept))

    # -------------------------------------------------------------------------------------------- checkpoints

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict, save_policy: Callable[[Path], None], keep: int) -> Path:
        """Publish `checkpoints/step_<step>` and prune to the newest `keep`."""

        def write(folder: Path) -> None:
            folder.mkdir(parents=True)
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / "state.safetensors")
            (folder / "training.json").write_text(json.dumps({"step": step, **facts}, indent=1))
            save_policy(folder / "policy")

        folder = self.checkpoints / f"step_{step:08d}"
        publish(folder, write)
        for old in self.steps()[:-keep] if keep else []:
            shutil.rmtree(self.checkpoints / f"step_{old:08d}", ignore_errors=True)
        return folder

    def steps(self) -> list[int]:
        """Steps that have a checkpoint folder, oldest first."""
        return sorted(int(p.name[5:]) for p in self.checkpoints.glob("step_*") if p.name[5:].isdigit())

    def newest(self, say: Callable[[str], None] = print) -> tuple[Path, dict, dict[str, Tensor]] | None:
        """(folder, training.json, tensors) of the newest checkpoint whose manifest holds; None when there is none.

        Damaged ones are named through `say`. Raises `CheckpointError` when every one is damaged.
        """
        bad = []
        for step in reversed(self.steps()):
            folder = self.checkpoints / f"step_{step:08d}"
            if problems := verify(folder):
                bad.append(f"{folder.name}: {'; '.join(problems)}")
                say(f"passing over a damaged checkpoint: {bad[-1]}")
                continue
            facts = json.loads((folder / "training.json").read_text())
            return folder, facts, load_file(folder / "state.safetensors")
        if bad:
            raise CheckpointError(self.checkpoints, found="; ".join(bad), expected="one intact checkpoint",
                                  fix="start again with another run.out; nothing here can be resumed")  # fmt: skip
        return None


def pack_optimizer(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """AdamW's state as named tensors: `adam/<parameter>/<key>`."""
    return {
        f"adam/{names[parameter]}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]) -> None:
    """Inverse of `pack_optimizer`; raises `CheckpointError` when a parameter has no state."""
    for parameter, name in names.items():
        prefix = f"adam/{name}/"
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if not state:
            raise CheckpointError("state.safetensors", found=f"no optimizer state for {name}", expected="one per parameter",
                                  fix="resume with the code and config that made it")  # fmt: skip
        optimizer.state[parameter] = {k: v.to(parameter.device) if k != "step" else v for k, v in state.items()}


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step_of(line: str) -> float:
    try:
        return json.loads(line).get("step", 0)
    except ValueError:  # a line cut off by the crash
        return float("inf")


def iter_log(path: Path) -> Iterator[dict]:
    """Lines of a metrics.jsonl; a line cut off by a crash is passed over."""
    if path.is_file():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)
