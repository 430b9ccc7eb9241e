"""Questions about rendered scenes: true of the scene, the same every time, readable as training data."""

import json

import numpy as np
import pytest

from data_tools.questions import CLEAR, questions
from vla.answers import Answers
from vla.cli import main

CUBES = {"red": np.array([0.30, 0.10, 0.02]), "green": np.array([0.40, -0.10, 0.02]),
         "blue": np.array([0.25, 0.00, 0.02]), "yellow": np.array([0.35, 0.05, 0.02])}  # fmt: skip
HAND = np.array([0.30, 0.02, 0.1])


def test_every_answer_is_true():
    met = set()
    for seed in range(300):
        for question, answer in questions(CUBES, HAND, np.random.default_rng(seed)):
            words = question.rstrip("?").split()
            met.add(words[0] + " " + words[1])
            if question.startswith("which cube is furthest"):
                truth = {"left": "red", "right": "green", "away": "green", "near": "blue"}[words[-1]]
                assert answer == f"the {truth} cube"
            elif question.startswith("where is the"):
                one, other = CUBES[words[3]], CUBES[words[8]]
                axis, sign = {"left": (1, 1), "right": (1, -1), "away": (0, 1), "near": (0, -1)}[answer]
                assert sign * (one - other)[axis] > CLEAR
            elif question.startswith("which way"):
                assert (CUBES[words[4]][1] > HAND[1]) == (answer == "left")
            elif "nearer to the robot" in question:
                assert (CUBES[words[2]][0] < HAND[0]) == (answer == "yes")
    assert len(met) >= 5


def test_the_command_writes_training_data_and_the_same_twice(tmp_path, capsys):
    for name in ("a", "b"):
        line = ["data", "questions", "--task", "touch", "--scenes", "3", "--seed", "5", "--out", str(tmp_path / name), "--json"]
        assert main(line) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["scenes"] == 3
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("a", "b")]
    assert files[0] == files[1] and len(files[0]) == 4
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files[0])
    read = Answers(tmp_path / "a/questions.json")
    picture = read.question(0).image
    assert len(read) == summary["questions"] and picture is not None and picture.shape == (64, 64, 3)


@pytest.mark.parametrize("scenes", ["0", "-1"])
def test_no_scenes_are_refused(tmp_path, scenes, capsys):
    assert main(["data", "questions", "--scenes", scenes, "--out", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()
