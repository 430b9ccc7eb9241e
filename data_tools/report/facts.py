"""What the report says in numbers: spreads against limits, coverage, lengths, and how unusual each episode is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data_tools.check import Dataset, Finding
from data_tools.check.cameras import apart, usual
from data_tools.check.timing import motion_scale, still_rows

BINS = 40
UNUSUAL = 4.0
"""Robust standard deviations (1.4826 times the median distance from the median) from which an episode is listed."""
MOST_POINTS = 1500


@dataclass(frozen=True)
class Spread:
    """One dimension's values."""

    name: str
    unit: str
    convention: str
    counts: np.ndarray  # (BINS,) share of rows
    edges: tuple[float, float]
    quantiles: dict[str, float]  # min, q01, q50, q99, max
    limits: tuple[float, float] | None
    """Declared low and high; None where nobody declared any."""
    outside: float
    """Share of rows outside the limits."""


@dataclass(frozen=True)
class Plane:
    """Where the robot was, seen along one axis."""

    title: str
    x: str
    y: str
    heat: np.ndarray  # (rows, columns) counts, first row at the top
    extent: tuple[float, float, float, float]  # x0, x1, y0, y1
    starts: np.ndarray  # (n, 2)
    tones: np.ndarray  # (n,) index of the instruction


@dataclass(frozen=True)
class Unusual:
    episode: int
    score: float
    reason: str


@dataclass
class Facts:
    spreads: dict[str, list[Spread]] = field(default_factory=dict)
    planes: list[Plane] = field(default_factory=list)
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    instructions: list[tuple[str, int, int]] = field(default_factory=list)  # (text, episodes, rows), most frequent first
    task: np.ndarray = field(default_factory=lambda: np.zeros(0, int))  # per episode, index into the dataset's instructions
    unusual: list[Unusual] = field(default_factory=list)  # most unusual first
    scores: dict[int, float] = field(default_factory=dict)


def facts_of(data: Dataset) -> Facts:
    """Everything that can be said; empty where there are no rows."""
    facts = Facts()
    if data.rows is None or not data.healthy:
        return facts
    assert data.layout is not None
    for part in ("state", "action"):
        facts.spreads[part] = spreads(data, part)
    facts.lengths = np.diff(data.rows.starts)
    facts.task = data.rows.task[np.minimum(data.rows.starts[:-1], len(data.rows.task) - 1)]
    numbers, where, episodes = np.unique(facts.task, return_inverse=True, return_counts=True)
    rows = np.bincount(where, facts.lengths).astype(int)
    for number, count, length in zip(numbers.tolist(), episodes.tolist(), rows.tolist(), strict=True):
        text = data.layout.instructions[number] if 0 <= number < len(data.layout.instructions) else f"task {number}"
        facts.instructions.append((text, count, length))
    facts.instructions.sort(key=lambda entry: -entry[1])
    facts.planes = planes(data, facts.task)
    facts.unusual, facts.scores = unusual(data)
    return facts


def spreads(data: Dataset, part: str) -> list[Spread]:
    """One `Spread` per dimension, over what the values or the limits span, whichever is wider (but not ten times wider)."""
    values, out = data.finite(part), []
    low, high = data.bounds(part)
    for run in data.runs(part):
        for d, name in zip(range(run.columns.start, run.columns.stop), run.names, strict=True):
            column = values[:, d]
            q: dict[str, float] = dict(
                zip(("min", "q01", "q50", "q99", "max"), np.quantile(column, [0, 0.01, 0.5, 0.99, 1]).tolist(), strict=True)
            )
            edges = (q["min"], q["max"])
            limits = (float(low[d]), float(high[d])) if np.isfinite([low[d], high[d]]).all() else None
            if limits and limits[1] - limits[0] < 10 * max(edges[1] - edges[0], 1e-9):
                edges = (min(edges[0], limits[0]), max(edges[1], limits[1]))
            if edges[1] - edges[0] < 1e-9:
                edges = (edges[0] - 0.5, edges[1] + 0.5)
            counts = np.histogram(column, BINS, edges)[0] / len(column)
            slack = 1e-5 * max(abs(low[d]), abs(high[d]))
            outside = float(((column < low[d] - slack) | (column > high[d] + slack)).mean()) if limits else 0.0
            out.append(Spread(name, run.channel.unit, run.channel.convention, counts, edges, q, limits, outside))
    return out


def planes(data: Dataset, task: np.ndarray) -> list[Plane]:
    """Positions from above and from the side where the state has them, else the two directions it varies most in."""
    state = data.finite("state")
    if state.shape[1] < 2 or len(state) < 3:
        return []
    place = next((run for run in data.runs("state") if run.channel.convention == "eef_position" and len(run.names) >= 2), None)
    firsts = [e for e in data.healthy]
    begin = np.stack([data.values("state")[data.span(e)][0] for e in firsts]).astype(float)
    if place is not None:
        at, names = place.columns.start, place.names
        views = [("from above", 0, 1), ("from the side", 0, 2)][: len(names) - 1]
        pairs = [(f"{place.channel.name} {how}", names[i], names[j], state[:, [at + i, at + j]], begin[:, [at + i, at + j]])
                 for how, i, j in views]  # fmt: skip
    else:
        scale = motion_scale(data, "state")
        centre, scaled = state.mean(0), (state - state.mean(0)) / scale
        axes = np.linalg.svd(scaled[:: max(1, len(scaled) // 20_000)], full_matrices=False)[2][:2]
        pairs = [
            ("the two directions the state varies most in", "first", "second", scaled @ axes.T, (begin - centre) / scale @ axes.T)
        ]
    out = []
    keep = np.unique(np.linspace(0, len(firsts) - 1, min(len(firsts), MOST_POINTS)).astype(int))
    for title, x, y, points, starts in pairs:
        (x0, y0), (x1, y1) = np.quantile(points, 0.001, axis=0), np.quantile(points, 0.999, axis=0)
        starts_in = np.clip(starts[keep], (x0, y0), (x1, y1))
        pad = 0.04 * np.maximum([x1 - x0, y1 - y0], 1e-6)
        extent = (x0 - pad[0], x1 + pad[0], y0 - pad[1], y1 + pad[1])
        cells = int(np.clip(np.sqrt(len(points)), 12, 48))
        heat = np.histogram2d(points[:, 1], points[:, 0], (cells, cells), (extent[2:], extent[:2]))[0][::-1]
        out.append(Plane(title, x, y, heat, extent, starts_in, task[np.array(firsts)[keep]]))
    return out


def unusual(data: Dataset) -> tuple[list[Unusual], dict[int, float]]:
    """Episodes ranked by their largest robust distance from the others, in the terms of `_features`."""
    table = _features(data)
    if len(data.healthy) < 5:
        return [], {}
    best: dict[int, tuple[float, str]] = {e: (0.0, "") for e in data.healthy}
    for words, values in table.items():
        known = {e: v for e, v in values.items() if np.isfinite(v)}
        if len(known) < 5:
            continue
        column = np.array(list(known.values()))
        middle = float(np.median(column))
        spread = max(1.4826 * float(np.median(np.abs(column - middle))), 0.05 * abs(middle), 1e-6)
        for e, value in known.items():
            score = abs(value - middle) / spread
            if score > best[e][0]:
                best[e] = (score, words.format(value=value, usual=middle))
    ranked = sorted(best, key=lambda e: -best[e][0])
    return [Unusual(e, *best[e]) for e in ranked if best[e][0] >= UNUSUAL], {e: score for e, (score, _) in best.items()}


def _features(data: Dataset) -> dict[str, dict[int, float]]:
    """What an episode can be unusual in: words with {value} and {usual} -> episode -> number."""
    lengths, waits, ways, jumps, begins, ends = ({} for _ in range(6))
    state_scale, action_scale = motion_scale(data, "state"), motion_scale(data, "action")
    middle = {}
    for name, at in (("begin", 0), ("end", -1)):
        rows = [data.values("state")[data.span(e)][at] for e in data.healthy]
        middle[name] = np.median(rows, axis=0)
    for e in data.healthy:
        state, action = (data.values(part)[data.span(e)].astype(float) for part in ("state", "action"))
        lengths[e] = float(len(state))
        waits[e] = still_rows(data, e) / data.fps
        jumps[e] = float((np.abs(np.diff(action, axis=0)) / action_scale).max(initial=0.0))
        if state.shape[1]:
            ways[e] = float((np.abs(np.diff(state, axis=0)) / state_scale).sum(0).mean())
            begins[e] = float((np.abs(state[0] - middle["begin"]) / state_scale).max())
            ends[e] = float((np.abs(state[-1] - middle["end"]) / state_scale).max())
    table = {
        "{value:.0f} rows long, usually {usual:.0f}": lengths, "{value:.1f} s before it moves, usually {usual:.1f}": waits,
        "a way of {value:.1f} ranges, usually {usual:.1f}": ways,
        "an action that jumps by {value:.0%} of its range, usually {usual:.0%}": jumps,
        "starts {value:.0%} of the range from the usual place, usually {usual:.0%}": begins,
        "ends {value:.0%} of the range from the usual place, usually {usual:.0%}": ends,
    }  # fmt: skip
    for camera, films in data.films.items():
        mean = usual(films)
        if mean is not None:
            far = {e: apart(film.mean, mean) for e, film in enumerate(films) if film is not None and e in lengths}
            table[f"camera {camera}: " + "{value:.0f} levels from the usual picture, usually {usual:.0f}"] = far
    return table


def worst(findings: list[Finding]) -> dict[int, str]:
    """Episode -> the worst severity said of it."""
    out: dict[int, str] = {}
    for finding in findings:  # worst first
        if finding.episode is not None:
            out.setdefault(finding.episode, finding.severity)
    return out
