"""GR00T's ZeroMQ wire, on a port of its own (`vla serve POLICY --gr00t 5555`): a client of Isaac-GR00T N1.6 drives a policy.

    client: {"endpoint": "get_action", "data": {"observation": {"video": {camera: (1, T, h, w, 3) uint8},
             "state": {channel: (1, T, d) float32}, "language": {"task": [[str]]}}, "options": None}, "api_token"?: str}
    server: [{channel: (1, n, d) float32}, info], or {"error": str}

and `ping`, `reset`, `get_modality_config`; `kill` is refused. msgpack, in which an array is the bytes `np.save` writes. One
observation at a time, of which the last of T steps counts. `options` may name a `robot` and an `adapter`; `info` says how many
steps to `execute`, and whether the guard held. Format: NVIDIA/Isaac-GR00T, `gr00t/policy/server_client.py`.

ZeroMQ bounds the parts of a message and not their number, and knows no TLS: beyond a trusted network this port is not to be
opened. Where there are tokens each request carries one, in the clear.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgpack
import numpy as np

from serve.gate import Tokens
from serve.refusal import Refusal
from serve.robot import Channel, Robot
from serve.service import Look, Reply, Service, Session
from serve.wire import WireError, array_of, unpack
from vla.errors import MachineError, UsageError, VLAError

logger = logging.getLogger(__name__)

_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?[a-zA-Z]\d{1,3})', 'fortran_order': (True|False), 'shape': \(((?:\d{1,10}, ?)*\d{0,10})\), \} *\n?"
)
"""What `np.save` writes of an array of numbers. numpy's own reader evaluates this text as Python, and tokenizes it when that
fails; from strangers only the one form is taken."""


# ---------------------------------------------------------------------------------------------------- answering


class Answering:
    """What a request is answered with; knows nothing of ZeroMQ."""

    def __init__(self, service: Service, tokens: Tokens) -> None:
        self.service, self.tokens = service, tokens

    async def answer(self, session: Session, data: bytes) -> bytes:
        """The reply to one request. Never raises."""
        try:
            return _pack(await self._answer(session, data))
        except VLAError as error:
            return _pack({"error": str(Refusal.of(error))})
        except Exception as error:  # whatever it is, the client waits for an answer
            logger.exception("gr00t: no answer")
            return _pack({"error": f"internal: {type(error).__name__}"})

    async def _answer(self, session: Session, data: bytes) -> Any:
        request = unpack(data, self.service.limits)
        if not isinstance(request, Mapping):
            raise _wrong("request", type(request).__name__, '{"endpoint", "data"}')
        token = request.get("api_token")
        if self.tokens and self.tokens.role(token if isinstance(token, str) else None) is None:
            raise Refusal("unauthorized", where="api_token", found="none, or an unknown one", expected="a server's token",
                          fix="PolicyClient(..., api_token=TOKEN)")  # fmt: skip
        given = request.get("data")
        if given is not None and not isinstance(given, Mapping):
            raise _wrong("data", type(given).__name__, "a mapping")
        match request.get("endpoint", "get_action"):
            case "ping":
                return {"status": "ok", "message": "Server is running"}
            case "get_action":
                return await self._action(session, given or {})
            case "reset":
                session.reset()
                return {}
            case "get_modality_config":
                return self._modalities()
            case "kill":
                raise Refusal("forbidden", where="endpoint", found="kill", expected="a server that is stopped where it runs",
                              fix="SIGTERM")  # fmt: skip
            case other:
                raise _wrong("endpoint", repr(other)[:40], "ping, get_action, reset or get_modality_config")

    async def _action(self, session: Session, given: Mapping[Any, Any]) -> list[Any]:
        options = given.get("options") or {}
        if not isinstance(options, Mapping) or not all(
            name in ("robot", "adapter") and isinstance(value, str) for name, value in options.items()
        ):
            raise _wrong("options", str(options)[:80], "None, or {'robot': str, 'adapter': str}")
        robot = self.service.robot_of(options.get("robot"))
        reply = await session.act(look_of(given.get("observation"), robot, options.get("adapter")))
        return [_split(robot.spans("action"), reply.actions), _info(reply)]

    def _modalities(self) -> dict[str, Any]:
        robot = self.service.robot_of(None)
        steps = self.service.engine.info.steps[robot.key][0]
        names = {"video": robot.cameras, "state": [c.name for c in robot.state], "action": [c.name for c in robot.action],
                 "language": ["task"]}  # fmt: skip
        return {part: {"__ModalityConfig_class__": True, "as_json": {
            "delta_indices": list(range(steps)) if part == "action" else [0], "modality_keys": list(keys),
        }} for part, keys in names.items()}  # fmt: skip


def look_of(observation: Any, robot: Robot, adapter: str | None = None) -> Look:
    """Raises `Refusal` or `WireError` for what is no single observation of this robot."""
    parts = observation if isinstance(observation, Mapping) else {}
    video, state, language = (parts.get(name) for name in ("video", "state", "language"))
    if not isinstance(video, Mapping) or not isinstance(language, Mapping) or not isinstance(state or {}, Mapping):
        raise _wrong("observation", f"{type(observation).__name__} with {sorted(map(str, parts))[:8]}", "video, state, language")
    frames = {str(name): _last(entry, f"video.{name}"[:80], 5) for name, entry in video.items()}
    values = {str(name): _last(entry, f"state.{name}"[:80], 3) for name, entry in (state or {}).items()}
    wanted = {channel.name: len(channel.dims) for channel, _ in robot.spans("state")}
    if {name: value.size for name, value in values.items()} != wanted:
        found = ", ".join(f"{name} ({value.size},)" for name, value in values.items())
        expected = ", ".join(f"{name} ({size},)" for name, size in wanted.items())
        raise _wrong("state", found[:200] or "none", f"of robot {robot.key!r}: {expected}")
    flat = np.concatenate([values[name] for name in wanted]) if wanted else None
    return Look(frames, flat, _words(language), robot.key, adapter)


def _last(entry: Any, where: str, dims: int) -> np.ndarray:
    """The newest step of the only observation: (1, T, ...) -> (...)."""
    array = array_of_npy(entry["as_npy"], where) if isinstance(entry, Mapping) and "as_npy" in entry else None
    if array is None or array.ndim != dims or array.shape[0] != 1 or not array.shape[1]:
        found = type(entry).__name__ if array is None else f"{array.dtype} {array.shape}"
        raise _wrong(where, found, "(1, T, h, w, 3) uint8" if dims == 5 else "(1, T, d): one observation a request")
    return array[0, -1]


def _words(language: Mapping[Any, Any]) -> str:
    """The only sentence, whatever it is called: `task`, or `annotation.human.task_description`."""
    entries = list(language.values())
    words = entries[0] if len(entries) == 1 else None
    for _ in "BT":
        words = words[-1] if isinstance(words, list) and words else None
    if not isinstance(words, str) or len(entries[0]) != 1:
        raise _wrong("language", f"{len(entries)} entries, or none of [[str]]", '{"task": [[str]]}, one observation a request')
    return words


def array_of_npy(data: Any, where: str = "array") -> np.ndarray:
    """The array in the bytes of `np.save`, as a view of them. Raises `WireError` unless header and bytes agree."""
    if not isinstance(data, bytes) or data[:6] != b"\x93NUMPY" or data[6:8] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise _unread(where, "no .npy", "what np.save writes")
    head = 10 if data[6] == 1 else 12
    start = head + int.from_bytes(data[8:head], "little")
    said = _HEADER.fullmatch(data[head:start]) if start <= min(len(data), 4096) else None
    if said is None:
        raise _unread(where, "a .npy header that np.save does not write of numbers", "descr, fortran_order, shape")
    shape = tuple(int(n) for n in said[3].decode().replace(" ", "").split(",") if n)
    fortran = said[2] == b"True"
    array = array_of(memoryview(data)[start:], said[1].decode(), shape[::-1] if fortran else shape)
    return array.T if fortran else array


def _split(spans: list[tuple[Channel, slice]], actions: np.ndarray) -> dict[str, np.ndarray]:
    return {channel.name: actions[None, :, dims] for channel, dims in spans}


def _info(reply: Reply) -> dict[str, Any]:
    sure = None if np.isnan(reply.confidence).all() else float(np.nanmean(reply.confidence))
    return {"confidence": sure, "execute": reply.execute, "hold": reply.hold, "reason": reply.reason,
            "needs_help": reply.needs_help, "policy": reply.policy, "timing": dict(reply.timing)}  # fmt: skip


def _pack(message: Any) -> bytes:
    data = msgpack.packb(message, default=_plain)
    assert data is not None
    return data


def _plain(value: Any) -> Any:
    assert isinstance(value, np.ndarray), type(value)
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(value), allow_pickle=False)
    return {"__ndarray_class__": True, "as_npy": file.getvalue()}


def _wrong(where: str, found: str, expected: str) -> Refusal:
    return Refusal("bad_request", where=where, found=found, expected=expected, fix="see docs/serving.md")


def _unread(where: str, found: str, expected: str) -> WireError:
    return WireError(where, found=found, expected=expected, fix="see docs/serving.md for the formats")


# ---------------------------------------------------------------------------------------------------- the socket


@contextlib.asynccontextmanager
async def listening(service: Service, tokens: Tokens) -> AsyncIterator[str | None]:
    """Answers on `settings.gr00t` of the server's own host meanwhile; nothing where that is None. Yields the address.

    Raises `MachineError` without pyzmq, `UsageError` for a port that is taken.
    """
    settings = service.settings
    if settings.gr00t is None:
        yield None
        return
    try:
        import zmq
        import zmq.asyncio
    except ImportError as error:
        raise MachineError("--gr00t", found=str(error), expected="pyzmq",
                           fix='pip install "tendon-vla[serve,gr00t]"') from error  # fmt: skip
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.MAXMSGSIZE, settings.limits.message)  # a longer part ends its connection before it is read
    socket.setsockopt(zmq.RCVHWM, 1)  # who sends before the last answer came waits outside
    socket.setsockopt(zmq.SNDHWM, 4)
    socket.setsockopt(zmq.BACKLOG, settings.connections)
    host = "127.0.0.1" if settings.host == "localhost" else settings.host
    if ":" in host:
        socket.setsockopt(zmq.IPV6, 1)
        host = f"[{host}]"
    try:
        socket.bind(f"tcp://{host}:{settings.gr00t or '*'}")
    except zmq.ZMQError as error:
        context.destroy(linger=0)
        raise UsageError("--gr00t", found=f"{host}:{settings.gr00t}: {error}", expected="a free port of this machine",
                         fix="--gr00t N") from error  # fmt: skip
    address = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    logger.info("gr00t: listening on %s", address)
    if settings.certificate is not None:
        logger.warning("gr00t: %s is not encrypted; TLS is of the other wires only", address)
    serving = asyncio.create_task(_serve(service, tokens, socket), name="gr00t")
    try:
        yield address
    finally:
        serving.cancel()
        await asyncio.wait({serving})
        context.destroy(linger=200)  # ms, for the last answers


async def _serve(service: Service, tokens: Tokens, socket: Any) -> None:
    """One request of a client at a time; clients beside each other. A client is a connection: nobody says when one leaves."""
    answering, settings = Answering(service, tokens), service.settings
    sessions: OrderedDict[bytes, Session] = OrderedDict()
    busy: dict[bytes, asyncio.Task[None]] = {}
    held = 0

    async def answer(client: bytes, data: bytes) -> None:
        nonlocal held
        held += len(data)
        try:
            await socket.send_multipart([client, b"", await answering.answer(sessions[client], data)])
        finally:
            held -= len(data)
            busy.pop(client, None)

    try:
        while True:
            client, *parts = await socket.recv_multipart()
            data = parts[-1] if len(parts) == 2 and not parts[0] else b""  # as a REQ socket sends it; b"" is no request
            if client in busy or len(busy) >= settings.queue + settings.batch or held > service.engine.options.queue_bytes:
                full = Refusal("busy", found="a request before the last one's answer" if client in busy else "too many requests",
                               expected="one at a time", fix="wait for the answer")  # fmt: skip
                await socket.send_multipart([client, b"", _pack({"error": str(full)})])
                continue
            if client not in sessions:
                sessions[client] = Session(service, "gr00t")
                idle = (one for one in sessions if one not in busy)
                if len(sessions) > settings.connections and (oldest := next(idle)) != client:
                    del sessions[oldest]
            sessions.move_to_end(client)
            service.metrics.sessions.labels("gr00t").set(len(sessions))
            busy[client] = asyncio.create_task(answer(client, data))
    finally:
        for task in list(busy.values()):
            task.cancel()
