"""What is asked of a policy behind a server, what it answers, and what a place where one lives must do (`serve/backend.py`)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from serve.robot import Robot, differences
from serve.wire import Picture
from vla.errors import VLAError


@dataclass(frozen=True)
class Words:
    """A question in words about a request's picture. One short part at a time, since looks wait for it (`serve/speaking.py`)."""

    question: str
    candidates: tuple[str, ...] = ()
    """Answers to score; without any the question is answered."""
    said: tuple[int, ...] = ()
    """What was said of the answer so far."""
    most: int = 8
    """Words to be said now."""


@dataclass(eq=False)
class Request:
    """One look of one robot, or one question."""

    images: Mapping[str, Picture]
    """Camera -> (h, w, 3) uint8, or a file that is decoded beside the model."""
    state: np.ndarray | None
    """(S,) float32, robot units."""
    instruction: str
    robot: str
    """Key of its embodiment."""
    adapter: str | None = None
    """Which of the adapters on the base; None for the policy itself."""
    seed: int = 0
    """What "sample" draws from."""
    client: str = ""
    """Whose it is: batches wait a moment for those who asked just now."""
    deadline: float = math.inf
    """On `time.monotonic`."""
    words: Words | None = None
    """Where an answer in words is wanted: about the first of the pictures, if there is one."""
    spot: int | None = None
    """A number for where in its client's memory all of its pictures lie: the same for the same places alone."""
    _size: int = field(default=-1, init=False, repr=False)

    @property
    def size(self) -> int:
        """Bytes it holds while it waits."""
        if self._size < 0:
            self._size = sum(p.nbytes if isinstance(p, np.ndarray) else len(p.data) for p in self.images.values())
        return self._size


@dataclass(eq=False)  # one a look: to freeze it costs 1.2 us
class Answer:
    """One chunk, as `vla.policy.Chunk`, and how it came about."""

    actions: np.ndarray  # (n, A) float32, robot units
    confidence: np.ndarray  # (n, A) float32 in [0, 1]; NaN where numbers are said (L1)
    symbols: np.ndarray  # int64
    policy: str
    """Fingerprint of the policy that answered."""
    infer: float
    """Seconds its batch took."""
    wait: float
    """Seconds it waited before that."""
    batch: int
    """Requests answered together."""
    execute: int
    """Steps to carry out before looking again."""


@dataclass(frozen=True)
class Spoken:
    """What was said to `Words`: the answer so far, or the scores of the candidates."""

    ids: tuple[int, ...]
    likely: float
    """Log-likelihood of what was added."""
    ended: bool
    text: str
    scores: tuple[float, ...]
    """Log-likelihood of each candidate as the whole answer."""
    policy: str
    """Fingerprint of the policy that said it."""


@dataclass(frozen=True)
class Info:
    """What a backend says of the policy it has loaded."""

    policy: str
    """Fingerprint."""
    name: str
    robots: Mapping[str, Robot]
    embodiments: Mapping[str, Any]
    """Robot -> its embodiment as JSON."""
    steps: Mapping[str, tuple[int, int]]
    """Robot -> (steps of a chunk, steps carried out before looking again)."""
    adapters: tuple[str, ...]
    instructions: tuple[str, ...]
    symbols: int
    """K of the codec."""
    warm: float
    """Seconds of one batch when it was warm."""


class BackendLost(Exception):
    """The process that had the model is gone, or was killed because it hung."""


Done = Callable[[list[Any] | Exception, float], None]
"""What a batch comes to: for each request (actions, confidence, symbols), a mapping as `Spoken`, or a `VLAError`; or what ended
all of it, mostly `BackendLost`; and the seconds it took."""


class Backend(Protocol):
    """Where a model lives. One batch at a time."""

    info: Info
    on_lost: Callable[[], None]
    """Called when it ends by itself, whatever it was doing."""

    def begin(self, batch: Sequence[Request], done: Done) -> None:
        """The batch is with the model when this returns; `done` is called once, later, by the loop. `Words` come alone. What it
        raises ends this backend: `BackendLost`, an observation that cannot be sent."""
        ...

    async def stop(self) -> None:
        """Let it end, or end it. Idempotent."""
        ...

    def kill(self) -> None: ...


Start = Callable[[], Awaitable[Backend]]


def lost_by(old: Info, fresh: Info) -> list[str]:
    """What of the robots and adapters that are served now another policy does not have, or has otherwise."""
    lost = [f"no adapter {name!r}" for name in old.adapters if name not in fresh.adapters]
    for key, robot in old.robots.items():
        there = fresh.robots.get(key)
        lost += [f"no robot {key!r}"] if there is None else [f"robot {key!r}: {text}" for text in differences(robot, there)]
    return lost


def telling(future: asyncio.Future[Any]) -> Callable[[Any], None]:
    """What says to `future` what was said: a `VLAError` is raised there, and who left hears nothing."""

    def tell(said: Any) -> None:
        if future.done():
            return
        if isinstance(said, VLAError):
            future.set_exception(said)
        else:
            future.set_result(said)

    return tell
