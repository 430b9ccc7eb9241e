"""Our own WebSocket, `/v1/ws`: msgpack (`serve/wire.py`), one look and one chunk at a time; `serve/client.py` is its other end.

    client: {"type": "hello"}        as often as it likes: first, and when a chunk comes from another `policy` than the last
    server: {"type": "hello", "protocol": 1, "policy", "robots", "steps", "shares", ...}
    client: {"type": "look", "seq": 7, "images": {camera: picture}, "state": (S,), "instruction", "robot"?, "adapter"?, "age"?,
             "executed"?, "deadline"?, "seed"?}
    server: {"type": "chunk", "seq": 7, "actions": (n, A), "confidence": (n, A), "symbols", "execute", "hold", "reason",
             "needs_help", "policy", "timing", "batch"}
         or {"type": "refusal", "seq": 7, "error": {"code", "where", "found", "expected", "fix", "retry_after"?}}
    client: {"type": "share", "size": bytes} where it `shares`: pictures through memory (`serve/shared.py`), on one computer
    server: {"type": "shared", "seq", "pid", "file", "number", "size", "key"}; from then on pictures may be {"__shared__", ...}
    client: {"type": "reset"} when an episode begins, {"type": "resume"} when help was given; both answer {"type": "ok", "seq"}

A client says which protocol it speaks in the address (`/v1/ws?protocol=1`); another one is refused before the socket opens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from serve.gate import refuse
from serve.refusal import Refusal
from serve.service import SHORTEST, Look, Reply, Service, Session
from serve.shared import AVAILABLE, MARK, Region
from serve.sockets import messages, send
from serve.wire import PROTOCOL, Limits, WireError, pack, unpack
from vla.errors import VLAError

_NEAR = ("127.0.0.1", "::1")
_LOOK = {"type", "seq", "images", "state", "instruction", "robot", "adapter", "age", "executed", "deadline", "seed"}


def routes(service: Service) -> list[BaseRoute]:
    """Of this wire."""

    async def connected(socket: WebSocket) -> None:
        if (spoken := socket.query_params.get("protocol", str(PROTOCOL))) != str(PROTOCOL):
            await refuse(socket.scope, socket.receive, socket.send, Refusal(
                "bad_request", where="protocol", found=spoken[:20], expected=str(PROTOCOL),
                fix="pip install the same tendon-vla on both sides"))  # fmt: skip
            return
        await socket.accept()
        session = Session(service, "websocket")
        near = socket.client is not None and socket.client.host in _NEAR
        try:
            with service.metrics.sessions.labels("websocket").track_inprogress():
                async for data in messages(socket):
                    await send(socket, await _answer(service, session, data, near))
        finally:
            session.close()

    async def greeted(socket: WebSocket) -> None:
        try:
            await connected(socket)
        except WebSocketDisconnect:
            pass

    return [WebSocketRoute("/v1/ws", greeted)]


async def _answer(service: Service, session: Session, data: bytes | memoryview, near: bool = False) -> bytes:
    seq = None
    try:
        message = unpack(data, service.settings.limits)
        if not isinstance(message, dict):
            raise _wrong("message", type(message).__name__, "a mapping with a 'type'")
        given = message.get("seq")
        seq = given if type(given) is int else None
        kind = message.get("type")
        match kind if isinstance(kind, str) else type(kind).__name__:
            case "hello":
                return pack({"type": "hello", "protocol": PROTOCOL, **service.describe(), "shares": near and AVAILABLE})
            case "look":
                if session.region is not None:
                    _place(message.get("images"), session.region, service.settings.limits)
                return pack({"type": "chunk", "seq": seq, **said(await session.act(look_of(message)))})
            case "share":
                if not near or type(size := message.get("size")) is not int:
                    raise _wrong("share", "no whole number" if near else "another computer", "bytes, of this one")
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
        return pack({"type": "refusal", "seq": seq, **Refusal.of(error).to_json()})


def look_of(message: Mapping[str, Any]) -> Look:
    """Raises `Refusal` naming every field that is unknown or of the wrong kind."""
    problems = [f"unknown field {name!r}"[:60] for name in message if name not in _LOOK]
    images = message.get("images")
    if not isinstance(images, dict) or not all(isinstance(name, str) for name in images):
        problems.append("images is no mapping of names")
        images = {}
    for name, kinds, least in (("seq", (int,), None), ("executed", (int,), 0), ("seed", (int,), 0), ("age", (int, float), None),
                               ("deadline", (int, float), SHORTEST)):  # fmt: skip
        value = message.get(name)
        if value is not None and (type(value) not in kinds or (least is not None and not value >= least) or abs(value) > 2**53):
            problems.append(f"{name} is {str(value)[:20]}")
    for name in ("robot", "adapter"):
        if message.get(name) is not None and not isinstance(message[name], str):
            problems.append(f"{name} is {type(message[name]).__name__}")
    if problems:
        raise _wrong("look", "; ".join(problems[:8]), f"fields {', '.join(sorted(_LOOK))}")
    return Look(
        images=images, state=message.get("state"), instruction=message.get("instruction"), robot=message.get("robot"),
        adapter=message.get("adapter"), seq=message.get("seq"), age=float(message.get("age") or 0.0),
        executed=message.get("executed"), deadline=message.get("deadline"), seed=message.get("seed") or 0,
    )  # fmt: skip


def _place(images: Any, region: Region, limits: Limits) -> None:
    """Pictures that lie in `region` instead of where they are said to be."""
    if isinstance(images, dict):
        shared = {camera: entry for camera, entry in images.items() if isinstance(entry, dict) and MARK in entry}
        if len(shared) > limits.pictures:
            raise _wrong("images", f"{len(shared)} pictures", f"at most {limits.pictures}")
        for camera, entry in shared.items():
            try:
                images[camera] = region.picture(entry, limits)
            except WireError as error:
                error.where = f"camera {camera!r}"[:80]
                raise


def said(reply: Reply) -> dict[str, Any]:
    """A chunk's message."""
    return {
        "actions": reply.actions, "confidence": reply.confidence, "symbols": reply.symbols, "execute": reply.execute,
        "hold": reply.hold, "reason": reply.reason, "needs_help": reply.needs_help, "policy": reply.policy,
        "timing": dict(reply.timing), "batch": reply.batch,
    }  # fmt: skip


def _wrong(where: str, found: str, expected: str) -> Refusal:
    return Refusal("bad_request", where=where, found=found, expected=expected, fix="see docs/serving.md")
