"""Clients as others publish them, each in an environment of its own, drive a policy on the tabletop: what comes over each wire
is, number for number, what the policy says in this process."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import LIMIT
from prismatic_folder import write_tiny
from serving import serving, started
from stock_environments import python_of

from serve.backend import ThreadBackend
from serve.engine import Engine
from serve.gate import Tokens
from serve.reading import read_json
from serve.server import build_app
from serve.service import Look, Service
from serve.settings import ServeSettings
from serve.wire import Encoded, pack, unpack
from serve.wires import vla_eval
from vla.policy import VLAPolicy, load_policy
from vla.sims import make_sim

CLIENTS = Path(__file__).with_name("stock_clients")
SCENES = [("push-red-left", 900_001), ("touch-blue", 900_002), ("lift-green", 900_003)]
"""(task, seed) of the episodes each client plays."""
PATIENT = ("--threads", "1", "--deadline", "120")
"""As many threads as here, so that sums are added up in the same order; and no hurry on a machine that has other work."""
TOKEN = "a-token-of-some-length"


@dataclass
class Episode:
    """What a client saw, did and told."""

    instruction: str = ""
    looks: list[dict[str, Any]] = field(default_factory=list)
    """One more than actions."""
    actions: list[np.ndarray] = field(default_factory=list)
    told: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)
    """Name -> (actions by then, value)."""
    over: bool = False

    def one(self, name: str) -> Any:
        """What was told under this name, once."""
        ((_, value),) = self.told[name]
        return value


def drive(client: str, scenes: list[tuple[str, int]] = SCENES, **settings: Any) -> list[Episode]:
    """Let `stock_clients/with_CLIENT.py` play. What it told before its first scene is in the first episode."""
    command = [python_of(client), str(CLIENTS / f"with_{client}.py"), json.dumps(settings | {"episodes": len(scenes)})]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, text=True, env=clean, **pipes)  # pyright: ignore[reportCallIssue, reportArgumentType]
    complaints: list[str] = []
    reader = threading.Thread(target=lambda: complaints.extend(process.stderr or ()), daemon=True)
    reader.start()
    timer = threading.Timer(LIMIT, process.kill)
    timer.start()
    try:
        episodes = play(process, scenes)
        assert process.wait(LIMIT) == 0, "".join(complaints)[-4000:]
        return episodes
    finally:
        timer.cancel()
        process.kill()
        process.wait(LIMIT)
        reader.join(LIMIT)


def play(process: Any, scenes: list[tuple[str, int]]) -> list[Episode]:
    """The simulator's side, until the client hangs up."""
    sim, episodes, asked, told = make_sim("tabletop", "touch-red"), [Episode()], 0, {}
    for line in process.stdout:
        request, episode = json.loads(line), episodes[-1]
        match request["do"]:
            case "tell":
                for name, value in request["notes"].items():
                    episode.told.setdefault(name, []).append((len(episode.actions), heard(value)))
                continue
            case "reset":
                task, seed = scenes[asked % len(scenes)]  # openpi's runtime resets once more when it is done
                seen, info = sim.reset(seed=seed, options={"task": task})
                if asked:
                    episodes.append(Episode())
                asked += 1
            case "act":
                episode.actions.append(heard(request["action"]))
                seen, _, done, late, info = sim.step(episode.actions[-1])
                episode.over = done or late
        episode = episodes[-1]
        episode.looks.append(seen)
        episode.instruction = sim.instruction
        told = {"images": {name: said(frame) for name, frame in seen["images"].items()}, "state": said(seen["state"]),
                "instruction": sim.instruction, "over": episode.over, "success": info["success"]}  # fmt: skip
        process.stdin.write(json.dumps(told) + "\n")
        process.stdin.flush()
    return [episode for episode in episodes if episode.actions] or episodes[:1]


def said(array: np.ndarray) -> dict[str, Any]:
    return {"array": base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str, "shape": array.shape}


def heard(value: Any) -> Any:
    if isinstance(value, dict) and "bytes" in value:
        return base64.b64decode(value["bytes"])
    if isinstance(value, dict) and "array" in value:
        return np.frombuffer(base64.b64decode(value["array"]), value["dtype"]).reshape(value["shape"])
    return value


# ---------------------------------------------------------------------------------------------------- the other side


@pytest.fixture(scope="module")
def nano(checkout: Path) -> VLAPolicy:
    return load_policy(checkout / "models" / "nano-base", "cpu")


@pytest.fixture(scope="module")
def server(checkout: Path) -> Iterator[str]:
    """HOST:PORT of models/nano-base, which knows more robots than one."""
    with serving(str(checkout / "models" / "nano-base"), "--robot", "tabletop", *PATIENT) as address:
        yield address.removeprefix("http://")


def check(
    episodes: list[Episode], policy: VLAPolicy, horizon: int, read: Callable[[bytes], tuple[dict[str, Any], Any]],
    kind: type = np.float32, same: bool = True,
) -> int:  # fmt: skip
    """Every action is the policy's, here, at what the client sent; returns how many. `read`: what our own readers make of
    that, (images, state); with `same` these are the very frames of the simulator."""
    assert len(episodes) == len(SCENES) and all(episode.over and episode.actions for episode in episodes)
    compared = 0
    for episode in episodes:
        sent = dict(episode.told["sent"])
        chunk = np.zeros(0)
        for n, action in enumerate(episode.actions):
            if n % horizon == 0:
                images, state = read(sent[n])
                (frame,) = [p.decode() if isinstance(p, Encoded) else p for p in images.values()]
                look = episode.looks[n]
                assert frame.dtype == np.uint8 and np.array_equal(frame, look["images"]["front"]) is same
                assert np.array_equal(state, look["state"])
                seen = {"images": {"front": frame}, "state": look["state"]}
                chunk = policy.act(seen, episode.instruction, "tabletop").actions
            assert action.dtype == kind and np.array_equal(action, chunk[n % horizon]), (n, action, chunk[n % horizon])
            compared += 1
    return compared


# ---------------------------------------------------------------------------------------------------- openpi-client


def read_openpi(data: bytes) -> tuple[dict[str, Any], Any]:
    content = unpack(data)
    return {"front": content["observation/image"]}, content["observation/state"]


@pytest.mark.parametrize("place", ["a path", "its own default host"])
def test_openpi_client_drives(server: str, nano: VLAPolicy, place: str):
    address: dict[str, Any] = {"host": f"ws://{server}/openpi"} if place == "a path" else {"port": int(server.rpartition(":")[2])}
    episodes = drive("openpi", policy=address, horizon=4)
    assert check(episodes, nano, 4, read_openpi) > 20
    metadata = episodes[0].one("metadata")
    assert metadata["policy"] == nano.fingerprint and metadata["steps"]["tabletop"] == [8, 4]
    for episode in episodes:
        timings = [timing for _, timing in episode.told["timing"]]
        assert all(timing["infer_ms"] > 0 for timing in timings) and "prev_total_ms" in timings[1]
        assert not any(held for _, held in episode.told["hold"])
        for n, chunk in episode.told["chunk"]:  # all of the chunk came, not only what was played
            look = episode.looks[n]
            assert np.array_equal(chunk, nano.act(look, episode.instruction, "tabletop").actions) and chunk.shape == (8, 4)


def test_openpi_client_is_told_what_is_wrong(server: str):
    (episode,) = drive("openpi", policy={"host": f"ws://{server}/openpi"}, wrong=True)
    error = episode.one("error")
    assert error.startswith("Error in inference server:") and "4 finite numbers: eef.x" in error and "found:    none" in error
    (episode,) = drive("openpi", policy={"host": f"ws://{server}/openpi?robot=tabeltop"}, wrong=True)
    assert "did you mean 'tabletop'?" in episode.one("error")


# ---------------------------------------------------------------------------------------------------- vla-eval


def read_vla_eval(data: bytes) -> tuple[dict[str, Any], Any]:
    payload = unpack(data)["payload"]
    return payload["images"], payload["state"]


@pytest.mark.parametrize("form", ["png", "raw", "jpeg"])
def test_vla_eval_drives(server: str, nano: VLAPolicy, tmp_path: Path, form: str):
    """Its own orchestrator and runner. Chunks are played by the server, an action a look."""
    url = f"ws://{server}/vla-eval"
    episodes = drive("vla_eval", url=url, out=str(tmp_path), format=form)
    assert check(episodes, nano, 4, read_vla_eval, same=form != "jpeg") > 20
    assert episodes[0].one("send_state") is True  # the server's wish reached the benchmark
    (results,) = episodes[-1].one("results")
    assert [len(task["episodes"]) for task in results["tasks"]] == [1] * len(SCENES)
    assert [task["episodes"][0]["steps"] for task in results["tasks"]] == [len(episode.actions) for episode in episodes]
    assert not any("failure_reason" in task["episodes"][0] for task in results["tasks"])


def test_vla_eval_is_told_what_is_wrong_and_goes_on(server: str, nano: VLAPolicy):
    (episode,) = drive("vla_eval", url=f"ws://{server}/vla-eval", wrong=True)
    assert "Server error" in episode.one("error") and "no picture of camera 'front'" in episode.one("error")
    chunk = nano.act(episode.looks[0], episode.instruction, "tabletop").actions
    assert np.array_equal(episode.one("after"), chunk[0])
    info = episode.one("server")
    assert info["protocol_version"] == 1 and info["observation_params"] == {"send_state": True}
    assert info["action_spec"]["position"] | {"range": 0} == {
        "name": "position", "dims": 3, "format": "delta_xyz", "description": "0.02 m/step", "range": 0,
    }  # fmt: skip


def test_vla_eval_names_a_robot_and_says_what_it_played():
    """The address may name a robot; how many steps were sent since the last look is known here, and the guard is told."""
    looks: list[Look] = []

    async def work(service: Service) -> None:
        async def send(playing: vla_eval.Playing, kind: str, **payload: Any) -> Any:
            reply = await playing.heard(pack({"type": kind, "payload": payload, "seq": 3, "timestamp": 0.0}))
            return None if reply is None else unpack(reply)

        lost = vla_eval.Playing(service, "tabeltop")
        assert "action_spec" not in (await send(lost, "hello"))["payload"]  # that client would drop the words of an error
        error = await send(lost, "observation", images={})
        assert error["type"] == "error" and error["seq"] == 3 and "did you mean 'tabletop'?" in error["payload"]["error"]
        playing = vla_eval.Playing(service, "tabletop")
        act = playing.session.act
        playing.session.act = lambda look: looks.append(look) or act(look)
        frame = np.zeros((64, 64, 3), np.uint8)
        for length in (17, 1):
            await send(playing, "episode_start", task={"name": "wait"})
            for _ in range(length):
                reply = await send(playing, "observation", images={"front": frame}, state=np.zeros(4))
                assert reply["type"] == "action" and reply["payload"]["actions"].shape == (4,)
            await send(playing, "episode_end", metrics={})

    with_nothing(work)
    assert [look.executed for look in looks] == [None, 8, 8, None] and {look.instruction for look in looks} == {"wait"}


# ---------------------------------------------------------------------------------------------------- before it is ready


def with_nothing(work: Callable[[Service], Coroutine[Any, Any, None]]) -> None:
    """The inside of a server whose policy holds still."""

    async def whole() -> None:
        service = Service(Engine(lambda: ThreadBackend.start({"policy": "null:tabletop"})), ServeSettings(deadline=60.0))
        await service.engine.start()
        try:
            await work(service)
        finally:
            await service.engine.stop()

    asyncio.run(asyncio.wait_for(whole(), 120))


@pytest.mark.parametrize("path", ["/openpi", "/", "/vla-eval"])
def test_a_policy_that_is_not_there_yet_refuses_the_handshake(path: str):
    """Both clients take what comes first for what they expect; vla-eval's tries a handshake again, and nothing later."""
    sent: list[Any] = []

    async def work() -> None:
        app = build_app(Service(Engine(lambda: ThreadBackend.start({"policy": "null:tabletop"})), ServeSettings()), Tokens())
        scope = {"type": "websocket", "path": path, "headers": [(b"host", b"localhost")], "query_string": b"", "subprotocols": [],
                 "extensions": {"websocket.http.response": {}}}  # fmt: skip

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        await app(scope, receive, send)

    asyncio.run(asyncio.wait_for(work(), 60))
    assert sent[0]["status"] == 503 and b"the policy is starting" in sent[1]["body"]


# ---------------------------------------------------------------------------------------------------- OpenVLA


def read_openvla(data: bytes) -> tuple[dict[str, Any], Any]:
    content = read_json(data, arrays=True)
    content = read_json(content["encoded"], arrays=True) if "encoded" in content else content
    return {"front": content.get("image", content.get("full_image"))}, content["state"]


@pytest.mark.parametrize("payload", ["plain", "encoded", "oft"])
def test_openvla_clients_drive(server: str, nano: VLAPolicy, payload: str):
    """float64, as that server answers: of the policy's float32, so nothing is lost."""
    horizon = 4 if payload == "oft" else 1
    url = f"http://{server.replace('127.0.0.1', '0.0.0.0')}/act"
    episodes = drive("openvla", url=url, payload=payload, horizon=horizon, robot="tabletop", state=True)
    assert check(episodes, nano, horizon, read_openvla, kind=np.float64) > 20
    assert {steps for episode in episodes for _, steps in episode.told["steps"]} == {8 if payload == "oft" else 1}


def test_an_openvla_folder_serves_its_own_client(tmp_path: Path):
    """What that client sends and no more: no state, and `unnorm_key` to choose among the folder's datasets. Random weights."""
    write_tiny(tmp_path / "openvla")
    policy, dims = load_policy(tmp_path / "openvla", "cpu"), [0, 1, 2, 6]
    asked = {"payload": "plain", "horizon": 1, "robot": "kuka", "state": False, "dims": dims}
    with serving(str(tmp_path / "openvla"), *PATIENT) as address:
        episodes = drive("openvla", SCENES[:2], url=f"{address}/act", **asked)
    assert len(episodes) == 2
    for episode in episodes:
        assert episode.over
        for look, action in zip(episode.looks, episode.actions, strict=False):
            seen = {"images": {"image": look["images"]["front"]}, "state": np.zeros(0, np.float32)}
            assert np.array_equal(action, policy.act(seen, episode.instruction, "kuka").actions[0, dims])


def test_openvla_clients_are_told_what_is_wrong(server: str):
    (episode,) = drive("openvla", url=f"http://{server}/act", wrong={"instruction": "push"})
    assert episode.one("status") == 422 and "neither 'image' nor 'full_image'" in episode.one("body")["error"]["found"]


# ---------------------------------------------------------------------------------------------------- who may come in


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """No model; a token, and OpenVLA's manners."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(TOKEN + "\n")
    with started("null:tabletop", "--token-file", tokens, "--compat", "openvla", *PATIENT, token=TOKEN) as server:
        yield server.address.removeprefix("http://")


def test_openpi_client_shows_its_key(guarded: str):
    address = {"host": f"ws://{guarded}/openpi"}
    (refused,) = drive("openpi", policy=address | {"api_key": "another-token-of-some-length"}, horizon=8)
    assert "HTTP 401" in refused.one("refused") and not refused.looks
    episodes = drive("openpi", SCENES[:1], policy=address | {"api_key": TOKEN}, horizon=8)
    assert episodes[0].over and len(episodes[0].actions) == 40


def test_vla_eval_shows_a_token_in_its_address(guarded: str, tmp_path: Path):
    """It has no setting for one; a password in the address is sent by the package it uses."""
    (refused,) = drive("vla_eval", url=f"ws://{guarded}/vla-eval", wrong=True)
    assert "Server unreachable" in refused.one("refused") and "401" in refused.one("cause")
    url = f"ws://any:{TOKEN}@{guarded}/vla-eval"
    episodes = drive("vla_eval", SCENES[:1], url=url, out=str(tmp_path))
    assert episodes[0].over and len(episodes[0].actions) == 40


def test_openvla_clients_with_a_token_and_its_manners(guarded: str):
    (refused,) = drive("openvla", url=f"http://{guarded}/act", wrong={"instruction": "push"})
    assert refused.one("status") == 401
    url = f"http://any:{TOKEN}@{guarded}/act"
    (wrong,) = drive("openvla", url=url, wrong={"instruction": "push"})
    assert (wrong.one("status"), wrong.one("body")) == (200, "error")
