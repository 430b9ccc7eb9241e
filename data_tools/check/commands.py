"""What actions do to the state: absolute or delta, which axis, which way, and whether they are actions at all."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from data_tools.check.dataset import ABSOLUTE, Dataset, Run
from data_tools.check.finding import Finding, register
from vla.episodes.layout import ACTION

LEAST_ROWS = 60
"""Rows below which a correlation says nothing."""
AHEAD = (1, 3)
"""Steps after which the state is looked at: a controller needs a few to get anywhere."""
_FINGERS = re.compile(r"finger|grip", re.IGNORECASE)
CARD = "declare it in a dataset card and convert again (`vla data convert --help`), or correct meta/embodiment.json"


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(A, B) Pearson correlations between the columns of (n, A) and (n, B); 0 for a constant column."""
    a, b = a - a.mean(0), b - b.mean(0)
    sizes = [np.linalg.norm(x, axis=0) for x in (a, b)]
    a, b = (x / np.where(size > 1e-9 * np.sqrt(len(x)), size, np.inf) for x, size in zip((a, b), sizes, strict=True))
    return a.T @ b


@register("delta-absolute", "absolute actions declared as deltas, and the reverse")
def delta_absolute(data: Dataset) -> Iterator[Finding]:
    """An absolute target resembles the next state, a delta the way there; the two hardly resemble each other."""
    paired = set()
    for action, state in data.pairs() if data.declared else ():
        paired.add(action.columns.start)
        place = way = np.full(len(action.names), -1.0)
        moving = np.ones(len(action.names), bool)
        for ahead in AHEAD:
            a, now, later = data.steps(action.columns, state.columns, ahead)
            if len(a) < LEAST_ROWS:
                break
            place = np.maximum(place, np.diag(correlation(a, later)))
            way = np.maximum(way, np.diag(correlation(a, later - now)))
            moving &= (a.std(0) > 1e-9) & (now.std(0) > 1e-9)
        else:
            absolute = action.channel.convention in ABSOLUTE
            like_place, like_way = (place > 0.95) & (place > way + 0.2), (way > 0.6) & (way > place + 0.05) & (place < 0.9)
            wrong = (like_way if absolute else like_place) & moving
            if 2 * wrong.sum() > moving.sum():
                d = int(np.argmax(np.where(wrong, np.abs(place - way), -1)))
                seen = f"{action.names[d]} correlates {place[d]:.2f} with where the state is next, {way[d]:.2f} with how it moves"
                yield _declared_wrong(action, d, absolute, seen)
    for run in data.runs("action") if data.declared else ():
        if run.columns.start in paired or run.channel.convention not in ("eef_delta_position", "joint_delta"):
            continue
        values = data.finite("action")[:, run.columns]  # no state to compare with: only its own shape
        if len(values) < LEAST_ROWS:
            continue
        lean = np.abs(values.mean(0)) / np.maximum(values.std(0), 1e-9)
        steady = np.ptp(values, axis=0) > 1e-6 * np.abs(values).max(0)
        if (steady & (lean > 3)).any():
            d = int(np.argmax(np.where(steady, lean, 0)))
            yield _declared_wrong(
                run,
                d,
                False,
                f"mean {values[:, d].mean():g}, standard deviation {values[:, d].std():g}: a robot that moves one way only",
            )


def _declared_wrong(run: Run, d: int, absolute: bool, found: str) -> Finding:
    is_, said = ("deltas", "absolute") if absolute else ("absolute positions", "deltas")
    return Finding(
        "error",
        ACTION,
        f"{found}: {is_}",
        f"{said}, as its convention {run.channel.convention} says",
        CARD,
        dimension=run.names[d],
    )


@register("action-axes", "actions that move another axis than they say, or the other way")
def action_axes(data: Dataset) -> Iterator[Finding]:
    """A turned or mirrored frame: the command of one axis shows in the motion of another."""
    for action, state in data.pairs() if data.declared else ():
        if action.channel.convention in ABSOLUTE:
            continue
        a, now, later = data.steps(action.columns, state.columns)
        if len(a) < LEAST_ROWS:
            continue
        table = correlation(a, later - now)
        for d, name in enumerate(action.names):
            best = int(np.abs(table[d]).argmax())
            if table[d, d] < -0.6:
                found = f"{name} correlates {table[d, d]:.2f} with the motion of {state.names[d]}: the sign is turned"
            elif abs(table[d, d]) < 0.25 and abs(table[d, best]) > 0.85:
                found = f"{name} moves {state.names[best]} ({table[d, best]:.2f}), not {state.names[d]} ({table[d, d]:.2f})"
            else:
                continue
            yield Finding(
                "warning",
                ACTION,
                found,
                f"that {name} moves {state.names[d]} forwards",
                f"if action and state are in different frames, say so in `frame`; else {CARD}",
                dimension=name,
            )


@register("action-is-state", "actions that only repeat the state (GR00T #137)")
def action_is_state(data: Dataset) -> Iterator[Finding]:
    """Such a policy learns to stay where it is. Compared at rows where the state has just moved; lags up to 5 steps."""
    equal = _equal_columns(data)
    names = data.names("action")
    moving = [d for d in range(len(names)) if np.ptp(data.finite("action")[:, d]) > 1e-9] if data.healthy else []
    for lag in (0, 1, 2, 3, 4, 5, -1, -2, -3):
        hits = {d: s for d, (best, s) in equal.items() if best == lag}
        if not hits:
            continue
        listed = ", ".join(f"{names[d]} = {data.names('state')[s]}" for d, s in list(hits.items())[:4])
        d = next(iter(hits))
        if lag < 0:
            yield Finding(
                "note",
                ACTION,
                f"action[t] is state[t + {-lag}] in {len(hits)} dimensions ({listed})",
                "commands as they were sent",
                "nothing, if the recorder meant the next state as the target",
            )
            continue
        when = "state[t]" if lag == 0 else f"state[t - {lag}]"
        severity = "error" if 2 * len(hits) > len(moving) else "warning"
        yield Finding(
            severity,
            ACTION,
            f"action[t] is {when} in {len(hits)} of {len(moving)} moving dimensions ({listed})",
            "the command that was sent, or the next state",
            "record the commands (the leader's or the controller's target); failing "
            "that, use the next state as the action: action[t] = state[t + 1]",
            dimension=names[d],
        )


def _equal_columns(data: Dataset) -> dict[int, tuple[int, int]]:
    """Action column -> (lag, state column) that holds the same numbers, where the state moves."""
    found: dict[int, tuple[int, int]] = {}
    episodes = data.sample()[:200]
    if not episodes:
        return found
    scale = np.maximum(np.ptp(data.finite("state"), axis=0), 1e-9)
    for lag in (0, -1, 1, 2, 3, 4, 5, -2, -3):
        same = moves = np.zeros((data.values("action").shape[1], len(scale)))
        for e in episodes:
            a, s = data.values("action")[data.span(e)], data.values("state")[data.span(e)]
            if len(a) < 12:
                continue
            at = np.arange(6, len(a) - 3)  # so that every lag compares the same rows
            moved = np.abs(s[at - lag] - s[at - lag - 1]) > 1e-4 * scale
            close = np.abs(a[at][:, :, None] - s[at - lag][:, None, :]) <= 1e-5 * scale + 1e-7
            same = same + (close & moved[:, None, :]).sum(0)
            moves = moves + moved.sum(0)[None, :]
        for d, s in np.argwhere((moves >= 12) & (same >= 0.99 * moves)):
            found.setdefault(int(d), (lag, int(s)))
    return found


@register("gripper-polarity", "grippers whose declared sense is not what the data does")
def gripper_polarity(data: Dataset) -> Iterator[Finding]:
    """The command is held against the opening measured a few steps later, in all and in each episode."""
    for action, state, agree in _grippers(data):
        senses = {}
        for e in data.sample():
            a = data.values("action")[data.span(e)][:, action.columns.start].astype(float)
            senses[e] = (a, _opening(data.values("state")[data.span(e)][:, state.columns].astype(float)))
        if sum(len(a) for a, _ in senses.values()) < LEAST_ROWS:
            continue
        lag, overall = _best_lag(list(senses.values()))
        name = action.names[0]
        if agree and abs(overall) > 0.5 and overall * agree < 0:
            yield Finding(
                "error",
                ACTION,
                f"a larger command is followed {lag} steps later by a {'larger' if overall > 0 else 'smaller'} "
                f"{state.names[0]} (correlation {overall:.2f})",
                f"the opposite: {action.channel.convention} against {state.channel.convention}",
                f"declare the other sense (gripper_open_positive or gripper_closed_positive) for {name} in a dataset card and "
                "convert again, or in meta/embodiment.json if only the description is wrong",
                dimension=name,
            )
        each = {e: _corr(*_shift(a, s, lag)) for e, (a, s) in senses.items()}
        sure = {e: c for e, c in each.items() if abs(c) > 0.5}
        against = [e for e, c in sure.items() if c * np.sign(np.median(list(sure.values()))) < 0]
        if sure and len(against) <= len(sure) / 2:
            for e in against:
                yield Finding(
                    "error",
                    ACTION,
                    f"the gripper command has the other sense than in the other episodes ({each[e]:.2f} "
                    f"against {np.median(list(sure.values())):.2f})",
                    "one sense in all episodes",
                    "turn its sign in these episodes, or drop them",
                    e,
                    dimension=name,
                )


@register("gripper-range", "grippers that use one half of their declared range only")
def gripper_range(data: Dataset) -> Iterator[Finding]:
    """0 to 1 where -1 to 1 is declared: what is meant as closed (or open) is then half of it. Said only where the values
    span one half from end to end and never enter the other."""
    for run in data.runs("action") if data.declared else ():
        if run.channel.convention not in ("gripper_open_positive", "gripper_closed_positive"):
            continue
        values = data.finite("action")[:, run.columns]
        for d, name in enumerate(run.names):
            low, high = float(run.channel.low[d]), float(run.channel.high[d])
            if len(values) < LEAST_ROWS or not np.isfinite(high - low):
                continue
            ends, middle, slack = (values[:, d].min(), values[:, d].max()), (low + high) / 2, 0.02 * (high - low)
            if any(np.allclose(ends, half, rtol=0, atol=slack) for half in ((low, middle), (middle, high))):
                yield Finding(
                    "warning",
                    ACTION,
                    f"{ends[0]:g} to {ends[1]:g} over all {len(values)} rows",
                    f"both halves of the declared range, {low:g} to {high:g}",
                    f"if {ends[0]:g} means the one end and {ends[1]:g} the other, {CARD}",
                    dimension=name,
                )


def _grippers(data: Dataset) -> Iterator[tuple[Run, Run, int]]:
    """(command, measured opening, +1 when both are declared in the same sense, -1 in opposite ones, 0 undeclared)."""
    senses = {"gripper_open_positive": 1, "gripper_closed_positive": -1}
    states = list(data.runs("state"))
    if data.declared:
        measured = [s for s in states if s.channel.convention in senses] or [s for s in states if _FINGERS.search(s.channel.name)]
        commands = [a for a in data.runs("action") if a.channel.convention in senses]
        for n, action in enumerate(commands):
            same = [s for s in measured if s.channel.name == action.channel.name]
            if same or len(measured) == len(commands):
                state = same[0] if same else measured[n]
                # Finger joints that nobody declared: two of them measure their distance, of one the sense is unknown.
                fingers = 1 if len(state.names) == 2 else 0
                yield action, state, senses[action.channel.convention] * senses.get(state.channel.convention, fingers)
        return
    found = []
    for part in ("action", "state"):
        found.append([(run, n) for run in data.runs(part) for n, dim in enumerate(run.channel.dims) if "grip" in dim.lower()])
    for (a, i), (s, j) in zip(*found, strict=False) if len(found[0]) == len(found[1]) else ():
        yield _one(a, i), _one(s, j), 0


def _one(run: Run, d: int) -> Run:
    c = run.channel
    small = c.model_copy(update={"dims": (c.dims[d],), "low": (c.low[d],), "high": (c.high[d],)})
    return Run(small, slice(run.columns.start + d, run.columns.start + d + 1))


def _opening(state: np.ndarray) -> np.ndarray:
    """One number per row: two fingers that move against each other are counted as their distance."""
    if state.shape[1] == 2 and _corr(state[:, 0], state[:, 1]) < -0.9:
        return state[:, 0] - state[:, 1]
    return state.mean(1)


def _shift(a: np.ndarray, s: np.ndarray, lag: int) -> tuple[np.ndarray, np.ndarray]:
    return (a[:-lag], s[lag:]) if lag < len(a) else (a[:0], s[:0])


def _corr(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 8 or np.std(a) < 1e-9 or np.std(b) < 1e-9:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _best_lag(senses: list[tuple[np.ndarray, np.ndarray]]) -> tuple[int, float]:
    best = (1, 0.0)
    for lag in range(1, 11):
        shifted = [_shift(a, s, lag) for a, s in senses]
        value = _corr(np.concatenate([a for a, _ in shifted]), np.concatenate([s for _, s in shifted]))
        if abs(value) > abs(best[1]) + 0.01:
            best = (lag, value)
    return best
