"""Cards: every conversion against a calculation of its own, every mistake in a card said at once with its line."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_tools.sources import RawEpisode, SourceInfo
from data_tools.standardise import Card, card_for, fit, load_card, standardise
from vla import rotation
from vla.embodiment import Channel
from vla.errors import DataError, UsageError
from vla.schema import Episode

T = 7
RNG = np.random.default_rng(0)


def channel(name: str, convention: str, unit: str, width: int, frame: str = "-", low: float = -9, high: float = 9) -> dict:
    return {"name": name, "dims": [f"d{i}" for i in range(width)], "convention": convention, "unit": unit, "frame": frame,
            "low": [low] * width, "high": [high] * width}  # fmt: skip


def make_card(action: list[tuple[dict, dict]], state: list[tuple[dict, dict]] = (), **more: Any) -> Card:  # pyright: ignore
    """A card from pairs of (the robot's channel, the entry that fills it)."""
    robot = {"name": "arm", "control_hz": 10, "cameras": {}, "state": [c for c, _ in state], "action": [c for c, _ in action]}
    parts = {part: [{"channel": c["name"]} | e for c, e in pairs] for part, pairs in (("state", state), ("action", action))}
    return Card.model_validate({"name": "made-up", "embodiment": robot} | parts | more)


def run(card: Card, fields: dict[str, np.ndarray], images: dict[str, np.ndarray] | None = None, *, fps: float | None = None,
        instruction: str = "do it", info: dict | None = None, attributes: dict | None = None) -> Episode:  # fmt: skip
    images = images or {}
    described = SourceInfo(fps, {p: (str(a.dtype), a.shape[1:]) for p, a in fields.items()},
                           {p: (a.shape[1], a.shape[2]) for p, a in images.items()}, info or {})  # fmt: skip
    raw = RawEpisode(fields, images, instruction, "file.h5 demo_0", "demo_0", attributes or {})
    return standardise(raw, card, described)


def convert(entry: dict, target: dict, **fields: np.ndarray) -> np.ndarray:
    """The action of a card with this one channel, `a` being its field unless it says otherwise."""
    return run(make_card([(target, {"field": "a"} | entry)]), fields).action


def close(a: np.ndarray, b: Any, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(a, b, atol=atol)


# --- numbers whose meaning is right already ---------------------------------------------------------------------------


@given(st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=9))
def test_what_needs_no_conversion_passes_to_the_bit(values):
    a = np.array(values, np.float32)[:, None].repeat(4, 1)
    for convention, unit in (("scalar", "N"), ("eef_quat_xyzw", "1"), ("joint_position", "rad")):
        target = channel("x", convention, unit, 4)
        entry = {"from": {"convention": target["convention"], "unit": target["unit"], "frame": target["frame"]}}
        np.testing.assert_array_equal(convert(entry, target, a=a), a)


# --- units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convention", "found", "wanted", "factor"),
    [
        ("joint_position", "deg", "rad", np.pi / 180), ("joint_position", "rad", "deg", 180 / np.pi),
        ("eef_position", "mm", "m", 1e-3), ("eef_position", "cm", "mm", 10), ("eef_position", "0.02 m", "m", 0.02),
        ("eef_delta_position", "m/s", "m/step", 0.1), ("eef_delta_position", "mm/step", "0.05 m/step", 0.02),
        ("eef_delta_position", "0.05 m/step", "m/step", 0.05), ("joint_velocity", "deg/s", "rad/s", np.pi / 180),
        ("eef_delta_axis_angle", "0.5 rad/step", "rad/step", 0.5), ("eef_euler_xyz", "deg", "rad", np.pi / 180),
        ("scalar", "%", "1", 0.01), ("gripper_open_positive", "mm", "m", 1e-3),
    ],
)  # fmt: skip
def test_units(convention, found, wanted, factor):
    a = RNG.uniform(-0.5, 0.5, (T, 3))
    meaning = {"convention": convention, "unit": found}
    close(convert({"from": meaning}, channel("x", convention, wanted, 3), a=a), a * factor)


# --- rotations --------------------------------------------------------------------------------------------------------

FORMS = {"eef_euler_xyz": "euler_xyz", "eef_euler_zyx": "euler_ZYX", "eef_quat_xyzw": "quat_xyzw", "eef_quat_wxyz": "quat_wxyz",
         "eef_axis_angle": "axis_angle", "eef_rot6d": "rot6d"}  # fmt: skip
RAW = ["euler_XYZ", "euler_zyx", "rot6d_interleaved", "matrix", "quat_wxyz"]


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", [*FORMS, *RAW])
def test_rotation_forms(source, target):
    q = rotation.canonical(RNG.normal(size=(T, 4)))
    form: str = FORMS[source] if source in FORMS else source
    meaning = {"convention": source} if source in FORMS else {"convention": "eef_rotation", "rotation": source}
    a = rotation.from_quat(q, form)
    scale = np.pi / 180 if form.startswith("euler") or form == "axis_angle" else 1
    unit = {"unit": "deg" if scale != 1 else "1", "frame": "base"}
    wanted = channel("x", target, "rad", rotation.width(FORMS[target]), "base")
    close(convert({"from": meaning | unit}, wanted, a=a / scale), rotation.from_quat(q, FORMS[target]), 2e-6)


def test_the_layout_of_6d_is_what_the_card_says_not_what_fits():
    a = rotation.from_quat(rotation.canonical(RNG.normal(size=(T, 4))), "rot6d_interleaved")
    wanted = channel("x", "eef_rot6d", "1", 6, "base")
    meaning = {"convention": "eef_rotation", "rotation": "rot6d_interleaved", "unit": "1", "frame": "base"}
    right = convert({"from": meaning}, wanted, a=a)
    close(right, a[:, [0, 2, 4, 1, 3, 5]])
    wrong = convert({"from": {"convention": "eef_rot6d", "unit": "1", "frame": "base"}}, wanted, a=a)
    assert np.abs(right - wrong).max() > 0.1


def test_signs_of_quaternions_and_long_rotation_vectors():
    turns = np.linspace(0, 1.9 * np.pi, T)[:, None] * [0.6, 0.0, 0.8]  # past pi, where w changes its sign
    q = rotation.to_quat(turns, "axis_angle") * RNG.choice([-1.0, 1.0], (T, 1))
    wanted = channel("x", "eef_quat_xyzw", "1", 4, "base")
    entry = {"from": {"convention": "eef_quat_xyzw", "unit": "1", "frame": "base"}}
    close(convert(entry, wanted, a=q), q)
    assert (convert(entry | {"sign": "canonical"}, wanted, a=q)[:, 3] >= 0).all()
    smooth = convert(entry | {"sign": "continuous"}, wanted, a=q)
    assert (np.sum(smooth[1:] * smooth[:-1], -1) > 0).all()
    long = np.array([[0, 0, 1.5 * np.pi]])
    entry, wanted = {"from": {"convention": "eef_axis_angle", "unit": "rad"}}, channel("x", "eef_axis_angle", "rad", 3)
    close(convert(entry, wanted, a=long), long)
    close(convert(entry | {"sign": "canonical"}, wanted, a=long), [[0, 0, -0.5 * np.pi]])


# --- grippers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convention", "opened", "closed", "values", "expected"),
    [
        ("gripper_closed_positive", -1, 1, [-1, 1, 0], [1, 0, 0.5]),  # robosuite, LIBERO
        ("gripper_open_positive", 255, 0, [255, 0, 51], [1, 0, 0.2]),  # Robotiq the other way
        ("gripper_closed_positive", 0, 255, [0, 255, 51], [1, 0, 0.8]),
        ("gripper_open_positive", 0.08, 0, [0.08, 0, 0.02], [1, 0, 0.25]),  # width in m
        ("gripper_open_positive", 1, 0, [1, 0, 0.3], [1, 0, 0.3]),  # Open X
    ],
)
def test_gripper_ranges_and_senses(convention, opened, closed, values, expected):
    a = np.array(values, float)[:, None]
    entry = {"from": {"convention": convention, "open": opened, "closed": closed}}
    close(convert(entry, channel("g", "gripper_open_positive", "1", 1, low=0, high=1), a=a)[:, 0], expected)
    other = convert(entry, channel("g", "gripper_closed_positive", "1", 1, low=-1, high=1), a=a)[:, 0]
    close(other, 1 - 2 * np.array(expected))
    spanned = convert(entry | {"to": {"open": 0.5, "closed": 0.1}}, channel("g", "gripper_open_positive", "1", 1, low=-1), a=a)
    close(spanned[:, 0], 0.1 + 0.4 * np.array(expected))


def held(moves: list[float]) -> list[float]:
    """The commanded state, step by step: 1 open, 0 closed; +1 closes, -1 opens."""
    moved = [m for m in moves if abs(m) > 0.1]
    state, out = (1.0 if not moved else float(moved[0] > 0)), []
    for m in moves:
        state = state if abs(m) <= 0.1 else float(m < 0)
        out.append(state)
    return out


@given(st.lists(st.sampled_from([-1.0, -0.05, 0.0, 0.08, 1.0]), min_size=1, max_size=12))
def test_a_relative_gripper_becomes_a_command_that_holds(moves):
    entry = {"gripper": {"relative": 0.1}, "from": {"convention": "gripper_closed_positive", "open": -1, "closed": 1}}
    got = convert(entry, channel("g", "gripper_open_positive", "1", 1, low=0, high=1), a=np.array(moves)[:, None])
    assert got[:, 0].tolist() == held(moves)


def decided(values: list[float]) -> list[float]:
    """From the end: 1 above 0.95, 0 below 0.05, else what comes next, at the very end the nearer."""
    out, upcoming = [], None
    for v in reversed(values):
        upcoming = 1.0 if v >= 0.95 else 0.0 if v <= 0.05 else upcoming
        out.append(float(v > 0.5) if upcoming is None else upcoming)
    return out[::-1]


@given(st.lists(st.sampled_from([0.0, 0.04, 0.3, 0.6, 0.97, 1.0]), min_size=1, max_size=12))
def test_a_binarised_gripper_takes_what_it_reaches_next(values):
    entry = {"gripper": {"binarise": [0.05, 0.95]}, "from": {"convention": "gripper_open_positive", "open": 1, "closed": 0}}
    got = convert(entry, channel("g", "gripper_open_positive", "1", 1, low=0, high=1), a=np.array(values)[:, None])
    assert got[:, 0].tolist() == decided(values)


def test_a_gripper_is_clipped_only_when_asked():
    a = np.array([[-1.0], [0], [1], [2]])
    entry: dict = {"from": {"convention": "gripper_closed_positive", "open": 0, "closed": 1}}
    wanted = channel("g", "gripper_open_positive", "1", 1, low=0, high=1)
    assert convert(entry, wanted, a=a)[:, 0].tolist() == [2, 1, 0, -1]
    assert convert(entry | {"gripper": {"clip": True}}, wanted, a=a)[:, 0].tolist() == [1, 1, 0, 0]


# --- absolute and delta -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["position", "joint"])
def test_absolute_to_delta_and_back(family):
    names = ("eef_position", "eef_delta_position") if family == "position" else ("joint_position", "joint_delta")
    length = "m" if family == "position" else "rad"
    target, now = RNG.normal(size=(T, 3)), RNG.normal(size=(T, 3))
    seen = {"field": "s", "from": {"convention": names[0], "unit": f"0.001 {length}"}}
    entry = {"from": {"convention": names[0], "unit": length}, "relative_to": seen}
    delta = convert(entry, channel("x", names[1], f"0.05 {length}/step", 3), a=target, s=now * 1000)
    close(delta, (target - now) / 0.05, 1e-5)
    entry = {"from": {"convention": names[1], "unit": f"0.05 {length}/step"}, "relative_to": seen}
    close(convert(entry, channel("x", names[0], length, 3), a=delta, s=now * 1000), target, 1e-5)


@pytest.mark.parametrize("frame", ["base", "eef"])
def test_absolute_rotation_to_delta_and_back(frame):
    target, now = (rotation.canonical(RNG.normal(size=(T, 4))) for _ in range(2))
    seen = {"field": "s", "from": {"convention": "eef_quat_wxyz", "unit": "1", "frame": "base"}}
    entry = {"from": {"convention": "eef_quat_xyzw", "unit": "1", "frame": "base"}, "relative_to": seen}
    fields = {"s": np.roll(now, 1, -1)}
    delta = convert(entry, channel("x", "eef_delta_axis_angle", "rad/step", 3, frame), a=target, **fields)
    turned = rotation.relative(now, target, "base" if frame == "base" else "body")
    close(delta, rotation.from_quat(turned, "axis_angle"), 2e-6)
    entry = {"from": {"convention": "eef_delta_axis_angle", "unit": "rad/step", "frame": frame}, "relative_to": seen}
    back = convert(entry, channel("x", "eef_quat_xyzw", "1", 4, "base"), a=delta, **fields)
    close(rotation.angle_between(back, target), 0, 1e-5)


def test_achieved_actions_are_the_step_to_the_next_observation_and_the_last_goes():
    pose, euler = RNG.normal(size=(T, 3)), np.array([[3.1, 0, 0], [-3.1, 0.1, 0], [-3.0, 0.2, 0.1]]).repeat([3, 2, 2], 0)
    gripper = np.arange(T, dtype=float)[:, None]
    card = make_card([
        (channel("p", "eef_delta_position", "m/step", 3, "base"), {"field": "s", "dims": "0:3", "achieved": "subtract",
         "from": {"convention": "eef_position", "unit": "m", "frame": "base"}}),
        (channel("r", "eef_delta_euler_xyz", "rad/step", 3, "base"), {"field": "s", "dims": "3:6", "achieved": "subtract",
         "from": {"convention": "eef_euler_xyz", "unit": "rad", "frame": "base"}}),
        (channel("c", "eef_delta_axis_angle", "rad/step", 3, "base"), {"field": "s", "dims": "3:6", "achieved": "compose",
         "from": {"convention": "eef_euler_xyz", "unit": "rad", "frame": "base"}}),
        (channel("g", "scalar", "1", 1), {"field": "a"}),
    ], state=[(channel("p", "scalar", "m", 3), {"field": "s", "dims": "0:3"})], cameras={"front": {"field": "i"}})  # fmt: skip
    image = RNG.integers(0, 256, (T, 4, 4, 3), dtype=np.uint8)
    got = run(card, {"s": np.concatenate([pose, euler], 1), "a": gripper}, {"i": image})
    assert len(got) == T - 1 and len(got.images["front"]) == T - 1
    close(got.action[:, :3], np.diff(pose, axis=0))
    step = np.diff(euler, axis=0)
    step[2, 0] = -6.2 + 2 * np.pi  # across pi: the short way
    close(got.action[:, 3:6], step)
    q = rotation.to_quat(euler, "euler_xyz")
    close(got.action[:, 6:9], rotation.from_quat(rotation.relative(q[:-1], q[1:]), "axis_angle"))
    close(got.action[:, 9], np.arange(T - 1))
    close(got.state, pose[:-1])
    np.testing.assert_array_equal(got.images["front"], image[:-1])


def test_an_achieved_turn_about_the_hands_own_axes():
    q = rotation.canonical(RNG.normal(size=(T, 4)))
    entry = {"achieved": "compose", "from": {"convention": "eef_quat_xyzw", "unit": "1", "frame": "base"}}
    for frame, kind in (("eef", "body"), ("base", "base")):
        got = convert(entry, channel("x", "eef_delta_axis_angle", "rad/step", 3, frame), a=q)
        close(got, rotation.from_quat(rotation.relative(q[:-1], q[1:], kind), "axis_angle"), 2e-6)


# --- frames -----------------------------------------------------------------------------------------------------------


def test_offsets_between_frames():
    quarter = {"rotation": [0, 0, np.pi / 2], "form": "axis_angle", "translation": [1, 2, 3]}
    p, q = RNG.normal(size=(T, 3)), rotation.canonical(RNG.normal(size=(T, 4)))
    turned = np.stack([-p[:, 1], p[:, 0], p[:, 2]], -1)
    at = {"from": {"convention": "eef_position", "unit": "m", "frame": "world"}, "offset": quarter}
    close(convert(at, channel("x", "eef_position", "m", 3, "base"), a=p), turned + [1, 2, 3])
    by = {"from": {"convention": "eef_delta_position", "unit": "m/step", "frame": "world"}, "offset": quarter}
    close(convert(by, channel("x", "eef_delta_position", "m/step", 3, "base"), a=p), turned)
    turn = rotation.to_quat(np.array([0, 0, np.pi / 2]), "axis_angle")
    tool = rotation.to_quat(np.array([np.pi / 2, 0, 0]), "axis_angle")
    at = {"from": {"convention": "eef_quat_xyzw", "unit": "1", "frame": "world"}, "offset": quarter | {"tool": [np.pi / 2, 0, 0]}}
    got = convert(at, channel("x", "eef_quat_xyzw", "1", 4, "base"), a=q)
    close(rotation.angle_between(got, rotation.compose(rotation.compose(turn, q), tool)), 0, 1e-5)
    by = {"from": {"convention": "eef_delta_axis_angle", "unit": "rad/step", "frame": "world"}, "offset": quarter}
    small = p / np.linalg.norm(p, axis=1, keepdims=True)
    close(convert(by, channel("x", "eef_delta_axis_angle", "rad/step", 3, "base"), a=small),
          np.stack([-small[:, 1], small[:, 0], small[:, 2]], -1))  # fmt: skip


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "last"), [(0, 0), (2, 0), (1, 2)])
@pytest.mark.parametrize("pairing", ["observation_before_action", "observation_after_action", "as_source"])
def test_state_and_pictures_are_what_was_seen_before_the_action(pairing, first, last):
    # Row t was seen after action t: before action t lies row t - 1. Numbers name their row.
    rows = np.arange(T, dtype=np.float32)[:, None]
    image = np.broadcast_to(np.arange(T, dtype=np.uint8)[:, None, None, None], (T, 2, 2, 3))
    card = make_card([(channel("a", "scalar", "1", 1), {"field": "a"})], [(channel("s", "scalar", "1", 1), {"field": "s"})],
                     pairing=pairing, cameras={"front": {"field": "i"}}, skip_steps={"first": first, "last": last})  # fmt: skip
    info = {"pairing": "observation_after_action"} if pairing == "as_source" else {}
    got = run(card, {"a": rows, "s": rows}, {"i": image}, info=info)
    shift = 0 if pairing == "observation_before_action" else 1
    expected = list(range(first + shift, T - last))
    assert got.action[:, 0].tolist() == expected
    assert got.state[:, 0].tolist() == got.images["front"][:, 0, 0, 0].tolist() == [t - shift for t in expected]


def test_what_a_command_is_relative_to_was_seen_before_it():
    a, s = np.arange(T, dtype=float)[:, None], 100.0 * np.arange(T)[:, None]
    entry = {"field": "a", "from": {"convention": "joint_position", "unit": "rad"},
             "relative_to": {"field": "s", "from": {"convention": "joint_position", "unit": "rad"}}}  # fmt: skip
    card = make_card([(channel("j", "joint_delta", "rad/step", 1), entry)], pairing="observation_after_action")
    assert run(card, {"a": a, "s": s}).action[:, 0].tolist() == [t - 100.0 * (t - 1) for t in range(1, T)]


def test_an_episode_too_short_to_pair_is_refused():
    target = [(channel("a", "scalar", "1", 1), {"field": "a"})]
    card = make_card(target, pairing="observation_after_action", skip_steps={"first": 6})
    with pytest.raises(DataError, match="7 steps, of which the card leaves 0"):
        run(card, {"a": np.zeros((T, 1))})


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_are_turned_and_resized_as_the_card_says():
    image = RNG.integers(0, 256, (T, 8, 6, 3), dtype=np.uint8)
    flips = {"none": image, "vertical": image[:, ::-1], "rotate180": image[:, ::-1, ::-1], "as_source": image[:, ::-1]}
    cameras: dict = {name: {"field": "i", "flip": name} for name in flips} | {"bgr": {"field": "i", "channels": "bgr"}}
    cameras |= {"small": {"field": "i", "resize": [4, 3]}, "gone": {"field": "nowhere", "optional": True}}
    card = make_card([(channel("a", "scalar", "1", 1), {"field": "a"})], cameras=cameras)
    got = run(card, {"a": np.zeros((T, 1))}, {"i": image}, info={"image_orientation": "bottom_up"})
    for name, expected in (flips | {"bgr": image[..., ::-1]}).items():
        np.testing.assert_array_equal(got.images[name], expected)
    assert got.images["small"].shape == (T, 4, 3, 3) and "gone" not in got.images
    assert abs(float(got.images["small"].mean()) - float(image.mean())) < 3
    upright = run(card, {"a": np.zeros((T, 1))}, {"i": image}, info={"image_orientation": "upright"})
    np.testing.assert_array_equal(upright.images["as_source"], image)


# --- success ----------------------------------------------------------------------------------------------------------


def test_success_is_what_the_source_says_of_it():
    """HDF5 in an attribute, LeRobot in a column, RLDS in the metadata of the episode; demonstrations say nothing."""
    card = make_card([(channel("a", "scalar", "1", 1), {"field": "a"})])

    def succeeds(flags: list[bool] | None = None, **attributes: Any) -> bool:
        column = {} if flags is None else {"next.success": np.array(flags + [False] * (T - len(flags)))}
        return run(card, {"a": np.zeros((T, 1)), **column}, attributes=attributes).success

    assert succeeds() and succeeds([False, True]) and succeeds([False], success=True)
    assert not succeeds([False]) and not succeeds([True], success=np.bool_(False))
    assert not succeeds(episode={"episode_metadata/success": False}) and succeeds(episode={"episode_metadata/success": True})
    assert succeeds(episode={"episode_metadata/success": "no flag"}) and succeeds(episode={})


def test_a_card_for_another_robot_forgets_the_first():
    card = make_card([(channel("a", "scalar", "1", 1), {"field": "a"})])
    info = SourceInfo(None, {"a": ("float64", (1,))}, {}, {})
    fitted = fit(card, info)
    assert fitted.fitted and not card.fitted and fitted.robot is not None
    other = fitted.with_robot(fitted.robot.model_copy(update={"name": "leg"}))
    assert (other.spec.name, other.fitted) == ("leg", False) and fitted.spec.name == "arm"


# --- words ------------------------------------------------------------------------------------------------------------


def test_where_the_words_come_from():
    points = np.zeros((T, 16), np.int32)
    points[:, :8] = [ord(c) for c in "push \u00e9\u4e2d!"[:8]]
    fields = {"a": np.zeros((T, 1)), "code": points}
    target = [(channel("a", "scalar", "1", 1), {"field": "a"})]

    def said(rule: dict, **more: Any) -> str:
        return run(make_card(target, instruction=rule), fields, **more).instruction

    assert said({}) == "do it"
    assert said({"field": "code"}) == "push \u00e9\u4e2d!"
    assert said({"field": ["first", "second"]}, attributes={"texts": {"first": "", "second": ["", "take it"]}}) == "take it"
    assert said({"attribute": "env.words"}, info={"env": {"words": b"from file"}}) == "from file"
    assert said({"field": "nothing", "text": "always this"}) == "always this"
    fields["code"] = points - 900
    with pytest.raises(DataError, match="file.h5 demo_0, instruction(.|\n)*no Unicode code points"):
        said({"field": "code"})
    with pytest.raises(DataError, match="no words in field 'nothing'") as error:
        said({"field": "nothing"}, instruction="")
    assert "instruction: {text: ...}" in error.value.fix


# --- mistakes ---------------------------------------------------------------------------------------------------------

SCALAR = channel("x", "scalar", "1", 1)
POSE = channel("x", "eef_position", "m", 3, "base")
STEP = channel("x", "eef_delta_position", "m/step", 3, "base")
TURN = channel("x", "eef_quat_xyzw", "1", 4, "base")
TURNED = channel("x", "eef_delta_euler_xyz", "rad/step", 3, "base")
GRIP = channel("x", "gripper_open_positive", "1", 1, low=0, high=1)
META = {"convention": "eef_position", "unit": "m", "frame": "base"}
QUAT = {"convention": "eef_quat_xyzw", "unit": "1", "frame": "base"}
HAND = {"convention": "gripper_open_positive", "open": 1, "closed": 0}
SEEN = {"field": "three", "from": META}
JOINT = channel("x", "joint_position", "rad", 1)


@pytest.mark.parametrize(
    ("target", "entry", "message"),
    [
        (POSE, {"field": "three"}, "convention 'scalar'"),  # never guesses
        (SCALAR, {"from": {"convention": "joint_position", "unit": "rad"}}, "convention 'joint_position'"),
        (POSE, {"field": "three", "from": META | {"unit": "rad"}}, "'rad' cannot become 'm'"),
        (POSE, {"field": "three", "from": META | {"unit": "furlong"}}, "'furlong' cannot be converted"),
        (POSE, {"field": "three", "from": META | {"frame": "world"}}, "frame 'world'"),
        (STEP, {"field": "three", "from": META}, "`relative_to` / `achieved`"),
        (STEP, {"field": "three", "from": META, "achieved": "compose", "relative_to": SEEN}, "one of the two"),
        (POSE, {"field": "three", "from": META, "relative_to": SEEN}, "or the other way"),
        (POSE, {"field": "three", "from": META, "achieved": "compose"}, "absolute numbers into a delta"),
        (STEP, {"field": "three", "from": META, "relative_to": SEEN | {"from": QUAT}}, "an absolute position"),
        (STEP, {"field": "three", "from": META, "relative_to": SEEN | {"from": META | {"unit": "deg"}}}, "same kind"),
        (STEP, {"field": "three", "from": META, "relative_to": SEEN | {"from": META | {"frame": "world"}}}, "the other pose"),
        (STEP | {"frame": "eef"}, {"field": "three", "from": META, "achieved": "compose"}, "a frame that moves"),
        (STEP, {"field": "three", "from": META | {"unit": "deg"}, "achieved": "compose"}, "cannot become"),
        (TURNED, {"field": "four", "from": QUAT, "achieved": "subtract"}, "one Euler form on both sides"),
        (POSE, {"field": "three", "from": META, "sign": "canonical"}, "sign: 'canonical' on a position"),
        (POSE, {"field": "three", "from": META, "gripper": {"clip": True}}, "a gripper channel"),
        (POSE, {"field": "three", "from": META, "offset": {"tool": [0, 0, 0, 1]}}, "an absolute orientation to turn"),
        (JOINT, {"from": {"convention": "joint_position", "unit": "rad"}, "offset": {}}, "of the hand"),
        (GRIP, {"from": {"convention": "gripper_closed_positive", "unit": "1"}}, "without its range"),
        (GRIP, {"from": {"convention": "gripper_open_positive", "unit": "m"}}, "cannot become '1'"),
        (GRIP, {"from": HAND | {"open": 0, "closed": 1}}, "open above closed"),
        (GRIP, {"from": HAND, "to": {"open": 0, "closed": 1}}, "to: open 0.0, closed 1.0"),
        (GRIP, {"from": HAND, "gripper": {"relative": 0.1}}, "one of them above 0"),
        (GRIP, {"from": HAND, "achieved": "compose"}, "on a gripper"),
        (TURN, {"field": "three", "from": QUAT}, "3 of the numbers of 'three'"),
        (SCALAR, {"field": "three"}, "1: \\['d0'\\] of 'x'"),
        (SCALAR, {"field": "a", "dims": "0:2"}, "0:2 of 1"),
        (SCALAR, {"field": "a", "dims": [3]}, "positions below 1"),
        (SCALAR, {"field": "thee"}, "'three'"),
        (SCALAR, {"field": "words"}, "holds <U4"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_out_is_refused_beforehand(target, entry, message):
    fields = {"a": np.zeros((T, 1)), "three": np.ones((T, 3)), "four": np.ones((T, 4)), "words": np.array(["text"] * T)}
    with pytest.raises(UsageError) as error:
        run(make_card([(target, {"field": "a"} | entry)]), fields)
    assert re.search(message, f"{error.value.found}\n{error.value.expected}"), str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("from", {"convention": "eef_posiion"}, "unknown convention"),
        ("from", {"convention": "eef_position"}, "say the unit of eef_position"),
        ("from", {"convention": "eef_rotation", "unit": "1"}, "`rotation` goes with"),
        ("from", {"convention": "eef_rotation", "rotation": "rpy", "unit": "rad"}, "euler_ and three axes"),
        ("from", {"convention": "gripper_open_positive", "open": 1}, "come together"),
        ("from", {"convention": "scalar", "open": 1, "closed": 0}, "belong to a gripper"),
        ("dims", "0-3", "write a slice"),
        ("gripper", {"binarise": [0.9, 0.1]}, "low <= high"),
        ("gripper", {"binarise": [0.1, 0.9], "relative": 0.1}, "not both"),
        ("offset", {"rotation": [0, 0, 0, 0]}, "a length of about 1"),
        ("filed", "a", "no such key"),
    ],
)
def test_a_card_that_makes_no_sense_is_refused_with_its_line(tmp_path: Path, key, value, message):
    robot = {"name": "arm", "control_hz": 10, "cameras": {}, "state": [], "action": [SCALAR]}
    file = tmp_path / "mine.yaml"
    entry = {"channel": "x", "field": "a", key: value}
    file.write_text(yaml.safe_dump({"name": "mine", "embodiment": robot, "action": [entry]}, sort_keys=False))
    with pytest.raises(UsageError, match=message) as error:
        load_card(file)
    assert "mine.yaml:" in error.value.found and "action.0" in error.value.found


def test_every_mistake_at_once_with_lines_and_nearest_names(tmp_path: Path):
    text = """
name: mine
fps: 30
embodiment: {name: arm, control_hz: 10, cameras: {}, state: [], action: [
  {name: hand, dims: [x, y, z], convention: eef_position, unit: m, frame: base, low: [-1, -1, -1], high: [1, 1, 1]},
  {name: grip, dims: [g], convention: gripper_open_positive, unit: "1", low: [0], high: [1]}]}
cameras:
  front: {field: obs/imge}
action:
  - channel: hand
    field: obs/ee_poz
    from: {convention: eef_position, unit: rad, frame: world}
  - {channel: gripp, field: actions}
"""
    (tmp_path / "mine.yaml").write_text(text)
    info = SourceInfo(20.0, {"obs/ee_pos": ("float64", (3,)), "actions": ("float64", (7,))}, {"obs/image": (8, 8)}, {})
    with pytest.raises(UsageError) as error:
        fit(load_card(tmp_path / "mine.yaml"), info)
    found, expected = error.value.found, error.value.expected
    for part in ("mine.yaml:3: fps: 30.0 Hz", "mine.yaml:8: cameras.front.field", "mine.yaml:11: action.0.field",
                 "mine.yaml:12: action.0.from: unit 'rad'", "mine.yaml:12: action.0.from: frame 'world'",
                 "mine.yaml:13: action.1.channel", "mine.yaml:9: action: nothing fills channel 'grip'"):  # fmt: skip
        assert part in found, found
    assert "'obs/ee_pos'" in expected and "'obs/image'" in expected and "'grip'" in expected and "20.0 Hz" in expected


def test_a_state_is_not_achieved():
    entry = {"field": "three", "from": META, "achieved": "compose"}
    with pytest.raises(UsageError, match="on a state channel"):
        run(make_card([(SCALAR, {"field": "a"})], [(STEP, entry)]), {"a": np.zeros((T, 1)), "three": np.ones((T, 3))})


def test_a_channel_filled_twice_and_a_rate_that_is_not_the_robots_are_refused():
    fields = {"a": np.zeros((T, 1))}
    with pytest.raises(UsageError, match="'x' is filled twice"):
        once = make_card([(SCALAR, {"field": "a"})])
        run(once.model_copy(update={"action": 2 * once.action}), fields)
    entry = {"field": "a", "from": {"convention": "gripper_open_positive", "unit": "1"}}
    parts = {"action": [{"channel": "gripper"} | entry], "state": []}
    with pytest.raises(UsageError, match=r"25.0 Hz.*") as error:
        run(Card.model_validate({"name": "made-up", "embodiment": "tabletop", "fps": 25} | parts), fields)
    assert "the 10.0 Hz of embodiment 'tabletop'" in error.value.expected


def test_a_card_that_contradicts_the_reader_is_refused():
    card = make_card([(SCALAR, {"field": "a"})], pairing="observation_before_action")
    with pytest.raises(UsageError, match="pairing"):
        run(card, {"a": np.zeros((T, 1))}, info={"pairing": "observation_after_action"})


def test_an_episode_that_is_not_what_the_dataset_promises_is_named():
    state = [(channel("s", "scalar", "1", 2), {"field": "obs/s"})]
    card = make_card([(SCALAR, {"field": "a"})], state, cameras={"front": {"field": "i"}})
    info = SourceInfo(None, {"a": ("float32", (1,)), "obs/s": ("float32", (2,))}, {"i": (4, 4)}, {})
    fitted = fit(card, info)
    good = {"a": np.zeros((T, 1)), "obs/s": np.zeros((T, 2))}
    image = {"i": np.zeros((T, 4, 4, 3), np.uint8)}

    def refuse(fields: dict, images: dict, message: str) -> None:
        with pytest.raises(DataError, match=message) as error:
            standardise(RawEpisode(fields, images, "do it", "shard-3, record 5", "k"), fitted, info)
        assert error.value.where.startswith("shard-3, record 5")

    refuse({"a": good["a"], "obs/t": good["obs/s"]}, image, r"no field 'obs/s' \(nearest: 'obs/t'\)")
    refuse(good | {"obs/s": np.zeros((T, 3))}, image, r"'obs/s' is \(3,\) a step, the dataset says \(2,\)")
    refuse(good | {"a": np.zeros((T - 1, 1))}, image, "lengths differ")
    refuse(good, {"i": np.zeros((T, 4, 5, 3), np.uint8)}, r"'i' is uint8 \(4, 5, 3\)")
    refuse(good, {"i": np.zeros((T, 4, 4, 3), np.float32)}, "'i' is float32")
    refuse(good, {}, "no pictures 'i'")
    refuse(good | {"a": np.full((T, 1), np.nan)}, image, "nan")
    refuse(good | {"a": np.full((T, 1), 1e300)}, image, "inf")


def test_numbers_that_are_no_rotation_name_card_field_and_file():
    card = make_card([(channel("r", "eef_axis_angle", "rad", 3, "base"), {"field": "a", "dims": "0:4", "from": QUAT})])
    with pytest.raises(DataError) as error:
        run(card, {"a": np.zeros((T, 5))})
    assert "action.0, 'a' 0:4" in error.value.found and "length of about 1" in error.value.found
    assert error.value.where == "file.h5 demo_0"


# --- a card finds its dataset -----------------------------------------------------------------------------------------


class Fake:
    damage: list = []
    missing = 0

    def __init__(self, kind: str, root: str, info: SourceInfo) -> None:
        self.kind, self.root, self.info = kind, Path(root), info


def test_an_unknown_dataset_is_taken_as_it_is():
    info = SourceInfo(None, {
        "observation/ee/pose": ("float32", (6,)), "observation/embedding": ("float32", (512,)), "is_first": ("bool", ()),
        "action/world_vector": ("float32", (3,)), "action/gripper": ("float32", ()), "reward": ("float32", ()),
    }, {"observation/image": (8, 8), "observation/wrist/image": (6, 6)}, {"name": "somewhere"})  # fmt: skip
    source: Any = Fake("rlds", "somewhere/1.0.0", info)
    with pytest.raises(UsageError, match="no control rate"):
        card_for(source)
    card = fit(Card(name="somewhere", fps=5), info)
    assert card.spec.name == "somewhere" and card.spec.control_hz == card.fps == 5
    assert card.spec.action_names == ["world_vector.d0", "world_vector.d1", "world_vector.d2", "gripper.d0"]
    assert card.spec.state_dim == 6 and {c.convention for c in (*card.spec.state, *card.spec.action)} == {"scalar"}
    assert "observation/embedding" in card.about
    assert {n: (c.height, c.width) for n, c in card.spec.cameras.items()} == {"image": (8, 8), "wrist_image": (6, 6)}


def test_lerobot_names_and_our_own_robots_are_kept():
    fields = {"observation.state": ("float32", (3,)), "action": ("float32", (2,)), "timestamp": ("float32", ())}
    names = {"observation.state": ["x", "y", "g"], "action": {"motors": ["vx", "vy"]}}
    info = SourceInfo(10.0, fields, {"observation.images.front": (8, 8)}, {"robot_type": "so100", "names": names})
    spec = card_for(Fake("lerobot-v2.1", "somewhere", info)).spec  # pyright: ignore
    assert (spec.name, spec.state_names) == ("so100", ["state.x", "state.y", "state.g"])
    assert spec.action_names == ["action.vx", "action.vy"]
    assert list(spec.cameras) == ["front"]
    ours = {"name": "ours", "mode": "eef", "cameras": {"front": {"height": 8, "width": 8}}, "control_hz": 10,
            "state": [channel("s", "scalar", "odd unit", 1), channel("p", "eef_position", "m", 2, "base")],
            "action": [channel("v", "eef_delta_position", "0.02 m/step", 2, "base")]}  # fmt: skip
    info = SourceInfo(10.0, fields, {"observation.images.front": (8, 8)}, {"robot_type": "x", "embodiment": ours})
    card = card_for(Fake("lerobot-v3.0", "somewhere", info))  # pyright: ignore
    assert card.spec.key == "ours/eef" and [c.unit for c in card.spec.state] == ["odd unit", "m"]
    assert isinstance(card.spec.state[0], Channel)
    values = {path: RNG.normal(size=(T, width)).astype(np.float32) for path, width in (("observation.state", 3), ("action", 2))}
    pixels = {"observation.images.front": np.zeros((T, 8, 8, 3), np.uint8)}
    fitted = pickle.loads(pickle.dumps(card))  # to a worker process and back
    got = standardise(RawEpisode(values, pixels, "go", "here", "k", {"task": "t", "seed": 4, "success": False}), fitted, info)
    np.testing.assert_array_equal(got.state, values["observation.state"])
    np.testing.assert_array_equal(got.action, values["action"])
    assert (got.embodiment, got.task, got.seed, got.success) == ("ours/eef", "t", 4, False)


def test_what_a_derived_card_says_itself_stays():
    fields = {"actions": ("float64", (2,)), "obs/s": ("float64", (2,))}
    info = SourceInfo(10.0, fields, {"obs/image": (4, 4), "obs/depth": (4, 4)}, {})
    said = {"name": "mine", "cameras": {"top": {"field": "obs/image", "flip": "rotate180"}}, "instruction": {"text": "go"},
            "pairing": "observation_after_action", "skip_steps": {"first": 1}}  # fmt: skip
    card = fit(Card.model_validate(said), info)
    assert card.pairing == "observation_after_action" and list(card.spec.cameras) == ["top"]
    rows = np.arange(T, dtype=float)[:, None].repeat(2, 1)
    image = RNG.integers(0, 256, (T, 4, 4, 3), dtype=np.uint8)
    raw = RawEpisode({"actions": rows, "obs/s": rows}, {"obs/image": image, "obs/depth": image}, "", "f", "k")
    got = standardise(raw, card, info)
    assert got.action[:, 0].tolist() == list(range(2, T)) and got.state[:, 0].tolist() == list(range(1, T - 1))
    np.testing.assert_array_equal(got.images["top"], image[1:-1, ::-1, ::-1])
    assert got.instruction == "go"


def test_a_shipped_card_that_does_not_fit_is_passed_over_and_said():
    info = SourceInfo(20.0, {"actions": ("float64", (7,)), "obs/joints": ("float64", (7,))}, {}, {})
    card = card_for(Fake("libero", "libero_odd", info))  # pyright: ignore
    assert card.spec.name == "libero_odd" and "'libero' does not fit" in card.about and "obs/ee_pos" in card.about


def test_names_and_overrides():
    with pytest.raises(UsageError, match="datasets/libero"):
        load_card("librero")
    card = load_card("libero", ["cameras.agentview.flip=rotate180", "instruction.text=do it"])
    assert card.cameras["agentview"].flip == "rotate180" and card.instruction.text == "do it"
    with pytest.raises(UsageError, match="sizes of the cameras"):
        _ = card.spec
