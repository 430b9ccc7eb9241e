"""A planner's questions end in time, whatever the other end does, and what comes back is no more than was asked for."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest
from children import LIMIT

from serve.asking import post_json
from serve.planner import Asked
from serve.refusal import Refusal
from serve.remote_planner import ServerPlanner


@pytest.mark.parametrize("length", [True, False])
def test_an_answer_that_drips_ends_in_time(length: bool):
    """Whether the connection is kept or closed after it: `http.client` forgets its socket then."""
    listening = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def drip() -> None:
        peer, _ = listening.accept()
        peer.recv(1 << 16)
        head = "content-length: 1000" if length else "connection: close"
        with contextlib.suppress(OSError):
            peer.sendall(f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{head}\r\n\r\n".encode())
            while not over.wait(0.05):
                peer.sendall(b" ")
        peer.close()

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    done: list[object] = []

    def ask() -> None:
        with pytest.raises(Refusal) as refused:
            post_json(f"http://127.0.0.1:{listening.getsockname()[1]}/v1/plan", {}, timeout=0.5)
        done.append(refused.value.code)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(LIMIT)
    over.set()
    listening.close()
    assert done == ["late"]


def test_a_server_is_believed_only_as_far_as_the_robot_knows_its_words(monkeypatch: pytest.MonkeyPatch):
    """Only what is made of an answer is looked at here; tests/test_planning.py has real servers."""
    said = {"instruction": "fly to the moon", "remaining": [], "memory": "", "done": False, "confidence": 1.0, "valid_for": 3600,
            "reason": "", "considered": []}  # fmt: skip
    asked: list[dict[str, object]] = []

    def answer(url: str, body: dict[str, object], **_: object) -> tuple[int, object]:
        asked.append(body)
        return 200, dict(said)

    monkeypatch.setattr("serve.remote_planner.post_json", answer)
    free = ServerPlanner("http://127.0.0.1:1")
    assert free.plan(Asked("x")).valid_for == 30.0, "no plan is good for an hour"
    bound = ServerPlanner("http://127.0.0.1:1", known=["touch it", "push it"])
    with pytest.raises(Refusal, match="fly to the moon"):
        bound.plan(Asked("x"))
    assert asked[-1]["known"] == ["touch it", "push it"]
    said["instruction"] = "done"
    for planner in (free, bound):
        with pytest.raises(Refusal, match="not done"):
            planner.plan(Asked("x"))
    said["instruction"] = "push it"
    assert bound.plan(Asked("x")).instruction == "push it"
    said["instruction"] = "wave"
    assert bound.plan(Asked("x", words="wave")).instruction == "wave", "what a person said may be followed"
