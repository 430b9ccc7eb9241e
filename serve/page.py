"""The page at `/`: three files of `serve/web/`, as they are, with headers that let them do nothing but talk to this server.

Who may see it is the gate's business (`serve/gate.py`): a browser asks its user for a token, as the password of any name, and
sends it along with what the page fetches.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

HERE = Path(__file__).parent / "web"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
"""Path -> (file, type). Nothing else is ever opened, whatever a path says."""

# A word of a stranger that became HTML after all could run nothing, load nothing and send nothing anywhere else; the browser
# itself refuses to make HTML of text (trusted types), and to show the page inside another one.
POLICY = "; ".join([
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' blob: data:", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
])  # fmt: skip
HEADERS = {
    "content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    # Kept by the browser, not by what stands between, and asked about each time: a new server has a new page at once.
    "cache-control": "private, no-cache",
}  # fmt: skip


def routes() -> list[BaseRoute]:
    """Of the page. The files are read here, once."""
    return [_route(path, (HERE / name).read_bytes(), kind) for path, (name, kind) in FILES.items()]


def _route(path: str, content: bytes, kind: str) -> Route:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    async def send(request: Request) -> Response:
        headers = HEADERS | {"etag": tag}
        known = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
        if tag in known:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers | {"content-type": kind})

    return Route(path, send)
