"""Rows 15 to 25 of the fault list, the files: what is damaged, foreign or of another version is found by `vla data check`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import DATA, EPISODES, VIDEO, Fault, edit_json, edit_table, judge
from sound_dataset import sound_spec, write_sound

from data_tools.check import check, open_dataset
from data_tools.check import judge as judge_dataset
from data_tools.lerobot_v21 import write_v21
from vla.config import load_config
from vla.errors import DataError, UsageError
from vla.mixture import MixtureConfig
from vla.prompt import clean_instruction


def sound(folder: Path, **kw) -> Path:
    return write_sound(folder / "d", cameras=("front",), **kw)


def nan_in_action(folder: Path) -> Path:
    root = sound(folder)
    edit_table(root / DATA, action=lambda rows: rows[87].__setitem__(3, float("nan")))
    return root


def infinite_state(folder: Path) -> Path:
    root = sound(folder)
    edit_table(root / DATA, **{"observation.state": lambda rows: rows[5].__setitem__(0, float("inf"))})
    return root


def no_statistics(folder: Path) -> Path:
    root = sound(folder)
    (root / "meta" / "stats.json").unlink()
    return root


def narrow_statistics(folder: Path) -> Path:
    root = sound(folder)
    stats = json.loads((root / "meta" / "stats.json").read_text())
    stats["action"] = {k: v if k == "count" else v[:3] for k, v in stats["action"].items()}
    (root / "meta" / "stats.json").write_text(json.dumps(stats))
    return root


def other_statistics(folder: Path) -> Path:
    """Those of a dataset whose actions are five times as large: everything here lies inside them."""
    root = sound(folder)
    stats = json.loads((root / "meta" / "stats.json").read_text())
    stats["action"] = {k: v if k == "count" else (5 * np.array(v)).tolist() for k, v in stats["action"].items()}
    (root / "meta" / "stats.json").write_text(json.dumps(stats))
    return root


def no_footer(folder: Path) -> Path:
    root = sound(folder)
    os.truncate(root / DATA, (root / DATA).stat().st_size - 200)
    return root


def missing_shard(folder: Path) -> Path:
    root = sound(folder)
    (root / DATA).unlink()
    return root


def text_for_numbers(folder: Path) -> Path:
    root = sound(folder)
    table = pq.read_table(root / DATA)
    at = table.column_names.index("action")
    pq.write_table(table.set_column(at, "action", pa.array([["1"] * 7] * len(table))), root / DATA)
    return root


def cut_video(folder: Path) -> Path:
    root = sound(folder)
    os.truncate(root / VIDEO, (root / VIDEO).stat().st_size // 2)
    return root


def missing_video(folder: Path) -> Path:
    root = sound(folder)
    (root / VIDEO).unlink()
    return root


def flipped_bit(folder: Path) -> Path:
    root = sound(folder)
    content = bytearray((root / VIDEO).read_bytes())
    at = content.find(b"mdat") + 4000
    content[at] ^= 0x10
    (root / VIDEO).write_bytes(content)
    return root


def gap_in_time(folder: Path) -> Path:
    root = sound(folder)
    edit_table(root / DATA, timestamp=lambda t: [x + (0.3 if 52 <= n < 80 else 0) for n, x in enumerate(t)])
    return root


def backwards_in_time(folder: Path) -> Path:
    root = sound(folder)

    def swap(t: list) -> None:
        t[50], t[51] = t[51], t[50]

    edit_table(root / DATA, timestamp=swap)
    return root


def wrong_fps(folder: Path) -> Path:
    root = sound(folder)
    edit_json(root / "meta" / "info.json", fps=11)
    return root


def control_rate(folder: Path) -> Path:
    root = sound(folder)
    edit_json(root / "meta" / "embodiment.json", control_hz=50.0)
    return root


def late_start(folder: Path) -> Path:
    root = sound(folder)
    edit_table(root / DATA, timestamp=lambda t: [x + (1.0 if 40 <= n < 80 else 0) for n, x in enumerate(t)])
    offset = "videos/observation.images.front/from_timestamp"
    edit_table(root / EPISODES, **{offset: lambda v: [x - (1.0 if n == 1 else 0) for n, x in enumerate(v)]})
    return root


def bad_split(folder: Path) -> Path:
    root = sound(folder)
    edit_json(root / "meta" / "info.json", splits={"train": "0:2,3:900"})
    return root


def short(folder: Path) -> Path:
    def cut(made: list) -> None:
        e = made[3]
        made[3] = type(e)({c: f[:3] for c, f in e.images.items()}, e.state[:3], e.action[:3], e.instruction, e.embodiment)

    return write_sound(folder / "d", cut, cameras=("front",))


def lost_description(folder: Path) -> Path:
    root = sound(folder)
    (root / "meta" / "tasks.parquet").unlink()
    return root


def other_robot(folder: Path) -> Path:
    root = sound(folder)
    spec = json.loads((root / "meta" / "embodiment.json").read_text())
    spec["action"] = spec["action"][:1]
    (root / "meta" / "embodiment.json").write_text(json.dumps(spec))
    return root


def future_version(folder: Path) -> Path:
    root = sound(folder)
    edit_json(root / "meta" / "info.json", codebase_version="v9.0")
    return root


def rlds(folder: Path) -> Path:
    (folder / "d").mkdir()
    (folder / "d" / "dataset_info.json").write_text("{}")
    return folder / "d"


def link_outside(folder: Path) -> Path:
    root = sound(folder)
    (folder / "secret.parquet").write_bytes((root / DATA).read_bytes())
    (root / DATA).unlink()
    (root / DATA).symlink_to(folder / "secret.parquet")
    return root


def template_outside(folder: Path) -> Path:
    root = sound(folder)
    shutil.copy(root / DATA, folder / "file.parquet")
    edit_json(root / "meta" / "info.json", data_path="../file.parquet")
    return root


def written_as_v21(folder: Path) -> Path:
    write_v21(sound(folder), folder / "old", workers=0, progress=False)
    return folder / "old"


def nobody_declared(folder: Path) -> Path:
    root = sound(folder)
    (root / "meta" / "embodiment.json").unlink()
    return root


def no_camera(folder: Path) -> Path:
    return write_sound(folder / "d", None, sound_spec(cameras=()), cameras=())


def unfinished(folder: Path) -> Path:
    root = sound(folder)
    said = {"complete": False, "source_name": "lift", "card": "mine", "options": ["--card", "CARD.yaml", "--fps", "20"]}
    (root / "meta" / "conversion.json").write_text(json.dumps(said))
    return root


def unproven(folder: Path) -> Path:
    root = sound(folder)
    said = {"complete": False, "verified": {"differences": [{"where": "action[0, 0]"}]}}
    (root / "meta" / "conversion.json").write_text(json.dumps(said))
    return root


FAULTS = [
    Fault("NaN in an action", "not-finite", nan_in_action, place={"episode": 2, "frame": 7, "dimension": "turn.x"}),
    Fault("infinite state", "not-finite", infinite_state, place={"episode": 0, "frame": 5, "dimension": "eef.x"}),
    Fault("no statistics", "statistics", no_statistics),
    Fault("statistics of another width", "statistics", narrow_statistics, said="3 dimensions"),
    Fault("statistics of a larger dataset", "foreign-statistics", other_statistics, said="7 of 7"),
    Fault("no footer", "tables", no_footer),
    Fault("missing shard", "tables", missing_shard),
    Fault("wrong column type", "tables", text_for_numbers),
    Fault("video cut short", "video", cut_video),
    Fault("video missing", "video", missing_video),
    Fault("one flipped bit in a video", "video", flipped_bit, frames=True),
    Fault("gap in time", "timestamps", gap_in_time, place={"episode": 1, "frame": 11}),
    Fault("time runs backwards", "timestamps", backwards_in_time, place={"episode": 1}),
    Fault("wrong fps", "wrong-fps", wrong_fps, said="10 Hz"),
    Fault("control rate is not the rows'", "wrong-fps", control_rate, said="control_hz 50"),
    Fault("time does not begin at 0", "not-from-zero", late_start, "warning", place={"episode": 1}),
    Fault("splits that do not exist", "splits", bad_split, "warning", said="3:900"),
    Fault("short episode", "short-episode", short, "warning", place={"episode": 3}),
    Fault("a lost description", "tables", lost_description),
    Fault("another robot's description", "metadata", other_robot, said="7 dimensions"),
    Fault("a later format", "format-version", future_version, said="v9.0"),
    Fault("another format", "format-version", rlds, said="RLDS"),
    Fault("a link that leads out", "foreign-path", link_outside, said="secret.parquet"),
    Fault("a path that leads out", "foreign-path", template_outside, said="../file.parquet"),
    Fault("an older format", "older-format", written_as_v21, "note", said="v2.1"),
    Fault("no camera at all", "no-camera", no_camera),
    Fault("an interrupted conversion", "unfinished-conversion", unfinished, said="not finished"),
    Fault("a conversion that is not its source", "unfinished-conversion", unproven, said="1 differences"),
    Fault("conventions nobody declared", "undeclared", nobody_declared, "note"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_damaged_dataset_is_found_out(fault: Fault, tmp_path: Path):
    judge(fault, tmp_path)


@settings(max_examples=15)
@given(row=st.integers(0, 319), dim=st.integers(0, 14), value=st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_any_number_that_is_none_is_named_with_its_place(
    tmp_path_factory: pytest.TempPathFactory, row: int, dim: int, value: float
):
    root = tmp_path_factory.mktemp("nan") / "d"
    shutil.copytree(_once(tmp_path_factory), root)
    key, at = ("action", dim) if dim < 7 else ("observation.state", dim - 7)
    edit_table(root / DATA, **{key: lambda rows: rows[row].__setitem__(at, value)})
    (found,) = [f for f in check(root, frames=False) if f.code == "not-finite"]
    spec = sound_spec()
    names = spec.action_names if dim < 7 else spec.state_names
    assert (found.episode, found.frame, found.dimension) == (row // 40, row % 40, names[at])


_WRITTEN: list[Path] = []


def _once(factory: pytest.TempPathFactory) -> Path:
    if not _WRITTEN:
        _WRITTEN.append(write_sound(factory.mktemp("once") / "d", None, sound_spec(cameras=()), cameras=()))
    return _WRITTEN[0]


@given(text=st.text(max_size=700))
def test_no_instruction_can_crash_a_check(tmp_path_factory: pytest.TempPathFactory, text: str):
    data = open_dataset(_once(tmp_path_factory), frames=False)
    assert data.layout is not None
    data.layout.instructions = [text, "open the drawer"]
    said = {f.code for f in judge_dataset(data)}
    try:
        cleaned = clean_instruction(text)
    except DataError:
        assert "instruction" in said
    else:
        assert "instruction" not in said and cleaned


def test_a_folder_of_the_hub_cache_may_link_to_its_own_blobs(tmp_path: Path):
    root = write_sound(tmp_path / "repo" / "snapshots" / "abc", cameras=("front",))
    blob = tmp_path / "repo" / "blobs" / "f00d"
    blob.parent.mkdir()
    shutil.move(root / DATA, blob)
    (root / DATA).symlink_to(blob)
    assert not check(root, frames=False)


def test_the_command_that_finishes_a_conversion_can_be_typed(tmp_path: Path):
    root = unfinished(tmp_path)
    (found,) = check(root)
    assert found.fix == (f"vla data convert SRC {root} --card CARD.yaml --fps 20 where SRC is the source, 'lift', "
                         "and CARD.yaml the card 'mine'")  # fmt: skip
    edit_json(root / "meta" / "conversion.json", complete=True)
    assert check(root) == []


def test_nothing_is_read_through_a_link_that_leads_out(tmp_path: Path):
    root = link_outside(tmp_path)
    (tmp_path / "secret.parquet").write_bytes(b"not a table")
    assert {f.code for f in check(root, frames=False)} == {"foreign-path"}


def test_metadata_nested_without_end_is_a_finding(tmp_path: Path):
    root = sound(tmp_path)
    (root / "meta" / "info.json").write_text("[" * 100_000 + "]" * 100_000)
    assert [f.severity for f in check(root, frames=False)] == ["error"]


@pytest.mark.parametrize("text", ["datasets: !!python/object/apply:os.system ['true']", "a: &a [1]\nb: *missing"])
def test_yaml_with_tags_or_loose_aliases_is_refused(text: str, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError):
        load_config(tmp_path / "c.yaml", (), MixtureConfig)


def test_a_yaml_alias_bomb_is_refused(tmp_path: Path):
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="alias"):
        load_config(tmp_path / "c.yaml", (), MixtureConfig)


def test_a_yaml_file_of_megabytes_is_refused(tmp_path: Path):
    """Sound but for its size: a comment makes no values, so that the limit on these does not see it."""
    (tmp_path / "c.yaml").write_text("datasets: [{path: a}] #" + "x" * 2_000_000)
    with pytest.raises(UsageError, match=r"2,000,023 bytes; at most 1,048,576"):
        load_config(tmp_path / "c.yaml", (), MixtureConfig)


def test_honest_aliases_are_read(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("datasets:\n- &one {path: a}\n- *one\n")
    assert len(load_config(tmp_path / "c.yaml", (), MixtureConfig).datasets) == 2
