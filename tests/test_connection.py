"""A WebSocket that waits for nothing past its deadline: whatever comes in whatever portions is put together, or is refused."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from misbehaving import PATIENT, frame
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from serve.client import Client
from serve.connection import Connection
from serve.refusal import Refusal


def soon() -> float:
    return time.monotonic() + PATIENT


def accepted(plain: socket.socket) -> tuple[Connection, socket.socket, ServerProtocol]:
    """Both ends of a connection that is open."""
    protocol, there = ServerProtocol(), list[socket.socket]()

    def greet() -> None:
        there.append(plain.accept()[0])
        protocol.receive_data(there[0].recv(1 << 16))
        (request,) = protocol.events_received()
        assert isinstance(request, Request)
        protocol.send_response(protocol.accept(request))
        there[0].sendall(b"".join(protocol.data_to_send()))

    thread = threading.Thread(target=greet)
    thread.start()
    link = Connection(f"ws://127.0.0.1:{plain.getsockname()[1]}", {}, soon())
    thread.join(PATIENT)
    return link, there[0], protocol


SIZES = st.sampled_from([0, 1, 125, 126, 4000, 65_526, 65_535, 65_536, 150_000])


@given(
    st.lists(st.tuples(SIZES, st.integers(1, 4), st.booleans()), max_size=6),
    st.lists(st.sampled_from([1, 2, 3, 9, 100, 70_000]), min_size=1, max_size=4),
)
def test_messages_come_whole_in_whatever_portions_they_are_sent(messages, portions):
    """Of one frame or of several, with pings in between; each is answered."""
    with socket.create_server(("127.0.0.1", 0)) as plain:
        link, there, protocol = accepted(plain)
        data, wanted, pings = bytearray(), [], []
        for number, (size, parts, pinged) in enumerate(messages):
            wanted.append((bytes(range(251)) * (size // 251 + 2))[number : number + size])
            cuts = [size * n // parts for n in range(parts + 1)]
            for n in range(parts):
                if pinged:
                    pings.append(f"{number}.{n}".encode())
                    data += frame(pings[-1], 9)
                data += frame(wanted[-1][cuts[n] : cuts[n + 1]], 0 if n else 2, n == parts - 1)

        def send() -> None:
            at = n = 0
            while at < len(data):
                size = portions[n % len(portions)] if n < 200 else 1 << 20
                there.sendall(data[at : at + size])
                at, n = at + size, n + 1

        sender = threading.Thread(target=send)
        sender.start()
        assert [bytes(link.receive(soon())) for _ in wanted] == wanted
        sender.join(PATIENT)
        heard: list[bytes] = []
        while len(heard) < len(pings):
            protocol.receive_data(there.recv(1 << 16))
            heard += [bytes(e.data) for e in protocol.events_received() if isinstance(e, Frame) and e.opcode is Opcode.PONG]
        assert heard == pings
        link.close()
        there.close()


@given(st.binary(max_size=300))
def test_nonsense_is_refused_or_taken_for_what_it_is(data: bytes):
    with socket.create_server(("127.0.0.1", 0)) as plain:
        link, there, _ = accepted(plain)
        there.sendall(data)
        there.shutdown(socket.SHUT_WR)
        with pytest.raises(OSError):
            while True:
                link.receive(soon())
        link.close()
        there.close()


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("size", [0, 100, 126, 65_535, 65_536, 300_000])
def test_what_is_sent_arrives(size: int, mask: bool):
    with socket.create_server(("127.0.0.1", 0)) as plain:
        link, there, protocol = accepted(plain)
        link._mask = mask
        data = (bytes(range(251)) * (size // 251 + 1))[:size]
        sender = threading.Thread(target=link.send, args=([data[:50], memoryview(data)[50:], b""], soon()))
        sender.start()
        got: list[Any] = []
        while not got:
            protocol.receive_data(there.recv(1 << 16))
            got = protocol.events_received()
        sender.join(PATIENT)
        assert got[0].opcode is Opcode.BINARY and bytes(got[0].data) == data
        link.close()
        there.close()


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nno!", "not_found"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "bad_request"),
        (b"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n<html>", "unavailable"),
        (b"HTTP/1.1 301 Moved\r\nLocation: https://elsewhere\r\nContent-Length: 0\r\n\r\n", "bad_request"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", "bad_request"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "unavailable"),
        (b"x" * 100_000, "unavailable"),
        (b"", "unavailable"),
    ],
)
def test_what_is_no_server_of_ours(said: bytes, code: str):
    def serve(plain: socket.socket) -> None:
        while True:
            try:
                line, _ = plain.accept()
            except OSError:
                return
            with line:
                line.recv(1 << 16)
                line.sendall(said)

    with socket.create_server(("127.0.0.1", 0)) as plain:
        threading.Thread(target=serve, args=(plain,), daemon=True).start()
        with pytest.raises(Refusal) as refused:
            Client(f"127.0.0.1:{plain.getsockname()[1]}", wait=PATIENT, reconnect=None)
        assert refused.value.code == code, refused.value
        plain.shutdown(socket.SHUT_RDWR)
