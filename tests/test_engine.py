"""The engine: what is accepted is answered in time, who cannot be is told at once, and a lost model costs one batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest
import yaml

from serve.backend import ProcessBackend, ThreadBackend
from serve.engine import Engine, EngineOptions
from serve.refusal import Refusal
from serve.requests import Answer, BackendLost, Done, Info, Request
from serve.robot import Robot
from vla.config import CONFIGS
from vla.errors import DataError, MachineError, UsageError, VLAError

ACTIONS = np.zeros((2, 3), np.float32)
ROBOTS = {
    name: Robot.from_json(yaml.safe_load((CONFIGS / "embodiments" / "tabletop.yaml").read_text()) | {"name": name}, name)
    for name in ("arm", "leg")
}


class Fake:
    """A backend that remembers what it was given and answers when it is let."""

    def __init__(self, name: str = "one", seconds: float = 0.0, robots: Sequence[str] = ("arm",)) -> None:
        self.info = Info(name, name, {r: ROBOTS[r] for r in robots}, {}, {r: (2, 2) for r in robots}, (), (), 2, 0.01)  # pyright: ignore
        self.seconds, self.batches, self.alive, self.on_lost = seconds, [], True, lambda: None
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail: Callable[[Request], VLAError | None] = lambda request: None
        self.lose = False

    def begin(self, batch: Sequence[Request], done: Done) -> None:
        self.batches.append([r.instruction for r in batch])
        self.running = asyncio.create_task(self.run(batch, done))

    async def run(self, batch: Sequence[Request], done: Done) -> None:
        try:
            said: Any = await self.answer(batch)
        except BackendLost as lost:
            said = lost, 0.0
        done(*said)

    async def answer(self, batch: Sequence[Request]) -> tuple[list[Any], float]:
        await asyncio.sleep(self.seconds)
        await self.gate.wait()
        if self.lose or not self.alive:
            raise BackendLost("gone")
        return [self.fail(r) or (ACTIONS, ACTIONS, ACTIONS) for r in batch], self.seconds

    async def stop(self) -> None:
        self.alive = False

    def kill(self) -> None:
        self.alive = False
        self.gate.set()


def look(words: str = "a", client: str = "c", within: float | None = None, size: int = 8) -> Request:
    picture = np.zeros((size, size, 3), np.uint8)
    request = Request({"front": picture}, None, words, "arm", client=client)
    if within is not None:
        request.deadline = time.monotonic() + within
    return request


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))


async def engine(*backends: Fake, **options: Any) -> Engine:
    ready = list(backends)

    async def start() -> Fake:
        return ready.pop(0) if len(ready) > 1 else ready[0]

    return await Engine(start, EngineOptions(**{"gather": 0.0, "deadline": 20.0} | options)).start()  # pyright: ignore


def test_requests_that_wait_are_answered_together_and_in_order():
    async def work() -> None:
        fake = Fake()
        served = await engine(fake, batch=4)
        fake.gate.clear()
        asked = [asyncio.create_task(served.act(look("0", "c0")))]
        await asyncio.sleep(0.02)  # it is with the model
        asked += [asyncio.create_task(served.act(look(str(i), f"c{i}"))) for i in range(1, 6)]
        await asyncio.sleep(0.02)
        assert served.waiting == 6
        fake.gate.set()
        answers = await asyncio.gather(*asked)
        assert [a.batch for a in answers] == [1, 4, 4, 4, 4, 1] and fake.batches == [["0"], ["1", "2", "3", "4"], ["5"]]
        assert served.waiting == 0 and all(a.policy == "one" for a in answers)
        await served.stop()

    run(work)


def test_one_bad_look_costs_only_its_sender():
    async def work() -> None:
        fake = Fake()
        fake.fail = lambda r: DataError("observation", found="x", expected="y", fix="z") if r.instruction == "bad" else None
        served = await engine(fake)
        fake.gate.clear()
        asked = [asyncio.create_task(served.act(look(words, words))) for words in ("first", "good", "bad", "fine")]
        await asyncio.sleep(0.02)
        fake.gate.set()
        said = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(s) for s in said] == [Answer, Answer, DataError, Answer]
        await served.stop()

    run(work)


def test_a_full_queue_and_a_deadline_that_cannot_be_kept_are_refused_at_once():
    async def work() -> None:
        fake = Fake()
        served = await engine(fake, queue=2, batch=1)
        fake.gate.clear()
        asked = [asyncio.create_task(served.act(look("0", within=10)))]
        await asyncio.sleep(0.02)  # it is with the model
        asked += [asyncio.create_task(served.act(look(str(i), within=10))) for i in range(1, 3)]
        await asyncio.sleep(0.02)
        with pytest.raises(Refusal) as full:
            await served.act(look("more", within=10))
        assert full.value.code == "busy" and full.value.status == 429 and (full.value.retry_after or 0) > 0
        fake.gate.set()
        await asyncio.gather(*asked)
        fake.gate.clear()
        running = asyncio.create_task(served.act(look("slow", within=10)))
        await asyncio.sleep(0.02)
        served.expected = 5.0
        with pytest.raises(Refusal, match="busy|waiting"):
            await served.act(look("soon", within=0.5))
        fake.gate.set()
        await running
        with pytest.raises(Refusal) as past:
            await served.act(look("past", within=-1))
        assert past.value.code == "late" and served.waiting == 0
        await served.stop()

    run(work)


def test_bytes_that_wait_are_bounded_too():
    async def work() -> None:
        fake = Fake()
        served = await engine(fake, queue_bytes=3 * 8 * 8 * 3)
        fake.gate.clear()
        asked = [asyncio.create_task(served.act(look("first")))]
        await asyncio.sleep(0.02)  # it is with the model
        asked += [asyncio.create_task(served.act(look(str(i)))) for i in range(3)]
        await asyncio.sleep(0.02)
        with pytest.raises(Refusal, match="busy|waiting"):
            await served.act(look("more"))
        fake.gate.set()
        await asyncio.gather(*asked)
        assert served._queue.bytes == 0
        await served.stop()

    run(work)


def test_who_goes_away_frees_the_place():
    async def work() -> None:
        fake = Fake()
        served = await engine(fake, queue=1, batch=1)
        fake.gate.clear()
        first = asyncio.create_task(served.act(look("first")))
        await asyncio.sleep(0.02)
        second = asyncio.create_task(served.act(look("second")))
        await asyncio.sleep(0.02)
        second.cancel()
        await asyncio.wait([second])
        third = asyncio.create_task(served.act(look("third")))
        await asyncio.sleep(0.02)
        first.cancel()  # it is with the model: its answer is thrown away
        fake.gate.set()
        await third
        assert fake.batches == [["first"], ["third"]] and served.waiting == 0
        await served.stop()

    run(work)


def test_a_deadline_that_passes_is_said_while_the_model_goes_on():
    async def work() -> None:
        fake = Fake()
        served = await engine(fake)
        fake.gate.clear()
        with pytest.raises(Refusal) as late:
            await served.act(look(within=0.1))
        assert late.value.code == "late" and late.value.status == 504
        fake.gate.set()
        assert (await served.act(look())).batch == 1
        await served.stop()

    run(work)


def test_a_lost_backend_costs_its_batch_and_those_that_wait_are_served_by_the_next():
    async def work() -> None:
        first, second = Fake("one"), Fake("two")
        served = await engine(first, second, batch=1)
        first.gate.clear()
        asked = [asyncio.create_task(served.act(look(str(i)))) for i in range(3)]
        await asyncio.sleep(0.02)
        first.lose = True
        first.gate.set()
        said = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(said[0], Refusal) and said[0].status == 503 and said[0].retry_after
        assert [s.policy for s in said[1:] if isinstance(s, Answer)] == ["two", "two"]
        assert not first.alive and served.ready
        await served.stop()

    run(work)


def test_a_backend_that_hangs_is_killed_and_one_that_does_not_start_is_tried_again():
    async def work() -> None:
        hung, fresh, tries = Fake("hung"), Fake("fresh"), 0

        async def start() -> Fake:
            nonlocal tries
            tries += 1
            if tries == 2:
                raise UsageError("policy", found="no", expected="yes", fix="again")
            return hung if tries == 1 else fresh

        served = await Engine(start, EngineOptions(hang=0.2, deadline=20.0, gather=0.0)).start()
        hung.gate.clear()
        with pytest.raises(Refusal, match="did not answer for 0.2 s"):
            await served.act(look("x"))
        assert not hung.alive
        for _ in range(400):
            if served.ready:
                break
            await asyncio.sleep(0.01)
        assert (await served.act(look("y"))).policy == "fresh" and tries == 3
        await served.stop()

    run(work)


def test_a_swap_drops_nothing_and_one_that_would_lose_a_robot_is_refused():
    async def work() -> None:
        old, new = Fake("old", seconds=0.01), Fake("new")
        served = await engine(old)
        answers: list[str] = []

        async def client(i: int) -> None:
            for _ in range(20):
                answers.append((await served.act(look("x", f"c{i}"))).policy)

        async def start(fake: Fake) -> Fake:
            await asyncio.sleep(0.05)
            return fake

        clients = [asyncio.create_task(client(i)) for i in range(4)]
        await asyncio.sleep(0.03)
        with pytest.raises(Refusal, match="arm"):
            await served.swap(lambda: start(Fake("other", robots=("leg",))))
        info = await served.swap(lambda: start(new))
        assert info.policy == "new" and not old.alive
        await asyncio.gather(*clients)
        assert len(answers) == 80 and set(answers) == {"old", "new"}
        assert answers == sorted(answers, reverse=True)  # old ones, then new ones
        await served.stop()

    run(work)


def test_draining_refuses_what_is_new_and_finishes_what_was_accepted():
    async def work() -> None:
        fake = Fake()
        served = await engine(fake, batch=1)
        fake.gate.clear()
        asked = [asyncio.create_task(served.act(look(str(i)))) for i in range(3)]
        await asyncio.sleep(0.02)
        drain = asyncio.create_task(served.drain(10))
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="draining"):
            await served.act(look("late"))
        assert not served.ready and not drain.done()
        fake.gate.set()
        assert await drain and all(isinstance(a, Answer) for a in await asyncio.gather(*asked))
        await served.stop()

    run(work)


def test_clients_who_just_asked_are_waited_for_a_moment_and_a_lone_one_is_not():
    async def work() -> None:
        fake = Fake(seconds=0.05)
        served = await engine(fake, gather=0.02)

        async def client(i: int) -> None:
            for _ in range(6):
                await served.act(look("x", f"c{i}"))
                await asyncio.sleep(0.002 * i)  # they come back one after the other

        await asyncio.gather(*(client(i) for i in range(4)))
        assert max(map(len, fake.batches)) == 4 and len(fake.batches) < 12  # 24 looks; one by one they would be 24 batches
        await served.stop()

    run(work)


@pytest.mark.parametrize("kind", [ProcessBackend, ThreadBackend])
def test_a_real_backend_answers_and_says_what_is_wrong(kind: Any):
    async def work() -> None:
        served = await Engine(lambda: kind.start({"policy": "null:tabletop"})).start()
        robot = served.info.robots["tabletop"]
        frame, state = np.zeros((64, 64, 3), np.uint8), np.full(robot.state_dim, 0.5, np.float32)

        def ask(**other: Any) -> Coroutine[Any, Any, Answer]:
            return served.act(
                Request(**({"images": {"front": frame}, "state": state, "instruction": "x", "robot": "tabletop"} | other))
            )

        answers = await asyncio.gather(*(ask() for _ in range(5)))
        assert all(a.actions.shape == (8, 4) and not a.actions.any() for a in answers)
        with pytest.raises(DataError, match="state"):
            await ask(state=state[:2])
        with pytest.raises(UsageError, match="kitchen"):
            await ask(adapter="kitchen")
        big = np.zeros((2400, 3200, 3), np.uint8)  # more than the shared memory was made for
        assert (await ask(images={"front": big})).batch == 1
        await served.stop()
        with pytest.raises(Refusal, match="draining|stopped"):
            await ask()

    run(work)


def test_a_policy_that_is_not_there_is_said_in_its_own_words():
    async def work() -> None:
        with pytest.raises(VLAError) as missing:
            await Engine(lambda: ProcessBackend.start({"policy": "/nowhere/policy"})).start()
        assert "/nowhere/policy" in str(missing.value)

    run(work)


def test_a_process_killed_in_the_middle_of_a_batch():
    async def work() -> None:
        served = await Engine(
            lambda: ProcessBackend.start({"policy": "null:tabletop?ms=400"}), EngineOptions(deadline=30.0)
        ).start()
        backend = served._backend
        assert isinstance(backend, ProcessBackend)
        request = {"images": {"front": np.zeros((64, 64, 3), np.uint8)}, "state": np.full(4, 0.5, np.float32)}
        asked = asyncio.create_task(served.act(Request(**request, instruction="x", robot="tabletop")))
        await asyncio.sleep(0.1)
        backend.kill()
        with pytest.raises(Refusal, match="killed by signal 9") as lost:
            await asked
        assert lost.value.status == 503
        assert (await served.act(Request(**request, instruction="y", robot="tabletop"))).policy == "null"
        await served.stop()

    run(work)


def test_one_slow_batch_does_not_refuse_everybody_for_good():
    async def work() -> None:
        served = await engine(Fake(), deadline=0.5)
        served.expected = 5.0  # the last batch took so long
        assert (await served.act(look())).batch == 1
        assert served.expected < 5.0
        await served.stop()

    run(work)


def test_an_answer_that_makes_no_sense_costs_its_batch_not_the_engine():
    async def work() -> None:
        bad, good = Fake("bad"), Fake("good")

        async def short(batch: Sequence[Request]) -> tuple[list[Any], float]:
            return [], 0.0

        bad.answer = short
        served = await engine(bad, good)
        with pytest.raises(Refusal, match="could not be read"):
            await served.act(look())
        assert (await served.act(look())).policy == "good" and served.ready
        await served.stop()

    run(work)


def test_a_swap_while_nothing_answers_is_what_answers_next():
    async def work() -> None:
        first, brought, tries = Fake("first"), Fake("brought"), 0

        async def start() -> Fake:
            nonlocal tries
            tries += 1
            if tries > 1:
                await asyncio.sleep(60)  # it loads and loads
            return first

        async def other(name: str, robots: Sequence[str] = ("arm",)) -> Fake:
            return brought if name == "brought" else Fake(name, robots=robots)

        served = Engine(start, EngineOptions(gather=0.0, deadline=20.0))
        with pytest.raises(Refusal, match="starting"):
            await served.swap(lambda: other("early"))
        await served.start()
        first.lose = True
        with pytest.raises(Refusal, match="gone"):
            await served.act(look())
        with pytest.raises(Refusal, match="arm"):  # it still knows what it has to serve
            await served.swap(lambda: other("leg", ("leg",)))
        await served.swap(lambda: other("brought"))
        assert (await served.act(look())).policy == "brought" and served.ready
        await served.stop()

    run(work)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


def test_a_request_without_a_deadline_has_the_engines_and_a_long_one_ten_times_that():
    async def work() -> None:
        fake = Fake()
        served = await engine(fake, deadline=0.2)
        fake.gate.clear()
        for request, within in ((look(), "0.2 s"), (look(within=3600.0), "2 s")):
            with pytest.raises(Refusal, match=f"no answer within {within}"):
                await served.act(request)
        fake.gate.set()
        await served.stop()

    run(work)


def test_what_a_conversation_breaks_at_costs_that_batch_and_not_the_engine():
    """A name that is no UTF-8 could not be sent to the model's process, and nobody was answered ever after."""

    async def work() -> None:
        first, second, third = Fake("one"), Fake("two"), Fake("three")
        served = await engine(first, second, third)

        def broken(batch: Sequence[Request], done: Done) -> None:
            raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")

        async def unreadable(batch: Sequence[Request]) -> tuple[list[Any], float]:
            return [None], 0.0

        first.begin, second.answer = broken, unreadable
        for fake in (first, second):
            with pytest.raises(Refusal, match="could not be read") as lost:
                await served.act(look())
            assert lost.value.status == 503 and not fake.alive
        assert (await served.act(look())).policy == "three"
        await served.stop()

    run(work)


def test_a_backend_that_ends_with_nothing_to_do_is_replaced_before_anybody_asks():
    async def work() -> None:
        first, second = Fake("one"), Fake("two")
        served = await engine(first, second)
        await served.act(look())
        first.on_lost()
        assert not served.ready
        await until(lambda: served.ready)
        assert served.info.policy == "two" and not first.alive
        first.on_lost()  # it is nobody's any more
        assert served.ready and (await served.act(look())).policy == "two"
        await served.stop()

    run(work)


def test_a_swap_lets_the_old_one_finish_a_batch_that_nobody_waits_for_and_fails_nobody_who_waits():
    async def work() -> None:
        old, new = Fake("old"), Fake("new")
        served = await engine(old, batch=1)
        old.gate.clear()
        gone = asyncio.create_task(served.act(look("gone")))
        await asyncio.sleep(0.02)
        waits = asyncio.create_task(served.act(look("waits", within=0.5)))  # less than a policy takes to load

        async def start() -> Fake:
            return new

        swap = asyncio.create_task(served.swap(start))
        await asyncio.sleep(0.02)
        gone.cancel()
        await asyncio.sleep(0.02)
        assert old.alive and not swap.done()
        old.gate.set()
        assert (await swap).policy == "new" and (await waits).policy == "new" and not old.alive
        new.lose = True  # and what is started again is the new one
        with pytest.raises(Refusal, match="gone"):
            await served.act(look())
        new.lose, new.alive = False, True
        await until(lambda: served.ready)
        assert (await served.act(look())).policy == "new"
        await served.stop()

    run(work)


def test_stopping_tells_those_who_wait_and_those_who_are_with_the_model():
    async def work() -> None:
        fake = Fake()
        served = await engine(fake, batch=1)
        fake.gate.clear()
        asked = [asyncio.create_task(served.act(look(str(i)))) for i in range(3)]
        await asyncio.sleep(0.02)
        await served.stop(now=True)
        said = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(s, Refusal) and s.status == 503 for s in said) and not fake.alive

    run(work)


def test_who_is_told_badly_is_nobody_elses_trouble_and_who_left_is_not_told():
    async def work() -> None:
        fake, told = Fake(), list[Any]()
        served = await engine(fake, batch=4)
        fake.gate.clear()

        def upset(said: Any) -> None:
            raise RuntimeError("of the one who asked")

        served.submit(look("0", "a"), upset)
        served.submit(look("1", "b"), upset)
        leave = served.submit(look("2", "c"), lambda said: told.append("left"))
        served.submit(look("3", "d"), told.append)
        leave()
        leave()
        fake.gate.set()
        await until(lambda: bool(told))
        assert [type(one) for one in told] == [Answer] and served.waiting == 0 and served.ready
        assert fake.batches == [["0"], ["1", "3"]]
        await served.stop()

    run(work)


def test_each_deadline_is_kept_whatever_order_they_come_in():
    """One timer serves all of them, and the batch that hangs."""

    async def work() -> None:
        fake, late = Fake(), dict[str, float]()
        served = await engine(fake, batch=1, hang=0.5)
        fake.gate.clear()
        served.expected, began = 1e-4, time.monotonic()

        def ask(words: str, within: float) -> None:
            def tell(said: Any) -> None:
                late[f"{words} {said.code}"] = time.monotonic() - began

            served.submit(look(words, words, within), tell)

        for words, within in (("a", 9.0), ("b", 0.3), ("c", 0.1), ("d", 0.2), ("e", 9.0)):
            ask(words, within)
        await until(lambda: len(late) == 5)
        # One was with the model when it hung, the last with the one after it, which is gone at once.
        assert list(late) == ["c late", "d late", "b late", "a unavailable", "e unavailable"]
        assert all(late[name] >= least for name, least in zip(late, (0.1, 0.2, 0.3, 0.5, 0.5), strict=True))
        await served.stop()

    run(work)


def test_a_server_that_stops_in_the_middle_of_a_swap_leaves_neither_policy_behind():
    async def work() -> None:
        old, new = Fake("old"), Fake("new")
        served = await engine(old)
        old.gate.clear()
        asked = asyncio.create_task(served.act(look()))
        await asyncio.sleep(0.02)

        async def start() -> Fake:
            return new

        swap = asyncio.create_task(served.swap(start))
        await until(lambda: served.info.policy == "new")
        await served.stop(now=True)
        with pytest.raises(Refusal, match="stopping"):
            await asked
        await swap
        assert not old.alive and not new.alive

    run(work)


def test_a_thread_whose_policy_wants_to_end_the_program_says_so(monkeypatch: pytest.MonkeyPatch):
    """While it is loaded, and in a batch: neither waits for ever, and the server goes on."""

    def leave(*_: Any) -> Any:
        raise SystemExit("of a library")

    async def work() -> None:
        with monkeypatch.context() as broken:
            broken.setattr("serve.model_process.load", leave)
            with pytest.raises(MachineError, match="SystemExit"):
                await ThreadBackend.start({"policy": "null:tabletop"})
        served = await Engine(lambda: ThreadBackend.start({"policy": "null:tabletop"})).start()
        state = np.array([0.1, 0.1, 0.4, 0.5], np.float32)
        request = Request({"front": np.zeros((64, 64, 3), np.uint8)}, state, "go", "tabletop")
        with monkeypatch.context() as broken:
            broken.setattr("serve.model_process.Actor.answer", leave)
            with pytest.raises(Refusal, match="SystemExit"):
                await served.act(request)
        await until(lambda: served.ready)
        request.deadline = float("inf")
        assert (await served.act(request)).policy == "null"
        await served.stop()

    run(work)


def test_who_asked_long_ago_is_forgotten_while_others_keep_the_model_busy():
    async def work() -> None:
        served = await engine(Fake(seconds=0.01), batch=2)
        asked = [asyncio.create_task(served.act(look(str(i), f"c{i}"))) for i in range(3)]
        served._recent |= {f"left {i}": time.monotonic() - 60 for i in range(1000)}
        for i in range(3, 40):
            asked.append(asyncio.create_task(served.act(look(str(i), f"c{i}"))))
            await asyncio.sleep(0.002)
        await asyncio.gather(*asked)
        assert len(served._recent) <= 40
        await served.stop()

    run(work)
