"""`POST /act` as OpenVLA's and OpenVLA-OFT's clients say it: JSON with json-numpy arrays, plain or encoded twice.

    {"image": (h, w, 3) uint8, "instruction": str, "unnorm_key"?: str, "state"?: (S,)}   ->  (A,) float64, the chunk's first step
    {"full_image": ..., "<... wrist ...>": ..., "state": (S,), "instruction": str}       ->  a list of (A,) float64, one a step
    {"encoded": "<either, as JSON text>"}                                                ->  the answer as JSON text in a string

Formats: openvla/openvla `vla-scripts/deploy.py`, moojink/openvla-oft `vla-scripts/deploy.py`. `unnorm_key` names the robot.
Errors have their own status; `compat: [openvla]` answers 200 and "error", as those servers do.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from serve.reading import read_json
from serve.refusal import Refusal
from serve.service import Look, Reply, Service, Session
from serve.wires.rest import while_connected
from vla.errors import VLAError

_WORDS = ("instruction", "unnorm_key", "state", "proprio", "robot", "adapter")


def routes(service: Service) -> list[BaseRoute]:
    """Of this wire."""

    async def act(request: Request) -> Response:
        try:
            content = read_json(await request.body(), arrays=True, limits=service.limits)
            twice = isinstance(content, dict) and "encoded" in content
            if twice:
                if len(content) != 1 or not isinstance(content["encoded"], str):
                    raise _wrong("body", "'encoded' beside other keys, or no text", '{"encoded": "<JSON>"} alone')
                content = read_json(content["encoded"], arrays=True, limits=service.limits)
            look, chunk = look_of(content)
            reply = await while_connected(request, Session(service, "openvla", lasting=False).act(look))
        except VLAError:
            if "openvla" in service.settings.compat:
                return JSONResponse("error")
            raise
        said = _said(reply, chunk)
        return JSONResponse(json.dumps(said) if twice else said)

    return [Route("/act", act, methods=["POST"])]


def look_of(content: Any) -> tuple[Look, bool]:
    """The look, and whether a whole chunk is wanted (OFT). Raises `Refusal`."""
    if not isinstance(content, dict):
        raise _wrong("body", type(content).__name__, "an object with 'image' (OpenVLA) or 'full_image' (OFT)")
    images = {k: v for k, v in content.items() if k not in _WORDS and isinstance(v, np.ndarray) and v.ndim == 3}
    odd = sorted(str(k)[:40] for k in content if k not in _WORDS and k not in images)
    if odd or not ("image" in images or "full_image" in images):
        raise _wrong("body", f"unknown or no picture: {', '.join(odd[:8])}" if odd else "neither 'image' nor 'full_image'",
                     f"pictures (h, w, 3) as json-numpy arrays, and {', '.join(_WORDS)}")  # fmt: skip
    for name in ("unnorm_key", "robot", "adapter"):
        if content.get(name) is not None and not isinstance(content[name], str):
            raise _wrong(name, type(content[name]).__name__, "text")
    state = content["state"] if content.get("state") is not None else content.get("proprio")
    robot = content.get("robot") or content.get("unnorm_key")
    return Look(images, state, content.get("instruction"), robot, content.get("adapter")), "full_image" in images


def _said(reply: Reply, chunk: bool) -> Any:
    rows = [_numpy(row.astype(np.float64)) for row in reply.actions]
    return rows if chunk else rows[0]


def _numpy(array: np.ndarray) -> dict[str, Any]:
    """As json-numpy writes it."""
    return {"__numpy__": base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str, "shape": list(array.shape)}


def _wrong(where: str, found: str, expected: str) -> Refusal:
    return Refusal("bad_request", where=where, found=found, expected=expected, fix="see docs/serving.md")
