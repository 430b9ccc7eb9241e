"""How many demonstrations does a task need: LoRA and full fine-tuning from models/nano-base beside training from scratch.

    python benchmarks/sample_efficiency.py --suite tabletop --task lift --out docs/sample_efficiency.jsonl
    python benchmarks/sample_efficiency.py --table          # what the file holds, as Markdown
    python benchmarks/sample_efficiency.py --draw docs/sample_efficiency.svg

One line of JSON per cell (demonstrations, arm, seed); what is there already is not run again, so an interrupted sweep goes on.
Every arm gets the same steps, batches and demonstrations; sets are nested, since a longer recording begins with the shorter one.
Success is on fresh scenes (seeds 900000+), of the last step's averaged weights. Each cell is a process of its own, forked after
the imports: its seconds are training alone, its memory the peak of that process (training and evaluation, simulator apart).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ARMS = {"lora": "LoRA from nano-base", "full": "full fine-tuning from nano-base", "scratch": "from scratch"}
RATES = {"lora": 2e-3, "full": 5e-4, "scratch": 1e-3}
"""Learning rates: the first tried, on validation scenes at 25 demonstrations of lifting; none was tuned further."""
KEY = ("base", "suite", "task", "arm", "demonstrations", "seed", "steps", "batch", "lr", "rank", "episodes", "first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="tabletop")
    parser.add_argument("--task", default="lift")
    parser.add_argument("--base", default="models/nano-base", help="the policy to fine-tune from")
    parser.add_argument("--demonstrations", type=int, nargs="+", default=[5, 10, 25, 50])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", nargs="*", default=[], metavar="ARM=VALUE", help=f"default {RATES}")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--first", type=int, default=900_000, help="first scene; 500000 to choose settings")
    parser.add_argument("--out", type=Path, default=Path("docs/sample_efficiency.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--draw", type=Path, metavar="SVG", help="draw the curves and run nothing")
    args = parser.parse_args()
    if args.draw:
        args.draw.write_text(draw(read(args.out)))
    elif not args.table:
        sweep(args)
    print(table(read(args.out)))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def sweep(args: argparse.Namespace) -> None:
    import vla.evaluate
    import vla.train  # noqa: F401  imported once, before the cells are forked

    rates = RATES | {arm: float(rate) for arm, _, rate in (pair.partition("=") for pair in args.lr)}
    for seed in args.seeds:
        for count in args.demonstrations:
            data = record(args.suite, args.task, count)
            for arm in args.arms:
                key = vars(args) | {"arm": arm, "demonstrations": count, "seed": seed, "lr": rates[arm]}
                key = {name: key[name] for name in KEY}
                if not any(all(line.get(k) == v for k, v in key.items()) for line in read(args.out)):
                    write(args.out, key | apart(key, partial(cell, args.base, key, data)))


def write(path: Path, line: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def record(suite: str, task: str, count: int) -> Path:
    data = Path(f"data/efficiency/{suite}-{task}-{count}")
    command = f"data record --suite {suite} --task {task} --episodes {count} --seed 0 --out {data}".split()
    subprocess.run([sys.executable, "-m", "vla.cli", *command], check=True, capture_output=True)
    return data


def apart(key: dict, work: Callable[[Path], dict]) -> dict:
    """`work(run folder)` in a child of this process: {successes, of, seconds, parameters} and its peak_mb."""
    run = Path(f"runs/efficiency/{key['suite']}-{key['task']}-{key['demonstrations']}-{key['arm']}-{key['seed']}-{key['first']}")
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    log, result = run.with_suffix(".log"), run.with_suffix(".json")
    child = os.fork()
    if not child:
        code = 1
        try:
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            result.write_text(json.dumps(work(run)))
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{key}: failed, see {log}")
    shutil.rmtree(run)
    return json.loads(result.read_text()) | {"peak_mb": usage.ru_maxrss // 1024}


def cell(base: str, key: dict, data: Path, run: Path) -> dict:
    from vla.policy import load_policy
    from vla.train import TrainConfig, train

    tree: dict[str, Any] = {
        "run": {"out": str(run), "steps": key["steps"], "seed": key["seed"], "processes": 1, "eval_every": 10**6,
                "save_every": 10**6},
        "mixture": {"datasets": [{"path": str(data)}], "holdout": 0},
        "optim": {"lr": key["lr"], "batch": key["batch"], "warmup": 20, "ema": 0.98},
    }  # fmt: skip
    if key["arm"] == "scratch":  # the settings of the base, without what it learned
        settings = load_policy(base, "cpu").config.model_dump(mode="json")
        tree["policy"] = {name: value for name, value in settings.items() if name not in ("action_dim", "state_dim")}
    else:
        tree["start"] = {"policy": base}
    if key["arm"] == "lora":
        tree["adapter"] = {"rank": key["rank"], "targets": "all"}
    began = time.perf_counter()
    train(TrainConfig.model_validate(tree))
    return measured(run, key, time.perf_counter() - began)


def measured(run: Path, key: dict, seconds: float) -> dict:
    """Success of a run's policy on fresh scenes."""
    from vla.evaluate import evaluate
    from vla.policy import load_policy

    policy = load_policy(run, "cpu")
    found = evaluate(policy, key["suite"], [key["task"]], key["episodes"], key["first"], ["policy"], workers=1, clips=0,
                     progress=False)  # fmt: skip
    rows = [row for row in found["rows"] if row["condition"] == "policy"]
    learned = policy.adapter.trained if policy.adapter else dict(policy.named_parameters())
    sizes = dict(policy.named_parameters())
    return {"successes": sum(row["successes"] for row in rows), "of": sum(row["n"] for row in rows),
            "seconds": round(seconds, 1), "parameters": sum(sizes[name].numel() for name in learned)}  # fmt: skip


def cells(lines: Sequence[dict], task: str, arm: str) -> dict[int, list[dict]]:
    """Demonstrations -> the lines of all seeds."""
    mine = [line for line in lines if (line["task"], line["arm"]) == (task, arm)]
    return {n: [line for line in mine if line["demonstrations"] == n] for n in sorted({li["demonstrations"] for li in mine})}


def rate(lines: Sequence[dict]) -> tuple[float, float, float, int]:
    """(rate, low, high, n): all seeds' episodes together, Wilson 95 %."""
    from vla.evaluate.results import wilson

    good, of = sum(line["successes"] for line in lines), sum(line["of"] for line in lines)
    return (good / of, *wilson(good, of), of)


def table(lines: list[dict], arms: Mapping[str, str] = ARMS) -> str:
    """Markdown: one row per task and arm, one column per number of demonstrations; per cent, [interval], each seed's own."""
    counts = sorted({line["demonstrations"] for line in lines})
    out = ["| task | arm | " + " | ".join(map(str, counts)) + " | trained | training | memory |"]
    out.append("| --- " * (5 + len(counts)) + "|")
    for task in sorted({line["task"] for line in lines}):
        for arm, words in arms.items():
            found = cells(lines, task, arm)
            if not found:
                continue
            row = []
            for count in counts:
                mine = sorted(found.get(count, []), key=lambda line: line["seed"])
                good, low, high, _ = rate(mine) if mine else (0, 0, 0, 0)
                each = ", ".join(f"{100 * line['successes'] / line['of']:.0f}" for line in mine)
                row.append(f"**{100 * good:.0f}** [{100 * low:.0f}, {100 * high:.0f}] ({each})" if mine else "-")
            every = [line for some in found.values() for line in some]
            seconds = sorted(line["seconds"] for line in every)[len(every) // 2]
            out.append(f"| {task} | {words} | " + " | ".join(row) + f" | {every[0]['parameters'] / 1e6:.2f} M | {seconds:.0f} s "
                       f"| {max(line['peak_mb'] for line in every)} MB |")  # fmt: skip
    return "\n".join(out)


TONES = ("#b45206", "#1f5aa6", "#777777")


def draw(lines: list[dict], arms: Mapping[str, str] = ARMS) -> str:
    """One panel per task: success against demonstrations, a line and its intervals per arm, as one SVG."""
    tasks, counts, wide, high = (*({line[k] for line in lines} for k in ("task", "demonstrations")), 400, 250)
    tones = dict(zip(arms, TONES, strict=True))
    size = f"{wide * len(tasks)} {high + 30}"
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="12">',
           '<rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for i, task in enumerate(sorted(tasks)):
        left, right, top, bottom = i * wide + 45, (i + 1) * wide - 15, 30, high - 30
        x = {n: left + (right - left) * k / max(1, len(counts) - 1) for k, n in enumerate(sorted(counts))}
        y = [bottom - (bottom - top) * per_cent / 100 for per_cent in range(101)]
        out.append(_text((left + right) / 2, 16, task, "middle"))
        for tick in (0, 25, 50, 75, 100):
            out += [f'<line x1="{left}" x2="{right}" y1="{y[tick]}" y2="{y[tick]}" stroke="#ddd"/>',
                    _text(left - 6, y[tick] + 4, f"{tick}%", "end")]  # fmt: skip
        out += [_text(at, bottom + 16, str(n), "middle") for n, at in x.items()]
        out.append(_text((left + right) / 2, bottom + 30, "demonstrations", "middle"))
        for arm, tone in tones.items():
            points = {n: [y[round(100 * share)] for share in rate(mine)[:3]] for n, mine in cells(lines, task, arm).items()}
            line = " ".join(f"{x[n]:.1f},{at:.1f}" for n, (at, _, _) in points.items())
            out.append(f'<polyline points="{line}" fill="none" stroke="{tone}" stroke-width="2"/>')
            for n, (at, low, top_end) in points.items():
                out += [f'<line x1="{x[n]:.1f}" x2="{x[n]:.1f}" y1="{low:.1f}" y2="{top_end:.1f}" stroke="{tone}"/>',
                        f'<circle cx="{x[n]:.1f}" cy="{at:.1f}" r="3.5" fill="{tone}"/>']  # fmt: skip
    for k, (arm, tone) in enumerate(tones.items()):
        out += [f'<rect x="{60 + k * 230}" y="{high + 8}" width="12" height="12" fill="{tone}"/>',
                _text(78 + k * 230, high + 18, arms[arm], "start")]  # fmt: skip
    return "\n".join([*out, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


if __name__ == "__main__":
    main()
