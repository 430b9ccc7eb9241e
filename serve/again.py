"""What is alike is not said twice between a server and its model's process, who trust each other.

    AGAIN, state                     a look like the last that was said in full, but for its state and what the pictures show
    AGAIN, seconds, numbers          a chunk of the same types and shapes as the last

Everything else is msgpack (`serve/backend.py`, `serve/model_process.py`): the first look of a client, several looks at once, a
look whose pictures are not in shared memory, a robot without a state, questions, errors.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

AGAIN = b"\xc1\0\0\0"
"""No msgpack begins so."""
_HEAD = struct.Struct("<4s4xd")
"""`AGAIN`, and the seconds a batch took; arrays behind it are aligned."""
Kinds = list[tuple[np.dtype, tuple[int, ...], int]]
"""Type, shape and size of each array of a chunk."""


def look_said(state: np.ndarray) -> bytes:
    """`state` (S,) of a look that is like the last."""
    return AGAIN + np.asarray(state, np.float32).tobytes()


def look_heard(data: bytes) -> np.ndarray:
    """The state (S,) float32 that `look_said` says."""
    return np.frombuffer(data, np.float32, offset=len(AGAIN))


def kinds_of(results: Sequence[Any]) -> Kinds | None:
    """Of a batch's one chunk (actions, confidence, symbols); None where it came to anything else."""
    if len(results) != 1 or not isinstance(results[0], tuple):
        return None
    kinds = [(part.dtype, part.shape, part.size) for part in results[0]]
    return kinds if all(size for _, _, size in kinds) else None


def chunk_said(chunk: Sequence[np.ndarray], seconds: float) -> bytes:
    """A chunk of the same kinds as the last."""
    return b"".join((_HEAD.pack(AGAIN, seconds), *[part.tobytes() for part in chunk]))


def chunk_heard(data: bytes, kinds: Kinds) -> tuple[list[Any], float]:
    """The results that `chunk_said` says, and the seconds. Raises `ValueError` for other kinds."""
    parts, at = list[np.ndarray](), _HEAD.size
    for kind, shape, size in kinds:
        parts.append(np.frombuffer(data, kind, size, at).reshape(shape))
        at += parts[-1].nbytes
    if at != len(data):
        raise ValueError(f"a chunk of {len(data)} bytes, not {at}")
    return [tuple(parts)], _HEAD.unpack_from(data)[1]
