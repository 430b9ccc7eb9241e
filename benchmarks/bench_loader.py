"""The loader against lerobot's and lerobot-lancedb's: the same dataset, the same frames, one interleaved run.

    python benchmarks/bench_loader.py --work DIR --lerobot PY [--lance PY] [--codec default h264] [--rounds 5] [--json]

`PY` is the Python of an environment with `lerobot[dataset]` (0.6.1 was used), or that and `lerobot-lancedb`. What happens:

1. Pictures are made (two cameras, 256 x 256, textured, moving, with sensor noise), and the real lerobot writes them as a
   dataset, with its default encoder (AV1) or H.264.
2. Every contender opens it in a process of its own and stays there; in each round each runs in turn, for each number of
   workers: random batches of 32, uint8, both cameras with state and actions, timed from the time its pipeline is warm.
   torch runs on one thread everywhere. lerobot decodes cameras on threads of its own; that is left as it is.
3. Frames are compared: by hash where both sides decode the same video, by PSNR for JPEG.

Contenders: `raw`, `jpeg`, `video` (ours, with chunks of 8 actions, validated), `lerobot` (`LeRobotDataset(return_uint8=True)`
with the single action of each frame, its fastest use), `lerobot-chunk` (with 8 actions, as ours), `lance` (`LanceDBDataset`).
The floor of ours is the bare work in a loop: copying both frames (raw), decoding both JPEGs, decoding both packets.

`--train` also measures how long the training loop waits for data: 200 steps of a nano policy with one worker.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", SVT_LOG="1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np  # noqa: E402

CAMERAS, SIZE, FPS, CHUNK, BATCH, LENGTH = ("front", "wrist"), 256, 10, 8, 32, 60
OURS = ("raw", "jpeg", "video")
ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------------------------------------------- the dataset


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) float: a cloud with the spectrum of natural pictures."""
    square = np.fft.fftfreq(size)[:, None] ** 2 + np.fft.fftfreq(size)[None] ** 2
    square[0, 0] = 1
    clouds = []
    for _ in range(2):
        cloud = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) / square**0.85).real
        clouds.append((cloud - cloud.mean()) / cloud.std())
    light, tint = clouds
    return np.stack([128 + 40 * light + 10 * tint, 120 + 40 * light, 110 + 38 * light - 10 * tint], -1)


def scene(rng: np.random.Generator, length: int) -> np.ndarray:
    """(T, h, w, 3) uint8: three textured squares moving over a textured ground, sensor noise of one grey level."""
    ground, side = texture(rng, SIZE), 48
    things = [texture(rng, side) + rng.uniform(-60, 60, 3) for _ in range(3)]
    place, speed = rng.uniform(0, SIZE - side, (3, 2)), rng.uniform(-3, 3, (3, 2))
    frames = np.empty((length, SIZE, SIZE, 3), np.uint8)
    for t in range(length):
        picture = ground + rng.normal(0, 1, ground.shape)
        for thing, (y, x) in zip(things, np.clip(place, 0, SIZE - side).astype(int), strict=True):
            picture[y : y + side, x : x + side] = thing
        place += speed
        speed[(place < 0) | (place > SIZE - side)] *= -1
        frames[t] = np.clip(picture, 0, 255)
    return frames


def write_with_lerobot(out: Path, codec: str, episodes: int) -> None:
    """Runs under lerobot's Python."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    kw: dict[str, Any] = {}
    if codec != "default":
        from lerobot.configs.video import RGBEncoderConfig

        kw["rgb_encoder"] = RGBEncoderConfig(vcodec=codec)
    features = {name: {"dtype": "float32", "shape": (dims,), "names": [f"{name[0]}{i}" for i in range(dims)]}
                for name, dims in (("observation.state", 8), ("action", 7))}  # fmt: skip
    for camera in CAMERAS:
        features[f"observation.images.{camera}"] = {
            "dtype": "video", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]}  # fmt: skip
    dataset = LeRobotDataset.create("local/bench", FPS, features, root=out, robot_type="bench", use_videos=True, **kw)
    rng = np.random.default_rng(0)
    for _ in range(episodes):
        images = {f"observation.images.{camera}": scene(rng, LENGTH) for camera in CAMERAS}
        for t in range(LENGTH):
            row = {"observation.state": rng.uniform(-1, 1, 8).astype(np.float32), "task": "push the block",
                   "action": rng.uniform(-1, 1, 7).astype(np.float32)}  # fmt: skip
            dataset.add_frame(row | {key: frames[t] for key, frames in images.items()})
        dataset.save_episode()
    dataset.finalize()


# ---------------------------------------------------------------------------------------------------- contenders


class Peer:
    """lerobot's or lance's dataset behind a torch DataLoader, as their documentation does it."""

    def __init__(self, kind: str, path: Path) -> None:
        chunk = {"action": [i / FPS for i in range(CHUNK)]} if kind == "lerobot-chunk" else None
        self.start = None
        if kind == "lance":
            from lerobot_lancedb import LanceDBDataset, lance_mp_context

            self.dataset = LanceDBDataset(root=path, return_uint8=True)
            self.start = lance_mp_context()
        else:
            from lerobot.datasets.lerobot_dataset import LeRobotDataset

            self.dataset = LeRobotDataset("local/bench", root=path, return_uint8=True, delta_timestamps=chunk)

    def batches(self, workers: int, indices: list[list[int]]) -> Any:
        from torch.utils.data import DataLoader

        return iter(DataLoader(self.dataset, batch_sampler=indices, num_workers=workers, prefetch_factor=4 if workers else None,
                               multiprocessing_context=self.start if workers else None))  # fmt: skip

    def frame(self, camera: str, index: int) -> np.ndarray:
        return self.dataset[index][f"observation.images.{camera}"].numpy().transpose(1, 2, 0)

    def __len__(self) -> int:
        return len(self.dataset)

    def floor(self, seconds: float) -> float:
        return 0.0


class Ours:
    """An EpisodeStore in a mixture, behind `vla.loader.Loader`."""

    def __init__(self, kind: str, path: Path, cache: Path) -> None:
        from vla.episodes import EpisodeStore
        from vla.loader import Loader
        from vla.mixture import Mixture

        self.loader = Loader
        began = time.perf_counter()
        self.kind, self.store = kind, EpisodeStore.open(path, cache, kind, progress=False, compute_stats=True)  # pyright: ignore
        self.opened = time.perf_counter() - began
        self.mixture = Mixture([self.store], [1.0], CHUNK, seed=0)

    def batches(self, workers: int, indices: list[list[int]]) -> Any:
        return iter(self.loader(Sample(self.mixture), collate, indices, workers=workers,  # pyright: ignore
                           shelf=BATCH * (len(CAMERAS) * SIZE * SIZE * 3 + 4096)))  # fmt: skip

    def frame(self, camera: str, index: int) -> np.ndarray:
        return self.store.frame(camera, index)

    def __len__(self) -> int:
        return self.store.num_frames

    def floor(self, seconds: float) -> float:
        """Samples per second of the bare work, one thread."""
        from vla.episodes.store import _from_jpeg

        rng, done, out = np.random.default_rng(1), 0, np.empty((SIZE, SIZE, 3), np.uint8)
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            index = int(rng.integers(len(self)))
            for camera in CAMERAS:
                if self.kind == "jpeg":
                    per_batch, batches = self.store._batches[camera]
                    data, offsets = batches[index // per_batch]
                    _from_jpeg(data[offsets[index % per_batch] : offsets[index % per_batch + 1]])
                elif self.kind == "raw":
                    out[:] = self.store.frame(camera, index)
                else:
                    self.store.frame(camera, index)
            done += 1
        return done / (time.perf_counter() - began)


@dataclass(frozen=True)
class Pictures:
    """What a batch of ours holds here."""

    images: Any
    state: Any
    actions: Any
    valid: Any


class Sample:
    """Stream position -> (pictures, state, actions, valid): a window as it comes, pictures stacked."""

    def __init__(self, mixture: Any) -> None:
        self.mixture = mixture

    def __call__(self, n: int) -> Any:
        return self.mixture.window(n)


def collate(windows: list[Any]) -> Any:
    """Windows -> a dataclass of tensors; pictures (B, 2, 3, h, w) uint8 by a permuted view."""
    import torch

    pictures = np.empty((len(windows), len(CAMERAS), SIZE, SIZE, 3), np.uint8)
    for row, window in zip(pictures, windows, strict=True):
        for at, frame in zip(row, window.images.values(), strict=True):
            at[:] = frame
    stacked = {name: torch.from_numpy(np.stack([getattr(w, name) for w in windows])) for name in ("state", "actions", "valid")}
    return Pictures(torch.from_numpy(pictures).permute(0, 1, 4, 2, 3), **stacked)


def serve(kind: str, path: Path, cache: Path) -> None:
    """Answer commands, one JSON object a line, until stdin ends."""
    import torch

    torch.set_num_threads(1)
    contender = Ours(kind, path, cache) if kind in OURS else Peer(kind, path)
    packages = ("torch", "av", "numpy", "simplejpeg", "pillow", "lerobot", "torchcodec", "lerobot-lancedb", "pylance", "lancedb")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    answer = {"opened": getattr(contender, "opened", 0.0), "versions": versions, "python": sys.version.split()[0]}
    print("@" + json.dumps(answer), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "frames":
            frames = [contender.frame(camera, i) for i in command["indices"] for camera in CAMERAS]
            np.save(command["out"], np.stack(frames))
            answer = {"hashes": [hashlib.sha256(f.tobytes()).hexdigest() for f in frames]}
        elif command["do"] == "floor":
            answer = {"samples_s": contender.floor(command["seconds"])}
        else:
            answer = timed(contender, command["workers"], command["seed"], command["seconds"])
        print("@" + json.dumps(answer), flush=True)


def timed(contender: Any, workers: int, seed: int, seconds: float) -> dict[str, float]:
    """Samples per second of random batches once the workers' queues have been emptied once, and the first batch's delay."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(len(contender), size=(100_000, BATCH)).tolist()
    began = time.perf_counter()
    batches = contender.batches(workers, indices)
    next(batches)
    first = time.perf_counter() - began
    for _ in range(5 * workers):  # what had been made ahead
        next(batches)
    cpu, began, count = cpu_seconds(), time.perf_counter(), 0
    while count < 4 or time.perf_counter() - began < seconds:
        next(batches)
        count += 1
    wall, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    getattr(batches, "_shutdown_workers", lambda: None)()
    return {"samples_s": count * BATCH / wall, "first_s": first, "cpu_ms": cpu / (count * BATCH) * 1e3}


def cpu_seconds(process: int | None = None) -> float:
    """CPU time of this process and everything below it, to 10 ms: what other work on the machine changes least."""
    process = process or os.getpid()
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        children = [pid for task in Path(f"/proc/{process}/task").iterdir() for pid in (task / "children").read_text().split()]
    except OSError:  # it ended meanwhile
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + sum(cpu_seconds(int(pid)) for pid in children)


# ---------------------------------------------------------------------------------------------------- the driver


class Server:
    """A contender in a process of its own."""

    def __init__(self, python: str, kind: str, path: Path, cache: Path, log: Path) -> None:
        self.process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), "--serve", kind, "--work", str(path), "--cache", str(cache)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("a"), text=True, cwd=ROOT,
        )  # fmt: skip
        self._hello: dict[str, Any] | None = None

    @property
    def hello(self) -> dict[str, Any]:
        """What it said when it was ready."""
        self._hello = self._hello or self._answer()
        return self._hello

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"a contender ended: {self.process.wait()}")

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.hello and self.process.stdin  # the first line is its greeting, never an answer
        self.process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.kill()  # it holds nothing that has to be put away
        self.process.wait()


def size_of(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Lowest over the frames, dB; inf for equal ones."""
    error = ((a.astype(np.float64) - b) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(error, 1e-12))).min()) if error.max() else float("inf")


def compare(args: argparse.Namespace, codec: str) -> dict[str, Any]:
    """One dataset: written, opened by everybody, raced, compared."""
    work, log = args.work, args.work / "contenders.log"
    data, lance, cache = work / f"data-{codec}-{args.episodes}", work / f"lance-{codec}-{args.episodes}", work / f"cache-{codec}"
    result: dict[str, Any] = {"codec": codec, "seconds": {}, "bytes": {}, "versions": {}}
    if not data.exists():
        began = time.perf_counter()
        subprocess.run([args.lerobot, __file__, "--write", codec, "--work", str(data), "--episodes", str(args.episodes)],
                       check=True, stdout=subprocess.DEVNULL, stderr=log.open("a"))  # fmt: skip
        result["seconds"]["lerobot writes the dataset"] = time.perf_counter() - began
    result["bytes"]["videos and rows"] = size_of(data)
    kinds = {kind: (sys.executable, data) for kind in OURS}
    kinds |= {"lerobot": (args.lerobot, data), "lerobot-chunk": (args.lerobot, data)}
    if args.lance:
        if not lance.exists():
            began = time.perf_counter()
            tool = Path(args.lance).parent / "lerobot-lance-convert"
            subprocess.run([tool, "--root", data, "--out", lance], check=True, stdout=subprocess.DEVNULL, stderr=log.open("a"))
            result["seconds"]["lance converts"] = time.perf_counter() - began
        result["bytes"]["lance"] = size_of(lance)
        kinds["lance"] = (args.lance, lance)
    # lerobot cannot fork workers once it has decoded a frame itself: another process for those.
    servers: dict[tuple[str, bool], Server] = {}
    for kind, (python, path) in kinds.items():
        before = size_of(cache) if cache.exists() else 0
        for forks in sorted({False} | {workers > 0 for workers in args.workers}):
            servers[kind, forks] = Server(python, kind, path, cache, log)
            if kind in OURS:
                servers[kind, forks].hello  # noqa: B018  one after the other: the first builds the cache
        if kind not in OURS:
            continue
        result["versions"][kind] = servers[kind, False].hello["versions"] | {"python": servers[kind, False].hello["python"]}
        if grown := size_of(cache) - before:
            result["seconds"][f"{kind} opens first"] = servers[kind, False].hello["opened"]
            if (kind, True) in servers:
                result["seconds"][f"{kind} opens again"] = servers[kind, True].hello["opened"]
            result["bytes"][f"{kind} cache"] = grown
    for kind in kinds.keys() - set(OURS):
        hello = servers[kind, False].hello
        result["versions"][kind] = hello["versions"] | {"python": hello["python"]}
    try:
        result["frames"] = verify(servers, kinds, work)
        result["floor"] = {kind: [] for kind in OURS}
        rates: dict[str, list[dict[str, float]]] = {}
        for turn in range(args.rounds):
            for kind in OURS:
                result["floor"][kind].append(servers[kind, False]("floor", seconds=args.seconds / 2)["samples_s"])
            for workers in args.workers:
                for kind in kinds:
                    got = servers[kind, workers > 0]("time", workers=workers, seed=turn, seconds=args.seconds)
                    rates.setdefault(f"{kind} {workers}", []).append(got)
                    if not args.json:
                        print(f"  round {turn}  {kind:14s} workers {workers}  {got['samples_s']:9.0f} samples/s  "
                              f"{got['cpu_ms']:6.2f} ms of CPU", flush=True)  # fmt: skip
        result["rounds"] = rates
    finally:
        for server in servers.values():
            server.close()
    return result


def verify(servers: dict[tuple[str, bool], Server], kinds: dict[str, Any], work: Path) -> dict[str, Any]:
    """How many of 40 frames of each contender are lerobot's own to the bit, and the lowest PSNR against them."""
    indices = np.random.default_rng(7).integers(60, size=20).tolist()
    hashes, frames = {}, {}
    for kind in kinds:
        out = work / f"frames-{kind}.npy"
        hashes[kind] = servers[kind, False]("frames", indices=indices, out=str(out))["hashes"]
        frames[kind] = np.load(out, allow_pickle=False)
        out.unlink()
    same = {kind: sum(a == b for a, b in zip(hashes[kind], hashes["lerobot"], strict=True)) for kind in kinds}
    raw = {kind: sum(a == b for a, b in zip(hashes[kind], hashes["raw"], strict=True)) for kind in kinds}
    against = {kind: psnr(frames[kind], frames["lerobot"]) for kind in kinds}
    return {"count": len(hashes["raw"]), "same_as_lerobot": same, "same_as_raw": raw, "lowest_psnr_against_lerobot": against,
            "lowest_psnr_of_jpeg_against_raw": psnr(frames["jpeg"], frames["raw"])}  # fmt: skip


def summary(result: dict[str, Any], workers: list[int]) -> list[str]:
    """Lines to read: rates, CPU time, ratios of the same round, frames, times and sizes."""
    rows = result["rounds"]
    peers = [k for k in ("lerobot", "lerobot-chunk", "lance") if f"{k} {workers[0]}" in rows]

    def of(kind: str, w: int, what: str) -> list[float]:
        return [row[what] for row in rows[f"{kind} {w}"]]

    lines = [f"codec {result['codec']}, workers {workers}, {len(next(iter(rows.values())))} rounds: median (best)"]
    for kind in (*OURS, *peers):
        rates, costs = ([of(kind, w, what) for w in workers] for what in ("samples_s", "cpu_ms"))
        rate = "  ".join(f"{statistics.median(values):7.0f} ({max(values):7.0f})" for values in rates)
        cpu = "  ".join(f"{statistics.median(values):5.2f} ({min(values):5.2f})" for values in costs)
        first = " ".join(f"{min(of(kind, w, 'first_s')):.2f}" for w in workers)
        floor = f"; floor {1e3 / max(result['floor'][kind]):.2f} ms" if kind in OURS else ""
        lines.append(f"  {kind:14s} samples/s {rate}; CPU ms/sample {cpu}{floor}; first batch s, best {first}")
    lines.append("  ratios of the same round, median (least): of samples/s; of CPU time per sample")
    for kind in OURS:
        for peer in peers:
            cells = []
            for what in ("samples_s", "cpu_ms"):
                for w in workers:
                    pairs = zip(of(kind, w, what), of(peer, w, what), strict=True)
                    ratios = [a / b if what == "samples_s" else b / a for a, b in pairs]
                    cells.append(f"{statistics.median(ratios):6.1f} ({min(ratios):5.1f})")
            lines.append(f"  {kind:5s} / {peer:14s} {'  '.join(cells)}")
    lines += [f"  {json.dumps(result[key])}" for key in ("frames", "seconds", "bytes", "versions")]
    return lines


def data_wait(args: argparse.Namespace, codec: str) -> dict[str, Any]:
    """200 steps of a nano policy on this dataset with one worker; what its metrics.jsonl says."""
    out, config = args.work / "run", args.work / "train.yaml"
    data = args.work / f"data-{codec}-{args.episodes}"
    subprocess.run([sys.executable, "-m", "vla.cli", "data", "stats", str(data), "--write"], check=False, cwd=ROOT,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    waits = {}
    for frames in OURS:
        subprocess.run(["rm", "-rf", str(out)], check=True)
        config.write_text(json.dumps({
            "run": {"out": str(out), "steps": args.train, "log_every": 10, "eval_every": 10**6, "save_every": 10**6,
                    "workers": 1, "processes": 1, "eval_windows": 1},
            "mixture": {"datasets": [{"path": str(data)}], "frames": frames, "cache_dir": str(args.work / f"cache-{codec}")},
            "optim": {"batch": 32, "warmup": 5},
        }))  # fmt: skip
        subprocess.run([sys.executable, "-m", "vla.train", str(config)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
                       stderr=(args.work / "contenders.log").open("a"))  # fmt: skip
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        train = [line for line in lines if line.get("kind") == "train"]
        shares = [line["data_wait"] for line in train[1:]]  # the first holds the start of the worker
        step = 32 / statistics.median(line["samples_s"] for line in train[1:])
        waits[frames] = {"median": statistics.median(shares), "most": max(shares), "first_10_steps": train[0]["data_wait"],
                         "step_s": step}  # fmt: skip
    return waits


def main() -> int:
    """Race and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for datasets and caches; kept")
    add("--lerobot", help="Python of an environment with lerobot")
    add("--lance", help="Python of an environment with lerobot and lerobot-lancedb")
    add("--codec", nargs="+", default=["default"], help="default (AV1), h264")
    add("--episodes", type=int, default=15, help=f"of {LENGTH} frames each")
    add("--workers", type=int, nargs="+", default=[0, 1, 2])
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=2.0, help="each measurement takes at least this long")
    add("--train", type=int, default=0, metavar="STEPS", help="also measure the data wait of this many training steps")
    add("--json", action="store_true")
    add("--serve", help=argparse.SUPPRESS)
    add("--write", help=argparse.SUPPRESS)
    add("--cache", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.work, args.cache)
        return 0
    if args.write:
        write_with_lerobot(args.work, args.write, args.episodes)
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    for codec in args.codec:
        result = compare(args, codec) if args.lerobot else {"codec": codec}
        if args.train:
            result["data_wait"] = data_wait(args, codec)
        if args.json:
            print(json.dumps(result))
        else:
            lines = summary(result, args.workers) if args.lerobot else []
            lines += [f"  data wait with one worker: {json.dumps(result['data_wait'])}"] if args.train else []
            print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
