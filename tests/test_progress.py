"""Done and stalled: the fixed rule, a policy that is asked, and several judges together."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from edge_folder import edge_spec

from serve.progress import Asking, Several, Stillness, Told
from serve.refusal import Refusal
from serve.robot import Robot
from vla.prompt import progress_prompt

ROBOT = Robot.from_json(edge_spec(("front",)).model_dump(mode="json"), "test")
FRAME = np.zeros((8, 8, 3), np.uint8)


def seen(*state: float) -> dict[str, Any]:
    return {"images": {"front": FRAME, "wrist": FRAME + 1}, "state": np.array(state, np.float32)}


def test_still_is_what_does_not_move_for_a_while():
    rule = Stillness(ROBOT, still=1.0, limit=None)
    rule.begin("touch", 10.0)
    moving = [rule.saw(seen(0.01 * n, 0, 0.1, 1), None, 10 + 0.4 * n).stalled for n in range(8)]
    assert moving == [False] * 8
    resting = [rule.saw(seen(0.07, 0.0004 * n, 0.1, 1), None, 13.2 + 0.4 * n).stalled for n in range(6)]
    assert resting == [False, False, True, True, True, True]  # it has not moved since 12.8
    assert rule.saw(seen(0.07, 0, 0.1, 0), None, 16.0).stalled is False  # the gripper moves
    rule.begin("touch", 16.0)
    assert not rule.saw(seen(0.07, 0, 0.1, 0), None, 16.1).stalled


def test_looks_far_apart_are_judged_all_the_same():
    rule = Stillness(ROBOT, still=1.0)
    rule.begin("touch", 0.0)
    assert [rule.saw(seen(0, 0, 0, 0), None, at).stalled for at in (0.0, 3.0)] == [False, True]


def test_what_takes_too_long_is_stalled_whatever_moves():
    rule = Stillness(ROBOT, still=1.0, limit=5.0)
    rule.begin("touch", 0.0)
    told = [rule.saw(seen(0.05 * n, 0, 0, 0), None, float(n)) for n in range(7)]
    assert [t.stalled for t in told] == [False] * 5 + [True] * 2 and "longer than 5 s" in told[5].why
    blind = Stillness(ROBOT, limit=None)
    blind.begin("touch", 0.0)
    assert not any(blind.saw({"images": {}, "state": None}, None, float(n)).stalled for n in range(9))


class Yes:
    """A speaker that says yes so surely, in turn."""

    def __init__(self, *shares: Any) -> None:
        self.shares, self.asked, self.pictures = list(shares), [], []
        self.go = threading.Event()
        self.go.set()

    def score(self, picture: Any, question: str, candidates: Any) -> list[float]:
        self.asked.append(question)
        self.pictures.append(picture)
        assert self.go.wait(60) and list(candidates) == ["yes", "no"]
        share = self.shares.pop(0) if self.shares else 0.5
        if isinstance(share, Exception):
            raise share
        return [float(np.log(share)), float(np.log(1 - share))]

    def answer(self, picture: Any, question: str) -> tuple[str, float]:
        raise AssertionError


def test_a_policy_that_is_asked_is_believed_when_it_says_so_twice():
    speaker = Yes(0.9, 0.2, 0.8, 0.7, 0.99)
    judge = Asking(speaker, every=0.5, threaded=False)
    judge.begin("touch the red cube", 0.0)
    told = [judge.saw(seen(0, 0, 0, 0), None, 0.25 * n).done for n in range(10)]
    assert told[::2] == pytest.approx([0.0, 0.2, 0.2, 0.7, 0.7]) and told[1::2] == told[::2]  # asked every other look
    assert speaker.asked == [progress_prompt("touch the red cube")] * 5
    judge.begin("touch the blue cube", 3.0)
    assert judge.saw(seen(0, 0, 0, 0), None, 3.0).done == 0 and speaker.asked[-1] == progress_prompt("touch the blue cube")


def test_what_was_said_of_the_instruction_before_is_thrown_away_and_errors_are_survived():
    speaker = Yes(0.9, 0.9, Refusal("late", found="x", expected="y", fix="z"), OSError("gone"), 0.6)
    speaker.go.clear()
    judge = Asking(speaker, every=0.0, agree=1, camera="wrist")
    judge.begin("one", 0.0)
    assert judge.saw(seen(0, 0, 0, 0), None, 0.0).done == 0
    judge.begin("two", 1.0)
    speaker.go.set()
    heard = [0.0]
    for _ in range(2000):
        heard.append(judge.saw(seen(0, 0, 0, 0), None, 1.0).done)
        if judge.failed == 2 and heard[-1] == pytest.approx(0.6):
            break
        threading.Event().wait(0.01)
    assert judge.failed == 2 and heard[-1] == pytest.approx(0.6) and (speaker.pictures[0] == 1).all()


def test_several_judges_are_one():
    class Says:
        def __init__(self, told: Told) -> None:
            self.told, self.begun = told, []

        def begin(self, instruction: str, now: float) -> None:
            self.begun.append((instruction, now))

        def saw(self, observation: Any, chunk: Any, now: float) -> Told:
            return self.told

    one, two = Says(Told(0.3, False, "a")), Says(Told(0.7, False, "b"))
    both = Several(one, two)
    both.begin("touch", 1.0)
    assert one.begun == two.begun == [("touch", 1.0)]
    assert both.saw({}, None, 0.0) == Told(0.7, False, "b")
    assert Several(Says(Told(0.0, True, "c")), one).saw({}, None, 0.0) == Told(0.3, True, "c")
    assert Several().saw({}, None, 0.0) == Told()


def test_what_is_to_be_done_again_is_not_done_before_it_was_undone():
    class Says:
        def __init__(self) -> None:
            self.yes = 0.9

        def score(self, picture: object, question: str, candidates: object) -> list[float]:
            return np.log([self.yes, 1 - self.yes]).tolist()

        def answer(self, picture: object, question: str) -> tuple[str, float]:
            raise AssertionError

    says = Says()
    asking = Asking(says, every=0.1, agree=2, threaded=False)
    look = {"images": {"front": np.zeros((4, 4, 3), np.uint8)}}

    def told(*answers: float) -> list[bool]:
        found = []
        for yes in answers:
            says.yes = yes
            told.now += 1.0
            found.append(asking.saw(look, None, told.now).done > 0.5)
        return found

    told.now = 0.0
    asking.begin("touch it", 0.0)
    assert told(0.9, 0.9) == [False, True], "the first time there is nothing to be undone"
    asking.begin("touch it", told.now)
    assert told(0.9, 0.9, 0.9, 0.2, 0.9, 0.9) == [False, False, False, False, False, True]
    asking.begin("touch another", told.now)
    assert told(0.9) == [False]
    asking.begin("touch another", told.now)
    assert told(0.9, 0.9) == [False, True], "it was not finished when it was begun again: it is the same still"
