"""Bad data and full disks: every error names place, found, expected and fix; nothing is written, nothing is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from children import LIMIT
from hypothesis import given
from hypothesis import strategies as st
from small_datasets import content, make_episode, small_spec, write_dataset

from data_tools.record import record
from vla.embodiment import Channel, load_embodiment
from vla.episodes import EpisodeStore
from vla.errors import DataError, MachineError, VLAError
from vla.recording import LeRobotWriter

DATA, META, VIDEO = (
    "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet",
    "videos/observation.images.front/chunk-000/file-000.mp4",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "ds"
    write_dataset(root, 6, cameras=("front", "wrist"))
    return root


@pytest.fixture()
def root(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "ds"))


def refused(root: Path, kind: type[VLAError] = DataError, **kw) -> VLAError:
    """Opening `root` fails with all four parts said, and neither dataset nor cache is touched."""
    cache = root.parent / "cache"
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    with pytest.raises(kind) as caught:
        EpisodeStore.open(root, cache, progress=False, **kw)
    error = caught.value
    assert error.where and error.found and error.expected and error.fix
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    entries = [p for p in cache.iterdir() if p.name != "hashes" and p.suffix != ".lock"] if cache.exists() else []
    assert not entries, f"written on failure: {entries}"
    return error


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def edit_info(root: Path, **changes) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_dataset(tmp_path: Path):
    error = refused(tmp_path / "nowhere")
    assert "no such folder" in error.found and str(tmp_path / "nowhere") in error.where and error.exit_code == 3


def test_another_format_or_version(root: Path):
    for version, words in (("v1.6", "lerobot"), ("v4.0", "a version of tendon-vla that reads it")):
        edit_info(root, codebase_version=version)
        error = refused(root)
        assert version in error.found and "v2.0, v2.1 or v3.0" in error.expected and words in error.fix
    (root / "meta/info.json").unlink()
    (root / "meta/episodes.jsonl").write_text("{}")
    error = refused(root)
    assert "of LeRobot v2" in error.found and "restore meta/info.json" in error.fix
    (root / "meta/episodes.jsonl").rename(root / "dataset_info.json")
    assert "RLDS" in refused(root).found
    (root / "meta/info.json").write_text('{"codebase_version": ')
    assert "info.json" in refused(root).where


@pytest.mark.parametrize("name", [DATA, META, "meta/tasks.parquet"])
@pytest.mark.parametrize("keep", [0.0, 0.6])
def test_truncated_parquet_is_named(root: Path, name: str, keep: float):
    cut(root / name, keep)
    assert name in refused(root).where


@pytest.mark.parametrize("name", [DATA, VIDEO, "meta/tasks.parquet"])
def test_missing_file_is_named(root: Path, name: str):
    (root / name).unlink()
    error = refused(root)
    assert name in error.where and ("no such file" in error.found or "No such file" in error.found)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_video_is_named(root: Path, keep: float):
    cut(root / VIDEO, keep)
    assert VIDEO in refused(root).where


def test_a_video_that_opens_but_ends_early(root: Path, tmp_path: Path):
    """Fewer frames than rows: the file of a dataset with one episode less."""
    write_dataset(tmp_path / "short", 5, cameras=("front", "wrist"))
    shutil.copy(tmp_path / "short" / VIDEO, root / VIDEO)
    error = refused(root)
    frames = sum(len(make_episode(n)) for n in range(6))
    assert VIDEO in error.where and "[5]" in error.found and str(frames) in error.expected


def test_a_video_of_another_rate(root: Path):
    edit_info(root, fps=20)
    error = refused(root)
    assert "episode 0, frame 0" in error.where and "0.1 s" in error.found and "20 fps" in error.expected


def test_a_video_whose_middle_is_garbage(root: Path):
    """The index is intact, so this shows only when decoding; still nothing may be left behind."""
    data = bytearray((root / VIDEO).read_bytes())
    middle = slice(len(data) // 3, len(data) // 2)
    data[middle] = np.random.default_rng(0).bytes(middle.stop - middle.start)
    (root / VIDEO).write_bytes(data)
    assert VIDEO in refused(root).where


@pytest.fixture(scope="module", params=["noise", "lossless", "yuv420p"])
def filmed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, kept exactly; or smooth moving pictures, kept exactly or as a foreign dataset has them, without our hashes."""
    root = tmp_path_factory.mktemp(request.param) / "ds"
    with LeRobotWriter(root, small_spec(), video="yuv420p" if request.param == "yuv420p" else "lossless") as writer:
        for n in range(6):
            episode = make_episode(n)
            y, x = np.mgrid[0:32, 0:32]
            for t, frame in enumerate(episode.images["front"] if request.param != "noise" else []):
                frame[:] = np.stack([(x * 3 + t * 9) % 256, (y * 5 + n * 31) % 256, x + y], -1)
            writer.add(episode)
    hashed = ["pixels" in entry for entry in json.loads((root / "meta/recording.json").read_text())["episodes"]]
    assert hashed == [request.param != "yuv420p"] * 6
    return root


def test_a_video_damaged_anywhere_is_refused_or_decodes_exactly(filmed: Path, tmp_path: Path):
    """FFmpeg paints over damage and says nothing unless it is asked, and of lossless pictures it notices only half."""
    rng, refusals = np.random.default_rng(1), 0
    expected = content(filmed, tmp_path / "cache")
    for n in range(40):
        root = Path(shutil.copytree(filmed, tmp_path / f"ds{n}"))
        data = bytearray((root / VIDEO).read_bytes())
        at = int(rng.integers(len(data)))
        damage = rng.bytes(min(int(rng.integers(1, 64)), len(data) - at))
        data[at : at + len(damage)] = damage
        (root / VIDEO).write_bytes(data)
        try:
            assert content(root, tmp_path / "cache") == expected
        except DataError as error:
            refusals += 1
            assert VIDEO in str(error)
    assert refusals > 10


def test_hashes_of_other_pixels_name_the_episode(root: Path):
    path = root / "meta/recording.json"
    recording = json.loads(path.read_text())
    recording["episodes"][3]["pixels"]["wrist"] = "0" * 64
    path.write_text(json.dumps(recording))
    error = refused(root)
    assert "episode 3, camera 'wrist'" in error.where and "other pixels" in error.found and "0" * 64 in error.expected


@pytest.mark.parametrize("broken", [1, [[]], [{"seed": 1}], [{"seed": "1", "task": "a"}], [{"seed": None, "pixels": "x"}]])
def test_a_recording_that_is_none(root: Path, broken: Any):
    path = root / "meta/recording.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"episodes": broken}))
    assert "recording.json" in refused(root).where


def test_missing_camera_and_wrong_dimensions_come_together(root: Path):
    """A robot with another camera, one more action dimension and one state dimension less: one error, all three."""
    robot = load_embodiment("tabletop")
    more = Channel(name="wheel", dims=("turn",), convention="scalar", unit="1", low=(-1,), high=(1,))
    other = robot.model_copy(update={
        "cameras": {"overhead": robot.cameras["front"]}, "action": (*robot.action, more), "state": robot.state[:1],
    })  # fmt: skip
    text = str(refused(root, embodiment=other))
    assert "camera 'overhead' missing; the dataset has ['front', 'wrist']" in text
    assert "action has 4 dimensions" in text and "wheel.turn" in text and "observation.state has 4 dimensions" in text
    assert text.startswith(str(root)) and "3 problems" in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_in_actions_is_named_by_episode_frame_and_dimension(root: Path, value: float):
    table = pq.read_table(root / DATA)
    actions = np.array(table["action"].to_pylist(), np.float32)
    start = sum(len(make_episode(n)) for n in range(4))
    actions[start + 2, 1] = value
    column = pa.FixedSizeListArray.from_arrays(pa.array(actions.reshape(-1)), 4)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), root / DATA)
    error = refused(root)
    assert "episode 4, frame 2, action[1] (eef.dy)" in str(error) and str(value) in str(error)


def test_an_action_that_changed_on_the_disk_is_refused(root: Path):
    """One flipped bit of one number; pages carry checksums."""
    row_group = pq.read_metadata(root / DATA).row_group(0)
    chunk = next(c for c in map(row_group.column, range(row_group.num_columns)) if c.path_in_schema.startswith("action"))
    data = bytearray((root / DATA).read_bytes())
    data[chunk.data_page_offset + 100] ^= 1
    (root / DATA).write_bytes(data)
    assert DATA in refused(root).where


def test_missing_or_foreign_statistics(root: Path):
    path = root / "meta/stats.json"
    stats = json.loads(path.read_text())
    for broken, words in (
        ({k: v for k, v in stats.items() if k != "action"}, "action: no min"),
        (stats | {"action": {k: v[:3] for k, v in stats["action"].items()}}, "3 dimensions, the data 4"),
    ):
        path.write_text(json.dumps(broken))
        error = refused(root)
        assert words in error.found and f"vla data stats {root} --write" in error.fix
    path.write_text(json.dumps(stats | {"action": stats["action"] | {"max": [0.1] * 4}}))
    error = refused(root)
    assert "action[0] of the data spans" in error.found and "0.1" in error.expected
    # Without quantiles nothing is lost: the rows hold them. They are computed, and that is said.
    path.write_text(json.dumps(stats | {"action": {k: v for k, v in stats["action"].items() if k[0] != "q"}}))
    store = EpisodeStore.open(root, root.parent / "other", progress=False)
    assert any("action: no q01, q10" in note and "computed" in note for note in store.notes)
    assert np.allclose(store.stats["action"]["q01"], stats["action"]["q01"])
    path.unlink()
    assert "no such file" in refused(root).found


def test_rows_that_do_not_add_up(root: Path):
    table = pq.read_table(root / DATA)
    pq.write_table(table.slice(0, len(table) - 2), root / DATA)
    error = refused(root)
    assert "first episode that differs: 5" in error.found


def test_every_problem_is_reported_at_once(root: Path):
    cut(root / VIDEO, 0.5)
    (root / VIDEO.replace("front", "wrist")).unlink()
    (root / "meta/stats.json").unlink()
    text = str(refused(root))
    assert "3 problems" in text
    for words in (VIDEO, VIDEO.replace("front", "wrist"), "stats.json", "no such file", "vla data stats"):
        assert words in text


@given(st.integers(0, 2**32 - 1))
def test_any_broken_file_is_an_error_or_harmless(whole: Path, tmp_path_factory: pytest.TempPathFactory, seed: int):
    """Cut or overwrite any file of ours anywhere: a `VLAError`, or a dataset that still opens; never another exception."""
    rng = np.random.default_rng(seed)
    root = Path(shutil.copytree(whole, tmp_path_factory.mktemp("fuzz") / "ds"))
    files = sorted(p for p in root.rglob("*") if p.is_file())
    path = files[rng.integers(len(files))]
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        data = data[: rng.integers(len(data))]
    else:
        at = int(rng.integers(len(data)))
        data[at : at + int(rng.integers(1, 200))] = rng.bytes(int(rng.integers(0, 200)))
    path.write_bytes(data)
    try:
        found = content(root, root.parent / "cache")
        assert path.suffix != ".mp4" or found == content(whole, whole.parent / "cache"), "wrong frames, and nobody said so"
    except VLAError as error:
        assert error.found and error.fix
    finally:
        shutil.rmtree(root.parent)


_FULL = """
import json, resource, sys
sys.path[:0] = {paths!r}
from small_datasets import ToySim
from data_tools.record import record
import vla.recording.writer as lerobot
from vla.errors import MachineError
lerobot._COMMIT_SECONDS, lerobot._COMMIT_SHARE = 0.0, 0.0  # commit after every episode
if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    try:
        record("tabletop", ["touch-red"], 40, 0, sys.argv[1], workers=0, image_size=32, progress=False, make=ToySim)
    except MachineError as error:
        print(json.dumps([error.where, error.found, error.expected, error.fix, error.exit_code]))
"""


def test_disk_full_while_recording_keeps_every_committed_episode(tmp_path: Path):
    """No file may grow past a limit, so some commit fails; the last good one opens, and with room it goes on."""
    from small_datasets import ToySim

    script, out = tmp_path / "run.py", tmp_path / "ds"
    script.write_text(_FULL.format(paths=[str(Path(__file__).parents[1]), *sys.path]))
    toy: dict[str, Any] = dict(workers=0, image_size=32, progress=False, make=ToySim)
    record("tabletop", ["touch-red"], 5, 0, tmp_path / "five", **toy)
    limit = max(p.stat().st_size for p in (tmp_path / "five").rglob("*") if p.is_file()) + 500
    done = subprocess.run([sys.executable, script, out, str(limit)], capture_output=True, text=True, check=True, timeout=LIMIT)
    where, found, expected, fix, code = json.loads(done.stdout)
    kept = json.loads((out / "meta/info.json").read_text())["total_episodes"]
    assert 0 < kept < 40 and code == 5
    assert str(out) in where and f"{kept} episodes are safe" in found and "room" in expected and "free" in fix
    assert not [p for p in out.rglob("*.tmp-*")]
    record("tabletop", ["touch-red"], 40, 0, tmp_path / "whole", **toy)
    whole = content(tmp_path / "whole", tmp_path / "cache")
    assert content(out, tmp_path / "cache") == whole[:kept]
    record("tabletop", ["touch-red"], 40, 0, out, **toy)
    assert content(out, tmp_path / "cache") == whole


def test_disk_full_while_decoding_leaves_no_cache(root: Path, monkeypatch: pytest.MonkeyPatch):
    import vla.episodes.cache as cache

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "save", full)
    with pytest.raises(MachineError) as caught:
        EpisodeStore.open(root, root.parent / "cache", progress=False)
    assert "No space left" in caught.value.found and "VLA_CACHE" in caught.value.fix
    assert not [p for p in (root.parent / "cache").iterdir() if p.is_dir() and p.name != "hashes"]


def test_nan_is_refused_when_recording_too(tmp_path: Path):
    episode = make_episode(1)
    episode.action[1, 2] = np.nan
    with LeRobotWriter(tmp_path / "ds", small_spec()) as writer:
        writer.add(make_episode(0))
        with pytest.raises(DataError, match=r"action\[1, 2\]"):
            writer.add(episode)
    assert len(content(tmp_path / "ds", tmp_path / "cache")) == 1


def test_a_recording_stopped_before_its_first_commit_says_so(tmp_path):
    """What a SIGKILL in the first seconds leaves: a dataset of 0 episodes, which is no dataset to train on yet."""
    from data_tools.record import record

    record("tabletop", ["touch-red"], 1, 0, tmp_path / "d", workers=0, progress=False)
    info = json.loads((tmp_path / "d/meta/info.json").read_text())
    (tmp_path / "d/meta/info.json").write_text(json.dumps(info | {"total_episodes": 0, "total_frames": 0, "splits": {}}))
    for path in [*(tmp_path / "d/data").rglob("*.parquet"), *(tmp_path / "d/meta/episodes").rglob("*.parquet")]:
        path.unlink()
    with pytest.raises(DataError, match="0 episodes"):
        EpisodeStore.open(tmp_path / "d", cache_dir=tmp_path / "c", progress=False)


@pytest.mark.parametrize(
    ("key", "value"), [("fps", 0), ("fps", "ten"), ("fps", None), ("data_path", "{nope}"), ("video_path", "{0}/{")]
)
def test_a_header_that_makes_no_sense_is_named(tmp_path, key, value):
    record("tabletop", ["touch-red"], 1, 0, tmp_path / "d", workers=0, progress=False)
    path = tmp_path / "d/meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DataError, match=key):
        EpisodeStore.open(tmp_path / "d", cache_dir=tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()
