"""What a conversion claims: no picture is left out unsaid, rounding and other instructions are said, words are asked for once."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sound_dataset import sound_spec, write_sound
from toy_source import ToySource, write_toy

import data_tools.convert as conversion
from data_tools.check import check
from data_tools.convert import convert
from data_tools.convert_report import fingerprint, sentence
from data_tools.sources import RawEpisode
from data_tools.standardise import Card
from vla.config import CONFIGS
from vla.errors import DataError, UsageError
from vla.schema import Episode

GOLDEN = Path(__file__).parent / "golden"


def run(src: Path, out: Path, **kw: Any) -> dict[str, Any]:
    return convert(src, out, **{"workers": 0, "progress": False, **kw})


# ---- pictures ----


@pytest.fixture()
def odd(tmp_path: Path) -> Path:
    """A robomimic file whose cameras are others than those of the shipped card."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed (pip install 'tendon-vla[hdf5]')")
    path = tmp_path / "odd.hdf5"
    path.write_bytes(gzip.decompress((GOLDEN / "hdf5" / "robomimic.hdf5.gz").read_bytes()))
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            demo["obs"].move("agentview_image", "frontview_image")
            del demo["obs/robot0_eye_in_hand_image"]
    return path


@pytest.mark.parametrize("card", [None, "robomimic"])
def test_a_card_that_would_take_no_picture_is_refused_and_says_how_to_name_them(odd: Path, tmp_path: Path, card: str | None):
    with pytest.raises(UsageError) as caught:
        run(odd, tmp_path / "ds", card=card, instruction="lift the cube")
    said = caught.value
    assert "obs/frontview_image" in said.found and "obs/agentview_image" in said.expected
    assert "frontview_image: {field: obs/frontview_image, flip: as_source}" in said.fix and "--card my_card.yaml" in said.fix
    assert not (tmp_path / "ds").exists()


def shipped(changed: str) -> str:
    """The shipped card with other cameras."""
    text = (CONFIGS / "datasets" / "robomimic.yaml").read_text().splitlines()
    kept = [line for line in text if not line.startswith(("  agentview:", "  wrist:"))]
    return "\n".join(f"cameras: {changed}" if line == "cameras:" else line for line in kept)


def test_the_card_named_in_the_refusal_takes_them(odd: Path, tmp_path: Path):
    card = tmp_path / "my_card.yaml"
    card.write_text(shipped("{frontview_image: {field: obs/frontview_image, flip: as_source}}"))
    summary = run(odd, tmp_path / "ds", card=card, instruction="lift the cube")
    assert summary["verified"]["pictures"] == summary["frames"] and "WARNING" not in sentence(summary)
    assert not [f for f in check(tmp_path / "ds", frames=False) if f.code == "no-camera"]


def test_numbers_without_pictures_have_to_be_asked_for_and_are_told(odd: Path, tmp_path: Path):
    card = tmp_path / "my_card.yaml"
    card.write_text(shipped("{}"))
    summary = run(odd, tmp_path / "ds", card=card, instruction="lift the cube")
    assert summary["pictures_not_carried"] == ["obs/frontview_image"]
    assert summary["not_carried"] and "obs/frontview_image" not in summary["not_carried"]
    assert "WARNING: pictures left out, no camera of the card takes them: obs/frontview_image" in sentence(summary)
    assert [f.severity for f in check(tmp_path / "ds", frames=False) if f.code == "no-camera"] == ["error"]


# ---- what nobody has declared ----


def _noise(episodes: list[Episode], scale: float) -> list[Episode]:
    draw = [np.random.default_rng([n, 3]).normal(size=e.action.shape) for n, e in enumerate(episodes)]
    return [dataclasses.replace(e, action=(d * scale).astype(np.float32)) for e, d in zip(episodes, draw, strict=True)]


@pytest.mark.parametrize("scale", [1.0, 1e7])
def test_a_clean_dataset_converted_without_a_card_has_no_warning(scale: float, tmp_path: Path):
    src = write_sound(tmp_path / "src", lambda made: _noise(made, scale))
    (src / "meta" / "embodiment.json").unlink()
    summary = run(src, tmp_path / "ds")
    assert json.loads((tmp_path / "ds/meta/embodiment.json").read_text())["action"][0]["high"][0] == 1e6
    assert summary["episodes"] == 8
    found = check(tmp_path / "ds")
    assert [(f.severity, f.code) for f in found] == [("note", "undeclared")]
    assert "no channel with a convention or limits" in found[0].found


def test_a_derived_robot_of_several_fields_is_judged_too(tmp_path: Path):
    """RLDS and HDF5 have one channel per field, where a LeRobot dataset without a description has one in all."""
    spec, unknown = sound_spec(), {}
    for part in ("state", "action"):
        unknown[part] = tuple(
            c.model_copy(update={"convention": "scalar", "unit": "-", "low": (-1e6,) * len(c.dims), "high": (1e6,) * len(c.dims)})
            for c in getattr(spec, part)
        )
    found = check(write_sound(tmp_path / "ds", None, spec.model_copy(update=unknown)), frames=False)
    assert [(f.severity, f.code) for f in found] == [("note", "undeclared")]


def test_limits_of_the_channels_that_are_declared_still_hold(tmp_path: Path):
    """One scalar without limits takes nothing from the others."""
    spec = sound_spec()
    gripper = spec.state[2].model_copy(update={"convention": "scalar", "unit": "-", "low": (-1e6,), "high": (1e6,)})
    eef = spec.action[0].model_copy(update={"low": (-0.001,) * 3, "high": (0.001,) * 3})
    spec = spec.model_copy(update={"state": (*spec.state[:2], gripper), "action": (eef, *spec.action[1:])})
    found = check(write_sound(tmp_path / "ds", None, spec), frames=False)
    assert {f.dimension for f in found if f.code == "outside-limits"} == {"eef.x", "eef.y", "eef.z"}
    assert not [f for f in found if f.code in ("undeclared", "constant-dimension")]


# ---- words ----


class Mute(ToySource):
    """Without words, but for the episodes of `speaking`."""

    speaking: tuple[str, ...] = ()
    asked: list[str] = []

    def read(self, key: str, only: Any = None) -> RawEpisode:
        self.asked.append(key)
        raw = super().read(key, only)
        return raw if key in self.speaking else dataclasses.replace(raw, instruction="")


def test_words_are_asked_for_before_the_first_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(conversion, "open_source", lambda path, kind=None: Mute(path))
    monkeypatch.setattr(Mute, "asked", [])
    src = write_toy(tmp_path / "src", 20)
    with pytest.raises(DataError, match="pass --instruction TEXT"):
        run(src, tmp_path / "ds")
    assert not (tmp_path / "ds").exists() and Mute.asked == ["ep-000", "ep-010", "ep-019"]
    assert "QUARANTINED" not in capsys.readouterr().err
    assert run(src, tmp_path / "ds", instruction="lift")["episodes"] == 20


def test_one_mute_episode_is_left_out_and_not_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversion, "open_source", lambda path, kind=None: Mute(path))
    monkeypatch.setattr(Mute, "speaking", tuple(f"ep-{n:03d}" for n in range(1, 9)))
    summary = run(write_toy(tmp_path / "src", 9), tmp_path / "ds")
    assert summary["episodes"] == 8 and [q["key"] for q in summary["quarantined"]] == ["ep-000"]


def test_instructions_that_change_are_not_called_identical(tmp_path: Path):
    summary = run(GOLDEN / "rlds" / "wide", tmp_path / "ds", fps=5.0)
    changing = summary["instructions_changing"]
    assert changing > 0 and f"instructions identical (the first of an episode; {changing} episode" in sentence(summary)
    assert summary["rounded"] == [], "its numbers are float32"


# ---- the source ----


def test_the_fingerprint_says_what_it_does_not_cover(tmp_path: Path):
    path = tmp_path / "long"
    path.write_bytes(bytes(1 << 18))
    before = fingerprint(path)
    path.write_bytes(bytes(1 << 17) + b"x" + bytes((1 << 17) - 1))
    assert fingerprint(path) == before, "the middle is not read"
    path.write_bytes(b"x" + bytes((1 << 18) - 1))
    assert fingerprint(path) != before
    summary = run(_toys(tmp_path), tmp_path / "ds", card=Card(name="toy"))
    assert "not what lies between" in summary["source_listing_covers"] and len(summary["source_listing_sha256"]) == 64


def _toys(folder: Path) -> Path:
    return write_sound(folder / "toys", cameras=("front",))
