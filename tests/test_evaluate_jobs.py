"""Which episodes each condition plays, and what the replay control plays."""

from __future__ import annotations

import json

import fake_sims
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_sims import CONDITIONS, FakePolicy
from hypothesis import given
from hypothesis import strategies as st

from vla.embodiment import load_embodiment
from vla.errors import DataError
from vla.evaluate.demos import demos_of
from vla.evaluate.jobs import Demo, Demos, make_jobs, pick_demo
from vla.evaluate.worker import standstill


def test_episodes_are_dealt_round_robin_and_paired():
    suite = fake_sims.SUITES["fake"]
    demos = Demos({t: [Demo(np.zeros((3, 4)), s) for s in (100, 101)] for t in suite.tasks})
    jobs, notes = make_jobs(FakePolicy(), suite, suite.tasks, 10, 100, CONDITIONS, demos)
    assert notes == []
    fresh = {c: [(j.task, j.seed) for j in jobs if j.condition == c] for c in CONDITIONS}
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
    picked = pick_demo(Demos({"t": [Demo(np.full((2, 4), s, np.float32), s) for s in recorded]}), "t", seed, turn)
    if set(recorded) <= {seed}:
        assert picked is None
    else:
        assert picked is not None and picked[0, 0] != seed and picked[0, 0] in recorded


def test_after_a_replay_the_robot_stands_still():
    spec = load_embodiment("tabletop")
    assert standstill(spec, np.array([1, -1, 0.5, 0.7])).tolist() == pytest.approx([0, 0, 0, 0.7])


def test_notes_name_a_few_tasks_and_count_the_rest():
    suite = fake_sims.SUITES["fake"]
    policy = FakePolicy(instructions=("reach nothing",))
    _, notes = make_jobs(policy, suite, [f"reach-{i}" for i in range(7)], 7, 100, ("policy",), None)
    assert notes == ["the policy was not trained on the instruction of reach-0, reach-1, reach-2, reach-3 and 3 more"]


ACTIONS = np.arange(20, dtype=np.float32).reshape(5, 4)


@pytest.fixture()
def dataset(tmp_path):
    """A recorded dataset: episodes of 2 and 3 steps, the second without a seed."""
    root = tmp_path / "set"
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    episodes = [{"episode_index": 0, "task": "reach-red", "seed": 70}, {"episode_index": 1, "task": "reach-red", "seed": None}]
    (root / "meta/recording.json").write_text(json.dumps({"episodes": episodes}))
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(ACTIONS.ravel()), 4)
    pq.write_table(pa.table({"episode_index": [0, 0, 1, 1, 1], "action": fixed}), root / "data/chunk-000/file-000.parquet")
    return root


@pytest.mark.parametrize("form", [pa.list_(pa.float32(), 4), pa.list_(pa.float64())])
def test_demonstrations_are_read_from_the_policys_datasets(dataset, form):
    file = dataset / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(1, "action", table["action"].cast(form)), file)
    demos = demos_of([str(dataset), dataset])
    assert [(len(d.actions), d.seed) for d in demos.by_task["reach-red"]] == [(2, 70), (3, None)]
    np.testing.assert_array_equal(demos.by_task["reach-red"][1].actions, ACTIONS[2:])
    assert demos.by_task["reach-red"][1].actions.dtype == np.float32 and demos.lacking == []
    assert pick_demo(demos, "reach-red", 70, 0) is demos.by_task["reach-red"][1].actions, "another scene, as far as is known"


def test_datasets_that_give_nothing_are_named(dataset, tmp_path):
    (tmp_path / "foreign/meta").mkdir(parents=True)
    demos = demos_of([dataset, tmp_path / "gone", tmp_path / "foreign"])
    assert list(demos.by_task) == ["reach-red"]
    assert [reason.split(":")[0] for reason in demos.lacking] == [str(tmp_path / "gone"), str(tmp_path / "foreign")]
    assert demos_of([]).lacking == ["the policy names no dataset"]


@pytest.mark.parametrize("damage", ["recording", "parquet", "null"])
def test_a_damaged_dataset_is_an_error(dataset, damage):
    file = dataset / "data/chunk-000/file-000.parquet"
    match damage:
        case "recording":
            (dataset / "meta/recording.json").write_text('{"episodes": [{"task": ')
        case "parquet":
            file.write_bytes(file.read_bytes()[:100])
        case "null":
            rows = [*ACTIONS[:4].tolist(), None]
            pq.write_table(pa.table({"episode_index": [0, 0, 1, 1, 1], "action": rows}), file)
    with pytest.raises(DataError, match="copy that file again"):
        demos_of([dataset])
