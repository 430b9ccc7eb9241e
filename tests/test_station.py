"""The operator's station: what opens a question, that nothing moves while it is open, what each answer does. Real simulator."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edge_folder import edge_spec
from handoffs import calibrated
from serving import until

from data_tools.check import check_all
from serve.answering import Drill, Led
from serve.board import EVENTS, TICKS, Board
from serve.edge_sim import Settings, make_guard
from serve.guard import Guard
from serve.planner import Asked, Plan, ScriptedPlanner
from serve.refusal import Refusal
from serve.retreat import Trail
from serve.robot import Robot
from serve.stage import OneRobot, Scene
from serve.station import Station
from serve.station_run import ENDED
from serve.station_sim import Demonstrates, Expert, SimStage, clock_of
from vla.embodiment import load_embodiment
from vla.episodes import EpisodeStore
from vla.errors import DataError, UsageError
from vla.handoff.gate import Gate
from vla.handoff.incidents import LOG, Recorder

EVERY, RED, BLUE, YELLOW = "touch every cube", "touch the red cube", "touch the blue cube", "touch the yellow cube"
SCENE = 900_000
SIZE = 64


class Student(Expert):
    """The scripted expert, of whom tests may want other things."""

    def __init__(self) -> None:
        super().__init__()
        self.looks, self.sure, self.told = 0, 1.0, list[str]()
        self.instead: Callable[[int, str], Any] | None = None
        """(look, instruction) -> another instruction, an action, or None."""

    def act(self, observation: Any, instruction: str, robot: str | None = None) -> Any:
        self.looks += 1
        self.told.append(instruction)
        other = None if self.instead is None else self.instead(self.looks, instruction)
        chunk = super().act(observation, other if isinstance(other, str) else instruction)
        if isinstance(other, np.ndarray):
            chunk.actions = other[None]
        chunk.confidence = np.full((1, 4), self.sure, np.float32)
        return chunk


class Asks:
    """A gate that says something at one look."""

    needs = ""

    def __init__(self, at: int, say: str = "ask") -> None:
        self.at, self.say, self.looks, self.answers, self.resets = at, say, 0, 0, 0

    def reset(self) -> None:
        self.resets += 1

    def answered(self) -> None:
        self.answers += 1

    def look(self, chunk: Any, step: int | None = None, features: Any = None, samples: Any = None) -> Any:
        self.looks += 1
        now = self.looks == self.at
        return SimpleNamespace(say=self.say if now else "fine", score="made up", value=2.0, threshold=1.0,
                               reason="something is odd" if now else "", scores={"made up": 2.0})  # fmt: skip


def tabletop() -> Robot:
    return Robot.from_json(load_embodiment("tabletop").model_dump(mode="json"), "tabletop")


@contextmanager
def station(
    root: Path, gate: Any = None, student: Student | None = None, suite: str = "tabletop-long", **options: Any
) -> Iterator[Any]:
    """A station over a simulator whose time is counted in steps."""
    student, robot, spec = student or Student(), tabletop(), load_embodiment("tabletop")
    stage = SimStage(suite, robot, size=SIZE, seed=SCENE, on_sim=lambda sim: setattr(student, "sim", sim))
    cameras = {name: camera.model_copy(update={"height": SIZE, "width": SIZE}) for name, camera in spec.cameras.items()}
    recorder = Recorder(root / "incidents", spec.model_copy(update={"cameras": cameras}), corrections=root / "corrections",
                        patient=True)  # fmt: skip
    options = {"asynchronous": False, "clock": clock_of(0), "answers": root / "answers.jsonl", **options}
    with Station(student, stage, make_guard(student, robot, Settings(suite)), gate=gate, recorder=recorder, **options) as one:
        yield one
    assert recorder.lost == 0, recorder.problem


def asked(one: Station, number: int = 1) -> dict[str, Any]:
    """The snapshot, once question `number` is open."""
    until(lambda: (one.snapshot()["question"] or {}).get("number") == number or one.snapshot()["run"]["state"] in ENDED,
          f"question {number}")  # fmt: skip
    snapshot = one.snapshot()
    assert snapshot["question"] is not None, snapshot["run"]
    return snapshot


def ended(one: Station) -> dict[str, Any]:
    """The snapshot, once the run is over."""
    until(lambda: one.snapshot()["run"]["state"] in ENDED, "the end")
    return one.snapshot()


def ticks(one: Station) -> list[dict[str, Any]]:
    return [tick for event in one.board.after(0) if event["kind"] == "tick" for tick in event["ticks"]]


def said(one: Station, kind: str) -> list[dict[str, Any]]:
    return [event for event in one.board.after(0) if event["kind"] == kind]


def incidents(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "incidents" / LOG).read_text().splitlines()]


def opened(folder: Path) -> EpisodeStore:
    return EpisodeStore.open(folder, folder.parent / f"cache-{folder.name}", progress=False)


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_goal_is_reached_and_all_of_it_is_on_the_board(tmp_path: Path):
    with station(tmp_path) as one:
        idle = one.snapshot()
        assert (idle["run"]["state"], idle["run"]["number"], idle["question"]) == ("idle", 0, None)
        assert EVERY in idle["goals"] and RED in idle["instructions"]
        began = one.run(EVERY, SCENE)
        assert (began["run"]["state"], began["run"]["goal"], began["run"]["number"]) == ("running", EVERY, 1)
        snapshot = ended(one)
        run = snapshot["run"]
        assert (run["state"], run["success"], run["error"], run["hold"]) == ("done", True, "", "")
        assert sorted(run["plan"]["done"]) == sorted(f"touch the {c} cube" for c in ("red", "green", "blue", "yellow"))
        events = one.board.after(0)
        assert [event["number"] for event in events] == list(range(1, snapshot["last"] + 1))
        assert [event["state"] for event in said(one, "run")] == ["running", "done"] and said(one, "run")[-1]["success"]
        assert [event["what"] for event in said(one, "event")].count("done") == 3  # at the fourth the simulator says it is over
        played = ticks(one)
        assert [tick["step"] for tick in played] == list(range(1, run["step"] + 1))
        assert all((tick["action"] is None) == bool(tick["hold"]) for tick in played) and not played[0]["hold"]
        assert snapshot["loop"]["ticks"] == run["step"] and snapshot["loop"]["missed"] == 0
        number, picture = one.board.picture("front")
        assert number >= 1 and picture[:2] == b"\xff\xd8"
        again = one.run(RED)
        assert again["run"]["number"] == 2 and ended(one)["run"]["success"] is True
    assert not (tmp_path / "answers.jsonl").exists() and one.recorder.written == 0


def test_what_is_no_goal_here_or_comes_at_the_wrong_time_is_refused(tmp_path: Path):
    with station(tmp_path, Asks(3)) as one:
        for goal in ("dance", "touch the purple cube"):
            with pytest.raises(UsageError, match="goal"):
                one.run(goal)
        with pytest.raises(DataError):
            one.run("  ")
        for wrong in (lambda: one.say("faster"), lambda: one.answer(1, "go_on"), one.hand_back):
            with pytest.raises(Refusal) as refused:
                wrong()
            assert refused.value.status == 409
        assert one.stop()["run"]["state"] == "idle"
        one.run(EVERY, SCENE)
        asked(one)
        with pytest.raises(Refusal) as refused:
            one.run(RED)
        assert refused.value.code == "conflict" and one.snapshot()["run"]["number"] == 1
        with pytest.raises(Refusal):
            one.hand_back()


def test_a_run_that_spoils_its_goal_has_failed_and_is_kept(tmp_path: Path):
    student = Student()
    student.instead = lambda look, instruction: "push the blue cube left"
    with station(tmp_path, student=student) as one:
        one.run(RED, SCENE)
        run = ended(one)["run"]
        assert (run["state"], run["success"]) == ("failed", False) and "spoilt" in run["error"]
        assert said(one, "incident")[-1]["what"] == "failure" and said(one, "run")[-1]["error"] == run["error"]
    store = opened(tmp_path / "incidents")
    assert store.num_episodes == 1 and store.episode_starts[-1] > 5
    (line,) = incidents(tmp_path)
    assert line["success"] is False and line["incidents"][-1]["kind"] == "failure"


def test_a_student_that_breaks_ends_the_run_and_not_the_station(tmp_path: Path):
    student = Student()

    def breaks(look: int, instruction: str) -> None:
        if look == 8:
            raise RuntimeError("out of memory")

    student.instead = breaks
    with station(tmp_path, student=student) as one:
        one.run(EVERY, SCENE)
        run = ended(one)["run"]
        assert run["state"] == "failed" and "out of memory" in run["error"]
        one.run(RED, SCENE)
        assert ended(one)["run"]["state"] == "done"
    assert opened(tmp_path / "incidents").num_episodes == 1


# --- questions -------------------------------------------------------------------------------------------------------


def test_nothing_moves_while_a_question_is_open(tmp_path: Path):
    gate = Asks(12)
    with station(tmp_path, gate) as one:
        one.run(EVERY, SCENE)
        snapshot = asked(one)
        run, question = snapshot["run"], snapshot["question"]
        assert run["state"] == "asking" and gate.resets == 3, "of the run, and of each instruction"
        assert {name: question[name] for name in ("say", "reason", "score", "value", "threshold")} == {
            "say": "ask", "reason": "something is odd", "score": "made up", "value": 2.0, "threshold": 1.0,
        }  # fmt: skip
        assert question["answers"] == ["go_on", "instruct", "take_over", "retreat", "stop"]
        step = one.snapshot()["run"]["step"]
        until(lambda: one.snapshot()["run"]["step"] >= step + 2)
        hand, cubes = one.student.sim.places()
        looks = one.student.looks
        until(lambda: one.snapshot()["run"]["step"] >= step + 60)
        later, others = one.student.sim.places()
        # Commands of standing still, which a simulated arm carries out to a fraction of a millimetre.
        assert np.abs(later - hand).max() < 2e-4 and all(np.abs(others[c] - cubes[c]).max() < 2e-4 for c in cubes)
        assert one.student.looks == looks, "nobody is asked what to do next"
        still = [tick for tick in ticks(one) if tick["step"] > step + 1]
        assert still and all(tick["action"] is None and tick["hold"].startswith("asked: ") for tick in still)
        assert one.snapshot()["run"]["valid_for"] == 0, "what was planned before expires meanwhile"
        one.answer(1, "go_on")
        assert ended(one)["run"]["success"] is True
        assert gate.answers == 1
    (line,) = incidents(tmp_path)
    assert [what["kind"] for what in line["incidents"]] == ["handoff", "handoff"] and line["success"] is False
    assert line["incidents"][1]["answer"] == "go_on" and line["incidents"][0]["scores"] == {"made up": 2.0}
    store = opened(tmp_path / "incidents")
    assert store.episode_starts[-1] < step + 30, "the time that nothing moved is not kept"


def test_a_question_is_answered_once_and_only_by_its_own_answers(tmp_path: Path):
    with station(tmp_path, Asks(5)) as one:
        one.run(EVERY, SCENE)
        asked(one)
        for answer, more, status in (("dance", "", 422), ("go_on", "touch it", 422)):
            with pytest.raises(Refusal) as refused:
                one.answer(1, answer, more)
            assert refused.value.status == status
        with pytest.raises(DataError):
            one.answer(1, "instruct", " ")
        with pytest.raises(Refusal) as refused:
            one.answer(7, "go_on")
        assert refused.value.code == "conflict" and one.snapshot()["question"]["number"] == 1
        outcomes = list[str]()
        barrier = threading.Barrier(8)

        def race() -> None:
            barrier.wait()
            try:
                one.answer(1, "go_on")
                outcomes.append("taken")
            except Refusal as late:
                outcomes.append(late.code)

        people = [threading.Thread(target=race) for _ in range(8)]
        for person in people:
            person.start()
        for person in people:
            person.join()
        assert sorted(outcomes) == ["conflict"] * 7 + ["taken"]
        ended(one)
    (line,) = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert (line["run"], line["question"], line["answer"], line["by"]) == (1, 1, "go_on", "person")
    assert line["reason"] == "something is odd" and line["scores"] == {"made up": 2.0} and line["time"] > 1e9


def test_an_instruction_of_a_persons_own_is_followed_until_it_is_finished(tmp_path: Path):
    with station(tmp_path, Asks(2)) as one:
        one.run(EVERY, SCENE)
        first = asked(one)["run"]["instruction"]
        assert first != YELLOW
        one.answer(1, "instruct", "Touch the YELLOW cube")
        run = ended(one)["run"]
        told = list(dict.fromkeys(one.student.told))
        assert told[:2] == [first, YELLOW], "at once, and not forgotten with the planner's next answer"
        assert one.student.told.count(YELLOW) >= 5
        assert run["success"] is True and told.count(YELLOW) == 1, "what a person had done is not done again"
        (answer,) = said(one, "answer")
        assert (answer["answer"], answer["instruction"], answer["by"], answer["question"]) == ("instruct", YELLOW, "person", 1)


def test_who_takes_over_drives_through_the_guard_and_what_it_did_is_kept(tmp_path: Path):
    with station(tmp_path, Asks(4)) as one:
        one.run(EVERY, SCENE)
        now = asked(one)["run"]["instruction"]
        looks = one.student.looks
        one.answer(1, "take_over")
        run = ended(one)["run"]
        assert run["success"] is True
        driven = [tick for tick in ticks(one) if tick["by"] == "person"]
        assert len(driven) > 4 and all(tick["action"] is not None and tick["confidence"] is None for tick in driven[:-1])
        assert one.student.told[looks] == now or one.student.told[looks] in run["plan"]["done"]
        assert [event["what"] for event in said(one, "event") if event["what"] == "handed back"] == ["handed back"]
    assert (one.recorder.written, one.recorder.corrected) == (1, 1)
    store = opened(tmp_path / "corrections")
    assert store.num_episodes == 1 and store.instructions == [now] and len(store.state) in (len(driven), len(driven) - 1)
    (line,) = incidents(tmp_path)
    assert [span[2] for span in line["spans"]] == ["policy", "person"] and line["success"] is True
    assert [what.get("answer") for what in line["incidents"]] == [None, "take_over"]
    found = check_all([tmp_path / "corrections"], holdout=None)
    assert not [finding for finding in found if finding.severity == "error"], found


def test_the_robot_may_be_taken_back_from_who_drives(tmp_path: Path):
    with station(tmp_path, Asks(3)) as one:
        slow = threading.Event()
        begin = one.stage.begin

        def endless(goal: str, scene: int | None) -> Scene:
            made = begin(goal, scene)
            drive = lambda seen: slow.wait(0.01) or np.array([0, 0, 0.01, 1], np.float32)  # noqa: E731
            made.demonstrator = SimpleNamespace(begin=lambda instruction: None, act=drive)  # pyright: ignore
            return made

        one.stage.begin = endless
        one.run(EVERY, SCENE)
        asked(one)
        one.answer(1, "take_over")
        until(lambda: one.snapshot()["run"]["by"] == "person")
        looks = one.student.looks
        one.hand_back()
        until(lambda: one.student.looks > looks)
        assert ended(one)["run"]["state"] == "done"
        assert [event["reason"] for event in said(one, "event") if event["what"] == "handed back"] == ["taken back"]


def test_what_an_expert_did_that_gave_up_is_no_correction(tmp_path: Path):
    with station(tmp_path, Asks(6)) as one:
        begin = one.stage.begin

        def hasty(goal: str, scene: int | None) -> Scene:
            made = begin(goal, scene)
            made.demonstrator = Demonstrates(made.io, most=2)  # pyright: ignore[reportArgumentType]
            return made

        one.stage.begin = hasty
        one.run(EVERY, SCENE)
        now = asked(one)["run"]["instruction"]
        one.answer(1, "take_over")
        question = asked(one, 2)["question"]
        assert question["say"] == "help" and question["reason"] == f"who drives gave up: {now!r} not done in 2 steps"
        assert "retreat" not in question["answers"], "the way back began elsewhere"
        one.answer(2, "stop")
    assert one.recorder.corrected == 0 and one.recorder.written == 1
    (line,) = incidents(tmp_path)
    assert line["success"] is False and "person" in {span[2] for span in line["spans"]}


def test_a_retreat_goes_back_the_way_it_came_and_asks_again(tmp_path: Path):
    with station(tmp_path, Asks(7), back=1.0) as one:
        places = list[np.ndarray]()
        act = one.student.act

        def noted(*given: Any, **named: Any) -> Any:
            places.append(one.student.sim.places()[0])
            return act(*given, **named)

        one.student.act = noted
        one.run(EVERY, SCENE)
        asked(one)
        until(lambda: one.snapshot()["run"]["hold"].startswith("asked"))
        far, was = one.student.sim.places()[0], places[0]
        one.answer(1, "retreat")
        question = asked(one, 2)["question"]
        assert (question["say"], question["reason"]) == ("retreat", "moved back: as a person asked")
        assert question["answers"] == ["go_on", "instruct", "take_over", "stop"], "there is no way back any more"
        back = one.student.sim.places()[0]
        assert np.linalg.norm(back - was) < 0.3 * np.linalg.norm(far - was) > 0, (was, far, back)
        way = [tick for tick in ticks(one) if tick["by"] == "retreat"]
        assert 6 <= len(way) <= 8 and all(tick["action"] is not None for tick in way[:6])
        one.answer(2, "go_on")
        assert ended(one)["run"]["success"] is True


def test_a_gate_that_says_retreat_finds_the_robot_moved_back_first(tmp_path: Path):
    with station(tmp_path, Asks(7, "retreat"), back=1.0) as one:
        one.run(EVERY, SCENE)
        question = asked(one)["question"]
        assert (question["say"], question["reason"]) == ("retreat", "moved back: something is odd")
        order = [tick["by"] for tick in ticks(one)]
        assert order[:6] == ["policy"] * 6 and "retreat" in order
        one.answer(1, "stop")
        assert one.snapshot()["run"]["state"] == "stopped"
        assert [event["answer"] for event in one.board.after(0) if event["kind"] == "answer"][-1:] == ["stop"]
        assert one.run(EVERY, SCENE)["run"]["number"] == 2  # at once: the one before is over
    assert opened(tmp_path / "incidents").num_episodes == 1


def test_a_run_whose_end_cannot_be_kept_ends_all_the_same_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with station(tmp_path) as one:
        with monkeypatch.context() as broken:

            def full(**_: Any) -> None:
                raise OSError("no space left on device")

            broken.setattr(one.recorder, "end", full)
            one.run(EVERY, SCENE)
            assert ended(one)["run"]["state"] == "done"
        lost = [event for event in one.board.after(0) if event.get("what") == "not kept"]
        assert [event["reason"] for event in lost] == ["OSError: no space left on device"]


def test_stop_ends_a_run_at_once_and_its_question_with_it(tmp_path: Path):
    with station(tmp_path, Asks(9)) as one:
        one.run(EVERY, SCENE)
        asked(one)
        snapshot = one.stop()
        assert snapshot["run"]["state"] == "stopped" and snapshot["question"] is None
        with pytest.raises(Refusal) as refused:
            one.answer(1, "go_on")
        assert refused.value.code == "conflict"
        hand = one.student.sim.places()[0]
        assert one.run(RED, SCENE)["run"]["number"] == 2 and ended(one)["run"]["state"] == "done"
        assert not np.allclose(one.student.sim.places()[0], hand)


def test_an_answer_that_comes_when_the_run_is_over_is_refused_and_not_lost(tmp_path: Path):
    with station(tmp_path, Asks(9)) as one:
        end, outcomes = one.recorder.end, list[str]()

        def late(success: bool) -> None:
            try:
                one.answer(1, "go_on")
                outcomes.append("taken")
            except Refusal as refused:
                outcomes.append(refused.code)
            end(success)

        one.recorder.end = late
        one.run(EVERY, SCENE)
        asked(one)
        one.stop()
        ended(one)
        assert outcomes == ["conflict"] and not said(one, "answer")
    assert not (tmp_path / "answers.jsonl").exists()


def test_the_guards_call_for_help_is_a_question(tmp_path: Path):
    student = Student()
    student.instead = lambda look, instruction: np.full(4, np.nan, np.float32) if 5 <= look < 15 else None
    with station(tmp_path, student=student) as one:
        one.run(EVERY, SCENE)
        snapshot = asked(one)
        assert (snapshot["question"]["say"], snapshot["question"]["value"]) == ("help", None)
        assert "held 10 times" in snapshot["question"]["reason"]
        assert {"hold", "handoff"} <= {event["what"] for event in said(one, "incident")}
        one.answer(1, "go_on")
        assert ended(one)["run"]["success"] is True
        assert one.guard.needs_help == ""


def test_the_calibrated_gate_asks_and_is_not_asked_the_same_again_at_once(tmp_path: Path):
    folder = calibrated(tmp_path / "policy", score="entropy")
    student = Student()
    student.sure = 0.999
    gate = Gate.load(folder, {"ask": 0.1})
    student.instead = lambda look, instruction: setattr(student, "sure", -9.0 if look >= 10 else 0.999)
    with station(tmp_path, gate, student, grace=1.0) as one:
        one.run(EVERY, SCENE)
        question = asked(one)["question"]
        assert question["score"] == "entropy" and question["value"] > question["threshold"] and question["reason"]
        until(lambda: ticks(one)[-1]["hold"].startswith("asked"))
        doubts = [tick["doubt"]["entropy"] for tick in ticks(one) if tick["doubt"]]
        assert doubts[0] < question["threshold"] < doubts[-1]
        one.answer(1, "go_on")
        before = one.snapshot()["run"]["step"]
        assert asked(one, 2)["run"]["step"] >= before + 10, "a second of ticks in which it is not listened to"
        one.answer(2, "stop")


def test_a_gate_that_cannot_judge_stops_the_robot(tmp_path: Path):
    with station(tmp_path, Gate.load(calibrated(tmp_path / "policy", score="learned"), {"ask": 0.1})) as one:
        one.run(EVERY, SCENE)
        question = asked(one)["question"]
        assert question["say"] == "help" and "the gate cannot judge" in question["reason"]


def test_what_is_no_number_is_said_and_can_be_shown(tmp_path: Path):
    """A policy whose actions are no numbers: a detector of them knows nothing, and says nothing that is no JSON."""
    student, gate = Student(), Asks(5)
    look = gate.look

    def confused(*given: Any, **named: Any) -> Any:
        ruling = look(*given, **named)
        if ruling.say != "fine":
            ruling.say, ruling.value, ruling.threshold = "fine", float("nan"), float("inf")
            ruling.scores = {"made up": float("nan"), "another": 1.0}
        return ruling

    gate.look = confused
    with station(tmp_path, gate, student) as one:
        plan = one.stage.begin

        def unsure(goal: str, scene: int | None) -> Scene:
            made = plan(goal, scene)
            made.planner = SimpleNamespace(plan=lambda asked: Plan(RED, confidence=float("nan")))  # pyright: ignore
            return made

        one.stage.begin = unsure
        one.run(RED, SCENE)
        snapshot = asked(one)
        question = snapshot["question"]
        assert (question["say"], question["reason"]) == ("help", "the gate cannot judge: made up is nan")
        assert question["value"] is question["threshold"] is snapshot["run"]["plan"]["confidence"] is None
        json.dumps([snapshot, one.board.after(0)], allow_nan=False)
        one.answer(1, "stop")
    (line,) = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert line["scores"] == {"another": 1.0}


def test_a_person_is_heard_by_the_planner_while_it_runs(tmp_path: Path):
    with station(tmp_path, Drill(4), grace=0.0) as one:
        one.run(EVERY, SCENE)
        asked(one)
        one.say(YELLOW)  # no answer: it is heard when the question is answered
        assert one.snapshot()["question"]["number"] == 1
        one.answer(1, "go_on")
        asked(one, 2)
        assert [plan["now"] for plan in said(one, "plan")][:2] == [RED, YELLOW] and YELLOW in one.student.told
        assert "words" in [event["what"] for event in said(one, "event")]


def test_what_cannot_be_kept_is_shown_all_the_same(tmp_path: Path):
    with station(tmp_path) as one:

        def full(*given: Any, **named: Any) -> None:
            raise OSError("no space left")

        one.recorder.tick = full
        one.run(EVERY, SCENE)
        until(lambda: one.board.shown("front") >= 1)
        number = one.board.shown("front")
        assert ended(one)["run"]["state"] == "done" and one.board.shown("front") > number


def test_words_that_come_while_a_scene_is_made_are_not_lost(tmp_path: Path):
    with station(tmp_path) as one:
        begin, made = one.stage.begin, threading.Event()
        one.stage.begin = lambda goal, scene: made.wait(60) and begin(goal, scene)
        one.run(EVERY, SCENE)
        one.say(YELLOW)
        made.set()
        assert ended(one)["run"]["success"] is True
        assert one.student.told[0] == YELLOW and [event["what"] for event in said(one, "event")][0] == "words"


# --- a robot of one's own --------------------------------------------------------------------------------------------


class Arm:
    """A driver of a robot that is told where its joints shall be, and is there a tick later."""

    def __init__(self) -> None:
        self.at, self.sent = np.zeros(4, np.float32), list[np.ndarray]()

    def observe(self) -> dict[str, Any]:
        picture = np.full((32, 32, 3), len(self.sent) % 256, np.uint8)
        return {"images": {"front": picture}, "state": self.at.copy()}

    def act(self, action: np.ndarray) -> bool:
        self.at = np.array(action, np.float32)
        self.sent.append(self.at.copy())
        return len(self.sent) >= 400


def joints() -> Robot:
    channel = {
        "name": "arm",
        "dims": ["a", "b", "c"],
        "convention": "joint_position",
        "unit": "rad",
        "low": [-2, -2, -2],
        "high": [2, 2, 2],
    }
    hand = {"name": "hand", "dims": ["close"], "convention": "gripper", "unit": "1", "low": [-1], "high": [1]}
    return Robot.from_json({"name": "arm", "cameras": {"front": {"height": 32, "width": 32}}, "control_hz": 10,
                            "state": [channel, hand], "action": [channel, hand]}, "arm")  # fmt: skip


def test_a_robot_told_where_to_be_goes_back_through_the_places_it_was_at():
    arm, robot = Arm(), joints()

    class Onwards:
        def act(self, observation: Any, instruction: str, robot: str | None = None) -> Any:
            at = np.array(observation["state"])
            steps = np.stack([[at[0] + 0.02 * (n + 1), at[1], at[2], 1.0] for n in range(4)]).astype(np.float32)
            return SimpleNamespace(actions=steps, confidence=np.ones((4, 4), np.float32))

        def steps(self, robot: str) -> tuple[int, int]:
            return 4, 2

    stage = OneRobot(arm, ScriptedPlanner(["wave"]), goals=["wave"])
    guard = Guard(robot, jump={"arm": 0.05}, repeats=None)
    with Station(Onwards(), stage, guard, gate=Asks(10, "retreat"), asynchronous=False, clock=clock_of(0), back=1.0) as one:
        assert one.snapshot()["question"] is None and one.snapshot()["incidents"]["folder"] == ""
        with pytest.raises(UsageError, match="scene"):
            one.run("wave", 3)
        one.run("wave")
        question = asked(one)["question"]
        assert question["answers"] == ["go_on", "instruct", "stop"]
        steps = np.array(arm.sent)[:, 0]
        top = int(steps.argmax())
        assert top >= 17 and steps[-1] == pytest.approx(steps[top] - 10 * 0.02, abs=0.021)
        assert np.abs(np.diff(steps[: top + 11])).max() <= 0.05 + 1e-6
        assert not one.guard.needs_help
        one.answer(1, "go_on")
        until(lambda: len(arm.sent) > top + 40)
        run = one.stop()["run"]
        assert run["state"] in ("stopped", "done") and run["success"] is None


def test_a_way_back_of_the_drivers_own_is_gone_instead():
    robot, guard = tabletop(), Guard(tabletop(), repeats=None)
    sent = list[np.ndarray]()
    left = [np.array([0, 0, 1, 1], np.float32)] * 3

    class Io:
        def observe(self) -> dict[str, Any]:
            return {"images": {"front": np.full((64, 64, 3), len(sent) % 256, np.uint8)}, "state": np.full(4, 0.3, np.float32)}

        def act(self, action: np.ndarray) -> bool:
            sent.append(np.array(action))
            return False

    class Sideways:
        def act(self, observation: Any, instruction: str, robot: str | None = None) -> Any:
            return SimpleNamespace(actions=np.array([[0, 0.5, 0, 1]], np.float32), confidence=np.ones((1, 4), np.float32))

        def steps(self, robot: str) -> tuple[int, int]:
            return 1, 1

    stage = OneRobot(Io(), ScriptedPlanner(["go"]), retreat=lambda seen: left.pop() if left else None)
    with Station(Sideways(), stage, guard, gate=Asks(5, "retreat"), asynchronous=False, clock=clock_of(0)) as one:
        one.run("go")
        asked(one)
        moved = [action.tolist() for action in sent if np.any(action[:3])]
        assert moved[-3:] == [[0, 0, 1, 1]] * 3 and moved[:-3] == [[0, 0.5, 0, 1]] * len(moved[:-3])
        stage._scene.retreat = lambda seen: left[99]
        one.answer(1, "retreat")
        snapshot = asked(one, 2)
        assert snapshot["run"]["state"] == "asking" and snapshot["question"]["say"] == "help"
        assert snapshot["question"]["reason"].startswith("the way back failed: IndexError")
    assert robot.key == "tabletop"


def test_what_is_undone_is_the_opposite_rotations_as_well():
    channel = {
        "name": "eef",
        "dims": list("abcdef"),
        "convention": "eef_delta_rot6d",
        "unit": "1",
        "low": [-1] * 6,
        "high": [1] * 6,
    }
    hand = {"name": "hand", "dims": ["close"], "convention": "gripper", "unit": "1", "low": [-1], "high": [1]}
    robot = Robot.from_json({"name": "r", "cameras": {}, "control_hz": 10, "state": [], "action": [channel, hand]}, "r")
    turn = np.array([np.cos(0.3), np.sin(0.3), 0, -np.sin(0.3), np.cos(0.3), 0, 1], np.float32)
    trail = Trail(robot, 1.0)
    trail.add(None, np.array([1, 0, 0, 0, 1, 0, -1], np.float32))
    trail.add(None, turn)
    back = trail.back()
    np.testing.assert_allclose(back[0], [np.cos(0.3), -np.sin(0.3), 0, np.sin(0.3), np.cos(0.3), 0, -1], atol=1e-6)
    assert len(back) == 2 and not len(trail)
    for n in range(25):
        trail.add(None, turn * n)
    assert len(trail) == 10


def test_a_camera_that_fails_never_keeps_a_command_from_the_robot():
    """Not even the last one, to stand still."""
    arm = Arm()
    look = arm.observe

    def failing() -> dict[str, Any]:
        if len(arm.sent) >= 12:
            raise OSError("the camera is gone")
        return look()

    arm.observe = failing

    class Onwards:
        def act(self, observation: Any, instruction: str, robot: str | None = None) -> Any:
            steps = np.repeat(observation["state"][None], 4, 0) + np.array([[0.02], [0.04], [0.06], [0.08]], np.float32)
            return SimpleNamespace(actions=np.clip(steps, -1, 1), confidence=np.ones((4, 4), np.float32))

        def steps(self, robot: str) -> tuple[int, int]:
            return 4, 4

    stage = OneRobot(arm, ScriptedPlanner(["wave"]))
    guard = Guard(joints(), jump={"arm": 0.05}, repeats=None)
    with Station(Onwards(), stage, guard, asynchronous=False, clock=clock_of(0)) as one:
        one.run("wave")
        run = ended(one)["run"]
        assert run["state"] == "failed" and "the camera is gone" in run["error"]
        assert len(arm.sent) >= 13 and arm.sent[-1].tolist() == arm.sent[-2].tolist(), "it was told to stay where it is"


def test_another_suite_is_driven_by_its_own_expert(tmp_path: Path):
    pytest.importorskip("metaworld")
    robot = Robot.from_json(load_embodiment("metaworld_sawyer").model_dump(mode="json"), "sawyer")

    class Still:
        def act(self, observation: Any, instruction: str, robot: str | None = None) -> Any:
            return SimpleNamespace(actions=np.zeros((4, 4), np.float32), confidence=np.ones((4, 4), np.float32))

        def steps(self, robot: str) -> tuple[int, int]:
            return 4, 4

    stage = SimStage("metaworld", robot, tasks=["button-press-topdown-v3"])
    guard = make_guard(Still(), robot, Settings("metaworld"))
    with Station(Still(), stage, guard, gate=Asks(2), asynchronous=False, clock=clock_of(0)) as one:
        one.run("press the button from above")
        asked(one)
        one.answer(1, "take_over")
        run = ended(one)["run"]
        assert run["success"] is True and run["plan"]["done"] == ["press the button from above"]


# --- its parts -------------------------------------------------------------------------------------------------------


def test_the_board_remembers_so_much_and_no_more():
    board = Board(["front"])
    for n in range(5000):
        board.tick({"step": n})
        if n % 2:
            board.say("event", what=str(n))
    kept = board.after(0)
    assert len([event for event in kept if event["kind"] == "event"]) == EVENTS
    assert TICKS - 2 <= sum(len(event["ticks"]) for event in kept if event["kind"] == "tick") <= TICKS
    assert [event["number"] for event in kept] == sorted({event["number"] for event in kept}) and kept[-1]["number"] == board.last
    assert [event["number"] for event in board.after(board.last - 3)] == [board.last - 2, board.last - 1, board.last]
    assert board.after(board.last) == [] and board.after(board.last + 5) == []
    for n in range(10**4):
        board.tick({"step": n})
    board.flush()
    assert sum(len(event["ticks"]) for event in board.after(0) if event["kind"] == "tick") <= TICKS
    frame = np.zeros((8, 8, 3), np.uint8)
    board.show({"front": frame, "another": frame})
    frame[:] = 255
    number, file = board.picture("front") or (0, b"")
    assert number == 1 and board.picture("another") is None and board.picture("front") == (1, file)


def test_a_persons_instruction_goes_before_the_planner_until_it_is_over():
    led = Led(ScriptedPlanner([RED, BLUE]))
    assert led.order("Touch the yellow cube") == YELLOW
    asks = lambda **more: led.plan(Asked(EVERY, **{"last": YELLOW, "status": "running", **more}))  # noqa: E731
    assert asks(words="Touch the YELLOW cube").instruction == asks().instruction == asks(status="unsure").instruction == YELLOW
    assert asks(status="done").instruction == RED and asks(last=RED).instruction == RED
    assert asks(last=RED, words=BLUE).instruction == BLUE
    assert asks(last=BLUE).instruction == BLUE, "what a planner made of a person's words is as much an order"
    assert asks(last=BLUE, status="stalled").instruction == RED
    with pytest.raises(DataError):
        led.order(" ")
    with pytest.raises(UsageError):
        Drill(0)


def test_a_guard_says_how_far_one_tick_may_go():
    guard = Guard(edge_spec(("front",)).model_dump(mode="json"), repeats=None, max_age=None)
    assert guard.reach(np.array([9, -9, 0.5, 1])).tolist() == [1, -1, 0.5, 1]
    arm = Guard(joints(), jump={"arm": 0.05}, repeats=None)
    arm.saw(Arm().observe())
    np.testing.assert_allclose(arm.reach(np.array([1, -0.02, 0, 1])), [0.05, -0.02, 0, 1], atol=1e-7)
