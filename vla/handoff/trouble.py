"""What can go wrong in a simulator, so that detectors of failure have failures to learn from.

One kind an episode, its strength and everything else drawn from (seed, kind). What is wrong with pictures is so from the start in
half of the episodes, and else from a step in their first quarter on. What a policy sees and what becomes of its commands are
changed outside the simulator, so most kinds work in any suite; `physics` and `shove` reach into the tabletop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vla.errors import UsageError
from vla.randomness import mix

TROUBLES: dict[str, str] = {
    "none": "nothing",
    "occlusion": "a patch of one colour over 25 to 70 % of the picture's side",
    "noise": "Gaussian noise on every pixel, sigma 50 to 180 of 255, anew at every look",
    "brightness": "pictures darkened to 0.03 to 0.4, or brightened by 2 to 4",
    "shift": "the camera turned: pictures moved by 2 to 10 % of their side in each direction, edges repeated",
    "gain": "commands of motion multiplied by a factor of each dimension's own, between 1 and -0.6",
    "physics": "the simulator's own randomisation of looks, light, camera and physics",
    "shove": "the named cube is moved by 2 to 6 cm, 1 to 3 times in the first half of an episode",
}
"""Kind -> what it is."""
_INSIDE = {"physics": ("tabletop", "tabletop-wrist", "tabletop-long"), "shove": ("tabletop", "tabletop-wrist")}
_DRAW = 0x7B0B1E


def check_troubles(kinds: Sequence[str], suite: str) -> list[str]:
    """The kinds in order, each once; `all` is all this suite knows. Raises `UsageError` for one it does not."""
    known = [kind for kind in TROUBLES if suite in _INSIDE.get(kind, (suite,))]
    found = list(dict.fromkeys(kind for name in kinds for kind in (known if name == "all" else [name])))
    if wrong := [kind for kind in found if kind not in known]:
        raise UsageError("--perturb", found=", ".join(wrong), expected=f"all, or some of {', '.join(known)} in suite {suite!r}",
                         fix="--perturb all")  # fmt: skip
    return found or ["none"]


class Trouble:
    """What goes wrong in one episode."""

    def __init__(self, kind: str, seed: int, steps: int) -> None:
        """`steps`: about how long an episode is, for what happens in the middle of it."""
        self.kind = kind
        self._seed = mix(seed, _DRAW, list(TROUBLES).index(kind))
        rng = np.random.default_rng(self._seed)
        self.severity = float(rng.uniform())
        """0 to 1: how much, of what this kind can be."""
        self._place = rng.uniform(size=(8, 2))
        self._colour = rng.integers(0, 256, 3).astype(np.uint8)
        self._brighter = bool(rng.random() < 0.5)
        self._factors = rng.uniform(size=64)
        times = rng.choice(np.arange(1, max(5, round(0.5 * steps))), 1 + round(2 * self.severity), replace=False)
        self.begins = int(rng.integers(1, max(2, round(steps / 4)))) if rng.random() < 0.5 else 0
        """The control step from which on pictures are not what they should be."""
        self._shoves = {int(step): float(rng.uniform(0, 2 * np.pi)) for step in times}

    @property
    def randomise(self) -> bool:
        """Whether the simulator is to be made so."""
        return self.kind == "physics"

    def see(self, observation: dict[str, Any], step: int) -> dict[str, Any]:
        """The observation as the policy gets it."""
        if self.kind not in ("occlusion", "noise", "brightness", "shift") or step < self.begins:
            return observation
        change = getattr(self, f"_{self.kind}")
        images = {name: change(image, n, step) for n, (name, image) in enumerate(observation["images"].items())}
        return {**observation, "images": images}

    def act(self, action: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """The command (A,) as the robot gets it; `moves` (A,): the dimensions that are motion."""
        if self.kind != "gain":
            return action
        gain = 1 - 1.6 * self._factors[: len(action)] * (0.3 + 0.7 * self.severity)
        return np.where(moves, action * gain, action).astype(np.float32)

    def before(self, sim: Any, step: int) -> None:
        """Called before control step `step` is simulated."""
        if self.kind == "shove" and step in self._shoves:
            shove(sim, self._shoves[step], 0.02 + 0.04 * self.severity)

    def _occlusion(self, image: np.ndarray, camera: int, step: int) -> np.ndarray:
        side = round(image.shape[0] * (0.25 + 0.45 * self.severity))
        top, left = (int(at * (room - side)) for at, room in zip(self._place[camera], image.shape[:2], strict=True))
        out = image.copy()
        out[top : top + side, left : left + side] = self._colour
        return out

    def _noise(self, image: np.ndarray, camera: int, step: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, camera, step])
        noisy = image + rng.normal(0, 50 + 130 * self.severity, image.shape)
        return noisy.clip(0, 255).astype(np.uint8)

    def _brightness(self, image: np.ndarray, camera: int, step: int) -> np.ndarray:
        factor = 2 + 2 * self.severity if self._brighter else 0.4 - 0.37 * self.severity
        return (image * factor).clip(0, 255).astype(np.uint8)

    def _shift(self, image: np.ndarray, camera: int, step: int) -> np.ndarray:
        height, width = image.shape[:2]
        far = 0.02 + 0.08 * self.severity
        down, right = (
            round(np.sign(at - 0.5) * far * room) for at, room in zip(self._place[camera], (height, width), strict=True)
        )
        rows, columns = (np.arange(height) - down).clip(0, height - 1), (np.arange(width) - right).clip(0, width - 1)
        return np.ascontiguousarray(image[rows][:, columns])


def shove(sim: Any, turn: float, far: float) -> None:
    """Move the named cube of a tabletop by `far` metres towards `turn` rad, unless another cube or the hand is in its way.

    Reaches into the simulator, since no robot's doing is meant. A push is judged from where the cube was put: being moved by a
    stranger neither fulfils a task nor spoils it."""
    import mujoco  # the simulator's own, and only where there is one

    hand, cubes = sim.places()
    colour = next(word for word in sim.task.split("-") if word in cubes)
    move = far * np.array([np.cos(turn), np.sin(turn)])
    place = cubes[colour][:2] + move
    others = [at[:2] for name, at in cubes.items() if name != colour] + [hand[:2]]
    inside = 0.22 <= place[0] <= 0.46 and abs(place[1]) <= 0.2
    if inside and min(np.linalg.norm(place - at) for at in others) > 0.05 and cubes[colour][2] < 0.03:
        model, data = sim._model, sim._data
        joint = int(model.body(colour).jntadr[0])
        at, speed = int(model.jnt_qposadr[joint]), int(model.jnt_dofadr[joint])
        data.qpos[at : at + 2], data.qvel[speed : speed + 6] = place, 0
        mujoco.mj_forward(model, data)  # pyright: ignore[reportAttributeAccessIssue]  its compiled parts carry no types
        sim._judge_of.start[sim._judge_of.named, :2] += move
