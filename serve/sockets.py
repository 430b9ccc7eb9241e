"""WebSockets for uvicorn, fast for what robots send: one large binary message after another.

`FastWebSocket` is uvicorn's own protocol over the `websockets` package, but for one thing: bytes are received straight into one
buffer, and a whole unfragmented binary message is taken from there. Everything else (handshake, text, fragments, pings, closing,
violations) goes to the package, frame by frame, as before. Two 224-pixel pictures cost half the time that way (docs/results.md).
And a connection that is lost ends what is being done for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Opcode

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform without its C part: the same, slower
    from websockets.utils import apply_mask

SEND_SECONDS = 10.0
"""A client that reads nothing for so long is let go."""
_FIRST = 64 << 10
_WHOLE_BINARY = 0x80 | Opcode.BINARY
_NO_MASK = b"\0\0\0\0"


class FastWebSocket(WebSocketsSansIOProtocol, asyncio.BufferedProtocol):
    """See the module. uvicorn makes one a connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._buffer = bytearray(_FIRST)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._most = self.config.ws_max_size
        self._answering: asyncio.Task[Any] | None = None
        self._inner = self.app
        self.app = self._until_lost  # pyright: ignore[reportAttributeAccessIssue]

    async def _until_lost(self, scope: Any, receive: Any, send: Any) -> None:
        self._answering = asyncio.current_task()
        try:
            await self._inner(scope, receive, send)
        except asyncio.CancelledError:
            if not self.disconnected:
                raise
            raise ClientDisconnected from None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._answering is not None:
            self._answering.cancel()

    # ------------------------------------------------------------------------------------------------ receiving

    def data_received(self, data: bytes) -> None:
        """What uvicorn hands over when it upgrades: the handshake."""
        if not self.handshake_complete and not self._filled:
            super().data_received(data)
            return
        while data:
            room = self.get_buffer(len(data))
            size = min(len(room), len(data))
            room[:size] = data[:size]
            data = data[size:]
            self.buffer_updated(size)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport writes next."""
        if self._filled == len(self._buffer):
            larger = bytearray(2 * len(self._buffer))
            larger[: self._filled] = self._buffer
            self._view.release()
            self._buffer, self._view = larger, memoryview(larger)
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take every whole frame there is."""
        self._filled += nbytes
        start = 0
        while (end := self._take(start)) > start:
            start = end
        if start:
            left = self._filled - start
            self._buffer[:left] = self._buffer[start : self._filled]
            self._filled = left
            if not left and len(self._buffer) > 4 << 20:  # one large message does not keep its room for ever
                self._view.release()
                self._buffer = bytearray(_FIRST)
                self._view = memoryview(self._buffer)

    def _take(self, at: int) -> int:
        """Where the frame that begins at `at` ends; `at` itself while it is not whole."""
        there = self._filled - at
        if there < 2:
            return at
        first, second = self._buffer[at], self._buffer[at + 1]
        size, head = second & 0x7F, 2
        if size >= 126:
            head = 4 if size == 126 else 10
            if there < head:
                return at
            size = int.from_bytes(self._view[at + 2 : at + head], "big")
        masked = bool(second & 0x80)
        head += 4 * masked
        if size > self._most or not masked:  # the package knows how to say no
            self._give(at, self._filled)
            return self._filled
        if there < head + size:
            return at
        end = at + head + size
        if first == _WHOLE_BINARY and self.handshake_complete and not self.close_sent and not self.frames:
            mask, data = bytes(self._view[at + head - 4 : at + head]), self._view[at + head : end]
            self.frames, self.curr_msg_data_type = [bytes(data) if mask == _NO_MASK else apply_mask(data, mask)], "bytes"
            self.send_receive_event_to_app()
        else:
            self._give(at, end)
        return end

    def _give(self, start: int, end: int) -> None:
        super().data_received(bytes(self._view[start:end]))


async def messages(socket: WebSocket) -> AsyncIterator[bytes]:
    """Binary messages until the client leaves; a text message is handed on as its UTF-8."""
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
