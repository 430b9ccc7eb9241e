"""Keeps the last seconds, and when something goes wrong writes what happened around it as a LeRobot dataset. No torch.

    with Recorder(Path("data/incidents"), spec, corrections=Path("data/corrections")) as recorder:
        recorder.begin("push the red cube left")
        recorder.tick(observation, action)                # every control step, with what was seen before the action
        recorder.incident("handoff", "learned: 2.1, above 1.4")
        recorder.tick(observation, action, by="person")   # whoever was asked
        recorder.end(success=True)

An incident is a hand-off, a hold or a failure. The episode written begins `before` seconds earlier and goes on until the robot's
episode ends, or until `after` seconds have passed in which nothing more happened and nobody helped. `meta/incidents.jsonl` says
of each what happened at which frame and why, and who acted when; the column `language_persistent` what the robot was told when.
What a person did, where it led to success, goes to `corrections` as episodes of its own: that is what a policy should learn,
while the whole is for people and for detectors.

Pictures are encoded in a thread of the recorder's own. A robot is never made to wait or stopped by it: what cannot be written is
counted in `lost`, with the reason in `problem`.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vla.embodiment import EmbodimentSpec
from vla.errors import DataError, UsageError
from vla.recording import LeRobotWriter
from vla.schema import Episode, Said

LOG = "meta/incidents.jsonl"
Kind = Literal["handoff", "hold", "failure"]
POLICY = "policy"
_WAITING = 4
"""Episodes that may wait to be written; each is held in memory."""


class Tick(NamedTuple):
    """One control step."""

    images: dict[str, np.ndarray]
    state: np.ndarray
    action: np.ndarray
    by: str
    told: str


@dataclass
class Incident:
    """An episode that is going to be written."""

    ticks: list[Tick]
    told: str
    task: str
    seed: int | None
    happened: list[dict[str, Any]] = field(default_factory=list)
    quiet: int = 0
    """Control steps since anything happened or anybody helped."""


class Recorder:
    """See the module. One robot; `tick`, `incident`, `begin` and `end` from one thread."""

    def __init__(
        self, root: str | Path, spec: EmbodimentSpec, *, before: float = 5.0, after: float = 2.0, longest: float = 120.0,
        corrections: str | Path | None = None, video: str = "lossless", header: Mapping[str, Any] | None = None,
        patient: bool = False,
    ) -> None:  # fmt: skip
        """`spec.cameras` carry the size of the frames. `before`, `after`, `longest`: seconds kept from before an incident, added
        after the last one, and of an episode at most (memory is bounded by it). `patient`: wait where episodes come faster than
        they can be written, as a simulator's may, instead of losing them. Raises `UsageError` for a folder of other things
        or times that are none, `MachineError` when the disk is full."""
        if not (before > 0 and after >= 0 and longest >= before + after):
            raise UsageError(
                "recorder",
                found=f"before {before}, after {after}, longest {longest}",
                expected="seconds, and longest at least as many as the others together",
                fix="leave them out",
            )
        self.spec, self.root, hz = spec, Path(root), spec.control_hz
        self._after, self._longest = round(after * hz), max(2, round(longest * hz))
        self._ring: deque[Tick] = deque(maxlen=max(1, round(before * hz)))
        head = {"incidents": True, **(header or {})}
        self._writers = [LeRobotWriter(Path(root), spec, video=video, header=head, language=True)]
        if corrections is not None:
            try:
                self._writers.append(LeRobotWriter(Path(corrections), spec, video=video, header={**head, "corrections": True}))
            except BaseException:
                self._writers[0].close()
                raise
        self._thread = ThreadPoolExecutor(1, "incidents")
        self._pending: deque[Future[None]] = deque()
        self._open: Incident | None = None
        self._told = self._task = ""
        self._seed: int | None = None
        self._bad, self._patient = False, patient
        self._lines: list[dict[str, Any]] = []
        """Of the log, that are not durable yet."""
        self.written = self.corrected = self.lost = 0
        """Episodes of incidents, of corrections, and those that could not be written."""
        self.problem = ""
        """Why the first one could not."""

    # ------------------------------------------------------------------------------------------------ what happens

    def begin(self, instruction: str, task: str = "", seed: int | None = None) -> None:
        """A robot's episode begins; what was kept of the last one is not mixed with it."""
        self._finish(success=False)
        self._ring.clear()
        self._told, self._task, self._seed, self._bad = instruction, task, seed, False

    def tick(self, observation: Mapping[str, Any], action: np.ndarray, by: str = POLICY, told: str = "") -> None:
        """One control step: what was seen, and the command sent then. `by`: "policy", or who else commanded; `told`: the
        instruction in force, where it is not the episode's. Raises `DataError` when pictures are not of the spec's size."""
        tick = self._copied(observation, action, by, told or self._told)
        if self._open is None:
            self._ring.append(tick)
            return
        self._open.ticks.append(tick)
        self._open.quiet = self._open.quiet + 1 if by == POLICY else 0
        if len(self._open.ticks) >= self._longest or self._open.quiet >= max(1, self._after):
            self._finish(success=False)

    def incident(self, kind: Kind, reason: str, **facts: Any) -> None:
        """Something happened just now: what is kept is going to be written. Another one soon after joins the same episode.
        `facts`: JSON, such as scores."""
        if self._open is None:
            self._open = Incident(list(self._ring), self._told, self._task, self._seed)
            self._ring.clear()
        self._open.quiet = 0
        self._open.happened.append({"frame": len(self._open.ticks), "kind": kind, "reason": reason, "time": time.time(), **facts})

    def on_verdict(self, verdict: Any) -> None:
        """For `serve.loop.ControlLoop(on_verdict=...)`: the first of holds in a row, and a call for help, are incidents."""
        bad = bool(verdict.hold or verdict.needs_help)
        if bad and not self._bad:
            self.incident("handoff" if verdict.needs_help else "hold", verdict.needs_help or verdict.reason)
        self._bad = bad

    def end(self, success: bool) -> None:
        """The robot's episode is over. A failure nobody noticed before is an incident of its own: call `incident` first."""
        self._finish(success)
        self._ring.clear()

    def close(self) -> None:
        """Write what is left."""
        self._finish(success=False)
        self._thread.shutdown()
        for writer in self._writers:
            try:
                writer.close()
            except Exception as error:
                self.problem = self.problem or f"{type(error).__name__}: {error}"
        self.lost += len(self._lines)
        self._lines = []

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ what is written

    def _copied(self, observation: Mapping[str, Any], action: np.ndarray, by: str, told: str) -> Tick:
        images = {}
        for name, camera in self.spec.cameras.items():
            frame = observation["images"].get(name)
            if frame is None or frame.shape != (camera.height, camera.width, 3):
                raise DataError(f"recorder, camera {name!r}", found="no frame" if frame is None else str(frame.shape),
                                expected=f"({camera.height}, {camera.width}, 3)", fix="make the recorder with the size of the "
                                "frames: spec.model_copy(update={'cameras': ...})")  # fmt: skip
            images[name] = np.array(frame, np.uint8)  # drivers reuse their buffers
        state = observation.get("state")
        state = np.zeros(0, np.float32) if state is None else np.array(state, np.float32)
        return Tick(images, state, np.array(action, np.float32), by, told)

    def _finish(self, success: bool) -> None:
        """Hand the open episode to the thread."""
        open_, self._open = self._open, None
        if open_ is None or not open_.ticks:
            return
        while self._pending and self._pending[0].done():
            self._pending.popleft()
        if len(self._pending) >= _WAITING:
            if not self._patient:
                self._lose(f"{_WAITING} episodes were still waiting to be written")
                return
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._write, open_, success))

    def _write(self, incident: Incident, success: bool) -> None:
        """In the thread. A robot goes on, whatever a disk or an encoder has to say."""
        ticks, writer = incident.ticks, self._writers[0]
        try:
            spans = _spans([tick.by for tick in ticks])
            told = tuple(Said(start, "subtask", text) for start, _, text in _spans([tick.told for tick in ticks]) if text)
            writer.add(_episode(ticks, incident, self.spec.name, success, told))
            happened = [{**what, "frame": min(what["frame"], len(ticks) - 1)} for what in incident.happened]
            self._lines.append({"episode_index": writer.num_episodes - 1, "success": success, "incidents": happened,
                                "spans": [list(span) for span in spans]})  # fmt: skip
            if success and len(self._writers) > 1:
                for start, stop, by in spans:
                    if by != POLICY:
                        self._writers[1].add(_episode(ticks[start:stop], incident, self.spec.name, True))
                        self.corrected += 1
        except Exception as error:
            self._lose(f"{type(error).__name__}: {error}")
        self._commit()

    def _commit(self) -> None:
        """Make what was added durable, then say so in the log; what a full disk refuses is tried again with the next episode."""
        try:
            for writer in self._writers:
                writer.commit()
            with open(self._writers[0].root / LOG, "a") as log:
                log.write("".join(json.dumps(line) + "\n" for line in self._lines))
                log.flush()
                os.fsync(log.fileno())
        except Exception as error:
            self.problem = self.problem or f"{type(error).__name__}: {error}"
        else:
            self.written += len(self._lines)
            self._lines = []

    def _lose(self, why: str) -> None:
        self.lost += 1
        self.problem = self.problem or why


def _episode(ticks: list[Tick], incident: Incident, robot: str, success: bool, language: tuple[Said, ...] = ()) -> Episode:
    images = {camera: np.stack([tick.images[camera] for tick in ticks]) for camera in ticks[0].images}
    told = incident.told if language or len({tick.told for tick in ticks}) > 1 else ticks[0].told
    return Episode(images, np.stack([tick.state for tick in ticks]), np.stack([tick.action for tick in ticks]), told,
                   robot, success, incident.task, incident.seed, language)  # fmt: skip


def _spans(names: list[str]) -> list[tuple[int, int, str]]:
    """(first, last + 1, name) of every run of equal names."""
    edges = [0, *(n for n in range(1, len(names)) if names[n] != names[n - 1]), len(names)]
    return [(a, b, names[a]) for a, b in zip(edges[:-1], edges[1:], strict=True)]


class Recorded:
    """A robot's driver (`serve.loop.RobotIO`) that shows every control step to a recorder.

    Between looks nobody asks the driver what it sees, and a dataset needs a picture of every step, so it is asked here then."""

    def __init__(self, io: Any, recorder: Recorder, who: Callable[[], tuple[str, str]] = lambda: (POLICY, "")) -> None:
        """`who()`: (who commands now, the instruction in force)."""
        self.io, self.recorder, self.who = io, recorder, who
        self._seen: Mapping[str, Any] | None = None

    def observe(self) -> Mapping[str, Any]:
        seen = self._seen = self.io.observe()
        return seen

    def act(self, action: np.ndarray) -> bool | None:
        seen = self.io.observe() if self._seen is None else self._seen
        self._seen = None
        self.recorder.tick(seen, action, *self.who())
        return self.io.act(action)
