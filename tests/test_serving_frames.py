"""What comes in, mutated and cut anywhere: the frames of a WebSocket, the messages in them, the bodies of requests.

`serve/sockets.py` has its own splitter of frames; what it makes of a stream is compared with what the `websockets` package makes
of it. No mutation of a valid message is answered with a 5xx, ends a process, or makes it grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import socket
import struct
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any

import numpy as np
import pytest
import uvicorn
from children import LIMIT
from mutations import SIZE, WIRES, mutated_body, mutated_bytes, mutated_message, valid, valid_body
from serving import Server, started
from starlette.websockets import WebSocket
from uvicorn.server import ServerState
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.sync.client import connect
from websockets.utils import apply_mask

from serve import messages, patience, sockets
from serve.backend import ThreadBackend
from serve.engine import Engine, EngineOptions
from serve.gate import Tokens
from serve.refusal import Refusal
from serve.server import build_app
from serve.service import Service, Session
from serve.settings import ServeSettings
from serve.sockets import FastWebSocket
from serve.wire import pack, unpack
from serve.wires import openpi, vla_eval, websocket
from vla.errors import VLAError

MOST = 300_000
"""Bytes of a message, for the streams below."""
HANDSHAKE = (
    b"GET /v1/ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)

# ---------------------------------------------------------------------------------------------------- frames


def frame(
    opcode: int, data: bytes = b"", fin: bool = True, mask: bytes | None = b"\1\2\3\4", reserved: int = 0,
    length: int | None = None, wide: int = 0,
) -> bytes:  # fmt: skip
    """As a client writes one, or as none should: without a mask, with reserved bits, with another length, said in more bytes."""
    size = len(data) if length is None else length
    form = wide or (0 if size < 126 else 2 if size < 1 << 16 else 8)
    said = {0: bytes([size & 0x7F]), 2: b"\x7e" + struct.pack("!H", size & 0xFFFF), 8: b"\x7f" + struct.pack("!Q", size)}[form]
    head = bytes([fin << 7 | reserved << 4 | opcode, said[0] | (0x80 if mask is not None else 0)]) + said[1:]
    return head + (b"" if mask is None else mask) + (data if mask is None else apply_mask(data, mask))


def some_bytes(rng: np.random.Generator) -> bytes:
    size = int(rng.choice([0, 1, 5, 124, 125, 126, 127, 128, 1000, 65535, 65536, 70_000, 140_000],
                          p=[0.1, 0.1, 0.2, 0.05, 0.05, 0.05, 0.05, 0.05, 0.2, 0.04, 0.04, 0.04, 0.03]))  # fmt: skip
    return rng.bytes(size)


def a_mask(rng: np.random.Generator) -> bytes:
    return bytes(4) if rng.random() < 0.3 else rng.bytes(4)


def a_message(rng: np.random.Generator) -> Iterator[bytes]:
    """The frames of one message, whole or in parts, with control frames between the parts."""
    if text := rng.random() < 0.2:
        data = "".join(chr(int(c)) for c in rng.integers(32, 0x2FF, int(rng.integers(0, 300)))).encode()
        data = data + b"\xff" if rng.random() < 0.05 else data
    else:
        data = some_bytes(rng)
    opcode, parts = (1 if text else 2), 1 if rng.random() < 0.6 else int(rng.integers(2, 6))
    cuts = [0, *sorted(int(c) for c in rng.integers(0, len(data) + 1, parts - 1)), len(data)]
    for i in range(parts):
        yield frame(opcode if i == 0 else 0, data[cuts[i] : cuts[i + 1]], i == parts - 1, a_mask(rng))
        while parts > 1 and rng.random() < 0.3:
            yield control(rng)


def control(rng: np.random.Generator) -> bytes:
    return frame(int(rng.choice([9, 10])), rng.bytes(int(rng.choice([0, 4, 125]))), mask=a_mask(rng))


def goodbye(rng: np.random.Generator) -> bytes:
    code = struct.Struct("!H").pack
    data = [b"", code(1000), code(1001) + b"bye", code(4999), b"\3", code(1005), code(999), code(1000) + b"\xff\xfe"]
    return frame(8, data[int(rng.integers(len(data)))], mask=a_mask(rng))


def violation(rng: np.random.Generator) -> bytes:
    data, mask = rng.bytes(int(rng.integers(0, 300))), a_mask(rng)
    return [
        lambda: frame(2, data, mask=None),  # not masked
        lambda: frame(int(rng.choice([1, 9])), data[:100], mask=None),
        lambda: frame(2, data, mask=mask, reserved=int(rng.integers(1, 8))),
        lambda: frame(9, data[:9], mask=mask, reserved=1),
        lambda: frame(int(rng.choice([3, 4, 7, 11, 15])), data, mask=mask),  # nobody knows these
        lambda: frame(9, rng.bytes(126), mask=mask),  # a long ping
        lambda: frame(int(rng.choice([8, 9, 10])), b"ab", False, mask),  # a ping in parts
        lambda: frame(0, data, bool(rng.integers(2)), mask),  # a part of nothing, mostly
        lambda: frame(1, b"a", False, mask) + frame(int(rng.choice([1, 2])), data, True, mask),  # one in the middle of another
        lambda: frame(2, data, mask=mask, length=MOST + 1),
        lambda: frame(int(rng.choice([1, 2])), data, mask=mask, length=(1 << 63) + 5),
        lambda: frame(2, b"a" * 200_000, False, mask) + frame(0, b"b" * 100_001, True, mask),  # more than allowed, in parts
        lambda: frame(2, b"a" * 299_990, False, mask) + frame(9, b"c" * 20, True, mask),
        lambda: frame(2, data[:100], mask=mask, wide=8),  # no violation for the package: a length in more bytes than it needs
    ][int(rng.integers(14))]()


def stream(rng: np.random.Generator) -> bytes:
    """What a client sends after the handshake: messages, and perhaps a good or a bad end, and more behind it."""
    parts: list[bytes] = []
    for _ in range(int(rng.integers(1, 8))):
        parts += a_message(rng)
        if rng.random() < 0.3:
            parts.append(control(rng))
    ends = rng.random()
    if ends < 0.3:
        parts.append(goodbye(rng))
    elif ends < 0.8:
        parts.insert(int(rng.integers(len(parts) + 1)), violation(rng))
    if rng.random() < 0.3:
        parts += a_message(rng)
    if rng.random() < 0.1:
        rng.shuffle(parts)  # pyright: ignore[reportArgumentType]
    whole = b"".join(parts)
    return whole[: int(rng.integers(len(whole) + 1))] if rng.random() < 0.2 else whole


@dataclass
class Heard:
    """What came of a stream."""

    messages: list[bytes | str] = field(default_factory=list)
    written: bytes = b""
    """Pongs and at most one close."""
    closed: bool = False
    lent: int = 0
    """Messages that were read where they were received."""
    quick: int = 0
    """Messages that were taken without the app, and how many of these were answered; whether one is being answered."""
    answers: int = 0
    asking: bool = False


def as_the_package(data: bytes) -> Heard:
    """By the `websockets` package alone, frame by frame as they come out of it."""
    heard, parts, text = Heard(), [], False
    protocol = ServerProtocol(max_size=MOST)
    protocol.receive_data(HANDSHAKE)
    (request,) = protocol.events_received()
    assert isinstance(request, Request)
    protocol.send_response(protocol.accept(request))
    protocol.data_to_send()
    at, step = 0, 1 << 20
    while at < len(data) and not heard.closed:
        protocol.receive_data(data[at : at + step])
        at += step
        for event in protocol.events_received():
            assert isinstance(event, Frame)
            if event.opcode in (Opcode.TEXT, Opcode.BINARY):
                parts, text = [], event.opcode is Opcode.TEXT
            if event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                parts.append(bytes(event.data))
                if event.fin:
                    whole = b"".join(parts)
                    heard.messages.append(whole.decode("utf-8", "surrogateescape") if text else whole)
        heard.written += b"".join(protocol.data_to_send())
        heard.closed = protocol.close_expected()
    return heard


def torn(text: str) -> bool:
    """Whether it is no UTF-8."""
    return any("\ud800" <= c <= "\udfff" for c in text)


class Transport(asyncio.Transport):
    """A kernel with patience: what is sent to a protocol that has paused waits here."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.reading, self.over = bytearray(), True, False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    full: Any = None
    """A protocol that is told now and then that the kernel takes no more for the moment."""

    def write(self, data: Any) -> None:
        self.written += data
        if self.full is not None and len(self.written) % 3 == 0 and self.full.writable.is_set():
            self.full.pause_writing()
            asyncio.get_running_loop().call_soon(lambda: self.over or self.full.resume_writing())

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass

    def is_closing(self) -> bool:
        return self.over

    def close(self) -> None:
        self.over = True

    abort = close


ANSWER = b"an answer, 16 B."
SAID = bytes((0x82, len(ANSWER))) + ANSWER


async def as_served(
    data: bytes, cuts: list[int], slowly: bool, lane: np.random.Generator | None = None
) -> tuple[Heard, FastWebSocket]:
    """By `FastWebSocket`, with the bytes arriving in pieces that end at `cuts`, read by an app that takes its time, or not. With
    a `lane` there is somebody who answers binary messages without the app: at once, a few turns later, or not at all."""
    heard = Heard()

    def quick(message: bytes | memoryview, say: Callable[[bytes], None]) -> bool:
        assert lane is not None and not heard.asking, "a message before the one before it was answered"
        turns = int(lane.integers(-2, 6))
        if turns < 0:
            return False
        heard.asking = True
        heard.messages.append(bytes(message))
        heard.quick += 1

        def answer(turns: int) -> None:
            if turns:
                asyncio.get_running_loop().call_soon(answer, turns - 1)
                return
            heard.asking = False
            say(ANSWER)

        answer(turns)
        return True

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        if lane is not None:
            messages.answer_with(WebSocket(scope, receive, send), quick)
        while (message := await receive())["type"] == "websocket.receive":
            if slowly:  # what is lent stays as it is
                await asyncio.sleep(0)
            assert not heard.asking
            heard.lent += isinstance(message.get("bytes"), memoryview)
            heard.messages.append(message["text"] if message.get("bytes") is None else bytes(message["bytes"]))

    config = uvicorn.Config(app, ws_max_size=MOST, ws_per_message_deflate=False, lifespan="off", log_config=None)
    config.load()
    protocol, transport = FastWebSocket(config, ServerState(), {}), Transport()
    protocol.connection_made(transport)
    protocol.data_received(HANDSHAKE)
    for _ in range(5):
        await asyncio.sleep(0)
    assert transport.written.startswith(b"HTTP/1.1 101 ")
    del transport.written[:]
    transport.full = protocol if lane is not None else None
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        piece = data[start:end]
        while piece:
            for _ in range(200):
                if transport.reading:
                    break
                await asyncio.sleep(0)
            if transport.over:
                break
            room = protocol.get_buffer(-1)
            size = min(len(room), len(piece))
            room[:size] = piece[:size]
            piece = piece[size:]
            protocol.buffer_updated(size)
    for _ in range(30 if lane is None else 150):
        await asyncio.sleep(0)
    heard.written, heard.closed = bytes(transport.written).replace(SAID, b""), transport.over
    heard.answers = transport.written.count(SAID)
    protocol.connection_lost(None)
    for _ in range(5):
        await asyncio.sleep(0)
    protocol.stop_keepalive()
    return heard, protocol


@pytest.mark.parametrize("lane", [False, True])
def test_frames_cut_anywhere_are_what_the_websockets_package_makes_of_them(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, lane: bool
):  # fmt: skip
    """The package waits for the whole of a frame that breaks the rules; here it is enough to see how it begins. Whoever answers,
    pings are, and what came in the middle of an answer waits for its end."""
    monkeypatch.setattr(sockets, "_LENT", 1)
    room = patience.ROOM.left
    counts = {"messages": 0, "closed": 0, "early": 0, "lent": 0, "quick": 0}

    async def work() -> None:
        for seed in range(1500):
            rng = np.random.default_rng(seed)
            data = stream(rng)
            pieces = int(rng.choice([0, 1, 3, 10, min(200, len(data))]))
            cuts = sorted(int(c) for c in rng.integers(0, len(data) + 1, pieces))
            if rng.random() < 0.2:
                cuts = list(range(1, min(len(data), 300)))  # byte by byte
            expected = as_the_package(data)
            heard, _ = await as_served(data, cuts, bool(rng.integers(2)), rng if lane else None)
            assert heard.answers == heard.quick or heard.closed, seed
            counts["quick"] += heard.quick
            bad = next((i for i, m in enumerate(expected.messages) if isinstance(m, str) and torn(m)), None)
            if bad is not None:  # the package leaves it to its user to find that text is none
                assert heard.closed and heard.messages == expected.messages[:bad], seed
                assert struct.pack("!H", CloseCode.INVALID_DATA) in heard.written, seed
                continue
            assert heard.messages == expected.messages, seed
            if heard.closed and not expected.closed:
                assert heard.written.startswith(expected.written) and b"\x03\xea" in heard.written[len(expected.written) :], seed
                counts["early"] += 1
            else:
                assert (heard.written, heard.closed) == (expected.written, expected.closed), seed
            counts["messages"] += len(heard.messages)
            counts["closed"] += heard.closed
            counts["lent"] += heard.lent

    asyncio.run(work())
    assert counts["messages"] > 3000 and counts["closed"] > 700 and counts["early"] < 60, counts
    assert counts["quick"] > 500 if lane else counts["lent"] > 20, list(counts.items())
    assert patience.ROOM.left == room  # all of it was given back
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], caplog.text


def test_a_message_that_is_read_where_it_came_stays_as_it_is():
    """Whatever comes meanwhile; and what was lent counts as long as it is."""
    room = patience.ROOM.left
    first, second = b"a" * 200_000, b"b" * 200_000

    async def work() -> None:
        said, on = list[Any](), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            while (message := await receive())["type"] == "websocket.receive":
                await on.wait()
                said.append((isinstance(message["bytes"], memoryview), bytes(message["bytes"])))

        config = uvicorn.Config(app, ws_max_size=MOST, ws_per_message_deflate=False, lifespan="off", log_config=None)
        config.load()
        protocol, transport = FastWebSocket(config, ServerState(), {}), Transport()

        async def heard(data: bytes) -> None:
            while data:
                room = protocol.get_buffer(-1)
                size = min(len(room), len(data))
                room[:size], data = data[:size], data[size:]
                protocol.buffer_updated(size)
            for _ in range(5):
                await asyncio.sleep(0)

        protocol.connection_made(transport)
        protocol.data_received(HANDSHAKE)
        await heard(b"")
        await heard(frame(2, first, mask=bytes(4)))
        assert transport.reading and not said
        held = room - patience.ROOM.left
        await heard(frame(2, second, mask=bytes(4)))  # the app has the first, and this waits: it is a copy
        assert transport.reading and not said and room - patience.ROOM.left > held
        await heard(frame(9, b"ping", mask=bytes(4)))
        assert not transport.reading and b"ping" not in transport.written  # nothing is looked at before the second was taken
        on.set()
        await heard(b"")
        assert said == [(True, first), (False, second)] and transport.reading and transport.written.endswith(b"ping")
        await heard(frame(2, first, mask=bytes(4)) + frame(2, b"c", mask=bytes(4)))  # something behind it: a copy as well
        assert said[2:] == [(False, first), (False, b"c")]
        on.clear()
        await heard(frame(2, second, mask=bytes(4)))
        protocol.connection_lost(None)
        await heard(b"")
        protocol.stop_keepalive()

    asyncio.run(work())
    assert patience.ROOM.left == room


# ---------------------------------------------------------------------------------------------------- messages, in this process

KINDS = ("text/plain", "application/x-www-form-urlencoded", "", "application/json; charset=utf-8")
BROKEN = {"internal", "unavailable", "late"}
"""Codes that would be the server's fault."""


async def asked(app: Any, path: str, body: bytes, method: str = "POST", kind: str = "application/json") -> tuple[int, bytes]:
    """(status, body) of a request, without a socket. An exception of the app is raised here."""
    headers = [(b"host", b"localhost"), (b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
             "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers, "client": ("127.0.0.1", 1),
             "server": ("127.0.0.1", 80), "state": {}}  # fmt: skip
    given, said = [{"type": "http.request", "body": body, "more_body": False}], list[Any]()

    async def receive() -> Any:
        return given.pop() if given else await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        said.append(message)

    await app(scope, receive, send)
    return said[0]["status"], b"".join(m.get("body", b"") for m in said[1:])


@contextlib.asynccontextmanager
async def served(policy: str = "null:tabletop", **settings: Any) -> AsyncIterator[Service]:
    """A server without a socket; the model in a thread."""
    service = Service(
        Engine(lambda: ThreadBackend.start({"policy": policy}), EngineOptions(gather=0.0)), ServeSettings(**settings)
    )
    await service.engine.start()
    try:
        yield service
    finally:
        await service.engine.stop()


def test_what_breaks_while_a_look_is_answered_is_said_to_who_asked(monkeypatch: pytest.MonkeyPatch):
    """Whichever way they came, and nobody waits for ever."""

    def upset(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a mistake of the guard's own")

    async def work() -> None:
        async with served() as service:
            talk, said = websocket.Conversation(service, near=False), list[bytes]()
            looks = [valid("/v1/ws", n)[0] for n in range(4)]
            with monkeypatch.context() as broken:
                broken.setattr("serve.guard.Guard.chunk", upset)
                assert talk.look(pack(looks[0]), said.append)
                with pytest.raises(Refusal) as refused:
                    await Session(service, "http").act(websocket.look_of(looks[0]))
            with monkeypatch.context() as broken:
                broken.setattr(websocket, "_chunk", lambda seq, reply: pack({"seq": seq, "actions": np.zeros(1, complex)}))
                assert talk.look(pack(looks[1]), said.append)
                while len(said) < 2:
                    await asyncio.sleep(0.01)
            assert talk.look(pack(looks[2]), said.append)
            while len(said) < 3:
                await asyncio.sleep(0.01)
            first, second, third = map(unpack, said)
            assert first["error"]["code"] == refused.value.code == "internal" and "ZeroDivisionError" in first["error"]["found"]
            assert second["type"] == "refusal" and "complex" in str(second["error"]) and third["type"] == "chunk"
            with monkeypatch.context() as broken:
                broken.setattr(websocket, "_chunk", upset)
                assert talk.look(pack(looks[3]), said.append)
                while len(said) < 4:
                    await asyncio.sleep(0.01)
            assert unpack(said[3])["error"]["code"] == "internal"

    asyncio.run(work())


def test_who_leaves_in_the_middle_of_a_look_leaves_no_pictures_behind():
    """Nor does the collector of what goes in circles have to come for them: on a quiet server it hardly ever does."""

    async def work() -> None:
        async with served("null:tabletop?ms=100") as service:
            gone = list[weakref.ref[Any]]()
            for answered in (False, True):
                talk, said = websocket.Conversation(service, near=True), list[bytes]()
                region = talk.session.share(20_000)
                place = {"__shared__": True, "at": 64, "shape": [SIZE, SIZE, 3]}
                taken = talk.look(pack(valid("/v1/ws")[0] | {"images": {"front": place}}), said.append)
                assert taken  # apart: what pytest makes of an assertion keeps what stands in it
                while answered and not said:
                    await asyncio.sleep(0.01)
                gone += [weakref.ref(talk), weakref.ref(region)]
                talk.close()
                del talk, region
                while service.engine.waiting or service.engine._running:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            assert [ref() for ref in gone] == [None] * 4

    gc.collect()
    gc.disable()
    try:
        asyncio.run(work())
    finally:
        gc.enable()


def test_a_lane_that_breaks_ends_its_connection():
    """At once, or in the middle of answering the message before it."""

    async def work(first: bool) -> None:
        def quick(message: bytes | memoryview, say: Callable[[bytes], None]) -> bool:
            if first or asked:
                raise ZeroDivisionError("of the app's")
            asked.append(say)
            return True

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            messages.answer_with(WebSocket(scope, receive, send), quick)
            left.append(await receive())

        asked, left = list[Callable[[bytes], None]](), list[Any]()
        config = uvicorn.Config(app, ws_per_message_deflate=False, lifespan="off", log_config=None)
        config.load()
        protocol, transport = FastWebSocket(config, ServerState(), {}), Transport()
        protocol.connection_made(transport)
        protocol.data_received(HANDSHAKE)
        await asyncio.sleep(0.01)
        protocol.data_received(frame(2, b"one") + frame(2, b"two"))
        if not first:
            assert not transport.over
            asked[0](ANSWER)
        await asyncio.sleep(0.01)
        assert transport.over and struct.pack("!H", CloseCode.INTERNAL_ERROR) in transport.written
        assert left[0]["type"] == "websocket.disconnect" and transport.written.count(SAID) == (not first)
        protocol.connection_lost(None)
        protocol.stop_keepalive()

    asyncio.run(work(True))
    asyncio.run(work(False))


def test_mutated_messages_are_refused_or_answered():
    """What a wire makes of a message, up to the model and back."""
    codes = Counter[str]()

    async def work() -> None:
        async with served() as service:
            talk = websocket.Conversation(service, near=False)
            sessions = {wire: talk.session if wire == "/v1/ws" else Session(service, wire) for wire in WIRES}
            playing = vla_eval.Playing(service)
            for n in range(6600):
                wire = WIRES[n % 3]
                data = mutated_message(7, n, wire)
                if wire == "/v1/ws":
                    quick = list[bytes]()
                    if not talk.look(data, quick.append):
                        quick.append(await talk.answer(data))
                    while not quick:
                        await asyncio.sleep(0)
                    said = unpack(quick[0])
                    code = said["error"]["code"] if said["type"] == "refusal" else said["type"]
                elif wire == "/vla-eval":
                    answer = await playing.heard(data)
                    said: Any = {"type": "nothing"} if answer is None else unpack(answer)
                    code = said["payload"].get("code", "error") if said["type"] == "error" else said["type"]
                else:
                    try:
                        await sessions[wire].act(openpi.look_of(unpack(data)))
                        code = "actions"
                    except VLAError as error:
                        code = Refusal.of(error).code
                assert code not in BROKEN, (n, wire, code)
                codes[code] += 1
                if n % 50 == 49:  # a robot that repeats itself is refused for that, and nothing else is tried
                    for session in (*sessions.values(), playing.session):
                        session.reset()
                        session.resume()

    asyncio.run(work())
    answered = codes["chunk"] + codes["action"] + codes["actions"]
    assert answered > 300 and codes["bad_request"] > 3000, codes


def test_mutated_bodies_are_refused_or_answered():
    statuses = Counter[int]()

    async def work() -> None:
        async with served() as service:
            app = build_app(service, Tokens())
            for n in range(2400):
                path = ["/v1/act", "/act"][n % 2]
                kind = "application/json" if n % 40 else KINDS[n // 40 % len(KINDS)]
                status, body = await asked(app, path, mutated_body(8, n, path), kind=kind)
                assert status in (200, 409, 413, 415, 422), (n, path, status, body[:300])
                json.loads(body, parse_constant=lambda text: pytest.fail(f"{text} in JSON"))
                statuses[status] += 1

    asyncio.run(work())
    assert statuses[200] > 40 and statuses[415] and statuses[422] > 1200, statuses


# ---------------------------------------------------------------------------------------------------- messages, over sockets

GROWTH = 48 << 20
"""Bytes that a process may be larger after thousands of mutations than after hundreds: what an allocator keeps, no more."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One for all of them: none of them may end it."""
    with started("null:tabletop", "--deadline", "20") as server:
        yield server
        assert not server.complaints(), server.log[-4000:]


def spoken(server: Server, wire: str, numbers: Iterable[int]) -> Counter[str]:
    """Mutated messages in good frames; every one of them is answered, or the socket closed with a reason."""
    said, url = Counter[str](), server.address.replace("http", "ws") + wire
    waiting = list(numbers)[::-1]
    while waiting:
        with connect(url, max_size=None, open_timeout=LIMIT) as line:
            if wire == "/openpi":
                assert unpack(bytes(line.recv(LIMIT, decode=False)))["server"] == "tendon"
            while waiting:
                n = waiting.pop()
                try:
                    line.send(mutated_message(9, n, wire))
                    if wire == "/vla-eval":  # which answers some kinds with silence
                        line.send(pack({"type": "hello", "payload": {}, "seq": -n - 1, "timestamp": 0.0}))
                    while True:
                        answer = line.recv(LIMIT)
                        if isinstance(answer, str):
                            said["words"] += 1
                            continue
                        message = unpack(bytes(answer))
                        refused = message.get("error") or (message.get("payload", {}) if message.get("type") == "error" else {})
                        assert refused.get("code") not in BROKEN, (n, message)
                        said[refused.get("code") or message.get("type", "actions")] += 1
                        if wire != "/vla-eval" or message["seq"] == -n - 1:
                            break
                except ConnectionClosed as closed:
                    assert wire == "/openpi" and closed.rcvd and closed.rcvd.code == 1011 and said["words"], (n, closed)
                    break
    return said


def posted(server: Server, numbers: Iterable[int]) -> Counter[int]:
    """Mutated bodies in good requests."""
    statuses = Counter[int]()
    connection = HTTPConnection("127.0.0.1", server.port, timeout=LIMIT)
    for n in numbers:
        path = ["/v1/act", "/act"][n % 2]
        connection.request("POST", path, mutated_body(9, n, path), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status in (200, 409, 413, 415, 422), (n, path, answer.status, answer.read()[:300])
        json.loads(answer.read())
        statuses[answer.status] += 1
    connection.close()
    return statuses


def torn_off(server: Server, data: bytes, handshake: bytes = b"") -> bytes:
    """What comes back for these bytes and then the end; where there is a handshake, from its answer on."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT) as line:
        said = bytearray()
        try:
            if handshake:
                line.sendall(handshake)
                said += line.recv(1 << 16)
            line.sendall(data)
            line.shutdown(socket.SHUT_WR)
            while part := line.recv(1 << 16):
                said += part
        except (ConnectionResetError, BrokenPipeError):
            pass
        return bytes(said)


def test_frames_of_all_kinds_over_a_socket(server: Server):
    """Parts with pings between them, many messages in one packet, half a frame and its rest, text, goodbye."""
    hello, seen = pack({"type": "hello"}), pack(valid("/v1/ws", 4)[0])
    cuts = [0, 1, 100, 101, 9000, len(seen)]
    parts = [seen[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    sent = [
        b"".join(frame(2 if i == 0 else 0, part, i == len(parts) - 1) + frame(9, b"%d" % i) for i, part in enumerate(parts)),
        frame(2, hello) * 300, frame(1, b'{"type": "hello"}'), frame(10, b"nobody asked") + frame(2, hello)[:9], frame(2,
        hello)[9:],
        frame(2, hello[:3], False) + frame(0, hello[3:], True), frame(8, struct.pack("!H", 1000) + b"bye"),
    ]  # fmt: skip
    with socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT) as line:
        line.sendall(HANDSHAKE)
        said = bytearray(line.recv(1 << 16))  # who sends more before that is not heard
        for data in sent:
            line.sendall(data)
            time.sleep(0.05)
        while part := line.recv(1 << 16):
            said += part
    head, _, rest = bytes(said).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    frames: list[tuple[int, bytes]] = []
    while rest:
        size, at = rest[1], 2
        if size > 125:
            at = 4 if size == 126 else 10
            size = int.from_bytes(rest[2:at], "big")
        frames.append((rest[0] & 0x0F, rest[at : at + size]))
        rest = rest[at + size :]
    assert [data for kind, data in frames if kind == 10] == [b"%d" % i for i in range(len(parts))]
    answers = [unpack(data) for kind, data in frames if kind == 2]
    assert [a["type"] for a in answers] == ["chunk", *["hello"] * 300, "refusal", "hello", "hello"]
    assert frames[-1] == (8, struct.pack("!H", 1000) + b"bye")


def raw_request(n: int) -> bytes:
    path = ["/v1/act", "/act"][n % 2]
    body = json.dumps(valid_body(path, n)).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    chunked = head.partition("Content-Length")[0] + "Transfer-Encoding: chunked\r\n\r\n"
    if n % 3:
        return head.encode() + b"\r\n" + body
    return chunked.encode() + f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"


def test_thousands_of_mutations_over_sockets_leave_the_processes_as_they_were(server: Server):
    model = server.model

    def all_of_them(numbers: range) -> tuple[Counter[str], Counter[int], int]:
        said, torn = Counter[str](), 0
        for wire in WIRES:
            said += spoken(server, wire, numbers)
        statuses = posted(server, [*numbers, *(n + 10_000 for n in numbers)])
        for n in numbers:
            rng = np.random.default_rng((10, n))
            wire = WIRES[n % 3]
            message, packed = valid(wire, n)
            frames = b"".join(frame(2, part, True, a_mask(rng)) for part in (packed(message), packed(message)))
            handshake = HANDSHAKE.replace(b"/v1/ws", wire.encode())
            torn += torn_off(server, mutated_bytes(rng, frames, HANDSHAKE), handshake).startswith(b"HTTP/1.1 101 ")
            line = torn_off(server, mutated_bytes(rng, [raw_request(n), handshake][n % 2], HANDSHAKE)).split(b"\r\n")[0]
            assert not line or line.startswith(b"HTTP/1.1 ") and not line.startswith(b"HTTP/1.1 5"), (n, line)
        return said, statuses, torn

    all_of_them(range(200))
    before = server.memory()
    said, statuses, torn = all_of_them(range(200, 700))
    after = server.memory()
    assert server.model == model and server.get("/readyz")[0] == 200
    assert all(after[name] - before[name] < GROWTH for name in before), (before, after)
    assert said["bad_request"] > 800 and said["chunk"] and said["action"] and said["actions"] and torn == 500, (said, torn)
    assert statuses[200] and statuses[422] > 600, statuses
    assert server.metric("tendon_backend_restarts_total") == 0
    print(before, after, said, statuses)
