"""Who waits for the model: in order, counted in looks, bytes and questions, and leaving as they like.

    line = Line()
    line.join(one)                   # at its end
    line.leave(one)                  # from anywhere in it
    batch = line.next(8)             # who is answered together next
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from serve.requests import Request

_TURNS = 4
"""Batches of looks that go before a question in words that waits."""


@dataclass(eq=False, slots=True)
class Waiting:
    """One that was accepted."""

    request: Request
    tell: Callable[[Any], None]
    """Called once, with what it came to."""
    since: float
    """On `time.monotonic`."""
    over: bool = False
    """It was told, or nobody waits for it any more."""
    queued: bool = False


class Line:
    """See the module."""

    def __init__(self) -> None:
        self._all: deque[Waiting] = deque()
        self.bytes = self.words = self._turns = 0
        """Of all of them; how many are questions in words; batches that looks had while one of these waited."""

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._all)

    def join(self, one: Waiting) -> None:
        """At the end."""
        self._all.append(one)
        self._count(one, 1)

    def leave(self, one: Waiting) -> None:
        """Wherever it stands, if it does."""
        if one.queued:
            self._all.remove(one)
            self._count(one, -1)

    def next(self, most: int) -> list[Waiting]:
        """At most so many, out of the line: looks in their order. A question in words is answered alone, and lets looks go first,
        though not for ever."""
        batch = [one for one in self._all if one.request.words is None][:most] if self.words else list(self._all)[:most]
        if self.words:
            self._turns += 1
            if not batch or self._turns > _TURNS:
                self._turns, batch = 0, [next(one for one in self._all if one.request.words is not None)]
        for one in batch:
            self.leave(one)
        return batch

    def _count(self, one: Waiting, sign: int) -> None:
        one.queued = sign > 0
        self.bytes += sign * one.request.size
        self.words += sign * (one.request.words is not None)
