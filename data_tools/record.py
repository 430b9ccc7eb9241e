"""Records scripted experts in a simulator as a LeRobot v3.0 dataset: parallel, repeatable, interruptible.

Which scene is recorded for which task depends on the command alone: attempt `j` of the `k`-th of T tasks is scene
`seed + j * T + k`, so no scene is used twice, and episodes are stored in the order of their scenes. Worker count,
timing and interruptions change nothing.

Noise: a demonstrator that never errs never shows how to recover. Two episodes in three are pushed off course, by N(0,
0.3) on every motion dimension and by bursts of 3 steps (begun at 6% of the steps), while the label stays the expert's
clean action at the state actually reached. The unit of the 0.3 is a whole step, or 0.06 rad of a joint's place.

Goals of several subtasks (`tabletop-long`) are recorded with LeRobot's language column: what is to be done now, what is left,
what was done (`vla/recording/language.py`); and with a few steps beyond the end, so that a picture shows what done looks like.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools.working import begin_worker, one_thread_each, terminable
from vla.embodiment import EmbodimentSpec, load_embodiment
from vla.errors import DataError, MachineError, UsageError
from vla.prompt import DONE
from vla.recording import EncodedEpisode, LeRobotWriter, encode_episode
from vla.recording.language import Segment, narrate
from vla.recording.video import VIDEO
from vla.schema import Episode
from vla.sims import SUITES, expand_tasks, find_suite, make_sim

NOISE = {"episodes": 2 / 3, "sigma": 0.3, "burst_probability": 0.06, "burst_steps": 3}
_MOTION = {
    "eef_delta_position": 1.0, "eef_delta_euler_xyz": 1.0, "eef_delta_axis_angle": 0.25, "joint_delta": 1.0,
    "joint_velocity": 1.0, "joint_position": 0.06,
}  # fmt: skip
"""What a noise of 1 is in a channel's own unit: all of a command that is a step (a quarter where it
turns the hand by half a radian), 0.06 rad of a joint's place."""
_TAIL = 4
"""Steps recorded after the last subtask was done."""
_GIVE_UP = 50
"""Failed attempts of one task in a row after which the recorder says so instead of going on for ever."""


def record(
    suite: str, tasks: Sequence[str] | None, episodes: int, seed: int, out: str | Path, *, noise: bool = True,
    workers: int = 2, image_size: int = 64, video: str = "lossless", resume: bool = True, progress: bool = True,
    make: Callable[..., Any] = make_sim,
) -> dict[str, Any]:  # fmt: skip
    """Record until `episodes` successful ones are stored in all, dealt evenly to `tasks` (None: the suite's default).

    Failed attempts are dropped and counted. The same call continues an interrupted recording, or extends a finished
    one to a larger `episodes`. `workers` 0 records in this process. Returns a summary of what lies in `out`.

    Raises `UsageError` for an unknown suite or task and for a dataset begun with other settings, `MachineError`
    without a renderer or disk space, `DataError` when an expert fails 50 times in a row.
    """
    began = time.monotonic()
    names = expand_tasks(suite, list(tasks) if tasks else None)
    least = {"episodes": (episodes, 1), "seed": (seed, 0), "workers": (workers, 0), "size": (image_size, 16)}
    for name, (value, low) in least.items():
        if value < low:
            raise UsageError(f"--{name}", found=value, expected=f"{low} or more", fix=f"pass --{name} {low} or more")
    spec = load_embodiment(find_suite(suite).embodiment)
    sizes = {n: c.model_copy(update={"height": image_size, "width": image_size}) for n, c in spec.cameras.items()}
    spec = spec.model_copy(update={"cameras": sizes})
    header = {"suite": suite, "seed": seed, "task_order": names, "noise": NOISE if noise else None}
    quota = [episodes // len(names) + (k < episodes % len(names)) for k in range(len(names))]
    told = find_suite(suite).subtask is not None
    with LeRobotWriter(Path(out), spec, video=video, header=header, resume=resume, language=told) as writer:
        already = writer.num_episodes
        if writer.orphans:
            tqdm.write(f"removed what an interrupted recording had left: {', '.join(writer.orphans)}")
        plan = _Plan(names, quota, seed, writer.recorded)
        with (
            _runner(workers, make, suite, image_size, video, writer.fps, noise) as submit,
            tqdm(total=max(episodes, already), initial=already, unit="ep", desc=f"recording {suite}",
                 disable=not progress) as bar,
        ):  # fmt: skip
            for task, episode in plan.results(submit, window=4 * max(workers, 1)):
                writer.tried[task] = plan.tried(task)
                if episode is not None:
                    writer.add(episode)
                    bar.update()
                bar.set_postfix(failed=plan.failed, refresh=False)
    seconds = time.monotonic() - began
    counts = {name: {"tried": plan.tried(name), "kept": plan.kept[k]} for k, name in enumerate(names)}
    size = sum(p.stat().st_size for p in Path(out).rglob("*") if p.is_file())
    return {
        "out": str(out), "suite": suite, "episodes": writer.committed, "recorded_now": writer.committed - already,
        "frames": writer.num_frames, "tried": sum(c["tried"] for c in counts.values()), "failed": plan.failed,
        "tasks": counts, "megabytes": round(size / 1e6, 1), "seconds": round(seconds, 1),
    }  # fmt: skip


class _Plan:
    """Which attempts are still to be made, and their results in the order of the scenes."""

    def __init__(self, names: list[str], quota: list[int], seed: int, recorded: list[dict[str, Any]]) -> None:
        self.names, self.quota, self.seed = names, quota, seed
        self.kept = [0] * len(names)
        self._next = [0] * len(names)  # per task: the first attempt that is not decided
        self._failed_in_a_row = [0] * len(names)
        for episode in recorded:
            k = names.index(episode["task"])
            self.kept[k] += 1
            self._next[k] = (episode["seed"] - seed - k) // len(names) + 1

    def tried(self, name: str) -> int:
        return self._next[self.names.index(name)]

    @property
    def failed(self) -> int:
        return sum(self._next) - sum(self.kept)

    def results(self, submit: Callable[[str, int], Future], window: int) -> Iterator[tuple[str, EncodedEpisode | None]]:
        """(task, episode or None for a failure) per attempt. At most `window` attempts are under way; an attempt
        starts only when it is needed even if all earlier ones succeed, so the set of attempts does not depend on
        timing."""
        T, under_way = len(self.names), [0] * len(self.names)
        pending: dict[int, Future] = {}
        ahead = at = 0
        while any(kept < quota for kept, quota in zip(self.kept, self.quota, strict=True)):
            while len(pending) < window:
                j, k = divmod(ahead, T)
                if j >= self._next[k] and self.kept[k] < self.quota[k]:
                    if self.kept[k] + under_way[k] >= self.quota[k]:
                        break
                    pending[ahead] = submit(self.names[k], self.seed + ahead)
                    under_way[k] += 1
                ahead += 1
            if at in pending:
                episode = pending.pop(at).result()
                j, k = divmod(at, T)
                under_way[k] -= 1
                self._next[k] = j + 1
                self.kept[k] += episode is not None
                self._failed_in_a_row[k] = 0 if episode is not None else self._failed_in_a_row[k] + 1
                if self._failed_in_a_row[k] >= _GIVE_UP:
                    raise DataError(f"expert of {self.names[k]!r}", found=f"{_GIVE_UP} failed attempts in a row",
                                    expected="some successes",
                                    fix="leave this task out, or record with --no-noise")  # fmt: skip
                yield self.names[k], episode
            at += 1


class _runner:
    """`submit(task, seed) -> Future`, carried out here or in worker processes; stops them on the way out."""

    def __init__(self, workers: int, *worker_arguments: Any) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._arguments, self._threads = worker_arguments, one_thread_each()
        if workers:
            # Spawned, not forked: a child must not inherit an OpenGL context or threads.
            arguments = (os.getpid(), *worker_arguments)
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, arguments)

    def __enter__(self) -> Callable[[str, int], Future]:
        if self._pool is None:
            _WORKER.update(zip(_WORKER_KEYS, self._arguments, strict=True), sims={})
            return _run_here
        self._threads.__enter__()
        return self._submit

    def _submit(self, task: str, seed: int) -> Future:
        assert self._pool is not None
        try:
            return _Named(self._pool.submit(_attempt, task, seed))
        except BrokenProcessPool as error:
            raise _worker_died(error) from error

    def __exit__(self, *_: object) -> None:
        if self._pool is None:
            _close_sims()
            return
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._threads.__exit__(None, None, None)


class _Named(Future):
    """A pool's future whose broken pool is reported in words."""

    def __init__(self, inner: Future) -> None:
        super().__init__()
        self._inner = inner

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._inner.result(timeout)
        except BrokenProcessPool as error:
            raise _worker_died(error) from error


def _worker_died(error: BaseException) -> MachineError:
    return MachineError("recording", found=f"a worker process died ({error})", expected="workers that live",
                        fix="run the same command again (it continues); with less memory, use --workers 1")  # fmt: skip


# ---- inside a worker ----

_WORKER_KEYS = ("make", "suite", "image_size", "video", "fps", "noise")
_WORKER: dict[str, Any] = {}


def _start_worker(parent: int, *arguments: Any) -> None:
    begin_worker(parent)
    _WORKER.update(zip(_WORKER_KEYS, arguments, strict=True), sims={})
    atexit.register(_close_sims)


def _close_sims() -> None:
    for sim in _WORKER.get("sims", {}).values():
        sim.close()
    _WORKER["sims"] = {}


def _run_here(task: str, seed: int) -> Future:
    future: Future = Future()
    future.set_result(_attempt(task, seed))
    return future


def _attempt(task: str, seed: int) -> EncodedEpisode | None:
    sims = _WORKER["sims"]
    if task not in sims:
        sims[task] = _WORKER["make"](_WORKER["suite"], task, image_size=_WORKER["image_size"])
    episode = demonstrate(sims[task], seed, _WORKER["noise"])
    return encode_episode(episode, _WORKER["fps"], _WORKER["video"]) if episode else None


class Disturbance:
    """The noise of one recorded episode (see the module): call it with what the expert wants, execute what it returns."""

    def __init__(self, spec: EmbodimentSpec, rng: np.random.Generator) -> None:
        units = {d: unit for convention, unit in _MOTION.items() for d in spec.dims_with("action", convention)}
        self._motion, self._unit = list(units), np.array(list(units.values()))
        self._rng, self._burst, self._left = rng, np.zeros(len(units)), 0

    def __call__(self, label: np.ndarray) -> np.ndarray:
        """(A,) float32 `label` -> (A,) float32, not clipped."""
        executed, rng, many = label.copy(), self._rng, len(self._motion)
        if self._left == 0 and rng.random() < NOISE["burst_probability"]:
            self._burst, self._left = rng.uniform(-1, 1, many), NOISE["burst_steps"]
        executed[self._motion] += self._unit * (rng.normal(0, NOISE["sigma"], many) + (self._burst if self._left else 0))
        self._left = max(self._left - 1, 0)
        return executed


def demonstrate(sim: Any, seed: int, noise: bool) -> Episode | None:
    """One episode of the expert in scene `seed`; None when it failed. The picture after the last action is not kept."""
    rng = np.random.default_rng([seed, 0x7AB1E])
    noisy = noise and rng.random() < NOISE["episodes"]
    disturb = Disturbance(sim.spec, rng) if noisy else None
    low, high = sim.spec.limits("action")
    images: dict[str, list[np.ndarray]] = {camera: [] for camera in sim.spec.cameras}
    states, actions = [], []
    observation, info = sim.reset(seed=seed)
    ended, success, left = bool(info.get("success")), False, _TAIL if "subtask" in info else 0
    segments: list[Segment] = []
    while not ended:
        for camera, frames in images.items():
            frames.append(observation["images"][camera])
        states.append(observation["state"])
        if "subtask" in info:
            _note(segments, len(actions), info, find_suite(sim.suite).subtask)
            if len({segment.done for segment in segments}) < len(segments):
                return None  # what was begun and given up is no demonstration of its sentence
        label = np.clip(sim.expert(), low, high).astype(np.float32)
        actions.append(label)
        executed = disturb(label) if disturb and not success else label
        observation, _, terminated, truncated, info = sim.step(np.clip(executed, low, high))
        left -= success
        success = success or bool(info["success"])
        ended = left <= 0 if success else terminated or truncated
    if not success or not actions:
        return None
    return Episode({c: np.stack(f) for c, f in images.items()}, np.stack(states).astype(np.float32), np.stack(actions),
                   sim.instruction, sim.spec.name, True, sim.task, seed, narrate(segments))  # fmt: skip


def _note(segments: list[Segment], frame: int, info: dict[str, Any], sentence: Any) -> None:
    """Begin a segment where something else than before is to be done. `sentence` names a subtask."""
    plan, done = (tuple(map(sentence, info[name])) for name in ("plan", "done"))
    if not segments or (segments[-1].plan[:1], segments[-1].done) != (plan[:1], done):
        segments.append(Segment(frame, plan[0] if plan else DONE, plan, done))


# ---- the command ----


def add_record_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add `record` to the `vla data` sub-commands; `run` carries it out."""
    parser = subparsers.add_parser(
        "record", help="record a simulator's scripted expert as a LeRobot v3.0 dataset",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  vla data record --suite tabletop --episodes 3600 --seed 0 --out data/tabletop\n"
        "  vla data record --suite metaworld --task button-press-topdown-v3 drawer-open-v3 --episodes 100 --out data/two\n\n"
        "Run the same line again to continue an interrupted recording, or with a larger --episodes to extend it.",
    )  # fmt: skip
    add = parser.add_argument
    add("--suite", required=True, help=", ".join(SUITES))
    add("--task", nargs="+", action="extend", metavar="T", help="tasks or groups such as `push` (default: the suite's)")
    add("--episodes", type=int, required=True, metavar="N", help="successful episodes to keep, over all tasks, dealt evenly")
    add("--seed", type=int, default=0, metavar="K", help="first scene; scenes count up from it (default %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help="dataset folder, new or begun by the same command")
    add("--noise", action=argparse.BooleanOptionalAction, default=True,
        help="disturb two episodes in three; labels stay clean (default: yes)")  # fmt: skip
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="W", help="processes (default: cores, %(default)s)")
    add("--size", type=int, default=64, metavar="PX", help="picture side in pixels (default %(default)s)")
    add("--video", choices=sorted(VIDEO), default="lossless",
        help="how frames are stored (default %(default)s; yuv420p plays in browsers)")  # fmt: skip
    add("--no-resume", action="store_true", help="refuse to continue an existing dataset")
    add("--json", action="store_true", help="print the summary as JSON, no progress bar")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry out `vla data record`. Returns 0, or 130 after Ctrl-C or SIGTERM (what was recorded is kept)."""
    try:
        with terminable():
            summary = record(
                args.suite, args.task, args.episodes, args.seed, args.out, noise=args.noise, workers=args.workers,
                image_size=args.size, video=args.video, resume=not args.no_resume, progress=not args.json,
            )  # fmt: skip
    except KeyboardInterrupt:
        print(f"\ninterrupted; {args.out} holds what was recorded so far. Run the same command again to continue.")
        return 130
    if args.json:
        print(json.dumps(summary))
        return 0
    print(f"{summary['out']}: {summary['episodes']} episodes, {summary['frames']} frames, {summary['megabytes']} MB "
          f"in {summary['seconds']} s; {summary['failed']} of {summary['tried']} attempts failed, dropped")  # fmt: skip
    for task, count in summary["tasks"].items():
        print(f"  {task:32s} {count['kept']:5d} kept of {count['tried']}")
    return 0
