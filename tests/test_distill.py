"""Distillation, tiny: what the teacher says is kept to the byte, crosses codecs, and moves the student towards it."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from families import smolvlm

from vla.batch import Taught
from vla.checkpoint import iter_log, verify
from vla.config import validate
from vla.distill import Distillation, DistillConfig, distill
from vla.distill.rounds import _Log, _stage
from vla.distill.targets import Targets
from vla.distill.teacher import Teacher
from vla.errors import CheckpointError, UsageError
from vla.mixture import Mixture
from vla.policy import PolicyConfig, build_policy, load_policy, save_policy
from vla.policy.lesson import Lesson, LessonConfig

NANO = {"hidden": 32, "layers": 2, "heads": 2, "mlp": 64, "tower_channels": (8, 8, 16), "keypoints": 8, "text_vocab": 320}
STUDENT = {"kind": "student", "image_size": 64, "patch": 16, "channels": (8, 8, 16), "keypoints": 8, "hidden": 32, "layers": 1,
           "heads": 2, "mlp": 64, "text_vocab": 320}  # fmt: skip


@pytest.fixture(scope="module")
def mixture(stores):
    return Mixture(stores, [1, 1], 4, seed=0)


def policy_of(mixture, backbone=NANO, seed=0, **config):
    torch.manual_seed(seed)
    return build_policy(PolicyConfig.model_validate({"backbone": backbone, "chunk": 4, "execute": 2, **config}), mixture).eval()


@pytest.fixture(scope="module")
def teacher(mixture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "policy"
    save_policy(policy_of(mixture), folder)
    return folder


def config_for(demos, teacher, out: Path, **changes) -> dict:
    values = {
        "run": {"out": str(out), "steps": 4, "log_every": 1, "eval_every": 4, "eval_windows": 8, "save_every": 2, "keep": 0,
                "precision": "no", "processes": 1},
        "mixture": {"datasets": [{"path": str(demos["tabletop"]), "weight": 3}, {"path": str(demos["metaworld"])}],
                    "cache_dir": str(demos["tabletop"].parent / "cache"), "holdout": 0.1},
        "teacher": {"policy": str(teacher), "cache": str(out.parent / "answers"), "precision": "no", "batch": 32},
        "policy": {"backbone": STUDENT},
        "optim": {"batch": 8, "warmup": 1},
    }  # fmt: skip
    for key, value in changes.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return values


def build(values: dict) -> DistillConfig:
    return validate(values, DistillConfig, "test")


def bytes_of(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}


def losses(out: Path) -> list:
    return [r["loss"] for r in iter_log(out / "metrics.jsonl") if r["kind"] == "train"]


def test_a_student_is_made_in_the_teachers_image(demos, teacher, tmp_path):
    features = {"lesson__instruction": 0.1, "lesson__pictures": 0.1}
    out = distill(build(config_for(demos, teacher, tmp_path / "run", **features)))
    student, known = load_policy(out, "cpu"), load_policy(teacher, "cpu")
    assert student.config.backbone.kind == "student" and student.chunk == known.chunk == 4
    assert student.codec.to_json() == known.codec.to_json()
    for robot, parts in student.normalizers.items():
        assert parts["action"].to_json() == known.normalizers[robot]["action"].to_json()
    assert student.provenance["teacher"]["fingerprint"] == known.fingerprint
    assert not [n for n in student.state_dict() if n.startswith("lesson")]
    # The answers are shared: a second student of the same teacher asks nothing again.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "answers").rglob("*.bin")}
    again = distill(build(config_for(demos, teacher, tmp_path / "run2", run__steps=2, **features)))
    assert load_policy(again, "cpu") and {p: p.stat().st_mtime_ns for p in before} == before


def test_resumed_is_the_same_run(demos, teacher, tmp_path):
    """To the bit, the lesson's own maps included: what a crash after the second step would leave behind goes on as it was."""
    config = config_for(demos, teacher, tmp_path / "run", lesson__instruction=0.1, lesson__pictures=0.1)
    out = distill(build(config))
    whole, wanted = load_policy(out, "cpu"), losses(out)
    last = max((out / "checkpoints").iterdir())
    assert last.name.endswith("4") and len(wanted) == 4
    shutil.rmtree(last)
    distill(build(config), resume=True)
    again = load_policy(out, "cpu")
    assert losses(out) == wanted and again.fingerprint == whole.fingerprint
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_the_lesson_pulls_towards_the_teacher(demos, teacher, mixture, tmp_path):
    """More of what the teacher says, less of its opposite: the student's distributions approach the teacher's."""
    out = distill(build(config_for(demos, teacher, tmp_path / "run", run__steps=60, run__save_every=60, run__eval_every=60,
                                   lesson__hard=0.0, lesson__soft=1.0, lesson__expectation=1.0, optim__lr=3e-3,
                                   optim__ema=0.0)))  # fmt: skip
    known, student = load_policy(teacher, "cpu"), load_policy(out, "cpu")
    fresh = policy_of(mixture, STUDENT, normalization=known.config.normalization.model_dump())

    def gap(policy) -> float:
        windows = [mixture.window(n) for n in range(32) if mixture.locate(n)[0] == 0]
        total = 0.0
        for w in windows:
            a, b = (p.act({"images": w.images, "state": w.state}, w.instruction, w.embodiment).actions for p in (policy, known))
            total += float(np.abs(a - b).mean())
        return total / len(windows)

    assert gap(student) < 0.5 * gap(fresh)


def test_soft_is_zero_only_for_the_teachers_own_distribution(mixture):
    known = policy_of(mixture)
    windows = [mixture.window_at(0, 0, t) for t in range(4)]
    batch = known.collate([known.encode(w) for w in windows])
    with torch.no_grad():
        logits = known.action_logits(batch)
    p, likely = logits.softmax(-1).topk(256, -1)
    taught = replace(batch, likely=likely, p=p, mean=(logits.softmax(-1) * known.centres).sum(-1), features=torch.zeros(4, 0))
    lesson = Lesson(LessonConfig(soft=1.0, hard=0.0, expectation=1.0), 32, (0, 0))
    zeros = torch.zeros(batch.symbols.shape)
    assert lesson(logits, taught, zeros, known.centres, None).abs().max() < 1e-4
    assert (lesson(logits + torch.randn_like(logits), taught, zeros, known.centres, None) > 0).all()
    nobody = replace(taught, p=torch.zeros_like(p))
    assert torch.equal(lesson(logits, nobody, zeros + 7, known.centres, None), zeros + 7), "no opinion: the demonstration's loss"
    nowhere = replace(taught, mean=torch.zeros(4, 0), likely=likely[:, :0], p=p[:, :0])
    assert torch.equal(lesson(logits, nowhere, zeros + 7, known.centres, None), zeros + 7), "held-out windows have no teacher"


SCRIPT = """
import sys, yaml
from accelerate import Accelerator
from vla.config import validate
from vla.distill import Distillation, DistillConfig
from vla.mixture import open_mixture
config = validate(yaml.safe_load(open(sys.argv[1])), DistillConfig, "test")
mixture, _ = open_mixture(config.mixture, 4, 0, progress=False)
print("begun", flush=True)
Distillation(config).ask(mixture, Accelerator(cpu=True))
"""


def test_interrupted_at_a_random_moment_the_answers_are_the_same_bytes(demos, teacher, tmp_path):
    def start(name: str) -> subprocess.Popen:
        values = config_for(demos, teacher, tmp_path / "run", teacher__cache=str(tmp_path / name), teacher__batch=4)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    whole = start("whole")
    whole.communicate(timeout=300)
    assert whole.returncode == 0
    rng, killed = random.Random(5), 0
    for _ in range(3):
        process = start("cut")
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 200
        while not (tmp_path / "cut/teacher.json").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.communicate(timeout=300)
    last = start("cut")
    last.communicate(timeout=300)
    assert last.returncode == 0 and killed
    a, b = bytes_of(tmp_path / "whole"), bytes_of(tmp_path / "cut")
    assert a == b and len(a) >= 9
    assert all(np.fromfile(p, np.uint8).all() for p in (tmp_path / "cut").rglob("done.bin"))


def test_damaged_answers_are_refused_and_made_again(demos, teacher, tmp_path):
    values = config_for(demos, teacher, tmp_path / "run", run__steps=1)
    distill(build(values))
    answers = tmp_path / "answers"
    for number, damage in enumerate(("cut", "grown", "flipped", "gone")):
        path = sorted(answers.rglob("likely.bin"))[0]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        {"cut": lambda p, d: p.write_bytes(d[: len(d) // 2]), "grown": lambda p, d: p.write_bytes(d + b"x"),
         "flipped": lambda p, d: p.write_bytes(d), "gone": lambda p, d: p.unlink()}[damage](path, data)  # fmt: skip
        again = config_for(demos, teacher, tmp_path / f"run{number}", run__steps=1)
        with pytest.raises(CheckpointError) as error:
            distill(build(again))
        assert str(path.parent) in error.value.fix, damage
        shutil.rmtree(path.parent)
        distill(build(again), resume=True)


def test_another_teacher_is_refused(demos, teacher, mixture, tmp_path):
    distill(build(config_for(demos, teacher, tmp_path / "run", run__steps=2)))
    save_policy(policy_of(mixture, seed=1), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"another folder|teacher") as error:
        distill(build(config_for(demos, tmp_path / "other", tmp_path / "run2")))
    assert "teacher.cache" in error.value.fix
    mine = config_for(demos, tmp_path / "other", tmp_path / "run", teacher__cache=str(tmp_path / "fresh"))
    with pytest.raises((CheckpointError, UsageError)) as error:
        distill(build(mine), resume=True, allow_change=("run.steps", "teacher.policy.0", "teacher.cache"))
    assert "the teacher this run began with" in error.value.expected
    with pytest.raises(CheckpointError):
        distill(build(config_for(demos, teacher, tmp_path / "run3", teacher__top=4)))


@pytest.mark.parametrize(
    "changed", [{"chunk": 2}, {"codec": {"bins": 64}}, {"normalization": {"action": "bounds"}}, {"chunk": 8}]
)
def test_other_codecs_and_chunks_meet_in_the_expectation(demos, teacher, mixture, tmp_path, changed):
    values = config_for(demos, teacher, tmp_path / "run")
    values["policy"] |= changed | ({"execute": 1} if "chunk" in changed else {})
    lessons = Distillation(build(values))
    other = Mixture(mixture.stores, [1, 1], lessons.student.chunk, seed=0)
    student = lessons.build(lessons.student, other)
    cache, _ = lessons.ask(other, Accelerator(cpu=True))
    targets = Targets(cache, lessons.teacher, student, 0.02)
    assert not targets.same
    known, centres = load_policy(teacher, "cpu"), student.codec.centres
    assert centres is not None
    for place in ((0, 0, 0), (0, 1, 3), (1, 0, 5)):
        window = other.window_at(*place)
        taught = targets.add(student.encode(window), window, place).taught
        assert isinstance(taught, Taught)
        H, A = student.chunk, student.encoder.action_dim
        norm, a = student.normalizers[window.embodiment]["action"], window.actions.shape[1]
        said = norm.from_unit(taught.mean.reshape(H, A)[:, :a])
        seen = mixture.window_at(*place)
        acted = known.act({"images": seen.images, "state": seen.state}, seen.instruction, seen.embodiment).actions
        here = min(H, len(acted))
        outside = np.abs(norm.to_unit(acted[:here])) > 1
        assert np.abs(said[:here] - acted[:here])[~outside].max(initial=0) < 2e-2
        told = (taught.p * centres[taught.likely]).sum(-1)
        assert np.abs(told - taught.mean).max() < 0.05
    if lessons.student.chunk == 8:  # beyond its own chunk the teacher is heard where it stood four steps later
        window, later = other.window_at(1, 0, 5), mixture.window_at(1, 0, 9)
        mean = targets.add(student.encode(window), window, (1, 0, 5)).taught.mean.reshape(8, -1)  # pyright: ignore
        acted = known.act({"images": later.images, "state": later.state}, later.instruction, later.embodiment).actions
        a = acted.shape[1]
        unit = np.clip(student.normalizers[later.embodiment]["action"].to_unit(acted), -1, 1)
        np.testing.assert_allclose(mean[4:, :a], unit, atol=2e-2)


def test_teachers_that_speak_symbol_by_symbol_and_several_at_once(mixture, tmp_path):
    stepwise, parallel = policy_of(mixture, decoding="autoregressive"), policy_of(mixture)
    windows = [mixture.window_at(0, 0, t) for t in range(3)]
    off = torch.autocast("cpu", enabled=False)
    said = Teacher([stepwise]).say(windows, 8, False, off)
    for row, window in enumerate(windows):
        acted = stepwise.act({"images": window.images, "state": window.state}, window.instruction, window.embodiment)
        np.testing.assert_allclose(said.actions[row], acted.actions, atol=1e-4)
        assert np.array_equal(said.likely[row, :, :, 0], acted.symbols)
    both = Teacher([parallel, policy_of(mixture, seed=1)])
    assert both.has_symbols and both.fingerprint not in (p.fingerprint for p in both.policies)
    each = [Teacher([p]).say(windows, 256, False, off) for p in both.policies]
    mean = np.mean([e.actions for e in each], axis=0)
    np.testing.assert_allclose(both.say(windows, 256, False, off).actions, mean, atol=1e-4)
    coarse = Teacher([parallel, policy_of(mixture, codec={"bins": 64})])
    assert not coarse.has_symbols
    np.testing.assert_allclose(coarse.say(windows, 8, False, off).actions,
                               np.mean([Teacher([p]).say(windows, 8, False, off).actions for p in coarse.policies], axis=0),
                               atol=1e-4)  # fmt: skip
    with pytest.raises(UsageError, match="chunks of"):
        Teacher([parallel, policy_of(mixture, chunk=2)])


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_a_foreign_model_teaches(mixture, tmp_path, decoding):
    smolvlm(tmp_path)
    known = policy_of(mixture, {"kind": "hf", "path": str(tmp_path)}, decoding=decoding)
    window = mixture.window_at(0, 0, 0)
    said = Teacher([known]).say([window], 8, True, torch.autocast("cpu", enabled=False))
    acted = known.act({"images": window.images, "state": window.state}, window.instruction, window.embodiment)
    np.testing.assert_allclose(said.actions[0], acted.actions, atol=1e-4)
    assert np.array_equal(said.likely[0, :, :, 0], acted.symbols) and said.pictures.shape == (1, known.model.hidden_size)


def test_a_narrow_batch_cuts_what_the_teacher_says_too(mixture):
    """A nano student leaves out the dimensions nobody in a batch has, and the teacher's opinions of them with those."""
    wide = policy_of(mixture, action_dim=7)
    example = wide.encode(mixture.window_at(0, 0, 0))
    taught = Taught(np.arange(4 * 7 * 2).reshape(28, 2), np.ones((28, 2), np.float32), np.arange(28, dtype=np.float32),
                    np.zeros(0, np.float32))  # fmt: skip
    batch = wide.collate([replace(example, taught=taught)])
    assert batch.symbols.shape == (1, 16) and batch.likely.shape == (1, 16, 2) and batch.p.shape == (1, 16, 2)
    assert batch.mean[0].tolist() == [7 * step + dim for step in range(4) for dim in range(4)]


def test_rounds_collect_learn_and_stop(demos, teacher, tmp_path):
    values = config_for(demos, teacher, tmp_path / "run", run__steps=2)
    values["mixture"]["datasets"] = values["mixture"]["datasets"][:1]
    values["rounds"] = {"suite": "tabletop", "tasks": ["touch-red"], "rounds": 1, "episodes": 6, "labeller": "expert", "steps": 2,
                        "measure": 4}  # fmt: skip
    out = distill(build(values))
    log = yaml.safe_load((out / "rounds.json").read_text())
    assert [e["round"] for e in log["rounds"]] == [0, 1] and log["rounds"][1]["collected"]["episodes"] > 0
    assert all(0 <= e["success"]["rate"] <= 1 and e["success"]["n"] == 4 for e in log["rounds"])
    best = load_policy(out / f"round-{log['best']}", "cpu")
    assert load_policy(out, "cpu").fingerprint == best.fingerprint and verify(out / "policy") == []
    assert load_policy(out / "round-1", "cpu").provenance["recorded_seeds"]["tabletop"]["touch-red"][-1][0] >= 200_000
    assert 0 < log["rounds"][0]["minutes"] < log["rounds"][1]["minutes"] <= log["minutes"]
    before = (out / "rounds.json").read_text()
    distill(build(values), resume=True)
    assert (out / "rounds.json").read_text() == before
    with pytest.raises(UsageError, match="a run"):
        distill(build(values))
    for changed in ({"labeller": "teacher"}, {"rounds": 2, "minutes": 1.0}):
        with pytest.raises(UsageError) as error:
            distill(build(values | {"rounds": values["rounds"] | changed}), resume=True)
        assert all(f"rounds.{key}: {log['config'][key]} then, {new} now" in error.value.found for key, new in changed.items())
        assert "--allow-change rounds." in error.value.fix
    with pytest.raises(UsageError, match="began with rounds"):
        distill(build({key: part for key, part in values.items() if key != "rounds"}), resume=True)


def test_what_rounds_took_is_kept_when_they_are_interrupted(demos, teacher, tmp_path, monkeypatch):
    values = config_for(demos, teacher, tmp_path / "run") | {"rounds": {"suite": "tabletop", "minutes": 10.0, "rounds": 3}}
    config, root, now = build(values), tmp_path / "run", [0.0]
    monkeypatch.setattr("vla.distill.rounds.time.monotonic", lambda: now[0])
    monkeypatch.setattr("vla.distill.rounds._keep_best", lambda root, log: None)
    monkeypatch.setattr("vla.distill.rounds._collect", lambda *args: {"episodes": 1})
    monkeypatch.setattr("vla.distill.rounds._measure", lambda *args: {"successes": 1, "n": 4, "rate": 0.25, "low": 0.0,
                                                                      "high": 0.6, "groups": {}})  # fmt: skip
    trained = []

    def training(stage, *args):
        folder = Path(stage.run.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").touch()
        now[0] += 6 * 60
        trained.append(folder.name)
        if len(trained) == 1:
            raise KeyboardInterrupt
        return folder

    monkeypatch.setattr("vla.distill.rounds.train", training)
    with pytest.raises(KeyboardInterrupt):
        distill(config)
    assert yaml.safe_load((root / "rounds.json").read_text())["minutes"] == 6
    distill(config, resume=True)
    assert trained == ["round-0", "round-0"], "12 minutes of 10 are over, and so no further round began"
    distill(build(values | {"rounds": values["rounds"] | {"minutes": 20.0}}), resume=True, allow_change=("rounds.minutes",))
    assert trained[2:] == ["round-0", "round-1"] and yaml.safe_load((root / "rounds.json").read_text())["minutes"] == 24


def test_a_round_that_kept_nothing_adds_no_data(demos, teacher, tmp_path):
    config = build(config_for(demos, teacher, tmp_path / "run") | {"rounds": {"suite": "tabletop", "share": 0.5}})
    assert config.rounds is not None
    log = _Log(tmp_path, config.rounds)
    for number, kept in enumerate((None, 0, 7, 5)):
        log.entry(number)["collected"] = {"episodes": kept}
    old = config.mixture.datasets
    for number, rounds in ((1, []), (2, [2]), (3, [2, 3])):
        sets = _stage(config, number, tmp_path, log).mixture.datasets
        assert sets[: len(old)] == old and [Path(d.path).name for d in sets[len(old) :]] == [f"round-{n}" for n in rounds]
        if rounds:
            assert sum(d.weight for d in sets[len(old) :]) == pytest.approx(sum(d.weight for d in old))


def test_rounds_that_could_not_begin_are_refused_before_anything_is_trained(demos, teacher, tmp_path):
    for rounds, words in (({"suite": "tabletopp"}, "no such suite"), ({"suite": "tabletop", "tasks": ["fly"]}, "no such task"),
                          ({"suite": "tabletop", "seed": 499_500}, "scenes below 500000"),
                          ({"suite": "aloha"}, "the robot of this simulator")):  # fmt: skip
        with pytest.raises(UsageError) as error:
            distill(build(config_for(demos, teacher, tmp_path / "run") | {"rounds": {"rounds": 5} | rounds}))
        assert words in str(error.value) and not (tmp_path / "run").exists()


def test_configs_that_teach_nothing_are_refused(demos, teacher, tmp_path):
    for section, values, words in (("lesson", {"soft": 0, "hard": 0, "expectation": 0}, "nothing is learned"),
                                   ("policy", {"backbone": NANO}, "policy.backbone.kind must be student")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            build(config_for(demos, teacher, tmp_path / "run", lesson__pictures=1.0) | {section: values})
    for policy, words in (({"head": "l1"}, "head l1"), ({"codec": {"kind": "fast", "path": "symbols.json"}}, "codec fast")):
        with pytest.raises(UsageError, match=words):
            distill(build(config_for(demos, teacher, tmp_path / "run") | {"policy": {"backbone": NANO} | policy}))
    assert not (tmp_path / "run").exists()
