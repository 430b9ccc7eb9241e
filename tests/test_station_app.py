"""`vla operate`, a real process: its API, who may call it, a stream that resumes, clients that do not read, and its end."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from children import LIMIT
from operating import Operated, operating
from serving import started, until

pytest.importorskip("starlette", reason="the extra serve is not installed")

from serve.operate_command import _progress  # noqa: E402
from serve.robot import Robot  # noqa: E402
from serve.station_run import ENDED  # noqa: E402
from serve.wire import picture_of  # noqa: E402
from vla.embodiment import load_embodiment  # noqa: E402
from vla.episodes import EpisodeStore  # noqa: E402

EVERY, RED = "touch every cube", "touch the red cube"
TOKEN = "a-token-of-the-tests"
SCENE = 900_000


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    """One that asks every 4 looks, as fast as it goes."""
    with operating(tmp_path_factory.mktemp("drilled"), "--speed", 0, "--handoff", "drill=4", "--task", "touch-every") as one:
        yield one


def test_the_api_from_a_goal_to_its_end(drilled: Operated):
    idle = drilled.snapshot()
    assert idle["goals"][0] == EVERY and idle["robot"]["cameras"] == ["front"] and idle["run"]["state"] == "idle"
    assert [dim["name"] for dim in idle["robot"]["action"]] == ["eef.dx", "eef.dy", "eef.dz", "gripper.close"]
    status, begun = drilled.post("run", goal=EVERY, scene=SCENE)
    assert (status, begun["run"]["state"], begun["run"]["number"]) == (200, "running", 1)
    first = drilled.asked()
    assert first["run"]["state"] == "asking" and first["question"]["say"] == "ask"
    assert drilled.post("run", goal=RED)[0] == 409
    assert drilled.post("answer", question=1, answer="go_on")[1]["question"] is None
    late, refused = drilled.post("answer", question=1, answer="stop")
    assert late == 409 and refused["error"]["code"] == "conflict" and refused["error"]["fix"]
    number = 1
    while True:
        until(lambda: drilled.snapshot()["question"] is not None or drilled.snapshot()["run"]["state"] in ENDED)
        if (question := drilled.snapshot()["question"]) is None:
            break
        number = question["number"]
        assert drilled.post("answer", question=number, answer="take_over" if number == 2 else "go_on")[0] == 200
    over = drilled.ended()
    assert over["run"]["success"] is True and over["run"]["state"] == "done" and number >= 2
    until(lambda: drilled.snapshot()["incidents"]["corrections"] == 1)
    answers = [json.loads(line) for line in (drilled.folder / "answers.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in answers][:2] == ["go_on", "take_over"]

    # What happened can be read from any point on.
    last = drilled.snapshot()["last"]
    whole = drilled.events(0, last)
    assert [event["number"] for event in whole] == list(range(1, last + 1))
    assert {"run", "plan", "event", "question", "answer", "incident", "tick"} == {event["kind"] for event in whole}
    assert (
        drilled.events(last - 5, last) == whole[-5:] and drilled.events(-1, last, {"last-event-id": str(last - 2)}) == whole[-2:]
    )
    assert drilled.events(last + 1000, last)[0]["number"] == 1, "of a station before this one"


@pytest.mark.parametrize(
    ("what", "body", "status", "code"),
    [
        ("run", {"goal": "dance"}, 400, "bad_request"), ("run", {"goal": RED, "speed": 3}, 400, "bad_request"),
        ("run", {}, 400, "bad_request"), ("run", {"goal": RED, "scene": -1}, 400, "bad_request"),
        ("run", {"goal": RED, "scene": "3"}, 400, "bad_request"),
        ("answer", {"question": "1", "answer": "hold"}, 400, "bad_request"),
        ("run", {"goal": 3}, 400, "bad_request"), ("say", {"words": " "}, 400, "bad_request"),
        ("say", {"words": "x" * 5000}, 400, "bad_request"), ("answer", {"question": 99, "answer": "go_on"}, 409, "conflict"),
        ("answer", {"question": 1}, 400, "bad_request"), ("stop", {"now": True}, 400, "bad_request"),
        ("hand_back", {}, 409, "conflict"), ("dance", {}, 404, "not_found"),
    ],
)  # fmt: skip
def test_what_is_nothing_to_ask_is_refused_in_words(drilled: Operated, what: str, body: Any, status: int, code: str):
    found, said = drilled.post(what, **body)
    assert (found, said["error"]["code"]) == (status, code) and set(said["error"]) >= {"where", "found", "expected", "fix"}


def test_the_newest_picture_comes_and_a_newer_one_is_waited_for(drilled: Operated):
    until(lambda: drilled.get("/v1/station/frame/front")[0] == 200)  # none is drawn before somebody looks
    status, headers, content = drilled.get("/v1/station/frame/front")
    assert (status, headers["content-type"], headers["cache-control"]) == (200, "image/jpeg", "no-store")
    picture = picture_of(content).decode()
    assert picture.shape[0] == picture.shape[1] >= 64 and np.std(picture) > 5
    number = int(headers["x-frame"])
    assert drilled.get(f"/v1/station/frame/front?after={number}")[0] == 204, "nothing moves: there is no newer one"
    assert drilled.get("/v1/station/frame/wrist")[0] == 404 and drilled.get("/v1/station/frame/front?after=x")[0] == 400
    drilled.post("run", goal=RED, scene=SCENE)
    until(lambda: int(drilled.get(f"/v1/station/frame/front?after={number}")[1].get("x-frame", 0)) > number)
    drilled.post("stop")


def test_a_page_elsewhere_may_not_call(drilled: Operated):
    body = {"goal": RED}
    assert drilled.get("/v1/station/run", body, {"origin": "https://elsewhere.example"})[0] == 403
    assert drilled.get("/v1/station", headers={"host": "robot.example"})[0] == 403
    assert drilled.get("/livez")[0] == 200


def test_clients_that_do_not_read_change_nothing(tmp_path: Path):
    """The same scene with and without them: the loop played the same ticks, and missed none."""
    with operating(tmp_path, "--speed", 0, "--handoff", "off", "--task", "touch-every") as one:
        played = list[tuple[Any, ...]]()
        deaf = list[socket.socket]()
        for run in range(2):
            begun = one.snapshot()["last"]
            assert one.post("run", goal=EVERY, scene=SCENE)[0] == 200
            over = one.ended()
            ticks = [tick for event in one.events(begun, over["last"]) if event["kind"] == "tick" for tick in event["ticks"]]
            played.append((over["run"]["step"], over["run"]["success"], over["loop"]["missed"],
                           [(tick["step"], tick["action"], tick["hold"]) for tick in ticks]))  # fmt: skip
            for _ in range(12 * (run == 0)):
                client = socket.create_connection(("127.0.0.1", int(one.address.rpartition(":")[2])))
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.sendall(b"GET /v1/station/events?after=0 HTTP/1.1\r\nhost: localhost\r\n\r\n")
                deaf.append(client)
        assert played[0] == played[1] and played[0][1:3] == (True, 0) and len(played[0][3]) == played[0][0]
        for client in deaf:
            client.close()


def test_tokens_are_wanted_where_there_are_tokens(tmp_path: Path):
    (tmp_path / "tokens").write_text(f"# operators\n{TOKEN}\n")
    with operating(tmp_path, "--token-file", tmp_path / "tokens", token=TOKEN) as one:
        assert one.snapshot()["run"]["state"] == "idle"
        one.headers = {}
        for path in ("/v1/station", "/v1/station/events", "/v1/station/frame/front"):
            status, headers, _ = one.get(path)
            assert status == 401 and "Bearer" in headers["www-authenticate"]
        assert one.get("/v1/station/stop", {})[0] == 401 and one.get("/livez")[0] == 200


def test_sigterm_in_the_middle_of_a_run_ends_it_well(tmp_path: Path):
    with operating(tmp_path, "--handoff", "drill=6", "--start") as one:
        one.asked()
        one.leave = None
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(LIMIT) == 0 and not one.complaints(), one.log
        done = json.loads(one.out.read_text().splitlines()[-1])
        assert done["runs"] == 1 and done["questions"] == 1 and done["incidents"]["written"] == 1
        store = EpisodeStore.open(one.folder / "incidents", tmp_path / "cache", progress=False)
        assert store.num_episodes == 1
    (line,) = [json.loads(line) for line in (one.folder / "incidents" / "meta" / "incidents.jsonl").read_text().splitlines()]
    assert line["success"] is False and line["incidents"][0]["reason"].startswith("ask: a drill")


def test_a_real_policy_is_watched_at_its_own_rate(tmp_path: Path, checkout: Path):
    with operating(tmp_path, "--handoff", "off", "--trouble", "noise", student=checkout / "models" / "nano-base",
                  suite="tabletop") as one:  # fmt: skip
        assert one.snapshot()["name"] == "nano-base" and RED in one.snapshot()["goals"]
        one.post("run", goal=RED, scene=SCENE)
        run = one.ended()["run"]
        assert run["state"] in ("done", "failed") and run["step"] > 3
        ticks = [tick for event in one.events(0, one.snapshot()["last"]) if event["kind"] == "tick" for tick in event["ticks"]]
        assert any(tick["confidence"] is not None and 0 < tick["confidence"] < 1 for tick in ticks)


def test_a_planner_elsewhere_plans_and_the_policy_here_acts(tmp_path: Path):
    """Two real processes: the goal goes to a `vla serve`, its plan is what is done here; without it the robot holds."""
    (tmp_path / "steps").write_text("touch the green cube\ntouch the red cube\n")
    (tmp_path / "tokens").write_text(TOKEN)
    flags = ("--planner", f"scripted:{tmp_path / 'steps'}", "--token-file", tmp_path / "tokens")
    with started("null:tabletop", *flags, token=TOKEN) as planner:
        here = ("--planner", planner.address, "--planner-key-file", tmp_path / "tokens", "--handoff", "off")
        with operating(tmp_path, *here) as station:

            def now() -> Any:
                return station.snapshot()["run"]

            station.post("run", goal=EVERY, scene=SCENE)
            until(lambda: now()["plan"]["done"])
            assert now()["plan"]["done"][0] == "touch the green cube"
            until(lambda: now()["instruction"] == RED)
            os.kill(planner.process.pid, signal.SIGKILL)
            planner.leave = None
            until(lambda: now()["hold"].startswith(("expired", "waiting")))
            assert now()["state"] == "running" and not station.complaints()


@pytest.mark.parametrize("speed", [0.0, 1.0])
def test_a_judge_that_is_asked_thinks_in_steps_where_time_is_counted_so(speed: float):
    robot = Robot.from_json(load_embodiment("tabletop").model_dump(mode="json"), "tabletop")
    pictures = list[Any]()
    speaker = SimpleNamespace(score=lambda picture, question, candidates: pictures.append(threading.get_ident()) or [0.0, -9.0])
    args = argparse.Namespace(progress="policy", planner=None, speed=speed)
    judge = _progress(args, SimpleNamespace(speaker=speaker), robot)(None)
    judge.begin(RED, 0.0)
    judge.saw({"images": {"front": np.zeros((8, 8, 3), np.uint8)}, "state": None}, None, 0.0)
    until(lambda: pictures)
    assert (pictures == [threading.get_ident()]) == (speed == 0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["expert", "--sim", "aloha"], "a tabletop"), (["expert", "--sim", "tabletop", "--host", "0.0.0.0"], "--token-file"),
        (["expert", "--sim", "tabletop", "--planner", "policy"], "does not speak"),
        (["expert", "--sim", "tabletop", "--handoff", "ask=0.1"], "--handoff-folder"),
        (["expert", "--sim", "tabletop", "--handoff", "drill=x"], "drill=x"),
        (["expert", "--sim", "metaworl"], "no such suite"), (["expert", "--sim", "tabletop", "--trouble", "rain"], "occlusion"),
        (["expert", "--sim", "tabletop", "--planner", "guess"], "scripted:FILE"),
        (["expert", "--sim", "tabletop", "--planner", "server"], "--planner http://HOST:PORT"),
        (["expert", "--sim", "tabletop", "--planner", "http://user:word@127.0.0.1:1"], "the key goes into a file"),
    ],
)  # fmt: skip
def test_what_cannot_be_operated_is_said_before_anything_moves(flags: list[str], words: str, tmp_path: Path):
    command = [sys.executable, "-m", "vla.cli", "operate", *flags, "--port", "0", "--incidents", str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_stop_is_let_in_however_many_watch(tmp_path: Path):
    with operating(tmp_path, "--speed", 0.5, "--handoff", "off") as station:
        station.post("run", goal=EVERY, scene=SCENE)
        host, port = station.address.removeprefix("http://").split(":")
        watching = []
        try:
            for _ in range(64):
                one = socket.create_connection((host, int(port)), timeout=LIMIT)
                one.sendall(f"GET /v1/station/events HTTP/1.1\r\nhost: {host}:{port}\r\n\r\n".encode())
                assert one.recv(64).startswith(b"HTTP/1.1 200")
                watching.append(one)
            assert station.get("/v1/station")[0] == 503
            assert station.post("stop")[1]["run"]["state"] == "stopped"
        finally:
            for one in watching:
                one.close()
