"""How fast a dataset can be read: samples per second, waiting time, and the floor below which no loader can go.

Measured is what training reads, windows of a mixture with their pictures, in the order training would draw them; torch is
not involved, so tokenising, resizing and augmenting are not in these figures (`data_wait` in a run's metrics.jsonl has
them). The floor is the same pictures fetched in a bare loop by one process: copied (raw), or decoded (jpeg, video).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vla.episodes import EpisodeStore
from vla.errors import MachineError, UsageError, VLAError
from vla.mixture import Mixture

KINDS = ("raw", "jpeg", "video")
_AHEAD = 4
"""Batches a worker may be ahead."""


def bench(
    root: str | Path, frames: list[str], workers: list[int], *, batch: int = 32, chunk: int = 8, step_ms: float = 50.0,
    seconds: float = 3.0, cache_dir: str | Path | None = None, progress: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """One record per way of keeping frames and number of workers; see `_race` for the keys.

    Raises `UsageError` for numbers that make no sense, `DataError` for a dataset that cannot be read.
    """
    least = {"batch": (batch, 1), "workers": (min(workers), 0), "seconds": (seconds, 0.01), "step-ms": (step_ms, 0.0)}
    for name, (value, low) in least.items():
        if value < low:
            raise UsageError(f"--{name}", found=value, expected=f"{low} or more", fix=f"pass --{name} {low} or more")
    records = []
    with tqdm(total=len(frames) * len(workers), unit="run", disable=not progress, leave=False) as bar:
        for kind in frames:
            began = time.perf_counter()
            store = EpisodeStore.open(root, cache_dir, kind, progress, compute_stats=True)  # pyright: ignore[reportArgumentType]
            opened = time.perf_counter() - began
            mixture = Mixture([store], [1.0], chunk, seed=0)
            for count in workers:
                bar.set_description(f"{kind}, {count} workers")
                records.append({"frames": kind, "workers": count, "batch": batch, "open_s": opened}
                               | _race(mixture, count, batch, step_ms / 1e3, seconds))  # fmt: skip
                bar.update()
    return records


def _race(mixture: Mixture, workers: int, batch: int, step: float, seconds: float) -> dict[str, Any]:
    """`samples_s` and `mb_s` (pixels) as fast as it goes; `floor_samples_s` of the bare fetching, and the share of it that
    was reached by one process; `first_batch_s` from nothing to the first batch; `data_wait`: share of the time a consumer
    that takes `step` seconds per batch waits."""
    store = mixture.stores[0]
    pixels = sum(size.height * size.width * 3 for size in store.spec.cameras.values())
    began = time.perf_counter()
    with _batches(mixture, workers, batch) as batches:
        next(batches)
        first = time.perf_counter() - began
        for _ in range(_AHEAD * workers):  # what was made while nobody asked
            next(batches)
        count, began = 0, time.perf_counter()
        while not count or time.perf_counter() - began < seconds:
            next(batches)
            count += 1
        rate = count * batch / (time.perf_counter() - began)
    floor = _floor(mixture, batch, seconds / 2)
    waited, total = 0.0, 0.0
    with _batches(mixture, workers, batch) as batches:
        next(batches)
        while total < seconds and step:
            time.sleep(step)  # the step goes on elsewhere: on an accelerator, or on another core
            began = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - began
            total = total + step + time.perf_counter() - began
    return {
        "samples_s": rate, "mb_s": rate * pixels / 1e6, "floor_samples_s": floor, "of_floor": rate / floor / max(1, workers),
        "first_batch_s": first, "step_ms": step * 1e3, "data_wait": waited / total if total else None,
    }  # fmt: skip


def _floor(mixture: Mixture, batch: int, seconds: float) -> float:
    store, done, n = mixture.stores[0], 0, 0
    out = {camera: np.empty((batch, size.height, size.width, 3), np.uint8) for camera, size in store.spec.cameras.items()}
    spent = 0.0
    while not done or spent < seconds:
        places = [mixture.locate(k) for k in range(n, n + batch)]  # the same frames; finding them is not fetching them
        indices = [int(store.episode_starts[episode]) + t for _, episode, t in places]
        began = time.perf_counter()
        for camera, pictures in out.items():
            for row, index in enumerate(indices):
                pictures[row] = store.frame(camera, index)
        spent += time.perf_counter() - began
        done, n = done + batch, n + batch
    return done / spent


@contextmanager
def _batches(mixture: Mixture, workers: int, batch: int) -> Iterator[Iterator[None]]:
    """Batches of windows in order, made here (0) or by processes that lay them into memory shared with this one."""
    if not workers:
        yield _made_here(mixture, batch)
        return
    context: Any = multiprocessing.get_context()
    pixels = sum(size.height * size.width * 3 for size in mixture.stores[0].spec.cameras.values())
    started = []
    try:
        for number in range(workers):
            memory, free = context.RawArray("B", _AHEAD * batch * pixels), context.Semaphore(_AHEAD)
            here, there = context.Pipe(duplex=False)
            arguments = (mixture, number, workers, batch, memory, free, there)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            there.close()
            started.append((process, here, free))
        yield _received(started)
    finally:
        for process, here, _ in started:
            process.kill()  # not SIGTERM: a forked child has its parent's handlers, and one that only takes note would wait on
            process.join()
            here.close()


def _made_here(mixture: Mixture, batch: int) -> Iterator[None]:
    out, n = _pages(mixture, batch, None), 0
    while True:
        _fill(mixture, range(n, n + batch), out[0])
        n += batch
        yield


def _received(started: list[tuple[Any, Any, Any]]) -> Iterator[None]:
    turn = 0
    while True:
        _, here, free = started[turn % len(started)]
        try:
            error = here.recv()
        except EOFError:
            error = MachineError("vla data bench", found="a loader process died", expected="workers that live",
                                 fix="run it with --workers 0 to see why, or with a smaller --batch")  # fmt: skip
        if error is not None:
            raise error
        yield
        free.release()
        turn += 1


def _work(mixture: Mixture, number: int, workers: int, batch: int, memory: Any, free: Any, there: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    pages, turn = _pages(mixture, batch, memory), 0
    try:
        while True:
            free.acquire()
            first = (turn * workers + number) * batch
            _fill(mixture, range(first, first + batch), pages[turn % _AHEAD])
            there.send(None)
            turn += 1
    except VLAError as error:
        there.send(error)
    except (BrokenPipeError, EOFError):
        pass


def _pages(mixture: Mixture, batch: int, memory: Any) -> list[list[np.ndarray]]:
    """Per page one (batch, h, w, 3) array per camera, in `memory` or, without it, one page of its own."""
    sizes = [(batch, size.height, size.width, 3) for size in mixture.stores[0].spec.cameras.values()]
    if memory is None:
        return [[np.empty(size, np.uint8) for size in sizes]]
    flat, at, pages = np.frombuffer(memory, np.uint8), 0, []
    for _ in range(_AHEAD):
        pages.append([])
        for size in sizes:
            end = at + int(np.prod(size))
            pages[-1].append(flat[at:end].reshape(size))
            at = end
    return pages


def _fill(mixture: Mixture, positions: range, out: list[np.ndarray]) -> None:
    for row, n in enumerate(positions):
        for pictures, frame in zip(out, mixture.window(n).images.values(), strict=True):  # pyright: ignore
            pictures[row] = frame


# ---- the command ----


def add_bench_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add `bench` to the `vla data` sub-commands; `run` carries it out."""
    parser = subparsers.add_parser(
        "bench", help="samples per second, waiting time and the decode floor", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  vla data bench data/tabletop --frames raw jpeg --workers 0 1 --step-ms 80",
    )  # fmt: skip
    add = parser.add_argument
    add("dir", type=Path, metavar="DIR", help="a LeRobot dataset")
    add("--frames", nargs="+", choices=KINDS, default=list(KINDS), help="ways of keeping frames (default: all three)")
    add("--workers", nargs="+", type=int, default=[0, 1, 2], metavar="W", help="loader processes (default: 0 1 2)")
    add("--batch", type=int, default=32, metavar="B", help="samples per batch (default %(default)s)")
    add("--chunk", type=int, default=8, metavar="H", help="actions per sample (default %(default)s)")
    add("--step-ms", type=float, default=50.0, metavar="MS",
        help="time a training step takes, for the waiting share; 0 leaves it out (default %(default)s)")  # fmt: skip
    add("--seconds", type=float, default=3.0, metavar="S", help="length of each measurement (default %(default)s)")
    add("--cache", type=Path, metavar="DIR", help="cache folder (default: $VLA_CACHE, else the user's)")
    add("--json", action="store_true", help="print a list of records as JSON, no progress bar")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry out `vla data bench`. Returns 0."""
    records = bench(args.dir, args.frames, args.workers, batch=args.batch, chunk=args.chunk, step_ms=args.step_ms,
                    seconds=args.seconds, cache_dir=args.cache, progress=not args.json)  # fmt: skip
    if args.json:
        print(json.dumps(records))
        return 0
    print(f"{'frames':7s} {'workers':>7s} {'samples/s':>10s} {'MB/s':>8s} {'floor/s':>9s} {'of floor':>8s} {'first':>8s}  "
          f"wait at {args.step_ms:g} ms a step")  # fmt: skip
    for r in records:
        wait = "-" if r["data_wait"] is None else f"{r['data_wait']:.1%}"
        print(f"{r['frames']:7s} {r['workers']:7d} {r['samples_s']:10.0f} {r['mb_s']:8.0f} {r['floor_samples_s']:9.0f} "
              f"{r['of_floor']:8.0%} {r['first_batch_s']:6.2f} s  {wait}")  # fmt: skip
    return 0
