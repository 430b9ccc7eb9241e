"""One CUDA device in at most nine minutes: what our decoding and training reach of what the device can do. Random weights.

    python benchmarks/gpu.py [--out gpu.json] [--budget 520] [--only NAME ...]
    python benchmarks/gpu.py --tiny --device cpu       the same code at tiny sizes, as the tests run it

Probes come first (device copy, matrix product), so that every figure has its share of what was measured. Each section is
guarded: a failure is recorded with its error, and the next one begins; none begins after the budget is spent. Times by CUDA
events after a warm-up. Needs torch, transformers, timm, pydantic, and peft for training; other packages the project imports
(datasets, av, ...) are replaced by empty modules where they are missing, for nothing here calls them.
"""

from __future__ import annotations

import argparse
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
import torch  # noqa: E402

_UNUSED = ("datasets", "av", "mujoco", "pyarrow", "simplejpeg", "gymnasium", "metaworld", "h5py", "cv2", "yaml", "rich", "typer")
GIB = 2**30


class _Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that are imported on the way and never called."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        class Hollow(ModuleType):
            def __getattr__(self, name: str) -> Any:
                if name.startswith("__"):
                    raise AttributeError(name)
                return MagicMock()

        return Hollow(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ImportError:
        return True


def prepare_imports() -> list[str]:
    """Make the parts used here importable; returns the names of packages replaced by nothing."""
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "benchmarks")]
    import peft  # noqa: F401  # before anything is stood in for: it looks at what is installed
    import timm  # noqa: F401
    import transformers.cache_utils
    import transformers.modeling_utils
    import transformers.models.llama.modeling_llama  # noqa: F401

    gone = {name for name in _UNUSED if missing(name)}
    sys.meta_path.insert(0, _Empty(gone))
    return sorted(gone)


class Bench:
    """Device, sizes, clock, and what was found."""

    def __init__(self, device: str, tiny: bool, budget: float) -> None:
        self.device, self.tiny, self.end = torch.device(device), tiny, time.monotonic() + budget
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.found: dict[str, Any] = {}
        self.rows: list[tuple[str, str, str]] = []
        self.copy, self.rate = 1.0, 1.0  # bytes and FLOP a second, measured

    def time(self, run: Callable[[], Any], rounds: int = 20, warm: int = 3) -> dict[str, float]:
        """p50, p99 and least, in ms."""
        for _ in range(1 if self.tiny else warm):
            run()
        spent = []
        for _ in range(3 if self.tiny else rounds):
            if self.cuda:
                torch.cuda.synchronize()
                a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                a.record()
                run()
                b.record()
                b.synchronize()
                spent.append(a.elapsed_time(b))
            else:
                start = time.perf_counter()
                run()
                spent.append(1e3 * (time.perf_counter() - start))
        spent.sort()
        return {"p50": statistics.median(spent), "p99": spent[min(len(spent) - 1, int(0.99 * len(spent)))], "least": spent[0]}

    def row(self, what: str, value: str, share: str = "") -> None:
        self.rows.append((what, value, share))
        print(f"| {what} | {value} | {share} |", flush=True)

    def section(self, name: str, run: Callable[[Bench], dict[str, Any]]) -> None:
        """Run one part; its failure is a finding."""
        if time.monotonic() > self.end:
            self.found[name] = {"skipped": "the time budget was spent"}
            self.row(name, "skipped: no time left")
            return
        start = time.monotonic()
        try:
            self.found[name] = run(self)
        except Exception as error:
            self.found[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]}
            self.row(name, f"failed: {type(error).__name__}: {str(error)[:150]}".replace("\n", " "))
        self.found[name]["seconds"] = time.monotonic() - start
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def probe(b: Bench) -> dict[str, Any]:
    n, size = (2**31, 8192) if b.cuda else (2**22, 128)
    x = torch.empty(n, dtype=torch.uint8, device=b.device).zero_()
    y = torch.empty_like(x)
    b.copy = 2 * n / (b.time(lambda: y.copy_(x))["least"] / 1e3)
    x = y = torch.empty(0)  # the room is needed later
    p, q = (torch.randn(size, size, device=b.device, dtype=b.dtype) for _ in range(2))
    b.rate = 2 * size**3 / (b.time(lambda: p @ q)["least"] / 1e3)
    b.row("device copy (read and written)", f"{b.copy / 1e9:.0f} GB/s")
    b.row(f"matrix product {size}, {b.dtype}", f"{b.rate / 1e12:.2f} TFLOP/s")
    return {"copy_Bps": b.copy, "gemm_FLOPs": b.rate}


def model_of(b: Bench, kind: str) -> Any:
    """`7b`: openvla-7b. `256m`, `500m`: SmolVLM's language models behind a SigLIP tower of 64 tokens."""
    from vla.backbones.prismatic import random_prismatic
    from vla.backbones.prismatic_model import PrismaticModelConfig

    torch.manual_seed(0)
    if b.tiny:
        text = dict(model_type="llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                    intermediate_size=64, vocab_size=576, pad_token_id=0, tie_word_embeddings=False)  # fmt: skip
        small: dict[str, Any] = dict(timm_model_ids=("vit_so400m_patch14_siglip_224",), image_sizes=(28,), pad_token_id=0,
                                     act_id=90, tower_args=[dict(embed_dim=32, depth=3, num_heads=2, mlp_ratio=2.0)])  # fmt: skip
        config = PrismaticModelConfig(text, **small)
    elif kind == "7b":
        config = PrismaticModelConfig()
    else:
        d, layers, heads, kv, mlp = {"256m": (576, 30, 9, 3, 1536), "500m": (960, 32, 15, 5, 2560)}[kind]
        text = dict(model_type="llama", hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads,
                    num_key_value_heads=kv, intermediate_size=mlp, vocab_size=49280,
                    pad_token_id=0, tie_word_embeddings=False)  # fmt: skip
        config = PrismaticModelConfig(text, timm_model_ids=("vit_so400m_patch14_siglip_224",), image_sizes=(112,),
                                      act_id=90, pad_token_id=0,
                                      tower_args=[dict(embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0)])  # fmt: skip
    return random_prismatic(config, b.device, b.dtype).eval()


def text_length(model: Any) -> int:
    return 22 if model.config.image_tokens > 200 else 18  # openvla-7b: 279 with BOS, pictures and the act token, 280 here


def decode(b: Bench, kind: str, sweep: tuple[int, ...], model: Any = None) -> dict[str, Any]:
    """Latency of a 7-token action and of a parallel chunk of 8x7, plain and as graphs, from ids and pictures on the device."""
    from prismatic_policy import bench_policy, prefixes, rule_out_words

    from vla.policy.decoding import Graphs, greedy_logits, parallel_logits

    model = model or model_of(b, kind)
    rule_out_words(model)
    layers = sum(p.numel() for p in model.get_decoder().layers.parameters())
    seen = sum(p.numel() for part in (model.vision_backbone, model.projector) for p in part.parameters())
    steps = bench_policy(model, text_length(model), 1, "autoregressive")
    one = prefixes(steps, 1)
    act = torch.full((1, 1), model.config.ids.act, device=b.device)
    T, width, d = one.ids.shape[1] + 1, torch.finfo(b.dtype).bits // 8, model.hidden_size
    patches = model.config.image_tokens
    first = 2 * (layers * T + seen * patches) / b.rate
    floor7 = 1e3 * (max(first, width * (layers + seen) / b.copy) + 6 * width * (layers + 256 * d) / b.copy)
    floor56 = 1e3 * max(first + 2 * layers * 57 / b.rate, width * (layers + seen) / b.copy)
    found: dict[str, Any] = {"prefix": T, "layers": layers, "seen": seen, "floor_ms": {"7": floor7, "8x7": floor56}}

    def plain() -> Any:
        embeds = model.embed(torch.cat([one.ids, act], 1), one.images)
        return model.language_model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(1, T, dtype=torch.long, device=b.device), max_new_tokens=7,
            do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip

    def note(name: str, what: str, run: Callable[[], Any], floor: float | None) -> None:
        try:
            found[name] = b.time(run)
        except Exception as error:  # one way of running fails: the others still count
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            b.row(f"{kind}: {what}", f"failed: {type(error).__name__}: {str(error)[:120]}".replace("\n", " "))
            return
        t = found[name]
        b.row(f"{kind}: {what}", f"p50 {t['p50']:.2f} ms, p99 {t['p99']:.2f}",
              "" if floor is None else f"{100 * floor / t['p50']:.0f} % of the floor's rate")  # fmt: skip

    with torch.inference_mode():
        note("generate7", "7 tokens, plain `generate`", plain, floor7)
        note("eager7", "7 tokens, ours without graphs", lambda: greedy_logits(steps, one, 7), floor7)
        if b.cuda:
            graphs = Graphs()
            note("graph7", "7 tokens, ours", lambda: graphs(steps, one, 7), floor7)
        best = found["graph7"] if "p50" in found.get("graph7", {}) else found["eager7"]
        if "p50" in best and "p50" in found["generate7"]:
            found["times_generate"] = found["generate7"]["p50"] / best["p50"]
            b.row(f"{kind}: `generate` / ours", f"{found['times_generate']:.2f}")
        symbols = model.config.ids.symbols
        found["same_tokens"] = [symbols[0] - int(i) for i in plain()[0]] == greedy_logits(steps, one, 7).argmax(-1)[0].tolist()
        for n in sweep:
            many = prefixes(steps, n)
            run = (lambda m=many: graphs(steps, m, 7)) if b.cuda and "p50" in found.get("graph7", {}) else (
                lambda m=many: greedy_logits(steps, m, 7))  # fmt: skip
            note(f"batch{n}", f"7 tokens, batch {n}", run, None)
            if "p50" in found[f"batch{n}"]:
                b.row(f"{kind}: actions a second at batch {n}", f"{1e3 * n / found[f'batch{n}']['p50']:.0f}")
        chunk = bench_policy(model, text_length(model), 8, "parallel")
        wide = prefixes(chunk, 1)
        tail = torch.tensor(model.parallel_tail(56), device=b.device)
        note("eager8x7", "parallel chunk of 8x7, without graphs", lambda: parallel_logits(chunk, wide, tail), floor56)
        if b.cuda:
            wide_graphs = Graphs()
            note("graph8x7", "parallel chunk of 8x7", lambda: wide_graphs(chunk, wide, 7), floor56)
    return found


def weight_only(b: Bench) -> dict[str, Any]:
    """Weight-only quantisation of the language model's linear layers by torchao."""
    if missing("torchao"):
        b.row("int4, int8, fp8 weights", "torchao is not installed")
        return {"skipped": "torchao is not installed"}
    import torchao.quantization as q  # pyright: ignore[reportMissingImports]

    found: dict[str, Any] = {}
    names = {"int8": "Int8WeightOnlyConfig", "int4": "Int4WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}
    for name, config in names.items():
        try:
            model = model_of(b, "7b")
            q.quantize_(model.get_decoder(), getattr(q, config)())
            found[name] = decode(b, f"7b {name}", (), model)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            b.row(f"7b {name}", f"failed: {type(error).__name__}: {str(error)[:120]}".replace("\n", " "))
        model = None
        gc.collect()
        if b.cuda:
            torch.cuda.empty_cache()
    return found


_ADAPTED = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv|attn\.proj|fc1|fc2|fc3)"


def training(b: Bench) -> dict[str, Any]:
    """LoRA of rank 32, batch 16, through the policy's own `forward` and fused AdamW; gradient checkpointing on and off."""
    from peft import LoraConfig, inject_adapter_in_model
    from prismatic_policy import bench_policy, prefixes

    model = model_of(b, "7b")
    inject_adapter_in_model(LoraConfig(r=4 if b.tiny else 32, lora_alpha=16, target_modules=_ADAPTED), model)
    learned = []
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
        if "lora_" in name:
            p.data = p.data.to(b.dtype)
            learned.append(p)
    policy = bench_policy(model, text_length(model), 1, "autoregressive").train()
    rows = 2 if b.tiny else 16
    batch = prefixes(policy, rows)
    batch = replace(batch, valid=torch.ones_like(batch.valid), said=torch.ones_like(batch.said))
    T = batch.ids.shape[1] + 7
    layers = sum(p.numel() for n, p in model.get_decoder().named_parameters() if "layers" in n and "lora_" not in n)
    seen = sum(p.numel() for part in (model.vision_backbone, model.projector) for n, p in part.named_parameters()
               if "lora_" not in n)  # fmt: skip
    flop = 4 * (layers * T + seen * model.config.image_tokens)  # forward, and gradients of what goes in: weights are frozen
    found: dict[str, Any] = {"learned": sum(p.numel() for p in learned), "flop_per_sample": flop}
    for name, checkpointing in (("kept activations", False), ("gradient checkpointing", True)):
        try:
            if checkpointing:
                model.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            else:
                model.language_model.gradient_checkpointing_disable()
            optimizer = torch.optim.AdamW(learned, lr=1e-5, fused=b.cuda)
            if b.cuda:
                torch.cuda.reset_peak_memory_stats()

            def step(optimizer: Any = optimizer) -> None:
                loss = policy(batch)
                (loss.action / loss.action_count).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            t = b.time(step, rounds=8, warm=2)
            speed = 1e3 * rows / t["p50"]
            peak = torch.cuda.max_memory_allocated() / GIB if b.cuda else 0.0
            found[name] = {**t, "samples_per_s": speed, "share_of_gemm": speed * flop / b.rate, "peak_GiB": peak}
            b.row(f"LoRA, batch {rows}, {name}", f"{speed:.1f} samples/s, {peak:.1f} GiB",
                  f"{100 * speed * flop / b.rate:.0f} % of the measured product rate")  # fmt: skip
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            b.row(f"LoRA, {name}", f"failed: {type(error).__name__}: {str(error)[:120]}".replace("\n", " "))
        for p in learned:
            p.grad = None
        if b.cuda:
            torch.cuda.empty_cache()
    return found


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "7b": lambda b: decode(b, "7b", (2, 8) if b.tiny else (2, 4, 8, 16)),
    "training": training,
    "256m": lambda b: decode(b, "256m", (8,)),
    "500m": lambda b: decode(b, "500m", (8,)),
    "weight-only": weight_only,
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--budget", type=float, default=520, help="seconds after which no section begins")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    gone = prepare_imports()
    b = Bench(args.device, args.tiny, args.budget)
    b.found["machine"] = {"device": torch.cuda.get_device_name() if b.cuda else "cpu", "torch": torch.__version__, "gone": gone}
    print(f"{b.found['machine']}\n\n| what | figure | share |\n| --- | --- | --- |")
    for name, run in {"probes": probe, **{n: SECTIONS[n] for n in args.only}}.items():
        b.section(name, run)
        if args.out:  # after each: what was found survives a run that is cut off
            args.out.write_text(json.dumps(b.found, indent=1))
    return b.found


if __name__ == "__main__":
    main()
