"""Rollouts without a simulator, and a calibrated folder around them: for tests of what is made of rollouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vla.handoff.rollouts import Rollouts

POLICY = "a" * 64
SAME = {"format": 1, "robot": "tabletop", "suite": "tabletop", "tasks": ["touch-red", "push-red-left"], "execute": 4,
        "decode": "mean", "samples": 8, "scale": [1.0, 1.0, 1.0, 1.0]}  # fmt: skip


def rollouts(
    episodes: int, seed: int, policy: str = POLICY, features: int = 6, tells: float = 2.0, relief: bool = True
) -> Rollouts:
    """Made-up episodes. Failures are longer, and from their second look on both `entropy` and the first feature rise by `tells`
    standard deviations; `overlap` is noise. Help comes in time but at the last look of a failure."""
    rng = np.random.default_rng(seed)
    failed = rng.random(episodes) < 0.4
    looks = np.where(failed, 10, rng.integers(2, 6, episodes))
    of = np.repeat(np.arange(episodes), looks)
    place = np.concatenate([np.arange(n) for n in looks])
    bad = failed[of] & (place >= 1)
    group = np.where(np.arange(episodes) % 2, "push", "touch")
    task = np.where(group == "push", "push-red-left", "touch-red")
    hidden = rng.normal(size=(len(of), features))
    hidden[:, 0] += tells * bad
    last = place == looks[of] - 1
    columns = {"task": task, "group": group, "trouble": np.where(np.arange(episodes) % 4 < 2, "none", "noise"),
               "seed": seed * 100_000 + np.arange(episodes), "severity": rng.random(episodes).astype(np.float32),
               "success": ~failed, "failure": failed & (rng.random(episodes) < 0.5),
               "steps": (looks * 4).astype(np.int32)}  # fmt: skip
    scores = {"entropy": rng.normal(size=len(of)) + tells * bad, "overlap": rng.normal(size=len(of))}
    meta = {**SAME, "policy": policy, "seed": seed * 100_000, "episodes": episodes, "perturb": ["none", "noise"]}
    return Rollouts(meta, columns, np.concatenate([[0], np.cumsum(looks)]), (place * 4).astype(np.int32), scores,
                    hidden.astype(np.float32) if features else None, ~(failed[of] & last) if relief else None)  # fmt: skip


def bare_policy(folder: Path, policy: str = POLICY) -> Path:
    """As much of a policy folder as a gate looks at."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "policy.json").write_text(json.dumps({"fingerprint": policy}))
    return folder


def calibrated(folder: Path, **kw: Any) -> Path:
    """A folder with a gate: detectors fitted to 200 episodes, thresholds to 400."""
    from vla.handoff.calibrating import calibrate

    bare_policy(folder)
    calibrate(folder, rollouts(200, 1), rollouts(400, 2), **kw)
    return folder
