"""Subtasks named in a dataset: read where they begin, told to a policy, never crossed by a chunk."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_datasets import make_episode, small_spec, write_dataset

from vla.episodes import EpisodeStore
from vla.episodes.language import frame_of
from vla.errors import DataError
from vla.mixture import DatasetConfig, Mixture, MixtureConfig, open_mixture
from vla.policy.build import _provenance
from vla.recording import LeRobotWriter
from vla.recording.language import in_turn, narrate
from vla.schema import Said, Window

LENGTHS = (12, 9, 7)
PARTS = {0: ([0, 4, 8], ["touch it", "touch it", "done"]), 1: ([0, 5], ["push it", "touch it"]), 2: ([], [])}
"""Episode -> where its subtasks begin, and what they are; the last has none."""


def write(root: Path, parts=PARTS) -> None:
    with LeRobotWriter(root, small_spec(), language=True) as writer:
        for n, length in enumerate(LENGTHS):
            writer.add(replace(make_episode(n, length), instruction="the whole", language=narrate(in_turn(*parts[n]))))


@pytest.fixture()
def store(tmp_path: Path) -> EpisodeStore:
    write(tmp_path / "set")
    return EpisodeStore.open(tmp_path / "set", tmp_path / "cache", progress=False)


def test_segments_begin_where_they_are_said_to(store: EpisodeStore):
    assert store.segment_starts.tolist() == [0, 4, 8, 12, 17, 21, 28] and store.subtasks == ["touch it", "done", "push it"]
    assert store.subtask_of_segment.tolist() == [0, 0, 1, 2, 0, -1]
    assert store.stretches(np.array([0, 1])).tolist() == [12, 9]
    assert store.speaking("subtask").stretches(np.array([0, 2])).tolist() == [4, 4, 4, 7]


def test_what_is_told_and_where_it_ends(store: EpisodeStore):
    spoken = store.speaking("subtask")
    assert [spoken.told(at, 12) for at in (0, 3, 4, 11)] == [("touch it", 4), ("touch it", 4), ("touch it", 8), ("done", 12)]
    assert spoken.told(16, 21) == ("push it", 17) and spoken.told(22, 28) == ("the whole", 28), "nothing said: the whole"
    assert store.told(0, 12) == store.told(11, 12) == ("the whole", 12) and store.language == "task"
    assert sorted(spoken.sentences) == ["done", "push it", "the whole", "touch it"] and store.sentences == ["the whole"]
    twin = pickle.loads(pickle.dumps(spoken))  # noqa: S301  as it travels to a worker
    assert twin.told(5, 12) == ("touch it", 8) and twin.subtasks == store.subtasks


def test_a_chunk_ends_where_the_subtask_does(store: EpisodeStore):
    mixture = Mixture([store.speaking("subtask")], [1.0], 6, seed=0)
    for t in range(12):
        window = mixture.window_at(0, 0, t)
        count = min(6, 4 - t % 4)
        assert window.valid.sum(0).tolist() == [count] * 4 and not window.actions[count:].any()
        assert np.array_equal(window.actions[:count], store.action[t : t + count])
        assert np.array_equal(window.final_state, store.state[t // 4 * 4 + 3])
        assert window.instruction == ("done" if t >= 8 else "touch it")
    whole = Mixture([store], [1.0], 6, seed=0).window_at(0, 0, 2)
    assert whole.valid.all() and whole.instruction == "the whole"


def test_a_config_chooses_what_is_told(tmp_path: Path):
    write(tmp_path / "set")
    drawn = {}
    for language in ("task", "subtask", "both"):
        entry = DatasetConfig(path=str(tmp_path / "set"), language=language)
        config = MixtureConfig(datasets=[entry], holdout=0, cache_dir=str(tmp_path / "cache"))
        mixture, _ = open_mixture(config, 4, 0, progress=False)
        windows = [mixture.window(n) for n in range(400)]
        drawn[language] = [w.instruction for w in windows if isinstance(w, Window)]
        told = _provenance(mixture)
        assert told["instructions"] == sorted(set(drawn[language]))
    assert set(drawn["task"]) == {"the whole"} and set(drawn["subtask"]) == {"touch it", "push it", "done", "the whole"}
    assert 0.4 < np.mean([text == "the whole" for text in drawn["both"]]) - 0.5 * 7 / 28 < 0.6


def test_a_dataset_without_subtasks_says_how_to_get_them(tmp_path: Path):
    write_dataset(tmp_path / "plain")
    store = EpisodeStore.open(tmp_path / "plain", tmp_path / "cache", progress=False)
    assert store.subtasks == [] and np.array_equal(store.segment_starts, store.episode_starts)
    with pytest.raises(DataError, match="vla data segment"):
        store.speaking("subtask")
    config = MixtureConfig(datasets=[DatasetConfig(path=str(tmp_path / "plain"), language="both")], cache_dir=str(tmp_path / "c"))
    with pytest.raises(DataError, match="language: task"):
        open_mixture(config, 4, 0, progress=False)


def test_times_are_met_give_or_take_a_quarter_of_a_frame():
    times = np.arange(10) / 30
    assert [frame_of(float(np.float32(t / 30)), times) for t in range(10)] == list(range(10))
    assert frame_of(0.0334, times) == 1 and frame_of(0.05, times) == 2 and frame_of(1.0, times) == 10


@pytest.mark.parametrize(
    ("rows", "message"),
    [([Said(0, "subtask", "go"), Said(6, "subtask", "late")], "within its"), ([Said(0, "subtask", " ")], "the time from which")],
)
def test_what_cannot_hold_is_named(tmp_path: Path, rows: list[Said], message: str):
    with LeRobotWriter(tmp_path / "set", small_spec(), language=True) as writer:
        writer.add(replace(make_episode(0, 7), language=tuple(rows)))
    path = tmp_path / "set/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    later = [[{**row, "timestamp": row["timestamp"] * 3} for row in some] for some in table["language_persistent"].to_pylist()]
    column = pa.array(later, table.schema.field("language_persistent").type)
    pq.write_table(table.set_column(table.column_names.index("language_persistent"), "language_persistent", column), path)
    with pytest.raises(DataError, match=message):
        EpisodeStore.open(tmp_path / "set", tmp_path / "cache", progress=False)


def test_a_column_that_is_promised_and_missing_is_named(tmp_path: Path):
    write(tmp_path / "set")
    path = tmp_path / "set/data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["language_persistent"]), path)
    with pytest.raises(DataError, match="language_persistent"):
        EpisodeStore.open(tmp_path / "set", tmp_path / "cache", progress=False)
