"""RLDS without TensorFlow: against files that the real tensorflow-datasets wrote, and every way in which files break."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from children import call
from PIL import Image
from rlds_writing import AUDIO, STEP, TEXT, example, framed, image, jpeg, record, tensor, tree, write

from data_tools.sources import RawEpisode, Source, open_source
from data_tools.sources.rlds import RldsSource
from data_tools.sources.tfrecord import crc32c
from vla.errors import DataError

GOLDEN = Path(__file__).parent / "golden" / "rlds"
"""Written and read back by tensorflow 2.21.0 and tensorflow-datasets 4.9.10: benchmarks/foreign/rlds.py."""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Three shards of one, two and one episodes."""
    return write(tmp_path / "toy" / "1.0.0", [[example(record(n)) for n in ns] for ns in ([0], [1, 2], [3])])


def only_damage(source: Source) -> DataError:
    assert len(source.damage) == 1, source.damage
    return source.damage[0]


# --- real foreign bytes ----------------------------------------------------------------------------------------------


def test_every_value_is_what_tensorflow_reads():
    source, known = open_source(GOLDEN), np.load(GOLDEN / "wide.npz")
    assert not source.damage and source.kind == "rlds" and source.root == GOLDEN / "wide" / "1.0.0"
    assert source.keys() == ["train/00000/0", "train/00000/1", "train/00001/0", "val/00000/0", "val/00001/0"]
    read = {name for name in known.files if "/" in name and not name.endswith("/lengths")}
    for split in ("train", "val"):
        raws = [source.read(key) for key in source.keys() if key.startswith(split)]
        assert [len(raw) for raw in raws] == known[f"{split}/lengths"].tolist()
        for path, (dtype, shape) in source.info.fields.items():
            if path == "observation/uneven":
                continue
            together = np.concatenate([raw.fields[path] for raw in raws])
            assert together.dtype == known[f"{split}/{path}"].dtype == dtype and together.shape[1:] == shape
            assert together.tobytes() == known[f"{split}/{path}"].tobytes(), path
            read.discard(f"{split}/{path}")
        for path, (height, width) in source.info.images.items():
            together = np.concatenate([raw.images[path] for raw in raws])
            assert together.shape[1:] == (height, width, 3) and together.dtype == np.uint8
            assert np.array_equal(together, known[f"{split}/{path}"]), path
            read.discard(f"{split}/{path}")
        for path in raws[0].attributes["texts"]:
            texts = [(raw.attributes["texts"][path], len(raw)) for raw in raws]
            lines = [line for text, steps in texts for line in ([text] * steps if isinstance(text, str) else text)]
            assert lines == known[f"{split}/{path}"].tolist()
            read.discard(f"{split}/{path}")
        for path in raws[0].attributes["episode"]:
            assert np.array_equal([raw.attributes["episode"][path] for raw in raws], known[f"{split}//{path}"])
            read.discard(f"{split}//{path}")
    assert not read  # nothing that TensorFlow reads is left


def test_what_the_golden_files_cover():
    source = open_source(GOLDEN / "wide" / "1.0.0")
    assert source.info.fps is None
    assert set(source.info.images) == {"observation/image", "observation/wrist_image", "observation/any_size"}
    assert source.info.images["observation/any_size"] == (16, 8)  # -1 in features.json, looked up
    assert source.info.fields["observation/depth"] == ("uint16", (16, 16, 1))
    assert source.info.fields["observation/depth_metres"] == ("float32", (16, 16, 1))
    assert source.info.fields["observation/sized"] == ("int32", (3, 2))
    assert source.info.fields["observation/pairs"] == ("float32", (3, 2))
    assert source.info.fields["is_first"] == ("bool", ())
    assert source.info.attributes["splits"] == {"train": 3, "val": 2} and source.info.attributes["name"] == "wide"
    raws = {raw.attributes["episode"]["episode_metadata/file_path"]: raw for raw in map(source.read, source.keys())}
    assert raws["raw/0.hdf5"].fields["is_terminal"][-1] and not raws["raw/2.hdf5"].fields["is_terminal"][-1]
    assert raws["raw/2.hdf5"].fields["terminate_episode"][-1].tolist() == [0, 0, 1]
    assert raws["raw/2.hdf5"].instruction == "déplace la tasse à gauche"
    changing = raws["raw/1.hdf5"]
    assert changing.attributes["instruction_changes"] and changing.instruction == changing.attributes["instructions"][0]
    assert len(set(changing.attributes["instructions"])) == 2 and len(changing.attributes["instructions"]) == len(changing)
    assert "instruction_changes" not in raws["raw/0.hdf5"].attributes
    assert "rows of 0 to" in changing.attributes["unread"]["observation/uneven"]  # named, not skipped


def test_jpeg_is_decoded_accurately_and_not_as_tensorflow_does_by_default():
    assert 0 < int(np.load(GOLDEN / "wide.npz")["jpeg_default_differs_by"]) <= 7


# --- damage ----------------------------------------------------------------------------------------------------------


def readable(source: Source) -> tuple[list[str], list[DataError]]:
    good, bad = [], []
    for key in source.keys():
        try:
            assert isinstance(source.read(key), RawEpisode)
            good.append(key)
        except DataError as error:
            bad.append(error)
    return good, bad


def test_a_sound_dataset_has_nothing_to_say(toy: Path):
    source = open_source(toy)
    assert not source.damage and not source.missing
    assert readable(source) == (["train/00000/0", "train/00001/0", "train/00001/1", "train/00002/0"], [])


def test_a_flipped_bit_in_a_real_shard_is_named_with_record_and_offset(tmp_path: Path):
    root = Path(shutil.copytree(GOLDEN / "wide", tmp_path / "wide"))
    file = root / "1.0.0" / "wide-train.tfrecord-00000-of-00002"
    data = bytearray(file.read_bytes())
    offset = 16 + int.from_bytes(data[:8], "little")  # of the second record
    data[offset + 3000] ^= 4
    file.write_bytes(data)
    source = open_source(root)
    good, bad = readable(source)
    assert len(good) == 4 and not source.damage
    assert len(bad) == 1 and bad[0].where == f"{file}, record 1 at byte {offset}" and "crc32c" in bad[0].found


def test_a_truncated_shard_is_named_and_its_lost_records_are_counted(toy: Path):
    file = toy / "toy-train.tfrecord-00001-of-00003"
    file.write_bytes(file.read_bytes()[:-1])
    source = open_source(toy)
    cut = only_damage(source)
    assert str(file) in cut.where and "record 1 at byte" in cut.where and "truncated" in cut.found
    assert cut.found.endswith("; 1 whole records") and cut.expected.startswith("2,") and source.missing == 1
    assert readable(source) == (["train/00000/0", "train/00001/0", "train/00002/0"], [])


def test_a_missing_shard_is_named_and_the_others_keep_their_keys(toy: Path):
    file = toy / "toy-train.tfrecord-00001-of-00003"
    file.unlink()
    source = open_source(toy)
    missing = only_damage(source)
    assert source.missing == 2
    assert missing.where == str(file) and "no such file" in missing.found and "2 episodes" in missing.expected
    assert source.keys() == ["train/00000/0", "train/00002/0"]


@pytest.mark.parametrize("said", [1, 3])
def test_wrong_shard_lengths_are_named(toy: Path, said: int):
    info = json.loads((toy / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"][1] = str(said)
    (toy / "dataset_info.json").write_text(json.dumps(info))
    wrong = only_damage(source := open_source(toy))
    assert source.missing == max(0, said - 2)
    assert wrong.found == "2 whole records" and wrong.expected.startswith(f"{said}, as shardLengths of split 'train'")


def test_a_shard_that_nobody_counts_is_named(toy: Path):
    (toy / "toy-test.tfrecord-00000-of-00001").write_bytes(framed(example(record())))
    assert "no split" in only_damage(open_source(toy)).found


@pytest.mark.parametrize(("data", "what"), [(b"", "0 whole records"), (b"\x1f\x8b" + bytes(30), "gzip"), (b"abc", "truncated")])
def test_files_that_are_no_tfrecords_are_named(toy: Path, data: bytes, what: str):
    (toy / "toy-train.tfrecord-00000-of-00003").write_bytes(data)
    source = open_source(toy)
    assert any(what in error.found for error in source.damage) and len(source.keys()) == 3


def test_a_file_that_shrinks_after_it_was_listed_is_named(toy: Path):
    source = open_source(toy)
    file = toy / "toy-train.tfrecord-00000-of-00003"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="has changed since") as error:
        source.read("train/00000/0")
    assert "record 0 at byte 0" in error.value.where
    with pytest.raises(DataError, match="no episode"):
        source.read("train/00000/9")


# --- values that are not as promised ---------------------------------------------------------------------------------

PNG16 = jpeg(np.zeros((8, 8), np.uint16), "PNG")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps__action": np.zeros(5, np.float32)}, "action: 5 values where 3 steps of (2,)"),
        ({"steps__action": np.zeros(6, np.int64)}, "action: int64 where float32 is promised"),
        ({"steps__action": [b"x"]}, "action: byte strings where"),
        ({"steps__action": None}, "action: no values under 'steps/action'"),
        ({"steps__is_first": np.array([1, 0, 7])}, "is_first: values from 0 to 7 do not fit into bool"),
        ({"steps__is_first": np.array([1, 0])}, "2 steps"),
        ({"steps__observation__image": [b"\xff\xd8rubbish"] * 3}, "observation/image: picture 0: 9 bytes that cannot be decoded"),
        ({"steps__observation__image": [jpeg(np.zeros((8, 9, 3), np.uint8))] * 3}, "8 x 9 pixels where 8 x 8 are promised"),
        ({"steps__observation__image": [jpeg(np.zeros((8, 8, 3), np.uint8))[:-40]] * 3}, "cannot be decoded"),
        ({"steps__observation__image": [PNG16] * 3}, "I;16 samples where uint8 is promised"),
        ({"steps__observation__image": [jpeg(np.zeros((8, 8, 3), np.uint8))] * 2}, "2 values where 3 are promised"),
        ({"steps__observation__image": [b""] * 3}, "0 bytes that cannot be decoded"),
        ({"steps__observation__image": np.zeros(3, np.int64)}, "int64 where byte strings"),
        ({"steps__language_instruction": [b"\xff\xfe"] * 3}, "language_instruction: bytes that are no UTF-8 text"),
        ({"steps__language_instruction": [b"a"] * 2}, "2 values where 3"),
    ],
)
def test_a_record_that_breaks_its_promise_is_refused(tmp_path: Path, change: dict, said: str):
    source = open_source(write(tmp_path / "x", [[example(record(**change))]]))
    with pytest.raises(DataError) as error:
        source.read("train/00000/0")
    assert said in str(error.value) and "record 0 at byte 0" in error.value.where


def test_everything_wrong_with_a_record_is_said_at_once(tmp_path: Path):
    broken = record(steps__action=None, steps__observation__image=[b"x"] * 3)
    source = open_source(write(tmp_path / "x", [[example(broken)]]))
    with pytest.raises(DataError) as error:
        source.read("train/00000/0")
    assert "action:" in error.value.found and "observation/image:" in error.value.found


@pytest.mark.parametrize("payload", [b"", b"\x07", example(record(steps=0))])
def test_a_record_without_an_episode_is_refused(tmp_path: Path, payload: bytes):
    source = open_source(write(tmp_path / "x", [[payload]]))
    with pytest.raises(DataError, match="record 0 at byte 0"):
        source.read("train/00000/0")


def test_features_that_cannot_be_read_are_named(tmp_path: Path):
    steps = {**STEP, "odd": tensor(2, dtype="bfloat16"), "sound": AUDIO, "many": image(8, 8, 2)}
    source = open_source(write(tmp_path / "x", [[example(record())]], tree(steps)))
    assert set(source.info.attributes["unread"]) == {"odd", "sound", "many"}
    assert set(source.read("train/00000/0").fields) == {"action", "is_first", "observation/state"}


def test_an_optional_feature_may_be_absent(tmp_path: Path):
    steps = {**STEP, "force": tensor(3, optional=True)}
    source = open_source(write(tmp_path / "x", [[example(record())]], tree(steps)))
    assert source.read("train/00000/0").attributes["absent"] == ["force"]


@pytest.mark.parametrize(
    ("steps", "episode", "values"),
    [
        ({"observation": {"natural_language_instruction": TEXT}}, {}, {"steps/observation/natural_language_instruction": 3}),
        ({}, {"episode_metadata": {"language_instruction": TEXT}}, {"episode_metadata/language_instruction": 1}),
        ({}, {"language_instruction": TEXT}, {"language_instruction": 1}),
        ({"language_instruction": TEXT, "observation": {"natural_language_instruction": TEXT}}, {},
         {"steps/language_instruction": 0, "steps/observation/natural_language_instruction": 3}),
        ({}, {}, {}),
    ],
)  # fmt: skip
def test_the_instruction_is_found_where_datasets_keep_it(tmp_path: Path, steps: dict, episode: dict, values: dict):
    shape = tree({"is_first": tensor(dtype="bool"), **steps}, **episode)
    features = {"steps/is_first": np.array([1, 0, 0])} | {n: [b"lift it"] * k or [b""] * 3 for n, k in values.items()}
    source = open_source(write(tmp_path / "x", [[example(features)]], shape))
    assert source.read("train/00000/0").instruction == ("lift it" if values else "")


# --- the folder ------------------------------------------------------------------------------------------------------


def test_parents_of_the_version_folder_will_do_while_there_is_one(toy: Path):
    assert open_source(toy.parent).root == open_source(toy.parent.parent).root == toy
    shutil.copytree(toy, toy.parent / "1.1.0")
    assert RldsSource.recognises(toy.parent)
    with pytest.raises(DataError, match="2 datasets or versions"):
        open_source(toy.parent)
    assert open_source(toy.parent / "1.1.0").root.name == "1.1.0"


def test_other_folders_are_not_recognised(tmp_path: Path):
    assert not RldsSource.recognises(tmp_path) and not RldsSource.recognises(tmp_path / "nowhere")
    (tmp_path / "dataset_info.json").write_text("{}")  # Hugging Face's `save_to_disk` writes such a file as well
    assert not RldsSource.recognises(tmp_path)
    with pytest.raises(DataError, match=r"no features\.json or TFRecords"):
        RldsSource.open(tmp_path)


def test_both_descriptions_are_judged_at_once(toy: Path):
    (toy / "dataset_info.json").write_text("{")
    (toy / "features.json").unlink()
    with pytest.raises(DataError) as error:
        open_source(toy)
    assert "dataset_info.json: unreadable" in error.value.found and "features.json: missing" in error.value.found


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("features.json", {"featuresDict": {"features": {"image": image(8, 8, 3)}}}, "its records are not episodes"),
        ("features.json", {"tensor": {}}, "no featuresDict"),
        ("features.json", [], "no JSON object"),
        ("dataset_info.json", {"name": "toy"}, "no splits and shards"),
        ("dataset_info.json", {"name": "toy", "splits": []}, "no splits"),
        ("dataset_info.json", {"name": "toy", "fileFormat": "array_record", "splits": [{"name": "train"}]}, "array_record"),
        ("dataset_info.json", {"name": "../up", "splits": [{"name": "train", "shardLengths": ["1"]}]}, "out of the folder"),
        ("dataset_info.json", {"name": "toy", "splits": [{"name": "train", "shardLengths": ["many"]}]}, "many"),
    ],
)
def test_descriptions_that_say_nothing_are_refused(toy: Path, file: str, content: object, said: str):
    (toy / file).write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        open_source(toy)
    assert said in error.value.found and file in error.value.found


# --- workers ---------------------------------------------------------------------------------------------------------


def _first_two(source) -> list:
    return [source.read(key) for key in source.keys()[:2]]


def test_a_source_travels_to_spawned_workers():
    source = open_source(GOLDEN)
    assert len(pickle.dumps(source)) < 20_000
    far = call(multiprocessing.get_context("spawn"), _first_two, source)
    for raw, key in zip(far, source.keys(), strict=False):
        here = source.read(key)
        assert raw.key == key and np.array_equal(raw.images["observation/image"], here.images["observation/image"])


def test_reading_one_episode_takes_memory_for_one(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    payload = example({"steps/observation/image": [jpeg(noise, "PNG")] * 2})  # about a megabyte
    features = tree({"observation": {"image": image(400, 400, 3)}})
    root = write(tmp_path / "x", [[payload] * 24], features, crc=crc32c)
    size = next(root.glob("*.tfrecord-*")).stat().st_size
    Image.init()
    tracemalloc.start()
    source = open_source(root)
    listed = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    raw = source.read("train/00000/17")
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(raw) == 2 and size > 20e6
    assert listed < 0.5e6, listed
    assert read < 0.3 * size, read
