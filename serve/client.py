"""What a robot imports: a policy behind `vla serve`. Needs numpy, msgpack and websockets; no torch, no pydantic.

    with Client("ws://gpu-box:8000", token, expect=embodiment) as client:
        chunk = client.act({"images": {"front": frame}, "state": state}, "push the red cube left")
        ControlLoop(client, robot_io, hz=10, guard=Guard(embodiment), asynchronous=True).run("push the red cube left")

`act` answers or raises within `timeout`, whatever the server or the network does. A connection on which anything went wrong is
dropped, so that an answer that comes late is never taken for the next look's, and a thread connects again: at once, then after
pauses that grow. The server's guard knows nothing of a robot that comes back, as after `reset()`; that somebody's help was asked
for is remembered here.
"""

from __future__ import annotations

import logging
import random
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from serve.alike import Alike
from serve.connection import Connection, near_by
from serve.heard import Chunk, Hello, address_of, chunk_of, hello_of
from serve.refusal import Refusal
from serve.robot import Robot, is_file
from serve.shared import attach, room_for
from serve.wire import Picture, WireError, encode, pack, pieces, unpack
from vla.errors import DataError, UsageError, VLAError

logger = logging.getLogger(__name__)

_OPENING = 5.0
"""Seconds one attempt to connect may take."""
_SHARE = 0.95
"""Of the time there is, what the server is told, so that its own `late` still comes in time and the connection stays."""
_PASSING = ("unavailable", "late", "busy", "internal")
"""Refusals that end by themselves."""


class Client:
    """See the module. From any thread, but one look at a time."""

    def __init__(
        self, address: str = "ws://127.0.0.1:8000", token: str | None = None, *, robot: str | None = None,
        adapter: str | None = None, expect: Robot | Mapping[str, Any] | None = None,
        pictures: Literal["raw", "png", "jpeg"] = "raw", timeout: float = 2.0, wait: float = 5.0,
        reconnect: tuple[float, float] | None = (0.1, 2.0), tls: ssl.SSLContext | None = None, mask: bool = False,
        shared: bool = True,
    ) -> None:  # fmt: skip
        """Connect to `ws://HOST:PORT`, or `wss://` (with `tls`, or what this machine trusts), within `wait` s.

        `robot`, `adapter`: which are meant where `act` does not say. `expect`: the robot that stands here, or its embodiment's
        JSON; a server whose robot is another is refused with all that differs, now and after every change of its policy.
        `pictures`: as they are, or as files of which `png` loses nothing; pictures that are `Encoded` are sent as such.
        `timeout` s of one `act`. `reconnect`: first and longest pause in s between attempts, None for never. `mask`: with a
        random key, for a `ws://` through proxies of strangers (`serve/connection.py`). `shared`: to a server on this computer
        pictures go through memory (`serve/shared.py`) and the rest through a local socket, where the system allows it.

        Raises `Refusal` when there is no server, or it will not have us, `UsageError` for an address that is none, and for
        another robot.
        """
        self.address, self._url, headers = address_of(address, token)
        self.expect = expect if isinstance(expect, Robot | None) else Robot.from_json(expect, "client: expect")
        self.robot = robot or (self.expect.key if self.expect is not None else None)
        self.adapter, self.pictures, self.timeout, self.reconnect = adapter, pictures, timeout, reconnect
        pauses = reconnect is None or 0 < reconnect[0] <= reconnect[1]
        if pictures not in ("raw", "png", "jpeg") or not timeout > 0 or not pauses:
            raise UsageError("client", found=f"pictures={pictures!r}, timeout={timeout}, reconnect={reconnect}",
                             expected="raw, png or jpeg; seconds; a first and a longest pause", fix="leave them out")  # fmt: skip
        self._open: dict[str, Any] = {"headers": headers, "tls": tls, "mask": mask}
        self._near = shared and near_by(self._url)
        self.connections = 0
        """How often it connected; above 1, the connection was lost."""
        self._hello: Hello
        self._turn, self._changed = threading.Lock(), threading.Condition()
        self._link: Connection | None = None  # this and the next three under `_changed`
        self._error: VLAError | None = None
        self._connecting = self._closed = False
        self._seq, self._help, self._asked = 0, "", -1
        self._read = Alike(unpack, 64 << 10)  # chunks
        try:
            with self._changed:
                self._connect()
            self._connected(wait)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------ what is asked

    def act(self, observation: Mapping[str, Any], instruction: str, robot: str | None = None) -> Chunk:
        """One chunk for `{"images": {camera: (h, w, 3) uint8}, "state": (S,) float32}`; with "time" (s on `time.monotonic`), when
        it was taken, and "executed", how many steps of the chunk before were carried out, where that is known.

        A chunk may be a hold: see `Chunk.hold`. Raises `Refusal` within `timeout`: the server's own, `late`, `unavailable`, or
        `needs_help` where the server asked for help and was lost before `resume()`; `UsageError` when another robot is served
        now, `DataError` for what is no observation.
        """
        began, name = time.monotonic(), robot or self.robot
        deadline = began + self.timeout
        look = self._look_of(observation, instruction, name)
        with self._one_at_a_time(deadline):
            link = self._connected(self.timeout, deadline)
            if self._help and self._asked != self.connections:
                raise Refusal("needs_help", where=self.address, found=self._help, expected="somebody who looks at the robot",
                              fix="client.resume()")  # fmt: skip
            try:
                images = {camera: self._picture(camera, frame) for camera, frame in observation["images"].items()}
                if (taken := observation.get("time")) is not None:
                    look["age"] = max(0.0, time.monotonic() - float(taken))
                instruction.encode()  # half a surrogate is in no encoding
            except (TypeError, ValueError, OverflowError) as error:
                raise DataError("observation", found=f"{type(error).__name__}: {error}"[:300], expected="RGB frames by camera, "
                                "a time in seconds, words", fix="look at what the driver gives") from None  # fmt: skip
            if self._near:
                images = self._laid(link, images, deadline)
            look["deadline"] = max(0.0, _SHARE * (deadline - time.monotonic()))
            said = self._ask(link, look, "chunk", deadline, images)
            chunk = self._chunk_of(link, said, name, 1e3 * (time.monotonic() - began))
            self._help, self._asked = chunk.needs_help, self.connections
            if chunk.policy != self._hello.policy:  # swapped meanwhile: another policy may be one for another robot
                self._hear(link, self._ask(link, {"type": "hello"}, "hello", deadline))
            return chunk

    def reset(self) -> None:
        """Another episode begins: the server forgets where the robot was, and that it asked for help."""
        self._tell("reset")

    def resume(self) -> None:
        """Help was given: the server moves the robot again."""
        self._tell("resume")

    def close(self) -> None:
        """Say goodbye. An `act` under way in another thread ends with a `Refusal`. Idempotent."""
        with self._changed:
            self._closed, link, self._link = True, self._link, None
            self._changed.notify_all()
        if link is not None:
            if not (mine := self._turn.acquire(blocking=False)):
                link.abort()  # wakes whoever waits there
                mine = self._turn.acquire(timeout=self.timeout)
            link.close()
            if mine:
                self._turn.release()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ what is known

    @property
    def policy(self) -> str:
        """Fingerprint of what is served, as of when the server last said so."""
        return self._hello.policy

    @property
    def robots(self) -> Mapping[str, Robot]:
        """Every robot that is served, by the key of its embodiment."""
        return self._hello.robots

    @property
    def said(self) -> Mapping[str, Any]:
        """All that the server said of itself: `adapters`, `instructions`, `symbols`, ..."""
        return self._hello.said

    def steps(self, robot: str | None = None) -> tuple[int, int]:
        """(steps of a chunk, steps carried out before looking again). Raises `UsageError` for a robot that is not served."""
        steps = self._hello.steps
        name = robot or self.robot or (next(iter(steps)) if len(steps) == 1 else None)
        if name is None or name not in steps:
            raise UsageError(self.address, found="no robot" if name is None else f"robot {name!r}",
                             expected=f"one of {sorted(steps)}", fix="name one that is served: robot=...")  # fmt: skip
        return steps[name]

    # ------------------------------------------------------------------------------------------------ one question

    def _one_at_a_time(self, deadline: float) -> _Turn:
        if not self._turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise Refusal("busy", where=self.address, found="another call under way", expected="one look at a time",
                          fix="a client for each robot")  # fmt: skip
        return _Turn(self._turn)

    def _tell(self, what: str) -> None:
        """A session that cannot be told is dropped, and what it knew with it: the next one knows as little as after `reset`."""
        deadline = time.monotonic() + self.timeout
        with self._one_at_a_time(deadline):
            self._help = ""
            if (link := self._link) is not None:
                try:
                    self._ask(link, {"type": what}, "ok", deadline)
                except VLAError:
                    if self._link is link:
                        raise

    def _ask(self, link: Connection, message: Mapping[str, Any], wanted: str, deadline: float,
             images: Mapping[str, Picture] | None = None) -> dict[str, Any]:  # fmt: skip
        """Send, and wait for the answer to this very message. Whatever goes wrong but a refusal costs the connection."""
        self._seq += 1
        message = {**message, "seq": self._seq}
        data = [pack(message)] if images is None else pieces(message, images)
        try:
            link.send(data, deadline)
            while True:
                said = self._read(link.receive(deadline))
                kind, seq = (said.get("type"), said.get("seq")) if isinstance(said, dict) else (None, None)
                if kind == wanted and seq == (None if wanted == "hello" else self._seq):
                    return said
                if kind == "refusal" and seq in (None, self._seq):
                    refusal = Refusal.from_json(said)
                    break
                if kind == "hello":  # nobody asked: it has changed
                    self._hear(link, said)
                elif type(seq) is not int or seq >= self._seq:
                    raise ValueError(f"{str(kind)[:40]!r} number {str(seq)[:20]}")
        except BaseException as error:
            why = self._why(error, f"{wanted!r} number {self._seq}", self.timeout)
            self._drop(link, why)
            if why is error or not isinstance(error, Exception):
                raise
            raise why from None
        raise refusal

    def _why(self, error: BaseException, expected: str, seconds: float) -> VLAError:
        """What went wrong, as the robot's side hears it."""
        if isinstance(error, TimeoutError):
            return Refusal("late", where=self.address, found=f"no answer within {seconds:g} s", expected=expected,
                           fix="look at the server and the network, or allow more: timeout=...")  # fmt: skip
        if isinstance(error, OSError) or not isinstance(error, Exception):
            return Refusal("unavailable", where=self.address, found=str(error)[:300] or type(error).__name__, expected="a server",
                           fix="vla serve POLICY; look at the network", retry_after=1.0)  # fmt: skip
        if isinstance(error, VLAError) and not isinstance(error, WireError):
            return error
        found = error.found if isinstance(error, VLAError) else f"{type(error).__name__}: {error}"
        return Refusal("internal", where=self.address, found=found[:300], expected=expected,
                       fix="the same tendon-vla on both sides")  # fmt: skip

    # ------------------------------------------------------------------------------------------------ in and out

    def _look_of(self, observation: Any, instruction: Any, robot: str | None) -> dict[str, Any]:
        """All but the pictures. What only the server can judge is left to it."""
        if self.expect is not None and robot != self.expect.key:
            raise UsageError("act()", found=f"robot {robot!r}", expected=f"{self.expect.key!r}, which stands here",
                             fix="leave robot out, or make the client without expect")  # fmt: skip
        if not isinstance(observation, Mapping) or not isinstance(observation.get("images"), Mapping):
            raise DataError("observation", found=f"{type(observation).__name__} without an 'images' mapping",
                            expected="{'images': {camera: (h, w, 3) uint8}, 'state': (S,) float32}",
                            fix="give the frames by camera name")  # fmt: skip
        if not isinstance(instruction, str):
            raise DataError("instruction", found=type(instruction).__name__, expected="a sentence", fix="say what to do")
        state = observation.get("state")
        try:
            state = None if state is None else np.asarray(state, np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError("state", found=str(error)[:300], expected="(S,) numbers", fix="give the robot's own state") from error
        return {"type": "look", "state": state, "instruction": instruction, "robot": robot, "adapter": self.adapter,
                "executed": observation.get("executed")}  # fmt: skip

    def _picture(self, camera: str, frame: Any) -> Any:
        if isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3:
            return frame if self.pictures == "raw" else encode(frame, self.pictures)
        if not is_file(frame):
            kind = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
            raise DataError(f"camera {camera!r}", found=kind, expected="(h, w, 3) uint8", fix="give the camera's own frame")
        return frame

    def _laid(self, link: Connection, images: Mapping[str, Picture], deadline: float) -> Mapping[str, Any]:
        """Where pictures lie that went to the server's memory instead of the socket; themselves where that cannot be."""
        raw = {camera: frame for camera, frame in images.items() if isinstance(frame, np.ndarray)}
        if not raw or link.shared is False or self._hello.said.get("shares") is not True:
            return images
        if link.shared is None or not link.shared.holds(raw):
            try:
                link.shared = attach(self._ask(link, {"type": "share", "size": room_for(raw)}, "shared", deadline)) or False
            except Refusal:
                if self._link is not link:
                    raise
                link.shared = False
            if link.shared is False:
                return images
        return {**images, **link.shared.put(raw)}

    def _chunk_of(self, link: Connection, said: Mapping[str, Any], robot: str | None, total: float) -> Chunk:
        robots = self._hello.robots
        known = robots.get(robot) if robot is not None else next(iter(robots.values())) if len(robots) == 1 else None
        try:
            return chunk_of(said, None if known is None else known.action_dim, total)
        except (KeyError, TypeError, ValueError) as error:
            why = self._why(error, "a chunk of this robot", self.timeout)
            self._drop(link, why)
            raise why from None

    def _hear(self, link: Connection, said: Mapping[str, Any]) -> None:
        """What the server is now. A server that is none for the robot that stands here costs the connection."""
        try:
            self._hello = hello_of(said, self.address, self.expect)
        except VLAError as error:
            self._drop(link, error)
            raise

    # ------------------------------------------------------------------------------------------------ the connection

    def _connected(self, seconds: float, deadline: float | None = None) -> Connection:
        """The connection, or why there is none after `seconds`."""
        deadline = time.monotonic() + seconds if deadline is None else deadline
        with self._changed:
            while True:
                if self._closed:
                    raise UsageError("client", found="closed", expected="one that is open", fix="make another one")
                if (link := self._link) is not None:
                    try:
                        link.attend(deadline)
                        return link
                    except OSError as error:  # it was lost while nobody looked
                        self._drop(link, self._why(error, "a server", seconds))
                error, left = self._error, deadline - time.monotonic()
                passing = error is None or (isinstance(error, Refusal) and error.code in _PASSING)
                if error is not None and (not passing or not self._connecting or left <= 0):
                    raise error.with_traceback(None)  # the same one each time: it must not grow
                if left <= 0:
                    raise self._why(TimeoutError(), "a server", seconds)
                self._changed.wait(left)

    def _drop(self, link: Connection, why: VLAError) -> None:
        """It is of no use any more."""
        with self._changed:
            if self._link is link:
                self._link, self._error = None, why
                if self.reconnect is not None:
                    self._connect()
                logger.warning("%s: %s", self.address, why.found)
        link.abort()
        link.close()

    def _connect(self) -> None:
        if not self._connecting and not self._closed:
            self._connecting = True
            threading.Thread(target=self._reconnect, name="reconnect", daemon=True).start()

    def _reconnect(self) -> None:
        """Until there is a connection, or nobody wants one any more."""
        pause, most = self.reconnect or (0.0, 0.0)
        while True:
            link, error = None, None
            try:
                link = self._greeted()
            except Exception as failed:  # never a thread that dies and leaves everybody waiting
                error = self._why(failed, "a server", _OPENING)
            with self._changed:
                if link is not None and self._closed:
                    link.close()
                elif link is not None:
                    self._link, self._error = link, None
                    self.connections += 1
                    if self.connections > 1:
                        logger.warning("%s: connected again", self.address)
                else:
                    self._error = error
                self._connecting = link is None and self.reconnect is not None and not self._closed
                self._changed.notify_all()
                # Robots that lost one server do not come back all at once.
                if not self._connecting or self._changed.wait_for(lambda: self._closed, pause * random.uniform(0.5, 1.0)):
                    return
            pause = min(most, 2 * pause)

    def _greeted(self) -> Connection:
        """A connection whose server has said what it is. Raises `VLAError` or `OSError`."""
        deadline = time.monotonic() + _OPENING
        link = self._greeting(deadline)
        local = self._hello.said.get("local") if self._near and self._url.startswith("ws://") else None
        if not local or not isinstance(local, str):
            return link
        try:
            shorter = self._greeting(deadline, local)
        except (VLAError, OSError):  # a port that leads to another computer; a server that has just left
            return link
        link.close()
        return shorter

    def _greeting(self, deadline: float, local: str = "") -> Connection:
        link = Connection(self._url, deadline=deadline, local=local, **self._open)
        try:
            link.send([pack({"type": "hello"})], deadline)
            said = unpack(link.receive(deadline))
            if isinstance(said, dict) and said.get("type") == "refusal":
                raise Refusal.from_json(said)
            self._hear(link, said)
        except BaseException:
            link.close()
            raise
        return link


class _Turn:
    """A lock that is held already, to be given back. A generator that does the same takes 5 us of every look."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._lock.release()
