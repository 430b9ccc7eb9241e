"""Incidents: the last seconds before something went wrong, and what came of it, as datasets that load and train."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_datasets import SIZE, small_spec

from vla.config import validate
from vla.episodes import EpisodeStore
from vla.errors import DataError, UsageError
from vla.handoff.incidents import LOG, Recorded, Recorder
from vla.train import TrainConfig, train

HZ = 10  # the tabletop's


def seen(n: int) -> dict[str, Any]:
    """What is seen at step n: a picture that tells n."""
    return {"images": {"front": np.full((SIZE, SIZE, 3), n % 256, np.uint8)}, "state": np.full(4, n / 1000, np.float32)}


def ticks(recorder: Recorder, first: int, last: int, **kw: Any) -> None:
    for n in range(first, last):
        recorder.tick(seen(n), np.full(4, (n % 100) / 100, np.float32), **kw)


def log_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / LOG).read_text().splitlines()]


def episodes_of(root: Path) -> list[list[int]]:
    """The step each frame of each episode tells."""
    store = EpisodeStore.open(root, root.parent / f"cache-{root.name}", progress=False)
    told = []
    for e in range(store.num_episodes):
        start, stop = store.episode_starts[e : e + 2]
        told.append([round(float(store.frame("front", i).mean())) for i in range(start, stop)])
        np.testing.assert_allclose(store.state[start:stop, 0], np.array(told[-1]) / 1000, atol=1e-6)
    return told


def test_an_episode_holds_what_was_before_and_after(tmp_path: Path):
    root = tmp_path / "incidents"
    with Recorder(root, small_spec(), before=1.0, after=0.5) as recorder:
        recorder.begin("push the red cube left", "push-red-left", 7)
        ticks(recorder, 0, 40)
        recorder.incident("hold", "limit: 1.2 of 1", value=3)
        ticks(recorder, 40, 60)
        recorder.end(success=True)
    assert recorder.written == 1 and recorder.lost == 0
    assert episodes_of(root) == [list(range(30, 45))], "a second before, half a second after"
    (line,) = log_of(root)
    (what,) = line["incidents"]
    assert (what["frame"], what["kind"], what["reason"], what["value"]) == (10, "hold", "limit: 1.2 of 1", 3)
    assert abs(what["time"] - time.time()) < 600 and line["spans"] == [[0, 15, "policy"]] and line["success"] is False
    recorded = json.loads((root / "meta/recording.json").read_text())
    assert recorded["incidents"] is True and recorded["episodes"][0]["seed"] == 7


def test_nothing_is_written_where_nothing_happened_and_episodes_do_not_mix(tmp_path: Path):
    root = tmp_path / "incidents"
    with Recorder(root, small_spec(), before=2.0, after=0.0) as recorder:
        recorder.begin("a")
        ticks(recorder, 0, 30)
        recorder.end(success=True)
        recorder.begin("b")
        ticks(recorder, 100, 105)
        recorder.incident("failure", "out of steps")
        recorder.end(success=False)
        recorder.begin("c")
        recorder.incident("hold", "nothing seen yet")  # before the first step: there is nothing to show
        recorder.end(success=False)
    assert episodes_of(root) == [[100, 101, 102, 103, 104]]
    assert log_of(root)[0]["incidents"][0]["frame"] == 4, "the last one there is"


def test_incidents_close_together_are_one_episode(tmp_path: Path):
    root = tmp_path / "incidents"
    with Recorder(root, small_spec(), before=0.5, after=1.0) as recorder:
        recorder.begin("a")
        ticks(recorder, 0, 20)
        recorder.incident("hold", "one")
        ticks(recorder, 20, 25)
        recorder.incident("handoff", "two")
        ticks(recorder, 25, 60)
        recorder.incident("hold", "three")
        ticks(recorder, 60, 62)
    assert episodes_of(root) == [list(range(15, 35)), [*range(55, 62)]]
    assert [[what["reason"] for what in line["incidents"]] for line in log_of(root)] == [["one", "two"], ["three"]]
    assert log_of(root)[0]["incidents"][1]["frame"] == 10


def test_what_a_person_did_is_an_episode_of_its_own_where_it_led_to_success(tmp_path: Path):
    root, other = tmp_path / "incidents", tmp_path / "corrections"
    with Recorder(root, small_spec(), before=0.5, after=0.2, corrections=other) as recorder:
        for first, success in ((0, True), (100, False)):
            recorder.begin("push the red cube left", "push-red-left", first)
            ticks(recorder, first, first + 10)
            recorder.incident("handoff", "learned: 2.1, above 1.4")
            ticks(recorder, first + 10, first + 40, by="person", told="push the red cube left, from behind")
            recorder.end(success)
    assert recorder.written == 2 and recorder.corrected == 1
    assert [len(told) for told in episodes_of(root)] == [35, 35], "whoever helps is not cut off"
    assert episodes_of(other) == [list(range(10, 40))]
    assert log_of(root)[0]["spans"] == [[0, 5, "policy"], [5, 35, "person"]]
    store = EpisodeStore.open(other, tmp_path / "c2", progress=False)
    assert store.instructions == ["push the red cube left, from behind"]
    whole = EpisodeStore.open(root, tmp_path / "c3", progress=False)
    assert whole.instructions == ["push the red cube left"]
    assert whole.subtasks == ["push the red cube left", "push the red cube left, from behind"]
    assert whole.segment_starts.tolist() == [0, 5, 35, 40, 70]


def test_an_endless_incident_is_cut_and_a_later_run_goes_on(tmp_path: Path):
    root = tmp_path / "incidents"
    for first in (0, 200):
        with Recorder(root, small_spec(), before=0.5, after=0.5, longest=2.0) as recorder:
            recorder.begin("a")
            ticks(recorder, first, first + 10)
            recorder.incident("handoff", "who is there")
            ticks(recorder, first + 10, first + 40, by="person")
    assert [len(told) for told in episodes_of(root)] == [20, 20]
    assert [line["episode_index"] for line in log_of(root)] == [0, 1]


def test_a_robot_is_not_stopped_by_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "incidents"
    recorder = Recorder(root, small_spec(), before=0.5, after=0.0)

    def broken(*_: object) -> None:
        raise OSError("the disk is gone")

    real = recorder._writers[0].add
    monkeypatch.setattr(recorder._writers[0], "add", broken)
    for n in range(4):
        if n == 3:
            recorder._thread.submit(lambda: None).result()  # the three before are through
            monkeypatch.setattr(recorder._writers[0], "add", real)
        recorder.begin("a")
        ticks(recorder, 10 * n, 10 * n + 5)
        recorder.incident("failure", "spoilt")
        recorder.end(success=False)
    recorder.close()
    assert recorder.lost == 3 and recorder.written == 1 and "the disk is gone" in recorder.problem
    assert episodes_of(root) == [list(range(30, 35))] and log_of(root)[0]["episode_index"] == 0


def test_a_commit_that_fails_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "incidents"
    recorder = Recorder(root, small_spec(), before=0.5, after=0.0)
    real, calls = recorder._writers[0]._write, []

    def full() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        real()

    monkeypatch.setattr(recorder._writers[0], "_write", full)
    for n in range(2):
        recorder.begin("a")
        ticks(recorder, 10 * n, 10 * n + 5)
        recorder.incident("failure", "spoilt")
        recorder.end(success=False)
    recorder.close()
    assert recorder.lost == 0 and recorder.written == 2 and "No space" in recorder.problem
    assert len(episodes_of(root)) == 2 and [line["episode_index"] for line in log_of(root)] == [0, 1]


@pytest.mark.parametrize("patient", [False, True])
def test_what_comes_too_fast_is_lost_or_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patient: bool):
    gate = threading.Event()
    recorder = Recorder(tmp_path / "incidents", small_spec(), before=0.5, after=0.0, patient=patient)
    real = recorder._writers[0].add
    monkeypatch.setattr(recorder._writers[0], "add", lambda episode: (gate.wait(60), real(episode)))
    if patient:
        threading.Timer(0.2, gate.set).start()
    for n in range(8):
        recorder.begin("a")
        ticks(recorder, 10 * n, 10 * n + 5)
        recorder.incident("failure", "spoilt")
        recorder.end(success=False)
    gate.set()
    recorder.close()
    assert (recorder.written, recorder.lost) == ((8, 0) if patient else (4, 4))
    assert ("waiting" in recorder.problem) != patient


def test_what_is_no_recording_is_said_at_once(tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError):
        Recorder(tmp_path / "other", small_spec())
    with pytest.raises(UsageError, match="seconds"):
        Recorder(tmp_path / "x", small_spec(), before=0.0)
    with pytest.raises(UsageError):
        Recorder(tmp_path / "x", small_spec(), corrections=tmp_path / "other")
    with Recorder(tmp_path / "x", small_spec()) as recorder:
        recorder.begin("a")
        with pytest.raises(DataError, match="front"):
            recorder.tick({"images": {"front": np.zeros((8, 8, 3), np.uint8)}, "state": np.zeros(4)}, np.zeros(4))
        with pytest.raises(DataError, match="no frame"):
            recorder.tick({"images": {}, "state": np.zeros(4)}, np.zeros(4))


class Robot:
    """A driver that reuses its picture."""

    def __init__(self) -> None:
        self.n, self.frame = -1, np.zeros((SIZE, SIZE, 3), np.uint8)

    def observe(self) -> Mapping[str, Any]:
        self.n += 1
        self.frame[:] = self.n
        return {"images": {"front": self.frame}, "state": np.full(4, self.n / 1000, np.float32)}

    def act(self, action: np.ndarray) -> bool:
        return False


def test_a_drivers_every_step_is_recorded_and_verdicts_are_incidents(tmp_path: Path):
    root = tmp_path / "incidents"
    verdict = {name: SimpleNamespace(hold=name != "fine", reason="late", needs_help="held 10 times" * (name == "help"))
               for name in ("fine", "held", "help")}  # fmt: skip
    with Recorder(root, small_spec(), before=5.0, after=5.0) as recorder:
        robot = Recorded(Robot(), recorder)
        recorder.begin("a")
        for n in range(20):
            if n % 4 == 0:
                robot.observe()  # a look, as a control loop takes it
            robot.act(np.zeros(4, np.float32))
            recorder.on_verdict(verdict["held" if n in (8, 9, 14) else "help" if n == 18 else "fine"])
        recorder.end(success=False)
    assert episodes_of(root) == [list(range(20))], "one picture a step, each as it was then"
    happened = log_of(root)[0]["incidents"]
    assert [(what["kind"], what["frame"]) for what in happened] == [("hold", 9), ("hold", 15), ("handoff", 19)]
    assert happened[-1]["reason"] == "held 10 times"


def test_incidents_and_corrections_train(tmp_path: Path):
    root, other = tmp_path / "incidents", tmp_path / "corrections"
    with Recorder(root, small_spec(), before=1.0, after=0.5, corrections=other) as recorder:
        for n in range(4):
            recorder.begin(f"do thing {n % 2}")
            ticks(recorder, 20 * n, 20 * n + 10)
            recorder.incident("handoff", "entropy: 0.8, above 0.7")
            ticks(recorder, 20 * n + 10, 20 * n + 20, by="person")
            recorder.end(success=True)
    backbone = {"hidden": 32, "layers": 1, "heads": 2, "mlp": 64, "tower_channels": [8, 8, 16], "keypoints": 0, "text_vocab": 300}
    values = {
        "run": {"out": str(tmp_path / "run"), "steps": 2, "log_every": 1, "eval_every": 100, "save_every": 100, "precision": "no",
                "processes": 1},
        "mixture": {"datasets": [{"path": str(root)}, {"path": str(other)}], "cache_dir": str(tmp_path / "cache"), "holdout": 0},
        "policy": {"backbone": backbone, "normalization": {"action": "bounds", "state": "bounds"}},
        "optim": {"batch": 4, "warmup": 1},
    }  # fmt: skip
    train(validate(values, TrainConfig, "test"))
    assert json.loads((tmp_path / "run/STATUS.json").read_text())["state"] == "finished"
