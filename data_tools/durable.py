"""Writing files so that a crash or a full disk leaves the old one or the new one, never half of either."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from vla.errors import MachineError

TEMPORARY = ".tmp"
"""Suffix of a file being written; whoever opens the folder next may delete it."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write `data` beside `path`, force it to disk, then rename over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def disk_full(where: object, safe: str) -> Iterator[None]:
    """Turn "no space", "quota" and "file too large" into a `MachineError` that says what is `safe`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise MachineError(
            error.filename or where, found=f"{error.strerror} while writing; {safe}", expected="room for the dataset",
            fix="free some space, then run the same command again: it continues where it stopped",
        ) from error
