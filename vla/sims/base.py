"""The adapter every simulator is put behind: gymnasium's `reset` and `step` with our observation, expert and judging.

What differs from plain gymnasium, and why: `step(..., render=False)` because a policy that executes four actions of a
chunk needs one picture in four; `expert()` because demonstrations are labelled with the clean action at a disturbed
state; `watch` because "does it do what was said, or what it always does" is answered by judging several tasks on one
rollout.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import gymnasium
import numpy as np

from vla.embodiment import EmbodimentSpec, load_embodiment
from vla.errors import DataError, UsageError
from vla.sims.suites import find_suite


class Simulator(gymnasium.Env):
    """One task in one simulator.

    Observations are `{"images": {camera: (image_size, image_size, 3) uint8}, "state": (S,) float32}`, in the units of
    `spec`; `images` is empty when a step was not rendered. `info` of every step and reset holds `success` (bool),
    `failure` (bool: the task can no longer be done, e.g. another cube was touched) and `watched` ({task: bool, whether
    that task was done so far}). An episode is terminated by success or failure and truncated after `max_steps`; the
    verdict is final, but the world goes on if it is stepped further (a watched task may yet be done). The same
    (task, seed) is the same scene in any process.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012  gymnasium's own name and form
    spec: EmbodimentSpec  # pyright: ignore[reportIncompatibleVariableOverride]  ours describes a robot, not a registration
    suite: str
    max_steps: int
    camera: str

    def __init__(
        self, task: str, *, image_size: int = 64, render_mode: str = "rgb_array", randomise: bool = False,
        max_steps: int | None = None,
    ) -> None:  # fmt: skip
        suite = find_suite(self.suite)
        if render_mode != "rgb_array":
            raise UsageError("render_mode", found=render_mode, expected="rgb_array", fix="leave it out")
        self.spec = load_embodiment(suite.embodiment)
        self.render_mode = render_mode
        self.task = task
        self.instruction = suite.instruction(task)
        self.image_size = image_size
        self.randomise = randomise
        if max_steps is not None:
            self.max_steps = max_steps
        low, high = self.spec.limits("action")
        self._low, self._high = low, high
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        low, high = self.spec.limits("state")
        picture = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict({
            "images": gymnasium.spaces.Dict(dict.fromkeys(self.spec.cameras, picture)),
            "state": gymnasium.spaces.Box(low, high, dtype=np.float32),
        })  # fmt: skip
        self._steps = -1  # before the first reset

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Put scene number `seed` on the table; returns (observation, info) as `step` does.

        `options`: `task` (another task of the same scene), `watch` (tasks judged along), `render` (default True).
        Raises `UsageError` for a missing seed or an unknown option.
        """
        options = dict(options or {})
        if seed is None or int(seed) < 0:
            raise UsageError(f"{self.suite} reset", found=f"seed {seed}", expected="a seed of 0 or more",
                             fix="reset(seed=...): a scene without a number cannot be shown again")  # fmt: skip
        unknown = options.keys() - {"task", "watch", "render"}
        if unknown:
            raise UsageError(f"{self.suite} reset", found=f"options {sorted(unknown)}",
                             expected="task, watch, render", fix="remove them")  # fmt: skip
        task = options.get("task") or self.task
        if task != self.task:
            self._change_task(task)
            self.task, self.instruction = task, find_suite(self.suite).instruction(task)
        self._steps = 0
        self._scene(int(seed))
        success, failure = self._start_judging(list(options.get("watch") or ()))
        return self._observe(options.get("render", True)), self._info(success, failure)

    def step(self, action: Any, render: bool = True) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act for one control step. `action` is (A,) in the limits of `spec` (clipped to them).

        Reward is 1 on success, else 0. Raises `DataError` for a wrong shape or a non-finite value before anything
        moves.
        """
        if self._steps < 0:
            raise UsageError(f"{self.suite} step", found="no scene yet", expected="reset first", fix="call reset(seed=...)")
        command = np.asarray(action, np.float64)
        if command.shape != self._low.shape or not np.isfinite(command).all():
            raise DataError(
                f"{self.suite} action", found=f"shape {command.shape}, {command.tolist()}",
                expected=f"{len(self._low)} finite numbers = {self.spec.action_names}",
                fix="check the policy's output; nothing was moved",
            )  # fmt: skip
        self._act(np.clip(command, self._low, self._high))
        self._steps += 1
        success, failure = self._judge()
        over, late = success or failure, self._steps >= self.max_steps
        return self._observe(render), float(success), over, late, self._info(success, failure)

    def _info(self, success: bool, failure: bool) -> dict[str, Any]:
        return {"success": success, "failure": failure, "watched": self._watched(), "step": self._steps}

    def _observe(self, render: bool) -> dict[str, Any]:
        images = {name: self.view(name, self.image_size) for name in self.spec.cameras} if render else {}
        return {"images": images, "state": self._state()}

    def __str__(self) -> str:
        return f"{self.suite} {self.task}"

    def render(self) -> Any:
        """The current picture for people, (240, 240, 3) uint8."""
        return self.frame(240)

    def close(self) -> None:
        """Nothing to close: renderers belong to the process (`vla/sims/render.py`) and are freed at its exit."""

    @abstractmethod
    def expert(self) -> np.ndarray:
        """What the scripted expert would do now, (A,) float32: a function of the world's state alone, without noise."""

    @abstractmethod
    def frame(self, size: int = 240) -> np.ndarray:
        """(size, size, 3) uint8 through the policy's camera."""

    def view(self, camera: str, size: int) -> np.ndarray:
        """(size, size, 3) uint8 through one of the robot's cameras. Most suites have one; others say how they see here."""
        assert camera == self.camera, f"{self.suite} cannot see through {camera!r}"
        return self.frame(size)

    @abstractmethod
    def _scene(self, seed: int) -> None:
        """Set the world up."""

    @abstractmethod
    def _act(self, command: np.ndarray) -> None:
        """Advance the world by one control step."""

    @abstractmethod
    def _state(self) -> np.ndarray:
        """(S,) float32 proprioception, never an object's position."""

    @abstractmethod
    def _start_judging(self, watch: list[str]) -> tuple[bool, bool]:
        """Begin judging this task and the watched ones; (success, failure) at the start."""

    @abstractmethod
    def _judge(self) -> tuple[bool, bool]:
        """(success, failure) of this task now; also updates the watched ones."""

    @abstractmethod
    def _watched(self) -> dict[str, bool]:
        """Watched task -> whether it was done so far."""

    @abstractmethod
    def _change_task(self, task: str) -> None:
        """Prepare for another task of the same scene, or raise `UsageError`."""


class OneTask(Simulator):
    """A simulator whose scenes belong to one task: success is a flag that `_act` leaves in `_done`, nothing else is judged."""

    _done = False
    _ever = False
    _watching: tuple[str, ...] = ()

    def __init__(self, task: str, **kw: Any) -> None:
        super().__init__(task, **kw)
        if self.randomise:
            raise UsageError(self.suite, found="randomise=True", expected="the package's scenes as they are",
                             fix="randomise the tabletop suite instead")  # fmt: skip

    def _start_judging(self, watch: list[str]) -> tuple[bool, bool]:
        if set(watch) - {self.task}:
            raise UsageError(f"{self.suite} watch {watch}", found="another task", expected=f"only {self.task!r}",
                             fix="every task here has its own scene; watch tasks on the tabletop")  # fmt: skip
        self._watching, self._done, self._ever = tuple(watch), False, False
        return False, False

    def _judge(self) -> tuple[bool, bool]:
        self._ever = self._ever or self._done
        return self._done, False

    def _watched(self) -> dict[str, bool]:
        return dict.fromkeys(self._watching, self._ever)

    def _change_task(self, task: str) -> None:
        raise UsageError(f"{self.suite} task {task!r}", found=f"a scene of {self.task!r}",
                         expected="the task the simulator was made for", fix="make another simulator")  # fmt: skip
