"""A small nano policy and a run folder around it, made without a simulator, in a second: for tests of what becomes of folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from small_datasets import SIZE, write_dataset

from vla.checkpoint import publish
from vla.episodes import EpisodeStore
from vla.evaluate import wilson
from vla.mixture import Mixture
from vla.policy import AdapterConfig, PolicyConfig, VLAPolicy, build_policy, load_policy, save_policy
from vla.policy.adapters import adapt

BACKBONE = {"hidden": 32, "layers": 1, "heads": 2, "mlp": 64, "tower_channels": (8, 8, 16), "keypoints": 0, "text_vocab": 300}


def small_policy(root: Path, seed: int = 0, **config) -> VLAPolicy:
    """A fresh policy for the robot of `small_datasets`; its data are put at `root` when they are not there."""
    if not (root / "meta").exists():
        write_dataset(root, 3)
    store = EpisodeStore.open(root, root.parent / "cache", progress=False)
    torch.manual_seed(seed)
    chosen = PolicyConfig.model_validate({"backbone": BACKBONE, "chunk": 2, "execute": 1, "end_weight": 0.0, **config})
    return build_policy(chosen, Mixture([store], [1], 2, seed=0)).eval()


def write_policy(root: Path, seed: int = 0, **config) -> VLAPolicy:
    """Saves `small_policy` at `root`/policy; its data lie in `root`/data."""
    policy = small_policy(root / "data", seed, **config)
    publish(root / "policy", lambda folder: save_policy(policy, folder))
    return policy


def write_small_adapter(root: Path, base: Path, path: str | None = None, seed: int = 1) -> VLAPolicy:
    """Saves an adapter on the policy folder `base` at `root`/policy; `path` is what it remembers its base as."""
    policy = load_policy(base, "cpu")
    torch.manual_seed(seed)
    adapt(policy, AdapterConfig(rank=2), {"kind": "policy", "path": path or str(base)})
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    publish(root / "policy", lambda folder: save_policy(policy.eval(), folder))
    return policy


def seen(n: int = 0) -> dict:
    """An observation of noise."""
    rng = np.random.default_rng(n)
    picture = rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    return {"images": {"front": picture}, "state": rng.uniform(-0.5, 0.5, 4).astype(np.float32)}


def actions(policy: VLAPolicy) -> np.ndarray:
    """What it does at an observation of noise."""
    return policy.act(seen(), "do thing 1", "tabletop").actions


def write_evaluation(path: Path, fingerprint: str, successes: int = 31, n: int = 40) -> dict:
    """A `results.json` as `vla eval` writes it, of one group under three conditions."""

    def row(condition: str, wins: int, **more) -> dict:
        low, high = wilson(wins, n)
        return {"group": "push", "condition": condition, "successes": wins, "n": n, "rate": wins / n, "low": low, "high": high,
                "original": None, "failures": {"failure": n - wins, "timeout": 0}, **more}  # fmt: skip

    rows = [row("policy", successes), row("blank", n // 2), row("random", 0)]
    tasks = [{"task": f"push-{c}", "instruction": f"push the {c} cube", **row("policy", successes)} for c in ("red", "blue")]
    result = {"suite": "tabletop", "seed": 900_000, "episodes": n, "policy": fingerprint, "rows": rows, "per_task": tasks,
              "versions": {"tendon-vla": "0"}, "created": "2026-11-26T00:00:00+00:00"}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return result
