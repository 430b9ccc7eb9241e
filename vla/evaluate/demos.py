"""Recorded actions for the replay control, read from the parquet of LeRobot v3.0 datasets; no video is opened."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from vla.errors import DataError
from vla.evaluate.jobs import Demo

MOST = 64
"""Demonstrations kept per task: the rotation needs variety, not the whole dataset."""


def demos_of(roots: Sequence[Path]) -> Callable[[str], list[Demo]]:
    """task -> its demonstrations in the datasets at `roots`, read at the first call, up to `MOST` per task.

    Only datasets with `meta/recording.json` (made by `vla data record`) know tasks and seeds; others are left out.
    Raises `DataError` for a dataset whose parquet cannot be read.
    """
    found: dict[str, list[Demo]] | None = None

    def demos(task: str) -> list[Demo]:
        nonlocal found
        if found is None:
            found = {}
            for root in roots:
                for name, demo in _read(root):
                    found.setdefault(name, []).append(demo)
        return found.get(task, [])

    return demos


def _read(root: Path) -> Iterator[tuple[str, Demo]]:
    recording = root / "meta" / "recording.json"
    if not recording.is_file():
        return
    try:
        wanted: dict[int, tuple[str, int]] = {}
        count: dict[str, int] = {}
        for entry in json.loads(recording.read_text())["episodes"]:
            task = entry["task"]
            count[task] = count.get(task, 0) + 1
            if count[task] <= MOST:
                wanted[int(entry["episode_index"])] = (task, int(entry["seed"]))
        for file in sorted((root / "data").glob("**/*.parquet")):
            table = pq.read_table(file, columns=["episode_index", "action"])
            index = table["episode_index"].to_numpy()
            action = np.array(table["action"].to_pylist(), np.float32)
            for episode in np.unique(index):
                if (named := wanted.get(int(episode))) is not None:
                    yield named[0], Demo(action[index == episode], named[1])
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise DataError(root, found=f"{type(error).__name__}: {error}", expected="a readable LeRobot v3.0 dataset",
                        fix=f"vla data check {root}") from error  # fmt: skip


def roots_in(config: Path) -> list[Path]:
    """The dataset folders named in a run's `config.yaml` (`datasets: [{path: ...}]`, at any depth) that still exist."""
    if not config.is_file():
        return []
    found: list[Path] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "datasets" and isinstance(value, list):
                    found.extend(Path(d["path"]) for d in value if isinstance(d, dict) and "path" in d)
                else:
                    walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(yaml.safe_load(config.read_text()))
    return [root for root in dict.fromkeys(found) if (root / "meta").is_dir()]
