"""Small files: whole or as they were, whatever goes wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from children import dead_process
from hypothesis import given
from hypothesis import strategies as st

import vla.durable as durable
from vla.durable import check_place, clear_stale, disk_full, is_disk_full, read_lines, replace_file
from vla.errors import MachineError, UsageError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("data", ["äon", b"\x00\xff", memoryview(b"view")])
def test_a_file_is_made_replaced_and_alone(tmp_path: Path, data: str | bytes | memoryview):
    path = tmp_path / "new" / "folder" / "a.json"
    for content in ("before", data):
        replace_file(path, content)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else bytes(data)) and names(path.parent) == ["a.json"]


@pytest.mark.parametrize("stage", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(28, "No space left on device"), MachineError), (OSError(122, "Disk quota exceeded"), MachineError),
     (OSError(27, "File too large"), MachineError), (PermissionError(13, "denied"), PermissionError),
     (KeyboardInterrupt(), KeyboardInterrupt)],
)  # fmt: skip
def test_whatever_fails_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException, raised: type[BaseException]
):
    path = tmp_path / "a.json"
    replace_file(path, "old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(durable.os, stage, fail)
    with pytest.raises(raised) as caught:
        replace_file(path, "new", safe="12 things are safe")
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]
    if isinstance(caught.value, MachineError):
        assert caught.value.where == str(path) and "12 things are safe" in caught.value.found
        assert isinstance(error, OSError) and str(error.strerror) in caught.value.found


def test_the_rename_comes_after_the_data_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(durable.os, name, lambda *a, name=name, real=real: (order.append(name), real(*a)))
    replace_file(tmp_path / "a", "x")
    assert order == ["fsync", "replace", "fsync"], "the data, the name, the folder that holds the name"


def test_a_place_where_nothing_can_be_is_named_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("mine")
    check_place(tmp_path / "a" / "b" / "c")
    for path in ("file/x", "file/x/y"):
        with pytest.raises(UsageError, match=f"{tmp_path / 'file'} is a file(?s:.*)another --video"):
            check_place(tmp_path / path, "--video")
    monkeypatch.setattr(durable.os, "access", lambda *_: False)  # whoever is root may write anywhere
    with pytest.raises(UsageError, match="may not be written to"):
        check_place(tmp_path / "a")


def test_full_disks_are_recognised_by_number_and_by_words():
    for error in (OSError(28, ""), OSError(122, ""), OSError(27, ""), ValueError("I/O error: File too large (os error 27)")):
        assert is_disk_full(error)
        assert "nothing lost" in disk_full("here", error, "nothing lost").found
    for error in (OSError(5, "Input/output error"), PermissionError(13, ""), ValueError("x"), KeyboardInterrupt()):
        assert not is_disk_full(error)


def test_what_dead_processes_had_begun_is_removed(tmp_path: Path):
    dead = dead_process()
    for name in (f".a[1].tmp-{dead}", ".a[1].tmp-nobody", f".b.tmp-{dead}", f".a[1].tmp-{os.getpid()}", "a[1]"):
        (tmp_path / name).write_text("x")
    (tmp_path / f".a[1].tmp-{dead}").unlink()
    (tmp_path / f".a[1].tmp-{dead}" / "inside").mkdir(parents=True)
    clear_stale(tmp_path / "a[1]")
    assert names(tmp_path) == sorted(["a[1]", f".a[1].tmp-{os.getpid()}", f".b.tmp-{dead}"])


RECORDS = st.lists(st.dictionaries(st.text(max_size=5), st.none() | st.floats() | st.text(max_size=5), max_size=3), max_size=6)


@given(RECORDS, st.data())
def test_a_cut_file_gives_its_whole_lines(tmp_path_factory: pytest.TempPathFactory, records: list[dict], data: st.DataObject):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    text = "".join(json.dumps(record) + "\n" for record in records)
    keep = data.draw(st.integers(0, len(text)))
    path.write_text(text[:keep])
    found, bad = read_lines(path)
    whole = [record for record, end in zip(records, _ends(records), strict=True) if end - 1 <= keep]
    assert json.dumps(found) == json.dumps(whole) and bad == 0


def _ends(records: list[dict]) -> list[int]:
    ends, at = [], 0
    for record in records:
        at += len(json.dumps(record)) + 1
        ends.append(at)
    return ends


def test_lines_that_are_none_are_counted(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    assert read_lines(path) == ([], 0)
    path.write_bytes(b'{"a": 1}\ngarbage\n\n[2]\n{"b": \xff}\n{"c": "x\xe2\x80\xa8y"}\n{"d')
    assert read_lines(path) == ([{"a": 1}, {"c": "x\u2028y"}], 3)
    path.write_text("garbage\n")
    assert read_lines(path) == ([], 1), "a line with its end was not cut"
