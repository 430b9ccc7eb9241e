"""`vla export`: a policy in another program's layout, or a student as a folder that runs on a robot without torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vla.errors import UsageError
from vla.export.folder import check_empty, export_onnx
from vla.export.onnx import OPSET, OPSETS, check_opset, require_onnx
from vla.export.openvla import export_openvla
from vla.policy import load_policy, save_policy

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
    add("--json", action="store_true", help="print what was written as JSON")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    if args.to is None or args.out is None:
        raise UsageError("vla export", found="no --to" if args.to is None else "no --out", expected="what to write, and where",
                         fix="vla export POLICY --to onnx --out DIR")  # fmt: skip
    if args.to != "onnx" and args.opset is not None:
        raise UsageError("--opset", found=args.opset, expected="--to onnx", fix="leave it out")
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
    export_onnx(load_policy(args.path, device="cpu"), args.out, opset)
