"""`vla students`: what the presets cost, and a student that fits a latency budget on this machine.

Candidates are timed as a robot runs them: with random weights, exported, by onnxruntime (`exported`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from functools import partial
from typing import Any

import yaml

from vla.backbones import StudentConfig
from vla.errors import UsageError
from vla.students import LIMITS, PRESETS, Budget, StudentChoice, cost, preset, resolve
from vla.students.exported import runners
from vla.students.presets import SIZES

CLOCK = time.perf_counter


def add_students_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "students", help="sizes of small policies, and one that fits a latency budget here", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  vla students\n  vla students --budget 15 --threads 1 --cameras 2",
    )  # fmt: skip
    parser.add_argument("--budget", type=float, metavar="MS", help="p95 of one step, in milliseconds: find a student for it")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads a step may use (default 1)")
    parser.add_argument("--cameras", type=int, default=2, metavar="N", help="pictures of a step (default 2)")
    parser.add_argument("--preset", choices=list(PRESETS),
                        help="only this one; with --budget: whose number of parameters is the most (default s)")  # fmt: skip
    parser.add_argument("--runtime", choices=("auto", "onnx-int8", "onnx", "torch"), default="auto", help="what runs it")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """List the presets, or find a student. Raises `UsageError` when nothing meets the budget."""
    if not 1 <= args.cameras <= 16:
        raise UsageError("--cameras", found=args.cameras, expected="1 to 16", fix="--cameras 2")
    if args.threads < 1:
        raise UsageError("--threads", found=args.threads, expected="at least 1", fix="--threads 1")
    if args.budget is None:
        _list(args)
        return 0
    if not 0 < args.budget < math.inf:
        raise UsageError("--budget", found=args.budget, expected="a time above 0, in milliseconds", fix="--budget 15")
    if args.preset == "rt1":
        raise UsageError("--preset", found="rt1 with --budget",
                         expected="xs, s or m: a budget chooses patch, width and depth, and rt1's EfficientNet has them already",
                         fix="--preset m, or leave --budget out to see what rt1 costs")  # fmt: skip
    budget = Budget(p95_ms=args.budget, threads=args.threads, cameras=args.cameras, runtime=args.runtime)
    tell = None if args.json else partial(print, file=sys.stderr)
    found = resolve(StudentChoice(preset=args.preset or "s", budget=budget), SIZES, runners(), tell, CLOCK)
    if args.json:
        print(json.dumps(found.record))
    else:
        _print(found.config, found.record["budget"])
    return 0


def _list(args: argparse.Namespace) -> None:
    rows = {name: cost(preset(name), SIZES, args.cameras) | {"at_most": LIMITS[name]}
            for name in ([args.preset] if args.preset else PRESETS)}
    if args.json:
        print(json.dumps({"cameras": args.cameras, "presets": rows}))
        return
    print(f"7 action and 8 state dimensions, {args.cameras} camera(s), chunks of {SIZES.chunk}, {SIZES.symbols} bins")
    print("preset  parameters  at most  tokens a picture  tokens in all  GFLOP a step")
    for name, row in rows.items():
        count, most = row["parameters"] / 1e6, row["at_most"] / 1e6
        print(f"{name:6} {count:9.1f} M {most:6.0f} M {row['image_tokens']:17} {row['tokens']:14} {row['gflop']:13.1f}")


def _print(config: StudentConfig, record: dict[str, Any]) -> None:
    print("pixels patch hidden layers parameters capacity  p50 ms  p95 ms    told rounds")
    for row in record["measured"]:
        mark = "  <- chosen" if row == record["chosen"] else ""
        print(f"{row['image_size']:6} {row['patch']:5} {row['hidden']:6} {row['layers']:6} {row['parameters'] / 1e6:8.1f} M "
              f"{row['capacity']:8.2f} {row['p50_ms']:7.2f} {row['p95_ms']:7.2f} {row['predicted_p95_ms']:7.2f} "
              f"{row['rounds']:6}{mark}")  # fmt: skip
    asked = record["asked"]
    print(f"\nmost capable by {record['rule']}\nwithin a p95 of {asked['p95_ms']:g} ms in {record['runtime']}, "
          f"{asked['threads']} thread(s), {asked['cameras']} camera(s), of {record['candidates']} candidates; "
          f"told: what the model of the costs says, off by {record['model_off_median']:.0%} in the median\n")  # fmt: skip
    said = {name: value for name, value in config.model_dump(mode="json").items()
            if name == "kind" or value != StudentConfig.model_fields[name].default}  # fmt: skip
    said |= {name: getattr(config, name) for name in ("image_size", "patch", "hidden", "layers")}
    print(yaml.safe_dump({"policy": {"backbone": said}}, sort_keys=False), end="")
