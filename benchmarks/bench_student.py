"""How much faster a student is than those it may learn from: one chunk at batch 1, interleaved in one process.

    python benchmarks/bench_student.py --teacher runs/teacher --student runs/student [--export exports/student] [--smolvlm]

Contenders: the teacher as it is (torch float32, one symbol after the other), the student in torch, its exported graphs, and with
--smolvlm a model of SmolVLM-256M's shape with random weights (SigLIP-B/16 at 512 pixels, 64 + 40 tokens, 30 layers of 576) that
says one 7-D action, and a chunk as long as the student's. Medians of rounds in which each has one turn; ratios to the student.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch


def smolvlm(symbols: int) -> tuple[Callable[[], Any], int]:
    """(one action or chunk of `symbols`, parameters) of a random model of SmolVLM-256M's shape."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(
        vision_config={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                       "image_size": 512, "patch_size": 16},
        text_config={"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280, "pad_token_id": 2},
        scale_factor=4, image_token_id=49190, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SmolVLMForConditionalGeneration(config).eval()
    ids = torch.cat([torch.full((1, 64), 49190), torch.randint(0, 40_000, (1, 40))], dim=1)
    pixels = torch.randn(1, 1, 3, 512, 512)

    @torch.inference_mode()
    def act() -> None:
        out = model.model(input_ids=ids, pixel_values=pixels, use_cache=True)
        for _ in range(symbols - 1):
            said = model.lm_head(out.last_hidden_state[:, -1:, :])[..., -256:].argmax(-1)
            out = model.model(input_ids=said, past_key_values=out.past_key_values, use_cache=True)

    return act, sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--export", type=Path, help="an export folder of the student")
    parser.add_argument("--robot", default="tabletop")
    parser.add_argument("--smolvlm", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from vla.export.measure import race
    from vla.policy import load_policy

    teacher, student = load_policy(args.teacher, "cpu"), load_policy(args.student, "cpu")
    spec = student.embodiments[args.robot]
    rng = np.random.default_rng(0)
    seen = {"images": {n: rng.integers(0, 256, (c.height, c.width, 3)).astype(np.uint8) for n, c in spec.cameras.items()},
            "state": np.zeros(spec.state_dim, np.float32)}  # fmt: skip
    told = student.instructions[0]
    runs: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, policy in (("teacher, torch float32", teacher), ("student, torch float32", student)):
        runs[name] = partial(policy.act, seen, told, args.robot), sum(p.numel() for p in policy.parameters())
    if args.export:
        from serve.edge import EdgePolicy
        from vla.export_folder import read_export

        size = runs["student, torch float32"][1]
        for graph in read_export(args.export).meaning["graphs"]["policy"]:
            edge = EdgePolicy.load(args.export, runtime=graph, threads=args.threads)
            runs[f"student, onnxruntime {graph}"] = partial(edge.act, seen, told, args.robot), size
    if args.smolvlm:
        N = teacher.chunk * spec.action_dim
        for n in (7, N):
            runs[f"SmolVLM-256M's shape, {n} symbols"] = smolvlm(n)
    times = race({name: run for name, (run, _) in runs.items()}, args.rounds, warm=1)
    p50 = {name: figures["p50_ms"] for name, figures in times.items()}
    names = [name for name in runs if name.startswith("student")]
    best = min(names, key=p50.__getitem__)
    print(f"{args.threads} thread(s), {args.rounds} rounds, chunk of {teacher.chunk} x {spec.action_dim}\n")
    print("| | parameters | p50 | x the student's best |\n| --- | --- | --- | --- |")
    for name, (_, size) in runs.items():
        print(f"| {name} | {size / 1e6:.1f} M | {p50[name]:.1f} ms | {p50[name] / p50[best]:.1f} |")
    if args.out:
        args.out.write_text(json.dumps({"threads": args.threads, "p50_ms": p50}, indent=1))


if __name__ == "__main__":
    main()
