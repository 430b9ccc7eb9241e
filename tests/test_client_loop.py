"""A control loop whose policy is a server: what is played, what the server is told, and when the robot holds still."""

from __future__ import annotations

import logging
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edge_folder import edge_spec
from misbehaving import PATIENT, E, Line, N, Peer, chunk, client, look

from serve.client import Client
from serve.guard import Guard
from serve.loop import ControlLoop, Hurried
from serve.refusal import Refusal


class World:
    """A robot that writes down what it was sent, and whose state says how often it was."""

    def __init__(self, last: int) -> None:
        self.sent: list[np.ndarray] = []
        self.last = last

    def observe(self) -> dict[str, Any]:
        return {**look(len(self.sent)), "state": np.array([0, 0, 0, len(self.sent) / 1000], np.float32), "time": time.monotonic()}

    def act(self, action: np.ndarray) -> bool:
        self.sent.append(action)
        return len(self.sent) >= self.last

    def told(self) -> list[int]:
        return [round(1000 * float(action[0])) for action in self.sent]


def by_tick(line: Line, message: dict[str, Any]) -> None:
    """What is said for step s of a look taken at tick t is t + s."""
    line.say(chunk(message, first=round(1000 * float(message["state"][3]))))


def loop_of(robot: Client, world: World, **options: Any) -> ControlLoop:
    guard = Guard(edge_spec(("front",)).model_dump(mode="json"), **options.pop("guard", {}))
    return ControlLoop(robot, world, 10, guard, **{"clock": Hurried(), **options})


def test_a_loop_plays_what_a_server_says_and_tells_it_what_became_of_it():
    world = World(21)
    with Peer(by_tick) as peer, client(peer) as robot:
        report = loop_of(robot, world).run("go")
        assert world.told() == list(range(21)) and report.holds == 0 and report.over
        looks = peer.looks()
        assert [message["executed"] for message in looks] == [None, *[E] * (len(looks) - 1)] and len(looks) == 6
        assert all(0 < message["age"] < PATIENT and 0 < message["deadline"] < PATIENT for message in looks)
        assert [message["type"] for message in peer.heard[:3]] == ["hello", "reset", "look"]
        assert {message["robot"] for message in looks} == {"tabletop"}


@pytest.mark.parametrize("ensemble", [None, 0.01])
def test_a_server_of_150_ms_costs_steps_and_no_tick_at_10_hz(ensemble: float | None):
    """Nothing is asserted of time: an action says which tick it is meant for, and it is sent in that one."""
    world = World(40)

    def slow(line: Line, message: dict[str, Any]) -> None:
        peer.sleep(0.15)
        by_tick(line, message)

    with Peer(slow) as peer, client(peer) as robot:
        report = loop_of(robot, world, asynchronous=True, ensemble=ensemble, clock=None).run("go")
        assert report.ticks == 40 and report.reasons.keys() <= {"deadline", "no action"} and report.looks >= 5
        moved = [(at, said) for at, said in enumerate(world.told()) if np.any(world.sent[at])]
        # A tick that was missed, as on a machine that does something else, shifts what comes after it, and nothing else does.
        assert all(0 <= said - at <= report.missed for at, said in moved)
        if not report.holds and not report.missed:
            assert world.told() == list(range(40))
        looks = peer.looks()
        asked = [round(1000 * float(message["state"][3])) for message in looks]
        assert asked == sorted(asked) and len(looks) < 20
        if ensemble is None and not report.holds and not report.missed:
            # The chunk before was played on meanwhile, so what was carried out of it reaches up to the tick of the look; who
            # answers after four ticks is asked again before any of it was played.
            wanted = [now - before for before, now in zip(asked[:-1], asked[1:], strict=True)]
            told = [message["executed"] for message in looks[1:]]
            assert all(said in (None, steps) for said, steps in zip(told, wanted, strict=True)) and told[0] == wanted[0] == E
        if ensemble is not None:
            assert all(message["executed"] is None for message in looks)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_hold_of_the_server_stops_the_robot_until_it_is_over(asynchronous: bool):
    world = World(30)

    def answer(line: Line, message: dict[str, Any]) -> None:
        if line.looks in (3, 4):
            line.say(
                chunk(message, first=900, hold=True, reason="jump: 'eef'; waiting", needs_help="look at me" * (line.looks == 4))
            )
        else:
            by_tick(line, message)

    with Peer(answer) as peer, client(peer) as robot:
        verdicts: list[Any] = []
        loop = loop_of(robot, world, asynchronous=asynchronous, on_verdict=verdicts.append)
        if asynchronous:  # ticks wait for the answer, so that they can be counted
            act = world.act
            world.act = lambda action: (act(action), loop._pending and loop._pending[0].exception(PATIENT))[0]  # pyright: ignore
        report = loop.run("go")
    held = [verdict for verdict in verdicts if verdict.hold]
    assert held and report.holds == len(held) and report.needs_help == "look at me"
    assert all("server: jump: 'eef', waiting" in verdict.reason for verdict in held) and report.reasons["server"] == len(held)
    assert {verdict.needs_help for verdict in held} == {"", "look at me"} and not verdicts[-1].needs_help
    assert all(said == (0 if verdict.hold else at) for at, (said, verdict) in enumerate(zip(world.told(), verdicts, strict=True)))
    assert len(held) == 2  # it is asked again in the very next tick


def test_between_two_answers_it_is_still_the_server_that_holds():
    world, go, verdicts = World(20), threading.Event(), []

    def answer(line: Line, message: dict[str, Any]) -> None:
        if line.looks == 2:
            line.say(chunk(message, hold=True, reason="wait"))
            return
        if line.looks == 3:
            go.wait(PATIENT)
        by_tick(line, message)

    with Peer(answer) as peer, client(peer) as robot:
        loop, act = loop_of(robot, world, asynchronous=True, on_verdict=verdicts.append), world.act

        def counted(action: np.ndarray) -> bool:
            over = act(action)
            if len(world.sent) >= 12:
                go.set()
            if len(world.sent) < 6 or len(world.sent) >= 12:
                assert loop._pending is None or not loop._pending[0].exception(PATIENT)
            return over

        world.act = counted
        report = loop.run("go")
    assert [at for at, verdict in enumerate(verdicts) if "server: wait" in verdict.reason] == list(
        range(5, 12)
    ) and report.holds == 7
    assert world.told() == [0 if 5 <= at < 12 else at for at in range(20)] and not report.needs_help


def test_a_refusal_may_ask_for_help():
    said = Refusal("needs_help", found="somebody is in the way", expected="nobody", fix="look")

    def answer(line: Line, message: dict[str, Any]) -> None:
        line.say({"type": "refusal", "seq": message["seq"], **said.to_json()} if line.looks == 2 else chunk(message))

    with Peer(answer) as peer, client(peer) as robot:
        report = loop_of(robot, World(10)).run("go")
    assert report.needs_help == "somebody is in the way" and report.holds == 1 and report.reasons["policy"] == 1


def test_a_server_that_is_lost_makes_the_robot_hold_with_the_reason_and_one_that_is_back_move():
    world = World(24)

    def answer(line: Line, message: dict[str, Any]) -> None:
        if line.number == 1 and line.looks == 3:
            line.plain.close()
        else:
            by_tick(line, message)

    with Peer(answer) as peer, client(peer) as robot:
        report = loop_of(robot, world).run("go")
    assert report.holds == 1 and report.reasons["policy"] == 1 and robot.connections == 2
    assert world.told() == [at if at != 8 else 0 for at in range(24)]


def test_a_loop_says_help_is_needed_when_the_server_that_asked_for_it_is_gone(caplog: pytest.LogCaptureFixture):
    def answer(line: Line, message: dict[str, Any]) -> None:
        if line.number == 1 and line.looks == 1:
            line.say(chunk(message, hold=True, reason="no", needs_help="ask"))
            line.plain.close()
        else:
            line.say(chunk(message))

    caplog.set_level(logging.ERROR)
    world = World(10)
    with Peer(answer) as peer, client(peer) as robot:
        report = loop_of(robot, world).run("go")
        assert report.needs_help == "ask" and report.holds == 10 and len(peer.looks()) == 1


def test_a_policy_may_be_anything_with_a_chunk():
    """A loop's policy that is no server needs neither `reset` nor `hold`."""
    world = World(5)
    plain: Any = SimpleNamespace(act=lambda *_: SimpleNamespace(actions=np.zeros((N, 4), np.float32), confidence=np.ones((N, 4))),
                            steps=lambda robot: (N, E))  # fmt: skip
    report = ControlLoop(plain, world, 10, Guard(edge_spec(("front",)).model_dump(mode="json")), clock=Hurried()).run("go")
    assert report.holds == 0 and report.ticks == 5
