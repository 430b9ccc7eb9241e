"""What comes in, mutated and cut anywhere: the frames of a WebSocket, the messages in them, the bodies of requests.

`serve/sockets.py` has its own splitter of frames; what it makes of a stream is compared with what the `websockets` package makes
of it. No mutation of a valid message is answered with a 5xx, ends a process, or makes it grow.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import uvicorn
from uvicorn.server import ServerState
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.utils import apply_mask

from serve import sockets
from serve.sockets import FastWebSocket

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

    def write(self, data: Any) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.over

    def close(self) -> None:
        self.over = True

    abort = close


async def as_served(data: bytes, cuts: list[int], slowly: bool) -> tuple[Heard, FastWebSocket]:
    """By `FastWebSocket`, with the bytes arriving in pieces that end at `cuts`, read by an app that takes its time, or not."""
    heard = Heard()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            heard.messages.append(message["text"] if message.get("bytes") is None else message["bytes"])
            if slowly:
                await asyncio.sleep(0)

    config = uvicorn.Config(app, ws_max_size=MOST, ws_per_message_deflate=False, lifespan="off", log_config=None)
    config.load()
    protocol, transport = FastWebSocket(config, ServerState(), {}), Transport()
    protocol.connection_made(transport)
    protocol.data_received(HANDSHAKE)
    for _ in range(5):
        await asyncio.sleep(0)
    assert transport.written.startswith(b"HTTP/1.1 101 ")
    del transport.written[:]
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
    for _ in range(30):
        await asyncio.sleep(0)
    heard.written, heard.closed = bytes(transport.written), transport.over
    protocol.connection_lost(None)
    for _ in range(5):
        await asyncio.sleep(0)
    protocol.stop_keepalive()
    return heard, protocol


def test_frames_cut_anywhere_are_what_the_websockets_package_makes_of_them(caplog: pytest.LogCaptureFixture):
    """The package waits for the whole of a frame that breaks the rules; here it is enough to see how it begins."""
    room = sockets.ROOM.left
    counts = {"messages": 0, "closed": 0, "early": 0}

    async def work() -> None:
        for seed in range(1500):
            rng = np.random.default_rng(seed)
            data = stream(rng)
            pieces = int(rng.choice([0, 1, 3, 10, min(200, len(data))]))
            cuts = sorted(int(c) for c in rng.integers(0, len(data) + 1, pieces))
            if rng.random() < 0.2:
                cuts = list(range(1, min(len(data), 300)))  # byte by byte
            expected = as_the_package(data)
            heard, _ = await as_served(data, cuts, bool(rng.integers(2)))
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

    asyncio.run(work())
    assert counts["messages"] > 3000 and counts["closed"] > 700 and counts["early"] < 60, counts
    assert sockets.ROOM.left == room  # all of it was given back
    assert not caplog.records, caplog.text
