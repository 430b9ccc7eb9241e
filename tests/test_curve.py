"""Success over training: what is measured again and what is not, and how it is shown."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from fake_sims import FakePolicy, fake_pool

import vla.policy
from vla.errors import CheckpointError, MachineError, UsageError
from vla.evaluate import curve
from vla.evaluate.command import add_eval_parser
from vla.evaluate.curve import CURVE_SEED, curve_table, success_curve
from vla.report import write_report
from vla.report.lines import spread


@pytest.fixture(scope="module")
def pool():
    with fake_pool() as running:
        yield running


class Lab:
    """A run folder with checkpoints, and a record of which were really played."""

    def __init__(self, root: Path) -> None:
        self.root, self.played, self.broken = root, [], None
        for step, kind in ((100, "deaf"), (200, "blind"), (300, "honest")):
            self.save(step, kind)

    def save(self, step: int, kind: str, fingerprint: str = "") -> None:
        folder = self.root / "checkpoints" / f"step_{step:08d}" / "policy"
        folder.mkdir(parents=True, exist_ok=True)
        meaning = {"config": {"decode": "mean", "execute": 4, "chunk": 8}, "fingerprint": fingerprint or f"{kind}-{step}"}
        (folder / "policy.json").write_text(json.dumps(meaning))

    def load(self, folder: Path) -> FakePolicy:
        step = int(folder.parent.name.removeprefix("step_"))
        if step == self.broken:
            raise MachineError(folder, found="no memory", expected="some", fix="buy some")
        fingerprint = json.loads((folder / "policy.json").read_text())["fingerprint"]
        policy = FakePolicy(fingerprint.split("-")[0])
        policy.fingerprint = fingerprint
        self.played.append(step)
        return policy

    def curve(self, **kw):
        self.played = []
        return success_curve(self.root, kw.pop("suite", "fake"), episodes=kw.pop("episodes", 6), progress=False,
                             sims="fake_sims", **kw)  # fmt: skip

    @property
    def stored(self) -> list[dict]:
        return [json.loads(line) for line in (self.root / "eval/curve.jsonl").read_text().splitlines()]


class Kept:
    """The module's pool in the shape of a new one: `success_curve` may leave it, it runs on."""

    def __init__(self, pool) -> None:
        self.pool = pool

    def __enter__(self):
        return self.pool

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture()
def lab(tmp_path, monkeypatch, pool) -> Lab:
    made = Lab(tmp_path)
    monkeypatch.setattr(vla.policy, "load_policy", made.load)
    monkeypatch.setattr(curve, "SimulatorPool", lambda workers, sims: Kept(pool))
    return made


def test_every_checkpoint_is_measured_once(lab):
    lines = lab.curve()
    assert lab.played == [100, 200, 300] and [line["step"] for line in lines] == [100, 200, 300]
    assert [line["rate"] for line in lines] == pytest.approx([1 / 3, lines[1]["rate"], 1.0])
    assert all(line["low"] <= line["rate"] <= line["high"] and line["seed"] == CURVE_SEED for line in lines)
    assert lines[0] == {
        "step": 100, "suite": "fake", "group": "reach", "tasks": ["reach-red", "reach-green", "reach-blue"], "seed": 500_000,
        "n": 6, "decode": "mean", "execute": 4, "policy": "deaf-100", **{k: lines[0][k] for k in ("rate", "low", "high")},
    }  # fmt: skip
    assert lab.stored == lines and lab.curve() == lines and lab.played == []
    lab.save(400, "honest")
    assert len(lab.curve()) == 4 and lab.played == [400], "a longer curve costs what is new"


def test_an_interrupted_curve_continues(lab):
    lab.broken = 300
    with pytest.raises(MachineError, match="no memory"):
        lab.curve()
    assert [line["step"] for line in lab.stored] == [100, 200]
    path = lab.root / "eval/curve.jsonl"
    path.write_text(path.read_text()[:-20])  # and the file was cut by hand as well
    lab.broken = None
    assert len(lab.curve()) == 3 and lab.played == [200, 300] and len(lab.stored) == 3


@pytest.mark.parametrize(
    "change",
    [{"decode": "argmax"}, {"execute": 2}, {"seed": 600_000}, {"episodes": 3}, {"tasks": ["reach-red", "reach-blue"]},
     {"suite": "lone"}],
)  # fmt: skip
def test_another_measurement_is_made_and_kept_beside(lab, change):
    first = lab.curve()
    other = lab.curve(**change)
    assert lab.played == [100, 200, 300] and len(lab.stored) == 6
    assert all(line not in first for line in other) and len(other) == 3
    assert lab.curve() == first and lab.curve(**change) == other and lab.played == []


def test_saying_the_default_aloud_changes_nothing(lab):
    first = lab.curve()
    assert lab.curve(decode="mean", execute=4, seed=CURVE_SEED) == first and lab.played == []


def test_training_again_in_the_same_folder_leaves_nothing_stale(lab):
    lab.curve()
    for step in (100, 200, 300):
        lab.save(step, "honest", f"honest-again-{step}")
    (lab.root / "checkpoints/step_00000300/policy/policy.json").unlink()
    (lab.root / "checkpoints/step_00000300/policy").rmdir()
    lines = lab.curve()
    assert lab.played == [100, 200] and [line["rate"] for line in lines] == [1.0, 1.0]
    assert lab.stored == lines, "step 300 was of the earlier training too"


def test_checkpoints_that_were_pruned_stay_in_the_file(lab):
    lab.curve()
    (lab.root / "checkpoints/step_00000100/policy/policy.json").unlink()
    (lab.root / "checkpoints/step_00000100/policy").rmdir()
    lab.save(400, "honest")
    assert [line["step"] for line in lab.curve()] == [200, 300, 400]
    assert [line["step"] for line in lab.stored] == [100, 200, 300, 400]


def test_checkpoints_with_equal_weights_each_have_a_line(lab):
    for step in (100, 200, 300):
        lab.save(step, "honest", "honest-same")
    assert [line["step"] for line in lab.curve()] == [100, 200, 300]


def test_only_groups_without_a_line_are_played(lab):
    lone = lab.curve(suite="lone", tasks=["reach-red"])
    both = lab.curve(suite="lone", tasks=["reach-red", "reach-blue"])
    assert [line for line in both if line["group"] == "reach-red"] == lone and len(both) == len(lab.stored) == 6


def test_a_run_without_checkpoints_and_a_broken_one_are_refused(lab, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoints"):
        success_curve(tmp_path / "none", "fake", sims="fake_sims")
    (tmp_path / "checkpoints/step_00000200/policy/policy.json").write_text("{")
    with pytest.raises(CheckpointError, match="step_00000200"):
        lab.curve()
    assert lab.played == []


def point(step: int, group: str, rate: float) -> dict:
    return {"step": step, "group": group, "rate": rate, "low": rate - 0.1, "high": rate + 0.1}


def test_the_table_ends_with_the_spread_of_the_second_half():
    rates = {100: 0.1, 200: 0.9, 300: 0.7, 400: 0.5}
    lines = [point(step, "touch", rate) for step, rate in rates.items()] + [point(400, "push", 0.3)]
    text = curve_table(lines).splitlines()
    assert text[0].split() == ["step", "touch", "push"] and text[1].split() == ["100", "10", "[0,", "20]", "-"]
    assert text[4].split() == ["400", "50", "[40,", "60]", "30", "[20,", "40]"]
    assert text[5].split() == ["spread", "50..70", "-"], "one checkpoint has no spread"
    assert text[-1].endswith("spread over the checkpoints from step 300")
    assert spread(lines[:4]) == (300, 0.5, 0.7) and spread(lines[:1]) is None and spread([]) is None


def arguments(words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_eval_parser(parser.add_subparsers())
    return parser.parse_args(words.split())


@pytest.mark.parametrize(("words", "seed"), [("", 500_000), ("--seed 900000", 900_000), ("--seed 0", 0)])
def test_a_seed_that_is_given_is_the_seed_that_is_used(tmp_path, monkeypatch, capsys, words, seed):
    asked = []

    def fake(folder, suite, tasks, episodes, at, **_):
        asked.append((folder, suite, tasks, episodes, at))
        return [point(1, "touch", 0.5)]

    monkeypatch.setattr("vla.evaluate.command.success_curve", fake)
    (tmp_path / "policy").mkdir()  # a run folder
    args = arguments(f"eval {tmp_path} --suite tabletop --curve --episodes 7 {words}")
    assert args.run(args) == 0
    assert asked == [(tmp_path, "tabletop", None, 7, seed)] and "50 [40, 60]" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["--conditions policy", "--out x.json", "--out x.json --conditions policy,swap"])
def test_options_without_a_meaning_for_a_curve_are_refused(tmp_path, words):
    args = arguments(f"eval {tmp_path} --suite tabletop --curve {words}")
    with pytest.raises(UsageError) as error:
        args.run(args)
    assert all(option in error.value.fix for option in words.split() if option.startswith("--"))


def test_the_report_draws_each_measurement_as_its_own_curve_with_its_spread(lab):
    lab.curve()
    lab.curve(decode="argmax")
    page = write_report(lab.root).read_text()
    assert page.count('class="band') == 2 and "reach (decode mean)" in page and "reach (decode argmax)" in page
    assert "reach (decode mean): 33 to 100 % over the checkpoints from step 200" in page
    (lab.root / "eval/curve.jsonl").unlink()
    lab.curve()
    page = write_report(lab.root).read_text()
    assert page.count('class="band') == 1 and "<li>reach: 33 to 100 % over" in page
