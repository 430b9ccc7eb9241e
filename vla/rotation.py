"""Rotations in every form datasets write them, and what may be done to them. Pure numpy, vectorised over (..., d).

Everything goes through the unit quaternion, scalar last, in float64: it is the one form without a singularity, so a
rotation by 3.14159 rad survives the way to any other form and back. A quaternion and its negative are the same rotation;
every function here treats them so, and what leaves is canonical (w >= 0) unless it says otherwise.

Forms, by the names `convert` knows (`REPRESENTATIONS`):

    quat_xyzw, quat_wxyz    unit quaternion, scalar last (scipy, ROS, robosuite) or first (MuJoCo, Eigen's constructor)
    axis_angle              rotation vector: unit axis times angle in rad
    matrix                  (..., 9), row-major; `to_matrix` and `from_matrix` speak (..., 3, 3)
    rot6d                   first two columns of the matrix, one after the other: x0 x1 x2 y0 y1 y2
    rot6d_interleaved       the same six numbers row by row: x0 y0 x1 y1 x2 y2 (what `matrix[..., :2].reshape(6)` gives)
    euler_xyz, euler_ZYX    Euler angles in rad in scipy's notation, any order: lower case extrinsic (fixed axes, first letter
                            first), upper case intrinsic (moving axes). `euler_xyz` (a, b, c) is `euler_ZYX` (c, b, a).

Bad input (wrong width, not finite, a quaternion of length 0, a matrix that does not turn) raises `DataError`.
"""

from __future__ import annotations

import numpy as np

from vla.errors import DataError

REPRESENTATIONS: dict[str, int] = {
    "quat_xyzw": 4,
    "quat_wxyz": 4,
    "axis_angle": 3,
    "matrix": 9,
    "rot6d": 6,
    "rot6d_interleaved": 6,
    "euler_xyz": 3,
    "euler_ZYX": 3,
}
"""Form -> width. Any other `euler_<order>` of three axes is understood as well."""

_SMALL = 1e-7
"""rad within which a middle Euler angle counts as locked."""
_SHAPE = 1e-2
"""How far a matrix's rows may be from orthonormal before it is no rotation but a mistake."""


def convert(x: np.ndarray, source: str, target: str) -> np.ndarray:
    """`x` (..., d) of form `source` as float64 (..., e) of form `target`. Angles in rad."""
    return from_quat(to_quat(x, source), target)


def width(form: str) -> int:
    """How many numbers `form` takes. Raises `DataError` for a form nobody defined."""
    if form in REPRESENTATIONS:
        return REPRESENTATIONS[form]
    _euler_axes(form)
    return 3


def to_quat(x: np.ndarray, form: str) -> np.ndarray:
    """(..., d) of `form` -> (..., 4) canonical unit quaternions xyzw."""
    x = _checked(x, width(form), form)
    if form == "quat_xyzw":
        q = x
    elif form == "quat_wxyz":
        q = np.roll(x, -1, -1)
    elif form == "axis_angle":
        q = _from_axis_angle(x)
    elif form == "matrix":
        return from_matrix(x.reshape(*x.shape[:-1], 3, 3))
    elif form == "rot6d":
        return from_matrix(_orthonormal(x[..., :3], x[..., 3:]))
    elif form == "rot6d_interleaved":
        return from_matrix(_orthonormal(x[..., 0::2], x[..., 1::2]))
    else:
        q = _from_euler(x, form)
    return canonical(q)


def from_quat(q: np.ndarray, form: str) -> np.ndarray:
    """(..., 4) quaternions xyzw, of any sign -> (..., d) of `form`."""
    q = canonical(q)
    if form == "quat_xyzw":
        return q
    if form == "quat_wxyz":
        return np.roll(q, 1, -1)
    if form == "axis_angle":
        return _to_axis_angle(q)
    if form.startswith("euler_"):
        return _to_euler(q, form)
    width(form)  # an unknown form is said before anything is computed
    m = to_matrix(q)
    if form == "matrix":
        return m.reshape(*m.shape[:-2], 9)
    if form == "rot6d":
        return np.concatenate([m[..., 0], m[..., 1]], -1)
    return m[..., :2].reshape(*m.shape[:-2], 6)


# --- quaternions ------------------------------------------------------------------------------------------------------


def canonical(q: np.ndarray) -> np.ndarray:
    """(..., 4) -> the same rotations, unit length, w >= 0; where w is 0, the first non-zero of x, y, z is positive.

    Of the two quaternions of a rotation, the one whose angle is in [0, pi]. Skipping this before taking the rotation vector
    costs 14 to 40 points of success in reproductions of published policies (vla-evaluation-harness, common pitfalls).
    """
    q = _checked(q, 4, "quaternion")
    length = np.linalg.norm(q, axis=-1, keepdims=True)
    if (length < 1e-8).any():
        at = np.argwhere(length[..., 0] < 1e-8)[0].tolist()
        raise DataError(f"quaternion, index {at}", found=q[tuple(at)].tolist(), expected="a length of about 1",
                        fix="drop the episode, or check which dimensions hold the quaternion")  # fmt: skip
    q = q / length
    ordered = q[..., [3, 0, 1, 2]]
    first = np.take_along_axis(ordered, (ordered != 0).argmax(-1)[..., None], -1)
    return np.where(first < 0, -q, q)


def continuous(q: np.ndarray) -> np.ndarray:
    """(..., T, 4) -> the same rotations, each sign chosen so that it is the nearer one to the step before (dot >= 0).

    The first keeps its sign. For plotting, interpolating and differencing along time; no statistics should see the jumps.
    """
    q = _checked(q, 4, "quaternion")
    flips = np.sum(q[..., 1:, :] * q[..., :-1, :], -1) < 0
    signs = np.where(np.cumsum(flips, -1) % 2 == 1, -1.0, 1.0)
    return np.concatenate([q[..., :1, :], q[..., 1:, :] * signs[..., None]], -2)


def compose(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rotation `b` first, then `a`, both about fixed axes (matrix product a @ b): (..., 4) xyzw, canonical."""
    return canonical(_product(np.asarray(a, np.float64), np.asarray(b, np.float64)))


def inverse(q: np.ndarray) -> np.ndarray:
    """The rotation back: (..., 4) xyzw, canonical."""
    return canonical(np.asarray(q, np.float64) * np.array([-1.0, -1.0, -1.0, 1.0]))


def relative(a: np.ndarray, b: np.ndarray, frame: str = "base") -> np.ndarray:
    """What turns `a` into `b`: (..., 4) xyzw, canonical.

    frame "base": about the fixed axes, compose(result, a) == b (robosuite's OSC, Open X). frame "body": about the moving
    body's own axes, compose(a, result) == b (UMI, most hand-held data).
    """
    if frame == "base":
        return compose(b, inverse(a))
    if frame == "body":
        return compose(inverse(a), b)
    raise DataError("relative", found=f"frame {frame!r}", expected="'base' or 'body'", fix="name one of the two")


def rotate(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Vectors (..., 3) turned by quaternions (..., 4) xyzw."""
    v = _checked(v, 3, "vector")
    return np.einsum("...ij,...j->...i", to_matrix(q), v)


def angle_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(...) rad in [0, pi] between two rotations, the length of the shortest turn."""
    difference = relative(a, b)
    return 2 * np.arctan2(np.linalg.norm(difference[..., :3], axis=-1), difference[..., 3])


# --- along time -------------------------------------------------------------------------------------------------------


def slerp(a: np.ndarray, b: np.ndarray, t: np.ndarray | float) -> np.ndarray:
    """The rotation `t` (0..1, broadcast over (...)) of the shortest way from `a` to `b`, at constant speed: (..., 4) canonical.

    Shoemake 1985, "Animating rotation with quaternion curves". Where a and b are half a turn apart, either way is shortest.
    """
    a, b = canonical(a), canonical(b)
    turn = _to_axis_angle(relative(a, b, "body"))
    return canonical(_product(a, _from_axis_angle(turn * np.asarray(t, np.float64)[..., None])))


def resample(q: np.ndarray, times: np.ndarray, new_times: np.ndarray) -> np.ndarray:
    """Orientations `q` (T, 4) seen at `times` (T,), read at `new_times` (N,) along the shortest way: (N, 4) canonical.

    Times rise strictly; outside of them the nearest end holds, as in `numpy.interp`.
    """
    times, new_times = np.asarray(times, np.float64), np.asarray(new_times, np.float64)
    q = _checked(q, 4, "quaternion")
    if q.shape != (len(times), 4) or len(times) == 0 or (np.diff(times) <= 0).any():
        raise DataError("resample", found=f"{q.shape} at {len(times)} times", expected="one quaternion per time, times rising",
                        fix="sort the frames by time")  # fmt: skip
    if len(times) == 1:
        return np.repeat(canonical(q), len(new_times), 0)
    left = np.clip(np.searchsorted(times, new_times, side="right") - 1, 0, len(times) - 2)
    share = np.clip((new_times - times[left]) / (times[left + 1] - times[left]), 0, 1)
    return slerp(q[left], q[left + 1], share)


# --- matrices ---------------------------------------------------------------------------------------------------------


def to_matrix(q: np.ndarray) -> np.ndarray:
    """(..., 4) quaternions xyzw -> (..., 3, 3) matrices that turn column vectors."""
    x, y, z, w = np.moveaxis(canonical(q), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def from_matrix(m: np.ndarray) -> np.ndarray:
    """(..., 3, 3) -> (..., 4) canonical quaternions xyzw.

    Of the four ways to read a quaternion off a matrix, the one that divides by its largest component (Shepperd 1978,
    "Quaternion from rotation matrix"). Raises `DataError` for a matrix that scales, shears or mirrors.
    """
    m = np.asarray(m, np.float64)
    if m.shape[-2:] != (3, 3) or not np.isfinite(m).all():
        raise DataError("rotation matrix", found=f"shape {m.shape}, finite {bool(np.isfinite(m).all())}",
                        expected="finite (..., 3, 3)", fix="check which dimensions hold the matrix")  # fmt: skip
    wrong = (np.abs(m @ np.swapaxes(m, -1, -2) - np.eye(3)).max((-1, -2)) > _SHAPE) | (np.linalg.det(m) < 0)
    if wrong.any():
        at = np.argwhere(wrong)[0].tolist()
        raise DataError(f"rotation matrix, index {at}", found=m[tuple(at)].tolist(), expected="an orthonormal matrix that does "
                        "not mirror", fix="check which dimensions hold it, and whether they are rows or columns")  # fmt: skip
    d = np.diagonal(m, axis1=-2, axis2=-1)
    trace = d.sum(-1)
    choice = np.concatenate([d, trace[..., None]], -1).argmax(-1)
    x = [1 + 2 * d[..., 0] - trace, m[..., 1, 0] + m[..., 0, 1], m[..., 2, 0] + m[..., 0, 2], m[..., 2, 1] - m[..., 1, 2]]
    y = [x[1], 1 + 2 * d[..., 1] - trace, m[..., 2, 1] + m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0]]
    z = [x[2], y[2], 1 + 2 * d[..., 2] - trace, m[..., 1, 0] - m[..., 0, 1]]
    w = [x[3], y[3], z[3], 1 + trace]
    candidates = np.stack([np.stack(one, -1) for one in (x, y, z, w)], -2)  # (..., 4 ways, 4)
    return canonical(np.take_along_axis(candidates, choice[..., None, None], -2)[..., 0, :])


def _orthonormal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """First two columns, possibly not quite orthonormal -> (..., 3, 3), by Gram and Schmidt.

    Zhou et al. 2019, "On the continuity of rotation representations in neural networks", equation 15.
    """
    first = np.linalg.norm(a, axis=-1, keepdims=True)
    x = a / np.where(first > 0, first, 1)
    rest = b - np.sum(x * b, -1, keepdims=True) * x
    second = np.linalg.norm(rest, axis=-1, keepdims=True)
    flat = (first < 1e-6) | (second < 1e-6 * np.maximum(np.linalg.norm(b, axis=-1, keepdims=True), 1e-6))
    if flat.any():
        at = np.argwhere(flat[..., 0])[0].tolist()
        raise DataError(f"6D rotation, index {at}", found=[*a[tuple(at)].tolist(), *b[tuple(at)].tolist()],
                        expected="two columns that are neither zero nor parallel",
                        fix="check which dimensions hold it, and the layout (rot6d or rot6d_interleaved)")  # fmt: skip
    y = rest / second
    return np.stack([x, y, np.cross(x, y)], -1)


# --- rotation vectors -------------------------------------------------------------------------------------------------


def _from_axis_angle(v: np.ndarray) -> np.ndarray:
    angle = np.linalg.norm(v, axis=-1, keepdims=True)
    # sin(a/2)/a, which numpy's sinc gives without dividing by a small a.
    return np.concatenate([v * (0.5 * np.sinc(angle / (2 * np.pi))), np.cos(angle / 2)], -1)


def _to_axis_angle(q: np.ndarray) -> np.ndarray:
    """Angle in [0, pi]. `q` is canonical; arctan2 keeps full precision near 0 and near pi, where arccos loses half the digits."""
    size = np.linalg.norm(q[..., :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(size, q[..., 3:])
    return q[..., :3] * np.where(size > 1e-150, angle / np.where(size > 1e-150, size, 1), 2.0)


# --- Euler angles -----------------------------------------------------------------------------------------------------


def _euler_axes(form: str) -> tuple[list[int], bool]:
    """(axes in the order of the angles, extrinsic)."""
    order = form.removeprefix("euler_")
    lower = order.lower()
    bad = form == order or len(order) != 3 or set(lower) - set("xyz") or lower[0] == lower[1] or lower[1] == lower[2]
    if bad or (order != lower and order != order.upper()):
        raise DataError(f"rotation form {form!r}", found=form,
                        expected=f"one of {sorted(REPRESENTATIONS)}, or euler_ and three axes: lower case extrinsic (euler_xyz), "
                        "upper case intrinsic (euler_ZYX)", fix="name the form the dataset really uses")  # fmt: skip
    return ["xyz".index(letter) for letter in lower], order == lower


def _from_euler(angles: np.ndarray, form: str) -> np.ndarray:
    axes, extrinsic = _euler_axes(form)
    turns = []
    for index, axis in enumerate(axes):
        turn = np.zeros((*angles.shape[:-1], 4))
        turn[..., axis], turn[..., 3] = np.sin(angles[..., index] / 2), np.cos(angles[..., index] / 2)
        turns.append(turn)
    first, second, third = turns if extrinsic else turns[::-1]
    return _product(third, _product(second, first))


def _to_euler(q: np.ndarray, form: str) -> np.ndarray:
    """Straight from the quaternion: Bernardes and Viollet 2022, "Quaternion to Euler angles conversion" (PLOS ONE 17(11)).

    First and third angle in [-pi, pi], the second in [-pi/2, pi/2], or [0, pi] where the first and last axis are the same.
    In gimbal lock only the sum or the difference of first and third is defined: the third is then 0, as in scipy.
    """
    axes, extrinsic = _euler_axes(form)
    i, j, k = axes if extrinsic else axes[::-1]
    same = i == k
    k = 3 - i - j if same else k
    sign = float((i - j) * (j - k) * (k - i)) / 2
    w = q[..., 3]
    if same:
        a, b, c, d = w, q[..., i], q[..., j], q[..., k] * sign
    else:
        a, b, c, d = w - q[..., j], q[..., i] + q[..., k] * sign, q[..., j] + w, q[..., k] * sign - q[..., i]
    total, difference = np.arctan2(b, a), np.arctan2(d, c)
    middle = 2 * np.arctan2(np.hypot(c, d), np.hypot(a, b))
    low, high = middle < _SMALL, np.pi - middle < _SMALL
    lock = low | high
    early = np.where(lock, np.where(low, 2 * total, -2 * difference), total - difference)  # about axis i
    late = np.where(lock, 0.0, total + difference)  # about axis k
    if not extrinsic:  # the angle that is given up in gimbal lock is the third written one, which turns first
        early = np.where(lock, 0.0, early)
        late = np.where(lock, np.where(low, 2 * total, 2 * difference), late)
    if not same:
        late, middle = late * sign, middle - np.pi / 2
    angles = np.stack([early, middle, late] if extrinsic else [late, middle, early], -1)
    return angles - 2 * np.pi * np.round(angles / (2 * np.pi))


# --- small change -----------------------------------------------------------------------------------------------------


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    ax, ay, az, aw = np.moveaxis(a, -1, 0)
    bx, by, bz, bw = np.moveaxis(b, -1, 0)
    return np.stack([
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
        aw * bw - ax * bx - ay * by - az * bz,
    ], -1)  # fmt: skip


def _checked(x: np.ndarray, expected: int, what: str) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.shape[-1:] != (expected,):
        raise DataError(what, found=f"shape {x.shape}", expected=f"(..., {expected})", fix="check which dimensions hold it")
    if not np.isfinite(x).all():
        at = np.argwhere(~np.isfinite(x))[0].tolist()
        raise DataError(f"{what}, index {at}", found=x[tuple(at)], expected="finite numbers", fix="repair or drop the episode")
    return x
