"""Plays episodes in which something goes wrong, and notes every look: scores, hidden states, and what help would have achieved.

Scenes step together in fixed groups, in this process: what a network says about one picture may differ in its last bits with
the batch around it, and what is collected is to follow from the arguments alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vla.evaluate.jobs import Actor
from vla.handoff.scores import Scorer
from vla.handoff.trouble import Trouble
from vla.policy import VLAPolicy
from vla.policy.inside import act_inside
from vla.randomness import mix
from vla.resample import standstill

WIDTH = 32
"""Scenes of a group."""


class Scene(NamedTuple):
    """One episode to be."""

    task: str
    seed: int
    trouble: str


class Look(NamedTuple):
    """What a policy gave at one look."""

    chunk: Any
    features: np.ndarray | None  # (d,)
    samples: np.ndarray | None  # (K, n, A)


@dataclass
class Rollout:
    """One episode, as far as detectors are concerned."""

    scene: Scene
    severity: float
    success: bool = False
    failure: bool = False
    """A definite one, as against running out of steps."""
    steps: int = 0
    at: list[int] = field(default_factory=list)
    """The control step of every look."""
    scores: list[dict[str, float]] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    """What was commanded, (A,) a control step, before anything happened to it."""
    relief: list[bool] = field(default_factory=list)
    """Of every look: whether the scripted expert succeeds from there, given an episode's steps of its own."""


def looker(policy: Actor, embodiment: str, decode: str, samples: int) -> Callable[[list, list, list[int]], list[Look]]:
    """(observations, instructions, seeds) -> looks. Hidden states come of our own policies; of others only chunks and draws."""

    def inside(observations: list, instructions: list, seeds: list[int]) -> list[Look]:
        assert isinstance(policy, VLAPolicy)
        found = act_inside(policy, observations, instructions, embodiment, decode, seeds, samples)  # pyright: ignore[reportArgumentType]
        return [Look(look.chunk, look.features, look.samples if samples else None) for look in found]

    def outside(observations: list, instructions: list, seeds: list[int]) -> list[Look]:
        chunks = policy.act_batch(observations, instructions, embodiment, decode=decode, seeds=seeds)
        draws = [policy.act_batch(observations, instructions, embodiment, decode="sample", seeds=[mix(seed, k) for seed in seeds])
                 for k in range(samples)]  # fmt: skip
        return [Look(chunk, None, np.stack([draw[i].actions for draw in draws]) if draws else None)
                for i, chunk in enumerate(chunks)]  # fmt: skip

    return inside if isinstance(policy, VLAPolicy) else outside


class Stage:
    """The simulators of one collection, made as they are needed and used again."""

    def __init__(self, suite: str, image_size: int, sims: str = "vla.sims") -> None:
        self.module: Any = importlib.import_module(sims)
        self.suite, self.image_size = suite, image_size
        self._idle: dict[bool, list[Any]] = {False: [], True: []}

    def take(self, scene: Scene, trouble: Trouble) -> Any:
        """One that is not in use, not reset yet."""
        idle = self._idle[trouble.randomise]
        if idle:
            return idle.pop()
        more = {"randomise": True} if trouble.randomise else {}
        return self.module.make_sim(self.suite, scene.task, image_size=self.image_size, **more)

    def give(self, sim: Any, trouble: Trouble) -> None:
        self._idle[trouble.randomise].append(sim)

    def close(self) -> None:
        for sim in [sim for idle in self._idle.values() for sim in idle]:
            sim.close()


class Live:
    """An episode in progress."""

    def __init__(self, scene: Scene, stage: Stage, scale: np.ndarray) -> None:
        self.scene, self.stage = scene, stage
        probe = Trouble(scene.trouble, scene.seed, 40)
        self.sim = stage.take(scene, probe)
        self.trouble = Trouble(scene.trouble, scene.seed, self.sim.max_steps)
        self.moves = standstill(self.sim.spec, np.ones(self.sim.spec.action_dim, np.float32)) == 0
        self.limits = self.sim.spec.limits("action")
        self.scorer = Scorer(scale)
        self.rollout = Rollout(scene, self.trouble.severity)
        self.over = False
        self.seen = self._reset(render=True)

    def _reset(self, render: bool) -> dict[str, Any]:
        observation, _ = self.sim.reset(seed=self.scene.seed, options={"task": self.scene.task, "render": render})
        return self.trouble.see(observation, 0) if render else observation

    def step(self, step: int, action: np.ndarray, render: bool = False) -> tuple[dict[str, Any], bool, dict[str, Any]]:
        """Control step number `step`; (observation, over, info)."""
        self.trouble.before(self.sim, step)
        given = self.trouble.act(np.clip(action, *self.limits).astype(np.float32), self.moves)
        observation, _, terminated, truncated, info = self.sim.step(given, render=render)
        return observation, bool(terminated or truncated), info

    def look(self, look: Look, execute: int) -> None:
        """Note a look, and carry its chunk out."""
        rollout = self.rollout
        rollout.at.append(rollout.steps)
        rollout.scores.append(self.scorer(rollout.steps, look.chunk, None, look.samples))
        if look.features is not None:
            rollout.features.append(look.features)
        for n, action in enumerate(np.asarray(look.chunk.actions[:execute], np.float32)):
            observation, self.over, info = self.step(rollout.steps, action, render=n == execute - 1)
            rollout.steps += 1
            rollout.actions.append(action)
            if self.over:
                rollout.success, rollout.failure = bool(info["success"]), bool(info["failure"])
                return
        self.seen = self.trouble.see(observation, rollout.steps)

    def relieve(self) -> None:
        """Find out, for every look, whether help would have come in time: the way there is played again, then the expert acts."""
        most = self.sim.max_steps
        for look in self.rollout.at:
            self._reset(render=False)
            limit, self.sim.max_steps = self.sim.max_steps, 1 << 30  # who helps has as long as an episode, however late
            success = over = False
            for step in range(look + limit):
                action = self.rollout.actions[step] if step < look else self.sim.expert()
                _, over, info = self.step(step, action)
                if over:
                    success = bool(info["success"])
                    break
            self.sim.max_steps = most
            self.rollout.relief.append(success)

    def close(self) -> Rollout:
        self.stage.give(self.sim, self.trouble)
        return self.rollout


def play(
    policy: Actor, stage: Stage, embodiment: str, scenes: Sequence[Scene], scale: np.ndarray, *, execute: int, decode: str,
    samples: int = 0, relief: bool = False, width: int = WIDTH,
) -> Iterator[Rollout]:  # fmt: skip
    """The rollouts of `scenes`, in order."""
    think = looker(policy, embodiment, decode, samples)
    suite = stage.module.SUITES[stage.suite]
    for first in range(0, len(scenes), width):
        group = [Live(scene, stage, scale) for scene in scenes[first : first + width]]
        while going := [live for live in group if not live.over]:
            seeds = [live.scene.seed * 1009 + live.rollout.steps for live in going]
            told = [suite.instruction(live.scene.task) for live in going]
            for live, look in zip(going, think([live.seen for live in going], told, seeds), strict=True):
                live.look(look, execute)
        for live in group:
            if relief:
                live.relieve()
            yield live.close()
