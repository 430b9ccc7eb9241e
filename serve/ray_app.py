"""Many replicas of a server with Ray Serve: the same engine, gate and wires, one of each in every replica.

    vla serve runs/demo --replicas 2                          two, wherever Ray finds room
    vla serve runs/demo --replicas 1:8                        as many as are busy
    vla serve runs/demo --replicas 2 --model a=runs/a --model b=runs/b     header `serve_multiplexed_model_id: a` chooses

Ray keeps the replicas alive, starts others for those that die, and sends a request for a model where that model is loaded;
a robot's WebSocket stays with its replica, and a client connects again when that is lost. Run on a cluster (`ray start`, then
RAY_ADDRESS) or alone, where Ray is started for it. Ray's processes talk to each other by its own means, pickles among them: keep
its ports to yourself (docs.ray.io, security); ours is the HTTP port alone. Extra: pip install "tendon-vla[ray,serve]".
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import uuid
from collections.abc import Mapping
from typing import Any

from serve.gate import Tokens, check_bind, refuse
from serve.refusal import Refusal
from serve.settings import ServeSettings
from vla.errors import MachineError, UsageError

logger = logging.getLogger(__name__)

MOST_MODELS = 3
"""Policies one replica keeps loaded."""


def replicas_of(text: str) -> tuple[int, int]:
    """`2` or `1:8`. Raises `UsageError`."""
    low, sign, high = text.partition(":")
    try:
        least, most = int(low), int(high if sign else low)
    except ValueError:
        least, most = 0, 0
    if not 1 <= least <= most <= 1000:
        raise UsageError("--replicas", found=text, expected="N, or LEAST:MOST", fix="--replicas 2")
    return least, most


class Replica:
    """The ASGI application of one replica: the policies it has loaded, each behind an engine of its own."""

    def __init__(self, specs: Mapping[str, Mapping[str, Any]], settings: ServeSettings, tokens: Tokens) -> None:
        """`specs`: model's name -> what `serve.model_process.load` takes; "" is meant where a request names none."""
        from ray import serve  # pyright: ignore[reportMissingImports]  # an extra

        self._specs, self._settings, self._tokens = specs, settings, tokens
        self._asked = serve.get_multiplexed_model_id

        @serve.multiplexed(max_num_models_per_replica=MOST_MODELS)
        async def loaded(name: str) -> Served:
            return await Served.start(specs[name], settings, tokens)

        self._loaded: Any = loaded
        self._main: Served | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        name = self._asked()
        if name not in self._specs:
            known = ", ".join(sorted(n for n in self._specs if n))
            await refuse(scope, receive, send, Refusal("not_found", where="serve_multiplexed_model_id", found=repr(name)[:80],
                         expected=known or "no such header", fix="name one of them"))  # fmt: skip
            return
        served = self._main if not name else await self._loaded(name)
        assert served is not None
        await served.app(scope, receive, send)

    async def _lifespan(self, receive: Any, send: Any) -> None:
        await receive()
        self._main = await Served.start(self._specs[""], self._settings, self._tokens)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._main.stop()
        await send({"type": "lifespan.shutdown.complete"})


class Served:
    """One policy in a replica. Ray drops the one used longest ago when there are too many, which stops it."""

    def __init__(self, service: Any, app: Any) -> None:
        self.service, self.app = service, app

    @classmethod
    async def start(cls, spec: Mapping[str, Any], settings: ServeSettings, tokens: Tokens) -> Served:
        """Loaded and warm; the model is in a thread, since a replica is a process of its own already."""
        from serve.backend import ThreadBackend
        from serve.engine import Engine
        from serve.server import build_app, engine_options
        from serve.service import Service

        if settings.audit:  # one writer a folder
            settings = settings.model_copy(update={"audit": settings.audit / f"{os.getpid()}-{uuid.uuid4().hex[:6]}"})
        service = Service(Engine(lambda: ThreadBackend.start(spec), engine_options(settings)), settings)
        await service.engine.start()
        service.check()
        return cls(service, build_app(service, tokens))

    async def stop(self) -> None:
        """Finish what was accepted, then let the model go."""
        await self.service.engine.drain(self.service.settings.drain)
        await self.service.engine.stop()
        if self.service.audit is not None:
            self.service.audit.close()

    async def __del__(self) -> None:  # Ray awaits it when it drops a model
        await self.stop()


def application(
    specs: Mapping[str, Mapping[str, Any]], settings: ServeSettings, replicas: tuple[int, int], gpus: float = 0.0
) -> Any:
    """What `ray.serve.run` takes; for a deployment of your own around it."""
    from ray import serve  # pyright: ignore[reportMissingImports]  # an extra

    tokens = Tokens.read(settings.token_file) if settings.token_file else Tokens()
    least, most = replicas
    scale: dict[str, Any] = {"num_replicas": least} if least == most else {"autoscaling_config": {
        "min_replicas": least, "max_replicas": most, "target_ongoing_requests": settings.batch,
    }}  # fmt: skip
    deployment = serve.deployment(
        serve.ingress(lambda: Replica(specs, settings, tokens))(),  # pyright: ignore[reportCallIssue]
        name="policy", max_ongoing_requests=settings.queue + settings.batch, graceful_shutdown_timeout_s=settings.drain,
        health_check_period_s=2.0, health_check_timeout_s=10.0, ray_actor_options={"num_cpus": 1, "num_gpus": gpus}, **scale,
    )  # fmt: skip
    return deployment.bind()


def run(specs: Mapping[str, Mapping[str, Any]], settings: ServeSettings, replicas: tuple[int, int], ready: Any = None) -> None:
    """Serve until SIGTERM or SIGINT. Raises `MachineError` without Ray, `UsageError` for settings Ray cannot carry out."""
    try:
        import ray  # pyright: ignore[reportMissingImports]  # an extra
        from ray import serve  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise MachineError("ray", found=str(error), expected="Ray Serve", fix='pip install "tendon-vla[ray,serve]"') from error
    check_bind(settings.host, settings.token_file)
    if settings.certificate or settings.port == 0 or settings.gr00t is not None:
        raise UsageError("--replicas", found="TLS, port 0 or GR00T's wire", expected="a plain port of Ray's proxy",
                         fix="put a proxy with TLS before it")  # fmt: skip
    if not ray.is_initialized():
        alone: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": max(os.cpu_count() or 1, replicas[1] + 1)}
        ray.init(include_dashboard=False, logging_level=logging.WARNING, log_to_driver=True, **alone)
    gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port})
        serve.run(application(specs, settings, replicas, gpus), name="tendon")
        if ready is not None:
            ready(f"http://{settings.host}:{settings.port}")
        while not stop.wait(1.0):
            pass
    finally:
        serve.shutdown()
        ray.shutdown()
