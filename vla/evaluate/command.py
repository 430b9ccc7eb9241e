"""`vla eval`: closed-loop success of a policy, with controls, as a table, a JSON file and films."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vla.ensemble import DECAY
from vla.errors import UsageError
from vla.evaluate import CONDITIONS, REPORT_SEED, evaluate, text_table
from vla.evaluate.curve import CURVE_SEED, curve_table, success_curve
from vla.evaluate.demos import demos_of
from vla.evaluate.jobs import check_conditions
from vla.sims import expand_tasks

EXAMPLE = """\
examples:
  vla eval runs/demo --suite tabletop --episodes 200
  vla eval runs/demo --suite metaworld --task button-press-topdown-v3 --episodes 50 --conditions policy,replay,expert
  vla eval runs/demo/policy --suite tabletop --task push --decode argmax --execute 2 --out argmax.json --json
  vla eval runs/demo --suite tabletop --curve --episodes 20

conditions:
""" + "\n".join(f"  {name:9} {meaning}" for name, meaning in CONDITIONS.items())


def add_eval_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the verb `eval` to an argparse subparsers object; `run` carries it out."""
    parser = subparsers.add_parser(
        "eval", help="closed-loop success of a policy in a simulator, with matched controls",
        description="Play fresh episodes in a simulator; report success with Wilson 95 % intervals beside matched controls.",
        epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("policy", metavar="POLICY", help="a run folder or a policy folder")
    add("--suite", required=True, help="tabletop or metaworld")
    add("--task", nargs="+", action="extend", metavar="T", help="tasks or groups such as `push` (default: the suite's)")
    add("--episodes", type=int, default=50, metavar="N",
        help="episodes per group: a tabletop verb, a Meta-World task (default 50)")  # fmt: skip
    add("--seed", type=int, metavar="K", help=f"first seed (default {REPORT_SEED}, with --curve {CURVE_SEED}: for choosing)")
    add("--out", type=Path, metavar="FILE.json", help="result file (default: eval/SUITE.json in the run folder)")
    add("--conditions", metavar="A,B", help="which rows of the table, see below (default: all)")
    add("--decode", choices=("mean", "argmax", "sample"), help="how symbols become actions (default: the policy's)")
    add("--execute", type=int, metavar="k", help="steps of a chunk to play before looking again (default: the policy's)")
    add("--ensemble", type=float, nargs="?", const=DECAY, metavar="DECAY",
        help=f"average overlapping chunks as ACT does (decay {DECAY} unless given); needs --execute below the chunk")  # fmt: skip
    add("--workers", type=int, metavar="W", help="simulator processes (default: one per core)")
    add("--json", action="store_true", help="print the result as JSON instead of a table")
    add("--no-clips", action="store_true", help="record no films")
    add("--curve", action="store_true", help="instead: the policy alone, at every checkpoint of a run, on validation scenes")
    parser.set_defaults(run=run)
    return parser


def run_folder(path: Path) -> Path | None:
    """The run folder a policy path belongs to, or None for a policy folder on its own."""
    if (path / "policy").is_dir() and (path / "config.yaml").is_file():  # not a checkpoint's folder, which has no config
        return path
    return path.parent if path.name == "policy" and (path.parent / "config.yaml").is_file() else None


def run(args: argparse.Namespace) -> int:
    """Carry out `vla eval`; 0 when the evaluation was made, whatever it found."""
    expand_tasks(args.suite, args.task)
    path = Path(args.policy)
    folder = run_folder(path)
    if args.curve:
        return _run_curve(args, folder or path)
    names = list(CONDITIONS) if args.conditions is None else args.conditions.split(",")
    conditions = check_conditions([name.strip() for name in names if name.strip()])
    from vla.policy import load_policy  # the only heavy import, after the arguments are known to be sound

    policy = load_policy(path)
    out = args.out or (folder / "eval" / f"{args.suite}.json" if folder else None)
    demos = demos_of([d["path"] for d in policy.provenance.get("datasets", [])]) if "replay" in conditions else None
    results = evaluate(
        policy, args.suite, args.task, args.episodes, REPORT_SEED if args.seed is None else args.seed, conditions,
        execute=args.execute, decode=args.decode, out=out, workers=args.workers, demos=demos,
        clips=0 if args.no_clips else 8, progress=not args.json, ensemble=args.ensemble,
    )  # fmt: skip
    print(json.dumps(results) if args.json else text_table(results))
    places = [f"results {out}"] if out else []
    if folder:
        from vla.report import write_report

        places.append(f"report  {write_report(folder)}")
    print("\n".join(places), file=sys.stderr if args.json else sys.stdout)
    return 0


def _run_curve(args: argparse.Namespace, folder: Path) -> int:
    others = (("--conditions", args.conditions), ("--out", args.out), ("--ensemble", args.ensemble))
    given = [name for name, value in others if value is not None]
    if given:
        raise UsageError("vla eval --curve", found=" and ".join(given),
                         expected="none of them: a curve is of the condition `policy`, kept in eval/curve.jsonl of the run",
                         fix=f"drop {' and '.join(given)}, or drop --curve")  # fmt: skip
    from vla.report import write_report

    lines = success_curve(folder, args.suite, args.task, args.episodes, CURVE_SEED if args.seed is None else args.seed,
                          execute=args.execute, decode=args.decode, workers=args.workers,
                          progress=not args.json)  # fmt: skip
    print(json.dumps(lines) if args.json else curve_table(lines))
    print(f"report  {write_report(folder)}", file=sys.stderr if args.json else sys.stdout)
    return 0
