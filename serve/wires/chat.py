"""OpenAI's chat completions, `POST /v1/chat/completions` and `GET /v1/models`: what is served, for any client of that protocol.

A question in the words of `serve.remote_planner.OpenAIPlanner` is the planner's, and its plan is answered as that asks for it: so
one server plans for another by configuration only (`--planner openai:http://HOST:PORT/v1`). Any other text is asked as it stands,
about the first picture, as `POST /v1/ask` would. Pictures are `data:` URLs; nothing is fetched. Of earlier messages nothing is
read: a planner's memory is in its question. What would change an answer and is not known here (streams, tools, several choices)
is refused; what only colours it (`temperature`, `seed`) is not looked at.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from serve.planning import Planning
from serve.refusal import Refusal
from serve.remote_planner import asked_of
from serve.service import Service
from serve.wire import Picture, picture_of
from serve.wires.planning import counted
from serve.wires.rest import parsed, picture_bytes

_CAMERA = re.compile(r"Camera ([^\n]{1,200}):")
"""What `OpenAIPlanner` says before a picture."""


class ImageURL(BaseModel):
    """Where a picture is: in the address itself."""

    url: str


class Part(BaseModel):
    """Of a message."""

    type: Literal["text", "image_url"]
    text: str = Field(default="", max_length=20_000)
    image_url: ImageURL | None = None


class Message(BaseModel):
    """Of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] = ""


class ChatBody(BaseModel):
    """What is asked; the last message of a user counts."""

    model_config = ConfigDict(extra="ignore")
    model: str = Field(default="", max_length=4096, description="Any: there is one.")
    messages: list[Message] = Field(min_length=1, max_length=1000)
    stream: Literal[False, None] = None
    n: Literal[1, None] = None
    tools: None = None


class ChatReply(BaseModel):
    """The form clients know."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]


def routes(service: Service, planning: Planning) -> list[BaseRoute]:
    """Of this wire."""

    async def complete(request: Request) -> Response:
        body = await parsed(request, ChatBody, service)
        text, pictures = _question(body, service)
        asked = asked_of(text, pictures) if planning.kind else None
        if asked is not None:
            found, _ = await counted(service, "chat", request, planning.plan(asked))
            said = {key: value for key, value in found.to_json().items() if key not in ("valid_for", "considered")}
            content = json.dumps({key: value for key, value in said.items() if value is not None})
        else:
            answer = await counted(service, "chat", request, planning.ask(next(iter(pictures.values()), None), text, ()))
            content = answer["answer"]
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        reply = ChatReply(id=f"chatcmpl-{uuid.uuid4().hex}", object="chat.completion", created=int(time.time()),
                          model=service.engine.info.policy, choices=[choice])  # fmt: skip
        return JSONResponse(reply.model_dump())

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": service.engine.info.policy, "object": "model", "created": 0,
                                                         "owned_by": "tendon"}]})  # fmt: skip

    return [Route("/v1/chat/completions", complete, methods=["POST"]), Route("/v1/models", models)]


def _question(body: ChatBody, service: Service) -> tuple[str, dict[str, Picture]]:
    """(the words of the last thing a user said, pictures by the camera that the words before each name)."""
    last = next((message for message in reversed(body.messages) if message.role == "user"), None)
    if last is None:
        raise _wrong("no message of a user", "one, the last of which is answered")
    if isinstance(last.content, str):
        return _words(last.content), {}
    words: list[str] = []
    pictures: dict[str, Picture] = {}
    camera = ""
    for part, after in pairwise([*last.content, None]):
        assert part is not None
        if part.type == "text":
            # Words in front of a picture may name its camera; any others are said to the policy, whatever they begin with.
            named = after is not None and after.type == "image_url" and _CAMERA.fullmatch(part.text)
            camera = named[1] if named else ""
            words += [] if named else [part.text]
            continue
        head, _, data = ("" if part.image_url is None else part.image_url.url).partition(",")
        if not head.startswith("data:image/") or not head.endswith(";base64"):
            raise _wrong("a picture that is elsewhere", "data:image/png;base64,... or jpeg; nothing is fetched")
        name = camera or f"picture {len(pictures)}"
        if name in pictures or len(pictures) >= service.limits.pictures:
            raise _wrong(f"{name!r} twice, or too many pictures", f"at most {service.limits.pictures}, each its own")
        pictures[name], camera = picture_of(picture_bytes(data, name), service.limits), ""
    return _words("\n".join(words)), pictures


def _words(text: str) -> str:
    if not text.strip() or len(text) > 100_000:
        raise _wrong(f"{len(text)} characters", "a question in words")
    return text


def _wrong(found: str, expected: str) -> Refusal:
    return Refusal("bad_request", where="messages", found=found, expected=expected, fix="see docs/planning.md")
