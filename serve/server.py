"""HTTP and WebSocket routes over one engine, and how a server starts, drains and ends.

GET  /livez            alive; asks nobody who they are, never waits
GET  /readyz           200 when the policy is loaded and warm, 503 before, while it restarts and while draining
GET  /metrics          Prometheus
GET  /openapi.json     what is here
GET  /                 a page to try the policy on
GET  /v1/info          policy, robots (cameras, state, actions, units, limits), chunk, protocol
POST /v1/act           one look as JSON -> one chunk
POST /v1/plan          what to do next (also /plan)
POST /v1/ask           a question in words about a picture, to the policy
POST /v1/chat/completions  either of them, for clients of OpenAI's protocol (GET /v1/models)
POST /v1/swap          another policy, without dropping accepted work (admin tokens)
WS   /v1/ws            our own wire: serve/wires/websocket.py
and /act (OpenVLA, OFT), /openpi, /vla-eval, GR00T's ZeroMQ on a port of its own: serve/wires/
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from serve.engine import EngineOptions
from serve.gate import Gate, Tokens, check_bind, refusal_response
from serve.openapi import document
from serve.page import routes as page
from serve.patience import PatientHTTP
from serve.planning import Planning
from serve.refusal import Refusal
from serve.service import Service
from serve.settings import ServeSettings
from serve.sockets import FastWebSocket
from serve.wires import chat, gr00t, openpi, openvla, planning, rest, vla_eval, websocket
from vla.errors import UsageError, VLAError

logger = logging.getLogger(__name__)


def build_app(service: Service, tokens: Tokens) -> Starlette:
    """The ASGI application. The engine is started and stopped by whoever runs it (`run`, `serve/ray_app.py`)."""

    async def livez(request: HTTPRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(request: HTTPRequest) -> Response:
        engine = service.engine
        headers = {} if engine.ready else {"retry-after": "1"}
        return JSONResponse({"status": "draining" if engine.draining else engine.state}, 200 if engine.ready else 503, headers)

    async def metrics(request: HTTPRequest) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(request: HTTPRequest) -> Response:
        return JSONResponse(document())

    plans = Planning(service)
    routes: list[BaseRoute] = [
        Route("/livez", livez), Route("/readyz", readyz), Route("/healthz", readyz), Route("/metrics", metrics),
        Route("/openapi.json", openapi), *rest.routes(service), *websocket.routes(service), *openvla.routes(service),
        *planning.routes(service, plans), *chat.routes(service, plans), *openpi.routes(service), *vla_eval.routes(service),
        *page(),
    ]  # fmt: skip
    settings = service.settings
    gate = Middleware(
        Gate, tokens=tokens, body=settings.limits.message, origins=settings.origins, most=settings.connections,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    return Starlette(
        routes=routes, middleware=[gate], exception_handlers={VLAError: _refused, 404: _unknown, 405: _method, 500: _broken}
    )


async def _refused(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, VLAError)
    return refusal_response(Refusal.of(error))


async def _unknown(request: HTTPRequest, error: Exception) -> Response:
    return refusal_response(
        Refusal("not_found", where="path", found=request.scope["path"][:80], expected="a route", fix="GET /openapi.json")
    )


async def _method(request: HTTPRequest, error: Exception) -> Response:
    allowed = getattr(error, "headers", None) or {}
    said = Refusal(
        "bad_request", where="method", found=request.method, expected=allowed.get("Allow", "another"), fix="GET /openapi.json"
    )
    return JSONResponse(said.to_json(), 405, allowed)


async def _broken(request: HTTPRequest, error: Exception) -> Response:
    return refusal_response(Refusal("internal", found=type(error).__name__, expected="an answer", fix="see the server's log"))


# ---------------------------------------------------------------------------------------------------- running


class Leaving(uvicorn.Server):
    """uvicorn, but SIGTERM and SIGINT first let `finish` do its work, and the exit code is 0. A second one ends it now."""

    _leaving: asyncio.Task[None] | None = None

    async def finish(self) -> None:
        """Whatever must be over before nobody listens any more; nothing, where nobody says otherwise."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Instead of uvicorn's, which ends the process by the signal once more."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _leave(self) -> None:
        if self._leaving is not None:
            self.should_exit = self.force_exit = True
            return
        self._leaving = asyncio.create_task(self._finish())

    async def _finish(self) -> None:
        try:
            await self.finish()
        finally:
            self.should_exit = True


class Server(Leaving):
    """Finishes what was accepted. Clients on this computer find a second way in: a local socket (docs/results.md)."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._local: asyncio.Server | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, and the local socket, of which `hello` tells (`serve/wires/websocket.py`). Who can reach it can reach the
        port, and the gate stands before both; where the port is encrypted there is none."""
        await super().startup(sockets)
        if not self.started or self.config.is_ssl or not sys.platform.startswith("linux"):  # no names outside the file system
            return

        def connected() -> asyncio.Protocol:
            made: Any = self.config.http_protocol_class
            return made(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

        name, local = f"tendon-{secrets.token_hex(16)}", socket.socket(socket.AF_UNIX)
        try:
            local.bind(f"\0{name}")
            self._local = await asyncio.get_running_loop().create_unix_server(connected, sock=local, backlog=2048)
        except OSError as error:
            logger.info("no local socket: %s", error)
            local.close()
            return
        self._service.local = name

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's; nobody comes by the local socket any more either."""
        self._service.local = ""
        if self._local is not None:
            self._local.close()
        await super().shutdown(sockets)

    async def finish(self) -> None:
        engine, most = self._service.engine, self._service.settings.drain
        logger.info("draining: %d requests to finish, at most %g s", engine.waiting, most)
        if not await engine.drain(most):
            logger.warning("%d requests were not finished in %g s", engine.waiting, most)
            await engine.stop(now=True)
        for pause in (0.05, *[0.0] * 20):  # their answers are on the way out, through a few turns of the loop
            await asyncio.sleep(pause)


def engine_options(settings: ServeSettings) -> EngineOptions:
    """What the engine is told of them."""
    return EngineOptions(queue=settings.queue, batch=settings.batch, deadline=settings.deadline, hang=settings.hang)


def tokens_of(service: Service) -> Tokens:
    """Read, and compared with where the server listens. Raises `UsageError`."""
    settings = service.settings
    tokens = Tokens.read(settings.token_file) if settings.token_file else Tokens()
    check_bind(settings.host, tokens)
    return tokens


def config_of(service: Service, app: Starlette) -> uvicorn.Config:
    """uvicorn's, with its bounds. Raises `UsageError` for a certificate that is none."""
    settings = service.settings
    http = type("HTTP", (PatientHTTP,), {"most": 2 * settings.connections})  # the gate refuses, with words, long before
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, http=http, ws=FastWebSocket, lifespan="off", log_config=None,  # pyright: ignore
        access_log=False, ws_max_size=settings.limits.message, ws_per_message_deflate=False, timeout_keep_alive=75,
        timeout_graceful_shutdown=2, server_header=False, ssl_certfile=settings.certificate, ssl_keyfile=settings.key,
    )  # fmt: skip
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise UsageError("TLS", found=str(error), expected="a certificate and its key in PEM",
                         fix="--certificate FILE --key FILE") from error  # fmt: skip
    return config


async def run(service: Service, ready: Any = None) -> None:
    """Start the engine, serve until SIGTERM or SIGINT, finish what was accepted. `ready(address)` is called once it listens.

    Raises what the policy or the settings lack.
    """
    tokens = tokens_of(service)
    config = config_of(service, build_app(service, tokens))
    server = Server(config, service)
    async with gr00t.listening(service, tokens), _listening(server, ready) as serving:
        starting = asyncio.create_task(service.engine.start())
        await asyncio.wait({starting, serving}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            service.check()
            logger.info("ready: %s", service.engine.info.name)
            if (warm := service.engine.info.warm) > service.settings.deadline:
                logger.warning(
                    "one look takes %.2f s, more than --deadline %g s: most will be refused", warm, service.settings.deadline
                )
        else:  # asked to leave before there was anything to serve
            starting.cancel()
            await asyncio.wait({starting})
    await service.engine.stop()
    if service.audit is not None:
        service.audit.close()


def bound(host: str, port: int, what: str = "vla serve") -> socket.socket:
    """Where to listen. Raises `UsageError` when that cannot be had."""
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise UsageError(
            what, found=f"{host}:{port}: {error.strerror or error}", expected="an address of this machine, a free port",
            fix="--port N, or --port 0 for any that is free",
        ) from None  # fmt: skip


@contextlib.asynccontextmanager
async def _listening(server: Server, ready: Any) -> AsyncIterator[asyncio.Task[None]]:
    """Probes are answered while the policy loads; a policy that cannot be loaded ends the server."""
    where = bound(server.config.host, server.config.port)
    serving = asyncio.create_task(server.serve([where]))
    try:
        while not server.started:
            if serving.done():
                serving.result()
                raise UsageError("vla serve", found="a server that does not start", expected="a free port", fix="--port N")
            await asyncio.sleep(0.01)
        if ready is not None:
            host, port = where.getsockname()[:2]
            ready(f"{'https' if server.config.is_ssl else 'http'}://{f'[{host}]' if ':' in host else host}:{port}")
        yield serving
    except BaseException:
        server.should_exit = True
        await serving
        raise
    await serving
