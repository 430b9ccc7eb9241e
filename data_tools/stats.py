"""Statistics of a LeRobot dataset, with the keys and shapes `lerobot` writes, computed exactly instead of estimated.

`lerobot` estimates quantiles from a 5,000-bin histogram per episode and averages them. Here numeric columns are small
enough to be sorted, and pixels have 256 values, so a histogram of them *is* the data: everything below is exact, and
merges exactly.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from vla.normalize import QUANTILES, Stats

MAX_SORTED_ROWS = 2_000_000
"""Quantiles of a column with more rows use every k-th row (k the smallest that fits); min, max, mean and std use
all."""


def column_stats(values: np.ndarray) -> dict[str, list]:
    """Statistics of a numeric column (F,) or (F, D) as JSON lists of length D, with `count` as `[F]`.

    Raises `DataError` on a non-finite value.
    """
    table = np.asarray(values, np.float64).reshape(len(values), -1)
    entry = Stats.of(table[:: -(-len(table) // MAX_SORTED_ROWS)]).to_json()
    if len(table) > MAX_SORTED_ROWS:
        whole = {"min": table.min(0), "max": table.max(0), "mean": table.mean(0), "std": table.std(0)}
        entry |= {k: v.tolist() for k, v in whole.items()}
    return _ordered(entry, len(table))


def constant_stats(value: float, count: int) -> dict[str, list]:
    """What `column_stats(np.full(count, value))` returns, without the work."""
    entry = {key: [float(value)] for key in ("min", "max", "mean", *QUANTILES)}
    return _ordered(entry | {"std": [0.0]}, count)


def ramp_stats(first: int, base: dict[str, list]) -> dict[str, list]:
    """Statistics of `first + arange(n)` from those of `arange(n)`."""
    return {key: value if key in ("std", "count") else [value[0] + first] for key, value in base.items()}


def _ordered(entry: dict, count: int) -> dict[str, list]:
    moments = {key: entry[key] for key in ("min", "max", "mean", "std")}
    return moments | {"count": [count]} | {q: entry[q] for q in QUANTILES}


class PixelStats:
    """Statistics of RGB frames in 0..1, shape (3, 1, 1), from a (3, 256) histogram. Quantiles are the smallest pixel
    value whose cumulative share reaches q (numpy's `inverted_cdf`)."""

    def __init__(self, histogram: np.ndarray | None = None, frames: int = 0) -> None:
        self.histogram = np.zeros((3, 256), np.int64) if histogram is None else np.asarray(histogram, np.int64)
        self.frames = frames

    @classmethod
    def of(cls, images: np.ndarray) -> PixelStats:
        """Of (T, h, w, 3) uint8."""
        flat = images.reshape(-1, 3)
        return cls(np.stack([np.bincount(flat[:, c], minlength=256) for c in range(3)]), len(images))

    def __add__(self, other: PixelStats) -> PixelStats:
        return PixelStats(self.histogram + other.histogram, self.frames + other.frames)

    def to_json(self) -> dict[str, list]:
        values, weights = np.arange(256) / 255.0, self.histogram / self.histogram.sum(1, keepdims=True)
        mean = weights @ values
        std = np.sqrt(np.maximum(weights @ values**2 - mean**2, 0.0))
        present = self.histogram > 0
        cumulative = np.cumsum(self.histogram, 1)
        entry = {
            "min": values[present.argmax(1)], "max": values[255 - present[:, ::-1].argmax(1)], "mean": mean, "std": std,
        }  # fmt: skip
        for name, q in QUANTILES.items():
            # Integers are compared, so a share of exactly q is not lost to rounding.
            entry[name] = values[(cumulative >= np.ceil(q * cumulative[:, -1:] - 1e-9)).argmax(1)]
        shaped = {key: value.reshape(3, 1, 1).tolist() for key, value in entry.items()}
        return _ordered(shaped, self.frames)


def add_stats_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `stats` to the `vla data` sub-commands; `run` carries it out."""
    parser = subparsers.add_parser(
        "stats", help="show, recompute or compare a dataset's statistics",
        epilog="examples:\n  vla data stats data/button --write\n  vla data stats data/button --against runs/demo\n"
        "  vla data stats data/bridge --against downloads/openvla-7b --key bridge_orig",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("root", type=Path, metavar="DIR", help="a LeRobot dataset")
    parser.add_argument("--against", type=Path, metavar="PATH",
                        help="say whether the dataset fits this policy or run folder, or OpenVLA's dataset_statistics.json or "
                        "config.json or openpi's norm_stats.json (file or folder); exit code 3 when it does not")  # fmt: skip
    parser.add_argument("--robot", "--key", metavar="NAME",
                        help="with --against: which of the policy's robots it is, or whose statistics")  # fmt: skip
    parser.add_argument("--openvla", type=Path, metavar="FILE", help="write OpenVLA's dataset_statistics.json")
    parser.add_argument("--write", action="store_true", help="replace meta/stats.json by the recomputed statistics")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Recompute state and action statistics (and pixels, through the cache) of a dataset; write them when asked to, or hold
    them against a policy's. Returns 3 when the dataset does not fit the policy."""
    from vla.durable import replace_file
    from vla.episodes import EpisodeStore
    from vla.errors import UsageError

    if args.write and args.against or args.robot and not args.against:
        found = "--write with --against" if args.write else "--robot or --key without --against"
        raise UsageError("vla data stats", found=found,
                         expected="one job at a time, --robot or --key with --against", fix="drop one of them")  # fmt: skip
    if args.openvla:
        _write_openvla(args.root, args.openvla)
    if args.against:
        from data_tools.against import fit, lines

        result = fit(args.root, args.against, args.robot)
        print(json.dumps(result.to_json()) if args.json else "\n".join(lines(result)))
        return 3 if result.verdict == "misfit" else 0
    if args.openvla and not args.write:
        print(json.dumps({"openvla": str(args.openvla)}) if args.json else f"written to {args.openvla}")
        return 0
    store = EpisodeStore.open(args.root, compute_stats=True, progress=not args.json)
    stats = {"observation.state": column_stats(store.state), "action": column_stats(store.action)}
    stats = {key: value for key, value in stats.items() if value["min"]}
    for camera in store.cameras:
        pixels = PixelStats()
        for start in range(0, store.num_frames, 64):
            block = range(start, min(start + 64, store.num_frames))
            pixels = pixels + PixelStats.of(np.stack([store.frame(camera, index) for index in block]))
        stats[store.camera_key(camera)] = pixels.to_json()
    if args.write:
        path = args.root / "meta" / "stats.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        replace_file(path, json.dumps(known | stats, indent=4))
    if args.json:
        print(json.dumps(stats))
    else:
        for feature, entry in stats.items():
            print(feature)
            for key, value in entry.items():
                print(f"  {key:6s} {np.round(np.asarray(value, float).reshape(-1), 5).tolist()}")
        if args.write:
            print(f"written to {args.root / 'meta' / 'stats.json'}")
    return 0


def _write_openvla(root: Path, path: Path) -> None:
    """OpenVLA's `dataset_statistics.json`, the folder's name as its key. Grippers within [-1, 1] are masked, as OpenVLA
    does: they pass unnormalised. Raises `DataError` for a damaged dataset."""
    from data_tools.norm_stats import DatasetStats, write_norm_stats
    from vla.episodes.layout import read_layout
    from vla.episodes.rows import read_rows

    layout, problems = read_layout(root, None, need_stats=False)
    rows = read_rows(layout, problems)
    problems.raise_if_any()
    assert rows is not None
    mask = np.ones(rows.action.shape[1], bool)
    for convention in ("gripper_open_positive", "gripper_closed_positive"):
        for d in layout.spec.dims_with("action", convention):
            mask[d] = bool(np.abs(rows.action[:, d]).max() > 1)
    state = Stats.of(rows.state) if rows.state.shape[1] else None
    entry = DatasetStats(Stats.of(rows.action), mask, state, len(rows.action), len(rows.episodes))
    write_norm_stats(path, {root.resolve().name: entry})
