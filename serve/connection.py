"""A WebSocket for one robot and one server: a plain socket that never waits past a deadline. No thread, no event loop.

    link = Connection("ws://127.0.0.1:8000/v1/ws", {"Authorization": "Bearer ..."}, deadline=time.monotonic() + 2)
    link.send([head, frame.data], deadline)            # one binary message, gathered where it lies
    data = link.receive(deadline)                      # the next one

What robots do all day, one whole binary message out and one in, is done here: the pieces of a message go to the kernel as they
are, an answer is received into one buffer. The handshake, and everything unusual (pings, closing, fragments, violations), is the
`websockets` package's, without its input and output (`ClientProtocol`).

Frames of a client are masked (RFC 6455, 5.1). The mask keeps a page's script from making a browser send bytes of its choice,
which a proxy in between that knows no WebSockets could take for a request of its own (10.3). No stranger's script runs here, so
the key is 0 unless `mask=True` asks for a random one: every server understands it, and pictures need not be copied to be masked.
Inside TLS no proxy sees the bytes at all.
"""

from __future__ import annotations

import json
import os
import select
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidURI
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import WebSocketURI, parse_uri

from serve.refusal import Refusal
from serve.shared import Attached
from serve.wire import LIMITS, binary_head
from vla.errors import UsageError

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform without its C part: the same, slower
    from websockets.utils import apply_mask

_FIRST = 64 << 10
"""Bytes of the buffer at first, and the most that a server may say before the socket opens."""
_WHOLE_BINARY = 0x80 | Opcode.BINARY
_LITTLE = 16 << 10
"""Bytes of a message in one piece that is copied behind its head sooner than the kernel gathers the two."""
_PIECES = 64
"""Handed to the kernel at once; no system takes fewer than 16, Linux takes 1024."""
_CODES = {401: "unauthorized", 403: "forbidden", 404: "not_found", 413: "too_large", 429: "busy"}
_GOODBYE = 0.2
"""Seconds that saying so may take, when a connection is closed."""


class Connection:
    """See the module. One thread at a time; `abort` from any."""

    def __init__(self, address: str, headers: Mapping[str, str], deadline: float, *, tls: ssl.SSLContext | None = None,
                 mask: bool = False, most: int = LIMITS.message, local: str = "") -> None:  # fmt: skip
        """Connect by `deadline` (on `time.monotonic`). `most` bytes of a message. `local`: the name of a local socket that leads
        to the same server, instead of its address.

        Raises `Refusal` as the server says it, `UsageError` for a certificate that is not trusted, else `OSError`: `TimeoutError`
        past the deadline.
        """
        uri = uri_of(address)
        self._protocol = ClientProtocol(uri, max_size=most)
        self._most, self._mask = most, mask
        self._buffer = bytearray(_FIRST)
        self._view = memoryview(self._buffer)
        self._start = self._filled = self._need = 0
        self._fragments: list[bytes] = []
        self.shared: Attached | Literal[False] | None = None
        """Memory that both ends see; False where there can be none, None before anybody asked."""
        self._socket: Any = _local(local, deadline) if local else _dial(uri.host, uri.port, deadline)  # or an SSLSocket
        self._gathers = not uri.secure and hasattr(self._socket, "sendmsg")
        self._poll: Any = None
        """What tells when there is something to receive: a socket with a timeout asks the kernel twice as often."""
        try:
            if not local:
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if uri.secure:
                self._socket = _encrypted(self._socket, uri.host, tls, deadline)
            self._shake(headers, deadline)
            if not uri.secure and hasattr(select, "poll"):  # a TLS socket may hold what the kernel does not know of
                self._poll = select.poll()
                self._poll.register(self._socket, select.POLLIN)
                self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise

    def _shake(self, headers: Mapping[str, str], deadline: float) -> None:
        request = self._protocol.connect()
        for name, value in headers.items():
            request.headers[name] = value
        self._protocol.send_request(request)
        self._write(self._protocol.data_to_send(), deadline)
        end = -1
        while end < 0:  # what comes after the head may be a frame already
            if self._filled >= _FIRST:
                raise ConnectionError("no end of what it says before the socket opens")
            self._fill(deadline)
            end = self._buffer.find(b"\r\n\r\n", 0, self._filled)
        self._start = end + 4
        self._protocol.receive_data(bytes(self._view[: self._start]))
        if self._protocol.state is State.OPEN:
            self._protocol.events_received()
            return
        raise _refused(self._response(deadline), self._protocol.handshake_exc)

    def _response(self, deadline: float) -> Response | None:
        """Why the socket was not opened, with its body."""
        while True:
            for event in self._protocol.events_received():
                if isinstance(event, Response):
                    return event
            if self._protocol.handshake_exc is not None:
                return None
            if self._start == self._filled:
                try:
                    self._fill(deadline)
                except ConnectionError:
                    self._protocol.receive_eof()
                    continue
            self._protocol.receive_data(bytes(self._view[self._start : self._filled]))
            self._start = self._filled

    # ------------------------------------------------------------------------------------------------ messages

    def send(self, pieces: Sequence[bytes | memoryview], deadline: float) -> None:
        """One binary message. Raises `OSError`, after which the connection is of no use."""
        first = pieces[0]
        if len(pieces) == 1 and isinstance(first, bytes) and len(first) < _LITTLE and not self._mask and self._poll is not None:
            data = b"".join((binary_head(len(first), masked=True), bytes(4), first))
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
            if sent < len(data):
                self._write([memoryview(data)[sent:]], deadline)
            return
        views = [memoryview(piece).cast("B") for piece in pieces]
        head = binary_head(sum(view.nbytes for view in views), masked=True)
        if self._mask:
            key = os.urandom(4)
            self._write([head + key, apply_mask(b"".join(views), key)], deadline)
        else:
            self._write([head + bytes(4), *views], deadline)

    def receive(self, deadline: float) -> memoryview | bytes:
        """The next whole message; good until the next call. Raises `OSError`, after which the connection is of no use."""
        while (message := self._take(deadline)) is None:
            self._fill(deadline)
        return message

    def attend(self, deadline: float) -> None:
        """Take what came unasked while nobody listened: pings are answered. Raises `OSError` when the server has left."""
        while True:
            while self._take(deadline) is not None:
                pass  # an answer to nothing that is still being asked
            if self._poll is not None:
                if not self._poll.poll(0):
                    return
            else:
                self._socket.settimeout(0)
            self._make_room()
            try:
                self._receive()
            except (BlockingIOError, ssl.SSLWantReadError):
                return

    def close(self) -> None:
        """Say goodbye and close. Idempotent."""
        if self._socket.fileno() >= 0:
            try:
                if self._protocol.state is State.OPEN:
                    self._protocol.send_close(1000)
                    self._write(self._protocol.data_to_send(), time.monotonic() + _GOODBYE)
            except (OSError, ValueError):
                pass
            self._socket.close()

    def abort(self) -> None:
        """End whatever another thread waits for here."""
        try:
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        except OSError:
            pass

    # ------------------------------------------------------------------------------------------------ frames

    def _take(self, deadline: float) -> memoryview | bytes | None:
        """The next message that is here whole; None while there is none."""
        while (there := self._filled - self._start) >= 2:
            at = self._start
            first, second = self._buffer[at], self._buffer[at + 1]
            size, head = second & 0x7F, 2
            if size >= 126:
                head = 4 if size == 126 else 10
                if there < head:
                    break
                size = int.from_bytes(self._view[at + 2 : at + head], "big")
            wrong = second & 0x80 or size > self._most  # the package knows how to say no
            if not wrong and there < head + size:
                self._need = head + size
                break
            self._start = self._filled if wrong else at + head + size
            if first == _WHOLE_BINARY and not wrong and not self._fragments:
                return self._view[at + head : self._start]
            message = self._unusual(bytes(self._view[at : self._start]), deadline)
            if message is not None:
                return message
        return None

    def _unusual(self, data: bytes, deadline: float) -> bytes | None:
        """A frame the package understands; the message that ends with it, if one does."""
        self._protocol.receive_data(data)
        self._write([piece for piece in self._protocol.data_to_send() if piece], deadline)
        for event in self._protocol.events_received():
            if isinstance(event, Frame) and event.opcode in (Opcode.BINARY, Opcode.TEXT, Opcode.CONT):
                self._fragments.append(bytes(event.data))
                if event.fin:
                    message, self._fragments = b"".join(self._fragments), []
                    return message
        if self._protocol.state is not State.OPEN:
            close = self._protocol.close_rcvd or self._protocol.close_sent
            why = f"{int(close.code)} {close.reason}".strip() if close is not None else "no reason"
            raise ConnectionAbortedError(f"closed: {why[:200]}")
        return None

    def _fill(self, deadline: float) -> None:
        self._make_room()
        if self._poll is None:
            self._socket.settimeout(_left(deadline))
        elif not self._poll.poll(1 + int(1e3 * _left(deadline))):
            raise TimeoutError("timed out")
        try:
            self._receive()
        except BlockingIOError:  # the kernel thought better of it
            pass

    def _make_room(self) -> None:
        if self._start == self._filled:
            self._start = self._filled = 0
        if self._filled == len(self._buffer):
            fresh, left = bytearray(max(self._need, _FIRST)), self._filled - self._start
            fresh[:left] = self._view[self._start : self._filled]
            self._buffer, self._view = fresh, memoryview(fresh)
            self._start, self._filled = 0, left
        self._need = 0

    def _receive(self) -> None:
        size = self._socket.recv_into(self._view[self._filled :])
        if not size:
            raise ConnectionResetError("the server closed the connection")
        self._filled += size

    def _write(self, pieces: Sequence[bytes | memoryview], deadline: float) -> None:
        if not self._gathers:
            pieces = [b"".join(pieces)]
        views = [view for piece in pieces if (view := memoryview(piece)).nbytes]
        while views:
            if self._poll is None:
                self._socket.settimeout(_left(deadline))
            try:
                sent = self._socket.sendmsg(views[:_PIECES]) if self._gathers else self._socket.send(views[0])
            except BlockingIOError:  # the kernel has no room
                self._socket.settimeout(_left(deadline))
                try:
                    sent = self._socket.send(views[0])
                finally:
                    self._socket.setblocking(False)
            while views and sent >= views[0].nbytes:
                sent -= views.pop(0).nbytes
            if sent:
                views[0] = views[0][sent:]


# ---------------------------------------------------------------------------------------------------- opening


def uri_of(address: str) -> WebSocketURI:
    """Raises `UsageError` for what is no `ws://` or `wss://` address, and for one with a password in it."""
    try:
        uri = parse_uri(address)
        if uri.username is None and uri.port:
            return uri
        found = "a user's name or port 0"
    except (InvalidURI, ValueError) as error:
        found = str(error)
    raise UsageError("address", found=found.replace(address, "the address")[:200], expected="ws://HOST:PORT or wss://HOST:PORT",
                     fix="ws://127.0.0.1:8000; a token goes into token=") from None  # fmt: skip


def near_by(address: str) -> bool:
    """Whether it is this computer's own, by its name."""
    host = uri_of(address).host
    return host in ("localhost", "::1") or host.startswith("127.")


def _left(deadline: float) -> float:
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError("timed out")
    return left


def _local(name: str, deadline: float) -> socket.socket:
    """The local socket of that name. Raises `OSError`, also where a system has none."""
    if not hasattr(socket, "AF_UNIX"):
        raise ConnectionError("no local sockets on this system")
    found = socket.socket(socket.AF_UNIX)
    try:
        found.settimeout(_left(deadline))
        found.connect(f"\0{name}")
        return found
    except (OSError, ValueError) as error:
        found.close()
        raise error if isinstance(error, OSError) else ConnectionError(str(error)) from None


def _dial(host: str, port: int, deadline: float) -> socket.socket:
    """Whichever of the host's addresses answers first; an address that does not is not given all the time there is."""
    error: OSError = ConnectionError(f"no address of {host}")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for number, (family, kind, protocol, _, where) in enumerate(found):
        dialled = socket.socket(family, kind, protocol)
        try:
            dialled.settimeout(_left(deadline) / (len(found) - number))
            dialled.connect(where)
            return dialled
        except OSError as failed:
            error = failed
            dialled.close()
    raise error


def _encrypted(plain: socket.socket, host: str, tls: ssl.SSLContext | None, deadline: float) -> ssl.SSLSocket:
    plain.settimeout(_left(deadline))
    try:
        return (tls or ssl.create_default_context()).wrap_socket(plain, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise UsageError("TLS", found=error.verify_message, expected=f"a certificate of {host} that this machine trusts",
                         fix="SSL_CERT_FILE=ca.pem, or tls=ssl.create_default_context(cafile=...)") from error  # fmt: skip


def _refused(response: Response | None, error: Exception | None) -> Exception:
    """What the server said instead of opening the socket."""
    if response is None:
        return ConnectionError(f"no WebSocket: {error}"[:200])
    if response.status_code == 101:
        return Refusal("bad_request", where="handshake", found=str(error)[:200], expected="a WebSocket", fix="check the address")
    try:
        return Refusal.from_json(json.loads(bytes(response.body or b"")))
    except ValueError:
        status = response.status_code
        code = _CODES.get(status, "unavailable" if status >= 500 else "bad_request")
        return Refusal(code, where="handshake", found=f"HTTP {status} {response.reason_phrase}"[:200],
                       expected="a WebSocket of vla serve", fix="check the address, and the proxy if there is one")  # fmt: skip
