"""`vla export`: a policy in another program's layout, or a student as a folder that runs on a robot without torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vla.errors import UsageError
from vla.export.card import export_card
from vla.export.folder import check_empty, export_onnx
from vla.export.int8 import KINDS
from vla.export.onnx import OPSET, OPSETS, check_opset, check_student, require_onnx
from vla.export.openvla import export_openvla
from vla.export.parity import add_int8, report
from vla.export.parts import export_parts
from vla.export.runtime import choose_again
from vla.export.windows import read_windows
from vla.fetch import fetch_policy
from vla.policy import load_policy, save_policy
from vla.sims import expand_tasks

EXAMPLES = """\
examples:
  vla export runs/student --to onnx --int8 dynamic --out exports/student
  vla export runs/student --to onnx --int8 static --verify tabletop --episodes 200 --out exports/student
  vla export exports/student --choose                # on the robot's own computer: measure again which graph is fastest
  vla export runs/nano --to onnx --parts --out exports/nano-parts
  vla export runs/mine --to openvla --out exports/mine-openvla
  vla export downloads/openvla-7b-oft-libero --to policy --oft libero --out policies/oft
"""


def add_export_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "export", help="a policy in another program's layout", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write a student as graphs a robot runs, a policy for another program, or a foreign policy as one of ours.",
        epilog=EXAMPLES,
    )  # fmt: skip
    add = parser.add_argument
    add("path", metavar="POLICY", help="a policy folder, a run folder, a folder in OpenVLA's layout, or a Hub id")
    add("--to", choices=("onnx", "openvla", "policy"), help="what to write")
    add("--out", type=Path, metavar="DIR", help="a new folder")
    add("--oft", metavar="SETUP", help="POLICY is OpenVLA-OFT's: libero, aloha or bridge; its files do not say")
    add("--crop", type=float, default=1.0, metavar="AREA",
        help="with --to policy: share of a picture kept when acting; 0.9 after training with crops")  # fmt: skip
    add("--opset", type=int, metavar="N", help=f"with --to onnx: {OPSETS.start} to {OPSETS.stop - 1} (default {OPSET})")
    add("--int8", nargs="?", const="dynamic", choices=KINDS,
        help="with --to onnx: a second graph in fewer bits (dynamic unless said)")  # fmt: skip
    add("--calibrate", nargs="+", action="extend", metavar="DATASET", default=[],
        help="recorded data to calibrate and compare on (default: what the policy was trained on)")  # fmt: skip
    add("--windows", type=int, default=128, metavar="N", help="moments of it to compare on; 0: compare nothing (default 128)")
    add("--verify", metavar="SUITE[:TASK,TASK]", help="play the same episodes with the policy and every graph")
    add("--episodes", type=int, default=50, metavar="N", help="with --verify: per group (default 50)")
    add("--views", type=int, metavar="C", help="pictures of one observation when time is measured (default: the robot's cameras)")
    add("--rounds", type=int, default=100, metavar="N", help="chunks of each contestant when time is measured (default 100)")
    add("--parts", action="store_true", help="with --to onnx: vision tower and decode step of an autoregressive nano policy")
    add("--choose", action="store_true",
        help="POLICY is an export folder: measure it here, and choose its graph and threads anew")  # fmt: skip
    add("--json", action="store_true", help="print what was written as JSON")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    if args.choose:
        chosen = choose_again(Path(args.path), args.views, args.rounds)
        p50 = chosen["measured"][f"{chosen['graph']}/{chosen['threads']}"]["p50_ms"]
        print(json.dumps(chosen) if args.json else f"{args.path}: {chosen['graph']}, threads: {chosen['threads']}, {p50:.1f} ms "
              f"a chunk ({chosen['why']})")  # fmt: skip
        return 0
    if args.to is None or args.out is None:
        raise UsageError("vla export", found="no --to" if args.to is None else "no --out", expected="what to write, and where",
                         fix="vla export POLICY --to onnx --out DIR")  # fmt: skip
    only = ("opset", "int8", "verify", "calibrate", "views", "parts")
    if args.to != "onnx" and (given := [f"--{name}" for name in only if getattr(args, name) not in (None, False, [])]):
        raise UsageError(", ".join(given), found=f"--to {args.to}", expected="--to onnx", fix="leave it out")
    _onnx(args) if args.to == "onnx" else _layout(args)
    written = sorted(p.name for p in args.out.iterdir())
    size = sum(p.stat().st_size for p in args.out.iterdir())
    print(json.dumps({"out": str(args.out), "files": written, "bytes": size}) if args.json
          else f"{args.out}: {len(written)} files, {size:,} bytes")  # fmt: skip
    return 0


def _layout(args: argparse.Namespace) -> None:
    from vla.judging import is_openvla
    from vla.policy.openvla import read_openvla

    foreign = args.oft is not None or is_openvla(Path(args.path))
    if args.crop != 1.0 and not foreign:
        raise UsageError("--crop", found=args.crop, expected="a folder in OpenVLA's layout", fix="leave it out")
    policy = read_openvla(args.path, oft=args.oft, crop=args.crop) if foreign else load_policy(args.path, device="cpu")
    if args.to == "openvla":
        export_openvla(policy, args.out)
    else:
        check_empty(args.out)
        save_policy(policy, args.out)


def _onnx(args: argparse.Namespace) -> None:
    opset = OPSET if args.opset is None else check_opset(args.opset)
    require_onnx()
    check_empty(args.out)
    if args.parts:
        if args.int8 or args.verify:
            raise UsageError("--parts", found="--int8" if args.int8 else "--verify", expected="parts in float32",
                             fix="leave it out")  # fmt: skip
        export_parts(load_policy(args.path, device="cpu"), args.out, opset)
        return
    verify = _suite(args.verify)
    if args.windows < 0 or args.rounds < 1 or args.episodes < 1:
        raise UsageError("vla export", found=f"--windows {args.windows} --rounds {args.rounds} --episodes {args.episodes}",
                         expected="no window or more, one round and one episode or more", fix="leave them out")  # fmt: skip
    source = fetch_policy(args.path)
    policy = load_policy(source, device="cpu")
    check_student(policy)
    windows = read_windows(policy, args.calibrate, args.windows) if args.windows else ([], [])
    if args.int8 == "static" and not windows[0]:
        raise UsageError("--int8 static", found="--windows 0", expected="windows to calibrate on", fix="--int8 dynamic")

    def further(folder: Path, meaning: dict[str, Any]) -> None:
        made = add_int8(policy, folder, meaning, args.int8, windows) if args.int8 else None
        found = report(policy, folder, meaning, windows[1], made, source=source, views=args.views, rounds=args.rounds,
                       verify=verify, episodes=args.episodes)  # fmt: skip
        (folder / "parity.json").write_text(json.dumps(found, indent=1, allow_nan=False))
        (folder / "README.md").write_text(export_card(args.out.name, meaning, found))

    export_onnx(policy, args.out, opset, further)


def _suite(words: str | None) -> tuple[str, list[str] | None] | None:
    """`tabletop:push,lift` -> ("tabletop", ["push", "lift"]), checked before anything is loaded."""
    if words is None:
        return None
    suite, _, tasks = words.partition(":")
    names = [task for task in tasks.split(",") if task] or None
    expand_tasks(suite, names)
    return suite, names
