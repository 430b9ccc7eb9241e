"""Datasets named by a revision on the Hub. The server is a stand-in (tests/hub_stand_in.py); the client is the real one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_stand_in import HubStandIn, hub  # noqa: F401  the fixture
from small_datasets import write_dataset

from vla.episodes import EpisodeStore
from vla.episodes.hub import parse, resolve
from vla.errors import DataError, MachineError, UsageError

REPO = "someone/toy"


@pytest.fixture()
def pushed(hub: HubStandIn, tmp_path: Path) -> str:  # noqa: F811
    write_dataset(tmp_path / "ds", 4)
    (tmp_path / "ds/README.md").write_text("a card")
    return hub.push(REPO, tmp_path / "ds", "v3.0")


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert parse("data/button") is None and parse(tmp_path) is None and parse("/somewhere/a@b") is None
    named = parse("hub:user/na-me.1")
    assert named is not None and (named.repo, named.revision, named.pinned) == ("user/na-me.1", None, False)
    named = parse("user/name@v2.1")
    assert named is not None and str(named) == "hub:user/name@v2.1" and not named.pinned
    pinned = parse("hub:user/name@" + "0f" * 20)
    assert pinned is not None and pinned.pinned
    (tmp_path / "user/name@v2.1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse("user/name@v2.1") is None, "a folder of that name is a folder"
    for wrong in ("hub:name", "hub:user/name@", "hub:a/b/c", "hub:../x"):
        with pytest.raises(UsageError, match="hub:user/name@"):
            parse(wrong)


def test_a_folder_stays_what_it_is(tmp_path: Path):
    assert resolve(tmp_path / "ds") == tmp_path / "ds"
    assert resolve("data/none") == Path("data/none")


def test_a_pinned_dataset_equals_the_folder_and_is_fetched_once(
    hub: HubStandIn, pushed: str, tmp_path: Path, capsys: pytest.CaptureFixture  # noqa: F811
):
    folder = resolve(f"hub:{REPO}@{pushed}", progress=False)
    assert folder.name == pushed and "pin" not in capsys.readouterr().err
    cache = tmp_path / "cache"
    there, here = (EpisodeStore.open(root, cache, progress=False) for root in (folder, tmp_path / "ds"))
    assert there.fingerprint == here.fingerprint and (there.frame("front", 3) == here.frame("front", 3)).all()
    assert "README.md" not in hub.sent, "only what a dataset consists of"
    sent, requests = sum(hub.sent.values()), hub.requests
    assert resolve(f"{REPO}@{pushed}", progress=False) == folder
    assert sum(hub.sent.values()) == sent and hub.requests == requests, "a commit that is there needs no network"


@pytest.mark.parametrize("revision", ["", "@v3.0", "@main"])
def test_anything_but_a_commit_is_said_with_the_line_that_pins_it(
    revision: str, pushed: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = resolve(f"hub:{REPO}{revision}", tmp_path / "cache", progress=False)
    assert folder.is_relative_to(tmp_path / "cache/hub") and folder.name == pushed
    assert f"path: hub:{REPO}@{pushed}" in capsys.readouterr().err


def test_a_tag_that_moves_does_not_move_a_pinned_run(hub: HubStandIn, pushed: str, tmp_path: Path):  # noqa: F811
    write_dataset(tmp_path / "more", 5)
    newer = hub.push(REPO, tmp_path / "more", "v3.0")
    assert newer != pushed
    assert resolve(f"hub:{REPO}@v3.0", progress=False).name == newer
    old = EpisodeStore.open(resolve(f"hub:{REPO}@{pushed}", progress=False), tmp_path / "cache", progress=False)
    assert old.num_episodes == 4


def test_what_is_not_there_is_said(hub: HubStandIn, pushed: str):  # noqa: F811
    with pytest.raises(DataError) as caught:
        resolve("hub:someone/else@v3.0", progress=False)
    assert "no such dataset" in caught.value.found and "hf auth login" in caught.value.fix
    with pytest.raises(DataError) as caught:
        resolve(f"hub:{REPO}@v9", progress=False)
    assert "'v9'" in caught.value.found and "v3.0" in caught.value.expected and caught.value.where == f"hub:{REPO}@v9"
    with pytest.raises(DataError) as caught:
        resolve(f"hub:{REPO}@{'0' * 40}", progress=False)
    assert "0" * 40 in caught.value.found
    hub.gated.add(REPO)
    with pytest.raises(DataError) as caught:
        resolve(f"hub:{REPO}@{pushed}", progress=False)
    assert "gated" in caught.value.found and f"datasets/{REPO}" in caught.value.fix


def test_a_format_that_is_not_read_is_refused_before_its_data_is_fetched(hub: HubStandIn, tmp_path: Path):  # noqa: F811
    write_dataset(tmp_path / "ds", 4)
    info = tmp_path / "ds/meta/info.json"
    info.write_text(info.read_text().replace("v3.0", "v1.6"))
    hub.push(REPO, tmp_path / "ds")
    with pytest.raises(DataError, match="v1.6"):
        resolve(f"hub:{REPO}", progress=False)
    assert not hub.videos_sent() and not any(path.startswith("data/") for path in hub.sent)


def test_without_a_connection_what_is_there_opens_and_the_rest_is_an_error(
    hub: HubStandIn, pushed: str, monkeypatch: pytest.MonkeyPatch  # noqa: F811
):
    folder = resolve(f"hub:{REPO}@v3.0", progress=False)
    hub.close()
    assert resolve(f"hub:{REPO}@{pushed}", progress=False) == folder
    with pytest.raises(MachineError) as caught:
        resolve("hub:someone/else", progress=False)
    assert "no connection" in caught.value.found and "hf download someone/else" in caught.value.fix
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(f"hub:{REPO}@v3.0", progress=False) == folder, "the cache remembers what the tag stood for"
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE"):
        resolve("hub:someone/else@v3.0", progress=False)


def test_a_download_that_breaks_off_is_completed(hub: HubStandIn, pushed: str, tmp_path: Path):  # noqa: F811
    video = next(path for path in hub.commits[REPO][pushed] if path.endswith(".mp4"))
    hub.broken[video] = 1
    folder = resolve(f"hub:{REPO}@{pushed}", progress=False)
    assert (folder / video).read_bytes() == hub.commits[REPO][pushed][video]
    assert hub.sent[video] == len((folder / video).read_bytes()) * 3 // 2, "half of it, then all of it"
