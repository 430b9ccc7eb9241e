"""The shipped cards: each fits the layout it is for, and what comes out is what its comments promise."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.sources import RawEpisode, Source, SourceInfo, open_source
from data_tools.standardise import Card, card_for, fit, load_card, shipped_cards, standardise
from vla.config import CONFIGS
from vla.embodiment import load_embodiment
from vla.rotation import convert, from_quat, relative, to_quat, width
from vla.schema import Episode

T = 9
RNG = np.random.default_rng(1)

OXE: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, int]]]] = {
    "bridge_orig": ({"observation/state": (7,), "action": (7,)},
                    {f"observation/image_{i}": (256, 256) for i in range(4)}),
    "fractal20220817_data": ({
        "observation/base_pose_tool_reached": (7,), "observation/gripper_closed": (1,), "action/world_vector": (3,),
        "action/rotation_delta": (3,), "action/gripper_closedness_action": (1,), "action/base_displacement_vector": (2,),
        "observation/natural_language_embedding": (512,)}, {"observation/image": (256, 320)}),
    "taco_play": ({"observation/robot_obs": (15,), "action/rel_actions_world": (7,), "action/actions": (7,)},
                  {"observation/rgb_static": (150, 200), "observation/rgb_gripper": (84, 84)}),
    "jaco_play": ({"observation/end_effector_cartesian_pos": (7,), "observation/joint_pos": (8,), "action/world_vector": (3,),
                   "action/gripper_closedness_action": (1,)},
                  {"observation/image": (224, 224), "observation/image_wrist": (224, 224)}),
    "viola": ({"observation/joint_states": (7,), "observation/gripper_states": (1,), "observation/ee_states": (16,),
               "action/world_vector": (3,), "action/rotation_delta": (3,), "action/gripper_closedness_action": ()},
              {"observation/agentview_rgb": (224, 224), "observation/eye_in_hand_rgb": (224, 224)}),
    "berkeley_autolab_ur5": ({"observation/robot_state": (15,), "action/world_vector": (3,), "action/rotation_delta": (3,),
                              "action/gripper_closedness_action": ()},
                             {"observation/image": (480, 640), "observation/hand_image": (480, 640)}),
    "language_table": ({"observation/effector_translation": (2,), "observation/effector_target_translation": (2,),
                        "observation/instruction": (512,), "action": (2,)}, {"observation/rgb": (360, 640)}),
    "droid": ({"observation/joint_position": (7,), "observation/gripper_position": (1,), "observation/cartesian_position": (6,),
               "action_dict/joint_position": (7,), "action_dict/gripper_position": (1,), "action": (7,)},
              {f"observation/{c}": (180, 320) for c in ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")}),
}  # fmt: skip
"""Made-up datasets of the layouts the TFDS catalogue and public loaders describe: fields and pictures."""


class Fake:
    damage: list = []

    def __init__(self, kind: str, root: str, info: SourceInfo) -> None:
        self.kind, self.root, self.info = kind, Path(root), info


def episode(name: str, **fields: np.ndarray) -> tuple[Episode, dict[str, np.ndarray]]:
    """A random episode of `name` through its card, found by the dataset's name."""
    shapes, sizes = OXE[name]
    info = SourceInfo(None, {p: ("float32", s) for p, s in shapes.items()}, sizes, {"name": name, "version": "0.1.0"})
    values = {p: RNG.uniform(-0.9, 0.9, (T, *s)).astype(np.float32) for p, s in shapes.items()}
    values |= {path.replace(".", "/"): array for path, array in fields.items()}
    images = {p: RNG.integers(0, 256, (T, *s, 3), dtype=np.uint8) for p, s in sizes.items()}
    card = card_for(Fake("rlds", f"downloads/{name}/0.1.0", info))  # pyright: ignore
    assert card.name == name
    raw = RawEpisode(values, images, "" if name == "language_table" else "do it", "shard 0", "k", {})
    got = standardise(raw, card, info)
    assert got.state.shape[1] == card.spec.state_dim and got.action.shape[1] == card.spec.action_dim
    return got, values | images


def held(moves: np.ndarray) -> list[float]:
    state, out = 0.0, []
    first = moves[np.abs(moves) > 0.1]
    state = 1.0 if not len(first) else float(first[0] > 0)
    for move in moves:
        state = state if abs(move) <= 0.1 else float(move < 0)
        out.append(state)
    return out


def test_bridge_is_what_was_achieved_without_the_first_step():
    gripper = np.array([0.5, 1, 1, 0.5, 0.3, 0, 0, 0.6, 0.7], np.float32)
    action = np.concatenate([np.zeros((T, 6), np.float32), gripper[:, None]], 1)
    got, raw = episode("bridge_orig", action=action)
    state = raw["observation/state"]
    assert len(got) == T - 2
    np.testing.assert_allclose(got.action[:, :6], (state[2:] - state[1:-1])[:, :6], atol=1e-6)
    assert got.action[:, 6].tolist() == [1, 1, 0, 0, 0, 0, 1]  # steps 1 to 7; undecided ones take what comes
    np.testing.assert_array_equal(got.state, state[1:-1])
    assert list(got.images) == ["primary", "secondary"]
    np.testing.assert_array_equal(got.images["primary"], raw["observation/image_0"][1:-1])


@pytest.mark.parametrize("name", ["fractal20220817_data", "jaco_play", "berkeley_autolab_ur5"])
def test_relative_grippers_hold_and_open_is_one(name):
    moves = np.array([0, 0, 1, 0, 0, -1, 0, 1, 0], np.float32)
    shape = OXE[name][0]["action/gripper_closedness_action"]
    got, _ = episode(name, **{"action.gripper_closedness_action": moves.reshape(T, *shape)})
    assert got.action[:, -1].tolist() == held(moves) == [1, 1, 0, 0, 0, 1, 1, 0, 0]


def test_fractal_and_ur5_fields():
    got, raw = episode("fractal20220817_data")
    np.testing.assert_array_equal(got.state[:, :7], raw["observation/base_pose_tool_reached"])
    np.testing.assert_allclose(got.state[:, 7], 1 - raw["observation/gripper_closed"][:, 0], atol=1e-6)
    moved = np.concatenate([raw["action/world_vector"], raw["action/rotation_delta"]], 1)
    np.testing.assert_array_equal(got.action[:, :6], moved)
    got, raw = episode("berkeley_autolab_ur5")
    np.testing.assert_array_equal(got.state[:, :7], raw["observation/robot_state"][:, 6:13])
    np.testing.assert_allclose(got.state[:, 7], 1 - raw["observation/robot_state"][:, 13], atol=1e-6)


def test_taco_reads_the_width_and_clips_the_command():
    action = RNG.uniform(-1, 1, (T, 7)).astype(np.float32)
    action[:, 6] = [-1, 1, 1, -1, 2, 0.5, -3, 1, -1]
    got, raw = episode("taco_play", **{"action.rel_actions_world": action})
    np.testing.assert_array_equal(got.state, raw["observation/robot_obs"][:, :7])
    np.testing.assert_array_equal(got.action[:, :6], action[:, :6])
    assert got.action[:, 6].tolist() == [0, 1, 1, 0, 1, 0.75, 0, 1, 0]


def test_viola_takes_zero_and_minus_one_for_open():
    moves = np.array([1, 0, -1, 1, 1, -1, 0, 1, 1], np.float32)
    got, raw = episode("viola", **{"action.gripper_closedness_action": moves})
    assert got.action[:, 6].tolist() == [0, 1, 1, 0, 0, 1, 1, 0, 0]
    np.testing.assert_array_equal(got.state[:, :7], raw["observation/joint_states"])


def test_language_table_spells_its_instruction():
    points = np.zeros((T, 512), np.int32)
    points[:, :9] = [ord(c) for c in "push left"]
    got, raw = episode("language_table", **{"observation.instruction": points})
    assert got.instruction == "push left" and got.action.shape == got.state.shape == (T, 2)
    np.testing.assert_array_equal(got.action, raw["action"])


def test_droid_is_joints_and_open_is_one():
    got, raw = episode("droid")
    np.testing.assert_array_equal(got.action[:, :7], raw["action_dict/joint_position"])
    np.testing.assert_allclose(got.action[:, 7], 1 - raw["action_dict/gripper_position"][:, 0], atol=1e-6)
    np.testing.assert_allclose(got.state[:, 7], 1 - raw["observation/gripper_position"][:, 0], atol=1e-6)


# --- HDF5 -------------------------------------------------------------------------------------------------------------

LIBERO = {"obs/ee_pos": (3,), "obs/ee_ori": (3,), "obs/ee_states": (6,), "obs/gripper_states": (2,), "obs/joint_states": (7,),
          "actions": (7,), "rewards": (), "dones": ()}  # fmt: skip


@pytest.mark.parametrize("written_by", ["LIBERO", "OpenVLA's replay"])
def test_libero_is_paired_and_put_upright(written_by):
    sizes = {"obs/agentview_rgb": (8, 8), "obs/eye_in_hand_rgb": (8, 8)}
    after = written_by == "LIBERO"
    about = {"pairing": "observation_after_action" if after else "observation_before_action", "image_orientation": "bottom_up"}
    info = SourceInfo(20.0 if after else None, {p: ("float64", s) for p, s in LIBERO.items()}, sizes, about)
    values = {p: RNG.uniform(-0.9, 0.9, (T, *s)) for p, s in LIBERO.items()}
    values["actions"][:, 6] = RNG.choice([-1.0, 1.0], T)
    images = {p: RNG.integers(0, 256, (T, *s, 3), dtype=np.uint8) for p, s in sizes.items()}
    card = card_for(Fake("libero", "libero_goal", info))  # pyright: ignore
    got = standardise(RawEpisode(values, images, "open the drawer", "f", "k"), card, info)
    seen, done = (slice(0, -1), slice(1, None)) if after else (slice(None), slice(None))
    np.testing.assert_allclose(got.action, values["actions"][done], atol=1e-7)
    expected = np.concatenate([values["obs/ee_pos"], values["obs/ee_ori"], values["obs/gripper_states"]], 1)[seen]
    np.testing.assert_allclose(got.state, expected, atol=1e-7)
    np.testing.assert_array_equal(got.images["wrist"], images["obs/eye_in_hand_rgb"][seen][:, ::-1])
    assert card.spec.key == "libero_panda/osc_pose" and card.fps == 20


def robomimic(controller: dict[str, Any], robots: Any = "Panda") -> SourceInfo:
    shapes = {"obs/robot0_eef_pos": (3,), "obs/robot0_eef_quat": (4,), "obs/robot0_gripper_qpos": (2,), "actions": (7,)}
    kwargs = {"robots": robots, "control_freq": 5, "controller_configs": controller}
    about = {"pairing": "observation_before_action", "image_orientation": "upright", "env_args": {"env_kwargs": kwargs}}
    return SourceInfo(5.0, {p: ("float64", s) for p, s in shapes.items()}, {"obs/agentview_image": (8, 8)}, about)


OSC = {"type": "OSC_POSE", "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5]}


@pytest.mark.parametrize("controller", [OSC, {"type": "BASIC", "body_parts": {"right": OSC}}])  # robosuite 1.4 and 1.5
def test_robomimic_is_known_by_its_controller(controller):
    card = card_for(Fake("robomimic", "lift.hdf5", robomimic(controller)))  # pyright: ignore
    assert card.name == "robomimic" and card.spec.control_hz == 5 and list(card.spec.cameras) == ["agentview"]
    assert [c.convention for c in card.spec.state] == ["eef_position", "eef_quat_xyzw", "joint_position"]


@pytest.mark.parametrize(
    ("controller", "robots"),
    [({"type": "JOINT_POSITION"}, "Panda"), (OSC | {"output_max": [1] * 6}, "Panda"), (OSC, ["Sawyer"]), (OSC, ["Panda"] * 2)],
)
def test_another_arm_or_controller_is_not_taken_for_it(controller, robots):
    card = card_for(Fake("robomimic", "lift.hdf5", robomimic(controller, robots)))  # pyright: ignore
    assert card.name == "lift" and {c.convention for c in (*card.spec.state, *card.spec.action)} == {"scalar"}


def test_aloha_is_fourteen_joints():
    shapes = {"action": (14,), "observations/qpos": (14,), "observations/qvel": (14,)}
    cameras = {f"observations/images/cam_{c}": (6, 8) for c in ("high", "left_wrist", "right_wrist")}
    info = SourceInfo(None, {p: ("float32", s) for p, s in shapes.items()}, cameras, {"pairing": "observation_before_action"})
    values = {p: RNG.normal(size=(T, *s)).astype(np.float32) for p, s in shapes.items()}
    images = {p: RNG.integers(0, 256, (T, *s, 3), dtype=np.uint8) for p, s in cameras.items()}
    card = card_for(Fake("aloha", "aloha", info))  # pyright: ignore
    got = standardise(RawEpisode(values, images, "open the cup", "f", "k"), card, info)
    np.testing.assert_array_equal(got.action, values["action"])
    np.testing.assert_array_equal(got.state, values["observations/qpos"])
    assert card.fps == 50 and set(got.images) == {"cam_high", "cam_left_wrist", "cam_right_wrist"}


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_cards())
def test_every_card_says_what_it_is_and_what_was_checked(name):
    card = load_card(name)
    assert card.name == name and card.about and card.checked and (card.match.kinds or card.match.names)
    if name in OXE:
        assert card.match.kinds == ("rlds",) and name in card.match.names and "nothing against real files" in card.checked
    for part in ("state", "action"):
        for entry in getattr(card, part):
            (channel,) = [c for c in getattr(card.robot, part) if c.name == entry.channel]
            assert (channel.convention == "scalar") == (entry.from_.convention == "scalar")


def test_no_two_cards_and_no_embodiment_share_a_robot():
    robots = [card.robot.key for card in map(load_card, shipped_cards()) if card.robot is not None]
    root = CONFIGS / "embodiments"
    robots += [load_embodiment(p.stem).key for p in root.glob("*.yaml")]
    assert len(set(robots)) == len(robots), sorted(robots)


def test_the_rotation_of_a_card_can_be_asked_for_in_another_form():
    """What a user does to mix LIBERO with a robot of rot6d: an own embodiment, the card's `from` untouched."""
    card = load_card("libero")
    assert card.robot is not None
    state = tuple(c.model_copy(update={"convention": "eef_rot6d", "unit": "1", "dims": tuple("abcdef"), "low": (-1.1,) * 6,
                                       "high": (1.1,) * 6}) if c.name == "rotation" else c for c in card.robot.state)  # fmt: skip
    mine = card.with_robot(card.robot.model_copy(update={"state": state, "name": "mine"}), cameras={})
    values = {p: RNG.uniform(-0.9, 0.9, (T, *s)) for p, s in LIBERO.items()}
    info = SourceInfo(20.0, {p: ("float64", s) for p, s in LIBERO.items()}, {}, {})
    got = standardise(RawEpisode(values, {}, "go", "f", "k"), mine, info)
    np.testing.assert_allclose(got.state[:, 3:9], convert(values["obs/ee_ori"], "axis_angle", "rot6d"), atol=1e-6)


# --- real files -------------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden"


def real(tmp_path: Path, name: str) -> tuple[Source, Card, list[RawEpisode], list[Episode]]:
    """Every episode of a golden HDF5 file, before and after its card. Without words of their own, they all say the same."""
    pytest.importorskip("h5py")
    file = tmp_path / f"{name}.hdf5"
    file.write_bytes(gzip.decompress((GOLDEN / "hdf5" / f"{name}.hdf5.gz").read_bytes()))
    source = open_source(file)
    card = card_for(source)
    raws = [source.read(key) for key in source.keys()]
    if not raws[0].instruction:
        card = fit(load_card(card.name, ["instruction.text=lift the cube"]), source.info)
    return source, card, raws, [standardise(raw, card, source.info) for raw in raws]


@pytest.mark.parametrize("name", ["libero", "libero_replayed", "robomimic"])
def test_real_demonstrations_move_as_the_card_says(tmp_path, name):
    """Axes, senses and pairing, seen in what the robot did: commands cause the displacement that follows them."""
    _, card, raws, episodes = real(tmp_path, name)
    assert card.name == name.removesuffix("_replayed")
    form = {"eef_axis_angle": "axis_angle", "eef_quat_xyzw": "quat_xyzw"}[card.spec.state[1].convention]
    for raw, got in zip(raws, episodes, strict=True):
        shift = int(name == "libero")
        assert len(got) == len(raw) - shift
        np.testing.assert_array_equal(got.action, raw.fields["actions"][shift:].astype(np.float32))
        moved, commanded = np.diff(got.state[:, :3], axis=0), got.action[:-1, :3]
        assert np.corrcoef(moved.ravel(), commanded.ravel())[0, 1] > 0.9
        q = to_quat(got.state[:, 3 : 3 + width(form)], form)
        turned, asked = from_quat(relative(q[:-1], q[1:]), "axis_angle"), got.action[:-1, 3:6]
        body = from_quat(relative(q[:-1], q[1:], "body"), "axis_angle")
        assert not asked.any() or np.sum(turned * asked) > 0 > np.sum(body * asked)  # about the world's axes, not the hand's
        opening = got.state[:, -2] - got.state[:, -1]
        assert (got.action[:, 6] == -1).all() and opening[-1] > opening[0] > 0  # -1 opens
        for camera, field in ((c, card.cameras[c].field) for c in got.images):
            pictures = raw.images[field][: len(got)]
            np.testing.assert_array_equal(got.images[camera], pictures[:, ::-1] if name.startswith("libero") else pictures)


def test_liberos_own_rotation_vectors_are_longer_than_pi(tmp_path):
    """The reason for `sign: as_is`: robosuite does not flip quaternions with w < 0."""
    _, _, _, episodes = real(tmp_path, "libero")
    assert max(np.linalg.norm(e.state[:, 3:6], axis=1).max() for e in episodes) > np.pi


def test_real_aloha_files_are_taken_whole(tmp_path):
    _, card, raws, episodes = real(tmp_path, "aloha")
    assert card.spec.key == "aloha_act/joint" and set(episodes[0].images) == {"top", "angle"}
    for raw, got in zip(raws, episodes, strict=True):
        np.testing.assert_array_equal(got.action, raw.fields["action"].astype(np.float32))
        np.testing.assert_array_equal(got.state, raw.fields["observations/qpos"].astype(np.float32))


def test_a_real_lerobot_dataset_is_taken_as_it_is():
    source = open_source(GOLDEN / "lerobot_v21")
    card = card_for(source)
    assert card.name == "lerobot" and source.kind == "lerobot-v2.1"
    for raw in map(source.read, source.keys()):
        got = standardise(raw, card, source.info)
        np.testing.assert_array_equal(got.action, raw.fields["action"])
        np.testing.assert_array_equal(got.state, raw.fields["observation.state"])
        for camera, entry in card.cameras.items():
            np.testing.assert_array_equal(got.images[camera], raw.images[entry.field])
