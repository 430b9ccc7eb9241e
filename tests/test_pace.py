"""What a batch will take: too much rather than too little until larger ones were seen."""

from __future__ import annotations

import pytest

from serve.pace import Pace


def test_looks_cost_each_until_a_larger_batch_shows_that_they_do_not():
    pace = Pace(1, 0.1)
    assert pace(1) == pytest.approx(0.1) and pace(8) == pytest.approx(0.8)
    pace.learn(1, 0.1)
    assert pace(8) == pytest.approx(0.8)
    pace.learn(8, 0.1)
    assert pace(8) == pytest.approx(0.1) and pace(1) == pytest.approx(0.1)


def test_a_batch_that_grows_with_its_looks_stays_one():
    pace = Pace(1, 0.1)
    for looks in (2, 8, 3, 5):
        pace.learn(looks, 0.05 + 0.05 * looks)
    assert pace(8) == pytest.approx(0.45, rel=0.01) and pace(1) == pytest.approx(0.1, rel=0.01)


def test_what_was_long_ago_fades():
    pace = Pace(1, 5.0)
    for _ in range(60):
        pace.learn(1, 0.1)
    assert pace(1) == pytest.approx(0.1, rel=0.2)
