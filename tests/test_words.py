"""Answers in words: what is said greedily is what scores best; parts of an answer are the answer; company changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from speaking_policies import COLOURS, GOAL, NEXT, picture, write_speaking_policy

from vla.errors import DataError
from vla.policy import VLAPolicy
from vla.policy.words import say, score
from vla.prompt import plan_prompt, progress_prompt

CANDIDATES = ["do thing 0", "do thing 1", "do thing 2", "done", "do something else altogether"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> VLAPolicy:
    return write_speaking_policy(tmp_path_factory.mktemp("speaks"))


def test_the_likeliest_candidate_is_what_is_said(policy: VLAPolicy):
    for colour, answer in NEXT.items():
        scores = policy.score_answers(picture(colour), plan_prompt(GOAL), CANDIDATES)
        assert scores.shape == (5,) and (scores < 0).all() and CANDIDATES[int(scores.argmax())] == answer
        said = say(policy, picture(colour), plan_prompt(GOAL))
        assert said.text == answer == policy.answer(picture(colour), plan_prompt(GOAL)) and said.ended
        assert said.likely == pytest.approx(float(scores.max()), abs=1e-3)  # the same words, one by one and all at once
    yes = [np.diff(policy.score_answers(picture(c), progress_prompt("do thing 1"), ["no", "yes"]))[0] > 0 for c in COLOURS]
    assert yes == [False, False, True]


def test_parts_of_an_answer_are_the_answer(policy: VLAPolicy):
    whole, said, likely = say(policy, picture("red"), plan_prompt(GOAL)), (), 0.0
    for _ in range(len(whole.ids) + 1):
        part = say(policy, picture("red"), plan_prompt(GOAL), said, most=1)
        said, likely = part.ids, likely + part.likely
    assert part.ended and said == whole.ids and part.text == whole.text and likely == pytest.approx(whole.likely, abs=1e-4)
    assert not say(policy, picture("red"), plan_prompt(GOAL), most=len(whole.ids)).ended


def test_company_does_not_change_a_score(policy: VLAPolicy):
    alone = [score(policy, picture("green"), plan_prompt(GOAL), [c])[0] for c in CANDIDATES]
    for batch in (1, 2, 32):
        np.testing.assert_allclose(score(policy, picture("green"), plan_prompt(GOAL), CANDIDATES, batch), alone, atol=1e-3)
    assert score(policy, None, "what is it?", CANDIDATES[:2]).shape == (2,) and len(score(policy, None, "what?", [])) == 0
    with pytest.raises(DataError, match="number 1"):
        score(policy, None, "what is it?", ["red", " "])
