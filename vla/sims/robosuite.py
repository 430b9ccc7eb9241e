"""`robosuite-panda` and `robosuite-ur5e`: robosuite 1.5's Lift with two arms under operational-space control.

robosuite needs numpy below 2 (its inverse kinematics pin it), so simulators are made only by the interpreter of
`.venv-robosuite`; everybody else talks to them through `vla/sims/remote.py`.

Three things differ from the package as it comes: the cube lies anywhere in 16 x 24 cm, turned by up to 0.4 rad, where the
package's own 6 x 6 cm could be lifted blindly; its observations, which nobody here reads, are not computed; and the
simulators of a process take turns in one world per arm, because making one takes seconds and half a gigabyte.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from typing import Any

import mujoco as _mujoco
import numpy as np

from vla.sims.base import OneTask
from vla.sims.render import View, choose_gl, eye_for

mujoco: Any = _mujoco  # its compiled parts carry no types

_AREA = ((-0.08, 0.08), (-0.12, 0.12))
"""Cube centres (x, y), metres from the middle of the table."""
_TURNED = (-0.4, 0.4)
_TABLE = (0.0, 0.0, 0.8)
_VIEW = View(lookat=(-0.04, 0.0, 0.89), distance=0.68, azimuth=180, elevation=-30)
_COLLISION_GROUP = 0
"""robosuite draws meshes; the shapes that collide are in this group of geoms."""
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
_DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
"""Attitude of a hand that points down, columns its axes."""
_EMPTY = 0.35
"""A gripper less open than this has nothing between its fingers."""
_STEP, _TURN = 0.05, 0.5
"""Metres and radians of an action of 1."""


class _World:
    """One arm, one table, one cube: made once per process, lent to one simulator after the other."""

    def __init__(self, robot: str) -> None:
        choose_gl()  # robosuite looks at MUJOCO_GL when it is imported
        package: Any = importlib.import_module("robosuite")
        controllers: Any = importlib.import_module("robosuite.controllers")
        samplers: Any = importlib.import_module("robosuite.utils.placement_samplers")
        logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # notices about what is not used
        sampler = samplers.UniformRandomSampler(
            name="cube", x_range=_AREA[0], y_range=_AREA[1], rotation=_TURNED, reference_pos=np.array(_TABLE),
            ensure_object_boundary_in_range=False, z_offset=0.01, rng=np.random.default_rng(0),
        )  # fmt: skip
        self.env: Any = package.make(
            "Lift", robots=robot, controller_configs=controllers.load_composite_controller_config(robot=robot), seed=0,
            placement_initializer=sampler, control_freq=10, hard_reset=False, ignore_done=True, renderer="mujoco",
            has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False, use_object_obs=False,
        )  # fmt: skip
        self.env._update_observables = lambda force=False: None
        self.sampler = sampler
        self.owner: Any = None
        self.model, self.data = self.env.sim.model._model, self.env.sim.data._data
        self.arm = self.env.robots[0]
        self.gripper = self.arm.gripper["right"]
        self.site = self.model.site(self.gripper.important_sites["grip_site"]).id
        self.finger = self.arm._ref_gripper_joint_pos_indexes["right"][0]
        controller = self.arm.part_controllers["right"]
        self.origin, self.axes = np.array(controller.origin_pos), np.array(controller.origin_ori)

    def reset(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.env.rng = self.sampler.rng = rng
        self.env.reset()
        mujoco.mj_forward(self.model, self.data)

    def save(self) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
        """MuJoCo's state, the controllers (each reset makes new ones) and the ramp of the gripper."""
        state = np.empty(mujoco.mj_stateSize(self.model, _STATE))
        mujoco.mj_getState(self.model, self.data, state, _STATE)
        return state, dict(self.arm.part_controllers), np.array(self.gripper.current_action)

    def restore(self, saved: tuple[np.ndarray, dict[str, Any], np.ndarray]) -> None:
        """The world as it was at `save`."""
        mujoco.mj_setState(self.model, self.data, saved[0], _STATE)
        mujoco.mj_forward(self.model, self.data)
        mujoco.mj_setState(self.model, self.data, saved[0], _STATE)  # the solver's starting point moved with `forward`
        self.arm.part_controllers.update(saved[1])
        self.gripper.current_action = saved[2].copy()


@functools.cache
def _world(robot: str) -> _World:
    return _World(robot)


class _Lift(OneTask):
    """See the module. State: hand (3, m), its attitude (6), gripper opening 0..1; action: displacement, turn, gripper."""

    max_steps = 80
    camera = "front"
    robot: str
    shut: float
    """The first finger joint when the gripper is shut."""
    wide: float
    """... and when it is open."""
    held: float
    """A gripper less open than this that is around the cube holds it."""
    low: float
    """Metres of the grip site over the cube's centre in a grasp."""

    def __init__(self, task: str, **kw: Any) -> None:
        super().__init__(task, **kw)
        self._world = _world(self.robot)
        self._saved: Any = None

    def _enter(self) -> _World:
        """The world, in this simulator's state."""
        world = self._world
        if world.owner is not self:
            if world.owner is not None:
                world.owner._saved = world.save()
            if self._saved is not None:
                world.restore(self._saved)
            world.owner = self
        return world

    def close(self) -> None:
        """Leave the world to the others."""
        if self._world.owner is self:
            self._world.owner = None
        self._saved = None

    def _scene(self, seed: int) -> None:
        self._enter().reset(seed)

    def _act(self, command: np.ndarray) -> None:
        world = self._enter()
        world.env.step(command)
        mujoco.mj_forward(world.model, world.data)  # frames as they are now, whoever acts next
        self._done = bool(world.env._check_success())

    def _hand(self, world: _World) -> tuple[np.ndarray, np.ndarray]:
        """Place (3,) and attitude (3, 3) of the grip site in the world."""
        return world.data.site_xpos[world.site], world.data.site_xmat[world.site].reshape(3, 3)

    def _opening(self, world: _World) -> float:
        return float((world.data.qpos[world.finger] - self.shut) / (self.wide - self.shut))

    def _state(self) -> np.ndarray:
        world = self._enter()
        place, attitude = self._hand(world)
        place, attitude = world.axes.T @ (place - world.origin), world.axes.T @ attitude
        return np.array([*place, *attitude[:, 0], *attitude[:, 1], self._opening(world)], np.float32)

    def expert(self) -> np.ndarray:
        """(7,) float32 in [-1, 1] from hand, gripper and cube now: turn down, above it open, down, close, up."""
        world = self._enter()
        place, attitude = self._hand(world)
        cube, opening = world.data.xpos[world.env.cube_body_id], self._opening(world)
        side = world.data.xmat[world.env.cube_body_id].reshape(3, 3)[:, 0]
        yaw = math.atan2(side[1], side[0])
        yaw -= round(yaw / (math.pi / 2)) * math.pi / 2  # a cube looks the same after a quarter turn
        turn = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
        quat = np.empty(4)
        mujoco.mju_mat2Quat(quat, (turn @ _DOWN @ attitude.T).ravel())
        rotation = np.empty(3)
        mujoco.mju_quat2Vel(rotation, quat, 1.0)
        to, close = lift(place, opening, cube + [0, 0, self.low], self.held)
        delta = world.axes.T @ ((to - place) / _STEP * 1.6)
        return np.clip([*delta, *(world.axes.T @ rotation / _TURN * 1.2), close], -1, 1).astype(np.float32)

    def frame(self, size: int = 240) -> np.ndarray:
        """(size, size, 3) uint8 from in front of the table, looking at the arm."""
        world = self._enter()
        return eye_for(("robosuite", self.robot), world.model, size, hide=_COLLISION_GROUP).picture(
            world.model, world.data, _VIEW
        )


class PandaLift(_Lift):
    """Franka Panda with its two-finger hand."""

    suite = "robosuite-panda"
    robot, shut, wide, held, low = "Panda", 0.0, 0.04, 0.6, 0.0


class UR5eLift(_Lift):
    """UR5e with a Robotiq 2F-85."""

    suite = "robosuite-ur5e"
    robot, shut, wide, held, low = "UR5e", 0.8, 0.0, 0.6, 0.0


def lift(hand: np.ndarray, opening: float, cube: np.ndarray, held: float) -> tuple[np.ndarray, float]:
    """Where the hand goes next (3,), and the gripper's command (1 shuts), all in the world's frame."""
    off, height = float(np.linalg.norm(hand[:2] - cube[:2])), float(hand[2] - cube[2])
    around = off < 0.014 and abs(height) < 0.014
    shutting = off < 0.03 and abs(height) < 0.025 and _EMPTY < opening < 0.93  # a push aside is no reason to let go
    if around or shutting:
        return cube + [0, 0, 0.06 if _EMPTY < opening < held else 0.0], 1.0 if opening > _EMPTY else -1.0
    least = 0.0 if opening > 0.85 else 0.05  # open above, not beside
    clear = max(least, min(0.09, max(0.0, off - 0.01) * 3))  # a funnel: the nearer, the lower
    across = cube[:2] if height > clear - 0.03 else hand[:2]
    return np.array([*across, cube[2] + clear]), -1.0
