"""How fast and how sure the simulators are: frames and steps per CPU second, and the scripted experts' success.

    python benchmarks/bench_sims.py [--episodes 300] [--suite fetch aloha] [--json]

CPU seconds are this process's own (`time.process_time`), one thread, so other work on the machine counts little.
Success is given with Wilson's 95% interval. Disturbed means: the hand is put anywhere in its workspace, fingers anywhere.
Simulators that live in another interpreter (robosuite) spend their CPU there, so theirs is wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from data_tools.record import Disturbance  # noqa: E402
from vla.evaluate.results import wilson  # noqa: E402
from vla.sims import SUITES, expand_tasks, make_sim  # noqa: E402

FIRST_SEED = 700_000
METAWORLD = ("button-press-topdown-v3", "drawer-open-v3", "door-open-v3")


def rate(work: Callable[..., int], *args: Any) -> float:
    """Items per CPU second of `work(*args)`, which says how many it did."""
    start = time.process_time()
    return work(*args) / (time.process_time() - start)


def draw(sim: Any, size: int, frames: int) -> int:
    """`frames` pictures of one scene."""
    for _ in range(frames):
        sim.frame(size)
    return frames


def episodes_of(sim: Any, render: bool) -> int:
    """Steps of 20 expert episodes, resets included."""
    taken = 0
    for i in range(20):
        sim.reset(seed=FIRST_SEED + i, options={"render": render})
        over = False
        while not over:
            *_, terminated, truncated, _ = sim.step(sim.expert(), render=render)
            over, taken = terminated or truncated, taken + 1
    return taken


def resident() -> float:
    """MiB this process holds."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def act(sim: Any, noise: np.random.Generator | None = None) -> tuple[bool, int]:
    """(success, steps) of the expert from the state the simulator is in; `noise` disturbs what is executed, as recording."""
    burst, push = 0, np.zeros(3)
    while True:
        action = sim.expert()
        if noise is not None:
            action[:3] += noise.normal(0, 0.3, 3)
            if burst == 0 and noise.random() < 0.06:
                burst, push = 3, noise.uniform(-1, 1, 3)
            if burst:
                action[:3], burst = push, burst - 1
        _, _, terminated, truncated, info = sim.step(action, render=False)
        if terminated or truncated:
            return info["success"], info["step"]


def put_hand_anywhere(sim: Any, rng: np.random.Generator) -> None:
    """Any place of the workspace that is not inside or beside a cube, fingers anywhere."""
    import mujoco

    mj: Any = mujoco
    from vla.sims import tabletop

    while True:
        hand = rng.uniform(*tabletop._REACH)
        if hand[2] > 0.065 or np.linalg.norm(sim._cube_places()[:, :2] - hand[:2], axis=1).min() > 0.065:
            break
    sim._data.qpos[:6] = sim._data.ctrl[:6] = sim._solve(tabletop._READY, hand, iterations=60)
    sim._data.qpos[6:8] = sim._data.ctrl[6:8] = rng.uniform(0, tabletop._FINGER)
    mj.mj_forward(sim._model, sim._data)


def row(results: list[tuple[bool, int]]) -> dict[str, Any]:
    """Success of (success, steps) episodes with Wilson's interval, and the mean steps of all."""
    done = sum(success for success, _ in results)
    low, high = wilson(done, len(results))
    steps = float(np.mean([steps for _, steps in results]))
    return {"done": done, "tried": len(results), "low": low, "high": high, "steps": round(steps, 1)}


def experts_of(suite: str, episodes: int) -> dict[str, Any]:
    """Rows of every task of `suite`, clean and with exactly the noise of recording in every episode."""
    rows: dict[str, Any] = {}
    for task in SUITES[suite].known:
        sim = make_sim(suite, task)
        for condition in ("clean", "noise"):
            results = []
            for i in range(episodes):
                sim.reset(seed=FIRST_SEED + i, options={"render": False})
                disturb = Disturbance(sim.spec, np.random.default_rng([i, 7])) if condition == "noise" else None
                over, info = False, {}
                while not over:
                    action = sim.expert()
                    _, _, ended, late, info = sim.step(disturb(action) if disturb else action, render=False)
                    over = ended or late
                results.append((info["success"], info["step"]))
            rows[f"{suite} {task}, {condition}"] = row(results)
    return rows


def speed_of(suite: str) -> dict[str, float]:
    """Milliseconds of a picture, a step and an idle question: CPU here, wall time where the world is elsewhere."""
    sim = make_sim(suite, SUITES[suite].tasks[0])
    sim.reset(seed=FIRST_SEED)
    clock = time.perf_counter if suite.startswith("robosuite") else time.process_time
    out: dict[str, float] = {}
    work = {"picture of 64 pixels": lambda: sim.frame(64), "step": lambda: sim.step(sim.expert(), render=False),
            "expert": sim.expert}  # fmt: skip
    for name, job in work.items():
        job()
        start = clock()
        for _ in range(50):
            job()
        out[f"{suite} ms per {name}"] = (clock() - start) / 50 * 1000
    return out


def experts(episodes: int) -> dict[str, Any]:
    """Rows of success by verb and condition, and by Meta-World task."""
    rows: dict[str, Any] = {}
    plain, wild = make_sim("tabletop", "touch-red"), make_sim("tabletop", "touch-red", randomise=True)
    for verb in ("touch", "push", "lift"):
        tasks = expand_tasks("tabletop", [verb])
        for condition in ("clean", "disturbed", "noise", "randomised"):
            sim, results = wild if condition == "randomised" else plain, []
            for i in range(episodes):
                rng = np.random.default_rng([i, 7])
                task = tasks[i % len(tasks)]
                sim.reset(seed=FIRST_SEED + i, options={"render": False, "task": task})
                if condition == "disturbed":
                    put_hand_anywhere(sim, rng)
                results.append(act(sim, rng if condition == "noise" else None))
            rows[f"tabletop {verb}, {condition}"] = row(results)
    for task in METAWORLD:
        sim, results = make_sim("metaworld", task), []
        for i in range(max(1, episodes // 6)):
            sim.reset(seed=FIRST_SEED + i, options={"render": False})
            results.append(act(sim))
        rows[f"metaworld {task}"] = row(results)
    return rows


def speeds() -> dict[str, float]:
    """Figures per CPU second of one process, and MiB per further simulator."""
    out: dict[str, float] = {}
    for suite, task, frames in (("tabletop", "push-red-left", 2000), ("metaworld", METAWORLD[0], 150)):
        sim = make_sim(suite, task)
        sim.reset(seed=FIRST_SEED)
        for size in (64, 128, 224):
            sim.frame(size)
            out[f"{suite} frames of {size} pixels"] = rate(draw, sim, size, frames)
        out[f"{suite} expert steps, no picture"] = rate(episodes_of, sim, False)
        if suite == "tabletop":
            out[f"{suite} expert steps, 64 pixels each"] = rate(episodes_of, sim, True)
        before = resident()
        more = [make_sim(suite, task) for _ in range(24)]
        for i, one in enumerate(more):
            one.reset(seed=i, options={"render": False})
        out[f"{suite} MiB per further simulator"] = (resident() - before) / len(more)
    return out


def main() -> None:
    """Print both tables, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=300, help="tabletop episodes per row; Meta-World a sixth")
    parser.add_argument("--suite", nargs="+", choices=sorted(SUITES.keys() - {"tabletop", "metaworld"}),
                        help="these instead, every task clean and noisy (default: tabletop and metaworld)")  # fmt: skip
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result: dict[str, Any] = {"speed": {}, "expert": {}}
    if args.suite:
        for suite in args.suite:
            result["speed"] |= speed_of(suite)
            result["expert"] |= experts_of(suite, args.episodes)
    else:
        result = {"speed": speeds(), "expert": experts(args.episodes)}
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result["speed"].items():
        print(f"{name:<50} {value:9.2f}{'' if 'MiB' in name or ' ms ' in name else ' /CPU-s'}")
    for name, r in result["expert"].items():
        interval = f"[{100 * r['low']:.0f}, {100 * r['high']:.0f}]"
        print(f"{name:<50} {r['done']:>4}/{r['tried']:<4} {interval:>10} %, {r['steps']:.1f} steps")


if __name__ == "__main__":
    main()
