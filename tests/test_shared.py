"""Pictures through memory that client, server and model share: as by the socket, and nothing to bend."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Server, started, until

pytest.importorskip("starlette", reason="the extra serve is not installed")

from serve import shared  # noqa: E402
from serve.again import AGAIN  # noqa: E402
from serve.backend import ProcessBackend, ThreadBackend  # noqa: E402
from serve.client import Client  # noqa: E402
from serve.engine import Engine  # noqa: E402
from serve.patience import ROOM  # noqa: E402
from serve.refusal import Refusal  # noqa: E402
from serve.requests import Request  # noqa: E402
from serve.service import Service  # noqa: E402
from serve.settings import ServeSettings  # noqa: E402
from serve.shared import MARK, Attached, Region, Regions, attach, room_for  # noqa: E402
from serve.wire import WireError, encode, pack, unpack  # noqa: E402
from serve.wires.websocket import Conversation  # noqa: E402

pytestmark = pytest.mark.skipif(not shared.AVAILABLE, reason="no anonymous files on this system")
POLICY = Path(__file__).resolve().parents[1] / "models" / "nano-base"
STATE = np.array([0.0, 0.0, 0.4, 0.5], np.float32)
RNG = np.random.default_rng(0)


def frames(n: int, height: int = 64, width: int = 64) -> list[np.ndarray]:
    return list(RNG.integers(0, 256, (n, height, width, 3)).astype(np.uint8))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with started(POLICY, "--deadline", "20", "--threads", "1") as one:
        yield one


def regions_of(server: Server, pid: int | None = None) -> int:
    """Regions that a process (the server itself) has mapped."""
    maps = Path(f"/proc/{pid or server.process.pid}/maps").read_text()
    return len(set(re.findall(r"memfd:tendon-looks-\d+", maps)))


# ---------------------------------------------------------------------------------------------------- one region


def test_what_a_client_puts_is_what_the_server_and_the_model_see():
    region = Region(1 << 20)
    there, model = attach(region.offer()), Regions(os.getpid())
    assert isinstance(there, Attached)
    assert there.holds({"front": np.zeros((region.size - 64, 1, 1), np.uint8)})
    assert not there.holds({"front": np.zeros((region.size - 63, 1, 1), np.uint8)})
    images = {
        "front": frames(1, 48, 80)[0],
        "wrist": frames(1, 31, 17)[0][:, ::-1],
    }
    entries = there.put(images)
    model.named({region.number: (region.file, region.size)}, [])
    for camera, frame in images.items():
        seen = region.picture(entries[camera])
        assert (seen == frame).all() and not seen.flags.writeable
        assert seen.place is not None and seen.place[0] is region and seen.transpose(2, 0, 1).place is None
        assert (model.picture(region.number, seen.place[1], seen.shape) == frame).all()
    used = max(entry["at"] + np.prod(entry["shape"]) for entry in entries.values())
    assert used <= room_for(images) <= used + 64
    region.close()
    region.close()
    assert (seen == images["wrist"]).all() and region.closed  # who reads may go on


def test_nobody_can_shrink_it_or_make_it_grow():
    region = Region(1 << 16)
    theirs = os.open(f"/proc/{os.getpid()}/fd/{region.file}", os.O_RDWR)
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(theirs, size)
    os.close(theirs)
    region.close()


@pytest.mark.parametrize(
    "entry",
    [
        {}, {"at": 64}, {"shape": [8, 8, 3]}, {"at": 64, "shape": [8, 8]}, {"at": 64, "shape": [8, 8, 0]},
        {"at": 0, "shape": [8, 8, 3]}, {"at": 63, "shape": [8, 8, 3]}, {"at": -192, "shape": [8, 8, 3]},
        {"at": (1 << 16) - 191, "shape": [8, 8, 3]}, {"at": 64, "shape": [1 << 14, 1, 3]}, {"at": 64, "shape": [8000, 8000, 3]},
        {"at": 64.0, "shape": [8, 8, 3]}, {"at": True, "shape": [8, 8, 3]}, {"at": 64, "shape": [2**62, 2**62, 3]},
        {"at": 2**70, "shape": [8, 8, 3]}, {"at": "64", "shape": "883"}, None,
    ],
)  # fmt: skip
def test_a_picture_has_to_lie_in_it(entry: Any):
    region = Region(1 << 16)
    with pytest.raises(WireError):
        region.picture(entry)
    region.close()


def test_a_client_opens_nothing_else(tmp_path: Path):
    region = Region(1 << 16)
    offer = region.offer()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    fifo = os.open(pipe, os.O_RDWR)
    other = os.memfd_create("tendon-looks-999999")
    os.ftruncate(other, region.size)
    wrong: list[dict[str, Any]] = [
        {"key": bytes(64)}, {"number": 1 << 40}, {"size": region.size * 2}, {"file": fifo}, {"pid": 1 << 22}, {"file": "../../x"},
        {"file": other, "number": 999_999}, {"size": 0}, {"pid": None},
    ]  # fmt: skip
    assert [change for change in wrong if attach(offer | change) is not None] == []
    assert attach({}) is None and attach(offer) is not None
    for file in (fifo, other):
        os.close(file)
    region.close()
    assert attach(offer) is None


def test_a_region_whose_client_left_before_the_model_looked_is_black_to_it():
    region = Region(1 << 16)
    file, model = region.file, Regions(os.getpid())
    region.close()
    model.named({region.number: (file, region.size)}, [])
    assert not model.picture(region.number, 64, (8, 8, 3)).any()


# ---------------------------------------------------------------------------------------------------- the model's process


def test_what_is_alike_is_said_once_to_the_model_and_answered_as_ever():
    """Looks by turns alike and not: another place, client or seed, a state that is none, two at once, a client that left."""

    async def work() -> None:
        backend = await ProcessBackend.start({"policy": str(POLICY), "threads": 1})
        plain = await ThreadBackend.start({"policy": str(POLICY), "threads": 1})
        sent, heard = list[bytes](), list[bytes]()
        send, hear = backend._line.send, backend._heard
        backend._line.send = lambda data: (sent.append(data), send(data))[1]
        backend._heard = lambda data, done: (heard.append(data or b""), hear(data, done))[1]

        async def ask(where: Any, batch: list[Request]) -> list[Any]:
            said = asyncio.get_running_loop().create_future()
            where.begin(batch, lambda results, seconds: said.set_result(results))
            return await asyncio.wait_for(said, 60)

        regions = [Region(1 << 20) for _ in range(2)]
        writers = [attach(region.offer()) for region in regions]

        def look(client: int = 0, at: int = 0, **other: Any) -> Request:
            """With another picture and state each time; `at`: which of two places it lies in."""
            (frame,), writer = frames(1), writers[client]
            assert writer is not None
            entries = writer.put({"front": frame} if not at else {"other": frame, "front": frame})
            state = RNG.uniform(-0.3, 0.3, 4).astype(np.float32)
            images = {"front": regions[client].picture(entries["front"])}
            return Request(images, state, "touch the red cube", "tabletop", spot=10 * client + at, **other)

        def differ(one: Any, two: Any) -> bool:
            if isinstance(one, Exception):
                return str(one) != str(two)
            return any((a != b).any() or a.dtype != b.dtype for a, b in zip(one, two, strict=True))

        wrong = look()
        wrong.state = np.full(3, 0.5, np.float32)
        seen = set[bytes]()
        place, client, seed = {"at": 1}, {"client": 1}, {"seed": 3}
        turns: list[tuple[Any, bool, bool]] = [  # what is asked; whether as the last look was, and answered as the last was
            ({}, False, False), ({}, True, True), ({}, True, True), (place, False, True), (place, True, True),
            (client, False, True), (client, True, True), ({}, False, True), ({}, True, True), (seed, False, True),
            (seed, True, True), ("wrong", False, False), ({}, True, False), ({}, True, True), ("two", False, False),
            ({}, False, False), ({}, True, True), ("copied", False, True), ({}, False, True), ({}, True, True),
            ("left", False, True), ({}, True, True), *[({}, True, True)] * 4,
        ]  # fmt: skip
        for turn, said_so, heard_so in turns:
            match turn:
                case "wrong":
                    batch = [wrong]
                case "two":
                    batch = [look(), look(1)]
                case "copied":
                    batch = [look()]
                    batch[0].images, batch[0].spot = {"front": frames(1)[0]}, None
                case "left":
                    regions[1].close()
                    batch = [look()]
                case _:
                    assert isinstance(turn, dict)
                    batch = [look(**turn)]
            got, wanted = await ask(backend, batch), await ask(plain, batch)
            assert not any(map(differ, got, wanted)), turn
            assert (sent[-1].startswith(AGAIN), heard[-1].startswith(AGAIN)) == (said_so, heard_so), (len(sent), turn)
            if isinstance(got[0], tuple):
                seen.add(got[0][0].tobytes())
        assert len(seen) > 20, "every look is another, and so is what is answered"
        await backend.stop()
        await plain.stop()

    asyncio.run(work())


# ---------------------------------------------------------------------------------------------------- a real server


def test_answers_are_those_of_the_socket(server: Server):
    with (
        Client(server.address, robot="tabletop", timeout=20) as near,
        Client(server.address, robot="tabletop", timeout=20, shared=False) as plain,
    ):
        for n, size in enumerate((64, 64, 96, 64, 200)):  # a larger picture wants a larger region
            frame = frames(1, size, size)[0]
            looks = [client.act({"images": {"front": frame}, "state": STATE}, "touch the red cube") for client in (near, plain)]
            assert (looks[0].actions == looks[1].actions).all() and (looks[0].confidence == looks[1].confidence).all(), n
            near.reset()
            plain.reset()
        assert isinstance(near._link.shared, Attached) and plain._link.shared is None  # pyright: ignore[reportOptionalMemberAccess]
        file = encode(frame)
        same = [client.act({"images": {"front": picture}, "state": STATE}, "touch the red cube") for client, picture in
                ((near, file), (plain, frame))]  # fmt: skip
        assert (same[0].actions == same[1].actions).all()  # a file goes as a file
        assert regions_of(server) == 1 and regions_of(server, server.model) >= 1
    until(lambda: regions_of(server) == 0, "the server lets go what a client shared")
    with Client(server.address, robot="tabletop", timeout=20) as near:
        near.act({"images": {"front": frame}, "state": STATE}, "touch the red cube")
        assert regions_of(server, server.model) == 1  # and so does the model, at the next batch


def test_the_model_dies_and_sees_the_same_memory_again():
    with started("null:tabletop_wrist") as server, Client(server.address, robot="tabletop_wrist", timeout=20) as client:
        look = {"images": dict(zip(("front", "wrist"), frames(2), strict=True)), "state": STATE}
        client.act(look, "go")
        os.kill(server.model, signal.SIGKILL)
        until(lambda: server.get("/readyz")[0] == 503)
        until(lambda: server.get("/readyz")[0] == 200)
        assert not client.act(look, "go").hold and client.connections == 1
        assert regions_of(server, server.model) == 1


def test_who_may_not_share_sends(tmp_path: Path):
    (tmp_path / "serve.yaml").write_text("message_mib: 1")
    with started("null:tabletop", "--config", tmp_path / "serve.yaml") as server:
        frame = {"images": {"front": frames(1)[0]}, "state": STATE}
        with Client(server.address, robot="tabletop") as client:
            for size, code in ((0, "too_large"), (2 << 20, "too_large")):
                with pytest.raises(Refusal) as refused:
                    client._ask(client._link, {"type": "share", "size": size}, "shared", time.monotonic() + 20)  # pyright: ignore[reportArgumentType]
                assert refused.value.code == code
            link = client._link
            assert link is not None
            bent: Any = {MARK: True, "at": 64, "shape": [64, 64, 3]}
            look = {"type": "look", "state": STATE, "instruction": "go"}

            def refusal(entry: Any) -> Refusal:
                with pytest.raises(Refusal) as refused:
                    client._ask(link, look, "chunk", time.monotonic() + 20, {"front": entry})
                return refused.value

            before = refusal(bent)  # while nothing is shared it lies nowhere
            assert before.code == "bad_request" and "camera 'front'" in str(before)
            assert not client.act(frame, "go").hold
            for wrong in ({"at": 1}, {"shape": np.array([4, 4, 3])}, {"shape": None}, {"shape": 3}, {"at": 64.0}, {"at": None}):
                assert refusal(bent | wrong).code == "bad_request", wrong
            assert client.act(frame, "go").execute == 8 and client.connections == 1
        assert not server.complaints()


def test_what_a_client_shared_before_is_let_go_when_it_shares_anew():
    """Though its pictures were remembered by where they lay; nothing is kept for a client that has left, either."""

    def mapped() -> int:
        return len(set(re.findall(r"memfd:tendon-looks-\d+", Path("/proc/self/maps").read_text())))

    async def work() -> None:
        service = Service(Engine(lambda: ThreadBackend.start({"policy": "null:tabletop"})), ServeSettings())
        await service.engine.start()
        talk, before, room = Conversation(service, near=True), mapped(), ROOM.left
        for size in (1 << 20, 2 << 20, 20_000):
            assert unpack(await talk.answer(pack({"type": "share", "seq": 1, "size": size})))["type"] == "shared"
            assert mapped() == before + 1 and room - ROOM.left >= size
            place = {MARK: True, "at": 64, "shape": [64, 64, 3]}
            for n in range(4):
                said = list[bytes]()
                message = {"type": "look", "seq": n + size, "images": {"front": place}, "state": STATE, "instruction": "go"}
                taken = talk.look(pack(message), said.append)
                while taken and not said:
                    await asyncio.sleep(0.001)
                assert unpack(said[0])["type"] in ("chunk", "refusal")
            assert talk.session._laid[0] is not None
            for more in ({MARK: bytes(1000)}, {"more": bytes(1000)}):
                message["images"], message["seq"], said = {"front": place | more}, message["seq"] + 1, list[bytes]()
                assert talk.look(pack(message), said.append)
                while not said:
                    await asyncio.sleep(0.001)
                assert bytes(1000) not in pack(talk.session._laid[0]), "what a stranger says besides is not kept"
        talk.close()
        await service.engine.stop()
        assert mapped() == before and room == ROOM.left

    asyncio.run(work())


def test_another_computer_gets_no_offer():
    service = Service(Engine(ThreadBackend.start), ServeSettings())  # pyright: ignore[reportArgumentType]
    answer = unpack(asyncio.run(Conversation(service, near=False).answer(pack({"type": "share", "seq": 3, "size": 100}))))
    assert answer["type"] == "refusal" and answer["seq"] == 3 and "another computer" in answer["error"]["found"]
