"""`vla doctor`: it survives what it examines, tells which trials failed, and says how to mend it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
from children import LIMIT

from vla import doctor
from vla.doctor import FAIL, OK, WARN, Check

GOOD = {
    "torch": {"cuda": [], "built_for_cuda": "13.0", "mps": False, "cpu": "AVX2", "threads": 2, "bf16_speedup": 0.4},
    "accelerate": {"device": "cpu", "processes": 1, "type": "NO", "config": False},
    "video": {"codecs": ["libx264", "libsvtav1"]},
    "render-egl": {"red": [190, 60, 60], "fps": 2000.0},
    "render-osmesa": {"red": [190, 60, 60], "fps": 1000.0},
    "render-native": {"red": [190, 60, 60], "fps": 1000.0},
}


@pytest.fixture()
def machine(monkeypatch: pytest.MonkeyPatch):
    """A Linux machine with everything, whose trials a test can spoil: `machine["video"] = {"error": ...}`."""
    answers = {name: dict(answer) for name, answer in GOOD.items()}
    monkeypatch.setattr(doctor, "_try_apart", lambda trial, timeout: answers[trial])
    monkeypatch.setattr(doctor, "_version", lambda package: "99.0")
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    return answers


def named(checks: list[Check], name: str) -> Check:
    (check,) = [c for c in checks if c.name == name]
    return check


def test_a_whole_machine_has_no_failure(machine):
    checks = doctor.diagnose()
    assert not [c for c in checks if c.status == FAIL and c.group != "machine"]  # the disk here is nobody's promise
    assert {"software", "machine", "devices", "video", "renderer"} == {c.group for c in checks}
    assert "fp32" in named(checks, "cpu").found


def test_torchvision_that_does_not_fit_its_torch_is_named(machine):
    machine["torch"] = {"error": "RuntimeError: operator torchvision::nms does not exist"}
    check = named([c for c in doctor.diagnose() if c.group == "devices"], "torch")
    assert check.status == FAIL and "torchvision" in check.fix


def test_one_renderer_is_enough(machine):
    machine["render-osmesa"] = {"error": "no OSMesa"}
    check = named(doctor.diagnose(), "osmesa")
    assert check.status == WARN and "libosmesa6" in check.fix


def test_no_renderer_is_a_failure_with_both_fixes(machine):
    machine["render-egl"] = {"error": "no display"}
    machine["render-osmesa"] = {"red": [0, 0, 0], "fps": 1.0}  # it draws, but black
    checks = [c for c in doctor.diagnose() if c.group == "renderer"]
    assert [c.status for c in checks] == [FAIL, FAIL]
    assert "libegl1" in checks[0].fix and "wrong picture" in checks[1].found


def test_a_setting_that_points_at_the_broken_renderer_is_a_failure(machine):
    machine["render-egl"] = {"error": "no display"}
    check = named(doctor.diagnose(), "MUJOCO_GL")
    assert check.status == FAIL and check.fix == "export MUJOCO_GL=osmesa"


def test_no_simulator_is_a_warning(machine, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "mujoco" else "99.0")
    checks = [c for c in doctor.diagnose() if c.group == "renderer"]
    assert [c.status for c in checks] == [WARN] and "[sim]" in checks[0].fix


def test_old_and_missing_packages_fail(machine, monkeypatch):
    versions = {"torch": "2.9.1+cpu", "peft": None}
    monkeypatch.setattr(doctor, "_version", lambda package: versions.get(package, "99.0"))
    checks = [c for c in doctor.diagnose() if c.group == "software"]
    assert {c.name for c in checks if c.status == FAIL} == {"torch", "peft"}
    assert "torch>=2.10" in named(checks, "torch").fix


def test_versions_compare_as_numbers():
    assert doctor._parts("2.9.1+cpu") < doctor._parts("2.10") <= doctor._parts("2.10.0rc1")
    assert doctor._parts("2.10.0.dev20260101") >= (2, 10)


def test_floors_are_those_of_the_project(checkout):
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    declared = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for package, floor in doctor.REQUIRED.items():
        lowest = next(s.version for s in declared[package] if s.operator == ">=")
        assert doctor._parts(lowest)[: len(doctor._parts(floor))] == doctor._parts(floor), package


def test_video_really_goes_there_and_back():
    assert "libx264" in doctor._try_apart("video", 60)["codecs"]


def test_torch_and_accelerate_are_really_asked():
    torch, accelerate = doctor._try_apart("torch", 120), doctor._try_apart("accelerate", 120)
    assert torch["threads"] >= 1 and torch["bf16_speedup"] > 0
    assert accelerate["processes"] == 1
    assert [c.status for c in [*doctor._torch(torch), *doctor._accelerate(accelerate)] if c.status == FAIL] == []


def test_a_scene_is_really_rendered():
    pytest.importorskip("mujoco")
    answers = [doctor._try_apart(f"render-{backend}", 60) for backend in ("egl", "osmesa")]
    shown = [a for a in answers if "red" in a]
    assert shown or all(a["error"] for a in answers)  # a machine without a renderer still gets its reasons
    assert all(a["red"][0] > 2 * a["red"][2] and a["fps"] > 0 for a in shown)


def test_a_trial_that_crashes_or_hangs_does_not_take_the_doctor_along(monkeypatch):
    assert "KeyError" in doctor._try_apart("nonsense", 60)["error"]

    def hang(*args, **kwargs):
        raise subprocess.TimeoutExpired("trial", kwargs["timeout"])

    monkeypatch.setattr(doctor.subprocess, "run", hang)
    assert "7 s" in doctor._try_apart("video", 7.0)["error"]


@pytest.mark.parametrize(("status", "code"), [(OK, 0), (WARN, 0), (FAIL, 5)])
def test_exit_code_and_json(monkeypatch, capsys, status, code):
    monkeypatch.setattr(doctor, "diagnose", lambda: [Check("video", "PyAV", status, "as found", "as mended")])
    assert doctor.run(argparse.Namespace(json=True)) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] == (code == 0) and answer["checks"][0]["fix"] == "as mended"
    assert doctor.run(argparse.Namespace(json=False)) == code
    text = capsys.readouterr().out
    assert "PyAV" in text and "fix: as mended" in text


def test_the_parser_offers_help_with_an_example(capsys):
    parser = argparse.ArgumentParser()
    doctor.add_doctor_parser(parser.add_subparsers())
    args = parser.parse_args(["doctor", "--json"])
    assert args.json and args.run is doctor.run
    with pytest.raises(SystemExit):
        parser.parse_args(["doctor", "--help"])
    assert "example: vla doctor" in capsys.readouterr().out


def test_importing_the_doctor_imports_nothing_heavy():
    code = "import sys, vla.doctor; print({'torch', 'numpy', 'mujoco', 'av'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
