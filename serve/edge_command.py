"""`vla-edge`: an exported policy on this machine, without torch: look at the folder, act once, play episodes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import vla
from serve.edge import EdgePolicy
from serve.loop import percentiles
from serve.robot import Robot, robots_of
from vla.durable import check_place
from vla.errors import DataError, UsageError, exit_code_of
from vla.export_folder import read_export

EXAMPLES = """\
examples:
  vla-edge check exports/student
  vla-edge act exports/student --image front=frame.png --state 0.3,0,0.2,1 --instruction "push the red cube left"
  vla-edge run exports/student --sim tabletop --task push-red-left --episodes 20
  vla-edge run exports/student --sim tabletop --realtime --asynchronous --json
  vla-edge run --server wss://gpu-box:8000 --token-file token --sim tabletop --realtime --asynchronous
"""
_MOST_PIXELS = 50_000_000
_PACKAGES = ("tendon-vla", "onnxruntime", "numpy", "tokenizers", "pillow")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, as `vla` does."""
    args = make_parser().parse_args(argv)
    return exit_code_of(lambda: args.run(args))


def make_parser() -> argparse.ArgumentParser:
    raw: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="vla-edge", description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"tendon-vla {vla.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, function: Any, words: str) -> Any:
        made = verbs.add_parser(name, help=words, description=words, epilog=EXAMPLES, formatter_class=raw)
        many: Any = {"nargs": "?"} if name == "run" else {}
        made.add_argument("folder", type=Path, metavar="FOLDER", help="what `vla export POLICY --to onnx` wrote", **many)
        made.add_argument("--runtime", metavar="GRAPH", help="int8 or float32 (default: what was fastest when it was exported)")
        made.add_argument("--threads", type=int, metavar="N", help="of onnxruntime (default: as exported)")
        made.add_argument("--robot", metavar="NAME", help="which robot's, where the policy knows several")
        made.add_argument("--json", action="store_true", help="print the result as JSON")
        made.set_defaults(run=function)
        return made.add_argument

    add = verb("run", _run, "play episodes in a simulator, through the guard, at the robot's control rate")
    add("--server", metavar="ADDRESS", help="instead of FOLDER: the policy is behind `vla serve` there, loop and guard are here")
    add("--token-file", type=Path, metavar="FILE", help="the server's token, in the first line that is no comment")
    add("--sim", required=True, metavar="SUITE", help="tabletop, metaworld, ... (needs the extra `sim` on this machine)")
    add("--task", action="append", metavar="TASK", help="a task or a group of them; may be repeated (default: the suite's)")
    add("--episodes", type=int, default=20, metavar="N", help="in all, tasks in turn (default %(default)s)")
    add("--seed", type=int, default=900_000, metavar="K", help="of the first scene (default %(default)s)")
    add("--execute", type=int, metavar="N", help="steps of a chunk played before looking again (default: the policy's)")
    add("--ensemble", type=float, metavar="DECAY", help="average overlapping chunks (ACT; 0.01)")
    add("--realtime", action="store_true", help="wait for the clock; otherwise as fast as the machine can")
    add("--asynchronous", action="store_true", help="think while the chunk before is played on; with --realtime")
    add("--jump", action="append", default=[], metavar="CHANNEL=X",
        help="most change a tick (default: a quarter of the range of absolute targets, 0.5 rad of rotations)")  # fmt: skip
    add("--help-below", type=float, default=0.0, metavar="C", help="end an episode whose confidence stays below, 0..1")
    add("--video", type=Path, metavar="FILE.mp4", help="film the first episode")
    add = verb("check", _check, "verify every file, load every graph, measure how long one look takes here")
    add("--runs", type=int, default=200, metavar="N", help="looks measured of each graph (default %(default)s)")
    add = verb("act", _act, "one chunk of actions for pictures and an instruction")
    add("--image", action="append", default=[], metavar="CAMERA=FILE", help="one for each camera")
    add("--instruction", required=True, metavar="TEXT")
    add("--state", metavar="X,Y,...", help="the robot's own state, in its units")
    return parser


# --------------------------------------------------------------------------------------------------------------- check


def _check(args: argparse.Namespace) -> int:
    export = read_export(args.folder)
    size, robots = export.verify(), robots_of(export)
    graphs = export.meaning["graphs"]["policy"]
    measured = {}
    for runtime in [args.runtime] if args.runtime else sorted(graphs, reverse=True):
        began = time.perf_counter()
        policy = EdgePolicy.load(args.folder, runtime, args.threads, verify=False)
        loaded = time.perf_counter()
        robot = args.robot or next(iter(policy.robots))
        observation = _noise(policy.robots[policy.the_robot(robot)], policy)
        policy.act(observation, "go", robot)
        first = time.perf_counter()
        took = []
        for _ in range(max(1, args.runs)):
            start = time.perf_counter()
            policy.act(observation, "go", robot)
            took.append(time.perf_counter() - start)
        measured[runtime] = {"threads": policy.threads, "load_ms": round((loaded - began) * 1e3, 1),
                             "first_look_ms": round((first - loaded) * 1e3, 2), "look_ms": percentiles(took),
                             "bytes": (args.folder / graphs[runtime]).stat().st_size}  # fmt: skip
    meaning = export.meaning
    result = {
        "folder": str(args.folder), "policy": meaning["policy"], "files": len(meaning["files"]), "bytes": size,
        "robots": {k: {"cameras": list(r.cameras), "state": r.names("state"), "action": r.names("action"), "hz": r.control_hz}
                   for k, r in robots.items()},
        "instructions": len(meaning.get("instructions") or []), "runtime": meaning["runtime"], "measured": measured,
        "versions": {p: _version(p) for p in _PACKAGES}, "exported_with": meaning.get("versions") or {},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }  # fmt: skip
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{args.folder}: {len(meaning['files'])} files, {size:,} bytes, all as exported; policy {str(meaning['policy'])[:12]}")
    for name, robot in robots.items():
        state, action = (", ".join(robot.names(part)) for part in ("state", "action"))
        print(f"  robot {name}: {robot.control_hz:g} Hz, cameras {', '.join(robot.cameras)}, state {state} -> {action}")
    for name, one in measured.items():
        took = one["look_ms"]
        print(f"  {name}, {one['threads']} thread(s): a look p50 {took['p50']:.2f} ms, p95 {took['p95']:.2f}, "
              f"p99 {took['p99']:.2f}, max {took['max']:.2f}; loaded in {one['load_ms']:.0f} ms, first look "
              f"{one['first_look_ms']:.1f} ms")  # fmt: skip
    print("  " + ", ".join(f"{p} {v}" for p, v in result["versions"].items()) + f" on {result['machine']}")
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return vla.__version__ if package == "tendon-vla" else "?"


def _noise(robot: Robot, policy: EdgePolicy) -> dict[str, Any]:
    """An observation of noise, frames as large as they were recorded."""
    rng = np.random.default_rng(0)
    images = {c: rng.integers(0, 256, (*robot.sizes[c], 3)).astype(np.uint8) for c in robot.cameras}
    state = policy.folder.normalizers[robot.key]["state"]
    return {"images": images, "state": ((state.low.astype(np.float64) + state.high) / 2).astype(np.float32)}


# ----------------------------------------------------------------------------------------------------------------- act


def _act(args: argparse.Namespace) -> int:
    policy = EdgePolicy.load(args.folder, args.runtime, args.threads)
    robot = policy.the_robot(args.robot)
    observation: dict[str, Any] = {"images": dict(_picture(word) for word in args.image)}
    if args.state is not None:
        try:
            observation["state"] = np.array([float(word) for word in args.state.split(",")], np.float32)
        except ValueError:
            raise UsageError("--state", found=args.state, expected="numbers with commas between them",
                             fix="--state 0.3,0,0.2,1") from None  # fmt: skip
    chunk = policy.act(observation, args.instruction, robot)
    names = policy.robots[robot].names("action")
    if args.json:
        parts = {"actions": chunk.actions, "confidence": np.nan_to_num(chunk.confidence), "symbols": chunk.symbols}
        print(json.dumps({"robot": robot, "names": names, "hz": policy.robots[robot].control_hz,
                          **{name: part.tolist() for name, part in parts.items()}}))  # fmt: skip
        return 0
    print("step  " + "  ".join(f"{name:>14}" for name in names) + "   confidence")
    for i, (action, sure) in enumerate(zip(chunk.actions, chunk.confidence, strict=True)):
        print(f"{i:>4}  " + "  ".join(f"{value:>14.4f}" for value in action) + f"   {float(sure.mean()):.2f}")
    return 0


def _picture(word: str) -> tuple[str, np.ndarray]:
    from PIL import Image

    camera, equals, file = word.partition("=")
    if not equals or not camera:
        raise UsageError(f"--image {word}", found="no camera's name", expected="CAMERA=FILE", fix=f"--image front={word}")
    try:
        with Image.open(file) as picture:
            if picture.width * picture.height > _MOST_PIXELS:  # said by the header, before a byte is decoded
                raise DataError(file, found=f"{picture.width} x {picture.height} pixels", expected=f"at most {_MOST_PIXELS:,}",
                                fix="give the camera's own frame")  # fmt: skip
            return camera, np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(file, found=str(error), expected="a picture", fix="give a PNG or JPEG file") from error


# ----------------------------------------------------------------------------------------------------------------- run


def _run(args: argparse.Namespace) -> int:
    from serve.edge_sim import Settings, play  # with --sim, and only then, the simulators and what they need

    if args.asynchronous and not args.realtime:
        raise UsageError("--asynchronous", found="no --realtime", expected="a clock to think beside", fix="add --realtime")
    if (args.folder is None) == (args.server is None) or (args.server and (args.runtime or args.threads)):
        raise UsageError("vla-edge run", found=f"folder {args.folder}, server {args.server}, runtime {args.runtime}, threads "
                         f"{args.threads}", expected="a folder, with --runtime and --threads; or a server, without",
                         fix="vla-edge run FOLDER ..., or vla-edge run --server ADDRESS ...")  # fmt: skip
    if not 0 <= args.help_below <= 1:
        raise UsageError("--help-below", found=args.help_below, expected="a confidence, 0 to 1", fix="--help-below 0.2")
    if args.video is not None:
        if os.path.lexists(args.video):
            raise UsageError("--video", found=f"{args.video}, which is there already", expected="a new file",
                             fix="remove it, or name another")  # fmt: skip
        check_place(args.video, "--video")
    settings = Settings(args.sim, args.task, args.episodes, args.seed, args.execute, args.ensemble, args.realtime,
                        args.asynchronous, _jumps(args.jump), args.help_below, args.video, args.robot)  # fmt: skip
    with contextlib.ExitStack() as opened:
        policy = (
            EdgePolicy.load(args.folder, args.runtime, args.threads)
            if args.server is None
            else opened.enter_context(_there(args))
        )
        result = play(policy, settings, None if args.json else _say)
    if args.json:
        print(json.dumps(result))
        return 0
    loop = result["loop"]
    took = loop["inference_ms"]
    print(f"success {result['successes']}/{result['n']} = {100 * result['rate']:.0f} % "
          f"({100 * result['low']:.0f}..{100 * result['high']:.0f}, Wilson 95 %)")  # fmt: skip
    why = "".join(f", {n} x {reason}" for reason, n in loop["reasons"].items())
    where = result.get("server") or f"{result['runtime']}, {result['threads']} thread(s)"
    print(f"{where}: inference p50 {took['p50']:.2f} ms, p99 {took['p99']:.2f}; "
          f"{loop['holds']} of {loop['ticks']} ticks held{why}")  # fmt: skip
    if args.realtime:
        print(f"rate {loop['rate_hz']:.2f} of {loop['hz']:g} Hz; woke late p50 {loop['late_ms']['p50']:.2f} ms, "
              f"p99 {loop['late_ms']['p99']:.2f}, max {loop['late_ms']['max']:.2f}; jitter between actions p99 "
              f"{loop['jitter_ms']['p99']:.2f} ms; {loop['missed']} ticks missed")  # fmt: skip
    return 0


def _there(args: argparse.Namespace) -> Any:
    """The policy behind `--server`."""
    from serve.client import Client

    token = None
    if args.token_file is not None:
        try:
            lines = [line.strip() for line in args.token_file.read_text().splitlines()]
            token = next(line for line in lines if line and not line.startswith("#")).removeprefix("admin:")
        except (OSError, UnicodeDecodeError, StopIteration) as error:
            raise UsageError(args.token_file, found=str(error) or "no token", expected="a file with a token",
                             fix="--token-file FILE, the server's own will do") from None  # fmt: skip
    return Client(args.server, token, robot=args.robot)


def _say(line: str) -> None:
    print(line, flush=True)


def _jumps(words: Sequence[str]) -> Mapping[str, float]:
    try:
        return {name: float(value) for name, _, value in (word.partition("=") for word in words)}
    except ValueError:
        raise UsageError("--jump", found=" ".join(words), expected="CHANNEL=NUMBER", fix="--jump left_arm=0.1") from None
