"""Long goals with and without a planner, under injected latency: success with intervals, and how punctual the control loop is.

    python benchmarks/two_speeds.py                          # models/nano-base, scripted planner, every goal it has words for
    python benchmarks/two_speeds.py --policy runs/planner/policy --flat runs/flat/policy --export exports/subtasks --words \\
        --episodes 100 --realtime 4
    python benchmarks/two_speeds.py --expert                 # what the loop and the hand-over lose by themselves

Who acts, by row: *flat* is the policy told the goal's sentence (`--flat`: one that was trained so), *vla* the policy told one
subtask at a time, *student* an export that runs without torch. Who plans and who says that a subtask is done: *script* is the
simulator's own easiest order at the start and its own word, so the planner is never wrong; *words* (`--words`) is the policy
itself, asked what comes next and whether the instruction is finished, with nothing but pictures and its own memory.

Latency lies between robot and server. Flat and vla are behind it with every look: a chunk is played that many steps later, from
where the robot is by then; meanwhile it plays on what it has, and stands where it has nothing. The student is on the robot; only
its planner's answers come late. Same scenes in every row. Time is counted in steps; the last rows play with a clock that runs,
the planner in its threads, and say how late ticks were.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from serve.control import TwoSpeed
from serve.edge import EdgePolicy
from serve.edge_sim import Settings, make_guard
from serve.loop import Acts, Clock, ControlLoop, Hurried, Report
from serve.planner import Delayed, Planner, PolicyPlanner, ScriptedPlanner
from serve.progress import Asking, Progress, Told
from serve.robot import Robot
from serve.speaking import LocalSpeaker
from serve.station_sim import Expert, Judged, World
from vla.embodiment import load_embodiment
from vla.evaluate.results import proportion
from vla.prompt import clean_instruction
from vla.resample import standstill
from vla.sims import make_sim
from vla.sims.suites import TABLETOP_TASKS, find_suite, tabletop_instruction
from vla.sims.tabletop_goals import GOALS

SUITE = "tabletop-long"
SUBTASKS = [tabletop_instruction(task) for task in TABLETOP_TASKS]
Plans = Literal["", "script", "words"]


class Far:
    """A policy `ms` away: on a clock that runs it answers later, on one that counts steps its chunk begins later."""

    def __init__(self, policy: Any, robot: Robot, ms: float, execute: int, waits: bool) -> None:
        self._policy, self._robot, self._ms, self._execute, self._waits = policy, robot, ms, execute, waits
        self._late = 0 if waits else math.ceil(ms * robot.control_hz / 1e3)
        self._before: tuple[str, Any] | None = None

    def reset(self) -> None:
        self._before = None

    def act(self, observation: Mapping[str, Any], instruction: str, robot: str | None = None) -> Any:
        chunk = self._policy.act(observation, instruction, robot)
        if self._waits:
            time.sleep(self._ms / 1e3)
        if not self._late:
            return chunk
        goes_on = self._before is not None and self._before[0] == instruction
        played = self._before[1][self._execute :] if goes_on and self._before else chunk.actions[:0]
        last = played[-1] if len(played) else chunk.actions[0]
        still = np.repeat(standstill(self._robot, last)[None], self._late, 0)
        begin = np.concatenate([played, still])[: self._late]
        self._before = instruction, np.concatenate([begin, chunk.actions[self._late :]])
        return SimpleNamespace(actions=self._before[1], confidence=chunk.confidence)

    def steps(self, robot: str) -> tuple[int, int]:
        return self._policy.steps(robot)[0], self._execute


class FarJudge:
    """What a judge says, `ms` later, for clocks that count steps."""

    def __init__(self, judge: Progress, ms: float) -> None:
        self._judge, self._seconds = judge, ms / 1e3
        self._coming: deque[tuple[float, Told]] = deque()

    def begin(self, instruction: str, now: float) -> None:
        self._coming.clear()
        self._judge.begin(instruction, now)

    def saw(self, observation: Mapping[str, Any], chunk: Any, now: float) -> Told:
        self._coming.append((now + self._seconds, self._judge.saw(observation, chunk, now)))
        return Told(done=self.heard(now))

    def heard(self, now: float) -> float:
        done = 0.0
        while self._coming and self._coming[0][0] <= now + 1e-6:
            done = max(done, self._coming.popleft()[1].done)
        return done


@dataclass(frozen=True)
class Row:
    """One condition."""

    who: Literal["flat", "vla", "student", "expert"]
    plans: Plans
    ms: float

    @property
    def name(self) -> str:
        return f"{self.who}{f' + {self.plans}' if self.plans else ''}, {self.ms:g} ms"


class Bench:
    """Policies on the long goals."""

    def __init__(self, policies: Mapping[str, Any], robot: Robot, execute: int | None, asking: Mapping[str, Any],
                 sure: float = 0.5) -> None:  # fmt: skip
        """`policies`: who of a `Row` -> policy; `asking`: options of `serve.progress.Asking`; `sure`: from which
        probability a subtask is finished."""
        self.policies, self.robot, self.execute = policies, robot, execute
        self.asking, self.sure = asking, sure
        self.speaker = LocalSpeaker(policies["vla"]) if "vla" in policies else None
        self.size = max(max(sizes) for sizes in robot.sizes.values())
        self.sims: dict[str, Any] = {}

    def world(self, goal: str, seed: int) -> World:
        if goal not in self.sims:
            self.sims[goal] = make_sim(SUITE, goal, image_size=self.size)
        if (expert := self.policies.get("expert")) is not None:
            expert.sim = self.sims[goal]
        return World(self.sims[goal], *self.sims[goal].reset(seed=seed, options={"render": False}))

    def play(self, row: Row, world: World, realtime: bool) -> Report:
        policy: Any = self.policies[row.who]
        execute = self.execute or policy.steps(self.robot.key)[1]
        if row.who in ("flat", "vla"):
            policy = Far(policy, self.robot, row.ms, execute, waits=realtime)
        clock, goal = Clock() if realtime else Hurried(), world.sim.instruction
        guard = make_guard(policy, self.robot, Settings(SUITE))
        options: dict[str, Any] = {"execute": execute, "clock": clock, "asynchronous": realtime}
        if not row.plans:
            loop = ControlLoop(policy, world, self.robot.control_hz, guard, **options)
            loop.on_verdict = lambda verdict: loop.stop() if verdict.needs_help else None
            return loop.run(goal)
        planner, progress = self._planner(row, world, realtime)
        return self._planned(policy, world, planner, progress, guard, options)

    def _planned(self, policy: Acts, world: World, planner: Planner, progress: Progress, guard: Any, options: Any) -> Report:
        def judged(verdict: Any) -> None:
            if verdict.needs_help:
                loop.stop()

        loop = TwoSpeed(policy, world, planner, world.sim.instruction, self.robot.control_hz, guard, progress=progress,
                        finished=self.sure, on_verdict=judged, **options)  # fmt: skip
        return loop.run().loop

    def _planner(self, row: Row, world: World, realtime: bool) -> tuple[Planner, Progress]:
        if row.plans == "words":
            assert self.speaker is not None
            planner: Planner = PolicyPlanner(self.speaker, SUBTASKS)
            progress: Progress = Asking(self.speaker, **self.asking, threaded=realtime)
        else:
            planner, progress = ScriptedPlanner(world.plan), Judged(world)
        if row.ms:
            planner = Delayed(planner, row.ms)
            progress = progress if realtime else FarJudge(progress, row.ms)
        return planner, progress

    def row(self, row: Row, goals: list[str], episodes: int, seed: int, realtime: bool) -> dict[str, Any]:
        """Success over `episodes` scenes, goals in turn; subtasks done; how the loop kept time."""
        total, wins, done, wanted = Report(1.0 / self.robot.control_hz), 0, 0, 0
        by_goal: dict[str, list[int]] = {goal: [0, 0] for goal in goals}
        for n in range(episodes):
            world = self.world(goal := goals[n % len(goals)], seed + n)
            wanted += len(world.plan)
            total.add(self.play(row, world, realtime))
            wins, done = wins + world.success, done + world.done
            by_goal[goal] = [by_goal[goal][0] + world.success, by_goal[goal][1] + 1]
            print(f"  {row.name}: {n + 1}/{episodes}, {wins} reached", end="\r", file=sys.stderr, flush=True)
        print(" " * 60, end="\r", file=sys.stderr)
        return {"condition": row.name, "realtime": realtime, **proportion(wins, episodes), "subtasks": done / wanted,
                "goals": by_goal, "loop": total.to_json()}  # fmt: skip


def load(args: argparse.Namespace) -> tuple[dict[str, Any], Robot]:
    """Who of a `Row` -> policy, and the tabletop's robot."""
    robot = Robot.from_json(load_embodiment("tabletop").model_dump(mode="json"), "tabletop")
    if args.expert:
        return {"expert": Expert()}, robot
    from vla.policy import load_policy

    policies: dict[str, Any] = {"vla": load_policy(args.policy, args.device)}
    policies["flat"] = load_policy(args.flat, args.device) if args.flat else policies["vla"]
    if args.export:
        policies["student"] = EdgePolicy.load(args.export)
    return policies, Robot.from_json(policies["vla"].embodiments["tabletop"].model_dump(mode="json"), "tabletop")


def known_goals(policy: Any) -> list[str]:
    """Goals all of whose subtasks the policy was trained on."""
    suite, words = find_suite(SUITE), {clean_instruction(text) for text in policy.instructions}
    assert suite.subtask is not None
    return [goal for goal in suite.tasks if all(suite.subtask(task) in words for task in GOALS[goal].subtasks)]


def rows_of(args: argparse.Namespace, policies: Mapping[str, Any]) -> list[Row]:
    """What is compared."""
    if args.expert:
        return [Row("expert", "script", ms) for ms in args.ms]
    plans: list[Plans] = ["words", "script"] if args.words else ["script"]
    rows = [Row("flat", "", ms) for ms in args.ms]
    for who in ("vla", "student"):
        rows += [Row(who, plan, ms) for plan in plans for ms in args.ms if who in policies]
    return [row for row in rows if not args.only or row.name in args.only]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--policy", default="models/nano-base", help="a policy folder (default %(default)s)")
    add("--flat", help="the policy that is told whole goals (default: the same)")
    add("--export", type=Path, help="the student: an export folder, run without torch")
    add("--words", action="store_true", help="let the policy plan and judge by its own words as well")
    add("--expert", action="store_true", help="instead of all of them: the tabletop's scripted expert")
    add("--goal", action="append", help="default: every goal whose instructions the policy knows")
    add("--episodes", type=int, default=16, help="of each row, goals in turn (default %(default)s)")
    add("--seed", type=int, default=900_000, help="of the first scene (default %(default)s)")
    add("--ms", type=float, nargs="*", default=[0, 50, 200], help="latency of the network (default 0 50 200)")
    add("--only", action="append", metavar="ROW", help='these rows only, such as "vla + words, 50 ms"')
    add("--execute", type=int, help="steps of a chunk played before the next look (default: the policy's)")
    add("--every", type=float, default=0.3, help="s between questions whether it is finished (default %(default)s)")
    add("--agree", type=int, default=2, help="how many yes in a row are believed (default %(default)s)")
    add("--sure", type=float, default=0.8, help="from which probability a yes is one (default %(default)s)")
    add("--realtime", type=int, default=1, help="episodes of each row with a clock that runs (default %(default)s)")
    add("--device", default="cpu")
    add("--json", action="store_true")
    args = parser.parse_args()
    policies, robot = load(args)
    asking = {"every": args.every, "agree": args.agree}
    bench = Bench(policies, robot, args.execute, asking, args.sure)
    goals = args.goal or known_goals(policies.get("vla") or policies["expert"])
    rows = [bench.row(row, goals, episodes, args.seed, realtime)
            for realtime, episodes in ((False, args.episodes), (True, 0 if args.expert else args.realtime)) if episodes
            for row in rows_of(args, policies)]  # fmt: skip
    named = {"policy": "the expert" if args.expert else str(args.policy), "flat": args.flat, "export": str(args.export or "")}
    result = {**named, "goals": goals, "seed": args.seed, "asking": asking, "sure": args.sure, "rows": rows}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['policy']} on {len(goals)} goals of {SUITE}, scenes {args.seed} and up")
    for row in rows:
        loop, kind = row["loop"], "clock" if row["realtime"] else "steps"
        line = (f"{row['condition']:<26} {kind}  {row['successes']:>3} of {row['n']:<3} {row['rate']:>5.0%} [{row['low']:.0%}, "
                f"{row['high']:.0%}]  subtasks {row['subtasks']:>4.0%}")  # fmt: skip
        if row["realtime"]:
            jitter, late = loop["jitter_ms"], loop["late_ms"]
            line += f"  jitter p50 {jitter['p50']:.2f} p99 {jitter['p99']:.2f} max {jitter['max']:.1f} ms"
            line += f", late p99 {late['p99']:.2f} ms, {loop['missed']} of {loop['ticks']} ticks missed"
        print(line)


if __name__ == "__main__":
    main()
