"""Statistics kept up as episodes are appended: what they would be of the whole column, whenever commits came."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vla.recording.columns as columns
from vla.recording.columns import EpisodeRows, Running, from_table, to_table, weighted_stats
from vla.recording.statistics import column_stats

FPS = 10


def episodes(lengths: list[int], seed: int = 0, dims: int = 3) -> list[EpisodeRows]:
    rng, made, start = np.random.default_rng(seed), [], 0
    for n, T in enumerate(lengths):
        state, action = (rng.normal(size=(T, d)).astype(np.float32) for d in (dims, 2))
        made.append(EpisodeRows(n, start, int(rng.integers(3)), bool(rng.integers(2)), state, action))
        start += T
    return made


def close(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(np.allclose(found[k], wanted[k], rtol=1e-9, atol=1e-9) for k in wanted)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 99), st.data())
def test_equal_to_those_of_the_whole_column_wherever_it_was_cut(lengths: list[int], seed: int, data: st.DataObject):
    made = episodes(lengths, seed)
    cut = data.draw(st.integers(0, len(made)))
    running = Running(FPS)
    for part in (made[:cut], made[cut:]):
        running = running.plus(part) if part else running
    parts = [episode.columns(FPS) for episode in made]
    found = running.to_json()
    assert found.keys() == parts[0].keys()
    for key in found:
        assert close(found[key], column_stats(np.concatenate([part[key] for part in parts]))), key
    assert found == Running(FPS).plus(made).to_json(), "bit by bit the same, however often it was committed"


def test_a_robot_without_a_state_has_none_in_its_statistics():
    found = Running(FPS).plus(episodes([3, 4], dims=0)).to_json()
    assert "observation.state" not in found and found["action"]["count"] == [7]


def test_beyond_the_kept_rows_moments_stay_exact_and_memory_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(columns, "MAX_KEPT_ROWS", 1000)
    made = episodes([37] * 300)
    running = Running(FPS)
    for n in range(0, 300, 7):
        running = running.plus(made[n : n + 7])
        assert sum(map(len, running.action.kept)) <= 1000 and len(running.action.kept) <= columns._CHUNKS
    whole, found = np.concatenate([e.action for e in made]).astype(float), running.to_json()["action"]
    for name in ("min", "max", "mean", "std"):
        assert np.allclose(found[name], getattr(whole, name)(0), rtol=1e-12)
    stride = running.action.stride
    assert stride == 16 and found["q50"] == np.quantile(whole[::stride], 0.5, axis=0).tolist()
    assert running.to_json() == Running(FPS).plus(made).to_json()


def test_what_was_there_before_is_not_changed():
    """A commit that fails is tried again from the same statistics."""
    made = episodes([5, 6, 7])
    first = Running(FPS).plus(made[:1])
    before = first.to_json()
    once, twice = first.plus(made[1:]).to_json(), first.plus(made[1:]).to_json()
    assert first.to_json() == before and once == twice


@pytest.mark.parametrize("counts", [[1], [5], [3, 0, 2], [0, 1, 1], [100, 1]])
def test_weighted_statistics_equal_those_of_the_repeated_values(counts: list[int]):
    values = np.arange(len(counts)) * 2.5
    assert close(weighted_stats(values, np.array(counts)), column_stats(np.repeat(values, counts)))


@pytest.mark.parametrize("dims", [0, 1, 3])
def test_rows_survive_the_table(dims: int):
    made = episodes([4, 1, 6], dims=dims)
    back = from_table(to_table(made, FPS), 0, [4, 1, 6])
    for one, two in zip(made, back, strict=True):
        assert (one.number, one.start, one.task, one.success) == (two.number, two.start, two.task, two.success)
        assert np.array_equal(one.state, two.state) and np.array_equal(one.action, two.action)
