"""Who plans on a server: the settings' planner, asked by any number of robots, in threads of its own.

The policy's words go through the engine like any other question (`serve/speaking.py`): a plan never makes a look wait for longer
than one short batch, and everything a look survives (a crash, a hang, a swap) a plan survives too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from serve.planner import Asked, Plan, Planner, PolicyPlanner, ScriptedPlanner
from serve.refusal import Refusal
from serve.remote_planner import OpenAIPlanner
from serve.service import Service
from serve.settings import PlannerSettings
from serve.speaking import EngineSpeaker
from serve.wire import Picture

T = TypeVar("T")
_THREADS = 4
_WAITING = 16
"""Questions that may wait beside those that are thought about."""


class Planning:
    """Of one server. Everything but the constructor belongs to its loop."""

    def __init__(self, service: Service) -> None:
        """Raises `UsageError` for a script or an address that is none."""
        self._service, self._settings = service, service.settings.planner
        self._threads = ThreadPoolExecutor(_THREADS, "planner")
        self._asked = 0
        self._planner: Planner | None = None
        if self._settings is not None and self._settings.kind != "policy":
            self._planner = planner_of(self._settings, self._known)

    @property
    def kind(self) -> str:
        """`policy`, `scripted` or `openai`; empty where nobody plans."""
        return "" if self._settings is None else self._settings.kind.partition(":")[0]

    def _known(self) -> tuple[str, ...]:
        settings = self._settings
        assert settings is not None
        return settings.instructions or (self._service.engine.info.instructions if settings.known_only else ())

    def speaker(self, timeout: float) -> EngineSpeaker:
        """The policy that is served."""
        return EngineSpeaker(self._service.engine, asyncio.get_running_loop(), timeout=timeout,
                             adapter=self._service.settings.adapter)  # fmt: skip

    async def plan(self, asked: Asked) -> tuple[Plan, float]:
        """(the plan, seconds it took). Raises `VLAError`."""
        settings = self._settings
        if settings is None:
            raise Refusal("not_found", where="planner", found="a server nobody plans on", expected="a planner",
                          fix="vla serve ... --planner policy, scripted:FILE or openai:URL")  # fmt: skip
        planner = self._planner
        if planner is None:
            planner = PolicyPlanner(self.speaker(settings.timeout), self._known, valid_for=settings.valid_for,
                                    camera=settings.camera)  # fmt: skip
        return await self.in_thread(lambda: planner.plan(asked))

    async def ask(self, picture: Picture | None, question: str, candidates: tuple[str, ...]) -> dict[str, Any]:
        """{scores} of candidates, or {answer, likely}, and {policy, ms}."""
        speaker, policy = self.speaker(self._settings.timeout if self._settings else 10.0), self._service.engine.info.policy
        if candidates:
            scores, seconds = await self.in_thread(lambda: speaker.score(picture, question, candidates))
            said = {"scores": scores, "answer": None, "likely": None}
        else:
            (answer, likely), seconds = await self.in_thread(lambda: speaker.answer(picture, question))
            said = {"scores": [], "answer": answer, "likely": likely}
        return {**said, "policy": policy, "ms": round(1e3 * seconds, 3)}

    async def in_thread(self, work: Callable[[], T]) -> tuple[T, float]:
        """What `work()` comes to in one of the threads, and how long it took with its waiting."""
        if self._asked >= _THREADS + _WAITING:
            raise Refusal("busy", where="planner", found=f"{self._asked} questions", expected="fewer at a time",
                          fix="ask again later", retry_after=1.0)  # fmt: skip
        self._asked += 1
        began = time.perf_counter()
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        future.add_done_callback(self._over)
        return await asyncio.shield(future), time.perf_counter() - began

    def _over(self, future: asyncio.Future[Any]) -> None:
        self._asked -= 1
        if not future.cancelled():
            future.exception()  # whoever asked may be gone: nobody else will look


def planner_of(settings: PlannerSettings, known: Callable[[], tuple[str, ...]]) -> Planner:
    """The planner of settings that are not the policy's own. Raises `UsageError`."""
    kind, _, where = settings.kind.partition(":")
    if kind == "scripted":
        return ScriptedPlanner.load(where, settings.valid_for)
    return OpenAIPlanner(where, settings.model, settings.key_file, timeout=settings.timeout, valid_for=settings.valid_for,
                         known=known, form=settings.form, picture=settings.picture)  # fmt: skip
