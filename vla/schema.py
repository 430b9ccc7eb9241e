"""The data every part of the house speaks: numpy arrays in the robot's own units.

Shapes use the legend of `vla/batch.py`: T time steps, H chunk length, A action dimensions, S state dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vla.errors import DataError

Observation = Mapping[str, object]
"""What a policy is shown: `{"images": {camera: (h, w, 3) uint8}, "state": (S,) float32}`."""


@dataclass(frozen=True)
class Said:
    """A sentence that holds from frame `frame` of an episode on, until the next of its style (`subtask`, `plan`, `memory`)."""

    frame: int
    style: str
    content: str


@dataclass(frozen=True)
class Episode:
    """One demonstration from reset to its end, in the robot's own units.

    `images[camera]` is (T, h, w, 3) uint8, `state` (T, S) float32, `action` (T, A) float32. `state[t]` and `images[t]`
    are what the robot saw *before* it was given `action[t]`.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    action: np.ndarray
    instruction: str
    embodiment: str
    success: bool = True
    task: str = ""
    """The simulator's or recorder's own name of the task, e.g. `push-red-left`."""
    seed: int | None = None
    """The reset seed, when the episode came from a simulator."""
    language: tuple[Said, ...] = ()
    """What is said while it goes on, beside `instruction`, in order of time."""

    def __len__(self) -> int:
        return len(self.action)

    def validate(self, where: str) -> None:
        """Raise `DataError` unless every array is finite, all of them have the same length T >= 1 and nothing is said outside."""
        T = len(self.action)
        if T == 0:
            raise DataError(where, found="an episode of 0 steps", expected="at least 1 step", fix="record it again")
        for name, array in (("state", self.state), ("action", self.action)):
            if array.ndim != 2 or len(array) != T or array.dtype != np.float32:
                raise DataError(
                    f"{where}, {name}", found=f"{array.dtype} {array.shape}",
                    expected=f"float32 ({T}, dims)", fix="write state and action as float32, one row per step",
                )
            _finite(array, f"{where}, {name}")
        for camera, frames in self.images.items():
            if frames.dtype != np.uint8 or frames.ndim != 4 or len(frames) != T or frames.shape[-1] != 3:
                raise DataError(
                    f"{where}, camera {camera!r}", found=f"{frames.dtype} {frames.shape}",
                    expected=f"uint8 ({T}, h, w, 3)", fix="give one RGB frame per step",
                )
        if outside := [said for said in self.language if not 0 <= said.frame < T or not said.content]:
            raise DataError(f"{where}, language", found=str(outside[0]), expected=f"a sentence from one of its {T} frames on",
                            fix="say it of a frame the episode has")  # fmt: skip


@dataclass(frozen=True)
class Window:
    """What the robot saw at one moment and did next. NaN never gets in: `validate()` is called by whoever makes one."""

    images: dict[str, np.ndarray]  # camera -> (h, w, 3) uint8
    state: np.ndarray  # (S,) float32
    instruction: str
    actions: np.ndarray  # (H, A) float32; rows past the episode's end are zero and invalid
    valid: np.ndarray  # (H, A) bool
    embodiment: str
    final_state: np.ndarray  # (S,) float32: the state at the episode's last step ("where does this episode end")
    n: int = -1
    """Position in the mixture's stream; -1 outside of one."""
    source: str = field(default="", compare=False)
    """`dataset:episode:frame`, for messages."""

    def validate(self) -> Window:
        """Raise `DataError` on a wrong shape, a wrong dtype or a non-finite value; return self."""
        where = f"window {self.n} ({self.source})"
        if self.actions.ndim != 2 or self.valid.shape != self.actions.shape:
            raise DataError(
                where, found=f"actions {self.actions.shape}, valid {self.valid.shape}",
                expected="both (H, A)", fix="check the dataset's columns",
            )
        if not self.valid[0].any():
            raise DataError(
                where, found="no valid action", expected="at least the first action", fix="check the episode lengths"
            )
        for name in ("state", "actions", "final_state"):
            _finite(getattr(self, name), f"{where}, {name}")
        for camera, frame in self.images.items():
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
                raise DataError(
                    f"{where}, camera {camera!r}", found=f"{frame.dtype} {frame.shape}",
                    expected="uint8 (h, w, 3)", fix="decode the frame as RGB",
                )
        return self


def check_observation(
    observation: object, where: str, robot: str, cameras: Collection[str], state: Sequence[str],
    otherwise: Callable[[object], bool] | None = None,
) -> None:  # fmt: skip
    """Raise `DataError` naming every camera or state that is missing or has the wrong shape, dtype or value.

    `cameras` are those `robot` has, `state` the S names of what it says of itself; `otherwise` admits pictures that are no
    frames (files not opened yet). Cameras beyond those are judged too: whoever sends one means it to be seen.
    """
    if type(observation) is dict and _plain(observation, cameras, len(state)):
        return
    images = observation.get("images") if isinstance(observation, Mapping) else None
    if not isinstance(observation, Mapping) or not isinstance(images, Mapping):
        raise DataError(where, found=f"{type(observation).__name__} without an 'images' mapping",
                        expected="{'images': {camera: (h, w, 3) uint8}, 'state': (S,) float32}",
                        fix="give the frames by camera name")  # fmt: skip
    problems = [f"camera {c!r} missing (got {sorted(map(str, images))})" for c in sorted(cameras) if c not in images]
    for camera, frame in images.items():
        if not _is_frame(frame) and not (otherwise and otherwise(frame)):
            kind = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
            problems.append(f"camera {camera!r} is {kind}")
    found = _numbers(observation.get("state"))
    if len(state) and (found is None or found.shape != (len(state),)):
        problems.append(f"state has shape {None if found is None else found.shape}")
    elif found is not None and not all_finite(found):
        problems.append(f"state is not finite: {found.tolist()}")
    if problems:
        raise DataError(
            where, found="; ".join(problems),
            expected=f"robot {robot!r}: cameras {sorted(cameras)} as (h, w, 3) uint8, state ({len(state)},) = {list(state)}",
            fix="rename the cameras or reorder the state to match, or say which other robot this is",
        )  # fmt: skip


def _plain(observation: dict[str, object], cameras: Collection[str], state: int) -> bool:
    """Whether all is right at first sight, as it mostly is; what is not may be right all the same."""
    images, told = observation.get("images"), observation.get("state")
    if type(images) is not dict or len(images) != len(cameras):
        return False
    for camera in cameras:
        if not _is_frame(images.get(camera)):
            return False
    return isinstance(told, np.ndarray) and told.dtype == np.float32 and told.shape == (state,) and all_finite(told)


def all_finite(few: np.ndarray) -> bool:
    """Whether each of a few numbers is: for the dozens of a state sooner than numpy begins."""
    return all(map(math.isfinite, few.reshape(-1).tolist()))


def _is_frame(frame: object) -> bool:
    return (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
            and frame.size > 0)  # fmt: skip


def _numbers(state: object) -> np.ndarray | None:
    """As float32, empty when they are no numbers; None stays None."""
    if state is None or (isinstance(state, np.ndarray) and state.dtype == np.float32):
        return state
    try:
        given = np.asarray(state)
        with np.errstate(over="ignore", invalid="ignore"):
            return given.astype(np.float32) if given.dtype.kind in "biuf" else np.zeros(0, np.float32)
    except (TypeError, ValueError, OverflowError):
        return np.zeros(0, np.float32)


def _finite(array: np.ndarray, where: str) -> None:
    if np.isfinite(array).all():
        return
    at = np.argwhere(~np.isfinite(array))[0]
    raise DataError(
        f"{where}{list(map(int, at))}", found=f"{array[tuple(at)]}", expected="a finite number",
        fix="repair or drop this episode; a NaN in an action would become a full-scale move",
    )
