"""Run folders: atomic, verified, owned by one."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch

from vla.checkpoint import Run, iter_log, publish, verify, write_atomic
from vla.errors import CheckpointError, MachineError, UsageError


def save(run, step, value=1.0, keep=3):
    return run.save(step, {"w": torch.full((100,), value)}, {"config": {}}, lambda into: into.mkdir(), keep)


def newest_step(run):
    found = run.newest()
    assert found
    return found[1]["step"]


def test_newest_intact_checkpoint_wins_and_damage_is_named(tmp_path):
    run, said = Run(tmp_path), []
    for step in (1, 2, 3):
        save(run, step, float(step))
    state = tmp_path / "checkpoints/step_00000003/state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1  # safetensors alone would load this
    state.write_bytes(data)
    (tmp_path / "checkpoints/step_00000002/training.json").unlink()
    found = run.newest(said.append)
    assert found
    folder, facts, tensors = found
    assert facts["step"] == 1 and tensors["w"][0] == 1.0 and folder.name == "step_00000001"
    assert any("sha256" in s for s in said) and any("missing" in s for s in said)


@pytest.mark.parametrize("cut", [0, 4, 50, 0.5, -1])
def test_truncated_files_are_detected(tmp_path, cut):
    run = Run(tmp_path)
    state = save(run, 1) / "state.safetensors"
    size = state.stat().st_size
    with open(state, "r+b") as file:
        file.truncate(int(size * cut) if isinstance(cut, float) else cut % size)
    with pytest.raises(CheckpointError, match="bytes"):
        run.newest(lambda text: None)


def test_pruning_keeps_the_newest(tmp_path):
    run = Run(tmp_path)
    for step in range(1, 6):
        save(run, step, keep=2)
    assert run.steps() == [4, 5] and newest_step(run) == 5
    assert Run(tmp_path / "empty").newest() is None


def test_failed_write_leaves_the_old_folder(tmp_path):
    def good(into):
        into.mkdir()
        (into / "a").write_text("old")

    def bad(into):
        into.mkdir()
        (into / "a").write_text("new")
        raise OSError(28, "No space left on device")

    publish(tmp_path / "x", good)
    with pytest.raises(MachineError, match="No space left"):
        publish(tmp_path / "x", bad)
    assert (tmp_path / "x/a").read_text() == "old" and verify(tmp_path / "x") == []
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_disk_full_while_saving_keeps_the_last_good_state(tmp_path):
    """A real limit of the kernel, in a process of its own: RLIMIT_FSIZE stops the write half way."""
    save(Run(tmp_path), 1)
    code = f"""
import resource, signal, torch
from pathlib import Path
from vla.checkpoint import Run
from vla.errors import MachineError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    Run(Path({str(tmp_path)!r})).save(2, {{"w": torch.zeros(1_000_000)}}, {{}}, lambda into: into.mkdir(), 3)
except MachineError as error:
    print("refused:", error.found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("refused:"), done.stderr
    run = Run(tmp_path)
    assert run.steps() == [1] and newest_step(run) == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000001"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 200_000


def test_one_owner(tmp_path):
    run = Run(tmp_path)
    run.claim()
    code = f"from vla.checkpoint import Run; from pathlib import Path; Run(Path({str(tmp_path)!r})).claim()"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert other.returncode != 0 and f"pid {os.getpid()}" in other.stderr and UsageError.__name__ in other.stderr
    run.release()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_log_survives_a_cut_line_and_is_trimmed(tmp_path):
    run = Run(tmp_path)
    for step in range(1, 6):
        run.log({"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert [r["step"] for r in iter_log(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    run.trim_log(3)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_write_atomic_replaces(tmp_path):
    path = tmp_path / "a.json"
    for text in ("one", "two"):
        write_atomic(path, text)
    assert path.read_text() == "two" and len(list(tmp_path.iterdir())) == 1
