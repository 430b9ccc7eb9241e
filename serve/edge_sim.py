"""A policy in a simulator, driven as it drives a robot: control loop, guard, clock. Part of `vla-edge run`.

The policy is an exported one, or a server's (`--server`), whose guard then judges as well.

The simulators need packages a robot has not (pydantic, gymnasium, mujoco); nothing else in `serve` imports this file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.edge import EdgePolicy
from serve.guard import Guard
from serve.loop import Acts, Clock, ControlLoop, Hurried, Report
from serve.robot import Robot, differences
from vla.errors import MachineError, UsageError
from vla.resample import rotations_of

if TYPE_CHECKING:
    from serve.client import Client

logger = logging.getLogger(__name__)

_FILM_SIZE = 240


@dataclass(frozen=True)
class Settings:
    """What to play, and how; see `vla-edge run --help`."""

    suite: str
    tasks: Sequence[str] | None = None
    episodes: int = 20
    seed: int = 900_000
    execute: int | None = None
    ensemble: float | None = None
    realtime: bool = False
    asynchronous: bool = False
    jump: Mapping[str, float] | None = None
    help_below: float = 0.0
    video: Path | None = None
    robot: str | None = None
    """The suite's own, which is what moves; another is refused."""


class SimulatedRobot:
    """A `serve.loop.RobotIO` whose world is a simulator: rendered when it is looked at, and not in between."""

    def __init__(self, sim: Any, observation: Mapping[str, Any], film: bool) -> None:
        self.sim, self.state, self.success = sim, observation["state"], False
        self.frames: list[np.ndarray] | None = [sim.frame(_FILM_SIZE)] if film else None

    def observe(self) -> dict[str, Any]:
        images = {camera: self.sim.view(camera, self.sim.image_size) for camera in self.sim.spec.cameras}
        return {"images": images, "state": self.state}

    def act(self, action: np.ndarray) -> bool:
        observation, _, terminated, truncated, info = self.sim.step(action, render=False)
        self.state, self.success = observation["state"], bool(info["success"])
        if self.frames is not None:
            self.frames.append(self.sim.frame(_FILM_SIZE))
        return bool(terminated or truncated)


def play(policy: EdgePolicy | Client, settings: Settings, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Episodes of a suite; success with its Wilson interval, how the loop kept time, a record of each.

    Raises `UsageError` (another robot, an unknown task, seeds the policy was trained on) and `MachineError` (no simulator here).
    """
    try:
        from vla.evaluate.jobs import check_seeds
        from vla.evaluate.results import proportion
        from vla.sims import expand_tasks, find_suite, make_sim
    except ModuleNotFoundError as error:
        raise MachineError("--sim", found=f"Python package {error.name!r} is not installed", expected="the simulators",
                           fix="pip install 'tendon-vla[sim]'; without it: vla-edge check, vla-edge act") from error  # fmt: skip
    tasks = expand_tasks(settings.suite, settings.tasks)
    if settings.episodes < 1:
        raise UsageError("--episodes", found=settings.episodes, expected="at least 1", fix="--episodes 20")
    if isinstance(policy, EdgePolicy):
        check_seeds(policy, settings.suite, settings.seed, settings.episodes)  # pyright: ignore[reportArgumentType]
    else:
        logger.warning("a server does not say which seeds its policy was trained on: --seed %d is taken on trust", settings.seed)
    robot = _robot_of(policy, find_suite(settings.suite).embodiment)
    if settings.robot not in (None, robot.key):
        raise UsageError("--robot", found=settings.robot, expected=f"{robot.key!r}, the robot of --sim {settings.suite}",
                         fix="leave it out, or choose the suite of that robot")  # fmt: skip
    guard = make_guard(policy, robot, settings)
    size = max(max(sizes) for sizes in robot.sizes.values())
    total, records, sims = Report(1.0 / robot.control_hz), [], {}
    with ExitStack() as opened:
        for n in range(settings.episodes):
            task, seed = tasks[n % len(tasks)], settings.seed + n
            if task not in sims:
                sims[task] = make_sim(settings.suite, task, image_size=size)
                opened.callback(sims[task].close)
            sim = sims[task]
            observation, _ = sim.reset(seed=seed, options={"render": False})
            world = SimulatedRobot(sim, observation, film=settings.video is not None and n == 0)
            clock = Clock() if settings.realtime else Hurried()
            loop = ControlLoop(policy, world, robot.control_hz, guard, execute=settings.execute, ensemble=settings.ensemble,
                               asynchronous=settings.asynchronous, clock=clock)  # fmt: skip
            loop.on_verdict = lambda verdict, loop=loop: loop.stop() if verdict.needs_help else None
            report = loop.run(sim.instruction)
            total.add(report)
            records.append({"task": task, "seed": seed, "success": world.success, **report.to_json()})
            if say is not None:
                say(_line(records[-1], settings.realtime))
            if world.frames is not None and settings.video is not None:
                _film(world.frames, robot.control_hz, settings.video)
    wins = sum(r["success"] for r in records)
    return {
        "suite": settings.suite, "tasks": tasks, "seed": settings.seed, **proportion(wins, len(records)),
        "needs_help": sum(bool(r["needs_help"]) for r in records), **_about(policy), "realtime": settings.realtime,
        "asynchronous": settings.asynchronous, "ensemble": settings.ensemble, "loop": total.to_json(), "records": records,
    }  # fmt: skip


def _about(policy: EdgePolicy | Client) -> dict[str, Any]:
    if isinstance(policy, EdgePolicy):
        return {"policy": policy.fingerprint, "runtime": policy.runtime, "threads": policy.threads}
    return {"policy": policy.policy, "server": policy.address, "connections": policy.connections}


def make_guard(policy: Acts, robot: Robot, settings: Settings) -> Guard:
    """Limits from the embodiment; where nobody gave a jump, a quarter of the range of a target, half a radian of a rotation."""
    turned = {dims[0] for dims, _ in rotations_of(robot)}
    jump: dict[str, Any] = {}
    for channel, dims in robot.spans("action"):
        if dims.start in turned:
            jump[channel.name] = 0.5
        elif channel.convention in ("joint_position", "eef_position"):
            jump[channel.name] = [0.25 * (high - low) for low, high in zip(channel.low, channel.high, strict=True)]
    # A simulated robot that holds still is seen as the very same picture again: that is no camera that froze.
    return Guard(robot, jump={**jump, **(settings.jump or {})}, repeats=None, longest=policy.steps(robot.key)[0],
                 confidence=settings.help_below)  # fmt: skip


def _robot_of(policy: EdgePolicy | Client, name: str) -> Robot:
    """The policy's own description of a suite's robot, which must be the simulator's, up to the size of pictures."""
    from vla.embodiment import load_embodiment

    spec = load_embodiment(name)
    there = Robot.from_json(spec.model_dump(mode="json"), f"embodiment {name!r}")
    known = policy.robots.get(there.key)
    if known is None:
        raise UsageError("--sim", found=f"a policy of {sorted(policy.robots)}", expected=f"{there.key!r}, this suite's robot",
                         fix="choose the suite the policy was trained for")  # fmt: skip
    if wrong := differences(there, known):
        raise UsageError(f"robot {name!r}", found="simulator (here) and policy (there): " + "; ".join(wrong),
                         expected="the same channels, units and cameras",
                         fix="record and train again with this version")  # fmt: skip
    return known


def _line(record: Mapping[str, Any], realtime: bool) -> str:
    said = "success" if record["success"] else "needs help" if record["needs_help"] else "failure"
    rate = f"{record['rate_hz']:.1f} Hz" + (f", jitter p99 {record['jitter_ms']['p99']:.2f} ms" if realtime else "")
    line = (f"{record['task']} {record['seed']}: {said} in {record['ticks']} steps; {rate}; inference p50 "
            f"{record['inference_ms']['p50']:.2f} ms; {record['holds']} holds")  # fmt: skip
    return line + (f" ({record['needs_help'] or ', '.join(record['reasons'])})" if record["holds"] else "")


def _film(frames: list[np.ndarray], hz: float, path: Path) -> None:
    from vla.evaluate.worker import encode_clip

    stride = max(1, int(np.ceil(hz / 20)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_clip(frames[::stride], hz / stride))
