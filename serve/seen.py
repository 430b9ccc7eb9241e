"""What a guard wants to know of an observation: whether its form is right, whether it is the one before again, and the state.

    seen = see(robot, {"images": {"front": frame}, "state": state}, before=last.glance)
    seen.again(last.glance, last.whole)                                     # a camera that froze, or a picture sent twice

Pictures count by checksums alone, so that a judgement can be repeated from a log that holds none (`serve/audit.py`).
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
_GLANCE = 1024
"""Bytes that a glance takes in at the beginning of a picture's, and as many in the middle: enough wherever anything trembles, be
it only the state."""
LONGEST_WORDS = 1000
"""Characters of a text that others had a hand in."""


@dataclass(frozen=True)
class Seen:
    """An observation without its pictures."""

    problem: str
    """What is wrong with its form; empty when nothing is."""
    glance: int
    """A checksum of the state and of a little of each picture; 32 bits."""
    whole: int | None
    """Of all of it, where the glance was the same as that at the observation before."""
    state: np.ndarray | None
    """(S,) float32; None where there is a problem, and for a robot without a state."""

    def again(self, glance: int, whole: int | None) -> bool:
        """Whether this is the one before again, at which these were seen. Where only a glance was cast at that one, a glance
        decides: a row of repetitions is never found too late, and at most one too early."""
        return self.glance == glance and (whole is None or self.whole == whole)


def see(robot: Robot, observation: Any, rotations: Sequence[tuple[slice, str]] = (), before: int | None = None) -> Seen:
    """Look at an observation of `robot`, whose pictures may be files not opened yet. `rotations`: where in the state there have
    to be some, and in which form. `before`: the glance at the observation before; where that tells the two apart, nothing more is
    looked at, and without it everything is."""
    try:
        robot.check_observation(observation, "observation", files=True)
    except DataError as error:
        return Seen(f"observation: {error.found}".replace("; ", ", ")[:LONGEST_WORDS], 0, None, None)  # "; " parts reasons
    state = np.array(observation["state"], np.float32) if robot.state else None
    for dims, form in rotations:
        if state is not None and np.isnan(quaternions(state[None, dims], form)).any():
            name = robot.names("state")[dims.start]
            return Seen(f"observation: {name} ... is no rotation: {state[dims].tolist()}", 0, None, None)
    pictures = [_bytes(observation["images"][camera]) for camera in robot.cameras]
    glance = 0 if state is None else zlib.crc32(state.data)
    for data in pictures:
        middle = len(data) // 2
        glance = zlib.crc32(data[middle : middle + _GLANCE], zlib.crc32(data[:_GLANCE], glance))
    if before is not None and glance != before:
        return Seen("", glance, None, state)
    whole = glance
    for data in pictures:
        whole = _sum(data, whole)
    return Seen("", glance, whole, state)


def _bytes(picture: Any) -> memoryview:
    return (np.ascontiguousarray(picture).data if isinstance(picture, np.ndarray) else memoryview(picture.data)).cast("B")


def _sum(data: memoryview, seed: int) -> int:
    """A checksum that every byte of a picture counts for, four times sooner than crc32 of all of it: of its stretches of `_FOLD`
    words, folded onto each other by exclusive or, and of what remains."""
    stretches = len(data) // (8 * _FOLD)
    if stretches:
        words = np.frombuffer(data, np.uint64, stretches * _FOLD).reshape(stretches, _FOLD)
        seed = zlib.crc32(np.bitwise_xor.reduce(words, axis=0).data, seed)
    return zlib.crc32(data[stretches * 8 * _FOLD :], seed)
