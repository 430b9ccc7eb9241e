"""What stands before every route: who is asking, from which page, and how much. Pure ASGI, so WebSockets pass it as well.

Every path but `/livez` needs a token where there are tokens: `Authorization: Bearer T` (or `Api-Key T`, as openpi's client says
it, or Basic with the token as password, which is what a browser asks its user for), or `X-API-Key: T`. Compared in constant time.
Without tokens a server listens on loopback only, and answers only to loopback's names: a page elsewhere cannot rebind its own.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.patience import ROOM
from serve.refusal import Refusal, unavailable
from vla.errors import UsageError

OPEN = frozenset({"/livez"})
"""The only paths that ask nobody who they are."""
BODY_SECONDS = 15.0
"""A request's body must have come by then."""


@dataclass(frozen=True)
class Tokens:
    """Who may come in: digests, so that neither a log nor a traceback can show a token."""

    users: tuple[bytes, ...] = ()
    admins: tuple[bytes, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """One token a line, `admin:` before those that may swap policies, `#` before comments. Raises `UsageError`."""
        try:
            lines = [line.strip() for line in path.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(path, found=str(error), expected="a file of tokens", fix="--token-file FILE") from error
        kept = [line for line in lines if line and not line.startswith("#")]
        admins = [line.removeprefix("admin:") for line in kept if line.startswith("admin:")]
        users = [line for line in kept if not line.startswith("admin:")]
        if not kept or any(len(token) < 16 or not token.isascii() or " " in token for token in users + admins):
            raise UsageError(path, found=f"{len(kept)} tokens, or a short one", expected="at least one of 16 characters or more",
                             fix="python -c 'import secrets; print(secrets.token_urlsafe(32))' > FILE")  # fmt: skip
        return cls(tuple(map(_digest, users)), tuple(map(_digest, admins)))

    def __bool__(self) -> bool:
        return bool(self.users or self.admins)

    def role(self, token: str | None) -> str | None:
        """`admin`, `user` or None. Every known token is compared, however soon one fits."""
        given = _digest(token or "")
        user = [hmac.compare_digest(given, one) for one in self.users]
        admin = [hmac.compare_digest(given, one) for one in self.admins]
        return "admin" if any(admin) else "user" if any(user) else None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def token_of(headers: Mapping[str, str]) -> str | None:
    """The token a request carries, wherever."""
    scheme, _, rest = headers.get("authorization", "").partition(" ")
    if scheme.lower() in ("bearer", "api-key"):
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return None
    return headers.get("x-api-key")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_here(host: str) -> bool:
    """Whether a request for it means this machine. 0.0.0.0 is what clients of OpenVLA's and openpi's servers say by default;
    no name can be made to mean it by others, so a page elsewhere gains nothing."""
    return is_loopback(host) or host == "0.0.0.0"


@dataclass
class Gate:
    """ASGI middleware. See the module."""

    app: ASGIApp
    tokens: Tokens = field(default_factory=Tokens)
    body: int = 32 << 20
    """Bytes of a request's body."""
    origins: Iterable[str] = ()
    most: int = 256
    """WebSockets and requests at once."""
    always: Iterable[str] = ()
    """Paths there is room for all the same: what stops a robot."""
    open: int = 0
    """As many there are."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        role = self.tokens.role(token_of(headers)) if self.tokens else "admin"
        refusal = self._refusal(headers, role)
        if refusal is None and scope["type"] == "http":
            refusal = self._too_large(headers)
        if refusal is None and self.open >= self.most and scope["path"] not in self.always:
            refusal = unavailable(f"{self.open} connections")
        if refusal is not None:
            await refuse(scope, receive, send, refusal)
            return
        scope.setdefault("state", {})["role"] = role
        self.open += 1
        try:
            if scope["type"] == "websocket":
                await self.app(scope, receive, send)
            else:
                await self._bounded(scope, receive, send)
        finally:
            self.open -= 1

    def _refusal(self, headers: Mapping[str, str], role: str | None) -> Refusal | None:
        host = _part(f"//{headers.get('host', '')}", lambda parts: parts.hostname)
        if host is None:
            return Refusal("bad_request", where="Host", found=repr(headers.get("host"))[:80], expected="a name or an address",
                           fix="leave it to your HTTP library")  # fmt: skip
        if not self.tokens and not is_here(host):
            return Refusal("forbidden", where="Host", found=repr(host)[:80], expected="localhost, where a server has no tokens",
                           fix="--token-file FILE")  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and _part(origin, lambda parts: parts.netloc) != headers.get("host"):
            return Refusal("forbidden", where="Origin", found=repr(origin)[:80], expected="this server's own page",
                           fix="--origin, for a page you trust")  # fmt: skip
        if role is None:
            return Refusal("unauthorized", where="Authorization", found="no token, or an unknown one", expected="Bearer TOKEN",
                           fix="send one of the server's tokens")  # fmt: skip
        return None

    def _too_large(self, headers: Mapping[str, str]) -> Refusal | None:
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and len(length) < 20 and int(length) <= self.body:
            return None
        return _large(self.body, f"{length[:20]} bytes")

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A body of any length that never says so is cut off as well, and one that never comes."""
        got, answered, ended = 0, False, False
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        async def bounded() -> Message:
            nonlocal got, ended
            if ended:
                return await receive()  # only a disconnect can follow
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise Refusal("bad_request", where="body", found=f"none within {BODY_SECONDS:g} s", expected="a whole request",
                              fix="send it at once") from None  # fmt: skip
            ended, new = not message.get("more_body", False), len(message.get("body", b""))
            if got + new > self.body:
                raise _large(self.body, "more bytes")
            if not ROOM.take(new):
                raise Refusal("busy", where="body", found="too many large ones at once", expected="room", fix="try again",
                              retry_after=1.0)  # fmt: skip
            got += new
            return message

        async def watched(message: Message) -> None:
            nonlocal answered
            answered = answered or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, bounded, watched)
        except Refusal as refusal:
            if answered:
                raise
            await refuse(scope, receive, send, refusal)
        except ClientDisconnect:  # in the middle of its body: nobody is left to hear of it
            pass
        finally:
            ROOM.give(got)


def _part(url: str, part: Callable[[SplitResult], str | None]) -> str | None:
    """Empty where it says none; None when it is no address at all."""
    try:
        return part(urlsplit(url)) or ""
    except ValueError:
        return None


def _large(most: int, found: str) -> Refusal:
    return Refusal("too_large", where="body", found=found, expected=f"at most {most:,} bytes", fix="send smaller pictures")


async def refuse(scope: Scope, receive: Receive, send: Send, refusal: Refusal) -> None:
    """Answer with a refusal, on HTTP or before a WebSocket opens."""
    response = refusal_response(refusal)
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})
        return
    await response(scope, receive, send)


def refusal_response(refusal: Refusal) -> JSONResponse:
    """With the headers its status wants."""
    headers = {}
    if refusal.retry_after is not None:
        headers["retry-after"] = str(max(1, round(refusal.retry_after + 0.499)))
    response = JSONResponse(refusal.to_json(), refusal.status, headers)
    if refusal.code == "unauthorized":  # a line each: Chromium takes two in one line for a single scheme that it does not know
        response.headers.append("www-authenticate", "Bearer")
        response.headers.append("www-authenticate", 'Basic realm="tendon: the token is the password", charset="UTF-8"')
    return response


def check_bind(host: str, tokens: Any, what: str = "vla serve") -> None:
    """Raise `UsageError` for a server that everyone could reach and nobody has to prove anything to."""
    if not tokens and not is_loopback(host):
        raise UsageError(what, found=f"--host {host} without tokens", expected="loopback, or a token",
                         fix="--token-file FILE, or leave --host out")  # fmt: skip
