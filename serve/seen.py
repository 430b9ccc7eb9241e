"""What a guard wants to know of an observation: whether its form is right, whether it is the one before again, and the state.

    seen = see(robot, {"images": {"front": frame}, "state": state})     # Seen(problem="", digest=1907356101, state=array(...))

Pictures count by a checksum alone, so that a judgement can be repeated from a log that holds none (`serve/audit.py`).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.bounds import quaternions
from serve.robot import Robot
from vla.errors import DataError

_FOLD = 509
"""Words of 8 bytes that pictures are folded to. A prime, so that what moves across an even background hardly ever falls upon
itself."""
LONGEST_WORDS = 1000
"""Characters of a text that others had a hand in."""


@dataclass(frozen=True)
class Seen:
    """An observation without its pictures."""

    problem: str
    """What is wrong with its form; empty when nothing is."""
    digest: int
    """The same for the same pictures and state, and hardly ever for others."""
    state: np.ndarray | None
    """(S,) float32; None where there is a problem, and for a robot without a state."""


def see(robot: Robot, observation: Any, rotations: Sequence[tuple[slice, str]] = ()) -> Seen:
    """Look at an observation of `robot`, whose pictures may be files not opened yet. `rotations`: where in the state there have
    to be some, and in which form."""
    try:
        robot.check_observation(observation, "observation", files=True)
    except DataError as error:
        return Seen(f"observation: {error.found}".replace("; ", ", ")[:LONGEST_WORDS], 0, None)  # "; " parts reasons
    state = np.array(observation["state"], np.float32) if robot.state else None
    for dims, form in rotations:
        if state is not None and np.isnan(quaternions(state[None, dims], form)).any():
            name = robot.names("state")[dims.start]
            return Seen(f"observation: {name} ... is no rotation: {state[dims].tolist()}", 0, None)
    digest = 0 if state is None else zlib.crc32(state.data)
    for camera in robot.cameras:
        digest = _sum(observation["images"][camera], digest)
    return Seen("", digest, state)


def _sum(picture: Any, seed: int) -> int:
    """A checksum that every byte of a picture counts for, four times sooner than crc32 of all of it: of its stretches of `_FOLD`
    words, folded onto each other by exclusive or, and of what remains."""
    data = np.ascontiguousarray(picture) if isinstance(picture, np.ndarray) else picture.data
    size = data.nbytes if isinstance(data, np.ndarray) else len(data)
    stretches = size // (8 * _FOLD)
    if stretches:
        words = np.frombuffer(data, np.uint64, stretches * _FOLD).reshape(stretches, _FOLD)
        seed = zlib.crc32(np.bitwise_xor.reduce(words, axis=0).data, seed)
    whole = stretches * 8 * _FOLD
    return zlib.crc32(np.frombuffer(data, np.uint8, size - whole, whole).data, seed) if size > whole else seed
