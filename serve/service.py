"""What every wire serves: a robot's session with its guard, over the one engine.

    observation -> wire -> Session -> engine -> guard -> Reply: a chunk, or a hold with its reason
                              guard meanwhile

A wire turns its own messages into a `Look` and a `Reply` into its own words, and does nothing else.
"""

from __future__ import annotations

import asyncio
import difflib
import itertools
import math
import mmap
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serve.engine import Engine
from serve.guard import Guard
from serve.metrics import Metrics
from serve.patience import ROOM
from serve.refusal import Refusal
from serve.requests import Answer, Info, Request, Start, telling
from serve.robot import Robot
from serve.settings import ServeSettings
from serve.shared import Placed, Region, bare, lying
from serve.wire import Encoded, Limits, Picture, bounded
from vla.errors import UsageError, VLAError
from vla.prompt import clean_instruction
from vla.schema import all_finite

SHORTEST = 0.001
"""Seconds of a deadline. Less is a mistake, not a wish."""
_spots = itertools.count()
"""Numbers for where pictures lie; see `serve.requests.Request.spot`."""


@dataclass
class Look:
    """One observation, as any wire says it."""

    images: Mapping[str, Picture] = field(default_factory=dict)
    """Camera, or the wire's name of it -> picture."""
    state: Any = None
    instruction: Any = ""
    robot: str | None = None
    adapter: str | None = None
    seq: int | None = None
    """Must grow within a session."""
    age: float = 0.0
    """Seconds, when it was sent."""
    executed: int | None = None
    """Steps of the last chunk that were carried out; None when nobody knows."""
    deadline: float | None = None
    """Seconds from now."""
    seed: int = 0


@dataclass(eq=False)  # one a look: to freeze it costs 1.2 us
class Reply:
    """One chunk, judged."""

    actions: np.ndarray  # (n, A) float32, robot units: finite and inside the limits
    confidence: np.ndarray  # (n, A) float32
    symbols: np.ndarray
    execute: int
    """Steps to carry out before looking again."""
    hold: bool
    reason: str
    needs_help: str
    policy: str
    timing: dict[str, float]
    """ms: `infer` of the batch, `wait` before it, `serve` all of it here."""
    batch: int


class Service:
    """Engine, settings and counters of one server."""

    def __init__(self, engine: Engine, settings: ServeSettings, metrics: Metrics | None = None) -> None:
        """Raises `UsageError` when a robot's guard lacks limits; see `check`."""
        self.engine, self.settings, self.metrics = engine, settings, metrics or engine.metrics
        self.local = ""
        """Name of the local socket through which clients on this computer may come; empty where there is none."""
        self.limits = settings.limits
        """Of one message; the settings make them anew whenever they are asked."""
        self.audit: Any = None
        if settings.audit:
            from serve.audit import AuditLog

            self.audit = AuditLog(settings.audit, keep=settings.audit_keep)
            self.audit.note("start")
            if self.audit.dropped:
                raise UsageError("--audit", found=f"nothing can be written to {settings.audit}", expected="a folder of its own",
                                 fix="another folder, or make room")  # fmt: skip
        self.starter: Callable[[dict[str, Any]], Start] | None = None
        """Changes to what is served -> what starts that; None where policies cannot be swapped."""

    def check(self, info: Info | None = None) -> None:
        """Raise `UsageError` unless every robot of the policy (the one that answers, or `info`) can be guarded and everything the
        settings name is there."""
        info = info or self.engine.info
        names = set(info.robots)
        problems = [f"robot {n!r} of {where}" for n, where in [(self.settings.robot, "--robot"),
                    *((n, "guard") for n in self.settings.guard if n != "*")] if n is not None and n not in names]  # fmt: skip
        cameras = {camera for robot in info.robots.values() for camera in robot.cameras}
        problems += [f"camera {c!r} of cameras" for c in self.settings.cameras.values() if c not in cameras]
        if self.settings.adapter is not None and self.settings.adapter not in info.adapters:
            problems.append(f"adapter {self.settings.adapter!r}")
        if problems:
            raise UsageError("vla serve", found=f"no such {', '.join(problems)}",
                             expected=f"robots {sorted(names)}, cameras {sorted(cameras)}, adapters {sorted(info.adapters)}",
                             fix="name one of these")  # fmt: skip
        for robot in info.robots.values():
            try:
                self.guard_of(robot)
            except UsageError as error:
                raise UsageError(f"guard of robot {robot.key!r}", found=error.found, expected=error.expected,
                                 fix=f"--guard FILE.yaml with  {robot.key}: {{jump: {{CHANNEL: MOST}}, waive: [CHANNEL]}}",
                ) from error  # fmt: skip

    def guard_of(self, robot: Robot, session: str = "") -> Guard:
        """A fresh guard for this robot, writing to the audit log where there is one."""
        options = self.settings.guard_of(robot.key).model_dump()
        guard = Guard(robot, **options)
        if self.audit is not None and session:
            self.audit.watch(guard, session)
        return guard

    def robot_of(self, name: str | None) -> Robot:
        """The robot a client means. `Refusal` naming the nearest when there is none."""
        info = self.engine.info
        name = name or self.settings.robot or (next(iter(info.robots)) if len(info.robots) == 1 else None)
        if name is not None and name in info.robots:
            return info.robots[name]
        near = difflib.get_close_matches(str(name), info.robots, 1)
        raise Refusal("bad_request", where="robot", found="none" if name is None else repr(name)[:80],
                      expected=f"one of {sorted(info.robots)}",
                      fix=f"did you mean {near[0]!r}?" if near else "name one of them")  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """What a client is told when it comes: protocol, policy, robots."""
        info: Info = self.engine.info
        return {
            "server": "tendon", "policy": info.policy, "name": info.name.rpartition("/")[2], "robots": dict(info.embodiments),
            "steps": {key: list(steps) for key, steps in info.steps.items()}, "adapters": list(info.adapters),
            "instructions": list(info.instructions[:200]), "symbols": info.symbols, "ready": self.engine.ready,
            "planner": self.settings.planner.kind.partition(":")[0] if self.settings.planner else "", "pid": os.getpid(),
        }  # fmt: skip


class Session:
    """One client's dealings with one robot. One request at a time."""

    def __init__(self, service: Service, wire: str, lasting: bool = True) -> None:
        """`lasting`: more than one look will come of it; over HTTP each stands by itself."""
        self.service, self.wire, self.id = service, wire, uuid.uuid4().hex[:16]
        self._client = self.id if lasting else ""
        self.guard: Guard | None = None
        """Of the robot that was looked at last."""
        self._guards: dict[str, Guard] = {}
        self._ok = service.metrics.requests.labels(wire, "ok")
        self._seq = -math.inf
        self.region: Region | None = None
        """Where a client on this computer lays its pictures."""
        self._laid: tuple[Any, Mapping[str, Any]] = None, {}
        """What a client said last of where its pictures lie, and they."""
        self._named: tuple[Any, Robot | None, dict[str, Picture], int | None] = None, None, {}, None
        """Such pictures, whose, the same by its cameras' names, and a number for where they lie. The next look's lie there as
        well, mostly, and are known by being the same mapping (`serve.alike.Alike`)."""
        self._said, self._words = None, ""
        """An instruction and what is left of it when it is cleaned; the next look's is mostly the same."""

    def reset(self) -> None:
        """Another episode: nothing is known of where the robot is."""
        self._seq = -math.inf
        for guard in self._guards.values():
            guard.reset()

    def share(self, size: int) -> Region:
        """Memory of at least `size` bytes that this computer's processes see, in place of what there was.

        Raises `Refusal` for more than a message may hold, and where there is none to be had: then pictures come as before.
        """
        most = self.service.limits.message
        if not 0 < size <= most:
            raise Refusal("too_large", where="share", found=f"{size:,} bytes", expected=f"at most {most:,}", fix="send them")
        self.close()
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if not ROOM.take(size):
            raise Refusal("busy", where="share", found="no room", expected=f"{size:,} bytes", fix="send them", retry_after=1.0)
        try:
            self.region = Region(size)
        except OSError as error:
            ROOM.give(size)
            raise Refusal("unavailable", where="share", found=str(error), expected="memory to share", fix="send them") from None
        return self.region

    def pictures(self, said: Mapping[str, Any]) -> Mapping[str, Any]:
        """`said`, with those pictures that are said to lie in the region. Raises `WireError` for what does not."""
        if self.region is None:
            return said
        known, pictures = self._laid
        if said is not known:
            pictures = lying(said, self.region, self.service.limits)
            if all(isinstance(picture, Placed) and bare(name, said[name]) for name, picture in pictures.items()):
                self._laid = said, pictures  # nothing else would be known again, and is not kept
        return pictures

    def close(self) -> None:
        """It has left. Idempotent."""
        if self.region is not None:
            ROOM.give(self.region.size)
            self.region.close()
            self.region = None
            self._laid, self._named = (None, {}), (None, None, {}, None)  # they would keep what they lie in

    def resume(self) -> None:
        """Help was given."""
        for guard in self._guards.values():
            guard.resume()

    async def act(self, look: Look) -> Reply:
        """`begin`, and what comes of it. Raises `Refusal`."""
        reply = asyncio.get_running_loop().create_future()
        leave = self.begin(look, telling(reply))
        try:
            return await reply
        finally:
            leave()

    def begin(self, look: Look, tell: Callable[[Reply | Refusal], None]) -> Callable[[], None]:
        """Ask, and judge the look meanwhile. `tell` is called once, after this has returned, in the turn of the loop in which the
        model answered, with its chunk judged; not after what is returned was called: nobody waits any more. Raises `Refusal`."""
        began = time.perf_counter()
        try:
            return self._begin(look, began, tell)
        except VLAError as error:
            raise self._refused(error) from None

    def _refused(self, error: Exception) -> Refusal:
        refusal = Refusal.of(error)
        self.service.metrics.requests.labels(self.wire, refusal.code).inc()
        return refusal

    def _begin(self, look: Look, began: float, tell: Callable[[Reply | Refusal], None]) -> Callable[[], None]:
        service = self.service
        robot = service.robot_of(look.robot)
        guard = self.guard = self._guards.get(robot.key)
        if guard is None or (guard.robot is not robot and guard.robot != robot):
            guard = self.guard = self._guards[robot.key] = service.guard_of(robot, self.id)
        given, whose, images, spot = self._named
        if look.images is not given or robot is not whose:
            images, spot = self._images(robot, look.images), None
            if images and all(isinstance(picture, Placed) for picture in images.values()):
                spot = next(_spots)
                self._named = look.images, robot, images, spot
        state = _state(robot, look.state)
        if not isinstance(look.instruction, str) or look.instruction != self._said:  # an array equals nothing, element by element
            self._words, self._said = clean_instruction(look.instruction), look.instruction
        if look.seq is not None:
            if look.seq <= self._seq:
                raise Refusal("stale", where="seq", found=look.seq, expected=f"more than {self._seq}", fix="send looks in order")
            self._seq = look.seq
        adapter, known = look.adapter or service.settings.adapter, service.engine.info.adapters
        if adapter is not None and adapter not in known:
            raise Refusal("bad_request", where="adapter", found=repr(adapter)[:80],
                          expected=f"one of {sorted(known)}" if known else "none: the policy has no adapters",
                          fix="name one of them")  # fmt: skip
        deadline = time.monotonic() + look.deadline if look.deadline is not None else math.inf

        def answered(said: Answer | VLAError) -> None:
            try:
                reply = self._refused(said) if isinstance(said, VLAError) else self._judged(guard, said, began)
            except Exception as error:  # who asked hears of it, whatever it was
                reply = self._refused(error)
            tell(reply)

        leave = service.engine.submit(Request(
            images, state, self._words, robot.key, adapter, look.seed, self._client, deadline, spot=spot,
        ), answered)  # fmt: skip
        # The model has it already: what it says of a look that is refused here is thrown away.
        try:
            if seen := guard.saw({"images": images, "state": state}, look.age, executed=look.executed):
                code = "stale" if seen.startswith(("stale", "repeated")) else "bad_request"
                raise Refusal(code, where="observation", found=seen, expected=f"a fresh look of robot {robot.key!r}",
                              fix="check the camera and the clock")  # fmt: skip
        except BaseException:
            leave()
            raise
        return leave

    def _judged(self, guard: Guard, answer: Answer, began: float) -> Reply:
        """The chunk, or a hold."""
        metrics, helped = self.service.metrics, guard.needs_help
        verdict = guard.chunk(answer.actions, confidence=answer.confidence)
        if guard.needs_help and not helped:
            metrics.help.inc()
        if verdict.hold:
            metrics.holds.labels(verdict.reason.split(":")[0][:40]).inc()
            metrics.requests.labels(self.wire, "hold").inc()
        else:
            self._ok.inc()
        timing = {"infer": 1e3 * answer.infer, "wait": 1e3 * answer.wait, "serve": 1e3 * (time.perf_counter() - began)}
        return Reply(verdict.actions, answer.confidence, answer.symbols, answer.execute, verdict.hold, verdict.reason,
                     verdict.needs_help, answer.policy, timing, answer.batch)  # fmt: skip

    def _images(self, robot: Robot, given: Mapping[str, Picture]) -> dict[str, Picture]:
        """By the robot's own names of its cameras."""
        if given.keys() == set(robot.cameras):
            return {c: _frame(given[c], c, self.service.limits) for c in robot.cameras}
        mapping = self.service.settings.cameras
        images: dict[str, Picture] = {}
        for name, picture in given.items():
            short = name
            for prefix in ("observation.images.", "observation/", "images/", "images.", "video."):
                short = short.removeprefix(prefix)
            images[mapping.get(name) or mapping.get(short) or (name if name in robot.cameras else short)] = picture
        for likely in (
            lambda camera, name: camera in name,
            lambda camera, name: True,
        ):  # `wrist_image` is the wrist's; the last is the last
            wanted = [c for c in robot.cameras if c not in images]
            spare = [name for name in images if name not in robot.cameras]
            pairs = [(c, name) for c in wanted for name in spare if likely(c, name)]
            if len(pairs) == len({c for c, _ in pairs}) == len({name for _, name in pairs}):
                images |= {c: images.pop(name) for c, name in pairs}
        missing = [c for c in robot.cameras if c not in images]
        if missing:
            raise Refusal("bad_request", where="images", found=f"no picture of camera {', '.join(map(repr, missing))} among "
                          f"{sorted(str(name)[:40] for name in given)[:16]}", expected=f"cameras {sorted(robot.cameras)}",
                          fix="name them so, or serve with --camera NAME_ON_THE_WIRE=CAMERA")  # fmt: skip
        return {c: _frame(images[c], c, self.service.limits) for c in robot.cameras}


def _frame(picture: Any, camera: str, limits: Limits) -> Picture:
    if isinstance(picture, Encoded):
        return picture
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.size:
        if picture.shape[2] != 3 and picture.shape[0] == 3:  # openpi's ALOHA sends (3, h, w)
            picture = picture.transpose(1, 2, 0)
        if picture.shape[2] == 3:
            bounded(picture.shape[0], picture.shape[1], limits)
            return picture
    kind = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
    raise Refusal("bad_request", where=f"camera {camera!r}", found=kind, expected="(h, w, 3) uint8, or a JPEG or PNG file",
                  fix="send RGB frames")  # fmt: skip


def _state(robot: Robot, given: Any) -> np.ndarray | None:
    if not robot.state_dim:
        return None
    if (
        isinstance(given, np.ndarray)
        and given.dtype == np.float32
        and given.shape == (robot.state_dim,)
        and all_finite(given)
    ):
        return given
    try:
        raw = np.asarray(given)
        with np.errstate(all="ignore"):
            state = raw.astype(np.float32).reshape(-1) if given is not None and raw.dtype.kind in "biuf" else None
    except (TypeError, ValueError, OverflowError):
        state = None
    if state is None or state.shape != (robot.state_dim,) or not np.isfinite(state).all():
        found = (
            "none"
            if given is None
            else f"{type(given).__name__} of shape {np.shape(given) if isinstance(given, np.ndarray) else '?'}"
        )
        if state is not None and state.shape == (robot.state_dim,):
            found = "numbers that are not finite"
        raise Refusal("bad_request", where="state", found=found,
                      expected=f"{robot.state_dim} finite numbers: {', '.join(robot.names('state'))}",
                      fix="send the state in this order and these units (GET /v1/info)")  # fmt: skip
    return state
