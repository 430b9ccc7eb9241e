"""`vla prune`: a teacher with fewer layers, as a policy folder to distil from there."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vla.checkpoint import publish
from vla.durable import check_place
from vla.errors import UsageError
from vla.policy import load_policy, save_policy
from vla.students.depth import prune_depth


def add_prune_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "prune", help="a policy with fewer layers, to distil from there", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Leave out layers of a policy's language model; the first and the last stay. It acts badly until it has been "
        "distilled: start.policy=DIR, with the whole policy as teacher.",
        epilog="examples:\n  vla prune runs/demo --every 2 --out policies/half\n"
        "  vla prune user/big --keep 0,3,6,9,12,15,17 --bf16 --out policies/seven",
    )  # fmt: skip
    parser.add_argument("policy", metavar="POLICY", help="policy folder, run folder or Hub id of the teacher")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--every", type=int, metavar="K", help="keep every K-th layer")
    which.add_argument("--keep", type=_numbers, metavar="I,J,...", help="keep these layers, counted from 0")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new policy folder")
    parser.add_argument("--bf16", action="store_true", help="store the weights as bfloat16 (default: as they are)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> int:
    """Write the pruned policy. Raises `UsageError` for a policy that cannot be pruned so."""
    if args.out.exists():
        raise UsageError(args.out, found="something there already", expected="a new folder", fix="choose another --out")
    check_place(args.out)
    policy = load_policy(args.policy, "cpu")
    before = sum(p.numel() for p in policy.parameters())
    done = prune_depth(policy, args.every, args.keep).provenance["pruned"][-1]
    publish(args.out, partial(save_policy, policy, dtype=torch.bfloat16 if args.bf16 else None))
    count = sum(p.numel() for p in policy.parameters())
    facts = {"policy": str(args.out), "layers": done["layers"], "kept": done["kept"], "parameters": count, "before": before}
    if args.json:
        print(json.dumps(facts))
    else:
        print(f"{args.out}: layers {', '.join(map(str, done['kept']))} of {done['layers']}; "
              f"{count / 1e6:.1f} M of {before / 1e6:.1f} M parameters")  # fmt: skip
    return 0
