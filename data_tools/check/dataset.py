"""A dataset opened for judging: what the readers of `vla.episodes` make of it, whole or damaged, and their complaints.

Nothing is judged twice: whatever `vla.episodes` refuses is taken over word for word as a finding (see `damage.py`); the
checks here only look at what it lets through.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools.check.pictures import Film, watch
from data_tools.standardise.fitting import UNLIMITED
from vla.embodiment import Channel, EmbodimentSpec
from vla.episodes.layout import RESTORE, Layout, read_layout
from vla.episodes.rows import Rows, read_rows
from vla.errors import DataError
from vla.mixture import MixtureConfig

MOST_ROWS = 200_000
"""Rows that correlations are formed over; of larger datasets, whole episodes spread over all of it."""

COUNTERPART = {
    "eef_delta_position": "eef_position",
    "joint_delta": "joint_position",
    "joint_velocity": "joint_position",
    "eef_position": "eef_position",
    "joint_position": "joint_position",
}
"""Convention of an action -> convention of the state it moves."""
ABSOLUTE = ("eef_position", "joint_position")
ROTATIONS = {
    "eef_quat_xyzw": "quat_xyzw",
    "eef_quat_wxyz": "quat_wxyz",
    "eef_axis_angle": "axis_angle",
    "eef_euler_xyz": "euler_xyz",
    "eef_euler_zyx": "euler_zyx",
    "eef_rot6d": "rot6d",
    "eef_delta_axis_angle": "axis_angle",
    "eef_delta_euler_xyz": "euler_xyz",
    "eef_delta_rot6d": "rot6d",
}
"""Convention -> how its numbers make a rotation (`rotations.py`)."""


@dataclass(frozen=True)
class Run:
    """A channel and the columns of its dimensions."""

    channel: Channel
    columns: slice

    @property
    def names(self) -> list[str]:
        return [f"{self.channel.name}.{d}" for d in self.channel.dims]


@dataclass
class Dataset:
    """`layout` and `rows` are None where they could not be read; then only the files can be judged."""

    root: Path
    layout: Layout | None = None
    rows: Rows | None = None
    complaints: list[tuple[str, str, str, str]] = field(default_factory=list)
    """(where, found, expected, fix) of everything the readers refused."""
    declared: bool = False
    """Whether the conventions of any channel are declared, and not made up from the features: see `is_declared`."""
    films: dict[str, list[Film | None]] = field(default_factory=dict)
    """Camera -> one `Film` per episode; empty without pictures."""
    holdout: float = MixtureConfig.model_fields["holdout"].default
    healthy: list[int] = field(default_factory=list)
    """Episodes whose numbers are all finite."""
    known: dict[str, Any] = field(default_factory=dict)
    """What several checks ask for, computed once: see `once`."""

    @property
    def layout_episodes(self) -> range:
        """Every episode number the description counts."""
        return range(self.layout.num_episodes if self.layout else 0)

    @property
    def spec(self) -> EmbodimentSpec:
        assert self.layout is not None
        return self.layout.spec

    @property
    def fps(self) -> float:
        assert self.layout is not None
        return self.layout.fps

    def span(self, episode: int) -> slice:
        """Rows of an episode."""
        assert self.rows is not None
        return slice(int(self.rows.starts[episode]), int(self.rows.starts[episode + 1]))

    def values(self, part: str) -> np.ndarray:
        """(F, dims) of `state` or `action`."""
        assert self.rows is not None
        return getattr(self.rows, part)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it returned the first time under this name."""
        if name not in self.known:
            self.known[name] = compute()
        return self.known[name]

    def finite(self, part: str) -> np.ndarray:
        """(n, dims) float64 rows of all healthy episodes; not to be written to."""

        def gather() -> np.ndarray:
            parts = [self.values(part)[self.span(e)] for e in self.healthy]
            return np.concatenate(parts).astype(np.float64) if parts else np.zeros((0, self.values(part).shape[1]))

        return self.once(f"finite {part}", gather)

    def names(self, part: str) -> list[str]:
        return self.spec.state_names if part == "state" else self.spec.action_names

    def bounds(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Declared low and high of every dimension, float64; infinite where nobody declared any."""
        low, high = (np.array(limit, np.float64) for limit in self.spec.limits(part))
        for run in self.runs(part):
            if not (self.declared and is_declared(run.channel)):
                low[run.columns], high[run.columns] = -np.inf, np.inf
        return low, high

    def runs(self, part: str) -> Iterator[Run]:
        """The channels of a part with their columns."""
        at = 0
        for channel in getattr(self.spec, part):
            yield Run(channel, slice(at, at + len(channel.dims)))
            at += len(channel.dims)

    def pairs(self) -> Iterator[tuple[Run, Run]]:
        """(action channel, the state channel it moves), where the declared conventions say so."""
        taken: set[int] = set()
        for action in self.runs("action"):
            wanted = COUNTERPART.get(action.channel.convention)
            candidates = [
                s
                for s in self.runs("state")
                if s.channel.convention == wanted
                and s.columns.start not in taken
                and len(s.channel.dims) == len(action.channel.dims)
            ]
            if candidates:
                chosen = next((s for s in candidates if s.channel.name == action.channel.name), candidates[0])
                taken.add(chosen.columns.start)
                yield action, chosen

    def sample(self) -> list[int]:
        """Healthy episodes of two rows or more, at most `MOST_ROWS` rows in all, spread over the dataset."""
        long = [e for e in self.healthy if self.span(e).stop - self.span(e).start > 1]
        rows = sum(self.span(e).stop - self.span(e).start for e in long)
        return long[:: max(1, -(-rows // MOST_ROWS))]

    def steps(self, action: slice, state: slice, ahead: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(action[t], state[t], state[t + ahead]) of every such pair inside an episode, float64."""
        a, now, later = [], [], []
        for e in self.sample():
            span = self.span(e)
            if span.stop - span.start > ahead:
                a.append(self.values("action")[span][:-ahead, action])
                now.append(self.values("state")[span][:-ahead, state])
                later.append(self.values("state")[span][ahead:, state])
        empty = np.zeros((0, 0))
        a, now, later = (np.concatenate(x).astype(np.float64) if x else empty for x in (a, now, later))
        return a, now, later


def is_declared(channel: Channel) -> bool:
    """False for what a conversion without a card writes of numbers whose meaning it does not know."""
    without_limits = all(low == -UNLIMITED for low in channel.low) and all(high == UNLIMITED for high in channel.high)
    return channel.convention != "scalar" or not without_limits


def open_dataset(
    root: Path,
    embodiment: EmbodimentSpec | None = None,
    frames: bool = True,
    progress: bool = True,
    keep: int = 0,
    holdout: float | None = None,
) -> Dataset:
    """Read what can be read. `keep` thumbnails per episode and camera are kept for the report. Never raises `DataError`."""
    data = Dataset(root, declared=embodiment is not None or (root / "meta" / "embodiment.json").is_file())
    if holdout is not None:
        data.holdout = holdout
    data.complaints += _unfinished(root)
    try:
        layout, problems = read_layout(root, embodiment, need_stats=True)
    except (DataError, RecursionError) as error:
        data.complaints.append(_other_format(root) or _complaint(root, error))
        return data
    fits = True
    try:
        data.layout = layout
        data.declared = data.declared and any(map(is_declared, (*layout.spec.state, *layout.spec.action)))
        rows = read_rows(layout, problems)
        if rows is not None:
            fits = (rows.state.shape[1], rows.action.shape[1]) == (layout.spec.state_dim, layout.spec.action_dim)
        if rows is not None and fits:
            data.rows = rows
            ok = np.asarray(np.isfinite(rows.state).all(1) & np.isfinite(rows.action).all(1))
            data.healthy = [
                e for e in range(len(rows.episodes)) if ok[data.span(e)].all() and data.span(e).stop > data.span(e).start
            ]
        if rows is not None and frames:
            data.films = watch(layout, rows, problems, progress, keep)
        elif rows is not None:
            watch(layout, rows, problems, False, 0, decode=False)
    except (DataError, ValueError, KeyError, TypeError, pa.ArrowException) as error:  # damage of a kind the readers do not name
        data.complaints.append(_complaint(root, error))
    data.complaints = problems.found + data.complaints
    return data


def _unfinished(root: Path) -> list[tuple[str, str, str, str]]:
    """The complaint about a conversion that was interrupted, refused, or whose proof has failed, by its own report."""
    name = "meta/conversion.json"
    try:
        report = json.loads((root / name).read_text())
    except (OSError, ValueError, RecursionError):
        return []  # recorded, not converted; or by a version that did not say
    if not isinstance(report, dict) or report.get("complete") is not False:
        return []
    where, proof = str(root / name), report.get("verified")
    if isinstance(proof, dict) and proof.get("differences"):
        found, expected = f"{len(proof['differences'])} differences between the source and what was written", "none"
        return [(where, found, expected, "convert again, into another folder")]
    options = [str(word) for word in report.get("options") or ()]
    fix = f"vla data convert SRC {shlex.join([str(root), *options])} where SRC is the source, {report.get('source_name')!r}" + (
        f", and CARD.yaml the card {report.get('card')!r}" if "CARD.yaml" in options else ""
    )
    said = "a conversion that was not finished: interrupted, or refused for damage (--strict)"
    return [(where, said, "a finished one, read back and compared", fix)]


def _other_format(root: Path) -> tuple[str, str, str, str] | None:
    """The complaint about a dataset that is not LeRobot's but can be converted."""
    kinds = {".hdf5": "HDF5", ".h5": "HDF5", ".tfrecord": "RLDS"}
    if (root / "meta").is_dir() or not root.exists():
        return None
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())[:2000]
    name = next((kinds[s] for path in files for s in kinds if s in path.name), None)
    said = (str(root), f"of {name}", "a LeRobot dataset", f"vla data convert {root} {root.with_suffix('')}-lerobot")
    return said if name else None


def _complaint(root: Path, error: Exception) -> tuple[str, str, str, str]:
    if isinstance(error, DataError):
        return error.where, error.found, error.expected, error.fix
    if isinstance(error, RecursionError):
        return str(root / "meta"), "JSON nested without end", "JSON nested a few levels deep", RESTORE
    return str(root), f"{type(error).__name__}: {error}", "files that can be read", RESTORE
