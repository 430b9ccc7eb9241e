"""What action symbols cost and lose, on recorded data: prints a Markdown table.

    python benchmarks/codecs.py data/button data/arm --normalization bounds --success bins=eval/bins.json fast=eval/fast.json

FAST and VQ are fitted on the datasets together; measured are the chunks of each robot's last episodes, a twentieth, which they
were not fitted on. No picture is opened. Errors are decode(encode(.)) against what was recorded, in each robot's own units.
Failures are counted over chunks said by logits drawn at random: once as a policy says them (constrained), and once read as they
come, as a decoder without the constraint has to. `--success` adds `vla eval`'s results of policies trained with each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from data_tools.tokenizer import Chunks, measure, read_chunks
from vla.actions import ActionCodec, BinCodec, FastCodec, SequenceCodec, VQCodec, is_sequence
from vla.errors import DataError, VLAError
from vla.evaluate.results import cell
from vla.normalize import Scheme
from vla.policy.choose import SequenceChooser

HELD = 0.05
"""Share of a robot's chunks, its last episodes', that is measured on and not fitted on."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--normalization", choices=get_args(Scheme), default="bounds")
    parser.add_argument("--scales", type=float, nargs="+", default=[10.0, 40.0], help="of FAST")
    parser.add_argument("--rounds", type=int, nargs="+", default=[8, 16], help="of VQ")
    parser.add_argument("--most", type=int, default=20_000, help="chunks of each robot")
    parser.add_argument("--draws", type=int, default=1000, help="random chunks of each robot")
    parser.add_argument("--success", nargs="*", default=[], metavar="CODEC=JSON", help="results of `vla eval`")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        robots = read_chunks(args.roots, args.chunk, scheme=args.normalization, most=args.most)
    except VLAError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    rows = [row | {"fit_s": seconds} for name, codec, seconds in codecs(robots, args)
            for row in (one(name, codec, robot, args.draws) for robot in robots)]  # fmt: skip
    if args.json:
        print(json.dumps(rows))
    else:
        print(table(rows))
    if args.success:
        print("\n| trained with | success |\n| --- | --- |")
        for entry in args.success:
            name, path = entry.split("=", 1)
            results = json.loads(Path(path).read_text())
            print(f"| {name} | " + "; ".join(cell(row) for row in results["rows"] if row["condition"] == "policy") + " |")
    return 0


def codecs(robots: list[Chunks], args: argparse.Namespace) -> list[tuple[str, ActionCodec, float]]:
    """(name, codec, seconds its fit took)."""
    learned = [chunk for robot in robots for chunk in robot.unit[: -held(robot)]]
    made: list[tuple[str, ActionCodec, float]] = [("bins 256", BinCodec(256), 0.0)]
    for scale in args.scales:
        began = time.process_time()
        made.append((f"fast, scale {scale:g}", FastCodec.fit(learned, scale=scale), time.process_time() - began))
    for rounds in args.rounds:
        began = time.process_time()
        made.append((f"vq {rounds} x 256", VQCodec.fit(learned, rounds=rounds), time.process_time() - began))
    return made


def held(robot: Chunks) -> int:
    """How many of a robot's chunks are measured on."""
    return max(1, round(HELD * len(robot.unit)))


def one(name: str, codec: ActionCodec, robot: Chunks, draws: int) -> dict[str, Any]:
    """A row: `measure` of held-out chunks, and failures of chunks said at random, constrained and not."""
    last = slice(-held(robot), None)
    fresh = Chunks(robot.spec, robot.normalizer, robot.unit[last], robot.actions[last], robot.valid[last], robot.seconds)
    failures = broken = 0
    if is_sequence(codec):
        failures, broken = said_at_random(codec, robot.unit.shape[2], draws)
    row = measure(codec, fresh)
    row["bits"] = row["symbols"] * np.log2(codec.size)
    return {"codec": name, **row, "draws": draws, "failures": failures, "unconstrained": broken}


def said_at_random(codec: SequenceCodec, dims: int, draws: int) -> tuple[int, int]:
    """Of `draws` chunks of random logits: how many are no (H, dims) chunk as a policy says them, and read as they come."""
    rng, failures, broken = np.random.default_rng(0), 0, 0
    N = codec.slots(codec.fitted["chunk"], dims, [dims])
    for first in range(0, draws, 50):
        rows = min(50, draws - first)
        logits = rng.normal(0, 5, (rows, N, codec.size)).astype(np.float32)
        choose = SequenceChooser("argmax", codec, np.full(rows, dims), range(rows))
        choose(torch.from_numpy(logits))
        for row in range(rows):
            shape = codec.fitted["chunk"], dims
            try:
                unit = choose.chunk(row)[0]
                failures += unit.shape != shape or not np.isfinite(unit).all()
            except (DataError, ValueError):
                failures += 1
            try:
                codec.decode(logits[row].argmax(-1), dims)
            except DataError:
                broken += 1
    return failures, broken


def table(rows: list[dict[str, Any]]) -> str:
    """One line per robot and codec."""
    columns = ("robot", "codec", "numbers", "symbols, mean (longest)", "bits", "symbols per second", "error, mean", "error, max",
               "failures", "unconstrained")  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in sorted(rows, key=lambda row: row["robot"]):
        lines.append(
            f"| {row['robot']} | {row['codec']} | {row['numbers']} | {row['symbols']:.1f} ({row['longest']}) | "
            f"{row['bits']:.0f} | {row['symbols_per_second']:.0f} | {row['error_mean']:.2g} | {row['error_max']:.2g} | "
            f"{row['failures']} of {row['draws']} | {row['unconstrained']} of {row['draws']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
