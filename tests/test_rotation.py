"""Rotations: every form to every other and back, the same as scipy, one answer for both quaternions of a rotation."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla import rotation
from vla.errors import DataError
from vla.rotation import REPRESENTATIONS, angle_between, canonical, compose, convert, from_quat, inverse, relative, to_quat

ORDERS = ["".join(o) for o in itertools.product("xyz", repeat=3) if o[0] != o[1] and o[1] != o[2]]
EULER = [f"euler_{o}" for o in [*ORDERS, *map(str.upper, ORDERS)]]
FORMS = sorted({*REPRESENTATIONS, *EULER})

numbers = st.floats(-1, 1, allow_subnormal=False)
quaternions = st.tuples(numbers, numbers, numbers, numbers).filter(lambda q: np.linalg.norm(q) > 0.1).map(np.array)
axes = st.tuples(numbers, numbers, numbers).filter(lambda v: np.linalg.norm(v) > 0.1).map(
    lambda v: np.array(v) / np.linalg.norm(v)
)  # fmt: skip
angles = st.one_of(
    st.floats(0, np.pi), st.floats(0, 1e-6), st.floats(0, 1e-9).map(lambda e: np.pi - e), st.sampled_from([0.0, np.pi, np.pi / 2])
)


def many(n: int = 400, seed: int = 0) -> np.ndarray:
    return canonical(np.random.default_rng(seed).normal(size=(n, 4)))


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), list(itertools.product(sorted(REPRESENTATIONS), repeat=2)))
def test_every_pair_of_forms_round_trips(source, target):
    start = from_quat(many(), source)
    there = convert(start, source, target)
    assert there.shape == (400, REPRESENTATIONS[target])
    np.testing.assert_allclose(convert(there, target, source), start, atol=1e-9)


@given(axes, angles, st.sampled_from(FORMS))
def test_any_rotation_survives_any_form(axis, angle, form):
    q = to_quat(axis * angle, "axis_angle")
    assert angle_between(to_quat(from_quat(q, form), form), q) < 2e-7  # gimbal lock is left within 1e-7 rad


@given(quaternions, st.sampled_from(FORMS))
def test_a_quaternion_and_its_negative_are_one_rotation(q, form):
    np.testing.assert_array_equal(from_quat(q, form), from_quat(-q, form))
    np.testing.assert_array_equal(canonical(q), canonical(-q))
    assert canonical(q)[3] >= 0


@given(axes, angles)
def test_antipodes_have_the_same_rotation_vector_near_zero_and_near_pi(axis, angle):
    q = np.concatenate([axis * np.sin(angle / 2), [np.cos(angle / 2)]])
    one, two = from_quat(q, "axis_angle"), from_quat(-q, "axis_angle")
    np.testing.assert_array_equal(one, two)
    assert np.linalg.norm(one) <= np.pi + 1e-12
    np.testing.assert_allclose(np.linalg.norm(one), angle, rtol=1e-12, atol=1e-15)
    if angle < 3:  # at pi the axis may point either way
        np.testing.assert_allclose(one, axis * angle, atol=1e-12)


def test_a_rotation_vector_longer_than_pi_comes_back_as_the_short_way():
    long = np.array([0, 0, 1.5 * np.pi])  # what robosuite writes for a quaternion with w < 0
    np.testing.assert_allclose(convert(long, "axis_angle", "axis_angle"), [0, 0, -0.5 * np.pi], atol=1e-12)


def test_half_a_turn_has_one_quaternion():
    assert canonical(np.array([-1.0, 0, 0, 0])).tolist() == [1, 0, 0, 0]
    assert canonical(np.array([0, -0.6, 0.8, -0.0])).tolist() == pytest.approx([0, 0.6, -0.8, 0])


# --- the two 6D layouts -----------------------------------------------------------------------------------------------


def test_both_6d_layouts_hold_the_first_two_columns_each_its_own_way():
    m = rotation.to_matrix(many(5))
    np.testing.assert_allclose(from_quat(many(5), "rot6d"), np.concatenate([m[:, :, 0], m[:, :, 1]], -1))
    np.testing.assert_allclose(from_quat(many(5), "rot6d_interleaved"), m[:, :, :2].reshape(5, 6))


@given(quaternions)
def test_reading_one_6d_layout_as_the_other_is_another_rotation_or_refused(q):
    right = from_quat(q, "rot6d")
    if angle_between(q, np.array([0, 0, 0, 1.0])) < 1e-3 or np.allclose(right, from_quat(q, "rot6d_interleaved"), atol=1e-3):
        return
    try:
        assert angle_between(to_quat(right, "rot6d_interleaved"), q) > 1e-6
    except DataError:
        pass


def test_6d_of_a_network_is_made_orthonormal():
    rough = from_quat(many(50), "rot6d") * 1.7 + np.random.default_rng(1).normal(0, 0.02, (50, 6))
    m = rotation.to_matrix(to_quat(rough, "rot6d"))
    np.testing.assert_allclose(m @ np.swapaxes(m, -1, -2), np.broadcast_to(np.eye(3), (50, 3, 3)), atol=1e-12)
    assert angle_between(to_quat(rough, "rot6d"), many(50)).max() < 0.1


# --- Euler ------------------------------------------------------------------------------------------------------------


def test_extrinsic_xyz_is_intrinsic_zyx_backwards():
    q = many()
    np.testing.assert_allclose(from_quat(q, "euler_xyz"), from_quat(q, "euler_ZYX")[:, ::-1], atol=1e-12)
    np.testing.assert_allclose(convert([0.1, 0.2, 0.3], "euler_ZYX", "euler_xyz"), [0.3, 0.2, 0.1])  # pyright: ignore


def test_a_known_yaw():
    np.testing.assert_allclose(rotation.rotate(to_quat(np.array([0, 0, np.pi / 2]), "euler_xyz"), np.array([1.0, 0, 0])),
                               [0, 1, 0], atol=1e-12)  # fmt: skip


@pytest.mark.parametrize("form", EULER)
def test_gimbal_lock_keeps_the_rotation_and_zeroes_the_third_angle(form):
    order = form[-3:].lower()
    rng = np.random.default_rng(3)
    for locked in (0.0, np.pi) if order[0] == order[2] else (-np.pi / 2, np.pi / 2):
        given_angles = rng.uniform(-3, 3, (100, 3))
        given_angles[:, 1] = locked
        q = to_quat(given_angles, form)
        back = from_quat(q, form)
        assert np.isfinite(back).all() and (back[:, 2] == 0).all()
        assert angle_between(to_quat(back, form), q).max() < 1e-7


# --- as scipy has it --------------------------------------------------------------------------------------------------


def test_agrees_with_scipy():
    Rotation = pytest.importorskip("scipy.spatial.transform").Rotation
    q, other = many(1000), many(1000, seed=1)
    theirs = Rotation.from_quat(q)
    np.testing.assert_allclose(from_quat(q, "axis_angle"), theirs.as_rotvec(), atol=1e-12)
    np.testing.assert_allclose(rotation.to_matrix(q), theirs.as_matrix(), atol=1e-12)
    np.testing.assert_allclose(rotation.from_matrix(theirs.as_matrix()), theirs.as_quat(canonical=True), atol=1e-12)
    np.testing.assert_allclose(compose(q, other), (theirs * Rotation.from_quat(other)).as_quat(canonical=True), atol=1e-12)
    np.testing.assert_allclose(inverse(q), theirs.inv().as_quat(canonical=True), atol=1e-12)
    np.testing.assert_allclose(angle_between(q, other), (theirs.inv() * Rotation.from_quat(other)).magnitude(), atol=1e-9)


@pytest.mark.parametrize("form", EULER)
def test_euler_agrees_with_scipy(form):
    Rotation = pytest.importorskip("scipy.spatial.transform").Rotation
    q, order = many(), form.removeprefix("euler_")
    difference = from_quat(q, form) - Rotation.from_quat(q).as_euler(order)
    np.testing.assert_allclose(np.abs(np.exp(1j * difference) - 1), 0, atol=1e-6)
    angles_ = np.random.default_rng(5).uniform(-3, 3, (200, 3))
    np.testing.assert_allclose(to_quat(angles_, form), canonical(Rotation.from_euler(order, angles_).as_quat()), atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of gimbal lock
        lock = np.array([0.7, 0.0 if order[0].lower() == order[2].lower() else np.pi / 2, -0.4])
        theirs = Rotation.from_euler(order, lock).as_euler(order)
    difference = from_quat(to_quat(lock, form), form) - theirs
    np.testing.assert_allclose(np.abs(np.exp(1j * difference) - 1), 0, atol=1e-6)


def test_slerp_agrees_with_scipy():
    transform = pytest.importorskip("scipy.spatial.transform")
    key, times, read = many(20), np.cumsum(np.random.default_rng(2).uniform(0.1, 1, 20)), np.linspace(0.2, 9, 300)
    read = np.clip(read, times[0], times[-1])
    theirs = transform.Slerp(times, transform.Rotation.from_quat(key))(read).as_quat()
    assert angle_between(rotation.resample(key, times, read), theirs).max() < 1e-9


# --- relative, composed, along time -----------------------------------------------------------------------------------


@given(quaternions, quaternions)
def test_relative_undoes_compose_in_either_frame(a, b):
    assert angle_between(compose(relative(a, b), a), b) < 1e-7
    assert angle_between(compose(a, relative(a, b, "body")), b) < 1e-7
    assert angle_between(relative(a, a), np.array([0, 0, 0, 1.0])) < 1e-7


def test_relative_frames_differ():
    a, b = many(2)
    assert angle_between(relative(a, b), relative(a, b, "body")) > 0.1
    with pytest.raises(DataError, match="'base' or 'body'"):
        relative(a, b, "world")


@given(st.integers(0, 2**32 - 1))
def test_continuous_takes_the_jumps_out_and_nothing_else(seed):
    rng = np.random.default_rng(seed)
    turns = np.cumsum(rng.normal(0, 0.3, (50, 3)), 0)
    smooth = rotation.continuous(to_quat(turns, "axis_angle"))
    assert (np.sum(smooth[1:] * smooth[:-1], -1) > 0).all()
    flipped = smooth * rng.choice([-1.0, 1.0], (50, 1))
    again = rotation.continuous(flipped)
    np.testing.assert_array_equal(again, smooth * np.sign(flipped[0] @ smooth[0]))
    np.testing.assert_array_equal(canonical(again), canonical(smooth))


@given(quaternions, quaternions, st.floats(0, 1))
def test_slerp_goes_the_short_way_at_constant_speed_whatever_the_signs(a, b, t):
    whole = angle_between(a, b)
    if whole > np.pi - 1e-3:
        return
    middle = rotation.slerp(a, b, t)
    assert abs(angle_between(a, middle) - t * whole) < 1e-7
    assert angle_between(rotation.slerp(-a, b, t), middle) < 1e-7 and angle_between(rotation.slerp(a, -b, t), middle) < 1e-7


def test_resample_holds_its_ends_and_its_nodes():
    q, times = many(4), np.array([0.0, 1.0, 1.5, 3.0])
    np.testing.assert_allclose(rotation.resample(q, times, times), q, atol=1e-9)
    np.testing.assert_allclose(rotation.resample(q, times, np.array([-1.0, 9.0])), q[[0, -1]], atol=1e-9)
    np.testing.assert_allclose(rotation.resample(q[:1], times[:1], np.array([0.0, 5.0])), q[[0, 0]])
    with pytest.raises(DataError, match="times rising"):
        rotation.resample(q, times[::-1], times)


# --- shapes and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", sorted(REPRESENTATIONS))
def test_any_leading_shape(form):
    x = from_quat(many(24), form).reshape(2, 3, 4, -1)
    assert to_quat(x, form).shape == (2, 3, 4, 4)
    assert to_quat(x[0, 0, 0], form).shape == (4,)
    assert from_quat(to_quat(x[:0], form), form).shape == (0, 3, 4, x.shape[-1])


@pytest.mark.parametrize(
    ("form", "value", "message"),
    [
        ("quat_xyzw", [0, 0, 0, 0], "length of about 1"),
        ("quat_xyzw", [0, 0, 1], r"shape \(3,\)"),
        ("axis_angle", [0, np.nan, 0], "finite"),
        ("rot6d", [1, 0, 0, 2, 0, 0], "parallel"),
        ("rot6d", [0, 0, 0, 0, 1, 0], "neither zero"),
        ("matrix", [1, 0, 0, 0, 1, 0, 0, 0, -1], "mirror"),
        ("matrix", [2, 0, 0, 0, 2, 0, 0, 0, 2], "orthonormal"),
        ("euler_xyy", [0, 0, 0], "three axes"),
        ("euler_xYz", [0, 0, 0], "three axes"),
        ("rpy", [0, 0, 0], "three axes"),
    ],
)
def test_what_is_no_rotation_is_refused(form, value, message):
    with pytest.raises(DataError, match=message):
        to_quat(np.array(value, float), form)
