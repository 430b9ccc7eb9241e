"""Who comes in: every route but `/livez` asks for a token, wherever it may stand; pages from elsewhere do not; bounds hold."""

from __future__ import annotations

import argparse
import asyncio
import base64
import hmac
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from children import LIMIT
from starlette.routing import Route, WebSocketRoute

from serve import command
from serve import gate as gates
from serve.backend import ThreadBackend
from serve.engine import Engine
from serve.gate import Gate, Tokens, check_bind, is_here, token_of
from serve.patience import ROOM, Room
from serve.refusal import STATUS, Refusal
from serve.server import build_app
from serve.service import Service
from serve.settings import ServeSettings
from vla.errors import UsageError

USER, ADMIN, WRONG = "user-token-0123456789", "admin-token-0123456789", "wrong-token-0123456789"


@pytest.fixture()
def tokens(tmp_path: Path) -> Tokens:
    path = tmp_path / "tokens"
    path.write_text(f"# who may come in\n{USER}\n\nadmin:{ADMIN}\nanother-token-0123456789\n")
    return Tokens.read(path)


def service(**settings: Any) -> Service:
    """Whose engine was not started: what lies behind the gate is not asked here, or says 503."""
    return Service(Engine(lambda: ThreadBackend.start({"policy": "null:tabletop"})), ServeSettings(**settings))


async def ask(
    app: Any, path: str, headers: Mapping[str, str] | None = None, *, method: str = "GET", kind: str = "http",
    body: list[bytes] | None = None, host: str | None = "localhost", forever: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """What an ASGI app sends. With `forever` the last part of the body says that more comes, and none does."""
    given = [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in (headers or {}).items()]
    given += [] if host is None else [(b"host", host.encode("latin-1"))]
    scope = {"type": kind, "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
             "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": given, "client": ("127.0.0.1", 1),
             "server": ("127.0.0.1", 80), "subprotocols": [], "extensions": {"websocket.http.response": {}}}  # fmt: skip
    parts = body if body is not None else [b""]
    coming: list[Any] = [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts) or forever}
                         for i, part in enumerate(parts)]  # fmt: skip
    if kind == "websocket":
        coming = [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1001}]
    said: list[dict[str, Any]] = []

    async def receive() -> Any:
        return coming.pop(0) if coming else await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        said.append(message)

    await asyncio.wait_for(app(scope, receive, send), LIMIT)
    return said


def status(said: list[dict[str, Any]]) -> int:
    """Of a response; 101 for a WebSocket that was accepted, 403 for one that was closed before."""
    first = said[0]
    return {"websocket.accept": 101, "websocket.close": 403}.get(first["type"]) or first["status"]


def headers_of(said: list[dict[str, Any]]) -> dict[str, str]:
    return {k.decode(): v.decode() for k, v in said[0]["headers"]}


def error_of(said: list[dict[str, Any]]) -> dict[str, Any]:
    return json.loads(b"".join(m.get("body", b"") for m in said[1:]))["error"]


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(), LIMIT)

    asyncio.run(bounded())


# ---------------------------------------------------------------------------------------------------- tokens


def test_every_route_is_walked_and_asks_for_a_token(tokens: Tokens):
    async def work() -> None:
        app, walked = build_app(service(), tokens), set[str]()
        for route in app.routes:
            assert isinstance(route, (Route, WebSocketRoute)), f"{route}: a kind of route this walk does not know"
            kind = "http" if isinstance(route, Route) else "websocket"
            for method in sorted(route.methods or ()) if isinstance(route, Route) else ["GET"]:
                walked.add(f"{kind} {method} {route.path}")
                answers = [status(await ask(app, route.path, asked, method=method, kind=kind)) for asked in (
                    {}, {"authorization": f"Bearer {WRONG}"}, {"authorization": f"Bearer {USER}"})]  # fmt: skip
                if route.path == "/livez":
                    assert answers == [200, 200, 200]
                else:
                    assert answers[:2] == [401, 401], (route.path, method, answers)
                    assert (answers[2] == 403) == (route.path == "/v1/swap") and answers[2] != 401, (route.path, method, answers)
        assert {"http GET /livez", "http GET /metrics", "http GET /openapi.json", "http POST /v1/act", "http POST /v1/swap",
                "http POST /act", "http POST /v1/plan", "http POST /plan", "http POST /v1/ask", "http GET /",
                "websocket GET /v1/ws", "websocket GET /openpi",
                "websocket GET /vla-eval"} <= walked  # fmt: skip

    run(work)


@pytest.mark.parametrize("path", ["/livez/", "//livez", "/LIVEZ", "/livez/../v1/info", "/livez%2e", "/livez?", "/nothing", ""])
def test_no_other_spelling_comes_in_for_the_open_one(tokens: Tokens, path: str):
    async def work() -> None:
        app = build_app(service(), tokens)
        assert status(await ask(app, path)) == status(await ask(app, path, kind="websocket")) == 401
        said = await ask(app, "/livez", kind="websocket")  # open, but no WebSocket
        assert status(said) in (403, 404)

    run(work)


@pytest.mark.parametrize("form", [
    {"authorization": f"Bearer {USER}"}, {"Authorization": f"bearer  {USER} "}, {"authorization": f"Api-Key {USER}"},
    {"x-api-key": USER}, {"authorization": "Basic " + base64.b64encode(f"anybody:{USER}".encode()).decode()},
])  # fmt: skip
def test_a_token_may_stand_in_several_places(tokens: Tokens, form: dict[str, str]):
    assert tokens.role(token_of({k.lower(): v for k, v in form.items()})) == "user"


@pytest.mark.parametrize("form", [
    {}, {"authorization": ""}, {"authorization": USER}, {"authorization": "Bearer"}, {"authorization": "Bearer "},
    {"authorization": f"Bearer {USER}x"}, {"authorization": f"Bearer {USER[:-1]}"}, {"authorization": f"Bearer {USER.upper()}"},
    {"authorization": f"Bearer {USER}, {USER}"}, {"authorization": "Basic ***"}, {"authorization": "Basic " + "A" * 5},
    {"authorization": "Basic " + base64.b64encode(b"\xff\xfe:\xff").decode()}, {"x-api-key": ""}, {"x-api-key": f"admin:{ADMIN}"},
    {"authorization": "Basic " + base64.b64encode(USER.encode()).decode()}, {"cookie": f"token={USER}"},
    {"authorization": "Bearer \xff\xfe\x80"}, {"authorization": "Digest " + USER}, {"authorization": "Bearer " + "a" * 50_000},
])  # fmt: skip
def test_what_is_no_token_is_none(tokens: Tokens, form: dict[str, str]):
    assert tokens.role(token_of(form)) is None


def test_every_known_token_is_compared_however_soon_one_fits(tokens: Tokens, monkeypatch: pytest.MonkeyPatch):
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(gates.hmac, "compare_digest", lambda a, b: (compared.append((a, b)), real(a, b))[1])
    for token, role in ((USER, "user"), (ADMIN, "admin"), (WRONG, None), ("", None)):
        compared.clear()
        assert tokens.role(token) == role
        assert len(compared) == 3 and all(len(a) == len(b) == 32 for a, b in compared)  # digests, not what was sent


def test_neither_a_digest_nor_a_file_shows_a_token(tokens: Tokens):
    assert USER not in repr(tokens) and ADMIN not in repr(tokens)


@pytest.mark.parametrize("text", [
    "", "# only a comment\n", "tiny-secret\n", "with a space inside it\n", "päss-wörter-0123456789\n", f"{USER}\nadmin:x\n",
])  # fmt: skip
def test_files_that_hold_no_good_tokens_are_refused_without_showing_them(tmp_path: Path, text: str):
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(UsageError) as wrong:
        Tokens.read(path)
    assert not any(line and line in str(wrong.value) for line in text.splitlines())
    with pytest.raises(UsageError):
        Tokens.read(tmp_path / "nowhere")


def test_only_admins_swap(tokens: Tokens):
    async def work() -> None:
        app, body = build_app(service(), tokens), [json.dumps({"policy": "null:tabletop"}).encode()]
        for token, expected in ((USER, 403), (ADMIN, 403)):  # without a starter nobody may
            said = await ask(app, "/v1/swap", {"authorization": f"Bearer {token}", "content-type": "application/json"},
                             method="POST", body=body)  # fmt: skip
            assert status(said) == expected
            assert error_of(said)["where"] == {USER: "token", ADMIN: "swap"}[token]

    run(work)


# ---------------------------------------------------------------------------------------------------- pages and names


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "robot.example", "127.0.0.1.example", "localhost.example", ""])
def test_a_public_address_without_a_token_is_refused(host: str, tokens: Tokens):
    with pytest.raises(UsageError, match="--token-file"):
        check_bind(host, Tokens())
    check_bind(host, tokens)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]"])
def test_loopback_needs_none(host: str):
    check_bind(host, Tokens())


def test_a_public_address_without_a_token_never_listens():
    done = subprocess.run([sys.executable, "-m", "vla.cli", "serve", "null:tabletop", "--host", "0.0.0.0", "--port", "0"],
                          capture_output=True, text=True, timeout=LIMIT)  # fmt: skip
    assert done.returncode == 2 and "--token-file" in done.stderr and "loading" not in done.stderr


def test_without_tokens_only_names_of_this_machine_are_answered():
    """Who makes a name of his own mean 127.0.0.1 has a page that is allowed to talk to it."""

    async def work() -> None:
        app = build_app(service(), Tokens())
        for host, expected in [("localhost", 200), ("localhost:8000", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200),
                               ("LOCALHOST", 200), ("rebound.example", 403), ("127.0.0.1.example", 403), ("", 403), (None, 403),
                               ("example@localhost.example", 403), ("[", 422), ("[::1", 422), ("a]b", 422)]:  # fmt: skip
            assert status(await ask(app, "/openapi.json", host=host)) == expected, host
            assert status(await ask(app, "/v1/ws", host=host, kind="websocket")) == {200: 101}.get(expected, expected), host
        assert is_here("localhost") and not is_here("example.org")

    run(work)


def test_pages_from_elsewhere_are_refused_before_their_token_is_looked_at(tokens: Tokens):
    async def work() -> None:
        app = build_app(service(origins=("https://console.example",)), tokens)
        mine = {"authorization": f"Bearer {USER}"}
        for origin, expected in [("http://localhost", 200), ("https://console.example", 200), ("https://evil.example", 403),
                                 ("null", 403), ("", 403), ("http://localhost.evil.example", 403), ("http://localhost:1", 403),
                                 ("https://console.example.evil.example", 403), ("http://[", 403), ("file://", 403)]:  # fmt: skip
            for kind, fine in (("http", expected), ("websocket", {200: 101}.get(expected, expected))):
                path = "/openapi.json" if kind == "http" else "/v1/ws"
                assert status(await ask(app, path, mine | {"origin": origin}, kind=kind)) == fine, (origin, kind)
        assert status(await ask(app, "/openapi.json", {"origin": "https://evil.example"})) == 403  # nor does it learn of tokens

    run(work)


# ---------------------------------------------------------------------------------------------------- bounds


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Reads all of a body and says how long it was."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def test_bodies_are_bounded_whatever_their_length_says():
    async def work() -> None:
        gate, left = Gate(echo, body=1000), ROOM.left
        for length, parts, expected in [
            ("1000", [b"a" * 1000], 200), ("1001", [b"a"], 413), ("0", [b"a" * 1001], 413), (None, [b"a" * 600] * 2, 413),
            (None, [b"a" * 500] * 2, 200), ("-1", [b""], 413), ("1e3", [b""], 413), ("9" * 5000, [b""], 413),
            ("\xb2", [b""], 413), ("1_0", [b""], 413), (" 10", [b""], 413),
        ]:  # fmt: skip
            given = {} if length is None else {"content-length": length}
            said = await ask(gate, "/x", given, method="POST", body=parts)
            assert status(said) == expected, (length, expected)
        assert ROOM.left == left

    run(work)


def test_all_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch):
    async def work() -> None:
        monkeypatch.setattr(gates, "ROOM", room := Room(1000))
        gate = Gate(echo, body=1000)
        held = asyncio.create_task(ask(gate, "/x", method="POST", body=[b"a" * 900], forever=True))
        await asyncio.sleep(0.01)
        said = await ask(gate, "/x", method="POST", body=[b"a" * 200])
        assert status(said) == STATUS["busy"] and headers_of(said)["retry-after"] == "1" and room.left == 100
        held.cancel()
        await asyncio.wait([held])
        assert status(await ask(gate, "/x", method="POST", body=[b"a" * 200])) == 200 and room.left == 1000

    run(work)


def test_a_body_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    async def work() -> None:
        monkeypatch.setattr(gates, "BODY_SECONDS", 0.05)
        said = await ask(Gate(echo), "/x", method="POST", body=[b"half"], forever=True)
        assert status(said) == 422 and error_of(said)["where"] == "body"

    run(work)


def test_connections_are_bounded_but_for_the_probe():
    async def work() -> None:
        async def busy(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/livez":
                await echo(scope, receive, send)
            await asyncio.sleep(LIMIT if scope["path"] == "/busy" else 0)

        gate = Gate(busy, most=3)
        held = [asyncio.create_task(ask(gate, "/busy", kind=kind)) for kind in ("http", "websocket", "http")]
        await asyncio.sleep(0.01)
        for kind in ("http", "websocket"):
            said = await ask(gate, "/x", kind=kind)
            assert status(said) == 503 and headers_of(said)["retry-after"] == "1"
        assert status(await ask(gate, "/livez")) == 200
        for one in held:
            one.cancel()
        await asyncio.wait(held)
        assert gate.open == 0

    run(work)


def test_refusals_say_what_their_status_wants():
    for code, wanted in STATUS.items():
        refusal = Refusal(code, found="x", expected="y", fix="z", retry_after=0.2 if code in ("busy", "unavailable") else None)
        response = gates.refusal_response(refusal)
        assert response.status_code == wanted
        assert ("retry-after" in response.headers) == (code in ("busy", "unavailable"))
        assert ("www-authenticate" in response.headers) == (code == "unauthorized")


def test_the_audit_log_of_a_server_keeps_what_it_was_told(tmp_path: Path):
    parser = argparse.ArgumentParser()
    command.add_serve_parser(parser.add_subparsers())
    settings = command.settings_of(parser.parse_args(["serve", "null:tabletop", "--audit", str(tmp_path), "--audit-keep", "2"]))
    kept = Service(Engine(lambda: ThreadBackend.start({"policy": "null:tabletop"})), settings)
    assert (kept.audit.keep, kept.audit.max_bytes) == (2, 64 << 20)
    kept.audit.close()
