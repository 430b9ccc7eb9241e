"""vla-eval's envelope, `/vla-eval`: the unchanged `vla-eval` package evaluates a policy on its own benchmarks.

    {"type": "hello" | "observation" | "episode_start" | "episode_end" | "action" | "error", "payload", "seq", "timestamp"}

An observation is `{"images": {camera: (h, w, 3)}, "state"?, "task_description"}`; its answer one action (A,), for that harness
moves one step a look: chunks are played here, and the policy is asked again when their part is played. The address may name a
robot and an adapter: `/vla-eval?robot=...&adapter=...`. Format: allenai vla-evaluation-harness, `vla_eval/protocol`.
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
from serve.gate import refuse
from serve.messages import messages, send
from serve.refusal import Refusal
from serve.robot import Robot
from serve.service import Look, Service, Session
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
        try:
            service.engine.info  # noqa: B018  none yet: that client tries the handshake again, and nothing later
        except Refusal as refusal:
            await refuse(socket.scope, socket.receive, socket.send, refusal)
            return
        await socket.accept()
        playing = Playing(service, socket.query_params.get("robot"), socket.query_params.get("adapter"))
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

    def __init__(self, service: Service, robot: str | None = None, adapter: str | None = None) -> None:
        self.service, self.session = service, Session(service, "vla-eval")
        self._robot, self._adapter = robot, adapter
        self._left: deque[np.ndarray] = deque()
        self._played: int | None = None
        """Steps of the chunk that were sent, each before the next look; None before the first chunk of an episode."""
        self._words: Any = None

    async def heard(self, data: bytes | memoryview) -> bytes | None:
        """What to answer, if anything."""
        seq = 0
        try:
            message = unpack(data, self.service.limits)
            if not isinstance(message, Mapping) or not isinstance(payload := message.get("payload"), Mapping):
                raise _wrong("message", "no envelope", "type, payload, seq, timestamp")
            seq = message["seq"] if type(message.get("seq")) is int else 0
            kind = message.get("type")
            match kind if isinstance(kind, str) else type(kind).__name__:
                case "hello":
                    return _envelope("hello", seq, self._hello())
                case "episode_start":
                    self._left.clear()
                    self._played = None
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
            look = Look({str(k): v for k, v in images.items()}, state, words, self._robot, self._adapter, executed=self._played)
            reply = await self.session.act(look)
            self._left.extend(reply.actions[: 1 if reply.hold else reply.execute])
            self._played = 0
        assert self._played is not None
        self._played += 1
        return self._left.popleft()

    def _hello(self) -> dict[str, Any]:
        said: dict[str, Any] = {"harness_version": f"tendon-vla {vla.__version__}", "protocol_version": _VERSION,
                                "model_server": "tendon-vla", "capabilities": {}}  # fmt: skip
        try:
            robot = self.service.robot_of(self._robot)
        except Refusal:  # that client drops what an error says here; the first observation is told
            return said
        state = {} if not robot.state_dim else {"state": {"name": "state", "dims": robot.state_dim, "format": "raw"}}
        seen = {"image": {"name": "image", "dims": 0, "format": "rgb_hwc_uint8"},
                "language": {"name": "language", "dims": 0, "format": "language"}}  # fmt: skip
        wrist = any("wrist" in camera for camera in robot.cameras)
        wanted = {"send_state": bool(robot.state_dim), "send_wrist_image": wrist}
        return said | {"action_spec": _specs(robot), "observation_spec": seen | state,
                       "observation_params": {name: True for name, value in wanted.items() if value}}  # fmt: skip


def _specs(robot: Robot) -> dict[str, dict[str, Any]]:
    """A part that comes twice, as with two arms, goes by our own name of it."""
    specs: dict[str, dict[str, Any]] = {}
    for channel in robot.action:
        part, form = _PARTS.get(channel.convention, (channel.name, channel.convention))
        part = channel.name if part in specs else part
        specs[part] = {"name": part, "dims": len(channel.dims), "format": form, "description": channel.unit}
        if channel.low:
            specs[part]["range"] = [min(channel.low), max(channel.high)]
    return specs


def _envelope(kind: str, seq: int, payload: Mapping[str, Any]) -> bytes:
    return pack({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()})


def _wrong(where: str, found: str, expected: str) -> Refusal:
    return Refusal("bad_request", where=where, found=found, expected=expected, fix="see docs/serving.md")
