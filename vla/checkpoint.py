"""A run's folder: atomic saves, exact resume, one owner.

    run/  config.yaml  metrics.jsonl  STATUS.json  report.html  policy/
          checkpoints/step_00001200/{policy/, state.safetensors, training.json, manifest.json}

A save writes a temporary folder, flushes every file, writes `manifest.json` (sha256 and size of each file) last, and
renames. Safetensors and JSON only. Loading takes the newest folder whose manifest holds, names what it passed over, and
fails only when none is left. A crash at any moment leaves the last good state, if need be under a hidden name that the
next owner of the run (`Run.claim`) gives its own again.
"""

from __future__ import annotations

import contextlib
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

from vla.durable import TEMPORARY, clear_stale, disk_full, flush, is_disk_full, read_lines, replace_file, temporary_name
from vla.errors import CheckpointError, UsageError

MANIFEST = "manifest.json"
_OLD = ".old-"


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Make `folder` hold exactly what `write(temporary)` wrote, or leave everything as it was.

    Raises `MachineError` on a full disk or a file-size limit; whatever fails, the temporary folder is removed and the old
    one is in its place. After a crash between the two renames `recover` finishes the job.
    """
    temporary, old = temporary_name(folder), folder.with_name(f".{folder.name}{_OLD}{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear_stale(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        write(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {}
        for path in files:
            flush(path)
            manifest[str(path.relative_to(temporary))] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        (temporary / MANIFEST).write_text(json.dumps({"files": manifest}, indent=1))
        flush(temporary / MANIFEST)
        for path in temporary.rglob("*"):
            if path.is_dir():
                flush(path)
        flush(temporary)
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            raise disk_full(folder, error, "the last save is intact") from error
        raise
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(parent: Path) -> None:
    """Clear away what dead processes left in `parent`; call it as the folder's only owner.

    A folder that is missing under its own name was being replaced when its owner died: a temporary one whose manifest
    holds takes its place, else the old one does. Everything else that is temporary or old goes.
    """
    for leftover in [*parent.glob(f".*{TEMPORARY}*"), *parent.glob(f".*{_OLD}*")]:  # the newer ones first
        if not leftover.is_dir():
            leftover.unlink(missing_ok=True)
            continue
        old = _OLD in leftover.name
        folder = parent / leftover.name[1:].rpartition(_OLD if old else TEMPORARY)[0]
        if not folder.exists() and (old or not verify(leftover)):
            leftover.rename(folder)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def verify(folder: Path) -> list[str]:
    """What is wrong with a published folder, one line per file; empty when the manifest holds."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())["files"].items()
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return [f"{MANIFEST}: {error}"]
    problems = []
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != size:
            problems.append(f"{name}: {path.stat().st_size} bytes, not {size}")
        elif _sha256(path) != digest:
            problems.append(f"{name}: sha256 differs")
    return problems


class Run:
    """A training run's folder, owned by one process (rank 0) at a time."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._lock: Any = None

    # -------------------------------------------------------------------------------------------- ownership

    def claim(self) -> None:
        """Take the folder and mend what a crash left in it, or raise `UsageError` naming who has it.

        The lock dies with the process."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.root / ".lock", "a+")  # noqa: SIM115 - held until release()
        except OSError as error:
            raise UsageError(self.root, found=str(error), expected="a folder that can be made and written",
                             fix="choose another run.out") from error  # fmt: skip
        try:
            # A record lock, not flock: forked loader workers would inherit that one and hold it after our death.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            raise UsageError(self.root, found=f"in use by {owner}", expected="a run folder nobody is writing",
                             fix="wait for it, stop it, or choose another run.out") from None  # fmt: skip
        self._lock.truncate(0)
        self._lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()
        for folder in (self.root, self.checkpoints):
            recover(folder)

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
        replace_file(self.root / "STATUS.json", json.dumps({"state": state, "time": time.time(), **facts}, indent=1))

    def read_status(self) -> dict:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.root / "STATUS.json").read_text())
        return {}

    def log(self, record: dict) -> None:
        """Append one line to metrics.jsonl, or raise `MachineError` on a full disk and leave the file as it was."""
        path = self.root / "metrics.jsonl"
        try:
            with open(path, "ab", buffering=0) as file:
                end, line = file.tell(), json.dumps(record).encode() + b"\n"
                try:
                    written = file.write(line)
                    if written < len(line):  # a limit is reported by the write after the one it cut short
                        file.write(line[written:])
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(path, error, "the lines before this one are intact") from error
            raise

    def trim_log(self, step: int) -> None:
        """Drop log lines after `step`: they will be written again."""
        path = self.root / "metrics.jsonl"
        if path.is_file():
            kept = [record for record in read_lines(path)[0] if record.get("step", 0) <= step]
            replace_file(path, "".join(json.dumps(record) + "\n" for record in kept))

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
        # `step` too: the fused optimizer wants it where the parameter is, as load_state_dict would put it.
        optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def iter_log(path: Path) -> Iterator[dict]:
    """Lines of a metrics.jsonl; a line cut off by a crash is passed over."""
    yield from read_lines(path)[0]
