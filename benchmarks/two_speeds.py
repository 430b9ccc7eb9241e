"""Long goals with and without a planner: success with intervals under injected latency, and how punctual the control loop is.

    python benchmarks/two_speeds.py                                    # models/nano-base, every goal it has the words for
    python benchmarks/two_speeds.py --policy runs/student/policy --episodes 40 --json
    python benchmarks/two_speeds.py --export exports/student --realtime 2

`flat` is the policy told the goal's sentence, `planner` the same policy under the two-speed loop and a scripted planner: the
right subtasks in the order the simulator holds easiest at the start of each scene, and the simulator's own word on which are
done. So the planner is never wrong, and what is measured is the loop, the hand-over and the policy. Same scenes in every row.
`--expert` puts the tabletop's scripted expert in the policy's place, a step a look: what is lost there is not the policy's.

Time is counted in steps (a planner `ms` late is heard that many ms of control steps later); the last rows play with a clock that
runs, the planner in its threads, and say how late ticks were.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve.control import TwoSpeed
from serve.edge import EdgePolicy
from serve.edge_sim import Settings, make_guard
from serve.loop import Clock, ControlLoop, Hurried, Report
from serve.planner import Delayed, ScriptedPlanner
from serve.robot import Robot
from serve.station_sim import Expert, Judged, World
from vla.embodiment import load_embodiment
from vla.evaluate.results import proportion
from vla.prompt import clean_instruction
from vla.sims import make_sim
from vla.sims.suites import find_suite
from vla.sims.tabletop_goals import GOALS

SUITE = "tabletop-long"


class Bench:
    """One policy on the long goals."""

    def __init__(self, policy: Any, robot: Robot, execute: int | None) -> None:
        self.policy, self.robot, self.execute = policy, robot, execute
        self.size = max(max(sizes) for sizes in robot.sizes.values())
        self.sims: dict[str, Any] = {}

    def world(self, goal: str, seed: int) -> World:
        if goal not in self.sims:
            self.sims[goal] = make_sim(SUITE, goal, image_size=self.size)
        if isinstance(self.policy, Expert):
            self.policy.sim = self.sims[goal]
        return World(self.sims[goal], *self.sims[goal].reset(seed=seed, options={"render": False}))

    def flat(self, world: World, clock: Clock, asynchronous: bool) -> Report:
        loop = ControlLoop(self.policy, world, self.robot.control_hz, self._guard(), execute=self.execute, clock=clock,
                           asynchronous=asynchronous)  # fmt: skip
        loop.on_verdict = lambda verdict: loop.stop() if verdict.needs_help else None
        return loop.run(world.sim.instruction)

    def planned(self, world: World, clock: Clock, asynchronous: bool, ms: float) -> Report:
        planner = Delayed(ScriptedPlanner(world.plan), ms) if ms else ScriptedPlanner(world.plan)
        loop = TwoSpeed(self.policy, world, planner, world.sim.instruction, self.robot.control_hz, self._guard(),
                        progress=Judged(world), execute=self.execute, clock=clock, asynchronous=asynchronous)  # fmt: skip
        loop._on_verdict = lambda verdict: loop.stop() if verdict.needs_help else None
        return loop.run().loop

    def _guard(self) -> Any:
        return make_guard(self.policy, self.robot, Settings(SUITE))

    def row(self, name: str, goals: list[str], episodes: int, seed: int, play: Callable[[World], Report]) -> dict[str, Any]:
        """Success over `episodes` scenes, goals in turn; subtasks done; how the loop kept time."""
        total, wins, done, wanted = Report(1.0 / self.robot.control_hz), 0, 0, 0
        for n in range(episodes):
            world = self.world(goals[n % len(goals)], seed + n)
            wanted += len(world.plan)
            total.add(play(world))
            wins, done = wins + world.success, done + world.done
            print(f"  {name}: {n + 1}/{episodes}, {wins} reached", end="\r", file=sys.stderr, flush=True)
        print(" " * 60, end="\r", file=sys.stderr)
        return {"condition": name, **proportion(wins, episodes), "subtasks": done / wanted, "loop": total.to_json()}


def load(args: argparse.Namespace) -> tuple[Any, Robot]:
    """The policy, and the tabletop's robot as it knows it."""
    if args.expert:
        return Expert(), Robot.from_json(load_embodiment("tabletop").model_dump(mode="json"), "tabletop")
    if args.export:
        edge = EdgePolicy.load(args.export)
        return edge, edge.robots["tabletop"]
    from vla.policy import load_policy

    policy = load_policy(args.policy, args.device)
    return policy, Robot.from_json(policy.embodiments["tabletop"].model_dump(mode="json"), "tabletop")


def known_goals(policy: Any) -> list[str]:
    """Goals all of whose subtasks the policy was trained on."""
    suite, words = find_suite(SUITE), {clean_instruction(text) for text in policy.instructions}
    assert suite.subtask is not None
    return [goal for goal in suite.tasks if all(suite.subtask(task) in words for task in GOALS[goal].subtasks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="models/nano-base", help="a policy folder (default %(default)s)")
    parser.add_argument("--export", type=Path, help="instead: an export folder, run without torch")
    parser.add_argument("--expert", action="store_true", help="instead: the tabletop's scripted expert")
    parser.add_argument("--goal", action="append", help="default: every goal whose instructions the policy knows")
    parser.add_argument("--episodes", type=int, default=16, help="of each row, goals in turn (default %(default)s)")
    parser.add_argument("--seed", type=int, default=900_000, help="of the first scene (default %(default)s)")
    parser.add_argument("--ms", type=float, nargs="*", default=[0, 50, 200], help="latency of the planner (default 0 50 200)")
    parser.add_argument("--execute", type=int, help="steps of a chunk played before the next look (default: the policy's)")
    parser.add_argument(
        "--realtime", type=int, default=1, help="episodes of each row with a clock that runs (default %(default)s)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    policy, robot = load(args)
    bench, goals = Bench(policy, robot, args.execute), args.goal or known_goals(policy)
    names: dict[str, float | None] = {} if args.expert else {"flat": None}  # an expert cannot be told a goal
    names |= {f"planner, {ms:g} ms": ms for ms in args.ms}
    rows = []
    for realtime, episodes in ((False, args.episodes), (True, 0 if args.expert else args.realtime)):
        for name, ms in names.items():
            if not episodes:
                continue

            def play(world: World, ms: float | None = ms, realtime: bool = realtime) -> Report:
                clock = Clock() if realtime else Hurried()
                return bench.flat(world, clock, realtime) if ms is None else bench.planned(world, clock, realtime, ms)

            rows.append({**bench.row(name, goals, episodes, args.seed, play), "realtime": realtime})
    result = {
        "policy": "the expert" if args.expert else str(args.export or args.policy),
        "goals": goals,
        "seed": args.seed,
        "rows": rows,
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['policy']} on {len(goals)} goals of {SUITE}, scenes {args.seed} and up")
    for row in rows:
        loop, kind = row["loop"], "clock" if row["realtime"] else "steps"
        line = (f"{row['condition']:<16} {kind}  {row['successes']:>3} of {row['n']:<3} {row['rate']:>5.0%} [{row['low']:.0%}, "
                f"{row['high']:.0%}]  subtasks {row['subtasks']:>4.0%}")  # fmt: skip
        if row["realtime"]:
            jitter, late = loop["jitter_ms"], loop["late_ms"]
            line += f"  jitter p50 {jitter['p50']:.2f} p99 {jitter['p99']:.2f} max {jitter['max']:.1f} ms"
            line += f", late p99 {late['p99']:.2f} ms, {loop['missed']} of {loop['ticks']} ticks missed"
        print(line)


if __name__ == "__main__":
    main()
