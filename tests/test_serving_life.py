"""A server's life: its model is killed, it is asked to leave in the middle of its work, its policy is swapped, it serves for
long, and several adapters share one base. Nothing that was accepted is lost but what was with a model that died.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from children import LIMIT
from mutations import mutated_message
from serving import Server, started, until
from small_policies import seen, write_policy, write_small_adapter
from test_serving_faults import ask, body, line_to, look, request, response
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from serve.model_process import load
from serve.wire import encode, pack, unpack
from vla.errors import VLAError
from vla.policy import load_policy


def websocket(server: Server) -> str:
    return server.address.replace("http", "ws") + "/v1/ws"


def in_threads(works: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], Callable[[], None]]:
    """What each said, as far as they have come, and what waits for all of them."""
    said: dict[str, Any] = {}

    def run(name: str) -> None:
        try:
            said[name] = works[name]()
        except BaseException as error:
            said[name] = error
            raise

    threads = [threading.Thread(target=run, args=(name,)) for name in works]
    for thread in threads:
        thread.start()

    def wait() -> None:
        for thread in threads:
            thread.join(LIMIT)
        assert said.keys() == works.keys(), said

    return said, wait


# ---------------------------------------------------------------------------------------------------- kill


def test_a_model_killed_in_the_middle_of_a_batch_costs_that_batch():
    with started("null:tabletop?ms=1500", "--deadline", "60") as server:
        killed, served = server.model, server.process.pid

        def over_websocket() -> Any:
            with connect(websocket(server)) as line:
                line.send(pack(look(deadline=60.0)))
                first = unpack(line.recv(LIMIT, decode=False))
                line.send(pack(look(2, deadline=60.0)))  # on the same socket, as soon as it heard
                return first, unpack(line.recv(LIMIT, decode=False))

        said, wait = in_threads({"http": lambda: ask(server.port, "/v1/act", body(deadline=60.0)), "websocket": over_websocket})
        until(lambda: server.metric("tendon_running") + server.metric("tendon_queue_length") == 2)
        os.kill(killed, signal.SIGKILL)
        wait()
        status, headers, content = said["http"]
        first, second = said["websocket"]
        lost = [status == 503, first["type"] == "refusal"]  # both, if they were in one batch; one, if one came later
        assert any(lost)
        if lost[0]:
            assert int(headers["retry-after"]) >= 1 and b"killed by signal 9" in content
        if lost[1]:
            assert first["error"]["code"] == "unavailable" and first["error"]["retry_after"] > 0
        assert second["type"] == "chunk" or second["error"]["code"] == "unavailable"
        until(lambda: server.get("/readyz")[0] == 200)
        assert ask(server.port, "/v1/act", body(deadline=60.0))[0] == 200
        assert server.model != killed and not psutil.pid_exists(killed) and server.process.pid == served
        assert server.metric("tendon_backend_restarts_total") == 1
        assert not server.complaints(but="killed and started again"), server.log


def test_a_model_that_dies_with_nothing_to_do_is_back_before_anybody_asks():
    with started("null:tabletop") as server:
        for times in range(1, 4):
            killed = server.model
            os.kill(killed, signal.SIGKILL)
            until(lambda times=times: server.metric("tendon_backend_restarts_total") == times)
            until(lambda: server.get("/readyz")[0] == 200)
            assert ask(server.port, "/v1/act", body())[0] == 200 and server.model != killed
        assert not server.complaints(but="started again"), server.log


def test_a_server_that_is_killed_leaves_no_model_behind():
    with started("null:tabletop") as server:
        model, server.leave = server.model, None
        server.process.kill()
        until(lambda: not psutil.pid_exists(model) or psutil.Process(model).status() == psutil.STATUS_ZOMBIE)


# ---------------------------------------------------------------------------------------------------- leave


def test_sigterm_under_load_finishes_all_that_was_accepted_and_exits_0():
    with started("null:tabletop?ms=150", "--batch", "2", "--deadline", "60", "--drain", "60") as server:

        def over_http() -> Any:
            return ask(server.port, "/v1/act", body(deadline=60.0))

        def over_websocket() -> Any:
            with connect(websocket(server)) as line:
                line.send(pack(look(deadline=60.0)))
                first = unpack(line.recv(LIMIT, decode=False))
                with pytest.raises(ConnectionClosed) as closed:
                    line.recv(LIMIT)
                return first, closed.value.rcvd and closed.value.rcvd.code

        said, wait = in_threads({f"{kind.__name__} {i}": kind for i in range(12) for kind in (over_http, over_websocket)})
        until(lambda: server.metric("tendon_queue_length") + 2 * bool(server.metric("tendon_sessions")) >= 20 or len(said) > 2)
        server.process.send_signal(signal.SIGTERM)
        refused = Counter[int]()
        while server.process.poll() is None and refused.total() < 20:
            with contextlib.suppress(OSError):
                status, headers, _ = ask(server.port, "/v1/act", body())
                refused[status] += 1
                assert status in (503, 0, 200) and (status != 503 or headers["retry-after"])
            time.sleep(0.02)
        wait()
        assert server.process.wait(LIMIT) == 0
        server.leave = None
        outcomes = Counter(s[0] if "http" in name else s[0].get("error", s[0]).get("code", "chunk") for name, s in said.items())
        # Those that came after the signal heard that it drains; nobody was accepted and left without an answer.
        assert outcomes.keys() <= {200, 503, "chunk", "unavailable"} and outcomes[200] + outcomes["chunk"] >= 20, outcomes
        assert {s[1] for name, s in said.items() if "websocket" in name} == {1012}
        assert refused[503], refused
        print(outcomes, refused)
        assert not server.complaints(), server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_leave_before_it_is_ready_it_leaves(number: int):
    with started("null:tabletop?ms=60000", wait=False) as server:
        until(lambda: psutil.Process(server.process.pid).children())
        model = server.model
        began = time.monotonic()
        server.process.send_signal(number)
        assert server.process.wait(LIMIT) == 0 and time.monotonic() - began < 60  # and does not wait for its policy
        server.leave = None
        until(lambda: not psutil.pid_exists(model))
        assert not server.complaints(), server.log


def test_work_that_does_not_end_is_not_waited_for_for_ever():
    with started("null:tabletop?ms=4000", "--deadline", "60", "--drain", "0.5") as server:
        said, wait = in_threads({"one": lambda: ask(server.port, "/v1/act", body(deadline=60.0))})
        until(lambda: server.metric("tendon_running") == 1)
        server.process.send_signal(signal.SIGTERM)
        wait()
        assert server.process.wait(LIMIT) == 0
        server.leave = None
        status, headers, content = said["one"]
        assert status == 503 and headers["retry-after"] and b"stopping" in content
        assert not server.complaints(), server.log


# ---------------------------------------------------------------------------------------------------- swap, adapters


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two policies of one robot, and two adapters on the first."""
    root = tmp_path_factory.mktemp("policies")
    for seed, name in enumerate(("one", "two")):
        write_policy(root / name, seed)
    for seed, name in enumerate(("kitchen", "bench")):
        write_small_adapter(root / name, root / "one/policy", seed=3 + seed)
    return {name: root / name / "policy" for name in ("one", "two", "kitchen", "bench")}


def asked(n: int, **more: Any) -> dict[str, Any]:
    """A look of the small policies' robot."""
    observation = seen(n)
    words = f"do thing {n % 3}"
    return look(n, observation["images"]["front"]) | {"state": observation["state"], "instruction": words} | more


def alone(folder: Path, n: int) -> np.ndarray:
    return load_policy(folder, "cpu").act(seen(n), f"do thing {n % 3}", "tabletop").actions


async def together(url: str, clients: int, each: int, say: Callable[[int, int], dict[str, Any]], **options: Any) -> list[Any]:
    """(what was asked, what was said) of so many clients at once."""
    heard: list[Any] = []

    async def client(i: int) -> None:
        async with connect_async(url, open_timeout=LIMIT, **options) as line:
            for k in range(each):
                message = say(i, k)
                await line.send(pack(message))
                heard.append((message, unpack(await line.recv(decode=False))))

    await asyncio.wait_for(asyncio.gather(*(client(i) for i in range(clients))), LIMIT)
    return heard


def test_two_adapters_on_one_base_in_one_batch_say_what_each_says_alone(policies: dict[str, Path]):
    flags = [f for name in ("kitchen", "bench") for f in ("--adapter-folder", f"{name}={policies[name]}")]
    expected = {(name, n): alone(policies[name], n) for name in ("kitchen", "bench") for n in range(1, 5)}
    assert not np.array_equal(expected["kitchen", 1], expected["bench", 1])
    with started(policies["one"], *flags, "--deadline", "60") as server:
        assert json.loads(server.get("/v1/info")[2])["adapters"] == ["kitchen", "bench"]

        def say(i: int, k: int) -> dict[str, Any]:
            return asked(1 + k % 4, seq=k, adapter=["kitchen", "bench"][i])

        heard = asyncio.run(together(websocket(server), 2, 24, say))
        batches = Counter[int]()
        for message, said in heard:
            assert said["type"] == "chunk" and not said["hold"], said
            np.testing.assert_array_equal(said["actions"], expected[message["adapter"], message["seq"] % 4 + 1])
            batches[said["batch"]] += 1
        assert batches[2] > 8, batches  # both of them, together
        with connect(websocket(server)) as line:
            for adapter in (None, "attic"):
                line.send(pack(asked(1, seq=1 + (adapter is not None), adapter=adapter)))
                error = unpack(line.recv(LIMIT, decode=False))["error"]
                assert error["code"] == "bad_request" and "kitchen" in error["expected"], error
        assert not server.complaints(), server.log
    print(dict(batches))


@pytest.mark.parametrize(
    ("policy", "name"), [("two", "kitchen"), ("one", "two"), ("kitchen", "bench"), ("null:tabletop", "kitchen")]
)
def test_adapters_of_another_base_are_refused_before_anything_is_served(policies: dict[str, Path], policy: str, name: str):
    with pytest.raises(VLAError) as refused:
        load({"policy": policies.get(policy, policy), "adapters": {"a": policies[name]}, "device": "cpu"})
    assert refused.value.found and refused.value.fix


def test_policies_swapped_under_load_drop_nothing(policies: dict[str, Path], tmp_path: Path):
    tokens, user, admin = tmp_path / "tokens", "user-token-0123456789abcdef", "admin-token-0123456789abcdef"
    tokens.write_text(f"{user}\nadmin:{admin}\n")
    names = {load_policy(policies[name], "cpu").fingerprint: name for name in ("one", "two")}
    expected = {(name, n): alone(policies[name], n) for name in ("one", "two") for n in range(1, 5)}
    with started(policies["one"], "--token-file", tokens, "--deadline", "60", token=user) as server:

        def swap(token: str, **content: Any) -> tuple[int, Any]:
            status, _, said = ask(server.port, "/v1/swap", json.dumps(content).encode(), f"Authorization: Bearer {token}")
            return status, json.loads(said)

        done = threading.Event()
        heard: list[Any] = []

        async def clients() -> None:
            async def client(i: int) -> None:
                async with connect_async(websocket(server), additional_headers=server.headers, open_timeout=LIMIT) as line:
                    k = 0
                    while not done.is_set() or k < 8:
                        await line.send(pack(asked(1 + k % 4, seq=k)))
                        heard.append((i, k, unpack(await line.recv(decode=False))))
                        k += 1
                        await asyncio.sleep(0.03)  # the new policy wants to load, too

            await asyncio.gather(*(client(i) for i in range(4)))

        said, wait = in_threads({"clients": lambda: asyncio.run(clients())})
        until(lambda: said or len(heard) > 20)
        assert not said
        assert swap(user, policy=str(policies["two"]))[0] == 403
        for wrong in ("null:aloha", "null:nowhere"):  # another robot, and no policy at all
            status, refused = swap(admin, policy=wrong)
            assert status == 422 and refused["error"]["found"], refused
        status, info = swap(admin, policy=str(policies["two"]))
        assert status == 200 and names[info["policy"]] == "two"
        done.set()
        wait()
        order: dict[int, list[str]] = {}
        for i, k, said in heard:
            assert said["type"] == "chunk" and not said["hold"], said  # nobody was refused
            name = names[said["policy"]]
            # Who shares a batch may change the last bit.
            np.testing.assert_allclose(said["actions"], expected[name, k % 4 + 1], rtol=0, atol=1e-6)
            order.setdefault(i, []).append(name)
        counts = Counter(name for names_of in order.values() for name in names_of)
        assert all(names_of == sorted(names_of) for names_of in order.values()) and counts["one"] > 20 and counts["two"], counts
        assert server.metric("tendon_policy_swaps_total") == 1 and server.metric("tendon_late_total") == 0
        assert len(psutil.Process(server.process.pid).children()) == 1  # the old model is gone
        assert not server.complaints(), server.log
    print(dict(counts))


# ---------------------------------------------------------------------------------------------------- long


@pytest.mark.parametrize("looks", [3000, pytest.param(36_000, marks=pytest.mark.slow)])
def test_an_hour_of_ten_looks_a_second_leaves_the_memory_flat(looks: int):
    """All a robot does in an hour (`--slow`; else the beginning of it), as fast as it goes: episodes, pictures of all kinds and
    sizes, connections that come and go, what is refused, and what nobody waits for."""
    with started("null:tabletop", "--deadline", "20") as server:
        rng = np.random.default_rng(0)
        frames = [rng.integers(0, 256, (side, side, 3)).astype(np.uint8) for side in (8, 64, 224, 480)]
        pictures: list[Any] = [*frames, *(encode(frame) for frame in frames[:3]), *(encode(frame, "jpeg") for frame in frames)]
        counts = Counter[str]()

        def episode(n: int, length: int) -> None:
            with connect(websocket(server), max_size=None, open_timeout=LIMIT) as line:
                for seq in range(length):
                    if seq % 25 == 0:  # another episode; what was bad may have been taken for a look
                        line.send(pack({"type": "reset"}))
                        counts[unpack(line.recv(LIMIT, decode=False))["type"]] += 1
                    bad = seq % 25 == 24
                    line.send(
                        mutated_message(11, n + seq, "/v1/ws") if bad else pack(look(seq, pictures[(n + seq) % len(pictures)]))
                    )
                    said = unpack(line.recv(LIMIT, decode=False))
                    assert bad or said["type"] == "chunk", said
                    counts["bad" if bad else "chunk"] += 1
            if n % 3 == 0:
                with line_to(server.port) as line:  # and is not waited for
                    line.sendall(request("/v1/act", body()))
                    if n % 2:
                        assert response(line)[0] == 200

        def play(count: int) -> None:
            for n in range(0, count, 100):
                episode(n, 100)

        play(800)
        before = server.memory()
        play(looks)
        after = server.memory()
        grown = {name: after[name] - before[name] for name in after}
        print(f"{counts}, before {before}, after {after}, grown {grown}")
        assert counts["chunk"] > 0.9 * looks and max(grown.values()) < 16 << 20, grown
        files = psutil.Process(server.process.pid).num_fds()
        assert files < 40 and server.metric("tendon_sessions") == 0 and server.metric("tendon_queue_length") == 0
        assert not server.complaints(), server.log
