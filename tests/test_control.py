"""Two speeds: no tick runs on an instruction that has expired, whatever becomes of the planner; it goes on when that is back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chat_server import Chat
from edge_folder import edge_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from misbehaving import PATIENT, look
from serving import started

from serve.audit import AuditLog, check
from serve.control import TwoSpeed, TwoSpeedReport
from serve.guard import Guard
from serve.loop import Clock, Hurried
from serve.planner import Asked, Delayed, Plan, ScriptedPlanner
from serve.progress import Told
from serve.refusal import Refusal
from serve.remote_planner import OpenAIPlanner, ServerPlanner
from serve.robot import Robot as Described
from vla.embodiment import load_embodiment
from vla.errors import DataError, UsageError
from vla.sims import make_sim
from vla.sims.suites import tabletop_instruction
from vla.sims.tabletop_tasks import expert

SCRIPT = ["touch the red cube", "touch the blue cube", "touch the green cube"]
N, E = 8, 4


class Robot:
    """A robot that writes down what it was sent, and a student whose every action says which instruction it obeys."""

    def __init__(self, last: int = 10**9, slow: float = 0.0) -> None:
        self.sent: list[np.ndarray] = []
        self.told: list[str] = []
        """Instructions the student was asked to follow, by look."""
        self.last, self.slow, self.confidence = last, slow, 0.9
        self.known: list[str] = []
        self.held: str | None = None

    def observe(self) -> dict[str, Any]:
        return look(len(self.sent))

    def act(self, *args: Any, **_: Any) -> Any:
        if len(args) == 1:
            self.sent.append(np.array(args[0]))
            return len(self.sent) >= self.last
        time.sleep(self.slow)
        self.told.append(args[1])
        if args[1] not in self.known:
            self.known.append(args[1])
        actions = np.zeros((N, 4), np.float32)
        actions[:, 0] = (1 + self.known.index(args[1])) / 1000
        return SimpleNamespace(actions=actions, confidence=np.full((N, 4), self.confidence, np.float32))

    def steps(self, robot: str) -> tuple[int, int]:
        return N, E

    def obeyed(self, tick: int) -> str:
        """Whose action was sent in a tick; empty for none."""
        said = round(1000 * float(self.sent[tick][0]))
        return self.known[said - 1] if said else ""


class After:
    """An instruction is finished after so many looks at it."""

    def __init__(self, looks: int | dict[str, int]) -> None:
        self.looks, self.seen, self.instruction = looks, 0, ""
        self.stalled: set[int] = set()
        self.begun: list[str] = []

    def begin(self, instruction: str, now: float) -> None:
        self.seen, self.instruction = 0, instruction
        self.begun.append(instruction)

    def saw(self, observation: Any, chunk: Any, now: float) -> Told:
        self.seen += 1
        looks = self.looks if isinstance(self.looks, int) else self.looks.get(self.instruction, 10**9)
        return Told(done=float(self.seen >= looks), stalled=self.seen in self.stalled)


class Planner:
    """Asked by number, answers or raises as it is told."""

    def __init__(self, answer: Callable[[int, Asked], Any]) -> None:
        self.answer, self.asked = answer, list[Asked]()

    def plan(self, asked: Asked) -> Plan:
        self.asked.append(asked)
        said = self.answer(len(self.asked), asked)
        if isinstance(said, Exception):
            raise said
        return said


def guard(**options: Any) -> Guard:
    return Guard(edge_spec(("front",)).model_dump(mode="json"), **{"repeats": None, "max_age": None, **options})


def two(robot: Robot, planner: Any, hz: float = 10, **options: Any) -> TwoSpeed:
    watch = options.pop("guard", None) or guard()
    options = {"asynchronous": False, "clock": Hurried(), **options}
    return TwoSpeed(robot, robot, planner, "touch them all", hz, watch, **options)


def sound(report: TwoSpeedReport, robot: Robot, hz: float = 10) -> list[str]:
    """Why a tick held, or whose instruction it followed; no tick may have followed one that had expired, or another's."""
    out = []
    for tick in report.ticks:
        if tick.hold:
            assert robot.obeyed(tick.number) == ""
        else:
            assert tick.at + 1 / hz <= tick.valid_until + 1e-5 and robot.obeyed(tick.number) == tick.instruction != ""
        out.append(f"({tick.hold.split(':')[0]})" if tick.hold else tick.instruction)
    assert [tick.number for tick in report.ticks] == list(range(len(report.ticks))) and len(report.ticks) == report.loop.ticks
    return out


def runs(names: list[str]) -> list[tuple[str, int]]:
    """Equal neighbours, counted."""
    found: list[tuple[str, int]] = []
    for name in names:
        found = [*found[:-1], (name, found[-1][1] + 1)] if found and found[-1][0] == name else [*found, (name, 1)]
    return found


# --- time counted in steps -------------------------------------------------------------------------------------------


def test_one_instruction_after_the_other_until_all_is_done():
    robot = Robot()
    report = two(robot, ScriptedPlanner(SCRIPT), progress=After(3)).run(400)
    followed = runs(sound(report, robot))
    assert [name for name, _ in followed] == [*SCRIPT, "(waiting)"] and report.done and not report.loop.over
    assert [text for _, text in report.followed] == SCRIPT and report.events["done"] == 3
    # Three looks at each, four ticks apart; what the third saw is known in the next tick.
    assert [count for _, count in followed] == [9, 9, 9, 1]
    assert robot.sent[-1][:3].tolist() == [0, 0, 0] and report.failed == {} and report.late == 0


def test_an_instruction_ends_in_the_tick_in_which_that_is_heard_not_at_the_next_look():
    class Heard(After):
        def begin(self, instruction: str, now: float) -> None:
            super().begin(instruction, now)
            self.since = now

        def heard(self, now: float) -> float:
            return float(now - self.since > 0.65)

    robot = Robot()
    report = two(robot, ScriptedPlanner(SCRIPT), progress=Heard(10**9)).run(400)
    followed = runs(sound(report, robot))
    assert [count for _, count in followed] == [7, 7, 7, 1] and report.done  # looks are four ticks apart


@pytest.mark.parametrize(("ms", "ticks"), [(0, 0), (50, 1), (100, 1), (200, 2), (1000, 10)])
def test_latency_costs_ticks_of_waiting_after_each_instruction(ms: float, ticks: int):
    robot = Robot()
    planner = Delayed(ScriptedPlanner(SCRIPT), ms)
    report = two(robot, planner, progress=After(3)).run(400)
    followed = runs(sound(report, robot))
    wait = [("(waiting)", ticks)] if ticks else []
    assert followed[:-1] == [pair for text in SCRIPT for pair in [*wait, (text, 9)]] and report.done
    assert followed[-1] == ("(waiting)", ticks + 1)
    assert report.thinking[0] == pytest.approx(ms / 1e3) and not report.loop.needs_help


def test_a_planner_that_dies_is_survived_for_as_long_as_its_last_plan_is_valid(tmp_path: Path):
    robot, dead = Robot(), lambda n: 2 <= n <= 6
    planner = Planner(lambda n, asked: OSError("gone") if dead(n) else Plan(SCRIPT[0], valid_for=2.0))
    watch = guard()
    with AuditLog(tmp_path) as log:
        log.watch(watch)
        report = two(robot, planner, guard=watch).run(80)
    # Asked at 0, 1, 2, 3, 4, 5 s; what was said at 0 s is good until 2 s; the next answer comes at 6 s.
    assert runs(sound(report, robot)) == [(SCRIPT[0], 20), ("(expired)", 40), (SCRIPT[0], 20)]
    assert report.failed == {"broken": 5} and report.answered == report.asked - 5 and report.loop.reasons["expired"] == 40
    assert check(tmp_path) == {**check(tmp_path), "differing": 0, "skipped": 0, "unreadable": 0}  # judged again to the byte
    assert not report.loop.needs_help  # nobody's fault that a robot's guard would have to count


def test_a_planner_that_is_five_seconds_late_is_not_believed_where_its_plans_are_good_for_three():
    robot = Robot()
    slow = Delayed(ScriptedPlanner(SCRIPT, valid_for=3.0), 5000)
    report = two(robot, slow).run(120)
    assert runs(sound(report, robot)) == [("(waiting)", 120)] and report.late == report.asked - 1 > 0 and not report.answered
    robot = Robot()
    slow = Delayed(ScriptedPlanner(SCRIPT, valid_for=8.0), 5000)
    report = two(robot, slow).run(120)
    # What it was asked at 0 s comes at 5 s and is good until 8 s; the next is asked at 5 s and comes at 10 s.
    assert runs(sound(report, robot)) == [("(waiting)", 50), (SCRIPT[0], 30), ("(expired)", 20), (SCRIPT[0], 20)]


def test_nonsense_is_never_followed():
    robot = Robot()
    refused = Refusal("bad_answer", found="x", expected="y", fix="z")
    nonsense = [None, Plan(""), {"instruction": SCRIPT[1]}, "push", refused, Plan(SCRIPT[1], valid_for=-1.0)]
    said: dict[int, Any] = {1: Plan(SCRIPT[0], valid_for=1.5), **dict(enumerate(nonsense, 2))}
    report = two(robot, Planner(lambda n, asked: said.get(n, Plan(SCRIPT[2])))).run(90)
    followed = runs(sound(report, robot))
    assert [name for name, _ in followed] == [SCRIPT[0], "(expired)", SCRIPT[2]] and followed[0][1] == 15
    assert report.failed["bad_answer"] == 6 and set(robot.told) == {SCRIPT[0], SCRIPT[2]}


def test_what_was_said_of_the_time_before_is_thrown_away():
    robot = Robot()
    ends = After({SCRIPT[0]: 3})
    inner = Planner(lambda n, asked: Plan(SCRIPT[0] if asked.status in ("new", "running") else SCRIPT[1], valid_for=9.0))
    report = two(robot, Delayed(inner, 300), progress=ends, every=1.0).run(60)
    names = [name for name, _ in runs(sound(report, robot))]
    assert names[:3] == ["(waiting)", SCRIPT[0], "(waiting)"]
    assert names[3] == SCRIPT[1]
    done = next(i for i, asked in enumerate(inner.asked) if asked.status == "done")
    assert inner.asked[done - 1].status == "running" and report.outdated >= 1  # it was out when the instruction ended
    assert inner.asked[done].last == SCRIPT[0]


def test_a_plan_is_renewed_before_it_expires_whatever_the_pace():
    robot = Robot()
    report = two(robot, Planner(lambda n, asked: Plan(SCRIPT[0], valid_for=0.8)), every=5.0).run(100)
    assert runs(sound(report, robot)) == [(SCRIPT[0], 100)] and len(set(robot.told)) == 1


def test_the_memory_of_a_plan_goes_into_the_next_question():
    planner = Planner(lambda n, asked: Plan(SCRIPT[n % 2], memory=f"{asked.memory}{n}"))
    two(Robot(), planner).run(35)
    assert [asked.memory for asked in planner.asked] == ["", "1", "12", "123"]
    assert all(asked.images["front"].shape == (32, 32, 3) and asked.state.shape == (4,) for asked in planner.asked)
    assert [(asked.last, asked.status) for asked in planner.asked][:2] == [("", "new"), (SCRIPT[1], "running")]


def test_the_same_instruction_twice_is_begun_twice():
    robot, progress = Robot(), After(3)
    report = two(robot, ScriptedPlanner([SCRIPT[0], SCRIPT[0]]), progress=progress).run(100)
    assert progress.begun == [SCRIPT[0]] * 2 and report.done and report.events["done"] == 2
    assert runs(sound(report, robot)) == [(SCRIPT[0], 18), ("(waiting)", 1)]


def test_stalls_doubts_and_low_confidence_are_told_at_once():
    robot, progress = Robot(), After(10**9)
    progress.stalled = {4}
    planner = Planner(lambda n, asked: Plan(SCRIPT[0]))
    report = two(robot, planner, progress=progress, every=100.0, execute=1).run(7)
    assert [asked.status for asked in planner.asked] == ["new", "stalled"] and report.events["stalled"] == 1
    assert progress.begun == [SCRIPT[0]] * 2  # what the planner says after a stall is begun anew
    robot, planner = Robot(), Planner(lambda n, asked: Plan(SCRIPT[0]))
    robot.confidence = 0.2
    report = two(robot, planner, unsure=0.3, window=3, every=100.0, execute=1).run(12)
    assert report.events["unsure"] == 3 and planner.asked[1].status == "unsure"
    robot, planner = Robot(), Planner(lambda n, asked: Plan(SCRIPT[0]))
    doubts = two(robot, planner, doubt=lambda seen, chunk: "odd" * (len(robot.told) == 5), every=100.0, execute=1).run(12)
    assert doubts.events == {"unsure": 1} and len(sound(doubts, robot)) == 12


def test_a_person_is_heard_and_the_robot_waits_for_what_is_made_of_it():
    robot = Robot()
    planner = Planner(lambda n, asked: Plan(asked.words or SCRIPT[0]))
    loop = two(robot, Delayed(planner, 200), on_verdict=lambda _: loop.say(SCRIPT[2]) if len(robot.sent) == 9 else None)
    report = loop.run(30)
    followed = runs(sound(report, robot))
    assert followed[:3] == [("(waiting)", 2), (SCRIPT[0], 7), ("(waiting)", 2)] and followed[3][0] == SCRIPT[2]
    assert [asked.words for asked in planner.asked if asked.words] == [SCRIPT[2]] and report.events["words"] == 1


def test_another_goal_forgets_the_one_before():
    robot = Robot()
    planner = Planner(lambda n, asked: Plan(asked.goal, memory="something"))
    loop = two(robot, planner, on_verdict=lambda _: loop.pursue("wave") if len(robot.sent) == 5 else None)
    report = loop.run(12)
    assert runs(sound(report, robot)) == [("touch them all", 5), ("wave", 7)]
    assert (planner.asked[1].goal, planner.asked[1].memory, planner.asked[1].status) == ("wave", "", "new")
    with pytest.raises(DataError):
        loop.pursue(" ")


def test_help_is_told_to_the_planner_and_only_a_person_ends_it():
    robot, planner = Robot(), Planner(lambda n, asked: Plan(SCRIPT[0]))
    whole = robot.observe
    robot.observe = lambda: whole() if not 8 <= len(robot.sent) < 20 else {**whole(), "images": {}}
    loop = two(robot, planner, guard=guard(most_holds=4), on_verdict=lambda _: loop.resume() if len(robot.sent) == 40 else None)
    report = loop.run(60)
    names = runs(sound(report, robot))
    assert report.events["help"] == 1 and "held 4 times" in report.loop.needs_help
    assert "help" in [asked.status for asked in planner.asked] and planner.asked[-1].status == "running"
    assert names[0] == (SCRIPT[0], 8) and names[-1] == (SCRIPT[0], 20)


def test_a_plan_nobody_is_sure_of_is_not_followed():
    robot = Robot()
    report = two(robot, Planner(lambda n, asked: Plan(SCRIPT[n > 2], confidence=0.2 if n <= 2 else 0.8)), least=0.5).run(30)
    assert runs(sound(report, robot)) == [("(waiting)", 20), (SCRIPT[1], 10)] and report.failed == {"doubtful": 2}


Behaviour = st.tuples(st.sampled_from(["plan", "done", "raise", "refuse", "nonsense", "empty"]), st.integers(0, 3000),
                      st.floats(0.05, 4.0))  # fmt: skip


@settings(max_examples=150)
@given(st.lists(Behaviour, min_size=1, max_size=12), st.floats(0.1, 3.0), st.integers(1, 6), st.booleans())
def test_whatever_a_planner_does_no_tick_runs_on_what_has_expired(script: list[Any], every: float, looks: int, last: bool):
    robot = Robot()

    class Wild:
        count = 0

        def plan(self, asked: Asked) -> Any:
            kind, _, valid = script[self.count % len(script)]
            self.count += 1
            match kind:
                case "raise":
                    raise OSError("gone")
                case "refuse":
                    raise Refusal("late", found="x", expected="y", fix="z")
                case "nonsense":
                    return {"instruction": "push"}
                case "empty":
                    return Plan("", valid_for=valid)
                case "done":
                    return Plan("", done=last and self.count > 8, valid_for=valid)
            return Plan(SCRIPT[self.count % 3], valid_for=valid)

    class Drawn(Delayed):
        def seconds(self) -> float:
            return script[self.planner.count % len(script)][1] / 1e3  # pyright: ignore[reportAttributeAccessIssue]

    report = two(robot, Drawn(Wild(), 0), progress=After(looks), every=every).run(60)
    sound(report, robot)
    assert report.asked >= report.answered + report.outdated + sum(report.failed.values())
    assert not report.loop.needs_help


# --- a simulator -----------------------------------------------------------------------------------------------------


def tabletop() -> Described:
    return Described.from_json(load_embodiment("tabletop").model_dump(mode="json"), "tabletop")


class Table:
    """The tabletop, and an expert that follows one instruction at a time in it, a step a look."""

    def __init__(self, goal: str, seed: int) -> None:
        self.sim: Any = make_sim("tabletop-long", goal)
        self.seen, self.info = self.sim.reset(seed=seed)
        self.actions: list[np.ndarray] = []
        self.plan = [tabletop_instruction(task) for task in self.info["plan"]]

    def observe(self) -> Any:
        return self.seen

    def act(self, *args: Any) -> Any:
        if len(args) == 1:
            self.actions.append(np.array(args[0]))
            self.seen, _, over, late, self.info = self.sim.step(args[0])
            return bool(over or late)
        task = "-".join(word for word in args[1].split() if word not in ("the", "cube"))
        hand, cubes = self.sim.places()
        action = expert(task, hand, float(args[0]["state"][3]), np.array(list(cubes.values())))
        return SimpleNamespace(actions=action[None], confidence=np.ones((1, 4), np.float32))

    def steps(self, robot: str) -> tuple[int, int]:
        return 1, 1

    def begin(self, instruction: str, now: float) -> None:
        self.before = len(self.info["done"])

    def saw(self, observation: Any, chunk: Any, now: float) -> Told:
        return Told(done=float(len(self.info["done"]) > self.before))


@pytest.mark.parametrize("goal", ["touch-every", "clear-by-colour"])
def test_a_long_goal_is_reached_whatever_the_latency_and_the_same_twice(goal: str):
    played: dict[int, list[np.ndarray]] = {}
    for ms in (0, 50, 200, 200):
        table: Any = Table(goal, 900_003)
        watch = Guard(tabletop(), repeats=None)
        planner = Delayed(ScriptedPlanner(table.plan), ms)
        loop = TwoSpeed(table, table, planner, table.sim.instruction, 10, watch, progress=table, asynchronous=False,
                        clock=Hurried())  # fmt: skip
        report = loop.run(400)
        assert table.info["success"] and report.loop.over and [text for _, text in report.followed] == table.plan
        assert all(t.hold or t.at + 0.1 <= t.valid_until + 1e-5 for t in report.ticks)
        waited = sum(bool(t.hold) for t in report.ticks)
        assert waited == len(table.plan) * {0: 0, 50: 1, 200: 2}[ms]
        if ms in played:
            np.testing.assert_array_equal(table.actions, played[ms])
        played[ms] = table.actions


def test_a_goal_told_a_planner_that_died_is_not_reached_and_nothing_moves_any_more():
    table: Any = Table("touch-every", 900_003)
    planner = Planner(lambda n, asked: Plan(table.plan[0], valid_for=2.0) if n == 1 else OSError("gone"))
    loop = TwoSpeed(table, table, planner, "touch every cube", 10, Guard(tabletop(), repeats=None), progress=table,
                    asynchronous=False, clock=Hurried())  # fmt: skip
    report = loop.run(60)
    stood = [t.number for t in report.ticks if t.hold]
    assert len(stood) > 40 and stood == list(range(60 - len(stood), 60)) and not table.info["success"]
    assert all((action[:3] == 0).all() for action in table.actions[stood[0] :])


# --- a clock that runs -----------------------------------------------------------------------------------------------

HZ = 20.0


def threaded(robot: Robot, planner: Any, **options: Any) -> TwoSpeed:
    # A machine that does other things as well may wake a loop late; what it holds for then is not what is tested here.
    watch = guard(deadline=60.0, most_holds=10**6, window=10**6)
    return two(robot, planner, HZ, **{"asynchronous": True, "clock": Clock(), "every": 0.2, "guard": watch, **options})


def stages(loop: TwoSpeed, robot: Robot, *steps: tuple[Callable[[TwoSpeedReport], bool], Callable[[], Any]]) -> TwoSpeedReport:
    """Runs until each condition has come true in turn; what belongs to it is done then, by another thread."""
    left, began = list(steps), time.monotonic()

    def watch(_: Any) -> None:
        assert time.monotonic() - began < PATIENT, f"{len(left)} stages left: {loop.report.to_json()}"
        if left and left[0][0](loop.report):
            threading.Thread(target=left.pop(0)[1], daemon=True).start()
        elif not left:
            loop.stop()

    loop._on_verdict = watch
    report = loop.run()
    sound(report, robot, HZ)
    return report


def moved(since: Callable[[], int], ticks: int = 3) -> Callable[[TwoSpeedReport], bool]:
    """Whether the last ticks all followed an instruction, later than tick `since()`."""
    return lambda report: len(report.ticks) - ticks >= since() and not any(t.hold for t in list(report.ticks)[-ticks:])


def expired(report: TwoSpeedReport) -> bool:
    return len(report.ticks) > 3 and all(t.hold.startswith("expired") for t in list(report.ticks)[-3:])


def test_a_real_planner_is_killed_cut_off_delayed_and_talks_nonsense_and_comes_back():
    """Over HTTP, with threads and a clock that runs. Every stage waits for what it caused, nothing is asserted of time."""
    mode, robot = {"says": "plan"}, Robot(slow=0.005)

    def answer(body: Any) -> Any:
        match mode["says"]:
            case "plan":
                return {"instruction": SCRIPT[0], "done": False}
            case "nonsense":
                return "let me think about that"
            case "foreign":
                return {"instruction": "dance", "done": False}
            case "cut":
                return (chat.over.wait(1.5), b"")[1]
            case _:
                return (chat.over.wait(1.0), {"instruction": SCRIPT[1], "done": False})[1]

    with Chat(answer) as chat:
        planner = OpenAIPlanner(chat.address, known=SCRIPT, valid_for=0.6, timeout=5.0)
        loop = threaded(robot, planner)
        at = {"tick": 0}

        def say(what: str) -> Callable[[], None]:
            def change() -> None:
                mode["says"], at["tick"] = what, len(loop.report.ticks)

            return change

        steps: list[Any] = [(moved(lambda: 0), say("nonsense"))]
        for kind in ("foreign", "late", "cut", "plan"):
            back = moved(lambda: at["tick"])
            steps += (
                [(expired, say("plan")), (back, say(kind))] if kind != "plan" else [(expired, say("plan")), (back, say("end"))]
            )
        report = stages(loop, robot, *steps)
    assert set(robot.told) == {SCRIPT[0]} and report.failed["bad_answer"] >= 2 and report.late >= 1
    held = [name for name, _ in runs(["hold" if t.hold.startswith("expired") else "move" for t in report.ticks])]
    assert held.count("hold") >= 4 and not report.loop.needs_help


def test_a_planner_that_never_comes_back_costs_threads_that_are_bounded():
    robot, over = Robot(), threading.Event()
    planner = Planner(lambda n, asked: Plan(SCRIPT[0], valid_for=0.3) if n == 1 else (over.wait(PATIENT), Plan(SCRIPT[1]))[1])
    loop = threaded(robot, planner, patience=0.05, every=0.05)
    before = threading.active_count()
    report = stages(loop, robot, (lambda report: report.late >= 8 and expired(report), lambda: None))
    assert len(planner.asked) == 9 and threading.active_count() - before <= 10 and report.late >= 8
    over.set()
    assert set(robot.told) == {SCRIPT[0]}


def test_a_server_that_stops_for_a_while_and_one_that_is_killed(tmp_path: Path):
    (tmp_path / "script.txt").write_text("\n".join(SCRIPT))
    (tmp_path / "serve.yaml").write_text(f"planner: {{kind: 'scripted:{tmp_path / 'script.txt'}', valid_for: 0.6}}\n")
    robot = Robot()
    with started("null:tabletop", "--config", tmp_path / "serve.yaml") as server:
        loop = threaded(robot, ServerPlanner(server.address, timeout=0.5))
        at = {"tick": 0}

        def send(number: signal.Signals) -> Callable[[], None]:
            def now() -> None:
                os.kill(server.process.pid, number)
                at["tick"] = len(loop.report.ticks)

            return now

        report = stages(
            loop, robot, (moved(lambda: 0), send(signal.SIGSTOP)),
            (lambda report: report.failed["late"] >= 1 and expired(report), send(signal.SIGCONT)),
            (moved(lambda: at["tick"]), send(signal.SIGKILL)), (expired, lambda: None),
        )  # fmt: skip
        server.leave = None
    assert report.failed["late"] >= 1 and report.failed["unavailable"] >= 1 and set(robot.told) == {SCRIPT[0]}


def test_between_50_and_200_ms_of_latency_change_nothing_but_waiting():
    robot = Robot(slow=0.005)
    planner = Delayed(ScriptedPlanner(SCRIPT, valid_for=PATIENT), (50, 200), seed=1)
    report = threaded(robot, planner, progress=After(3)).run(int(PATIENT * HZ))
    names = [name for name, _ in runs(sound(report, robot, HZ)) if name[0] != "("]
    assert names == SCRIPT and report.done and report.failed == {} and not report.loop.needs_help


def test_what_cannot_be_is_refused():
    for wrong in ({"every": 0}, {"patience": 0}, {"window": 0}):
        with pytest.raises(UsageError):
            two(Robot(), ScriptedPlanner(SCRIPT), **wrong)
    with pytest.raises(DataError):
        TwoSpeed(Robot(), Robot(), ScriptedPlanner(SCRIPT), "", 10, guard())


# --- somebody above ----------------------------------------------------------------------------------------------------


def test_who_watches_makes_it_hold_and_it_goes_on_where_the_plan_is_still_good():
    robot, planner = Robot(), Planner(lambda n, asked: Plan(SCRIPT[0], valid_for=4.0))
    told = list[Any]()

    def before() -> None:
        if len(robot.sent) == 10:
            loop.hold("is that right?")
        if len(robot.sent) == 25:
            loop.release()

    loop = two(robot, planner, before=before, on_look=told.append, on_event=told.append)
    report = loop.run(40)
    assert runs(sound(report, robot)) == [(SCRIPT[0], 10), ("(asked)", 15), (SCRIPT[0], 15)]
    assert report.ticks[12].hold == "asked: is that right?" and not report.loop.needs_help
    looks = [look for look in told if not isinstance(look, str)]
    assert not [look for look in looks if 10 <= look.tick < 25] and {look.tick for look in looks} >= {0, 4, 8, 25}
    assert [asked.status for asked in planner.asked] == ["new", "running", "running"], "at 0, 2.5 and 3.5 s: not while it is held"


def test_a_hold_outlasts_what_was_planned_and_no_expired_plan_is_followed_after_it():
    robot = Robot()
    planner = Delayed(Planner(lambda n, asked: Plan(SCRIPT[0], valid_for=2.0)), 300)

    def before() -> None:
        if len(robot.sent) == 12:
            loop.hold("is that right?")
        if len(robot.sent) == 60:
            loop.release()

    loop = two(robot, planner, before=before)
    names = runs(sound(loop.run(80), robot))
    assert names == [("(waiting)", 3), (SCRIPT[0], 9), ("(asked)", 48), ("(expired)", 3), (SCRIPT[0], 17)]


def test_who_commands_goes_through_the_guard_and_needs_no_plan():
    robot, planner = Robot(), Planner(lambda n, asked: Plan(SCRIPT[0], valid_for=1.5))
    given: list[Any] = [np.array([0.5, 0, 0, 1], np.float32), np.array([9, 0, 0, 1], np.float32), None]

    def before() -> None:
        if len(robot.sent) == 10:
            loop.command("person", lambda seen: given[min(2, (len(robot.sent) - 10) // 10)])
        if len(robot.sent) == 35:
            loop.release(anew=False)

    loop = two(robot, planner, before=before, guard=guard(most_holds=100))
    report = loop.run(50)
    driven = [tick for tick in report.ticks if tick.by == "person"]
    assert [tick.number for tick in driven] == list(range(10, 35))
    assert [tick.hold.split(":")[0] for tick in driven] == [""] * 10 + ["limit"] * 10 + ["waiting"] * 5
    assert all(robot.sent[n].tolist() == [0.5, 0, 0, 1] for n in range(10, 20))
    assert all(robot.sent[n][:3].tolist() == [0, 0, 0] for n in range(20, 35)), "what the guard refuses is not sent"
    assert [tick.instruction for tick in report.ticks][35:] == [SCRIPT[0]] * 15 and not any(
        t.hold for t in list(report.ticks)[35:]
    )
    assert report.loop.looks < 20 and planner.asked[-1].status == "running"


def test_a_person_may_drive_before_there_is_any_plan():
    robot = Robot()
    planner = Planner(lambda n, asked: OSError("gone"))
    loop = two(robot, planner, before=lambda: loop.command("person", lambda seen: np.array([0.5, 0, 0, 1], np.float32)))
    report = loop.run(5)
    assert [tick.by for tick in report.ticks] == ["person"] * 5 and not any(tick.hold for tick in report.ticks)
    assert not robot.told and report.loop.looks == 0
