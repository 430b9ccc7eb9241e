"""What every reader of foreign data owes: damage is named with its file, and nothing outside the dataset is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted import DATA, EPISODES, VIDEO, edit_json
from small_datasets import make_episode, small_spec, write_dataset

from data_tools.sources import open_source
from vla.cli import main
from vla.errors import DataError
from vla.recording import LeRobotWriter

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recorded") / "ds"
    write_dataset(root)
    return root


@pytest.fixture()
def ours(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "ds"))


def refusals(root: Path) -> list[str]:
    """What the source says of each episode that it does not give."""
    source, said = open_source(root), []
    for key in source.keys():
        try:
            source.read(key)
        except DataError as error:
            said.append(str(error))
    return said


# ---- pixels as they were recorded ----


def test_a_flipped_bit_in_our_own_video_is_named_though_it_decodes(ours: Path):
    """One bit of one picture: most such videos decode to the end, into another picture."""
    assert refusals(ours) == []
    wanted = [open_source(ours).read(f"episode_{n:06d}").images["observation.images.front"] for n in range(6)]
    whole, other_pixels = (ours / VIDEO).read_bytes(), 0
    for at in np.linspace(whole.index(b"mdat") + 100, len(whole) - 1, 12).astype(int):
        data = bytearray(whole)
        data[at] ^= 0x10
        (ours / VIDEO).write_bytes(data)
        source = open_source(ours)
        for key, frames in zip(source.keys(), wanted, strict=True):
            try:
                assert np.array_equal(source.read(key).images["observation.images.front"], frames)
            except DataError as error:
                assert VIDEO in str(error)
                other_pixels += "other pixels than were recorded" in error.found
    assert other_pixels


def test_pictures_are_held_against_the_recorded_hash(ours: Path):
    path = ours / "meta" / "recording.json"
    recording = json.loads(path.read_text())
    recording["episodes"][2]["pixels"]["front"] = "0" * 64
    path.write_text(json.dumps(recording))
    (said,) = refusals(ours)
    assert "file-000.mp4, episode 2" in said and "other pixels" in said


# ---- damaged files ----


@pytest.mark.parametrize("left", [0, 30, 500])
def test_a_video_of_thirty_bytes_is_named_for_every_episode(left: int, ours: Path):
    (ours / VIDEO).write_bytes((ours / VIDEO).read_bytes()[:left])
    said = refusals(ours)
    assert len(said) == 6 and all(VIDEO in text for text in said)


def test_a_word_that_is_no_utf8_names_its_file(ours: Path):
    table = pq.read_table(ours / EPISODES)
    name = next(f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_list(f.type))
    at, words = table.column_names.index(name), pa.array([b"\xff\xfe"] * len(table), pa.binary())
    pq.write_table(table.set_column(at, name, pa.Array.from_buffers(pa.string(), len(words), words.buffers())), ours / EPISODES)
    (damage,) = open_source(ours).damage
    assert EPISODES in damage.where and "Unicode" in damage.found


@pytest.mark.parametrize("name", ["length", "data/chunk_index", "videos/observation.images.front/file_index"])
def test_a_misspelt_column_of_the_metadata_names_its_file(name: str, ours: Path):
    table = pq.read_table(ours / EPISODES)
    pq.write_table(table.rename_columns([n[:-1] + "\x7f" if n == name else n for n in table.column_names]), ours / EPISODES)
    source = open_source(ours)
    said = [str(damage) for damage in source.damage] + ([] if source.damage else refusals(ours))
    assert said and all("meta/episodes" in text for text in said)


def test_any_flipped_bit_of_a_table_is_named_or_harmless(ours: Path):
    rng, opened = np.random.default_rng(0), 0
    for name in (DATA, EPISODES, "meta/tasks.parquet"):
        whole = (ours / name).read_bytes()
        footer = int.from_bytes(whole[-8:-4], "little")
        for at in [*rng.integers(len(whole), size=6), *(len(whole) - 8 - rng.integers(1, footer, size=16))]:
            data = bytearray(whole)
            data[at] ^= 1 << int(rng.integers(8))
            (ours / name).write_bytes(data)
            try:
                opened += not open_source(ours).damage and not refusals(ours)
            except DataError as error:
                assert str(ours) in error.where
        (ours / name).write_bytes(whole)
    assert opened, "bits nobody looks at"


# ---- ways out of the dataset ----


def leads_out(root: Path, *words: str) -> None:
    with pytest.raises(DataError) as error:
        open_source(root)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert main(["data", "convert", str(root), str(root.parent / "out"), "--workers", "0", "--fps", "5"]) == 3
    assert not (root.parent / "out").exists()


def moved_out(path: Path, secret: Path) -> None:
    shutil.move(path, secret)
    path.symlink_to(secret)


def test_a_table_that_is_a_link_is_not_followed(ours: Path, tmp_path: Path):
    moved_out(ours / DATA, tmp_path / "secret")
    leads_out(ours, DATA, "a link to", "secret")


def test_every_link_is_named(ours: Path, tmp_path: Path):
    moved_out(ours / DATA, tmp_path / "secret")
    moved_out(ours / "videos", tmp_path / "films")
    leads_out(ours, DATA, "secret", "films", "2 ways out")


@pytest.mark.parametrize("template", ["../file.parquet", "/etc/file.parquet", "data/../../file.parquet"])
def test_a_template_that_leads_out_is_not_filled_in(template: str, ours: Path, tmp_path: Path):
    shutil.copy(ours / DATA, tmp_path / "file.parquet")
    edit_json(ours / "meta" / "info.json", data_path=template)
    leads_out(ours, "meta/info.json", template)


def test_a_feature_that_is_a_way_out_is_not_filled_in(ours: Path):
    info = json.loads((ours / "meta" / "info.json").read_text())
    info["features"]["observation.images.x/../../../films"] = info["features"]["observation.images.front"]
    edit_json(ours / "meta" / "info.json", features=info["features"])
    leads_out(ours, "meta/info.json", "../films")


def test_a_shard_that_is_a_link_is_not_followed(tmp_path: Path):
    root = Path(shutil.copytree(GOLDEN / "rlds" / "wide", tmp_path / "wide"))
    shard = sorted(root.rglob("*.tfrecord-*"))[0]
    moved_out(shard, tmp_path / "secret")
    leads_out(root, shard.name, "a link to", "secret")


def test_links_inside_the_dataset_are_followed(ours: Path):
    shutil.move(ours / DATA, ours / "data" / "one.parquet")
    (ours / DATA).symlink_to("../one.parquet")
    assert refusals(ours) == []


@pytest.mark.parametrize("below", ["", "tabletop"])
def test_a_hub_cache_links_to_its_own_blobs_only(below: str, recorded: Path, tmp_path: Path):
    root = Path(shutil.copytree(recorded, tmp_path / "repo" / "snapshots" / "abc" / below))
    (tmp_path / "repo" / "blobs").mkdir()
    moved_out(root / DATA, tmp_path / "repo" / "blobs" / "f00d")
    assert refusals(root) == []
    moved_out(tmp_path / "repo" / "blobs" / "f00d", tmp_path / "secret")
    leads_out(root, "secret")


# ---- one size of picture per dataset ----


def test_pictures_of_another_size_are_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A source whose second episode was filmed at another size, which no card can make one dataset."""
    from data_tools import convert
    from data_tools.convert_pool import Job

    with LeRobotWriter(tmp_path / "src", small_spec()) as writer:
        for n in range(3):
            writer.add(make_episode(n))
    read = Job.read

    def odd(self: Job, key: str):
        raw, episode = read(self, key)
        if key == "episode_000001":
            episode.images["front"] = np.ascontiguousarray(episode.images["front"][:, :16])
        return raw, episode

    monkeypatch.setattr(Job, "read", odd)
    report = convert.convert(tmp_path / "src", tmp_path / "out", workers=0, verify=False, progress=False)
    assert report["episodes"] == 2
    (left_out,) = report["quarantined"]
    assert "(16, 32)" in str(left_out) and "(32, 32)" in str(left_out)
