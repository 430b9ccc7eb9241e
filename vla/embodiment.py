"""What a robot is: cameras, state and action channels, with their units, frames, signs and limits, as data.

An `EmbodimentSpec` is written once per robot as YAML (`configs/embodiments/`), travels inside every dataset and every
policy folder, and is compared before anything moves. The idea of conventions as comparable data follows `DimSpec` of
vla-evaluation-harness; unlike there, a difference refuses instead of warning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from vla.config import CONFIGS, Config
from vla.errors import UsageError
from vla.schema import check_observation

CONVENTIONS: dict[str, str] = {
    "eef_position": "end-effector position in `frame`, absolute",
    "eef_delta_position": "end-effector displacement per control step in `frame`",
    "eef_euler_xyz": "end-effector orientation, extrinsic x-y-z Euler angles, absolute",
    "eef_delta_euler_xyz": "rotation per control step, extrinsic x-y-z Euler angles",
    "eef_euler_zyx": "end-effector orientation, intrinsic z-y-x (yaw, pitch, roll in that order), absolute",
    "eef_quat_xyzw": "end-effector orientation, unit quaternion, scalar last",
    "eef_quat_wxyz": "end-effector orientation, unit quaternion, scalar first",
    "eef_axis_angle": "end-effector orientation, rotation vector (axis times angle), absolute",
    "eef_delta_axis_angle": "rotation per control step, rotation vector",
    "eef_rot6d": "end-effector orientation, first two columns of the rotation matrix, one after the other",
    "eef_delta_rot6d": "rotation per control step, first two columns of its matrix, one after the other",
    "joint_position": "joint positions, absolute",
    "joint_delta": "joint displacement per control step",
    "joint_velocity": "joint velocities",
    "gripper_open_positive": "larger is more open",
    "gripper_closed_positive": "larger is more closed",
    "scalar": "a number with no convention beyond its unit",
}
"""Every convention a channel may declare. Two channels with different conventions never mix silently."""

class Camera(Config):
    """One RGB camera; images are (height, width, 3) uint8."""

    height: int = Field(gt=0)
    width: int = Field(gt=0)


class Channel(Config):
    """A run of dimensions that share one meaning."""

    name: str
    dims: Annotated[tuple[str, ...], Field(min_length=1)]
    """One name per dimension, e.g. `[x, y, z]`."""
    convention: str
    unit: str
    """`m`, `rad`, `m/step`, or `1` for a fraction. For a normalised command, say what 1 means: `0.02 m/step`."""
    frame: str = "-"
    """`base`, `world`, `camera`, or `-` where no frame applies."""
    low: tuple[float, ...]
    high: tuple[float, ...]

    @model_validator(mode="after")
    def _check(self) -> Channel:
        if self.convention not in CONVENTIONS:
            raise ValueError(f"unknown convention {self.convention!r}; one of {sorted(CONVENTIONS)}")
        if not len(self.low) == len(self.high) == len(self.dims):
            raise ValueError(f"channel {self.name!r}: low, high and dims must have the same length")
        if any(lo >= hi for lo, hi in zip(self.low, self.high, strict=True)):
            raise ValueError(f"channel {self.name!r}: every low must be below its high")
        return self


class EmbodimentSpec(Config):
    """A robot as a policy sees it: what comes in, what goes out, how often."""

    name: str
    mode: str = ""
    """Control mode, where one robot is commanded in several ways (`joint`, `eef`): each mode has statistics of its own."""
    robot: str = ""
    """Free text: maker and model."""
    cameras: dict[str, Camera]
    state: tuple[Channel, ...]
    action: tuple[Channel, ...]
    control_hz: float = Field(gt=0)

    @property
    def key(self) -> str:
        """What statistics, soft tokens and `Window.embodiment` are filed under: `name`, or `name/mode`."""
        return f"{self.name}/{self.mode}" if self.mode else self.name

    @property
    def state_dim(self) -> int:
        """S."""
        return sum(len(c.dims) for c in self.state)

    @property
    def action_dim(self) -> int:
        """A."""
        return sum(len(c.dims) for c in self.action)

    @property
    def state_names(self) -> list[str]:
        """S names such as `eef.x`."""
        return [f"{c.name}.{d}" for c in self.state for d in c.dims]

    @property
    def action_names(self) -> list[str]:
        """A names such as `gripper.width`."""
        return [f"{c.name}.{d}" for c in self.action for d in c.dims]

    def limits(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of `part` in {"state", "action"}, each (dims,) float32 in robot units."""
        channels: tuple[Channel, ...] = getattr(self, part)
        low = np.array([v for c in channels for v in c.low], np.float32)
        high = np.array([v for c in channels for v in c.high], np.float32)
        return low, high

    def dims_with(self, part: str, convention: str) -> list[int]:
        """Indices of the dimensions of `part` whose channel declares `convention`."""
        found, at = [], 0
        for channel in getattr(self, part):
            if channel.convention == convention:
                found += range(at, at + len(channel.dims))
            at += len(channel.dims)
        return found

    def check_observation(self, observation: object, where: str) -> None:
        """Raise `DataError` naming every camera or state that is missing or has the wrong shape, dtype or value."""
        check_observation(observation, where, self.key, self.cameras, self.state_names)


def explain(a: EmbodimentSpec, b: EmbodimentSpec) -> list[str]:
    """Why two specs differ, one line per difference; empty when they are equal."""
    lines = []
    for field in ("name", "mode", "control_hz", "cameras"):
        left, right = getattr(a, field), getattr(b, field)
        if left != right:
            lines.append(f"{field}: {left} against {right}")
    for part in ("state", "action"):
        left, right = getattr(a, part), getattr(b, part)
        if [c.name for c in left] != [c.name for c in right]:
            lines.append(f"{part} channels: {[c.name for c in left]} against {[c.name for c in right]}")
            continue
        for one, two in zip(left, right, strict=True):
            for field in Channel.model_fields:
                if getattr(one, field) != getattr(two, field):
                    lines.append(f"{part}.{one.name}.{field}: {getattr(one, field)} against {getattr(two, field)}")
    return lines


def load_embodiment(name: str | Path) -> EmbodimentSpec:
    """Read a spec by shipped name (`tabletop`) or by path to a YAML file. Raises `UsageError` naming the fields at fault."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIGS / "embodiments" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in (CONFIGS / "embodiments").glob("*.yaml"))
        raise UsageError(f"embodiment {str(name)!r}", found="no such file", expected=f"one of {known} or a path",
                         fix=f"write {path}")  # fmt: skip
    try:
        return EmbodimentSpec.model_validate(yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError) as error:
        raise UsageError(path, found=str(error), expected="an EmbodimentSpec (see configs/embodiments/tabletop.yaml)",
                         fix="correct the fields named above") from error  # fmt: skip
