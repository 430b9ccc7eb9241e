"""Rotations: whether the numbers can be what their convention says, and whether they turn smoothly.

Which of two readings is right is decided by the data, never by habit: a reading whose orientation jumps where the
other's glides is wrong, and so is one whose turns do not go with the commanded ones while the other's do.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_tools.check.commands import CARD, correlation
from data_tools.check.dataset import ROTATIONS, Dataset, Run
from data_tools.check.finding import Finding, register
from data_tools.check.values import KEYS, first_row
from vla.errors import DataError
from vla.rotation import continuous, convert, relative

READINGS = {
    4: ("quat_xyzw", "quat_wxyz"),
    3: ("axis_angle", "euler_xyz", "euler_ZYX"),
    6: ("rot6d", "rot6d_interleaved"),
}
"""Width -> the forms it may be."""
JUMP = 0.7
"""rad per control step: at 5 Hz and more, a turn of 40 degrees is no motion of an arm."""


def form_of(convention: str) -> str | None:
    """The name `vla.rotation` has for a convention."""
    form = ROTATIONS.get(convention)
    return "euler_ZYX" if form == "euler_zyx" else form


def _rotations(data: Dataset) -> Iterator[tuple[str, Run, str, np.ndarray]]:
    for part in ("state", "action") if data.declared else ():
        values = data.finite(part)
        for run in data.runs(part):
            form = form_of(run.channel.convention)
            whole = run.channel.unit[:1].isalpha() or run.channel.unit in ("1", "-")  # not scaled: `0.1 rad/step` is no angle
            if form and len(values) and whole:
                yield part, run, form, values[:, run.columns]


@register("rotation-shape", "rotations that are none: not unit, not orthonormal, another layout")
def rotation_shape(data: Dataset) -> Iterator[Finding]:
    """Needs no motion: a quaternion has length 1, two 6D columns are orthonormal, a rotation vector is at most pi long."""
    for part, run, form, x in _rotations(data):
        name = run.channel.name
        if form.startswith("quat"):
            size = np.linalg.norm(x, axis=1)
            bad = np.abs(size - 1) > 0.02
            if bad.mean() > 0.001:
                e, t = first_row(data, part, lambda rows, c=run.columns: np.abs(np.linalg.norm(rows[:, c], axis=1) - 1) > 0.02)
                yield Finding(
                    "error",
                    KEYS[part],
                    f"length {size.min():.3g} to {size.max():.3g} ({bad.mean():.1%} of the rows)",
                    "unit quaternions",
                    f"check which dimensions hold the quaternion; {CARD}",
                    e,
                    t,
                    name,
                )
            first = [d.lower().lstrip("q_") for d in run.channel.dims]
            if "w" in (first[0], first[3]) and (first[0] == "w") != (form == "quat_wxyz"):
                yield Finding(
                    "error",
                    KEYS[part],
                    f"dimensions named {list(run.channel.dims)}",
                    f"{form}, as the convention says",
                    CARD,
                    dimension=name,
                )
        elif form == "rot6d":
            yield from _columns_of_six(data, part, run)
        elif form == "axis_angle":
            size = np.linalg.norm(x, axis=1)
            if (size > np.pi * 1.001).mean() > 0.0005:
                e, t = first_row(data, part, lambda rows, c=run.columns: np.linalg.norm(rows[:, c], axis=1) > np.pi * 1.001)
                yield Finding(
                    "error" if size.max() > 2 * np.pi * 1.001 else "warning",
                    KEYS[part],
                    f"rotation vectors up to {size.max():.3g} rad long ({(size > np.pi * 1.001).mean():.1%} above pi): Euler "
                    "angles, or made from quaternions without turning w < 0",
                    "lengths of at most pi",
                    CARD,
                    e,
                    t,
                    name,
                )
        elif np.abs(x).max() > 2 * np.pi * 1.001:
            yield Finding(
                "error",
                KEYS[part],
                f"Euler angles up to {np.abs(x).max():.3g}",
                "radians within one turn",
                f"unwrap them, or declare degrees: {CARD}",
                dimension=name,
            )


def _columns_of_six(data: Dataset, part: str, run: Run) -> Iterator[Finding]:
    """Judged by episode, since datasets of several recorders are mixed by episodes; one finding when most are bad."""
    off: dict[int, tuple[float, float]] = {}
    for e in data.healthy:
        x = data.values(part)[data.span(e)][:, run.columns].astype(float)
        declared, other = _skew(x[:, :3], x[:, 3:]), _skew(x[:, ::2], x[:, 1::2])
        if np.median(declared) > 0.05:
            off[e] = float(np.median(declared)), float(np.median(other))
    for e in off if 2 * len(off) <= len(data.healthy) else list(off)[:1]:
        declared, other = off[e] if 2 * len(off) <= len(data.healthy) else np.median(list(off.values()), axis=0)
        yield Finding(
            "error",
            KEYS[part],
            "interleaved columns x0 y0 x1 y1 x2 y2 (orthonormal only when read so)"
            if other < 0.02
            else f"columns that are not orthonormal (off by {declared:.2g})",
            "x0 x1 x2 y0 y1 y2: the first column of the matrix, then the second",
            f"name the layout rot6d_interleaved: {CARD}" if other < 0.02 else f"check which dimensions hold it; {CARD}",
            e if 2 * len(off) <= len(data.healthy) else None,
            dimension=run.channel.name,
        )


def _skew(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far two columns per row are from orthonormal."""
    lengths = [np.abs(np.linalg.norm(v, axis=1) - 1) for v in (a, b)]
    return np.maximum(np.maximum(*lengths), np.abs((a * b).sum(1)))


@register("rotation-jumps", "rotations whose numbers jump while the orientation does not")
def rotation_jumps(data: Dataset) -> Iterator[Finding]:
    """q and -q, or +pi and -pi: one orientation, far apart as numbers. Bad input, worse target."""
    for part, run, form, _ in _rotations(data):
        found: list[tuple[int, int]] = []
        for e in data.sample():
            x = data.values(part)[data.span(e)][:, run.columns].astype(float)
            if form.startswith("quat"):
                jumps = (x[1:] * x[:-1]).sum(1) < -0.5
            elif form == "rot6d":
                continue
            else:
                jumps = np.linalg.norm(np.diff(x, axis=0), axis=1) > np.pi
                if form == "axis_angle":  # over the half turn, v becomes v - 2 pi v/|v|
                    jumps &= np.linalg.norm(x[1:], axis=1) > np.pi / 2
            found += [(e, int(t) + 1) for t in np.flatnonzero(jumps)]
        if not found:
            continue
        episodes = sorted({e for e, _ in found})
        what = "change sign" if form.startswith("quat") else "jump by a turn"
        yield Finding(
            "error" if part == "action" else "warning",
            KEYS[part],
            f"{form} values {what} between neighbouring rows, {len(found)} times in {len(episodes)} episodes",
            "numbers that are continuous along an episode",
            "convert with a dataset card whose target is rot6d, which has no jumps (`vla data convert --help`)"
            + ("; or keep the sign of the row before" if form.startswith("quat") else ""),
            *found[0],
            run.channel.name,
        )


@register("rotation-layout", "rotations that make sense only when read another way")
def rotation_layout(data: Dataset) -> Iterator[Finding]:
    """Every form of the same width is tried; see the module's first lines for the verdict."""
    for part, run, form, x in _rotations(data):
        if "delta" in run.channel.convention or len(x) < 60:
            continue
        forms = READINGS[len(run.channel.dims)]
        jumps = {f: _jumps(data, part, run, f) for f in forms}
        evidence = f"read as {form} it jumps {jumps[form] or 0} times"
        better = [f for f in forms if jumps[f] is not None and jumps[f] == 0]
        if jumps[form] is None or (jumps[form] and better):
            if better and form not in better:
                yield _read_as(part, run, form, better, evidence)
                continue
        if part == "state" and (commanded := _commanded(data)) is not None:
            fit = {f: value for f in forms if (value := _fit(data, run, f, *commanded)) is not None}
            best = max(fit, key=lambda f: fit[f], default=form)
            if best != form and fit[best] > 0.7 and fit.get(form, 0.0) < fit[best] - 0.2:
                yield _read_as(
                    part,
                    run,
                    form,
                    [best],
                    f"its turns go with the commanded ones by {fit.get(form, 0.0):.2f}, but read as {best} by {fit[best]:.2f}",
                )
        if form.startswith("quat"):
            yield from _odd_episodes(data, part, run, form)


def _read_as(part: str, run: Run, form: str, better: list[str], evidence: str) -> Finding:
    return Finding(
        "error",
        KEYS[part],
        f"{evidence}: it is {' or '.join(better)}",
        f"{form}, as {run.channel.convention} says",
        CARD,
        dimension=run.channel.name,
    )


def _jumps(data: Dataset, part: str, run: Run, form: str) -> int | None:
    """Steps at which the orientation turns by more than `JUMP`; None when the numbers cannot be of this form."""
    count = 0
    for e in data.sample()[:300]:
        x = data.values(part)[data.span(e)][:, run.columns].astype(float)
        try:
            q = continuous(convert(x, form, "quat_xyzw"))
        except DataError:
            return None
        count += int((2 * np.arccos(np.clip(np.abs((q[1:] * q[:-1]).sum(1)), 0, 1)) > JUMP).sum())
    return count


def _commanded(data: Dataset) -> tuple[Run, str] | None:
    """The action channel that says how to turn per step, and its form."""
    for run in data.runs("action"):
        form = form_of(run.channel.convention)
        if form and "delta" in run.channel.convention:
            return run, form
    return None


def _fit(data: Dataset, state: Run, form: str, action: Run, action_form: str) -> float | None:
    """Mean correlation of commanded with measured turns, about fixed or own axes, whichever fits better."""
    commands, turns = [], {"base": [], "body": []}
    for e in data.sample()[:100]:
        a = data.values("action")[data.span(e)][:-1, action.columns].astype(float)
        x = data.values("state")[data.span(e)][:, state.columns].astype(float)
        try:
            q = convert(x, form, "quat_xyzw")
            commands.append(a if action_form != "rot6d" else convert(a, "rot6d", "axis_angle"))
            for frame, held in turns.items():
                held.append(convert(relative(q[:-1], q[1:], frame), "quat_xyzw", "axis_angle"))
        except DataError:
            return None
    a = np.concatenate(commands) if commands else np.zeros((0, 3))
    if len(a) < 60:
        return None
    used = a.std(0) > 1e-6
    return max(float(np.diag(correlation(a, np.concatenate(t)))[used].mean()) for t in turns.values()) if used.any() else None


def _odd_episodes(data: Dataset, part: str, run: Run, form: str) -> Iterator[Finding]:
    """A few episodes in the other order: their quaternions lie where the others' do only after rolling by one place."""
    episodes = data.sample()
    means = np.array([np.abs(data.values(part)[data.span(e)][:, run.columns]).mean(0) for e in episodes])
    if len(episodes) < 5:
        return
    usual, step = np.median(means, axis=0), 1 if form == "quat_xyzw" else -1
    for e, mean in zip(episodes, means, strict=True):
        straight, rolled = np.linalg.norm(mean - usual), np.linalg.norm(np.roll(mean, -step) - usual)
        if straight > 0.4 and rolled < 0.4 * straight:
            yield Finding(
                "error",
                KEYS[part],
                "the quaternion's scalar is at the other end than in the other episodes",
                form,
                "roll it by one place in this episode, or drop it",
                e,
                dimension=run.channel.name,
            )
