"""Closed-loop evaluation: intervals, which episodes each control plays, and what each control would reveal."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from types import SimpleNamespace

import fake_sims
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.embodiment import load_embodiment
from vla.errors import MachineError, UsageError
from vla.evaluate import SimulatorPool, evaluate, text_table, wilson
from vla.evaluate.command import add_eval_parser, run_folder
from vla.evaluate.demos import demos_of, roots_in
from vla.evaluate.jobs import Demo, make_jobs, pick_demo
from vla.evaluate.worker import encode_clip, standstill
from vla.report.lines import lines_of, percent

ALL = ("policy", "train", "swap", "blank", "nostate", "replay", "random", "expert")


class FakePolicy:
    """Goes to the colour it is told, found in the picture; `blind` always goes to the middle, `deaf` always to red."""

    def __init__(self, kind: str = "honest", instructions: tuple[str, ...] | None = None) -> None:
        self.kind = kind
        self.embodiments = {"tabletop": load_embodiment("tabletop")}
        self.chunk, self.execute, self.image_size, self.fingerprint = 8, 4, 64, "f" * 64
        self.recorded_seeds = {s: {t: [[0, 9], [20, 29]] for t in fake_sims.TASKS} for s in ("fake", "lone")}
        self.instructions = list(instructions if instructions is not None else (f"reach {c}" for c in fake_sims.COLOURS))
        self.batches: list[int] = []
        self.saw: list[tuple] = []

    def act_batch(self, observations, instructions, embodiment, *, decode=None, seeds=None, drop_state=False):
        assert seeds is not None and len(observations) == len(instructions) == len(seeds)
        self.batches.append(len(observations))
        chunks = []
        for observation, instruction, seed in zip(observations, instructions, seeds, strict=True):
            picture = observation["images"]["front"]
            grey = bool((picture == 127).all())
            self.saw.append((seed, instruction, grey, drop_state))
            colour = "red" if self.kind == "deaf" else instruction.removeprefix("reach ")
            x = 0.0 if self.kind == "blind" or grey else (int(picture[0, fake_sims.COLOURS.index(colour), 0]) - 127) / 500
            at, actions = np.array(observation["state"][:2], np.float64), []
            for _ in range(self.chunk):
                actions.append(fake_sims.go_to(x, at))
                at = at + 0.02 * actions[-1][:2]
            rows = np.stack(actions)
            chunks.append(SimpleNamespace(actions=rows, confidence=np.full(rows.shape, 0.5, np.float32),
                                          symbols=((rows + 1) * 127).astype(int).ravel()))  # fmt: skip
        return chunks


@pytest.fixture(scope="module")
def pool():
    import os
    import sys

    sys.path.insert(0, os.path.dirname(__file__))  # the processes inherit sys.path and import fake_sims from it
    with SimulatorPool(2, "fake_sims") as running:
        yield running
    sys.path.remove(os.path.dirname(__file__))


def run(policy, pool, conditions=ALL, suite="fake", episodes=30, **kw):
    kw.setdefault("demos", {t: [np.ones((12, 4), np.float32) * 0.5] for t in fake_sims.TASKS})
    return evaluate(policy, suite, episodes=episodes, conditions=conditions, pool=pool, sims="fake_sims", progress=False, **kw)


def row(results, condition, group="reach"):
    return next(r for r in results["rows"] if (r["condition"], r["group"]) == (condition, group))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_published_values(successes, n, low, high):
    # R. G. Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_are_where_the_score_test_rejects(pair):
    successes, n = pair
    for bound in wilson(successes, n):
        assert (successes / n - bound) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / n, abs=1e-9)


@given(st.integers(0, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_is_symmetric(pair):
    successes, n = pair
    low, high = wilson(successes, n)
    assert 0 <= low <= (successes / n if n else 0.5) <= high <= 1
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_refuses_nonsense():
    with pytest.raises(ValueError):
        wilson(3, 2)


def test_an_honest_policy_does_the_given_and_never_the_original(pool):
    policy = FakePolicy()
    results = run(policy, pool)
    assert row(results, "policy")["rate"] == 1.0 and row(results, "expert")["rate"] == 1.0
    assert row(results, "swap")["rate"] == 1.0 and row(results, "swap")["original"]["successes"] == 0
    assert row(results, "train")["rate"] == 1.0 and row(results, "nostate")["rate"] == 1.0
    assert row(results, "blank")["rate"] < 0.7  # it walks straight on; one scene in three is won by chance
    assert row(results, "policy")["mean_steps"] == row(results, "expert")["mean_steps"]
    assert {r["condition"] for r in results["rows"]} == set(ALL)
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
    assert alone["rows"] == [] and "knows no other instruction" in alone["notes"][0]
    assert "note: swap" in text_table(alone)


def test_episodes_are_dealt_round_robin_and_paired():
    suite = fake_sims.SUITES["fake"]
    demos = {t: [Demo(np.zeros((3, 4)), s) for s in (100, 101)] for t in suite.tasks}
    jobs, notes = make_jobs(FakePolicy(), suite, suite.tasks, 10, 100, ALL, demos)
    assert notes == []
    fresh = {c: [(j.task, j.seed) for j in jobs if j.condition == c] for c in ALL}
    assert fresh["policy"] == [(suite.tasks[i % 3], 100 + i) for i in range(10)]
    for condition in ("swap", "blank", "nostate", "replay", "random", "expert"):
        assert fresh[condition] == fresh["policy"], condition
    assert {seed for _, seed in fresh["train"]} <= {*range(10), *range(20, 30)} and len(set(fresh["train"])) == 10
    for job in (j for j in jobs if j.condition == "swap"):
        assert job.given and job.given != job.task and job.instruction == suite.instruction(job.given)
    assert {j.given for j in jobs if j.task == "reach-red" and j.given} == {"reach-green", "reach-blue"}


def test_swapping_changes_one_word_of_a_tabletop_task():
    from vla.sims.suites import SUITES

    suite = SUITES["tabletop"]
    jobs, _ = make_jobs(FakePolicy(instructions=()), suite, ["push-red-left"], 10, 900_000, ("swap",), None)
    assert {j.given for j in jobs} == {
        "push-green-left", "push-blue-left", "push-yellow-left", "push-red-right", "push-red-away"
    }  # fmt: skip


@given(st.integers(0, 20), st.integers(0, 40), st.lists(st.integers(0, 20), max_size=6))
def test_replay_never_uses_the_same_scene(seed, turn, recorded):
    demos = {"t": [Demo(np.full((2, 4), s, np.float32), s) for s in recorded]}
    picked = pick_demo(demos, "t", seed, turn)
    if set(recorded) <= {seed}:
        assert picked is None
    else:
        assert picked is not None and picked[0, 0] != seed and picked[0, 0] in recorded
    called = pick_demo(lambda task: demos["t"], "t", seed, turn)
    assert (called is None) == (picked is None) and (called is None or picked is None or np.array_equal(called, picked))


def test_replay_without_demonstrations_is_said_not_skipped(pool):
    results = run(FakePolicy(), pool, ("policy", "replay"), episodes=3, demos=None)
    assert [r["condition"] for r in results["rows"]] == ["policy"]
    assert all("no recorded demonstration" in note for note in results["notes"]) and results["notes"]


def test_after_a_replay_the_robot_stands_still():
    spec = load_embodiment("tabletop")
    assert standstill(spec, np.array([1, -1, 0.5, 0.7])).tolist() == pytest.approx([0, 0, 0, 0.7])


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
    assert {t["task"] for t in first["per_task"]} == set(fake_sims.TASKS)
    assert sum(t["successes"] for t in first["per_task"]) == row(first, "policy")["successes"]
    assert first["cpu_s"] > 0 and first["versions"]["python"]


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


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [("die", MachineError, "goodbye"), ("refuse", MachineError, "libegl1"), ("bug", RuntimeError, "ZeroDivisionError")],
)
def test_a_failing_simulator_process_is_reported(pool, monkeypatch, how, error, says):
    monkeypatch.setenv("FAKE_SIM", how)
    with pytest.raises(error, match=says):
        evaluate(FakePolicy(), "fake", episodes=2, conditions=("policy",), workers=1, progress=False, sims="fake_sims")


def test_text_table_has_every_line(pool):
    results = run(FakePolicy(), pool)
    text = text_table(results)
    for label in (
        "policy",
        "swap: does the given",
        "swap: does the original",
        "expert",
        "0/30    0 [0, 11]",
        "30/30  100 [89, 100]",
    ):
        assert label in text
    assert [label for label, _ in lines_of(results["rows"])][0] == "policy"
    many = {**results, "rows": [{**row(results, "policy"), "group": f"task-{i}"} for i in range(7)]}
    assert text_table(many).count("task-") == 7


def test_command_line():
    parser = argparse.ArgumentParser()
    add_eval_parser(parser.add_subparsers())
    args = parser.parse_args("eval runs/x --suite tabletop --task push lift --task touch --episodes 9 --out o.json".split())
    assert args.task == ["push", "lift", "touch"] and args.out == Path("o.json") and args.seed == 900_000 and args.run


def test_help_has_an_example(capsys):
    parser = argparse.ArgumentParser()
    add_eval_parser(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["eval", "--help"])
    said = capsys.readouterr().out
    assert "vla eval runs/demo --suite tabletop" in said and "Wilson 95 % intervals" in " ".join(said.split())


def test_run_folder_is_recognised(tmp_path):
    (tmp_path / "run/policy").mkdir(parents=True)
    assert run_folder(tmp_path / "run") == tmp_path / "run" and run_folder(tmp_path / "run/policy") is None
    (tmp_path / "run/config.yaml").write_text("{}")
    assert run_folder(tmp_path / "run/policy") == tmp_path / "run"


def test_demonstrations_come_from_the_runs_datasets(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path / "set"
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    episodes = [{"episode_index": i, "task": "reach-red", "seed": 70 + i} for i in range(2)]
    (root / "meta/recording.json").write_text(json.dumps({"episodes": episodes}))
    actions = np.arange(20, dtype=np.float32).reshape(5, 4)
    pq.write_table(
        pa.table({"episode_index": [0, 0, 1, 1, 1], "action": list(actions)}), root / "data/chunk-000/file-000.parquet"
    )
    config = tmp_path / "config.yaml"
    config.write_text(f"data:\n  datasets:\n  - {{path: {root}, weight: 1}}\n  - {{path: {tmp_path}/gone}}\n")
    assert roots_in(config) == [root] and roots_in(tmp_path / "none.yaml") == []
    demos = demos_of(roots_in(config))
    assert [(len(d.actions), d.seed) for d in demos("reach-red")] == [(2, 70), (3, 71)] and demos("reach-blue") == []
    np.testing.assert_array_equal(demos("reach-red")[1].actions, actions[2:])


def test_percent_never_claims_all_or_nothing_falsely():
    assert [percent(n / 200) for n in (0, 1, 195, 199, 200)] == ["0", "0.5", "98", "99.5", "100"]


# ---------------------------------------------------------------------------------------------- the real simulators


@pytest.fixture(scope="module")
def tabletop():
    pytest.importorskip("mujoco")
    with SimulatorPool(2) as running:
        yield running


class Still(FakePolicy):
    """Knows the tabletop's sentences and does nothing, deterministically."""

    def __init__(self) -> None:
        super().__init__()
        from vla.sims.suites import SUITES

        self.instructions = [SUITES["tabletop"].instruction(t) for t in SUITES["tabletop"].tasks]
        self.recorded_seeds = {}

    def act_batch(self, observations, instructions, embodiment, *, decode=None, seeds=None, drop_state=False):
        for observation in observations:
            self.embodiments[embodiment].check_observation(observation, "shown to the policy")
        zeros = np.zeros((self.chunk, 4), np.float32)
        return [SimpleNamespace(actions=zeros, confidence=zeros, symbols=zeros.astype(int)) for _ in observations]


def test_real_tabletop(tabletop, tmp_path):
    results = evaluate(
        Still(), "tabletop", episodes=8, conditions=("policy", "swap", "blank", "random", "expert"), pool=tabletop,
        progress=False, out=tmp_path / "tabletop.json", clips=2,
    )  # fmt: skip
    for group in ("touch", "push", "lift"):
        assert row(results, "expert", group)["rate"] == 1.0
        assert 4 < row(results, "expert", group)["mean_steps"] < 30
        assert row(results, "policy", group)["failures"] == {"failure": 0, "timeout": 8}
        assert row(results, "swap", group)["original"]["successes"] == row(results, "blank", group)["successes"] == 0
        assert row(results, "random", group)["rate"] <= 0.5
    assert len(results["clips"]) == 2 and all((tmp_path / c["file"]).stat().st_size > 1000 for c in results["clips"])


def test_the_expert_on_the_swapped_task_is_a_failure_of_the_original(tabletop):
    """The real judges: doing the given thing is never counted as the originally named one."""
    from vla.evaluate.jobs import Job
    from vla.evaluate.pool import run_jobs

    count = tabletop.open("tabletop", 64, 8, 1)
    pairs = [("lift-red", "lift-blue"), ("touch-red", "touch-blue"), ("push-red-left", "push-red-right")]
    jobs = [
        Job(i, "swap", task[:4], task, 900_000 + i, "", given=given, controller="expert") for i, (task, given) in enumerate(pairs)
    ]
    outcomes, _ = run_jobs(tabletop, count, Still(), "tabletop", jobs, execute=4, decode=None, width=4)
    assert [(o.success, o.original) for o in outcomes.values()] == [(True, False)] * 3
