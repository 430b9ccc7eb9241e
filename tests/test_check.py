"""`vla data check`: that every check has a planted fault, and what the command says and returns."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

import pytest
from faults import test_check_conventions, test_check_files, test_check_pictures  # type: ignore[import-not-found]
from sound_dataset import write_sound

from data_tools.check import CHECKS, Finding, check, check_all, table
from data_tools.check.command import add_check_parser
from vla.cli import main
from vla.errors import UsageError

TABLES: tuple[ModuleType, ...] = (test_check_files, test_check_conventions, test_check_pictures)


def test_every_check_has_a_planted_fault():
    planted = {fault.code for room in TABLES for fault in room.FAULTS}
    assert planted == CHECKS.keys()
    assert all(check.about for check in CHECKS.values())


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sound(tmp_path_factory.mktemp("sound") / "d", cameras=("front",))


@pytest.fixture(scope="module")
def warned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sound(tmp_path_factory.mktemp("warned") / "d", lambda made: [*made, made[3]], cameras=("front",))


def test_a_sound_dataset_passes(sound: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "check", str(sound), "--no-frames"]) == 0
    assert "nothing found" in capsys.readouterr().out


def test_recorded_demonstrations_have_no_error(demos: dict[str, Path]):
    for root in demos.values():
        assert [f for f in check(root) if f.severity == "error"] == []


def test_warnings_fail_only_when_strict(warned: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "check", str(warned), "--no-frames"]) == 0
    assert main(["data", "check", str(warned), "--no-frames", "--strict"]) == 3
    assert "WARNING  duplicate-episode" in capsys.readouterr().out


def test_errors_return_3_and_are_named_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = test_check_files.nan_in_action(tmp_path)
    assert main(["data", "check", str(root), "--json"]) == 3
    said = json.loads(capsys.readouterr().out)
    (finding,) = said["findings"]
    assert said["counts"] == {"error": 1, "warning": 0, "note": 0} and not said["ok"]
    assert (finding["code"], finding["episode"], finding["frame"], finding["dimension"]) == ("not-finite", 2, 7, "turn.x")
    assert finding["root"] == str(root) and finding["fix"]


def test_several_datasets_are_named_each(sound: Path, warned: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "check", str(sound), str(warned), "--no-frames"]) == 3  # they share episodes
    out = capsys.readouterr().out
    assert "leaked-between" in out and str(warned) in out


def test_no_such_folder_is_an_error_not_a_crash(tmp_path: Path):
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 3


def test_an_unknown_check_is_a_usage_error(sound: Path):
    with pytest.raises(UsageError, match="nonsense"):
        check(sound, skip=["nonsense"])


def test_findings_come_worst_first(tmp_path: Path):
    root = test_check_files.bad_split(tmp_path)
    (root / "meta" / "stats.json").unlink()
    assert [f.severity for f in check_all([root], frames=False)] == ["error", "warning"]


def test_the_table_counts_what_it_does_not_print():
    same = [Finding("warning", "data", "short", "long", "drop it", n, code="short-episode", root="d") for n in range(9)]
    said = table(same)
    assert "short-episode x9" in said and "and 6 more, episodes 3, 4, 5, 6, 7, 8" in said and said.endswith("9 warnings, 0 notes")
    assert said.count("drop it") == 1


def test_help_lists_every_check(capsys: pytest.CaptureFixture[str]):
    parser = add_check_parser(argparse.ArgumentParser().add_subparsers())
    assert "example" in parser.format_help()
    assert all(f"  {code} " in parser.format_help() for code in CHECKS)
