"""openpi's WebSocket, `/openpi` and `/`: the unchanged `openpi-client` package drives a policy.

    server: metadata, as soon as the socket opens
    client: {"observation/image": uint8, "observation/state": (S,), "prompt": str}, or {"images": {...}, "state", "prompt"}
    server: {"actions": (n, A), "policy_timing": {"infer_ms"}, "server_timing": {"infer_ms", "prev_total_ms"}}
         or a text frame that says what was wrong, and the socket closes with 1011

msgpack with byte-string markers (`serve.wire.pack_openpi`). An observation, or else the address (`/openpi?robot=R&adapter=A`),
may name a robot and an adapter. `WebsocketClientPolicy(host, port)` cannot be told a path and comes to `/`. Format:
Physical-Intelligence/openpi, `openpi/serving`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from serve.gate import refuse
from serve.messages import messages, send
from serve.refusal import Refusal
from serve.service import Look, Service, Session
from serve.wire import Encoded, pack_openpi, unpack
from vla.errors import VLAError

_STATES = ("observation/state", "state", "observation.state")
_JOINTS = ("observation/joint_position", "observation/gripper_position")


def routes(service: Service) -> list[BaseRoute]:
    """Of this wire."""

    async def connected(socket: WebSocket) -> None:
        try:
            metadata = pack_openpi(_metadata(service))
        except Refusal as refusal:  # no policy yet: what that client takes for metadata must not be words
            await refuse(socket.scope, socket.receive, socket.send, refusal)
            return
        await socket.accept()
        session, before, asked = Session(service, "openpi"), 0.0, socket.query_params
        try:
            with service.metrics.sessions.labels("openpi").track_inprogress():
                await send(socket, metadata)
                async for data in messages(socket):
                    began = time.perf_counter()
                    look = look_of(unpack(data, service.limits))
                    look.robot, look.adapter = look.robot or asked.get("robot"), look.adapter or asked.get("adapter")
                    reply = await session.act(look)
                    timing = {"infer_ms": reply.timing["serve"]} | ({"prev_total_ms": before} if before else {})
                    await send(socket, pack_openpi({
                        "actions": reply.actions, "confidence": reply.confidence, "hold": reply.hold, "reason": reply.reason,
                        "needs_help": reply.needs_help, "policy_timing": {"infer_ms": reply.timing["infer"]},
                        "server_timing": timing,
                    }))  # fmt: skip
                    before = 1e3 * (time.perf_counter() - began)
        except VLAError as error:
            await socket.send_text(str(Refusal.of(error)))
            await socket.close(1011)
        except WebSocketDisconnect:
            pass

    return [WebSocketRoute(path, connected) for path in ("/openpi", "/", "/v1/realtime/robot/openpi")]


def _metadata(service: Service) -> dict[str, Any]:
    said = service.describe()
    return {key: said[key] for key in ("server", "policy", "name", "steps", "adapters", "ready")} | {
        "robots": list(said["robots"])
    }


def look_of(content: Any) -> Look:
    """Raises `Refusal` for what is no observation."""
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise Refusal("bad_request", where="observation", found=type(content).__name__, expected="a mapping of names",
                      fix="see docs/serving.md")  # fmt: skip
    nested = content.get("images")
    images = dict(nested) if isinstance(nested, Mapping) else {}
    images |= {k: v for k, v in content.items() if isinstance(v, Encoded) or (isinstance(v, np.ndarray) and v.ndim == 3)}
    state = next((content[name] for name in _STATES if name in content), None)
    if state is None and all(isinstance(content.get(name), np.ndarray) for name in _JOINTS):
        state = np.concatenate([np.reshape(content[name], -1) for name in _JOINTS])
    words = content.get("prompt", content.get("task"))
    robot, adapter = (value if isinstance(value := content.get(name), str) else None for name in ("robot", "adapter"))
    return Look({str(k): v for k, v in images.items()}, state, words, robot, adapter)
