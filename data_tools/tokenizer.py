"""Fit an action tokenizer (FAST or residual VQ) on recorded chunks, and say what it costs: error, symbols, time.

The chunks are those a policy would learn: every frame's next H actions, at the policy's step where `--seconds` is given,
normalised by the dataset's own statistics, the last action held beyond an episode's end. Pictures are never opened.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from vla.actions import ActionCodec, FastCodec, VQCodec, hold
from vla.durable import replace_file
from vla.embodiment import EmbodimentSpec
from vla.episodes.layout import read_layout
from vla.episodes.rows import read_rows
from vla.errors import UsageError
from vla.normalize import Normalizer, Scheme, Stats
from vla.resample import native_steps, to_policy_steps


@dataclass(frozen=True)
class Chunks:
    """What one robot does, as a policy would learn it."""

    spec: EmbodimentSpec
    normalizer: Normalizer
    unit: np.ndarray  # (F, H, a) float32 in [-1, 1]
    actions: np.ndarray  # (F, H, a) float32, robot units
    valid: np.ndarray  # (F, H) bool
    seconds: float  # a chunk spans


def read_chunks(
    roots: list[Path], steps: int, *, seconds: float | None = None, scheme: Scheme = "q99", most: int = 50_000
) -> list[Chunks]:
    """One `Chunks` per robot of LeRobot datasets, at most `most` of each, evenly spread. Raises `DataError` for damaged ones."""
    robots: dict[str, list[Any]] = {}
    for root in roots:
        layout, problems = read_layout(root, None, need_stats=True)
        rows = read_rows(layout, problems)
        problems.raise_if_any()
        assert rows is not None
        robots.setdefault(layout.spec.key, []).append((layout, rows))
    out = []
    for found in robots.values():
        spec, entry = found[0][0].spec, found[0][0].stats.get("action", {})
        # As `vla.policy.build.normalizers_of`: one dataset's own statistics, several recomputed together.
        whole = len(found) == 1 and {"q01", "q99"} <= entry.keys()
        stats = (Stats.from_json(entry, f"{roots[0]}: action") if whole
                 else Stats.of(np.concatenate([rows.action for _, rows in found])))  # fmt: skip
        native = native_steps(seconds, steps, spec.control_hz)
        actions, valid = [], []
        for _, rows in found:
            total = sum(len(r.action) for _, r in found)
            for at in range(0, len(rows.action), -(-total // most)):
                stop = int(rows.starts[np.searchsorted(rows.starts, at, "right")])
                count = min(native, stop - at)
                own = np.zeros((native, rows.action.shape[1]), np.float32)
                own[:count] = rows.action[at : at + count]
                chunk, real = to_policy_steps(own, count, steps, spec)
                actions.append(hold(chunk, real))
                valid.append(real)
        normalizer = Normalizer(stats, scheme, where=f"{roots[0]}/meta/stats.json: action")
        stacked = np.stack(actions)
        out.append(Chunks(spec, normalizer, normalizer.to_unit(stacked), stacked, np.stack(valid), native / spec.control_hz))
    return out


def measure(codec: ActionCodec, chunks: Chunks, most: int = 4000) -> dict[str, Any]:
    """Of one robot: symbols per chunk (mean, longest) and per second of motion, and the error of decode(encode(.)) against what
    was recorded, in robot units, mean and largest over numbers, and its mean per dimension."""
    some = np.unique(np.linspace(0, len(chunks.unit) - 1, min(most, len(chunks.unit))).astype(int))
    dims, lengths, errors = chunks.unit.shape[2], [], []
    for i in some:
        symbols = codec.encode(chunks.unit[i])
        back = chunks.normalizer.from_unit(codec.decode(symbols, dims).reshape(-1, dims))
        lengths.append(len(symbols))
        errors.append(np.where(chunks.valid[i][:, None], np.abs(back - chunks.actions[i]), np.nan))
    error = np.stack(errors)
    return {
        "robot": chunks.spec.key, "chunks": len(some), "symbols": float(np.mean(lengths)), "longest": max(lengths),
        "symbols_per_second": float(np.mean(lengths)) / chunks.seconds, "numbers": chunks.unit[0].size,
        "error_mean": float(np.nanmean(error)), "error_max": float(np.nanmax(error)),
        "error_per_dimension": dict(zip(chunks.spec.action_names, np.nanmean(error, axis=(0, 1)).tolist(), strict=True)),
    }  # fmt: skip


def add_tokenizer_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `tokenizer` to the `vla data` sub-commands; `run` carries it out."""
    parser = subparsers.add_parser(
        "tokenizer", help="fit action symbols (FAST, residual VQ) on recorded chunks",
        epilog="examples:\n  vla data tokenizer data/button --kind fast --chunk 8 --normalization bounds --out button-fast.json\n"
        "  vla data tokenizer data/button data/arm --kind vq --chunk 8 --rounds 8 --out vq.json\n"
        "  vla data tokenizer data/button --kind fast --from downloads/fast --chunk 8 --out universal.json\n"
        "then, in a config:\n  policy: {codec: {kind: fast, path: button-fast.json}}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("roots", type=Path, nargs="+", metavar="DIR", help="LeRobot datasets; robots may share a tokenizer")
    parser.add_argument("--kind", choices=("fast", "vq"), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--chunk", type=int, default=8, metavar="H", help="as policy.chunk (default 8)")
    parser.add_argument("--seconds", type=float, metavar="S", help="as policy.chunk_seconds (default: steps of the robot's own)")
    parser.add_argument("--normalization", choices=get_args(Scheme), default="q99", help="as policy.normalization.action")
    parser.add_argument("--from", dest="folder", type=Path, metavar="DIR",
                        help="fast: a tokenizer in the published layout instead of a new one; its code is not run")  # fmt: skip
    parser.add_argument("--scale", type=float, default=10.0, help="fast: steps per unit; finer costs more symbols")
    parser.add_argument("--vocabulary", type=int, default=1024, help="fast: number of different symbols")
    parser.add_argument("--tokens", type=int, metavar="N", help="fast: most symbols of a chunk (default: the longest of these)")
    parser.add_argument("--rounds", type=int, default=8, help="vq: symbols of a chunk")
    parser.add_argument("--codes", type=int, default=256, help="vq: different symbols")
    parser.add_argument("--most", type=int, default=50_000, metavar="N", help="chunks to fit on, of each robot, evenly spread")
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON, no progress bar")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Fit or read, measure, write."""
    for name, least in {"chunk": 1, "scale": 1e-3, "vocabulary": 2, "rounds": 1, "codes": 2, "most": 1, "tokens": 1}.items():
        if (given := getattr(args, name)) is not None and given < least:
            raise UsageError(f"--{name}", found=given, expected=f"{least} or more", fix=f"--{name} {least}, or more")
    if args.folder and args.kind != "fast":
        raise UsageError("--from", found=f"--kind {args.kind}", expected="--kind fast", fix="leave --from out")
    began = time.perf_counter()
    robots = read_chunks(args.roots, args.chunk, seconds=args.seconds, scheme=args.normalization, most=args.most)
    every = [chunk for robot in robots for chunk in robot.unit]
    fitted = {"seconds": args.seconds, "normalization": args.normalization, "chunks": len(every),
              "robots": sorted(robot.spec.key for robot in robots)}  # fmt: skip
    progress = not args.json
    if args.folder:
        # Not fitted on these numbers, so they bind nobody; only the longest chunk was measured on them.
        codec: FastCodec | VQCodec = FastCodec.from_folder(args.folder, args.chunk, max(r.unit.shape[2] for r in robots))
        codec.with_most(tqdm(every, desc="measuring", disable=not progress), args.tokens)
    elif args.kind == "fast":
        codec = FastCodec.fit(every, scale=args.scale, vocabulary=args.vocabulary, most=args.tokens, fitted=fitted,
                              progress=progress)  # fmt: skip
    else:
        codec = VQCodec.fit(every, rounds=args.rounds, codes=args.codes, fitted=fitted, progress=progress)
    measured = [measure(codec, robot) for robot in robots]
    replace_file(args.out, json.dumps(codec.to_json()))
    summary = {"file": str(args.out), "kind": args.kind, "size": codec.size,
               "most": codec.slots(args.chunk, 0, [r.unit.shape[2] for r in robots]), "chunks": len(every),
               "seconds": round(time.perf_counter() - began, 1), "robots": measured}  # fmt: skip
    if args.json:
        print(json.dumps(summary))
        return 0
    print(f"{args.out}: {args.kind}, {codec.size} symbols, at most {summary['most']} a chunk; {len(every)} chunks, "
          f"{summary['seconds']} s")  # fmt: skip
    for m in measured:
        print(f"  {m['robot']}: {m['symbols']:.1f} symbols a chunk of {m['numbers']} numbers (longest {m['longest']}), "
              f"{m['symbols_per_second']:.1f} per second of motion; error mean {m['error_mean']:.4g}, "
              f"max {m['error_max']:.4g}")  # fmt: skip
        print("    mean error, robot units: " + ", ".join(f"{k} {v:.3g}" for k, v in m["error_per_dimension"].items()))
    return 0
