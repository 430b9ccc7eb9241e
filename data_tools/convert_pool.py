"""Worker processes of a conversion: each holds the source and the card, results come back in order.

Spawned, not forked, so that neither threads nor open files are inherited. A worker that loses its parent ends itself.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from data_tools.sources import RawEpisode, Source
from data_tools.standardise import SUCCESS, Card, standardise
from data_tools.working import begin_worker, one_thread_each
from vla.errors import DataError, MachineError
from vla.schema import Episode


@dataclass(frozen=True)
class Job:
    """What every worker needs to know, sent once."""

    source: Source
    card: Card | None
    """None where episodes are compared as they are, see `data_tools/convert_v21.py`."""
    fps: int
    video: str

    def read(self, key: str) -> tuple[RawEpisode, Episode]:
        """One episode as its file holds it and as the card understands it.

        Raises `DataError` for whatever a damaged file makes a decoder raise: a flipped bit can end in any of these.
        """
        where = f"{self.source.root}, {key}"
        assert self.card is not None
        try:
            raw = self.source.read(key, only=fields_used(self.card) | {SUCCESS})  # robomimic's next_obs is half a file
            episode = standardise(raw, self.card, self.source.info)
            episode.validate(where)
        except (OSError, ValueError, LookupError, RuntimeError, EOFError) as error:
            raise DataError(where, found=f"{type(error).__name__}: {error}", expected="an episode that can be read",
                            fix="download or copy the file again") from error  # fmt: skip
        return raw, episode


def fields_used(card: Card) -> set[str]:
    """Paths of the raw fields and pictures a fitted card takes."""
    columns = [*card.state, *card.action, *(c.relative_to for c in (*card.state, *card.action) if c.relative_to)]
    return {c.field for c in (*columns, *card.cameras.values())} | set(card.instruction.field)


class Pool:
    """Calls `function(job, *arguments)` in `workers` processes, or in this one when there are none."""

    def __init__(self, workers: int, job: Job) -> None:
        self._job, self._pool, self._threads = job, None, one_thread_each()
        self.window = 2 * workers + 1
        """Results that may lie ready or be under way, beside the one in hand: it bounds the memory."""
        if workers:
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (os.getpid(), job))

    def __enter__(self) -> Pool:
        self._threads.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._threads.__exit__(None, None, None)

    def ordered(self, function: Callable[..., Any], calls: Iterable[tuple]) -> Iterator[Any]:
        """Results of `function(job, *call)` in the order of `calls`, computed ahead by at most `window`.

        Raises what the function raises, and `MachineError` when a worker dies.
        """
        pending: deque[Future] = deque()
        try:
            for call in calls:
                if self._pool is None:
                    yield function(self._job, *call)
                    continue
                pending.append(self._pool.submit(_call, function, call))
                if len(pending) >= self.window:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise MachineError(
                "converting", found=f"a worker process died ({error})", expected="workers that live",
                fix="run the same command again (it continues); if memory ran out, with --workers 1",
            ) from error
        finally:
            for future in pending:
                future.cancel()


# ---- inside a worker ----

_JOB: list[Job] = []


def _start(parent: int, job: Job) -> None:
    begin_worker(parent)
    _JOB[:] = [job]


def _call(function: Callable[..., Any], arguments: tuple) -> Any:
    return function(_JOB[0], *arguments)
