"""Writing files so that a crash or a full disk leaves the old one or the new one, never half of either.

The one place that knows how: everything kept on disk (configs, statuses, results, reports, datasets, caches) goes through
here, and a full disk is always the same `MachineError`. Standard library only, so the lightest parts may use it.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from vla.errors import MachineError, UsageError

TEMPORARY = ".tmp-"
"""In the name of everything being written, before the writer's process id. Whoever owns the folder next may delete it."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXTS = ("No space left", "File too large", "quota exceeded", "StorageFull")


def temporary_name(path: Path) -> Path:
    """Where this process writes what is going to be `path`: beside it, hidden."""
    return path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}")


def clear_stale(path: Path) -> None:
    """Remove what processes that died on this machine had begun to write in place of `path`."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}{TEMPORARY}*"):
        if is_alive(stale.name.rpartition(TEMPORARY)[2]):
            continue
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)


def is_alive(process: str | int) -> bool:
    """Whether a process with this id runs here; what is no id is nobody's."""
    try:
        os.kill(int(process), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except OSError:  # somebody else's
        pass
    return True


def check_place(path: Path, option: str = "--out") -> None:
    """Raise `UsageError` where nothing new can be made at `path`: a file stands on the way, or nobody may write there.

    For commands that work long before they write. What lies at `path` itself is the caller's to judge.
    """
    above = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(path, found=f"{above} " + ("may not be written to" if above.is_dir() else "is a file"),
                         expected="a place in a folder that can be written", fix=f"choose another {option}")  # fmt: skip


def replace_file(path: Path, data: str | bytes | memoryview, safe: str = "the previous file is intact") -> None:
    """Write `data` (text as UTF-8) beside `path`, force it to disk, then rename over `path`. Missing folders are made.

    Raises `MachineError` on a full disk, which says what is `safe`; other `OSError`s as they are.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full(path, error, safe) from error
        raise


def digest_of(content: dict[str, Any]) -> str:
    """sha256 of JSON content, whatever the order of its keys and without what it says under `digest` itself."""
    told = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` means a full disk, a quota or a file-size limit; some libraries (safetensors) say so as text only."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(text in str(error) for text in _FULL_TEXTS)


def disk_full(where: object, error: BaseException, safe: str) -> MachineError:
    """The error to raise from one that `is_disk_full`; `safe` says what has not been lost."""
    found = error.strerror if isinstance(error, OSError) and error.strerror else error
    return MachineError(where, found=f"{found} while writing; {safe}", expected="room for it",
                        fix="free some space (`df -h` shows where), then run the same command again")  # fmt: skip


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of JSON lines, and how many lines were none; ([], 0) when there is no such file.

    A last line cut short is what a kill leaves behind: it is passed over and not counted.
    """
    try:
        lines = path.read_text(errors="replace").split("\n")
    except FileNotFoundError:
        return [], 0
    records, bad = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            bad += number < len(lines)  # only a line without an end can have been cut
            continue
        if isinstance(value, dict):
            records.append(value)
        else:
            bad += 1
    return records, bad
