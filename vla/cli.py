"""The command line: one verb per job. The only file of `vla` that may reach `serve` and `data_tools`, and only lazily."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vla
from vla.errors import VLAError

VERBS: dict[str, tuple[str, str, str]] = {
    "doctor": ("vla.doctor", "add_doctor_parser", "look at the machine: versions, devices, video, renderer"),
    "data": ("vla.cli", "_add_data_parser", "record and look at datasets"),
    "train": ("vla.cli", "_add_train_parser", "fine-tune a policy (prints and runs the accelerate line)"),
    "eval": ("vla.evaluate.command", "add_eval_parser", "closed-loop success in a simulator, with matched controls"),
    "report": ("vla.cli", "_add_report_parser", "write a run's report again"),
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
    parser = argparse.ArgumentParser(
        prog="vla", description=vla.__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"tendon-vla {vla.__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    wanted = next((word for word in argv if word in VERBS), None)
    for verb, (module, function, line) in VERBS.items():
        if verb == wanted:  # import only what the verb needs: `vla --help` stays instant
            add: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
            add(subparsers)
        else:
            subparsers.add_parser(verb, help=line)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except VLAError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vla ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _add_data_parser(subparsers: Any) -> None:
    from data_tools.record import add_record_parser
    from data_tools.stats import add_stats_parser

    data = subparsers.add_parser("data", help=VERBS["data"][2], description=VERBS["data"][2])
    jobs = data.add_subparsers(dest="what", metavar="WHAT", required=True)
    add_record_parser(jobs)
    add_stats_parser(jobs)


def _add_train_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train", help=VERBS["train"][2], formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fine-tune a policy. Prints the `accelerate launch` line that does it, and runs it.",
        epilog="examples:\n  vla train configs/smoke/train.yaml\n"
        "  vla train train/demo run.steps=2000 policy.decoding=autoregressive run.out=runs/ar --resume",
    )  # fmt: skip
    parser.add_argument("config", help="a YAML file, or a shipped name such as train/demo")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the file's")
    parser.add_argument("--resume", action="store_true", help="continue from the newest intact checkpoint, if there is one")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="a key that may differ on resume")
    parser.add_argument("--json", action="store_true", help="print the final status as JSON")
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    from vla.config import load_config
    from vla.train import TrainConfig

    config = load_config(args.config, args.overrides, TrainConfig)  # complain here, before anything is launched
    command, environment = launch_line(config.run.processes, config.run.threads)
    command += ["-m", "vla.train", args.config, *args.overrides]
    command += ["--resume"] * args.resume + ["--json"] * args.json
    command += [word for key in args.allow_change for word in ("--allow-change", key)]
    shown = " ".join([*(f"{k}={v}" for k, v in environment.items()), shlex.join(command)])
    print(f"$ {shown}", file=sys.stderr, flush=True)
    return _launch([sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]], environment)


def _launch(command: list[str], environment: dict[str, str]) -> int:
    """Run the launcher, pass signals on, and return the *trainer's* exit code: launchers turn every failure into 1."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "exit-code"
        child = subprocess.Popen(command, env=os.environ | environment | {"TENDON_EXIT_CODE": str(said)})
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: child.send_signal(number))
        code = child.wait()
        for _ in range(300):  # a one-process launcher may be gone before the trainer has saved itself
            if code == 0 or said.is_file():
                break
            time.sleep(0.1)
        return int(said.read_text()) if said.is_file() else code


def launch_line(processes: int, threads: int | None) -> tuple[list[str], dict[str, str]]:
    """The `accelerate launch` command and environment for this machine.

    On a CPU, several processes need `--multi_gpu` together with ACCELERATE_USE_CPU: `--cpu --num_processes 2` starts one
    process and says nothing (accelerate 1.15).
    """
    import torch

    command = ["accelerate", "launch", "--num_processes", str(processes), "--num_machines", "1", "--dynamo_backend", "no",
               "--mixed_precision", "no"]  # fmt: skip
    environment: dict[str, str] = {}
    if processes > 1:
        command += ["--multi_gpu", "--main_process_port", "0"]
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        if processes == 1:
            command.append("--cpu")
    return command, environment


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
