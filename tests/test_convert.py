"""Conversion: the same whatever the workers do, interruptible at any moment, honest about damage, and proven."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from children import LIMIT
from small_datasets import content
from toy_source import ToySource, write_toy

import data_tools.convert as conversion
import vla.recording.writer as lerobot
from data_tools.check import check
from data_tools.convert import convert
from data_tools.convert_pool import Job
from data_tools.convert_report import sentence
from data_tools.sources import RawEpisode
from data_tools.standardise import Card, card_for
from vla.cli import main
from vla.episodes import EpisodeStore
from vla.errors import DataError, UsageError
from vla.recording.video import join

ROWS = "data/chunk-000/file-000.parquet"


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "open_source", lambda path, kind=None: ToySource(path))


@pytest.fixture()
def src(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "src", 9)


def run(src: Path, out: Path, **kw: Any) -> dict[str, Any]:
    return convert(src, out, **{"workers": 0, "progress": False, **kw})


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "meta/conversion.json").read_text())


def test_every_value_arrives_and_the_proof_is_written_down(src: Path, tmp_path: Path):
    summary = run(src, tmp_path / "ds")
    source, store = ToySource(src), EpisodeStore.open(tmp_path / "ds", tmp_path / "cache", progress=False)
    assert store.num_episodes == 9 and sorted(store.cameras) == ["front", "wrist"]
    for e, key in enumerate(source.keys()):
        raw, rows = source.read(key), slice(*store.episode_starts[e : e + 2])
        assert np.array_equal(store.action[rows], raw.fields["actions"].astype(np.float32))
        assert np.array_equal(store.state[rows], raw.fields["obs/place"])
        assert store.instructions[store.task_of_episode[e]] == raw.instruction
        for camera in store.cameras:
            for t, frame in enumerate(raw.images[f"obs/{camera}"]):
                assert np.array_equal(store.frame(camera, rows.start + t), frame)
    said, pictures = report(tmp_path / "ds"), 2 * store.num_frames
    assert said["complete"] is True and said["pictures_not_carried"] == [] and said["rounded"] == ["actions"]
    assert "identical as float32 (1 float64 field rounded: actions); instructions identical;" in sentence(summary)
    assert said["verified"] == {"episodes": 9, "pictures": pictures, "pictures_identical": True, "worst_psnr": None,
                                "psnr_limit": None, "differences": []} == summary["verified"]  # fmt: skip
    assert said["not_carried"] == ["obs/flag", "rewards"] and not said["quarantined"] and not said["damaged_files"]
    recorded = json.loads((tmp_path / "ds/meta/recording.json").read_text())
    assert [episode["source"] for episode in recorded["episodes"]] == source.keys()
    assert str(tmp_path) not in json.dumps(recorded) + json.dumps(said), "a dataset must not carry the places it was made in"


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_dataset(src: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch):
    # On a slow machine time decides where the writer commits, and a film that grew in two steps has other bytes (and pictures
    # that are the same): here it does not.
    monkeypatch.setattr("vla.recording.writer._COMMIT_SECONDS", 1e9)
    (src / "ep-004").write_text("damaged")
    run(src, tmp_path / "here")
    run(src, tmp_path / "there", workers=workers)
    names = {p.relative_to(tmp_path / "here") for p in (tmp_path / "here").rglob("*") if p.is_file()}
    assert names == {p.relative_to(tmp_path / "there") for p in (tmp_path / "there").rglob("*") if p.is_file()}
    differing = [n for n in names if (tmp_path / "here" / n).read_bytes() != (tmp_path / "there" / n).read_bytes()]
    assert set(differing) <= {Path("meta/pixels.json")}  # the writer's memory of its last two commits, which time decides


@pytest.mark.parametrize("video", ["rgb", "yuv420p"])
def test_lossy_video_is_verified_by_its_distance(src: Path, tmp_path: Path, video: str):
    proof = run(src, tmp_path / "ds", video=video)["verified"]
    assert not proof["pictures_identical"] and proof["psnr_limit"] < 35 < proof["worst_psnr"] < 60


# ---- damage ----


@pytest.mark.parametrize("text", ["damaged", "crash", "999"])
def test_damaged_episodes_are_named_and_left_out(src: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture):
    for name in ("ep-000", "ep-006"):
        (src / name).write_text(text)
    assert main(["data", "convert", str(src), str(tmp_path / "ds"), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "WARNING: damaged episodes left out: 2" in out and "ep-000" in out and "ep-006" in out
    found = report(tmp_path / "ds")["quarantined"]
    words = {"damaged": "a flipped bit", "crash": "ValueError: invalid literal", "999": "(48, 48, 3)"}
    assert [f["key"] for f in found] == ["ep-000", "ep-006"] and all(words[text] in f["found"] for f in found)
    recorded = json.loads((tmp_path / "ds/meta/recording.json").read_text())["episodes"]
    assert [e["source"] for e in recorded] == [f"ep-{n:03d}" for n in (1, 2, 3, 4, 5, 7, 8)]
    assert report(tmp_path / "ds")["verified"]["episodes"] == len(content(tmp_path / "ds", tmp_path / "cache")) == 7


def test_a_reader_is_asked_for_what_the_card_takes_and_nothing_else(src: Path):
    asked: list[Any] = []

    class Asked(ToySource):
        def read(self, key: str, only: Any = None) -> RawEpisode:
            asked.append(only)
            return super().read(key, only)

    source = Asked(src)
    card = card_for(source)
    Job(source, card, 10, "lossless").read("ep-000")
    assert asked == [{"actions", "obs/place", "obs/front", "obs/wrist", "next.success"}] and "rewards" in source.info.fields


def test_strict_stops_at_the_first_damage_and_names_it(src: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (src / "ep-006").write_text("damaged")
    assert main(["data", "convert", str(src), str(tmp_path / "ds"), "--workers", "0", "--strict", "--json"]) == 3
    err = capsys.readouterr().err
    assert "ep-006" in err and "flipped bit" in err and "--strict" in err
    assert report(tmp_path / "ds")["complete"] is False
    (finding,) = [f for f in check(tmp_path / "ds") if f.code == "unfinished-conversion"]
    assert finding.severity == "error" and f"vla data convert SRC {tmp_path / 'ds'} where SRC" in finding.fix
    run(src, tmp_path / "ds")
    assert not [f for f in check(tmp_path / "ds") if f.code == "unfinished-conversion"]


def test_damage_in_the_listing(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversion, "open_source", lambda path, kind=None: ToySource(path, unlisted=2))
    with pytest.raises(DataError, match="shard-1") as caught:
        run(src, tmp_path / "ds", strict=True)
    assert "2 damaged files" in caught.value.found and not (tmp_path / "ds").exists()
    summary = run(src, tmp_path / "ds")
    assert [d["where"].rsplit("/", 1)[1] for d in summary["damaged_files"]] == ["shard-0", "shard-1"]
    assert "files that cannot be listed: 2" in sentence(summary)


def test_more_ruins_than_data_are_refused(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for n in range(4):
        (src / f"ep-{n:03d}").write_text("damaged")
    assert run(src, tmp_path / "four")["episodes"] == 5
    (src / "ep-008").write_text("damaged")
    with pytest.raises(DataError, match="5 of 9 damaged") as caught:
        run(src, tmp_path / "five")
    assert all(f"ep-{n:03d}" in caught.value.found for n in (0, 1, 2, 3, 8))
    monkeypatch.setattr(conversion, "open_source", lambda path, kind=None: ToySource(path, unlisted=10))
    with pytest.raises(DataError, match="10 of 19 damaged"):
        run(src, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_lost_episodes_count_each_and_not_their_file(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One shard that is missing may be most of a dataset."""

    def lost(count: int) -> None:
        monkeypatch.setattr(conversion, "open_source", lambda path, kind=None: ToySource(path, unlisted=1, missing=count))

    lost(10)
    with pytest.raises(DataError, match="10 of 19 damaged"):
        run(src, tmp_path / "most")
    with pytest.raises(DataError, match="10 of 19 damaged"):
        run(src, tmp_path / "part", episodes="0:2")
    lost(8)
    summary = run(src, tmp_path / "some", episodes="0:2")
    assert summary["episodes"] == 2 and any(note.startswith("8 episodes that the source promises") for note in summary["notes"])
    (src / "ep-003").write_text("damaged")
    assert run(src, tmp_path / "part", episodes="2:5")["episodes"] == 2, "a chosen part is judged by itself"
    (src / "ep-004").write_text("damaged")
    with pytest.raises(DataError, match="2 of 3 damaged"):
        run(src, tmp_path / "ruined part", episodes="2:5")
    with pytest.raises(DataError, match="9 of 17 damaged"):
        run(src, tmp_path / "ruined whole")


# ---- proof ----


def rewritten(path: Path, column: str, values: pa.Array) -> None:
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(column), column, values), path)


def planted_action(root: Path) -> None:
    table = pq.read_table(root / ROWS)
    flat = table["action"].combine_chunks().flatten().to_numpy().copy()
    flat[50] = np.nextafter(flat[50], np.float32(9))  # the smallest difference there is
    rewritten(root / ROWS, "action", pa.FixedSizeListArray.from_arrays(pa.array(flat), 4))


def planted_state(root: Path) -> None:
    table = pq.read_table(root / ROWS)
    flat = table["observation.state"].combine_chunks().flatten().to_numpy().copy()
    flat[7] = -flat[7]
    rewritten(root / ROWS, "observation.state", pa.FixedSizeListArray.from_arrays(pa.array(flat), 3))


def planted_time(root: Path) -> None:
    values = pq.read_table(root / ROWS)["timestamp"].to_numpy().copy()
    values[3] += 0.01
    rewritten(root / ROWS, "timestamp", pa.array(values))


def planted_task(root: Path) -> None:
    values = pq.read_table(root / ROWS)["task_index"].to_numpy().copy()
    values[:4] = 2
    rewritten(root / ROWS, "task_index", pa.array(values))


def planted_picture(root: Path) -> None:
    """Cameras swapped: both are whole videos of the right length."""
    front, wrist = (root / f"videos/observation.images.{c}/chunk-000/file-000.mp4" for c in ("front", "wrist"))
    one, two = front.read_bytes(), wrist.read_bytes()
    front.write_bytes(two)
    wrist.write_bytes(one)


def planted_cut(root: Path) -> None:
    """A video that ends two pictures early."""
    path = root / "videos/observation.images.front/chunk-000/file-000.mp4"
    frames = json.loads((root / "meta/info.json").read_text())["total_frames"]
    path.write_bytes(bytes(join([(path.read_bytes(), frames - 2)], 10)))


@pytest.mark.parametrize(
    ("plant", "word"),
    [(planted_action, "action[12, 2]"), (planted_state, "observation.state[2, 1]"), (planted_time, "timestamp[3"),
     (planted_task, "task_index"), (planted_picture, "camera 'front'"), (planted_cut, "no whole frame")],
)  # fmt: skip
@pytest.mark.parametrize("video", ["lossless", "rgb"])
def test_a_planted_difference_is_found(plant, word: str, video: str, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    verify = conversion.verify_episodes

    def tampered(pool, root: Path, *rest):
        plant(root)
        return verify(pool, root, *rest)

    if word == "action[12, 2]":  # rows are counted within their episode
        T, at = [4 + n % 5 for n in range(9)], 12
        while at >= T[0]:
            at -= T.pop(0)
        word = f"action[{at}, 2]"
    monkeypatch.setattr(conversion, "verify_episodes", tampered)
    with pytest.raises(DataError) as caught:
        run(src, tmp_path / "ds", video=video)
    said = report(tmp_path / "ds")["verified"]
    assert word in caught.value.found and not said["pictures_identical"]
    assert any(word.split("[")[0] in f"{d['where']} {d['found']}" for d in said["differences"])


def test_pictures_late_by_one_are_found_though_they_look_alike(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Lossy video: each picture is close to its neighbour too, so distance alone would not tell."""
    encode = conversion.encode_episode

    def late(episode, *rest):
        images = {c: np.concatenate([f[:1], f[:-1]]) for c, f in episode.images.items()}
        return encode(type(episode)(images, *list(vars(episode).values())[1:]), *rest)

    monkeypatch.setattr(conversion, "encode_episode", late)
    monkeypatch.setattr("data_tools.verify.PSNR_LIMIT", {"rgb": 5.0})
    with pytest.raises(DataError, match="nearer to the one before"):
        run(src, tmp_path / "ds", video="rgb")


def test_unverified_is_said(src: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["data", "convert", str(src), str(tmp_path / "ds"), "--workers", "0", "--no-verify"]) == 0
    assert "NOT verified" in capsys.readouterr().out and report(tmp_path / "ds")["verified"] is None


# ---- interruption ----

_CONVERT = """
import sys
sys.path[:0] = {paths!r}
import data_tools.convert as conversion
import vla.recording.writer as lerobot
from toy_source import ToySource
lerobot._COMMIT_SECONDS, lerobot._COMMIT_SHARE = 0.05, 0.5
conversion.open_source = lambda path, kind=None: ToySource(path, delay=0.15)
if __name__ == "__main__":
    conversion.convert(sys.argv[1], sys.argv[2], workers={workers}, progress=False)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_in_the_middle_and_run_again_equals_never_killed(tmp_path: Path, workers: int):
    src = write_toy(tmp_path / "src", 24)
    for name in ("ep-001", "ep-013"):
        (src / name).write_text("damaged")
    run(src, tmp_path / "whole")
    expected = content(tmp_path / "whole", tmp_path / "cache")
    script, out, info = tmp_path / "run.py", tmp_path / "ds", tmp_path / "ds/meta/info.json"
    script.write_text(_CONVERT.format(paths=[str(Path(__file__).parent), *sys.path], workers=workers))
    process = subprocess.Popen([sys.executable, script, src, out], stderr=subprocess.DEVNULL)
    while process.poll() is None and (json.loads(info.read_text())["total_episodes"] if info.exists() else 0) < 1:
        time.sleep(0.005)
    process.kill()
    process.wait(60)
    stopped = json.loads(info.read_text())["total_episodes"]
    assert 0 < stopped < 22 and report(out)["complete"] is False
    assert content(out, tmp_path / "cache") == expected[:stopped]
    summary = run(src, out)
    assert summary["converted_now"] == 22 - stopped and [q["key"] for q in summary["quarantined"]] == ["ep-001", "ep-013"]
    assert content(out, tmp_path / "cache") == expected
    for name in ("stats.json", "recording.json", "conversion.json", "tasks.parquet"):
        assert (out / "meta" / name).read_bytes() == (tmp_path / "whole/meta" / name).read_bytes(), name
    assert run(src, out)["converted_now"] == 0


def test_v21_that_was_finished_is_not_made_again(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = run(src, tmp_path / "ds", to="lerobot-v2.1")
    monkeypatch.setattr(lerobot, "_COMMIT_SECONDS", 0.0)  # commits would fall elsewhere
    again = run(src, tmp_path / "ds", to="lerobot-v2.1")
    assert again["converted_now"] == 0 and again["verified"] == first["verified"] and again["episodes"] == 9
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine").write_text("mine")
    with pytest.raises(UsageError, match="other things"):
        run(src, tmp_path / "other", to="lerobot-v2.1")
    assert not list(tmp_path.glob(".*")), "refused before anything is written"


def test_ctrl_c_keeps_what_was_read(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    read = ToySource.read

    def stopped(self, key: str, only=None):
        if key == "ep-005":
            raise KeyboardInterrupt
        return read(self, key)

    monkeypatch.setattr(ToySource, "read", stopped)
    line = ["data", "convert", str(src), str(tmp_path / "ds"), "--workers", "0"]
    assert main(line) == 130 and "Run the same command again" in capsys.readouterr().err
    assert len(content(tmp_path / "ds", tmp_path / "cache")) == 5
    monkeypatch.setattr(ToySource, "read", read)
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["converted_now"] == 4


def test_another_card_source_or_setting_is_refused(src: Path, tmp_path: Path):
    run(src, tmp_path / "ds", episodes="0:4")
    before = {p: p.read_bytes() for p in (tmp_path / "ds").rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match="card"):
        run(src, tmp_path / "ds", episodes="0:4", card=Card(name="src", instruction={"text": "something else"}))  # pyright: ignore
    with pytest.raises(UsageError, match="selected: 0:4 against 0:5"):
        run(src, tmp_path / "ds", episodes="0:5")
    with pytest.raises(UsageError, match="video"):
        run(src, tmp_path / "ds", episodes="0:4", video="rgb")
    write_toy(src, 10)
    with pytest.raises(UsageError, match="source_listing_sha256"):
        run(src, tmp_path / "ds", episodes="0:4")
    assert before == {p: p.read_bytes() for p in (tmp_path / "ds").rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--episodes", "3"], "A:B"), (["--episodes", "90:"], "no episodes"), (["--workers", "-1"], "--workers"),
     (["--card", "no-such-card"], "no-such-card"), (["--fps", "12"], "10")],
)  # fmt: skip
def test_nonsense_is_refused_before_anything_is_written(
    flags: list[str], words: str, src: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert main(["data", "convert", str(src), str(tmp_path / "ds"), "--workers", "0", *flags]) in (2, 3)
    assert words in capsys.readouterr().err and not (tmp_path / "ds").exists()
    assert main(["data", "convert", str(src), str(src / "inside"), "--workers", "0"]) == 2
    assert not (src / "inside").exists()


_FULL = """
import resource, sys
sys.path[:0] = {paths!r}
import data_tools.convert as conversion
import vla.recording.writer as lerobot
from toy_source import ToySource
from vla.cli import main
lerobot._COMMIT_SECONDS, lerobot._COMMIT_SHARE = 0.0, 0.0  # commit after every episode
conversion.open_source = lambda path, kind=None: ToySource(path, noise=True)
if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
    sys.exit(main(["data", "convert", sys.argv[1], sys.argv[2], "--workers", "0", "--json"]))
"""


def test_a_full_disk_is_named_and_keeps_what_was_committed(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script, out = tmp_path / "run.py", tmp_path / "ds"
    script.write_text(_FULL.format(paths=[str(Path(__file__).parent), *sys.path]))
    monkeypatch.setattr(conversion, "open_source", lambda path, kind=None: ToySource(path, noise=True))
    run(src, tmp_path / "whole")
    limit = max(p.stat().st_size for p in (tmp_path / "whole").rglob("*") if p.is_file()) * 2 // 3
    done = subprocess.run([sys.executable, script, src, out, str(limit)], capture_output=True, text=True, timeout=LIMIT)
    kept = json.loads((out / "meta/info.json").read_text())["total_episodes"]
    assert done.returncode == 5 and f"{kept} episodes are safe" in done.stderr and 0 < kept < 9
    expected = content(tmp_path / "whole", tmp_path / "cache")
    assert content(out, tmp_path / "cache") == expected[:kept]
    assert run(src, out)["converted_now"] == 9 - kept and content(out, tmp_path / "cache") == expected


# ---- memory ----


def test_what_the_writer_holds_does_not_grow_with_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files that are full are neither held nor written again."""
    src = write_toy(tmp_path / "src", 16)
    monkeypatch.setattr(lerobot, "_COMMIT_BYTES", 0)
    written: list[str] = []
    replace = lerobot.replace_file
    monkeypatch.setattr(lerobot, "replace_file", lambda path, *rest: (written.append(path.name), replace(path, *rest))[1])
    held = []

    class Small(lerobot.LeRobotWriter):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            self.limits = {"data": 2000, "videos": 10_000}

        def commit(self):
            written.clear()
            super().commit()
            held.append((sum(e.nbytes for e in self._done.open_data), len(written)))

    monkeypatch.setattr(conversion, "LeRobotWriter", Small)
    run(src, tmp_path / "ds")
    assert len(list((tmp_path / "ds/data").rglob("*.parquet"))) > 3
    assert len(list((tmp_path / "ds/videos").rglob("*.mp4"))) > 6
    assert len(held) >= 16 and max(size for size, _ in held) <= 2000 and max(files for _, files in held) <= 9
