"""Residual codebooks: every sequence is a chunk, expectations are exact, files give back the same."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vla.actions import VQCodec, codec_from_json, read_codec
from vla.errors import CheckpointError, DataError, UsageError
from vla.policy.choose import SequenceChooser


def motions(count, dims, seed=0):
    """(8, dims) constant speeds with a turn somewhere: a family that a few codes describe."""
    rng = np.random.default_rng([seed, dims])
    start, speed = rng.uniform(-0.5, 0.5, (2, count, 1, dims))
    return list(np.clip(start + speed * np.linspace(0, 1, 8)[None, :, None] ** 2, -1, 1))


@pytest.fixture(scope="module")
def codec():
    return VQCodec.fit(motions(600, 2) + motions(300, 4), rounds=4, codes=32)


def test_every_round_brings_it_nearer(codec):
    chunks = motions(600, 2)
    errors = []
    for rounds in range(1, 5):
        shorter = VQCodec({2: codec.books[2][:rounds]}, 8)
        errors.append(np.mean([np.abs(shorter.decode(shorter.encode(c), 2) - c).mean() for c in chunks]))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 < errors[0]


@given(st.integers(0, 10_000), st.sampled_from([2, 4]))
def test_any_symbols_are_a_chunk(codec, seed, dims):
    symbols = np.random.default_rng(seed).integers(0, codec.size, codec.rounds)
    unit = codec.decode(symbols, dims)
    assert unit.shape == (8, dims) and np.isfinite(unit).all() and np.abs(unit).max() <= 1
    assert codec.spread(np.ones(4), symbols, dims).shape == (8, dims)


@given(st.integers(0, 10_000))
def test_each_code_is_the_nearest_to_what_is_left(codec, seed):
    unit = np.random.default_rng(seed).uniform(-1, 1, (8, 2))
    rest = unit.reshape(-1)
    for book, symbol in zip(codec.books[2], codec.encode(unit), strict=True):
        assert np.linalg.norm(rest - book[symbol]) <= np.linalg.norm(rest - book, axis=1).min() + 1e-9
        rest = rest - book[symbol]
    assert np.allclose(np.clip(unit.reshape(-1) - rest, -1, 1).reshape(8, 2), codec.decode(codec.encode(unit), 2), atol=1e-6)


def test_expectation_of_certain_symbols_is_their_chunk(codec):
    symbols = np.array([3, 0, 31, 7])
    p = np.eye(codec.size)[symbols]
    assert np.allclose(codec.expected(p, 4), codec.decode(symbols, 4), atol=1e-6)
    half = (np.eye(codec.size)[symbols] + np.eye(codec.size)[[4, 0, 31, 7]]) / 2
    other = codec.books[4][np.arange(4), [4, 0, 31, 7]].sum(0)
    mean = (codec.books[4][np.arange(4), symbols].sum(0) + other).reshape(8, 4) / 2
    assert np.allclose(codec.expected(half, 4), np.clip(mean, -1, 1), atol=1e-6)


def test_fitting_again_gives_the_same(codec):
    again = VQCodec.fit(motions(600, 2) + motions(300, 4), rounds=4, codes=32)
    assert again.to_json() == codec.to_json()
    loaded = codec_from_json(json.loads(json.dumps(codec.to_json())))
    assert loaded.to_json() == codec.to_json() and (loaded.size, loaded.slots(8, 4, [2, 4])) == (32, 4)


def test_fewer_chunks_than_codes():
    few = VQCodec.fit(motions(3, 2), rounds=2, codes=8)
    for chunk in motions(3, 2):
        assert np.allclose(few.decode(few.encode(chunk), 2), chunk, atol=1e-5)


def test_an_only_code_is_certain():
    one = VQCodec.fit(motions(5, 2), rounds=2, codes=1)
    for decode in ("argmax", "mean", "sample"):
        choose = SequenceChooser(decode, one, np.array([2]), [0])
        choose(torch.zeros(1, 2, 1))
        assert np.array_equal(choose.chunk(0)[1], np.ones((8, 2)))
    with pytest.raises(UsageError, match="--codes"):
        VQCodec.fit(motions(5, 2), codes=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_is_refused(codec, bad):
    unit = np.zeros((8, 2))
    unit[1, 1] = bad
    with pytest.raises(DataError, match=r"\[1, 1\]"):
        codec.encode(unit)


def test_misfits_are_refused(codec):
    with pytest.raises(UsageError, match="a chunk of 5 steps"):
        codec.encode(np.zeros((5, 2)))
    with pytest.raises(UsageError, match=r"a robot of 3 dimensions[\s\S]*\[2, 4\]"):
        codec.slots(8, 4, [2, 3])
    with pytest.raises(DataError, match=r"0\.\.31"):
        codec.decode(np.array([0, 0, 0, 32]), 2)
    with pytest.raises(CheckpointError, match="fit it again"):
        codec_from_json({**codec.to_json(), "rounds": 5})


def test_a_file_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "deep").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="JSON"):
        read_codec(tmp_path / "deep")
