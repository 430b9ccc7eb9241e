"""Does the real `lerobot` read what we write, and do we read what it writes?

Builds a throw-away environment with the newest `lerobot` that installs on the given Python, then compares every frame,
action, state and task both ways. lerobot is never a dependency of ours, so this is a script and not part of the tests.

    python benchmarks/lerobot_roundtrip.py --dir roundtrip
    python benchmarks/lerobot_roundtrip.py --dir roundtrip --python python3.12

The first run installs some gigabytes; `--dir` keeps them for the next. Exit code 0 means that everything agreed.

What must agree, and why that much: actions, states, timestamps and tasks exactly. Frames of ours (H.264 in RGB, lossless by
default) exactly as well: H.264 decoding is bit-exact and no colour conversion takes place. Frames of lerobot's (4:2:0) are
converted to RGB by each decoder in its own way, so there a mean difference of 2 of 255 is allowed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

MEAN_DIFFERENCE = 2.0
"""Of 255, for frames whose colours were sub-sampled."""

# Runs inside the throw-away environment: `python - SRC OUT.npz`. Prints one JSON object as its last line.
READER = r"""
import importlib.metadata as md, json, sys, numpy as np
try:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
except ImportError:
    from lerobot.datasets import LeRobotDataset
src, reference, backends, out = sys.argv[1], np.load(sys.argv[2]), sys.argv[3].split(","), {}
names = [k for k in reference.files if k.startswith("frames/")]
for backend in backends:
    result = out[backend] = {}
    try:
        ds = LeRobotDataset("local/roundtrip", root=src, video_backend=backend)
        worst, total, different, vectors, tasks = 0, 0.0, 0, 0, 0
        for i in range(len(ds)):
            item = ds[i]
            for name in names:
                got = np.rint(item["observation.images." + name[7:]].numpy() * 255).astype(int).transpose(1, 2, 0)
                apart = np.abs(got - reference[name][i].astype(int))
                worst, total, different = max(worst, int(apart.max())), total + float(apart.mean()), different + bool(apart.any())
            for key in ("action", "observation.state"):
                vectors += not np.array_equal(item[key].numpy(), reference[key][i])
            vectors += abs(float(item["timestamp"]) - reference["timestamp"][i]) > 0
            vectors += int(item["episode_index"]) != int(reference["episode"][i])
            tasks += item["task"] != str(reference["task"][i])
        stats = ds.meta.stats["action"]
        result.update(frames=len(ds), episodes=ds.meta.total_episodes, expected=len(reference["action"]),
                      frames_that_differ=different, largest_difference=worst, mean_difference=total / len(ds) / len(names),
                      rows_that_differ=int(vectors), tasks_that_differ=int(tasks), statistics=sorted(stats))
        one = LeRobotDataset("local/roundtrip", root=src, episodes=[1], video_backend=backend,
                             delta_timestamps={"action": [i / ds.meta.fps for i in range(4)]})
        first = int(np.argmax(reference["episode"] == 1))
        got = one[0]["action"].numpy()
        result["window_that_differs"] = int(not np.array_equal(got, reference["action"][first : first + 4]))
    except Exception as error:  # the outer script decides what a missing backend means
        result["error"] = f"{type(error).__name__}: {error}"[:600]
versions = {}
for name in ("lerobot", "torch", "torchcodec", "torchvision", "av", "datasets", "numpy", "pyarrow"):
    try:
        versions[name] = md.version(name)
    except md.PackageNotFoundError:
        versions[name] = None
print(json.dumps({"python": sys.version.split()[0], "versions": versions, "backends": out}))
"""

# Runs inside the environment: `python - ROOT OUT.npz`. lerobot writes a dataset and says what it had put in.
WRITER = r"""
import sys, numpy as np
try:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
except ImportError:
    from lerobot.datasets import LeRobotDataset
root, out = sys.argv[1:]
names = ["height", "width", "channels"]
features = {
    "observation.images.front": {"dtype": "video", "shape": (64, 96, 3), "names": names},
    "observation.images.wrist": {"dtype": "video", "shape": (64, 64, 3), "names": names},
    "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
    "action": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
}
ds = LeRobotDataset.create("local/theirs", fps=20, features=features, root=root, robot_type="probe")
rng, kept = np.random.default_rng(0), {"state": [], "action": [], "task": [], "episode": []}
for e, length in enumerate((9, 14, 11, 20, 5)):
    for t in range(length):
        ramp = np.linspace(0, 200, 96, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
        front = np.roll(ramp, 3 * t + 20 * e, 1).copy()
        front[10:30, 10 + t : 30 + t] = (200, 30 * e, 40)
        state, action = rng.normal(size=3).astype(np.float32), rng.normal(size=2).astype(np.float32)
        task = ["open the box", "close it"][e % 2]
        ds.add_frame({"observation.images.front": front, "observation.images.wrist": front[:, :64].copy(),
                      "observation.state": state, "action": action, "task": task})
        for key, value in (("state", state), ("action", action), ("task", task), ("episode", e)):
            kept[key].append(value)
    ds.save_episode()
if hasattr(ds, "finalize"):
    ds.finalize()
back = LeRobotDataset("local/theirs", root=root, video_backend="pyav")
frames = {c: np.stack([np.rint(back[i]["observation.images." + c].numpy() * 255).astype(np.uint8).transpose(1, 2, 0)
                       for i in range(len(back))]) for c in ("front", "wrist")}
np.savez(out, **{k: np.array(v) for k, v in kept.items()}, **{"frames/" + c: f for c, f in frames.items()})
"""


def environment(folder: Path, python: str, package: str) -> Path:
    """The Python of a virtual environment with `package` in it, made on first use."""
    interpreter = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "--no-cache-dir", package], check=True)
        (folder / "ready").touch()
    return interpreter


def inside(interpreter: Path, code: str, *arguments: object) -> str:
    """Run `code` there, offline and with its caches in its own folder; return what it printed."""
    home = interpreter.parents[1] / "home"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_", "VIRTUAL_ENV"))}
    done = subprocess.run([interpreter, "-", *map(str, arguments)], input=code, text=True, stdout=subprocess.PIPE,
                          env=clean | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"the reader inside {interpreter} failed with code {done.returncode}\n{done.stdout}")
    return done.stdout


def ours_read_by_them(interpreter: Path, dataset: Path, work: Path, backends: str) -> dict:
    """Our dataset through their reader."""
    from vla.episodes import EpisodeStore

    store = EpisodeStore.open(dataset, work / "cache", progress=False)
    fps = json.loads((dataset / "meta" / "info.json").read_text())["fps"]
    lengths = np.diff(store.episode_starts)
    reference = {
        "action": store.action, "observation.state": store.state,
        "episode": np.repeat(np.arange(store.num_episodes), lengths),
        "timestamp": np.concatenate([(np.arange(n) / fps).astype(np.float32) for n in lengths]),
        "task": np.array([store.instructions[i] for i in store.task_of_frame]),
        **{f"frames/{c}": np.stack([store.frame(c, i) for i in range(store.num_frames)]) for c in store.cameras},
    }
    np.savez(work / "ours.npz", **reference)
    return json.loads(inside(interpreter, READER, dataset, work / "ours.npz", backends).splitlines()[-1])


def theirs_read_by_us(interpreter: Path, work: Path) -> dict:
    """Their dataset through our reader."""
    from vla.episodes import EpisodeStore

    shutil.rmtree(work / "theirs", ignore_errors=True)
    inside(interpreter, WRITER, work / "theirs", work / "theirs.npz")
    source = np.load(work / "theirs.npz")
    store = EpisodeStore.open(work / "theirs", work / "cache", progress=False)
    apart = [np.abs(store.frame(c, i).astype(int) - source[f"frames/{c}"][i]) for c in store.cameras
             for i in range(store.num_frames)]
    episode = np.repeat(np.arange(store.num_episodes), np.diff(store.episode_starts))
    tasks = np.array([store.instructions[i] for i in store.task_of_frame])
    same = {"state": store.state, "action": store.action, "episode": episode, "task": tasks}
    return {
        "frames": store.num_frames, "cameras": store.cameras, "expected": len(source["action"]),
        "rows_that_differ": sum(not np.array_equal(values, source[key]) for key, values in same.items()),
        "mean_difference": float(np.mean([a.mean() for a in apart])),
        "largest_difference": int(max(a.max() for a in apart)),
    }


def verdict(result: dict) -> list[str]:
    """Everything that does not agree, in words."""
    wrong = []
    for backend, read in result["ours_read_by_them"]["backends"].items():
        if "error" in read:
            wrong.append(f"{backend}: {read['error']}")
            continue
        limit = 0.0 if result["lossless"] else MEAN_DIFFERENCE
        counts = ("rows_that_differ", "tasks_that_differ", "window_that_differs")
        wrong += [f"{backend}: {name} {read[name]}" for name in counts if read[name]]
        if read["frames"] != read["expected"] or read["mean_difference"] > limit:
            wrong.append(f"{backend}: {read['frames']} of {read['expected']} frames, apart {read['mean_difference']:.3f}")
    theirs = result["theirs_read_by_us"]
    if theirs["rows_that_differ"] or theirs["frames"] != theirs["expected"]:
        wrong.append(f"theirs: {theirs}")
    if theirs["mean_difference"] > MEAN_DIFFERENCE:
        wrong.append(f"theirs: frames apart by {theirs['mean_difference']:.2f} of 255")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where the environment and the datasets go")
    parser.add_argument("--python", default=sys.executable, help="its version decides which lerobot is the newest")
    parser.add_argument("--package", default="lerobot[dataset]", help="pip requirement (default %(default)s)")
    parser.add_argument("--dataset", type=Path, help="a dataset of ours; default: 40 tabletop episodes, recorded now")
    parser.add_argument("--backends", default="pyav,torchcodec", help="lerobot's video backends to try")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from data_tools.record import record

    version = subprocess.run([args.python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
                             check=True, capture_output=True, text=True).stdout.strip()
    work = args.dir / f"python{version}"
    work.mkdir(parents=True, exist_ok=True)
    dataset = args.dataset or args.dir / "ours"
    if args.dataset is None:
        record("tabletop", None, 40, 0, dataset, workers=2)
    interpreter = environment(work / "venv", args.python, args.package)
    codec = json.loads((dataset / "meta" / "recording.json").read_text()).get("video")
    result = {
        "lossless": codec in ("lossless", "rgb"), "stored_as": codec,
        "ours_read_by_them": ours_read_by_them(interpreter, dataset, work, args.backends),
        "theirs_read_by_us": theirs_read_by_us(interpreter, work),
    }
    result["disagreements"] = verdict(result)
    print(json.dumps(result, indent=2))
    return 1 if result["disagreements"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
