"""What a guard was asked and what it answered is on record, and comes out the same when it is judged again."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from children import LIMIT
from edge_folder import look
from test_guard import ARM, JUMP, POSE, TABLE

from serve.audit import AuditLog, check, read, replay, same
from serve.bounds import Unread
from serve.guard import Guard
from serve.loop import ControlLoop, Hurried
from vla.errors import DataError, MachineError, UsageError

STRANGE = (None, "left", {}, [[]], np.zeros((2, 3)), np.full((4, 7), np.nan), [[10**400] * 7], Unread("nothing came"), b"\0")
CLEAN = {"differing": 0, "skipped": 0, "lost": 0, "torn": 0, "unreadable": 0, "first_difference": None}


def arm_guard(**kw) -> Guard:
    return Guard(ARM, **{"jump": JUMP, "repeats": 2, "deadline": 0.1, "most_holds": 6, "window": 9, "confidence": 0.3, **kw})


def wander(guard: Guard, rng: np.random.Generator, events: int) -> list:
    """A session of everything a guard may be asked; the answers it gave."""
    answers, last = [], np.array([0.2, -0.2, 0, 0, 0.1, 0, 0.5], np.float32)

    def one(of):
        return of[rng.integers(len(of))]

    for _ in range(events):
        kind, late = rng.integers(12), float(one([0.0, 0.01, 0.02, 0.03, np.nan, np.inf, np.float32(0.05), 7]))
        sure = one([None, np.nan, 0.7, rng.random((3, 7)), np.float32(0.1), "sure"])
        walk = last + np.cumsum(rng.uniform(-0.1, 0.1, (rng.integers(1, 6), 7)), 0)
        walk = walk.clip(guard.low, guard.high).astype(np.float32)
        if kind == 0:
            answers.append(guard.reset())
        elif kind == 1:
            answers.append(guard.resume())
        elif kind < 6:
            state = last[:5] + one([0, 1]) * rng.normal(0, 0.01, 5).astype(np.float32)
            seen = {"images": {}, "state": state}
            if rng.random() < 0.1:
                seen = one([{"images": {}}, {"images": {}, "state": np.full(5, np.inf)}, "nothing"])
            answers.append(guard.saw(seen, one([0.0, 0.1, 0.2, 0.3, 2.0, np.nan, np.inf]), one([None, None, 0, 2, 10**400, -1])))
        elif kind == 6:
            answers.append(guard.said(one([walk, walk, walk, np.zeros((2, 2)), np.float32(1), one(STRANGE)])))
        elif kind < 9:
            given = walk[0] if rng.random() < 0.8 else one(STRANGE)
            why = one(["", "", "", "policy: bröken \ud800"])
            answers.append(guard.judge(given, confidence=sure, late=late, why=why))
        else:
            given = walk if rng.random() < 0.8 else one(STRANGE)
            answers.append(guard.chunk(given, sure, late=late))
            last = answers[-1].actions[-1].copy()
    return answers


def told(answer) -> object:
    """An answer without its arrays' identities."""
    return answer if answer is None or isinstance(answer, str) else {
        name: value.tobytes() if isinstance(value, np.ndarray) else value for name, value in vars(answer).items()
    }  # fmt: skip


def lines(folder: Path) -> list[dict]:
    return list(read(folder))


# --- replay ----------------------------------------------------------------------------------------------------------


def test_a_session_of_everything_comes_out_the_same_to_the_byte(tmp_path: Path):
    guard = arm_guard()
    with AuditLog(tmp_path / "log") as log:
        assert log.watch(guard, "one", policy="a1b2") == "one"
        answers = wander(guard, np.random.default_rng(0), 1500)
    again = [answer for event, answer in replay(tmp_path / "log") if event["do"] not in ("open", "reset", "resume")]
    assert [told(a) for a in again] == [told(a) for a in answers if a is not None]
    summary = check(tmp_path / "log")
    assert summary == {**summary, **CLEAN, "sessions": 1, "files": 1, "compared": len(again), "events": 1502}
    kinds = Counter(type(a).__name__ + ("" if isinstance(a, str | None) else " held" * a.hold) for a in answers)
    assert {"str", "NoneType", "Verdict", "Verdict held", "ChunkVerdict", "ChunkVerdict held"} == set(kinds)
    assert min(kinds.values()) > 20 and any(getattr(a, "needs_help", "") for a in answers)


def test_sessions_of_several_robots_interleaved_and_settings_changed_meanwhile(tmp_path: Path):
    with AuditLog(tmp_path) as log:
        posed = Guard(POSE, jump={"turn": 0.3, "hand": 0.05}, first_jump=2.0)
        guards = [arm_guard(), Guard(TABLE, repeats=None), posed, arm_guard()]
        for name, guard in zip("abca", guards, strict=True):  # one session may have several robots, or the same again
            log.watch(guard, name)
        for i in range(60):
            wander(guards[0], np.random.default_rng(i), 5)
            guards[1].saw(look(i))
            guards[1].deadline = 0.1 * (1 + i // 20) if i % 3 else np.float64("inf")  # a control loop gives a guard its deadline
            guards[1].judge(np.full(4, 0.1 * i - 1), late=0.15)
            guards[2].saw({"images": {}, "state": np.array([0, 0, 0, 0, 0, 0, 1], np.float32)}, executed=i % 3)
            guards[2].chunk([[0.5, 0, 0, 0, 1, 0.01 * i, 0, 0]] * 4)
            wander(guards[3], np.random.default_rng(100 + i), 2)
            log.note("weather", "b", wind=float("nan"), policy="a1b2")
    summary = check(tmp_path)
    assert summary == {**summary, **CLEAN, "sessions": 3} and summary["compared"] > 500
    assert len({(e["session"], e.get("guard")) for e in lines(tmp_path) if e["do"] == "open"}) == 4


def test_a_control_loop_on_record(tmp_path: Path):
    class Policy:
        def act(self, observation, instruction, robot=None):
            class Chunk:
                actions = np.full((4, 4), 0.25, np.float32)
                confidence = np.full((4, 4), np.nan, np.float32)

            return Chunk

        def steps(self, robot):
            return 4, 2

    class Body:
        def observe(self):
            return look(3)

        def act(self, action):
            return None

    guard = Guard(TABLE, repeats=None)
    with AuditLog(tmp_path) as log:
        log.watch(guard)
        report = ControlLoop(Policy(), Body(), guard.robot.control_hz, guard, clock=Hurried()).run("go", steps=40)
    assert report.ticks == 40 and not report.holds
    summary = check(tmp_path)
    assert summary == {**summary, **CLEAN} and [e["do"] for e in lines(tmp_path)].count("judge") == 41


def test_neither_pictures_nor_anything_but_their_sum_is_written(tmp_path: Path):
    guard = Guard(TABLE)
    with AuditLog(tmp_path) as log:
        log.watch(guard)
        guard.saw(look(5))
    (event,) = [e for e in lines(tmp_path) if e["do"] == "saw"]
    told = {"problem", "glance", "whole", "state", "age", "executed", "says"}
    assert set(event) == {"n", "t", "session", "guard", "i", "do", *told}
    sums = event["glance"], event["whole"]
    assert guard.see(look(5)).again(*sums) and not guard.see(look(6)).again(*sums)


def test_logs_of_before_there_were_glances_are_judged_again(tmp_path: Path):
    guard = Guard(TABLE, repeats=0)
    with AuditLog(tmp_path) as log:
        log.watch(guard)
        said = [guard.saw(look(n))[:8] for n in (5, 6, 6, 7)]
    assert said == ["", "", "repeated", ""] and check(tmp_path) == {**check(tmp_path), **CLEAN}
    (file,) = tmp_path.glob("*.jsonl")
    told = [json.loads(line) for line in file.read_text().splitlines()]
    for event in told:
        if event["do"] == "saw":
            event["digest"] = event.pop("whole")
            del event["glance"]
    file.write_text("".join(json.dumps(event) + "\n" for event in told))
    assert check(tmp_path) == {**check(tmp_path), **CLEAN}


# --- the files -------------------------------------------------------------------------------------------------------


def test_files_are_the_owners_numbered_and_of_one_size(tmp_path: Path):
    folder, guard = tmp_path / "a" / "log", arm_guard()
    with AuditLog(folder, max_bytes=20_000) as log:
        log.watch(guard)
        wander(guard, np.random.default_rng(1), 400)
    names = sorted(p.name for p in folder.iterdir())
    assert names == [f"audit-{i + 1:06d}.jsonl" for i in range(len(names))] and len(names) > 5
    assert all(stat.S_IMODE((folder / name).stat().st_mode) == 0o600 for name in names)
    assert all(20_000 <= (folder / name).stat().st_size < 25_000 for name in names[:-1])
    events = lines(folder)
    assert [e["n"] for e in events] == list(range(1, len(events) + 1)) and events[0]["t"] <= events[-1]["t"]
    assert [e["do"] for e in events].count("open") == len(names)  # each file can be read without those before
    with AuditLog(folder) as log:  # another process goes on counting, in a file of its own
        log.watch(arm_guard(), "later")
    assert [e["n"] for e in lines(folder)] == list(range(1, len(events) + 3))
    assert len(list(folder.iterdir())) == len(names) + 1
    summary = check(folder)
    assert summary == {**summary, **CLEAN, "sessions": 2}


def test_with_old_files_deleted_the_rest_is_judged_from_the_next_reset_on(tmp_path: Path):
    guard = arm_guard()
    with AuditLog(tmp_path, max_bytes=20_000, keep=3) as log:
        log.watch(guard)
        wander(guard, np.random.default_rng(2), 500)
    for thread in threading.enumerate():
        if thread.name == "audit":
            thread.join()
    assert len(list(tmp_path.iterdir())) == 3
    summary = check(tmp_path)
    assert summary == {**summary, **CLEAN, "skipped": summary["skipped"]} and summary["compared"] > 30 and summary["skipped"] > 0
    events = lines(tmp_path)
    reset = next(i for i, e in enumerate(events) if e["do"] == "reset")
    asked = [e for e in events[:reset] if e["do"] not in ("open", "set")]
    assert summary["skipped"] == len(asked)


def test_a_crash_in_the_middle_of_a_line_costs_that_line(tmp_path: Path):
    guard = arm_guard()
    with AuditLog(tmp_path) as log:
        log.watch(guard)
        wander(guard, np.random.default_rng(3), 200)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    before = check(tmp_path)
    for cut in (1, 2, 40):
        path.write_bytes(whole[:-cut])
        summary = check(tmp_path)
        fewer = int(cut > 1)
        assert summary == {**before, "torn": fewer, "events": before["events"] - fewer, "compared": summary["compared"]}
        assert summary["compared"] >= before["compared"] - fewer
    with AuditLog(tmp_path) as log:  # what comes after a torn line is not glued to it
        second = arm_guard()
        log.watch(second)
        wander(second, np.random.default_rng(4), 50)
    summary = check(tmp_path)
    assert summary == {**summary, **CLEAN, "torn": 1, "files": 2}


def test_events_missing_are_counted_and_judging_goes_on_at_the_next_reset(tmp_path: Path):
    guard = arm_guard()
    with AuditLog(tmp_path) as log:
        log.watch(guard)
        wander(guard, np.random.default_rng(5), 100)
        guard.reset()
        wander(guard, np.random.default_rng(6), 20)
    (path,) = tmp_path.iterdir()
    every = path.read_text().splitlines(keepends=True)
    path.write_text("".join(every[:50] + every[53:]))
    summary = check(tmp_path)
    assert summary == {**summary, **CLEAN, "lost": 3, "skipped": summary["skipped"]} and summary["skipped"] > 0
    spoilt = [json.loads(line) for line in every]
    spoilt[60] = {**spoilt[60], "i": "x"}
    at = next(i for i, e in enumerate(spoilt) if e["do"] == "chunk" and i < 60)
    spoilt[at]["sent"] = "AAAA" + spoilt[at]["sent"][4:]
    path.write_text("".join(json.dumps(e) + "\n" for e in spoilt) + "[]\n17\n\n\x00\n" + "[" * 100_000 + "\n")
    summary = check(tmp_path)
    assert summary["differing"] == 1 and summary["first_difference"] == spoilt[at]["n"] and summary["torn"] == 4
    assert summary["unreadable"] == 1 and spoilt[-1]["n"] in [e["n"] for e, answer in replay(tmp_path) if answer is not None]


def test_no_log_is_no_clean_log(tmp_path: Path):
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="no audit"):
        check(tmp_path)
    with pytest.raises(UsageError, match="keep 0"):
        AuditLog(tmp_path, keep=0)


# --- where nothing can be written ------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_stops_no_robot_and_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Full, then free again: what was lost is counted, and what comes after a reset can be judged again."""
    plain, guard = arm_guard(), arm_guard()
    log = AuditLog(tmp_path)
    log.watch(guard)
    wander(guard, np.random.default_rng(7), 30)
    real, full = log._file, os.open("/dev/full", os.O_WRONLY)
    with caplog.at_level(logging.WARNING):
        log._file = full
        plain.reset()
        lost = [told(a) for a in wander(guard, np.random.default_rng(8), 40)]
        guard.reset()
    assert log.dropped == 41 and len(caplog.records) == 1 and "No space left" in caplog.text
    assert len(lost) == 40
    os.close(full)
    log._file = real
    wander(guard, np.random.default_rng(9), 10)
    guard.reset()
    after = [told(a) for a in wander(guard, np.random.default_rng(9), 60)]
    log.close()
    plain.reset()
    assert after == [told(a) for a in wander(plain, np.random.default_rng(9), 60)]  # watched or not, a guard is the same
    summary = check(tmp_path)
    assert summary["lost"] == 41 and summary["differing"] == summary["torn"] == 0 and summary["compared"] > 50


def test_a_folder_that_cannot_be_made_stops_no_robot_either(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("")
    guard = arm_guard()
    with caplog.at_level(logging.WARNING), AuditLog(tmp_path / "file" / "log") as log:
        log.watch(guard)
        wander(guard, np.random.default_rng(0), 20)
    assert log.dropped == 21 and len(caplog.records) == 1
    with pytest.raises(MachineError, match="a folder that can be written"):
        AuditLog(tmp_path / "file" / "log", strict=True).watch(guard)
    closed = AuditLog(tmp_path / "log")
    closed.watch(guard)
    closed.close()
    guard.reset()
    assert closed.dropped == 1


LIMITED = """
import resource, sys
import numpy as np
from test_guard import ARM, JUMP, POSE, TABLE

from serve.audit import AuditLog
from serve.guard import Guard
from test_guard import TABLE
from edge_folder import look
from vla.errors import MachineError

resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
guard, log = Guard(TABLE, repeats=None), AuditLog(sys.argv[1], strict=sys.argv[2] == "strict")
log.watch(guard)
try:
    for i in range(150):
        guard.saw(look(i))
        assert not guard.chunk(np.full((8, 4), 0.1)).hold
except MachineError as error:
    print("stopped", error.found)
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # room again
    guard.reset()
    guard.saw(look(1))
    guard.chunk(np.full((8, 4), 0.1))
    print(log.dropped)
"""


@pytest.mark.parametrize("mode", ["going", "strict"])
def test_a_line_the_kernel_cuts_short(tmp_path: Path, mode: str):
    """A real limit of the kernel, which takes a part of a line and refuses the next."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "log"), mode]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    summary = check(tmp_path / "log")
    assert summary["torn"] == 1 and summary["differing"] == summary["unreadable"] == 0 and summary["compared"] > 20
    if mode == "strict":
        assert done.stdout.startswith("stopped") and "every line before is intact" in done.stdout
    else:
        assert int(done.stdout) > 100 and summary["lost"] == int(done.stdout)
        assert [e["do"] for e in lines(tmp_path / "log")][-4:] == ["open", "reset", "saw", "chunk"]


def test_same_compares_every_part_of_an_answer(tmp_path: Path):
    guard = arm_guard()
    with AuditLog(tmp_path) as log:
        log.watch(guard)
        guard.saw({"images": {}, "state": np.zeros(5, np.float32)})
        verdict = guard.chunk(np.zeros((2, 7)))
    event = lines(tmp_path)[-1]
    assert same(event, verdict)
    for name, other in (("sent", "AAAA"), ("hold", True), ("reason", "x"), ("needs_help", "x"), ("placed", False)):
        assert not same({**event, name: other}, verdict)
    shutil.rmtree(tmp_path)
