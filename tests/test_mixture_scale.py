"""A mixture of a thousand datasets: exact shares in every block, nothing that grows with the data."""

from __future__ import annotations

import importlib.util
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from vla.errors import UsageError
from vla.mixture import BLOCK, Mixture

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_mixture.py"
if not SCRIPT.is_file():
    pytest.skip("not in a checkout", allow_module_level=True)
_spec = importlib.util.spec_from_file_location("bench_mixture", SCRIPT)
assert _spec and _spec.loader
bench_mixture = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench_mixture)


def many(datasets: int, windows: int, weights: list[float] | None = None) -> Mixture:
    stores = bench_mixture.virtual_stores(datasets, windows, 100)
    uneven = np.random.default_rng(0).uniform(0.5, 2.0, datasets).tolist()
    return Mixture(stores, weights or uneven, 4, seed=0)


def test_every_block_of_a_thousand_datasets_holds_its_shares():
    mixture = many(1000, 100_000)
    before = np.zeros(1000, int)
    for block in range(1, 40):
        after = np.array(mixture.drawn(block))
        assert after.sum() == block * mixture.block
        assert (after >= before).all(), "a dataset cannot be drawn fewer times by a longer run"
        assert np.abs(after - np.array(mixture.shares) * block * mixture.block).max() < 1
        before = after
    drawn = np.bincount([mixture.locate(n)[0] for n in range(mixture.block)], minlength=1000)
    assert drawn.tolist() == mixture.drawn(1)


def test_a_rare_dataset_makes_blocks_longer_and_one_that_is_never_drawn_is_refused():
    assert many(2, 1000).block == BLOCK
    rare = many(2, 1000, [1.0, 1e-4])
    assert rare.block * rare.shares[1] >= 2 and rare.drawn(1)[1] >= 2
    with pytest.raises(UsageError, match="raise its weight"):
        many(2, 1000, [1.0, 1e-7])


def test_memory_does_not_grow_with_the_windows():
    grown = []
    for windows in (10**5, 10**7):
        stores = bench_mixture.virtual_stores(100, windows, windows // 1000)  # as many episodes, longer ones
        tracemalloc.start()
        mixture = Mixture(stores, [1.0] * 100, 4, seed=0)
        for n in (0, 10**6, 10**12):
            mixture.window(n)
        grown.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert grown[1] < 1.1 * grown[0] < 10e6
