"""Foreign datasets as they lie on disk, behind one interface: episodes with their raw fields, nothing reinterpreted.

    source = open_source("downloads/libero_spatial")
    for key in source.keys():
        raw = source.read(key)          # RawEpisode: fields, pictures, instruction, as the file holds them

What a field *means* (units, frames, signs) is a dataset card's business, see `data_tools/standardise/`.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_tools.sources.inside import leads_out
from vla.errors import DataError, UsageError


@dataclass(frozen=True)
class SourceInfo:
    """What a source says of all its episodes."""

    fps: float | None
    """Control rate in Hz; None where the format does not carry one (RLDS)."""
    fields: Mapping[str, tuple[str, tuple[int, ...]]]
    """Numeric field path -> (dtype, shape without the time axis)."""
    images: Mapping[str, tuple[int, int]]
    """Picture field path -> (height, width)."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the format carries (`env_args`, `robot_type`, feature names, ...), JSON-like."""


@dataclass(frozen=True)
class RawEpisode:
    """One episode as its file holds it. All arrays share their first axis T."""

    fields: Mapping[str, np.ndarray]  # path -> (T, ...) numbers, in the file's own dtype
    images: Mapping[str, np.ndarray]  # path -> (T, h, w, 3) uint8, RGB as decoded, not turned
    instruction: str
    """"" when the source has none; the card then names one."""
    where: str
    """File and episode, for messages."""
    key: str
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        arrays = [*self.fields.values(), *self.images.values()]
        return len(arrays[0]) if arrays else 0


class Source(Protocol):
    """A dataset that can be listed and read one episode at a time. Small to hand to worker processes."""

    kind: str
    """`lerobot-v3.0`, `lerobot-v2.1`, `lerobot-v2.0`, `rlds`, `libero`, `robomimic`, `aloha`."""
    root: Path
    info: SourceInfo
    damage: list[DataError]
    """What could not even be listed: a missing shard, a file without its footer. Named, never skipped in silence."""
    missing: int
    """Episodes the source promises beyond those it lists, where it says how many there are (RLDS); else 0."""

    def keys(self) -> list[str]:
        """One stable, unique key per episode, in the order of the files."""
        ...

    def read(self, key: str, only: Collection[str] | None = None) -> RawEpisode:
        """One episode; of its fields and pictures `only` these need be there (a reader may return more).

        Raises `DataError` naming the file when it is damaged."""
        ...


_READERS = {
    "lerobot": ("data_tools.sources.lerobot", "LeRobotSource"),
    "rlds": ("data_tools.sources.rlds", "RldsSource"),
    "hdf5": ("data_tools.sources.hdf5", "Hdf5Source"),
}
"""family -> (module, class). A class has `recognises(path) -> bool` (cheap, never raises) and `open(path) -> Source`."""


_MOST_NAMED = 20


def open_source(path: str | Path, kind: str | None = None) -> Source:
    """The dataset at `path` (a folder or a file), its layout recognised, or read as `kind` (`lerobot`, `rlds`, `hdf5`).

    Raises `DataError` when it is in no known layout, is damaged beyond listing, or has links or names that lead out of it.
    """
    path = Path(path)
    if kind is not None and kind not in _READERS:
        raise UsageError("--from", found=kind, expected=f"one of {sorted(_READERS)}", fix="leave it out, or choose one of these")
    if not path.exists():
        raise DataError(path, found="no such file or folder", expected="a dataset", fix="check the path")
    _refuse_ways_out(path)
    for module, name in [_READERS[kind]] if kind else _READERS.values():
        reader = getattr(importlib.import_module(module), name)
        if kind or reader.recognises(path):
            return reader.open(path)
    inside = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else [path.suffix or "no suffix"]
    raise DataError(path, found=f"none of the known layouts ({inside})",
                    expected="LeRobot (meta/info.json), RLDS (dataset_info.json, *.tfrecord-*), or HDF5 (*.hdf5)",
                    fix="point at the folder that holds those files, or say --from lerobot|rlds|hdf5")  # fmt: skip


def _refuse_ways_out(root: Path) -> None:
    """Before anything is read. A file somebody names is read whatever it links to; what a folder holds has to lie in it."""
    wrong = list(leads_out(root)) if root.is_dir() else []
    if len(wrong) == 1:
        path, found, expected, fix = wrong[0]
        raise DataError(path, found=found, expected=expected, fix=fix)
    if wrong:
        listed = "".join(f"\n    {n}. {path}: {found}" for n, (path, found, _, _) in enumerate(wrong[:_MOST_NAMED], 1))
        raise DataError(root, found=f"{len(wrong)} ways out of it{listed}", expected="files of the dataset only", fix=wrong[0][3])
