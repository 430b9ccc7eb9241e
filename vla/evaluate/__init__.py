"""Closed-loop evaluation: how often a policy succeeds in a simulator, beside every control a sceptic would ask for.

    results = evaluate(policy, "tabletop", episodes=200, out=Path("runs/x/eval/tabletop.json"), demos=demos_of([root]))

`jobs` decides which episodes are run, `pool` and `worker` run them, `results` makes figures of them, `clips` the films,
`demos` finds what the replay control plays, `curve` evaluates every checkpoint of a run, `command` is `vla eval`.
The open-loop error on held-out episodes, which training writes as it goes, is `vla/open_loop.py`.
"""

from __future__ import annotations

import importlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vla.durable import replace_file
from vla.embodiment import EmbodimentSpec, explain, load_embodiment
from vla.ensemble import Ensemble
from vla.errors import UsageError
from vla.evaluate.clips import save_clips
from vla.evaluate.jobs import CONDITIONS, REPORT_SEED, Actor, Demo, Demos, check_conditions, check_seeds, make_jobs
from vla.evaluate.pool import LANES, SimulatorPool, inference_threads, run_jobs
from vla.evaluate.results import make_records, make_rows, text_table, wilson

__all__ = ["CONDITIONS", "REPORT_SEED", "Demo", "Demos", "SimulatorPool", "evaluate", "text_table", "wilson"]

SCHEMA = 1


def evaluate(
    policy: Actor, suite: str, tasks: Sequence[str] | None = None, episodes: int = 50, seed: int = REPORT_SEED,
    conditions: Sequence[str] = tuple(CONDITIONS), *, execute: int | None = None, decode: str | None = None,
    out: Path | None = None, workers: int | None = None, width: int = 32, demos: Demos | None = None, clips: int = 8,
    progress: bool = True, pool: SimulatorPool | None = None, sims: str = "vla.sims", ensemble: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Closed-loop success of `policy` in `suite`; the dict of `results.json` (schema in `vla/evaluate/results.py`).

    `episodes` are per group (a tabletop verb, a Meta-World task). `execute` steps of each chunk are played before the
    policy looks again (default: the policy's); with `ensemble`, a decay (`vla.ensemble`), overlapping chunks are averaged.
    `demos` feeds the replay control. With `out` the result is written there,
    and up to `clips` films beside it. `pool` reuses running simulator processes; else `workers` are started (default:
    one per core), each hosting up to `width` environments per lane.
    Raises UsageError (unknown suite, task or condition; a seed the policy was trained on; another embodiment) and
    MachineError (no renderer, a simulator process that died, a full disk).
    """
    started, cpu = time.perf_counter(), time.process_time()
    module: Any = importlib.import_module(sims)
    names = module.expand_tasks(suite, list(tasks) if tasks else None)
    room = module.SUITES[suite]
    chosen = check_conditions(conditions)
    spec = same_robot(policy, load_embodiment(room.embodiment))
    chunk, own = policy.steps(spec.key)
    execute = own if execute is None else execute
    decode = decode or policy.decode  # written down, not left to a default
    if not 1 <= execute <= chunk:
        raise UsageError("execute", found=execute, expected=f"1..{chunk}, the policy's chunk", fix=f"--execute {own}")
    if ensemble is not None:
        Ensemble(ensemble)  # refuses what is no decay before anything is started
        if execute == chunk:
            raise UsageError("ensemble", found=f"execute {execute}, the whole chunk", expected="chunks that overlap",
                             fix=f"--execute {max(1, chunk // 2)}, or no --ensemble")  # fmt: skip
    if episodes < 1:
        raise UsageError("episodes", found=episodes, expected="at least 1", fix="--episodes 50")
    check_seeds(policy, suite, seed, episodes)
    jobs, notes = make_jobs(policy, room, names, episodes, seed, chosen, demos)

    mine = pool is None
    pool = SimulatorPool(workers, sims) if pool is None else pool
    before = pool.cpu_seconds()
    bar = tqdm(total=len(jobs), desc=f"eval {suite}", unit="ep", disable=None if progress else True)
    with pool if mine else nullcontext(), inference_threads(pool.workers), bar:
        image_size = max(camera.height for camera in spec.cameras.values())
        try:
            running = pool.open(suite, image_size, LANES * width + 4, len(jobs))

            def play(some: Sequence[Any], tick: Any) -> Any:
                return run_jobs(pool, running, policy, spec.key, some, execute=execute, decode=decode, width=width, tick=tick,
                                ensemble=ensemble)  # fmt: skip

            outcomes, _ = play(jobs, lambda: bar.update(1))
            films = save_clips(jobs, outcomes, play, spec, out, clips) if out is not None and clips else []
        except BaseException:
            pool.close()  # answers are under way, or a process is gone: the next evaluation starts fresh ones
            raise
        cpu_s = time.process_time() - cpu + pool.cpu_seconds() - before
    rows, per_task = make_rows(jobs, outcomes)
    results = {
        "schema": SCHEMA, "suite": suite, "seed": seed, "episodes": episodes, "tasks": names, "conditions": chosen,
        "execute": execute, "chunk": chunk, "decode": decode, "ensemble": ensemble,
        "policy": policy.fingerprint, "versions": versions(),
        "rows": rows, "per_task": per_task, "records": make_records(jobs, outcomes), "clips": films, "notes": notes,
        "wall_s": round(time.perf_counter() - started, 2), "cpu_s": round(cpu_s, 2),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    if out is not None:
        write_json(out, results)
    return results


def same_robot(policy: Actor, there: EmbodimentSpec, place: str = "simulator") -> EmbodimentSpec:
    """The policy's spec of the robot `there`: same channels and cameras, any picture size. Raises `UsageError` otherwise."""
    known: Mapping[str, EmbodimentSpec] = policy.embodiments
    name = there.key
    if name not in known:
        raise UsageError("policy", found=f"embodiments {sorted(known)}", expected=f"{name!r}, the robot of this {place}",
                         fix=f"choose a {place} the policy was trained for, or train with its data")  # fmt: skip
    differences = explain(known[name].model_copy(update={"cameras": {}}), there.model_copy(update={"cameras": {}}))
    if missing := sorted(known[name].cameras.keys() - there.cameras.keys()):
        differences.append(f"cameras {missing} do not exist in the {place}, which has {sorted(there.cameras)}")
    if differences:
        raise UsageError(f"embodiment {name!r}", found=f"policy against {place}: " + "; ".join(differences),
                         expected="the same channels, units and cameras",
                         fix="record and train again with this version")  # fmt: skip
    return known[name]


def versions() -> dict[str, str]:
    """Versions of everything that can change a figure."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("tendon-vla", "torch", "transformers", "numpy", "mujoco", "metaworld"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write atomically, so that a reader never sees half a file; one line per row, record and clip, for eyes and diffs.

    Raises `MachineError` on a full disk; an older file is intact then.
    """

    def lines(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join("  " + json.dumps(item, allow_nan=False) for item in value) + "\n ]"
        return json.dumps(value, allow_nan=False)

    text = "{\n" + ",\n".join(f" {json.dumps(key)}: {lines(value)}" for key, value in results.items()) + "\n}\n"
    replace_file(path, text)
