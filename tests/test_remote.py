"""A simulator in another interpreter: the same as here, and whatever the other side does is an error that says what to type."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from children import LIMIT
from toy_remote import Toy

from vla.errors import DataError, MachineError, UsageError
from vla.sims import make_sim, remote
from vla.sims.remote import Environment, RemoteSimulator
from vla.sims.remote_wire import MAX_ARRAYS, WireError, receive, send

TOY = Environment("toy", "the toy", module="toy_remote")


@pytest.fixture(autouse=True)
def toy_python(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLA_TOY_PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def toy(task: str = "touch-red", **kw: object) -> RemoteSimulator:
    return RemoteSimulator(TOY, "tabletop", task, **kw)


# ---------------------------------------------------------------- the same as here


def test_it_plays_exactly_as_it_would_here():
    there, here = toy(image_size=16), Toy("touch-red", image_size=16)
    assert (there.camera, there.max_steps, there.task, there.instruction) == ("front", 7, "touch-red", "touch the red cube")
    assert there.action_space == here.action_space and there.observation_space == here.observation_space
    for options in (None, {"watch": ["touch-red"]}, {"render": False}):
        (seen, info), (expected, told) = (sim.reset(seed=5, options=options) for sim in (there, here))
        over, steps = False, 0
        while not over:
            assert info == told and seen["images"].keys() == expected["images"].keys()
            assert seen["state"].dtype == np.float32 and np.array_equal(seen["state"], expected["state"])
            assert all(np.array_equal(seen["images"][camera], expected["images"][camera]) for camera in seen["images"])
            action = there.expert()
            assert action.dtype == np.float32 and np.array_equal(action, here.expert())
            seen, *mine, info = there.step(action, render=steps % 2 == 0)
            expected, *theirs, told = here.step(action, render=steps % 2 == 0)
            assert mine == theirs and [type(m) for m in mine] == [float, bool, bool]
            over, steps = mine[1] or mine[2], steps + 1
        assert info["success"] and steps == 3
    assert np.array_equal(there.frame(24), here.frame(24)) and there.render().shape == (240, 240, 3)
    seen["state"][0] = 9  # what arrives can be written to, as here


def test_simulators_of_a_process_share_a_child_and_do_not_disturb_each_other():
    one, other = toy(), toy("touch-blue")
    assert one._room is other._room and one.instruction != other.instruction
    one.reset(seed=0)
    other.reset(seed=100)
    one.step(np.ones(4))
    assert other.step(np.zeros(4))[0]["state"][0] == np.float32(0.1)
    one.close()
    one.close()
    with pytest.raises(MachineError, match="KeyError"):
        one.step(np.zeros(4))
    assert other.step(np.zeros(4))[4]["step"] == 2


def test_errors_come_home_as_what_they_were():
    sim = toy()
    with pytest.raises(UsageError, match="reset first"):
        sim.step(np.zeros(4))
    sim.reset(seed=1)
    with pytest.raises(DataError, match="eef.dx"):
        sim.step(np.zeros(3))
    with pytest.raises(DataError, match="finite"):
        sim.step([0, np.nan, 0, 0])
    with pytest.raises(UsageError, match="a seed of 0 or more"):
        sim.reset(seed=None)
    with pytest.raises(UsageError, match="make another simulator"):
        sim.reset(seed=1, options={"task": "touch-blue"})
    with pytest.raises(UsageError, match="randomise"):
        toy(randomise=True)
    with pytest.raises(MachineError, match="the physics exploded") as caught:
        sim.reset(seed=662)
    assert caught.value.fix == "make setup-toy"
    assert sim.reset(seed=2)[1]["step"] == 0  # none of them ended the child


# ---------------------------------------------------------------- the other side fails


@pytest.mark.parametrize(("seed", "said"), [(660, "it ended with code 3"), (661, "killed by signal 9"), (663, "not ours")])
def test_a_child_that_dies_or_babbles_is_a_machine_error_and_the_next_one_works(seed, said):
    sim = toy()
    sim.reset(seed=1)
    with pytest.raises(MachineError, match=said) as caught:
        sim.reset(seed=seed)
    assert caught.value.fix == "make setup-toy" and caught.value.exit_code == 5
    assert sim._room._child.poll() is not None, "nobody is left behind"
    with pytest.raises(MachineError, match="it ended earlier"):
        sim.step(np.zeros(4))
    sim.close()
    assert toy().reset(seed=1)[1]["step"] == 0


def test_what_the_child_prints_does_not_get_into_the_conversation():
    assert toy().reset(seed=664)[0]["state"][0] == np.float32(0.664)


def test_a_silent_child_is_given_up(monkeypatch):
    sim = toy()
    sim._room._sock.settimeout(0.2)
    os.kill(sim._room._child.pid, signal.SIGSTOP)
    with pytest.raises(MachineError, match="no answer to 'reset'"):
        sim.reset(seed=1)
    assert sim._room._child.poll() is not None


def test_the_child_ends_with_its_parent():
    code = (
        "import os, signal, sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_remote import toy\n"
        "sim = toy(); sim.reset(seed=1); print(sim._room._child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    child = Path(f"/proc/{int(done.stdout)}")
    for _ in range(200):
        if not child.exists() or "\nState:\tZ" in (child / "status").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("the child outlived its parent")


def test_a_missing_or_wrong_interpreter_says_what_to_type(monkeypatch, tmp_path):
    monkeypatch.setenv("VLA_TOY_PYTHON", str(tmp_path / "nobody"))
    with pytest.raises(MachineError, match="VLA_TOY_PYTHON") as caught:
        toy()
    assert "make setup-toy" in caught.value.fix
    monkeypatch.setenv("VLA_ROBOSUITE_PYTHON", str(tmp_path / "nobody"))
    with pytest.raises(MachineError, match="numpy below 2") as caught:
        make_sim("robosuite-panda", "lift")
    assert "make setup-robosuite" in caught.value.fix
    for text, said in (("#!/bin/sh\necho no such module >&2; exit 1\n", "no such module"), ("not a program", "does not start")):
        python = tmp_path / said.replace(" ", "")
        python.write_text(text)
        python.chmod(0o755)
        monkeypatch.setenv("VLA_TOY_PYTHON", str(python))
        with pytest.raises(MachineError, match=said):
            toy()


def test_another_version_on_the_other_side_is_refused(monkeypatch):
    monkeypatch.setattr(remote.vla, "__version__", "99.0")
    with pytest.raises(MachineError, match=r"99\.0, as here"):
        RemoteSimulator(Environment("toy", "the toy, newer", module="toy_remote"), "tabletop", "touch-red")


# ---------------------------------------------------------------- the bytes


@pytest.fixture()
def pair():
    one, other = socket.socketpair()
    with one, other:
        other.settimeout(5)
        yield one, other


def test_arrays_arrive_as_they_were_sent(pair):
    arrays = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4).T, "b": np.array([], np.float64).reshape(0, 3),
        "c": np.array(7, np.uint8), "d": np.random.default_rng(0).integers(0, 255, (400, 400, 3)).astype(np.uint8),
    }  # fmt: skip
    threading.Thread(target=send, args=(pair[0], {"op": "x", "deep": {"n": [1, None, "ü"]}}, arrays)).start()
    header, got = receive(pair[1])
    assert header == {"op": "x", "deep": {"n": [1, None, "ü"]}} and list(got) == list(arrays)
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape and np.array_equal(got[name], array)
        assert got[name].flags.writeable


def test_only_plain_numbers_are_sent(pair):
    for bad in (np.array([{}], object), np.array(["x"]), np.array([1])):
        with pytest.raises(TypeError):
            send(pair[0], {}, {"a": bad})
    with pytest.raises(ValueError):
        send(pair[0], {"x": float("nan")})


def message(header: object, payload: bytes = b"", length: int | None = None, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<II", len(text) if length is None else length, len(payload) if size is None else size) + text + payload


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        message({}, size=MAX_ARRAYS + 1),
        message(b"\x80\x04}\x94."),
        message([1]),
        message({"op": "x"}),
        message({"arrays": [["a", "uint8"]]}),
        message({"arrays": [["a", "object", [1]]]}, b"12345678"),
        message({"arrays": [["a", "uint8", [-1]]]}, b""),
        message({"arrays": [["a", "float64", [3]]]}, b"12345678"),
        message({"arrays": [["a", "uint8", [2**40, 2**40]]]}, b"1"),
        message({"arrays": [["a", "uint8", [3]]]}, b"12345678"),
        message(b"[" * 60_000),
    ],
)
def test_bytes_that_are_not_ours_are_refused(pair, data):
    pair[0].sendall(data)
    pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises(WireError):
        receive(pair[1])


@pytest.mark.parametrize("cut", [0, 3, 8, 20, -1])
def test_a_message_cut_short_is_an_end(pair, cut):
    whole = message({"arrays": [["a", "uint8", [8]]]}, b"12345678")
    pair[0].sendall(whole[:cut])
    pair[0].close()
    with pytest.raises(EOFError):
        receive(pair[1])
