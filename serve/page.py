"""The pages at `/`, of a server and of a station: files of `serve/web/`, as they are, with headers that let them do nothing but
talk to where they came from.

Who may see it is the gate's business (`serve/gate.py`): a browser asks its user for a token, as the password of any name, and
sends it along with what the page fetches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
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
"""Path -> (file, type), of a server's page. Nothing else is ever opened, whatever a path says."""
OPERATOR = {
    "/": ("operator.html", "text/html; charset=utf-8"),
    "/operator.js": ("operator.js", "text/javascript; charset=utf-8"),
    "/operator_views.js": ("operator_views.js", "text/javascript; charset=utf-8"),
    "/operator.css": ("operator.css", "text/css; charset=utf-8"),
    "/page.css": FILES["/page.css"],
}
"""Of a station's page."""

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
    """Of a server's page. The files are read here, once."""
    return _routes(FILES)


def operator() -> list[BaseRoute]:
    """Of a station's page."""
    return _routes(OPERATOR)


def _routes(files: Mapping[str, tuple[str, str]]) -> list[BaseRoute]:
    return [_route(path, (HERE / name).read_bytes(), kind) for path, (name, kind) in files.items()]


def _route(path: str, content: bytes, kind: str) -> Route:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    async def send(request: Request) -> Response:
        headers = HEADERS | {"etag": tag}
        known = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
        if tag in known:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers | {"content-type": kind})

    return Route(path, send)
