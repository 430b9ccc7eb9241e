"""Which graph, on how many threads: measured on the machine, not assumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla.export.actor import OnnxPolicy
from vla.export.folder import write_meaning
from vla.export.int8 import Feed
from vla.export.measure import graph_run, machine, race, several_views, thread_counts
from vla.export_folder import read_export

WORTH = 0.9
"""A further thread must bring a chunk down to this share of its time: a robot has other uses for its cores."""
MOST_ERROR = 3.0
"""Per cent of the action range: an int8 graph whose mean error is above is not chosen, however fast it is."""


def choose(measured: Mapping[str, Mapping[str, float]], int8_error: float | None) -> dict[str, Any]:
    """export.json's `runtime` from times of `graph/threads` entrants.

    `int8_error` in per cent of the action range; None: not measured, and int8 has to prove itself elsewhere.
    """
    entrants = {tuple(name.split("/")): figures["p50_ms"] for name, figures in measured.items()}
    bad = int8_error is not None and int8_error > MOST_ERROR
    allowed = {key: p50 for key, p50 in entrants.items() if not (bad and key[0] == "int8")}
    best = min(allowed, key=lambda key: allowed[key])
    for key in sorted(allowed, key=lambda key: (int(key[1]), allowed[key])):
        if allowed[best] > WORTH * allowed[key]:
            best = key
            break
    why = f"int8 is {int8_error:.1f} % of the action range off, above {MOST_ERROR}" if bad else "the fastest measured"
    return {"graph": best[0], "threads": int(best[1]), "why": why, "measured": {k: dict(v) for k, v in measured.items()},
            "machine": machine()}  # fmt: skip


def measure_graphs(folder: Path, graphs: Mapping[str, str], feed: Feed, rounds: int) -> dict[str, dict[str, float]]:
    """`graph/threads` -> times of one chunk."""
    return race({f"{kind}/{threads}": graph_run(folder / name, threads, feed)
                 for kind, name in graphs.items() for threads in thread_counts()}, rounds)  # fmt: skip


def choose_again(folder: Path, views: int | None = None, rounds: int = 100) -> dict[str, Any]:
    """Measure an export folder on this machine and write what is best into its export.json; returns that.

    Raises `CheckpointError` for a folder that is not whole.
    """
    export = read_export(folder)
    export.verify()
    meaning = dict(export.meaning)
    feed = noise_feed(OnnxPolicy(folder, meaning), views)
    measured = measure_graphs(folder, meaning["graphs"]["policy"], feed, rounds)
    meaning["runtime"] = choose(measured, meaning["runtime"].get("int8_error_percent")) | {
        "views": len(feed["images"]), "int8_error_percent": meaning["runtime"].get("int8_error_percent")}  # fmt: skip
    write_meaning(folder, meaning)
    return meaning["runtime"]


def noise_feed(actor: OnnxPolicy, views: int | None = None) -> Feed:
    """Inputs of policy.onnx for the robot with most cameras; time does not depend on what is in them."""
    robot = max(actor.embodiments, key=lambda key: len(actor.embodiments[key].cameras))
    spec, rng = actor.embodiments[robot], np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (c.height, c.width, 3)).astype(np.uint8) for name, c in spec.cameras.items()}
    state = actor.normalizers[robot]["state"].low
    feed = actor.feed({"images": images, "state": state}, (list(actor.instructions) or ["go"])[0], robot)
    return several_views(feed, views or len(images))
