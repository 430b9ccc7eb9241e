"""A simulator process: hosts many environments, steps them through chunks of actions, reports what it sees next.

Started by `vla.evaluate.pool` as its own interpreter, not through `multiprocessing`: a child then never imports the
caller's main module, which may be a training script that takes seconds and gigabytes to import. It must stay free of
torch. Messages travel over a private socket pair; the process ends when its parent does (end of file).
"""

from __future__ import annotations

import importlib
import math
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from vla.errors import VLAError
from vla.evaluate.jobs import Job, Outcome
from vla.resample import standstill

GREY = 127
HELD_STEPS = 8
"""How long the random control holds an action; one drawn per step would average out to standing still."""


@dataclass
class Live:
    """An episode in progress."""

    job: Job
    sim: Any
    steps: int = 0
    success: bool | None = None
    """None while undecided. Frozen at the first verdict, since a swapped episode goes on after it."""
    failure: bool = False
    watched: bool = False
    frames: list[np.ndarray] = field(default_factory=list)
    stride: int = 1

    def begin(self, observation: dict[str, Any]) -> bool:
        """Called once, with what is seen first; whether the episode is over by that."""
        return False

    def advance(self, actions: np.ndarray, render: bool) -> tuple[dict[str, Any], bool]:
        """Step through `actions` (k, A); (last observation, episode over). Only the last step draws a picture.

        With a swapped instruction the robot may do what was *originally* named only after it has failed at what was
        given (lifting the wrong cube moves it first), so such an episode runs on until that too is decided.
        """
        observation: dict[str, Any] = {}
        for i, action in enumerate(actions):
            wanted = render and i == len(actions) - 1
            observation, _, terminated, truncated, info = self.sim.step(action, render=wanted)
            self.steps += 1
            if self.job.record and self.steps % self.stride == 0:
                self.frames.append(self.sim.frame(self.job.record))
            if self.success is None and (terminated or truncated):
                self.success, self.failure = bool(info["success"]), bool(info["failure"])
            self.watched = any(info.get("watched", {}).values())
            over = truncated or bool(self.success) or (self.success is not None and (not self.job.given or self.watched))
            if over or self.steps >= self.sim.max_steps:
                return observation, True
        return observation, False

    def outcome(self) -> Outcome:
        """The verdict, with the clip encoded."""
        job, success = self.job, bool(self.success)
        original = None if job.condition != "swap" else self.watched if job.given else success
        clip, fps = None, 0.0
        if job.record:
            fps = self.sim.spec.control_hz / self.stride
            clip = encode_clip([*self.frames, self.sim.frame(job.record)], fps)
        return Outcome(job.id, success, self.failure, self.steps, original, clip, fps, self.stride)


class Host:
    """The environments of one process. Finished ones are kept and reused by the next episode of the same group."""

    def __init__(self, module: str, suite: str, image_size: int, limit: int) -> None:
        self.module, self.suite, self.image_size, self.limit = importlib.import_module(module), suite, image_size, limit
        self.idle: dict[str, list[Any]] = {}
        self.live: dict[int, Live] = {}

    def take(self, job: Job) -> Any:
        """An environment able to play `job`; one idle in another group makes room when there are too many."""
        if self.idle.get(job.group):
            return self.idle[job.group].pop()
        others = [sims for sims in self.idle.values() if sims]
        if others and len(self.live) + sum(map(len, others)) >= self.limit:
            others[0].pop().close()
        return self.module.make_sim(self.suite, job.task, image_size=self.image_size)

    def start(self, job: Job) -> tuple[Live, dict[str, Any]]:
        """Reset an environment to the job's scene."""
        sim = self.take(job)
        options: dict[str, Any] = {"render": job.controller == "policy" and not job.blank}
        if (judged := job.given or job.task) != sim.task or job.given:
            options["task"] = judged
        if job.given:
            options["watch"] = [job.task]
        observation, _ = sim.reset(seed=job.seed, options=options)
        live = _kind(job)(job, sim, stride=max(1, math.ceil(sim.spec.control_hz / 20)))
        if job.record:
            live.frames.append(sim.frame(job.record))
        self.live[job.id] = live
        return live, observation

    def handle(self, starts: list[Job], chunks: dict[int, np.ndarray]) -> tuple[list[Outcome], list[tuple[int, int, dict]]]:
        """Start jobs and play chunks (k, A). Returns finished episodes and (job, steps so far, observation) of the others."""
        done: list[Outcome] = []
        waiting: list[tuple[int, int, dict]] = []
        for job in starts:
            live, observation = self.start(job)
            if job.controller == "policy":
                if live.begin(observation):
                    done.append(self.finish(live))
                else:
                    waiting.append((job.id, live.steps, self.seen(live, observation)))
                continue
            control = Controller(job, live.sim)
            while not live.advance(control(live.steps)[None], render=False)[1]:
                pass
            done.append(self.finish(live))
        for job_id, chunk in chunks.items():
            live = self.live[job_id]
            observation, over = live.advance(chunk, render=not live.job.blank)
            if over:
                done.append(self.finish(live))
            else:
                waiting.append((job_id, live.steps, self.seen(live, observation)))
        return done, waiting

    def seen(self, live: Live, observation: dict[str, Any]) -> dict[str, Any]:
        """The observation the policy is shown: the real one, or every camera at mean grey."""
        if not live.job.blank:
            return observation
        grey = np.full((self.image_size, self.image_size, 3), GREY, np.uint8)
        return {**observation, "images": dict.fromkeys(live.sim.spec.cameras, grey)}

    def finish(self, live: Live) -> Outcome:
        """Close the books of an episode and put its environment back."""
        outcome = live.outcome()
        del self.live[live.job.id]
        self.idle.setdefault(live.job.group, []).append(live.sim)
        return outcome

    def close(self) -> None:
        """Release every renderer; EGL complains at exit about those left open."""
        for sim in [s for sims in self.idle.values() for s in sims] + [live.sim for live in self.live.values()]:
            sim.close()
        self.idle, self.live = {}, {}


def _kind(job: Job) -> type[Live]:
    if job.takeover is None:
        return Live
    from vla.evaluate.taken_over import TakenOver  # with it come Parquet and video, which evaluation can do without

    return TakenOver


class Controller:
    """What moves the robot when no policy does: `controller(step) -> (A,)` float32."""

    def __init__(self, job: Job, sim: Any) -> None:
        self.job, self.sim = job, sim
        self.low, self.high = sim.spec.limits("action")
        self.rng = np.random.default_rng([job.seed, 8])
        self.held = np.zeros_like(self.low)

    def __call__(self, step: int) -> np.ndarray:
        """The action of this step; the random one changes every `HELD_STEPS`."""
        match self.job.controller:
            case "expert":
                return np.asarray(self.sim.expert(), np.float32)
            case "random":
                if step % HELD_STEPS == 0:
                    self.held = self.rng.uniform(self.low, self.high).astype(np.float32)
                return self.held
            case "replay":
                assert self.job.actions is not None
                if step < len(self.job.actions):
                    return self.job.actions[step]
                return standstill(self.sim.spec, self.job.actions[-1])
        raise ValueError(f"controller {self.job.controller!r}")


def encode_clip(frames: list[np.ndarray], fps: float) -> bytes:
    """Frames (h, w, 3) uint8 as an mp4 every browser plays (h264, yuv420p, header first); the last one stays 0.8 s."""
    frames = frames + frames[-1:] * max(1, round(0.8 * fps))
    height, width = (side - side % 2 for side in frames[0].shape[:2])
    with tempfile.TemporaryDirectory() as folder:  # a header in front needs a second pass over a real file
        path = Path(folder) / "clip.mp4"
        _write_mp4(path, frames, width, height, fps)
        return path.read_bytes()


def _write_mp4(path: Path, frames: list[np.ndarray], width: int, height: int, fps: float) -> None:
    import av

    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=max(1, round(fps)))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1
        stream.options = {"crf": "27", "preset": "veryfast", "profile": "high"}
        for frame in frames:
            picture = np.ascontiguousarray(frame[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def serve(connection: Connection) -> None:
    """Answer messages until the parent hangs up.

    In: ("open", module, suite, image_size, limit) or ("go", lane, starts, chunks). Out: ("ready", cpu_s) once per open,
    ("did", lane, outcomes, waiting, cpu_s), or ("error", exception or traceback text), after which the parent gives up.
    """
    host: Host | None = None
    try:
        while True:
            message = connection.recv()
            try:
                if message[0] == "open":
                    if host is not None:
                        host.close()
                    host = Host(*message[1:])
                    connection.send(("ready", time.process_time()))
                    continue
                assert host is not None
                done, waiting = host.handle(*message[2:])
                connection.send(("did", message[1], done, waiting, time.process_time()))
            except VLAError as error:
                connection.send(("error", error))
            except Exception:
                connection.send(("error", traceback.format_exc()))
    except (EOFError, ConnectionResetError, BrokenPipeError):
        pass
    finally:
        if host is not None:
            host.close()


def main() -> None:
    """Entry point of the process: the only argument is the number of the inherited socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then hangs up
    serve(Connection(int(sys.argv[1])))
