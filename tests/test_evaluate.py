"""Closed-loop evaluation: what each control would reveal, what is refused, what is written."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from fake_sims import CONDITIONS, TASKS, FakePolicy, fake_pool, row, run

from vla.embodiment import load_embodiment
from vla.errors import MachineError, UsageError
from vla.evaluate import evaluate, text_table
from vla.evaluate.jobs import Demos
from vla.evaluate.worker import encode_clip


@pytest.fixture(scope="module")
def pool():
    with fake_pool() as running:
        yield running


def test_an_honest_policy_does_the_given_and_never_the_original(pool):
    policy = FakePolicy()
    results = run(policy, pool)
    assert row(results, "policy")["rate"] == 1.0 and row(results, "expert")["rate"] == 1.0
    assert row(results, "swap")["rate"] == 1.0 and row(results, "swap")["original"]["successes"] == 0
    assert row(results, "train")["rate"] == 1.0 and row(results, "nostate")["rate"] == 1.0
    assert row(results, "blank")["rate"] < 0.7  # it walks straight on; one scene in three is won by chance
    assert row(results, "policy")["mean_steps"] == row(results, "expert")["mean_steps"]
    assert {r["condition"] for r in results["rows"]} == set(CONDITIONS)
    assert all(r["n"] == 30 for r in results["rows"] if r["condition"] != "train")
    assert max(policy.batches) > 4, "inference must be batched over episodes"
    assert any(grey for _, _, grey, _ in policy.saw) and any(drop for *_, drop in policy.saw)


def test_a_blind_policy_is_no_better_with_the_image(pool):
    results = run(FakePolicy("blind"), pool, ("policy", "blank"))
    seeing, blank = row(results, "policy"), row(results, "blank")
    assert seeing["successes"] == blank["successes"] > 0
    wins = {c: [r["success"] for r in results["records"] if r["condition"] == c] for c in ("policy", "blank")}
    assert wins["policy"] == wins["blank"], "the same seeds in the same order: rows are paired"


def test_a_deaf_policy_is_caught_by_the_swap(pool):
    results = run(FakePolicy("deaf"), pool, ("policy", "swap"))
    # It goes to red whatever it is told. One scene in three was drawn for red: there it does the *original*, although
    # the given task had definitely failed earlier, so the episode must have been played on.
    swap = row(results, "swap")
    red = [r for r in results["records"] if r["condition"] == "swap" and r["task"] == "reach-red"]
    assert swap["original"]["successes"] == len(red) == 10
    assert all(r["original"] and r["failure"] and not r["success"] for r in red)
    assert row(results, "policy")["successes"] == 10 and row(results, "policy")["failures"] == {
        "failure": 20,
        "timeout": 0,
    }


def test_a_lone_task_is_told_another_instruction_and_judged_by_its_own(pool):
    results = run(FakePolicy(), pool, ("policy", "swap"), suite="lone", episodes=6)
    swap = row(results, "swap", "reach-red")
    assert swap["rate"] is None and swap["original"] == pytest.approx({**swap["original"], "successes": 0, "n": 6})
    assert {r["instruction"] for r in results["records"] if r["condition"] == "swap"} == {"reach green", "reach blue"}
    alone = run(FakePolicy(instructions=("reach red",)), pool, ("swap",), suite="lone", episodes=6)
    assert "no meaning in the scene of reach-red" in results["notes"][0], "the table says why one of the two lines is missing"
    assert alone["rows"] == [] and "knows no other instruction" in alone["notes"][0]
    assert "note: swap" in text_table(alone)


def test_replay_without_demonstrations_is_said_not_skipped(pool):
    results = run(FakePolicy(), pool, ("policy", "replay"), episodes=3, demos=None)
    assert [r["condition"] for r in results["rows"]] == ["policy"]
    said = "replay: no recorded demonstration of reach-red, reach-green, reach-blue"
    assert results["notes"] == [f"{said} (no dataset was given)"], "one note for all tasks"
    results = run(FakePolicy(), pool, ("replay",), episodes=3, demos=Demos({}, ["data/gone: no dataset there"]))
    assert results["notes"] == [f"{said} (data/gone: no dataset there)"]


@pytest.mark.parametrize(("seed", "refused"), [(0, True), (29, True), (15, True), (10, False), (30, False)])
def test_recorded_seeds_are_refused(pool, seed, refused):
    if not refused:
        assert run(FakePolicy(), pool, ("policy",), episodes=5, seed=seed)["seed"] == seed
        return
    with pytest.raises(UsageError) as error:
        run(FakePolicy(), pool, ("policy",), episodes=10, seed=seed)
    assert "reach-red" in error.value.found and "--seed 900000" in error.value.fix


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"conditions": ("policy", "swop")}, "did you mean 'swap'"),
        ({"execute": 9}, "1..8"),
        ({"episodes": 0}, "at least 1"),
    ],
)
def test_bad_arguments(pool, change, where):
    with pytest.raises(UsageError, match=where):
        run(FakePolicy(), pool, **change)


def test_another_robot_is_refused(pool):
    policy = FakePolicy()
    policy.embodiments = {"metaworld_sawyer": load_embodiment("metaworld_sawyer")}
    with pytest.raises(UsageError, match="metaworld_sawyer"):
        run(policy, pool)
    spec = load_embodiment("tabletop")
    policy.embodiments = {"tabletop": spec.model_copy(update={"control_hz": 20.0})}
    with pytest.raises(UsageError, match="control_hz"):
        run(policy, pool)
    cameras = {"front": spec.cameras["front"].model_copy(update={"height": 96, "width": 96})}
    policy.embodiments = {"tabletop": spec.model_copy(update={"cameras": cameras})}
    assert row(run(policy, pool, ("policy",), episodes=3), "policy")["n"] == 3, "another picture size is no other robot"


def test_results_are_written_whole_and_the_same_twice(pool, tmp_path):
    first, second = (run(FakePolicy(), pool, out=tmp_path / name / "fake.json", clips=4) for name in "ab")
    stored = json.loads((tmp_path / "a/fake.json").read_text())
    assert stored == json.loads(json.dumps(first)) and not list(tmp_path.glob("**/*.part"))
    assert [first[k] for k in ("rows", "records", "per_task")] == [second[k] for k in ("rows", "records", "per_task")]
    assert {t["task"] for t in first["per_task"]} == set(TASKS)
    assert sum(t["successes"] for t in first["per_task"]) == row(first, "policy")["successes"]
    assert first["cpu_s"] > 0 and first["versions"]["python"]


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [("die", MachineError, "goodbye"), ("refuse", MachineError, "libegl1"), ("bug", RuntimeError, "ZeroDivisionError")],
)
def test_a_failing_simulator_process_is_reported(pool, monkeypatch, how, error, says):
    monkeypatch.setenv("FAKE_SIM", how)
    with pytest.raises(error, match=says):
        evaluate(FakePolicy(), "fake", episodes=2, conditions=("policy",), workers=1, progress=False, sims="fake_sims")


def test_clips_play_and_carry_what_the_policy_did(pool, tmp_path):
    import av

    results = run(FakePolicy("blind"), pool, ("policy", "swap"), out=tmp_path / "eval" / "fake.json", clips=5)
    assert {c["success"] for c in results["clips"]} == {True, False} and len(results["clips"]) == 5
    for clip in results["clips"]:
        with av.open(str(tmp_path / "eval" / clip["file"])) as container:
            video = container.streams.video[0]
            assert (video.codec_context.name, video.codec_context.pix_fmt, video.width) == ("h264", "yuv420p", 240)
            assert len(list(container.decode(video=0))) > clip["steps"] / clip["stride"]
        assert np.shape(clip["actions"]) == np.shape(clip["confidence"]) == np.shape(clip["symbols"]) == (clip["steps"], 4)
        assert clip["decisions"][:2] == [0, 4] and clip["instruction"].startswith("reach ")
    again = run(FakePolicy("blind"), pool, ("policy",), out=tmp_path / "eval" / "fake.json", clips=1)
    assert len(list((tmp_path / "eval" / "fake-clips").iterdir())) == len(again["clips"]) == 1, "old films are removed"


def test_odd_pictures_still_make_a_playable_clip():
    import av

    with av.open(io.BytesIO(encode_clip([np.zeros((65, 67, 3), np.uint8)], 10))) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (66, 64)


def test_a_dead_process_is_a_machine_error_and_the_pool_starts_again():
    with fake_pool() as pool:
        assert row(run(FakePolicy(), pool, ("policy",), episodes=2), "policy")["n"] == 2
        for process in pool.processes:
            process.kill()
            process.wait(60)
        with pytest.raises(MachineError, match="it ended with status -9"):
            run(FakePolicy(), pool, ("policy",), episodes=2)
        assert row(run(FakePolicy(), pool, ("policy",), episodes=2), "policy")["n"] == 2


def test_the_decoder_that_was_used_is_written_down(pool):
    assert run(FakePolicy(), pool, ("policy",), episodes=1)["decode"] == "mean"
    assert run(FakePolicy(), pool, ("policy",), episodes=1, decode="argmax")["decode"] == "argmax"
