"""A server as an OpenAI-compatible endpoint: OpenAI's own client asks it, and it plans for another server by configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from serving import Server, started
from speaking_policies import GOAL, NEXT, picture, write_speaking_policy

from serve.asking import post_json
from serve.planner import STATUSES, Asked
from serve.remote_planner import _KNOWN, OpenAIPlanner, ServerPlanner, asked_of, data_url
from serve.settings import ServeSettings
from serve.wires.chat import ChatBody, _question
from vla.prompt import progress_prompt

TOKEN = "a-token-of-the-tests"
PATIENT = 60.0


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("speaks")
    write_speaking_policy(root)
    (root / "tokens").write_text(TOKEN)
    (root / "serve.yaml").write_text("planner: {kind: policy, timeout: 60}\ndeadline: 60\n")
    flags = ("--config", root / "serve.yaml", "--device", "cpu", "--token-file", root / "tokens")
    with started(root / "policy", *flags, token=TOKEN) as running:
        yield running


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("state", [None, np.array([0.5, -2.0], np.float32)])
@pytest.mark.parametrize("known", [(), ("do thing 0", 'say "x"\nand [y]')])
def test_what_a_planner_is_asked_is_read_as_it_was_meant(status: str, state: Any, known: tuple[str, ...]):
    for memory, last, words in (("", "", ""), ("one\ntwo", "do thing 0", "not that one\nbut this"), ("Goal: x", "a (b)", "")):
        asked = Asked("clear the table", {}, memory, state, last, status, words, known)
        body = OpenAIPlanner("http://127.0.0.1:1/v1")._body(asked, list(known))
        said = asked_of(body["messages"][1]["content"][0]["text"], {})
        assert said is not None
        assert (said.goal, said.memory, said.last, said.status, said.words, said.known) == (
            asked.goal, memory, last, status, words, known)  # fmt: skip
        assert (said.state is None) == (state is None) and (state is None or np.allclose(said.state, state))


DONE = "Last instruction: z (it is finished)"


@pytest.mark.parametrize("text", [
    "", "Goal: x", "what is it?", "Goal: x\nYour memory: y\nLast instruction: z (well)", f"x\nYour memory: y\n{DONE}",
    f"Goal: x\nYour memory: y\n{DONE}\nand then?", f"Goal: x\nYour memory: y\n{DONE}{_KNOWN}[1]",
    f"Goal: x\nYour memory: y\n{DONE}{_KNOWN}", f"Goal: x\nYour memory: y\n{DONE}{_KNOWN}{'[' * 5000}",
    f"Goal: {'x' * 4001}\nYour memory: y\n{DONE}", f"Goal: x\nYour memory: {'y' * 4001}\n{DONE}",
    f"Goal: x\nYour memory: y\n{DONE}\nState of the robot: 1, two",
])  # fmt: skip
def test_other_words_are_no_planners_question(text: str):
    assert asked_of(text, {}) is None


def test_words_that_begin_like_a_cameras_name_are_said_all_the_same():
    png = {"type": "image_url", "image_url": {"url": data_url(np.zeros((8, 8, 3), np.uint8), "png")}}
    service: Any = SimpleNamespace(settings=ServeSettings(), limits=ServeSettings().limits)

    def read(*parts: Any) -> tuple[str, list[str]]:
        content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
        words, pictures = _question(ChatBody.model_validate({"messages": [{"role": "user", "content": content}]}), service)
        return words, list(pictures)

    asked = "Camera pictures show what?"
    assert read(asked) == (asked, []) and read(asked, png) == read(png, asked) == (asked, ["picture 0"])
    assert read("Camera front:") == ("Camera front:", []), "no picture follows"
    assert read("x", "Camera front:", png, "Camera wrist:", png, png) == ("x", ["front", "wrist", "picture 2"])
    assert read("Camera front:", "x", png) == ("Camera front:\nx", ["picture 0"])


def test_the_same_planner_by_configuration_only(planner: Server, tmp_path: Path):
    (tmp_path / "key").write_text(TOKEN)
    (tmp_path / "serve.yaml").write_text(
        f"planner: {{kind: 'openai:{planner.address}/v1', key_file: {tmp_path / 'key'}, picture: png, timeout: 60, "
        "instructions: [do thing 0, do thing 1, do thing 2]}"
    )
    with started("null:tabletop", "--config", tmp_path / "serve.yaml") as other:
        itself, through = ServerPlanner(planner.address, TOKEN, timeout=PATIENT), ServerPlanner(other.address, timeout=PATIENT)
        for colour, answer in NEXT.items():
            for last, status in (("", "new"), ("do thing 0", "done"), ("do thing 0", "running")):
                asked = Asked(GOAL, {"front": picture(colour)}, last=last, status=status,
                              known=("do thing 0", "do thing 1", "do thing 2"))  # fmt: skip
                here, there = itself.plan(asked), through.plan(asked)
                assert (here.instruction, here.done, here.memory, here.confidence, here.reason) == (
                    there.instruction, there.done, there.memory, there.confidence, there.reason)  # fmt: skip
                # Of one that is being carried out it may hold that it is not finished.
                assert (there.instruction or "done") in {answer, last if status == "running" else answer}
    assert planner.metric("tendon_requests_total") > 0 and not planner.complaints()


def test_openais_own_client_asks_it(planner: Server):
    openai = pytest.importorskip("openai", reason="the extra dev is not installed: openai")
    with openai.OpenAI(base_url=planner.address + "/v1", api_key=TOKEN, timeout=PATIENT) as client:
        (model,) = client.models.list().data
        content = [
            {"type": "text", "text": progress_prompt("do thing 0")},
            {"type": "image_url", "image_url": {"url": data_url(picture("blue"), "png")}},
        ]
        said = client.chat.completions.create(model=model.id, messages=[{"role": "user", "content": content}], temperature=0)
        assert said.choices[0].message.content == "yes" and said.model == model.id
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.chat.completions.create(model=model.id, messages=[{"role": "user", "content": "hello"}], stream=True)
        assert "stream" in refused.value.response.text
    with openai.OpenAI(base_url=planner.address + "/v1", api_key="another", timeout=PATIENT, max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


@pytest.mark.parametrize(
    "messages",
    [
        [], [{"role": "system", "content": "you are"}], [{"role": "user", "content": "  "}], [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}],
        [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "user", "content": [{"type": "audio"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}, *[
            {"type": "image_url", "image_url": {"url": data_url(np.zeros((4, 4, 3), np.uint8), "png")}}] * 20]}],
    ],
)  # fmt: skip
def test_what_is_no_question_is_refused(planner: Server, messages: Any):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    status, said = post_json(planner.address + "/v1/chat/completions", {"messages": messages}, headers=headers, timeout=PATIENT)
    assert status in (413, 422) and json.dumps(said["error"]["found"])
