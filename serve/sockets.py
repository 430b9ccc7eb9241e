"""WebSockets for uvicorn, fast for what robots send: one large binary message after another; bounded as `serve/patience.py` says.

`FastWebSocket` is uvicorn's own protocol over the `websockets` package, but for two things. Bytes are received straight into one
buffer, and a whole unfragmented binary message is taken from there, or read there if it is large and not masked. Everything else
(handshake, text, fragments, pings, closing, violations) goes to the package, frame by frame, as before. Two 224-pixel pictures
cost half the time that way (docs/results.md). A connection that is lost ends what is being done for it; a message is not looked
at before the one before it was taken.

And an app that can answer without waiting for anything but a callback may say so once it has accepted
(`serve.messages.answer_with`): then what the model says goes out in the turn of the loop in which it came, without a task, a
queue or a timer in between. Meanwhile pings are answered, and the next message waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from starlette.websockets import WebSocketDisconnect
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import State

from serve.messages import LANE, Quick
from serve.patience import ROOM, Reader
from serve.wire import binary_head

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform without its C part: the same, slower
    from websockets.utils import apply_mask

logger = logging.getLogger(__name__)

_FIRST, _KEPT, _SPARE = 64 << 10, 4 << 20, 4 << 10
"""Bytes of a connection's buffer at first, most that stay between messages, and how many more than a large message it gets: a
buffer that was filled to its end is asked for again at once."""
_LENT = 16 << 10
"""Bytes of a message that is worth lending instead of copying."""
_OPCODES = frozenset(Opcode)
_WHOLE_BINARY = 0x80 | Opcode.BINARY
_NO_MASK = b"\0\0\0\0"


class _Buffered(asyncio.BufferedProtocol):
    """A `FastWebSocket` as its transport sees it once it is open: to uvloop an `asyncio.Protocol` is nothing else besides, and
    what it receives is copied twice on the way."""

    def __init__(self, socket: FastWebSocket) -> None:
        for name in ("get_buffer", "buffer_updated", "eof_received", "connection_lost", "pause_writing", "resume_writing"):
            setattr(self, name, getattr(socket, name))


class FastWebSocket(Reader, WebSocketsSansIOProtocol, asyncio.BufferedProtocol):
    """See the module. uvicorn makes one a connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._buffer = bytearray(_FIRST)
        self._view = memoryview(self._buffer)
        self._filled, self._needed = 0, 0
        self._asked = self._lent = False
        """Whether the app waits for a message; whether it reads its last one where it was received."""
        self._owed = 0
        """Bytes of a buffer that was left to the app, since more came."""
        self._most = self.config.ws_max_size
        self._quick: Quick | None = None
        self._asking = self._inside = False
        """Whether `_quick` has a message it has not answered; whether it is just being given one."""
        self._held: dict[str, Any] | None = None
        """A message that came behind the one `_quick` has."""
        self._unsaid: bytes | None = None
        """An answer that waits for what was written before to go out."""
        self._answering: asyncio.Task[Any] | None = None
        self._inner = self.app
        self.app = self._until_lost  # pyright: ignore[reportAttributeAccessIssue]

    async def _until_lost(self, scope: Any, receive: Any, send: Any) -> None:
        self._answering = asyncio.current_task()
        scope["extensions"][LANE] = self._answer_with
        try:
            await self._inner(scope, receive, send)
        except asyncio.CancelledError:
            if not self.disconnected:
                raise
            raise ClientDisconnected from None
        except WebSocketDisconnect:  # nobody is left to hear what the app wanted to say
            raise ClientDisconnected from None
        finally:
            self._answering = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._filled, self._held, self._unsaid = 0, None, None
        self._take_back()
        self._resize(_FIRST)
        if self._answering is not None:
            self._answering.cancel()

    async def run_asgi(self) -> None:
        await super().run_asgi()
        if not self.disconnected:
            self._let_go_later()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self._let_go_later()

    def pause_writing(self) -> None:
        super().pause_writing()
        if not self.transport.is_closing():
            self.transport.pause_reading()  # who sends pings and reads no pongs

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.read_paused and not self.transport.is_closing():
            self.transport.resume_reading()
        if (data := self._unsaid) is not None:
            self._unsaid = None
            self._say(data)

    async def receive(self) -> Any:
        """The next message; what came behind it is looked at from now on. A large one is good until the next is asked for."""
        if not self.read_paused:
            self._take_back()
        self._asked = True
        try:
            message = await super().receive()
        finally:
            self._asked = False
        self._take_all()
        return message

    async def send(self, message: Any) -> None:
        if (data := message.get("bytes")) is not None and message["type"] == "websocket.send" and self._flows():
            self._write(data)
            return
        before = self.handshake_complete, self.close_sent
        if before == (True, True):  # by a violation of the other side's, which the app cannot know of
            if message["type"] == "websocket.close":
                return
            raise ClientDisconnected
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True  # by a refusal; uvicorn would call it unfinished, in the log, for every stranger
        if before != (self.handshake_complete, self.close_sent):
            if not before[0] and not self.close_sent and not self.transport.is_closing():
                self.transport.set_protocol(_Buffered(self))
            self._take_all()  # what came before the handshake was over; the other side's close

    def _flows(self) -> bool:
        """Whether the connection is open, and what is written goes out."""
        return self.conn.state is State.OPEN and self.writable.is_set() and not (self.close_sent or self.disconnected)

    def _write(self, data: bytes) -> None:
        """As one frame."""
        self.transport.write(binary_head(len(data), masked=False) + data)

    # ------------------------------------------------------------------------------------------------ the quick lane

    def _answer_with(self, quick: Quick) -> None:
        self._quick = quick

    def _offer(self, data: bytes | memoryview) -> bool:
        """To whom answers without a task, while the app waits for a message; False for what is the app's."""
        if self._quick is None or not self._asked or not self.queue.empty() or not self._flows():
            return False
        self._asking = self._inside = True
        try:
            taken = self._quick(data, self._say)
        except Exception:  # else the connection would stay open, and deaf
            logger.exception("a message could not be answered")
            self._asking = self._inside = False
            self._fail(CloseCode.INTERNAL_ERROR, "see the server's log")
            return True
        self._inside = False
        self._asking &= taken
        return taken

    def _say(self, data: bytes) -> None:
        """What `_quick` answers."""
        if not self._asking or self.disconnected or self.close_sent:
            return
        if not self._flows():
            self._unsaid = data  # `Reader` waits a while for who does not read
            return
        self._write(data)
        self._asking = False
        if self._inside:  # who offered the message goes on by itself
            return
        if (event := self._held) is not None:
            self._held = None
            if "bytes" not in event or not self._offer(event["bytes"]):
                self._pass_on(event)
                return
            self.read_paused = False
            self._take_all()
            if not self.read_paused and self.writable.is_set() and not self.transport.is_closing():
                self.transport.resume_reading()

    def _pass_on(self, event: dict[str, Any]) -> None:
        """A message to the app, or to nobody yet."""
        self.read_paused = True
        if self._asking:
            self._held = event
        else:
            self._asked = False
            self.queue.put_nowait(event)  # pyright: ignore[reportArgumentType]

    # ------------------------------------------------------------------------------------------------ receiving

    def data_received(self, data: bytes) -> None:
        """What uvicorn hands over when it upgrades: the handshake."""
        if not self.handshake_complete and not self._filled:
            with contextlib.suppress(UnicodeError):
                super().data_received(data)
            if not self.handshake_initiated and not self.transport.is_closing():
                # Its package has bounds of its own for heads, and says nothing beyond them; uvicorn waits for ever.
                self.transport.write(STATUS_LINE[400] + b"content-length: 0\r\nconnection: close\r\n\r\n")
                self.transport.close()
            return
        while data:
            room = self.get_buffer(len(data))
            size = min(len(room), len(data))
            room[:size] = data[:size]
            data = data[size:]
            self.buffer_updated(size)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport writes next."""
        if self._lent and not self._leave():
            self._fail(CloseCode.TRY_AGAIN_LATER, "too many large messages at once")
        elif self._filled == len(self._buffer):
            # Hardly further than the frame that is coming: what lies behind it can wait.
            size = min(4 * len(self._buffer), max(self._needed + _SPARE, len(self._buffer) + _FIRST))
            if not self.handshake_complete:
                self.transport.abort()
                self._filled = 0
            elif not self._resize(size):
                self._fail(CloseCode.TRY_AGAIN_LATER, "too many large messages at once")
                self._filled = 0
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take what can be taken."""
        self._filled += nbytes
        if self.read_paused:  # not before: to stop and begin again for every message costs more than to receive a small one
            self.transport.pause_reading()
        self._take_all()

    def _leave(self) -> bool:
        """The buffer to the app, which reads its message there; another one for what comes. False when there is no room."""
        if not ROOM.take(_FIRST):
            return False
        self._owed, self._lent = len(self._buffer), False
        self._buffer = bytearray(_FIRST)
        self._view = memoryview(self._buffer)
        return True

    def _take_back(self) -> None:
        """What was lent."""
        ROOM.give(self._owed)
        self._owed, self._lent = 0, False
        self._shrink()

    def _shrink(self) -> None:
        """One large message does not keep its room for ever."""
        if not self._filled and not self._lent and len(self._buffer) > _KEPT:
            self._resize(_FIRST)

    def _resize(self, size: int) -> bool:
        """False when there is no room."""
        more = size - len(self._buffer)
        if more > 0 and not ROOM.take(more):
            return False
        if more < 0:
            ROOM.give(-more)
        if more:
            other = bytearray(size)
            other[: self._filled] = self._view[: self._filled]
            self._view.release()
            self._buffer, self._view = other, memoryview(other)
        return True

    def _take_all(self) -> None:
        """Every whole frame there is, up to the first message that somebody has to take first."""
        start = 0
        while self.handshake_complete and not (self.read_paused and not self.close_sent) and start < self._filled:
            if self.transport.is_closing():
                start = self._filled
            elif (end := self._take(start)) > start:
                start = end
            else:
                break
        if start:
            if left := self._filled - start:
                self._buffer[:left] = self._buffer[start : self._filled]
            self._filled = left
            self._shrink()

    def _take(self, at: int) -> int:
        """Where the frame that begins at `at` ends; `at` itself while it is not whole."""
        there = self._filled - at
        if there < 2:
            return at
        first, second = self._buffer[at], self._buffer[at + 1]
        opcode = first & 0x0F
        if opcode not in _OPCODES or not second & 0x80:  # no opcode, no mask: the package says no
            return self._refuse(at)
        size, head = second & 0x7F, 2
        if size >= 126:
            head = 4 if size == 126 else 10
            if there < head:
                return at
            size = int.from_bytes(self._view[at + 2 : at + head], "big")
        if size > self._most - (self.conn.current_size or 0):
            return self._refuse(at)
        if (first != _WHOLE_BINARY or self.conn.current_size is not None) and (fault := self._fault(first, opcode, size)):
            self._fail(CloseCode.PROTOCOL_ERROR, fault)
            return self._filled
        head += 4
        if there < head + size:
            self._needed = head + size
            return at
        end = at + head + size
        if first == _WHOLE_BINARY and not self.close_sent and self.conn.state is State.OPEN:
            mask, data = bytes(self._view[at + head - 4 : at + head]), self._view[at + head : end]
            self._hand(apply_mask(data, mask) if mask != _NO_MASK else data, end == self._filled)
        else:
            self._give(at, end)
        return end

    def _hand(self, data: bytes | memoryview, last: bool) -> None:
        """A binary message to the app; where it lies, if the app waits for it and nothing came behind it."""
        if isinstance(data, memoryview):
            self._lent = last and self._asked and not self._asking and len(data) >= _LENT
            data = data.toreadonly() if self._lent else bytes(data)
        if self._asking or not self._offer(data):
            self._pass_on({"type": "websocket.receive", "bytes": data})
        else:
            self._lent = False

    def _fault(self, first: int, opcode: int, size: int) -> str:
        """What is wrong with a frame that begins so, in the package's words, which says them when all of it is there."""
        if first & 0x70:
            return "reserved bits must be 0"
        if opcode & 0x08:
            return "control frame too long" if size > 125 else "" if first & 0x80 else "fragmented control frame"
        if opcode == Opcode.CONT:
            return "unexpected continuation frame" if self.conn.current_size is None else ""
        return "" if self.conn.current_size is None else "expected a continuation frame"

    def _refuse(self, at: int) -> int:
        self._give(at, self._filled)
        return self._filled

    def _give(self, start: int, end: int) -> None:
        super().data_received(bytes(self._view[start:end]))

    def _fail(self, code: CloseCode, reason: str) -> None:
        self.conn.fail(code, reason)
        self.handle_parser_exception()

    def handle_cont(self, event: Frame) -> None:
        """Parts are put together as they come: a list of a million small ones takes many times their bytes."""
        parts: list[Any] = self.frames
        if not isinstance(parts[0], bytearray):
            parts[0] = bytearray(parts[0])
        parts[0] += event.data
        if event.fin:
            parts[0] = bytes(parts[0])
            self.send_receive_event_to_app()

    def send_receive_event_to_app(self) -> None:
        """As uvicorn's, whose log is not for text that is none; and a message behind one that is being answered waits for it."""
        (data,), self.frames = self.frames, []
        if self.close_sent:
            return
        event: dict[str, Any] = {"type": "websocket.receive"}
        if self.curr_msg_data_type == "text":
            try:
                event["text"] = data.decode()
            except UnicodeDecodeError:
                self._fail(CloseCode.INVALID_DATA, "text that is no UTF-8")
                return
        else:
            event["bytes"] = data
        self._pass_on(event)
        self.transport.pause_reading()
