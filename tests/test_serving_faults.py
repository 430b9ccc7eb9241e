"""A server under bad manners and bad luck: bombs, floods, clients that stop half-way, a model that hangs. Rows 29 to 34 of what a
trusted system survives: it refuses, in a bounded time and a bounded room, and goes on.

Times are not asserted but where waiting itself is the fault: counts, codes and bytes are.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from children import LIMIT
from mutations import FRAME, PNG, state
from PIL import Image
from servers import in_thread
from serving import Server, started, until
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from serve import gate, patience
from serve.wire import LIMITS, Encoded, encode, pack, unpack

TOKEN, ADMIN = "user-token-0123456789abcdef", "admin-token-0123456789abcdef"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One for all faults that must leave it as it was."""
    with started("null:tabletop", "--deadline", "20") as server:
        yield server
        assert not server.complaints(), server.log[-4000:]


def look(seq: int = 1, picture: Any = FRAME, **more: Any) -> dict[str, Any]:
    return {"type": "look", "seq": seq, "images": {"front": picture}, "state": state(seq), "instruction": "push"} | more


def body(picture: bytes = PNG.data, **more: Any) -> bytes:
    said = {"images": {"front": base64.b64encode(picture).decode()}, "state": state().tolist(), "instruction": "push"}
    return json.dumps(said | more).encode()


def request(path: str, content: bytes, *headers: str, method: str = "POST") -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def line_to(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=LIMIT)


def response(line: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of the next response on a connection; status 0 when it was closed without one."""
    said = b""
    while b"\r\n\r\n" not in said:
        try:
            part = line.recv(1)  # and nothing of the response behind it
        except ConnectionResetError:
            part = b""
        if not part:
            return 0, {}, said
        said += part
    status, *lines = said.decode("latin-1").split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (text.partition(":") for text in lines)}
    rest, size = b"", int(headers.get("content-length", 0))
    while len(rest) < size:
        rest += line.recv(size - len(rest))
    return int(status.split()[1]), headers, rest


def ask(port: int, path: str, content: bytes, *headers: str) -> tuple[int, dict[str, str], bytes]:
    with line_to(port) as line:
        line.sendall(request(path, content, "Connection: close", *headers))
        return response(line)


def answers(server: Server) -> None:
    """It still does its work."""
    assert ask(server.port, "/v1/act", body())[0] == 200


# ---------------------------------------------------------------------------------------------------- bombs


def png(width: int, height: int, *chunks: tuple[bytes, bytes], pixels: bytes = b"") -> bytes:
    """A file of that size, whatever its pixels."""
    all_chunks = [(b"IHDR", struct.pack("!IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data)) for kind,
        data in all_chunks)  # fmt: skip


def bombs() -> dict[str, bytes]:
    """Small files with much in them."""
    row = zlib.compressobj(9)
    zeros = b"".join([*(row.compress(b"\0" * (3 * 13_000 + 1)) for _ in range(13_000)), row.flush()])
    jpeg = encode(FRAME, "jpeg").data
    at = jpeg.index(b"\xff\xc0") + 5
    progressive = io.BytesIO()
    Image.fromarray(FRAME).save(progressive, "JPEG", progressive=True)
    scans = progressive.getvalue()
    last = scans[scans.rindex(b"\xff\xda") : -2]
    return {
        "13000 x 13000 png": png(13_000, 13_000, pixels=zeros),
        "65535 x 65535 jpeg": jpeg[:at] + b"\xff\xff\xff\xff" + jpeg[at + 4 :],
        "1 x 60000 png": png(1, 60_000),
        "png of nothing": png(0, 0),
        "png of 4 billion": png((1 << 32) - 1, (1 << 32) - 1),
        "png of a million chunks": png(64, 64, *[(b"tEXt", b"")] * 1_000_000),
        "jpeg of 4 million segments": jpeg[:2] + b"\xff\xe1\x00\x02" * 4_000_000 + jpeg[2:],
        "jpeg of 5000 scans": scans[:-2] + last * 5000 + b"\xff\xd9",
    }


def test_picture_bombs_are_refused_by_their_headers_and_nobody_grows(server: Server):
    answers(server)
    for name, bomb in bombs().items():
        packed, posted = pack(look(1, Encoded(bomb, "png", 9, 9))), body(bomb)
        with server.bounded(2 * LIMITS.message + len(packed)) as grown:
            status, _, said = ask(server.port, "/v1/act", posted)
            assert status in (413, 422), (name, said)
            with connect(server.address.replace("http", "ws") + "/v1/ws", max_size=None) as line:
                line.send(packed)
                refusal = unpack(line.recv(LIMIT, decode=False))
                assert refusal["error"]["code"] == ("too_large" if status == 413 else "bad_request"), (name, refusal)
        print(f"{name}: {len(bomb):,} bytes, {status}, grown by {grown}")
    answers(server)


def test_pictures_whose_header_is_right_and_whose_rest_is_not_cost_only_their_sender(server: Server):
    model, whole = server.model, PNG.data
    for damaged in (whole[:60], whole[:-40], whole[:100] + bytes(500) + whole[600:], png(64, 64, pixels=zlib.compress(b"")),
                    png(64, 64, (b"zTXt", b"k\0\0" + zlib.compress(bytes(80 << 20))), pixels=b""),
                    encode(FRAME, "jpeg").data[:400]):  # fmt: skip
        assert ask(server.port, "/v1/act", body(damaged))[0] in (422, 200)
    answers(server)
    assert server.model == model and server.metric("tendon_backend_restarts_total") == 0


@pytest.mark.parametrize(
    "name", ["empty mappings", "empty lists", "lists in lists", "numbers", "text", "JSON objects", "JSON lists"]
)
def test_messages_of_many_small_things_are_refused_before_they_are_large(server: Server, name: str):
    """A byte on the wire may be a mapping of 64 bytes here."""
    many, size = 4000, LIMITS.message - (2 << 20)
    inner = {"empty mappings": b"\x80", "empty lists": b"\x90", "lists in lists": b"\x91\x91\x91\xc0", "numbers": b"\x01",
    "text": b"\xa1a",
             "JSON objects": b"{},", "JSON lists": b"[[]],"}[name]  # fmt: skip
    if name.startswith("JSON"):
        message = b"[" + inner * (size // len(inner)) + b"1]"
    else:
        message, head = inner, b"\xdc" + struct.pack("!H", many)  # no list alone is longer than allowed
        while len(message) * many < size:
            message = head + message * many
        message = b"\xdc" + struct.pack("!H", size // len(message)) + message * (size // len(message))
    with server.bounded(5 * LIMITS.message) as grown:
        if name.startswith("JSON"):
            status, _, said = ask(server.port, "/act", message)
            assert status == 413, said
        else:
            with connect(server.address.replace("http", "ws") + "/v1/ws", max_size=None) as line:
                line.send(message)
                assert unpack(line.recv(LIMIT, decode=False))["error"]["code"] == "too_large"
    print(name, grown)
    answers(server)


def test_addresses_are_not_fetched(server: Server):
    """Whoever answers at that address would know."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/a.png"
        assert (
            ask(server.port, "/v1/act", json.dumps({"images": {"front": url}, "state": [0.5] * 4, "instruction": "a"}).encode())[
                0
            ]
            == 422
        )
        with connect(server.address.replace("http", "ws") + "/v1/ws") as line:
            for picture in (url, url.encode(), {"__image__": True, "format": "png", "data": url}):
                line.send(pack(look(1, picture)))
                assert unpack(line.recv(LIMIT, decode=False))["error"]["code"] == "bad_request"
        trap.settimeout(0.2)
        with pytest.raises(TimeoutError):
            trap.accept()


# ---------------------------------------------------------------------------------------------------- floods


def test_a_chunked_body_without_end_is_cut_off(server: Server):
    chunk = b"%x\r\n" % (1 << 20) + b"a" * (1 << 20) + b"\r\n"
    with server.bounded(2 * LIMITS.message) as grown, line_to(server.port) as line:
        line.sendall(b"POST /v1/act HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
        line.settimeout(0.01)
        sent, said = 0, b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while sent < 64 * LIMITS.message:  # until it is let go
                with contextlib.suppress(TimeoutError):
                    line.sendall(chunk)
                    sent += 1
                with contextlib.suppress(TimeoutError):
                    said += line.recv(1 << 16)
        assert b" 413 " in said.split(b"\r\n")[0], (sent, said[:200])
    print(f"after {sent} MiB, grown by {grown}")
    answers(server)


def test_a_body_that_says_it_is_too_long_is_refused_before_it_comes(server: Server):
    with line_to(server.port) as line:
        head = f"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: {LIMITS.message + 1}\r\n"
        line.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert response(line)[0] == 413
    with line_to(server.port) as line:  # and one that comes all the same hears it, and may ask again
        line.sendall(request("/act", bytes(LIMITS.message + 1)) + request("/livez", b"", method="GET"))
        assert response(line)[0] == 413 and response(line)[0] == 200


@pytest.mark.parametrize(
    "name", ["a line without end", "a header without end", "many headers", "a long path", "a name without end"]
)
def test_heads_without_end_are_cut_off(server: Server, name: str):
    start, more = {
        "a line without end": (b"GET /", b"a" * 4096), "a header without end": (b"GET / HTTP/1.1\r\nA: ", b"a" * 4096),
        "many headers": (b"GET / HTTP/1.1\r\n", b"X-Header: value\r\n" * 256), "a long path": (b"POST /v1/", b"%41" * 1000),
        "a name without end": (b"GET / HTTP/1.1\r\n", b"A" * 4096),
    }[name]  # fmt: skip
    with server.bounded(32 << 20), line_to(server.port) as line:
        line.sendall(start)
        sent = 0
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while sent < 256 << 20:
                line.sendall(more)
                sent += len(more)
        status, _, _ = response(line)
        assert status in (0, 400, 414, 431) and sent < 64 << 20, (status, sent)
    answers(server)


def test_a_head_of_many_headers_in_one_go_is_refused(server: Server):
    for count, expected in ((50, 200), (9000, 431)):
        with line_to(server.port) as line:
            line.sendall(request("/livez", b"", *[f"X-Header-{i}: value" for i in range(count)], method="GET"))
            assert response(line)[0] == expected
    with line_to(server.port) as line:  # the package of WebSockets has its own bounds
        line.sendall(request("/v1/ws", b"", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
                             "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", *[f"X-{i}: value" for i in range(500)],
                             method="GET"))  # fmt: skip
        assert response(line)[0] == 400
    answers(server)


def test_who_sends_nothing_or_half_is_let_go(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patience, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(patience, "REST_SECONDS", 0.4)
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.4)
    with in_thread() as (port, service), contextlib.ExitStack() as lines:
        whole = request("/v1/act", body())
        beginnings = {"nothing": b"", "a word": b"PO", "half a head": whole[:40], "half a body": whole[:-30],
                      "a second head": request("/livez", b"", method="GET") + b"GET /li",
                      "a second body": request("/livez", b"", method="GET") + whole[:-30]}  # fmt: skip
        held = {name: lines.enter_context(line_to(port)) for name in beginnings}
        for name, line in held.items():
            line.sendall(beginnings[name])
        heard = {name: [] for name in held}
        for name, line in held.items():
            while (said := response(line))[0]:
                heard[name].append(said[0])
        assert heard == {"nothing": [], "a word": [], "half a head": [], "half a body": [422], "a second head": [200],
                         "a second body": [200, 422]}  # fmt: skip
        dripping = lines.enter_context(line_to(port))
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for byte in whole[:300]:
                dripping.sendall(bytes([byte]))
                time.sleep(0.02)
        assert response(dripping)[0] == 0


def test_idle_connections_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch):
    with in_thread(connections=10) as (port, service), contextlib.ExitStack() as lines:
        idle = [lines.enter_context(line_to(port)) for _ in range(60)]
        with line_to(port) as line:
            line.sendall(request("/livez", b"", method="GET"))
            assert response(line)[0] == 200
        gone = 0
        for line in idle:
            line.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                gone += response(line)[0] == 0
        assert 40 <= gone < 60  # the oldest; those left may go on
        idle[-1].settimeout(LIMIT)
        idle[-1].sendall(request("/livez", b"", method="GET"))
        assert response(idle[-1])[0] == 200


def test_more_sockets_than_allowed_hear_when_to_come_again():
    with in_thread(connections=5) as (port, service), contextlib.ExitStack() as lines:
        held = [lines.enter_context(connect(f"ws://127.0.0.1:{port}/v1/ws")) for _ in range(5)]
        with line_to(port) as line:
            line.sendall(request("/v1/info", b"", method="GET"))
            status, headers, _ = response(line)
            assert (status, headers["retry-after"]) == (503, "1")
            line.sendall(request("/livez", b"", method="GET"))
            assert response(line)[0] == 200
        held[0].close()
        until(lambda: ask(port, "/v1/act", body())[0] == 200)


# ---------------------------------------------------------------------------------------------------- half-way


def test_a_reader_that_does_not_read_is_let_go_and_holds_up_nobody(server: Server):
    """It asks for much more than the kernels between hold for it, and reads nothing; nor does one that only sends pings."""
    sockets_of = psutil.Process(server.process.pid)
    answers(server)
    before = len(sockets_of.net_connections())
    hello, ping = pack({"type": "hello"}), bytes(125)
    with server.bounded(64 << 20) as grown, contextlib.ExitStack() as lines:
        slow: list[socket.socket] = []
        for path in ("/v1/ws", "/vla-eval", "/v1/ws", "/metrics"):
            line = socket.socket()
            lines.enter_context(line)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.settimeout(LIMIT)
            line.connect(("127.0.0.1", server.port))
            slow.append(line)
            if path == "/metrics":
                one = request(path, b"", method="GET")
            else:
                line.sendall(request(path, b"", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
                                     "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", method="GET"))  # fmt: skip
                assert line.recv(13) == b"HTTP/1.1 101 "
                data = hello if path == "/v1/ws" else pack({"type": "hello", "payload": {}, "seq": 1, "timestamp": 0.0})
                one = bytes([0x82, 0x80 | len(data), 0, 0, 0, 0]) + data
                if len(slow) == 3:
                    one = bytes([0x89, 0x80 | 125, 0, 0, 0, 0]) + ping
            line.setblocking(False)
            left, quiet = one * (24_000_000 // (len(one) if b"\x89" == one[:1] else 2000)), time.monotonic()
            while left and time.monotonic() - quiet < 0.5:  # until nothing more is taken
                try:
                    sent = line.send(left[: 1 << 16])
                    left, quiet = left[sent:], time.monotonic()
                except BlockingIOError:
                    time.sleep(0.005)
                except (ConnectionResetError, BrokenPipeError):
                    break
        answers(server)
        assert len(sockets_of.net_connections()) > before
        until(lambda: len(sockets_of.net_connections()) <= before)  # all four were let go, though none of them has gone
    print("grown by", grown)
    answers(server)


def test_who_goes_away_frees_the_model_for_others():
    with started("null:tabletop", "--batch", "1", "--queue", "40", "--deadline", "60") as server:
        answers(server)
        answered = server.metric("tendon_inference_seconds_count")
        os.kill(server.model, signal.SIGSTOP)  # for a while, so that nobody's turn comes
        with contextlib.ExitStack() as lines:
            for i in range(16):
                if i % 2:
                    line = lines.enter_context(line_to(server.port))
                    line.sendall(request("/v1/act", body(deadline=60.0)))
                else:
                    line = lines.enter_context(connect(server.address.replace("http", "ws") + "/v1/ws"))
                    lines.callback(line.socket.shutdown, socket.SHUT_RDWR)
                    line.send(pack(look(deadline=60.0)))
            until(lambda: server.metric("tendon_queue_length") == 15)
        until(lambda: server.metric("tendon_queue_length") == 0)  # all of them hung up
        os.kill(server.model, signal.SIGCONT)
        answers(server)
        assert server.metric("tendon_inference_seconds_count") - answered == 2  # of the first of them, and of this one
        assert server.metric("tendon_sessions") == 0 and server.metric("tendon_backend_restarts_total") == 0
        assert not server.complaints(), server.log


def test_a_model_that_hangs_is_killed_and_comes_back(tmp_path: Path):
    (tmp_path / "serve.yaml").write_text("hang: 1.0\n")
    with started("null:tabletop", "--config", tmp_path / "serve.yaml", "--deadline", "30") as server:
        hung = server.model
        os.kill(hung, signal.SIGSTOP)
        status, headers, said = ask(server.port, "/v1/act", body())
        assert status == 503 and int(headers["retry-after"]) >= 1 and b"did not answer for 1 s" in said
        until(lambda: server.get("/readyz")[0] == 200)
        answers(server)
        assert server.model != hung and not psutil.pid_exists(hung)
        assert server.metric("tendon_backend_restarts_total") == 1
        assert not server.complaints(but="killed and started again"), server.log


# ---------------------------------------------------------------------------------------------------- load


def test_64_clients_and_one_model_of_100_ms():
    """Who is accepted is answered inside the deadline; who is not hears at once when to come again."""
    deadline, queue, clients, each = 2.0, 12, 64, 5
    counts, waits = Counter[str](), {"ok": list[float](), "refused": list[float]()}
    seen: list[float] = []

    async def over_http(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(each):
            began = time.monotonic()
            writer.write(request("/v1/act", body()))
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            said = json.loads(await reader.readexactly(int(head.partition("content-length: ")[2].split()[0])))
            status = int(head.split()[1])
            waits["ok" if status == 200 else "refused"].append(time.monotonic() - began)
            counts[f"http {status}"] += 1
            if status != 200:
                assert status in (429, 503), said
                assert int(head.partition("retry-after: ")[2].split()[0]) >= 1 and said["error"]["retry_after"] > 0
                await asyncio.sleep(min(1.0, said["error"]["retry_after"]))
        writer.close()

    async def over_websocket(port: int) -> None:
        async with connect_async(f"ws://127.0.0.1:{port}/v1/ws", open_timeout=LIMIT) as line:
            for seq in range(each):
                began = time.monotonic()
                await line.send(pack(look(seq)))
                said = unpack(await line.recv(decode=False))
                waits["ok" if said["type"] == "chunk" else "refused"].append(time.monotonic() - began)
                counts[f"websocket {said.get('error', said).get('code', 'ok')}"] += 1
                if said["type"] != "chunk":
                    assert said["error"]["code"] == "busy" and said["error"]["retry_after"] > 0, said
                    await asyncio.sleep(min(1.0, said["error"]["retry_after"]))

    flags = ("--batch", "1", "--queue", str(queue), "--deadline", str(deadline))
    with started("null:tabletop?ms=100&each=1", *flags) as server:

        async def work() -> None:
            asking = asyncio.gather(*(kind(server.port) for kind in (over_http, over_websocket) for _ in range(clients // 2)))
            while not asking.done():
                seen.append(await asyncio.to_thread(server.metric, "tendon_queue_length"))
                await asyncio.sleep(0.05)
            await asking

        asyncio.run(work())
        assert server.metric("tendon_late_total") == 0, counts
        assert server.metric("tendon_refused_busy_total") == len(waits["refused"])
        assert not server.complaints(), server.log
    accepted = len(waits["ok"])
    print(f"{counts}, at most {max(seen):g} waiting; answered within {max(waits['ok']):.2f} s, "
          f"refused within {np.median(waits['refused']) * 1e3:.0f} to {max(waits['refused']) * 1e3:.0f} ms")  # fmt: skip
    assert accepted + len(waits["refused"]) == clients * each and accepted > 20 and len(waits["refused"]) > 60, counts
    assert max(seen) <= queue
    assert max(waits["ok"]) < deadline + 3.0  # as measured by clients that share their cores with it


def test_a_probe_is_answered_while_the_model_thinks_and_says_when_it_cannot(tmp_path: Path):
    """One server of a model that takes 3 s: before it is warm, at work, and asked to leave."""
    with started("null:tabletop?ms=3000", "--deadline", "30", wait=False) as server:
        status, headers, said = server.get("/readyz")
        assert (status, headers["retry-after"], json.loads(said)) == (503, "1", {"status": "starting"})
        assert server.get("/livez")[0] == 200
        status, headers, _ = ask(server.port, "/v1/act", body())
        assert status == 503 and int(headers["retry-after"]) >= 1
        assert server.get("/v1/info")[0] == 503
        with pytest.raises(ConnectionClosed) as closed, connect(server.address.replace("http", "ws") + "/v1/ws") as line:
            line.send(pack(look()))
            assert unpack(line.recv(LIMIT, decode=False))["error"]["code"] == "unavailable"
            line.close()
            line.recv(LIMIT)
        assert closed.value.rcvd and closed.value.rcvd.code == 1000
        until(lambda: server.get("/readyz")[0] == 200)
        done = threading.Event()
        answer: list[int] = []
        asking = threading.Thread(target=lambda: (answer.append(ask(server.port, "/v1/act", body())[0]), done.set()))
        asking.start()
        until(lambda: server.metric("tendon_queue_length") == 0 and server.metric("tendon_inference_seconds_count") == 0)
        time.sleep(0.3)
        times = []
        for path in ("/livez", "/readyz", "/metrics", "/livez"):
            began = time.monotonic()
            assert server.get(path)[0] == 200
            times.append(time.monotonic() - began)
        assert not done.is_set(), "the model answered before the probe did"
        print("probes in ms:", [round(1e3 * t, 1) for t in times])
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/readyz")[0] == 503)
        assert json.loads(server.get("/readyz")[2])["status"] == "draining" and server.get("/livez")[0] == 200
        status, headers, said = ask(server.port, "/v1/act", body())
        assert status == 503 and headers["retry-after"] and b"draining" in said
        asking.join(LIMIT)
        assert answer == [200] and server.process.wait(LIMIT) == 0
        server.leave = None
        assert not server.complaints(), server.log


# ---------------------------------------------------------------------------------------------------- secrets


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
    "2",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", str(files[0]),
                    "-keyout", str(files[1])], check=True, capture_output=True, timeout=LIMIT)  # fmt: skip
    return files


def test_tls_with_tokens_and_nothing_secret_in_the_log(certificate: tuple[Path, Path], tmp_path: Path):
    """Over TLS, on every address, to users who are known; and what it says of all that holds neither tokens nor frames."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{TOKEN}\nadmin:{ADMIN}\n")
    flags = ("--token-file", tokens, "--certificate", certificate[0], "--key", certificate[1], "--host", "0.0.0.0")
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    marked = FRAME.copy()
    mark = b"a secret that a camera saw "
    marked.reshape(-1)[: 27 * 100] = np.frombuffer(mark * 100, np.uint8)
    words = "instruction of someone who wants privacy"
    with started("null:tabletop", *flags, token=TOKEN) as server:
        assert server.address.startswith("https://")
        url = f"wss://localhost:{server.port}/v1/ws"
        for wrong in (
            {},
            {"authorization": f"Bearer {TOKEN[::-1]}"},
            {"authorization": f"Bearer {TOKEN}", "origin": "https://evil.example"},
        ):
            with pytest.raises(Exception, match="HTTP 40[13]"), connect(url, ssl=trusting, additional_headers=wrong):
                pass
        rng = np.random.default_rng(0)
        with connect(url, ssl=trusting, additional_headers={"authorization": f"Bearer {TOKEN}"}, max_size=None) as line:
            for seq in range(60):
                side = int(rng.choice([8, 64, 300, 900]))
                frame = marked if seq % 4 == 0 else rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
                line.send(pack(look(seq, frame if seq % 3 else encode(frame), instruction=words)))
                assert unpack(line.recv(LIMIT, decode=False))["type"] == "chunk"
            line.send(pack(look(0, encode(marked, "jpeg"), instruction=words)))
            assert unpack(line.recv(LIMIT, decode=False))["error"]["code"] == "stale"
            line.send(pack(look(99, Encoded(mark * 9, "png", 1, 1), instruction=words)))
            assert unpack(line.recv(LIMIT, decode=False))["error"]["code"] == "bad_request"
            line.send(b"\xc1" + mark)
            assert unpack(line.recv(LIMIT, decode=False))["error"]["code"] == "bad_request"
        for path in (f"/v1/info?token={TOKEN}", f"/nowhere/{TOKEN}", "/v1/info"):
            assert server.get(path)[0] in (200, 404)
        with line_to(server.port) as line:  # who does not speak TLS
            line.sendall(request("/v1/info", b"", f"Authorization: Bearer {TOKEN}", method="GET"))
            assert response(line)[0] == 0
        with trusting.wrap_socket(line_to(server.port), server_hostname="localhost") as line:
            for content in (body(encode(marked).data, instruction=words), body(mark * 20, instruction=words), b"{" + mark):
                line.sendall(request("/v1/act", content, f"Authorization: Bearer {TOKEN}"))
                assert response(line)[0] in (200, 422)
            line.sendall(request("/v1/swap", b'{"policy": "null:nowhere"}', f"Authorization: Bearer {TOKEN}"))
            assert response(line)[0] == 403
            line.sendall(request("/v1/swap", b'{"policy": "null:nowhere"}', f"Authorization: Bearer {ADMIN}"))
            assert response(line)[0] == 422
            line.sendall(b"BROKEN " + TOKEN.encode() + b" \r\n\r\n")
            assert response(line)[0] == 400
        os.kill(server.model, signal.SIGKILL)  # what it says of a lost model, too
        until(lambda: server.metric("tendon_backend_restarts_total"))
        until(lambda: server.get("/readyz")[0] == 200)
        assert not server.complaints(but="started again"), server.log
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT) == 0
        server.leave, log = None, server.log_file.read_bytes()
    secrets = [
        TOKEN.encode(),
        ADMIN.encode(),
        mark[:12],
        base64.b64encode(mark * 3)[8:30],
        words.encode(),
        PNG.data[40:60],
        b"Bearer",
    ]
    assert b"ready" in log and not [secret for secret in secrets if secret in log], log


def test_a_certificate_that_is_none_is_said_before_anything_listens(tmp_path: Path, certificate: tuple[Path, Path]):
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for flags in (["--certificate", broken, "--key", certificate[1]], ["--certificate", certificate[0]],
                  ["--certificate", certificate[0], "--key", tmp_path / "nowhere"]):  # fmt: skip
        command = [os.sys.executable, "-m", "vla.cli", "serve", "null:tabletop", "--port", "0", *map(str, flags)]  # pyright: ignore
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 2 and "TLS" in done.stderr and "Traceback" not in done.stderr, done.stderr
