"""The one owner of the model: a bounded queue in front of it, batches across clients, a deadline for every request.

    engine = Engine(lambda: ProcessBackend.start(spec))
    await engine.start()                                  # loaded and warm
    answer = await engine.act(Request(images, state, "push the red cube left", robot="tabletop"))
    await engine.swap(lambda: ProcessBackend.start(other))  # accepted work is finished first; nobody is refused

Runs on one asyncio loop and never computes: the model is a `Backend` in a process (or thread) of its own. A request is accepted
only if it can be answered inside its deadline by what batches took of late; otherwise the client hears `busy` at once, and when
to come again. Who goes away frees its place. A backend that dies or hangs is killed and started again: its batch hears
`unavailable`, those still waiting wait on as long as their deadlines allow.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from serve.metrics import Metrics
from serve.pace import Pace
from serve.refusal import Refusal, unavailable
from serve.requests import Answer, Backend, BackendLost, Info, Request, Spoken, Start, lost_by, telling
from serve.waiting import Line, Waiting
from vla.errors import VLAError

logger = logging.getLogger(__name__)

_CARE = 0.25
"""Of the time before its own batch that a request is thought to wait longer: batches to come may be slower than those of late."""


@dataclass(frozen=True)
class EngineOptions:
    """Bounds. Times in seconds."""

    queue: int = 64
    """Requests that may wait."""
    queue_bytes: int = 256 << 20
    batch: int = 8
    """Most requests answered together."""
    words: int = 16
    """Questions in words that may wait."""
    deadline: float = 2.0
    """Of a request that brings none; and the longest it may bring is ten times this."""
    hang: float = 30.0
    """A batch that takes longer is not waited for: the backend is killed."""
    gather: float = 0.01
    """Longest a batch waits for clients that asked a moment ago; at most a tenth of what a batch takes."""


class Engine:
    """See the module. Everything but the constructor belongs to one running loop."""

    def __init__(self, start: Start, options: EngineOptions | None = None, metrics: Metrics | None = None) -> None:
        self.options, self.metrics = options or EngineOptions(), metrics or Metrics()
        self._start = start
        self._backend: Backend | None = None
        self._info: Info | None = None
        self._queue = Line()
        self.metrics.queue.set_function(lambda: len(self._queue))
        self.metrics.running.set_function(lambda: len(self._running))
        self._running: list[Waiting] = []
        self._began = self._loading = self._back = self._alarm_at = 0.0
        self._busy: Backend | None = None
        """The backend that has a batch."""
        self._alarm: asyncio.TimerHandle | None = None
        """For the first deadline to pass, or the batch to hang: one timer, since most of them are never needed."""
        self._hung = False
        self._over = asyncio.Event()
        """The batch that is with `_busy` came to an end, whoever waits for it."""
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop: asyncio.Task[None] | None = None
        self._ending: asyncio.Future[None] | None = None
        """Of a backend that was lost: what it held is free when this is done."""
        self._taken = asyncio.Event()
        """There is a backend, whoever brought it."""
        self._swapping = asyncio.Lock()
        self._recent: dict[str, float] = {}
        self.state = "starting"
        """starting, ready, restarting, draining or stopped."""
        self.draining = False
        self.expected = 0.1
        """Seconds a batch is expected to take: the slowest of late, forgotten by and by."""
        self._pace = Pace(1, 0.1)
        self.speaking = 0.1
        """The same of questions in words."""

    # ------------------------------------------------------------------------------------------------ life

    async def start(self) -> Engine:
        """Load the model and warm it up. Raises what the backend says it lacks."""
        await self._take(*await self._timed(self._start))
        self._loop = asyncio.create_task(self._serve(), name="engine")
        self._loop.add_done_callback(self._ended)
        return self

    def _ended(self, loop: asyncio.Task[None]) -> None:
        """An engine that stops by itself must not look ready."""
        if not loop.cancelled() and loop.exception() is not None:
            logger.critical("the engine has failed", exc_info=loop.exception())
            self.state = "stopped"

    async def _timed(self, start: Start) -> tuple[Backend, float]:
        began = time.monotonic()
        return await start(), time.monotonic() - began

    async def _take(self, backend: Backend, loading: float) -> None:
        self._backend, self._info, backend.on_lost = backend, backend.info, lambda: self._lost(backend)
        self._loading, self.expected = loading, max(backend.info.warm, 1e-4)
        self._taken.set()
        self._pace = Pace(1, self.expected)
        self.state = "draining" if self.draining else "ready"
        self.metrics.policy(backend.info.policy)

    @property
    def info(self) -> Info:
        """Of the policy that answers, or did until it was lost; `Refusal` before there was one."""
        if self._info is None:
            raise unavailable(f"the policy is {self.state}")
        return self._info

    @property
    def ready(self) -> bool:
        return self.state == "ready" and not self.draining

    @property
    def waiting(self) -> int:
        """Requests that were accepted and not answered yet."""
        return len(self._queue) + len(self._running)

    async def drain(self, timeout: float) -> bool:
        """Accept nothing any more and finish what was; whether all of it was finished within `timeout` s."""
        self.draining, self.state = True, "draining"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        return self._idle.is_set()

    async def stop(self, now: bool = False) -> None:
        """End the model's process, with `now` in the middle of its work; whoever still waits hears `unavailable`."""
        self.draining, self.state = True, "stopped"
        left = [*self._running, *self._queue]
        if self._loop is not None:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
        for one in left:
            self._tell(one, unavailable("the server is stopping", retry_after=5.0))
        backend, self._backend = self._backend, None
        self._free()  # whoever waits for the end of its batch, as a swap does
        if self._alarm is not None:
            self._alarm.cancel()
        if backend is not None:
            if now:
                backend.kill()
            await backend.stop()

    async def swap(self, start: Start, check: Callable[[Info], None] = lambda info: None) -> Info:
        """Load another policy beside the one that answers, and let it answer from the next batch on. Returns what it is.

        Raises what the new backend or `check` says, or `Refusal` when it lacks a robot or an adapter that is served now, or knows
        that robot as another one: then nothing has changed.
        """
        async with self._swapping:
            if self._loop is None:
                raise unavailable(f"the policy is {self.state}")
            fresh, loading = await self._timed(start)
            try:
                if lost := lost_by(self.info, fresh.info):
                    raise Refusal("bad_request", where="swap", found="; ".join(lost)[:1000],
                                  expected="every robot and adapter that is served now, as it is",
                                  fix="start another server for it")  # fmt: skip
                check(fresh.info)
                if self.draining:
                    raise unavailable("the server is draining", retry_after=5.0)
            except BaseException:
                await fresh.stop()
                raise
            old, self._start = self._backend, start
            await self._take(fresh, loading)
            self.metrics.swaps.inc()
            if old is not None:
                while self._busy is old:  # the batch that is with the old one is finished there
                    await self._over.wait()
                await old.stop()
            return fresh.info

    # ------------------------------------------------------------------------------------------------ asking

    async def act(self, request: Request) -> Answer:
        """One chunk for one look. Raises `Refusal`, or the `VLAError` the policy has for this observation."""
        return await self.ask(request)

    def ask(self, request: Request) -> asyncio.Future[Any]:
        """`act`, to be awaited later; cancelled, it frees its place. Raises the `Refusal` of what is not even accepted. What
        comes of a request with `words` is `Spoken`."""
        answer = asyncio.get_running_loop().create_future()
        leave = self.submit(request, telling(answer))
        answer.add_done_callback(lambda _: leave())
        return answer

    def submit(self, request: Request, tell: Callable[[Any], None]) -> Callable[[], None]:
        """`ask` without a future: `tell` is called once, after this has returned, with what `ask` would come to or raise: in the
        very turn of the loop in which the model answered. Returns what frees its place; it is not told then.

        Where nothing else waits the model has it when this returns: what a caller still does then costs no time.
        """
        now = time.monotonic()
        own = request.deadline < math.inf
        request.deadline = min(request.deadline, now + self.options.deadline * (10 if own else 1))
        self._admit(request, now)
        one = Waiting(request, tell, now)
        if request.words is None and request.client:
            self._recent[request.client] = now
        if self._busy is None and not self._queue and self._backend is not None and len(self._recent) <= 1:
            self._begin([one])
        else:
            self._queue.join(one)
            self._work.set()
        self._idle.clear()
        self._wake_by(request.deadline)
        return partial(self._forget, one)

    def _tell(self, one: Waiting, said: Answer | Spoken | VLAError) -> None:
        """The first that is said to it. Who hears it may raise whatever it likes: the others of its batch are told all the same,
        and the engine goes on."""
        if one.over:
            return
        self._forget(one)
        try:
            one.tell(said)
        except Exception:  # the caller's own; who else is in the batch does not pay for it
            logger.exception("an answer could not be handed over")

    def _wake_by(self, when: float) -> None:
        """Look at the time then, at the latest."""
        if self._alarm is None or self._alarm_at > when:
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm_at = when
            self._alarm = asyncio.get_running_loop().call_later(when - time.monotonic(), self._look_at_the_time)

    def _look_at_the_time(self) -> None:
        """Whose deadline has passed hears it, and what the model says of it is thrown away; who hangs is killed."""
        self._alarm, now, times = None, time.monotonic(), list[float]()
        for one in [*self._running, *self._queue]:
            if one.over:
                continue
            if one.request.deadline > now:
                times.append(one.request.deadline)
                continue
            self.metrics.late.inc()
            self._tell(one, Refusal("late", found=f"no answer within {one.request.deadline - one.since:.3g} s",
                                    expected="a batch in time", fix="ask for a longer deadline, or less often",
                                    retry_after=self.expected))  # fmt: skip
        if self._busy is not None and not self._hung:
            if (end := self._began + self.options.hang) > now:
                times.append(end)
            else:
                self._hung = True
                self._busy.kill()
        if times:
            self._wake_by(min(times))

    def _admit(self, request: Request, now: float) -> None:
        if self.draining:
            raise unavailable("the server is draining", retry_after=5.0)
        if self._backend is None and not (self.state == "restarting" and self._back < request.deadline):
            raise unavailable(f"the policy is {self.state}", retry_after=max(1.0, self._back - now))
        if request.deadline <= now:
            raise Refusal("late", found="a deadline that has passed", expected="time to answer",
                          fix="deadlines are seconds from now")  # fmt: skip
        if not self._running and not self._queue and request.size <= self.options.queue_bytes:
            return  # with nothing to do it is tried, whatever it took last: or one slow batch would refuse everybody for good
        wait = self._wait(now) + (0.0 if request.words is None else self.speaking)
        full = len(self._queue) >= self.options.queue or self._queue.bytes + request.size > self.options.queue_bytes
        full = full or (request.words is not None and self._queue.words >= self.options.words)
        late = now + wait + _CARE * (wait - self.expected) > request.deadline
        if full or late:
            self.metrics.busy.inc()
            raise Refusal("busy", found=f"{len(self._queue)} requests waiting, {wait:.3g} s of work", expected=f"at most "
                          f"{self.options.queue}, and {request.deadline - now:.3g} s", fix="ask less often, or start another",
                          retry_after=max(wait, self.expected))  # fmt: skip

    def _wait(self, now: float) -> float:
        """Seconds until a request that comes now would be answered, if batches take as long as the slow ones of late."""
        whole, rest = divmod(len(self._queue) + 1, self.options.batch)
        queued = whole * self._batch_takes(self.options.batch) + (self._batch_takes(rest) if rest else 0.0)
        if not self._running:
            return queued
        usual = self._batch_takes(len(self._running)) if self._running[0].request.words is None else self.speaking
        return max(0.0, usual - (now - self._began)) + queued

    def _batch_takes(self, looks: int) -> float:
        return max(self.expected, self._pace(looks))

    def _forget(self, one: Waiting) -> None:
        """It was answered, or nobody waits for it any more. Idempotent."""
        one.over = True
        self._queue.leave(one)
        if not self._queue and not self._running:
            self._idle.set()

    # ------------------------------------------------------------------------------------------------ serving

    async def _serve(self) -> None:
        """Brings a backend that was lost back, and lets batches begin that could not begin when they were asked for."""
        while True:
            if self._backend is None:  # at once: a server that is not ready is not asked for anything
                await self._restart()
            if self._busy is not None or not self._queue:
                self._work.clear()
                await self._work.wait()
                continue
            await self._gather()
            if self._backend is not None and self._busy is None and self._queue:
                self._begin(self._queue.next(self.options.batch))  # no name for it here: it would keep its pictures

    async def _gather(self) -> None:
        """Clients who asked a moment ago are about to ask again: answered together, all of them wait less."""
        self._forget_old()
        end = time.monotonic() + min(self.options.gather, 0.1 * self.expected)
        while len(self._queue) < min(len(self._recent), self.options.batch) and (left := end - time.monotonic()) > 0:
            self._work.clear()
            try:
                await asyncio.wait_for(self._work.wait(), left)
            except TimeoutError:
                return

    def _forget_old(self) -> None:
        """Clients who have not asked of late."""
        near = time.monotonic() - max(1.0, 3 * self.expected)
        self._recent = {client: at for client, at in self._recent.items() if at > near}

    def _begin(self, batch: list[Waiting]) -> None:
        """The batch is with the model."""
        assert self._backend is not None
        backend = self._backend
        self._busy, self._running, self._began, self._hung = backend, batch, time.monotonic(), False
        self._over.clear()
        self._wake_by(self._began + self.options.hang)
        try:
            backend.begin([one.request for one in batch], partial(self._finish, batch, backend))
        except Exception as error:
            asyncio.get_running_loop().call_soon(self._finish, batch, backend, error, 0.0)

    def _finish(self, batch: list[Waiting], backend: Backend, results: list[Any] | Exception, seconds: float) -> None:
        """What the model says of a batch, to those who wait."""
        if self._running is not batch:  # the engine has stopped
            return
        took = time.monotonic() - self._began
        try:
            if isinstance(results, Exception):
                raise results
            said = [
                self._read(one, result, backend.info, seconds, len(batch)) for one, result in zip(batch, results, strict=True)
            ]
        except Exception as error:  # of ours as well: whatever it was, this conversation is not to be trusted any more
            self._failed(batch, backend, error)
            return
        waits = [self._began - one.since for one in batch if not one.over]
        self._free()
        if self._backend is not None and len(self._queue) >= min(self.options.batch, max(1, len(self._recent))):
            self._forget_old()
            self._begin(self._queue.next(self.options.batch))  # a model that is wanted does not wait for answers to be written
        for one, answer in zip(batch, said, strict=True):
            self._tell(one, answer)
        # What is learnt of it can wait until it was said.
        if batch[0].request.words is None:
            self.expected = max(took, 0.8 * self.expected + 0.2 * took)
            self._pace.learn(len(batch), took)
        else:
            self.speaking = max(took, 0.8 * self.speaking + 0.2 * took)
        self.metrics.batch(len(batch), took, waits)

    def _free(self) -> None:
        """The model has nothing to do."""
        self._running, self._busy = [], None
        self._over.set()
        if self._queue or self._backend is None:
            self._work.set()
        if not self._queue:
            self._idle.set()

    def _failed(self, batch: list[Waiting], backend: Backend, error: Exception) -> None:
        """A conversation that came to nothing: its backend is killed."""
        why = f"the policy did not answer for {self.options.hang:g} s" if self._hung else str(error)
        if not isinstance(error, BackendLost):
            why = f"the policy's answer could not be read: {type(error).__name__}"
            logger.error("a conversation that failed", exc_info=error)
        logger.error("%s: killed and started again", why)
        self.metrics.restarts.inc()
        backend.kill()
        lost = batch
        if self._backend is backend:
            self._gone()
            lost = [*batch, *(one for one in self._queue if one.request.deadline < self._back)]
        self._put_away(backend)
        self._free()
        for one in lost:
            self._tell(one, unavailable(why, retry_after=max(1.0, self._loading)))

    def _read(self, one: Waiting, result: Any, info: Info, seconds: float, size: int) -> Answer | Spoken | VLAError:
        """What the model said to one request of a batch of `size`."""
        if isinstance(result, VLAError):
            return result
        if one.request.words is not None:
            return Spoken(**result, policy=info.policy)
        actions, confidence, symbols = result
        execute = info.steps[one.request.robot][1]
        return Answer(actions, confidence, symbols, info.policy, seconds, self._began - one.since, size, execute)

    def _gone(self) -> None:
        """There is no backend."""
        self._backend, self.state, self._back = None, "restarting", time.monotonic() + self._loading
        self._taken.clear()

    def _put_away(self, backend: Backend) -> None:
        async def stopped(before: asyncio.Future[None] | None) -> None:
            await backend.stop()
            if before is not None:
                await before

        self._ending = asyncio.ensure_future(stopped(self._ending))

    def _lost(self, backend: Backend) -> None:
        """It ended with nothing to do; what was with it is `_finish`'s to tell."""
        if backend is not self._backend or self._busy is backend:
            return
        logger.error("the policy's process ended: started again")
        self.metrics.restarts.inc()
        self._gone()
        self._put_away(backend)
        self._work.set()

    async def _restart(self) -> None:
        """Until there is a backend again, started here or brought by a swap: at once, then after 1, 2, 4, ... at most 30 s."""
        pause, taken = 0.0, asyncio.ensure_future(self._taken.wait())
        try:
            if self._ending is not None:  # a GPU has room for one
                await asyncio.wait({taken, self._ending}, return_when=asyncio.FIRST_COMPLETED)
            while self._backend is None:
                await asyncio.wait({taken}, timeout=pause)
                if self._backend is not None:
                    return
                starting = asyncio.ensure_future(self._timed(self._start))
                try:
                    await asyncio.wait({starting, taken}, return_when=asyncio.FIRST_COMPLETED)
                    if not starting.done():
                        return  # a swap was quicker
                    backend, loading = starting.result()
                except Exception as error:  # whatever it is, the next try may come to something
                    pause = min(30.0, max(1.0, 2 * pause))
                    logger.error("the policy's process did not start, again in %g s: %s", pause, error)
                    continue
                finally:
                    starting.cancel()
                if self._backend is None:
                    await self._take(backend, loading)
                else:
                    await backend.stop()
        finally:
            taken.cancel()
