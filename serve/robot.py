"""What a robot is, as an export folder says it: an embodiment without pydantic, since a robot's computer has none.

The names are `vla.embodiment.EmbodimentSpec`'s, so that `vla.resample` takes either; what is refused is the same as well
(`vla.schema.check_observation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vla.errors import CheckpointError
from vla.schema import check_observation

if TYPE_CHECKING:  # a client needs none of what reads an export
    from vla.export_folder import ExportFolder


@dataclass(frozen=True)
class Channel:
    """A run of dimensions that share one meaning; see `vla.embodiment.Channel`."""

    name: str
    dims: tuple[str, ...]
    convention: str
    unit: str
    low: tuple[float, ...]
    """Robot units, one a dimension; empty where nobody gave any."""
    high: tuple[float, ...]
    frame: str = ""
    """`base`, `world`, ...; empty where nobody said."""


@dataclass(frozen=True)
class Robot:
    """Cameras, state and action channels, control rate."""

    key: str
    cameras: tuple[str, ...]
    """In the order that numbers them."""
    sizes: Mapping[str, tuple[int, int]]
    """Camera -> (height, width) of its frames where it was recorded."""
    state: tuple[Channel, ...]
    action: tuple[Channel, ...]
    control_hz: float

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], where: str) -> Robot:
        """From an embodiment of `export.json`. Raises `CheckpointError` for one that says too little."""
        try:
            cameras = {name: (int(c["height"]), int(c["width"])) for name, c in entry["cameras"].items()}
            state, action = (tuple(_channel(c) for c in entry[part]) for part in ("state", "action"))
            key = f"{entry['name']}/{entry['mode']}" if entry.get("mode") else str(entry["name"])
            hz = float(entry["control_hz"])
            if not (hz > 0 and np.isfinite(hz) and action):
                raise ValueError(f"control_hz {hz}, {len(action)} action channels")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(where, found=f"{type(error).__name__}: {error}",
                                  expected="name, cameras, state, action and control_hz of a robot",
                                  fix="export the policy again; this file is not meant to be edited") from error  # fmt: skip
        return cls(key, tuple(cameras), cameras, state, action, hz)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` makes this robot of."""
        cameras = {name: {"height": self.sizes[name][0], "width": self.sizes[name][1]} for name in self.cameras}
        return {"name": self.key, "cameras": cameras, "control_hz": self.control_hz,
                **{part: [vars(c) | {k: list(getattr(c, k)) for k in ("dims", "low", "high")} for c in getattr(self, part)]
                   for part in ("state", "action")}}  # fmt: skip

    @cached_property
    def state_dim(self) -> int:
        """S."""
        return sum(len(c.dims) for c in self.state)

    @cached_property
    def action_dim(self) -> int:
        """A."""
        return sum(len(c.dims) for c in self.action)

    def names(self, part: str) -> list[str]:
        """Names such as `eef.x` of the dimensions of `part` in {"state", "action"}."""
        return [f"{c.name}.{d}" for c in getattr(self, part) for d in c.dims]

    def spans(self, part: str) -> list[tuple[Channel, slice]]:
        """The channels of `part`, and where their dimensions lie."""
        out, at = [], 0
        for channel in getattr(self, part):
            out.append((channel, slice(at, at := at + len(channel.dims))))
        return out

    @cached_property
    def _state_names(self) -> list[str]:
        return self.names("state")

    def check_observation(self, observation: Any, where: str, files: bool = False) -> None:
        """Raise `DataError` naming every camera or state that is missing or has the wrong shape, dtype or value. With `files` a
        picture may be a file as well (`is_file`)."""
        check_observation(observation, where, self.key, self.cameras, self._state_names, is_file if files else None)


def differences(here: Robot, there: Robot) -> list[str]:
    """Why what moves `there` must not move the robot `here`, a line each: another name, rate, channel, convention, unit, frame or
    limit, or a camera it lacks. A camera nobody there looks through is no difference, nor is the size of pictures."""
    lines = [f"{name}: {ours} here, {theirs} there" for name in ("key", "control_hz")
             if (ours := getattr(here, name)) != (theirs := getattr(there, name))]  # fmt: skip
    lines += [f"camera {camera!r}: none here" for camera in there.cameras if camera not in here.cameras]
    for part in ("state", "action"):
        ours, theirs = getattr(here, part), getattr(there, part)
        if (names := [c.name for c in ours]) != (others := [c.name for c in theirs]):
            lines.append(f"{part} channels: {', '.join(names) or 'none'} here, {', '.join(others) or 'none'} there")
            continue
        for one, two in zip(ours, theirs, strict=True):
            for name, value in vars(one).items():
                if value != (other := getattr(two, name)) and not (name == "frame" and "" in (value, other)):
                    lines.append(f"{part} {one.name}, {name}: {_words(value)} here, {_words(other)} there")
    return lines


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def robots_of(folder: ExportFolder) -> dict[str, Robot]:
    """Every robot an exported policy knows, in the order that numbers them."""
    entries, file = folder.meaning["embodiments"], folder.path / "export.json"
    return {name: Robot.from_json(entries[name], f"{file}: embodiments.{name}") for name in folder.normalizers}


def is_file(picture: Any) -> bool:
    """Whether `picture` is one as a file, such as `serve.wire.Encoded`: its bytes are its `data`."""
    return isinstance(getattr(picture, "data", None), bytes)


def _channel(entry: Mapping[str, Any]) -> Channel:
    dims = tuple(map(str, entry["dims"]))
    low, high = (tuple(float(v) for v in entry.get(end) or ()) for end in ("low", "high"))
    if not dims:
        raise ValueError(f"channel {entry['name']!r} has no dimensions")
    unit, frame = (str(entry.get(name, "")) for name in ("unit", "frame"))
    return Channel(str(entry["name"]), dims, str(entry["convention"]), unit, low, high, frame)
