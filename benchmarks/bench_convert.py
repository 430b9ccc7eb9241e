"""What `vla data convert` costs: peak memory of all its processes, time, bytes on disk, for sources of several sizes.

    python benchmarks/bench_convert.py [--megabytes 300 1200] [--workers 2] [--video lossless yuv420p] [--dir DIR] [--json]

Sources are HDF5 in robomimic's layout, 2 cameras of 128 x 128 stored raw, 100 steps an episode: a textured background
with noise of +-2 and a moving square, so that lossless video has something to do. The command runs as a process of its
own; every 20 ms the resident memory of it and its children is summed from /proc (shared pages count once per process, so
the sum is an upper bound), and each process's own high-water mark is kept. Reading everything back is included and timed
apart.

50 GB is extrapolated in two parts. Time and bytes on disk follow the line through the sizes measured. Memory has a part
that does not depend on the size once a video file is full (100 MB), measured above, and a part that grows with the number
of frames until the columns' own limits: that one is measured at its full size, by a writer fed with as many episodes as
50 GB hold, pictures of 16 x 16, which also gives the time of a commit from first to last.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZE, STEPS, HZ = 128, 100, 20
EPISODE_BYTES = 2 * STEPS * SIZE * SIZE * 3
TARGET_MB = 50_000


def write_source(path: Path, megabytes: int) -> int:
    """A robomimic file of about that many MB of raw pictures. Returns the number of episodes."""
    import h5py

    episodes = max(1, round(megabytes * 1e6 / EPISODE_BYTES))
    env = {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"], "control_freq": HZ}}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"], data.attrs["total"] = json.dumps(env), episodes * STEPS
        for n in range(episodes):
            rng = np.random.default_rng(n)
            demo = data.create_group(f"demo_{n}")
            demo.attrs["num_samples"] = STEPS
            demo["actions"] = rng.uniform(-1, 1, (STEPS, 7))
            obs = demo.create_group("obs")
            obs["robot0_eef_pos"] = rng.normal(size=(STEPS, 3)) * 0.1
            quat = rng.normal(size=(STEPS, 4))
            obs["robot0_eef_quat"] = quat / np.linalg.norm(quat, axis=1, keepdims=True)
            obs["robot0_gripper_qpos"] = rng.uniform(0, 0.04, (STEPS, 2))
            for camera in ("agentview_image", "robot0_eye_in_hand_image"):
                obs[camera] = _pictures(rng)
    return episodes


def _pictures(rng: np.random.Generator) -> np.ndarray:
    coarse = rng.integers(30, 220, (SIZE // 8, SIZE // 8, 3))
    still = np.kron(coarse, np.ones((8, 8, 1), int))
    frames = still + rng.integers(-2, 3, (STEPS, SIZE, SIZE, 3))
    for t in range(STEPS):
        x, y = (np.array([20, 30]) + t * rng.integers(0, 2, 2)) % (SIZE - 20)
        frames[t, y : y + 20, x : x + 20] = (200, 40, 30)
    return frames.clip(0, 255).astype(np.uint8)


class Watch(threading.Thread):
    """Peak resident memory of a process and its descendants, from /proc, while it lives."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.sum, self.parent, self.worker = pid, 0.0, 0.0, 0.0

    def run(self) -> None:
        while Path(f"/proc/{self.pid}").exists():
            held = {pid: resident(pid) for pid in [self.pid, *descendants(self.pid)]}
            self.sum = max(self.sum, sum(now for now, _ in held.values()))
            self.parent = max(self.parent, held[self.pid][1])
            self.worker = max([self.worker, *(peak for pid, (_, peak) in held.items() if pid != self.pid)])
            time.sleep(0.02)


def resident(pid: int) -> tuple[float, float]:
    """(now, peak) MB; zeros for a process that is gone."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
        return int(lines["VmRSS"].split()[0]) * 1024 / 1e6, int(lines["VmHWM"].split()[0]) * 1024 / 1e6
    except (OSError, KeyError):
        return 0.0, 0.0


def descendants(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(c) for task in tasks for c in (task / "children").read_text().split()]
    except OSError:
        return []
    return children + [d for child in children for d in descendants(child)]


def measure(source: Path, out: Path, workers: int, video: str) -> dict[str, Any]:
    """Convert once, watched."""
    line = [sys.executable, "-m", "vla.cli", "data", "convert", str(source), str(out), "--instruction", "lift the cube",
            "--workers", str(workers), "--video", video, "--json"]  # fmt: skip
    began, spent = time.monotonic(), _children()
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = Watch(process.pid)
    watch.start()
    stdout, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(stderr)
    summary = json.loads(stdout)
    proof = summary["verified"]
    return {
        "source_mb": round(source.stat().st_size / 1e6), "episodes": summary["episodes"], "video": video, "workers": workers,
        "peak_sum_mb": round(watch.sum), "peak_parent_mb": round(watch.parent), "peak_worker_mb": round(watch.worker),
        "written_mb": summary["megabytes"], "convert_s": summary["seconds"], "verify_s": summary["verify_seconds"],
        "wall_s": round(time.monotonic() - began, 1), "cpu_s": round(_children() - spent, 1),
        "raw_mb_per_s": round(summary["raw_megabytes"] / summary["seconds"], 1),
        "pictures": proof["pictures"], "identical": proof["pictures_identical"], "worst_psnr": proof["worst_psnr"],
    }  # fmt: skip


def _children() -> float:
    """CPU seconds of all processes that were waited for, workers included: other work on the machine counts little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


_WRITER = """
import json, sys, time
from pathlib import Path
import numpy as np
from vla.recording import EncodedEpisode, LeRobotWriter, encode_episode
from vla.embodiment import Camera, load_embodiment
from vla.schema import Episode
import vla.recording.writer as lerobot
sys.path.insert(0, sys.argv[1])
from bench_convert import STEPS, resident
lerobot._COMMIT_SECONDS = 1e9  # commits are made here, and timed
rng, first, last = np.random.default_rng(0), int(sys.argv[3]), int(sys.argv[4])
cameras = {name: Camera(height=16, width=16) for name in ("a", "b")}
spec = load_embodiment("tabletop").model_copy(update={"cameras": cameras})
channel = spec.state[0].model_copy(update={"dims": tuple("abcdefghi"), "low": (-9.0,) * 9, "high": (9.0,) * 9})
spec = spec.model_copy(update={"state": (channel,)})
frames = rng.integers(0, 256, (STEPS, 16, 16, 3), dtype=np.uint8)
def episode():
    state, action = (rng.normal(size=(STEPS, d)).astype(np.float32) for d in (9, spec.action_dim))
    return Episode({c: frames for c in cameras}, state, action, "lift the cube", spec.name)
one, held, seconds = encode_episode(episode(), 20), [], []
with LeRobotWriter(Path(sys.argv[2]), spec, fps=20) as writer:
    for n in range(last):
        e = episode()
        writer.add(EncodedEpisode(one.clips, e.state, e.action, e.instruction, True, "", None, one.pixels, one.stats,
                                  one.digests, source=f"image.hdf5:demo_{n}"))
        if n + 1 == first or (n + 1) % 250 == 0:
            began = time.process_time()
            writer.commit()
            seconds.append(time.process_time() - began)
        if n + 1 == first:
            held.append(resident(%(self)s)[1])
    held.append(resident(%(self)s)[1])
print(json.dumps({"episodes": [first, last], "peak_mb": [round(mb) for mb in held],
                  "commit_cpu_s": [round(seconds[0], 2), round(float(np.median(seconds[-5:])), 2)]}))
"""


def writer_alone(out: Path, first: int, last: int) -> dict[str, Any]:
    """Peak memory of a writer, and CPU seconds of a commit, after `first` and after `last` episodes."""
    code = _WRITER.replace("%(self)s", "__import__('os').getpid()")
    line = [sys.executable, "-c", code, str(Path(__file__).parent), str(out), str(first), str(last)]
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout)


def extrapolated(small: dict[str, Any], large: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """At 50 GB: time and disk by the line through two measurements, memory as the larger one plus what the writer gained."""
    grown = large["source_mb"] - small["source_mb"]

    def at(key: str) -> float:
        slope = (large[key] - small[key]) / grown
        return large[key] + slope * (TARGET_MB - large["source_mb"])

    gained = alone["peak_mb"][1] - alone["peak_mb"][0]
    return {"source_mb": TARGET_MB, "episodes": alone["episodes"][1], "peak_sum_mb": round(large["peak_sum_mb"] + gained),
            "peak_parent_mb": round(large["peak_parent_mb"] + gained), "written_mb": round(at("written_mb")),
            "hours": round((at("convert_s") + at("verify_s")) / 3600, 1),
            "cpu_hours": round(at("cpu_s") / 3600, 1)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[300, 1200], help="raw sizes of the sources")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--video", nargs="+", default=["lossless"])
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary folder); needs 3 times the largest size")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    work = Path(tempfile.mkdtemp(dir=args.dir))
    rows = []
    try:
        for megabytes in args.megabytes:
            source = work / f"{megabytes}.hdf5"
            write_source(source, megabytes)
            for video in args.video:
                rows.append(measure(source, work / "out", args.workers, video))
                shutil.rmtree(work / "out")
                if not args.json:
                    print(rows[-1], flush=True)
            source.unlink()
        alone = writer_alone(work / "writer", rows[-1]["episodes"], round(TARGET_MB * 1e6 / EPISODE_BYTES))
        if not args.json:
            print("the writer alone:", alone, flush=True)
    finally:
        shutil.rmtree(work)
    ends = {video: [row for row in rows if row["video"] == video] for video in args.video}
    lines = {video: extrapolated(found[0], found[-1], alone) for video, found in ends.items() if len(found) > 1}
    print(json.dumps({"rows": rows, "writer": alone, "at_50_gb": lines}) if args.json else f"at 50 GB: {lines}")


if __name__ == "__main__":
    main()
