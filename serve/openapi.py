"""`GET /openapi.json`: what is here, from the models that check what comes in."""

from __future__ import annotations

from typing import Any

import vla
from serve.refusal import STATUS
from serve.wires.chat import ChatBody, ChatReply
from serve.wires.planning import AskBody, AskReply, PlanBody, PlanReply
from serve.wires.rest import ActBody, ActReply, SwapBody

_REFUSAL = {
    "type": "object", "required": ["error"], "properties": {"error": {
        "type": "object", "required": ["code", "where", "found", "expected", "fix"],
        "properties": {"code": {"enum": sorted(STATUS)}, "where": {"type": "string"}, "found": {"type": "string"},
                       "expected": {"type": "string"}, "fix": {"type": "string"}, "retry_after": {"type": "number"}},
    }},
}  # fmt: skip
_OBJECT = {"type": "object"}
_NUMPY = {
    "type": "object", "required": ["__numpy__", "dtype", "shape"],
    "properties": {"__numpy__": {"type": "string", "contentEncoding": "base64"}, "dtype": {"type": "string"},
                   "shape": {"type": "array", "items": {"type": "integer"}}},
}  # fmt: skip
_OPENVLA = {"type": "object", "properties": {
    "image": _NUMPY, "full_image": _NUMPY, "instruction": {"type": "string"}, "unnorm_key": {"type": "string"}, "state": _NUMPY,
    "encoded": {"type": "string"},
}}  # fmt: skip


def document() -> dict[str, Any]:
    """OpenAPI 3.1. WebSockets are not part of that language: they are told of in the description."""
    schemas: dict[str, Any] = {"Refusal": _REFUSAL}
    for model in (ActBody, ActReply, SwapBody, PlanBody, PlanReply, AskBody, AskReply, ChatBody, ChatReply):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    get, post = _operation, _operation
    paths = {
        "/livez": {"get": get("Alive; needs no token", {200: _OBJECT}, codes=()) | {"security": []}},
        "/readyz": {"get": get("Loaded, warm and not draining", {200: _OBJECT, 503: _OBJECT}, codes=_ASKED)},
        "/metrics": {"get": get("Prometheus", {200: None}, codes=_ASKED)},
        "/openapi.json": {"get": get("This document", {200: _OBJECT}, codes=_ASKED)},
        "/v1/info": {"get": get("Policy, robots, chunk", {200: _OBJECT}, codes=(*_ASKED, "unavailable"))},
        "/v1/act": {"post": post("One look, one chunk", {200: _ref("ActReply")}, _ref("ActBody"), _ACTS)},
        "/v1/swap": {"post": post("Another policy", {200: _OBJECT}, _ref("SwapBody"), _ACTS)},
        **{
            path: {"post": post("What to do next", {200: _ref("PlanReply")}, _ref("PlanBody"), _PLANS)}
            for path in ("/v1/plan", "/plan")
        },
        "/v1/ask": {"post": post("A question to the policy", {200: _ref("AskReply")}, _ref("AskBody"), _ACTS)},
        "/v1/chat/completions": {
            "post": post("A plan or an answer, as OpenAI's clients ask", {200: _ref("ChatReply")}, _ref("ChatBody"), _PLANS)
        },
        "/v1/models": {"get": get("The one that is served", {200: _OBJECT}, codes=(*_ASKED, "unavailable"))},
        "/act": {"post": post("OpenVLA's and OFT's", {200: {}}, _OPENVLA, _ACTS)},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "tendon-vla", "version": vla.__version__, "description": "WebSockets: /v1/ws, /openpi, /vla-eval"},
        "paths": paths, "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{"token": []}],
    }  # fmt: skip


_ASKED = ("unauthorized", "forbidden", "bad_request")
_PLANS = tuple(code for code in STATUS if code not in ("internal", "conflict"))
_ACTS = tuple(code for code in STATUS if code not in ("not_found", "internal", "bad_answer", "conflict"))


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _operation(summary: str, said: dict[int, Any], body: Any = None, codes: tuple[str, ...] = ()) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for status, schema in said.items():
        content = {"text/plain": {"schema": {"type": "string"}}} if schema is None else {"application/json": {"schema": schema}}
        answers[str(status)] = {"description": summary, "content": content}
    for code in codes:
        answers.setdefault(str(STATUS[code]), {"description": code, "content": {"application/json": {"schema": _ref("Refusal")}}})
    asked = {} if body is None else {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}}
    return {"summary": summary, "responses": answers, **asked}
