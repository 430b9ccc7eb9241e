"""Chunks become one action a tick, on a grid that does not drift; a slow policy costs steps, never order."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edge_folder import edge_spec, look
from hypothesis import given
from hypothesis import strategies as st

from serve.guard import Guard
from serve.loop import Clock, ControlLoop, Hurried, Order, Player
from vla.ensemble import Ensemble
from vla.errors import DataError, UsageError

N, E = 8, 3


def chunk(at: int, n: int = N) -> Any:
    """A chunk said at tick `at`: step s of it says (at + s) / 1000 in dx and at / 1000 in dy."""
    steps = np.stack([np.arange(at, at + n), np.full(n, at), np.zeros(n), np.zeros(n)], 1).astype(np.float32) / 1000
    return SimpleNamespace(actions=steps, confidence=np.full((n, 4), 0.5, np.float32))


def told(action: np.ndarray) -> tuple[int, int]:
    """(tick meant, tick said) of an action."""
    return round(float(action[0]) * 1000), round(float(action[1]) * 1000)


class World:
    """A robot that counts its ticks and writes down what it was sent, and a policy that answers by them."""

    def __init__(self, last: int = 10**9, slow: float = 0.0) -> None:
        self.sent: list[np.ndarray] = []
        self.asked: list[int] = []
        self.last, self.slow, self.looks = last, slow, 0
        self.fail: Any = lambda n: None
        self.ticks: dict[bytes, int] = {}  # state -> tick it was seen at

    def observe(self) -> dict[str, Any]:
        self.looks += 1
        seen = look(self.looks)
        self.ticks.setdefault(seen["state"].tobytes(), len(self.sent))
        return seen

    def act(self, *args: Any, **kw: Any) -> Any:
        if len(args) == 1:
            self.sent.append(np.array(args[0]))
            return len(self.sent) >= self.last
        observation = args[0]
        self.asked.append(self.looks)
        self.fail(self.looks)
        time.sleep(self.slow)
        return chunk(self.ticks[observation["state"].tobytes()])

    def steps(self, robot: str) -> tuple[int, int]:
        return N, E


def make(world: World, hz: float = 10, clock: Clock | None = None, guard: dict | None = None, **kw: Any) -> ControlLoop:
    watch = Guard(edge_spec().model_dump(mode="json"), **(guard or {}))
    return ControlLoop(world, world, hz, watch, clock=clock or Hurried(), **kw)


# --- the player ------------------------------------------------------------------------------------------------------


@given(st.integers(1, N), st.integers(1, 40))
def test_it_looks_every_few_ticks_and_plays_what_was_said_of_now(execute, ticks):
    player, played = Player(execute), []
    for t in range(ticks):
        if player.due:
            player.said(chunk(t), t)
        action, confidence = player.next()
        assert action is not None and confidence is not None
        played.append(told(action))
    assert played == [(t, t - t % execute) for t in range(ticks)]


@given(st.integers(1, N - 1), st.lists(st.integers(0, 12), min_size=1, max_size=20))
def test_a_late_chunk_is_played_from_now_and_a_tick_nobody_spoke_of_is_empty(execute, delays):
    player, pending, asked, delays = Player(execute), None, [], list(delays)
    for t in range(60):
        if pending and pending[1] <= t:
            player.said(chunk(pending[0]), pending[0])
            pending = None
        if pending is None and player.due:
            player.looking()
            asked.append(t)
            pending = t, t + (delays.pop() if delays else 0)
            if pending[1] == t:
                player.said(chunk(t), t)
                pending = None
        action, _ = player.next()
        newest = max((a for a in asked if pending is None or a != pending[0]), default=None)
        if newest is None or t - newest >= N:
            assert action is None
        else:
            assert action is not None and told(action) == (t, newest)


@given(st.integers(1, N - 1), st.sampled_from([0.01, 0.0, -0.5]))
def test_with_an_ensemble_it_is_the_evaluations_own(execute, decay):
    player, ensemble, played, wanted = Player(execute, Ensemble(decay)), Ensemble(decay), [], []
    rng = np.random.default_rng(0)
    for t in range(0, 24, execute):
        said = SimpleNamespace(actions=rng.normal(size=(N, 2)).astype(np.float32), confidence=np.zeros((N, 2)))
        wanted += list(ensemble(t, said.actions, execute))
        assert player.due
        player.said(said, t)
        played += [player.next()[0] for _ in range(execute)]
    np.testing.assert_array_equal(played, wanted)


# --- the loop --------------------------------------------------------------------------------------------------------


def test_actions_in_order_one_look_every_few_and_the_robot_says_when():
    world = World(last=20)
    report = make(world).run("go")
    assert [told(a) for a in world.sent] == [(t, t - t % E) for t in range(20)]
    assert report.over and report.ticks == 20 and report.holds == report.missed == 0 and report.looks == 7
    assert report.to_json()["confidence"] == 0.5 and report.to_json()["late_ms"]["max"] == 0


def test_it_ends_after_its_steps_standing_still():
    world = World()
    report = make(world).run("go", steps=5)
    assert report.ticks == 5 and len(world.sent) == 6
    assert world.sent[-1][:3].tolist() == [0, 0, 0] and not report.over


def test_a_fault_of_the_first_look_is_raised_and_a_later_one_holds():
    def fail(n: int) -> None:
        if n in faulty:
            raise DataError("camera", found="a torn frame", expected="a whole one", fix="check the cable")

    world, faulty = World(last=12), {1}
    world.fail = fail
    with pytest.raises(DataError):
        make(world).run("go")
    assert not world.sent
    world, faulty = World(last=12), {2}
    world.fail = fail
    report = make(world).run("go")
    assert report.holds == 1 and report.reasons == {"policy": 1} and report.ticks == 12
    assert [told(a) for a in world.sent[:6]] == [(0, 0), (1, 0), (2, 0), (0, 0), (4, 4), (5, 4)]


def test_a_broken_camera_is_never_shown_to_the_policy_and_help_is_asked_for():
    world = World(last=40)
    whole = world.observe
    world.observe = lambda: whole() if world.looks < 2 else {**whole(), "images": {}}
    loop = make(world, guard={"most_holds": 4})
    loop.on_verdict = lambda verdict: loop.stop() if verdict.needs_help else None
    report = loop.run("go")
    assert len(world.asked) == 2 and report.reasons == {"observation": 4}
    assert "held 4 times" in report.needs_help and report.ticks == 10


def test_an_error_of_the_driver_ends_it_with_the_robot_told_to_stand_still():
    world, calls = World(), []

    def act(action):
        calls.append(action)
        if len(calls) == 3:
            raise OSError("bus")

    loop = make(world)
    loop.io = SimpleNamespace(observe=world.observe, act=act)
    with pytest.raises(OSError, match="bus"):
        loop.run("go")
    assert len(calls) == 4 and calls[-1][:3].tolist() == [0, 0, 0]


class Steps(Clock):
    """A clock that only moves when somebody waits or works."""

    def __init__(self, cost: dict[int, float]) -> None:
        self.time, self.cost, self.waits = 100.0, cost, []

    def now(self) -> float:
        return self.time

    def wait_until(self, due: float, stop: threading.Event) -> None:
        self.waits.append(due)
        self.time = max(self.time, due)


def test_a_tick_that_takes_too_long_costs_ticks_and_the_grid_stays():
    world, clock = World(last=8), Steps({})
    plain = world.act

    def act(action):
        clock.time += 0.37 if len(world.sent) == 2 else 0.01
        return plain(action)

    loop = make(world, clock=clock)
    loop.io = SimpleNamespace(observe=world.observe, act=act)
    report = loop.run("go")
    np.testing.assert_allclose(np.array(clock.waits) - 100, [0, 0.1, 0.2, 0.5, 0.6, 0.7, 0.8, 0.9], atol=1e-9)
    assert report.missed == 2 and [told(a)[0] for a in world.sent] == list(range(8))  # the robot stood still: nothing is skipped


def test_an_action_too_late_is_not_sent():
    world, clock = World(last=6), Steps({})
    plain = world.act

    def slow(*args, **kw):
        clock.time += 0.15 if len(world.asked) == 1 else 0.01
        return plain(*args, **kw)

    loop = make(world, clock=clock)
    loop.policy = SimpleNamespace(act=slow)
    report = loop.run("go")
    assert report.reasons == {"deadline": 1} and report.holds == 1


@pytest.mark.parametrize("late", [1, 2, 4])
def test_asynchronously_the_steps_that_passed_are_skipped(late: int):
    world, gate = World(last=24), threading.Event()
    plain = world.act
    gate.set()

    def act(*args, **kw):
        if len(args) > 1:  # the policy, in its own thread but for the first look
            assert gate.wait(30)
            return plain(*args)
        over = plain(*args)
        if loop._pending is not None and len(world.sent) - loop._pending[1] >= late:
            gate.set()
            loop._pending[0].result()
        gate.clear()
        return over

    loop = make(world, asynchronous=True)
    loop.policy, loop.io = SimpleNamespace(act=act), SimpleNamespace(act=act, observe=world.observe)
    report = loop.run("go")
    meant = [told(a) for a in world.sent]
    assert report.ticks == 24 and report.holds == 0
    assert [now for now, _ in meant] == list(range(24))
    # Asked every three ticks, or as soon as the chunk before has come; answered `late` ticks later.
    every = max(E, late)
    assert [said for _, said in meant] == [0 if t < 3 + late else t - late - (t - late - 3) % every for t in range(24)]


def test_stop_is_prompt_and_leaves_no_thread():
    world = World()
    loop = make(world, hz=0.5, clock=Clock(), asynchronous=True)
    threading.Timer(0.2, loop.stop).start()
    began, before = time.monotonic(), threading.active_count()
    report = loop.run("go")
    assert time.monotonic() - began < 1.9 and report.ticks == 1  # the next tick would have been after two seconds
    assert threading.active_count() <= before


def test_what_cannot_be_is_refused(caplog: pytest.LogCaptureFixture):
    world = World()
    with pytest.raises(UsageError, match=r"1\.\.8"):
        make(world, execute=9)
    with pytest.raises(UsageError, match="chunks that overlap"):
        make(world, execute=8, ensemble=0.01)
    with pytest.raises(UsageError, match="finite"):
        make(world, ensemble=float("nan"))
    make(world, hz=30)
    assert "a loop of 30 Hz plays chunks meant for 10 Hz" in caplog.text


# --- orders from above -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_nothing_said_of_another_instruction_or_before_a_pause_is_played(asynchronous: bool):
    """Every chunk says which instruction it was asked under, in its third dimension."""
    script = [*["a"] * 5, *[("a", "expired: x")] * 3, *["a"] * 6, *["b"] * 7, *[("b", "waiting: y")] * 30, *["b"] * 4]
    world, told, verdicts = World(last=len(script)), [], []

    def orders() -> Order:
        now = script[min(len(world.sent), len(script) - 1)]
        return Order(now) if isinstance(now, str) else Order(*now)

    def act(*args: Any, **kw: Any) -> Any:
        if len(args) == 1:
            over = world.act(*args)
            if loop._pending is not None:
                loop._pending[0].exception(30)
            return over
        told.append(args[1])
        chunk = world.act(*args, **kw)
        chunk.actions[:, 2] = {"a": 1, "b": 2}[args[1]] / 1000
        return chunk

    loop = make(world, asynchronous=asynchronous, orders=orders, on_verdict=verdicts.append)
    loop.policy, loop.io = SimpleNamespace(act=act), SimpleNamespace(act=act, observe=world.observe)
    report = loop.run("nobody's")
    obeyed = ["" if not a.any() else "ab"[round(1000 * float(a[2])) - 1] for a in world.sent]
    for at, (order, instruction) in enumerate(zip(script, obeyed, strict=True)):
        if isinstance(order, str):
            assert instruction == order or (asynchronous and not instruction and verdicts[at].reason == "no action")
        else:
            assert not instruction and verdicts[at].reason == order[1]
    assert set(told) == {"a", "b"} and report.ticks == len(script) and not report.needs_help
    assert report.reasons["expired"] == 3 and report.reasons["waiting"] == 30  # more than a guard forgives, were they faults


def test_a_pause_does_not_hide_a_fault():
    world, watch = World(), Guard(edge_spec().model_dump(mode="json"), most_holds=3)
    watch.saw(world.observe())
    for late in (0.0, 9.0, 9.0, 9.0):
        watch.deadline = 1.0
        verdict = watch.judge(None, why="expired: x", late=late)
        assert verdict.hold and verdict.reason.startswith("expired: x") and ("deadline" in verdict.reason) == (late > 0)
    assert watch.needs_help and "no action" not in verdict.reason
