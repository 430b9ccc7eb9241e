"""Files that the real tools wrote (tests/golden) through the whole of `vla data convert`, held against what those tools say."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_tools.sources import open_source
from data_tools.sources.lerobot import LeRobotSource
from vla.cli import main
from vla.episodes import EpisodeStore

GOLDEN = Path(__file__).parent / "golden"


def converted(src: Path, out: Path, capsys: pytest.CaptureFixture, *flags: str) -> dict[str, Any]:
    assert main(["data", "convert", str(src), str(out), "--workers", "0", "--json", *flags]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["verified"]["pictures_identical"] and not summary["quarantined"] and not summary["damaged_files"]
    return summary


def pictures(store: EpisodeStore, camera: str) -> np.ndarray:
    return np.stack([store.frame(camera, index) for index in range(store.num_frames)])


def test_lerobot_v21_becomes_v30_with_the_values_lerobot_reads(tmp_path: Path, capsys: pytest.CaptureFixture):
    summary = converted(GOLDEN / "lerobot_v21", tmp_path / "ds", capsys)
    assert summary["not_carried"] == ["next.reward"] and summary["source_kind"] == "lerobot-v2.1"
    store = EpisodeStore.open(tmp_path / "ds", tmp_path / "cache", progress=False)
    with np.load(GOLDEN / "lerobot_v21.npz") as wanted:
        assert np.array_equal(store.state, wanted["state"]) and np.array_equal(store.action, wanted["action"])
        assert [store.instructions[t] for t in store.task_of_frame] == wanted["task"].tolist()
        assert np.array_equal(np.repeat(np.arange(store.num_episodes), np.diff(store.episode_starts)), wanted["episode"])


@pytest.mark.parametrize("way", ["straight", "through v3.0"])
def test_v21_is_written_back_with_the_same_numbers_and_pictures(way: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    flags = [] if way == "straight" else ["--episodes", "0:3"]
    summary = converted(GOLDEN / "lerobot_v21", tmp_path / "ds", capsys, "--to", "lerobot-v2.1", *flags)
    source, copy = LeRobotSource(GOLDEN / "lerobot_v21"), LeRobotSource(tmp_path / "ds")
    assert copy.kind == summary["format"] == "lerobot-v2.1" and copy.keys() == source.keys() and len(copy.keys()) == 3
    for key in source.keys():
        one, two = source.read(key), copy.read(key)
        assert one.instruction == two.instruction
        for name in ("action", "observation.state", "timestamp"):
            assert one.fields[name].dtype == two.fields[name].dtype and np.array_equal(one.fields[name], two.fields[name])
        assert one.images.keys() == two.images.keys()
        assert all(np.array_equal(one.images[name], two.images[name]) for name in one.images)
    assert ("next.reward" in copy.info.fields) == (way == "straight")
    assert [p.name for p in tmp_path.iterdir()] == ["ds"], "the v3.0 dataset on the way is gone"


def test_rlds_becomes_v30_with_the_values_tensorflow_datasets_reads(tmp_path: Path, capsys: pytest.CaptureFixture):
    src = GOLDEN / "rlds" / "wide"
    assert main(["data", "convert", str(src), str(tmp_path / "ds"), "--workers", "0"]) == 2
    assert "--fps" in capsys.readouterr().err, "the format has no control rate, and nobody guesses one"
    summary = converted(src, tmp_path / "ds", capsys, "--fps", "5")
    assert summary["source_name"] == "wide", "not the folder of its version"
    assert "observation/depth" in summary["not_carried"] and any("midway" in note for note in summary["notes"])
    assert summary["splits"] == {"train": "0:3", "val": "3:5"} and any("val" in note for note in summary["notes"])
    assert converted(src, tmp_path / "ds", capsys, "--fps", "5")["notes"] == summary["notes"], "also when there was nothing to do"
    assert json.loads((tmp_path / "ds/meta/info.json").read_text())["splits"] == summary["splits"]
    store = EpisodeStore.open(tmp_path / "ds", tmp_path / "cache", progress=False)
    with np.load(GOLDEN / "rlds" / "wide.npz") as wanted:
        solved = [*wanted["train//episode_metadata/success"], *wanted["val//episode_metadata/success"]]
        flags = pq.read_table(tmp_path / "ds/data/chunk-000/file-000.parquet")["next.success"].to_numpy()
        assert [bool(flags[stop - 1]) for stop in store.episode_starts[1:]] == solved and flags.sum() == sum(solved)
        both = {key: np.concatenate([wanted[f"train/{key}"], wanted[f"val/{key}"]]) for key in (
            "action", "observation/state", "observation/image", "observation/wrist_image")}  # fmt: skip
        assert np.diff(store.episode_starts).tolist() == [*wanted["train/lengths"], *wanted["val/lengths"]]
    assert np.array_equal(store.action, both["action"])
    at = store.spec.state_names.index("state.d0")
    assert np.array_equal(store.state[:, at : at + 8], both["observation/state"])
    assert np.array_equal(pictures(store, "wrist_image"), both["observation/wrist_image"])


def test_a_rate_does_not_hide_that_the_card_of_that_name_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture):
    shutil.copytree(GOLDEN / "rlds" / "wide", tmp_path / "bridge_orig")
    assert main(["data", "convert", str(tmp_path / "bridge_orig"), str(tmp_path / "ds"), "--workers", "0", "--fps", "5"]) == 2
    assert "card 'bridge_orig'" in capsys.readouterr().err


def test_pictures_of_a_v21_copy_are_stored_as_asked(tmp_path: Path):
    flags = ["--to", "lerobot-v2.1", "--video", "rgb", "--workers", "0", "--json"]
    assert main(["data", "convert", str(GOLDEN / "lerobot_v21"), str(tmp_path / "ds"), *flags]) == 0
    features = json.loads((tmp_path / "ds/meta/info.json").read_text())["features"]
    assert {f["info"]["video.pix_fmt"] for f in features.values() if f["dtype"] == "video"} == {"gbrp"}


@pytest.mark.parametrize("name", ["libero", "libero_replayed", "robomimic", "aloha", "aloha_compressed"])
def test_hdf5_becomes_v30(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("h5py", reason="h5py is not installed (pip install 'tendon-vla[hdf5]')")
    src = tmp_path / "src" / f"{name}.hdf5"
    src.parent.mkdir()
    src.write_bytes(gzip.decompress((GOLDEN / "hdf5" / f"{name}.hdf5.gz").read_bytes()))
    words = [] if name.startswith("libero") else ["--instruction", "lift the cube"]
    if words:
        assert main(["data", "convert", str(src), str(tmp_path / "silent"), "--workers", "0"]) == 3
        assert "--instruction" in capsys.readouterr().err
    summary = converted(src, tmp_path / "ds", capsys, *words)
    source, store = open_source(src), EpisodeStore.open(tmp_path / "ds", tmp_path / "cache", progress=False)
    assert store.num_episodes == len(source.keys()) == summary["episodes"]
    for e, key in enumerate(source.keys()):
        raw, rows = source.read(key), slice(*store.episode_starts[e : e + 2])
        # Seen after the action: the first action and the last picture have no partner.
        after = raw.attributes.get("pairing", source.info.attributes["pairing"]) == "observation_after_action"
        path = "action" if name.startswith("aloha") else "actions"
        kept = raw.fields[path][1:] if after else raw.fields[path]
        assert len(kept) == rows.stop - rows.start
        if name.startswith("aloha"):
            assert np.array_equal(store.action[rows], kept.astype(np.float32))
        else:
            assert np.array_equal(store.action[rows][:, :6], kept[:, :6].astype(np.float32))
        if words:
            assert store.instructions == ["lift the cube"]
        camera = next(iter(store.cameras))
        seen = [frames for frames in raw.images.values()]
        first = store.frame(camera, rows.start)
        assert any(np.array_equal(first, turned) for frames in seen for turned in (frames[0], frames[0][::-1]))


@pytest.mark.parametrize(
    ("name", "wanted"), [("rlds/wide", "action"), ("lerobot_v21", "action"), ("hdf5/aloha.hdf5.gz", "action")]
)
def test_every_reader_can_be_asked_for_a_part(name: str, wanted: str, tmp_path: Path):
    path = GOLDEN / name
    if path.suffix == ".gz":
        pytest.importorskip("h5py", reason="h5py is not installed (pip install 'tendon-vla[hdf5]')")
        path = tmp_path / path.stem
        path.write_bytes(gzip.decompress((GOLDEN / name).read_bytes()))
    source = open_source(path)
    whole, part = source.read(source.keys()[0]), source.read(source.keys()[0], only={wanted})
    assert np.array_equal(part.fields[wanted], whole.fields[wanted]) and part.instruction == whole.instruction
    assert part.fields.keys() <= whole.fields.keys() and part.images.keys() <= whole.images.keys()


def flipped(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    path.write_bytes(data)


def cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def damage_rlds(root: Path, how: str) -> str:
    shard = root / "1.0.0" / "wide-train.tfrecord-00001-of-00002"
    assert shard.is_file()
    shard.unlink() if how == "missing" else flipped(shard, 0.5) if how == "flipped" else cut(shard, 0.6)
    return shard.name


def damage_lerobot(root: Path, how: str) -> str:
    video = root / "videos/chunk-000/observation.images.wrist/episode_000001.mp4"
    rows = root / "data/chunk-000/episode_000001.parquet"
    if how == "missing":
        video.unlink()
    else:
        flipped(rows, 0.3) if how == "flipped" else cut(rows, 0.6)
    return (video if how == "missing" else rows).name


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize(("name", "damage"), [("rlds/wide", damage_rlds), ("lerobot_v21", damage_lerobot)])
def test_damaged_files_are_named_left_out_and_refused_when_strict(
    name: str, damage: Any, how: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    src = Path(shutil.copytree(GOLDEN / name, tmp_path / "src"))
    whole = len(open_source(src).keys())
    word, flags = damage(src, how), ["--workers", "0", *(["--fps", "5"] if name.startswith("rlds") else [])]
    assert main(["data", "convert", str(src), str(tmp_path / "strict"), "--strict", *flags]) == 3
    assert word in capsys.readouterr().err
    assert main(["data", "convert", str(src), str(tmp_path / "ds"), "--json", *flags]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    findings = summary["damaged_files"] + summary["quarantined"]
    assert findings and any(word in f"{f['where']} {f['found']}" for f in findings)
    assert summary["episodes"] == whole - 1 == summary["verified"]["episodes"] and summary["verified"]["pictures_identical"]


def test_a_truncated_hdf5_file_among_whole_ones_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("h5py", reason="h5py is not installed (pip install 'tendon-vla[hdf5]')")
    src = tmp_path / "src"
    src.mkdir()
    data = gzip.decompress((GOLDEN / "hdf5" / "aloha.hdf5.gz").read_bytes())
    for n in range(3):
        (src / f"episode_{n}.hdf5").write_bytes(data if n != 1 else data[: len(data) // 2])
    line = ["data", "convert", str(src), str(tmp_path / "ds"), "--workers", "0", "--instruction", "lift", "--json"]
    assert main([*line, "--strict"]) == 3 and "episode_1.hdf5" in capsys.readouterr().err
    assert not (tmp_path / "ds").exists()
    assert main(line) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["episodes"] == 2 and "episode_1.hdf5" in json.dumps(summary["damaged_files"] + summary["quarantined"])
