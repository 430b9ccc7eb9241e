"""Questions for a planner: true of the episode, answerable by what they show, apart by episode."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from small_datasets import write_dataset

from data_tools.plan_pairs import moments, plan_pairs
from data_tools.record import record
from vla.answers import Answers
from vla.backbones.nano_processor import build_tokenizer  # torch before the renderer, whose LLVM it does not stand beside
from vla.cli import main
from vla.errors import DataError, UsageError
from vla.mixture import split_episodes
from vla.prompt import DONE, plan_prompt, progress_prompt
from vla.sims import SUITES
from vla.sims.tabletop_goals import GOALS

GOAL, RED, BLUE = "touch both", "touch the red cube", "touch the blue cube"


def asked(starts, subtasks, length) -> dict[int, list[tuple[str, str]]]:
    found: dict[int, list[tuple[str, str]]] = {}
    for moment in moments(GOAL, starts, subtasks, length):
        found.setdefault(moment.frame, []).extend(moment.pairs)
    return found


def test_the_question_and_its_answers_through_an_episode():
    found = asked([0, 10, 20], [RED, BLUE, DONE], 24)
    begin, first, both = ([], [RED], [RED, BLUE])
    finished = (progress_prompt(RED), "yes")
    assert found[0][0] == (plan_prompt(GOAL), RED) and found[5][0] == (plan_prompt(GOAL, begin, RED), RED)
    assert found[10] == [(plan_prompt(GOAL, first, RED), BLUE), (plan_prompt(GOAL, begin, RED), BLUE), finished]
    assert (plan_prompt(GOAL, first, BLUE), BLUE) in found[13] and (progress_prompt(BLUE), "no") in found[15]
    assert found[20][:2] == [(plan_prompt(GOAL, both, BLUE), DONE), (plan_prompt(GOAL, first, BLUE), DONE)]
    assert found[23] == [(plan_prompt(GOAL, both, BLUE), DONE)]
    assert all(answer in {RED, BLUE, DONE, "yes", "no"} for pairs in found.values() for _, answer in pairs)


def test_nothing_is_asked_that_cannot_be_told():
    """Just after a touch that is to be repeated, the picture of the first one's end is that of the second one's beginning."""
    found = asked([0, 10, 20], [RED, RED, BLUE], 30)
    for frame in (10, 11, 13):
        assert (progress_prompt(RED), "no") not in found.get(frame, [])
    assert (progress_prompt(RED), "yes") in found[10] and (progress_prompt(RED), "no") in found[15]
    assert found[10][1] == (plan_prompt(GOAL, [], RED), RED), "not done yet or once done: the same is next"
    assert not any(answer == DONE for pairs in found.values() for _, answer in pairs), "no frame shows the end"
    assert set(asked([0, 2, 3], [RED, BLUE, DONE], 4)) == {0, 2, 3}


def test_no_question_has_two_answers():
    for goal in GOALS.values():
        texts = [SUITES["tabletop"].instruction(task) for task in goal.subtasks]
        starts = [12 * n for n in range(len(texts) + 1)]
        for pairs in asked(starts, [*texts, DONE], 12 * len(texts) + 4).values():
            answers = dict(pairs)
            assert all(answers[question] == answer for question, answer in pairs)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("plans") / "set"
    record("tabletop-long", ["touch-return", "clear-by-colour"], 10, 0, root, workers=0, progress=False, image_size=32)
    return root


def test_the_command_writes_training_data_and_the_same_twice(recorded: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("VLA_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        line = ["data", "plan-pairs", str(recorded), "--out", str(tmp_path / name / "plans.json"), "--holdout", "0.2", "--json"]
        assert main(line) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("a", "b")]
    assert files[0] == files[1] and len(files[0]) > 40
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files[0])
    read, held = Answers(tmp_path / "a/plans.json"), Answers(tmp_path / "a/plans-heldout.json")
    assert len(read) + len(held) == summary["questions"] == sum(summary["answers"].values()) and read.left_out == 0
    picture = read.question(0).image
    assert picture is not None and picture.shape == (32, 32, 3)
    assert {"begun", "midway", "late", "after", "end"} == summary["kinds"].keys()
    assert {"yes", "no", DONE} < summary["answers"].keys()
    episodes = [{entry["episode"] for entry in json.loads((tmp_path / "a" / name).read_text())}
                for name in ("plans.json", "plans-heldout.json")]  # fmt: skip
    assert episodes[1] == set(split_episodes(10, 0.2, "holdout").tolist()) and not episodes[0] & episodes[1]


def test_words_are_few_and_whole_in_a_vocabulary_learned_from_them(recorded: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("VLA_CACHE", str(tmp_path / "cache"))
    plan_pairs(recorded, tmp_path / "plans.json", holdout=0, bar=False)
    corpus = [text for _, *texts in Answers(tmp_path / "plans.json").pairs for text in texts]
    words = {word for text in corpus for word in re.findall(r"\w+", text)}
    tokenizer = build_tokenizer(corpus)
    assert len(words) < 40 and all(len(tokenizer.tokenize(word)) == 1 for word in words)


def test_refusals(recorded: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("VLA_CACHE", str(tmp_path / "cache"))
    write_dataset(tmp_path / "plain", 2)
    with pytest.raises(DataError, match="vla data segment"):
        plan_pairs(tmp_path / "plain", tmp_path / "plans.json", bar=False)
    with pytest.raises(UsageError, match="front"):
        plan_pairs(recorded, tmp_path / "plans.json", bar=False, camera="wrist")
    with pytest.raises(UsageError, match="plan-1"):
        plan_pairs(recorded, tmp_path / "plans.json", bar=False, plan="plan-0")
    (tmp_path / "there.json").write_text("[]")
    with pytest.raises(UsageError, match="exists"):
        plan_pairs(recorded, tmp_path / "there.json", bar=False)
    with pytest.raises(UsageError, match="json"):
        plan_pairs(recorded, tmp_path / "plans", bar=False)
    assert main(["data", "plan-pairs", str(recorded), "--out", str(tmp_path / "x.json"), "--holdout", "1"]) == 2
    assert not (tmp_path / "x.json").exists()
