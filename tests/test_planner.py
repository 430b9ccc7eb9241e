"""Planners: what they say next, what they are told, and that nothing but a plan ever becomes an instruction."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chat_server import KEY, Chat
from hypothesis import given
from hypothesis import strategies as st

from serve.asking import check_url
from serve.planner import Asked, Delayed, Grounded, Plan, PolicyPlanner, ScriptedPlanner, plan_of
from serve.refusal import STATUS, Refusal
from serve.remote_planner import OpenAIPlanner
from serve.wire import encode, picture_of
from vla.errors import DataError, UsageError, VLAError
from vla.prompt import plan_prompt

SCRIPT = ["touch the red cube", "touch the blue cube", "touch the red cube"]
FRAME = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


class Says:
    """A speaker for whom each candidate is as likely as it is told."""

    def __init__(self, likely: dict[str, float], answer: tuple[str, float] = ("", 0.0)) -> None:
        self.likely, self.said, self.asked = likely, answer, []

    def score(self, picture: Any, question: str, candidates: Any) -> list[float]:
        self.asked.append(question)
        return [self.likely.get(candidate, -20.0) for candidate in candidates]

    def answer(self, picture: Any, question: str) -> tuple[str, float]:
        self.asked.append(question)
        return self.said


# --- a list ----------------------------------------------------------------------------------------------------------


def test_a_script_goes_on_when_the_last_one_is_done_and_only_then():
    planner, memory, last, said = ScriptedPlanner(SCRIPT), "", "", []
    for status in ("new", "running", "done", "stalled", "running", "done", "unsure", "done", "done"):
        plan = planner.plan(Asked("touch them", memory=memory, last=last, status=status))
        memory, last = plan.memory, plan.instruction
        said.append(plan.instruction)
    red, blue = SCRIPT[:2]
    assert said == [red, red, blue, blue, blue, red, red, "", ""] and plan.done and not plan.remaining
    again = [planner.plan(Asked("touch them", last=red, status="done")) for _ in range(2)]
    assert again[0] == again[1] and again[0].remaining == (red,)  # an answer that was lost costs nothing


def test_a_person_goes_before_a_script():
    planner = ScriptedPlanner(SCRIPT)
    plan = planner.plan(Asked("touch them", last=SCRIPT[0], status="running", words="Push the green cube left!"))
    assert plan.instruction == "push the green cube left!" and plan.remaining == tuple(SCRIPT)
    after = planner.plan(Asked("touch them", memory=plan.memory, last=plan.instruction, status="done"))
    assert after.instruction == SCRIPT[0]


def test_scripts_are_read_from_files(tmp_path: Path):
    (tmp_path / "one.txt").write_text("# in this order\nTouch the red cube\n\ntouch the blue cube\n")
    (tmp_path / "many.json").write_text(json.dumps({"both": SCRIPT[:2], "*": ["go home"]}))
    one, many = ScriptedPlanner.load(tmp_path / "one.txt"), ScriptedPlanner.load(tmp_path / "many.json")
    assert one.plan(Asked("any")).remaining == ("touch the blue cube",)
    assert many.plan(Asked("Both")).instruction == SCRIPT[0] and many.plan(Asked("else")).instruction == "go home"
    for name, text in [("empty.txt", "# nothing\n"), ("no.json", "[1"), ("gone.txt", None)]:
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UsageError):
            ScriptedPlanner.load(tmp_path / name)
    with pytest.raises(DataError, match="write it down"):
        ScriptedPlanner({"both": SCRIPT}).plan(Asked("else"))


# --- a policy's words ------------------------------------------------------------------------------------------------


def test_a_policy_plans_by_likelihood_and_its_memory_grows():
    speaker = Says({SCRIPT[0]: -1.0, SCRIPT[1]: -2.0, "done": -3.0})
    planner = PolicyPlanner(speaker, SCRIPT)
    plan = planner.plan(Asked("touch them", memory=SCRIPT[1], last=SCRIPT[0], status="done"))
    assert plan.instruction == SCRIPT[0] and plan.memory.splitlines() == [SCRIPT[1], SCRIPT[0]]
    shares = np.exp([-1.0, -2.0, -3.0]) / np.exp([-1.0, -2.0, -3.0]).sum()
    assert [text for text, _ in plan.considered] == [SCRIPT[0], SCRIPT[1], "done"]
    np.testing.assert_allclose([share for _, share in plan.considered], shares)
    assert plan.confidence == pytest.approx(shares[0])
    assert speaker.asked == [plan_prompt("touch them", [SCRIPT[1], SCRIPT[0]], SCRIPT[0])]
    over = PolicyPlanner(Says({"done": -0.1}), SCRIPT).plan(Asked("touch them"))
    assert over.done and not over.instruction
    asked = planner.plan(Asked("touch them", known=("push the red cube left", "touch the blue cube")))
    assert asked.instruction == SCRIPT[1]  # of those that were asked for


def test_a_policy_may_say_what_it_likes_where_nothing_is_known():
    plan = PolicyPlanner(Says({}, ("Touch the red cube", -0.5))).plan(Asked("touch them"))
    assert plan.instruction == SCRIPT[0] and plan.confidence == pytest.approx(np.exp(-0.5))
    with pytest.raises(Refusal) as nothing:
        PolicyPlanner(Says({}, ("", -0.5))).plan(Asked("touch them"))
    assert nothing.value.code == "bad_answer"
    for scores in (float("nan"), float("-inf")):
        with pytest.raises(Refusal, match="finite"):
            PolicyPlanner(Says(dict.fromkeys([*SCRIPT, "done"], scores)), SCRIPT).plan(Asked("touch them"))


def test_what_a_person_says_is_done_or_becomes_the_goal():
    speaker = Says({SCRIPT[0]: -1.0})
    planner = PolicyPlanner(speaker, SCRIPT)
    assert planner.plan(Asked("touch them", words=" Touch the BLUE cube ")).instruction == SCRIPT[1] and not speaker.asked
    planner.plan(Asked("touch them", words="not that one"))
    assert speaker.asked == [plan_prompt("not that one")]


def test_which_picture_a_policy_is_asked_about():
    seen: list[Any] = []
    speaker: Any = SimpleNamespace(score=lambda picture, question, candidates: seen.append(picture) or [0.0] * len(candidates))
    images = {"front": FRAME, "wrist": FRAME + 1}
    PolicyPlanner(speaker, SCRIPT).plan(Asked("touch", images))
    PolicyPlanner(speaker, SCRIPT, camera="wrist").plan(Asked("touch", images))
    PolicyPlanner(speaker, SCRIPT).plan(Asked("touch"))
    assert seen[0] is images["front"] and seen[1] is images["wrist"] and seen[2] is None
    with pytest.raises(DataError, match="wrist"):
        PolicyPlanner(speaker, SCRIPT, camera="wrist").plan(Asked("touch", {"front": FRAME}))


def test_what_a_model_proposes_is_weighed_by_what_the_policy_holds_likely():
    proposing: Any = SimpleNamespace(plan=lambda asked: Plan(SCRIPT[0], (SCRIPT[1],), confidence=0.6, reason="red is near"))
    agrees = Grounded(proposing, Says({SCRIPT[0]: -1.0, SCRIPT[1]: -3.0}), SCRIPT).plan(Asked("touch"))
    assert agrees.instruction == SCRIPT[0] and agrees.remaining == (SCRIPT[1],) and (agrees.confidence or 0) > 0.8
    differs = Grounded(proposing, Says({SCRIPT[0]: -9.0, SCRIPT[1]: -1.0}), SCRIPT).plan(Asked("touch"))
    assert differs.instruction == SCRIPT[1] and differs.remaining == () and "was proposed" in differs.reason
    foreign: Any = SimpleNamespace(plan=lambda asked: Plan("dance"))
    assert Grounded(foreign, Says({SCRIPT[1]: -1.0}), SCRIPT).plan(Asked("touch")).instruction == SCRIPT[1]


# --- nothing but a plan ----------------------------------------------------------------------------------------------

GOOD = {"instruction": "Touch  the red cube", "done": False, "confidence": 1, "memory": "m", "reason": "a\nb", "remaining": ["x"]}


def test_a_plan_is_read():
    plan = plan_of(GOOD, "here", SCRIPT, 3.0)
    assert plan == Plan(SCRIPT[0], ("x",), "m", False, 1.0, 3.0, "a b")
    assert plan_of(json.loads(json.dumps(plan.to_json())), "here") == plan


@pytest.mark.parametrize("change", [
    {"instruction": ""}, {"instruction": " \n"}, {"instruction": 3}, {"instruction": None}, {"instruction": "x" * 600},
    {"instruction": ["touch the red cube"]}, {"instruction": "push the moon"}, {"done": "no"}, {"done": 1}, {"confidence": 1.2},
    {"confidence": -0.1}, {"confidence": True}, {"confidence": "high"}, {"memory": 5}, {"memory": "m" * 5000}, {"remaining": "x"},
    {"remaining": [1]}, {"remaining": [""]}, {"remaining": ["x"] * 100}, {"reason": {}}, {"valid_for": 0}, {"valid_for": 1e9},
    {"valid_for": float("inf")}, {"valid_for": float("nan")}, {"considered": [["a"]]}, {"considered": [["a", "b"]]},
    {"action": [1, 2]}, {"tool_calls": []},
])  # fmt: skip
def test_what_is_no_plan_is_refused(change: dict[str, Any]):
    with pytest.raises(Refusal) as wrong:
        plan_of({**GOOD, **change}, "here", SCRIPT, 3.0)
    assert wrong.value.code == "bad_answer"


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, "else"]), inner, max_size=4),
)


@given(JSON)
def test_whatever_json_it_is_comes_out_as_a_known_instruction_or_an_error(entry: Any):
    try:
        plan = plan_of(entry, "here", SCRIPT, 3.0)
    except Refusal as error:
        assert error.code == "bad_answer"
    else:
        assert (plan.instruction in SCRIPT) != plan.done


def test_questions_that_are_none_are_refused():
    for wrong in ({"goal": " "}, {"goal": "x", "status": "lost"}, {"goal": 3}, {"goal": "x", "memory": None}):
        with pytest.raises(DataError):
            Asked(**wrong)  # pyright: ignore


# --- a server that speaks chat completions ---------------------------------------------------------------------------


def asked(**more: Any) -> Asked:
    return Asked("touch them", {"front": FRAME, "wrist": encode(FRAME, "png")}, "red is done", np.array([0.1, 2.0]), SCRIPT[0],
                 "done", "hurry", **more)  # fmt: skip


def test_a_chat_server_is_asked_as_such_servers_are(tmp_path: Path):
    (tmp_path / "key").write_text(f"{KEY}\n")
    with Chat(lambda body: GOOD | {"remaining": [SCRIPT[1]]}) as chat:
        planner = OpenAIPlanner(chat.address + "/", "some-model", tmp_path / "key", known=SCRIPT, valid_for=2.5)
        plan = planner.plan(asked())
    assert plan == Plan(SCRIPT[0], (SCRIPT[1],), "m", False, 1.0, 2.5, "a b")
    body, headers = chat.asked[0], chat.headers[0]
    assert headers["authorization"] == f"Bearer {KEY}" and KEY not in json.dumps(body) and KEY not in repr(planner)
    assert body["model"] == "some-model" and body["temperature"] == 0 and body["stream"] is False
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["instruction"]["enum"] == [SCRIPT[0], SCRIPT[1], ""]
    content = body["messages"][1]["content"]
    text = content[0]["text"]
    assert all(word in text for word in ("touch them", "red is done", SCRIPT[0], "it is finished", "hurry", "0.1, 2"))
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    assert [url.partition(";")[0] for url in urls] == ["data:image/jpeg", "data:image/png"]
    assert np.array_equal(picture_of(base64.b64decode(urls[1].partition(",")[2])).decode(), FRAME)


@pytest.mark.parametrize("said", [
    "I would touch the red cube.", "", "{}", "null",
    '{"instruction": "touch the red cube", "instruction": "push the moon"}',
    '{"instruction": "push the moon", "done": false}', '{"instruction": "touch the red cube"',
    '{"instruction": "touch the red cube", "valid_for": 3000}', '{"confidence": NaN}',
    "[" * 10_000, b"", b"<html>", b'{"choices": []}',
    b'{"choices": [{"message": {"content": null}}]}', b'{"choices": {"0": 1}}', b"[]",
    b'{"choices": [{"message": {"content": {"instruction": "touch the red cube"}}}]}',
    b"x" * (2 << 20),
])  # fmt: skip
def test_nonsense_is_an_error_and_never_an_instruction(said: Any):
    with Chat(lambda body: said) as chat:
        with pytest.raises(Refusal) as wrong:
            OpenAIPlanner(chat.address, known=SCRIPT, timeout=30.0).plan(Asked("touch them"))
    assert wrong.value.code == "bad_answer" and len(str(wrong.value)) < 2000


def test_a_fence_around_the_answer_is_taken_off_and_the_form_can_be_asked_for_in_words_alone():
    with Chat(lambda body: f"```json\n{json.dumps(GOOD)}\n```") as chat:
        assert OpenAIPlanner(chat.address, known=SCRIPT, form="none").plan(Asked("touch")).instruction == SCRIPT[0]
        assert OpenAIPlanner(chat.address, form="json_object").plan(Asked("touch")).instruction == SCRIPT[0]
    assert "response_format" not in chat.asked[0] and chat.asked[1]["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize(("status", "code"), [(401, "unauthorized"), (404, "unavailable"), (429, "busy"), (500, "unavailable")])
def test_a_refusal_of_the_other_server_is_passed_on(status: int, code: str):
    with Chat(lambda body: b'{"error": "no"}', status) as chat, pytest.raises(Refusal, match=f"status {status}") as refused:
        OpenAIPlanner(chat.address).plan(Asked("touch"))
    assert refused.value.code == code and refused.value.status == STATUS[code]


def test_a_redirect_is_not_followed():
    with Chat(lambda body: b"{}", 302) as chat, pytest.raises(Refusal, match="status 302"):
        OpenAIPlanner(chat.address).plan(Asked("touch"))
    assert len(chat.asked) == 1


def test_a_server_that_is_not_there_or_never_answers_is_not_waited_for():
    with Chat(lambda body: GOOD) as chat:
        gone = chat.address
    with pytest.raises(Refusal) as lost:
        OpenAIPlanner(gone, timeout=30.0).plan(Asked("touch"))
    assert lost.value.code == "unavailable"
    with Chat(lambda body: (chat.over.wait(60), GOOD)[1]) as chat, pytest.raises(Refusal) as late:
        OpenAIPlanner(chat.address, timeout=0.3).plan(Asked("touch"))
    assert late.value.code == "late"


def test_a_server_that_says_a_byte_now_and_then_is_not_waited_for_either():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        over = threading.Event()

        def drip() -> None:
            line, _ = listening.accept()
            with line:
                line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while not over.wait(0.05):
                    try:
                        line.sendall(b" ")
                    except OSError:
                        return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        with pytest.raises(Refusal) as late:
            OpenAIPlanner(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=0.5).plan(Asked("touch"))
        over.set()
        thread.join(30)
    assert late.value.code == "late" and not thread.is_alive()


@pytest.mark.parametrize("address", ["ftp://x", "http://", "x", "http://me:secret@x", "http://x?key=secret", "http://x:0", "http://x:y",
                                     "http://x /"])  # fmt: skip
def test_addresses_that_are_none_are_refused_without_showing_a_secret(address: str):
    with pytest.raises(UsageError) as wrong:
        check_url(address)
    assert "secret" not in str(wrong.value)


def test_a_key_comes_from_a_file_and_is_never_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for text in ("", "\n# nothing\n", "two words\n", "gr\u00fcn\n"):
        (tmp_path / "key").write_text(text)
        with pytest.raises(UsageError) as wrong:
            OpenAIPlanner("http://127.0.0.1:1", key=tmp_path / "key")
        assert "two words" not in str(wrong.value)
    with pytest.raises(UsageError):
        OpenAIPlanner("http://127.0.0.1:1", key=tmp_path / "nowhere")
    OpenAIPlanner("http://elsewhere.example", key=KEY)
    assert "https://" in caplog.text and KEY not in caplog.text


def test_a_delay_is_drawn_between_its_bounds():
    planner = Delayed(ScriptedPlanner(SCRIPT), (50, 200), seed=3)
    drawn = [planner.seconds() for _ in range(50)]
    assert 0.05 <= min(drawn) < max(drawn) <= 0.2 and Delayed(ScriptedPlanner(SCRIPT), (50, 200), seed=3).seconds() == drawn[0]
    began = time.monotonic()
    assert Delayed(ScriptedPlanner(SCRIPT), 50).plan(Asked("touch")).instruction == SCRIPT[0]
    assert time.monotonic() - began >= 0.05


def test_every_error_of_a_planner_is_one_for_the_reader():
    for planner, question in [(ScriptedPlanner({"a": SCRIPT}), Asked("b")), (OpenAIPlanner("http://127.0.0.1:1"), Asked("b"))]:
        with pytest.raises(VLAError) as error:
            planner.plan(question)
        assert error.value.fix and error.value.found
