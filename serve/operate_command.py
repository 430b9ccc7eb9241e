"""`vla operate STUDENT --sim SUITE`: a station: a policy at work, its planner, and you, who are asked when it is not sure."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

from vla.errors import MachineError, UsageError

_ASKED = 0.3
"""Seconds between two questions whether it is finished, where a policy is asked."""
_EXAMPLES = """\
examples:
  vla operate models/nano-base --sim tabletop-long                 then open the address it prints
  vla operate runs/demo --sim tabletop --handoff ask=0.1,hold=0.02 --trouble occlusion
  vla operate expert --sim tabletop-long --handoff drill=20        nothing to load; asks every 20 looks, to practise
  vla operate http://gpu-box:8000 --student-token-file token --sim tabletop-long --planner server --progress policy
  vla operate exports/student --sim tabletop-long --planner http://gpu-box:8000 --progress policy       plans there, acts here
  vla operate exports/student --sim tabletop --host 0.0.0.0 --token-file tokens --incidents data/incidents

A robot of your own: a few lines of Python around serve.station.Station, docs/operating.md
"""


def add_operate_parser(subparsers: Any) -> None:
    """`vla operate`."""
    parser = subparsers.add_parser(
        "operate", help="watch a policy at work, and answer it", description=__doc__, epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("student", metavar="STUDENT", help="a policy folder, a run, an export folder, the address of a `vla serve`, or expert")
    add("--sim", required=True, metavar="SUITE", help="tabletop, tabletop-long, metaworld, ...")
    add("--task", action="append", metavar="GOAL", help="a task, a group or its sentence, offered first; may be repeated")
    add("--start", action="store_true", help="begin the first run at once, towards the first goal")
    add(
        "--seed", type=int, default=900_000, metavar="K", help="of the first scene; each run takes the next (default %(default)s)"
    )
    add("--planner", metavar="KIND", help="simulator (its own plan of the scene, the default), policy, server (that of "
        "STUDENT), http://HOST:PORT (a `vla serve --planner ...`), scripted:FILE or openai:URL")  # fmt: skip
    add("--planner-model", metavar="NAME", default="default", help="of openai:URL, which model is asked")
    add("--planner-key-file", type=Path, metavar="FILE", help="of openai:URL or http://..., the key in the first line of a file")
    add("--progress", choices=("simulator", "policy"), default="simulator", help="who says that an instruction is finished; "
        "policy: whichever speaks, here or where it plans (default %(default)s)")  # fmt: skip
    add("--handoff", default="auto", metavar="HOW", help="auto (by handoff.json beside the policy), off, drill=N, or responses "
        "with their rates: ask=0.1,hold=0.02,retreat=0.005 (default %(default)s)")  # fmt: skip
    add("--handoff-folder", type=Path, metavar="DIR", help="where handoff.json lies, if not beside the policy")
    add("--incidents", type=Path, metavar="DIR", help="what happened around hand-offs, holds and failures, corrections and "
        "answers (default runs/incidents/ROBOT)")  # fmt: skip
    add("--trouble", default="none", metavar="KIND", help="something goes wrong in every scene: occlusion, noise, brightness, "
        "shift, gain, physics, shove")  # fmt: skip
    add("--execute", type=int, metavar="N", help="steps of a chunk played before looking again (default: the policy's)")
    add("--speed", type=float, default=1.0, metavar="X", help="times real time; 0: as fast as it goes (default %(default)s)")
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine only)")
    add("--port", type=int, default=8010, help="0: any that is free (default %(default)s)")
    add("--token-file", type=Path, metavar="FILE", help="one token a line; needed to listen beyond this machine")
    add("--student-token-file", type=Path, metavar="FILE", help="the token for the server of STUDENT, in its first line")
    add("--origin", action="append", default=[], metavar="URL", help="a page elsewhere that may call")
    add("--robot", help="of a server that knows several")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--json", action="store_true", help="print the address, and at the end what was done, as JSON")
    parser.set_defaults(run=_operate)


def _operate(args: argparse.Namespace) -> int:
    try:
        from serve.station_app import Where, serve
    except ImportError as error:
        raise MachineError("vla operate", found=str(error), expected="the packages of the server and the simulators",
                           fix='pip install "tendon-vla[serve,sim]"') from error  # fmt: skip
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    if args.speed < 0 or not 0 <= args.port <= 65535:
        raise UsageError("vla operate", found=f"--speed {args.speed:g}, --port {args.port}",
                         expected="a speed of 0 or more, a port", fix="leave them out")  # fmt: skip
    with contextlib.ExitStack() as opened:
        station = opened.enter_context(_station(args, opened))

        def ready(address: str) -> None:
            words = f"{address}  {station.name} on {args.sim}; Ctrl-C ends it"
            print(json.dumps({"address": address, "name": station.name}) if args.json else words, flush=True)
            if args.start:
                station.run(station.stage.goals[0])

        asyncio.run(serve(station, Where(args.host, args.port, args.token_file, tuple(args.origin)), ready))
        station.close()
        said = station.snapshot()
    done = {"runs": said["run"]["number"], "questions": station.asked, "incidents": said["incidents"]}
    kept = said["incidents"]
    words = (f"{done['runs']} runs, {done['questions']} questions; {kept['written']} incidents, {kept['corrections']} corrections"
             f" in {kept['folder']}" + (f", {kept['lost']} lost" if kept["lost"] else ""))  # fmt: skip
    print(json.dumps(done) if args.json else words, file=sys.stdout if args.json else sys.stderr, flush=True)
    return 0


def _station(args: argparse.Namespace, opened: contextlib.ExitStack) -> Any:
    from serve.edge_sim import Settings, make_guard
    from serve.operate_student import EXPERT, Inside, gate_of, student_of
    from serve.robot import Robot, differences
    from serve.station import Station
    from serve.station_sim import SimStage, clock_of
    from vla.embodiment import load_embodiment
    from vla.handoff.incidents import Recorder
    from vla.sims import expand_tasks, find_suite

    suite = find_suite(args.sim)
    spec = load_embodiment(suite.embodiment)
    sentences: dict[str, str] = {suite.instruction(task): task for task in suite.known}
    tasks = expand_tasks(args.sim, [sentences.get(task) or task for task in args.task]) if args.task else []
    there = Robot.from_json(spec.model_dump(mode="json"), f"embodiment {suite.embodiment!r}")
    token = _token(args.student_token_file, args.student) if "://" in args.student else None
    student = student_of(args.student, device=args.device, token=token, robot=args.robot)
    if student.close is not None:
        opened.callback(student.close)
    robot = student.robots.get(there.key) if student.robots else there
    if args.student == EXPERT and not args.sim.startswith("tabletop"):
        raise UsageError("vla operate expert", found=f"--sim {args.sim}", expected="a tabletop", fix="--sim tabletop-long")
    if robot is None or (wrong := differences(there, robot)):
        found = f"robots {sorted(student.robots)}" if robot is None else "; ".join(wrong)
        raise UsageError("vla operate", found=found, expected=f"{there.key!r}, the robot of --sim {args.sim}",
                         fix="choose the suite the policy was trained for")  # fmt: skip
    size = max(max(sizes) for sizes in robot.sizes.values())
    stage = SimStage(
        args.sim, robot, tasks=tasks, seed=args.seed, size=size, trouble=args.trouble, known=student.instructions,
        planner=_planner(args, student), progress=_progress(args, student, robot),
        on_sim=(lambda sim: setattr(student.acts, "sim", sim)) if args.student == EXPERT else None,
    )  # fmt: skip
    gate = gate_of(student, args.handoff, args.handoff_folder)
    folder = args.incidents or Path("runs/incidents") / robot.key.replace("/", "-")
    cameras = {name: camera.model_copy(update={"height": size, "width": size}) for name, camera in spec.cameras.items()}
    recorder = Recorder(folder / "incidents", spec.model_copy(update={"cameras": cameras}), corrections=folder / "corrections",
                        header={"suite": args.sim})  # fmt: skip
    thinks = args.speed > 0 and args.student != EXPERT  # an expert's look is of this very tick, and takes no time
    if isinstance(student.acts, Inside):
        import torch

        torch.set_num_threads(1)  # the control loop needs a core as well
    return Station(
        student.acts, stage, make_guard(student.acts, robot, Settings(args.sim)), gate=gate, recorder=recorder,
        answers=folder / "answers.jsonl", name=student.name, asynchronous=thinks, execute=args.execute,
        clock=clock_of(args.speed),
    )  # fmt: skip


def _token(path: Path | None, address: str) -> str | None:
    from serve.asking import bearer

    return bearer(path, address, "token")["Authorization"].partition(" ")[2] if path is not None else None


def _planner(args: argparse.Namespace, student: Any) -> Any:
    """(world) -> planner; None for the simulator's own plan. Raises `UsageError`."""
    kind = args.planner or "simulator"
    if kind == "simulator":
        return None
    if (where := _server(args)) is not None:
        from serve.remote_planner import ServerPlanner

        asked = ServerPlanner(*where, robot=args.robot, known=student.instructions)
        return lambda world: asked
    if kind == "policy":
        from serve.planner import PolicyPlanner

        if student.speaker is None:
            raise UsageError("--planner policy", found=f"{args.student}, which does not speak", expected="a policy folder",
                             fix="leave it out, or openai:URL")  # fmt: skip
        spoken = PolicyPlanner(student.speaker, student.instructions)
        return lambda world: spoken
    from pydantic import ValidationError

    from serve.planning import planner_of
    from serve.settings import PlannerSettings

    try:
        settings = PlannerSettings(kind=kind, model=args.planner_model, key_file=args.planner_key_file)
    except ValidationError:
        raise UsageError("--planner", found=kind, expected="simulator, policy, server, scripted:FILE or openai:URL",
                         fix="leave it out") from None  # fmt: skip
    planner = planner_of(settings, lambda: tuple(student.instructions))
    return lambda world: planner


def _server(args: argparse.Namespace) -> tuple[str, Path | None] | None:
    """(address of the `vla serve` that plans, file of its token); None where another plans. Raises `UsageError`."""
    if args.planner == "server":
        if "://" not in args.student:
            raise UsageError("--planner server", found=f"STUDENT {args.student}", expected="the address of a `vla serve`",
                             fix="--planner policy, or --planner http://HOST:PORT")  # fmt: skip
        return args.student, args.student_token_file
    if (args.planner or "").startswith(("http://", "https://", "ws://", "wss://")):
        return args.planner, args.planner_key_file
    return None


def _progress(args: argparse.Namespace, student: Any, robot: Any) -> Any:
    if args.progress == "simulator":
        return None
    from serve.progress import Asking, Several, Stillness
    from serve.remote_planner import ServerSpeaker

    where = _server(args)
    speaker = student.speaker if where is None else ServerSpeaker(*where)
    if speaker is None:
        raise UsageError("--progress policy", found=f"STUDENT {args.student}, which does not speak", expected="a policy folder, "
                         "or a server that plans", fix="leave it out, or --planner http://HOST:PORT")  # fmt: skip
    counts = args.speed == 0  # time in steps: an answer that comes when it likes would be of another step each time
    return lambda world: Several(Asking(speaker, every=_ASKED, threaded=not counts), Stillness(robot))
