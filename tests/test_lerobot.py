"""The LeRobot v3.0 writer: the format to the letter, exact statistics, and what a crash leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_datasets import content, make_episode, small_spec, write_dataset

import vla.recording.writer as lerobot
from vla.durable import temporary_name
from vla.episodes import EpisodeStore
from vla.errors import DataError, UsageError
from vla.normalize import QUANTILES
from vla.recording import LeRobotWriter
from vla.recording.statistics import PixelStats, column_stats, constant_stats, ramp_stats
from vla.recording.video import VIDEO, encode, join


def test_what_was_written_is_read_back_exactly(tmp_path: Path):
    made = write_dataset(tmp_path / "ds", 9, cameras=("front", "wrist"))
    store = EpisodeStore.open(tmp_path / "ds", tmp_path / "cache", progress=False)
    assert store.num_episodes == 9 and store.num_frames == sum(map(len, made)) and store.cameras == ["front", "wrist"]
    for e, episode in enumerate(made):
        rows = slice(*store.episode_starts[e : e + 2])
        assert np.array_equal(store.state[rows], episode.state) and np.array_equal(store.action[rows], episode.action)
        assert store.instructions[store.task_of_episode[e]] == episode.instruction
        for camera, frames in episode.images.items():
            for t, frame in enumerate(frames):
                assert np.array_equal(store.frame(camera, rows.start + t), frame), (e, camera, t)
    assert store.recorded_seeds == {"thing-0": [0, 3, 6], "thing-1": [1, 4, 7], "thing-2": [2, 5, 8]}


def test_the_files_are_lerobots(tmp_path: Path):
    """Names, keys, columns and types as in LeRobot's own writer (checked against the package by benchmarks/)."""
    root = tmp_path / "ds"
    made = write_dataset(root, 5)
    files = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert files == {
        "meta/info.json", "meta/stats.json", "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet",
        "data/chunk-000/file-000.parquet", "videos/observation.images.front/chunk-000/file-000.mp4",
        "meta/embodiment.json", "meta/recording.json", "meta/pixels.json",
    }  # fmt: skip
    info = json.loads((root / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["fps"] == 10 and info["splits"] == {"train": "0:5"}
    assert (info["total_episodes"], info["total_tasks"], info["total_frames"]) == (5, 3, sum(map(len, made)))
    assert set(info) == {
        "codebase_version", "fps", "features", "total_episodes", "total_frames", "total_tasks", "chunks_size",
        "data_files_size_in_mb", "video_files_size_in_mb", "data_path", "video_path", "robot_type", "splits",
    }  # fmt: skip
    image = info["features"]["observation.images.front"]
    assert (image["dtype"], image["shape"], image["names"]) == ("video", [32, 32, 3], ["height", "width", "channels"])
    assert image["info"]["video.codec"] == "h264" and image["info"]["video.fps"] == 10
    tasks = pd.read_parquet(root / "meta/tasks.parquet")
    assert tasks.index.name == "task" and tasks.loc["do thing 1", "task_index"] == 1
    data = pq.read_table(root / "data/chunk-000/file-000.parquet")
    types = {field.name: str(field.type) for field in data.schema}
    for vector in (data.schema.field("observation.state").type, data.schema.field("action").type):
        assert str(vector).startswith("fixed_size_list") and vector.list_size == 4 and str(vector.value_type) == "float"
    assert {name: kind for name, kind in types.items() if not kind.startswith("fixed")} == {
        "next.done": "bool", "next.success": "bool",
        "timestamp": "float", "frame_index": "int64", "episode_index": "int64", "index": "int64", "task_index": "int64",
    }  # fmt: skip
    assert data["index"].to_pylist() == list(range(info["total_frames"]))
    rows = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    key, T = "videos/observation.images.front", np.cumsum([0, *map(len, made)])
    for e, row in enumerate(rows):
        assert (row["episode_index"], row["length"], row["tasks"]) == (e, len(made[e]), [made[e].instruction])
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (T[e], T[e + 1])
        assert (row[f"{key}/from_timestamp"], row[f"{key}/to_timestamp"]) == (T[e] / 10, T[e + 1] / 10)
        assert row["data/chunk_index"] == row[f"{key}/file_index"] == row["meta/episodes/file_index"] == 0
        assert np.allclose(row["stats/action/q50"], np.quantile(made[e].action.astype(float), 0.5, axis=0))
        assert np.shape(row["stats/observation.images.front/mean"]) == (3, 1, 1)
        assert row["stats/action/count"] == [len(made[e])] and row["stats/index/min"] == [T[e]]


def test_statistics_are_exact_over_several_commits(tmp_path: Path):
    made = [make_episode(n) for n in range(12)]
    for part in (made[:5], made[5:6], made[6:]):
        with LeRobotWriter(tmp_path / "ds", small_spec()) as writer:
            for episode in part:
                writer.add(episode)
    stats = json.loads((tmp_path / "ds/meta/stats.json").read_text())
    action = np.concatenate([e.action for e in made]).astype(float)
    pixels = np.concatenate([e.images["front"] for e in made]).reshape(-1, 3)
    image = stats["observation.images.front"]
    for name, q in QUANTILES.items():
        assert np.allclose(stats["action"][name], np.quantile(action, q, axis=0), atol=1e-12)
        exact = np.quantile(pixels, q, axis=0, method="inverted_cdf") / 255
        assert np.allclose(np.reshape(image[name], 3), exact, atol=1e-12)
    for name in ("min", "max", "mean", "std"):
        assert np.allclose(stats["action"][name], getattr(action, name)(0), atol=1e-12)
        assert np.allclose(np.reshape(image[name], 3), getattr(pixels / 255, name)(0), atol=1e-9)
    assert stats["action"]["count"] == image["count"] == [len(action)]
    assert stats["task_index"]["max"] == [2] and stats["index"]["max"] == [len(action) - 1]


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_pixel_statistics_equal_numpys(n: int, seed: int):
    rng = np.random.default_rng(seed)
    low, high = sorted(rng.choice(257, 2, replace=False))
    pixels = rng.integers(low, high, (n, 1, 1, 3), dtype=np.uint8)
    half = n // 2
    found = (PixelStats.of(pixels[:half]) + PixelStats.of(pixels[half:])).to_json()
    flat = pixels.reshape(-1, 3) / 255
    for name, q in QUANTILES.items():
        assert np.allclose(np.reshape(found[name], 3), np.quantile(flat, q, axis=0, method="inverted_cdf"), atol=1e-12)
    assert np.allclose(np.reshape(found["std"], 3), flat.std(0), atol=1e-7) and found["count"] == [n]


def test_short_cuts_equal_the_long_way():
    assert constant_stats(3, 7) == column_stats(np.full(7, 3))
    shifted, long = ramp_stats(11, column_stats(np.arange(6))), column_stats(11 + np.arange(6))
    assert shifted.keys() == long.keys() and all(np.allclose(shifted[k], long[k]) for k in long)


def test_files_roll_over_by_size_and_stay_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lerobot, "CHUNK_FILES", 3)
    monkeypatch.setattr(lerobot, "_EPISODES_PER_META_FILE", 4)
    made = [make_episode(n) for n in range(14)]
    for part in (made[:3], made[3:10], made[10:]):
        with LeRobotWriter(tmp_path / "ds", small_spec()) as writer:
            writer.limits = {"data": 1000, "videos": 40_000}
            for episode in part:
                writer.add(episode)
    assert len(list((tmp_path / "ds/data").rglob("*.parquet"))) > 3
    assert len(list((tmp_path / "ds/videos").rglob("*.mp4"))) > 3
    assert (tmp_path / "ds/data/chunk-001/file-000.parquet").is_file()
    assert len(list((tmp_path / "ds/meta/episodes").rglob("*.parquet"))) == 4
    write_dataset(tmp_path / "one", 14)
    assert content(tmp_path / "ds", tmp_path / "cache") == content(tmp_path / "one", tmp_path / "cache")


class Killed(BaseException):
    pass


def half(data: str | bytes | memoryview) -> bytes:
    part = data[: len(data) // 2]
    return part.encode() if isinstance(part, str) else bytes(part)


def test_a_writer_stopped_after_any_file_leaves_a_dataset_that_opens_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second commit is cut short after each of its files in turn."""
    write_dataset(tmp_path / "whole", 6)
    expected, replace = content(tmp_path / "whole", tmp_path / "cache"), lerobot.replace_file
    for allowed in range(9):
        root, left = tmp_path / f"cut{allowed}", allowed
        write_dataset(root, 3)
        spent = 0

        def stop(path: Path, data, safe: str, left: int = left) -> None:
            nonlocal spent
            if spent == left:
                temporary_name(path).write_bytes(half(data))
                raise Killed(str(path))
            spent += 1
            replace(path, data, safe)

        monkeypatch.setattr(lerobot, "replace_file", stop)
        writer = LeRobotWriter(root, small_spec())
        for n in range(3, 6):
            writer.add(make_episode(n))
        try:
            writer.commit()
            assert allowed == 8, "a commit is eight files; fewer are tested than are written"
        except Killed:
            writer._pending = []
        writer.close()
        monkeypatch.setattr(lerobot, "replace_file", replace)
        done = 6 if allowed == 8 else 3
        assert content(root, tmp_path / "cache") == expected[:done], f"after {allowed} files"
        with LeRobotWriter(root, small_spec()) as writer:
            assert writer.num_episodes == done
            assert done == 6 or len(writer.orphans) == 1
            for n in range(done, 6):
                writer.add(make_episode(n))
        assert content(root, tmp_path / "cache") == expected
        stats, whole = (json.loads((r / "meta/stats.json").read_text()) for r in (root, tmp_path / "whole"))
        assert stats == whole


def test_files_nobody_points_to_are_removed_and_named(tmp_path: Path):
    write_dataset(tmp_path / "ds", 2)
    orphan = tmp_path / "ds/data/chunk-000/file-001.parquet"
    orphan.write_bytes(b"half")
    with LeRobotWriter(tmp_path / "ds", small_spec()) as writer:
        assert writer.orphans == ["data/chunk-000/file-001.parquet"] and not orphan.exists()


def test_a_second_writer_and_other_settings_are_refused(tmp_path: Path):
    root = tmp_path / "ds"
    with LeRobotWriter(root, small_spec(), header={"noise": None}) as writer:
        writer.add(make_episode(0))
        with pytest.raises(UsageError, match="another process is recording"):
            LeRobotWriter(root, small_spec(), header={"noise": None})
    with pytest.raises(UsageError, match="noise: None against 3"):
        LeRobotWriter(root, small_spec(), header={"noise": 3})
    with pytest.raises(UsageError, match="cameras"):
        LeRobotWriter(root, small_spec(size=48), header={"noise": None})
    with pytest.raises(UsageError, match="a dataset"):
        LeRobotWriter(root, small_spec(), header={"noise": None}, resume=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("do not touch")
    with pytest.raises(UsageError, match="other things"):
        LeRobotWriter(tmp_path / "other", small_spec())
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    with LeRobotWriter(root, small_spec(), header={"noise": None}) as writer:
        assert writer.num_episodes == 1
        with pytest.raises(DataError, match="wrist"):
            writer.add(make_episode(1, cameras=("wrist",)))


@pytest.mark.parametrize("video", sorted(VIDEO))
def test_joined_clips_decode_as_they_did_alone(video: str, tmp_path: Path):
    """A clip's pixels do not depend on the file it is in, and `lossless` means it."""
    clips = [make_episode(n, size=64).images["front"] // 4 + 60 for n in range(3)]
    with LeRobotWriter(tmp_path / "ds", small_spec(size=64), video=video) as writer:
        for n, frames in enumerate(clips):
            episode = make_episode(n, size=64)
            writer.add(type(episode)({"front": frames}, episode.state, episode.action, "x", "tabletop", True, "x", n))
    store = EpisodeStore.open(tmp_path / "ds", tmp_path / "cache", progress=False)
    for n, frames in enumerate(clips):
        with LeRobotWriter(tmp_path / f"alone{n}", small_spec(size=64), video=video) as writer:
            episode = make_episode(n, size=64)
            writer.add(type(episode)({"front": frames}, episode.state, episode.action, "x", "tabletop", True, "x", n))
        alone = EpisodeStore.open(tmp_path / f"alone{n}", tmp_path / "cache", progress=False)
        for t, frame in enumerate(frames):
            got = store.frame("front", store.episode_starts[n] + t)
            assert np.array_equal(got, alone.frame("front", t))
            assert video != "lossless" or np.array_equal(got, frame)


def test_encoding_is_repeatable_and_a_short_clip_is_not_joined():
    frames = make_episode(0, length=5).images["front"]
    clip = encode(frames, 10)
    assert clip == encode(frames, 10)
    with pytest.raises(ValueError, match="5 frames where 6"):
        join([(clip, 6)], 10)
