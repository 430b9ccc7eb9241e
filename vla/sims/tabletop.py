"""`tabletop`: four coloured cubes and a six-joint arm in one scene, where only the instruction says what to do.

Ours, MJCF from primitives, needs only MuJoCo. Three verbs (touch, push left/right/away, lift) times four colours are 20
tasks. Scene number `seed` is the same whatever the task, so a swapped instruction can be judged on the very same scene.
Models, the inverse-kinematics twin and the renderer are shared by all simulators of a process; a simulator owns its
`MjData` (and, when randomised, its numbers). Not safe to step from several threads.

`tabletop-wrist` shows the same to a second camera; `tabletop-long` asks for several of the tasks, one after the other.
"""

from __future__ import annotations

import colorsys
import copy
import functools
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, ClassVar

import mujoco as _mujoco
import numpy as np

from vla.errors import UsageError
from vla.sims.base import Simulator
from vla.sims.render import eye_for
from vla.sims.suites import COLOURS, find_suite
from vla.sims.tabletop_long import STEPS_EACH, GoalJudge, goal_expert, progress
from vla.sims.tabletop_tasks import STEP, Judge, expert

mujoco: Any = _mujoco  # its compiled parts carry no types
_XML = Path(__file__).with_name("tabletop.xml")
_ARM = 6
_FINGER = 0.03
"""Metres a finger travels; opening is its joint over this."""
_HALF = 0.017
_AREA = ((0.24, 0.42), (-0.15, 0.15))
"""Cube centres (x, y), 18 x 30 cm."""
_APART = 0.09
_REACH = np.array([[0.14, -0.27, 0.011], [0.52, 0.27, 0.3]])
"""The hand's workspace: commands beyond it are clipped to it."""
_HOME = np.array([[0.2, -0.12, 0.13], [0.32, 0.12, 0.2]])
_READY = np.array([0.0, 0.2, 0.35, -0.55, 0.0, 0.0])
"""Joint angles from which inverse kinematics starts, elbow up."""
_RAMP = ((5, 1 / 3), (5, 2 / 3), (10, 1.0))
"""One control step of 100 ms as (physics steps, part of the way): a hand that jumps would shoot the cube away."""


class Tabletop(Simulator):
    """See the module. State: hand x, y, z in metres and finger opening 0..1; action: dx, dy, dz (1 = 2 cm), close."""

    suite = "tabletop"
    max_steps = 40
    camera = "front"
    rules: ClassVar[type[Judge | GoalJudge]] = Judge

    def __init__(self, task: str, **kw: Any) -> None:
        super().__init__(task, **kw)
        shared, self._twin = _models()
        self._model = copy.copy(shared) if self.randomise else shared
        self._data = mujoco.MjData(self._model)
        self._twin_data = _twin_data()
        self._camera_ids = {name: self._model.camera(name).id for name in self.spec.cameras}
        self._site = self._model.site("ee").id
        self._cubes = [self._model.body(colour).id for colour in COLOURS]
        self._judge_of: Any = self.rules(task, np.zeros((4, 3)))
        self._watching: dict[str, Any] = {}

    # ------------------------------------------------------------------ the world

    def _scene(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        places = _places(rng)
        yaws = rng.uniform(-0.3, 0.3, len(COLOURS))
        home = rng.uniform(*_HOME)
        if self.randomise:  # its own stream: the places of a seed are the same with and without
            randomise(self._model, np.random.default_rng([seed, 1]))
        mujoco.mj_resetData(self._model, self._data)
        joints = self._solve(_READY, home, iterations=60)
        self._data.qpos[:_ARM] = self._data.ctrl[:_ARM] = joints
        self._data.qpos[_ARM : _ARM + 2] = self._data.ctrl[_ARM : _ARM + 2] = _FINGER
        for i, (place, yaw) in enumerate(zip(places, yaws, strict=True)):
            at = _ARM + 2 + 7 * i
            self._data.qpos[at : at + 7] = [*place, _HALF, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        mujoco.mj_forward(self._model, self._data)

    def _act(self, command: np.ndarray) -> None:
        target = np.clip(self._hand() + STEP * command[:3], *_REACH)
        data = self._data
        begin = data.ctrl[:_ARM].copy()
        change = self._solve(data.qpos[:_ARM], target, iterations=3) - begin
        data.ctrl[_ARM : _ARM + 2] = _FINGER * (1 - command[3]) / 2
        for steps, part in _RAMP:
            data.ctrl[:_ARM] = begin + part * change
            mujoco.mj_step(self._model, data, steps)
        # mj_step leaves positions one step ahead of the derived frames that judging and drawing read.
        mujoco.mj_kinematics(self._model, data)

    def _solve(self, joints: np.ndarray, target: np.ndarray, iterations: int) -> np.ndarray:
        """(6,) joint angles that bring the hand to `target` (3,) pointing down: damped least squares from `joints`."""
        model, data = self._twin, self._twin_data
        data.qpos[:_ARM] = joints
        jacobian = np.empty((6, model.nv))
        error = np.empty(6)
        damping = 1e-4 * np.eye(6)
        low, high = model.jnt_range[:_ARM].T
        for _ in range(iterations):
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], self._site)
            r = data.site_xmat[self._site]
            error[:3] = target - data.site_xpos[self._site]
            error[3:] = (r[5] - r[7]) / 2, (r[6] - r[2]) / 2, (r[1] - r[3]) / 2  # the turn back to upright
            if abs(error).max() < 1e-4:  # a tenth of a millimetre, and of a milliradian
                break
            arm = jacobian[:, :_ARM]
            data.qpos[:_ARM] += arm.T @ np.linalg.solve(arm @ arm.T + damping, error)
            np.clip(data.qpos[:_ARM], low, high, out=data.qpos[:_ARM])
        return data.qpos[:_ARM].copy()

    def _hand(self) -> np.ndarray:
        return self._data.site_xpos[self._site]

    def _opening(self) -> float:
        return float(self._data.qpos[_ARM : _ARM + 2].mean() / _FINGER)

    def places(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Where the hand (3,) and each colour's cube (3,) are: metres, the robot's frame."""
        return self._hand().copy(), {colour: place.copy() for colour, place in zip(COLOURS, self._cube_places(), strict=True)}

    def _cube_places(self) -> np.ndarray:
        return self._data.xpos[self._cubes]

    def _state(self) -> np.ndarray:
        return np.array([*self._hand(), self._opening()], np.float32)

    # ------------------------------------------------------------------ the task

    def expert(self) -> np.ndarray:
        """(4,) float32; see `vla/sims/tabletop_tasks.py`."""
        return expert(self.task, self._hand(), self._opening(), self._cube_places())

    def _start_judging(self, watch: list[str]) -> tuple[bool, bool]:
        for task in watch:
            self._change_task(task)
        start = self._cube_places().copy()
        self._judge_of = self.rules(self.task, start)
        self._watching = {task: self.rules(task, start) for task in watch}
        return self._judge()

    def _judge(self) -> tuple[bool, bool]:
        hand, cubes = self._hand(), self._cube_places()
        for judge in self._watching.values():
            judge.update(hand, cubes)
        status = self._judge_of.update(hand, cubes)
        return status > 0, status < 0

    def _watched(self) -> dict[str, bool]:
        return {task: judge.status > 0 for task, judge in self._watching.items()}

    def _change_task(self, task: str) -> None:
        known = find_suite(self.suite).known
        if task not in known:
            raise UsageError(f"task {task!r}", found=f"no such task in {self.suite}", expected=f"one of its {len(known)} tasks",
                             fix=f"see vla.sims.SUITES[{self.suite!r}].known")  # fmt: skip

    # ------------------------------------------------------------------ pictures

    def frame(self, size: int = 240) -> np.ndarray:
        """(size, size, 3) uint8 through `front`."""
        return self.view(self.camera, size)

    def view(self, camera: str, size: int) -> np.ndarray:
        return eye_for("tabletop", self._model, size).picture(self._model, self._data, self._camera_ids[camera])


class TabletopWrist(Tabletop):
    """The same scenes and tasks, seen by a second camera on the hand as well."""

    suite = "tabletop-wrist"


class TabletopLong(Tabletop):
    """The same scenes under goals of several subtasks (`vla/sims/tabletop_goals.py`), each of them a task of the tabletop.

    `info` says more than other suites': `subtask` ({index, task, instruction} of what is to be done now; None at the end), `done`
    and `plan` (tasks, in the order they were done and are going to be). The limit is `STEPS_EACH` steps per subtask.
    """

    suite = "tabletop-long"
    rules = GoalJudge

    def __init__(self, task: str, *, max_steps: int | None = None, **kw: Any) -> None:
        super().__init__(task, max_steps=max_steps, **kw)
        self._limit = max_steps

    def _start_judging(self, watch: list[str]) -> tuple[bool, bool]:
        status = super()._start_judging(watch)
        self.max_steps = self._limit or STEPS_EACH * len(self._judge_of.subtasks)
        return status

    def _info(self, success: bool, failure: bool) -> dict[str, Any]:
        return super()._info(success, failure) | progress(self._judge_of)

    def expert(self) -> np.ndarray:
        """(4,) float32; see `vla/sims/tabletop_long.py`."""
        return goal_expert(self._judge_of, self._hand(), self._opening(), self._cube_places())


def randomise(model: Any, rng: np.random.Generator) -> None:
    """Change `model`'s looks and physics in place, always starting from the plain scene.

    Cube hue +-0.03 (of 1; yellow +-0.015), saturation and value x 0.8..1.1; table value x 0.6..1.3 with +-0.06 per
    colour channel; arm x 0.7..1.05; light: brightness x 0.6..1.3, direction +-0.4 in x and y; camera: +-1.5 cm in x, y
    and z, +-0.02 rad about each axis, field of view +-1.5 degrees; friction of cubes and table x 0.7..1.4; each cube's
    mass x 0.5..2.
    """
    plain, _ = _models()
    for colour in COLOURS:
        geom = plain.geom(colour).id
        hue, saturation, value = colorsys.rgb_to_hsv(*plain.geom_rgba[geom, :3])
        spread = 0.015 if colour == "yellow" else 0.03
        hue = (hue + rng.uniform(-spread, spread)) % 1
        saturation, value = np.clip([saturation, value] * rng.uniform(0.8, 1.1, 2), 0, 1)
        model.geom_rgba[geom, :3] = colorsys.hsv_to_rgb(hue, float(saturation), float(value))
        body, mass = plain.body(colour).id, rng.uniform(0.5, 2)
        model.body_mass[body] = plain.body_mass[body] * mass
        model.body_inertia[body] = plain.body_inertia[body] * mass
        model.geom_friction[geom, 0] = plain.geom_friction[geom, 0] * rng.uniform(0.7, 1.4)
    table = plain.geom("table").id
    shade = plain.geom_rgba[table, :3] * rng.uniform(0.6, 1.3) + rng.uniform(-0.06, 0.06, 3)
    model.geom_rgba[table, :3] = np.clip(shade, 0, 1)
    model.geom_friction[table, 0] = plain.geom_friction[table, 0] * rng.uniform(0.7, 1.4)
    arm = [i for i in range(plain.ngeom) if i != table and plain.geom(i).name not in COLOURS]
    model.geom_rgba[arm, :3] = np.clip(plain.geom_rgba[arm, :3] * rng.uniform(0.7, 1.05), 0, 1)
    model.light_diffuse[0] = plain.light_diffuse[0] * rng.uniform(0.6, 1.3)
    direction = plain.light_dir[0] + [*rng.uniform(-0.4, 0.4, 2), 0]
    model.light_dir[0] = direction / np.linalg.norm(direction)
    model.cam_pos[0] = plain.cam_pos[0] + rng.uniform(-0.015, 0.015, 3)
    turn = np.empty(4)
    mujoco.mju_mulQuat(turn, plain.cam_quat[0], np.array([1, *rng.uniform(-0.01, 0.01, 3)]))  # half angles
    model.cam_quat[0] = turn / np.linalg.norm(turn)
    model.cam_fovy[0] = plain.cam_fovy[0] + rng.uniform(-1.5, 1.5)
    mujoco.mj_setConst(model, mujoco.MjData(model))  # weights derived from the masses


@functools.cache
def _models() -> tuple[Any, Any]:
    """(the scene, its twin without cubes); compiled once per process."""
    tree = ElementTree.parse(_XML)
    scene = mujoco.MjModel.from_xml_string(ElementTree.tostring(tree.getroot(), encoding="unicode"))
    world = tree.getroot().find("worldbody")
    assert world is not None
    for body in world.findall("body"):
        if body.get("name") in COLOURS:
            world.remove(body)
    return scene, mujoco.MjModel.from_xml_string(ElementTree.tostring(tree.getroot(), encoding="unicode"))


@functools.cache
def _twin_data() -> Any:
    return mujoco.MjData(_models()[1])


def _places(rng: np.random.Generator) -> np.ndarray:
    """(4, 2) cube centres in `_AREA`, every two of them `_APART`."""
    (x0, x1), (y0, y1) = _AREA
    pairs = np.triu_indices(len(COLOURS), 1)
    while True:
        places = rng.uniform((x0, y0), (x1, y1), (len(COLOURS), 2))
        gaps = np.linalg.norm(places[pairs[0]] - places[pairs[1]], axis=1)
        if gaps.min() >= _APART:
            return places
