"""Rollouts without a simulator, and a calibrated folder around them: for tests of what is made of rollouts."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from vla.handoff import learning
from vla.handoff.calibrating import calibrate
from vla.handoff.detectors import FUSED
from vla.handoff.gate import FILE, WEIGHTS, read_handoff, write_handoff
from vla.handoff.rollouts import Rollouts

POLICY = "a" * 64
SAME = {"format": 1, "robot": "tabletop", "suite": "tabletop", "tasks": ["touch-red", "push-red-left"], "execute": 4,
        "decode": "mean", "samples": 8, "scale": [1.0, 1.0, 1.0, 1.0]}  # fmt: skip


def rollouts(
    episodes: int, seed: int, policy: str = POLICY, features: int = 6, tells: float = 2.0, relief: bool = True
) -> Rollouts:
    """Made-up episodes. Failures are longer, and from their second look on both `entropy` and the first feature rise by `tells`
    standard deviations; the other scores are noise. Help comes in time but at the last look of a failure."""
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
    scores = {name: rng.normal(size=len(of)) + tells * bad * (name == "entropy") for name in FUSED}
    meta = {**SAME, "policy": policy, "seed": seed * 100_000, "episodes": episodes, "perturb": ["none", "noise"]}
    return Rollouts(meta, columns, np.concatenate([[0], np.cumsum(looks)]), (place * 4).astype(np.int32), scores,
                    hidden.astype(np.float32) if features else None, ~(failed[of] & last) if relief else None)  # fmt: skip


def bare_policy(folder: Path, policy: str = POLICY) -> Path:
    """As much of a policy folder as a gate looks at."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "policy.json").write_text(json.dumps({"fingerprint": policy}))
    return folder


def calibrated(folder: Path, score: str | None = None) -> Path:
    """A folder with a gate: detectors fitted (hastily, once a process) to 200 episodes, thresholds to 400."""
    bare_policy(folder)
    for name in (FILE, WEIGHTS):
        shutil.copyfile(_made() / name, folder / name)
    if score is not None:
        handoff = read_handoff(folder)
        write_handoff(folder, {**handoff.meaning, "score": score}, handoff.fitted.arrays())
    return folder


@functools.cache
def _made() -> Path:
    made = bare_policy(Path(tempfile.mkdtemp(prefix="handoff-")))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "EPOCHS", 25)
        calibrate(made, rollouts(200, 1), rollouts(400, 2))
    return made
