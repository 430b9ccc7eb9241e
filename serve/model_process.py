"""What has the model: loads a policy, answers batches that come through a socket, leaves when the socket closes.

Started by `serve/backend.py`, one process per policy. `spec` = {"policy": PATH, "adapters": {name: PATH}, "device", "dtype",
"threads", "runtime", "base"}; PATH is a policy folder, a run, a Hub id, an export folder, or `null:ROBOT?ms=100`
(`serve/null.py`).
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from serve.again import AGAIN, chunk_said, kinds_of, look_heard
from serve.shared import Regions
from serve.wire import Encoded
from vla.errors import MachineError, UsageError, VLAError

logger = logging.getLogger(__name__)

_AT_ONCE = 64 << 10
"""Bytes that are received in one step; nearly every batch is smaller."""
Item = tuple[str, str | None, str, int, Mapping[str, Any], np.ndarray | None]
"""(robot, adapter, instruction, seed, camera -> picture, state (S,) float32 or None)."""


class Actor:
    """A policy, or several on one base, that answers batches of mixed robots and adapters."""

    def __init__(self, policies: Mapping[str | None, Any], robots: Mapping[str, Any], name: str) -> None:
        """`policies`: adapter's name, or None, -> what acts. `robots`: key -> embodiment as JSON."""
        self._policies, self._robots, self._name = policies, robots, name
        self._warm, self._broken = 0.0, 0

    def describe(self) -> dict[str, Any]:
        """What `serve.backend.info_of` reads."""
        first = next(iter(self._policies.values()))
        known = {key: policy for policy in self._policies.values() for key in _robots_of(policy)}
        return {
            "policy": _fingerprint(self._policies), "name": self._name, "robots": dict(self._robots),
            "steps": {key: policy.steps(key) for key, policy in known.items()},
            "adapters": [name for name in self._policies if name is not None],
            "instructions": list(first.instructions)[:1000], "symbols": getattr(getattr(first, "codec", None), "size", 0),
            "warm": self._warm,
        }  # fmt: skip

    def warm_up(self) -> None:
        """Two looks of every robot at nothing: what is compiled or cached at the first is there, and its time is known."""
        for name, policy in self._policies.items():
            for key in _robots_of(policy):
                robot = self._robots[key]
                frames = {c: np.zeros((s["height"], s["width"], 3), np.uint8) for c, s in robot["cameras"].items()}
                state = np.array([0.5 * (lo + hi) for c in robot["state"] for lo, hi in zip(c["low"], c["high"], strict=True)])
                for _ in range(2):
                    began = time.perf_counter()
                    (said,) = self.answer([(key, name, "warm up", 0, frames, state.astype(np.float32))])
                    if isinstance(said, VLAError):
                        raise said
                self._warm = max(self._warm, time.perf_counter() - began)

    def answer(self, items: Sequence[Item]) -> list[Any]:
        """For each item (actions, confidence, symbols), or its own `VLAError`: one bad look costs only its sender."""
        said: list[Any] = [None] * len(items)
        groups: dict[tuple[str, str | None], list[int]] = {}
        looks: list[Any] = []
        for i, (robot, adapter, _, _, images, state) in enumerate(items):
            try:
                frames = {camera: p.decode() if isinstance(p, Encoded) else p for camera, p in images.items()}
                looks.append({"images": frames, "state": state})
                self._policy(adapter)
                groups.setdefault((robot, adapter), []).append(i)
            except VLAError as error:
                looks.append(None)
                said[i] = error
        for (robot, adapter), rows in groups.items():
            for i, chunk in zip(rows, self._each(looks, items, rows, robot, adapter), strict=True):
                said[i] = chunk if isinstance(chunk, VLAError) else (chunk.actions, chunk.confidence, chunk.symbols)
        self._broken = self._broken + 1 if any(isinstance(one, MachineError) for one in said) else 0
        if self._broken >= 3:
            raise RuntimeError("three batches in a row failed: the device, not the input")
        return said

    def speak(self, items: Sequence[Item], words: Sequence[Any]) -> list[Any]:
        """What is said to a question (question, candidates, said, most) about the first picture of the one item, as
        `serve.engine.Spoken` knows it, or a `VLAError`."""
        (_, adapter, _, _, images, _), (question, candidates, said, most) = items[0], words
        try:
            policy, picture = self._policy(adapter), next(iter(images.values()), None)
            if not hasattr(policy, "score_answers"):
                raise UsageError("policy", found=f"{self._name}, which says actions and no words", expected="one that speaks",
                                 fix="a policy folder trained with mixture.answers; another planner")  # fmt: skip
            frame = picture.decode() if isinstance(picture, Encoded) else picture
            scores = policy.score_answers(frame, question, candidates).tolist() if candidates else []
            spoken = {"ids": (), "likely": 0.0, "ended": False, "text": "", "scores": scores}
            if not candidates:
                from vla.policy.words import say

                spoken |= vars(say(policy, frame, question, said, most))
            return [spoken]
        except VLAError as error:
            return [error]
        except Exception as error:
            logger.exception("the policy failed")
            return [MachineError("policy", found=type(error).__name__, expected="an answer", fix="see the server's log")]

    def _each(self, looks: list[Any], items: Sequence[Item], rows: list[int], robot: str, adapter: str | None) -> list[Any]:
        """Chunks or errors. An error is somebody's: who else is with them does not pay for it."""
        try:
            return self._act(looks, items, rows, robot, adapter)
        except VLAError as error:
            if len(rows) == 1:
                return [error]
        except Exception as error:  # models raise anything; what they say is for the log, not for the network
            logger.exception("the policy failed")
            if len(rows) == 1:
                return [MachineError("policy", found=type(error).__name__, expected="a chunk", fix="see the server's log")]
        return [one for i in rows for one in self._each(looks, items, [i], robot, adapter)]

    def _policy(self, adapter: str | None) -> Any:
        if adapter is None and None not in self._policies and len(self._policies) == 1:
            return next(iter(self._policies.values()))
        if adapter not in self._policies:
            raise UsageError("adapter", found=repr(adapter), expected=f"one of {sorted(map(str, self._policies))}",
                             fix="name one of them in the request")  # fmt: skip
        return self._policies[adapter]

    def _act(self, looks: list[Any], items: Sequence[Item], rows: list[int], robot: str, adapter: str | None) -> list[Any]:
        policy = self._policy(adapter)
        if hasattr(policy, "act_batch"):
            return policy.act_batch(
                [looks[i] for i in rows], [items[i][2] for i in rows], robot, seeds=[items[i][3] for i in rows]
            )
        return [policy.act(looks[i], items[i][2], robot) for i in rows]


def load(spec: Mapping[str, Any]) -> Actor:
    """The policy of `spec`, loaded and warm. Raises the `VLAError` of what it lacks."""
    path = str(spec["policy"])
    if path.startswith("null:"):
        from serve.null import NullPolicy

        if spec.get("adapters"):
            raise UsageError("adapters", found=path, expected="a policy folder", fix="leave --adapter-folder out")
        null = NullPolicy.parse(path)
        actor = Actor({None: null}, {null.robot: null.embodiment}, path)
    elif (Path(path) / "export.json").is_file():
        if spec.get("adapters"):
            raise UsageError("adapters", found=f"an export folder: {path}", expected="a policy folder",
                             fix="leave --adapter-folder out")  # fmt: skip
        from serve.edge import EdgePolicy

        edge = EdgePolicy.load(path, spec.get("runtime"), spec.get("threads"))
        embodiments = json.loads((Path(path) / "export.json").read_text())["embodiments"]
        actor = Actor({None: edge}, embodiments, path)
    else:
        actor = _torch_actor(path, spec)
    actor.warm_up()
    return actor


def _torch_actor(path: str, spec: Mapping[str, Any]) -> Actor:
    import torch

    from vla.policy import Adapters, load_policy

    if threads := spec.get("threads"):
        torch.set_num_threads(int(threads))
    options: dict[str, Any] = {"device": spec.get("device"), "base": spec.get("base")}
    if spec.get("dtype"):
        options["dtype"] = getattr(torch, str(spec["dtype"]))
    adapters = dict(spec.get("adapters") or {})
    policies: dict[str | None, Any] = {}
    if adapters:  # POLICY is what they were trained on
        options["base"] = spec.get("base") or path
        many = Adapters(adapters, **options)
        policies = {name: many[name] for name in many}
    else:
        policies[None] = load_policy(path, **options)
    robots = {key: e.model_dump(mode="json") for p in policies.values() for key, e in p.embodiments.items()}
    return Actor(policies, robots, path)


def _robots_of(policy: Any) -> list[str]:
    return list(policy.embodiments if hasattr(policy, "embodiments") else policy.robots)


def _fingerprint(policies: Mapping[str | None, Any]) -> str:
    parts = [policy.fingerprint for policy in policies.values()]
    return parts[0] if len(parts) == 1 else "+".join(part[:12] for part in parts)


# ---------------------------------------------------------------------------------------------------- the process


def main(conversation: int, pictures: int) -> None:
    """Answer batches from the socket `conversation`, whose pictures lie in the file `pictures`."""
    _die_with_the_server()
    line = socket.socket(fileno=conversation)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if (spec := _receive(line, bytearray(_AT_ONCE))) is None:
            return
        actor = load(msgpack.unpackb(spec))
    except VLAError as error:
        _say(line, {"error": _error(error)})
        return
    except MemoryError as error:
        _say(line, {"error": _error(MachineError("policy", found=f"MemoryError: {error}", expected="room for it",
                                                  fix="a smaller policy, or a larger machine"))})  # fmt: skip
        return
    _say(line, actor.describe())
    memory, regions, room = np.zeros(0, np.uint8), Regions(os.getppid()), bytearray(_AT_ONCE)
    items, words, kinds = list[Item](), None, None
    while (heard := _receive(line, room)) is not None:
        began = time.perf_counter()
        if heard.startswith(AGAIN):
            items = [(*items[0][:5], look_heard(heard))]
        else:
            said = msgpack.unpackb(heard, use_list=True, strict_map_key=False)
            if len(memory) != said["room"]:
                memory = np.frombuffer(mmap.mmap(pictures, said["room"]), np.uint8) if said["room"] else memory
            if "regions" in said:
                regions.named(said["regions"], said["gone"])
            items, words = [_item(one, memory, regions) for one in said["batch"]], said.get("words")
        results = [_arrays(one) for one in (actor.answer(items) if words is None else actor.speak(items, words))]
        before, kinds = kinds, kinds_of(results)
        if kinds is not None and kinds == before:
            _send(line, chunk_said(results[0], time.perf_counter() - began))
        else:
            _say(line, {"results": [_result(one) for one in results], "seconds": time.perf_counter() - began})


def _item(said: Any, memory: np.ndarray, regions: Regions) -> Item:
    robot, adapter, instruction, seed, pictures, state = said
    images: dict[str, Any] = {}
    for camera, kind, at, size, shape in pictures:
        if kind == "shared":  # `size` is the number of its region
            images[camera] = regions.picture(size, at, shape)
            continue
        data = memory[at : at + size]
        images[camera] = data.reshape(shape) if kind == "raw" else Encoded(data.tobytes(), kind, shape[0], shape[1])
    return robot, adapter, instruction, seed, images, None if state is None else np.frombuffer(state, np.float32)


def _arrays(one: Any) -> Any:
    """A chunk as it travels; every other result as it is."""
    if not isinstance(one, tuple):
        return one
    actions, confidence, symbols = one
    return np.asarray(actions, np.float32), np.asarray(confidence, np.float32), np.asarray(symbols)


def _result(one: Any) -> dict[str, Any]:
    if isinstance(one, VLAError):
        return {"error": _error(one)}
    if isinstance(one, dict):
        return {"spoken": one}
    return {"chunk": [(part.tobytes(), part.dtype.str, part.shape) for part in one]}


def _error(error: VLAError) -> dict[str, str]:
    # What it is called where everybody knows it: a `WireError` is a `DataError` of its own.
    kinds = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == VLAError.__module__)
    return {"kind": next(kinds), "where": error.where, "found": error.found, "expected": error.expected,
            "fix": error.fix}  # fmt: skip


def _say(line: socket.socket, message: Any) -> None:
    data = msgpack.packb(message)
    assert data is not None
    _send(line, data)


def _send(line: socket.socket, data: bytes) -> None:
    try:
        line.sendall(len(data).to_bytes(4, "big") + data)
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)


def _receive(line: socket.socket, room: bytearray) -> bytes | None:
    """The next message, received into `room`, which grows with it; None when the server has gone."""
    heard = size = 0
    while heard < 4 or heard < size:
        if size > len(room):
            room.extend(bytes(size - len(room)))
        try:
            part = line.recv_into(memoryview(room)[heard:])  # no more than one message: the server waits for its answer
        except ConnectionResetError:
            return None
        if not part:
            return None
        heard += part
        size = 4 + int.from_bytes(room[:4], "big") if heard >= 4 else 0
    return bytes(memoryview(room)[4:size])


def _die_with_the_server() -> None:
    """A server that was killed leaves no model behind that holds a GPU (Linux; elsewhere the socket's end tells)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:
            sys.exit(0)
