"""Two replicas with Ray Serve, for real: one is killed, clients go on being served, and there are two again."""

from __future__ import annotations

import base64
import collections
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from serve.ray_app import replicas_of
from serve.wire import encode
from vla.errors import UsageError

ray = pytest.importorskip("ray", reason="Ray is the extra `ray`: pip install 'tendon-vla[ray,serve]'")
FRAME = base64.b64encode(encode(np.zeros((64, 64, 3), np.uint8)).data).decode()
LOOK = {"images": {"front": FRAME}, "state": [0.0, 0.0, 0.4, 0.5], "instruction": "touch the red cube"}


@contextlib.contextmanager
def replicated(*flags: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from vla.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", "null:tabletop?ms=20", "--port", str(port), *flags]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True)
    assert child.stderr is not None
    try:
        said = []
        for line in child.stderr:
            said.append(line)
            if "  ready" in line:
                break
        else:
            raise AssertionError("".join(said)[-3000:])
        threading.Thread(target=child.stderr.read, daemon=True).start()
        yield port, child
    finally:
        child.terminate()
        try:
            child.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as line:
        line.request(method, path, body and json.dumps(body), {"content-type": "application/json"} | headers)
        reply = line.getresponse()
        return reply.status, json.loads(reply.read())


def until(true: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.5)


@pytest.mark.slow
def test_one_of_two_replicas_is_killed_and_clients_go_on_being_served():
    with replicated("--replicas", "2") as (port, child):

        def alive() -> set[int]:
            return {ask(port, "GET", "/v1/info")[1].get("pid") for _ in range(12)}

        until(lambda: len(alive()) == 2, "two replicas answer")
        said: collections.Counter[str] = collections.Counter()
        stop, killed = threading.Event(), threading.Event()

        def client() -> None:
            while not stop.is_set():
                try:
                    status = ask(port, "POST", "/v1/act", LOOK)[0]
                except (OSError, http.client.HTTPException, ValueError):
                    status = 0
                said[f"{'after' if killed.is_set() else 'before'} {status}"] += 1

        clients = [threading.Thread(target=client) for _ in range(3)]
        for one in clients:
            one.start()
        until(lambda: said["before 200"] >= 30, "looks are answered")
        victim, survivor = sorted(alive())
        killed.set()
        os.kill(victim, signal.SIGKILL)
        until(lambda: said["after 200"] >= 60, f"looks are answered after one replica was killed: {said}")
        assert survivor in alive()
        until(lambda: len(alive() - {victim}) == 2, "there are two again")
        before = said["after 200"]
        until(lambda: said["after 200"] >= before + 30, "looks are answered by both")
        stop.set()
        for one in clients:
            one.join()
        print(dict(said))
        failed = sum(n for outcome, n in said.items() if not outcome.endswith("200"))
        assert not any(outcome.startswith("before") and not outcome.endswith("200") for outcome in said)
        assert failed <= 12, said  # what was with the replica that died; everybody else was served
        child.terminate()
        assert child.wait(60) == 0


@pytest.mark.slow
def test_a_request_chooses_among_several_policies():
    with replicated("--replicas", "1", "--model", "slow=null:tabletop?ms=1", "--model", "wrist=null:tabletop_wrist") as (port, _):
        names = {
            name: list(ask(port, "GET", "/v1/info", serve_multiplexed_model_id=name)[1]["robots"])
            for name in ("", "slow", "wrist")
        }
        assert names == {"": ["tabletop"], "slow": ["tabletop"], "wrist": ["tabletop_wrist"]}
        status, said = ask(port, "GET", "/v1/info", serve_multiplexed_model_id="none")
        assert status == 404 and "slow, wrist" in said["error"]["expected"]


@pytest.mark.parametrize("text", ["0", "2:1", "x", "1:", ""])
def test_a_number_of_replicas_that_is_none(text: str):
    with pytest.raises(UsageError, match="--replicas"):
        replicas_of(text)
    assert replicas_of("3") == (3, 3) and replicas_of("1:8") == (1, 8)
