"""JSON over HTTP from a planner's side: it ends in time whatever the other end does, and what comes back is read strictly.

    status, said = post_json("http://gpu-box:8000/v1/chat/completions", {"model": ...}, timeout=5.0)

No redirects are followed and no proxies asked: the address is what it says. Needs the standard library alone.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import socket
import ssl
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serve.reading import read_json
from serve.refusal import Refusal
from serve.wire import Limits
from vla.errors import UsageError, VLAError

logger = logging.getLogger(__name__)

ANSWER = 1 << 20
"""Bytes of an answer: far more than any plan."""


def post_json(
    url: str, body: Any, *, headers: Mapping[str, str] | None = None, timeout: float = 10.0, most: int = ANSWER,
    tls: ssl.SSLContext | None = None,
) -> tuple[int, Any]:  # fmt: skip
    """(HTTP status, the JSON that came with it), within `timeout` s all in all, but for the time a name takes to be looked up.

    Raises `Refusal`: `unavailable`, `late`, or `bad_answer` for what is no JSON or more than `most` bytes.
    """
    parts = urlsplit(check_url(url))
    kind = http.client.HTTPConnection
    options: dict[str, Any] = {"timeout": timeout}
    if parts.scheme == "https":
        kind, options["context"] = http.client.HTTPSConnection, tls or ssl.create_default_context()
    connection = kind(parts.hostname or "", parts.port, **options)
    over = threading.Event()
    opened: list[socket.socket] = []  # the connection itself forgets its socket once it is told that it will be closed

    def end() -> None:
        over.set()
        for one in (*opened, connection.sock):
            try:
                if one is not None:
                    one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    timer = threading.Timer(timeout, end)  # a server that says a byte now and then never times out by itself
    timer.daemon = True
    timer.start()
    try:
        data = json.dumps(body).encode()
        sent = {"Content-Type": "application/json", "Accept": "application/json", **(headers or {})}
        connection.connect()
        opened.append(connection.sock)
        if over.is_set():
            raise TimeoutError
        connection.request("POST", parts.path or "/", data, sent)
        answer = connection.getresponse()
        content = answer.read(most + 1)
    except (OSError, http.client.HTTPException) as error:
        if over.is_set() or isinstance(error, TimeoutError):
            raise Refusal("late", where=url, found=f"no answer within {timeout:g} s", expected="an answer in time",
                          fix="look at the network and the server, or allow more") from None  # fmt: skip
        raise Refusal("unavailable", where=url, found=f"{type(error).__name__}: {error}"[:300], expected="a server",
                      fix="start it, or look at the address", retry_after=1.0) from None  # fmt: skip
    finally:
        timer.cancel()
        connection.close()
    if over.is_set():  # what was read may be a part
        raise Refusal("late", where=url, found=f"no whole answer within {timeout:g} s", expected="an answer in time",
                      fix="look at the network and the server, or allow more")  # fmt: skip
    if len(content) > most:
        raise Refusal("bad_answer", where=url, found=f"more than {most:,} bytes", expected="a plan", fix="look at the server")
    try:
        return answer.status, read_json(content, limits=Limits(message=most))
    except VLAError as error:
        if answer.status != 200:
            return answer.status, content[:300].decode(errors="replace")
        raise Refusal("bad_answer", where=url, found=error.found, expected="JSON", fix="look at the server") from None


def check_url(url: str) -> str:
    """`url`, if it is one of HTTP with nothing secret in it. Raises `UsageError`."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError("address", found=str(error), expected="http://HOST:PORT/...", fix="look at the address") from None
    secret = "@" in parts.netloc or parts.query or parts.fragment
    if parts.scheme not in ("http", "https") or not parts.hostname or secret or port == 0 or not url.isascii() or " " in url:
        raise UsageError("address", found="a query or a password" if secret else repr(url)[:80], expected="http://HOST:PORT/...",
                         fix="the key goes into a file")  # fmt: skip
    return url


def bearer(key: str | Path | None, url: str, name: str = "key") -> dict[str, str]:
    """The header that carries a token, or what the first line of a file holds, to `url`. Raises `UsageError`; never shows it.
    `name`: what it is called in messages."""
    if isinstance(key, Path):
        try:
            found = [line.strip() for line in key.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(key, found=type(error).__name__, expected="a file with a key in it", fix="write one") from None
        key = next((line.removeprefix("admin:") for line in found if line and not line.startswith("#")), "")
        if not key:
            raise UsageError("key", found="an empty file", expected="the key in its first line", fix="write it there")
    if key is None:
        return {}
    if not (key.isascii() and key.isprintable() and key and " " not in key):
        raise UsageError(name, found=f"characters that no {name} has", expected="one line of ASCII", fix="look at the file")
    scheme, host = urlsplit(url).scheme, urlsplit(url).hostname or ""
    if scheme in ("http", "ws") and host not in ("localhost", "::1") and not host.startswith("127."):
        logger.warning("%s: whoever listens on the network can read the %s; %ss:// hides it", url, name, scheme)
    return {"Authorization": f"Bearer {key}"}


def check_timeout(seconds: float, where: str) -> float:
    """`seconds`, if they are some. Raises `UsageError`."""
    if not (seconds > 0 and math.isfinite(seconds)):
        raise UsageError(where, found=seconds, expected="seconds, more than 0", fix="10")
    return seconds
