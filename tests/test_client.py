"""The robot's side of a server: it answers or says why not, in time, whatever the other side does."""

from __future__ import annotations

import json
import select
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_folder import edge_spec
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from misbehaving import PATIENT, SHORT, SOON, Line, N, Peer, answers, chunk, client, frame, look
from serving import serving, started, until

from serve.client import Client
from serve.connection import Connection
from serve.refusal import Refusal
from serve.robot import Robot, differences
from serve.wire import encode, pack, pieces
from vla.embodiment import load_embodiment
from vla.errors import DataError, UsageError

# --- a real server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving("null:tabletop") as served:
        yield served


def test_it_acts(address: str):
    with client(address) as robot:
        assert robot.address == address.replace("http", "ws") and robot.policy == "null" and robot.steps() == (8, 8)
        assert robot.robots["tabletop"].names("action") == ["eef.dx", "eef.dy", "eef.dz", "gripper.close"]
        said = robot.act(look(), "push the red cube left")
        assert said.actions.shape == said.confidence.shape == said.symbols.shape == (8, 4) and said.actions.dtype == np.float32
        assert (said.execute, said.hold, said.reason, said.needs_help, said.policy) == (8, False, "", "", "null")
        assert said.timing["total"] >= said.timing["serve"] > 0
        robot.reset()
        robot.resume()
        assert not robot.act(look(1), "go", "tabletop").hold and robot.connections == 1
    with pytest.raises(UsageError, match="closed"):
        robot.act(look(), "go")


@pytest.mark.parametrize("options", [{"pictures": "png"}, {"pictures": "jpeg"}, {"mask": True}])
def test_pictures_may_be_files_and_frames_masked(address: str, options: dict):
    with client(address, **options) as robot:
        for n, side in enumerate((1, 32, 300)):
            assert not robot.act(look(n, side), "go").hold
        files = {**look(9), "images": {"front": encode(look(9)["images"]["front"])}}
        assert not robot.act(files, "go").hold


def test_what_is_wrong_with_a_look_is_said_and_the_connection_stays(address: str):
    with client(address) as robot:
        for observation, instruction, kind, part in (
            ({**look(), "state": np.zeros(3)}, "go", Refusal, "state"),
            ({**look(), "state": "here"}, "go", DataError, "state"),
            (look(), "", Refusal, "instruction"),
            (look(), 7, DataError, "instruction"),
            ({**look(), "images": {"front": np.zeros((4, 4))}}, "go", DataError, "camera 'front'"),
            ({**look(), "images": {"front": np.zeros((0, 4, 3), np.uint8)}}, "go", Refusal, "camera 'front'"),
            ({"state": None}, "go", DataError, "images"),
            ({**look(), "images": {}}, "go", Refusal, "no picture of camera 'front'"),
            ({**look(), "time": time.monotonic() - 3}, "go", Refusal, "stale"),
            ({**look(), "executed": -1}, "go", Refusal, "executed"),
        ):
            with pytest.raises(kind, match=part):
                robot.act(observation, instruction)  # pyright: ignore[reportArgumentType]
        with pytest.raises(Refusal, match="did you mean 'tabletop'"):
            robot.act(look(), "go", "tabletopp")
        with pytest.raises(UsageError, match="one of"):
            robot.steps("tabletopp")
        assert not robot.act(look(1), "go").hold and robot.connections == 1


def test_who_is_not_let_in(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    token = "0123456789abcdef"
    (tmp_path / "tokens").write_text(f"# of the robot\n{token}\n")
    with started("null:tabletop", "--token-file", tmp_path / "tokens", token=token) as server:
        for wrong in (None, "0123456789abcdeF"):
            with pytest.raises(Refusal, match="Bearer") as refused:
                client(server.address, token=wrong)
            assert refused.value.code == "unauthorized"
        with client(server.address, token=token) as robot:
            assert robot.policy == "null"
        monkeypatch.setattr("serve.heard.PROTOCOL", 2)
        with pytest.raises(Refusal, match="same tendon-vla on both sides") as refused:
            client(server.address, token=token)
        assert refused.value.code == "bad_request" and (refused.value.where, refused.value.found) == ("protocol", "2")
        assert token[:-1] not in server.log
    assert token[:-1] not in caplog.text


def test_it_comes_back_when_the_server_does():
    with started("null:tabletop") as server:
        robot = client(server.address)
        assert not robot.act(look(), "go").hold
        server.leave = None
        server.process.kill()
        server.process.wait(PATIENT)
        robot.timeout = SHORT
        for _ in range(2):
            with pytest.raises(Refusal) as refused:
                robot.act(look(1), "go")
            assert refused.value.code in ("unavailable", "late")
    with serving("null:tabletop", "--port", server.port), robot:
        robot.timeout = PATIENT
        assert not robot.act(look(2), "go").hold and robot.connections == 2


def test_it_waits_for_a_policy_that_is_loading():
    with started("null:tabletop", wait=False) as server, client(server.address) as robot:
        assert not robot.act(look(), "go").hold and robot.policy == "null"


def test_tls(tmp_path: Path):
    files = [str(tmp_path / name) for name in ("key.pem", "cert.pem")]
    try:
        words = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", files[0], "-out", files[1],
                 "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]  # fmt: skip
        subprocess.run(["openssl", "req", "-x509", *words], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl")
    with serving("null:tabletop", "--key", files[0], "--certificate", files[1]) as served:
        with pytest.raises(UsageError, match="that this machine trusts"):
            client(served)
        with client(served, tls=ssl.create_default_context(cafile=files[1])) as robot:
            assert robot.address.startswith("wss://")
            for n, side in enumerate((4, 300)):
                assert not robot.act(look(n, side), "go").hold
            assert robot.connections == 1


# --- which robot -----------------------------------------------------------------------------------------------------


def test_another_robot_is_refused_with_all_that_differs(address: str):
    here = load_embodiment("tabletop").model_dump(mode="json")
    with client(address, expect=here) as robot, client(address, expect=Robot.from_json(here, "here")) as same:
        assert not robot.act(look(), "go").hold and not same.act(look(), "go").hold
        with pytest.raises(UsageError, match="which stands here"):
            robot.act(look(), "go", "another")
    other = json.loads(json.dumps(here))
    other["control_hz"], other["cameras"] = 20, {"wrist": {"height": 9, "width": 9}}
    other["state"][0]["unit"], other["action"][0]["frame"] = "mm", "tool"
    other["action"][0]["low"][0], other["action"][1]["convention"] = -2, "gripper_open_positive"
    with pytest.raises(UsageError) as refused:
        client(address, expect=other)
    for part in ("control_hz: 20.0 here, 10.0 there", "camera 'front': none here", "state eef, unit: mm here, m there",
                 "action eef, frame: tool here, base there", "action eef, low: -2.0, -1.0, -1.0 here, -1.0, -1.0, -1.0 there",
                 "action gripper, convention: gripper_open_positive here, gripper_closed_positive there"):  # fmt: skip
        assert part in refused.value.found
    assert refused.value.found.count(" here, ") == 5
    with pytest.raises(UsageError, match="only 'tabletop'"):
        client(address, expect={**here, "name": "another"})


def test_a_camera_too_many_is_no_difference_and_a_channel_is():
    one, two = (Robot.from_json(edge_spec(cameras).model_dump(mode="json"), "") for cameras in (("front", "wrist"), ("front",)))
    assert differences(one, two) == [] and differences(two, one) == ["camera 'wrist': none here"]
    entry = two.to_json()
    fewer = Robot.from_json({**entry, "action": entry["action"][:1]}, "")
    assert differences(two, fewer) == ["action channels: eef, gripper here, eef there"]
    unsaid = Robot.from_json({**entry, "action": [{k: v for k, v in c.items() if k != "frame"} for c in entry["action"]]}, "")
    assert differences(two, unsaid) == []


def test_a_policy_that_is_swapped_is_looked_at_again():
    peer = Peer(lambda line, message: line.say(chunk(message, policy=peer.policy)), edge_spec(("front",)))
    with peer, client(peer, expect=peer.spec.model_dump(mode="json")) as robot:
        robot.act(look(), "go")
        peer.policy = "two"
        assert robot.act(look(), "go").policy == robot.policy == "two" and robot.connections == 1
        peer.policy, peer.spec = "three", edge_spec(("front",), control_hz=20)
        for _ in range(3):
            with pytest.raises(UsageError, match="control_hz: 10.0 here, 20.0 there"):
                robot.act(look(), "go")
        peer.spec = edge_spec(("front",))
        until(lambda: robot.connections == 2)
        assert robot.act(look(), "go").policy == "three"


# --- a server that misbehaves ----------------------------------------------------------------------------------------


def raised(robot: Client, code: str, observation: Any = None) -> Refusal:
    """What one look is refused with, within a time that is bounded."""
    began = time.monotonic()
    with pytest.raises(Refusal) as refused:
        robot.act(observation or look(), "go")
    assert time.monotonic() - began < SOON and refused.value.code == code, refused.value
    return refused.value


def trickle(line: Line, message: dict[str, Any]) -> None:
    for byte in frame(pack(chunk(message))):
        line.plain.sendall(bytes((byte,)))
        time.sleep(0.05)


def half(line: Line, message: dict[str, Any]) -> None:
    whole = frame(pack(chunk(message)))
    line.plain.sendall(whole[: len(whole) // 2])


def cut(line: Line, message: dict[str, Any]) -> None:
    half(line, message)
    line.plain.close()


def torn(line: Line, message: dict[str, Any]) -> None:
    line.plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.plain.close()


BAD: dict[str, tuple[Any, str]] = {
    "never answers": (lambda line, message: None, "late"),
    "half a frame": (half, "late"),
    "half a head": (lambda line, message: line.plain.sendall(b"\x82\x7f\x00"), "late"),
    "a byte now and then": (trickle, "late"),
    "only pings": (lambda line, message: [line.plain.sendall(frame(b"", 9)) for _ in range(50)], "late"),
    "only yesterday's answers": (lambda line, message: line.say({**chunk(message), "seq": message["seq"] - 1}), "late"),
    "leaves in the middle": (cut, "unavailable"),
    "leaves at once": (torn, "unavailable"),
    "says goodbye": (lambda line, message: line.plain.sendall(frame(b"\x03\xe8bye", 8)), "unavailable"),
    "tomorrow's answer": (lambda line, message: line.say({**chunk(message), "seq": message["seq"] + 1}), "internal"),
    "no msgpack": (lambda line, message: line.plain.sendall(frame(b"\xc1")), "internal"),
    "no mapping": (lambda line, message: line.say([1, 2]), "internal"),
    "a refusal of no kind": (lambda line, message: line.say({"type": "refusal", "seq": message["seq"]}), "internal"),
    "no actions": (lambda line, message: line.say({"type": "chunk", "seq": message["seq"]}), "internal"),
    "another robot's": (lambda line, message: line.say(chunk(message, actions=np.zeros((8, 7), np.float32))), "internal"),
    "words for actions": (lambda line, message: line.say(chunk(message, actions="left")), "internal"),
    "a masked frame": (lambda line, message: line.plain.sendall(b"\x82\x81\0\0\0\0\xc0"), "unavailable"),
    "a frame of 2**40 bytes": (lambda line, message: line.plain.sendall(b"\x82\x7f\0\0\1" + bytes(5)), "unavailable"),
    "no frame": (lambda line, message: line.plain.sendall(b"HTTP/1.1 200 OK\r\n\r\n" * 9), "unavailable"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_costs_the_connection_and_nothing_else(name: str):
    bad, code = BAD[name]
    with Peer(lambda line, message: (bad if line.number == 1 else answers)(line, message)) as peer, client(peer) as robot:
        robot.timeout = SHORT if code == "late" else PATIENT
        raised(robot, code)
        robot.timeout = PATIENT
        assert not robot.act(look(1), "go").hold and robot.connections == 2
        assert len(peer.looks()) == 2  # no look is sent twice


def test_an_answer_that_comes_late_is_nobodys():
    """The first look is answered after the second was asked, on a connection that is still open there."""
    first: list[tuple[Line, dict[str, Any]]] = []

    def answer(line: Line, message: dict[str, Any]) -> None:
        if not first:
            first.append((line, message))
            return
        try:
            first[0][0].say(chunk(first[0][1], first=500))
        except OSError:
            pass
        line.say(chunk({"seq": first[0][1]["seq"]}, first=600))  # and once more on this one
        line.say(chunk(message, first=100))

    with Peer(answer) as peer, client(peer, timeout=SHORT) as robot:
        raised(robot, "late")
        robot.timeout = PATIENT
        assert round(1000 * float(robot.act(look(1), "go").actions[0, 0])) == 100


def test_a_server_that_reads_nothing():
    """Pictures that fit no buffer on the way."""
    large = {"images": {c: np.zeros((1500, 1500, 3), np.uint8) for c in "abcd"}, "state": None}
    with Peer(answers) as peer:
        peer.greeted = lambda line: peer.sleep(PATIENT)
        with client(peer, reconnect=None) as robot:
            robot.timeout = SHORT
            raised(robot, "late", large)
            assert not peer.looks()
            raised(robot, "late")  # it was told not to connect again


def test_a_server_that_greets_nobody_any_more():
    with Peer(lambda line, message: line.plain.close()) as peer, client(peer) as robot:
        robot.timeout, peer.greets = SHORT, False
        for n in range(3):
            began = time.monotonic()
            with pytest.raises(Refusal) as refused:
                robot.act(look(n), "go")
            assert time.monotonic() - began < SOON and refused.value.code in ("unavailable", "late")
        assert len(peer.looks()) == 1


def test_nobody_reads_what_is_sent():
    took: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as plain:
        address = f"ws://127.0.0.1:{plain.getsockname()[1]}"
        for wait in (SHORT, 0.0):  # accepted by the system, and by nobody else
            began = time.monotonic()
            with pytest.raises(Refusal):
                Client(address, wait=wait)
            took.append(time.monotonic() - began)
    assert max(took) < SOON
    with pytest.raises(Refusal, match="refused") as refused:
        Client(address, wait=SHORT)
    assert refused.value.code == "unavailable" and refused.value.retry_after
    assert not [thread for thread in threading.enumerate() if thread.name == "reconnect" and waits(thread)]


def waits(thread: threading.Thread) -> bool:
    thread.join(PATIENT)
    return thread.is_alive()


def test_frames_that_are_unusual_are_understood():
    def answer(line: Line, message: dict[str, Any]) -> None:
        data = pack(chunk(message))
        if line.looks == 1:
            parts = [frame(data[:1], 2, False), frame(b"?", 9), frame(data[1:700], 0, False), frame(data[700:], 0)]
            line.plain.sendall(frame(b"!", 9) + b"".join(parts))
        elif line.looks == 2:
            line.plain.sendall(frame(b"", 10) + frame(data)[:10])
            time.sleep(0.05)
            line.plain.sendall(frame(data)[10:] + frame(b"later", 9) + frame(pack({"type": "chunk", "seq": 0})))
        elif line.looks == 3:  # one larger than any buffer at first
            line.say(chunk(message, reason="x" * 19_000, symbols=np.zeros(100_000, np.int64)))
        else:
            line.say(chunk(message))

    with Peer(answer) as peer, client(peer) as robot:
        for n in range(4):
            said = robot.act(look(n), "go")
            assert said.actions.shape == (N, 4) and len(said.symbols) == (100_000 if n == 2 else N)
        assert robot.connections == 1


def test_what_the_server_says_is_what_is_raised():
    refusal = Refusal("busy", where="engine", found="9 requests", expected="at most 8", fix="later", retry_after=1.5)

    def answer(line: Line, message: dict[str, Any]) -> None:
        line.say({"type": "refusal", "seq": message["seq"] if line.looks == 1 else None, **refusal.to_json()})

    with Peer(answer) as peer, client(peer) as robot:
        for _ in range(2):
            said = raised(robot, "busy")
            assert said.to_json() == refusal.to_json() and robot.connections == 1
    with pytest.raises(ValueError):
        Refusal.from_json({"error": {"code": "none of ours"}})


def test_who_speaks_another_protocol():
    peer = Peer(answers)
    peer.protocol = 2
    with peer, pytest.raises(Refusal, match="same tendon-vla on both sides") as refused:
        client(peer)
    assert refused.value.code == "bad_request" and "protocol 2" in refused.value.found


@pytest.mark.parametrize(
    "address", ["ftp://here", "ws://", "ws://here:x", "ws://user:pass@here", "ws://here/?protocol=1", "ws://here/#a"]
)
def test_what_is_no_address(address: str):
    with pytest.raises(UsageError, match="address") as refused:
        Client(address)
    assert "pass" not in refused.value.found


@pytest.mark.parametrize(
    "options", [{"token": ""}, {"token": "a\r\nHost: b"}, {"pictures": "gif"}, {"timeout": 0}, {"reconnect": (0, 1)}]
)
def test_what_is_no_option(options: dict):
    with pytest.raises(UsageError):
        Client("ws://127.0.0.1:1", **options)


def test_where_it_knocks_and_what_it_says_at_the_door(caplog: pytest.LogCaptureFixture):
    with Peer(answers) as peer, client(f"{peer.address}/lab/arm/", token="secret") as robot:
        assert peer.opened[0].path == "/lab/arm/v1/ws?protocol=1" and peer.opened[0].headers["Authorization"] == "Bearer secret"
        assert "Sec-WebSocket-Extensions" not in peer.opened[0].headers and robot.address.endswith("/lab/arm")
    assert "secret" not in caplog.text


def test_closing_ends_a_look_that_is_under_way():
    asked = threading.Event()
    with Peer(lambda line, message: asked.set()) as peer:
        robot = client(peer)
        threading.Thread(target=lambda: (asked.wait(PATIENT), robot.close()), daemon=True).start()
        raised(robot, "unavailable")
    with pytest.raises(UsageError, match="closed"):
        robot.act(look(), "go")


def test_one_look_at_a_time():
    go, errors = threading.Event(), []

    def answer(line: Line, message: dict[str, Any]) -> None:
        go.wait(PATIENT)
        line.say(chunk(message))

    with Peer(answer) as peer, client(peer) as robot:
        other = threading.Thread(target=lambda: robot.act(look(), "go"))
        other.start()
        until(lambda: peer.looks())
        robot.timeout = SHORT
        errors.append(raised(robot, "busy"))
        go.set()
        other.join(PATIENT)
        robot.timeout = PATIENT
        assert not robot.act(look(), "go").hold and robot.connections == 1


def test_a_server_that_left_while_nobody_looked_is_noticed_before_a_look_is_sent():
    lines: list[Line] = []

    def answer(line: Line, message: dict[str, Any]) -> None:
        lines.append(line)
        line.say(chunk(message))

    with Peer(answer) as peer, client(peer) as robot:
        robot.act(look(), "go")
        lines[0].plain.sendall(frame(b"\x03\xe9going", 8))
        lines[0].plain.close()
        assert robot._link is not None and select.select([robot._link._socket], [], [], PATIENT)[0]
        assert not robot.act(look(1), "go").hold and robot.connections == 2 and len(peer.looks()) == 2


def test_that_help_was_asked_for_outlives_the_connection():
    def answer(line: Line, message: dict[str, Any]) -> None:
        if line.number == 1 and line.looks == 1:
            line.say(chunk(message, hold=True, reason="waiting for help", needs_help="held 10 times"))
        elif line.number == 1:
            line.plain.close()
        else:
            line.say(chunk(message))

    with Peer(answer) as peer, client(peer) as robot:
        said = robot.act(look(), "go")
        assert said.hold and said.needs_help == "held 10 times"
        raised(robot, "unavailable")
        until(lambda: robot.connections == 2)
        for _ in range(2):  # the server that came back knows nothing of it
            assert raised(robot, "needs_help").found == "held 10 times"
        robot.resume()
        assert not robot.act(look(2), "go").hold
        assert [message["type"] for message in peer.heard][-2:] == ["resume", "look"]


def test_reset_needs_no_server():
    with Peer(lambda line, message: line.plain.close()) as peer:
        robot = client(peer, reconnect=None)
        raised(robot, "unavailable")
        robot.reset()
        robot.resume()
        robot.close()
        robot.close()


# --- and what it costs -----------------------------------------------------------------------------------------------


@given(
    st.lists(arrays(np.uint8, st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 3))), max_size=4),
    st.sampled_from(["C", "F"]),
)
def test_pieces_are_what_pack_says(frames, order):
    images: dict[str, Any] = {str(n): np.array(one, order=order) for n, one in enumerate(frames)}
    images |= {"file": encode(np.zeros((3, 4, 3), np.uint8))}
    message = {"type": "look", "state": np.ones(3, np.float32), "seq": None, "age": np.float32(1)}
    parts = pieces(message, images)
    assert b"".join(parts) == pack(message | {"images": images})
    for part in parts[1::2] if order == "C" else ():
        if len(part):
            assert isinstance(part, memoryview) and any(np.shares_memory(np.asarray(part), one) for one in images.values()
                                                        if isinstance(one, np.ndarray))  # fmt: skip


def test_a_robot_needs_little():
    code = "import serve.client, sys; print([m for m in %r if m in sys.modules])"
    heavy = ["torch", "pydantic", "pandas", "transformers", "PIL", "starlette", "uvicorn", "asyncio", "yaml"]
    done = subprocess.run([sys.executable, "-c", code % (heavy,)], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="local sockets without files are Linux's")
def test_who_is_near_comes_by_the_local_socket_and_proves_as_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    token = "0123456789abcdef"
    (tmp_path / "tokens").write_text(f"{token}\n")

    def family(robot: Client) -> int:
        assert robot._link is not None
        return robot._link._socket.family

    with started("null:tabletop", "--token-file", tmp_path / "tokens", token=token) as server:
        address = server.address.replace("http", "ws")
        with client(address, token=token) as near, client(address, token=token, shared=False) as far:
            assert (family(near), family(far)) == (socket.AF_UNIX, socket.AF_INET)
            assert near.act(look(), "go").execute == far.act(look(), "go").execute == 8
            local = near.said["local"]
        late = time.monotonic() + 5
        for headers in ({}, {"Authorization": "Bearer another-token-of-16"}):
            with pytest.raises(Refusal) as kept_out:
                Connection(f"{address}/v1/ws?protocol=1", headers, late, local=local)
            assert kept_out.value.code == "unauthorized"
        with pytest.raises(ConnectionError):
            Connection(f"{address}/v1/ws?protocol=1", {}, late, local="tendon-of-another-computer")
        monkeypatch.delattr(socket, "AF_UNIX")
        with client(address, token=token) as elsewhere:  # as through a port that is forwarded
            assert family(elsewhere) == socket.AF_INET and elsewhere.act(look(), "go").execute == 8
        assert not server.complaints()
