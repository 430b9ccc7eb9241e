"""How the mixture scales: 1,000 datasets with 10^4, 10^6 and 10^7 windows in all.

    python benchmarks/bench_mixture.py [--datasets 1000] [--json]

The datasets are virtual: everything an EpisodeStore shows, over arrays that take no memory, so that what is measured is the
mixture alone. Each size runs in a process of its own. `start` is from opened stores to the first window, training and
held-out part both made; `memory` is what the process grew by (resident); `in order` and `anywhere` are the time of
`window(n)` along the stream and at random places of it (a new block of draws each time); pictures are not decoded.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from vla.embodiment import Camera, Channel, EmbodimentSpec
from vla.mixture import Mixture

PICTURE = np.zeros((8, 8, 3), np.uint8)
PICTURE.flags.writeable = False


class VirtualStore:
    """`frames` frames in `episodes` episodes of about equal length, all of them alike."""

    def __init__(self, number: int, spec: EmbodimentSpec, episodes: int, frames: int) -> None:
        self.root, self.spec = Path(f"virtual/{number:04d}"), spec
        self.cameras, self.instructions = list(spec.cameras), ["push the block"]
        self.num_episodes, self.num_frames = episodes, frames
        self.episode_starts = np.linspace(0, frames, episodes + 1).astype(np.int64)
        self.state = np.broadcast_to(np.float32(0), (frames, spec.state_dim))
        self.action = np.broadcast_to(np.float32(0), (frames, spec.action_dim))
        self.task_of_frame = np.broadcast_to(np.int32(0), (frames,))
        self.task_of_episode = np.broadcast_to(np.int32(0), (episodes,))
        self.shards, self.language = None, "task"

    def frame(self, camera: str, index: int) -> np.ndarray:
        """Always the same picture."""
        return PICTURE

    def told(self, at: int, stop: int) -> tuple[str, int]:
        """Always the same sentence, to the end."""
        return self.instructions[0], stop


def virtual_stores(datasets: int, windows: int, per_episode: int) -> list[Any]:
    """`datasets` stores with `windows` frames in all, in episodes of about `per_episode`."""
    names = tuple(f"joint{i}" for i in range(7))
    channel = Channel(name="joints", dims=names, convention="scalar", unit="-", low=(-1.0,) * 7, high=(1.0,) * 7)
    spec = EmbodimentSpec(name="virtual", cameras={"front": Camera(height=8, width=8)}, control_hz=10.0, state=(channel,),
                          action=(channel,))  # fmt: skip
    each = windows // datasets
    return [VirtualStore(n, spec, max(2, each // per_episode), each) for n in range(datasets)]


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmRSS in /proc/self/status")


def measure(datasets: int, windows: int, per_episode: int = 100, samples: int = 2000) -> dict[str, Any]:
    """One size, in this process."""
    stores = virtual_stores(datasets, windows, per_episode)
    weights = np.random.default_rng(0).uniform(0.5, 2.0, datasets).tolist()
    # Touch what any use of numpy loads, so that it is not counted as the mixture's.
    Mixture(stores[:2], weights[:2], 8, seed=0, holdout=0.02).window(0)
    gc.collect()
    before, began = resident(), time.perf_counter()
    mixture = Mixture(stores, weights, 8, seed=0, holdout=0.02)
    heldout = Mixture(stores, weights, 8, seed=0, holdout=0.02, part="holdout")
    made = time.perf_counter() - began
    mixture.window(0)
    start = time.perf_counter() - began
    in_order = []
    for first in range(0, samples * 5, samples):
        at = time.perf_counter()
        for n in range(first, first + samples):
            mixture.window(n)
        in_order.append((time.perf_counter() - at) / samples)
    anywhere = []
    for n in np.random.default_rng(1).integers(0, 100 * windows, 200).tolist():
        at = time.perf_counter()
        mixture.window(n)
        anywhere.append(time.perf_counter() - at)
    return {
        "windows": len(mixture) + len(heldout), "datasets": datasets, "episodes": sum(s.num_episodes for s in stores),
        "made_s": made, "start_s": start, "memory_mb": (resident() - before) / 1e6, "in_order_us": min(in_order) * 1e6,
        "in_order_median_us": statistics.median(in_order) * 1e6, "anywhere_us": statistics.median(anywhere) * 1e6,
    }  # fmt: skip


def main() -> int:
    """Print a table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=1000)
    parser.add_argument("--windows", type=int, nargs="+", default=[10**4, 10**6, 10**7])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="one JSON object per size")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.datasets, args.one)))
        return 0
    if not args.json:
        print(f"{'windows':>10s} {'episodes':>9s} {'start':>9s} {'memory':>10s} {'in order':>12s} {'anywhere':>12s}")
    for windows in args.windows:
        command = [sys.executable, __file__, "--one", str(windows), "--datasets", str(args.datasets)]
        line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        got = json.loads(line)
        if args.json:
            print(line.strip())
        else:
            print(f"{got['windows']:10d} {got['episodes']:9d} {got['start_s']:7.3f} s {got['memory_mb']:7.1f} MB "
                  f"{got['in_order_us']:9.1f} us {got['anywhere_us']:9.1f} us")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
