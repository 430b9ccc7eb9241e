"""A policy asked in words, a little at a time, by somebody in another thread: what a planner and a judge of progress need.

    speaker = EngineSpeaker(service.engine, loop)          # a server's model, in its process
    speaker.score(frame, "is it finished: touch the red cube?", ["yes", "no"])      # [-0.1, -2.4]

Robots act while it thinks: each part is one batch of the engine's, so that a look never waits longer than for one, and a model
that hangs is killed as it would be for a look. No torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from serve.refusal import Refusal, unavailable
from serve.wire import Encoded, Picture

if TYPE_CHECKING:  # a planner on a robot needs no engine
    from serve.engine import Engine
    from serve.requests import Spoken, Words

PART = 8
"""Words said, or candidates scored, before looks have their turn."""
MOST_WORDS = 64


class Speaker(Protocol):
    """What answers questions about pictures. From any thread; raises `VLAError`."""

    def score(self, picture: Picture | None, question: str, candidates: Sequence[str]) -> Sequence[float]:
        """Log-likelihood of each candidate as the whole answer."""
        ...

    def answer(self, picture: Picture | None, question: str) -> tuple[str, float]:
        """(the likeliest answer, its log-likelihood)."""
        ...


class LocalSpeaker:
    """A `vla.policy.VLAPolicy` of this very process. One question at a time."""

    def __init__(self, policy: Any) -> None:
        self._policy, self._turn = policy, threading.Lock()

    def score(self, picture: Picture | None, question: str, candidates: Sequence[str]) -> list[float]:
        with self._turn:
            return self._policy.score_answers(_pixels(picture), question, candidates).tolist()

    def answer(self, picture: Picture | None, question: str) -> tuple[str, float]:
        with self._turn:
            text = self._policy.answer(_pixels(picture), question)
            return text, float(self._policy.score_answers(_pixels(picture), question, [text])[0]) if text else 0.0


class EngineSpeaker:
    """The policy of an engine, whose loop runs in another thread than the one that asks."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, *, timeout: float = 10.0, adapter: str | None = None,
                 robot: str | None = None) -> None:  # fmt: skip
        """`timeout` s of one question, all its parts together."""
        self._engine, self._loop, self.timeout, self._adapter, self._robot = engine, loop, timeout, adapter, robot

    def score(self, picture: Picture | None, question: str, candidates: Sequence[str]) -> list[float]:
        return self._run(self._score(picture, question, tuple(candidates)))

    def answer(self, picture: Picture | None, question: str) -> tuple[str, float]:
        return self._run(self._answer(picture, question))

    def _run(self, work: Any) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(self.timeout + 1.0)
        except TimeoutError:
            future.cancel()
            raise Refusal("late", where="policy", found=f"no answer within {self.timeout:g} s", expected="words in time",
                          fix="a longer timeout, fewer candidates, or a smaller policy") from None  # fmt: skip

    async def _score(self, picture: Picture | None, question: str, candidates: tuple[str, ...]) -> list[float]:
        from serve.requests import Words

        scores: list[float] = []
        with self._parts(picture) as ask:
            for at in range(0, len(candidates), PART):
                scores += (await ask(Words(question, candidates[at : at + PART]))).scores
        return scores

    async def _answer(self, picture: Picture | None, question: str) -> tuple[str, float]:
        from serve.requests import Words

        ids: tuple[int, ...] = ()
        likely, said = 0.0, None
        with self._parts(picture) as ask:
            while said is None or not (said.ended or len(ids) >= MOST_WORDS):
                said = await ask(Words(question, (), ids, PART))
                ids, likely = tuple(said.ids), likely + said.likely
        return said.text, likely

    @contextlib.contextmanager
    def _parts(self, picture: Picture | None) -> Iterator[Any]:
        """Parts of one question, all of them to the same policy."""
        from serve.requests import Request

        engine, policy, deadline = self._engine, self._engine.info.policy, time.monotonic() + self.timeout
        robot = self._robot or next(iter(engine.info.robots))

        async def ask(words: Words) -> Spoken:
            images = {} if picture is None else {"front": picture}
            asked = Request(images, None, "", robot, self._adapter, client="words", deadline=deadline, words=words)
            spoken = await engine.ask(asked)
            if spoken.policy != policy:
                raise unavailable("the policy was swapped in the middle of an answer")
            return spoken

        yield ask


def _pixels(picture: Picture | None) -> np.ndarray | None:
    return picture.decode() if isinstance(picture, Encoded) else picture
