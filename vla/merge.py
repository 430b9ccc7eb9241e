"""`vla merge`: an adapter and its base become one ordinary policy, once, in float32, compared before and after."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla.batch import Batch
from vla.checkpoint import publish
from vla.durable import check_place
from vla.errors import UsageError
from vla.policy import VLAPolicy, load_policy, save_policy
from vla.policy.adapters import merge


def add_merge_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "merge", help="fold an adapter into its base", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: vla merge runs/lora --out runs/lora-merged",
    )  # fmt: skip
    parser.add_argument("policy", metavar="ADAPTER", help="run folder or policy folder that holds an adapter")
    parser.add_argument("--out", required=True, metavar="DIR", help="new policy folder")
    parser.add_argument("--base", metavar="DIR", help="where the base is now, if not where it was")
    parser.add_argument("--bf16", action="store_true", help="store the merged weights as bfloat16 (default float32)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the merged policy. Raises `CheckpointError` for a policy without an adapter, or merged already."""
    out = Path(args.out)
    if out.exists():
        raise UsageError(out, found="something there already", expected="a new folder", fix="choose another --out")
    check_place(out)
    policy = load_policy(args.policy, "cpu", base=args.base, unquantized=True)
    difference = merge(policy, partial(_logits, batch=_some_batch(policy)), args.policy)
    publish(out, partial(save_policy, policy, dtype=torch.bfloat16 if args.bf16 else None))
    facts = {"policy": str(out), "largest_logit_difference": difference}
    print(json.dumps(facts) if args.json else f"{out}: merged; logits differ by at most {difference:.1e}")
    return 0


def _some_batch(policy: VLAPolicy) -> Batch:
    """Four observations of noise per robot, with targets of zero: enough to pass through every layer."""
    rng, examples = np.random.default_rng(0), []
    for key, spec in policy.embodiments.items():
        sentences = policy.instructions or ["move"]
        for i in range(4):
            images = {name: rng.integers(0, 256, (c.height, c.width, 3)).astype(np.uint8) for name, c in spec.cameras.items()}
            state = rng.uniform(-1, 1, spec.state_dim).astype(np.float32)
            examples.append(policy.encoder.observation({"images": images, "state": state}, sentences[i % len(sentences)], key))
    return policy.collate(examples)


@torch.inference_mode()
def _logits(policy: VLAPolicy, batch: Batch) -> Tensor:
    if policy.l1_head is not None:
        return policy.l1_head(policy.acts(batch))
    return policy.action_logits(batch)
