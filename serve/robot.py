"""What a robot is, as an export folder says it: an embodiment without pydantic, since a robot's computer has none.

The names are `vla.embodiment.EmbodimentSpec`'s, so that `vla.resample` takes either; what is refused is the same as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla.errors import CheckpointError, DataError


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

    @property
    def state_dim(self) -> int:
        """S."""
        return sum(len(c.dims) for c in self.state)

    @property
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

    def check_observation(self, observation: Any, where: str, files: bool = False) -> None:
        """Raise `DataError` naming every camera or state that is missing or has the wrong shape, dtype or value. With `files` a
        picture may be a file as well (`is_file`)."""
        images = observation.get("images") if isinstance(observation, Mapping) else None
        if not isinstance(images, Mapping):
            raise DataError(where, found=f"{type(observation).__name__} without an 'images' mapping",
                            expected="{'images': {camera: (h, w, 3) uint8}, 'state': (S,) float32}",
                            fix="give the frames by camera name")  # fmt: skip
        problems = [f"camera {c!r} missing (got {sorted(map(str, images))})" for c in self.cameras if c not in images]
        for camera, frame in images.items():
            if files and is_file(frame):
                continue
            if not (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
                    and frame.size):  # fmt: skip
                kind = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
                problems.append(f"camera {camera!r} is {kind}")
        state = _numbers(observation.get("state"))
        if self.state_dim and (state is None or state.shape != (self.state_dim,)):
            problems.append(f"state has shape {None if state is None else state.shape}")
        elif state is not None and not np.isfinite(state).all():
            problems.append(f"state is not finite: {state.tolist()}")
        if problems:
            raise DataError(
                where, found="; ".join(problems),
                expected=f"robot {self.key!r}: cameras {sorted(self.cameras)} as (h, w, 3) uint8, "
                f"state ({self.state_dim},) = {self.names('state')}",
                fix="rename the cameras or reorder the state to match, or use the policy of this robot",
            )  # fmt: skip


def is_file(picture: Any) -> bool:
    """Whether `picture` is one as a file, such as `serve.wire.Encoded`: its bytes are its `data`."""
    return isinstance(getattr(picture, "data", None), bytes)


def _numbers(state: Any) -> np.ndarray | None:
    """As float32, empty when they are no numbers; None stays None."""
    if state is None:
        return None
    try:
        given = np.asarray(state)
        with np.errstate(over="ignore", invalid="ignore"):
            return given.astype(np.float32) if given.dtype.kind in "biuf" else np.zeros(0, np.float32)
    except (TypeError, ValueError, OverflowError):
        return np.zeros(0, np.float32)


def _channel(entry: Mapping[str, Any]) -> Channel:
    dims = tuple(map(str, entry["dims"]))
    low, high = (tuple(float(v) for v in entry.get(end) or ()) for end in ("low", "high"))
    if not dims:
        raise ValueError(f"channel {entry['name']!r} has no dimensions")
    return Channel(str(entry["name"]), dims, str(entry["convention"]), str(entry.get("unit", "")), low, high)
