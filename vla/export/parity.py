"""What an export changed, measured beside the policy itself: errors on recorded moments, time, memory, success in a simulator.

The content of parity.json, and the table of the card. Every figure stands beside the policy's own from the same run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla.evaluate import REPORT_SEED, evaluate, wilson
from vla.export.actor import OnnxPolicy
from vla.export.int8 import quantise
from vla.export.measure import (
    fresh_graph,
    fresh_torch,
    gemm_rate,
    graph_run,
    machine,
    race,
    thread_counts,
    torch_run,
)
from vla.export.onnx import torch_chunks
from vla.export.runtime import choose, noise_feed
from vla.export.windows import observation_of
from vla.policy import VLAPolicy
from vla.schema import Window

_Z95 = 1.959964
Said = dict[str, tuple[np.ndarray, np.ndarray]]
"""robot -> (unit, symbols), each (windows, H, A) of that robot's dimensions."""


def said_by_torch(policy: VLAPolicy, windows: Sequence[Window], at_once: int = 16) -> Said:
    found = {}
    for robot, own in _by_robot(windows).items():
        parts = [torch_chunks(policy, [observation_of(w) for w in some], [w.instruction for w in some], robot)[:2]
                 for some in (own[i : i + at_once] for i in range(0, len(own), at_once))]  # fmt: skip
        dims = policy.embodiments[robot].action_dim
        found[robot] = tuple(np.concatenate(column)[..., :dims] for column in zip(*parts, strict=True))
    return found


def said_by_graph(actor: OnnxPolicy, windows: Sequence[Window]) -> Said:
    found = {}
    for robot, own in _by_robot(windows).items():
        dims = actor.embodiments[robot].action_dim
        parts = [actor.unit(observation_of(w), w.instruction, robot)[:2] for w in own]
        found[robot] = tuple(np.stack(column)[..., :dims] for column in zip(*parts, strict=True))
    return found


def _by_robot(windows: Sequence[Window]) -> dict[str, list[Window]]:
    found: dict[str, list[Window]] = {}
    for window in windows:
        found.setdefault(window.embodiment, []).append(window)
    return found


def errors(policy: VLAPolicy, wanted: Said, found: Said) -> dict[str, Any]:
    """{mean_percent, p99_percent, max_percent, agreement, robots}: how far from the policy, in per cent of the action range
    (-1 to 1), in robot units by dimension, and the share of symbols that are the same."""
    robots, apart, same = {}, [], []
    for robot, (unit, symbols) in found.items():
        difference = np.abs(unit - wanted[robot][0])  # (n, H, A)
        normalizer = policy.normalizers[robot]["action"]
        own = np.abs(normalizer.from_unit(unit) - normalizer.from_unit(wanted[robot][0]))
        agree = symbols == wanted[robot][1]
        robots[robot] = {
            "windows": len(unit), "dimensions": policy.embodiments[robot].action_names,
            "mean": own.mean((0, 1)).tolist(), "max": own.max((0, 1)).tolist(),
            "mean_percent": (50 * difference.mean((0, 1))).tolist(), "max_percent": (50 * difference.max((0, 1))).tolist(),
            "agreement": float(agree.mean()),
        }  # fmt: skip
        apart.append(difference.ravel())
        same.append(agree.ravel())
    every = 50 * np.concatenate(apart)
    return {"mean_percent": float(every.mean()), "p99_percent": float(np.percentile(every, 99)),
            "max_percent": float(every.max()), "agreement": float(np.concatenate(same).mean()), "robots": robots}  # fmt: skip


def latency(policy: VLAPolicy, actor: OnnxPolicy, graphs: Mapping[str, str], views: int | None, rounds: int) -> dict[str, Any]:
    """{views, rounds, times: {name/threads: figures}}: torch and the graphs in turn, from the same inputs."""
    feed = noise_feed(actor, views)
    entrants = {}
    for threads in thread_counts():
        entrants[f"torch float32/{threads}"] = torch_run(policy, feed, threads)
        entrants[f"torch bfloat16/{threads}"] = torch_run(policy, feed, threads, bf16=True)
        for kind, name in graphs.items():
            entrants[f"{kind}/{threads}"] = graph_run(actor.folder / name, threads, feed)
    before = torch.get_num_threads()
    try:
        times = race(entrants, rounds)
    finally:
        torch.set_num_threads(before)  # each contestant sets its own
    return {"views": len(feed["images"]), "what": "one chunk from prepared pictures and a known sentence, in turn, one by one",
            "times": times, "machine": machine()}  # fmt: skip


def integer_share(actor: OnnxPolicy, names: Sequence[str], views: int | None, times: Mapping[str, float]) -> dict[str, Any]:
    """How near an int8 graph on one thread comes to the machine's own rate of integer products, in processor time."""
    p50_ms = times["cpu_p50_ms"]
    found = gemm_rate(actor.folder / actor.meaning["graphs"]["policy"]["float32"], names, noise_feed(actor, views))
    return found | {"p50_ms": p50_ms, "reached_gops": round(1000 * found["gop"] / p50_ms, 1),
                    "percent": round(100 * found["ideal_ms"] / p50_ms, 1)}  # fmt: skip


def fresh(actor: OnnxPolicy, graphs: Mapping[str, str], source: Path | None) -> dict[str, Any]:
    """Cold start and peak memory in fresh processes, of each graph and of the policy folder they came from."""
    feed = noise_feed(actor)
    found = {kind: fresh_graph(actor.folder, name, feed) for kind, name in graphs.items()}
    return ({"torch": fresh_torch(source)} if source else {}) | found


# ------------------------------------------------------------------------------------------------------ closed loop


def closed_loop(
    actors: Mapping[str, Any], suite: str, tasks: Sequence[str] | None, episodes: int, seed: int = REPORT_SEED,
    progress: bool = True,
) -> dict[str, Any]:
    """Success of every actor on the same scenes, how the later ones differ from the first: {..., rows, differences}."""
    wins, rows = {}, {}
    for name, actor in actors.items():
        result = evaluate(actor, suite, tasks, episodes, seed, ["policy"], clips=0, progress=progress)
        wins[name] = {(r["task"], r["seed"]): bool(r["success"]) for r in result["records"]}
        won, n = sum(wins[name].values()), len(wins[name])
        low, high = wilson(won, n)
        rows[name] = {"successes": won, "n": n, "rate": won / n, "low": low, "high": high,
                      "groups": {r["group"]: [r["successes"], r["n"]] for r in result["rows"]}}  # fmt: skip
    first = next(iter(wins))
    return {"suite": suite, "tasks": list(tasks) if tasks else None, "episodes": episodes, "seed": seed, "rows": rows,
            "against": first, "differences": {name: paired(wins[first], wins[name]) for name in wins if name != first}}


def paired(first: Mapping[Any, bool], second: Mapping[Any, bool]) -> dict[str, Any]:
    """How much more often `second` succeeds on the same scenes: {difference, low, high, only_first, only_second, n}.

    The adjusted Wald interval for paired proportions (Bonett and Price 2012), 95 %.
    """
    n = len(first)
    only_second = sum(second[scene] and not won for scene, won in first.items())
    only_first = sum(won and not second[scene] for scene, won in first.items())
    more, less = (only_second + 1) / (n + 2), (only_first + 1) / (n + 2)
    half = _Z95 * math.sqrt(max(0.0, more + less - (more - less) ** 2) / (n + 2))
    return {"difference": (only_second - only_first) / n, "low": max(-1.0, more - less - half),
            "high": min(1.0, more - less + half), "only_first": only_first, "only_second": only_second, "n": n}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the whole report


def report(
    policy: VLAPolicy, folder: Path, meaning: dict[str, Any], windows: Sequence[Window], made: Mapping[str, Any] | None, *,
    source: Path | None, views: int | None, rounds: int, verify: tuple[str, list[str] | None] | None, episodes: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure everything; writes `runtime` into `meaning`. `made` is what `quantise` returned."""
    graphs = meaning["graphs"]["policy"]
    actors = {kind: OnnxPolicy(folder, meaning, kind) for kind in graphs}
    found: dict[str, Any] = {"format": 1, "windows": len(windows), "int8": made, "bytes": _sizes(folder, graphs)}
    error = None
    if windows:
        wanted = said_by_torch(policy, windows)
        found["errors"] = {kind: errors(policy, wanted, said_by_graph(actor, windows)) for kind, actor in actors.items()}
        error = found["errors"]["int8"]["mean_percent"] if "int8" in actors else None
    plain = actors["float32"]
    found["latency"] = latency(policy, plain, graphs, views, rounds)
    times = found["latency"]["times"]
    if made and not made["kind"].startswith("weight-only"):
        found["integer_products"] = integer_share(plain, made["products"], views, times["int8/1"])
    found["fresh"] = fresh(plain, graphs, source)
    if verify is not None:
        found["closed_loop"] = closed_loop({"torch": policy, **actors}, verify[0], verify[1], episodes)
    own = {name: figures for name, figures in times.items() if name.partition("/")[0] in graphs}
    meaning["runtime"] = choose(own, error) | {"views": found["latency"]["views"], "int8_error_percent": error}
    return found


def _sizes(folder: Path, graphs: Mapping[str, str]) -> dict[str, int]:
    return {kind: (folder / name).stat().st_size for kind, name in graphs.items()} | {
        "sentence": (folder / "sentence.onnx").stat().st_size}  # fmt: skip


def add_int8(
    policy: VLAPolicy, folder: Path, meaning: dict[str, Any], kind: str, windows: tuple[Sequence[Window], Sequence[Window]]
) -> dict[str, Any]:
    """Write policy.int8.onnx of `kind`, calibrated on the first `windows`; returns what was done.

    The second `windows` decide whether what is delicate (`int8.DELICATE`) stays float32: everything in bytes is a little
    smaller, so it is taken where it is as exact.
    """
    source, target = folder / meaning["graphs"]["policy"]["float32"], folder / "policy.int8.onnx"
    actor = OnnxPolicy(folder, meaning)
    feeds = [actor.feed(observation_of(w), w.instruction, w.embodiment) for w in windows[0]] if kind == "static" else []
    meaning["graphs"]["policy"]["int8"] = target.name
    made = quantise(source, target, kind, feeds)
    if not windows[1]:
        return made
    wanted, tried, kept = said_by_torch(policy, windows[1]), {}, target.read_bytes()

    def judged() -> dict[str, float]:
        found = errors(policy, wanted, said_by_graph(OnnxPolicy(folder, meaning, "int8"), windows[1]))
        return {name: value for name, value in found.items() if name != "robots"}

    tried["delicate in float32"] = judged()
    everything = quantise(source, target, kind, feeds, everything=True)
    tried["everything"] = judged()
    if tried["everything"]["mean_percent"] <= tried["delicate in float32"]["mean_percent"]:
        made = everything
    else:
        target.write_bytes(kept)
    return made | {"tried": tried}
