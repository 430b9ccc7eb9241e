"""Split-conformal thresholds: a bound on false alarms that holds for any score, with the band the true rate lies in.

The scores of n held-out successful rollouts are exchangeable with that of a further successful one from the same circumstances,
so it lies above the k-th smallest of them, k = ceil((n + 1)(1 - alpha)), with a probability of at most alpha (Vovk et al. 2005).
That is the mean over calibrations; given one calibration, the share of successes below its threshold is a draw from
Beta(n + 1 - l, l), l = n + 1 - k. None of it holds once the circumstances change.

Numbers only, no torch: a robot uses it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vla.errors import UsageError

LEVEL = 0.98
"""Of the bands that are printed."""


class Band(NamedTuple):
    """Where a coverage lies."""

    mean: float
    low: float
    high: float


def check_alpha(alpha: float, where: str = "alpha") -> float:
    """`alpha`, if it is a rate of questions; raises `UsageError`."""
    if not 0 < alpha < 1:
        raise UsageError(where, found=alpha, expected="a share between 0 and 1: questions per successful episode",
                         fix="e.g. 0.1")  # fmt: skip
    return float(alpha)


def rank(n: int, alpha: float) -> int:
    """k: which of n scores in rising order is the threshold; n + 1 when n is too small for `alpha`, and nothing ever alarms."""
    return math.ceil((n + 1) * (1 - check_alpha(alpha)) - 1e-9)


def threshold(scores: Sequence[float] | np.ndarray, alpha: float) -> float:
    """What a successful rollout's score exceeds with a probability of at most `alpha`; infinite when there are too few."""
    ordered = np.sort(np.asarray(scores, np.float64))
    k = rank(len(ordered), alpha)
    return float(ordered[k - 1]) if k <= len(ordered) else math.inf


def needed(alpha: float) -> int:
    """The fewest successful rollouts that have a threshold at `alpha`."""
    return math.ceil(1 / check_alpha(alpha) - 1 - 1e-9)


def coverage_band(n: int, alpha: float, level: float = LEVEL) -> Band:
    """The true coverage of a threshold calibrated on n: mean, and the middle `level` of Beta(n + 1 - l, l)."""
    k = rank(n, alpha)
    if k > n:
        return Band(1.0, 1.0, 1.0)
    a, b, tail = k, n + 1 - k, (1 - level) / 2
    return Band(a / (a + b), *(_inverse(lambda x: beta_cdf(x, a, b), q) for q in (tail, 1 - tail)))


def observed_band(n: int, m: int, alpha: float, level: float = LEVEL) -> Band:
    """The coverage seen on m further successes: as `coverage_band`, with the chance of those m in it (beta-binomial)."""
    k = rank(n, alpha)
    if k > n or m < 1:
        return Band(1.0, 1.0 if m else 0.0, 1.0)
    a, b, tail = k, n + 1 - k, (1 - level) / 2
    weight = [_log_choose(m, j) + _log_beta(j + a, m - j + b) for j in range(m + 1)]
    upto = np.cumsum(np.exp(np.array(weight) - _log_beta(a, b)))
    return Band(a / (a + b), *(float(min(np.searchsorted(upto, q * upto[-1]), m)) / m for q in (tail, 1 - tail)))


def beta_cdf(x: float, a: int, b: int) -> float:
    """P(Beta(a, b) <= x) for whole numbers: that at least a of a + b - 1 uniform draws are below x."""
    if not 0 < x < 1:
        return float(x >= 1)
    n = a + b - 1
    j = np.arange(a, n + 1)
    ways = np.array([_log_choose(n, int(i)) for i in j])
    return float(min(1.0, np.exp(ways + j * math.log(x) + (n - j) * math.log1p(-x)).sum()))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _inverse(rising: Callable[[float], float], q: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < q else (low, middle)
    return (low + high) / 2


def guarantee(n: int, alpha: float, perturbed: Sequence[str], level: float = LEVEL) -> str:
    """The sentence of a card."""
    band = coverage_band(n, alpha, level)
    under = f" under {', '.join(perturbed)}" if perturbed else ""
    return (f"Calibrated on n={n} successful episodes{under}: {100 * (1 - alpha):.3g} % of successful episodes pass without a "
            f"question ({100 * level:.3g} % band of the true coverage {100 * band.low:.1f} to {100 * band.high:.1f} %). "
            "The guarantee fails under distribution shift: other tasks, scenes, cameras, disturbances or a changed policy."
            )  # fmt: skip
