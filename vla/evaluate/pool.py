"""The parent's side of closed-loop evaluation: simulator processes in flight, inference in large batches.

Every process hosts several *lanes* of environments. While the policy thinks for one lane, the processes simulate the
others, so neither waits for the other; a lane's finished episodes are replaced at once, so batches stay full.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from vla.ensemble import Ensemble
from vla.errors import MachineError, VLAError
from vla.evaluate.jobs import Actor, Job, Outcome
from vla.resample import rotations_of

LANES = 2
"""Lanes of policy episodes per process. A further lane plays the controls that need no policy."""
BLIND_BATCH = 4
"""Episodes without a policy played per message: few, so that a policy lane never waits long behind them."""


@dataclass
class Trace:
    """What the policy did in one recorded episode: one row per executed step."""

    actions: list[np.ndarray] = field(default_factory=list)  # (k, A) each, robot units
    confidence: list[np.ndarray] = field(default_factory=list)  # (k, A) each
    symbols: list[np.ndarray | None] = field(default_factory=list)  # (k, A) each; None: not one symbol per element


class SimulatorPool:
    """Simulator processes that outlive one evaluation (`with SimulatorPool(2) as pool: evaluate(..., pool=pool)`)."""

    def __init__(self, workers: int | None = None, sims: str = "vla.sims") -> None:
        """`workers` processes (default: one per core); `sims` is the module with `make_sim` and `SUITES`."""
        self.workers, self.sims = workers or usable_cores(), sims
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        self.logs: list[Any] = []
        self.cpu: list[float] = []

    def __enter__(self) -> SimulatorPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, suite: str, image_size: int, limit: int, workers: int) -> int:
        """Have up to `workers` processes ready for `suite`; returns how many there are. First call starts them.

        Raises `MachineError` when one has died.
        """
        while len(self.processes) < min(workers, self.workers):
            self._start()
        for worker in range(len(self.connections)):
            self.send(worker, ("open", self.sims, suite, image_size, limit))
        for worker in range(len(self.connections)):
            self.receive(worker)
        return len(self.connections)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        log = tempfile.TemporaryFile()
        program = "from vla.evaluate.worker import main; main()"
        with theirs:
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", program, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )
        self.connections.append(Connection(ours.detach()))
        self.logs.append(log)
        self.cpu.append(0.0)

    def send(self, worker: int, message: object) -> None:
        """Queue a message for a process. Raises `MachineError` when it is no longer there."""
        try:
            self.connections[worker].send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self._dead(worker) from None

    def ready(self) -> list[int]:
        """Block until at least one process has answered; which ones."""
        found = set(wait(self.connections))
        return [i for i, connection in enumerate(self.connections) if connection in found]

    def receive(self, worker: int) -> Any:
        """The next answer of a process. Re-raises its `VLAError`; anything else it failed with is a RuntimeError.

        Raises `MachineError` when it has died.
        """
        try:
            answer = self.connections[worker].recv()
        except (EOFError, ConnectionResetError):
            raise self._dead(worker) from None
        if answer[0] == "error":
            if isinstance(answer[1], VLAError):
                raise answer[1]
            raise RuntimeError(f"simulator process {worker} failed:\n{answer[1]}")
        self.cpu[worker] = answer[-1]
        return answer

    def _dead(self, worker: int) -> MachineError:
        try:
            status = self.processes[worker].wait(timeout=10)
        except subprocess.TimeoutExpired:  # it hung up and yet lives on
            self.processes[worker].kill()
            status = self.processes[worker].wait()
        log = self.logs[worker]
        log.seek(0)
        tail = log.read().decode(errors="replace").strip()[-1500:]
        return MachineError(
            f"simulator process {worker}",
            found=f"it ended with status {status}" + (f"; it said:\n{tail}" if tail else ""),
            expected="a living process",
            fix="`vla doctor` checks the renderer; fewer --workers need less memory",
        )

    def cpu_seconds(self) -> float:
        """CPU time of all processes so far."""
        return sum(self.cpu)

    def close(self) -> None:
        """Hang up and wait; a process that does not leave by itself is killed."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for log in self.logs:
            log.close()
        self.processes, self.connections, self.logs, self.cpu = [], [], [], []


def run_jobs(
    pool: SimulatorPool, workers: int, policy: Actor, embodiment: str, jobs: Sequence[Job], *, execute: int,
    decode: str | None, width: int, tick: Callable[[], object] = lambda: None, ensemble: float | None = None,
) -> tuple[dict[int, Outcome], dict[int, Trace]]:  # fmt: skip
    """Play every job; outcomes by job id, and the traces of the recorded ones.

    `width` environments per lane at most; `execute` steps of every chunk are played before the policy looks again; with
    `ensemble` (a decay, see `vla.ensemble`) they are the mean of all that was said about them.
    """
    turns = rotations_of(policy.embodiments[embodiment]) if ensemble is not None else []
    blends: dict[int, Ensemble] = {}
    by_id = {job.id: job for job in jobs}
    acting = deque(job for job in jobs if job.controller == "policy")
    blind = deque(job for job in jobs if job.controller != "policy")
    width = max(1, min(width, -(-len(acting) // (workers * LANES))))
    playing = {(worker, lane): 0 for worker in range(workers) for lane in range(LANES)}
    outcomes: dict[int, Outcome] = {}
    traces = {job.id: Trace() for job in jobs if job.record and job.controller == "policy"}
    in_flight = 0

    def send(worker: int, lane: int, chunks: dict[int, np.ndarray]) -> None:
        nonlocal in_flight
        queue, room = (blind, BLIND_BATCH) if lane == LANES else (acting, width - playing[worker, lane])
        starts = [queue.popleft() for _ in range(min(room, len(queue)))]
        if lane < LANES:
            playing[worker, lane] += len(starts)
        if starts or chunks:
            pool.send(worker, ("go", lane, starts, chunks))
            in_flight += 1

    for lane in range(LANES + 1):
        for worker in range(workers):
            send(worker, lane, {})
    while in_flight:
        answers: list[tuple[int, int]] = []
        waiting: list[tuple[int, int, int, dict]] = []  # (which answer, job, steps so far, observation)
        for worker in pool.ready():
            _, lane, done, seen, _ = pool.receive(worker)
            in_flight -= 1
            for outcome in done:
                outcomes[outcome.id] = outcome
                blends.pop(outcome.id, None)
                tick()
            if lane < LANES:
                playing[worker, lane] -= len(done)
            waiting += [(len(answers), *entry) for entry in seen]
            answers.append((worker, lane))
        chunks: list[dict[int, np.ndarray]] = [{} for _ in answers]
        for drop in (False, True):
            some = [entry for entry in waiting if by_id[entry[1]].drop_state == drop]
            if not some:
                continue
            thought = policy.act_batch(
                [observation for *_, observation in some],
                [by_id[job].instruction for _, job, _, _ in some],
                embodiment,
                decode=decode,
                seeds=[by_id[job].seed * 1009 + step for _, job, step, _ in some],
                drop_state=drop,
            )
            for (at, job, step, _), chunk in zip(some, thought, strict=True):
                actions = np.asarray(chunk.actions[:execute], np.float32)
                if ensemble is not None:
                    actions = blends.setdefault(job, Ensemble(ensemble, turns))(step, chunk.actions, execute)
                chunks[at][job] = actions
                if job in traces:
                    _note(traces[job], chunk, actions)
        for (worker, lane), todo in zip(answers, chunks, strict=True):
            send(worker, lane, todo)
    return outcomes, traces


def _note(trace: Trace, chunk: Any, actions: np.ndarray) -> None:
    """What was carried out, and what the newest chunk said about it."""
    shape, execute = chunk.actions.shape, len(actions)
    trace.actions.append(actions)
    trace.confidence.append(np.asarray(chunk.confidence, np.float32).reshape(shape)[:execute])
    symbols = np.asarray(chunk.symbols)
    trace.symbols.append(symbols[:execute] if symbols.shape == shape else None)  # a sequence has none per number


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def inference_threads(workers: int) -> Iterator[None]:
    """Leave cores to the simulators while they run: torch threads that wait for each other collapse, up to tenfold,
    when anything else runs on their cores. Does nothing where torch was never imported."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, usable_cores() - -(-workers // 2))))
    try:
        yield
    finally:
        torch.set_num_threads(before)
