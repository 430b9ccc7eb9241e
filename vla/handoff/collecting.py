"""`vla handoff collect`: who is asked to play which scenes, and what is written down of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vla.embodiment import EmbodimentSpec, load_embodiment
from vla.errors import UsageError
from vla.evaluate import same_robot, versions
from vla.evaluate.jobs import Actor, trained_on
from vla.evaluate.pool import inference_threads
from vla.handoff.play import WIDTH, Scene, Stage, play
from vla.handoff.rollouts import Rollouts, gather, save
from vla.handoff.scores import scale_of
from vla.handoff.trouble import check_troubles
from vla.policy import VLAPolicy
from vla.randomness import mix

TRAIN_SEED = 500_000
"""First seed of scenes that thresholds and detectors are made of, as of those a checkpoint is chosen by."""
_DRAW = 0xC0117EC7


def scenes_of(room: Any, tasks: Sequence[str], troubles: Sequence[str], episodes: int, seed: int) -> list[Scene]:
    """Scene i is `seed + i`; groups take turns, and a group's tasks within it; what goes wrong is drawn from the seed."""
    groups: dict[str, list[str]] = {}
    for task in tasks:
        groups.setdefault(room.group(task), []).append(task)
    turn = [members[i % len(members)] for i in range(lcm(*map(len, groups.values()))) for members in groups.values()]
    return [Scene(turn[i % len(turn)], seed + i, troubles[mix(seed + i, _DRAW) % len(troubles)]) for i in range(episodes)]


def collect(
    policy: Actor, suite: str, tasks: Sequence[str] | None, episodes: int, seed: int = TRAIN_SEED, *,
    perturb: Sequence[str] = ("all",), execute: int | None = None, decode: str | None = None, samples: int = 8,
    relief: bool = False, out: Path | None = None, progress: bool = True, sims: str = "vla.sims",
) -> Rollouts:  # fmt: skip
    """Play `episodes` with something wrong in them and score every look; with `out`, written there.

    `perturb`: kinds of `vla/handoff/trouble.py`, one of them an episode. `samples`: draws a look (0: none, and no detector that
    needs them). `relief`: find out as well, for every look, whether the scripted expert would have succeeded from there.

    Raises `UsageError` for an unknown task or kind, a robot that is not the policy's, a seed it was trained on.
    """
    began = time.perf_counter()
    stage, room, names, spec = stage_for(policy, suite, tasks, episodes, seed, sims)
    chunk, own = policy.steps(spec.key)
    execute, decode = own if execute is None else execute, decode or policy.decode
    if not 1 <= execute <= chunk:
        raise UsageError("execute", found=execute, expected=f"1..{chunk}, the policy's chunk", fix=f"--execute {own}")
    if samples < 0 or samples == 1:
        raise UsageError("samples", found=samples, expected="0, or at least 2 to be compared", fix="--samples 8")
    kinds = check_troubles(perturb, suite)
    scale = action_scale(policy, spec.key)
    scenes = scenes_of(room, names, kinds, episodes, seed)
    bar = tqdm(total=episodes, desc=f"handoff {suite}", unit="ep", disable=None if progress else True)
    found = []
    try:
        with inference_threads(1), bar:
            for rollout in play(policy, stage, spec.key, scenes, scale, execute=execute, decode=decode, samples=samples,
                                relief=relief, width=WIDTH):  # fmt: skip
                found.append(rollout)
                bar.update(1)
    finally:
        stage.close()
    meta = {
        "policy": policy.fingerprint, "robot": spec.key, "suite": suite, "tasks": names, "seed": seed, "episodes": episodes,
        "perturb": kinds, "execute": execute, "decode": decode, "samples": samples, "scale": scale.tolist(),
        "versions": versions(), "wall_s": round(time.perf_counter() - began, 1),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    rollouts = gather(found, {"format": 1, **meta}, room.group)
    if out is not None:
        save(rollouts, out)
    return rollouts


def stage_for(
    policy: Actor, suite: str, tasks: Sequence[str] | None, episodes: int, seed: int, sims: str
) -> tuple[Stage, Any, list[str], EmbodimentSpec]:
    """(simulators, the suite, names of tasks, the policy's spec of the robot). Raises `UsageError` where they do not fit."""
    stage = Stage(suite, 8, sims)
    names, room = stage.module.expand_tasks(suite, list(tasks) if tasks else None), stage.module.SUITES[suite]
    spec = same_robot(policy, load_embodiment(room.embodiment))
    stage.image_size = max(camera.height for camera in spec.cameras.values())
    if episodes < 1:
        raise UsageError("episodes", found=episodes, expected="at least 1", fix="--episodes 400")
    if shown := trained_on(policy, suite, seed, episodes):
        raise UsageError(f"seeds {seed}..{seed + episodes - 1} of suite {suite!r}",
                         found=f"seeds the policy was trained on ({shown})", expected="scenes it has not seen",
                         fix=f"--seed {TRAIN_SEED}")  # fmt: skip
    return stage, room, names, spec


def action_scale(policy: Actor, robot: str) -> np.ndarray:
    """(A,) half ranges of its actions: by its statistics where it is a policy of ours, else by the robot's limits."""
    if isinstance(policy, VLAPolicy):
        return scale_of(policy.normalizers[robot]["action"]).astype(np.float64)
    low, high = policy.embodiments[robot].limits("action")
    return (high.astype(np.float64) - low) / 2
