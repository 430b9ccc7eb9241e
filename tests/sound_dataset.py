"""A dataset with nothing wrong in it, into which tests plant faults: an arm that moves, turns, grips and is filmed twice.

The state is what the action did, exactly and one step later, as in a perfect recording. Small enough to be written often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla.embodiment import Camera, Channel, EmbodimentSpec
from vla.recording import LeRobotWriter
from vla.rotation import compose, continuous, convert
from vla.schema import Episode

EPISODES, ROWS, SIDE, FPS = 8, 40, 32, 10
DOWN = np.array([1.0, 0.0, 0.0, 0.0])
"""A gripper that points at the table: half a turn about x, so that q and -q lie close together."""
TILTED = convert(np.array([0.5, 0.3, 0.2]), "axis_angle", "quat_xyzw")
FORMS = {"quat_xyzw": "xyzw", "quat_wxyz": "wxyz", "axis_angle": "xyz", "euler_xyz": "rpy", "rot6d": "abcdef"}


def channel(name: str, dims: Sequence[str], convention: str, unit: str, low: float, high: float) -> Channel:
    """A channel with one limit for all its dimensions."""
    return Channel(
        name=name, dims=tuple(dims), convention=convention, unit=unit, low=(low,) * len(dims), high=(high,) * len(dims)
    )


def sound_spec(form: str = "quat_xyzw", cameras: tuple[str, ...] = ("front", "wrist")) -> EmbodimentSpec:
    """State: position, orientation in `form`, opening. Action: displacement, turn, gripper (1 closes)."""
    return EmbodimentSpec(
        name="sound", cameras={c: Camera(height=SIDE, width=SIDE) for c in cameras}, control_hz=FPS,
        state=(channel("eef", "xyz", "eef_position", "m", -2, 2), channel("turn", FORMS[form], f"eef_{form}", "rad", -4, 4),
               channel("gripper", ["opening"], "gripper_open_positive", "1", -0.1, 1.1)),
        action=(channel("eef", "xyz", "eef_delta_position", "m/step", -0.2, 0.2),
                channel("turn", "xyz", "eef_delta_axis_angle", "rad/step", -0.4, 0.4),
                channel("gripper", ["close"], "gripper_closed_positive", "1", -0.1, 1.1)),
    )  # fmt: skip


def sound_episode(n: int, form: str = "quat_xyzw", rows: int = ROWS, base: np.ndarray = DOWN, swing: float = 0.12) -> Episode:
    """Episode `n`: smooth motion of its own, the gripper closing on the way."""
    rng = np.random.default_rng([n, 7])
    t = np.arange(rows)[:, None] / rows
    waves = rng.uniform(0.5, 2.0, 6), rng.uniform(0, 2 * np.pi, 6)
    speed = np.sin(2 * np.pi * (t * waves[0]) + waves[1]) * np.array([0.06] * 3 + [swing] * 3) * rng.uniform(0.6, 1, 6)
    place = rng.uniform(-0.3, 0.3, 3) + np.concatenate([np.zeros((1, 3)), np.cumsum(speed[:-1, :3], 0)])
    q = [compose(convert(rng.uniform(-0.3, 0.3, 3), "axis_angle", "quat_xyzw"), base)]
    for step in speed[:-1, 3:]:
        q.append(compose(convert(step, "axis_angle", "quat_xyzw"), q[-1]))
    smooth = continuous(np.array(q))
    turn = np.roll(smooth, 1, 1) if form == "quat_wxyz" else smooth if form == "quat_xyzw" else convert(smooth, "quat_xyzw", form)
    close = (np.arange(rows) > rows * rng.uniform(0.4, 0.7)).astype(float)
    opening = np.ones(rows)
    for i in range(1, rows):
        opening[i] = opening[i - 1] + 0.6 * ((1 - close[i - 1]) - opening[i - 1])
    state = np.concatenate([place, turn, opening[:, None]], 1).astype(np.float32)
    action = np.concatenate([speed, close[:, None]], 1).astype(np.float32)
    pictures = {"front": _front(place, rng), "wrist": _wrist(place)}
    return Episode(pictures, state, action, ["put the cup away", "open the drawer"][n % 2], "sound", True, "", None)


def _front(place: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A table below a wall, darker to the left, and the arm as a red square."""
    frames = np.zeros((len(place), SIDE, SIDE, 3), np.uint8)
    frames[:, : SIDE // 2] = (150, 170, 200)
    frames[:, SIDE // 2 :] = (90, 60, 30)
    frames[:, :, : SIDE // 3] //= 2
    for frame, (x, y, _) in zip(frames, place, strict=True):
        i, j = np.clip(((y + 1) * SIDE / 2, (x + 1) * SIDE / 2), 0, SIDE - 6).astype(int)
        frame[i : i + 6, j : j + 6] = (220, 30 + int(60 * (x % 1)), 30 + int(60 * (y % 1)))
    return frames


def _wrist(place: np.ndarray) -> np.ndarray:
    """Green stripes that pass by, a black finger at the lower right."""
    at = np.arange(SIDE)
    frames = np.zeros((len(place), SIDE, SIDE, 3), np.uint8)
    for frame, (x, y, z) in zip(frames, place, strict=True):
        frame[..., 1] = (120 + 60 * np.sin(at / 3 + 9 * x) + 40 * np.sin(at[:, None] / 4 + 9 * (y + z))).clip(0, 255)
    frames[:, -8:, -14:] = 0
    return frames


def write_sound(
    root: Path, change: Callable[[list[Episode]], Any] | None = None, spec: EmbodimentSpec | None = None, *,
    episodes: int = EPISODES, cameras: tuple[str, ...] = ("front", "wrist"), first: int = 0, **kw: Any,
) -> Path:  # fmt: skip
    """Write `episodes` sound episodes after `change` has had its way with the list (it may return another)."""
    made = [sound_episode(first + n, **kw) for n in range(episodes)]
    for episode in made:
        for camera in [c for c in episode.images if c not in cameras]:
            del episode.images[camera]
    made = (change(made) if change else None) or made
    with LeRobotWriter(root, spec or sound_spec(kw.get("form", "quat_xyzw"), cameras)) as writer:
        for episode in made:
            writer.add(episode)
    return root
