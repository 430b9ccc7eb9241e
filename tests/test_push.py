"""`vla push`, and back again: to a stand-in of the Hub by the real client, and into a folder laid out as the Hub's cache."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import LIMIT, children
from hub_stand_in import HubStandIn, hub  # noqa: F401  the fixture
from hub_uploads import TOKEN
from small_datasets import write_dataset
from small_policies import actions, write_evaluation, write_policy, write_small_adapter

from vla import push as pushing
from vla.cli import main
from vla.episodes import EpisodeStore
from vla.episodes.hub import HubName
from vla.errors import CheckpointError
from vla.hub_folder import to_folder
from vla.policy import VLAPolicy, load_policy

NAME = "you/small"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an evaluation, and with everything a push might spoil: the author's own README.md among it."""
    root = tmp_path_factory.mktemp("run")
    policy = write_policy(root)
    write_evaluation(root / "eval/tabletop.json", policy.fingerprint)
    (root / "policy/README.md").write_text("by hand")
    (root / "policy/evaluation.json").write_text('{"of": "an earlier pull"}')
    (root / "policy/.secret").mkdir()
    (root / "policy/.secret/notes.txt").write_text("not for others")
    return root


@pytest.fixture()
def login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture()
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the Hub, and the real client told to look there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "shelf"))
    return tmp_path / "shelf"


def push(*words: object) -> int:
    return main(["push", *map(str, words), *([] if "--card" in words or "data" in str(words[0]) else ["--no-latency"])])


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below, its bytes and when it was changed."""
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))
            if p.is_file()}  # fmt: skip


# ----------------------------------------------------------------------------------------------- the author's own files


def test_nothing_in_the_authors_folder_is_written_to(run: Path, shelf: Path, tmp_path: Path):
    before = contents(run)
    assert push(run, NAME, "--hub", shelf) == 0
    assert contents(run) == before
    pulled = next(shelf.glob("models--you--small/snapshots/*"))
    assert "by hand" not in (pulled / "README.md").read_text() and "earlier" not in (pulled / "evaluation.json").read_text()
    assert not list(pulled.rglob("notes.txt")) and not (pulled / "manifest.json").exists()
    (tmp_path / "words.md").write_text("Learned on my own desk.")
    assert push(run, NAME, "--hub", shelf, "--about", tmp_path / "words.md") == 0
    assert "Learned on my own desk." in Path(load_folder(shelf, NAME), "README.md").read_text()
    write_small_adapter(tmp_path / "lora", run / "policy")
    before = contents(tmp_path / "lora")
    assert push(tmp_path / "lora", "you/lora", "--hub", shelf, "--base", NAME) == 0
    assert contents(tmp_path / "lora") == before, "its policy.json was changed for the others only"


def load_folder(shelf: Path, name: str) -> Path:
    top = shelf / f"models--{name.replace('/', '--')}"
    return top / "snapshots" / (top / "refs/main").read_text()


def test_a_card_needs_no_name_and_sends_nothing(run: Path, capsys: pytest.CaptureFixture):
    before = contents(run)
    assert push(run, "--card", "--license", "apache-2.0", "--known", "drops things") == 0
    said = capsys.readouterr().out
    assert said.startswith("---\n") and "- drops things" in said and "p50" in said and contents(run) == before
    assert push(run) == 2 and "no USER/NAME" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- the Hub


def test_to_the_hub_and_back(
    run: Path, hub: HubStandIn, login: None, capsys: pytest.CaptureFixture  # noqa: F811
):
    own = load_policy(run, "cpu")
    assert push(run, NAME, "--license", "apache-2.0", "--json") == 0
    facts = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert facts["where"] == f"{hub.url}/{NAME}" and facts["commit"] == hub.names[NAME]["main"]
    files = hub.now(NAME)
    assert {Path(f).suffix for f in files} <= {".json", ".safetensors", ".md", ""} and "README.md" in files
    assert len(hub.uploaded) == len([f for f in files if f.endswith(".safetensors")]), "weights went as LFS objects"
    for name, load in ((NAME, load_policy), (f"{NAME}@{facts['commit']}", VLAPolicy.from_pretrained)):
        again = load(name, device="cpu")
        assert again.fingerprint == own.fingerprint and np.array_equal(actions(again), actions(own))
    assert f"to pin it: {NAME}@{facts['commit']}" in capsys.readouterr().err
    sent = len(hub.asked)
    load_policy(f"{NAME}@{facts['commit']}", "cpu")
    assert len(hub.asked) == sent, "a commit that is there needs no network"


def test_a_second_push_replaces_the_first(run: Path, hub: HubStandIn, login: None, tmp_path: Path):  # noqa: F811
    assert push(run, NAME) == 0
    hub.commit(NAME, hub.now(NAME) | {"old/model.safetensors": b"x", "stale.txt": b"x"})
    policy = write_policy(tmp_path, seed=5)
    assert push(tmp_path, NAME) == 0
    assert not {"old/model.safetensors", "stale.txt"} & hub.now(NAME).keys() and ".gitattributes" in hub.now(NAME)
    assert load_policy(NAME, "cpu").fingerprint == policy.fingerprint
    commits, uploaded = len(hub.commits[NAME]), len(hub.uploaded)
    assert push(tmp_path, NAME) == 0
    assert len(hub.commits[NAME]) == commits and len(hub.uploaded) == uploaded, "the same again changes nothing"


def test_a_private_repository(run: Path, hub: HubStandIn, login: None, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    assert push(run, NAME, "--private") == 0 and NAME in hub.private
    assert load_policy(NAME, "cpu")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="hf auth login"):
        load_policy("you/small", "cpu")


def test_what_stands_in_the_way_is_said(
    run: Path, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path  # noqa: F811
):
    from huggingface_hub import constants

    def says(*words: object, code: int) -> str:
        assert push(run, *words) == code
        return capsys.readouterr().err

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "hf auth login" in says(NAME, code=2) and not hub.commits
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "401" in says(NAME, code=2)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = says("somebody/else", code=2)
    assert "403" in said and "rights" in said and "hf auth whoami" in said
    assert "license" in says(NAME, "--license", "my-own", code=2)
    hub.fail = {"lfs/": 403}
    assert "403" in says(NAME, code=2) and set(hub.now(NAME)) == {".gitattributes"}
    hub.fail = {"commit/": 500}
    assert "the Hub answered 500" in says(NAME, code=5)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "no connection" in says(NAME, code=5)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.close()
    said = says(NAME, code=5)
    assert "no connection" in said and "--hub DIR" in said
    for wrong in ("name", "a/b/c", f"{NAME}@main"):
        assert "USER/NAME" in says(wrong, code=2) or "hub:" in says(wrong, code=2)


def test_a_dataset_goes_with_its_format_as_a_tag(
    hub: HubStandIn, login: None, tmp_path: Path, capsys: pytest.CaptureFixture  # noqa: F811
):
    write_dataset(tmp_path / "data", 3)
    (tmp_path / "data/README.md").write_text("by hand")
    assert push(tmp_path / "data", "you/thing", "--license", "cc-by-4.0") == 0
    assert hub.kinds["you/thing"] == "dataset" and set(hub.names["you/thing"]) == {"main", "v3.0"}
    assert b"license: cc-by-4.0" in hub.now("you/thing")["README.md"] and (tmp_path / "data/README.md").read_text() == "by hand"
    from vla.episodes.hub import resolve

    own = EpisodeStore.open(tmp_path / "data", tmp_path / "cache", progress=False)
    assert EpisodeStore.open(resolve("hub:you/thing@v3.0", progress=False), tmp_path / "cache").fingerprint == own.fingerprint
    write_dataset(tmp_path / "more-data", 4)
    assert push(tmp_path / "more-data", "you/thing") == 0
    assert hub.names["you/thing"]["v3.0"] == hub.names["you/thing"]["main"], "LeRobot's tag has moved along"
    (tmp_path / "more-data/data/extra.pkl").write_bytes(b"\x80\x04.")
    capsys.readouterr()
    assert push(tmp_path / "more-data", "you/thing") == 4 and "data/extra.pkl" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- a folder in place of the Hub


def test_into_a_folder_and_back(run: Path, shelf: Path):
    own = load_policy(run, "cpu")
    assert push(run, NAME, "--hub", shelf) == 0
    assert load_policy(NAME, "cpu").fingerprint == own.fingerprint
    before = contents(shelf)
    assert push(run, NAME, "--hub", shelf) == 0
    assert contents(shelf) == before, "the same again changes nothing"
    commit = (shelf / "models--you--small/refs/main").read_text()
    assert load_policy(f"{NAME}@{commit}", "cpu").fingerprint == own.fingerprint


def test_another_process_finds_it_by_the_hubs_own_variables(run: Path, tmp_path: Path):
    assert push(run, NAME, "--hub", tmp_path / "hub") == 0
    code = f"from vla.policy import load_policy; print(load_policy({NAME!r}, 'cpu').fingerprint)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"),
                                            "PYTHONPATH": str(Path(pushing.__file__).parents[1])}, timeout=LIMIT)  # fmt: skip
    assert done.stdout.strip() == load_policy(run, "cpu").fingerprint, done.stderr


def test_an_interrupted_push_leaves_the_last_one(run: Path, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    from vla import hub_folder

    own = load_policy(run, "cpu")
    assert push(run, NAME, "--hub", shelf) == 0
    write_policy(tmp_path / "new", seed=3)
    real, copied = shutil.copy2, []

    def halfway(*args, **kw):
        copied.append(args)
        if len(copied) == 3:
            raise KeyboardInterrupt
        return real(*args, **kw)

    whole = shutil.copytree
    monkeypatch.setattr(hub_folder.shutil, "copytree", lambda a, b: whole(a, b, copy_function=halfway))
    assert push(tmp_path / "new", NAME, "--hub", shelf) == 130
    assert load_policy(NAME, "cpu").fingerprint == own.fingerprint
    assert len(list((shelf / "models--you--small/snapshots").iterdir())) == 1, "and nothing half"
    monkeypatch.setattr(hub_folder.shutil, "copytree", whole)
    monkeypatch.setattr(hub_folder, "replace_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert push(tmp_path / "new", NAME, "--hub", shelf) == 130
    assert load_policy(NAME, "cpu").fingerprint == own.fingerprint, "the name is moved last"
    monkeypatch.undo()


def _put(staged: Path, root: Path, start: Any, results: Any) -> None:
    start.wait(LIMIT)
    try:
        results.put(str(to_folder(staged, root, HubName(NAME, None), "model")[0]))
    except BaseException as error:
        results.put(repr(error))


def test_several_processes_push_the_same_at_once(tmp_path: Path):
    staged = tmp_path / "staged"
    sizes = {f"{part}/{i}.txt": 200_000 + i for part in ("a", "b") for i in range(10)}
    for name, size in sizes.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_bytes(b"x" * size)
    fork = multiprocessing.get_context("fork")
    for round in range(3):
        start, results, root = fork.Event(), fork.Queue(), tmp_path / f"shelf{round}"
        with children(fork, _put, *[(staged, root, start, results)] * 4) as found:
            start.set()
            said = {results.get(timeout=60) for _ in found}
        (folder,) = said
        assert {n.relative_to(folder).as_posix(): n.stat().st_size for n in Path(folder).rglob("*") if n.is_file()} == sizes
        assert [p.name for p in Path(folder).parent.iterdir()] == [Path(folder).name], "and nothing temporary"


def test_a_partial_snapshot_is_made_whole_and_nothing_alive_is_deleted(tmp_path: Path):
    staged, shelf, name = tmp_path / "staged", tmp_path / "shelf", HubName(NAME, None)
    for path in ("a.txt", "b/c.txt", "d.txt"):
        (staged / path).parent.mkdir(parents=True, exist_ok=True)
        (staged / path).write_text(path)
    snapshot, commit = to_folder(staged, shelf, name, "model")
    before = {path: data for path, (data, _) in contents(snapshot).items()}
    (snapshot / "a.txt").unlink()
    (snapshot / "b/c.txt").unlink()
    (snapshot / "b").rmdir()
    (snapshot / "d.txt").write_text("d")
    host = socket.gethostname()
    gone = subprocess.Popen(["true"])
    gone.wait()
    others = [snapshot.with_name(f".{commit}.tmp-{who}") for who in (f"{host}-{os.getppid()}-0", "elsewhere-1-0",
                                                                     f"{host}-{gone.pid}-0")]  # fmt: skip
    for other in others:
        other.mkdir()
    assert to_folder(staged, shelf, name, "model") == (snapshot, commit)
    assert {path: data for path, (data, _) in contents(snapshot).items()} == before
    assert [other.exists() for other in others] == [True, True, False]


def test_where_no_folder_can_be_made_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").write_text("x")
    for where in (tmp_path / "file", tmp_path / "file/below", Path("/proc/nowhere")):
        assert push(run, NAME, "--hub", where) == 5
        said = capsys.readouterr().err
        assert str(where) in said and "--hub DIR" in said
    assert (tmp_path / "file").read_text() == "x"


def test_a_bad_name_of_a_policy_is_no_datasets(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    for wrong in ("name", "a/b/c", "", "you/", "../x"):
        assert push(run, wrong, "--hub", tmp_path / "hub") == 2
        said = capsys.readouterr().err
        assert said.startswith("error: USER/NAME") or "USER/NAME" in said
        assert repr(wrong) in said and "dataset" not in said and "you/name" in said
    assert not (tmp_path / "hub").exists()


def test_a_broken_evaluation_is_left_out_or_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    good = json.loads((run / "eval/tabletop.json").read_text())
    (tmp_path / "no-suite.json").write_text(json.dumps({k: v for k, v in good.items() if k != "suite"}))
    assert push(run, NAME, "--hub", tmp_path / "hub", "--eval", tmp_path / "no-suite.json") == 2
    assert "no-suite.json" in capsys.readouterr().err
    (tmp_path / "run/eval").mkdir(parents=True)
    (tmp_path / "run/policy").symlink_to(run / "policy")
    (tmp_path / "run/eval/deep.json").write_text("[" * 100_000)
    assert push(tmp_path / "run", NAME, "--hub", tmp_path / "hub") == 0
    assert "left out of the card" in (said := capsys.readouterr().err) and "deep.json" in said


def test_an_adapter_finds_its_base_by_name(run: Path, shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    own = write_small_adapter(tmp_path / "lora", run / "policy")
    assert push(tmp_path / "lora", "you/lora", "--hub", shelf) == 2
    assert "--base USER/NAME" in capsys.readouterr().err and not shelf.exists()
    assert push(run, NAME, "--hub", shelf) == 0 and push(tmp_path / "lora", "you/lora", "--hub", shelf, "--base", NAME) == 0
    again = load_policy("you/lora", "cpu")
    assert np.array_equal(actions(again), actions(own)) and again.adapter.base["path"] == NAME
    folder = load_folder(shelf, "you/lora")
    assert not (folder / "model.safetensors").exists() and f"base_model: {NAME}" in (folder / "README.md").read_text()
    write_policy(tmp_path / "other", seed=9)
    assert push(tmp_path / "other", NAME, "--hub", shelf) == 0
    with pytest.raises(CheckpointError, match="which this adapter was trained on"):
        load_policy("you/lora", "cpu")
    assert push(run, NAME, "--hub", shelf, "--base", NAME) == 2, "a policy without an adapter has no base"
