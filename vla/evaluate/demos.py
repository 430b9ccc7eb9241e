"""Recorded actions for the replay control, read from the parquet of LeRobot v3.0 datasets; no video is opened."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from vla.errors import DataError
from vla.evaluate.jobs import Demo, Demos

MOST = 64
"""Demonstrations kept per task: the rotation needs variety, not the whole dataset."""


def demos_of(roots: Sequence[str | Path]) -> Demos:
    """The demonstrations in the datasets at `roots` (a policy's `provenance["datasets"]`), up to `MOST` per task and dataset.

    Only datasets with `meta/recording.json` (made by `vla data record`) know tasks and seeds. Those without, and those
    that are no longer there, are named in `lacking`. Raises `DataError` for one that is there and cannot be read.
    """
    found: dict[str, list[Demo]] = {}
    lacking = []
    for root in dict.fromkeys(Path(root) for root in roots):
        if not (root / "meta").is_dir():
            lacking.append(f"{root}: no dataset there")
        elif not (root / "meta" / "recording.json").is_file():
            lacking.append(f"{root}: no meta/recording.json, which tells what was played")
        else:
            for task, demo in _read(root):
                found.setdefault(task, []).append(demo)
    return Demos(found, lacking or ([] if roots else ["the policy names no dataset"]))


def _read(root: Path) -> Iterator[tuple[str, Demo]]:
    try:
        wanted: dict[int, tuple[str, int | None]] = {}
        count: dict[str, int] = {}
        for entry in json.loads((root / "meta" / "recording.json").read_text())["episodes"]:
            task, seed = entry["task"], entry.get("seed")
            count[task] = count.get(task, 0) + 1
            if count[task] <= MOST:
                wanted[int(entry["episode_index"])] = (task, None if seed is None else int(seed))
        for file in sorted((root / "data").glob("**/*.parquet")):
            table = pq.read_table(file, columns=["episode_index", "action"])
            index = table["episode_index"].to_numpy()
            action = table["action"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            action = action.astype(np.float32).reshape(len(index), -1)
            for episode in np.unique(index):
                if (named := wanted.get(int(episode))) is not None:
                    yield named[0], Demo(action[index == episode], named[1])
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise DataError(root, found=f"{type(error).__name__}: {error}", expected="a readable LeRobot v3.0 dataset",
                        fix="copy that file again from where the dataset was made") from error  # fmt: skip
