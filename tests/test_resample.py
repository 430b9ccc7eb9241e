"""Chunks in seconds: what crosses between control rates, and what must not change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.embodiment import Channel, EmbodimentSpec
from vla.resample import native_steps, source_step, to_policy_steps, to_robot_steps


def robot(*conventions: str) -> EmbodimentSpec:
    width = {"eef_quat_xyzw": 4, "eef_euler_xyz": 3, "eef_axis_angle": 3, "eef_rot6d": 6}
    channels = []
    for i, convention in enumerate(conventions):
        names = tuple(f"d{k}" for k in range(width.get(convention, 1)))
        channels.append(Channel(name=f"c{i}", dims=names, convention=convention, unit="1", low=(-9,) * len(names),
                                high=(9,) * len(names)))  # fmt: skip
    return EmbodimentSpec(name="r", cameras={}, state=(), action=tuple(channels), control_hz=10)


RATE, TARGET, COMMAND = robot("eef_delta_position"), robot("joint_position"), robot("gripper_closed_positive")


def test_a_chunk_is_a_length_of_time():
    assert [native_steps(0.8, 8, hz) for hz in (10, 25, 50, 1)] == [8, 20, 40, 1]
    assert native_steps(None, 8, 25) == 8


@settings(max_examples=60)
@given(st.integers(1, 50), st.integers(1, 16), st.integers(0, 2**31))
def test_total_motion_and_range_survive_both_ways(n, steps, seed):
    moves = np.random.default_rng(seed).uniform(-1, 1, (n, 1)).astype(np.float32)
    policy, whole = to_policy_steps(moves, n, steps, RATE)
    assert whole.all() and np.abs(policy).max() <= np.abs(moves).max() + 1e-5
    assert policy.sum() * n / steps == pytest.approx(moves.sum(), abs=1e-3)
    back = to_robot_steps(policy, n, RATE)
    assert back.sum() == pytest.approx(moves.sum(), abs=1e-3) and np.abs(back).max() <= np.abs(moves).max() + 1e-5
    constant = np.full((n, 1), 0.25, np.float32)
    assert np.allclose(to_robot_steps(to_policy_steps(constant, n, steps, RATE)[0], n, RATE), 0.25, atol=1e-5)


def test_the_same_rate_is_left_alone_bit_for_bit():
    actions = np.random.default_rng(0).normal(size=(8, 1)).astype(np.float32)
    for spec in (RATE, TARGET, COMMAND):
        assert to_policy_steps(actions, 8, 8, spec)[0] is actions and to_robot_steps(actions, 8, spec) is actions


def test_targets_are_those_at_the_end_of_a_step_and_commands_are_held():
    ramp = np.arange(1, 21, dtype=np.float32)[:, None]  # 20 steps at 25 Hz -> 8 policy steps of 2.5
    policy, _ = to_policy_steps(ramp, 20, 8, TARGET)
    assert np.allclose(policy[:, 0], np.arange(1, 9) * 2.5)
    back = to_robot_steps(policy, 20, TARGET)
    assert np.allclose(back[3:, 0], ramp[3:, 0], atol=1e-5)
    close = np.array([[0.0]] * 11 + [[1.0]] * 9, np.float32)
    policy, _ = to_policy_steps(close, 20, 8, COMMAND)
    assert policy[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert set(to_robot_steps(policy, 20, COMMAND)[:, 0].tolist()) == {0.0, 1.0}
    assert source_step(20, 8)[[0, 2, 3, 19]].tolist() == [0, 1, 1, 7]


def test_angles_take_the_short_way_and_quaternions_keep_their_length():
    spec = robot("eef_euler_xyz")
    turning = np.zeros((4, 3), np.float32)
    turning[:, 2] = [3.0, 3.1, -3.1, -3.0]  # across the seam at pi
    policy, _ = to_policy_steps(turning, 4, 8, spec)
    assert (np.abs(policy[:, 2]) > 2.9).all()  # never through zero
    turning[:, 2] = [3.30, 3.36, 3.42, 3.48]  # recorded in 0..2 pi: stays there, where its statistics are
    assert np.allclose(to_policy_steps(turning, 4, 2, spec)[0][:, 2], [3.36, 3.48], atol=1e-5)
    assert np.allclose(to_robot_steps(turning[::2], 4, spec)[:, 2], [3.30, 3.30, 3.36, 3.42], atol=1e-5)
    spec = robot("eef_quat_xyzw")
    angle = np.linspace(0, 1, 6)
    q = np.stack([np.sin(angle), 0 * angle, 0 * angle, np.cos(angle)], -1)
    q[3] *= -1  # the same rotation, written the other way
    out, _ = to_policy_steps(q.astype(np.float32), 6, 4, spec)
    assert np.allclose(np.linalg.norm(out, axis=-1), 1, atol=1e-6)
    signs = np.array([[1], [1], [-1], [1]])  # as the nearest recorded one was written
    assert np.allclose(np.arctan2(*(out * signs)[:, [0, 3]].T), (np.arange(1, 5) * 1.5 - 1) / 5, atol=1e-5)


def test_a_hand_that_points_down_does_not_turn_over():
    """Rotation vectors around pi, written on both sides of it, as LIBERO's are."""
    angle = np.array([3.10, 3.12, 3.14, 3.16, 3.18, 3.20, 3.18, 3.16, 3.14, 3.12])
    for beyond in (True, False):  # kept beyond pi, or turned round to the other axis
        along = angle if beyond else np.where(angle > np.pi, angle - 2 * np.pi, angle)
        values = np.zeros((10, 3), np.float32)
        values[:, 0] = along
        policy, _ = to_policy_steps(values, 10, 4, robot("eef_axis_angle"))
        back = to_robot_steps(policy, 10, robot("eef_axis_angle"))
        for out in (policy, back):
            assert (np.abs(out[:, 0]) > 3.05).all() and not out[:, 1:].any()
            assert (np.abs(np.abs(np.mod(out[:, 0], 2 * np.pi) - np.pi)) < 0.07).all()
        if beyond:
            assert np.allclose(policy[:, 0], [3.13, 3.18, 3.17, 3.12], atol=1e-5)
    nonsense = np.zeros((10, 6), np.float32)  # what an untrained policy may say
    assert np.isfinite(to_robot_steps(nonsense[:4], 10, robot("eef_rot6d"))).all()


@pytest.mark.parametrize("spec", [RATE, TARGET, COMMAND])
def test_steps_the_recording_does_not_cover_are_not_valid_and_zero(spec):
    actions = np.ones((20, 1), np.float32)
    actions[6:] = 0  # what lies behind the episode's end
    policy, whole = to_policy_steps(actions, 6, 8, spec)
    assert whole.tolist() == [True, True] + [False] * 6
    assert np.allclose(policy[:2], 1) and not policy[2:].any()
    one, whole = to_policy_steps(actions, 1, 8, spec)  # the last frame of an episode still teaches its one action
    assert whole.tolist() == [True] + [False] * 7 and one[0, 0] == pytest.approx(1)
