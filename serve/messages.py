"""What a wire does with a WebSocket: takes messages, says answers, or leaves somebody at it who answers without a task.

    async for data in messages(socket):
        await send(socket, answer_to(data))

Whatever server carries it; `serve/sockets.py` is ours, and the only one that knows of the latter.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.websockets import WebSocket, WebSocketDisconnect
from uvicorn.protocols.utils import ClientDisconnected

from serve.patience import SEND_SECONDS

LANE = "tendon.answer_with"
"""Of a connection's extensions: where an app leaves its `Quick`."""
Say = Callable[[bytes], None]
Quick = Callable[[bytes | memoryview, Say], bool]
"""Takes a binary message and says its answer, then or later, once; or returns False, and the app receives it as ever. The message
is good until this returns."""


def answer_with(socket: WebSocket, quick: Quick) -> None:
    """From now on `quick` is offered whole binary messages before the app is, one at a time, while the app waits for one. Where a
    server has no such lane, nothing changes. What it has not answered when the socket is left, it must not answer any more."""
    if (lane := socket.scope.get("extensions", {}).get(LANE)) is not None:
        lane(quick)


async def messages(socket: WebSocket) -> AsyncIterator[bytes | memoryview]:
    """Binary messages until the client leaves, each good until the next is asked for; a text is handed on as its UTF-8."""
    while True:
        message = await socket.receive()
        if message["type"] != "websocket.receive":
            return
        data = message.get("bytes")
        yield data if data is not None else (message.get("text") or "").encode()


async def send(socket: WebSocket, data: bytes) -> None:
    """Raises `WebSocketDisconnect` for a client that does not read."""
    try:
        async with asyncio.timeout(SEND_SECONDS):
            await socket.send({"type": "websocket.send", "bytes": data})
    except (TimeoutError, ClientDisconnected) as error:
        raise WebSocketDisconnect(1011) from error
