"""Codecs: exact variants, round trips, refusal of NaN."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vla.actions import BinCodec, codec_from_json
from vla.errors import CheckpointError, DataError

UNIT = hnp.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.floats(-1, 1))


@given(UNIT, st.integers(2, 512))
def test_uniform_round_trip_error_is_at_most_one_over_bins(unit, bins):
    codec = BinCodec(bins)
    symbols = codec.encode(unit)
    assert symbols.min() >= 0 and symbols.max() < bins
    assert np.abs(codec.decode(symbols, unit.shape[1]) - unit).max() <= 1 / bins + 1e-6


def test_uniform_uses_every_symbol_and_decoding_is_stable():
    codec = BinCodec(256)
    x = np.linspace(-1, 1, 100_001)[:, None]
    assert len(np.unique(codec.encode(x))) == 256
    centres = codec.decode(np.arange(256), 1)
    assert np.array_equal(codec.encode(centres), np.arange(256))


def test_openvla_vectors_bit_for_bit():
    """Ids for Llama-2's vocabulary of 32000, from OpenVLA's own tokenizer."""
    codec = BinCodec(256, "openvla")
    values = np.array([-1, -0.5, -0.073, 0, 0.5, 0.999, 1.0])[:, None]
    symbols = codec.encode(values)
    assert codec.vocabulary_ids(symbols, 32000).tolist() == [31999, 31936, 31881, 31872, 31808, 31745, 31744]
    decoded = codec.decode(symbols, 1)[:, 0]
    expected = [-0.996078431, -0.501960784, -0.070588235, 0.0, 0.501960784, 0.996078431, 0.996078431]
    assert np.allclose(decoded, expected, atol=1e-8)
    assert len(np.unique(codec.centres)) == 255
    assert codec.symbols_of(np.array([31744, 31999]), 32000).tolist() == [255, 0]


def test_openvla_equals_digitize_on_a_fine_grid():
    x = np.linspace(-1.2, 1.2, 50_001)
    edges = np.linspace(-1, 1, 256)
    expected_ids = 32000 - np.digitize(np.clip(x, -1, 1), edges)
    codec = BinCodec(256, "openvla")
    assert np.array_equal(codec.vocabulary_ids(codec.encode(x[:, None]), 32000), expected_ids)
    centres = (edges[:-1] + edges[1:]) / 2
    index = np.clip(32000 - expected_ids - 1, 0, 254)
    assert np.array_equal(codec.decode(codec.encode(x[:, None]), 1)[:, 0], centres[index].astype(np.float32))


@pytest.mark.parametrize("variant", ["uniform", "openvla"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_is_refused(variant, bad):
    unit = np.zeros((3, 2))
    unit[1, 1] = bad
    with pytest.raises(DataError, match=r"\[1, 1\]"):
        BinCodec(256, variant).encode(unit)


def test_symbols_and_ids_outside_the_codec_are_refused():
    codec = BinCodec(256)
    with pytest.raises(DataError, match=r"0\.\.255"):
        codec.decode(np.array([0, 256]), 1)
    with pytest.raises(DataError, match="multiple of 3"):
        codec.decode(np.zeros(4, int), 3)
    with pytest.raises(DataError, match="31744"):
        BinCodec(256, "openvla").symbols_of(np.array([31000]), 32000)


def test_json_round_trip():
    codec = codec_from_json(BinCodec(64, "openvla").to_json())
    assert (codec.size, codec.to_json()["variant"]) == (64, "openvla")
    with pytest.raises(CheckpointError, match="spline"):
        codec_from_json({"kind": "spline"})
