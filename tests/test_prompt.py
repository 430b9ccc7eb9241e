"""Words: cleaned once, versioned, refused when they cannot be cleaned."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.errors import DataError
from vla.prompt import MAX_INSTRUCTION, PROMPTS, act_prompt, clean_instruction, plan_prompt, progress_prompt


@given(st.text(max_size=700))
def test_cleaning_is_idempotent_or_refuses(text):
    try:
        cleaned = clean_instruction(text)
    except DataError:
        return
    assert clean_instruction(cleaned) == cleaned and 0 < len(cleaned) <= MAX_INSTRUCTION
    assert "\n" not in cleaned and cleaned == cleaned.strip()


def test_openvla_prompt_to_the_letter():
    expected = "In: What action should the robot take to push the red cube?\nOut:"
    assert act_prompt("  Push the\tRED cube ", "openvla-1") == expected
    assert act_prompt("Push it", "plain-1") == "push it"
    assert act_prompt("Push it", "robot-1", "my_arm/joint") == "my arm joint: push it"
    assert set(PROMPTS) == {"plain-1", "robot-1", "openvla-1", "openvla-v01"}


@pytest.mark.parametrize("bad", ["", " \u200b\x00", "x" * (MAX_INSTRUCTION + 1), None, 3])
def test_what_is_no_instruction_is_refused(bad):
    with pytest.raises(DataError, match="instruction"):
        clean_instruction(bad)


def test_template_characters_are_only_text():
    assert act_prompt("pick {instruction} {0}", "plain-1") == "pick {instruction} {0}"


def test_what_a_planner_is_asked_to_the_letter():
    assert plan_prompt("Touch every  cube") == "goal: touch every cube. done: nothing. last: nothing. what next?"
    done = ["touch the red cube", "Touch the blue cube"]
    expected = "goal: tidy up. done: touch the red cube, touch the blue cube. last: touch the blue cube. what next?"
    assert plan_prompt("tidy up", done, done[1]) == expected
    assert progress_prompt("Push it ") == "is it finished: push it?"
    with pytest.raises(DataError, match="instruction"):
        plan_prompt("tidy up", [""])
