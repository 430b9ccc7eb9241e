"""Units that change on the way: single episodes whose angles are so many times those of the others."""

from __future__ import annotations

import numpy as np

from data_tools.check.dataset import Dataset, Run

DEGREE = 180 / np.pi
_EPISODES = 5
"""Episodes below which nothing is usual, so that none can be odd."""
_USUAL = 4.0
"""How far an episode's range, taken as degrees, may lie from the usual one; from radians, degrees are 57 times off."""
_MOST = 0.6
"""Share of the moving dimensions."""


def in_degrees(data: Dataset, part: str, run: Run) -> dict[int, float]:
    """Episode -> its largest angle, of those whose angles would be like the others' if they were degrees and are not as radians.

    Most dimensions that move have to reach well beyond what any other episode does, divided by 57.3 they have to be usual,
    and the largest has to be more than one turn (a step of more than 1 rad in a delta). A single wild joint, or an episode
    that only moves more, is neither.
    """
    episodes = [e for e in data.healthy if data.span(e).stop - data.span(e).start > 1]
    if len(episodes) < _EPISODES:
        return {}
    size = np.array([np.quantile(np.abs(data.values(part)[data.span(e)][:, run.columns]), 0.99, axis=0) for e in episodes], float)
    usual = np.median(size, axis=0)
    moving = usual > 1e-4
    if not moving.any():
        return {}
    size, usual = size[:, moving], usual[moving]
    ratio = size / DEGREE / usual
    odd = np.abs(np.log(np.median(ratio, axis=1) + 1e-9)) < np.log(_USUAL)
    odd &= size.max(1) > (1.0 if "delta" in run.channel.convention else 2 * np.pi)
    if not odd.any() or 2 * odd.sum() >= len(episodes):
        return {}
    odd &= (size > 2 * size[~odd].max(0)).mean(1) >= _MOST
    return {episodes[n]: float(size[n].max()) for n in np.flatnonzero(odd)}
