"""`metaworld`: the 50 tasks of Meta-World 3.1 with their own scripted experts, as a policy with a camera sees them.

Four traps of the package are dealt with here, each found the hard way: the goal is hidden from the experts unless a
cached observation space is dropped; its renderer takes 100 ms a picture (4096-pixel shadow maps, anti-aliasing); camera
`corner2` is mounted upside down; `reset(seed=...)` ignores its seed. A compiled task is 20 MB of meshes, so a process
has one model per task; a reset moves bodies and sites *of the model*, so each simulator puts its own places back before
it acts.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import mujoco as _mujoco
import numpy as np

from vla.sims.base import OneTask
from vla.sims.render import choose_gl, eye_for

choose_gl()  # gymnasium's MuJoCo module looks at MUJOCO_GL when the line below imports it
import metaworld.env_dict  # noqa: E402
import metaworld.policies  # noqa: E402

mujoco: Any = _mujoco  # its compiled parts carry no types

_CAMERA_AT = (0.75, 0.075, 0.7)
"""Where everyone who learns from `corner2` puts it; the XML's own place cuts the table off."""
_MOVED = ("body_pos", "site_pos")
"""The parts of a model that resets of Meta-World 3.1.1 change."""
_PROPRIO = 4
"""The first numbers of an observation: hand x, y, z and gripper opening. Object positions follow and are not shown."""


class MetaWorld(OneTask):
    """See the module. State: hand x, y, z in metres and gripper opening 0..1; action: dx, dy, dz (1 = 1 cm), effort.

    `info["success"]` is Meta-World's own; nothing is ever a definite failure.
    """

    suite = "metaworld"
    max_steps = 200
    camera = "corner2"

    def __init__(self, task: str, **kw: Any) -> None:
        super().__init__(task, **kw)
        self._env = _env_class(task)()
        self._env._partially_observable = False  # the experts need the goal ...
        self._env.__dict__.pop("sawyer_observation_space", None)  # ... which the cached space would clip to zero
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._env._set_task_called = True
        self._env.max_path_length = 10**9  # the number of steps is ours to limit
        self._policy = metaworld.policies.ENV_POLICY_MAP[task]()
        self._camera_id = self._env.model.camera(self.camera).id
        self._full = np.zeros(39)

    def _scene(self, seed: int) -> None:
        env = self._env
        self._places = _compiled(self.task)[1]
        self._arrange()
        env.seed(seed)
        env.curr_path_length = 0
        env._did_see_sim_exception = False
        mujoco.mj_resetData(env.model, env.data)
        env.reset_model()
        self._places = {name: getattr(env.model, name).copy() for name in _MOVED}
        mujoco.mj_forward(env.model, env.data)
        env._prev_obs = env._get_curr_obs_combined_no_goal()
        self._full = env._get_obs()

    def _arrange(self) -> None:
        """Put this simulator's furniture into the shared model."""
        for name, places in self._places.items():
            getattr(self._env.model, name)[:] = places

    def _act(self, command: np.ndarray) -> None:
        self._arrange()
        self._full, _, _, _, info = self._env.step(command.astype(np.float32))
        self._done = bool(info["success"])

    def _state(self) -> np.ndarray:
        return self._full[:_PROPRIO].astype(np.float32)

    def expert(self) -> np.ndarray:
        """(4,) float32 of Meta-World's own policy, clipped to [-1, 1] as its simulator would."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Constant(s) may be too high": they are, hence the clip
            return np.clip(self._policy.get_action(self._full), -1, 1).astype(np.float32)

    def frame(self, size: int = 240) -> np.ndarray:
        """(size, size, 3) uint8 through `corner2`, the right way up."""
        self._arrange()
        picture = eye_for(("metaworld", self.task), self._env.model, size).picture(
            self._env.model, self._env.data, self._camera_id
        )
        return np.ascontiguousarray(picture[::-1, ::-1])


@functools.cache
def _env_class(task: str) -> type[Any]:
    """Meta-World's class of `task`, working on the process's model instead of compiling its own."""
    base = metaworld.env_dict.ENV_CLS_MAP[task]

    class Shared(base):
        def _initialize_simulation(self) -> tuple[Any, Any]:
            model, places = _compiled(task, self.fullpath)
            for name in _MOVED:
                getattr(model, name)[:] = places[name]
            return model, mujoco.MjData(model)

    Shared.__name__ = base.__name__
    return Shared


_MODELS: dict[str, tuple[Any, dict[str, np.ndarray]]] = {}


def _compiled(task: str, path: str | None = None) -> tuple[Any, dict[str, np.ndarray]]:
    """The task's `MjModel` and its places as the file has them (but for the camera's); compiled once per process."""
    if task not in _MODELS:
        assert path is not None, f"{task} was not made yet"
        model = mujoco.MjModel.from_xml_path(path)
        model.cam_pos[model.camera("corner2").id] = _CAMERA_AT
        _MODELS[task] = model, {name: getattr(model, name).copy() for name in _MOVED}
    return _MODELS[task]
