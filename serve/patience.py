"""Bounds for whoever connects: in what all of them hold together, and in how long each may do nothing. uvicorn has none.

`PatientHTTP` is uvicorn's own protocol, with an end to what it waits for without one: a head that never comes or never ends, a
body that goes on after its answer, a client that does not read. When there are too many connections, those that have been idle
the longest are closed. `Reader` is what WebSockets (`serve/sockets.py`) share of that, and `ROOM`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

SEND_SECONDS = 10.0
"""A client that reads nothing for so long is let go."""
HEAD_SECONDS = 15.0
"""The head of a request must have come by then."""
HEAD_BYTES = 64 << 10
"""Of a request's line and headers."""
REST_SECONDS = 5.0
"""A body that was answered already may go on for so long."""


class Room:
    """Bytes that all messages together may take while they come in: 256 connections of 32 MiB are more than a machine has."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        """Whether there is room for so many more; then they are taken."""
        if size > self.left:
            return False
        self.left -= size
        return True

    def give(self, size: int) -> None:
        """Back."""
        self.left += size


ROOM = Room(2 << 30)
"""Of this process."""


class Reader:
    """Lets a client go that does not read what it asked for, and one that leaves what it was sent last."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _slow: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()  # pyright: ignore[reportAttributeAccessIssue]
        self._let_go_later()

    def resume_writing(self) -> None:
        super().resume_writing()  # pyright: ignore[reportAttributeAccessIssue]
        self._stay()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stay()
        super().connection_lost(exc)  # pyright: ignore[reportAttributeAccessIssue]

    def _let_go_later(self) -> None:
        """What was written is not waited for any longer then; `close` alone waits for ever."""
        if self._slow is None:
            self._slow = self.loop.call_later(SEND_SECONDS, self._abort)

    def _abort(self) -> None:
        self.transport.abort()

    def _stay(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None


class PatientHTTP(Reader, HttpToolsProtocol):
    """See the module. uvicorn makes one a connection."""

    most = 512
    """Connections at once; beyond, the one that has been without a request the longest is closed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.idle_since: float | None = None
        """Since when there is no request on this connection."""
        self._in_head, self._begun, self._heads = True, False, 0
        self._head = self._fields = 0
        """Bytes of the head that is coming, and of those of its headers that are whole."""
        self._patience: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self.idle_since = self.loop.time()
        self._wait(HEAD_SECONDS)
        if len(self.connections) > self.most:
            idle = [c for c in self.connections if isinstance(c, PatientHTTP) and c.idle_since is not None]
            oldest = min(idle, key=lambda c: c.idle_since or 0.0)
            oldest.idle_since = None
            oldest._abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait(None)
        self._forsake()
        super().connection_lost(exc)

    def _abort(self) -> None:
        self._forsake()
        super()._abort()

    def _forsake(self) -> None:
        """Nothing is written for the request that is being answered; uvicorn knows of the last that came, which may wait yet."""
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        heads = self._heads if self._in_head else -1
        super().data_received(data)
        if self.transport.is_closing():
            return
        self._head = self._head + len(data) if heads == self._heads else 0
        if self._head > HEAD_BYTES:
            self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        if max(self._head, self._fields) <= HEAD_BYTES:
            super().send_400_response(msg)
            return
        self.transport.write(STATUS_LINE[431] + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun, self._fields = True, 0
        self._wait(HEAD_SECONDS)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += len(name) + len(value)
        if self._fields > HEAD_BYTES:
            raise ValueError("head")  # the parser's answer to it is `send_400_response`
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._begun, self.idle_since = False, False, None
        self._heads += 1
        self._wait(None)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        self._wait(None)
        if self.cycle is not None and self.cycle.response_complete:  # it went on after its answer
            self._rest()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        next_one = bool(self.pipeline)
        super().on_response_complete()
        if self.transport.is_closing():
            self._let_go_later()
        elif not next_one and not self._in_head:
            self._wait(REST_SECONDS)
        elif not next_one and not self._begun:
            self._rest()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._let_go_later()

    def _rest(self) -> None:
        self.idle_since = self.loop.time()
        self._wait(self.timeout_keep_alive)

    def _wait(self, seconds: float | None) -> None:
        """For what must come next, no longer than that."""
        if self._patience is not None:
            self._patience.cancel()
        self._patience = None if seconds is None else self.loop.call_later(seconds, self._abort)
