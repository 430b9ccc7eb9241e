"""A student for a latency budget: picks resolution, patch, width and depth by measuring on this machine, and says what it chose.

Every candidate of a grid has a capacity, log2(parameters) + log2(pixels) / 2 + log2(tokens of a picture) / 4: twice the
parameters are worth four times the pixels or sixteen times the tokens, for tokens cost most and win least. A few candidates
spread over the grid are timed, a model of four costs (a step, its products, its attention, its pixels) is fitted to them, and
from the most capable one that should fit the budget downward they are timed for real, the model fitted again each time, until
none more capable than the best that did fit is left to try. What is compared with the budget is the p95 of a step with random
weights in the robot's runtime. Nothing is drawn: only the clock makes two runs differ.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import Field

from vla.backbones import Sizes, StudentConfig
from vla.config import Config
from vla.errors import MachineError, UsageError
from vla.students.presets import cost, parameters
from vla.students.timing import TORCH, Runner, Timing, random_network, timed

GRID: dict[str, tuple[int, ...]] = {"image_size": (128, 160, 192, 224), "patch": (16, 32), "hidden": (192, 256, 320, 384),
                                    "layers": tuple(range(4, 13))}  # fmt: skip
RULE = "log2(parameters) + log2(pixels) / 2 + log2(tokens of a picture) / 4"
_SPREAD = 6  # candidates timed before the model is first believed
_AT_ONCE = 2  # the most capable ones that should fit, timed together
_MOST = 20  # candidates timed in all
_ROUNDS_FIRST, _ROUNDS = 30, 200


class Budget(Config):
    """How long one step may take on this machine."""

    p95_ms: float = Field(gt=0)
    threads: int = Field(default=1, ge=1)
    cameras: int = Field(default=2, ge=1)
    runtime: Literal["auto", "onnx-int8", "onnx", "torch"] = "auto"
    """What runs the student; auto: the fastest of those installed here, by measuring."""


@dataclass
class Candidate:
    config: StudentConfig
    parameters: int
    image_tokens: int
    terms: np.ndarray
    """What a step consists of: 1, operations of products, numbers of attention, numbers of pictures."""
    timing: Timing | None = None
    tries: int = 0
    """How often it was timed over all rounds."""
    predicted_ms: float = field(default=math.nan)

    @property
    def capacity(self) -> float:
        """See `RULE`."""
        return math.log2(self.parameters) + math.log2(self.config.image_size) + math.log2(self.image_tokens) / 4

    @property
    def order(self) -> tuple:
        """Best first, and a cheaper one before an equal."""
        return -self.capacity, self.terms[1], *(getattr(self.config, name) for name in GRID)


@dataclass(frozen=True)
class Fitted:
    """What a budget led to."""

    config: StudentConfig
    record: dict[str, Any]


def fit(
    budget: Budget, sizes: Sizes, most_parameters: int, own: Mapping[str, Any] | None = None,
    runners: Mapping[str, Runner] = TORCH, clock: Callable[[], float] = time.perf_counter,
    tell: Callable[[str], None] | None = None,
) -> Fitted:  # fmt: skip
    """The most capable student within `budget` and `most_parameters`; `own` are fields of `StudentConfig` said by hand.

    Raises `UsageError` when nothing fits, naming the fastest candidate, `MachineError` for a runtime that is not there.
    """
    say, most = tell or (lambda line: None), budget.p95_ms
    candidates = sorted(grid(sizes, most_parameters, budget.cameras, own or {}), key=lambda c: c.order)
    if not candidates:
        raise UsageError("student.budget", found=f"nothing in the grid with {own or 'its sizes'} and at most "
                         f"{most_parameters / 1e6:.0f} M parameters", expected=f"some of {GRID}",
                         fix="leave the sizes to the budget, or take a larger preset")  # fmt: skip
    spread = _spread(candidates)
    name, runner, tried = _runtime(budget, sizes, spread[len(spread) // 2], runners, clock)
    say(f"runtime {name}; {len(candidates)} candidates")
    if (load := _load()) > 0.5:
        say(f"this machine is busy (load {load:.1f} a core): everything will seem slower than it is")

    def time_them(group: list[Candidate], rounds: int) -> None:
        steps = [runner(random_network(c.config, sizes), sizes, budget.cameras, budget.threads) for c in group]
        for candidate, timing in zip(group, timed(steps, budget.threads, rounds, clock=clock), strict=True):
            known = candidate.timing if candidate.tries else None  # what else runs only ever adds: the better of two counts
            candidate.timing = known if known is not None and known.p95_ms <= timing.p95_ms else timing
            candidate.tries += rounds >= _ROUNDS
            say(line(candidate))

    time_them(spread, _ROUNDS_FIRST)
    cheapest = sorted(candidates, key=lambda c: tuple(c.terms[1:]))[:_AT_ONCE]
    while True:
        _predict(candidates)
        known = [c for c in candidates if c.timing is not None]
        # A p95 of few rounds is no p95: who seems to fit is timed again before it counts.
        sure = [c for c in known if c.tries and c.timing and c.timing.p95_ms <= most]
        best = min(sure, key=lambda c: c.order) if sure else None
        better = [c for c in candidates if c.predicted_ms <= 1.02 * most and (best is None or c.order < best.order)]
        open_ = [c for c in better if c.timing is None or (not c.tries and c.timing.p95_ms <= 1.1 * most)]
        # Who fits by all the others' times and did not by its own may have met something else that ran: once more.
        open_ = open_ or [c for c in better if c.tries == 1]
        if best is None and not open_ and not any(c.tries for c in cheapest):
            open_ = cheapest  # nothing is refused on the word of a model
        if sum(c.tries for c in known) >= _MOST or not open_:
            break
        time_them(open_[:_AT_ONCE], _ROUNDS)
    measured = sorted((c for c in candidates if c.timing is not None), key=lambda c: c.order)
    if best is None:
        fastest = min(measured, key=_p95)
        assert fastest.timing is not None
        ms = fastest.timing.p95_ms
        raise UsageError("student.budget", found=f"nothing within {most:g} ms; the fastest of {len(candidates)} is "
                         f"{shape(fastest)}, with a p95 of {ms:.1f} ms ({name}, {budget.threads} thread(s))",
                         expected="a budget this machine can meet",
                         fix=f"budget.p95_ms={math.ceil(1.1 * ms)}, more threads, fewer cameras, or an idle machine")  # fmt: skip
    record = {
        "asked": budget.model_dump(mode="json"), "most_parameters": most_parameters, "runtime": name, "runtimes_p50_ms": tried,
        "rule": RULE, "machine": platform.processor() or platform.machine(), "load_a_core": round(load, 2),
        "candidates": len(candidates),
        "measured": [row(c) for c in measured], "chosen": row(best), **_off(measured),
    }  # fmt: skip
    return Fitted(best.config, record | {"cost": cost(best.config, sizes, budget.cameras)})


def grid(sizes: Sizes, most_parameters: int, cameras: int, own: Mapping[str, Any]) -> list[Candidate]:
    """Every candidate with at most `most_parameters`, `own` fields as they were said."""
    axes = {name: (own[name],) if name in own else values for name, values in GRID.items()}
    rest = {name: value for name, value in own.items() if name not in GRID}
    found = []
    for size, patch, hidden in itertools.product(axes["image_size"], axes["patch"], axes["hidden"]):
        if size % patch or hidden % 64:
            continue

        def config(layers: int, size: int = size, patch: int = patch, hidden: int = hidden) -> StudentConfig:
            wide = {"hidden": hidden, "heads": hidden // 64, "mlp": round(hidden * 8 / 3 / 64) * 64}
            shape = {"image_size": size, "patch": patch, "layers": layers}
            return StudentConfig.model_validate({"kind": "student", **shape, **wide, **rest})

        one, two = (parameters(config(layers), sizes) for layers in (1, 2))
        for layers in axes["layers"]:
            chosen, count = config(layers), one + (layers - 1) * (two - one)
            if count <= most_parameters:
                tokens = (chosen.tokens or (size // patch) ** 2) + bool(chosen.keypoints)
                T = cameras * tokens + 1 + sizes.soft_tokens + sizes.state_token + sizes.end_token + sizes.chunk
                terms = np.array([1.0, T * layers * hidden**2, layers * T * T * hidden, cameras * size * size])
                found.append(Candidate(chosen, count, tokens, terms / np.array([1, 1e9, 1e9, 1e6])))
    return found


def _spread(candidates: list[Candidate]) -> list[Candidate]:
    """Some from the cheapest to the dearest, evenly by the logarithm of their products."""
    by_cost = sorted(candidates, key=lambda c: (c.terms[1], c.order))
    work = np.log([c.terms[1] for c in by_cost])
    at = [int(np.abs(work - wanted).argmin()) for wanted in np.linspace(work[0], work[-1], _SPREAD)]
    return [by_cost[i] for i in sorted(set(at))]


def _runtime(
    budget: Budget, sizes: Sizes, middle: Candidate, runners: Mapping[str, Runner], clock: Callable[[], float]
) -> tuple[str, Runner, dict[str, float]]:
    """The runtime, and what each that was tried took for `middle` (p50, ms, the least moved by what else is running)."""
    if budget.runtime != "auto":
        if budget.runtime not in runners:
            raise MachineError("student.budget.runtime", found=f"no {budget.runtime} here", expected=f"one of {sorted(runners)}",
                               fix='pip install "tendon-vla[edge]", or runtime: auto')  # fmt: skip
        return budget.runtime, runners[budget.runtime], {}
    if len(runners) == 1:
        return *next(iter(runners.items())), {}
    network = random_network(middle.config, sizes)
    steps = [runner(network, sizes, budget.cameras, budget.threads) for runner in runners.values()]
    took = {name: t.p50_ms for name, t in zip(runners, timed(steps, budget.threads, _ROUNDS_FIRST, clock=clock), strict=True)}
    name = min(took, key=lambda n: took[n])
    return name, runners[name], {n: round(ms, 3) for n, ms in took.items()}


def _p95(candidate: Candidate) -> float:
    return candidate.timing.p95_ms if candidate.timing else math.inf


def _load() -> float:
    """Processes that want a core, per core; 0 where the system does not say."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


def _predict(candidates: list[Candidate]) -> None:
    """Fit what each part of a step costs to the medians that are known, and say p95 of all by it."""
    known = [(c.terms, c.timing) for c in candidates if c.timing is not None]
    times = np.array([t.p50_ms for _, t in known])
    rows = np.array([terms for terms, _ in known]) / times[:, None]  # relative errors count
    best, least = np.zeros(4), math.inf
    for count in range(1, 5):  # every subset: a cost is never negative, and four of them need no solver
        for subset in itertools.combinations(range(4), count):
            solved, *_ = np.linalg.lstsq(rows[:, subset], np.ones(len(rows)), rcond=None)
            wrong = float(np.square(rows[:, subset] @ solved - 1).sum())
            if (solved >= 0).all() and wrong < least * (1 - 1e-9):
                best, least = np.zeros(4), wrong
                best[list(subset)] = solved
    tails = [(c.tries > 0, c.timing.p95_ms / c.timing.p50_ms) for c in candidates if c.timing is not None]
    # A p95 of few rounds is a guess: it tells where to begin, and no more once there are better ones.
    tail = float(np.median([ratio for sure, ratio in tails if sure] or [ratio for _, ratio in tails]))
    for candidate in candidates:
        candidate.predicted_ms = float(candidate.terms @ best) * tail


def _off(measured: list[Candidate]) -> dict[str, float]:
    """How far the model is from what was measured, over all of it."""
    off = [abs(c.predicted_ms / c.timing.p95_ms - 1) for c in measured if c.timing is not None]
    return {"model_off_median": round(float(np.median(off)), 3), "model_off_worst": round(max(off), 3)}


def row(candidate: Candidate) -> dict[str, Any]:
    """JSON of one candidate."""
    timing, config = candidate.timing, candidate.config
    assert timing is not None
    return {**{name: getattr(config, name) for name in GRID}, "parameters": candidate.parameters,
            "image_tokens": candidate.image_tokens, "capacity": round(candidate.capacity, 3),
            "p50_ms": round(timing.p50_ms, 3), "p95_ms": round(timing.p95_ms, 3), "rounds": timing.rounds,
            "predicted_p95_ms": round(candidate.predicted_ms, 3)}  # fmt: skip


def shape(candidate: Candidate) -> str:
    c = candidate.config
    return f"{c.image_size} px, patch {c.patch}, {c.layers} layers of {c.hidden}"


def line(candidate: Candidate) -> str:
    """One line for a terminal."""
    timing = candidate.timing
    assert timing is not None
    return (f"{shape(candidate):38} {candidate.parameters / 1e6:5.1f} M  p50 {timing.p50_ms:6.2f}  p95 {timing.p95_ms:6.2f} ms"
            f"  ({timing.rounds} rounds)")  # fmt: skip
