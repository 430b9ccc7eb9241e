"""Run folders: atomic, verified, owned by one."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vla.checkpoint import Run, iter_log, pack_optimizer, publish, unpack_optimizer, verify
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


def write(text):
    def into(folder):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep/a").write_text(text)

    return into


class Crash(BaseException):
    """A kill, as far as our own code can see one: nothing after it may run."""


@pytest.fixture()
def renames(monkeypatch):
    """`renames(n, error)`: the n-th `Path.rename` from now raises instead."""
    real = Path.rename

    def arm(failing, error):
        calls = []

        def rename(self, target):
            calls.append(target)
            if len(calls) == failing:
                raise error
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)

    yield arm


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_rename_that_fails_leaves_everything_as_it_was(tmp_path, renames, failing, error):
    publish(tmp_path / "policy", write("old"))
    renames(failing, error)
    with pytest.raises(type(error)):
        publish(tmp_path / "policy", write("new"))
    assert [p.name for p in tmp_path.iterdir()] == ["policy"] and verify(tmp_path / "policy") == []
    assert (tmp_path / "policy/deep/a").read_text() == "old"


def crash_between_the_renames(folder, monkeypatch):
    """What a kill between them leaves: the old folder and the new one, both under hidden names."""
    import vla.checkpoint as checkpoint

    real = Path.rename

    def rename(self, target):
        if not Path(target).name.startswith("."):  # the one that brings the new folder, and any attempt to go back
            raise Crash
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: None)
        with pytest.raises(Crash):
            publish(folder, write("new"))
    assert not folder.exists() and len(list(folder.parent.glob(".*"))) == 2


@pytest.mark.parametrize("place", ["policy", "checkpoints/step_00000002"])
@pytest.mark.parametrize("new_is_whole", [True, False])
def test_a_crash_between_the_renames_is_mended_by_the_next_owner(tmp_path, monkeypatch, place, new_is_whole):
    folder = tmp_path / place
    publish(folder, write("old"))
    crash_between_the_renames(folder, monkeypatch)
    if not new_is_whole:
        (file,) = folder.parent.glob(".*.tmp-*/deep/a")
        file.write_text("ne")
    (tmp_path / ".STATUS.json.tmp-1").write_text("{")
    run = Run(tmp_path)
    run.claim()
    assert verify(folder) == [] and (folder / "deep/a").read_text() == ("new" if new_is_whole else "old")
    assert not [*tmp_path.rglob(".*.tmp-*"), *tmp_path.rglob(".*.old-*")]
    run.release()


def test_what_is_left_over_goes_when_the_folder_is_there(tmp_path):
    publish(tmp_path / "policy", write("current"))
    for name in (".policy.tmp-7", ".policy.old-7"):
        publish(tmp_path / name, write("stale"))
    (tmp_path / ".lonely.tmp-7").mkdir()  # begun, never finished: nothing to promote
    Run(tmp_path).claim()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "policy"]
    assert (tmp_path / "policy/deep/a").read_text() == "current"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {}}}', "\x00"])
def test_a_damaged_manifest_is_a_finding(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    assert verify(tmp_path)


def test_disk_full_while_logging_keeps_whole_lines(tmp_path):
    code = f"""
import resource, signal
from pathlib import Path
from vla.checkpoint import Run
from vla.errors import MachineError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
run = Run(Path({str(tmp_path)!r}))
for said in (lambda: [run.log({{"step": step}}) for step in range(1000)], lambda: run.status("x" * 2000)):
    try:
        said()
    except MachineError as error:
        print("refused:", error.where)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [f"refused: {tmp_path / n}" for n in ("metrics.jsonl", "STATUS.json")], done.stderr
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("}\n") and 980 < len(text) <= 1000
    assert [r["step"] for r in iter_log(tmp_path / "metrics.jsonl")] == list(range(text.count("\n")))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def step_once(parameter, optimizer):
    optimizer.zero_grad()
    (parameter**2).sum().backward()
    optimizer.step()


def test_the_optimizer_goes_on_where_it_was():
    def make():
        parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
        return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=True)

    parameter, optimizer = make()
    for _ in range(3):
        step_once(parameter, optimizer)
    packed = {key: value.clone() for key, value in pack_optimizer(optimizer, {parameter: "w"}).items()}
    assert sorted(packed) == ["adam/w/exp_avg", "adam/w/exp_avg_sq", "adam/w/step"]
    other, fresh = make()
    with torch.no_grad():
        other.copy_(parameter)
    unpack_optimizer(fresh, {other: "w"}, packed)
    fresh.load_state_dict(fresh.state_dict())  # as accelerate does
    for pair in ((parameter, optimizer), (other, fresh)):
        step_once(*pair)
    assert torch.equal(parameter, other) and fresh.state[other]["step"] == 4
    with pytest.raises(CheckpointError, match="no optimizer state for v"):
        unpack_optimizer(fresh, {other: "v"}, packed)


def test_every_part_of_the_optimizer_is_moved_to_its_parameter():
    parameter = torch.nn.Parameter(torch.zeros(2, device="meta"))  # a device that every machine has beside its CPU
    optimizer = torch.optim.AdamW([parameter])
    unpack_optimizer(optimizer, {parameter: "w"}, {f"adam/w/{k}": torch.zeros(2) for k in ("exp_avg", "exp_avg_sq", "step")})
    assert {value.device.type for value in optimizer.state[parameter].values()} == {"meta"}
