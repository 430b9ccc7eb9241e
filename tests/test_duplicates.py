"""Episodes that are there several times: every group once, named briefly, however large it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_tools.check import duplicates
from data_tools.check.dataset import Dataset
from data_tools.check.duplicates import NEAR, duplicate_episode, groups, leaked_episode
from data_tools.check.timing import motion_scale
from vla import mixture

ROWS = 12


def dataset(episodes: Sequence[np.ndarray], holdout: float = 0.0) -> Dataset:
    """Episodes of (T, 2) actions; the state says the same."""
    values = np.concatenate(episodes).astype(np.float32)
    rows: Any = SimpleNamespace(starts=np.cumsum([0, *map(len, episodes)]), action=values, state=values)
    layout: Any = SimpleNamespace(num_episodes=len(episodes))
    return Dataset(Path("made-up"), layout, rows, holdout=holdout, healthy=list(range(len(episodes))))


def episode(number: int, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng([number, 3]).uniform(-1, 1, (rows, 2))


def said(data: Dataset) -> list[str]:
    return [finding.found for finding in duplicate_episode(data)]


def test_a_large_group_is_named_by_its_first_and_its_size():
    data = dataset([episode(1), *[episode(0)] * 500, episode(2)])
    assert groups(data) == [(list(range(1, 501)), True)]
    assert said(data) == ["the same numbers as episodes 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 487 more (499 in all)"]


def test_near_episodes_are_one_group_and_not_their_pairs(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    data = dataset([episode(1), *(episode(0) + rng.uniform(0, 1e-4, (ROWS, 2)) for _ in range(200)), episode(2), episode(1)])
    compared: list[int] = []
    whole = np.abs
    monkeypatch.setattr(duplicates.np, "abs", lambda array: compared.append(array.size) or whole(array))
    assert groups(data) == [([0, 202], True), (list(range(1, 201)), False)]
    assert sum(compared) < 200 * 200 * duplicates.POINTS, "what is linked already is not compared again"
    assert said(data)[1].startswith("hardly differs from episodes 1, 2,") and said(data)[1].endswith("187 more (199 in all)")
    assert said(data)[0] == "the same numbers as episode 0"


def test_copies_of_a_near_episode_belong_to_its_group():
    data = dataset([episode(0), episode(5), episode(0), episode(0) + 1e-4, episode(6)])
    assert groups(data) == [([0, 2, 3], False)]


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_what_all_pairs_link(seed: int):
    rng = np.random.default_rng(seed)
    drawn = rng.integers([0, 12], [6, 14], (60, 2)).tolist()  # number and rows
    made = [episode(n, T) + rng.uniform(0, 2.5 * NEAR) for n, T in drawn]
    data = dataset(made)
    scale, at = np.concatenate([motion_scale(data, "action")] * 2), np.linspace(0, 1, duplicates.POINTS)
    shapes = [np.stack([np.interp(at, np.linspace(0, 1, len(e)), e[:, d]) for d in (0, 1, 0, 1)]) / scale[:, None] for e in made]
    group = list(range(60))
    for i in range(60):
        for j in range(i):
            if abs(len(made[i]) - len(made[j])) <= 1 and np.abs(shapes[i] - shapes[j]).max() < NEAR:
                group = [group[i] if g == group[j] else g for g in group]
    wanted = {tuple(i for i in range(60) if group[i] == g) for g in group}
    found = {tuple(episodes) for episodes, _ in groups(data)}
    assert found == {g for g in wanted if len(g) > 1} and len(found) > 3


def test_a_leak_names_both_sides_of_its_group():
    count, share = 40, 0.2
    held = sorted(mixture.split_episodes(count, share, "holdout").tolist())
    trained = [e for e in range(count) if e not in held]
    # The two held out are exact copies of each other and only near to what is trained on.
    same = {held[0]: episode(99), held[1]: episode(99), trained[0]: episode(99) + 1e-4}
    (finding,) = leaked_episode(dataset([same.get(e, episode(e)) for e in range(count)], share))
    assert f"episodes {held[0]}, {held[1]}, held out" in finding.found and f"nearly episode {trained[0]}," in finding.found
    assert finding.fix == f"drop episode {trained[0]}" and finding.episode == held[0]
    every = {e: episode(99) for e in range(count)}
    (finding,) = leaked_episode(dataset([every[e] for e in range(count)], share))
    assert f"{len(trained)} in all" in finding.found and len(finding.found) < 300
