"""A simulator as the robot under two speeds: a world that says which subtasks are done, its scripted expert, and its scenes.

Part of `vla operate --sim` and of benchmarks/two_speeds.py. Needs what simulators need (pydantic, gymnasium, mujoco); no torch.
"""

from __future__ import annotations

import difflib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from serve.edge_sim import SimulatedRobot
from serve.loop import Clock, Hurried
from serve.planner import Asked, Plan, Planner
from serve.progress import Progress, Several, Stillness, Told
from serve.robot import Robot
from serve.stage import Scene
from vla.errors import DataError, MachineError, UsageError
from vla.handoff.trouble import Trouble, check_troubles
from vla.prompt import clean_instruction
from vla.resample import standstill
from vla.sims import find_suite, make_sim
from vla.sims.render import draw_in_any_thread
from vla.sims.suites import TABLETOP_TASKS, same_scenes, tabletop_instruction
from vla.sims.tabletop_tasks import expert

SHOWN = 320
"""Side of the pictures for people, in pixels."""
_TASKS = {tabletop_instruction(task): task for task in TABLETOP_TASKS}


class World(SimulatedRobot):
    """A simulated robot whose simulator also says which subtasks are done."""

    def __init__(self, sim: Any, observation: Mapping[str, Any], info: Mapping[str, Any], trouble: Trouble | None = None) -> None:
        """`trouble`: what goes wrong with its pictures and commands."""
        super().__init__(sim, observation, film=False)
        subtask = find_suite(sim.suite).subtask
        self.done = len(info.get("done", ()))
        """Subtasks, or 1 for a task that is."""
        self._subtask = subtask or (lambda task: sim.instruction)
        self.plan: list[str] = self._said(info, "plan", not info["success"])
        """Instructions that reach the goal, in the order that is easiest from where it begins."""
        self.left: tuple[str, ...] = tuple(self.plan)
        """Those still to be done now, and those done."""
        self.reached: tuple[str, ...] = ()
        self.verdict = ""
        self.trouble, self._step = trouble, 0
        self._moves = standstill(sim.spec, np.ones(sim.spec.action_dim, np.float32)) == 0

    def observe(self) -> dict[str, Any]:
        observation = super().observe()
        return observation if self.trouble is None else self.trouble.see(observation, self._step)

    def act(self, action: Any) -> bool:
        if self.trouble is not None:
            self.trouble.before(self.sim, self._step)
            action = self.trouble.act(action, self._moves)
        self._step += 1
        observation, _, terminated, truncated, info = self.sim.step(action, render=False)
        self.state, self.success = observation["state"], bool(info["success"])
        self.left = tuple(self._said(info, "plan", not self.success))
        self.reached = tuple(self._said(info, "done", self.success))
        self.done = len(self.reached)
        self.verdict = "spoilt: the goal cannot be reached any more" if info["failure"] else ""
        return bool(terminated or truncated)

    def _said(self, info: Mapping[str, Any], what: str, otherwise: bool) -> list[str]:
        """Instructions of `info`; `otherwise`: whether the only one of a suite without subtasks is among them."""
        return [self._subtask(task) for task in info.get(what, [""] if otherwise else [])]


class Foreseen:
    """The simulator's own plan as a planner: it always knows what is left, whoever did the rest."""

    def __init__(self, world: World) -> None:
        self._world = world

    def plan(self, asked: Asked) -> Plan:
        left, memory = self._world.left, "\n".join(self._world.reached)
        if asked.words:
            return Plan(clean_instruction(asked.words), left, memory, confidence=1.0, reason="a person said so")
        if not left:
            return Plan("", (), memory, True, 1.0, reason="all of it is done")
        now = asked.last if asked.last in left and asked.status != "done" else left[0]
        rest = list(left)
        rest.remove(now)
        done = len(self._world.reached)
        return Plan(now, tuple(rest), memory, False, 1.0, reason=f"{done + 1} of {done + len(left)}")


class Judged:
    """Done when the simulator counts one more subtask than when the instruction was begun."""

    def __init__(self, world: World) -> None:
        self._world, self._before = world, 0

    def begin(self, instruction: str, now: float) -> None:
        self._before = self._world.done

    def saw(self, observation: Any, chunk: Any, now: float) -> Told:
        return Told(done=float(self._world.done > self._before))


class Expert:
    """Follows one instruction at a time as the tabletop's scripted expert does, a step a look; it sees the cubes themselves."""

    instructions = tuple(_TASKS)

    def __init__(self) -> None:
        self.sim: Any = None

    def act(self, observation: Any, instruction: str, robot: str | None = None) -> Any:
        """A chunk of one step. Raises `DataError` for an instruction of another world."""
        action = self.next(observation["state"], instruction)
        return SimpleNamespace(actions=action[None], confidence=np.ones((1, 4), np.float32))

    def next(self, state: np.ndarray, instruction: str) -> np.ndarray:
        """(4,) float32 in [-1, 1]."""
        if instruction not in _TASKS:
            raise DataError("expert", found=repr(instruction)[:60], expected=f"one of its {len(_TASKS)} instructions",
                            fix=f"such as {next(iter(_TASKS))!r}")  # fmt: skip
        hand, cubes = self.sim.places()
        return expert(_TASKS[instruction], hand, float(state[3]), np.array(list(cubes.values())))

    def steps(self, robot: str) -> tuple[int, int]:
        return 1, 1


class Acted(World):
    """A world of a station: what does not move costs no steps, and whoever helps brings an episode's steps along."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self._most, self._used, self._last = int(self.sim.max_steps), 0, None
        self._limit = self._most
        self.sim.max_steps = 1 << 30  # counted here

    def act(self, action: Any) -> bool:
        last = action if self._last is None else self._last
        self._used += bool(np.any(np.where(self._moves, action, action - last)))
        self._last = np.array(action)
        over = super().act(action)
        if not over and self._used >= self._limit:
            self.verdict, over = f"out of steps: {self._limit}", True
        return over

    def helped(self) -> None:
        """A person helps: there is as much time again."""
        self._limit = self._used + self._most

    def show(self) -> dict[str, np.ndarray]:
        """Large pictures, with what is wrong with those the policy sees."""
        images = {camera: self.sim.view(camera, SHOWN) for camera in self.sim.spec.cameras}
        return images if self.trouble is None else self.trouble.see({"images": images}, self._step)["images"]


class Demonstrates:
    """The scripted expert as a demonstrator: finished when the simulator counts one more subtask. Where it does not get there it
    gives up, and what it did is not for others to learn from."""

    def __init__(self, world: World, most: int = 120) -> None:
        """`most` steps at a time."""
        self._world, self._most, self._expert = world, most, Expert()
        self._expert.sim = world.sim
        self._instruction, self._before, self._left = "", 0, 0

    def begin(self, instruction: str) -> None:
        self._instruction, self._before, self._left = instruction, self._world.done, self._most

    def act(self, observation: Mapping[str, Any]) -> np.ndarray | None:
        self._left -= 1
        if self._world.done > self._before:
            return None
        if self._left < 0:
            raise MachineError("the expert", found=f"{self._instruction!r} not done in {self._most} steps", expected="fewer",
                               fix="tell it something else")  # fmt: skip
        if self._instruction in _TASKS and hasattr(self._world.sim, "places"):
            return self._expert.next(self._world.state, self._instruction)
        return self._world.sim.expert()


class SimStage:
    """The scenes of a suite as a `serve.station.Stage`: a goal is the sentence of a task, of it or of a suite with its scenes."""

    def __init__(
        self, suite: str, robot: Robot, *, tasks: Sequence[str] = (), seed: int = 900_000, size: int = 64,
        planner: Callable[[World], Planner] | None = None, progress: Callable[[World], Progress] | None = None,
        trouble: str = "none", known: Sequence[str] = (), on_sim: Callable[[Any], None] | None = None,
    ) -> None:  # fmt: skip
        """`tasks`: the goals offered first; `seed`: of the first scene, each run takes the next; `size` of the policy's pictures.
        `planner`, `progress`: of a world; default: its own plan, and the simulator's word beside stillness. `known`: instructions
        the policy knows. `on_sim` is told the simulator of each run. Raises `UsageError` for a trouble this suite does not know.
        """
        draw_in_any_thread()  # the station's, of which there may be several in a process
        self.suite, self.robot, self.seed, self.size, self.on_sim = suite, robot, seed, size, on_sim
        (self.trouble,) = check_troubles([trouble], suite)
        self._planner = planner or Foreseen
        self._progress = progress or (lambda world: Several(Judged(world), Stillness(robot)))
        own = find_suite(suite)
        related = [find_suite(name) for name in same_scenes(suite) if find_suite(name).embodiment == own.embodiment]
        self._tasks = {clean_instruction(room.instruction(task)): (room.name, task)
                       for room in reversed(related) for task in room.known}  # fmt: skip
        first = [clean_instruction(own.instruction(task)) for task in tasks or own.tasks]
        self.goals = tuple(dict.fromkeys([*first, *(text for text, (name, _) in self._tasks.items() if name == suite)]))
        self.instructions = tuple(known) or tuple(text for text, (name, _) in self._tasks.items() if not find_suite(name).subtask)
        self._sims: dict[tuple[str, str], Any] = {}
        self._most: dict[tuple[str, str], int] = {}
        self._runs, self._shown = 0, False

    def check(self, goal: str, scene: int | None) -> None:
        if (cleaned := clean_instruction(goal)) not in self._tasks:
            near = difflib.get_close_matches(cleaned, [*self._tasks], n=3, cutoff=0.4) or list(self.goals[:3])
            raise UsageError("goal", found=repr(goal)[:80], expected=f"a goal of this simulator, nearest {near}", fix=near[0])

    def begin(self, goal: str, scene: int | None) -> Scene:
        world, task, seed = self._world(goal, self.seed + self._runs if scene is None else scene)
        self._runs += 1
        return Scene(world, self._planner(world), self._progress(world), Demonstrates(world), task=task, seed=seed)

    def _world(self, goal: str, seed: int) -> tuple[Acted, str, int]:
        key = suite, task = self._tasks[clean_instruction(goal)]
        if key not in self._sims:
            more = {"randomise": True} if self.trouble == "physics" else {}
            self._sims[key] = make_sim(suite, task, image_size=self.size, **more)
            self._most[key] = self._sims[key].max_steps
        sim = self._sims[key]
        sim.max_steps = self._most[key]
        if self.on_sim is not None:
            self.on_sim(sim)
        observation, info = sim.reset(seed=seed, options={"render": False})
        trouble = None if self.trouble == "none" else Trouble(self.trouble, seed, sim.max_steps)
        return Acted(sim, observation, info, trouble), task, seed

    def idle(self, watched: bool) -> Mapping[str, Any] | None:
        """The first scene, before there was a run; after that the last one is as it was left."""
        if self._shown or self._runs:
            return None
        self._shown = True
        return self._world(self.goals[0], self.seed)[0].show()

    def close(self) -> None:
        for sim in self._sims.values():
            sim.close()


class Scaled(Clock):
    """A clock that runs `speed` times as fast."""

    def __init__(self, speed: float) -> None:
        self.speed = speed

    def now(self) -> float:
        return time.monotonic() * self.speed

    def wait_until(self, due: float, stop: threading.Event) -> None:
        if (left := due / self.speed - time.monotonic()) > 0:
            stop.wait(left)


class Unhurried(Hurried):
    """As fast as it goes, but slowly while somebody is asked: a person needs time whose passing is not simulated."""

    def __init__(self, asking: Callable[[], bool]) -> None:
        super().__init__()
        self._asking = asking

    def wait_until(self, due: float, stop: threading.Event) -> None:
        super().wait_until(due, stop)
        if self._asking():
            stop.wait(0.05)


def clock_of(speed: float) -> Callable[[Callable[[], bool]], Clock]:
    """Of a run at `speed` times real time; 0: as fast as it goes."""
    return (lambda asking: Scaled(speed)) if speed else Unhurried
