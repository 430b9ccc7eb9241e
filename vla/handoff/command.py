"""`vla handoff`: collect, calibrate, report, watch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vla.durable import check_place, replace_file
from vla.errors import UsageError
from vla.handoff.trouble import TROUBLES

EXAMPLE = """\
examples:
  vla handoff collect runs/demo --suite tabletop --task touch push --episodes 800 --seed 500000 --out runs/handoff/train
  vla handoff collect runs/demo --suite tabletop --task touch push --episodes 400 --seed 600000 --out runs/handoff/calibrate
  vla handoff calibrate runs/demo --train runs/handoff/train --calibrate runs/handoff/calibrate --alpha 0.1
  vla handoff collect runs/demo --suite tabletop --task touch push --episodes 400 --seed 900000 --relief --out runs/handoff/report
  vla handoff report runs/demo --rollouts runs/handoff/report --train runs/handoff/train --leave-out touch push --svg curve.svg
  vla handoff watch runs/demo --suite tabletop --episodes 40 --out data/incidents

what can go wrong (--perturb):
""" + "\n".join(f"  {name:11} {what}" for name, what in TROUBLES.items())


def add_handoff_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the verb `handoff` to an argparse subparsers object."""
    parser = subparsers.add_parser(
        "handoff", help="when to stop and ask: detectors of failure, thresholds that keep a promise, what they are worth",
        description="Detectors of failure for a policy, with split-conformal thresholds: how often a good episode is stopped "
        "is chosen, and kept as long as circumstances are those it was calibrated in.",
        epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    jobs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    _add_collect(jobs)
    _add_calibrate(jobs)
    _add_report(jobs)
    _add_watch(jobs)
    return parser


def _job(jobs: Any, name: str, line: str, work: Any, example: str) -> Any:
    parser = jobs.add_parser(name, help=line, description=line, epilog=f"example: vla handoff {example}",
                             formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("policy", metavar="POLICY", help="a run folder or a policy folder")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=work)
    return parser.add_argument


def _played(add: Any) -> None:
    add("--suite", required=True, help="a simulator, e.g. tabletop")
    add("--task", nargs="+", action="extend", metavar="T", help="tasks or groups such as `push` (default: the suite's)")
    add("--perturb", nargs="+", default=["all"], metavar="KIND", help="what goes wrong, one kind an episode (default: all)")
    add("--execute", type=int, metavar="k", help="steps of a chunk to play before looking again (default: the policy's)")
    add("--decode", choices=("mean", "argmax", "sample"), help="how symbols become actions (default: the policy's)")


def _add_collect(jobs: Any) -> None:
    add = _job(jobs, "collect", "play episodes in which something goes wrong, and note every look", _collect,
               "collect runs/demo --suite tabletop --episodes 400 --out runs/handoff/train")  # fmt: skip
    _played(add)
    add("--episodes", type=int, default=400, metavar="N", help="in all (default 400)")
    add("--seed", type=int, default=500_000, metavar="K", help="first seed (default 500000; 900000 and up for reports)")
    add("--samples", type=int, default=8, metavar="S", help="draws of each chunk, for detectors that compare them (default 8)")
    add("--relief", action="store_true", help="find out as well whether the scripted expert would succeed from each look on")
    add("--out", type=Path, required=True, metavar="DIR", help="where the tables go")


def _add_calibrate(jobs: Any) -> None:
    add = _job(jobs, "calibrate", "fit detectors, make thresholds, and put both into the policy's folder", _calibrate,
               "calibrate runs/demo --train runs/handoff/train --calibrate runs/handoff/calibrate --alpha 0.1")  # fmt: skip
    add("--train", type=Path, nargs="+", metavar="DIR", help="collections to fit detectors to (default: none are fitted)")
    add("--calibrate", type=Path, nargs="+", required=True, metavar="DIR", help="collections whose successes make the thresholds")
    add("--alpha", "--rate", type=float, default=0.1, metavar="A", help="questions per successful episode, at most (default 0.1)")
    add("--score", metavar="NAME", help="the detector (default: the one that does best on --train)")


def _add_report(jobs: Any) -> None:
    add = _job(jobs, "report", "what detectors and thresholds are worth on further episodes", _report,
               "report runs/demo --rollouts runs/handoff/report --out handoff.json --svg handoff.svg")  # fmt: skip
    add("--rollouts", type=Path, nargs="+", required=True, metavar="DIR", help="collections made with --relief")
    add("--train", type=Path, nargs="+", metavar="DIR", help="the collections detectors were fitted to, for --leave-out")
    add("--leave-out", nargs="+", default=[], metavar="WORD", help="verbs, colours, troubles: fitted without, judged on it")
    add("--out", type=Path, metavar="FILE.json", help="the figures")
    add("--svg", type=Path, metavar="FILE.svg", help="success against questions, drawn")


def _add_watch(jobs: Any) -> None:
    add = _job(jobs, "watch", "play with the gate on: the scripted expert answers, and what happened around it becomes a dataset",
               _watch, "watch runs/demo --suite tabletop --episodes 40 --out data/incidents")  # fmt: skip
    _played(add)
    add("--episodes", type=int, default=40, metavar="N", help="in all (default 40)")
    add("--seed", type=int, default=700_000, metavar="K", help="first seed (default 700000)")
    add("--respond", nargs="+", metavar="SAY=RATE", help="ask, hold and retreat, each with its rate (default: ask, at "
        "the calibrated rate)")  # fmt: skip
    add("--score", metavar="NAME", help="the detector (default: the calibrated one)")
    add("--seconds", type=float, default=5.0, metavar="S", help="kept from before an incident (default 5)")
    add("--out", type=Path, required=True, metavar="DIR", help="the dataset; what the expert did goes to DIR-corrections")


def responses(given: list[str] | None) -> dict[str, float] | None:
    """`["ask=0.1", "hold=0.02"]` as a mapping; the gate judges what it says."""
    if not given:
        return None
    found: dict[str, float] = {}
    for text in given:
        say, _, rate = text.partition("=")
        try:
            found[say] = float(rate)
        except ValueError:
            raise UsageError("--respond", found=text, expected="RESPONSE=RATE", fix="--respond ask=0.1 hold=0.02") from None
    return found


def _collect(args: argparse.Namespace) -> int:
    from vla.handoff.collecting import collect
    from vla.policy import load_policy

    check_place(args.out)
    found = collect(load_policy(args.policy), args.suite, args.task, args.episodes, args.seed, perturb=args.perturb,
                    execute=args.execute, decode=args.decode, samples=args.samples, relief=args.relief, out=args.out,
                    progress=not args.json)  # fmt: skip
    facts = {"out": str(args.out), "episodes": len(found), "successes": int(found.success.sum()), "looks": len(found.step),
             "seconds": found.meta["wall_s"]}  # fmt: skip
    words = (
        f"{facts['successes']} of {facts['episodes']} episodes succeed, {facts['looks']} looks, {facts['seconds']} s: {args.out}"
    )
    print(json.dumps(facts) if args.json else words)
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from vla.handoff.calibrating import calibrate, calibrated_text
    from vla.handoff.gate import FILE, folder_of, read_handoff
    from vla.handoff.rollouts import load

    meaning = calibrate(args.policy, load(args.train) if args.train else None, load(args.calibrate), args.alpha, args.score)
    says = read_handoff(args.policy).says()
    if args.json:
        scores = {name: {k: v for k, v in entry.items() if k != "successes"} for name, entry in meaning["scores"].items()}
        print(json.dumps({**meaning, "scores": scores, "says": says}))
    else:
        print(f"{calibrated_text(meaning, says)}\n{folder_of(args.policy) / FILE}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from vla.evaluate import write_json
    from vla.handoff.gate import read_handoff
    from vla.handoff.report import draw, report, report_text
    from vla.handoff.rollouts import load

    if args.leave_out and not args.train:
        raise UsageError("--leave-out", found="no --train", expected="what detectors are to be fitted to", fix="--train DIR")
    found = report(load(args.rollouts), read_handoff(args.policy), load(args.train) if args.train else None, args.leave_out)
    if args.out:
        write_json(args.out, found)
    if args.svg:
        replace_file(args.svg, draw(found))
    print(json.dumps(found) if args.json else report_text(found))
    return 0


def _watch(args: argparse.Namespace) -> int:
    from vla.handoff.watch import watch
    from vla.policy import load_policy

    check_place(args.out)
    found = watch(load_policy(args.policy), args.policy, args.suite, args.task, args.episodes, args.seed, out=args.out,
                  perturb=args.perturb, respond=responses(args.respond), score=args.score, execute=args.execute,
                  decode=args.decode, seconds=args.seconds, progress=not args.json)  # fmt: skip
    print(json.dumps(found) if args.json else "\n".join(f"{name:12} {value}" for name, value in found.items()))
    return 0
