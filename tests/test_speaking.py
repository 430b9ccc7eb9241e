"""Words beside looks: questions wait for looks, looks for one part of a question at most; a model that dies is started again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from speaking_policies import COLOURS, GOAL, NEXT, picture, write_speaking_policy
from test_engine import Fake, engine, look

from serve.backend import ProcessBackend, ThreadBackend
from serve.engine import Engine, EngineOptions
from serve.refusal import Refusal
from serve.requests import Answer, Request, Words
from serve.speaking import PART, EngineSpeaker, LocalSpeaker
from serve.wire import encode
from vla.errors import UsageError, VLAError
from vla.policy import load_policy
from vla.prompt import plan_prompt

CANDIDATES = ["do thing 0", "do thing 1", "do thing 2", "done", *(f"do thing number {n} then" for n in range(2 * PART))]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("speaks")
    write_speaking_policy(root)
    return root / "policy"


class Speaks(Fake):
    """Answers both kinds; `batches` says which."""

    async def answer(self, batch: Sequence[Request]) -> tuple[list[Any], float]:
        if batch[0].words is not None:
            assert len(batch) == 1
            self.batches[-1] = [f"?{batch[0].words.question}"]
        results, seconds = await super().answer(batch)
        if batch[0].words is not None and not isinstance(results[0], VLAError):
            results = [{"ids": [], "likely": 0.0, "ended": True, "text": "", "scores": [0.0] * len(batch[0].words.candidates)}]
        return results, seconds


def question(text: str = "q") -> Request:
    return Request({}, None, "", "arm", client="words", words=Words(text))


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 120))


def test_looks_go_first_and_a_question_goes_in_the_end():
    async def work() -> None:
        fake = Speaks()
        served = await engine(fake, batch=1)
        fake.gate.clear()
        asked = [asyncio.create_task(served.act(look("0", "c0")))]
        await asyncio.sleep(0.02)  # it is with the model
        asked += [asyncio.create_task(served.act(question(str(n)))) for n in range(2)]
        await asyncio.sleep(0.02)
        asked += [asyncio.create_task(served.act(look(str(n), f"c{n}"))) for n in range(1, 7)]
        await asyncio.sleep(0.02)
        assert served.waiting == 9
        fake.gate.set()
        said = await asyncio.gather(*asked)
        assert fake.batches == [["0"], ["1"], ["2"], ["3"], ["4"], ["?0"], ["5"], ["6"], ["?1"]]
        assert [type(s) is Answer for s in said] == [True, False, False, *[True] * 6] and said[1].ended  # pyright: ignore
        assert served.waiting == 0
        assert (await served.act(look("last"))).batch == 1 and fake.batches[-1] == ["last"]
        await served.stop()

    run(work)


def test_questions_are_bounded_and_do_not_make_looks_seem_slow():
    async def work() -> None:
        fake = Speaks(seconds=0.15)
        served = await engine(fake, words=2)
        before = served.expected
        await served.act(question())
        assert served.expected == before and served.speaking >= 0.15
        fake.gate.clear()
        asked = []
        for n in range(3):
            asked.append(asyncio.create_task(served.act(question(str(n)))))
            await asyncio.sleep(0.02)  # the first is with the model
        with pytest.raises(Refusal) as refused:
            await served.act(question("one too many"))
        assert refused.value.code == "busy"
        asked[2].cancel()  # whoever goes away frees its place
        await asyncio.sleep(0.02)
        asked.append(asyncio.create_task(served.act(question("another"))))
        fake.gate.set()
        await asyncio.gather(*asked, return_exceptions=True)
        assert [b for b in fake.batches if b[0][0] == "?"][1:] == [["?0"], ["?1"], ["?another"]]
        await served.stop()

    run(work)


@pytest.mark.parametrize("kind", [ThreadBackend, ProcessBackend])
def test_a_policy_behind_an_engine_says_what_it_says_here(policy: Path, kind: Any):
    local = LocalSpeaker(load_policy(policy, "cpu"))

    async def work() -> None:
        served = await Engine(lambda: kind.start({"policy": str(policy), "device": "cpu"}), EngineOptions(deadline=60.0)).start()
        there = EngineSpeaker(served, asyncio.get_running_loop(), timeout=60.0)
        for colour in COLOURS:
            seen: Any = encode(picture(colour)) if colour == "green" else picture(colour)
            said = await asyncio.to_thread(there.answer, seen, plan_prompt(GOAL))
            assert said[0] == NEXT[colour] and said == pytest.approx(local.answer(picture(colour), plan_prompt(GOAL)), abs=1e-3)
            scores = await asyncio.to_thread(there.score, seen, plan_prompt(GOAL), CANDIDATES)
            np.testing.assert_allclose(scores, local.score(picture(colour), plan_prompt(GOAL), CANDIDATES), atol=1e-3)
            assert CANDIDATES[int(np.argmax(scores))] == NEXT[colour]
        assert len(await asyncio.to_thread(there.score, None, "what is it?", ["a", "b"])) == 2
        observation = {"front": picture("red")}
        chunk = await served.act(Request(observation, np.zeros(4, np.float32), "do thing 0", "tabletop"))
        assert chunk.actions.shape[1] == 4
        if kind is ProcessBackend:
            await dies_while_it_speaks(served, there)
        await served.stop()

    run(work)


async def dies_while_it_speaks(served: Engine, there: EngineSpeaker) -> None:
    backend: Any = served._backend
    os.kill(backend.pid, signal.SIGSTOP)
    asked = asyncio.create_task(asyncio.to_thread(there.answer, picture("red"), plan_prompt(GOAL)))
    await asyncio.sleep(0.2)
    os.kill(backend.pid, signal.SIGKILL)
    with pytest.raises(Refusal) as lost:
        await asked
    assert lost.value.code == "unavailable"
    while not served.ready:
        await asyncio.sleep(0.05)
    assert (await asyncio.to_thread(there.answer, picture("red"), plan_prompt(GOAL)))[0] == NEXT["red"]


def test_a_policy_that_does_not_speak_says_so():
    async def work() -> None:
        served = await Engine(lambda: ThreadBackend.start({"policy": "null:tabletop"})).start()
        there = EngineSpeaker(served, asyncio.get_running_loop())
        with pytest.raises(UsageError, match="no words"):
            await asyncio.to_thread(there.answer, None, "what is it?")
        await served.stop()

    run(work)
