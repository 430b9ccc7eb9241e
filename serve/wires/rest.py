"""Our own HTTP: `/v1/info`, `/v1/act`, `/v1/swap`. Pictures are base64 of JPEG or PNG files; `curl` is client enough."""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from serve.reading import read_json
from serve.refusal import Refusal
from serve.service import SHORTEST, Look, Reply, Service, Session
from serve.wire import LIMITS, PROTOCOL, Limits, picture_of
from vla.config import Config

T = TypeVar("T")


class ActBody(Config):
    """One look."""

    images: dict[str, str] = Field(max_length=16, description="Camera -> base64 of a JPEG or PNG file.")
    state: list[float] = Field(default=[], max_length=4096, description="Robot units, in the order of GET /v1/info.")
    instruction: str = Field(max_length=20_000)
    robot: str | None = Field(default=None, description="Key of the embodiment; may be left out where there is one.")
    adapter: str | None = None
    deadline: float | None = Field(default=None, ge=SHORTEST, le=3600, description="Seconds from now.")
    seed: int = Field(default=0, ge=0, le=2**53)


class SwapBody(Config):
    """Another policy, by a path on the server or a Hub id."""

    policy: str = Field(min_length=1, max_length=4096)
    adapters: dict[str, str] = {}


Numbers = list[list[Annotated[float, Field(allow_inf_nan=False)] | None]]


class ActReply(Config):
    """One chunk."""

    actions: list[list[float]] = Field(description="(n, A), robot units.")
    confidence: Numbers = Field(description="(n, A) in 0..1; null where the policy has none.")
    names: list[str] = Field(description="Of the A dimensions.")
    execute: int = Field(description="Steps to carry out before looking again.")
    control_hz: float
    hold: bool
    reason: str
    needs_help: str
    policy: str
    timing: dict[str, float] = Field(description="ms: infer, wait, serve.")
    batch: int


def routes(service: Service) -> list[BaseRoute]:
    """Of this wire."""

    async def info(request: Request) -> Response:
        return JSONResponse({"protocol": PROTOCOL, **service.describe()})

    async def act(request: Request) -> Response:
        body = await parsed(request, ActBody, service)
        images = {name: picture_of(picture_bytes(text, name), service.limits) for name, text in body.images.items()}
        look = Look(images, np.array(body.state, np.float64), body.instruction, body.robot, body.adapter, deadline=body.deadline,
                    seed=body.seed)  # fmt: skip
        robot = service.robot_of(body.robot)
        reply = await while_connected(request, Session(service, "http", lasting=False).act(look))
        return JSONResponse(reply_json(reply) | {"names": robot.names("action"), "control_hz": robot.control_hz})

    async def swap(request: Request) -> Response:
        if request.state.role != "admin":
            raise Refusal(
                "forbidden", where="token", found="a user's", expected="an admin's", fix="admin: before it in the token file"
            )
        body = await parsed(request, SwapBody, service)
        if service.starter is None:
            raise Refusal(
                "forbidden", where="swap", found="a server whose policy is fixed", expected="vla serve", fix="start another one"
            )
        fresh = await service.engine.swap(service.starter({"policy": body.policy, "adapters": body.adapters}), service.check)
        return JSONResponse({"policy": fresh.policy, "name": fresh.name})

    return [Route("/v1/info", info), Route("/v1/act", act, methods=["POST"]), Route("/v1/swap", swap, methods=["POST"])]


async def parsed(request: Request, model: type[T], service: Service) -> T:
    """The body as `model`. Raises `Refusal` naming every field that is wrong."""
    return await model_of(request, model, service.limits)


async def model_of(request: Request, model: type[T], limits: Limits = LIMITS) -> T:
    """As `parsed`, without a service."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(
            "unsupported", where="content-type", found=kind[:80] or "none", expected="application/json", fix="send JSON"
        )
    content = read_json(await request.body(), limits=limits)
    try:
        return model.model_validate(content, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors(include_input=False, include_url=False)
        ]
        raise Refusal("bad_request", where="body", found="; ".join(wrong[:8])[:1000], expected=model.__name__,
                      fix="see GET /openapi.json") from None  # fmt: skip


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """What `work` comes to; a client that goes away ends it."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            raise Refusal("late", found="a client that went away", expected="one that waits", fix="wait for the answer")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def reply_json(reply: Reply) -> dict[str, Any]:
    """Numbers JSON can say: a confidence nobody has is null."""
    sure = [[None if not math.isfinite(v) else round(v, 4) for v in row] for row in reply.confidence.tolist()]
    timing = {name: round(ms, 3) for name, ms in reply.timing.items()}
    return {
        "actions": reply.actions.tolist(), "confidence": sure, "execute": reply.execute, "hold": reply.hold,
        "reason": reply.reason, "needs_help": reply.needs_help, "policy": reply.policy, "timing": timing, "batch": reply.batch,
    }  # fmt: skip


def picture_bytes(text: str, name: str) -> bytes:
    """Of a picture as base64. Raises `Refusal`."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        found = "an address" if text.startswith("http") else "no base64"
        raise Refusal("bad_request", where=f"images.{name}"[:80], found=found, fix="send the file itself",
                      expected="base64 of a JPEG or PNG file; nothing is fetched") from None  # fmt: skip
