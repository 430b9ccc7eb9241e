"""LeRobot datasets written and read by the real `lerobot`, old and new, against our readers and our v2.1 writer.

    python benchmarks/foreign/lerobot.py write --python ENV/bin/python --out foreign/lerobot-v2.1
    python benchmarks/foreign/lerobot.py check --dir foreign --v21 ENV033/bin/python --v30 ENV044/bin/python
    python benchmarks/foreign/lerobot.py golden --python ENV033/bin/python --out tests/golden/lerobot_v21
    python benchmarks/foreign/lerobot.py golden --python ENV033/bin/python --out tests/golden/lerobot_v21_images \\
        --images --episodes 2 --size 16 --longest 6

`ENV033` is a virtual environment with `lerobot==0.3.3 numpy<2.3` (the last release that writes v2.1), `ENV044` one with
`lerobot==0.4.4 numpy<2.3` (v3.0); neither is ever a dependency of ours. v2.0 has no release that still installs on Python 3.11
beside those: `as_v20` derives it from a v2.1 dataset by the written description (version, `video_info`, one stats.json
instead of statistics per episode, float64 actions).

What must agree: actions, states, rewards, timestamps and tasks exactly; frames to a mean of 2 of 255, since 4:2:0 is turned
into RGB by each decoder in its own way, and exactly where we only copy.
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

# Runs inside an environment: `python - OUT EPISODES SIZE VIDEO LENGTH`. lerobot writes a dataset; OUT.npz says what went in
# and what lerobot itself decodes.
WRITER = r"""
import importlib.metadata as md, inspect, sys, numpy as np
try:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
except ImportError:
    from lerobot.datasets import LeRobotDataset
out, episodes, size, video, longest = sys.argv[1], *map(int, sys.argv[2:6])
kind = "video" if video else "image"
names = ["height", "width", "channels"]
features = {
    "observation.images.front": {"dtype": kind, "shape": (size, size, 3), "names": names},
    "observation.images.wrist": {"dtype": kind, "shape": (size, size, 3), "names": names},
    "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
    "action": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
}
ds = LeRobotDataset.create("local/theirs", fps=20, features=features, root=out, robot_type="probe", use_videos=bool(video))
apart = "task" in inspect.signature(ds.add_frame).parameters
rng, kept = np.random.default_rng(0), {k: [] for k in ("state", "action", "reward", "task", "episode")}
y, x = np.mgrid[0:size, 0:size]
for e in range(episodes):
    for t in range(longest - longest // 2 + (7 * e) % (longest // 2)):
        front = np.stack([(2 * x + 3 * t + 20 * e) % 200, (2 * y + 5 * e) % 200, (x + y) % 256], -1).astype(np.uint8)
        side, at = size // 4, (t * size // (2 * longest))
        front[at : at + side, at : at + side] = (220, (30 * e) % 256, 40)
        wrist = np.ascontiguousarray(front[::-1])
        state, action = rng.normal(size=3).astype(np.float32), rng.normal(size=2).astype(np.float32)
        task, reward = ["open the box", "close the lid", "lift the red cube"][e % 3], np.float32([t / 10])
        frame = {"observation.images.front": front, "observation.images.wrist": wrist,
                 "observation.state": state, "action": action, "next.reward": reward}
        ds.add_frame(frame, task=task) if apart else ds.add_frame(frame | {"task": task})
        for key, value in (("state", state), ("action", action), ("task", task), ("episode", e), ("reward", reward[0])):
            kept[key].append(value)
    ds.save_episode()
if hasattr(ds, "finalize"):
    ds.finalize()
back = LeRobotDataset("local/theirs", root=out, video_backend="pyav")
frames = {c: np.stack([np.rint(back[i]["observation.images." + c].numpy() * 255).astype(np.uint8).transpose(1, 2, 0)
                       for i in range(len(back))]) for c in ("front", "wrist")}
version = np.array("lerobot " + md.version("lerobot"))
np.savez_compressed(out + ".npz", **{k: np.array(v) for k, v in kept.items()}, version=version,
                    **{"frames/" + c: f for c, f in frames.items()})
print(version, len(back), "frames")
"""

# Runs inside an environment: `python - ROOT OUT.npz`. What lerobot makes of a dataset.
READER = r"""
import importlib.metadata as md, sys, numpy as np
try:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
except ImportError:
    from lerobot.datasets import LeRobotDataset
root, out = sys.argv[1:3]
ds = LeRobotDataset("local/ours", root=root, video_backend="pyav")
items = [ds[i] for i in range(len(ds))]
back = {k: np.stack([item[k].numpy() for item in items]) for k in items[0] if k != "task" and "images" not in k}
back["task"] = np.array([item["task"] for item in items])
for key in ds.meta.camera_keys:
    back["frames/" + key.removeprefix("observation.images.")] = np.stack(
        [np.rint(item[key].numpy() * 255).astype(np.uint8).transpose(1, 2, 0) for item in items])
for key in ("action", "observation.state"):
    for name in ("min", "max", "mean", "std"):
        back["stats/" + key + "/" + name] = np.asarray(ds.meta.stats[key][name])
window = LeRobotDataset("local/ours", root=root, video_backend="pyav", delta_timestamps={"action": [0, 1 / ds.fps, 2 / ds.fps]})
back["window"] = np.stack([window[i]["action"].numpy() for i in range(len(ds))])
np.savez(out, version=np.array("lerobot " + md.version("lerobot")), **back)
"""


def inside(python: Path, code: str, *arguments: object) -> str:
    """Run `code` in an environment, offline; return what it printed."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_", "VIRTUAL_ENV"))}
    home = Path(python).absolute().parents[1] / "home"
    done = subprocess.run([python, "-", *map(str, arguments)], input=code, text=True, stdout=subprocess.PIPE,
                          env=clean | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"})  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{python} failed with code {done.returncode}\n{done.stdout}")
    return done.stdout


def write(python: Path, out: Path, episodes: int = 12, size: int = 128, video: bool = True, longest: int = 40) -> None:
    """A dataset by the real `lerobot` of that environment, and OUT.npz beside it with what it holds."""
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(inside(python, WRITER, out, episodes, size, int(video), longest).splitlines()[-1])
    shutil.rmtree(out / "images", ignore_errors=True)  # lerobot leaves the pictures it has put elsewhere


def as_v20(source: Path, out: Path) -> None:
    """A v2.0 dataset from a v2.1 one, by the format's description: derived by hand, not written by a v2.0 release."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out)
    info = json.loads((out / "meta/info.json").read_text()) | {"codebase_version": "v2.0"}
    for feature in info["features"].values():
        if feature["dtype"] == "video":
            old = feature.pop("info", {})
            feature["video_info"] = {k: v for k, v in old.items() if k.startswith("video.") or k == "has_audio"}
    info["features"]["action"]["dtype"] = "float64"
    columns: dict[str, list[np.ndarray]] = {"action": [], "observation.state": []}
    for path in sorted((out / "data").rglob("*.parquet")):
        table = pq.read_table(path)
        for key, kept in columns.items():
            kept.append(np.array(table[key].to_pylist(), np.float64))
        wide = pa.array(columns["action"][-1].tolist(), pa.list_(pa.float64()))
        table = table.set_column(table.column_names.index("action"), "action", wide).replace_schema_metadata(None)
        pq.write_table(table, path)
    stats = {}
    for key, parts in columns.items():
        whole = np.concatenate(parts)
        stats[key] = {name: getattr(whole, name)(0).tolist() for name in ("min", "max", "mean", "std")}
    (out / "meta/stats.json").write_text(json.dumps(stats, indent=4))
    (out / "meta/episodes_stats.jsonl").unlink()
    (out / "meta/info.json").write_text(json.dumps(info, indent=4))


def read_by_us(root: Path, reference: dict[str, np.ndarray], cache: Path) -> dict:
    """Our reader against what lerobot was given and what it decodes itself."""
    from vla.episodes import EpisodeStore

    store = EpisodeStore.open(root, cache, progress=False)
    episode = np.repeat(np.arange(store.num_episodes), np.diff(store.episode_starts))
    tasks = np.array([store.instructions[i] for i in store.task_of_frame])
    same = {"state": store.state, "action": store.action, "episode": episode, "task": tasks}
    apart = [np.abs(store.frame(c, i).astype(int) - reference[f"frames/{c}"][i]) for c in store.cameras
             for i in range(store.num_frames)]  # fmt: skip
    return {
        "frames": store.num_frames, "expected": len(reference["action"]), "cameras": store.cameras,
        "columns_that_differ": [k for k, values in same.items() if not np.array_equal(values, reference[k])],
        "mean_difference": float(np.mean([a.mean() for a in apart])), "largest_difference": int(max(a.max() for a in apart)),
        "notes": store.notes,
    }  # fmt: skip


def read_as_source(root: Path, reference: dict[str, np.ndarray]) -> dict:
    """The convert source against the same."""
    from data_tools.sources import open_source

    source = open_source(root)
    episodes = [source.read(key) for key in source.keys()]
    got = {
        "state": np.concatenate([e.fields["observation.state"] for e in episodes]),
        "action": np.concatenate([e.fields["action"] for e in episodes]),
        "reward": np.concatenate([e.fields["next.reward"] for e in episodes]).reshape(-1),
        "task": np.repeat([e.instruction for e in episodes], [len(e) for e in episodes]),
        "episode": np.repeat(np.arange(len(episodes)), [len(e) for e in episodes]),
    }
    frames = {c: np.concatenate([e.images[f"observation.images.{c}"] for e in episodes]) for c in ("front", "wrist")}
    return {
        "kind": source.kind, "damage": [str(d) for d in source.damage],
        "columns_that_differ": [k for k, values in got.items() if not np.array_equal(values, reference[k])],
        "mean_difference": float(np.mean([np.abs(f.astype(int) - reference[f"frames/{c}"]).mean() for c, f in frames.items()])),
    }  # fmt: skip


def written_by_us(source: Path, out: Path, python: Path, reference: dict[str, np.ndarray]) -> dict:
    """Our v2.1 of a dataset, read by the real lerobot that writes v2.1."""
    from data_tools.lerobot_v21 import write_v21

    shutil.rmtree(out, ignore_errors=True)
    report = write_v21(source, out, workers=0, progress=False)
    return {"report": report} | read_by_them(out, python, reference)


def read_by_them(root: Path, python: Path, reference: dict[str, np.ndarray]) -> dict:
    """A dataset through the real lerobot, against what it holds."""
    kept = root.with_name(f"{root.name}.read.npz")
    inside(python, READER, root, kept)
    got = dict(np.load(kept))
    pairs = {"state": "observation.state", "action": "action", "task": "task", "episode": "episode_index",
             "reward": "next.reward"}  # fmt: skip
    differ = [k for k, theirs in pairs.items() if not np.array_equal(got[theirs].reshape(reference[k].shape), reference[k])]
    for key in ("action", "observation.state"):
        column = reference[key.removeprefix("observation.")].astype(np.float64)
        differ += [f"stats/{key}/{name}" for name in ("min", "max", "mean", "std")
                   if not np.allclose(got[f"stats/{key}/{name}"], getattr(column, name)(0), atol=1e-5)]  # fmt: skip
    apart = [np.abs(got[f"frames/{c}"].astype(int) - reference[f"frames/{c}"]) for c in ("front", "wrist")]
    return {
        "read_by": str(got["version"]), "frames": len(got["action"]), "expected": len(reference["action"]),
        "columns_that_differ": differ, "mean_difference": float(np.mean([a.mean() for a in apart])),
        "largest_difference": int(max(a.max() for a in apart)),
    }  # fmt: skip


def check(folder: Path, v21: Path, v30: Path) -> int:
    """Every comparison, as JSON; 1 when something does not agree."""
    cache = folder / "cache"
    result: dict[str, dict] = {}
    for name, python in (("lerobot-v2.1", v21), ("lerobot-v3.0", v30)):
        if not (folder / f"{name}.npz").is_file():
            write(python, folder / name)
    as_v20(folder / "lerobot-v2.1", folder / "lerobot-v2.0")
    result["lerobot-v2.0, which we derived, by lerobot"] = read_by_them(
        folder / "lerobot-v2.0", v21, dict(np.load(folder / "lerobot-v2.1.npz")))  # fmt: skip
    for name, kept in (("lerobot-v2.1", "lerobot-v2.1"), ("lerobot-v3.0", "lerobot-v3.0"), ("lerobot-v2.0", "lerobot-v2.1")):
        reference = dict(np.load(folder / f"{kept}.npz"))
        result[f"{name} ({reference['version']}) by EpisodeStore"] = read_by_us(folder / name, reference, cache)
        result[f"{name} by LeRobotSource"] = read_as_source(folder / name, reference)
        result[f"{name} -> our v2.1"] = written_by_us(folder / name, folder / f"ours-from-{name}", v21, reference)
    print(json.dumps(result, indent=2))
    wrong = [name for name, found in result.items() if found["columns_that_differ"] or found.get("damage")
             or found["mean_difference"] > MEAN_DIFFERENCE or found.get("frames") != found.get("expected")]  # fmt: skip
    print(f"disagreements: {wrong or 'none'}")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("write", "golden"):
        one = verbs.add_parser(verb)
        one.add_argument("--python", type=Path, required=True)
        one.add_argument("--out", type=Path, required=True)
        one.add_argument("--episodes", type=int, default=12 if verb == "write" else 3)
        one.add_argument("--size", type=int, default=128 if verb == "write" else 32)
        one.add_argument("--longest", type=int, default=40 if verb == "write" else 8)
        one.add_argument("--images", action="store_true", help="pictures inside the Parquet files instead of video")
    both = verbs.add_parser("check")
    both.add_argument("--dir", type=Path, required=True)
    both.add_argument("--v21", type=Path, required=True, help="Python with lerobot 0.3.3")
    both.add_argument("--v30", type=Path, required=True, help="Python with lerobot 0.4.4")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2]))
    if args.verb == "check":
        return check(args.dir, args.v21, args.v30)
    write(args.python, args.out, args.episodes, args.size, not args.images, args.longest)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
