"""HTTP routes over one station (`serve/station.py`), and how its server starts and ends.

GET  /                              the operator's page
GET  /v1/station                    what goes on
GET  /v1/station/events?after=N     what happens, as server-sent events
GET  /v1/station/frame/CAMERA       the newest picture; with after=S the first newer one, if it comes within two seconds
POST /v1/station/run, say, answer, hand_back, stop
GET  /livez

Nothing here waits for the robot, and the robot for nothing here: events and pictures are fetched from a board that forgets.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import Field
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from serve.gate import Gate, Tokens, check_bind, refusal_response
from serve.page import operator
from serve.patience import PatientHTTP
from serve.refusal import Refusal
from serve.server import Leaving, bound
from serve.station import Station
from serve.wires.rest import model_of
from vla.config import Config
from vla.errors import VLAError

logger = logging.getLogger(__name__)

_BODY = 1 << 20
"""Bytes of a request."""
_POLL = 0.05
"""Seconds between two looks at the board."""
_AT_ONCE = 200
"""Events of one write."""
_QUIET = 5.0
"""Seconds after which a stream that has nothing to say says so."""
_PICTURE = 2.0
"""Seconds a newer picture is waited for."""
_CONNECTIONS = 64


class RunBody(Config):
    goal: str
    scene: int | None = Field(default=None, ge=0, le=2**31 - 1)


class SayBody(Config):
    words: str


class AnswerBody(Config):
    question: int
    answer: str
    instruction: str = ""


class Nothing(Config):
    """{}"""


@dataclass(frozen=True)
class Where:
    """Where a station listens, and to whom."""

    host: str = "127.0.0.1"
    port: int = 8010
    token_file: Path | None = None
    origins: tuple[str, ...] = ()


def build_app(station: Station, tokens: Tokens, origins: tuple[str, ...] = ()) -> Starlette:
    """The ASGI application. The station is started and closed by whoever runs it."""

    async def livez(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def snapshot(request: Request) -> Response:
        return JSONResponse(station.snapshot(), headers=_FRESH)

    async def events(request: Request) -> Response:
        after = _number(request, "after", request.headers.get("last-event-id", "0"))
        headers = {**_FRESH, "x-accel-buffering": "no"}
        return StreamingResponse(_events(station, after), headers=headers, media_type="text/event-stream")

    async def frame(request: Request) -> Response:
        camera, after = request.path_params["camera"], _number(request, "after", "-1")
        if camera not in station.guard.robot.cameras:
            raise Refusal("not_found", where="camera", found=repr(camera)[:60], expected=", ".join(station.guard.robot.cameras),
                          fix="name one of these")  # fmt: skip
        end = asyncio.get_running_loop().time() + _PICTURE
        while True:
            station.board.wanted()
            shown = station.board.shown(camera)
            if shown and shown != after:
                break
            if after < 0 or station.board.closed or asyncio.get_running_loop().time() >= end or await request.is_disconnected():
                return Response(status_code=204, headers=_FRESH)
            await asyncio.sleep(_POLL / 2)
        newest = await asyncio.to_thread(station.board.picture, camera)
        assert newest is not None
        return Response(newest[1], headers={**_FRESH, "x-frame": str(newest[0])}, media_type="image/jpeg")

    def post(name: str, model: Any, work: Callable[[Any], dict[str, Any]]) -> Route:
        async def answer(request: Request) -> Response:
            body = await model_of(request, model)
            return JSONResponse(await asyncio.to_thread(work, body), headers=_FRESH)

        return Route(f"/v1/station/{name}", answer, methods=["POST"])

    routes: list[BaseRoute] = [
        Route("/livez", livez), Route("/v1/station", snapshot), Route("/v1/station/events", events),
        Route("/v1/station/frame/{camera}", frame),
        post("run", RunBody, lambda body: station.run(body.goal, body.scene)),
        post("say", SayBody, lambda body: station.say(body.words)),
        post("answer", AnswerBody, lambda body: station.answer(body.question, body.answer, body.instruction)),
        post("hand_back", Nothing, lambda body: station.hand_back()),
        post("stop", Nothing, lambda body: station.stop()),
        *operator(),
    ]  # fmt: skip
    gate = Middleware(
        Gate, tokens=tokens, body=_BODY, origins=origins, most=_CONNECTIONS, always=("/v1/station/stop",),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    return Starlette(routes=routes, middleware=[gate],
                     exception_handlers={VLAError: _refused, 404: _unknown, 405: _method, 500: _broken})  # fmt: skip


_FRESH = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


async def _events(station: Station, after: int) -> AsyncIterator[str]:
    """Each event from `after` on, as far as it is remembered. Whoever reads slowly is written to slowly, and misses some."""
    board, loop = station.board, asyncio.get_running_loop()
    said = loop.time()
    yield "retry: 1000\n\n"
    if after > board.last:  # of a station before this one
        after = 0
    while True:
        closed = board.closed
        found = board.after(after)
        if found := found[:_AT_ONCE]:
            after, said = found[-1]["number"], loop.time()
            yield "".join(f"id: {event['number']}\ndata: {json.dumps(event, separators=(',', ':'), allow_nan=False)}\n\n"
                          for event in found)  # fmt: skip
        elif closed:
            return
        elif loop.time() - said >= _QUIET:
            said = loop.time()
            yield ": still here\n\n"
        await asyncio.sleep(_POLL)


def _number(request: Request, name: str, default: str) -> int:
    text = request.query_params.get(name, default)
    if not (text.removeprefix("-").isascii() and text.removeprefix("-").isdigit() and len(text) < 18):
        raise Refusal("bad_request", where=name, found=repr(text)[:40], expected="a whole number", fix=f"{name}=0")
    return int(text)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, VLAError)
    refusal = Refusal.of(error)
    return JSONResponse(refusal.to_json(), 400) if refusal.code == "bad_request" else refusal_response(refusal)


async def _unknown(request: Request, error: Exception) -> Response:
    return refusal_response(Refusal("not_found", where="path", found=request.scope["path"][:80], expected="a route",
                                    fix="docs/operating.md has them"))  # fmt: skip


async def _method(request: Request, error: Exception) -> Response:
    allowed = getattr(error, "headers", None) or {}
    said = Refusal("bad_request", where="method", found=request.method, expected=allowed.get("Allow", "another"),
                   fix="docs/operating.md has them")  # fmt: skip
    return JSONResponse(said.to_json(), 405, allowed)


async def _broken(request: Request, error: Exception) -> Response:
    return refusal_response(Refusal("internal", found=type(error).__name__, expected="an answer", fix="see the station's log"))


# ---------------------------------------------------------------------------------------------------- running


class _Server(Leaving):
    """Ends the run first, with the robot still."""

    def __init__(self, config: uvicorn.Config, station: Station) -> None:
        super().__init__(config)
        self._station = station

    async def finish(self) -> None:
        await asyncio.to_thread(self._station.close)
        await asyncio.sleep(2 * _POLL)  # streams find that there is nothing more to say


async def serve(station: Station, where: Where, ready: Callable[[str], None] | None = None) -> None:
    """Until SIGTERM or SIGINT. `ready(address)` is called once it listens. Raises `UsageError` for an address or tokens that
    will not do."""
    tokens = Tokens.read(where.token_file) if where.token_file else Tokens()
    check_bind(where.host, tokens, "vla operate")
    http = type("HTTP", (PatientHTTP,), {"most": 2 * _CONNECTIONS})
    config = uvicorn.Config(
        build_app(station, tokens, where.origins), http=http, lifespan="off", log_config=None, access_log=False,  # pyright: ignore
        timeout_keep_alive=75, timeout_graceful_shutdown=2, server_header=False, ws="none",
    )  # fmt: skip
    server = _Server(config, station)
    listening = bound(where.host, where.port, "vla operate")
    serving = asyncio.create_task(server.serve([listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if ready is not None and server.started:
        host, port = listening.getsockname()[:2]
        ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    await serving
