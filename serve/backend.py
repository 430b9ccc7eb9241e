"""The model in a process of its own: pictures go there through shared memory, everything else through a socket.

    backend = await ProcessBackend.start({"policy": "runs/demo"})
    backend.begin(requests, lambda results, seconds: ...)

The server's process never imports torch, so nothing the model does (a long step, a crash, `kill -9`) stops a probe or a socket.
What the process does is `serve/model_process.py`. `ThreadBackend` is the same without a process, for replicas that
already are one (`serve/ray_app.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

import msgpack
import numpy as np

from serve.again import AGAIN, Kinds, chunk_heard, kinds_of, look_said
from serve.requests import BackendLost, Done, Info, Request
from serve.robot import Robot
from serve.shared import Region
from vla.errors import CheckpointError, DataError, MachineError, UsageError, VLAError

_KINDS = {kind.__name__: kind for kind in (CheckpointError, DataError, MachineError, UsageError)}
_ROOM = 4 << 20
"""Bytes of shared memory at first; it grows with the largest batch."""
LOADING = 600.0
"""Seconds a policy may take to load and warm up."""


class ProcessBackend:
    """See the module. Made by `start`."""

    def __init__(self, process: asyncio.subprocess.Process, line: _Line, shared: int) -> None:
        self._process, self._line, self._file = process, line, shared
        self._room, self._memory = 0, np.zeros(0, np.uint8)
        self._regions: dict[int, Region] = {}
        """Shared memory of clients that the process has open."""
        self._last: tuple[Any, ...] | None = None
        """What another look has in common with the last that was said in full, if it is like it; None where none can be."""
        self._kinds: Kinds | None = None
        """Of the last answer's arrays."""
        self._stopped = False
        self._ending: asyncio.Task[None] | None = None
        self.info: Info
        self.on_lost: Callable[[], None] = lambda: None
        line.on_lost = lambda: None if self._stopped else self.on_lost()

    @classmethod
    async def start(cls, spec: Mapping[str, Any], loading: float = LOADING) -> ProcessBackend:
        """A process with the policy that `spec` says (`serve/model_process.py`), loaded and warm.

        Raises the `VLAError` of the policy that could not be loaded, `MachineError` when the process dies or takes too long.
        """
        mine, theirs = socket.socketpair()
        shared = _anonymous_file()
        command = "import sys; from serve.model_process import main; main(int(sys.argv[1]), int(sys.argv[2]))"
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-c", command, str(theirs.fileno()), str(shared), pass_fds=(theirs.fileno(), shared),
                stdin=asyncio.subprocess.DEVNULL, start_new_session=True,  # a terminal's Ctrl-C is the server's to handle
            )  # fmt: skip
        finally:
            theirs.close()
        _, line = await asyncio.get_running_loop().create_unix_connection(_Line, sock=mine)
        backend = cls(process, line, shared)
        try:
            async with asyncio.timeout(loading):
                backend._send(dict(spec))
                said = await backend._receive()
                if "error" not in said:
                    backend.info = info_of(said)
        except BaseException as error:  # a process that nobody knows of would keep its GPU
            backend.kill()
            await backend.stop()
            if not isinstance(error, (TimeoutError, BackendLost)):
                raise
            raise MachineError("policy process", found=str(error) or f"not ready within {loading:g} s",
                               expected=f"{spec.get('policy')} loaded and warm",
                               fix="look above for what it said; free memory") from error  # fmt: skip
        if "error" in said:
            await backend.stop()
            raise error_of(said["error"])
        return backend

    @property
    def pid(self) -> int:
        """Of the model's process."""
        return self._process.pid

    def begin(self, batch: Sequence[Request], done: Done) -> None:
        """See `serve.requests.Backend`."""
        one, alike = batch[0], _alike(batch)
        gone = any(region.closed for region in self._regions.values())
        if alike is not None and alike == self._last and one.state is not None and not gone:
            self._line.send(look_said(one.state))
        else:
            self._last = alike if self._say(batch) else None
        self._line.then(lambda data: self._heard(data, done))

    def _say(self, batch: Sequence[Request]) -> bool:
        """All there is to say of it. Returns whether no picture had to be copied."""
        at, items, places = 0, [], []
        regions: dict[int, Region] = {}
        for request in batch:
            pictures: list[Any] = []
            for camera, picture in request.images.items():
                if (place := getattr(picture, "place", None)) is not None and not place[0].closed:  # the model sees it as well
                    regions[place[0].number] = place[0]
                    pictures.append((camera, "shared", place[1], place[0].number, picture.shape))
                    continue
                data = picture if isinstance(picture, np.ndarray) else picture.data
                size = data.nbytes if isinstance(data, np.ndarray) else len(data)
                kind = "raw" if isinstance(picture, np.ndarray) else picture.format
                pictures.append((camera, kind, at, size, picture.shape))
                places.append((at, size, data))
                at += size
            state = None if request.state is None else np.asarray(request.state, np.float32).tobytes()
            items.append((request.robot, request.adapter, request.instruction, request.seed, pictures, state))
        self._make_room(at)
        for start, size, data in places:
            raw = np.ascontiguousarray(data).reshape(-1) if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
            self._memory[start : start + size] = raw.view(np.uint8)
        self._send({"batch": items, "room": self._room, **self._named(regions), **_words_of(batch)})
        return not places

    def _named(self, regions: dict[int, Region]) -> dict[str, Any]:
        """What the model's process is to open of its clients' shared memory, and what to let go."""
        gone = [number for number, region in self._regions.items() if region.closed]
        for number in gone:
            del self._regions[number]
        fresh = {number: (one.file, one.size) for number, one in regions.items() if number not in self._regions}
        self._regions |= regions
        return {"regions": fresh, "gone": gone} if fresh or gone else {}

    def _heard(self, data: bytes | None, done: Done) -> None:
        """What a batch came to; without `data` the process has ended."""
        if data is None:
            self._ending = asyncio.create_task(self._tell_the_end(done))
            return
        try:
            if data.startswith(AGAIN) and self._kinds is not None:
                results, seconds = chunk_heard(data, self._kinds)
            else:
                said = msgpack.unpackb(data, strict_map_key=False)
                results, seconds = [result_of(one) for one in said["results"]], said["seconds"]
                self._kinds = kinds_of(results)
        except Exception as error:
            results, seconds, self._kinds = error, 0.0, None
        done(results, seconds)

    async def _tell_the_end(self, done: Done) -> None:
        done(await self._why_lost(), 0.0)

    async def _why_lost(self) -> BackendLost:
        """Why the process ended."""
        code = await self._process.wait()
        return BackendLost(f"the policy's process ended ({f'killed by signal {-code}' if code < 0 else f'exit code {code}'})")

    async def stop(self) -> None:
        """See `serve.requests.Backend`."""
        if self._stopped:
            return
        self._stopped = True
        self._line.close()  # its end of the conversation: it leaves by itself
        try:
            await asyncio.wait_for(self._process.wait(), 5.0)
        except TimeoutError:
            self.kill()
            await self._process.wait()
        self._memory = np.zeros(0, np.uint8)
        os.close(self._file)

    def kill(self) -> None:
        """At once, with whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _make_room(self, size: int) -> None:
        if size > self._room:
            self._room = max(_ROOM, 1 << (size - 1).bit_length())
            os.ftruncate(self._file, self._room)
            self._memory = np.frombuffer(mmap.mmap(self._file, self._room), np.uint8)

    def _send(self, message: Any) -> None:
        data = msgpack.packb(message)
        assert data is not None
        self._line.send(data)

    async def _receive(self) -> Any:
        heard = asyncio.get_running_loop().create_future()
        self._line.then(lambda data: None if heard.done() else heard.set_result(data))
        if (data := await heard) is None:
            raise await self._why_lost()
        return msgpack.unpackb(data, strict_map_key=False)


class _Line(asyncio.Protocol):
    """Messages with their length before them, one waited for at a time. What waits is called in the turn of the loop in which
    its message came: a stream reader costs two turns more."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._heard, self._lost = bytearray(), False
        self._then: Callable[[bytes | None], None] | None = None
        self.on_lost: Callable[[], None] = lambda: None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._heard += data
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._tell()
        self.on_lost()

    def _tell(self) -> None:
        if (then := self._then) is None:
            return
        if len(self._heard) >= 4 and len(self._heard) >= (end := 4 + int.from_bytes(self._heard[:4], "big")):
            self._then, data = None, bytes(self._heard[4:end])
            del self._heard[:end]
            then(data)
        elif self._lost:
            self._then = None
            then(None)

    def send(self, data: bytes) -> None:
        """Pictures lie elsewhere: it never takes long."""
        if self._lost or self._transport.is_closing():
            raise BackendLost("the policy's process ended")
        self._transport.write(len(data).to_bytes(4, "big") + data)

    def then(self, then: Callable[[bytes | None], None]) -> None:
        """Call it with the next message, or None when the other end is gone."""
        self._then = then
        if self._heard or self._lost:
            asyncio.get_running_loop().call_soon(self._tell)

    def close(self) -> None:
        self._transport.close()


class ThreadBackend:
    """The model in a thread of this process: nobody can kill it, and it shares the interpreter with the server.

    A thread that only takes what is to be done and does it: an executor's costs as much again, and a program that wants to end
    would wait for one that hangs.
    """

    def __init__(self, actor: Any, work: SimpleQueue[Callable[[], None] | None]) -> None:
        self._actor, self._work = actor, work
        self._done: Done | None = None
        """Of the batch it has."""
        self.info: Info = info_of(actor.describe())
        self.on_lost: Callable[[], None] = lambda: None  # a thread does not end by itself

    @classmethod
    async def start(cls, spec: Mapping[str, Any]) -> ThreadBackend:
        """Raises the `VLAError` of the policy that could not be loaded."""
        from serve.model_process import load

        loop, work = asyncio.get_running_loop(), SimpleQueue[Callable[[], None] | None]()
        loaded = loop.create_future()
        Thread(target=_do_all, args=(work,), name="policy", daemon=True).start()
        work.put(_for(loop, lambda: load(dict(spec)), lambda said, _: None if loaded.done() else loaded.set_result(said)))
        try:
            if isinstance(said := await loaded, BackendLost):
                raise MachineError("policy thread", found=said, expected=f"{spec.get('policy')} loaded and warm",
                                   fix="look above for what it said") from said  # fmt: skip
            if isinstance(said, Exception):
                raise said
            return cls(said, work)
        except BaseException:
            work.put(None)
            raise

    def begin(self, batch: Sequence[Request], done: Done) -> None:
        """See `serve.requests.Backend`."""
        items = [(r.robot, r.adapter, r.instruction, r.seed, dict(r.images), r.state) for r in batch]
        words, actor, self._done = _words_of(batch).get("words"), self._actor, done
        answers = (lambda: actor.answer(items)) if words is None else (lambda: actor.speak(items, words))
        self._work.put(_for(asyncio.get_running_loop(), answers, partial(self._tell, done)))

    def _tell(self, done: Done, results: list[Any] | Exception, seconds: float) -> None:
        if self._done is done:  # nobody waits for a thread that hung
            self._done = None
            done(results, seconds)

    async def stop(self) -> None:
        """See `serve.requests.Backend`."""
        self._work.put(None)

    def kill(self) -> None:
        """It is not waited for any more; a thread cannot be ended."""
        self._work.put(None)
        if (done := self._done) is not None:
            asyncio.get_running_loop().call_soon(self._tell, done, BackendLost("the policy's thread hangs"), 0.0)


def _do_all(work: SimpleQueue[Callable[[], None] | None]) -> None:
    """One after the other, until there is nothing more to do."""
    while (job := work.get()) is not None:
        job()
        del job  # it would keep its pictures until the next one


def _for(loop: asyncio.AbstractEventLoop, work: Callable[[], Any], tell: Callable[[Any, float], None]) -> Callable[[], None]:
    """What a thread is to do: `work`, and to let `loop` tell what came of it, or what it raised, and the seconds it took."""

    def job() -> None:
        began = time.perf_counter()
        try:
            said = work()
        except Exception as error:
            said = error
        except BaseException as error:  # a library that wants to end the program, or panics: this policy alone
            said = BackendLost(f"the policy's thread met {type(error).__name__}: {error}"[:300])
        with contextlib.suppress(RuntimeError):  # a loop that has closed meanwhile
            loop.call_soon_threadsafe(tell, said, time.perf_counter() - began)

    return job


def _alike(batch: Sequence[Request]) -> tuple[Any, ...] | None:
    """All but the state of a lone look whose pictures lie where the model sees them."""
    one = batch[0]
    if len(batch) > 1 or one.spot is None or one.words is not None or one.state is None:
        return None
    return one.spot, one.robot, one.adapter, one.instruction, one.seed


def _words_of(batch: Sequence[Request]) -> dict[str, Any]:
    """The question of a batch that is one: (question, candidates, said, most)."""
    words = batch[0].words
    return {} if words is None else {"words": (words.question, words.candidates, words.said, words.most)}


def info_of(said: Mapping[str, Any]) -> Info:
    """What a policy's process says of itself, as the engine knows it."""
    robots = {key: Robot.from_json(entry, f"embodiment {key!r}") for key, entry in said["robots"].items()}
    return Info(
        policy=said["policy"], name=said["name"], robots=robots, embodiments=said["robots"],
        steps={key: (int(n), int(k)) for key, (n, k) in said["steps"].items()}, adapters=tuple(said["adapters"]),
        instructions=tuple(said["instructions"]), symbols=said["symbols"], warm=said["warm"],
    )  # fmt: skip


def result_of(said: Mapping[str, Any]) -> Any:
    """(actions, confidence, symbols), or what was said in words, or the error that was said."""
    if "error" in said:
        return error_of(said["error"])
    if "spoken" in said:
        return said["spoken"]
    actions, confidence, symbols = (np.frombuffer(data, kind).reshape(shape) for data, kind, shape in said["chunk"])
    return actions, confidence, symbols


def error_of(said: Mapping[str, str]) -> VLAError:
    """A `VLAError` that crossed from the other process."""
    return _KINDS.get(said["kind"], MachineError)(said["where"], found=said["found"], expected=said["expected"], fix=said["fix"])


def _anonymous_file() -> int:
    """A file in memory that two processes can map; /dev/shm is 64 MB in many containers, this is not there."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tendon-pictures")
    handle, path = tempfile.mkstemp()
    os.unlink(path)
    return handle
