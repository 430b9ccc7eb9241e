"""A server in a thread of the test's own process, for tests that shorten what it waits for; `tests/serving.py` has real ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from children import LIMIT
from serving import until

from serve.backend import ThreadBackend
from serve.engine import Engine, EngineOptions
from serve.gate import Tokens
from serve.server import build_app, config_of
from serve.service import Service
from serve.settings import ServeSettings


class _Ephemeral(uvicorn.Server):
    """In a thread, where signals are nobody's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def in_thread(policy: str = "null:tabletop", tokens: Tokens | None = None, **settings: Any) -> Iterator[tuple[int, Service]]:
    """(port, service) of a server in this process, for tests that shorten what it waits for. The model is in a thread as well."""
    chosen = ServeSettings(port=0, **settings)
    service = Service(Engine(lambda: ThreadBackend.start({"policy": policy}), EngineOptions(queue=chosen.queue)), chosen)
    server = _Ephemeral(config_of(service, build_app(service, tokens or Tokens())))

    async def work() -> None:
        await service.engine.start()
        try:
            await server.serve()
        finally:
            await service.engine.stop()

    thread = threading.Thread(target=lambda: asyncio.run(work()), daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1], service
    finally:
        server.should_exit = server.force_exit = True
        thread.join(LIMIT)
