"""How a planted fault is judged: it is found under its code, at its place; without that check it is not found."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.check import Finding, check_all

DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
VIDEO = "videos/observation.images.front/chunk-000/file-000.mp4"


@dataclass(frozen=True)
class Fault:
    """`plant(folder)` makes a bad dataset (or several) and returns where; `code` must find it as `severity`."""

    name: str
    code: str
    plant: Callable[[Path], Path | Sequence[Path]]
    severity: str = "error"
    said: str = ""
    """Words the finding must contain."""
    place: dict[str, Any] = field(default_factory=dict)
    """episode, frame, dimension, where they can be known."""
    frames: bool = False

    def __str__(self) -> str:
        return self.name


def judge(fault: Fault, folder: Path) -> None:
    """The two sides of every fault's test."""
    planted = fault.plant(folder)
    roots = [planted] if isinstance(planted, Path) else list(planted)
    found = check_all(roots, frames=fault.frames)
    own = [f for f in found if f.code == fault.code and f.severity == fault.severity and fits(f, fault)]
    assert own, f"not found among {[(f.severity, f.code, f.place, f.found) for f in found]}"
    for finding in own:
        assert finding.found and finding.expected and finding.fix and finding.where
    left = check_all(roots, frames=fault.frames, skip=[fault.code])
    assert not [f for f in left if f.code == fault.code]
    assert len(left) == len([f for f in found if f.code != fault.code])


def fits(finding: Finding, fault: Fault) -> bool:
    return fault.said in f"{finding.found} {finding.expected}" and all(getattr(finding, k) == v for k, v in fault.place.items())


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_table(path: Path, **columns: Callable[[list], Any]) -> None:
    """Rewrite columns of a Parquet file; each function gets the values and changes or returns them."""
    table = pq.read_table(path)
    for name, change in columns.items():
        values = table[name].to_pylist()
        values = change(values) or values
        table = table.set_column(table.column_names.index(name), name, pa.array(values, table[name].type))
    pq.write_table(table, path)
