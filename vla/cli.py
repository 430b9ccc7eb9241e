"""The command line: one verb per job. The only file of `vla` that may reach `serve` and `data_tools`, and only lazily."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vla
from vla.errors import exit_code_of

VERBS: dict[str, tuple[str, str, str]] = {
    "doctor": ("vla.doctor", "add_doctor_parser", "look at the machine: versions, devices, video, renderer"),
    "data": ("vla.cli", "_add_data_parser", "record, convert, check, mix and look at datasets"),
    "train": ("vla.cli", "_add_train_parser", "fine-tune a policy (prints and runs the accelerate line)"),
    "distill": ("vla.cli", "_add_distill_parser", "a small student from a large teacher (prints and runs the accelerate line)"),
    "eval": ("vla.evaluate.command", "add_eval_parser", "closed-loop success in a simulator, with matched controls"),
    "students": ("vla.students.command", "add_students_parser", "sizes of small policies; one that fits a latency budget here"),
    "prune": ("vla.students.prune", "add_prune_parser", "a policy with fewer layers, to distil from there"),
    "merge": ("vla.merge", "add_merge_parser", "fold an adapter into its base"),
    "report": ("vla.cli", "_add_report_parser", "write a run's report again"),
    "serve": ("serve.command", "add_serve_parser", "a policy behind HTTP and WebSockets"),
    "plan": ("serve.plan_command", "add_plan_parser", "what to do next towards a goal"),
    "operate": ("serve.operate_command", "add_operate_parser", "watch a policy at work, and answer it when it asks"),
    "handoff": ("vla.handoff.command", "add_handoff_parser", "when to stop and ask: detectors of failure with kept promises"),
    "push": ("vla.push", "add_push_parser", "share a policy or a dataset, with a card made of facts"),
    "export": ("vla.export", "add_export_parser", "a policy in another program's layout"),
}
"""verb -> (module, function that adds its parser, one line for the overview)."""

EXAMPLES = """\
the main job, from nothing to a report:
  vla data record --suite tabletop --episodes 3600 --seed 0 --out data/tabletop
  vla train configs/train/demo.yaml
  vla eval runs/demo --suite tabletop --episodes 200
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns its exit code (0 ok, 2 usage, 3 data, 4 checkpoint, 5 machine, 6 diverged, 75 preempted)."""
    argv = sys.argv[1:] if argv is None else argv
    if not sys.stderr.isatty():  # progress in a file: a line now and then, not ten a second
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    parser = argparse.ArgumentParser(
        prog="vla", description=vla.__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"tendon-vla {vla.__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    wanted = next((word for word in argv if word in VERBS), None)
    setattr(subparsers, "words", argv)  # noqa: B010  for `data`, whose own verbs are imported as lazily
    for verb, (module, function, line) in VERBS.items():
        if verb == wanted:  # import only what the verb needs: `vla --help` stays instant
            add: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
            add(subparsers)
        else:
            subparsers.add_parser(verb, help=line)
    args, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(args, "overrides") and all(re.match(r"[\w.]+=", word) for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides after an option: argparse takes them for strangers
        args.overrides = [*args.overrides, *rest]
    return exit_code_of(lambda: args.run(args))


DATA_VERBS: dict[str, tuple[str, str]] = {
    "record": ("data_tools.record", "record a simulator's scripted expert as a LeRobot v3.0 dataset"),
    "convert": ("data_tools.convert", "bring LeRobot v2.x, RLDS or HDF5 data to LeRobot v3.0, or v3.0 to v2.1"),
    "check": ("data_tools.check", "find what is wrong with a dataset, before it is trained on"),
    "report": ("data_tools.report", "one HTML file to judge a dataset from"),
    "segment": ("data_tools.segment", "cut episodes into subtasks: language columns in a new dataset"),
    "plan-pairs": ("data_tools.plan_pairs", "questions for a planner with their answers, out of episodes with subtasks"),
    "questions": ("data_tools.questions", "render scenes with questions and answers about them"),
    "stats": ("data_tools.stats", "show, recompute or compare statistics"),
    "tokenizer": ("data_tools.tokenizer", "fit action symbols (FAST, residual VQ) on recorded chunks"),
    "mixture": ("vla.preview", "print what a training config will draw"),
    "bench": ("data_tools.bench", "samples per second, waiting time and the decode floor"),
}
"""`vla data` verb -> (module with `add_<verb>_parser`, one line for the overview)."""


def _add_data_parser(subparsers: Any) -> None:
    data = subparsers.add_parser("data", help=VERBS["data"][2], description=VERBS["data"][2])
    jobs = data.add_subparsers(dest="what", metavar="WHAT", required=True)
    wanted = next((word for word in subparsers.words if word in DATA_VERBS), None)
    for verb, (module, line) in DATA_VERBS.items():
        if verb == wanted:
            getattr(importlib.import_module(module), f"add_{verb.replace('-', '_')}_parser")(jobs)
        else:
            jobs.add_parser(verb, help=line)


def _add_train_parser(subparsers: Any) -> None:
    _add_launched(
        subparsers, "train", "Fine-tune a policy. Prints the `accelerate launch` line that does it, and runs it.",
        "examples:\n  vla train configs/smoke/train.yaml\n"
        "  vla train train/demo run.steps=2000 policy.decoding=autoregressive run.out=runs/ar --resume",
    )  # fmt: skip


def _add_distill_parser(subparsers: Any) -> None:
    _add_launched(
        subparsers, "distill",
        "Distil a teacher into a student. Prints the `accelerate launch` line that does it, and runs it.",
        "examples:\n  vla distill configs/smoke/distill.yaml\n"
        "  vla distill distill/demo teacher.policy=runs/teacher policy.backbone.layers=6 run.out=runs/student --resume",
    )  # fmt: skip


def _add_launched(subparsers: Any, verb: str, description: str, examples: str) -> None:
    """A verb that is a configuration handed to `accelerate launch -m vla.VERB`."""
    from vla.launch import add_arguments

    parser = subparsers.add_parser(verb, help=VERBS[verb][2], formatter_class=argparse.RawDescriptionHelpFormatter,
                                   description=description, epilog=examples)  # fmt: skip
    add_arguments(parser)
    parser.add_argument("--no-check", action="store_true", help="do not look for faults in the datasets first")
    parser.set_defaults(run=_launch)


def _launch(args: argparse.Namespace) -> int:
    from vla.config import load_config
    from vla.launch import launch
    from vla.train import TrainConfig, processes

    kind = TrainConfig
    if args.verb == "distill":
        from vla.distill import DistillConfig as kind
    config = load_config(args.config, args.overrides, kind)  # complain here, before anything is launched
    if not args.no_check:
        _preflight(config)
    return launch(f"vla.{args.verb}", args, processes(config), config.run.threads)


def _preflight(config: Any) -> None:
    """`vla data check --no-frames` on every local dataset of a config: errors refuse, warnings are counted."""
    from data_tools.check import check_all
    from vla.errors import DataError
    from vla.mixture import all_datasets, recorded_as

    # What is on the Hub, or not there, is opened later and says so then.
    here = [e for e in all_datasets(config.mixture)[0] if (Path(e.path) / "meta" / "info.json").is_file()]
    groups = [([e.path for e in here if not e.embodiment], None)]  # together: leaks and contradictions between datasets
    groups += [([e.path], recorded_as(e)[0]) for e in here if e.embodiment]
    found = [finding for paths, spec in groups if paths
             for finding in check_all(paths, frames=False, embodiment=spec, holdout=config.mixture.holdout)]  # fmt: skip
    errors = [f"{f.root}: {f.place}: {f.found} ({f.code})" for f in found if f.severity == "error"]
    for path in dict.fromkeys(f.root for f in found if f.severity == "warning"):
        warnings = sum(f.severity == "warning" and f.root == path for f in found)
        print(f"{path}: {warnings} warning(s); vla data check {path}", file=sys.stderr)
    if errors:
        more = f"\n    and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise DataError("the datasets, before the first step", found="\n    ".join(errors[:20]) + more, expected="no faults",
                        fix="`vla data check DIR` says how to mend each; --no-check trains on them as they are")  # fmt: skip


def _add_report_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "report", help=VERBS["report"][2], description="One self-contained HTML file from whatever a run folder holds.",
        epilog="example: vla report runs/demo", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("path", metavar="RUN", help="a run folder")
    parser.add_argument("--json", action="store_true", help="print the path as JSON")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    import json

    from vla.report import write_report

    path = write_report(Path(args.path))
    print(json.dumps({"report": str(path)}) if args.json else f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
