"""`vla data stats --against POLICY`: which data fits which policy, per dimension, and OpenVLA's file."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import LIMIT
from faults.test_check_conventions import bare, each, redeclared, with_action, with_state  # type: ignore[import-not-found]
from sound_dataset import sound_spec, write_sound

from data_tools.against import fit, lines, read_meaning
from data_tools.norm_stats import read_norm_stats
from vla.cli import main
from vla.embodiment import EmbodimentSpec
from vla.episodes.layout import read_layout
from vla.episodes.rows import read_rows
from vla.errors import CheckpointError, DataError, UsageError
from vla.normalize import Normalizer, Stats


def policy_of(root: Path, folder: Path, key: str | None = None, mask: list[bool] | None = None) -> Path:
    """A policy.json as training on `root` would leave it."""
    layout, problems = read_layout(root, None, need_stats=False)
    rows = read_rows(layout, problems)
    assert rows is not None
    key = key or layout.spec.key
    parts = {"action": Normalizer(Stats.of(rows.action), "q99", mask), "state": Normalizer(Stats.of(rows.state), "bounds")}
    folder.mkdir(parents=True, exist_ok=True)
    meaning = {"embodiments": {key: layout.spec.model_dump(mode="json")},
               "normalizers": {key: {part: n.to_json() for part, n in parts.items()}}}  # fmt: skip
    (folder / "policy.json").write_text(json.dumps(meaning))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder trained on the sound dataset."""
    folder = tmp_path_factory.mktemp("trained")
    root = bare(folder, None, sound_spec(cameras=()), episodes=32)
    return policy_of(root, folder / "run" / "policy").parent


def changed(folder: Path, change, spec: EmbodimentSpec | None = None) -> Path:
    return bare(folder, each(change), spec, episodes=32)


def by_name(root: Path, policy: Path, verdict: str) -> dict[str, str]:
    return {f"{d.part} {d.name}": d.reason for d in fit(root, policy).dimensions if d.verdict == verdict}


def test_other_episodes_of_the_same_robot_fit(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = bare(tmp_path, None, first=100, episodes=32)
    result = fit(root, trained)
    assert result.verdict != "misfit" and not result.differences and len(result.dimensions) == 15
    assert main(["data", "stats", str(root), "--against", str(trained)]) == 0
    assert "it fits" in capsys.readouterr().out
    before = (root / "meta/stats.json").read_bytes()
    assert main(["data", "stats", str(root), "--against", str(trained), "--write"]) == 2
    assert main(["data", "stats", str(root), "--robot", "tabletop"]) == 2, "a flag that does nothing is refused"
    assert (root / "meta/stats.json").read_bytes() == before


def test_its_own_data_fits_without_a_remark(trained: Path):
    result = fit(trained.parent / "d", trained)
    assert result.verdict == "fits"
    off = [d for d in result.dimensions if d.clipped >= 0.03 or abs(d.shift) > 1e-3 or abs(d.scale - 1) > 1e-3]
    assert not off and min(d.overlap for d in result.dimensions) > 0.9999


def test_other_units_do_not_fit_and_are_guessed(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    spec = redeclared(sound_spec(cameras=()), "action", 1, low=(-30,) * 3, high=(30,) * 3)
    root = changed(tmp_path, lambda e: with_action(e, slice(3, 6), e.action[:, 3:6] * np.float32(57.29578)), spec)
    misfits = by_name(root, trained, "misfit")
    assert set(misfits) == {"action turn.x", "action turn.y", "action turn.z"}
    assert all("perhaps in degrees" in reason and "clipped" in reason for reason in misfits.values())
    assert main(["data", "stats", str(root), "--against", str(trained), "--json"]) == 3
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] is False and {d["name"] for d in said["dimensions"] if d["verdict"] == "misfit"} >= {"turn.x"}


def test_an_exchanged_sense_does_not_fit_by_its_description(trained: Path, tmp_path: Path):
    spec = redeclared(sound_spec(cameras=()), "action", 2, convention="gripper_open_positive")
    result = fit(changed(tmp_path, lambda e: with_action(e, slice(6, 7), 1 - e.action[:, 6:7]), spec), trained)
    assert ("misfit", "action.gripper.convention: gripper_closed_positive against gripper_open_positive") in result.differences


def test_another_place_does_not_fit(trained: Path, tmp_path: Path):
    misfits = by_name(changed(tmp_path, lambda e: with_state(e, slice(0, 1), e.state[:, :1] + 5)), trained, "misfit")
    assert list(misfits) == ["state eef.x"] and "standard deviations away" in misfits["state eef.x"]


def test_a_tenth_of_the_motion_deserves_a_look(trained: Path, tmp_path: Path):
    root = changed(tmp_path, lambda e: with_action(e, slice(0, 3), e.action[:, :3] / 10))
    assert all("less spread" in reason for reason in by_name(root, trained, "look").values())
    assert not by_name(root, trained, "misfit")


def test_what_the_policy_never_saw_move_does_not_fit(tmp_path: Path):
    still = changed(tmp_path / "a", lambda e: with_action(e, slice(6, 7), 0 * e.action[:, 6:7]))
    policy = policy_of(still, tmp_path / "policy")
    misfits = by_name(bare(tmp_path / "b", None, episodes=32), policy, "misfit")
    assert list(misfits) == ["action gripper.close"] and "masked" in misfits["action gripper.close"]


def test_a_dimension_that_passes_unnormalised_is_held_against_the_unit_range(trained: Path, tmp_path: Path):
    policy = policy_of(trained.parent / "d", tmp_path / "policy", mask=[True] * 6 + [False])
    grip = {d.name: d for d in fit(trained.parent / "d", policy).dimensions}["gripper.close"]
    assert grip.policy == (-1, 1) and grip.clipped == 0


def test_missing_cameras_and_other_dimensions_do_not_fit(trained: Path, tmp_path: Path):
    filmed = write_sound(tmp_path / "filmed", cameras=("front",))
    policy = policy_of(filmed, tmp_path / "policy")
    assert ("misfit", "cameras ['front'] are missing; the dataset has []") in fit(trained.parent / "d", policy).differences
    spec = sound_spec(cameras=())
    spec = spec.model_copy(update={"action": spec.action[:1]})
    result = fit(changed(tmp_path / "few", lambda e: dataclasses.replace(e, action=e.action[:, :3]), spec), trained)
    assert ("misfit", "action: 3 dimensions, the policy's has 7") in result.differences


def test_data_without_a_description_is_compared_by_numbers(trained: Path, tmp_path: Path):
    root = bare(tmp_path, None, first=100, episodes=32)
    (root / "meta" / "embodiment.json").unlink()
    result = fit(root, trained)
    assert result.verdict == "look" and result.robot == "sound"
    assert any("no conventions" in what for _, what in result.differences)


def test_a_robot_must_be_one_of_the_policys(trained: Path):
    with pytest.raises(UsageError, match="sound"):
        fit(trained.parent / "d", trained, robot="other")


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"embodiments": {}, "normalizers": {}}', None])
def test_what_is_no_policy_folder_is_refused(content: str | None, trained: Path, tmp_path: Path):
    if content is not None:
        (tmp_path / "policy.json").write_text(content)
    with pytest.raises(CheckpointError):
        fit(trained.parent / "d", tmp_path)


def test_the_table_names_the_worst_first(trained: Path, tmp_path: Path):
    result = fit(changed(tmp_path, lambda e: with_state(e, slice(2, 3), e.state[:, 2:3] - 9)), trained)
    said = "\n".join(lines(result))
    assert said.index("misfit state "
    "eef.z") < said.index("fits   action") and "it does not fit" in said and "vla data convert" in said


def test_no_torch_is_needed(trained: Path):
    code = "import sys; from data_tools.against import fit; fit(*sys.argv[1:]); print('torch' in sys.modules)"
    words = [sys.executable, "-c", code, str(trained.parent / "d"), str(trained)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout.strip() == "False", done.stderr


def test_openvla_statistics_are_written(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "dataset_statistics.json"
    assert main(["data", "stats", str(trained.parent / "d"), "--openvla", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    entry = read_norm_stats(out)
    _, normalizers = read_meaning(trained)
    assert np.allclose(entry.action.values["q99"], normalizers["sound"]["action"].stats.values["q99"])
    assert entry.mask is not None and entry.mask.tolist() == [True] * 6 + [False]
    assert (entry.num_transitions, entry.num_trajectories) == (1280, 32)




# --- OpenVLA's and openpi's statistics --------------------------------------------------------------------------------


def of_rows(root: Path, wide: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """(action, state) statistics of `root` as JSON, filled up with zeros to `wide` dimensions."""
    layout, problems = read_layout(root, None, need_stats=False)
    rows = read_rows(layout, problems)
    assert rows is not None
    parts = []
    for values in (rows.action, rows.state):
        filled = np.pad(values, ((0, 0), (0, max(0, wide - values.shape[1]))))
        entry = Stats.of(filled).to_json()
        parts.append({name: entry[name] for name in ("mean", "std", "min", "max", "q01", "q99")})
    return parts[0], parts[1]


def openvla(root: Path, folder: Path, *names: str, file: str = "dataset_statistics.json") -> Path:
    action, state = of_rows(root)
    entry = {"action": action | {"mask": [True] * 6 + [False]}, "proprio": state, "num_transitions": 1, "num_trajectories": 1}
    other = json.loads(json.dumps(entry))
    other["action"] = {name: [10 * n for n in numbers] if name != "mask" else numbers for name, numbers in action.items()}
    content = {name: entry if name == names[0] else other for name in names}
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps({"norm_stats": content} if file == "config.json" else content))
    return folder


@pytest.mark.parametrize("file", ["dataset_statistics.json", "config.json"])
def test_openvlas_statistics_are_held_against_each_dimension(file: str, trained: Path, tmp_path: Path):
    root = trained.parent / "d"
    folder = openvla(root, tmp_path / "openvla", "mine", file=file)
    for path in (folder, folder / file):
        result = fit(root, path)
        assert (result.verdict, result.robot) == ("look", "mine") and len(result.dimensions) == 15
        assert {d.verdict for d in result.dimensions} == {"fits"} and "only numbers" in result.differences[0][1]
    grip = {d.name: d for d in result.dimensions}["gripper.close"]
    assert grip.policy == (-1, 1), "masked: it passes unnormalised"
    far = changed(tmp_path / "far", lambda e: with_action(e, slice(3, 6), e.action[:, 3:6] * np.float32(57.29578)),
                  redeclared(sound_spec(cameras=()), "action", 1, low=(-30,) * 3, high=(30,) * 3))  # fmt: skip
    assert set(by_name(far, folder, "misfit")) == {"action turn.x", "action turn.y", "action turn.z"}


def test_one_of_several_datasets_is_chosen(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = trained.parent / "d"
    folder = openvla(root, tmp_path / "openvla", "bridge_orig", "kuka", "viola")
    line = ["data", "stats", str(root), "--against", str(folder)]
    assert main(line) == 2 and "bridge_orig, kuka, viola" in capsys.readouterr().err
    assert main([*line, "--key", "bridge"]) == 2 and "--key bridge_orig" in capsys.readouterr().err
    assert main([*line, "--key", "bridge_orig", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["robot"] == "bridge_orig"
    assert main([*line, "--robot", "kuka"]) == 0 and "10.0 times less spread" in capsys.readouterr().out
    named = openvla(root, tmp_path / "named", "d", "kuka")
    assert fit(root, named).robot == "d", "its own name is taken"
    assert main(["data", "stats", str(root), "--key", "kuka"]) == 2


def test_openpis_statistics_are_read_where_a_checkpoint_keeps_them(trained: Path, tmp_path: Path):
    root = trained.parent / "d"
    action, state = of_rows(root, wide=32)
    normal = {"norm_stats": {"state": {k: state[k] for k in ("mean", "std")}, "actions": action}}
    for name in ("droid", "lab/arm"):
        (tmp_path / "pi0" / "assets" / name).mkdir(parents=True)
        (tmp_path / "pi0" / "assets" / name / "norm_stats.json").write_text(json.dumps(normal))
    with pytest.raises(UsageError, match="droid, lab/arm"):
        fit(root, tmp_path / "pi0")
    for result in (fit(root, tmp_path / "pi0", "lab/arm"), fit(root, tmp_path / "pi0/assets/droid/norm_stats.json")):
        assert result.verdict == "look" and {d.verdict for d in result.dimensions} == {"fits"} and len(result.dimensions) == 15
        assert ("look", "action: the last 25 of 32 dimensions of the statistics are padding") in result.differences
        one = {d.name: d for d in result.dimensions if d.part == "state"}["eef.x"]
        assert np.isclose(one.policy[1] - one.policy[0], 6 * state["std"][0], rtol=1e-5), "no quantiles: three deviations"


def test_other_widths_and_broken_statistics_are_named(trained: Path, tmp_path: Path):
    root = trained.parent / "d"
    action, state = of_rows(root)
    short = {"mine": {"action": {name: numbers[:6] for name, numbers in action.items()}, "proprio": state}}
    (tmp_path / "other.json").write_text(json.dumps(short))
    assert ("misfit", "action: 7 dimensions, the policy's has 6") in fit(root, tmp_path / "other.json").differences
    (tmp_path / "other.json").write_text(json.dumps({"mine": {"action": action | {"q01": action["q99"], "q99": action["q01"]}}}))
    with pytest.raises(DataError, match="q01 above q99"):
        fit(root, tmp_path / "other.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(DataError, match="without statistics"):
        fit(root, tmp_path)
