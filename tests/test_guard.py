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

from serve.bounds import Bounds, Unread
from serve.guard import ChunkVerdict, Guard
from serve.robot import Robot
from vla.embodiment import load_embodiment
from vla.errors import UsageError
from vla.rotation import angle_between, to_quat

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


STEPS = 8
QUAT = {"unit": "1", "low": [-1.2] * 4, "high": [1.2] * 4}
SPOT = {"unit": "m", "low": [-0.5] * 3, "high": [0.5] * 3}
POSE = {
    **ARM, "mode": "quat",
    "state": [{"name": "hand", "dims": ["x", "y", "z"], "convention": "eef_position", **SPOT},
              {"name": "turn", "dims": ["x", "y", "z", "w"], "convention": "eef_quat_xyzw", **QUAT}],
    "action": [ARM["action"][3], {"name": "turn", "dims": ["x", "y", "z", "w"], "convention": "eef_quat_xyzw", **QUAT},
               {"name": "hand", "dims": ["x", "y", "z"], "convention": "eef_position", **SPOT}],
}  # fmt: skip
BLIND = {**ARM, "mode": "blind", "state": []}


def shipped(name: str) -> dict:
    return {**load_embodiment(name).model_dump(mode="json"), "cameras": {}}


GUARDED = {
    "tabletop": (shipped("tabletop"), {"gripper": 0.5}),
    "panda": (shipped("robosuite_panda"), {"hand": 0.5, "turn": [0.3, 0.4, 0.5]}),
    "aloha": (shipped("aloha"), {"left_arm": 0.2, "right_arm": [0.1] * 6, "left_gripper": 0.3}),
    "arm": (ARM, JUMP),
    "pose": (POSE, {"turn": 0.3, "hand": 0.05, "grip": 0.5}),
    "blind": (BLIND, JUMP),
}


class Client:
    """A robot that carries out some steps of what it is sent, and trails behind; what a guard may send it is known here too."""

    def __init__(self, name: str, seed: int) -> None:
        embodiment, jump = GUARDED[name]
        start = [0.0] * 7 if name == "blind" else None
        self.guard = Guard(embodiment, jump=jump, repeats=None, most_holds=10**9, window=10**6, longest=STEPS, start=start)
        self.rng = np.random.default_rng(seed)
        bounds, low, high = self.guard._bounds, self.guard.low, self.guard.high
        self.stride = np.where(np.isfinite(bounds.jump), 0.9 * bounds.jump, 0.5 * (high - low))
        self.span = {dims: form for dims, form in ((tuple(range(d.start, d.stop)), f) for d, f in bounds.rotations)}
        for dims in self.span:
            self.stride[list(dims)] = bounds.turn[dims[0]] * (0.1 if len(dims) == 4 else 0.5)
        self.told = [(d, at) for d, at, _ in self.guard._in_state]
        self.posed = [(d, at) for d, at, _ in self.guard._poses]
        self.walks = np.cumsum(self.rng.uniform(-1, 1, (512, STEPS, len(low))) * self.stride, 1)
        self.begin()

    def begin(self) -> None:
        """Another episode, somewhere."""
        guard = self.guard
        guard.reset()
        self.last = (guard._start if guard._start is not None else self.rng.uniform(guard.low, guard.high)).astype(np.float32)
        self.last[guard._motion] = 0
        for dims in self.span:
            self.last[list(dims)] = [0] * (len(dims) - 1) + [len(dims) == 4]
        self.free = ~guard._known & ~np.isin(np.arange(len(self.last)), [d for dims, _ in self.told for d in np.r_[dims]])
        self.rows = np.where(self.free, np.nan, self.last)[None]
        self.executed: int | None = None
        self.silent = 0

    def look(self) -> np.ndarray:
        """The state the guard is shown: where the last command led to, nearly."""
        state = self.rng.uniform(-0.1, 0.1, self.guard.robot.state_dim).astype(np.float32)
        for dims, at in self.told:
            trailing = self.rng.uniform(-1, 1, dims.stop - dims.start) * self.stride[dims]
            state[at] = np.clip(self.last[dims] + trailing, self.guard.low[dims], self.guard.high[dims])
        assert self.guard.saw({"images": {}, "state": state}, executed=self.executed) == ""
        return state

    def sound(self, n: int) -> np.ndarray:
        """A chunk there is nothing wrong with."""
        walk = self.last + self.walks[self.rng.integers(512)][:n]
        for dims in self.span:
            if len(dims) == 4:
                walk[:, dims] /= np.linalg.norm(walk[:, dims], axis=1, keepdims=True)
        return np.clip(walk, self.guard.low, self.guard.high).astype(np.float32)

    def obey(self, sent: np.ndarray, hold: bool) -> None:
        """Carry out some of the steps, and say how many, or not. `rows` are the commands that an onlooker may think of then."""
        says = self.silent == 2 or self.rng.random() < 0.5
        done = len(sent) if hold else int(self.rng.integers(not says, len(sent) + 1))
        self.last = sent[done - 1].copy() if done else self.last
        self.executed, self.silent = (done, 0 if done else self.silent) if says else (None, self.silent + 1)
        self.free &= hold or not done
        if hold or says and done:
            self.rows = np.where(self.free, np.nan, self.last)[None]
        elif not says:
            self.rows = np.concatenate([self.rows, sent])


class Rude:
    """Asked for its numbers, it makes trouble."""

    def __array__(self, *args, **kw):
        raise RuntimeError("no")


def _spoilt(rng: np.random.Generator, chunk: np.ndarray, low: np.ndarray, high: np.ndarray):
    """(what a policy may say instead of `chunk`, whether it has to be held)."""
    n, dims = chunk.shape
    step, dim, kind = rng.integers(n), rng.integers(dims), rng.integers(16)
    wild: np.ndarray = chunk.copy()
    if kind < 5:
        wild[step, dim] = [np.nan, np.inf, -np.inf, 3.4e38, -1e38][kind]
        return wild, True
    if kind == 5:
        wild = wild.astype(np.float64)
        wild[step, dim] = 1e300
        return wild, True
    if kind == 6:
        wild[step, dim] = high[dim] + 0.01 * (high[dim] - low[dim])
        return wild, True
    if kind == 7:  # within the limits, from one end to the other
        return rng.uniform(low, high, (n, dims)).astype(np.float32), None
    if kind == 8:
        return rng.standard_normal((n, dims)) * 10.0 ** rng.integers(-45, 30), None
    if kind == 9:
        return rng.integers(0, 2**32, (n, dims), dtype=np.uint32).view(np.float32), None
    if kind == 10:
        return rng.integers(-1, 2, (n, dims)).astype([np.int8, np.bool_, np.float16, np.int64][rng.integers(4)]), None
    shapes = (wild[0], wild[:, :-1], wild[None], wild[:0], np.repeat(wild, STEPS + 1, 0), np.hstack([wild, wild]))
    strange = (
        None, "left", {}, object(), [[]], wild.tolist()[:-1] + [[1.0]], Rude(), [Rude()], wild.astype(object),
        wild.astype(complex), wild.astype("U8"), np.zeros((n, dims), "M8[s]"), np.zeros((n, dims), [("a", "f4")]), 10**400,
        [10**400] * dims, b"\0" * 28, np.broadcast_to(np.float32(0), (10**9, dims)), Unread("nothing came"),
    )  # fmt: skip
    if kind < 13:
        return shapes[rng.integers(len(shapes))], True
    if kind < 15:
        return strange[rng.integers(len(strange))], True
    return wild.tolist(), False  # sound, as a list


HUNDRED_THOUSAND = {"tabletop": 30_000, "panda": 25_000, "aloha": 20_000, "arm": 10_000, "pose": 10_000, "blind": 5_000}


@pytest.mark.parametrize(("name", "number"), HUNDRED_THOUSAND.items())
def test_a_hundred_thousand_chunks(name, number):
    """Random and adversarial: whatever comes in, what goes out is safe; and what is sound goes out as it came."""
    client = Client(name, seed=number)
    guard, rng = client.guard, client.rng
    low, high, dims = guard.low, guard.high, len(guard.low)
    sent, trails = (np.full((number, rows, dims), np.nan, np.float32) for rows in (STEPS, 4 * STEPS))
    states, lengths = np.zeros((number, dims)), np.zeros(number, int)
    passed, held = 0, 0
    for i in range(number):
        if rng.random() < 0.01:
            client.begin()
        state = client.look()
        n = int(rng.integers(1, STEPS + 1))
        chunk = client.sound(n)
        given, wrong = (chunk, False) if rng.random() < 0.5 else _spoilt(rng, chunk, low, high)
        verdict = guard.chunk(given, confidence=rng.random())
        out = verdict.actions
        assert out.dtype == np.float32 and out.ndim == 2 and out.shape[1] == dims and verdict.placed
        assert verdict.hold == bool(verdict.reason)
        assert wrong is None or verdict.hold == wrong, (i, wrong, verdict.reason, given)
        if wrong is False:
            assert out.tobytes() == chunk.tobytes()
        elif not verdict.hold:
            np.testing.assert_allclose(out, np.asarray(given, np.float64), atol=2e-3 * (high - low).max())
        passed, held = passed + (not verdict.hold), held + verdict.hold
        lengths[i], sent[i, : len(out)], trails[i, : len(client.rows)] = len(out), out, client.rows
        for d, at in client.posed:
            states[i, d] = state[at]
        client.obey(out.copy(), verdict.hold)
        out[:] = np.nan  # what is done with a verdict is none of the guard's business
    assert min(passed, held) > number / 4
    _check_all(client, sent, trails, states, lengths)


def _check_all(client: Client, sent, trails, states, lengths) -> None:
    """Every step of every chunk, by other means than the guard's."""
    guard = client.guard
    jump, real = guard._bounds.jump * (1 + 2e-6), np.arange(STEPS) < lengths[:, None]
    assert np.isfinite(sent[real]).all() and (sent[real] >= guard.low).all() and (sent[real] <= guard.high).all()
    with np.errstate(invalid="ignore"):
        assert not (np.abs(np.diff(sent, axis=1)) > jump).any()
        posed = np.zeros(len(jump), bool)
        for d, _ in client.posed:
            posed[d] = True
        first = sent[:, 0]
        assert not (np.abs(first - np.clip(states, guard.low, guard.high)) > 3 * jump)[:, posed].any()
        # To the step that went before, whichever it was; a velocity also to standing still.
        far = (np.abs(first[:, None] - trails) > jump) & ~posed
        far &= ~(guard._motion & (np.abs(first) <= jump))[:, None]
        for dims, form in client.span.items():
            turn, d = guard._bounds.turn[dims[0]] + 2e-6, list(dims)
            a, b = np.broadcast_arrays(sent[:, :-1, d], sent[:, 1:, d])
            both = real[:, 1:]
            assert (angle_between(to_quat(a[both], form), to_quat(b[both], form)) <= turn).all()
            if posed[d[0]]:
                assert (angle_between(to_quat(first[:, d], form), to_quat(states[:, d], form)) <= 3 * turn).all()
                continue
            known = np.isfinite(trails[..., d]).all(-1)
            many = np.broadcast_to(first[:, None][..., d], trails[..., d].shape)
            angle = np.zeros(known.shape)
            angle[known] = angle_between(to_quat(many[known], form), to_quat(trails[..., d][known], form))
            far[..., d] = (angle > turn)[..., None]
        there = ~np.isnan(trails).all(-1)
        assert (there & ~far.any(-1)).any(1).all()


@settings(max_examples=80)
@given(st.lists(st.tuples(st.one_of(
    strange, st.lists(actions, max_size=4), hnp.arrays(st.sampled_from([np.float32, np.float64, np.int32]), (3, 7)),
    st.lists(near, min_size=1, max_size=5).map(np.array)), numbers, numbers, st.none() | st.integers() | numbers, st.booleans()),
    min_size=1, max_size=8))  # fmt: skip
def test_what_is_sent_is_safe_whatever_is_said_of_lateness_confidence_and_steps(chunks):
    guard = arm_guard(deadline=0.1, most_holds=5, window=6, confidence=0.3, longest=STEPS)
    for chunk, confidence, late, executed, again in chunks:
        seen = guard.saw({"images": {}, "state": np.array([0.2, -0.2, 0, 0, 0.1], np.float32)}, 0.0, executed)
        verdict = guard.chunk(chunk, confidence, late=late)
        sent = verdict.actions
        assert sent.dtype == np.float32 and 1 <= len(sent) <= STEPS and sent.shape[1] == 7 and np.isfinite(sent).all()
        assert (guard.low <= sent).all() and (sent <= guard.high).all()
        assert verdict.hold == bool(verdict.reason) and (verdict.hold or not seen)
        assert (np.abs(sent[0, :2] - [0.2, -0.2]) <= 3 * np.array(JUMP["arm"]) + 1e-5).all()
        assert (np.abs(np.diff(sent[:, :2], axis=0)) <= np.array(JUMP["arm"]) + 1e-5).all()
        if again:
            guard.resume()


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


# --- whole chunks ----------------------------------------------------------------------------------------------------

LOOK = {"images": {}, "state": np.array([0.2, -0.2, 0, 0, 0.1], np.float32)}
REST = np.array([0.2, -0.2, 0, 0, 0.1, 0, 0], np.float32)


def asked(guard: Guard, chunk, state=LOOK["state"], executed=None, **kw) -> ChunkVerdict:
    assert guard.saw({"images": {}, "state": np.array(state, np.float32)}, executed=executed) == ""
    return guard.chunk(chunk, **kw)


def steps(*rows) -> np.ndarray:
    """`REST` with some dimensions changed, a step each."""
    return np.array([[row.get(d, REST[d]) for d in range(7)] for row in rows], np.float32)


def test_a_chunk_passes_whole_or_not_at_all():
    chunk = steps({}, {0: 0.5}, {0: 0.9}, {0: 0.9, 6: 1})
    assert asked(arm_guard(), chunk).actions.tobytes() == chunk.tobytes()
    chunk[2, 0], chunk[3, 3] = 1.5, np.nan
    verdict = asked(arm_guard(), chunk)
    assert verdict.hold and verdict.reason == "limit: step 2, arm.a = 1.5, -1..1; not finite: step 3, turn.y"
    assert verdict.actions.shape == chunk.shape and (np.ptp(verdict.actions, axis=0) == 0).all()
    np.testing.assert_allclose(verdict.actions[0], [0.2, -0.2, 0, 0, 0.1, 0, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{}, {0: 0.8}, {0: 0.8}], "jump: step 1, arm.a by 0.6, at most 0.5"),
        ([{4: 0.3}, {4: 0.7}], "jump: step 1, turn.x ... turns by 0.4 rad, at most 0.3"),
        ([{0: 1, 1: 1}, {1: 1}], "jump: step 0, arm.b by 1.2, at most 0.75; jump: step 1, arm.a by 0.8, at most 0.5"),
        ([{5: 1.5}, {5: 2}], "jump: step 0, speed.v by 1.5, at most 1"),
        ([{d: 9 for d in range(7)}] * 9, "limit: step 0, arm.a = 9, -1..1; limit: step 0, arm.b = 9, -2..2; "
         "limit: step 0, turn.x = 9, -4..4; limit: step 0, turn.y = 9, -4..4, and 61 more"),
        (np.zeros((3, 6)), "chunk: shape (3, 6), not (n, 7)"),
        (np.zeros((0, 7)), "chunk: shape (0, 7), not (n, 7)"),
        (np.zeros((9, 7)), "overlong: a chunk of 9 steps, at most 8"),
        (None, "no action"),
        ("left", "no numbers: str"),
    ],
)  # fmt: skip
def test_a_faulty_chunk_is_held_with_its_reasons(rows, reason):
    dicts = isinstance(rows, list)
    guard = arm_guard(longest=None if dicts else 8)
    verdict = asked(guard, steps(*rows) if dicts else rows)
    assert verdict.hold and verdict.reason == reason
    assert len(verdict.actions) == (len(rows) if dicts else 8)


@pytest.mark.parametrize(("kw", "reason"), [({"late": 0.3}, "deadline: 300.0 ms"), ({"why": "policy: broken"}, "policy: broken")])
def test_what_is_wrong_already_holds_a_chunk(kw, reason):
    assert asked(arm_guard(deadline=0.1), steps({}, {}), **kw).reason.startswith(reason)
    assert Guard(ARM, jump=JUMP).chunk(steps({})).reason == "nothing seen yet"


def test_each_chunk_needs_a_look_of_its_own():
    guard = arm_guard()
    assert not asked(guard, steps({})).hold
    assert guard.chunk(steps({})).reason == "unseen: no observation since the last chunk"
    assert not asked(guard, steps({})).hold
    assert guard.saw(LOOK, age=2.0).startswith("stale") and guard.chunk(steps({})).reason.startswith("stale")


def test_the_first_step_is_measured_from_where_the_robot_is_seen():
    """An arm trails behind its targets, and a client may look after any number of steps."""
    chunk = steps({}, {0: 0.5}, {0: 0.9})
    guard = arm_guard()
    assert not asked(guard, chunk).hold
    assert not asked(guard, chunk, state=[-0.9, -0.2, 0, 0, 0.1]).hold  # 1.1, and 1.5 are allowed
    strict = arm_guard(first_jump=1)
    assert "jump: step 0, arm.a by 1.1, at most 0.5" in asked(strict, chunk, state=[-0.9, -0.2, 0, 0, 0.1]).reason
    assert "turns by 1.1 rad, at most 0.9" in asked(guard, chunk, state=[0.2, -0.2, 0, 0, 1.2]).reason
    with pytest.raises(UsageError, match="first_jump 0.5"):
        arm_guard(first_jump=0.5)


def test_speed_and_gripper_follow_the_last_chunk_wherever_in_it_the_client_is():
    guard = Guard(ARM, jump={**JUMP, "grip": 0.2}, repeats=None)
    ramp = steps(*[{5: v, 6: 0.2 * v} for v in (1, 2, 3)])
    assert not asked(guard, ramp).hold  # of a gripper never told anything nobody knows how far it is
    assert not asked(guard, steps({5: 2.5, 6: 0.4})).hold  # after any of them
    assert not asked(guard, ramp).hold  # after the last, or after standing still
    assert "grip.g by 0.4" in asked(guard, steps({5: 2, 6: 1.0})).reason
    guard.reset()
    assert not asked(guard, ramp).hold
    assert "speed.v by 1.5, at most 1" in asked(guard, steps({5: 2.5, 6: 0.4}), executed=1).reason  # it has said where it is
    assert not asked(guard, steps({5: 1, 6: 0.4})).hold  # the hold stopped it, with the gripper where it was
    assert guard.saw(LOOK, executed=-1) == "executed: no number of steps" == guard.chunk(steps({6: 0.4})).reason


def test_nothing_carried_out_leaves_what_came_before():
    guard = Guard(ARM, jump={**JUMP, "grip": 0.2}, repeats=None)
    asked(guard, steps({6: 1.0}))
    asked(guard, steps({6: 0.8}, {6: 0.6}, {6: 0.4}), executed=1)
    assert not asked(guard, steps({6: 0.9}), executed=0).hold
    assert "grip.g by 0.4" in asked(guard, steps({6: 0.5}), executed=1).reason
    assert asked(guard, None, executed=1).actions[0, 6] == np.float32(0.9)


def test_a_hold_does_not_lower_an_arm_that_sags_nor_lets_go():
    guard = arm_guard()
    asked(guard, steps({6: 0.0}, {6: 0.0}))
    heights = [asked(guard, None, state=[0.2 - 0.01 * i, -0.2, 0, 0, 0.1]).actions[0] for i in range(5)]
    assert {float(h[0]) for h in heights} == {float(np.float32(0.2))} and not any(h[6] for h in heights)
    moved = asked(guard, None, state=[0.2, -1.8, 0, 0, 2.0]).actions[0]  # by hand: nothing pulls it back
    np.testing.assert_allclose(moved[[1, 4]], [-1.8, 2.0], rtol=1e-6)
    gripping = Guard(shipped("aloha"), jump={"left_arm": 0.2, "right_arm": 0.2}, repeats=None)
    state = np.zeros(14, np.float32)
    state[[6, 13]] = 0.4  # what the gripper is closed around
    assert not asked(gripping, np.zeros((4, 14)), state=state).hold
    assert asked(gripping, None, state=state).actions[0].tolist() == [0.0] * 14


def test_a_hold_after_a_known_step_keeps_that_command():
    guard = arm_guard()
    asked(guard, steps({0: 0.3}, {0: 0.4}, {0: 0.5}))
    held = asked(guard, None, state=[0.35, -0.2, 0, 0, 0.1], executed=2).actions[0]
    assert held[0] == np.float32(0.4)
    guard = arm_guard()
    asked(guard, steps({0: 0.3}, {0: 0.4}, {0: 0.5}))
    assert asked(guard, None, state=[0.35, -0.2, 0, 0, 0.1]).actions[0, 0] == np.float32(0.35)  # nobody said: where it is seen


def test_what_was_seen_before_a_chunk_is_not_where_the_robot_is_after_it():
    guard = arm_guard()
    asked(guard, steps({0: 0.6}, {0: 1.0}))
    assert guard.saw(LOOK, age=2.0).startswith("stale")
    assert guard.chunk(None).actions[0, 0] == 1.0  # not back to 0.2


def test_only_the_first_chunk_measures_a_gripper_from_where_it_is_seen():
    guard = Guard(shipped("aloha"), jump={"left_arm": 0.2, "right_arm": 0.2, "left_gripper": 0.3}, repeats=None)
    state, chunk = np.zeros(14, np.float32), np.zeros((1, 14), np.float32)
    state[6], chunk[0, 6] = 0.8, 0.1  # within 3 jumps
    assert not asked(guard, chunk, state=state).hold
    assert not asked(guard, chunk, state=state, executed=0).hold
    chunk[0, 6] = 0.5
    assert "left_gripper.opening by 0.4, at most 0.3" in asked(guard, chunk, state=state, executed=1).reason


def test_chunks_count_as_one_for_help_and_confidence():
    guard = table_guard(most_holds=2, window=4, confidence=0.5)
    said = []
    for frame, chunk in enumerate((np.zeros((4, 4)), None, np.zeros((4, 4)), None)):
        guard.saw(look(frame))
        said.append(guard.chunk(chunk, 0.9).needs_help)
    assert said == ["", "", "", "held 2 times in 4 chunks"]
    guard.resume()
    for frame, sure in enumerate((0.1, np.full((4, 4), np.nan), np.full((4, 4), 0.5), [0.3, 0.5], 0.6)):
        guard.saw(look(frame))
        verdict = guard.chunk(np.zeros((4, 4)), sure)
        assert verdict.hold == (frame == 4)
    assert verdict.needs_help == "confidence 0.40 over 4 chunks, at least 0.5"


def test_rotations_that_are_none_are_neither_believed_nor_sent():
    guard = Guard(POSE, jump=GUARDED["pose"][1], repeats=None)
    assert guard.saw({"images": {}, "state": np.zeros(7, np.float32)}).startswith("observation: turn.x ... is no rotation: [0.0")
    assert not guard.chunk(np.zeros((1, 8))).placed
    there, chunk = [0, 0, 0, 0, 0, 0, 1], np.zeros((2, 8))
    chunk[0, 4] = -1  # the same rotation, written the other way
    assert asked(guard, chunk, there).reason.startswith("no rotation: step 1, turn.x ... = [0.0")
    assert not asked(guard, chunk[:1], there).hold
    with pytest.raises(UsageError, match=r"start is no rotation where turn\.x begins"):
        Guard(POSE, jump=GUARDED["pose"][1], start=[0] * 8)


def test_pictures_as_files_and_a_camera_that_froze_in_a_corner():
    class File:
        data, shape = b"\xff\xd8 a picture", (32, 32, 3)

    guard = table_guard(repeats=1)
    frames = [a_frame(np.random.default_rng(0)) for _ in range(2)]
    seen = [guard.saw({"images": {"front": frames[0], "wrist": File()}, "state": look()["state"]}) for _ in range(3)]
    assert seen[:2] == ["", ""] and seen[2].startswith("repeated")
    for byte in (0, 75_000, 150_527):  # any single byte says that it lives
        frames[1].reshape(-1)[:] = frames[0].reshape(-1)
        frames[1].reshape(-1)[byte] ^= 1
        assert not guard.see({"images": {"front": frames[1], "wrist": File()}, "state": look()["state"]}).again(*guard._sums)
    assert guard.see({"images": {"front": frames[0], "wrist": File()}, "state": look()["state"]}).again(*guard._sums)


@pytest.mark.parametrize("repeats", [0, 1, 2, 3, None])
def test_what_is_told_at_a_glance_is_what_a_whole_look_tells(repeats: int | None):
    """Only as much of a picture is looked at as tells it from the one before. A row of repetitions may seem to begin one too
    early, with a picture that differed where no glance falls, and never one too late."""
    rng = np.random.default_rng(0)
    guard = table_guard(repeats=repeats)
    first = {"images": {camera: a_frame(rng) for camera in ("front", "wrist")}, "state": look()["state"]}
    others = [copy.deepcopy(first) for _ in range(4)]
    others[0]["state"][0] += 1e-6
    for other, byte in zip(others[1:], (0, 75_000, 150_527), strict=True):
        other["images"]["wrist"].reshape(-1)[byte] ^= 1
    seen, alike = [first, *others], [0, 1, 2, 0, 0]
    """What is seen, and what a glance makes of it."""
    last, row, counted, known, glances = None, 0, 0, False, 0
    for _ in range(3000):
        if last is None or rng.random() < 0.5:
            now = int(rng.integers(len(seen)))
        row = row + 1 if now == last else 0
        glances += guard.see(seen[now]).whole is None
        near = last is not None and alike[now] == alike[last]
        counted = counted + 1 if near and (now == last or not known) else 0
        known = near or repeats == 0  # it was looked at whole
        repeated = guard.saw(seen[now]).startswith("repeated")
        assert repeated == (repeats is not None and counted > repeats), (last, now, row)
        assert row <= counted <= row + 1
        last = now
        if rng.random() < 0.01:
            guard.reset()
            last, row, counted, known = None, 0, 0, False
    assert glances == 0 if repeats == 0 else 500 < glances < 1500


def a_frame(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (224, 224, 3), np.uint8)


def test_a_guard_made_again_from_its_json_is_the_same():
    start = [0.5, 0, 0, 0, 1, 0, 0, 0]
    guard = Guard(POSE, jump=GUARDED["pose"][1], waive=["grip"], start=start, longest=4, first_jump=2, deadline=0.1)
    told = guard.to_json()
    again = Guard(told["robot"], **told["options"])
    assert again.to_json() == told and again.robot.key == "arm/quat" and again.robot.action == guard.robot.action


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


def test_what_passes_at_first_sight_would_have_passed_a_second(monkeypatch: pytest.MonkeyPatch):
    """Of few numbers the guard looks at the ends only; whatever it lets through so is what numpy lets through."""
    plain = Robot.from_json(ARM | {"action": [channel for channel in ARM["action"] if channel["name"] != "turn"]}, "arm")
    bounds, rng, passed = Bounds(plain, {"arm": [0.5, 0.25], "speed": 1.0}), np.random.default_rng(3), 0
    sights = list[bool]()
    low, high, seen = bounds.low.astype(np.float64), bounds.high.astype(np.float64), bounds._nothing_wrong
    monkeypatch.setattr(bounds, "_nothing_wrong", lambda *given: sights.append(seen(*given)) or sights[-1])
    for _ in range(5000):
        middle = rng.uniform(low, high)
        chunk = middle + rng.normal(0, rng.choice([0.001, 0.05, 0.5]), (int(rng.integers(1, 9)), len(middle)))
        chunk = np.clip(chunk, low, high).astype(np.float32) if rng.random() < 0.7 else chunk.astype(np.float32)
        if rng.random() < 0.2:
            chunk[rng.integers(len(chunk)), rng.integers(len(middle))] = rng.choice([np.nan, np.inf, -np.inf, 3e38, -0.0])
        before = np.where(rng.random(len(middle)) < 0.2, np.nan, middle + rng.normal(0, 0.02, len(middle)))
        one, faults = bounds.judge(chunk, before)
        with monkeypatch.context() as patched:
            patched.setattr("serve.bounds._FEW", 0)
            two, others = bounds.judge(chunk, before)
        assert faults == others and np.array_equal(one, two, equal_nan=True)
        passed += not faults
    assert passed < 4000 and 1000 < sum(sights) <= passed and len(sights) == 5000, (passed, sum(sights))
