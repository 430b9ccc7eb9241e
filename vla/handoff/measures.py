"""What a detector is worth, with intervals: can it tell failures from successes, how soon, and what comes of asking by it.

An episode that fails is usually longer than one that succeeds, and whatever grows with time tells the two apart. So two figures
are given: `auroc`, of the largest value in a whole episode, and `matched`, which compares a failure with a success at the same
look only. A clock is perfect or nearly so by the first, and 0.5 by the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from vla.evaluate.results import proportion
from vla.handoff.rollouts import Rollouts
from vla.handoff.scores import Kind

DRAWS = 1000
"""Bootstrap draws of episodes."""


class Share(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


class Pairs:
    """How often a failed episode scores above a successful one: counts of wins (F, S) and of comparisons (F, S)."""

    def __init__(self, wins: np.ndarray, count: np.ndarray) -> None:
        self.wins, self.count = wins, count

    @classmethod
    def of(cls, values: np.ndarray, failed: np.ndarray) -> Pairs:
        """Of one value an episode (E,)."""
        wins = _above(values[failed], values[~failed])
        return cls(wins, np.ones_like(wins))

    @classmethod
    def matched(cls, rollouts: Rollouts, values: np.ndarray) -> Pairs:
        """Of running values (L,), each look against the same look of the other."""
        failed, looks = ~rollouts.success, rollouts.looks
        table = np.full((len(rollouts), looks.max(initial=0)), np.nan)
        table[rollouts.of_episode, np.arange(len(values)) - rollouts.starts[rollouts.of_episode]] = values
        wins, count = np.zeros((2, int(failed.sum()), int((~failed).sum())))
        for k in range(table.shape[1]):
            a, b = table[failed, k], table[~failed, k]
            both = ~np.isnan(a)[:, None] & ~np.isnan(b)[None]
            wins += np.where(both, _above(a, b), 0)
            count += both
        return cls(wins, count)

    @property
    def value(self) -> float:
        """0.5 of nothing to compare."""
        return float(self.wins.sum() / self.count.sum()) if self.count.sum() else 0.5

    @cached_property
    def draws(self) -> np.ndarray:
        """(DRAWS,): the value of episodes drawn with replacement; the same episodes for all detectors of the same rollouts."""
        F, S = self.wins.shape
        if not F or not S:
            return np.full(DRAWS, np.nan)
        rng = np.random.default_rng(0)
        of_failed, of_rest = (rng.multinomial(n, np.full(n, 1 / n), DRAWS).astype(np.float32) for n in (F, S))
        wins, count = (((of_failed @ matrix.astype(np.float32)) * of_rest).sum(1, dtype=np.float64)
                       for matrix in (self.wins, self.count))  # fmt: skip
        return wins / np.maximum(count, 1e-9)

    def share(self) -> Share:
        """With its interval."""
        return interval(self.value, self.draws)


def interval(value: float, draws: np.ndarray) -> Share:
    """The middle 95 % of bootstrap draws."""
    low, high = np.nanquantile(draws, [0.025, 0.975]) if np.isfinite(draws).any() else (np.nan, np.nan)
    return Share(value, float(low), float(high))


def _above(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(F, S): 1 where a is above b, half where they are equal."""
    return (a[:, None] > b[None]) + 0.5 * (a[:, None] == b[None])


def detection(rollouts: Rollouts, values: np.ndarray) -> tuple[Pairs, Pairs]:
    """(whole episodes, same looks) of running values (L,)."""
    largest = np.maximum.reduceat(values, rollouts.starts[:-1])
    return Pairs.of(largest, ~rollouts.success), Pairs.matched(rollouts, values)


def values_of(rollouts: Rollouts, score: str, kind: Kind) -> np.ndarray:
    """(L,) running values of a detector; `clock` is the look's number."""
    if score == "clock":
        return (np.arange(len(rollouts.step)) - rollouts.starts[rollouts.of_episode]).astype(np.float64)
    return rollouts.running(score, kind)


# ------------------------------------------------------------------------------------------------------- asking


def asked_at(rollouts: Rollouts, values: np.ndarray, threshold: float) -> np.ndarray:
    """(E,): the look (0, 1, ...) at which somebody is asked, -1 where nobody is."""
    never = len(values)
    first = np.minimum.reduceat(np.where(values > threshold, np.arange(never), never), rollouts.starts[:-1])
    return np.where(first < never, first - rollouts.starts[:-1], -1)


def outcome_of(rollouts: Rollouts, asked: np.ndarray) -> np.ndarray:
    """(E,) bool: success when whoever is asked (the scripted expert) finishes the episode; needs `collect --relief`."""
    assert rollouts.relief is not None
    helped = rollouts.relief[rollouts.starts[:-1] + np.maximum(asked, 0)]
    return np.where(asked >= 0, helped, rollouts.success)


def point(rollouts: Rollouts, values: np.ndarray, threshold: float) -> dict[str, Any]:
    """What asking at a threshold comes to."""
    asked = asked_at(rollouts, values, threshold)
    won, asks, alone = outcome_of(rollouts, asked), asked >= 0, rollouts.success
    when = rollouts.step[rollouts.starts[:-1] + np.maximum(asked, 0)][asks & ~alone]
    return {
        "threshold": float(threshold) if np.isfinite(threshold) else None, "success": proportion(int(won.sum()), len(won)),
        "questions": proportion(int(asks.sum()), len(asks)),
        "questions_in_successes": proportion(int((asks & alone).sum()), int(alone.sum())),
        "failures_asked_about": proportion(int((asks & ~alone).sum()), int((~alone).sum())),
        "median_step_of_question_in_failures": float(np.median(when)) if len(when) else None,
    }  # fmt: skip


def curve(rollouts: Rollouts, values: np.ndarray, points: int = 41) -> list[dict[str, float]]:
    """{questions, success} per episode as the threshold moves, from never asking to as often as this detector can ask."""
    largest = np.sort(np.maximum.reduceat(values, rollouts.starts[:-1]))[::-1]
    at = np.unique(np.linspace(0, len(largest), points).round().astype(int))
    found = []
    for asked in at:
        threshold = np.inf if asked == 0 else float(np.nextafter(largest[asked - 1], -np.inf))
        asks = asked_at(rollouts, values, threshold)
        found.append({"questions": float((asks >= 0).mean()), "success": float(outcome_of(rollouts, asks).mean())})
    return found


def area(points: Sequence[Mapping[str, float]], never: float, always: float) -> float:
    """How much of what help can bring comes with few questions: the area of a curve above asking at random, over that of asking
    in just the episodes that would fail; 0 at random."""
    ordered = sorted((p["questions"], p["success"]) for p in points)
    x, y = np.array([(0.0, never), *ordered, (1.0, always)]).T
    gain = np.trapezoid(y, x) - (never + always) / 2
    best = (always - never) * (1 - (always - never)) / 2
    return float(gain / best) if best > 1e-9 else 0.0
