"""What to do where the learner really gets to: it acts, then somebody who knows takes over, and that is recorded.

    summary = collect(student, "tabletop", None, 400, seed=300_000, out="data/round_1", labeller="expert")

A policy trained on demonstrations alone errs, comes where no demonstration ever was, and errs more (DAgger: Ross et al.
2011). Here it acts for a number of steps drawn per scene; from the state it reached the labeller carries the episode to
its end in one piece (HG-DAgger: Kelly et al. 2019), so what is recorded are chunks that one hand really played. Only
episodes in which the labeller succeeds are kept; all others are counted by how they ended.

A share of the scenes (`alone`) is the learner's to the end: its success there, measured on the way, adds no data.

Scene i is `seed + i` with task i mod T; who acts until when follows from the seed. Policies are asked in fixed groups of
scenes that step together, so what they are asked beside what, and with it every last bit, depends neither on timing nor
on the number of processes. `meta/takeover.jsonl` says how each scene ended; the same call continues where it stopped.

`label_logged` is the other half of the idea: recorded pictures stay, every action becomes the teacher's own.
"""

from __future__ import annotations

import importlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vla.durable import read_lines, replace_file
from vla.embodiment import load_embodiment
from vla.episodes import EpisodeStore
from vla.errors import UsageError
from vla.evaluate import SimulatorPool, same_robot, wilson
from vla.evaluate.curve import CURVE_SEED
from vla.evaluate.jobs import Actor, Job, Keep, Outcome, trained_on
from vla.evaluate.pool import LANES, inference_threads, run_jobs
from vla.recording import LeRobotWriter
from vla.schema import Episode

WIDTH = 32
"""Scenes of a group. Two groups are under way: one is simulated while the other is thought for."""
PILOTS = 2
"""Scenes per task in which the expert's steps are counted, from the first one on."""
KEPT = "labeller succeeded"
_LOG = "meta/takeover.jsonl"
_DRAW = 0x7A0E


def collect(
    learner: Actor, suite: str, tasks: Sequence[str] | None, episodes: int, seed: int, out: str | Path, *,
    labeller: str | Actor = "expert", alone: float = 0.25, reach: float = 1.0, execute: int | None = None,
    decode: str | None = None, image_size: int | None = None, video: str = "lossless", workers: int | None = None,
    pool: SimulatorPool | None = None, progress: bool = True, sims: str = "vla.sims",
) -> dict[str, Any]:  # fmt: skip
    """Play `episodes` scenes, dealt round-robin to `tasks` (None: the suite's), into the LeRobot v3.0 dataset `out`.

    The learner looks again after `execute` steps (default: its own) and is relieved after 0 to `reach` x what the expert
    needs for the task, evenly drawn. `labeller` is "expert" (the simulator's script, step by step) or a policy (its own
    chunks); both have what is left of the episode's steps. `image_size`: side of the recorded pictures, in which both
    see (default: the learner's).

    Returns {"out", "suite", "scenes", "episodes" (kept), "recorded_now", "frames", "ends" {how: scenes},
    "success_of_learner" {"n", "successes", "rate", "low", "high", "groups" {group: the same}}, "tasks" {task: {"scenes",
    "kept"}}, "usual_steps" {task: steps} (this call's), "seconds"}.

    Raises `UsageError` for seeds that evaluation uses (500000 and up) or the learner was trained on, an unknown task, a
    robot that is not the learner's, and an `out` begun otherwise; `MachineError` without renderer, process or disk.
    """
    began = time.monotonic()
    module: Any = importlib.import_module(sims)
    names, room = module.expand_tasks(suite, list(tasks) if tasks else None), module.SUITES[suite]
    there = load_embodiment(room.embodiment)
    spec, teacher = same_robot(learner, there), None if isinstance(labeller, str) else labeller
    if teacher is not None:
        same_robot(teacher, there)
    elif labeller != "expert":
        raise UsageError("labeller", found=repr(labeller), expected='"expert" or a policy', fix="load_policy(...) makes one")
    chunk, own = learner.steps(spec.key)
    execute, decode = own if execute is None else execute, decode or learner.decode
    _check(learner, suite, episodes, seed, {"alone": (alone, 1.0), "reach": (reach, np.inf)}, execute, chunk)
    size = image_size or max(camera.height for camera in spec.cameras.values())
    cameras = {name: c.model_copy(update={"height": size, "width": size}) for name, c in there.cameras.items()}
    header = {"suite": suite, "seed": seed, "task_order": names, "takeover": {
        "learner": learner.fingerprint, "labeller": teacher.fingerprint if teacher else "expert", "alone": alone,
        "reach": reach, "execute": execute, "decode": decode,
    }}  # fmt: skip
    mine, usual = pool is None, {}
    pool = SimulatorPool(workers, sims) if pool is None else pool
    with LeRobotWriter(Path(out), there.model_copy(update={"cameras": cameras}), video=video, header=header) as writer:
        already, log = writer.num_episodes, _Log(writer)
        left = any(scene not in log.ended for scene in range(seed, seed + episodes))
        bar = tqdm(total=episodes, initial=min(len(log.ended), episodes), desc=f"takeover {suite}", unit="ep",
                   disable=None if progress else True)  # fmt: skip
        with pool if mine else nullcontext(), inference_threads(pool.workers), bar:
            try:
                if left:
                    count = pool.open(suite, size, LANES * WIDTH + 4, episodes)
                    usual = _usual_steps(pool, count, learner, spec.key, room, names, seed)
                    jobs = _make_jobs(room, names, episodes, seed, alone, reach, usual,
                                      "policy" if teacher else "expert", Keep(writer.fps, video))  # fmt: skip
                    groups = [jobs[at : at + WIDTH] for at in range(0, len(jobs), WIDTH)]
                    groups = [group for group in groups if any(job.seed not in log.ended for job in group)]
                    answer = _Answer(jobs, learner, teacher, spec.key, execute, decode)
                    for group, outcomes in _play(pool, count, groups, answer):
                        bar.update(log.add(group, outcomes))
            except BaseException:
                pool.close()  # answers are under way, or a process is gone: the next call starts fresh ones
                raise
    return {"out": str(out), "suite": suite, **log.summary(room), "recorded_now": writer.committed - already,
            "usual_steps": usual, "seconds": round(time.monotonic() - began, 1)}  # fmt: skip


def _check(learner: Actor, suite: str, episodes: int, seed: int, shares: dict[str, tuple[float, float]], execute: int,
           chunk: int) -> None:  # fmt: skip
    if episodes < 1:
        raise UsageError("episodes", found=episodes, expected="at least 1", fix="say how many scenes to play")
    if not 1 <= execute <= chunk:
        raise UsageError("execute", found=execute, expected=f"1..{chunk}, the learner's chunk", fix="leave it out")
    for name, (value, most) in shares.items():
        if not 0 <= value <= most or value == np.inf:
            raise UsageError(name, found=value, expected=f"0 to {most}", fix="leave it out")
    last = seed + episodes - 1
    if seed < 0 or last >= CURVE_SEED:
        raise UsageError(f"takeover seeds {seed}..{last}", found=f"not within 0..{CURVE_SEED - 1}",
                         expected=f"scenes no evaluation uses, below {CURVE_SEED}", fix="choose a lower seed")  # fmt: skip
    if shown := trained_on(learner, suite, seed, episodes):
        raise UsageError(f"takeover seeds {seed}..{last} of suite {suite!r}", found=f"seeds the learner was trained on ({shown})",
                         expected="scenes it has not seen", fix="choose a seed above them")  # fmt: skip


def _usual_steps(
    pool: SimulatorPool, workers: int, learner: Actor, embodiment: str, room: Any, names: list[str], seed: int
) -> dict[str, int]:
    """Task -> control steps the expert needs, the longest of a few scenes. Nothing is rendered."""
    scenes = [(task, seed + n + turn * len(names)) for turn in range(PILOTS) for n, task in enumerate(names)]
    jobs = [Job(n, "expert", room.group(task), task, at, room.instruction(task), controller="expert")
            for n, (task, at) in enumerate(scenes)]  # fmt: skip
    outcomes, _ = run_jobs(pool, workers, learner, embodiment, jobs, execute=1, decode=None, width=1)
    return {task: max(outcomes[job.id].steps for job in jobs if job.task == task) for task in names}


def _make_jobs(room: Any, names: list[str], episodes: int, seed: int, alone: float, reach: float, usual: dict[str, int],
               after: str, keep: Keep) -> list[Job]:  # fmt: skip
    """One per scene, in order; what is drawn for a scene is a function of its seed."""
    jobs = []
    for n in range(episodes):
        task, rng = names[n % len(names)], np.random.default_rng([seed + n, _DRAW])
        left_alone, place = rng.random() < alone, rng.random()
        takeover = None if left_alone else int(place * (int(reach * usual[task]) + 1))
        jobs.append(Job(n, "policy", room.group(task), task, seed + n, room.instruction(task), takeover=takeover,
                        controller_after=after, keep=keep))  # fmt: skip
    return jobs


class _Answer:
    """What the policies say to the scenes of a group that wait: `answer([(job, steps, observation)]) -> {job: (k, A)}`."""

    def __init__(self, jobs: list[Job], learner: Actor, teacher: Actor | None, key: str, execute: int, decode: str) -> None:
        self.jobs, self.key = {job.id: job for job in jobs}, key
        self.minds = [(learner, execute, decode)]
        if teacher is not None:
            self.minds.append((teacher, teacher.steps(key)[1], teacher.decode))

    def __call__(self, seen: list[tuple[int, int, dict]]) -> dict[int, np.ndarray]:
        chunks: dict[int, np.ndarray] = {}
        for relieved, (policy, execute, decode) in enumerate(self.minds):
            some = [(job, step, shown) for job, step, shown in seen if self._relieved(job, step) == bool(relieved)]
            if not some:
                continue
            thought = policy.act_batch(
                [shown for *_, shown in some], [self.jobs[job].instruction for job, *_ in some], self.key, decode=decode,
                seeds=[self.jobs[job].seed * 1009 + step for job, step, _ in some],
            )  # fmt: skip
            chunks |= {job: np.asarray(said.actions[:execute], np.float32)
                       for (job, *_), said in zip(some, thought, strict=True)}  # fmt: skip
        return chunks

    def _relieved(self, job: int, step: int) -> bool:
        takeover = self.jobs[job].takeover
        return takeover is not None and step >= takeover


@dataclass
class _Group:
    """Scenes that step together, job n of them in process n mod the number of processes."""

    number: int
    jobs: list[Job]
    awaited: int = 0
    """Processes that have not answered yet."""
    seen: list[tuple[int, int, dict]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)


def _play(
    pool: SimulatorPool, workers: int, groups: Iterable[list[Job]], answer: Callable[[list], dict[int, np.ndarray]]
) -> Iterator[tuple[list[Job], list[Outcome]]]:
    """Every group with how its jobs ended, in order. Fixed groups instead of `run_jobs`'s full batches: what a network
    says about one picture may differ in its last bit with the batch around it, and a dataset must not depend on that."""
    todo, playing = deque(enumerate(groups)), dict[int, _Group]()
    ready: dict[int, _Group] = {}
    at = 0

    def send(lane: int, starts: Sequence[Job], chunks: dict[int, np.ndarray]) -> None:
        group = playing[lane]
        place = {job.id: n % workers for n, job in enumerate(group.jobs)}
        for worker in range(workers):
            begun = [job for job in starts if place[job.id] == worker]
            said = {job: chunk for job, chunk in chunks.items() if place[job] == worker}
            if begun or said:
                pool.send(worker, ("go", lane, begun, said))
                group.awaited += 1

    def begin(lane: int) -> None:
        if todo:
            playing[lane] = _Group(*todo.popleft())
            send(lane, playing[lane].jobs, {})

    for lane in range(LANES):
        begin(lane)
    while playing:
        for worker in pool.ready():
            _, lane, done, seen, _ = pool.receive(worker)
            group = playing[lane]
            group.awaited -= 1
            group.outcomes += done
            group.seen += seen
            if group.awaited:
                continue
            if waiting := sorted(group.seen, key=lambda entry: entry[0]):
                group.seen = []
                send(lane, (), answer(waiting))
                continue
            ready[group.number] = playing.pop(lane)
            begin(lane)
        while at in ready:
            group = ready.pop(at)
            yield group.jobs, sorted(group.outcomes, key=lambda outcome: outcome.id)
            at += 1


class _Log:
    """How every scene ended, in a file of JSON lines beside the dataset. Written after the dataset, so a scene that is in
    it is in the dataset as well; a scene that is in the dataset alone is played again and not stored twice."""

    def __init__(self, writer: LeRobotWriter) -> None:
        self.writer, self.path = writer, writer.root / _LOG
        self.recorded = {entry["seed"] for entry in writer.recorded}
        self.ended = {line["seed"]: line for line in read_lines(self.path)[0]}

    def add(self, jobs: list[Job], outcomes: list[Outcome]) -> int:
        """Store a whole group; how many scenes of it are new."""
        before = len(self.ended)
        for job, outcome in zip(jobs, outcomes, strict=True):
            if outcome.kept is not None and job.seed not in self.recorded:
                self.writer.add(outcome.kept)
                self.recorded.add(job.seed)
            relieved = job.takeover is not None and outcome.steps > job.takeover
            verdict = "succeeded" if outcome.success else "failed" if outcome.failure else "ran out of steps"
            line = {"seed": job.seed, "task": job.task, "takeover": job.takeover, "steps": outcome.steps,
                    "end": f"{'labeller' if relieved else 'learner'} {verdict}"}  # fmt: skip
            self.ended.setdefault(job.seed, line)
        self.writer.tried = dict(Counter(line["task"] for line in self.ended.values()))
        self.writer.commit()
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in self.ended.values()))
        return len(self.ended) - before

    def summary(self, room: Any) -> dict[str, Any]:
        lines = list(self.ended.values())
        alone = [line for line in lines if line["takeover"] is None]
        kept = Counter(line["task"] for line in lines if line["end"] == KEPT)
        groups = {group: _rate([line for line in alone if room.group(line["task"]) == group])
                  for group in dict.fromkeys(room.group(line["task"]) for line in lines)}  # fmt: skip
        return {
            "scenes": len(lines), "episodes": self.writer.committed, "frames": self.writer.num_frames,
            "ends": dict(Counter(line["end"] for line in lines).most_common()),
            "success_of_learner": {**_rate(alone), "groups": groups},
            "tasks": {task: {"scenes": n, "kept": kept[task]} for task, n in sorted(self.writer.tried.items())},
        }  # fmt: skip


def _rate(lines: list[dict[str, Any]]) -> dict[str, Any]:
    won = sum(line["end"] == "learner succeeded" for line in lines)
    low, high = wilson(won, len(lines))
    return {"n": len(lines), "successes": won, "rate": won / len(lines) if lines else None, "low": low, "high": high}


def label_logged(
    dataset: str | Path, teacher: Actor, out: str | Path, *, decode: str | None = None, batch: int = 64,
    video: str = "lossless", cache_dir: str | Path | None = None, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Copy a LeRobot dataset of what a policy did into `out`, every action replaced by what `teacher` would have done there.

    The first action of the teacher's chunk at each recorded state; pictures and states stay. So the next H labels along
    the logged way are the target of a chunk, as in DAgger. An episode told several things becomes one per instruction.
    `success` is False throughout: nobody carried out what is written. The same call continues where it stopped.

    Returns {"out", "episodes", "recorded_now", "frames", "moved" (mean absolute difference to the logged actions per
    dimension, of the episodes of this call), "seconds"}. Raises `UsageError` for another robot than the teacher's,
    `DataError` for a damaged dataset.
    """
    began = time.monotonic()
    store = EpisodeStore.open(dataset, cache_dir, progress=progress)
    spec, decode = same_robot(teacher, store.spec, "dataset"), decode or teacher.decode
    path = Path(dataset) / "meta" / "recording.json"
    known = json.loads(path.read_text())["episodes"] if path.is_file() else []
    header = {"suite": store.suite, "relabelled": {
        "dataset": store.fingerprint, "teacher": teacher.fingerprint, "decode": decode, "batch": batch,
    }}  # fmt: skip
    pieces = list(_pieces(store))
    moved, count = np.zeros(store.action.shape[1]), 0
    with LeRobotWriter(Path(out), store.spec, video=video, header=header) as writer:
        already = writer.num_episodes
        for number, start, stop in tqdm(pieces[already:], desc="relabelling", unit="ep", disable=None if progress else True):
            images = {camera: store.frames(camera, np.arange(start, stop)) for camera in store.cameras}
            told = store.instructions[int(store.task_of_frame[start])]
            actions = []
            for first in range(0, stop - start, batch):
                steps = range(first, min(first + batch, stop - start))
                seen: list[Any] = [{"images": {camera: frames[t] for camera, frames in images.items()},
                                    "state": np.array(store.state[start + t])} for t in steps]  # fmt: skip
                said = teacher.act_batch(seen, [told] * len(seen), spec.key, decode=decode, seeds=[start + t for t in steps])
                actions += [np.asarray(chunk.actions[0], np.float32) for chunk in said]
            action = np.stack(actions)
            moved += np.abs(action - store.action[start:stop]).sum(0)
            count += len(action)
            entry = known[number] if number < len(known) else {}
            writer.add(Episode(images, np.array(store.state[start:stop]), action, told, store.spec.name, False,
                               entry.get("task", ""), entry.get("seed")))  # fmt: skip
    return {"out": str(out), "episodes": writer.committed, "recorded_now": writer.committed - already,
            "frames": writer.num_frames, "moved": [round(float(m) / max(count, 1), 5) for m in moved],
            "seconds": round(time.monotonic() - began, 1)}  # fmt: skip


def _pieces(store: EpisodeStore) -> Iterator[tuple[int, int, int]]:
    """(episode, first frame, frame after the last) of every stretch of an episode that was told one thing."""
    for number in range(store.num_episodes):
        start, stop = (int(edge) for edge in store.episode_starts[number : number + 2])
        told = np.asarray(store.task_of_frame[start:stop])
        edges = [start, *(start + 1 + np.flatnonzero(told[1:] != told[:-1])).tolist(), stop]
        yield from ((number, a, b) for a, b in zip(edges[:-1], edges[1:], strict=True))
