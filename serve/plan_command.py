"""`vla plan POLICY "goal"`: what to do next, as a planner says it; once, on this machine or on a running server."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

from serve.planner import LONGEST, STATUSES, Asked, Plan
from vla.errors import DataError, MachineError, UsageError

_EXAMPLES = """\
examples:
  vla plan runs/demo "touch every cube" --image front=frame.png
  vla plan runs/demo --sim tabletop-long --task touch-every --seed 900000     the scene's own goal and picture
  vla plan "touch every cube" --server http://gpu-box:8000 --image frame.png --memory "touch the red cube"
  vla plan runs/demo "touch every cube" --image frame.png --planner openai:http://127.0.0.1:8080/v1
  vla plan runs/demo "touch every cube" --planner scripted:steps.txt --last "touch the red cube" --status done

Nothing is remembered: what is printed as memory goes into the next question (--memory).  docs/planning.md
"""


def add_plan_parser(subparsers: Any) -> None:
    """`vla plan`."""
    parser = subparsers.add_parser(
        "plan", help="what to do next towards a goal", description=__doc__, epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("policy", metavar="POLICY", nargs="?", help="a policy folder, a run or a Hub id; left out with --server")
    add("goal", metavar="GOAL", nargs="?", help="what is wanted in the end (default with --sim: the task's sentence)")
    add("--image", action="append", default=[], metavar="[CAMERA=]FILE", help="what is seen, one for each camera (JPEG or PNG)")
    add("--sim", metavar="SUITE", help="instead of --image: a scene of this suite as it begins")
    add("--task", metavar="TASK", help="of --sim (default: its first)")
    add("--seed", type=int, default=900_000, metavar="K", help="scene of --sim (default %(default)s)")
    add("--memory", default="", metavar="TEXT", help="of the plan before; @FILE reads it")
    add("--last", default="", metavar="TEXT", help="the instruction that is followed, or was")
    add("--status", choices=STATUSES, default="new", help="how it goes (default new: there is none)")
    add("--words", default="", metavar="TEXT", help="what a person says")
    add(
        "--known",
        action="append",
        default=[],
        metavar="TEXT",
        help="an instruction that will do; may be repeated, @FILE: a line each",
    )
    add("--free", action="store_true", help="any words will do, not only instructions the policy was trained on")
    add("--server", metavar="ADDRESS", help="ask the planner of a `vla serve` there")
    add("--token-file", type=Path, metavar="FILE", help="its token, in the first line that is no comment")
    add("--planner", default="policy", metavar="KIND", help="policy, scripted:FILE or openai:URL (default %(default)s)")
    add("--planner-model", default="default", metavar="NAME", help="of openai:URL")
    add("--planner-key-file", type=Path, metavar="FILE", help="of openai:URL")
    add("--timeout", type=float, default=60.0, metavar="S", help="seconds it may take (default %(default)s)")
    add("--robot", help="which robot is meant, where there are several")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    try:
        from serve.remote_planner import ServerPlanner
    except ImportError as error:
        raise MachineError("vla plan", found=str(error), expected="the packages of the server",
                           fix='pip install "tendon-vla[serve]"') from error  # fmt: skip
    if args.server and args.goal is None:
        args.policy, args.goal = None, args.policy
    asked = _asked(args)
    began = time.perf_counter()
    if args.server:
        plan = ServerPlanner(args.server, args.token_file, robot=args.robot, timeout=args.timeout).plan(asked)
    else:
        plan = _here(args, asked)
    seconds = time.perf_counter() - began
    print(json.dumps({**plan.to_json(), "seconds": round(seconds, 3)}) if args.json else "\n".join(words_of(plan)))
    return 0


def words_of(plan: Plan) -> list[str]:
    """For people."""
    sure = "" if plan.confidence is None else f"   {plan.confidence:.0%}"
    said = [f"next        {'done' if plan.done else plan.instruction}{sure}"]
    said += [f"then        {', '.join(plan.remaining)}"] if plan.remaining else []
    said += [f"instead     {', '.join(f'{text} {share:.0%}' for text, share in plan.considered[1:])}"] if plan.considered else []
    said += [f"good for    {plan.valid_for:g} s"]
    said += [f"memory      {' | '.join(plan.memory.splitlines())}"] if plan.memory else []
    return said + ([f"because     {plan.reason}"] if plan.reason else [])


def _asked(args: argparse.Namespace) -> Asked:
    images, state, goal = _images(args.image), None, args.goal
    if args.sim:
        if images:
            raise UsageError("--sim", found="--image as well", expected="one of them", fix="leave one out")
        images, state, sentence = _scene(args.sim, args.task, args.seed)
        goal = goal or sentence
    if not goal:
        raise UsageError("vla plan", found="no goal", expected='vla plan POLICY "goal"', fix="say what is wanted, or --sim SUITE")
    known = [
        line for text in args.known for line in (_text(text).splitlines() if text.startswith("@") else [text]) if line.strip()
    ]
    return Asked(goal, images, _text(args.memory), state, args.last, args.status, args.words, tuple(known))


def _text(given: str) -> str:
    """Itself, or what stands in the file after the `@`."""
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text()[: 100 * LONGEST]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(given, found=str(error), expected="a text file", fix="look at the path") from error


def _images(given: list[str]) -> dict[str, Any]:
    from serve.wire import picture_of

    images: dict[str, Any] = {}
    for text in given:
        camera, sign, file = text.partition("=")
        name, path = (camera, Path(file)) if sign else ("front", Path(text))
        try:
            images[name] = picture_of(path.read_bytes())
        except OSError as error:
            raise DataError(path, found=str(error), expected="a JPEG or PNG file", fix="--image CAMERA=FILE") from error
    if len(images) != len(given):
        raise UsageError("--image", found=given, expected="every camera once", fix="--image CAMERA=FILE")
    return images


def _scene(suite: str, task: str | None, seed: int) -> tuple[dict[str, Any], Any, str]:
    """(pictures, state, sentence of the task) of a scene as it begins."""
    from vla.embodiment import load_embodiment
    from vla.sims import expand_tasks, find_suite, make_sim

    tasks = expand_tasks(suite, [task] if task else None)
    cameras = load_embodiment(find_suite(suite).embodiment).cameras
    size = max(max(camera.height, camera.width) for camera in cameras.values())
    sim = make_sim(suite, tasks[0], image_size=size)
    try:
        observation, _ = sim.reset(seed=seed)
        return dict(observation["images"]), observation["state"], sim.instruction
    finally:
        sim.close()


def _here(args: argparse.Namespace, asked: Asked) -> Plan:
    """By a planner of this process; a policy is loaded in one of its own, as `vla serve` does."""
    from pydantic import ValidationError

    from serve.command import starter
    from serve.engine import Engine, EngineOptions
    from serve.planning import Planning, planner_of
    from serve.service import Service
    from serve.settings import PlannerSettings, ServeSettings

    try:
        chosen = PlannerSettings(kind=args.planner, model=args.planner_model, key_file=args.planner_key_file,
                                 timeout=args.timeout, known_only=not args.free)  # fmt: skip
    except ValidationError as error:
        raise UsageError("--planner", found="; ".join(e["msg"] for e in error.errors()), expected="policy, scripted:FILE or "
                         "openai:http://HOST:PORT/v1", fix="vla plan --help") from None  # fmt: skip
    if args.policy is None and chosen.kind == "policy":
        raise UsageError("vla plan", found="no policy", expected="POLICY, --server or --planner", fix="vla plan --help")
    if chosen.kind != "policy" and (args.policy is None or args.free or asked.known):  # nothing to ask the policy for
        return planner_of(chosen, lambda: ()).plan(asked)
    start = starter("process", {"policy": args.policy, "device": args.device})
    service = Service(Engine(start, EngineOptions(deadline=args.timeout)), ServeSettings(planner=chosen, deadline=args.timeout))

    async def work() -> Plan:
        planning = Planning(service)
        await service.engine.start()
        try:
            return (await planning.plan(asked))[0]
        finally:
            await service.engine.stop()

    return asyncio.run(work())
