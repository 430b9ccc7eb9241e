"""vla-eval's envelope, `/vla-eval`: the unchanged `vla-eval` package evaluates a policy on its own benchmarks.

    {"type": "hello" | "observation" | "episode_start" | "episode_end" | "action" | "error", "payload", "seq", "timestamp"}

An observation is `{"images": {camera: (h, w, 3)}, "state"?, "task_description"}`; its answer one action (A,), for that harness
moves one step a look: chunks are played here, and the policy is asked again when their part is played. Format: allenai
vla-evaluation-harness, `vla_eval/protocol`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

import vla
from serve.refusal import Refusal
from serve.service import Look, Service, Session
from serve.sockets import messages, send
from serve.wire import pack, unpack
from vla.errors import VLAError

_VERSION = 1
_PARTS = {
    "eef_delta_position": ("position", "delta_xyz"), "eef_position": ("position", "absolute_xyz"),
    "eef_delta_axis_angle": ("rotation", "axis_angle"), "eef_axis_angle": ("rotation", "axis_angle"),
    "eef_delta_euler_xyz": ("rotation", "euler_xyz"), "eef_euler_xyz": ("rotation", "euler_xyz"),
    "eef_quat_xyzw": ("rotation", "quaternion_xyzw"), "gripper_closed_positive": ("gripper", "binary_close_positive"),
    "gripper_open_positive": ("gripper", "binary_close_negative"),
}  # fmt: skip
"""Our convention -> (component, format) in vla-eval's words."""


def routes(service: Service) -> list[BaseRoute]:
    """Of this wire, and the two addresses that harness asks over HTTP."""

    async def health(request: Request) -> Response:
        ready = service.engine.ready
        return JSONResponse({"status": "ok" if ready else service.engine.state}, 200 if ready else 503)

    async def config(request: Request) -> Response:
        return JSONResponse({"applied": {}, "config": {"max_batch_size": service.settings.batch}})

    async def connected(socket: WebSocket) -> None:
        await socket.accept()
        playing = Playing(service)
        try:
            with service.metrics.sessions.labels("vla-eval").track_inprogress():
                async for data in messages(socket):
                    if (reply := await playing.heard(data)) is not None:
                        await send(socket, reply)
        except WebSocketDisconnect:
            pass

    return [WebSocketRoute("/vla-eval", connected), Route("/health", health), Route("/config", config),
            Route("/vla-eval/health", health), Route("/vla-eval/config", config)]  # fmt: skip


class Playing:
    """One harness's episodes: the chunk that is being played."""

    def __init__(self, service: Service) -> None:
        self.service, self.session = service, Session(service, "vla-eval")
        self._left: deque[np.ndarray] = deque()
        self._words: Any = None

    async def heard(self, data: bytes) -> bytes | None:
        """What to answer, if anything."""
        seq = 0
        try:
            message = unpack(data, self.service.settings.limits)
            if not isinstance(message, Mapping) or not isinstance(payload := message.get("payload"), Mapping):
                raise _wrong("message", "no envelope", "type, payload, seq, timestamp")
            seq = message["seq"] if type(message.get("seq")) is int else 0
            match message.get("type"):
                case "hello":
                    return _envelope("hello", seq, self._hello())
                case "episode_start":
                    self._left.clear()
                    self.session.reset()
                    task = payload.get("task")
                    self._words = task.get("name") if isinstance(task, Mapping) else None
                case "episode_end" | "error":
                    self._left.clear()
                case "observation":
                    return _envelope("action", seq, {"actions": await self._action(payload)})
                case other:
                    raise _wrong("type", repr(other)[:40], "hello, observation, episode_start or episode_end")
        except VLAError as error:
            self._left.clear()
            return _envelope("error", seq, {"error": str(Refusal.of(error)), "code": Refusal.of(error).code})
        return None

    async def _action(self, payload: Mapping[Any, Any]) -> np.ndarray:
        if not self._left:
            images = payload.get("images")
            if not isinstance(images, Mapping):
                raise _wrong("images", type(images).__name__, "camera -> picture")
            state = payload.get("state", payload.get("states", payload.get("proprio")))
            words = payload.get("task_description", self._words)
            reply = await self.session.act(Look({str(k): v for k, v in images.items()}, state, words))
            self._left.extend(reply.actions[: 1 if reply.hold else reply.execute])
        return self._left.popleft()

    def _hello(self) -> dict[str, Any]:
        robot = self.service.robot_of(None)
        action = {name: spec for channel in robot.action for name, spec in [_spec(channel)]}
        state = {} if not robot.state_dim else {"state": {"name": "state", "dims": robot.state_dim, "format": "raw"}}
        seen = {"image": {"name": "image", "dims": 0, "format": "rgb_hwc_uint8"}, "language": {"name": "language", "dims": 0,
                "format": "language"}} | state  # fmt: skip
        return {"harness_version": f"tendon-vla {vla.__version__}", "protocol_version": _VERSION, "model_server": "tendon-vla",
                "capabilities": {}, "action_spec": action, "observation_spec": seen}  # fmt: skip


def _spec(channel: Any) -> tuple[str, dict[str, Any]]:
    part, form = _PARTS.get(channel.convention, (channel.name, channel.convention))
    spec: dict[str, Any] = {"name": part, "dims": len(channel.dims), "format": form, "description": channel.unit}
    if channel.low:
        spec["range"] = [min(channel.low), max(channel.high)]
    return part, spec


def _envelope(kind: str, seq: int, payload: Mapping[str, Any]) -> bytes:
    return pack({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()})


def _wrong(where: str, found: str, expected: str) -> Refusal:
    return Refusal("bad_request", where=where, found=found, expected=expected, fix="see docs/serving.md")
