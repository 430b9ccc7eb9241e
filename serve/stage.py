"""What a station's runs are made of: a robot, who plans, who may drive in the policy's place, and the way back. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from serve.loop import RobotIO
from serve.planner import Planner
from serve.progress import Progress
from vla.errors import UsageError


class Demonstrator(Protocol):
    """Drives the robot in the policy's place, through the same loop and guard: a person's device, or a scripted expert."""

    def begin(self, instruction: str) -> None:
        """It is asked to do this from now on."""
        ...

    def act(self, observation: Mapping[str, Any]) -> np.ndarray | None:
        """The action (A,) of this tick, robot units, None when it is finished: what it did is a correction then. The loop waits
        for it: at once. Raises `VLAError` when it gives up, and a person is asked again."""
        ...


@dataclass
class Scene:
    """What a run is made of."""

    io: RobotIO
    """May also have `success` (bool or None: its word for it), `verdict` (why it failed), `show()` (pictures for people, by
    camera) and `helped()` (told when a person helps)."""
    planner: Planner
    progress: Progress | None = None
    demonstrator: Demonstrator | None = None
    retreat: Callable[[Mapping[str, Any]], np.ndarray | None] | None = None
    """The driver's own way back to where it is safe, an action a tick, None when it is there. Else the last seconds undone."""
    task: str = ""
    seed: int | None = None


class Stage(Protocol):
    """What a station runs on. `check` from any thread; `begin`, `idle` and `close` from the station's."""

    @property
    def goals(self) -> Sequence[str]: ...

    @property
    def instructions(self) -> Sequence[str]:
        """What an operator is offered."""
        ...

    def check(self, goal: str, scene: int | None) -> None:
        """Raise `VLAError` for a goal, or a scene, that cannot be had here."""
        ...

    def begin(self, goal: str, scene: int | None) -> Scene:
        """A run begins."""
        ...

    def idle(self, watched: bool) -> Mapping[str, Any] | None:
        """Pictures while nothing runs, None for no newer ones."""
        ...

    def close(self) -> None: ...


class OneRobot:
    """The stage of a real robot: one driver, one planner, no scenes."""

    def __init__(
        self, robot_io: RobotIO, planner: Planner, progress: Progress | None = None, demonstrator: Demonstrator | None = None,
        retreat: Callable[[Mapping[str, Any]], Any] | None = None, goals: Sequence[str] = (), instructions: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """As `Scene`; `goals`, `instructions`: what an operator is offered. `robot_io` may have what a `Scene`'s may."""
        self._scene = Scene(robot_io, planner, progress, demonstrator, retreat)
        self.goals, self.instructions = tuple(goals), tuple(instructions)

    def check(self, goal: str, scene: int | None) -> None:
        if scene is not None:
            raise UsageError("scene", found=scene, expected="none: the robot stands in the only one", fix="leave it out")

    def begin(self, goal: str, scene: int | None) -> Scene:
        return self._scene

    def idle(self, watched: bool) -> Mapping[str, Any] | None:
        return self._scene.io.observe().get("images") if watched else None

    def close(self) -> None:
        """The driver is its owner's."""
