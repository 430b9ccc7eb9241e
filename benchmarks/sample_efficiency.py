"""How many demonstrations does a task need: LoRA and full fine-tuning from models/nano-base beside training from scratch.

    python benchmarks/sample_efficiency.py --suite metaworld --task handle-pull-v3 --out runs/efficiency.jsonl

One line of JSON per cell (demonstrations, arm, seed); what is there already is not run again. Every arm gets the same steps and
the same demonstrations; sets are nested, since a longer recording begins with the shorter one. Success is on fresh scenes,
seeds 900000+. `--table` prints what the file holds, with Wilson intervals over the seeds together.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ARMS = {
    "lora": ["start={policy: models/nano-base}", "adapter={rank: 16, targets: all}"],
    "full": ["start={policy: models/nano-base}"],
    "scratch": ["policy={backbone: {text_vocab: 1024}, chunk: 8, chunk_seconds: 0.4, execute: 4, prompt: robot-1, "
                "soft_tokens: 4, normalization: {action: bounds, state: bounds}}"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="metaworld")
    parser.add_argument("--task", default="handle-pull-v3")
    parser.add_argument("--demonstrations", type=int, nargs="+", default=[5, 10, 25, 50])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", nargs="*", default=["lora=2e-3", "full=5e-4", "scratch=1e-3"], help="ARM=VALUE")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/efficiency.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    args = parser.parse_args()
    if not args.table:
        rates = dict(pair.split("=") for pair in args.lr)
        for seed in args.seeds:
            for count in args.demonstrations:
                for arm in args.arms:
                    cell(args, arm, count, seed, rates[arm])
    print(table(read(args.out)))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def cell(args: argparse.Namespace, arm: str, count: int, seed: int, rate: str) -> None:
    """Record, train, evaluate and append one line, unless it is there."""
    key = {"suite": args.suite, "task": args.task, "arm": arm, "demonstrations": count, "seed": seed, "steps": args.steps,
           "batch": args.batch, "lr": rate, "episodes": args.episodes}  # fmt: skip
    if any(all(line.get(k) == v for k, v in key.items()) for line in read(args.out)):
        return
    data = f"data/efficiency/{args.suite}-{args.task}-{count}"
    vla("data", "record", "--suite", args.suite, "--task", args.task, "--episodes", str(count), "--seed", "0", "--out", data)
    run = f"runs/efficiency/{args.suite}-{args.task}-{count}-{arm}-{seed}"
    subprocess.run(["rm", "-rf", run], check=True)
    config = Path(run + ".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    settings = [f"run: {{out: {run}, steps: {args.steps}, seed: {seed}, processes: 1, log_every: 50, eval_every: 100000, "
                f"save_every: 100000}}", f"mixture: {{datasets: [{{path: {data}}}], holdout: 0}}",
                f"optim: {{lr: {float(rate)}, batch: {args.batch}, warmup: 20, ema: 0.98}}",
                *(line.replace("=", ": ", 1) for line in ARMS[arm])]  # fmt: skip
    config.write_text("\n".join(settings) + "\n")
    began = time.perf_counter()
    vla("train", str(config), "--no-check")
    seconds = time.perf_counter() - began
    result = f"{run}/eval.json"
    vla("eval", run, "--suite", args.suite, "--task", args.task, "--episodes", str(args.episodes), "--seed", "900000",
        "--conditions", "policy", "--no-clips", "--workers", "1", "--out", result)  # fmt: skip
    rows = [row for row in json.loads(Path(result).read_text())["rows"] if row["condition"] == "policy"]
    line = key | {"successes": sum(row["successes"] for row in rows), "of": sum(row["n"] for row in rows),
                  "seconds": round(seconds, 1), "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def vla(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "vla.cli", *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def table(lines: list[dict]) -> str:
    """Markdown: one row per task and arm, one column per number of demonstrations."""
    from vla.evaluate.results import wilson

    counts = sorted({line["demonstrations"] for line in lines})
    out = ["| task | arm | " + " | ".join(map(str, counts)) + " |", "| --- " * (2 + len(counts)) + "|"]
    for task in sorted({line["task"] for line in lines}):
        for arm in ARMS:
            cells = []
            for count in counts:
                mine = [li for li in lines if (li["task"], li["arm"], li["demonstrations"]) == (task, arm, count)]
                good, of = sum(li["successes"] for li in mine), sum(li["of"] for li in mine)
                low, high = wilson(good, of) if of else (0, 0)
                cells.append(f"{100 * good / of:.0f} [{100 * low:.0f}, {100 * high:.0f}] (n {of})" if of else "-")
            out.append(f"| {task} | {arm} | " + " | ".join(cells) + " |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
