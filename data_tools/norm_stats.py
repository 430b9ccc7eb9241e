"""Statistics as OpenVLA and openpi keep them, to and from `vla.normalize.Stats`.

    dataset_statistics.json   {"<dataset>": {"action": {mean, std, max, min, q01, q99, mask}, "proprio": {...},
                               "num_transitions", "num_trajectories"}}         beside an OpenVLA fine-tune
    config.json               the same under "norm_stats": in a base checkpoint, where `unnorm_key` chooses a dataset
    norm_stats.json           {"norm_stats": {"state": {mean, std, q01, q99}, "actions": {...}}}                  openpi
                              (a checkpoint has one per data set, as assets/<asset_id>/norm_stats.json)

A fine-tuned OpenVLA folder holds both of the first two, and its config.json still has the base model's: the first wins.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from vla.durable import replace_file
from vla.errors import DataError, UsageError
from vla.normalize import Stats

FILES = ("dataset_statistics.json", "config.json", "norm_stats.json")
"""Where they are looked for in a folder, the surest first."""

_FIELDS = ("mean", "std", "max", "min", "q01", "q99")
_OPENPI = "openpi"
"""The key under which an openpi file, which names no dataset, is read; below `assets/` it is the asset's id."""
_ASSETS = "assets/**/norm_stats.json"


class DatasetStats(NamedTuple):
    """What OpenVLA knows of one dataset."""

    action: Stats
    mask: np.ndarray | None  # (D,) bool, False where a dimension is not normalised (the gripper); None: all are
    state: Stats | None = None  # None where the file has none (OpenVLA writes zeros then)
    num_transitions: int = 0
    num_trajectories: int = 0


def holds_norm_stats(path: str | Path) -> bool:
    """Whether `path` is a folder with a file of such a name, or a file that is no policy of ours. Reads nothing."""
    path = Path(path)
    if not path.is_dir():
        return path.is_file() and path.name != "policy.json"
    return any((path / name).is_file() for name in FILES) or any(path.glob(_ASSETS))


def norm_stats_names(path: str | Path) -> list[str]:
    """The datasets in a file or folder, as `read_norm_stats` takes them. Raises `DataError` when there are no statistics."""
    return sorted(_entries(Path(path))[1])


def read_norm_stats(path: str | Path, key: str | None = None) -> DatasetStats:
    """The statistics of dataset `key` in a file, or in a folder that has one of `FILES`. A single dataset needs no key.

    Raises `UsageError` with the nearest names for a key that is not there, `DataError` naming everything wrong in the file.
    """
    file, entries = _entries(Path(path))
    if key is None and len(entries) == 1:
        key = next(iter(entries))
    if key is None or key not in entries:
        near = difflib.get_close_matches(key or "", entries, n=3, cutoff=0.4) or sorted(entries)
        raise UsageError(f"{file}, dataset {key!r}", found=f"{len(entries)} datasets: {', '.join(sorted(entries))}",
                         expected="one of these names" if key is None else f"one of {near}",
                         fix=f"name one, e.g. --key {near[0]}")  # fmt: skip
    return _dataset(entries[key], f"{file}: {key}")


def read_all_norm_stats(path: str | Path) -> dict[str, DatasetStats]:
    """The statistics of every dataset in the file, by name. Raises `DataError` naming everything wrong in it."""
    file, entries = _entries(Path(path))
    found, problems = {}, []
    for key, entry in entries.items():
        try:
            found[key] = _dataset(entry, f"{file}: {key}")
        except DataError as error:
            problems.append(f"{key}: {error.found}")
    if problems:
        raise DataError(file, found="; ".join(problems), expected="statistics of equal length, finite, low below high",
                        fix="fetch the file again, or recompute it with `vla data stats DIR --write`")  # fmt: skip
    return found


def write_norm_stats(path: str | Path, datasets: Mapping[str, DatasetStats | tuple[Any, ...]]) -> None:
    """Write `datasets` as OpenVLA's `dataset_statistics.json` (name -> `DatasetStats`, or a tuple of its fields).

    `Stats` need mean, std, min, max, q01 and q99. Without a mask every dimension is normalised; without a state, zeros of the
    action's shape are written, as OpenVLA does. Raises `DataError` naming what a dataset lacks.
    """
    content, problems = {}, []
    for name, values in datasets.items():
        one = values if isinstance(values, DatasetStats) else DatasetStats(*cast(Any, values))
        for part, stats in (("action", one.action), ("proprio", one.state)):
            if stats is not None and (missing := [f for f in _FIELDS if f not in stats.values]):
                problems.append(f"{name}.{part}: no {', '.join(missing)}")
        D = len(next(iter(one.action.values.values())))
        mask = np.ones(D, bool) if one.mask is None else np.asarray(one.mask, bool)
        if mask.shape != (D,):
            problems.append(f"{name}: a mask of {mask.size} for {D} dimensions")
        content[name] = (one, mask, D)
    if problems:
        raise DataError(path, found="; ".join(problems), expected=f"{', '.join(_FIELDS)} and one mask entry per dimension",
                        fix="recompute the statistics with `vla data stats DIR --write`")  # fmt: skip
    out = {}
    for name, (one, mask, D) in content.items():
        zeros = {field: [0.0] * D for field in _FIELDS}
        out[name] = {
            "action": {field: one.action.values[field].tolist() for field in _FIELDS} | {"mask": mask.tolist()},
            "proprio": zeros if one.state is None else {field: one.state.values[field].tolist() for field in _FIELDS},
            "num_transitions": int(one.num_transitions or one.action.count),
            "num_trajectories": int(one.num_trajectories),
        }
    replace_file(Path(path), json.dumps(out, indent=2) + "\n")


def _entries(path: Path) -> tuple[Path, dict[str, Any]]:
    """(the file, or the folder of several, dataset name -> its raw entry)."""
    candidates = [path / name for name in FILES] if path.is_dir() else [path]
    if path.is_dir() and not any(c.is_file() for c in candidates) and (assets := sorted(path.glob(_ASSETS))):
        found = {file.parent.relative_to(path / "assets").as_posix(): _entries(file)[1] for file in assets}
        return path, {name: next(iter(entries.values())) for name, entries in found.items()}
    wrong = []
    for file in [c for c in candidates if c.is_file()]:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(file, found=str(error), expected="JSON", fix="fetch the file again") from error
        inner = content.get("norm_stats", content) if isinstance(content, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get("actions"), dict) and "mean" in inner["actions"]:
            return file, {_OPENPI: {"action": inner["actions"], "proprio": inner.get("state")}}
        if isinstance(inner, dict) and inner and all(isinstance(v, dict) and "action" in v for v in inner.values()):
            return file, inner
        wrong.append(f"{file.name} without statistics")
    raise DataError(path, found="; ".join(wrong) or "no such file",
                    expected=f"OpenVLA's or openpi's statistics: {', '.join(FILES)}",
                    fix="point at the file, or at the checkpoint folder that holds it")  # fmt: skip


def _dataset(entry: dict[str, Any], where: str) -> DatasetStats:
    problems: list[str] = []
    counts = {}
    for field in ("num_transitions", "num_trajectories"):
        counts[field] = entry.get(field, 0)
        if not isinstance(counts[field], int) or counts[field] < 0:
            problems.append(f"{field} = {counts[field]!r}")
    transitions = counts["num_transitions"] if isinstance(counts["num_transitions"], int) else 0
    action = _stats(entry.get("action"), "action", transitions, problems)
    state = _stats(entry["proprio"], "proprio", transitions, problems) if entry.get("proprio") else None
    mask = None
    if action is not None and "mask" in entry["action"]:
        raw = entry["action"]["mask"]
        if not isinstance(raw, list) or not all(isinstance(m, bool) for m in raw) or len(raw) != _width(action):
            problems.append(f"action.mask = {raw!r} for {_width(action)} dimensions")
        else:
            mask = np.array(raw, bool)
    if problems or action is None:
        raise DataError(where, found="; ".join(problems), expected="numbers of equal length, finite, low not above high",
                        fix="fetch the file again, or recompute it")  # fmt: skip
    if state is not None and not any(values.any() for values in state.values.values()):
        state = None  # OpenVLA's way of saying that it did not load any
    return DatasetStats(action, mask, state, counts["num_transitions"], counts["num_trajectories"])


def _stats(entry: Any, part: str, count: int, problems: list[str]) -> Stats | None:
    if not isinstance(entry, dict):
        problems.append(f"{part} is {type(entry).__name__}")
        return None
    values = {}
    for field, numbers in entry.items():
        if field == "mask" or numbers is None:
            continue
        try:
            values[field] = np.array(numbers, np.float64)
        except (TypeError, ValueError):
            problems.append(f"{part}.{field} holds no numbers")
            continue
        if values[field].ndim != 1 or not np.isfinite(values[field]).all():
            problems.append(f"{part}.{field} is {numbers!r}")
    for needed in ("mean", "std"):
        if needed not in values:
            problems.append(f"{part} has no {needed}")
    if len({v.shape for v in values.values()}) > 1:
        problems.append(f"{part}: lengths {({k: v.size for k, v in values.items()})}")
        return None
    for low, high in (("min", "max"), ("q01", "q99")):
        if low in values and high in values and (values[low] > values[high]).any():
            problems.append(f"{part}: {low} above {high} in dimension {int(np.argmax(values[low] > values[high]))}")
    return Stats(values, count) if values else None


def _width(stats: Stats) -> int:
    return len(next(iter(stats.values.values())))
