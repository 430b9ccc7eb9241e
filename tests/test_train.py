"""Training for real, tiny: through accelerate's launcher, killed, resumed, on one and two processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vla.checkpoint import iter_log
from vla.config import validate
from vla.errors import DataError, DivergedError, UsageError
from vla.mixture import Mixture
from vla.train import TrainConfig, learning_rate, train

SMALL = {"hidden": 32, "layers": 2, "heads": 2, "mlp": 64, "tower_channels": [8, 8, 16], "keypoints": 8, "text_vocab": 320}


def config_for(demos, out: Path, **changes) -> dict:
    values = {
        "run": {"out": str(out), "steps": 12, "log_every": 1, "eval_every": 6, "eval_windows": 8, "save_every": 2, "keep": 0,
                "precision": "no", "processes": 1},
        "mixture": {"datasets": [{"path": str(demos["tabletop"]), "weight": 3}, {"path": str(demos["metaworld"])}],
                    "cache_dir": str(demos["tabletop"].parent / "cache"), "holdout": 0.1},
        "policy": {"backbone": SMALL, "normalization": {"action": "bounds", "state": "bounds"}},
        "optim": {"batch": 8, "warmup": 2},
    }  # fmt: skip
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    return values


def build(values: dict) -> TrainConfig:
    return validate(values, TrainConfig, "test")


def losses(out: Path) -> list:
    return [r["loss"] for r in iter_log(out / "metrics.jsonl") if r["kind"] == "train"]


def start(tmp_path: Path, values: dict, *extra: str) -> subprocess.Popen[str]:
    """The documented command line, in a process group of its own."""
    path = tmp_path / f"{Path(values['run']['out']).name}.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "vla.cli", "train", str(path), *extra]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def launch(tmp_path: Path, values: dict, *extra: str) -> tuple[int, str]:
    process = start(tmp_path, values, *extra)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def wait_for_lines(process: subprocess.Popen[str], log: Path, count: int) -> None:
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline and len(list(iter_log(log))) < count:
        time.sleep(0.01)
    assert len(list(iter_log(log))) >= count


@pytest.fixture(scope="module")
def straight(demos, tmp_path_factory):
    """An uninterrupted run, for comparison."""
    out = tmp_path_factory.mktemp("straight") / "run"
    train(build(config_for(demos, out)))
    return out


def test_a_run_leaves_a_policy_a_log_and_a_status(straight):
    assert json.loads((straight / "STATUS.json").read_text())["state"] == "finished"
    assert len(losses(straight)) == 12 and np.isfinite(losses(straight)).all()
    heldout = [r for r in iter_log(straight / "metrics.jsonl") if r["kind"] == "heldout"]
    assert [r["step"] for r in heldout] == [6, 12]
    assert set(heldout[0]["l1"]) == {"tabletop", "metaworld_sawyer"} and "eef.dx" in heldout[0]["l1"]["tabletop"]
    from vla.policy import load_policy

    assert set(load_policy(straight, device="cpu").embodiments) == {"tabletop", "metaworld_sawyer"}


@pytest.mark.parametrize("workers", [0, 2])
def test_sigkill_and_resume_give_the_uninterrupted_run_bit_for_bit(demos, straight, tmp_path, workers):
    values = config_for(demos, tmp_path / "killed", run__workers=workers)
    process = start(tmp_path, values)
    wait_for_lines(process, tmp_path / "killed/metrics.jsonl", random.Random(workers).randint(3, 10))
    os.kill(json.loads((tmp_path / "killed/STATUS.json").read_text())["pid"], signal.SIGKILL)
    process.communicate(timeout=90)
    code, output = launch(tmp_path, values, "--resume")
    assert code == 0, output
    assert losses(tmp_path / "killed") == losses(straight)
    last = "checkpoints/step_00000012/state.safetensors"
    a, b = load_file(tmp_path / "killed" / last), load_file(straight / last)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_two_processes_learn_what_one_does(demos, straight, tmp_path):
    code, output = launch(tmp_path, config_for(demos, tmp_path / "two", run__processes=2))
    assert code == 0, output
    assert np.allclose(losses(tmp_path / "two"), losses(straight), rtol=1e-4)
    a, b = (load_file(p / "policy/model.safetensors") for p in (tmp_path / "two", straight))
    assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)


def test_accumulation_equals_the_whole_batch(demos, straight, tmp_path):
    train(build(config_for(demos, tmp_path / "micro", optim__micro_batch=3, run__eval_every=100)))
    assert np.allclose(losses(tmp_path / "micro"), losses(straight), rtol=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_exits_75(demos, tmp_path, processes):
    """The whole group is signalled, as a scheduler does it; launchers would report 1."""
    values = config_for(demos, tmp_path / "term", run__steps=5000, run__save_every=4000, run__eval_every=4000,
                        run__processes=processes, run__workers=processes - 1)  # fmt: skip
    process = start(tmp_path, values)
    wait_for_lines(process, tmp_path / "term/metrics.jsonl", 3)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75, output
    assert json.loads((tmp_path / "term/STATUS.json").read_text())["state"] == "preempted"
    assert list((tmp_path / "term/checkpoints").glob("step_*/manifest.json"))


def test_ctrl_c_saves_without_a_traceback(demos, tmp_path):
    values = config_for(demos, tmp_path / "c", run__steps=5000, run__save_every=4000, run__eval_every=4000)
    process = start(tmp_path, values)
    wait_for_lines(process, tmp_path / "c/metrics.jsonl", 2)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75 and "Traceback" not in output, output


def test_resume_mends_a_policy_folder_the_crash_left_behind(demos, straight, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "policy")
    shutil.copytree(out / "checkpoints/step_00000006/policy", out / "policy")
    train(build(config_for(demos, out)), resume=True)
    a, b = (json.loads((out / p / "policy.json").read_text()) for p in ("policy", "checkpoints/step_00000012/policy"))
    assert a["fingerprint"] == b["fingerprint"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_stops_every_process_with_the_data_code(demos, tmp_path, monkeypatch, workers):
    values = config_for(demos, tmp_path / "bad", run__workers=workers)
    good = Mixture.window

    def window(self, n):
        made = good(self, n)
        return replace(made, actions=made.actions * np.nan) if n == 21 else made  # pyright: ignore

    monkeypatch.setattr(Mixture, "window", window)
    with pytest.raises(DataError, match="finite"):
        train(build(values))
    assert json.loads((tmp_path / "bad/STATUS.json").read_text())["state"] == "failed"


def test_exit_codes_reach_the_shell(demos, tmp_path):
    missing = config_for(demos, tmp_path / "x", run__processes=2)
    missing["mixture"]["datasets"][0]["path"] = str(tmp_path / "nowhere")
    code, output = launch(tmp_path, missing)
    assert code == 3 and "nowhere" in output and "Traceback" not in output
    code, output = launch(tmp_path, config_for(demos, tmp_path / "x"), "optim.lrr=1")
    assert code == 2 and "did you mean 'lr'" in output and not (tmp_path / "x").exists()


def test_fewer_processes_than_asked_is_refused(demos, tmp_path):
    with pytest.raises(UsageError, match="1 process"):
        train(build(config_for(demos, tmp_path / "x", run__processes=2)))
    assert not (tmp_path / "x").exists()


def test_an_existing_run_is_never_overwritten_and_a_changed_config_is_refused(demos, straight):
    before = sorted((p, p.stat().st_mtime_ns) for p in (straight / "checkpoints").rglob("*"))
    with pytest.raises(UsageError, match="--resume"):
        train(build(config_for(demos, straight)))
    with pytest.raises(UsageError, match=r"policy.codec.bins"):
        train(build(config_for(demos, straight, policy__codec={"bins": 128})), resume=True, allow_change=("policy.codec.bins",))
    with pytest.raises(UsageError, match=r"optim.clip.*\n.*\n.*--allow-change optim.clip"):
        train(build(config_for(demos, straight, optim__clip=2.0)), resume=True)
    assert sorted((p, p.stat().st_mtime_ns) for p in (straight / "checkpoints").rglob("*")) == before


def test_non_finite_gradients_are_not_applied_and_stop_the_run(demos, tmp_path, monkeypatch):
    from vla.policy import VLAPolicy

    forward, calls = VLAPolicy.forward, []

    def broken(self, batch):
        loss = forward(self, batch)
        calls.append(1)
        factor = float("nan") if len(calls) > 3 else 1.0
        return replace(loss, action=loss.action * factor)

    monkeypatch.setattr(VLAPolicy, "forward", broken)
    with pytest.raises(DivergedError, match="3 steps"):
        train(build(config_for(demos, tmp_path / "nan", optim__ema=0.0, run__eval_every=100)))
    assert json.loads((tmp_path / "nan/STATUS.json").read_text())["state"] == "diverged"
    assert [p.name for p in (tmp_path / "nan/checkpoints").iterdir()] == ["step_00000002"]  # nothing is kept while it is ill
    saved = load_file(tmp_path / "nan/checkpoints/step_00000002/state.safetensors")
    assert all(torch.isfinite(t).all() for t in saved.values())


def test_learning_rate_warms_up_and_decays(tmp_path):
    config = build({"run": {"out": "x", "steps": 100}, "mixture": {"datasets": [{"path": "x"}]}, "optim": {"warmup": 10}})
    rates = [learning_rate(s, config) for s in range(100)]
    assert rates[0] == pytest.approx(1e-4) and rates[10] == pytest.approx(1e-3) and rates[99] < 1e-6
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
