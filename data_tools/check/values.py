"""Numbers by themselves: constant dimensions, declared limits, units, and statistics against the data they describe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from data_tools.check.dataset import Dataset
from data_tools.check.finding import Finding, register
from data_tools.check.scales import in_degrees
from vla.episodes.layout import ACTION, RECOMPUTE, STATE

KEYS = {"state": STATE, "action": ACTION}
WARN_OUTSIDE, FAIL_OUTSIDE = 0.01, 0.10
"""Shares of rows outside the declared limits: above the first a warning, above the second an error."""
_CONSTANT, _NEAR = 1e-6, 1e-3
_ANGLES = ("joint_position", "joint_delta", "eef_euler", "eef_delta_euler", "eef_axis_angle", "eef_delta_axis_angle")
_DEGREE = 180 / np.pi


def ranges(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(min, q01, q99, max) per dimension of (n, dims)."""
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
    return values.min(0), q01, q99, values.max(0)


@register("constant-dimension", "dimensions that never change, or hardly ever")
def constant_dimension(data: Dataset) -> Iterator[Finding]:
    """A range of nothing divides by nothing (openpi #814: -3200 after normalising). Ours masks it; others do not."""
    for part in ("state", "action"):
        values, names = data.finite(part), data.names(part)
        if len(values) < 3:
            continue
        low, q01, q99, high = ranges(values)
        declared = np.subtract(*data.bounds(part)[::-1])
        for d, name in enumerate(names):
            size = max(abs(low[d]), abs(high[d]))
            fix = (
                f"leave {name} out of the embodiment, or keep it knowing that it is masked: it becomes 0 for the model "
                "and its constant on the robot"
            )
            if high[d] - low[d] <= max(_CONSTANT * size, 1e-12):
                yield Finding(
                    "note" if part == "state" else "warning",
                    KEYS[part],
                    f"always {low[d]:g}",
                    "values that vary",
                    fix,
                    dimension=name,
                )
            elif q99[d] - q01[d] <= max(_CONSTANT * max(abs(q01[d]), abs(q99[d])), 1e-12):
                share = float(np.mean((values[:, d] < q01[d]) | (values[:, d] > q99[d])))
                yield Finding(
                    "warning",
                    KEYS[part],
                    f"q01 = q99 = {q01[d]:g}, though {share:.2%} of the rows differ (min {low[d]:g}, max {high[d]:g})",
                    "a range that most rows span",
                    "record more episodes that use this dimension, or "
                    "normalise it by min and max (`policy.normalization.action=bounds`)",
                    dimension=name,
                )
            elif np.isfinite(declared[d]) and q99[d] - q01[d] < _NEAR * declared[d]:
                yield Finding(
                    "warning",
                    KEYS[part],
                    f"98 % of the rows span {q99[d] - q01[d]:.2g}, {(q99[d] - q01[d]) / declared[d]:.1e} of the declared range",
                    "a range well above noise",
                    fix,
                    dimension=name,
                )


@register("outside-limits", "values outside the declared limits")
def outside_limits(data: Dataset) -> Iterator[Finding]:
    """What lies outside is clipped in training and refused on the robot."""
    if not data.declared:
        return
    for part in ("state", "action"):
        values, names = data.finite(part), data.names(part)
        low, high = data.bounds(part)
        slack = 1e-5 * np.maximum(np.maximum(np.abs(low), np.abs(high)), high - low)
        slack[~np.isfinite(slack)] = 0.0  # without limits: inf - inf would be no number
        outside = (values < low - slack) | (values > high + slack)
        for d in np.flatnonzero(outside.any(0)):
            share = float(outside[:, d].mean())
            severity = "error" if share > FAIL_OUTSIDE else "warning" if share > WARN_OUTSIDE else "note"
            episode, frame = first_row(
                data, part, lambda rows, d=d, lo=low - slack, hi=high + slack: (rows[:, d] < lo[d]) | (rows[:, d] > hi[d])
            )
            yield Finding(
                severity,
                KEYS[part],
                f"{share:.2%} of the rows outside ({values[:, d].min():g} to {values[:, d].max():g})",
                f"within {low[d]:g} to {high[d]:g}, at most {WARN_OUTSIDE:.0%} outside",
                "if the limits are wrong, correct them in meta/embodiment.json; if the data is, drop these episodes or "
                "convert the unit with a dataset card (`vla data convert --help`)",
                episode,
                frame,
                names[d],
            )


def first_row(data: Dataset, part: str, bad) -> tuple[int | None, int | None]:
    """(episode, frame) of the first healthy row for which `bad` (rows -> bool per row) holds."""
    for e in data.healthy:
        hits = np.flatnonzero(bad(data.values(part)[data.span(e)]))
        if len(hits):
            return e, int(hits[0])
    return None, None


@register("degrees", "angles in degrees that are declared in radians, and the reverse")
def degrees(data: Dataset) -> Iterator[Finding]:
    """By size where a unit is declared, and by the ratio of action to state where both move one joint."""
    said = set()
    for part in ("state", "action"):
        values = data.finite(part)
        if not data.declared or not len(values):
            continue
        for run in data.runs(part):
            unit, convention = run.channel.unit.lower(), run.channel.convention
            if not convention.startswith(_ANGLES):
                continue
            size = np.quantile(np.abs(values[:, run.columns]), 0.99, axis=0)
            most = np.pi if "delta" in convention else 4 * np.pi
            whole = not unit[:1].isdigit() or unit.startswith("1 ")  # "0.1 rad/step" says what 1 means, not what is stored
            odd = in_degrees(data, part, run) if "rad" in unit and whole else {}
            for e, largest in odd.items():
                found = f"up to {largest:.1f}, {_DEGREE:.0f} times the other episodes"
                yield replace(_angle(part, run.channel.name, found, "radians, as they are", "deg", "rad"), episode=e)
            for d in np.flatnonzero(size > most) if "rad" in unit and whole and not odd else ():
                said.add(run.names[d])
                yield _angle(part, run.names[d], f"99 % up to {size[d]:.1f}", f"radians, below {most:.1f}", "deg", "rad")
            if unit.startswith("deg") and "delta" not in convention and len(size) > 2 and 0.05 < size.max() <= 2 * np.pi:
                name = run.names[int(size.argmax())]
                yield _angle(part, name, f"no angle of {run.channel.name} above {size.max():.2f}", "degrees", "rad", "deg")
    for name, action, state in _same_joint(data):
        a, now, _ = data.steps(slice(action, action + 1), slice(state, state + 1))
        if len(a) < 20 or np.std(a) < 1e-9 or np.std(now) < 1e-9 or np.corrcoef(a[:, 0], now[:, 0])[0, 1] < 0.9:
            continue
        ratio = float(np.std(a) / np.std(now))
        if name not in said and (abs(ratio / _DEGREE - 1) < 0.15 or abs(ratio * _DEGREE - 1) < 0.15):
            larger = "action" if ratio > 1 else "state"
            yield _angle(larger, name, f"the action is {ratio:.3g} times the state", "one unit for both", "deg", "rad")


def _angle(part: str, name: str, found: str, expected: str, have: str, want: str) -> Finding:
    return Finding(
        "error",
        KEYS[part],
        f"{found}: looks like {'degrees' if have == 'deg' else 'radians'}",
        expected,
        f"declare unit {have} for {name} in a dataset card and convert (`vla data convert --help`), which makes it {want}",
        dimension=name,
    )


def _same_joint(data: Dataset) -> Iterator[tuple[str, int, int]]:
    """(name, action column, state column) of dimensions that are the same joint, by declaration or by name."""
    if data.declared:
        for action, state in data.pairs():
            if action.channel.convention == "joint_position":
                for d, name in enumerate(action.names):
                    yield name, action.columns.start + d, state.columns.start + d
        return
    states = {name.removeprefix("state."): n for n, name in enumerate(data.names("state"))}
    for n, name in enumerate(data.names("action")):
        bare = name.removeprefix("action.")
        if bare in states and not (bare[:1] == "d" and bare[1:].isdigit()):
            yield bare, n, states[bare]


@register("foreign-statistics", "statistics that are not those of the data")
def foreign_statistics(data: Dataset) -> Iterator[Finding]:
    """Readers refuse what lies outside [min, max]. Statistics of more data than this, or of other actions, are found here."""
    assert data.layout is not None
    for part, key in KEYS.items():
        entry, values = data.layout.stats.get(key) or {}, data.finite(part)
        said = {name: np.asarray(entry.get(name, ()), float).reshape(-1) for name in ("min", "max", "mean", "std")}
        if (
            len(values) < 2
            or any(v.size != values.shape[1] for v in said.values())
            or len(data.healthy) < len(data.layout_episodes)
        ):
            continue
        width = np.maximum(values.max(0) - values.min(0), 1e-6 * np.maximum(np.abs(values).max(0), 1e-3))
        off = np.max(
            [
                np.abs(said[n] - f(values)) / width
                for n, f in (
                    ("min", lambda v: v.min(0)),
                    ("max", lambda v: v.max(0)),
                    ("mean", lambda v: v.mean(0)),
                    ("std", lambda v: v.std(0)),
                )
            ],
            axis=0,
        )
        bad = np.flatnonzero(off > 0.02)
        if not len(bad):
            continue
        d = int(bad[off[bad].argmax()])
        is_delta = part == "action" and _of_deltas(data, said)
        what = (
            "those of action minus state: deltas, while the actions are absolute"
            if is_delta
            else f"mean {said['mean'][d]:g}, std {said['std'][d]:g}, {said['min'][d]:g} to {said['max'][d]:g}"
        )
        yield Finding(
            "error",
            "meta/stats.json",
            f"{key}: {what} ({len(bad)} of {values.shape[1]} dimensions differ)",
            f"mean {values[:, d].mean():g}, std {values[:, d].std():g}, {values[:, d].min():g} to {values[:, d].max():g}",
            RECOMPUTE.format(data.root),
            dimension=data.names(part)[d],
        )


def _of_deltas(data: Dataset, said: dict[str, np.ndarray]) -> bool:
    """Whether the statistics are those of `action - state`, or of the steps from one action to the next."""
    action, state = data.finite("action"), data.finite("state")
    candidates = [np.diff(action, axis=0)]
    if state.shape == action.shape:
        candidates.append(action - state)
    for values in candidates:
        scale = np.maximum(values.std(0), 1e-9)
        if (np.abs(said["mean"] - values.mean(0)) < 0.1 * scale).all() and (np.abs(said["std"] / scale - 1) < 0.1).all():
            return True
    return False
