"""The one random-number rule: every draw is a function of integers, and no generator's state is ever saved.

order = f(seed, n), augmentation = f(seed, n), dropout = f(seed, step, rank). A run that was stopped anywhere, or spread over
another number of processes or workers, therefore draws what it would have drawn.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 6


class Purpose(IntEnum):
    """What a draw is for; two purposes never share numbers."""

    BLOCK = 1
    """Whose position is whose inside a block of the mixture."""
    EPOCH = 2
    """Order of a dataset's frames in one epoch."""
    AUGMENT = 3
    """Image, state and history augmentation of one window."""
    SAMPLE = 4
    """Sampled decoding."""
    STEP = 5
    """torch's generator at the start of a training step."""
    SPLIT = 6
    """Which episodes are held out."""


def mix(*words: int) -> int:
    """64-bit hash of a few integers (splitmix64's finaliser, Steele et al. 2014)."""
    h = 0x9E3779B97F4A7C15
    for word in words:
        h = (h ^ (word & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        h = (h ^ h >> 27) * 0x94D049BB133111EB & _MASK
        h ^= h >> 31
    return h


def permute(i: int, size: int, key: int) -> int:
    """Element i of a keyed permutation of range(size), in constant memory.

    A Feistel network (Luby and Rackoff 1988) on a square just large enough, with cycle walking.
    """
    if size <= 1:
        return 0
    side = math.isqrt(size - 1) + 1  # side * side >= size, so cycle walking leaves the square almost never
    while True:
        left, right = divmod(i, side)
        for round_ in range(_ROUNDS):
            left, right = right, (left + mix(key, round_, right)) % side
        i = left * side + right
        if i < size:
            return i


def generator(purpose: Purpose, seed: int, n: int) -> np.random.Generator:
    """numpy random numbers as a function of (purpose, seed, n)."""
    return np.random.Generator(np.random.Philox(key=np.array([mix(seed, purpose), mix(n)], np.uint64)))
