"""`vla data stats`: a dataset's statistics shown, recomputed, held against a policy's, or written as OpenVLA's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from vla.normalize import Stats
from vla.recording.statistics import PixelStats, column_stats


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
