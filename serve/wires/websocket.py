"""Our own WebSocket, `/v1/ws`: msgpack (`serve/wire.py`), one look and one chunk at a time; `serve/client.py` is its other end.

    client: {"type": "hello"}        as often as it likes: first, and when a chunk comes from another `policy` than the last
    server: {"type": "hello", "protocol": 1, "policy", "robots", "steps", "shares", "local", ...}
    client: {"type": "look", "seq": 7, "images": {camera: picture}, "state": (S,), "instruction", "robot"?, "adapter"?, "age"?,
             "executed"?, "deadline"?, "seed"?}
    server: {"type": "chunk", "seq": 7, "actions": (n, A), "confidence": (n, A), "symbols", "execute", "hold", "reason",
             "needs_help", "policy", "timing", "batch"}
         or {"type": "refusal", "seq": 7, "error": {"code", "where", "found", "expected", "fix", "retry_after"?}}
    client: {"type": "share", "size": bytes} where it `shares`: pictures through memory (`serve/shared.py`), on one computer
    server: {"type": "shared", "seq", "pid", "file", "number", "size", "key"}; from then on pictures may be {"__shared__", ...}
    client: {"type": "reset"} when an episode begins, {"type": "resume"} when help was given; both answer {"type": "ok", "seq"}

On the computer where the server runs `local` names its local socket (Linux, "\\0" before it): the same there, sooner.

A client says which protocol it speaks in the address (`/v1/ws?protocol=1`); another one is refused before the socket opens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from serve.alike import Alike
from serve.gate import refuse
from serve.messages import Say, answer_with, messages, send
from serve.refusal import Refusal
from serve.service import SHORTEST, Look, Reply, Service, Session
from serve.shared import AVAILABLE
from serve.wire import PROTOCOL, pack, unpack
from vla.errors import VLAError

_NEAR = ("127.0.0.1", "::1")
_LOOK: dict[str, tuple[tuple[type, ...], float | None] | None] = {
    "type": None, "images": None, "state": None, "instruction": None,
    "robot": ((str,), None), "adapter": ((str,), None), "seq": ((int,), -(2**53)), "executed": ((int,), 0), "seed": ((int,), 0),
    "age": ((int, float), -(2**53)), "deadline": ((int, float), SHORTEST),
}  # fmt: skip
"""Fields of a look: None for what is judged elsewhere, or which kinds of value they take, and the least one."""


def routes(service: Service) -> list[BaseRoute]:
    """Of this wire."""

    async def connected(socket: WebSocket) -> None:
        if (spoken := socket.query_params.get("protocol", str(PROTOCOL))) != str(PROTOCOL):
            await refuse(socket.scope, socket.receive, socket.send, Refusal(
                "bad_request", where="protocol", found=spoken[:20], expected=str(PROTOCOL),
                fix="pip install the same tendon-vla on both sides"))  # fmt: skip
            return
        await socket.accept()
        near = socket.client is None or socket.client.host in _NEAR  # nobody's address: a local socket
        talk = Conversation(service, near)
        answer_with(socket, talk.look)
        try:
            with service.metrics.sessions.labels("websocket").track_inprogress():
                async for data in messages(socket):
                    await send(socket, await talk.answer(data))
        finally:
            talk.close()

    async def greeted(socket: WebSocket) -> None:
        try:
            await connected(socket)
        except WebSocketDisconnect:
            pass

    return [WebSocketRoute("/v1/ws", greeted)]


class Conversation:
    """With one client."""

    def __init__(self, service: Service, near: bool) -> None:
        """`near`: it is on this computer."""
        self._service, self.session, self._near = service, Session(service, "websocket"), near
        self._limits = service.limits
        self._read = Alike(partial(unpack, limits=service.limits))
        self._leave: Callable[[], None] | None = None

    def close(self) -> None:
        """It has left."""
        if self._leave is not None:
            self._leave()
            self._leave = None  # it knows who asked, who knows it: pictures would stay until that circle is collected
        self.session.close()

    def look(self, data: bytes | memoryview, say: Say) -> bool:
        """Answer a look when the model has; every other message is left to `answer`."""
        try:
            message = self._read(data)
        except VLAError as error:
            say(_refused(None, error))
            return True
        if not (isinstance(message, dict) and isinstance(kind := message.get("type"), str) and kind == "look"):
            return False
        seq = _seq_of(message)

        def tell(reply: Reply | Refusal) -> None:
            self._leave = None
            try:
                answer = _refused(seq, reply) if isinstance(reply, Refusal) else _chunk(seq, reply)
            except Exception as error:  # numbers that do not travel; whatever it was, who asked hears of it
                answer = _refused(seq, error)
            say(answer)

        try:
            self._leave = self.session.begin(self._look_of(message), tell)
        except VLAError as error:
            say(_refused(seq, error))
        return True

    async def answer(self, data: bytes | memoryview) -> bytes:
        """To any message."""
        seq, session = None, self.session
        try:
            message = unpack(data, self._limits)
            if not isinstance(message, dict):
                raise _wrong("message", type(message).__name__, "a mapping with a 'type'")
            seq, kind = _seq_of(message), message.get("type")
            match kind if isinstance(kind, str) else type(kind).__name__:
                case "hello":
                    near = {"shares": self._near and AVAILABLE, "local": self._service.local if self._near else ""}
                    return pack({"type": "hello", "protocol": PROTOCOL, **self._service.describe(), **near})
                case "look":
                    return _chunk(seq, await session.act(self._look_of(message)))
                case "share":
                    if not self._near or type(size := message.get("size")) is not int:
                        raise _wrong("share", "no whole number" if self._near else "another computer", "bytes, of this one")
                    return pack({"type": "shared", "seq": seq, **session.share(size).offer()})
                case "reset":
                    session.reset()
                    return pack({"type": "ok", "seq": seq})
                case "resume":
                    session.resume()
                    return pack({"type": "ok", "seq": seq})
                case other:
                    raise _wrong("type", repr(other)[:40], "hello, look, reset or resume")
        except VLAError as error:
            return _refused(seq, error)

    def _look_of(self, message: Mapping[str, Any]) -> Look:
        look = look_of(message)
        look.images = self.session.pictures(look.images)
        return look


def _seq_of(message: Mapping[str, Any]) -> int | None:
    given = message.get("seq")
    return given if type(given) is int else None


def _chunk(seq: int | None, reply: Reply) -> bytes:
    return pack({
        "type": "chunk", "seq": seq, "actions": reply.actions, "confidence": reply.confidence, "symbols": reply.symbols,
        "execute": reply.execute, "hold": reply.hold, "reason": reply.reason, "needs_help": reply.needs_help,
        "policy": reply.policy, "timing": reply.timing, "batch": reply.batch,
    })  # fmt: skip


def _refused(seq: int | None, error: Exception) -> bytes:
    return pack({"type": "refusal", "seq": seq, **Refusal.of(error).to_json()})


def look_of(message: Mapping[str, Any]) -> Look:
    """Raises `Refusal` naming every field that is unknown or of the wrong kind."""
    problems: list[str] = []
    images = message.get("images")
    if not isinstance(images, dict) or not all(isinstance(name, str) for name in images):
        problems.append("images is no mapping of names")
        images = {}
    for name, value in message.items():
        if name not in _LOOK:
            problems.append(f"unknown field {name!r}"[:60])
        elif value is not None and (rule := _LOOK[name]) is not None:
            kinds, least = rule
            if type(value) not in kinds or (least is not None and not least <= value <= 2**53):
                problems.append(f"{name} is {str(value)[:20] if type(value) in (int, float) else type(value).__name__}")
    if problems:
        raise _wrong("look", "; ".join(problems[:8]), f"fields {', '.join(sorted(_LOOK))}")
    return Look(
        images=images, state=message.get("state"), instruction=message.get("instruction"), robot=message.get("robot"),
        adapter=message.get("adapter"), seq=message.get("seq"), age=float(message.get("age") or 0.0),
        executed=message.get("executed"), deadline=message.get("deadline"), seed=message.get("seed") or 0,
    )  # fmt: skip


def _wrong(where: str, found: str, expected: str) -> Refusal:
    return Refusal("bad_request", where=where, found=found, expected=expected, fix="see docs/serving.md")
