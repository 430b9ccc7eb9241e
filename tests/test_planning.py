"""Plans over a real server: one checkpoint plans and acts, other planners by configuration only, and the command that asks."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_server import KEY, Chat
from serving import Server, started, until
from speaking_policies import COLOURS, GOAL, NEXT, picture, write_speaking_policy

from serve.asking import post_json
from serve.client import Client
from serve.openapi import document
from serve.planner import STATUSES, Asked
from serve.refusal import Refusal
from serve.remote_planner import ServerPlanner, ServerSpeaker
from serve.wire import encode
from serve.wires.planning import PlanBody
from vla.cli import main
from vla.errors import VLAError
from vla.prompt import progress_prompt

PATIENT = 60.0


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("speaks")
    write_speaking_policy(root)
    return root / "policy"


@pytest.fixture(scope="module")
def server(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    waived = tmp_path_factory.mktemp("serve") / "serve.yaml"
    waived.write_text("planner: {kind: policy, valid_for: 3, timeout: 60}\ndeadline: 60\nguard: {'*': {repeats: null}}\n")
    with started(policy, "--config", waived, "--device", "cpu") as running:
        yield running


def test_one_checkpoint_plans_and_acts(server: Server):
    assert json.loads(server.get("/v1/info")[2])["planner"] == "policy"
    planner = ServerPlanner(server.address, timeout=PATIENT)
    for colour, answer in NEXT.items():
        plan = planner.plan(Asked(GOAL, {"front": picture(colour)}))
        assert (plan.instruction or "done") == answer and plan.done == (answer == "done")
        assert plan.valid_for == 3 and (plan.confidence or 0) > 0.5 and plan.considered[0][0] == answer
    with Client(server.address, timeout=PATIENT, wait=PATIENT) as client:
        asked = threading.Event()
        said: list[Any] = []

        def plan_on() -> None:
            while not asked.is_set():
                said.append(planner.plan(Asked(GOAL, {"front": picture("red")})).instruction)

        thread = threading.Thread(target=plan_on, daemon=True)
        thread.start()
        for _ in range(40):
            chunk = client.act({"images": {"front": picture("red")}, "state": np.zeros(4, np.float32)}, "do thing 0")
            assert chunk.actions.shape == (2, 4)
        asked.set()
        thread.join(PATIENT)
    assert said and set(said) == {"do thing 0"}


def test_the_memory_goes_round_and_the_known_can_be_narrowed(server: Server):
    planner = ServerPlanner(server.address, timeout=PATIENT)
    first = planner.plan(Asked(GOAL, {"front": picture("red")}))
    second = planner.plan(Asked(GOAL, {"front": picture("green")}, first.memory, np.zeros(4), first.instruction, "done"))
    assert second.instruction == "do thing 1" and second.memory == "do thing 0"
    narrowed = planner.plan(Asked(GOAL, {"front": picture("red")}, known=("do thing 1", "do thing 2")))
    assert narrowed.instruction in ("do thing 1", "do thing 2")
    told = planner.plan(Asked(GOAL, {"front": picture("red")}, words="do thing 2"))
    assert told.instruction == "do thing 2" and "person" in told.reason


def test_a_policy_elsewhere_says_whether_something_is_finished(server: Server):
    speaker = ServerSpeaker(server.address, timeout=PATIENT)
    finished = {c: speaker.score(picture(c), progress_prompt("do thing 0"), ["yes", "no"]) for c in COLOURS}
    assert {c: yes > no for c, (yes, no) in finished.items()} == {"red": False, "green": False, "blue": True}
    answer, likely = speaker.answer(picture("blue"), progress_prompt("do thing 0"))
    assert answer == "yes" and likely == pytest.approx(finished["blue"][0], abs=1e-3)


@pytest.mark.parametrize("body", [
    {}, {"goal": ""}, {"goal": "x", "status": "lost"}, {"goal": "x", "images": {"front": "http://elsewhere/x.png"}},
    {"goal": "x", "images": {"front": "AAAA"}}, {"goal": "x", "memory": "m" * 5000}, {"goal": "x", "known": ["k" * 600]},
    {"goal": "x", "actions": []}, {"goal": "x", "state": ["a"]}, {"goal": "x", "robot": "another"}, [], "x", None,
    {"goal": "x" * 3000},
])  # fmt: skip
def test_questions_that_are_none_are_refused_with_the_reason(server: Server, body: Any):
    status, said = post_json(server.address + "/v1/plan", body, timeout=PATIENT)
    assert status == 422 and said["error"]["code"] == "bad_request" and said["error"]["found"]


def test_both_names_of_the_route_and_nothing_else(server: Server):
    body = {"goal": GOAL, "images": {"front": base64.b64encode(encode(picture("red")).data).decode()}}
    answers = [post_json(server.address + path, body, timeout=PATIENT) for path in ("/v1/plan", "/plan")]
    assert [status for status, _ in answers] == [200, 200] and answers[0][1].keys() == answers[1][1].keys()
    described = document()["components"]["schemas"]["PlanReply"]["properties"]
    assert set(answers[0][1]) == set(described)
    assert PlanBody.model_json_schema()["properties"]["status"]["enum"] == list(STATUSES)
    host = server.address.partition("://")[2]
    connection = http.client.HTTPConnection(host, timeout=PATIENT)
    connection.request("POST", "/v1/plan", json.dumps(body), {"content-type": "text/plain"})
    assert connection.getresponse().status == 415
    connection.close()


def test_a_model_that_is_killed_while_it_plans_costs_a_plan(server: Server):
    planner = ServerPlanner(server.address, timeout=PATIENT)
    failed: list[VLAError] = []

    def plan() -> None:
        try:
            while True:
                planner.plan(Asked(GOAL, {"front": picture("red")}))
        except VLAError as error:
            failed.append(error)

    thread = threading.Thread(target=plan, daemon=True)
    thread.start()
    os.kill(server.model, signal.SIGKILL)
    thread.join(PATIENT)
    assert isinstance(failed[0], Refusal) and failed[0].code == "unavailable"
    until(lambda: server.get("/readyz")[0] == 200)
    assert planner.plan(Asked(GOAL, {"front": picture("red")})).instruction == "do thing 0"
    assert server.metric("tendon_requests_total") > 0 and not server.complaints("killed and started again|process ended")


def test_the_command_asks_a_server_and_prints_what_to_do(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "frame.png").write_bytes(encode(picture("green")).data)
    image = ["--image", f"front={tmp_path / 'frame.png'}", "--server", server.address]
    assert main(["plan", GOAL, *image, "--last", "do thing 0", "--status", "done"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("next        do thing 1   ") and "memory      do thing 0\n" in said
    assert main(["plan", GOAL, *image, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["instruction"] == "do thing 1"
    assert main(["plan", GOAL, *image, "--image", f"front={tmp_path / 'frame.png'}"]) == 2
    assert main(["plan", "--planner", "openai:nowhere", GOAL, "x"]) == 2 and main(["plan", GOAL]) == 2


def test_the_command_loads_a_policy(policy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "frame.png").write_bytes(encode(picture("green")).data)
    (tmp_path / "script.txt").write_text("do thing 2\ndo thing 1\n")
    image = ["--image", str(tmp_path / "frame.png")]
    assert main(["plan", str(policy), GOAL, *image, "--device", "cpu", "--json", "--free"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["instruction"] == "do thing 1" and said["considered"] == [] and said["confidence"] > 0.5
    script = ["--planner", f"scripted:{tmp_path / 'script.txt'}"]
    assert main(["plan", "nowhere", GOAL, "--json", "--free", *script, "--last", "do thing 2", "--status", "done"]) == 0
    assert json.loads(capfd.readouterr().out)["instruction"] == "do thing 1"
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "known.txt").write_text("do thing 0\nwave\n")
    with Chat(lambda body: {"instruction": "wave", "done": False}) as chat:
        line = ["plan", "nowhere", GOAL, "--planner", f"openai:{chat.address}", "--planner-key-file", str(tmp_path / "key")]
        assert main([*line, "--known", f"@{tmp_path / 'known.txt'}", "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["instruction"] == "wave"
        assert main([*line, "--known", "do thing 0"]) == 1
        assert "one of 1 that are known" in capfd.readouterr().err


def test_another_planner_by_configuration_only(tmp_path: Path):
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "script.json").write_text(json.dumps({"*": ["touch the red cube", "touch the blue cube"]}))
    with Chat(lambda body: {"instruction": "Touch the red cube", "done": False, "memory": "seen"}) as chat:
        flags = ["--planner", f"openai:{chat.address}", "--planner-model", "some-model", "--planner-key-file", tmp_path / "key"]
        with started("null:tabletop", *flags) as server:
            planner = ServerPlanner(server.address, timeout=PATIENT)
            plan = planner.plan(Asked(GOAL, {"front": picture("red")}))
            assert plan.instruction == "touch the red cube" and plan.memory == "seen"
            chat.answer = lambda body: "first, breathe in"
            with pytest.raises(Refusal) as nonsense:
                planner.plan(Asked(GOAL))
            assert nonsense.value.code == "bad_answer" and nonsense.value.status == 502
            with pytest.raises(Refusal, match="no words"):  # nor does the null policy speak itself
                ServerSpeaker(server.address, timeout=PATIENT).answer(None, "what is it?")
            assert KEY not in server.log and not server.complaints()
    assert chat.asked[0]["model"] == "some-model" and chat.headers[0]["authorization"] == f"Bearer {KEY}"
    with started("null:tabletop", "--planner", f"scripted:{tmp_path / 'script.json'}") as server:
        planner = ServerPlanner(server.address, timeout=PATIENT)
        plan = planner.plan(Asked(GOAL, last="touch the red cube", status="done"))
        assert plan.instruction == "touch the blue cube" and plan.memory == "touch the red cube"
    with started("null:tabletop") as server, pytest.raises(Refusal, match="--planner policy"):
        ServerPlanner(server.address, timeout=PATIENT).plan(Asked(GOAL))


@pytest.mark.parametrize("kind", ["scripted:nowhere.txt", "openai:ftp://x", "openai:http://me:secret@x", "guess"])
def test_a_planner_that_cannot_be_is_refused_before_the_server_listens(kind: str, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "null:tabletop", "--port", "0", "--planner", kind]) == 2
    assert "secret" not in capsys.readouterr().err
