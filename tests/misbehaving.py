"""A policy server written by hand over plain sockets, which does whatever a test says: answers late, half, wrongly or never.

with Peer(lambda line, look: line.say(chunk(look))) as peer:
    Client(peer.address)
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from serve.client import Client
from serve.wire import PROTOCOL, pack, unpack
from vla.embodiment import EmbodimentSpec, load_embodiment

N, E = 8, 4
PATIENT = 60.0
"""Seconds an answer may take where nothing is wrong, on a machine that does other things as well."""
SHORT = 0.3
SOON = 20.0
"""Far more than `SHORT`, far less than for ever."""


def chunk(look: dict[str, Any], first: float = 0.0, **changes: Any) -> dict[str, Any]:
    """An answer to `look` whose step s says (first + s) / 1000 in its first dimension."""
    actions = np.zeros((N, 4), np.float32)
    actions[:, 0] = (first + np.arange(N)) / 1000
    return {"type": "chunk", "seq": look["seq"], "actions": actions, "confidence": np.full((N, 4), 0.5, np.float32),
            "symbols": np.zeros((N, 4), np.int64), "execute": E, "hold": False, "reason": "", "needs_help": "", "policy": "one",
            "timing": {"serve": 1.0}, "batch": 1, **changes}  # fmt: skip


def frame(data: bytes, opcode: int = 2, fin: bool = True) -> bytes:
    """As a server sends it: not masked."""
    head = bytes((0x80 * fin | opcode,))
    if len(data) < 126:
        return head + bytes((len(data),)) + data
    return head + bytes((127,)) + len(data).to_bytes(8, "big") + data


class Line:
    """One connection of a client, as the peer sees it."""

    def __init__(self, plain: socket.socket, number: int) -> None:
        self.plain, self.number = plain, number
        """Of the connection, from 1 on."""
        self.looks = 0

    def say(self, message: Any) -> None:
        self.plain.sendall(frame(pack(message)))


class Peer:
    """See the module. `answer(line, look)` runs in the connection's thread; a connection it closes is closed."""

    def __init__(self, answer: Callable[[Line, dict[str, Any]], None], spec: EmbodimentSpec | None = None) -> None:
        self.answer, self.spec = answer, spec or load_embodiment("tabletop")
        self.policy, self.protocol = "one", PROTOCOL
        self.heard: list[dict[str, Any]] = []
        """Every message, without pictures."""
        self.opened: list[Request] = []
        self.greets = True
        self.greeted: Callable[[Line], None] = lambda line: None
        self._ended = threading.Event()
        self._plain = socket.create_server(("127.0.0.1", 0))
        self._lines: list[socket.socket] = []

    @property
    def address(self) -> str:
        return f"ws://127.0.0.1:{self._plain.getsockname()[1]}"

    def hello(self) -> dict[str, Any]:
        key = self.spec.key
        return {"type": "hello", "protocol": self.protocol, "policy": self.policy, "steps": {key: [N, E]},
                "robots": {key: self.spec.model_dump(mode="json")}}  # fmt: skip

    def looks(self) -> list[dict[str, Any]]:
        return [message for message in self.heard if message["type"] == "look"]

    def sleep(self, seconds: float) -> None:
        """Until then, or until the test is over."""
        self._ended.wait(seconds)

    def __enter__(self) -> Peer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for plain in (self._plain, *self._lines):
            with contextlib.suppress(OSError):
                plain.shutdown(socket.SHUT_RDWR)
            plain.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                plain, _ = self._plain.accept()
            except OSError:
                return
            self._lines.append(plain)
            threading.Thread(target=self._serve, args=(Line(plain, len(self._lines)),), daemon=True).start()

    def _serve(self, line: Line) -> None:
        protocol = ServerProtocol(max_size=None)
        with contextlib.suppress(OSError), line.plain:
            while data := line.plain.recv(1 << 16):
                protocol.receive_data(data)
                for event in protocol.events_received():
                    if isinstance(event, Request):
                        self.opened.append(event)
                        protocol.send_response(protocol.accept(event))
                    elif isinstance(event, Frame) and event.opcode is Opcode.BINARY:
                        self._hear(line, unpack(bytes(event.data)))
                for part in protocol.data_to_send():
                    line.plain.sendall(part)

    def _hear(self, line: Line, message: dict[str, Any]) -> None:
        self.heard.append({name: value for name, value in message.items() if name != "images"})
        match message["type"]:
            case "hello" if self.greets:
                line.say(self.hello())
                self.greeted(line)
            case "look":
                line.looks += 1
                self.answer(line, message)
            case "reset" | "resume":
                line.say({"type": "ok", "seq": message.get("seq")})


def look(n: int = 0, size: int = 32) -> dict[str, Any]:
    """What a tabletop robot sees."""
    frame = np.random.default_rng(n).integers(0, 256, (size, size, 3)).astype(np.uint8)
    return {"images": {"front": frame}, "state": np.array([0.1, 0.2, 0.3, n % 10 / 10], np.float32)}


def client(peer: Peer | str, **options: Any) -> Client:
    """A patient one."""
    options = {"timeout": PATIENT, "wait": PATIENT, "reconnect": (0.01, 0.1), **options}
    return Client(peer.address if isinstance(peer, Peer) else peer, **options)


def answers(line: Line, message: dict[str, Any]) -> None:
    """As a good server does."""
    line.say(chunk(message))
