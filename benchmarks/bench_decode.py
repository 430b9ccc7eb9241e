"""Constrained, cached decoding beside Hugging Face's `generate`: the same weights, the same tokens, one process.

    python benchmarks/bench_decode.py [--rounds 15] [--only 23m 135m] [--dtype bfloat16] [--image 56] [--pack] [--threads 2]
                                      [--clock cpu] [--profile] [--batch-only] [--json FILE]

Models are Prismatic with random float32 weights and a small image tower; every row of the head that is no action symbol is
zero, so that `generate`'s argmax over the whole vocabulary is a symbol without a logits processor: nothing is added to its
cost, and both sides must say the same tokens (asserted). Contenders run in turn within each round; ratios are within a round.

    generate7    language_model.generate(inputs_embeds=..., max_new_tokens=7, do_sample=False, use_cache=True), as OpenVLA does
    ours7        the policy's decoding from the same prefix embeddings
    generate56   the same for 8 steps of 7;  parallel56: our one pass
    batch8       ours7 for 8 rows with prompts of different lengths
    act7         `policy.act_batch` of one observation, image preparation and tower included; plain7: tower, `generate`, codec

`--image` is the side of the picture, 14 pixels a token, and with it the prefix's length; `--pack` keeps the linear layers in
oneDNN's own order (`vla.policy.packing`), for `ours` alone; `--clock cpu` counts the thread's processor time instead of the
wall's, which on a busy machine is the better measure of one thread; `--profile` says where batch 1 and batch 8 spend it.

Floor: bytes of weights that must be read per token over the measured bandwidth of reading, plus the prefix's multiplications
over the measured rate of a matrix product of its size.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import torch  # noqa: E402
from prismatic_policy import ROBOT, bench_policy, observations, prefixes, rule_out_words  # noqa: E402

from vla.backbones.prismatic import random_prismatic  # noqa: E402
from vla.backbones.prismatic_model import PrismaticModelConfig  # noqa: E402
from vla.policy.decoding import greedy_logits  # noqa: E402
from vla.policy.packing import packing  # noqa: E402

SHAPES: dict[str, dict[str, int]] = {
    "23m": dict(hidden_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4, intermediate_size=688,
                vocab_size=32064),
    "38m": dict(hidden_size=384, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=6, intermediate_size=1024,
                vocab_size=32064),
    "135m": dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
                 vocab_size=49152),
    "tiny": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64,
                 vocab_size=640),
}  # fmt: skip
TEXT = 18  # with BOS, 64 image tokens and the act token: a prefix of 84
CLOCK: Callable[[], float] = time.perf_counter


def model_of(shape: str, image: int = 112, dtype: torch.dtype = torch.float32) -> Any:
    text = {"model_type": "llama", "pad_token_id": 0, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, **SHAPES[shape]}
    config = PrismaticModelConfig(
        text, timm_model_ids=("vit_so400m_patch14_siglip_224",), image_sizes=(image,), pad_token_id=0, act_id=90,
        tower_args=[dict(embed_dim=192, depth=6, num_heads=3, mlp_ratio=4.0)],
    )  # fmt: skip
    torch.manual_seed(0)
    model = random_prismatic(config, "cpu", dtype).eval()
    rule_out_words(model)
    return model


def probes(prefix: int, hidden: int, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a matrix-vector product larger than the cache; FLOP a second of (prefix, d) x (d, 4 d)."""
    big, x = torch.randn(8192, 8192).to(dtype), torch.randn(1, 8192).to(dtype)
    a, b = torch.randn(prefix, hidden).to(dtype), torch.randn(hidden, 4 * hidden).to(dtype)
    read = min(timed(lambda: x @ big.T) for _ in range(5))
    gemm = min(timed(lambda: a @ b) for _ in range(20))
    return big.numel() * big.element_size() / read, 2 * prefix * hidden * 4 * hidden / gemm


def timed(run: Callable[[], Any]) -> float:
    start = CLOCK()
    run()
    return CLOCK() - start


@torch.inference_mode()
def measure(shape: str, rounds: int, args: argparse.Namespace) -> dict[str, Any]:
    dtype = getattr(torch, args.dtype)
    model = model_of(shape, args.image, dtype)
    symbols = model.config.ids.symbols
    steps, chunk = bench_policy(model, args.text, 1, "autoregressive"), None
    words = ["lift", "lift it", "lift the cube", "lift it up now"] * 2 if args.text == TEXT else None
    one, eight = prefixes(steps, 1), prefixes(steps, 8, words)
    seen = observations(steps, 1)
    act = torch.full((1, 1), model.config.ids.act)
    whole = torch.cat([one.ids, act], 1)
    prefix: torch.Tensor = model.embed(whole, one.images)
    kept: dict[int, torch.Tensor] = {1: prefix, 8: model.embed(torch.cat([eight.ids, act.expand(8, 1)], 1), eight.images)}
    true_embed = model.embed

    def known(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        return kept[len(ids)] if ids.shape[1] > 1 else true_embed(ids, *rest)

    def ours(batch: Any) -> list[int]:
        model.embed = known
        try:
            if args.pack:
                with packed:
                    return greedy_logits(steps, batch, 7).argmax(-1)[0].tolist()
            return greedy_logits(steps, batch, 7).argmax(-1)[0].tolist()
        finally:
            model.embed = true_embed

    def generate(n: int, embeds: torch.Tensor | None = None) -> list[int]:
        embeds = prefix if embeds is None else embeds
        said = model.language_model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long), max_new_tokens=n,
            do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return [symbols[0] - int(i) for i in said[0]]

    def plain() -> Any:
        batch = prefixes_of(steps, seen)
        said = generate(7, model.embed(torch.cat([batch.ids, act], 1), batch.images))
        return steps.normalizers[ROBOT]["action"].from_unit(steps.codec.decode(torch.tensor(said).numpy()[None], 7))

    def parallel() -> Any:
        assert chunk is not None
        return chunk.action_logits(wide).argmax(-1)

    packed = packing(model.language_model) if args.pack else None
    if (said := ours(one)) != (theirs := generate(7)):
        if dtype == torch.float32:
            raise AssertionError(f"the two do not say the same: {said} and {theirs}")
        print(f"{shape}: {said} and {theirs}: in {args.dtype} two orders of adding up may say another symbol")
    if args.profile:
        profiled("batch 1", lambda: ours(one))
        profiled("batch 8", lambda: ours(eight))
    model.config.num_slots = 7
    runs: dict[str, Callable[[], Any]] = {
        "generate7": lambda: generate(7), "ours7": lambda: ours(one), "batch8": lambda: ours(eight),
        "plain7": plain, "act7": lambda: steps.act_batch(seen, ["lift"], ROBOT),
        "generate56": lambda: generate(56), "parallel56": parallel,
    }  # fmt: skip
    chunk = bench_policy(model, args.text, 8, "parallel")
    wide = prefixes(chunk, 1)
    if args.batch_only:
        runs = {name: runs[name] for name in ("generate7", "ours7", "batch8")}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 2):
        for name, run in runs.items():
            if name == "parallel56":  # as act7 does it, from known prefix embeddings; the tail's are zero by definition
                tail = prefix.new_zeros(1, 58, prefix.shape[-1])
                model.embed = lambda ids, *rest, tail=tail: torch.cat([prefix[:, :-1], tail], 1)
            spent = timed(run)
            model.embed = true_embed
            if i >= 2:
                times[name].append(spent)
    weights = sum(p.numel() for p in model.language_model.model.layers.parameters())
    d, V = model.hidden_size, SHAPES[shape]["vocab_size"]
    bandwidth, rate = probes(prefix.shape[1], d, dtype)
    first, size = 2 * weights * prefix.shape[1] / rate, prefix.element_size()
    rest = 6 * size * (weights + 256 * d) / bandwidth
    floor = {"ours7": first + rest, "generate7": first + 6 * size * (weights + V * d) / bandwidth, "batch8": 8 * first + rest,
             "parallel56": 2 * weights * (prefix.shape[1] + 57) / rate}  # fmt: skip
    within = {
        "7 tokens, generate / ours": ratio(times["generate7"], times["ours7"]),
        "throughput of batch 8 / batch 1": [8 * r for r in ratio(times["ours7"], times["batch8"])],
        "the same, of their floors": [8 * floor["ours7"] / floor["batch8"]] * 2,
    }
    if not args.batch_only:
        within["7 tokens, whole act, generate / ours"] = ratio(times["plain7"], times["act7"])
        within["chunk of 8x7, generate / parallel"] = ratio(times["generate56"], times["parallel56"])
    return {
        "language_model": sum(p.numel() for p in model.language_model.parameters()), "prefix": prefix.shape[1],
        "ms": {name: [1e3 * statistics.median(t), 1e3 * min(t)] for name, t in times.items()},
        "ratios": within, "floor_ms": {name: 1e3 * t for name, t in floor.items()},
        "read_GBps": bandwidth / 1e9, "gemm_GFLOPs": rate / 1e9, "rounds": rounds, "dtype": args.dtype, "threads": args.threads,
        "clock": args.clock, "pack": args.pack,
        "torch": torch.__version__,
    }  # fmt: skip


def prefixes_of(policy: Any, seen: list[Any]) -> Any:
    return policy.collate([policy.encoder.observation(seen[0], "lift", ROBOT, False)])


def profiled(what: str, run: Callable[[], Any]) -> None:
    """Where the time of `run` goes, by operation."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(3):
            run()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    print(f"\n{what}: {sum(row.self_cpu_time_total for row in rows) / 3e3:.1f} ms under the profiler")
    for row in rows[:16]:
        print(f"    {row.key:44} {row.self_cpu_time_total / 3e3:8.2f} ms {row.count // 3:6d} calls")


def ratio(slow: list[float], fast: list[float]) -> list[float]:
    """[median, least] over rounds."""
    within = [a / b for a, b in zip(slow, fast, strict=True)]
    return [statistics.median(within), min(within)]


def show(shape: str, found: dict[str, Any]) -> None:
    print(f"\n## {shape}: language model of {found['language_model'] / 1e6:.1f} M, prefix {found['prefix']}, "
          f"reading {found['read_GBps']:.1f} GB/s, products {found['gemm_GFLOPs']:.0f} GFLOP/s")  # fmt: skip
    print("| | median ms | least ms | floor ms |\n| --- | --- | --- | --- |")
    for name, (median, least) in found["ms"].items():
        floor = found["floor_ms"].get(name)
        print(f"| {name} | {median:.1f} | {least:.1f} | {'' if floor is None else f'{floor:.1f}'} |")
    print("\n| ratio within a round | median | least |\n| --- | --- | --- |")
    for name, (median, least) in found["ratios"].items():
        print(f"| {name} | {median:.2f} | {least:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", choices=list(SHAPES), default=["23m", "38m", "135m"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--image", type=int, default=112)
    parser.add_argument("--text", type=int, default=TEXT)
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--batch-only", action="store_true", help="leave chunks and whole acts out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.clock == "cpu":
        if args.threads != 1:
            parser.error("--clock cpu is for one thread")
        global CLOCK
        CLOCK = time.thread_time
    torch.set_num_threads(args.threads)
    found = {}
    for shape in args.only:
        found[shape] = measure(shape, args.rounds, args)
        show(shape, found[shape])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
