"""Recorded moments to calibrate and to compare on: those the policy was trained on, or another dataset's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla.errors import DataError
from vla.mixture import MixtureConfig, open_mixture
from vla.mixture.config import DatasetConfig
from vla.policy import VLAPolicy
from vla.schema import Window


def read_windows(policy: VLAPolicy, datasets: Sequence[str], count: int) -> tuple[list[Window], list[Window]]:
    """(`count` windows of training episodes, `count` of held-out ones), spread over datasets and time; the same every time.

    `datasets`: folders or Hub names; empty: those in the policy's provenance. Raises `DataError` where they are not to be had,
    or show no robot the policy knows.
    """
    named: Sequence[dict[str, Any]] = [{"path": path} for path in datasets] or policy.provenance.get("datasets", [])
    paths = [entry["path"] for entry in named]
    missing = [path for path in paths if not path.startswith("hub:") and not Path(path).is_dir()]
    if missing or not paths:
        raise DataError("vla export", found=f"no datasets {missing}" if missing else "a policy that names no datasets",
                        expected="the data the policy was trained on, to measure what the export changes",
                        fix="--calibrate DATASET; or --windows 0 to export without a report")  # fmt: skip
    config = MixtureConfig(datasets=[DatasetConfig(path=e["path"], language=e.get("language", "task")) for e in named])
    train, held = open_mixture(config, policy.chunk, 0, progress=False, seconds=policy.config.chunk_seconds)
    parts = []
    ours = [i for i, spec in enumerate(train.specs) if spec.key in policy.embodiments]
    if not ours:
        raise DataError("vla export", found=f"robots {sorted({spec.key for spec in train.specs})}",
                        expected=f"one of {sorted(policy.embodiments)}",
                        fix="--calibrate a dataset of a robot the policy knows")  # fmt: skip
    for mixture in (train, held):
        known = [i for i in ours if mixture.sizes[i]]
        if not known:  # only held-out ones can be lacking: a mixture without a training episode does not open
            raise DataError("vla export", found="no held-out episodes in " + ", ".join(str(train.stores[i].root) for i in ours),
                            expected="at least two episodes in one of them: one is held out, to compare on",
                            fix="--calibrate a dataset with more; or --windows 0 to export without a report")  # fmt: skip
        share = -(-count // len(known))
        places = [(i, int(at)) for i in known for at in _spread(mixture.sizes[i], share)]
        parts.append([mixture.window_at(i, *mixture.place(i, at)) for i, at in places])
    return parts[0], parts[1]


def _spread(size: int, count: int) -> np.ndarray:
    """Up to `count` numbers below `size`, as far apart as they go."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).round().astype(int))


def observation_of(window: Window) -> dict:
    """What the robot saw."""
    return {"images": window.images, "state": window.state}
