"""HDF5 sources, on files that robomimic, LIBERO, ACT and Mobile ALOHA wrote (tests/golden/hdf5) and on damage done to them."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import call

from data_tools.sources import hdf5 as hdf5_module
from data_tools.sources import open_source
from data_tools.sources.hdf5 import Hdf5Source
from data_tools.sources.hdf5_layouts import natural
from vla.errors import DataError, MachineError

h5py: Any = pytest.importorskip("h5py", reason="h5py is not installed (pip install 'tendon-vla[hdf5]')")

GOLDEN = Path(__file__).parent / "golden" / "hdf5"
NAMES = ("robomimic", "libero", "libero_replayed", "aloha", "aloha_compressed")
BOOK = "pick up the book and place it in the front compartment of the caddy"


@pytest.fixture()
def golden(tmp_path: Path):
    """`golden("libero", as_name)`: a fresh copy of a real file."""

    def unpack(name: str, as_name: str | None = None) -> Path:
        path = tmp_path / (as_name or f"{name}.hdf5")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.decompress((GOLDEN / f"{name}.hdf5.gz").read_bytes()))
        return path

    return unpack


def every_dataset(path: Path, group: str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    with h5py.File(path, "r") as file:
        file[group].visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


# --- real files, every value ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_the_files_own(golden, name: str):
    path = golden(name)
    source = open_source(path, "hdf5")
    assert source.kind == name.split("_")[0] and not source.damage
    for key in source.keys():
        raw = source.read(key)
        group = f"data/{key.split(':')[1]}" if ":" in key else "/"
        arrays = every_dataset(path, group)
        left_out = set(raw.attributes["left_out"])
        assert {*raw.fields, *raw.images} | left_out == set(arrays)  # all read, or named
        for field, array in raw.fields.items():
            assert array.dtype == arrays[field].dtype and array.shape == arrays[field].shape
            assert array.tobytes() == arrays[field].tobytes()
        for camera, frames in raw.images.items():
            assert frames.dtype == np.uint8 and frames.shape[-1] == 3 and len(frames) == len(raw)
            if arrays[camera].ndim == 4:
                assert np.array_equal(frames, arrays[camera])  # neither turned nor recoloured
        assert raw.key == key and str(path) in raw.where


def test_robomimic_says_what_its_file_says(golden):
    source = open_source(golden("robomimic"))  # recognised without being told
    assert isinstance(source, Hdf5Source) and source.kind == "robomimic"
    assert source.info.fps == 20.0
    assert source.keys() == [f"robomimic.hdf5:demo_{i}" for i in (1, 2, 3)]
    assert source.info.fields["actions"] == ("float64", (7,))
    assert source.info.fields["obs/robot0_eef_quat_site"] == ("float32", (4,))
    assert source.info.fields["rewards"] == ("float64", ())
    assert source.info.images == {"obs/agentview_image": (16, 16), "obs/robot0_eye_in_hand_image": (16, 16)}
    about = source.info.attributes
    assert about["pairing"] == "observation_before_action" and about["image_orientation"] == "upright"
    assert about["env_args"]["env_kwargs"]["robots"] == "Panda"
    assert "next_obs/agentview_image" in about["left_out"] and "next_obs/object" in source.info.fields
    assert about["masks"]["train"] == source.keys() and about["masks"]["valid"] == []
    raw = source.read(source.keys()[0])
    assert raw.instruction == "" and raw.attributes["num_samples"] == 5 and raw.attributes["masks"] == ["train"]
    # The pairing is as said: the observation after action t is the one before action t + 1.
    assert np.array_equal(raw.fields["next_obs/object"][:-1], raw.fields["obs/object"][1:])


def test_libero_keeps_its_instruction_its_rows_and_its_late_observations(golden):
    source = open_source(golden("libero"), "hdf5")
    assert source.kind == "libero" and source.info.fps == 20.0
    assert source.info.attributes["pairing"] == "observation_after_action"
    assert source.info.attributes["image_orientation"] == "bottom_up"
    raw = source.read("libero.hdf5:demo_0")
    assert raw.instruction == BOOK
    states, joints = raw.fields["states"][:, 1:8], raw.fields["obs/joint_states"]
    assert np.array_equal(joints[:-1], states[1:]) and not np.array_equal(joints, states)
    assert "model_file" not in raw.attributes and "bddl_file_content" not in source.info.attributes


def test_replayed_libero_has_early_observations_and_an_instruction_in_its_name(golden):
    path = golden("libero_replayed", "STUDY_SCENE10_pick_up_the_book_demo.hdf5")
    source = open_source(path, "hdf5")
    assert source.kind == "libero" and source.info.fps is None
    assert source.info.attributes["pairing"] == "observation_before_action"
    assert source.read(source.keys()[0]).instruction == "pick up the book"


def test_a_libero_file_taken_for_the_wrong_pairing_is_refused(golden):
    stripped = golden("libero")
    with h5py.File(stripped, "a") as file:
        for name in list(file["data"].attrs):
            del file["data"].attrs[name]
    named = golden("libero_replayed")
    with h5py.File(named, "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": ["put ", "it"]})
    for path in (stripped, named):
        source = open_source(path, "hdf5")
        with pytest.raises(DataError, match="fit the states of the other pairing"):
            source.read(source.keys()[0])


def test_aloha_plain_and_compressed_show_the_same_pictures(golden):
    plain = open_source(golden("aloha"), "hdf5")
    small = open_source(golden("aloha_compressed"), "hdf5")
    assert plain.kind == small.kind == "aloha" and plain.keys() == ["aloha.hdf5"] and plain.info.fps is None
    assert plain.info.fields["action"] == ("float32", (14,)) == small.info.fields["action"]
    assert "compress" not in plain.info.attributes and small.info.attributes["compress"] is True
    assert small.info.images == plain.info.images == {"observations/images/top": (60, 80), "observations/images/angle": (60, 80)}
    assert "compress_len" in small.info.attributes["left_out"] and small.info.fields["base_action"] == ("float32", (2,))
    a, b = plain.read("aloha.hdf5"), small.read("aloha_compressed.hdf5")
    # What cv2.imdecode gives for the same rows, which is RGB because RGB was encoded as if it were BGR.
    digests = {"top": "9384d9b2ca1305457bd01672185e2e7322f04c0efa6fc0ae717504b13f799342",
               "angle": "105df05734142e677ef0d2b72786d612bba16c30025b5968261796216655b19c"}  # fmt: skip
    for camera, digest in digests.items():
        exact, lossy = (raw.images[f"observations/images/{camera}"].astype(int) for raw in (a, b))
        assert np.abs(exact - lossy).mean() < 6
        cube = exact[..., 0] - exact[..., 2] > 60  # the red cube
        assert cube.any() and (lossy[..., 0] - lossy[..., 2])[cube].mean() > 10
        assert hashlib.sha256(lossy.astype(np.uint8).tobytes()).hexdigest() == digest
    assert np.array_equal(a.fields["action"], b.fields["action"]) and len(a) == len(b) == 5


# --- listing: lazy, ordered, picklable ----------------------------------------------------------------------------------


def test_opening_reads_no_array_and_reading_reads_one_demonstration(golden, monkeypatch: pytest.MonkeyPatch):
    path = golden("robomimic")
    touched: list[str] = []
    take = h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda self, at: (touched.append(self.name), take(self, at))[1])
    source = Hdf5Source.open(path)
    assert not [name for name in touched if not name.startswith("/mask/")]
    touched.clear()
    source.read("robomimic.hdf5:demo_2", only=["actions", "obs/agentview_image"])
    assert touched == ["/data/demo_2/actions", "/data/demo_2/obs/agentview_image"]
    touched.clear()
    raw = source.read("robomimic.hdf5:demo_2")
    assert all(name.startswith("/data/demo_2/") for name in touched)
    assert len(touched) == len(raw.fields) + len(raw.images)


def test_demos_and_files_come_in_numeric_order(golden, tmp_path: Path):
    path = golden("robomimic", "data/b_10.hdf5")
    with h5py.File(path, "a") as file:
        file.move("data/demo_1", "data/demo_10")
        for mask in ("train", "valid"):
            del file["mask"][mask]
        file["mask/hard"] = np.array([b"demo_10", b"demo_2"])
    shutil.copy(path, tmp_path / "data/b_9.hdf5")
    source = open_source(tmp_path / "data", "hdf5")
    assert source.keys() == [f"b_{f}.hdf5:demo_{d}" for f in (9, 10) for d in (2, 3, 10)]
    assert source.info.attributes["masks"] == {"hard": [f"b_{f}.hdf5:demo_{d}" for f in (9, 10) for d in (10, 2)]}
    assert source.read("b_9.hdf5:demo_10").attributes["masks"] == ["hard"]
    assert sorted(["demo_10", "demo_9", "demo_1"], key=natural) == ["demo_1", "demo_9", "demo_10"]


def _length(source: Hdf5Source) -> int:
    return len(source.read(source.keys()[-1]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_source_travels_to_other_processes(golden, method: str):
    source = Hdf5Source.open(golden("libero"))
    _length(source)  # nothing stays open that a child could inherit
    assert call(multiprocessing.get_context(method), _length, source) == 8
    assert copy.deepcopy(source).keys() == source.keys()


def test_a_file_open_elsewhere_in_this_process_is_still_read(golden):
    path = golden("libero")
    with h5py.File(path, "r"):
        assert len(open_source(path, "hdf5").read("libero.hdf5:demo_1")) == 8
    with h5py.File(path, "r", locking=False):
        assert len(open_source(path, "hdf5").read("libero.hdf5:demo_1")) == 8


def test_without_h5py_the_fix_is_named(golden, monkeypatch: pytest.MonkeyPatch):
    path = golden("aloha")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    assert Hdf5Source.recognises(path)
    with pytest.raises(MachineError) as caught:
        Hdf5Source.open(path)
    assert caught.value.fix == 'pip install "tendon-vla[hdf5]"'


def test_an_episode_description_of_robosuite_15_gives_the_instruction(golden):
    path = golden("robomimic")
    with h5py.File(path, "a") as file:
        file["data/demo_2"].attrs["ep_meta"] = json.dumps({"lang": "lift the cube"})
    source = open_source(path, "hdf5")
    assert [source.read(key).instruction for key in source.keys()] == ["", "lift the cube", ""]


# --- damage: named, the rest still read ---------------------------------------------------------------------------------


def test_files_that_cannot_be_opened_are_named_and_the_others_read(golden, tmp_path: Path):
    good = golden("libero", "set/good_demo.hdf5")
    (tmp_path / "set/cut_demo.hdf5").write_bytes(good.read_bytes()[:-2000])
    (tmp_path / "set/page_demo.hdf5").write_text("<html>404</html>")
    (tmp_path / "set/empty_demo.hdf5").write_bytes(b"")
    with h5py.File(tmp_path / "set/other.hdf5", "w") as file:
        file["episodes/frames"] = np.zeros((3, 2))
        file["notes"] = np.zeros(4, np.float32)
    source = open_source(tmp_path / "set", "hdf5")
    assert source.keys() == ["good_demo.hdf5:demo_0", "good_demo.hdf5:demo_1"]
    told = {Path(error.where).name: error.found for error in source.damage}
    assert set(told) == {"cut_demo.hdf5", "page_demo.hdf5", "empty_demo.hdf5", "other.hdf5"}
    assert "truncated" in told["cut_demo.hdf5"] and "signature" in told["page_demo.hdf5"]
    assert "unknown HDF5 layout" in told["other.hdf5"]
    assert "episodes/ (frames)" in told["other.hdf5"] and "notes float32(4,)" in told["other.hdf5"]
    good.unlink()
    with pytest.raises(DataError, match="4 problems"):
        open_source(tmp_path / "set", "hdf5")


def spoil_libero(path: Path, how: str) -> None:
    with h5py.File(path, "a") as file:
        demo = file["data/demo_0"]
        if how == "short field":
            values = demo["obs/ee_pos"][:-1]
            del demo["obs/ee_pos"]
            demo["obs/ee_pos"] = values
        elif how == "no actions":
            del demo["actions"]
        elif how == "no camera":
            del demo["obs/agentview_rgb"]
        elif how == "another dtype":
            values = demo["actions"][()].astype(np.float32)
            del demo["actions"]
            demo["actions"] = values
        elif how == "another width":
            del demo["obs/gripper_states"]
            demo["obs/gripper_states"] = np.zeros((8, 3))
        elif how == "count":
            demo.attrs["num_samples"] = 9
        elif how == "text":
            del demo["rewards"]
            demo["rewards"] = np.array([b"one"] * 8)
        elif how == "never written":
            del demo["actions"]
            demo.create_dataset("actions", (8, 7), "f8", chunks=(4, 7))[:4] = 1.0
        elif how == "never written, contiguous":
            del demo["actions"]
            demo.create_dataset("actions", (8, 7), "f8")
        elif how == "elsewhere":
            del demo["actions"]
            demo["actions"] = h5py.ExternalLink("/etc/other.hdf5", "actions")
        elif how == "raw bytes elsewhere":
            del demo["actions"]
            demo.create_dataset("actions", (8, 7), "f8", external=[(str(path.with_suffix(".raw")), 0, 448)])
        elif how == "dangling":
            del demo["rewards"]
            demo["rewards"] = h5py.SoftLink("/data/demo_9/rewards")
        elif how == "endless":
            demo["obs/again"] = demo["obs"]
        elif how == "empty":
            for name in ("actions", "rewards", "dones", "states", "robot_states"):
                values = demo[name][:0]
                del demo[name]
                demo[name] = values


@pytest.mark.parametrize(
    ("how", "field", "words"),
    [
        ("short field", "obs/ee_pos", "7 rows"),
        ("no actions", "actions", "no actions"),
        ("no camera", "obs/agentview_rgb", "no such camera"),
        ("another dtype", "actions", "float32"),
        ("another width", "obs/gripper_states", r"\(3,\) per step"),
        ("count", "@num_samples", "8 actions"),
        ("text", "rewards", "not numbers"),
        ("never written", "actions", "1 of 2 chunks were ever written"),
        ("never written, contiguous", "actions", "0 of 448 bytes were ever written"),
        ("elsewhere", "actions", "a link to another file"),
        ("raw bytes elsewhere", "actions", "values kept in other files"),
        ("dangling", "rewards", "."),
        ("endless", "obs/again/again", "groups more than 8 deep"),
        ("empty", "actions", "an episode of 0 steps"),
    ],
)
def test_a_damaged_demonstration_is_named_and_its_neighbour_read(golden, how: str, field: str, words: str):
    path = golden("libero")
    with h5py.File(path, "a") as file:
        file.copy("data/demo_1", "data/demo_2")
        file["data"].attrs.update({"num_demos": 3, "total": 24})
    spoil_libero(path, how)
    source = open_source(path, "hdf5")
    assert len(source.keys()) == 3 and len(source.damage) == (how == "count")  # `total` is off as well
    with pytest.raises(DataError, match=words) as caught:
        source.read("libero.hdf5:demo_0")
    assert "libero.hdf5" in caught.value.where and "demo_0" in caught.value.where and field in str(caught.value)
    assert len(source.read("libero.hdf5:demo_1")) == len(source.read("libero.hdf5:demo_2")) == 8


def test_an_aloha_file_without_a_camera_is_refused_alone(golden, tmp_path: Path):
    for i in (0, 1, 2):
        path = golden("aloha", f"set/episode_{i}.hdf5")
    with h5py.File(tmp_path / "set/episode_0.hdf5", "a") as file:
        del file["observations/images/top"]
    source = open_source(path.parent, "hdf5")
    assert [len(source.read(f"episode_{i}.hdf5")) for i in (1, 2)] == [5, 5]
    with pytest.raises(DataError, match="no such camera"):
        source.read("episode_0.hdf5")
    (tmp_path / "set/episode_2.hdf5").unlink()
    with pytest.raises(DataError, match="unlike them episode_1.hdf5"):
        open_source(path.parent, "hdf5")


def test_tasks_with_other_simulators_behind_them_are_one_dataset(golden, tmp_path: Path):
    for name in ("a_demo", "b_demo"):
        path = golden("libero", f"set/{name}.hdf5")
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            states = demo["states"][()]
            del demo["states"]
            demo["states"] = np.pad(states, ((0, 0), (0, 13)))  # a scene with more joints
    source = open_source(path.parent, "hdf5")
    assert len(source.keys()) == 4 and "states" not in source.info.fields
    assert source.info.attributes["left_out"]["states"].startswith("the simulator's whole state")
    for key in source.keys():
        raw = source.read(key)
        assert set(raw.fields) == set(source.info.fields) and raw.attributes["left_out"] == source.info.attributes["left_out"]
    with h5py.File(path, "a") as file:  # still held against the states
        file["data/demo_0/obs/joint_states"][...] = file["data/demo_0/states"][:, 1:8]
    with pytest.raises(DataError, match="fit the states of the other pairing"):
        source.read("b_demo.hdf5:demo_0")


def test_all_problems_of_a_demonstration_come_at_once(golden):
    path = golden("libero")
    for how in ("short field", "no camera", "count", "never written"):
        spoil_libero(path, how)
    source = open_source(path, "hdf5")
    with pytest.raises(DataError) as caught:
        source.read("libero.hdf5:demo_0")
    assert caught.value.found.startswith("4 problems")
    for words in ("obs/ee_pos: 7 rows", "obs/agentview_rgb: no such camera", "num_samples: 8 actions", "actions: 1 of 2 chunks"):
        assert words in caught.value.found


def test_a_flipped_bit_in_a_compressed_chunk_is_named(golden):
    path = golden("robomimic")
    with h5py.File(path, "a") as file:
        demo = file["data/demo_2"]
        values = demo["actions"][()]
        del demo["actions"]
        stored = demo.create_dataset("actions", data=values, compression="gzip", fletcher32=True)
        chunk = stored.id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset + chunk.size // 2] ^= 0x10
    path.write_bytes(data)
    source = open_source(path, "hdf5")
    with pytest.raises(DataError) as caught:
        source.read("robomimic.hdf5:demo_2")
    assert caught.value.where.endswith("robomimic.hdf5 demo_2 actions")
    assert len(source.read("robomimic.hdf5:demo_1")) == 5


def test_a_missing_filter_is_the_machines_lack_not_the_files(golden, monkeypatch: pytest.MonkeyPatch):
    path = golden("robomimic")
    with h5py.File(path, "a") as file:
        values = file["data/demo_2/actions"][()]
        del file["data/demo_2/actions"]
        file["data/demo_2"].create_dataset("actions", data=values, compression="lzf")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: code != h5py.h5z.FILTER_LZF)
    monkeypatch.setitem(__import__("sys").modules, "hdf5plugin", None)
    source = open_source(path, "hdf5")
    with pytest.raises(MachineError, match="compressed with filter 32000") as caught:
        source.read("robomimic.hdf5:demo_2")
    assert caught.value.fix == "pip install hdf5plugin"


@pytest.mark.parametrize(
    ("how", "words"),
    [("cut", "without its end marker"), ("torn", "broken JPEG"), ("zeros", "0 bytes of JPEG"), ("size", r"a picture of \(8, 8\)"),
     ("lengths", "other JPEG lengths")],
)  # fmt: skip
def test_a_broken_jpeg_is_named_by_frame(golden, how: str, words: str):
    path = golden("aloha_compressed")
    with h5py.File(path, "a") as file:
        rows = file["observations/images/top"]
        row = rows[3]
        end = len(row.tobytes().rstrip(b"\0"))
        if how == "cut":
            row[end // 2 :] = 0
        elif how == "torn":
            row[2:40] = 0x55
        elif how == "zeros":
            row[:] = 0
        elif how == "size":
            import io

            from PIL import Image

            buffer = io.BytesIO()
            Image.new("RGB", (8, 8)).save(buffer, "JPEG")
            row[:] = np.frombuffer(buffer.getvalue().ljust(len(row), b"\0"), np.uint8)
        else:
            file["compress_len"][:, 2] += 1
        rows[3] = row
    source = open_source(path, "hdf5")
    with pytest.raises(DataError, match=words) as caught:
        source.read("aloha_compressed.hdf5")
    assert ("compress_len" if how == "lengths" else "observations/images/top, frame 3") in str(caught.value)


def test_counts_that_do_not_add_up_are_damage(golden):
    path = golden("libero")
    with h5py.File(path, "a") as file:
        del file["data/demo_1"]
        file["mask/valid"] = np.array([b"demo_1", b"demo_0"])
    source = open_source(path, "hdf5")
    assert [error.found for error in source.damage] == ["1 demonstrations", "8 steps"]
    assert source.info.attributes["mask_strangers"] == {"valid": 1}, "said, and no damage: robomimic's own `--n` does that"
    assert source.info.attributes["masks"] == {"valid": ["libero.hdf5:demo_0"]}
    assert len(source.read("libero.hdf5:demo_0")) == 8


def test_files_of_two_datasets_are_not_one(golden, tmp_path: Path):
    golden("robomimic", "mixed/a.hdf5")
    golden("libero", "mixed/b.hdf5")
    with pytest.raises(DataError, match="unlike them b.hdf5") as caught:
        open_source(tmp_path / "mixed", "hdf5")
    assert "vla data convert" in caught.value.fix
    shutil.copy(tmp_path / "mixed/a.hdf5", tmp_path / "mixed/b.hdf5")
    assert len(open_source(tmp_path / "mixed", "hdf5").keys()) == 6
    with h5py.File(tmp_path / "mixed/b.hdf5", "a") as file:
        told = json.loads(file["data"].attrs["env_args"])
        told["env_kwargs"]["control_freq"] = 10
        file["data"].attrs["env_args"] = json.dumps(told)
    with pytest.raises(DataError, match="other control_freq"):
        open_source(tmp_path / "mixed", "hdf5")


def test_arrays_that_are_no_numbers_per_step_are_left_out_by_name(golden):
    path = golden("robomimic")
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            demo["obs/depth"] = np.zeros((5, 16, 16, 1), np.float32)
            demo["obs/point_names"] = np.array([b"a"] * 5)
            demo["intrinsics"] = np.eye(3)
            demo["seed"] = 7
        file["data/demo_3/obs/extra"] = np.zeros((5, 2))
    source = open_source(path, "hdf5")
    assert {"obs/depth", "obs/point_names", "intrinsics", "seed"} < set(source.info.attributes["left_out"])
    assert not {"obs/depth", "obs/point_names", "intrinsics", "seed"} & {*source.info.fields, *source.info.images}
    assert source.read("robomimic.hdf5:demo_3").attributes["left_out"]["obs/extra"] == "not in the dataset's other episodes"


def test_an_empty_folder_and_an_unknown_key(golden, tmp_path: Path):
    with pytest.raises(DataError, match="no .hdf5 or .h5 file"):
        hdf5_module.Hdf5Source.open(tmp_path)
    assert not Hdf5Source.recognises(tmp_path) and not Hdf5Source.recognises(tmp_path / "nothing")
    source = open_source(golden("aloha"), "hdf5")
    with pytest.raises(DataError, match="no such episode"):
        source.read("episode_7.hdf5")
