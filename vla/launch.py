"""From one command to trainer processes and back: the accelerate line, signals, exit codes.

Launchers lose what matters here: `accelerate launch --cpu --num_processes 2` starts one process and says nothing; a
one-process launcher dies of SIGTERM without telling its child; and every failure comes back as 1 under a traceback of the
launcher's own. So `vla train` names a file in TENDON_EXIT_CODE, the trainer writes its code there, and the code is the
command's.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ANSWER = "TENDON_EXIT_CODE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments `vla train` and `accelerate launch -m vla.train` share."""
    parser.add_argument("config", help="a YAML file, or a shipped name such as train/demo")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the file's")
    parser.add_argument("--resume", action="store_true", help="continue from the newest intact checkpoint, if there is one")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="a key that may differ on resume")
    parser.add_argument("--json", action="store_true", help="print the final status as JSON")


def launch(module: str, args: argparse.Namespace, processes: int, threads: int | None) -> int:
    """Print and run `accelerate launch -m MODULE ...`, pass signals on, and return the trainer's exit code."""
    command, environment = launch_line(processes, threads)
    command += ["-m", module, args.config, *args.overrides, *["--resume"] * args.resume, *["--json"] * args.json]
    command += [word for key in args.allow_change for word in ("--allow-change", key)]
    print("$ " + " ".join([*(f"{k}={v}" for k, v in environment.items()), shlex.join(command)]), file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]]
    asked_to_stop = False
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "exit-code"
        # A session of its own: Ctrl-C in a terminal goes to whole groups, and launchers answer it with tracebacks. The
        # trainers are told directly, and save; before they exist, everything is ended.
        child = subprocess.Popen(command, env=os.environ | environment | {ANSWER: str(answer)}, start_new_session=True,
                                 preexec_fn=die_with_launcher)  # fmt: skip

        def forward(number: int, frame: object) -> None:
            nonlocal asked_to_stop
            asked_to_stop = True
            trainers = [int(path.read_text()) for path in Path(folder).glob("pid-*")]
            with contextlib.suppress(ProcessLookupError):
                for pid in trainers:
                    os.kill(pid, number)
                if not trainers:
                    os.killpg(child.pid, signal.SIGKILL)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, forward)
        code = child.wait()
        deadline = time.monotonic() + 60  # a one-process launcher may be gone before its trainer has saved itself
        while asked_to_stop and not answer.is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
        if answer.is_file():
            return int(answer.read_text())
        return 75 if asked_to_stop else code  # stopped before there was anything to save


def launch_line(processes: int, threads: int | None) -> tuple[list[str], dict[str, str]]:
    """The `accelerate launch` command for this machine, and the environment it needs."""
    import torch

    command = ["accelerate", "launch", "--num_processes", str(processes), "--num_machines", "1", "--dynamo_backend", "no",
               "--mixed_precision", "no"]  # fmt: skip
    if processes > 1:
        command += ["--multi_gpu", "--main_process_port", "0"]
    if torch.cuda.is_available():
        return command, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # what deterministic algorithms ask of cuBLAS
    environment = {"ACCELERATE_USE_CPU": "true"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    return command if processes > 1 else [*command, "--cpu"], environment


def answer_launcher(code: int | None, speak: bool) -> int:
    """Leave `code` where `vla train` looks for it, if this process is the one to `speak`; returns its own exit code.

    All processes stopped together and the error is printed, so under `vla train` they exit 0: the launcher would add a
    traceback of its own. `code` None: another process has the error.
    """
    if answer := os.environ.get(ANSWER):
        if speak:
            Path(answer).write_text(str(code))
        return 0
    return 1 if code is None else code


def introduce(rank: int) -> None:
    """Tell `vla train` which process to send signals to."""
    if answer := os.environ.get(ANSWER):
        (Path(answer).parent / f"pid-{rank}").write_text(str(os.getpid()))


class StopSignal:
    """Remembers SIGTERM, SIGINT or SIGUSR1; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.asked, self.name = 0, ""
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def restore(self) -> None:
        """Signals mean again what they meant before: a caller's, and its children's, are not ours to swallow."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked, self.name = 1, signal.Signals(number).name


def die_with_launcher() -> None:
    """Ask Linux for SIGTERM when the parent goes: a one-process launcher dies without telling us."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
