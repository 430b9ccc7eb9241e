"""Files: links that lead out of the dataset, and everything the readers themselves refuse, taken over as findings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from data_tools.check.dataset import Dataset
from data_tools.check.finding import Finding, register
from data_tools.sources.inside import leads_out


@register("foreign-path", "links and paths that lead out of the dataset", "folder")
def foreign_path(root: Path) -> Iterator[Finding]:
    """A downloaded archive may hold links to, or name, any file of this machine. Looks before anything is read."""
    for path, found, expected, fix in leads_out(root):
        yield Finding("error", str(path.relative_to(root)), found, expected, fix)


@register("no-camera", "datasets without any picture")
def no_camera(data: Dataset) -> Iterator[Finding]:
    """A policy that sees nothing is hardly what was meant; most often a converter was told of other cameras than there were."""
    if data.layout is not None and not data.layout.cameras:
        fix = "convert it again with a dataset card that names the cameras of the source (`vla data convert --help`); or, if "
        fix += "numbers alone are meant, --skip no-camera"
        yield Finding("error", "meta/info.json", "no camera", "pictures of at least one camera", fix)


_EPISODE = re.compile(r"episode (\d+)")
_FRAME = re.compile(r"frame (\d+)")
_DIMENSION = re.compile(r"\[(\d+)\] \(([^)]*)\)")

KINDS: dict[str, tuple[str, str]] = {
    "unfinished-conversion": ("conversions that were interrupted or refused, or failed their proof", r"meta/conversion\.json"),
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
