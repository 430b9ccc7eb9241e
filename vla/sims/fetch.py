"""`fetch`: the Fetch arm of gymnasium-robotics 1.4 (reach, push, pick and place), with our own scripted experts.

Four things differ from the package as it comes, and a figure measured here must be read with them: an action of 1 is 2 cm
instead of 5 (an episode would be three steps long otherwise); a scene that is solved before anything moved gets another
goal; the picture is taken from nearer and the red goal is drawn larger, so that it can be seen in 64 pixels; renders are
ours, since the package's own take 100 ms. Success is the package's: hand or block within 5 cm of the goal.
"""

from __future__ import annotations

import functools
from typing import Any

import farama_notifications
import mujoco as _mujoco
import numpy as np

from vla.sims.base import OneTask
from vla.sims.render import View, choose_gl, eye_for

choose_gl()  # gymnasium's MuJoCo module looks at MUJOCO_GL when the lines below import it
farama_notifications.notifications.pop("gymnasium_robotics", None)  # about robot hands, on every start's stderr
from gymnasium_robotics.envs.fetch.pick_and_place import MujocoFetchPickAndPlaceEnv  # noqa: E402
from gymnasium_robotics.envs.fetch.push import MujocoFetchPushEnv  # noqa: E402
from gymnasium_robotics.envs.fetch.reach import MujocoFetchReachEnv  # noqa: E402

mujoco: Any = _mujoco  # its compiled parts carry no types

STEP = 0.4
"""Of the package's action of 1, which is 5 cm."""
_MADE = 0.0128
"""Metres the hand really moves in a step at our action of 1: the arm follows its target softly."""
_FINGER = 0.05
"""Metres a finger travels."""
_GOAL_RADIUS = {"reach": 0.05, "push": 0.03, "pick-and-place": 0.03}
"""Metres; in `reach` the ball is the region that counts, in the others it would hide the block."""
_SLOW = 0.5
"""Largest action of the expert of `reach`: at full speed an episode would be five steps."""
_CLASSES = {"reach": MujocoFetchReachEnv, "push": MujocoFetchPushEnv, "pick-and-place": MujocoFetchPickAndPlaceEnv}
_VIEWS = {
    "reach": View(lookat=(1.34, 0.75, 0.53), distance=0.65, azimuth=90, elevation=-25),
    "push": View(lookat=(1.34, 0.75, 0.44), distance=0.65, azimuth=180, elevation=-28),
    "pick-and-place": View(lookat=(1.34, 0.75, 0.53), distance=0.75, azimuth=180, elevation=-25),
}
"""From where the hand hides the goal least: never in 60 scenes of `reach`, in 1 of `push`."""
_FIELD = 60.0
"""Degrees of the camera: close and wide, since only perspective tells how far away a ball hangs."""


class Fetch(OneTask):
    """See the module. State: hand x, y, z in metres and gripper opening 0..1; action: dx, dy, dz (1 = 2 cm), gripper.

    In `reach` and `push` the package holds the gripper shut whatever the fourth number says.
    """

    suite = "fetch"
    max_steps = 90
    camera = "side"

    def __init__(self, task: str, **kw: Any) -> None:
        super().__init__(task, **kw)
        self._env = _env_class(task)()
        self._target = self._env.model.site("target0").id
        self._hand_site = self._env.model.site("robot0:grip").id
        self._fingers = [self._env.model.joint(f"robot0:{side}_gripper_finger_joint").qposadr[0] for side in "lr"]
        self._block_site = self._env.model.site("object0").id if task != "reach" else None

    def _scene(self, seed: int) -> None:
        env = self._env
        env.reset(seed=seed)
        while self._solved():
            env.goal = env._sample_goal()

    def _solved(self) -> bool:
        return bool(self._env._is_success(self._env._get_obs()["achieved_goal"], self._env.goal))

    def _act(self, command: np.ndarray) -> None:
        self._env.step(np.array([*(STEP * command[:3]), command[3]], np.float32))
        self._done = self._solved()

    def _hand(self) -> np.ndarray:
        return self._env.data.site_xpos[self._hand_site]

    def _opening(self) -> float:
        return float(self._env.data.qpos[self._fingers].mean() / _FINGER)

    def _state(self) -> np.ndarray:
        return np.array([*self._hand(), self._opening()], np.float32)

    def expert(self) -> np.ndarray:
        """(4,) float32 in [-1, 1] from the places of hand, block and goal now."""
        hand, goal = self._hand(), self._env.goal
        if self._block_site is None:
            to, opening = goal, -1.0
        elif self.task == "push":
            to, opening = push(hand, self._env.data.site_xpos[self._block_site], goal), -1.0
        else:
            to, opening = pick(hand, self._opening(), self._env.data.site_xpos[self._block_site], goal)
        fastest = _SLOW if self.task == "reach" else 1.0
        return np.array([*np.clip((to - hand) / _MADE / 1.5, -fastest, fastest), opening], np.float32)

    def frame(self, size: int = 240) -> np.ndarray:
        """(size, size, 3) uint8 from the side and above, the goal drawn as a red ball."""
        env = self._env
        env.data.site_xpos[self._target] = env.goal  # the package moves the site only for its own renderer
        return eye_for(("fetch", self.task), env.model, size).picture(env.model, env.data, _VIEWS[self.task])


def push(hand: np.ndarray, block: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """(3,) where the hand goes next: up and behind the block as seen from the goal, down, then through it."""
    way = goal[:2] - block[:2]
    way = way / max(float(np.linalg.norm(way)), 1e-6)
    offset = hand[:2] - block[:2]
    along, aside = float(offset @ way), float(offset[0] * -way[1] + offset[1] * way[0])
    low, high = block[2] - 0.003, block[2] + 0.075
    if hand[2] < low + 0.025 and along < -0.035 and abs(aside) < 0.014:
        ahead = hand[:2] + 0.03 * way - aside * np.array([-way[1], way[0]])
        return np.array([*ahead, low])
    behind = block[:2] - 0.085 * way
    off = float(np.linalg.norm(hand[:2] - behind))
    if off < 0.012:
        return np.array([*behind, low])
    if hand[2] > high - 0.025 or off < 0.03:
        return np.array([*behind, max(low, high - 0.03) if off < 0.03 else high])
    return np.array([*hand[:2], high])


def pick(hand: np.ndarray, opening: float, block: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, float]:
    """(3,) where the hand goes next, and the gripper's command: above it open, down, close, to the goal."""
    off, height = float(np.linalg.norm(hand[:2] - block[:2])), hand[2] - block[2]
    around = off < 0.014 and abs(height) < 0.016
    if around and opening < 0.56:  # the block between the fingers keeps them at one half
        return goal, -1.0
    if around:
        return block, -1.0
    if off > 0.012 and height < 0.05:
        clear = hand if off < 0.05 and height < 0.035 else np.array([*block[:2], hand[2]])
        return np.array([*clear[:2], block[2] + 0.08]), 1.0
    if off > 0.012:
        return np.array([*block[:2], block[2] + 0.06]), 1.0
    return np.array([*block[:2], block[2] + (0.05 if opening < 0.85 else 0.0)]), 1.0


@functools.cache
def _env_class(task: str) -> type[Any]:
    """The package's class of `task`, working on one compiled model per process."""
    base: Any = _CLASSES[task]

    class Shared(base):
        made: dict[str, Any] = {}  # noqa: RUF012  deliberately of the class

        def _initialize_simulation(self) -> None:
            if not self.made:
                super()._initialize_simulation()
                self.model.vis.global_.fovy = _FIELD
                self.model.site("target0").size = _GOAL_RADIUS[task]
                mocap = self.model.body("robot0:mocap").id
                self.model.geom_rgba[self.model.geom_bodyid == mocap, 3] = 0  # a cross of lines through the hand
                self.model.site_rgba[self.model.site_bodyid == mocap, 3] = 0
                names = ("model", "_model_names", "initial_time", "initial_qpos", "initial_qvel", "initial_gripper_xpos",
                         "height_offset")  # fmt: skip
                self.made.update({name: getattr(self, name) for name in names if hasattr(self, name)})
            self.__dict__.update(self.made)
            self.data = mujoco.MjData(self.model)
            mujoco.mj_forward(self.model, self.data)

    Shared.__name__ = base.__name__
    return Shared

