"""Whatever is said, what is sent is finite, inside the limits, and no further from the last command than allowed."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
from edge_folder import edge_spec, look
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serve.guard import Guard
from vla.embodiment import load_embodiment
from vla.errors import UsageError

TABLE = edge_spec().model_dump(mode="json")
TURN = {"unit": "rad", "low": [-4] * 3, "high": [4] * 3}
ARM = {
    "name": "arm", "mode": "pose", "cameras": {}, "control_hz": 10.0,
    "state": [
        {"name": "arm", "dims": ["a", "b"], "convention": "joint_position", "unit": "rad", "low": [-2, -2], "high": [2, 2]},
        {"name": "wrist", "dims": ["x", "y", "z"], "convention": "eef_axis_angle", **TURN},
    ],
    "action": [
        {"name": "arm", "dims": ["a", "b"], "convention": "joint_position", "unit": "rad", "low": [-1, -2], "high": [1, 2]},
        {"name": "turn", "dims": ["x", "y", "z"], "convention": "eef_axis_angle", **TURN},
        {"name": "speed", "dims": ["v"], "convention": "joint_velocity", "unit": "rad/s", "low": [-3], "high": [3]},
        {"name": "grip", "dims": ["g"], "convention": "gripper_open_positive", "unit": "1", "low": [0], "high": [1]},
    ],
}  # fmt: skip
JUMP = {"arm": [0.5, 0.25], "turn": 0.3, "speed": 1.0}


def arm_guard(**kw) -> Guard:
    guard = Guard(ARM, jump=JUMP, repeats=None, **kw)
    guard.saw({"images": {}, "state": np.array([0.2, -0.2, 0, 0, 0.1], np.float32)})
    return guard


def table_guard(**kw) -> Guard:
    guard = Guard(TABLE, **{"repeats": None, **kw})
    assert guard.saw(look()) == ""
    return guard


# --- for all inputs --------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.floats(width=32), st.floats(), st.sampled_from([np.nan, np.inf, -np.inf, 1e38, -3.4e38, 0.0, 1.0, -1.0]), st.floats(-1, 1)
)
strange = st.one_of(
    st.none(), st.text(max_size=3), st.binary(max_size=3), st.lists(st.one_of(numbers, st.text(max_size=1), st.lists(numbers))),
    hnp.arrays(st.sampled_from([np.float64, np.int8, np.bool_, np.complex64, "O"]), hnp.array_shapes(max_dims=3, max_side=8)),
    st.dictionaries(st.text(max_size=1), numbers), st.just(10**400), st.just([10**400] * 7),
)  # fmt: skip
near = st.lists(st.floats(-0.4, 0.4), min_size=7, max_size=7)
actions = st.one_of(st.lists(numbers, min_size=7, max_size=7), near, near, strange)


@settings(max_examples=80)
@given(st.lists(st.tuples(actions, numbers, numbers, st.booleans()), min_size=1, max_size=12), st.booleans())
def test_what_is_sent_is_finite_inside_limits_and_near_the_last(ticks, waived):
    guard = arm_guard(deadline=0.1, most_holds=5, window=6, confidence=0.3, waive=["speed"] if waived else ())
    last = guard._last.copy()
    for action, confidence, late, again in ticks:
        verdict = guard.judge(action, confidence=confidence, late=late)
        sent = verdict.action
        assert sent.dtype == np.float32 and sent.shape == (7,) and np.isfinite(sent).all()
        assert (guard.low <= sent).all() and (sent <= guard.high).all()
        assert verdict.hold == bool(verdict.reason) and verdict.placed
        assert (np.abs(sent[:2] - last[:2]) <= np.array(JUMP["arm"]) + 1e-5).all()
        assert abs(sent[5] - last[5]) <= 1.0 + 1e-5 or sent[5] == 0  # to stop is always allowed
        if verdict.hold:
            np.testing.assert_array_equal(sent[[0, 1, 2, 3, 4, 6]], last[[0, 1, 2, 3, 4, 6]])
            assert sent[5] == 0
        else:
            np.testing.assert_allclose(sent, np.asarray(action, np.float64), atol=1e-2)
        last = sent.copy()
        sent[:] = np.nan  # what is done with a verdict is none of the guard's business
        if again:
            guard.resume()


@given(strange, numbers)
def test_no_observation_and_no_chunk_upsets_it(thing, age):
    guard = Guard(TABLE)
    for observation in (thing, {"images": thing}, {"images": {"front": thing, "wrist": thing}, "state": thing}):
        assert guard.saw(observation, age)
    assert not guard.judge(np.zeros(4)).placed  # nobody knows where the robot is
    guard.saw(look())
    guard.said(thing)
    assert np.isfinite(guard.judge(thing, confidence=thing).action).all()


# --- each reason -----------------------------------------------------------------------------------------------------


def test_a_sound_action_passes_untouched():
    verdict = table_guard(deadline=0.1).judge(np.array([0.1, -0.2, 1.0, -1.0]), confidence=0.9, late=0.01)
    assert not verdict.hold and not verdict.reason and not verdict.needs_help
    np.testing.assert_array_equal(verdict.action, np.array([0.1, -0.2, 1.0, -1.0], np.float32))


@pytest.mark.parametrize(
    ("action", "kw", "reason"),
    [
        ([np.nan, 0, 0, 0], {}, "not finite: eef.dx"),
        ([0, 1.1, 0, 0], {}, "limit: eef.dy = 1.1, -1..1"),
        ([0, 0, 0], {}, r"shape \(3,\)"),
        ("left", {}, "no numbers: str"),
        (None, {}, "no action"),
        ([0, 0, 0, 0], {"late": 0.3}, "deadline: 300.0 ms late, at most 100"),
        ([0, 0, 0, 0], {"late": float("nan")}, "deadline"),
        ([0, 0, 0, 0], {"why": "policy: broken"}, "policy: broken"),
        ([0, 0, 0, 0.6], {}, "jump: gripper.close by 0.6, at most 0.5"),
    ],
)
def test_a_faulty_action_is_held_with_its_reason(action, kw, reason):
    guard = table_guard(deadline=0.1, jump={"gripper": 0.5})
    guard.judge([0.5, 0.5, 0.5, 0.0])
    verdict = guard.judge(action, **kw)
    assert verdict.hold
    assert verdict.action.tolist() == [0, 0, 0, 0]  # displacements stop, the gripper stays
    assert re.search(reason, verdict.reason)


def test_rounding_beyond_a_limit_is_clipped_and_not_held():
    verdict = table_guard().judge([1.0005, -1.0005, 0, 0])
    assert not verdict.hold and verdict.action[:2].tolist() == [1, -1]


def test_targets_stay_where_they_were_and_jumps_are_measured_from_there():
    guard = arm_guard()
    assert guard.judge([0.6, -0.4, 0, 0, 0.3, 0.5, 1]).reason == ""
    held = guard.judge([0.0, -0.4, 0, 0, 0.3, 0.5, 1])
    assert "jump: arm.a by 0.6" in held.reason
    np.testing.assert_allclose(held.action, [0.6, -0.4, 0, 0, 0.3, 0, 1], rtol=1e-6)
    assert "turns by 0.5" in guard.judge([0.6, -0.4, 0, 0, 0.8, 0.5, 1]).reason
    assert "jump: speed.v by 1.5" in guard.judge([0.6, -0.4, 0, 0, 0.3, 1.5, 1]).reason


def test_a_rotation_either_side_of_pi_is_no_jump():
    guard = Guard(ARM, jump=JUMP, start=[0, 0, 0, 0, 3.1, 0, 0])
    guard.saw({"images": {}, "state": np.zeros(5, np.float32)})
    assert not guard.judge([0, 0, 0, 0, -3.1, 0, 0]).hold


def test_before_the_first_action_it_stands_where_the_state_says():
    guard = arm_guard()
    np.testing.assert_allclose(guard.judge(None).action, [0.2, -0.2, 0, 0, 0.1, 0, 0.5], rtol=1e-6)
    assert "jump: arm.a" in arm_guard().judge([0.9, -0.2, 0, 0, 0, 0, 0]).reason


def test_observations_stale_repeated_or_broken():
    guard = table_guard(max_age=0.2, repeats=2)
    assert guard.saw(look(1), 0.3).startswith("stale: an observation of 0.300 s")
    assert guard.judge([0, 0, 0, 0]).hold  # until a better one comes
    assert guard.saw(look(2), 0.1) == "" and not guard.judge([0, 0, 0, 0]).hold
    assert [guard.saw(copy.deepcopy(look(3)))[:8] for _ in range(5)] == ["", "", "", "repeated", "repeated"]
    moved = look(3)
    moved["state"][0] += 1e-3
    assert guard.saw(moved) == ""
    assert "camera 'wrist' missing" in guard.saw(look(4, ("front",)))
    assert "not finite" in guard.saw({**look(4), "state": np.full(4, np.nan, np.float32)})


def test_chunks_too_long_or_of_another_robot():
    guard = table_guard(longest=8)
    assert guard.said(np.zeros((9, 4))) == "overlong: a chunk of 9 steps, at most 8"
    assert guard.judge(np.zeros(4)).hold
    assert "not (n, 4)" in guard.said(np.zeros((8, 7)))
    assert guard.said(np.zeros((8, 4))) == "" and not guard.judge(np.zeros(4)).hold


def test_repeated_holds_ask_for_help_and_hold_until_it_came():
    guard = table_guard(most_holds=3, window=5)
    assert [guard.judge(a).needs_help for a in (None, [0] * 4, None, [0] * 4)] == [""] * 4
    assert guard.judge(None).needs_help == "held 3 times in 5 ticks"
    after = guard.judge([0.5] * 4)
    assert after.hold and after.reason == "waiting for help: held 3 times in 5 ticks"
    guard.resume()
    assert not guard.judge([0.5] * 4).hold


def test_low_confidence_counts_over_a_whole_window_and_nan_is_none():
    guard = table_guard(window=4, confidence=0.5)
    said = [guard.judge([0] * 4, confidence=c).needs_help for c in (0.1, 0.85, np.nan, 0.4, 0.4)]
    assert said[:4] == [""] * 4 and "confidence 0.44" in said[4]


# --- limits are mandatory --------------------------------------------------------------------------------------------


def test_limits_and_jumps_are_mandatory_or_waived_by_name():
    bare = copy.deepcopy(ARM)
    del bare["action"][0]["low"]
    bare["action"][3]["high"] = [float("inf")]
    with pytest.raises(UsageError) as caught:
        Guard(bare, waive=["spede"], jump={"turn": [1, 1, 1], "grap": 1})
    for part in ("'arm' has limits", "'grip' has limits", "waive 'spede'", "no jump for 'arm'", "jump of 'turn'", "jump 'grap'"):
        assert part in caught.value.found
    Guard(bare, waive=["arm", "grip"], jump={"turn": None, "arm": None})


def test_a_robot_whose_state_does_not_tell_where_it_is_needs_a_start():
    blind = {**ARM, "state": []}
    with pytest.raises(UsageError, match="does not tell where 'arm' is"):
        Guard(blind, jump=JUMP)
    assert Guard(blind, jump=JUMP, start=[0] * 7).judge(None).placed


@pytest.mark.parametrize("name", ["tabletop", "metaworld_sawyer", "aloha", "fetch", "robosuite_panda"])
def test_shipped_robots_can_be_guarded(name):
    spec = load_embodiment(name)
    absolute = {c.name: 0.1 for c in spec.action if c.convention in ("joint_position", "eef_position")}
    assert len(Guard(spec.model_dump(mode="json"), jump=absolute).low) == spec.action_dim
