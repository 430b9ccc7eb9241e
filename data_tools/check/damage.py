"""Files: links that lead out of the dataset, and everything the readers themselves refuse, taken over as findings."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from data_tools.check.dataset import Dataset
from data_tools.check.finding import Finding, register

MOST_METADATA = 256 * 2**20
"""Bytes of one JSON file of metadata; the largest honest ones seen are a few MB."""


@register("foreign-path", "links and paths that lead out of the dataset", "folder")
def foreign_path(root: Path) -> Iterator[Finding]:
    """A downloaded archive may hold links to, or name, any file of this machine. Looks before anything is read."""
    inside = [root.resolve()]
    if root.resolve().parent.name == "snapshots":  # a Hub cache keeps its files next door and links to them
        inside.append(root.resolve().parent.parent / "blobs")
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in inside):
            yield Finding(
                "error",
                name,
                f"a link to {path.resolve()}",
                "files of the dataset only",
                f"rm '{path}' and restore the file itself; do not unpack archives that hold such links",
            )
        elif not path.is_dir() and not stat.S_ISREG(path.stat().st_mode if path.exists() else stat.S_IFREG):
            yield Finding("error", name, "a pipe, socket or device", "regular files only", f"rm '{path}'")
        elif path.suffix == ".json" and path.is_file() and path.stat().st_size > MOST_METADATA:
            yield Finding(
                "error", name, f"{path.stat().st_size:,} bytes", f"at most {MOST_METADATA:,}", "restore this file from its source"
            )
    try:
        info = json.loads((root / "meta" / "info.json").read_text())
        templates = {key: info.get(key) for key in ("data_path", "video_path")} if isinstance(info, dict) else {}
    except (OSError, ValueError, RecursionError):
        return  # said by `metadata`
    for key, template in templates.items():
        if isinstance(template, str) and (template.startswith(("/", "~")) or ".." in Path(template).parts or "\\" in template):
            yield Finding(
                "error",
                "meta/info.json",
                f"{key} {template!r}",
                "a path inside the dataset",
                f"restore {key} from its source, e.g. data/chunk-{{chunk_index:03d}}/file-{{file_index:03d}}.parquet",
            )


_EPISODE = re.compile(r"episode (\d+)")
_FRAME = re.compile(r"frame (\d+)")
_DIMENSION = re.compile(r"\[(\d+)\] \(([^)]*)\)")

KINDS: dict[str, tuple[str, str]] = {
    "not-finite": ("NaN or infinite values", r"finite number"),
    "timestamps": ("rows that do not follow each other by 1 / fps", r", timestamp|fps in meta/info"),
    "statistics": ("statistics missing, of another width, or of other data", r"stats\.json|episodes_stats"),
    "format-version": (
        "a format or version that cannot be read",
        r"codebase_version|of LeRobot v|of RLDS|of HDF5|a LeRobot v3.0 dataset",
    ),
    "video": ("videos cut short, missing, undecodable, or with other pixels than recorded", r"video|picture|frames|pixels"),
    "tables": ("Parquet files without footer, missing, or of the wrong type", r"[Pp]arquet|rows|numbers|per row|column"),
    "metadata": ("descriptions that are missing, broken, or do not fit the data", r""),
}
"""Code -> (what it is, how to tell it in what a reader said). The first that fits has it."""


def kind_of(complaint: tuple[str, str, str, str]) -> str:
    where, found, expected, _ = complaint
    if re.search(KINDS["not-finite"][1], expected):
        return "not-finite"
    text = " | ".join((where, found, expected))
    return next(code for code, (_, pattern) in KINDS.items() if code != "not-finite" and re.search(pattern, text))


def _from_readers(code: str):
    def find(data: Dataset) -> Iterator[Finding]:
        for complaint in data.complaints:
            if kind_of(complaint) != code:
                continue
            where, found, expected, fix = complaint
            episode, frame, dimension = (pattern.search(where) for pattern in (_EPISODE, _FRAME, _DIMENSION))
            place = re.sub(r",? ?episode \d+|,? ?frame \d+", "", where.replace(str(data.root), "").strip("/, ")).strip(", ")
            yield Finding(
                "error",
                place.lstrip("/") or "dataset",
                found,
                expected,
                fix,
                int(episode[1]) if episode else None,
                int(frame[1]) if frame else None,
                (dimension[2] or dimension[1]) if dimension else None,
            )

    return find


for _code, (_about, _) in KINDS.items():
    register(_code, _about)(_from_readers(_code))
