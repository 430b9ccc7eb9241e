"""GR00T's wire: what its client sends is answered, in its own format; what nobody should send is refused and breaks nothing."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpies
from serving import serving, started

from serve.backend import ThreadBackend
from serve.engine import Engine
from serve.gate import Tokens
from serve.service import Service, Session
from serve.settings import ServeSettings
from serve.wires import gr00t
from serve.wires.gr00t import Answering, array_of_npy
from vla.errors import MachineError, UsageError, VLAError
from vla.policy import load_policy
from vla.sims import make_sim

TOKEN = "a-token-of-some-length"


# ---------------------------------------------------------------------------------------------------- that client's format


def to_bytes(message: Any) -> bytes:
    def plain(value: Any) -> Any:
        file = io.BytesIO()
        np.save(file, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": file.getvalue()}

    data = msgpack.packb(message, default=plain)
    assert data is not None
    return data


def from_bytes(data: bytes) -> Any:
    def made(entry: dict) -> Any:
        if "__ModalityConfig_class__" in entry:
            return SimpleNamespace(**entry["as_json"])
        return np.load(io.BytesIO(entry["as_npy"]), allow_pickle=False) if "__ndarray_class__" in entry else entry

    return msgpack.unpackb(data, object_hook=made)


def observation(seen: dict[str, Any], words: str, steps: int = 1) -> dict[str, Any]:
    """As Isaac-GR00T's policies take it; earlier steps are there and mean nothing."""

    def lasting(array: np.ndarray) -> np.ndarray:
        earlier = np.zeros((steps - 1, *array.shape), array.dtype)
        return np.concatenate([earlier, array[None]])[None]

    state = np.asarray(seen["state"], np.float32)
    return {"video": {name: lasting(frame) for name, frame in seen["images"].items()},
            "state": {"eef": lasting(state[:3]), "gripper": lasting(state[3:])}, "language": {"task": [[words]]}}  # fmt: skip


def looked(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"images": {"front": rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)}, "state": np.full(4, 0.25, np.float32)}


# ---------------------------------------------------------------------------------------------------- arrays


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@given(
    numpies.arrays(
        st.sampled_from(["|b1", "|u1", "<i4", ">i2", "<f4", ">f8", "<f2", "<u8"]),
        numpies.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
    ),
    st.booleans(),
)
def test_an_array_is_read_as_numpy_reads_it(array: np.ndarray, fortran: bool):
    data = saved(np.asfortranarray(array) if fortran else array)
    read, expected = array_of_npy(data), np.load(io.BytesIO(data), allow_pickle=False)
    assert read.dtype == expected.dtype and read.shape == expected.shape and read.tobytes() == expected.tobytes()


def test_a_newer_header_is_read():
    for version in ((2, 0), (3, 0)):
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy says that older readers cannot
            np.lib.format.write_array(file, np.arange(6.0).reshape(2, 3), version=version)
        assert np.array_equal(array_of_npy(file.getvalue()), np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("data", [
    None, 7, b"", b"\x93NUMPY", b"\x93NUMPY\1\0", saved(np.zeros(3))[:-1], saved(np.zeros(3)) + b"\0",
    saved(np.array([{"a": 1}], object)), saved(np.zeros(2, "c8")), saved(np.zeros(2, "U3")), saved(np.zeros(2, "M8[s]")),
    saved(np.zeros(2, [("a", "<f4")])), saved(np.zeros(3)).replace(b"(3,)", b"(-3,)"),
    saved(np.zeros(3)).replace(b"(3,), ", b"(1e9,)"),
    saved(np.zeros(3)).replace(b"(3,), }  ", b"(99999,)}"), saved(np.zeros(3)).replace(b"'<f8'", b"print"),
    saved(np.zeros(3)).replace(b"\1\0v\0", b"\1\0\xff\xff"), saved(np.zeros(3)).replace(b"\1\0v\0", b"\2\0\xff\xff\xff\xff"),
])  # fmt: skip
def test_what_is_no_array_of_numbers_is_refused(data: Any):
    with pytest.raises(VLAError):
        array_of_npy(data)


@given(st.integers(0, 127), st.binary(min_size=1, max_size=6))
def test_a_damaged_array_is_refused_or_read(at: int, other: bytes):
    data = saved(np.zeros((2, 3), np.float32))
    data = data[:at] + other + data[at + len(other) :]
    with contextlib.suppress(VLAError):
        assert array_of_npy(data).nbytes <= len(data)


# ---------------------------------------------------------------------------------------------------- endpoints


def run(work: Callable[[Answering, Session], Coroutine[Any, Any, None]], tokens: Tokens | None = None) -> None:
    """With a server's inside, without a server: a policy that holds still."""

    async def whole() -> None:
        settings = ServeSettings(deadline=60.0)
        service = Service(Engine(lambda: ThreadBackend.start({"policy": "null:tabletop"})), settings)
        answering, session = Answering(service, tokens or Tokens()), Session(service, "gr00t")
        if not tokens:
            early = from_bytes(await answering.answer(session, to_bytes({"endpoint": "get_modality_config"})))
            assert "the policy is starting" in early["error"]
        await service.engine.start()
        try:
            await work(answering, session)
        finally:
            await service.engine.stop()

    asyncio.run(asyncio.wait_for(whole(), 120))


def test_every_endpoint():
    async def work(answering: Answering, session: Session) -> None:
        async def call(endpoint: str, **rest: Any) -> Any:
            return from_bytes(await answering.answer(session, to_bytes({"endpoint": endpoint, **rest})))

        assert await call("ping") == {"status": "ok", "message": "Server is running"}
        modalities = await call("get_modality_config")
        assert {name: m.modality_keys for name, m in modalities.items()} == {
            "video": ["front"], "state": ["eef", "gripper"], "action": ["eef", "gripper"], "language": ["task"]
        }  # fmt: skip
        assert modalities["action"].delta_indices == list(range(8)) and modalities["video"].delta_indices == [0]
        for options in (None, {}, {"robot": "tabletop"}):
            actions, info = await call("get_action", data={"observation": observation(looked(), "wait", 2), "options": options})
            assert {name: (a.shape, a.dtype) for name, a in actions.items()} == {
                "eef": ((1, 8, 3), np.float32), "gripper": ((1, 8, 1), np.float32)
            }  # fmt: skip
            assert info["execute"] == 8 and info["confidence"] == 1.0 and not info["hold"]
        assert await call("reset", data={"options": None}) == {}
        assert "SIGTERM" in (await call("kill"))["error"]
        assert "'fly'" in (await call("fly"))["error"]

    run(work)


def test_what_does_not_fit_is_told():
    async def work(answering: Answering, session: Session) -> None:
        async def error(data: Any) -> str:
            reply = from_bytes(await answering.answer(session, data if isinstance(data, bytes) else to_bytes(data)))
            assert reply.keys() == {"error"}
            return reply["error"]

        def asked(**changed: Any) -> dict[str, Any]:
            return {"endpoint": "get_action", "data": {"observation": observation(looked(), "wait") | changed}}

        two = np.zeros((2, 1, 64, 64, 3), np.uint8)
        assert "(2, 1, 64, 64, 3)" in await error(asked(video={"front": two}))
        assert "(1, T, h, w, 3)" in await error(asked(video={"front": two[0]}))
        assert "found:    list" in await error(asked(video={"front": [1, 2]}))
        assert "no picture of camera 'front'" in await error(asked(video={}))
        assert "eef (3,), gripper (1,)" in await error(asked(state={"eef": np.zeros((1, 1, 3))}))
        assert "not finite" in await error(asked(state={"eef": np.full((1, 1, 3), np.nan), "gripper": np.zeros((1, 1, 1))}))
        for language in (
            {},
            {"task": "wait"},
            {"task": ["wait"]},
            {"task": [["a"], ["b"]]},
            {"task": [[]]},
            {"a": [["x"]], "b": 1},
        ):
            assert "[[str]]" in await error(asked(language=language))
        assert "None, or {'robot'" in await error(asked() | {"data": {"options": {"speed": 2}}})
        assert "'arm'" in await error(asked() | {"data": {"options": {"robot": "arm"}}})
        assert "video, state, language" in await error({"endpoint": "get_action", "data": None})
        assert "a mapping" in await error({"endpoint": "get_action", "data": [1]})
        assert "not msgpack" in await error(b"\xc1") and "not msgpack" in await error(b"")
        assert "NoneType" in await error(b"\xc0")
        pickled = {"__ndarray_class__": True, "as_npy": saved(np.array([{"a": 1}], object))}
        assert "np.save does not write of numbers" in await error(asked(video={"front": pickled}))

    run(work)


def test_a_token_is_asked_of_every_request(tmp_path: Path):
    (tmp_path / "tokens").write_text(TOKEN)

    async def work(answering: Answering, session: Session) -> None:
        for token in (None, "", 7, TOKEN + "x", TOKEN):
            reply = from_bytes(await answering.answer(session, to_bytes({"endpoint": "ping", "api_token": token})))
            assert ("status" in reply) is (token == TOKEN)

    run(work, Tokens.read(tmp_path / "tokens"))


# ---------------------------------------------------------------------------------------------------- over a socket


@pytest.fixture(scope="module")
def zmq() -> Any:
    return pytest.importorskip("zmq", reason="pyzmq is not installed: pip install 'tendon-vla[gr00t]'")


class Client:
    """Isaac-GR00T's `PolicyClient`, restated from its format; and unlike there a dead server is noticed."""

    def __init__(self, zmq: Any, port: int, kind: str = "REQ", **more: Any) -> None:
        self.context, self.more = zmq.Context(), more
        self.socket = self.context.socket(getattr(zmq, kind))
        self.socket.setsockopt(zmq.RCVTIMEO, 60_000)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"tcp://localhost:{port}")

    def call(self, endpoint: str, **data: Any) -> Any:
        self.socket.send(to_bytes({"endpoint": endpoint, **({"data": data} if data else {}), **self.more}))
        reply = from_bytes(self.socket.recv())
        if isinstance(reply, dict) and "error" in reply:
            raise RuntimeError(f"Server error: {reply['error']}")
        return reply

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def port(zmq: Any, checkout: Path) -> Iterator[int]:
    number = free_port()
    with serving(str(checkout / "models" / "nano-base"), "--robot", "tabletop", "--gr00t", str(number), "--threads", "1",
                 "--deadline", "120"):  # fmt: skip
        yield number


def test_it_drives_the_tabletop(zmq: Any, port: int, checkout: Path):
    """Whole episodes; every chunk is the policy's in this process."""
    policy, sim, compared = load_policy(checkout / "models" / "nano-base", "cpu"), make_sim("tabletop", "touch-red"), 0
    with Client(zmq, port) as client:
        for task, seed in (("push-red-left", 900_001), ("touch-blue", 900_002), ("lift-green", 900_003)):
            seen, _ = sim.reset(seed=seed, options={"task": task})
            client.call("reset", options=None)
            over = False
            while not over:
                action, info = client.call("get_action", observation=observation(seen, sim.instruction, 2), options=None)
                chunk = np.concatenate([action["eef"][0], action["gripper"][0]], axis=1)
                assert np.array_equal(chunk, policy.act(seen, sim.instruction, "tabletop").actions)
                assert info["policy"] == policy.fingerprint and not info["hold"]
                for step in chunk[: info["execute"]]:
                    seen, _, done, late, _ = sim.step(step)
                    compared += 1
                    if over := done or late:
                        break
    assert compared > 40


def test_one_clients_nonsense_is_not_anothers(zmq: Any, port: int):
    with Client(zmq, port) as good, Client(zmq, port) as bad, Client(zmq, port, "DEALER") as odd, socket.socket() as raw:
        raw.connect(("127.0.0.1", port))
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(RuntimeError, match="not msgpack"):
            bad.socket.send(b"\xc1")
            raise RuntimeError(from_bytes(bad.socket.recv())["error"])
        for parts in ([b"one"], [b"", b"", b""], [b"a", b"b", b"c"]):
            odd.socket.send_multipart(parts)
            assert odd.socket.recv_multipart()[0] == b""
        odd.socket.send_multipart(
            [b"", to_bytes({"endpoint": "get_action", "data": {"observation": observation(looked(), "a")}})]
        )
        odd.socket.send_multipart([b"", to_bytes({"endpoint": "ping"})])  # before the answer
        replies = [from_bytes(odd.socket.recv_multipart()[-1]) for _ in range(2)]
        assert sum("one at a time" in str(reply) for reply in replies) == 1
        bad.socket.send(bytes(33 << 20))  # more than a message may have: that connection ends
        assert good.call("ping")["status"] == "ok"
        assert good.call("get_action", observation=observation(looked(), "wait"))[1]["execute"] == 4


def test_a_token_and_a_taken_port(zmq: Any, tmp_path: Path):
    (tmp_path / "tokens").write_text(TOKEN)
    number = free_port()
    with started("null:tabletop", "--gr00t", str(number), "--token-file", str(tmp_path / "tokens"), token=TOKEN):
        with Client(zmq, number) as client, pytest.raises(RuntimeError, match="api_token"):
            client.call("ping")
        with Client(zmq, number, api_token=TOKEN) as client:
            assert client.call("ping")["status"] == "ok"

        async def another() -> None:
            service = Service(Engine(lambda: ThreadBackend.start({"policy": "null:tabletop"})), ServeSettings(gr00t=number))
            async with gr00t.listening(service, Tokens()):
                pass

        with pytest.raises(UsageError, match="a free port"):
            asyncio.run(another())


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "zmq", None)

    async def listen() -> None:
        service = Service(Engine(lambda: ThreadBackend.start({"policy": "null:tabletop"})), ServeSettings(gr00t=0))
        async with gr00t.listening(service, Tokens()):
            pass

    with pytest.raises(MachineError, match=r"tendon-vla\[serve,gr00t\]"):
        asyncio.run(listen())
