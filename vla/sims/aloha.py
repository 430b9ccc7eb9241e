"""`aloha`: the two ViperX arms of gym-aloha 0.1.5 with absolute joint positions, and our own scripted expert.

The package's environment draws three 640 x 480 pictures in every step of 20 ms, so its physics and its task are used
directly. A command stands for five of its steps (10 Hz) and is approached on a straight line, as a trajectory
controller would; held from the first step it would throw the cube. Success is the package's reward, judged after each
command: `transfer-cube` is its 4 (the left gripper touches the cube, the table does not); `lift`, a stage of that task
made a task of its own, is its 2 (the right gripper touches it, the table does not) with the cube 4 cm up, since a cube
that tips over a finger scores 2 as well.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import numpy as np

from vla.sims.base import OneTask
from vla.sims.render import View, choose_gl, eye_for

# dm_control would start an OpenGL display of its own and end ours with it at exit; it draws nothing here.
_chosen = choose_gl()
os.environ["MUJOCO_GL"] = "off"
from dm_control import mujoco as dm  # noqa: E402
from dm_control.mujoco import wrapper  # noqa: E402
from gym_aloha import constants, utils  # noqa: E402
from gym_aloha.tasks import sim as tasks  # noqa: E402

os.environ["MUJOCO_GL"] = _chosen
if not _chosen:  # a machine whose OpenGL needs no choice
    del os.environ["MUJOCO_GL"]

_REWARD = {"lift": 2, "transfer-cube": 4}
_LIFTED = 0.06
"""Metres of the cube's centre over the table; it lies at 0.02."""
_STEPS, _SUBSTEPS = 5, 10
"""Control steps of the package (20 ms) in a command; physics steps in one of those."""
_VIEW = View(lookat=(0.1, 0.53, 0.12), distance=0.6, azimuth=90, elevation=-35)
_START = np.array(constants.START_ARM_POSE)
_ARMS = {"left": (slice(0, 6), 6), "right": (slice(7, 13), 13)}
"""Where a 14-number state or command keeps an arm's joints and its gripper."""
_BASE = {"left": np.array([-0.469, 0.5]), "right": np.array([0.469, 0.5])}
_SHOULDER, _UPPER, _ELBOW_OFF, _FOREARM = 0.12705, 0.3, 0.05955, 0.3
"""Metres: height of the shoulder, the upper arm up and forward, the forearm (vx300s_left.xml)."""
_TOOL = 0.069744 + 0.125
"""Metres from the wrist's hinge to between the finger tips."""
_PITCH = 1.3
"""Rad below level at which a hand picks the cube up."""
_MEETING, _LEVEL = np.array([0.0, 0.5, 0.25]), 0.3
"""Where the cube changes hands, metres, and the pitch of both hands there."""
_HELD = 0.68
"""A gripper less open than this that is around the cube holds it."""
_FASTEST = 0.12
"""Largest change of a joint the expert asks for in a command, rad: 1.2 rad/s."""


class Aloha(OneTask):
    """See the module. State and action: left joints (6, rad), left gripper (0 shut..1 open), then the right ones."""

    suite = "aloha"
    max_steps = 80
    camera = "front"

    def __init__(self, task: str, **kw: Any) -> None:
        super().__init__(task, **kw)
        self._physics = dm.Physics.from_model(_compiled())
        self._world = tasks.TransferCubeTask(random=0)
        self._model, self._data = self._physics.model.ptr, self._physics.data.ptr
        self._cube = self._model.body("box").id
        self._links = {side: self._model.body(f"vx300s_{side}/gripper_link").id for side in _ARMS}

    def _scene(self, seed: int) -> None:
        places: Any = tasks.BOX_POSE  # the package hands the cube's place over in a global
        places[0] = utils.sample_box_pose(seed)
        with self._physics.reset_context():
            self._world.initialize_episode(self._physics)

    def _act(self, command: np.ndarray) -> None:
        now = self._commanded()
        for i in range(1, _STEPS + 1):
            self._world.before_step(now + (command - now) * i / _STEPS, self._physics)
            self._physics.step(_SUBSTEPS)
        up = self.task != "lift" or self._data.xpos[self._cube, 2] > _LIFTED
        self._done = bool(up and self._world.get_reward(self._physics) >= _REWARD[self.task])

    def _commanded(self) -> np.ndarray:
        """(14,) what the servos were told last."""
        ctrl = self._data.ctrl
        grippers = [constants.normalize_puppet_gripper_position(ctrl[i]) for i in (6, 14)]
        return np.concatenate([ctrl[:6], grippers[:1], ctrl[8:14], grippers[1:]])

    def _state(self) -> np.ndarray:
        return self._world.get_qpos(self._physics).astype(np.float32)

    def _tip(self, side: str) -> np.ndarray:
        """(3,) the place between the finger tips."""
        link = self._links[side]
        return self._data.xpos[link] + self._data.xmat[link].reshape(3, 3)[:, 0] * (_TOOL - 0.069744)

    def expert(self) -> np.ndarray:
        """(14,) float32 from the places of both hands and the cube now."""
        state, cube = self._world.get_qpos(self._physics), self._data.xpos[self._cube].copy()
        want = np.concatenate([_START[:6], [0.1], _START[8:14], [1.0]])
        (left, left_gripper), (right, right_gripper) = _ARMS["left"], _ARMS["right"]
        tip = self._tip("right")
        place, want[right_gripper] = grasp(tip, state[right_gripper], cube)
        if self.task == "transfer-cube" and np.linalg.norm(tip - cube) < 0.03 and cube[2] > 0.05 and place[2] > cube[2] + 0.05:
            want[right] = solve("right", tip + np.clip(_MEETING - cube, -0.06, 0.06), _LEVEL)
            near = np.linalg.norm(_MEETING - cube) < 0.03
            want[left] = solve("left", cube + [0.0 if near else -0.1, 0, 0], _LEVEL, math.pi / 2)
            want[left_gripper] = 0.0 if np.linalg.norm(self._tip("left") - cube) < 0.015 else 1.0
        else:
            want[right] = solve("right", place, _PITCH)
        change = want - state
        for arm, _ in _ARMS.values():
            want[arm] = state[arm] + change[arm] * min(1.0, _FASTEST / max(abs(change[arm]).max(), 1e-9))
        return np.clip(want, self._low, self._high).astype(np.float32)

    def frame(self, size: int = 240) -> np.ndarray:
        """(size, size, 3) uint8 from in front of the table and above, near enough to see the cube."""
        return eye_for("aloha", self._model, size).picture(self._model, self._data, _VIEW)


def grasp(tip: np.ndarray, opening: float, cube: np.ndarray) -> tuple[np.ndarray, float]:
    """Where the right hand goes next (3,), and its gripper: above the cube open, down, close, up."""
    off, height = float(np.linalg.norm(tip[:2] - cube[:2])), float(tip[2] - cube[2])
    low = cube + [0, 0, 0.012]  # lower, the fingers rub on the table and do not close
    if off < 0.02 and abs(height) < 0.025:
        return low + [0, 0, 0.08 if opening < _HELD else 0.0], 0.0
    if off < 0.01 and opening > 0.75:
        return low, 1.0
    return np.array([*cube[:2], cube[2] + 0.08]), 1.0


def solve(side: str, place: np.ndarray, pitch: float, roll: float = 0.0) -> np.ndarray:
    """(6,) joint angles that bring the finger tips to `place` (3,), the hand `pitch` rad below level: closed form.

    The arm works in the upright plane through its waist: waist towards the place, forearm roll 0, then the two-link
    triangle of upper arm and forearm to the wrist. A place out of reach is drawn in to the nearest reachable radius.
    """
    ahead = place[:2] - _BASE[side]
    waist = math.atan2(ahead[1], ahead[0]) if side == "left" else math.atan2(-ahead[1], -ahead[0])
    r = math.hypot(*ahead) - _TOOL * math.cos(pitch)
    z = place[2] - _SHOULDER + _TOOL * math.sin(pitch)
    upper, lean = math.hypot(_UPPER, _ELBOW_OFF), math.atan2(_ELBOW_OFF, _UPPER)
    far = min(math.hypot(r, z), upper + _FOREARM - 1e-3)
    # Angles from the vertical, forward positive, as the joints count them.
    to_wrist = math.atan2(r, z)
    at_shoulder = math.acos(np.clip((upper**2 + far**2 - _FOREARM**2) / (2 * upper * far), -1, 1))
    at_elbow = math.acos(np.clip((upper**2 + _FOREARM**2 - far**2) / (2 * upper * _FOREARM), -1, 1))
    shoulder = to_wrist - at_shoulder - lean
    forearm = to_wrist - at_shoulder + math.pi - at_elbow  # of the forearm, from the vertical
    elbow = forearm - math.pi / 2 - shoulder
    return np.array([waist, shoulder, elbow, 0.0, pitch - shoulder - elbow, roll])


@functools.cache
def _compiled() -> Any:
    """The package's model, compiled once per process; nothing in it changes afterwards."""
    return wrapper.MjModel.from_xml_path(str(constants.ASSETS_DIR / "bimanual_viperx_transfer_cube.xml"))
