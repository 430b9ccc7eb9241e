"""The slow role over HTTP: `/v1/plan` (and `/plan`), what to do next; `/v1/ask`, a question in words about a picture.

JSON in and out; pictures are base64 of JPEG or PNG files. The planner remembers nothing: `memory` of an answer goes into the next
question. `serve.remote_planner` has clients for both.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from serve.planner import LONGEST, Asked
from serve.planning import Planning
from serve.refusal import Refusal
from serve.service import Service
from serve.wire import Picture, picture_of
from serve.wires.rest import parsed, picture_bytes, while_connected
from vla.config import Config
from vla.errors import VLAError

T = TypeVar("T")
Sentence = Annotated[str, Field(max_length=512)]
Share = Annotated[float, Field(ge=0, le=1)]


class PlanBody(Config):
    """What a planner is asked."""

    goal: str = Field(min_length=1, max_length=LONGEST, description="What is wanted in the end.")
    images: dict[str, str] = Field(default={}, max_length=16, description="Camera -> base64 of a JPEG or PNG file.")
    memory: str = Field(default="", max_length=LONGEST, description="Of the plan before, as it was.")
    state: list[float] = Field(default=[], max_length=4096, description="Robot units, in the order of GET /v1/info.")
    last: Sentence = Field(default="", description="The instruction that is followed, or was.")
    status: Literal["new", "running", "done", "stalled", "unsure", "help"] = Field(default="new", description="How it goes.")
    words: str = Field(default="", max_length=LONGEST, description="What a person said since.")
    known: list[Sentence] = Field(default=[], max_length=1000, description="The only instructions that will do.")
    robot: str | None = Field(default=None, description="Key of the embodiment; its first camera is the one asked about.")


class PlanReply(Config):
    """What to do next."""

    instruction: str = Field(description="Empty when the goal is reached.")
    remaining: list[str] = Field(description="What is meant to come after it, as far as that is known.")
    memory: str = Field(description="To be sent along with the next question.")
    done: bool
    confidence: Share | None = Field(description="null where nobody knows.")
    valid_for: float = Field(description="Seconds, from when it was asked for, that it may be followed.")
    reason: str
    considered: list[tuple[str, Share]] = Field(description="The likeliest instructions, where they were compared.")
    planner: str
    ms: float


class AskBody(Config):
    """A question in words."""

    question: str = Field(min_length=1, max_length=2000)
    image: str | None = Field(default=None, description="base64 of a JPEG or PNG file.")
    candidates: list[Sentence] = Field(default=[], max_length=256, description="Answers to be scored, instead of said.")


class AskReply(Config):
    """What the policy says to it."""

    answer: str | None
    likely: float | None = Field(description="Log-likelihood of the answer.")
    scores: list[float] = Field(description="Log-likelihood of each candidate as the whole answer.")
    policy: str
    ms: float


def routes(service: Service, planning: Planning) -> list[BaseRoute]:
    """Of this wire."""

    async def plan(request: Request) -> Response:
        body = await parsed(request, PlanBody, service)
        images = {name: _picture(text, name, service) for name, text in body.images.items()}
        known = service.engine.info.robots if body.robot is None else {body.robot: service.robot_of(body.robot)}
        if len(known) == 1:  # the first camera is the robot's own first
            cameras = list(next(iter(known.values())).cameras)
            images = dict(sorted(images.items(), key=lambda pair: cameras.index(pair[0]) if pair[0] in cameras else len(cameras)))
        state = np.array(body.state, np.float32) if body.state else None
        asked = Asked(body.goal, images, body.memory, state, body.last, body.status, body.words, tuple(body.known))
        found, seconds = await counted(service, "plan", request, planning.plan(asked))
        return JSONResponse({**found.to_json(), "planner": planning.kind, "ms": round(1e3 * seconds, 3)})

    async def ask(request: Request) -> Response:
        body = await parsed(request, AskBody, service)
        picture = None if body.image is None else _picture(body.image, "image", service)
        return JSONResponse(await counted(service, "ask", request, planning.ask(picture, body.question, tuple(body.candidates))))

    return [Route("/v1/plan", plan, methods=["POST"]), Route("/plan", plan, methods=["POST"]),
            Route("/v1/ask", ask, methods=["POST"])]  # fmt: skip


async def counted(service: Service, wire: str, request: Request, work: Awaitable[T]) -> T:
    """What `work` comes to, or its `Refusal`, counted under `wire`; a client that goes away ends it."""
    try:
        said = await while_connected(request, work)
    except VLAError as error:
        refusal = Refusal.of(error)
        service.metrics.requests.labels(wire, refusal.code).inc()
        raise refusal from None
    service.metrics.requests.labels(wire, "ok").inc()
    return said


def _picture(text: str, name: str, service: Service) -> Picture:
    return picture_of(picture_bytes(text, name), service.limits)
