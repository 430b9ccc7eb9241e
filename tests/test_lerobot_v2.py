"""LeRobot v2.0 and v2.1: a small dataset written by the real lerobot 0.3.3 (tests/golden/lerobot_v21, made by
benchmarks/foreign/lerobot.py), what we write in that format, and what is wrong with damaged ones."""

from __future__ import annotations

import argparse
import importlib.util
import json
import pickle
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_datasets import content, make_episode, small_spec, write_dataset

import data_tools.lerobot_v21 as writer
from data_tools.clips import cut
from data_tools.convert_v21 import to_v21
from data_tools.lerobot_v21 import modality, write_v21
from data_tools.sources import open_source
from data_tools.sources.lerobot import LeRobotSource
from data_tools.stats import add_stats_parser
from vla.embodiment import load_embodiment
from vla.episodes import EpisodeStore
from vla.episodes.layout import read_layout
from vla.episodes.rows import find_frames, read_rows
from vla.errors import DataError, UsageError
from vla.recording import LeRobotWriter

GOLDEN = Path(__file__).parent / "golden" / "lerobot_v21"
DATA, VIDEO = "data/chunk-000/episode_000001.parquet", "videos/chunk-000/observation.images.wrist/episode_000001.mp4"


@pytest.fixture(scope="module")
def written() -> dict[str, np.ndarray]:
    """What lerobot 0.3.3 was given, and the frames it decodes itself (PyAV)."""
    return dict(np.load(GOLDEN.with_suffix(".npz")))


@pytest.fixture()
def v21(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "v21"))


@pytest.fixture()
def v20(tmp_path: Path, checkout: Path) -> Path:
    """Derived by hand from the v2.1 files, by the format's description; no release that writes v2.0 was run."""
    script = checkout / "benchmarks" / "foreign" / "lerobot.py"
    spec = importlib.util.spec_from_file_location("foreign_lerobot", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.as_v20(GOLDEN, tmp_path / "v20")
    return tmp_path / "v20"


def quietly(root: Path, **kw) -> EpisodeStore:
    return EpisodeStore.open(root, root.parent / "cache", progress=False, **kw)


def edit(path: Path, change) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def same_as(store: EpisodeStore, written: dict[str, np.ndarray]) -> None:
    assert np.array_equal(store.state, written["state"]) and np.array_equal(store.action, written["action"])
    assert [store.instructions[i] for i in store.task_of_frame] == written["task"].tolist()
    assert np.array_equal(np.repeat(np.arange(3), np.diff(store.episode_starts)), written["episode"])
    for camera in store.cameras:
        for i in range(store.num_frames):  # 4:2:0 becomes RGB a little differently in each build of FFmpeg
            assert np.abs(store.frame(camera, i).astype(int) - written[f"frames/{camera}"][i]).mean() < 2


@pytest.mark.parametrize("version", ["v20", "v21"])
def test_the_real_thing_reads_as_it_lies(version: str, written, request: pytest.FixtureRequest):
    root = request.getfixturevalue(version)
    store = quietly(root)
    same_as(store, written)
    assert store.cameras == ["front", "wrist"] and store.spec.name == "probe" and store.spec.control_hz == 20
    assert store.spec.action_names == ["action.a", "action.b"]
    assert store.camera_key("front") == "observation.images.front"


@pytest.mark.parametrize("version", ["v20", "v21"])
def test_quantiles_are_computed_exactly_and_that_is_said(
    version: str, written, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
):
    root = request.getfixturevalue(version)
    store = EpisodeStore.open(root, root.parent / "cache")
    source = "stats.json" if version == "v20" else "episodes_stats.jsonl"
    assert len(store.notes) == 2 and all(source in note and "q01" in note and "computed" in note for note in store.notes)
    assert all(note in capsys.readouterr().err for note in store.notes[:1])
    for key in ("state", "action"):
        entry = store.stats["action" if key == "action" else "observation.state"]
        assert np.allclose(entry["q99"], np.quantile(written[key].astype(np.float64), 0.99, axis=0))
        assert np.allclose(entry["mean"], written[key].mean(0), atol=1e-6)


def test_statistics_per_episode_merge_into_those_of_the_whole(v21: Path, written):
    layout, problems = read_layout(v21, None, need_stats=True)
    problems.raise_if_any()
    column = written["state"].astype(np.float64)
    for name in ("min", "max", "mean", "std"):
        assert np.allclose(layout.stats["observation.state"][name], getattr(column, name)(0), atol=1e-6), name
    assert layout.to_compute == ("observation.state", "action")


def test_without_any_statistics_they_are_computed(v21: Path, written):
    (v21 / "meta/episodes_stats.jsonl").unlink()
    store = quietly(v21)
    assert any("action: no min" in note for note in store.notes)
    assert np.allclose(store.stats["action"]["max"], written["action"].max(0))
    low, high = store.spec.limits("action")
    assert np.allclose(low, written["action"].min(0)) and np.allclose(high, written["action"].max(0)), "limits are measured"


def test_statistics_of_another_dataset_are_refused(v21: Path):
    path = v21 / "meta/episodes_stats.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["stats"]["action"]["max"] = [0.01, 0.01]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match="another dataset's statistics") as caught:
        quietly(v21)
    assert "action[0] of the data spans" in caught.value.found and "episodes_stats.jsonl" in caught.value.where


def test_the_statistics_command_mends_version_2_too(v21: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    test_statistics_of_another_dataset_are_refused(v21)
    monkeypatch.setenv("VLA_CACHE", str(v21.parent / "cache"))
    parser = argparse.ArgumentParser()
    add_stats_parser(parser.add_subparsers())
    args = parser.parse_args(["stats", str(v21), "--json", "--write"])
    assert args.run(args) == 0
    store = quietly(v21)
    assert store.notes == [] and np.allclose(store.stats["action"]["max"], store.action.max(0))


def test_frames_straight_from_the_videos(v21: Path, written):
    same_as(quietly(v21, frames="video"), written)


def refusals(root: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        quietly(root)
    for word in words:
        assert word in str(caught.value)


def test_damage_is_named_file_by_file_and_all_at_once(v21: Path):
    (v21 / DATA).unlink()
    (v21 / VIDEO).write_bytes((v21 / VIDEO).read_bytes()[:900])
    refusals(v21, DATA, "no such file")
    shutil.copy(GOLDEN / DATA, v21 / DATA)
    refusals(v21, VIDEO)
    (v21 / VIDEO).unlink()
    (v21 / VIDEO.replace("wrist", "front")).unlink()
    refusals(v21, VIDEO, VIDEO.replace("wrist", "front"), "2 problems")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.slice(0, len(t) - 1), "as meta/episodes.jsonl says"),
        (lambda t: t.drop_columns(["action"]), "no column action"),
        (lambda t: t.set_column(t.column_names.index("episode_index"), "episode_index", pa.array([7] * len(t))), "episode 1"),
        (lambda t: t.set_column(t.column_names.index("task_index"), "task_index", pa.array([9] * len(t))), "task_index up to 9"),
    ],
)
def test_rows_that_do_not_fit_are_named(v21: Path, change, words: str):
    pq.write_table(change(pq.read_table(v21 / DATA)), v21 / DATA)
    refusals(v21, words)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tasks.jsonl", '{"task_index": 0}', "task_index and task"),
        ("tasks.jsonl", '{"task_index": 1, "task": "x"}\n{"task_index": 2, "task": "y"}', "no task 0"),
        ("episodes.jsonl", '{"episode_index": 0, "tasks": [], "length": 4}', "episodes 0 to 2"),
        ("episodes.jsonl", '{"episode_index": 0,', "line 1"),
        ("episodes_stats.jsonl", '{"episode_index": 0, "stats": {"action": {"min": [1]}}}', "min, max, mean, std and count"),
    ],
)
def test_metadata_that_makes_no_sense_is_named(v21: Path, name: str, text: str, words: str):
    (v21 / "meta" / name).write_text(text)
    refusals(v21, name, words)


@pytest.mark.parametrize("text", ["1", "left"])
@pytest.mark.parametrize("name", ["action", "episode_index", "frame_index"])
def test_a_column_of_text_is_refused_by_name(v21: Path, name: str, text: str):
    table = pq.read_table(v21 / DATA)
    values = [[text] * len(v) if isinstance(v, list) else text for v in table[name].to_pylist()]
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values)), v21 / DATA)
    with pytest.raises(DataError) as caught:
        EpisodeStore.open(v21, v21.parent / "cache", progress=False)
    assert caught.value.where == f"{v21 / DATA}, column {name!r}" and caught.value.expected == "numbers"


def test_a_missing_metadata_file_is_named(v21: Path):
    (v21 / "meta/tasks.jsonl").unlink()
    refusals(v21, "tasks.jsonl", "no such file")


def test_rows_in_another_order_and_an_index_that_begins_anew(v21: Path, written):
    """GR00T's and merged sets: `index` per episode, rows not in order of time."""
    for path in (v21 / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        table = table.set_column(table.column_names.index("index"), "index", table["frame_index"])
        pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), path)
    same_as(quietly(v21), written)


def test_folders_hold_as_many_episodes_as_the_header_says(v21: Path, written):
    edit(v21 / "meta/info.json", lambda info: info | {"chunks_size": 2})
    for path in list(v21.rglob("episode_000002.*")):
        there = Path(str(path).replace("chunk-000", "chunk-001"))
        there.parent.mkdir(parents=True, exist_ok=True)
        path.rename(there)
    same_as(quietly(v21), written)
    edit(v21 / "meta/info.json", lambda info: info | {"chunks_size": 0})
    refusals(v21, "chunks_size 0")


@pytest.fixture()
def pictures(tmp_path: Path) -> Path:
    """Also by lerobot 0.3.3, with PNG pictures inside the Parquet files (`dtype: image`)."""
    return Path(shutil.copytree(GOLDEN.with_name("lerobot_v21_images"), tmp_path / "pictures"))


def test_pictures_inside_the_parquet_files(pictures: Path, tmp_path: Path):
    written = dict(np.load(GOLDEN.with_name("lerobot_v21_images.npz")))
    report = write_v21(pictures, tmp_path / "out", progress=False)
    assert report["clips_copied"] == report["clips_encoded"] == 0
    assert json.loads((tmp_path / "out/meta/info.json").read_text())["video_path"] is None
    for root in (pictures, tmp_path / "out"):
        store, source = quietly(root), open_source(root)
        frames = np.stack([store.frame("wrist", i) for i in range(store.num_frames)])
        assert np.array_equal(frames, written["frames/wrist"]) and np.array_equal(store.action, written["action"])
        assert np.array_equal(source.read("episode_000001").images["observation.images.wrist"], frames[3:])


def test_a_damaged_picture_is_named(pictures: Path):
    path = pictures / DATA
    table = pq.read_table(path)
    values = table["observation.images.wrist"].to_pylist()
    values[1]["bytes"] = b"no picture"
    at = table.column_names.index("observation.images.wrist")
    pq.write_table(table.set_column(at, "observation.images.wrist", pa.array(values)), path)
    with pytest.raises(DataError) as caught:
        open_source(pictures).read("episode_000001")
    assert DATA in caught.value.where and "observation.images.wrist, row 1" in caught.value.where


# As a source of conversion.


@pytest.mark.parametrize("version", ["v20", "v21"])
def test_the_source_gives_every_number_and_picture(version: str, written, request: pytest.FixtureRequest):
    root = request.getfixturevalue(version)
    source = open_source(root)
    assert source.kind == {"v20": "lerobot-v2.0", "v21": "lerobot-v2.1"}[version] and source.damage == []
    assert source.info.fps == 20 and source.info.images["observation.images.wrist"] == (32, 32)
    episodes = [source.read(key) for key in source.keys()]
    for field, name in (("observation.state", "state"), ("action", "action"), ("next.reward", "reward")):
        got = np.concatenate([e.fields[field] for e in episodes])
        assert np.array_equal(got, written[name]), field
    assert episodes[0].fields["action"].dtype == (np.float64 if version == "v20" else np.float32), "the file's own dtype"
    assert [e.instruction for e in episodes for _ in range(len(e))] == written["task"].tolist()
    pictures = np.concatenate([e.images["observation.images.front"] for e in episodes])
    assert np.abs(pictures.astype(int) - written["frames/front"]).mean() < 2


def test_the_source_reads_v30_and_what_its_recorder_knew(tmp_path: Path):
    made = write_dataset(tmp_path / "ds", 5, cameras=("front", "wrist"))
    source = open_source(tmp_path / "ds")
    assert isinstance(source, LeRobotSource) and source.kind == "lerobot-v3.0"
    assert source.info.attributes["embodiment"]["name"] == "tabletop"
    for key, episode in zip(source.keys(), made, strict=True):
        raw = source.read(key)
        assert np.array_equal(raw.images["observation.images.wrist"], episode.images["wrist"])
        assert np.array_equal(raw.fields["action"], episode.action) and raw.instruction == episode.instruction
        assert raw.attributes == {"task": episode.task, "seed": episode.seed}


def test_a_large_file_is_read_episode_by_episode(v30: Path, monkeypatch: pytest.MonkeyPatch):
    whole = [open_source(v30).read(key) for key in open_source(v30).keys()]
    monkeypatch.setattr("data_tools.sources.lerobot._HELD_BYTES", 0)
    source = open_source(v30)
    for key, raw in zip(source.keys(), whole, strict=True):
        again = source.read(key)
        assert all(np.array_equal(again.fields[name], values) for name, values in raw.fields.items())


def test_a_source_travels_to_other_processes(v30: Path):
    source = open_source(v30)
    first = source.read("episode_000002")
    data = pickle.dumps(source)
    assert len(data) < 20_000, "names, not rows"
    again = pickle.loads(data).read("episode_000002")
    assert np.array_equal(again.images["observation.images.front"], first.images["observation.images.front"])


def test_columns_that_are_no_numbers_are_named(v30: Path, tmp_path: Path):
    path = v30 / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("note", pa.array(["hm"] * len(table))), path)
    note = {"note": {"dtype": "string", "shape": [1], "names": None}}
    edit(v30 / "meta/info.json", lambda info: info | {"features": info["features"] | note})
    assert open_source(v30).info.attributes["left_out"] == ["note"]
    assert write_v21(v30, tmp_path / "out", progress=False)["left_out"] == ["note"]
    assert "note" not in json.loads((tmp_path / "out/meta/info.json").read_text())["features"]


def test_a_damaged_episode_of_a_source_is_named_and_the_others_read(v21: Path):
    (v21 / VIDEO).write_bytes(b"\0" * 500)
    (v21 / DATA.replace("01.parquet", "02.parquet")).unlink()
    source = open_source(v21)
    keys = source.keys()
    assert len(source.read(keys[0])) == 4
    for key, name in ((keys[1], VIDEO), (keys[2], "episode_000002.parquet")):
        with pytest.raises(DataError) as caught:
            source.read(key)
        assert name in caught.value.where


def test_gaps_in_a_column_are_an_error(v21: Path):
    table = pq.read_table(v21 / DATA)
    values = table["action"].to_pylist()
    values[1] = None
    pq.write_table(table.set_column(table.column_names.index("action"), "action", pa.array(values, pa.list_(pa.float32()))),
                   v21 / DATA)  # fmt: skip
    source = open_source(v21)
    with pytest.raises(DataError, match="null"):
        source.read(source.keys()[1])
    with pytest.raises(DataError, match="null"):
        quietly(v21)


# Writing v2.1.


@pytest.fixture()
def v30(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "v30", 5, cameras=("front", "wrist"))
    return tmp_path / "v30"


def test_what_we_write_is_the_same_dataset(v30: Path, tmp_path: Path):
    report = write_v21(v30, tmp_path / "out", progress=False)
    assert report["episodes"] == 5 and report["clips_copied"] == 10 and report["clips_encoded"] == 0
    assert content(tmp_path / "out", tmp_path / "cache") == content(v30, tmp_path / "cache")
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    assert info["codebase_version"] == "v2.1" and info["total_videos"] == 10 and info["splits"] == {"train": "0:5"}
    assert info["features"]["observation.images.front"]["info"]["video.pix_fmt"] == "gbrp"
    store = quietly(tmp_path / "out")
    assert store.spec == small_spec(("front", "wrist")) and store.recorded_seeds, "the robot and the seeds travel along"
    line = json.loads((tmp_path / "out/meta/episodes_stats.jsonl").read_text().splitlines()[3])
    assert line["episode_index"] == 3 and set(line["stats"]["action"]) == {"min", "max", "mean", "std", "count"}
    assert np.allclose(line["stats"]["action"]["max"], make_episode(3, cameras=("front", "wrist")).action.max(0))
    pixels = make_episode(3, cameras=("front", "wrist")).images["front"] / 255
    assert np.shape(line["stats"]["observation.images.front"]["mean"]) == (3, 1, 1)
    assert np.allclose(np.reshape(line["stats"]["observation.images.front"]["mean"], 3), pixels.mean((0, 1, 2)))
    assert not (tmp_path / "out/meta/parts").exists()


def test_splits_travel_with_the_episodes(v30: Path, tmp_path: Path):
    path = v30 / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"splits": {"train": "0:2,3:4", "val": "2:3,4:9"}}))
    write_v21(v30, tmp_path / "out", progress=False)
    for root in (v30, tmp_path / "out"):
        source = open_source(root)
        assert [source.read(key).attributes.get("split") for key in source.keys()] == [None, None, "val", None, "val"]


def test_the_copy_is_held_against_every_column_of_its_source(v30: Path, tmp_path: Path):
    to_v21(v30, tmp_path / "out", workers=0, verify=False, progress=False)
    lacking = tmp_path / "out/meta/info.json"
    info = json.loads(lacking.read_text())
    del info["features"]["next.done"]
    lacking.write_text(json.dumps(info))
    _, proof = to_v21(v30, tmp_path / "out", workers=0, verify=True, progress=False)
    assert proof and {d["found"] for d in proof["differences"]} == {"no such column"} and len(proof["differences"]) == 5


def test_modality_for_groot(v30: Path, tmp_path: Path):
    write_v21(v30, tmp_path / "out", progress=False)
    described = json.loads((tmp_path / "out/meta/modality.json").read_text())
    robot = load_embodiment("tabletop")
    assert described == modality(robot, {c: f"observation.images.{c}" for c in ("front", "wrist")})
    at = 0
    for channel in robot.action:
        assert described["action"][channel.name] == {"start": at, "end": at + len(channel.dims)}
        at += len(channel.dims)
    assert described["video"]["wrist"] == {"original_key": "observation.images.wrist"}
    assert described["annotation"] == {"human.task_description": {"original_key": "task_index"}}


def test_two_processes_write_what_one_does(v30: Path, tmp_path: Path):
    write_v21(v30, tmp_path / "one", progress=False)
    write_v21(v30, tmp_path / "two", workers=2, progress=False)
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*") if p.is_file())
    for name in names:
        if name.name != "source.json":  # names its folder
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_an_interrupted_writing_goes_on(v30: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, write = tmp_path / "out", writer._write_episode
    done: list[int] = []

    def until_the_third(source, where, job, start):
        if job.episode == 3 and not done.count(-1):
            done.append(-1)
            raise KeyboardInterrupt
        done.append(job.episode)
        return write(source, where, job, start)

    monkeypatch.setattr(writer, "_write_episode", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        write_v21(v30, out, progress=False)
    assert not (out / "meta/info.json").exists(), "not a dataset yet"
    (out / "data/chunk-000/.episode_000003.parquet.tmp-1").write_bytes(b"half")
    report = write_v21(v30, out, progress=False)
    assert done == [0, 1, 2, -1, 3, 4] and report["resumed"] == 3
    assert not list(out.rglob(".*"))
    assert content(out, tmp_path / "cache") == content(v30, tmp_path / "cache")
    again = write_v21(v30, out, progress=False)
    assert len(done) == 6 and again["resumed"] == 5 and again["clips_copied"] == 10


def test_a_folder_of_other_things_is_left_alone(v30: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="other things"):
        write_v21(v30, tmp_path / "out", progress=False)
    write_v21(v30, tmp_path / "good", progress=False)
    write_dataset(tmp_path / "longer", 6)
    with pytest.raises(UsageError, match="another dataset"):
        write_v21(tmp_path / "longer", tmp_path / "good", progress=False)


def test_a_damaged_source_is_refused_before_anything_is_written(v21: Path, tmp_path: Path):
    (v21 / VIDEO).unlink()
    with pytest.raises(DataError, match="episode_000001.mp4"):
        write_v21(v21, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_real_files_survive_a_round_trip(v21: Path, written, tmp_path: Path):
    report = write_v21(v21, tmp_path / "out", progress=False)
    assert report["clips_copied"] == 6
    same_as(quietly(tmp_path / "out"), written)
    assert content(tmp_path / "out", tmp_path / "cache") == content(v21, tmp_path / "cache")


def _shared_video(root: Path, keyframes: int, bframes: int) -> Path:
    """A v3.0 dataset of 3 smooth episodes whose shared video has a keyframe only every `keyframes` frames."""
    with LeRobotWriter(root, small_spec(), video="yuv420p") as out:
        for n in range(3):
            episode = make_episode(n, length=7)
            y, x = np.mgrid[0:32, 0:32]
            for t, frame in enumerate(episode.images["front"]):
                frame[:] = np.stack([(x * 3 + t * 9) % 256, (y * 5 + n * 31) % 256, x + y], -1)
            out.add(episode)
    path = next(root.rglob("*.mp4"))
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(path), "w", format="mp4") as container:
        options = {"g": str(keyframes), "bf": str(bframes), "sc_threshold": "0", "crf": "20"}
        stream = container.add_stream("libx264", rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return root


@pytest.mark.parametrize(("keyframes", "bframes", "encoded"), [(7, 0, []), (7, 2, None), (100, 0, [1, 2]), (100, 2, [1, 2])])
def test_clips_are_cut_where_that_is_exact_and_encoded_anew_where_not(tmp_path: Path, keyframes, bframes, encoded):
    root = _shared_video(tmp_path / "v30", keyframes, bframes)
    report = write_v21(root, tmp_path / "out", progress=False)
    if encoded is not None:
        assert report["encoded_episodes"] == encoded and report["clips_encoded"] == len(encoded)
    assert report["clips_copied"] + report["clips_encoded"] == 3
    assert content(tmp_path / "out", tmp_path / "cache") == content(root, tmp_path / "cache"), "every pixel the same"


def test_a_clip_cut_from_a_damaged_video_is_an_error(tmp_path: Path):
    root = _shared_video(tmp_path / "v30", 100, 0)
    layout, problems = read_layout(root, None, need_stats=False)
    rows = read_rows(layout, problems)
    assert rows is not None
    spans = find_frames(layout, rows, "front", problems)
    problems.raise_if_any()
    data = bytearray(spans[2].path.read_bytes())
    with av.open(str(spans[2].path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    at = packets[16].pos or 0
    data[at : at + 40] = b"\xff" * 40
    spans[2].path.write_bytes(data)
    with pytest.raises(DataError, match="file-000.mp4"):
        cut(spans[2])
