"""Few demonstrations: a student of a pretrained teacher beside the same student on the demonstrations alone.

    python benchmarks/student_efficiency.py --suite tabletop --task lift --out docs/student_efficiency.jsonl
    python benchmarks/student_efficiency.py --table
    python benchmarks/student_efficiency.py --draw docs/student_efficiency.svg

The teacher is models/nano-base with LoRA on the N demonstrations. It then plays in simulation, on scenes nobody recorded: the
task, and what it knew before (`--known`). What it did where it succeeded (the simulator judges) is data for its student, with its
probabilities; no further demonstration is asked of anybody. Both students have the same network, steps, batches and seed.
Arms, cells and drawing: sample_efficiency.py.
"""

from __future__ import annotations

import argparse
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from sample_efficiency import apart, draw, measured, read, record, table, write

ARMS = {"teacher": "teacher (LoRA from nano-base)", "distilled": "student of the teacher", "scratch": "student alone"}
STUDENT = {"kind": "student", "image_size": 64, "patch": 16, "hidden": 128, "layers": 3, "heads": 2, "mlp": 384,
           "text_vocab": 1024}  # fmt: skip
KEY = ("base", "suite", "task", "arm", "demonstrations", "seed", "steps", "batch", "scenes", "known", "episodes", "first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="tabletop")
    parser.add_argument("--task", default="lift")
    parser.add_argument("--base", default="models/nano-base")
    parser.add_argument("--demonstrations", type=int, nargs="+", default=[5, 10, 25, 50, 100])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--known", nargs="*", default=["touch", "push"], help="tasks of the suite the base knows")
    parser.add_argument("--steps", type=int, default=1800, help="of a student; a teacher has 150")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=600, help="in which the teacher plays, of each")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--first", type=int, default=900_000)
    parser.add_argument("--out", type=Path, default=Path("docs/student_efficiency.jsonl"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--draw", type=Path, metavar="SVG")
    args = parser.parse_args()
    if args.draw:
        args.draw.write_text(draw(read(args.out), ARMS))
    elif not args.table:
        sweep(args)
    print(table(read(args.out), ARMS))


def sweep(args: argparse.Namespace) -> None:
    import vla.distill  # noqa: F401  imported once, before the cells are forked
    import vla.evaluate  # noqa: F401

    for seed in args.seeds:
        for count in args.demonstrations:
            data = record(args.suite, args.task, count)
            for arm in args.arms:
                whole = vars(args) | {"arm": arm, "demonstrations": count, "seed": seed}
                key: dict[str, Any] = {name: whole[name] for name in KEY}
                if not any(all(line.get(k) == v for k, v in key.items()) for line in read(args.out)):
                    teacher = Path(f"runs/efficiency/teacher-{args.suite}-{args.task}-{count}-{seed}")
                    write(args.out, key | apart(key, partial({"teacher": teach, "distilled": distilled, "scratch": scratch}[arm],
                                                             key, data, teacher)))  # fmt: skip


def _run(key: dict, out: Path, steps: int, data: list[dict], **optim: Any) -> dict[str, Any]:
    return {
        "run": {"out": str(out), "steps": steps, "seed": key["seed"], "processes": 1, "eval_every": 10**6, "save_every": 10**6},
        "mixture": {"datasets": data, "holdout": 0}, "optim": {"batch": key["batch"], **optim},
    }  # fmt: skip


def teach(key: dict, data: Path, teacher: Path, run: Path) -> dict:
    """The teacher: kept beside the runs, for its student."""
    from vla.train import TrainConfig, train

    shutil.rmtree(teacher, ignore_errors=True)
    began = time.perf_counter()
    tree = _run(key, teacher, 150, [{"path": str(data)}], lr=2e-3, warmup=20, ema=0.98)
    train(TrainConfig.model_validate(tree | {"start": {"policy": key["base"]}, "adapter": {"rank": 16, "targets": "all"}}))
    shutil.copytree(teacher, run)
    return measured(run, key, time.perf_counter() - began)


def distilled(key: dict, data: Path, teacher: Path, run: Path) -> dict:
    from vla.distill import DistillConfig, distill
    from vla.policy import load_policy
    from vla.takeover import collect

    began, played = time.perf_counter(), teacher / "played"
    acts = load_policy(teacher, "cpu")
    told = {}
    for i, task in enumerate([key["task"], *key["known"]]):
        told[task] = collect(acts, key["suite"], [task], key["scenes"], 200_000 + 50_000 * i, played / task, labeller=acts,
                             alone=0.0, reach=0.0, workers=1, progress=False)["episodes"]  # fmt: skip
    shares = {str(data): 0.2, str(played / key["task"]): 0.4} | {str(played / k): 0.4 / len(key["known"]) for k in key["known"]}
    tree = _run(key, run, key["steps"], [{"path": path, "weight": share} for path, share in shares.items()], lr=1e-3, ema=0.99)
    distill(DistillConfig.model_validate(tree | {"teacher": {"policy": str(teacher), "cache": str(teacher / "answers")},
                                                 "policy": {"backbone": STUDENT}}))  # fmt: skip
    return measured(run, key, time.perf_counter() - began) | {"played": told}


def scratch(key: dict, data: Path, teacher: Path, run: Path) -> dict:
    from vla.policy import load_policy
    from vla.train import TrainConfig, train

    began = time.perf_counter()
    known = load_policy(key["base"], "cpu").config.model_dump(mode="json")
    same = ("chunk", "execute", "decode", "soft_sigma", "end_weight", "normalization", "prompt", "soft_tokens")
    tree = _run(key, run, key["steps"], [{"path": str(data)}], lr=1e-3, ema=0.99)
    train(TrainConfig.model_validate(tree | {"policy": {"backbone": STUDENT} | {name: known[name] for name in same}}))
    return measured(run, key, time.perf_counter() - began)


if __name__ == "__main__":
    main()
