"""Normaliser: one object both ways, masks, constants, refusal to guess."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vla.errors import DataError
from vla.normalize import Normalizer, Stats

COLUMNS = hnp.arrays(np.float32, st.tuples(st.integers(2, 30), st.integers(1, 5)),
                     elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=True))  # fmt: skip
SCHEMES = st.sampled_from(["q99", "bounds", "meanstd"])

# OpenVLA's bridge_orig action statistics, as published with openvla-7b.
BRIDGE_Q01 = [-0.02872725307941437, -0.04170349963009357, -0.026093858778476715, -0.08092105075716972,
              -0.09288699507713317, -0.20718276381492615, 0.0]  # fmt: skip
BRIDGE_Q99 = [0.028309678435325586, 0.040855254605412394, 0.040161586627364146, 0.08192047759890528,
              0.07792850524187081, 0.20382574498653397, 1.0]  # fmt: skip


@given(COLUMNS, SCHEMES)
def test_round_trip_inside_the_range_and_bounded_outside(column, scheme):
    normalizer = Normalizer(Stats.of(column), scheme)
    unit = normalizer.to_unit(column)
    assert np.isfinite(unit).all() and np.abs(unit).max() <= 1
    clipped = np.clip(column, normalizer.low, normalizer.high)
    scale = np.maximum(np.abs(normalizer.low), np.abs(normalizer.high)).astype(np.float64)
    assert (np.abs(normalizer.from_unit(unit) - clipped) <= 2e-6 * scale + 1e-9).all()


def test_bridge_round_trip_and_masked_gripper():
    stats = Stats({"q01": np.array(BRIDGE_Q01), "q99": np.array(BRIDGE_Q99)}, 1)
    normalizer = Normalizer(stats, "q99", [True] * 6 + [False])
    unit = np.array([0.5, -0.5, 0.0, 1.0, -1.0, 0.25, 0.996], np.float32)
    expected = [0.5 * (u + 1) * (hi - lo) + lo for u, lo, hi in zip(unit, BRIDGE_Q01, BRIDGE_Q99, strict=True)][:6] + [0.996]
    assert np.allclose(normalizer.from_unit(unit), expected, atol=1e-7)
    assert np.allclose(normalizer.to_unit(normalizer.from_unit(unit)), unit, atol=1e-6)


@pytest.mark.parametrize("value", [0.31, 0.0, 1e-40, -7e5])
def test_constant_dimensions_become_zero_and_come_back(value):
    column = np.stack([np.full(50, value), np.linspace(-1, 1, 50)], axis=1)
    column[0, 0] = np.nextafter(value, np.inf)  # "constant" up to rounding: openpi #814
    normalizer = Normalizer(Stats.of(column), "bounds")
    assert normalizer.constant.tolist() == [True, False]
    assert (normalizer.to_unit(column * [1, 1])[:, 0] == 0).all()
    assert np.allclose(normalizer.from_unit(np.ones((1, 2), np.float32))[0, 0], value)


@pytest.mark.parametrize("scheme", ["q99", "bounds", "meanstd"])
@pytest.mark.parametrize(("spread", "constant"), [(4e-7, True), (4e-6, False)])
def test_a_range_near_rounding_is_a_constant(scheme, spread, constant):
    """A held joint that trembles in its last digits (openpi #814): stretched to [-1, 1] it would be noise at full size.

    Values from 0.5 to 0.5 (1 + spread); float32 tells the two apart, so neither range is exactly 0.
    """
    low, high = np.float32(0.5), np.float32(0.5 * (1 + spread))
    assert high > low
    values = {"min": low, "max": high, "q01": low, "q99": high, "mean": (float(low) + float(high)) / 2,
              "std": (float(high) - float(low)) / 6}  # fmt: skip
    normalizer = Normalizer(Stats({name: np.array([v], np.float64) for name, v in values.items()}, 100), scheme)
    assert normalizer.constant.tolist() == [constant]
    assert (np.abs(normalizer.to_unit(np.array([[low], [high]]))) > 0.5).all() != constant


def test_nan_and_wrong_width_are_refused_both_ways():
    normalizer = Normalizer(Stats.of(np.random.default_rng(0).normal(size=(10, 3))), "q99")
    for way in (normalizer.to_unit, normalizer.from_unit):
        with pytest.raises(DataError, match=r"\[1, 2\]"):
            way(np.array([[0, 0, 0], [0, 0, np.nan]], np.float32))
        with pytest.raises(DataError, match=r"\(\.\.\., 3\)"):
            way(np.zeros((2, 4)))
    with pytest.raises(DataError, match="row 1, dimension 0"):
        Stats.of(np.array([[0.0], [np.inf]]))


def test_missing_statistics_are_named_not_guessed():
    stats = Stats({"mean": np.zeros(2), "std": np.ones(2)}, 5)
    with pytest.raises(DataError, match="q01"):
        Normalizer(stats, "q99", where="meta/stats.json: action")
    with pytest.raises(DataError, match="equal length"):
        Stats.from_json({"min": [0], "max": [0, 1]}, "here")
    with pytest.raises(DataError, match="mask"):
        Normalizer.from_json({"scheme": "q99", "stats": {}}, "policy.json")


def test_json_keeps_the_meaning_and_the_fingerprint_sees_a_change():
    normalizer = Normalizer(Stats.of(np.random.default_rng(1).normal(size=(100, 3))), "meanstd", [True, True, False])
    again = Normalizer.from_json(normalizer.to_json(), "here")
    x = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)
    assert np.array_equal(normalizer.to_unit(x), again.to_unit(x)) and normalizer.fingerprint == again.fingerprint
    assert Normalizer(normalizer.stats, "bounds").fingerprint != normalizer.fingerprint


def test_quantiles_match_numpy():
    column = np.random.default_rng(3).gamma(2.0, size=(1000, 2))
    stats = Stats.of(column)
    assert np.allclose(stats.values["q01"], np.quantile(column, 0.01, axis=0))
    assert np.allclose(stats.values["std"], column.std(0)) and stats.count == 1000


def test_a_dimension_that_never_moved_takes_the_statistics_of_data_where_it_does():
    still = Normalizer(Stats.of(np.array([[0.0, 1.0], [2.0, 1.0]])), "bounds")
    moving = Normalizer(Stats.of(np.array([[-9.0, -1.0], [9.0, 1.0]])), "bounds")
    both = still.completed(moving)
    assert not both.constant.any() and both.to_unit(np.array([1.0, 1.0])).tolist() == [0.0, 1.0]
    assert np.array_equal(both.from_unit(both.to_unit(np.array([2.0, -1.0]))), [2.0, -1.0])
    assert moving.completed(still) is moving and both.completed(still) is both
