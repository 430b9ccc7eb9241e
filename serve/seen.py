"""What a guard wants to know of an observation: whether its form is right, whether it is the one before again, and the state.

    seen = see(robot, {"images": {"front": frame}, "state": state}, before=last.digest)
    again(seen.digest, last.digest)                                         # a camera that froze, or a picture sent twice

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
_GLANCE = 1024
"""Bytes of a picture that a glance takes in, from its beginning and from its middle: enough wherever anything trembles, be it
only the state."""
_WHOLE = 1 << 64
LONGEST_WORDS = 1000
"""Characters of a text that others had a hand in."""


@dataclass(frozen=True)
class Seen:
    """An observation without its pictures."""

    problem: str
    """What is wrong with its form; empty when nothing is."""
    digest: int
    """Of pictures and state; see `again`. Of 32 bits after a glance, of 65 after a whole look."""
    state: np.ndarray | None
    """(S,) float32; None where there is a problem, and for a robot without a state."""


def see(robot: Robot, observation: Any, rotations: Sequence[tuple[slice, str]] = (), before: int | None = None) -> Seen:
    """Look at an observation of `robot`, whose pictures may be files not opened yet. `rotations`: where in the state there have
    to be some, and in which form. `before`: the digest of the observation before; where a glance tells the two apart, nothing
    more is looked at."""
    try:
        robot.check_observation(observation, "observation", files=True)
    except DataError as error:
        return Seen(f"observation: {error.found}".replace("; ", ", ")[:LONGEST_WORDS], 0, None)  # "; " parts reasons
    state = np.array(observation["state"], np.float32) if robot.state else None
    for dims, form in rotations:
        if state is not None and np.isnan(quaternions(state[None, dims], form)).any():
            name = robot.names("state")[dims.start]
            return Seen(f"observation: {name} ... is no rotation: {state[dims].tolist()}", 0, None)
    pictures = [_bytes(observation["images"][camera]) for camera in robot.cameras]
    glance = 0 if state is None else zlib.crc32(state.data)
    for data in pictures:
        middle = len(data) // 2
        glance = zlib.crc32(data[middle : middle + _GLANCE], zlib.crc32(data[:_GLANCE], glance))
    if before is not None and glance != _glance_of(before):
        return Seen("", glance, state)
    digest = glance
    for data in pictures:
        digest = _sum(data, digest)
    return Seen("", _WHOLE | glance << 32 | digest, state)


def again(now: int, before: int) -> bool:
    """Whether the observation with the digest `now` is the one before again. Where only a glance was cast at that one, a glance
    decides: a row of repetitions is never found too late, and at most one too early."""
    return now == before or (now >= _WHOLE > before and _glance_of(now) == before)


def _glance_of(digest: int) -> int:
    return digest >> 32 & 0xFFFFFFFF if digest >= _WHOLE else digest


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
