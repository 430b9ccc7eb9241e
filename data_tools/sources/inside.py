"""Whether a dataset's files lie in its own folder: a downloaded archive may link to, or name, any file of this machine.

One rule for everybody who reads what others wrote: `open_source` refuses by it, `vla data check` reports by it.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

MOST_METADATA = 256 * 2**20
"""Bytes of one JSON file of metadata; the largest honest ones seen are a few MB."""


def leads_out(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """(path, found, expected, fix) of links, templates and feature names that lead out of the folder `root`, and of what
    is no plain file. Follows no link and reads nothing but `meta/info.json`, and that only when it lies inside."""
    places = _inside(root)
    for path in sorted(root.rglob("*")):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in places):
            yield path, f"a link to {path.resolve()}", "files of the dataset only", (
                f"rm '{path}' and restore the file itself; do not unpack archives that hold such links")  # fmt: skip
        elif not path.is_dir() and not stat.S_ISREG(path.stat().st_mode if path.exists() else stat.S_IFREG):
            yield path, "a pipe, socket or device", "regular files only", f"rm '{path}'"
        elif path.suffix == ".json" and path.is_file() and path.stat().st_size > MOST_METADATA:
            found = f"{path.stat().st_size:,} bytes"
            yield path, found, f"at most {MOST_METADATA:,}", "restore this file from its source"
    yield from _templates(root, places)


def _inside(root: Path) -> list[Path]:
    """The folder itself and, in a Hub cache, the one next to `snapshots` that its links lead to."""
    whole = root.resolve()
    above = [folder for folder in (whole, *whole.parents) if folder.parent.name == "snapshots"]
    return [whole, *(folder.parent.parent / "blobs" for folder in above[:1])]


def _templates(root: Path, places: list[Path]) -> Iterator[tuple[Path, str, str, str]]:
    path = root / "meta" / "info.json"
    try:
        if not any(path.resolve().is_relative_to(place) for place in places) or path.stat().st_size > MOST_METADATA:
            return  # said above
        info = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return  # the readers say it
    if not isinstance(info, dict):
        return
    for key in ("data_path", "video_path"):
        if isinstance(info.get(key), str) and _out(info[key]):
            yield path, f"{key} {info[key]!r}", "a path inside the dataset", (
                f"restore {key}, e.g. data/chunk-{{chunk_index:03d}}/file-{{file_index:03d}}.parquet")  # fmt: skip
    for name in info["features"] if isinstance(info.get("features"), dict) else ():
        if _out(name):  # becomes the folder of its video
            yield path, f"feature {name!r}", "a name without ways out", "restore this file from its source"


def _out(text: str) -> bool:
    return text.startswith(("/", "~")) or ".." in Path(text).parts or "\\" in text
