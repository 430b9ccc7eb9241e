"""FAST: round trips, the published layout token for token, and that whatever is said is a whole chunk."""

import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from tokenizers.trainers import BpeTrainer

from vla.actions import FastCodec, VQCodec, codec_from_json
from vla.actions.fast import dct_matrix
from vla.errors import CheckpointError, DataError, UsageError


@pytest.fixture(scope="module")
def fft() -> Any:
    """Not ours: the published tokenizer's."""
    return pytest.importorskip("scipy.fft")


def walks(count, steps, dims, seed=0):
    """Smooth motions (steps, dims) in [-1, 1]."""
    rng = np.random.default_rng([seed, steps, dims])
    paths = np.cumsum(rng.normal(0, 0.1, (count, steps, dims)), 1) + rng.uniform(-0.8, 0.8, (count, 1, dims))
    return list(np.clip(paths, -1, 1))


@pytest.fixture(scope="module")
def codec():
    return FastCodec.fit(walks(300, 8, 4) + walks(200, 8, 7), vocabulary=256)


def with_most(codec, most):
    """The same tokenizer, allowed `most` symbols a chunk."""
    return FastCodec.from_json({**codec.to_json(), "tokens": most})


def publish(folder, chunks, scale=10.0, vocabulary=512, **more):
    """A tokenizer as physical-intelligence/fast publishes one: byte-level BPE, fitted the published way."""
    rounded = [np.around(dct_matrix(len(c)) @ c * scale).astype(int).flatten() for c in chunks]
    low, high = min(r.min() for r in rounded), max(r.max() for r in rounded)
    bpe = ByteLevelBPETokenizer()
    trainer = BpeTrainer(vocab_size=vocabulary, min_frequency=2, show_progress=False, special_tokens=[], max_token_length=10_000,
                         initial_alphabet=[chr(i) for i in range(high - low + 1)])  # fmt: skip
    bpe._tokenizer.train_from_iterator(("".join(chr(v - low) for v in r) for r in rounded), trainer=trainer)
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "processing_action_tokenizer.py").write_text("raise SystemExit('this must never be run')\n")
    (folder / "processor_config.json").write_text(json.dumps({
        "action_dim": None, "auto_map": {"AutoProcessor": "processing_action_tokenizer.UniversalActionProcessor"},
        "min_token": int(low), "processor_class": "UniversalActionProcessor", "scale": scale, "time_horizon": None,
        "vocab_size": vocabulary, **more,
    }))  # fmt: skip
    return bpe, int(low)


def say(codec, dims, seed, sharp=5.0):
    """Chunks of robots of `dims` as a model of random logits says them, sometimes insisting on one symbol."""
    rng = np.random.default_rng(seed)
    speech, said = codec.speech(np.array(dims)), [[] for _ in dims]
    loved = rng.integers(0, codec.size, len(dims))
    while not speech.done.all():
        going, allowed = ~speech.done, speech.allowed()
        assert allowed[going].any(1).all(), "a chunk that is not whole must be able to go on"
        logits = rng.normal(0, sharp, allowed.shape)
        logits[np.arange(len(dims)), loved] += 100 * (rng.random(len(dims)) < 0.5)
        symbols = np.where(allowed, logits, -np.inf).argmax(1)
        for row in np.flatnonzero(going):
            said[row].append(int(symbols[row]))
        speech.say(symbols)
    return [np.array(row) for row in said]


def test_transform_is_scipys(fft):
    for steps in (1, 2, 8, 50):
        x = np.random.default_rng(0).normal(size=(steps, 3))
        assert np.allclose(dct_matrix(steps) @ x, fft.dct(x, axis=0, norm="ortho"), atol=1e-12)
        assert np.allclose(dct_matrix(steps).T @ x, fft.idct(x, axis=0, norm="ortho"), atol=1e-12)


@given(st.integers(0, 10_000), st.sampled_from([1, 3, 4, 7]), st.floats(0, 1))
def test_round_trip_is_within_the_stated_error(codec, seed, dims, rough):
    """Any chunk, smooth or not, where `most` leaves room for it."""
    roomy = with_most(codec, 8 * 7)
    rng = np.random.default_rng(seed)
    unit = np.clip((1 - rough) * walks(1, 8, dims, seed)[0] + rough * rng.choice([-1.0, 1.0], (8, dims)), -1, 1)
    symbols = roomy.encode(unit)
    assert len(symbols) <= 8 * dims
    back = roomy.decode(symbols, dims)
    assert back.shape == (8, dims) and back.dtype == np.float32
    assert np.abs(back - unit).max() <= roomy.max_error + 1e-6


def test_fitted_chunks_are_said_in_fewer_symbols_than_numbers(codec):
    chunks = walks(300, 8, 4)
    lengths = [len(codec.encode(c)) for c in chunks]
    assert max(lengths) <= codec.most and np.mean(lengths) < 16
    assert max(np.abs(codec.decode(codec.encode(c), 4) - c).max() for c in chunks) <= codec.max_error + 1e-6


def test_a_chunk_too_rough_for_its_symbols_loses_its_highest_frequencies(codec):
    short = with_most(codec, 8)
    unit = np.random.default_rng(1).uniform(-1, 1, (8, 4))
    symbols = short.encode(unit)
    assert len(symbols) <= 8 < len(with_most(codec, 99).encode(unit))
    coefficients = dct_matrix(8) @ short.decode(symbols, 4).astype(float)
    wanted = dct_matrix(8) @ unit
    assert np.allclose(coefficients[0], wanted[0], atol=0.06) and np.allclose(coefficients[-1], 0, atol=1e-6)


@given(st.integers(0, 10_000), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 3))
def test_whatever_is_said_is_a_whole_chunk(codec, seed, dims, spare):
    """Several widths at once, with as few symbols as the widest of them can be said with."""
    tight = with_most(codec, int(codec._fewest(8 * 9)[0].max()) + spare)
    for row, a in zip(say(tight, dims, seed), dims, strict=True):
        assert 1 <= len(row) <= tight.most
        unit = tight.decode(row, a)
        assert unit.shape == (8, a) and np.isfinite(unit).all() and np.abs(unit).max() <= 1
        assert tight.spread(np.ones(len(row)), row, a).shape == (8, a)


def test_without_the_constraint_it_would_often_be_none(codec):
    rng = np.random.default_rng(0)
    broken = 0
    for _ in range(100):
        try:
            codec.decode(rng.integers(0, codec.size, codec.most), 4)
        except DataError:
            broken += 1
    assert broken > 50  # the published decoder answers zeros to these


def test_no_motion_can_be_said_whatever_was_fitted():
    """BPE has merged what was seen, not zeros: a `most` of what was seen alone could not say them."""
    codec = FastCodec.fit([np.full((8, 1), 1.0)] * 2)
    assert np.array_equal(codec.decode(codec.encode(np.zeros((8, 1))), 1), np.zeros((8, 1)))
    assert codec.slots(8, 1, [1]) == codec.most == len(codec.encode(np.zeros((8, 1)))) > 1
    for few in (0, codec.most - 1):
        with pytest.raises(UsageError, match=rf"--tokens\n  found:    {few}\n  expected: {codec.most} or more"):
            FastCodec.fit([np.full((8, 1), 1.0)] * 2, most=few)


def test_confidence_falls_on_the_dimension_a_symbol_spoke_of():
    codec = FastCodec.fit(walks(5, 2, 2), vocabulary=128, most=4)
    least = "".join(chr(c) for c in range(5))
    symbols = [codec._tokenizer.token_to_id(c) for c in least[:4]]  # one coefficient each: (f0 d0)(f0 d1)(f1 d0)(f1 d1)
    spread = codec.spread(np.array([0.2, 0.4, 0.6, 1.0]), np.array(symbols), 2)
    assert np.allclose(spread, [[0.4, 0.7], [0.4, 0.7]])


# ---------------------------------------------------------------------------------------------------- the published layout


@pytest.mark.parametrize(("steps", "dims", "scale"), [(8, 4, 10.0), (10, 7, 60.0)])
def test_published_layout_token_for_token(fft, tmp_path, steps, dims, scale):
    """Against a restatement of the published algorithm; at scale 60 most characters are two bytes."""
    chunks = walks(400, steps, dims)
    bpe, low = publish(tmp_path / "fast", chunks, scale)
    codec = FastCodec.from_folder(tmp_path / "fast", steps, dims)
    if scale == 60.0:
        assert len(codec._next) > 1 and max(fft.dct(c, axis=0, norm="ortho").max() for c in chunks) * scale - low > 127
    for chunk in chunks[:200]:
        rounded = np.around(fft.dct(chunk, axis=0, norm="ortho") * scale)
        theirs = bpe.encode("".join(map(chr, np.maximum(rounded.flatten() - low, 0).astype(int)))).ids
        assert codec.encode(chunk).tolist() == theirs
        text = bpe.decode(theirs)
        back = fft.idct((np.array([ord(c) for c in text]) + low).reshape(-1, dims) / scale, axis=0, norm="ortho")
        assert np.allclose(codec.decode(np.array(theirs), dims), np.clip(back, -1, 1), atol=1e-6)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_published_symbols_that_are_not_whole_characters(published, seed):
    """Constrained decoding of byte-level symbols: what is said is text, and of the right length, also for its own decoder."""
    codec, bpe = published
    for row, a in zip(say(codec, [7, 3], seed), (7, 3), strict=True):
        assert codec.decode(row, a).shape == (10, a)
        assert len(bpe.decode(row.tolist())) == 10 * a and "\ufffd" not in bpe.decode(row.tolist())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "fast"
    bpe, _ = publish(folder, walks(400, 10, 7), 60.0)
    return FastCodec.from_folder(folder, 10, 7), bpe


def test_published_horizon_and_width_are_held_to(tmp_path):
    publish(tmp_path / "fast", walks(50, 8, 4), time_horizon=8, action_dim=4)
    assert FastCodec.from_folder(tmp_path / "fast", 8, 4).chunk == 8
    with pytest.raises(CheckpointError, match=r"time_horizon 8[\s\S]*10 or null"):
        FastCodec.from_folder(tmp_path / "fast", 10, 4)
    with pytest.raises(CheckpointError, match="action_dim 4"):
        FastCodec.from_folder(tmp_path / "fast", 8, 5)
    (tmp_path / "fast" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="download it again"):
        FastCodec.from_folder(tmp_path / "fast", 8, 4)
    (tmp_path / "fast" / "processor_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"RecursionError[\s\S]*processor_config.json"):
        FastCodec.from_folder(tmp_path / "fast", 8, 4)
    (tmp_path / "fast" / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match="processor_config.json"):
        FastCodec.from_folder(tmp_path / "fast", 8, 4)


def test_published_alphabet_wider_than_needed(tmp_path):
    """As physical-intelligence/fast is: scale 10, min_token -354, any horizon and width."""
    far = [np.full((8, 4), x / math.sqrt(8) / 10) for x in (-354, 354)]
    assert publish(tmp_path / "fast", [*walks(200, 8, 4), *far], vocabulary=2048)[1] == -354
    codec = FastCodec.from_folder(tmp_path / "fast", 50, 7)
    assert codec.max_error == 0.5 * math.sqrt(50) / 10
    for unit in (np.ones((50, 7)), -np.ones((50, 7)), walks(1, 50, 7)[0]):
        assert np.abs(codec.decode(codec.encode(unit), 7) - unit).max() <= codec.max_error


@pytest.mark.parametrize("min_token", [-29, -27, -22, -16, -31, -38])  # all coefficients; fewer below; fewer above
def test_stated_error_counts_coefficients_that_cannot_be_said(codec, min_token):
    short = FastCodec.from_json({**codec.to_json(), "tokens": 99, "min_token": min_token})
    rng, t, worst = np.random.default_rng(0), np.arange(8)[:, None], 0.0
    waves = [s * np.sign(np.cos(np.pi * (t + 0.5) * k / 8)) for k in range(8) for s in (-1.0, 1.0)]
    for unit in [*waves, *rng.choice([-1.0, 1.0], (300, 8, 1)), *rng.uniform(-1, 1, (300, 8, 1))]:
        worst = max(worst, np.abs(short.decode(short.encode(unit), 1) - unit).max())
    assert worst <= short.max_error + 1e-6
    assert (short.max_error == 0.5 * math.sqrt(8) / 10) is (min_token == -29)
    if min_token in (-16, -38):
        assert worst > 0.5 * math.sqrt(8) / 10  # what was promised before


@pytest.mark.parametrize("bad", [
    {"min_token": 1000}, {"min_token": 1}, {"min_token": 1.7}, {"min_token": True}, {"min_token": "-29"}, {"min_token": None},
    {"min_token": -3}, {"min_token": -1000}, {"min_token": -(10**12)}, {"min_token": 10**30}, {"scale": 1e-9}, {"scale": True},
    {"scale": "10"}, {"scale": 0}, {"scale": -10.0}, {"scale": math.inf}, {"scale": math.nan}, {"scale": 10**400}, {"scale": 300},
])  # fmt: skip
def test_published_ranges_that_say_no_chunks_are_refused(tmp_path, codec, bad):
    publish(tmp_path / "fast", walks(50, 8, 4))
    config = tmp_path / "fast" / "processor_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **bad}))
    with pytest.raises(CheckpointError, match=r"processor_config.json[\s\S]*min_token[\s\S]*of one fit"):
        FastCodec.from_folder(tmp_path / "fast", 8, 4)
    with pytest.raises(CheckpointError, match="whole min_token"):
        codec_from_json({**codec.to_json(), **bad})


# ---------------------------------------------------------------------------------------------------- files and refusals


def test_json_and_pickle_give_the_same_codec(codec):
    chunk = walks(1, 8, 4, seed=9)[0]
    for again in (codec_from_json(json.loads(json.dumps(codec.to_json()))), pickle.loads(pickle.dumps(codec))):
        assert again.to_json() == codec.to_json()
        assert np.array_equal(again.encode(chunk), codec.encode(chunk))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_is_refused(codec, bad):
    unit = np.zeros((8, 4))
    unit[1, 1] = bad
    with pytest.raises(DataError, match=r"\[1, 1\]"):
        codec.encode(unit)


def test_misfits_are_refused(codec):
    with pytest.raises(UsageError, match=r"a chunk of 4 steps[\s\S]*policy.chunk=8"):
        codec.encode(np.zeros((4, 4)))
    with pytest.raises(UsageError, match="a chunk of 4 steps"):
        codec.slots(4, 4, [4])
    with pytest.raises(UsageError, match="a robot of 4 dimensions"):
        with_most(codec, 1).slots(8, 4, [4])
    with pytest.raises(UsageError, match="--vocabulary"):
        FastCodec.fit(walks(5, 8, 4), vocabulary=20)
    with pytest.raises(DataError, match="coefficients"):
        codec.decode(np.array([0]), 4)
    with pytest.raises(CheckpointError, match="fit it again"):
        codec_from_json({**codec.to_json(), "tokenizer": "{}"})
    for tokens in (10**12, 0, 1.5, True):
        with pytest.raises(CheckpointError, match=r"whole number in 1\.\.65536"):
            codec_from_json({**codec.to_json(), "tokens": tokens})


@pytest.mark.parametrize("scale", [math.inf, math.nan, -1.0, 1e-9, 15_000, 1e300, True])
def test_scales_without_an_alphabet_are_refused(scale):
    with pytest.raises(UsageError, match=r"--scale[\s\S]*0.354 to 9774 for 8 steps"):
        FastCodec.fit(walks(5, 8, 4), scale=scale, vocabulary=70_000)


@pytest.mark.parametrize("kind", [FastCodec, VQCodec])
def test_chunks_of_no_one_shape_are_refused(kind):
    for chunks, found in (([], "no chunk at all"), (walks(2, 8, 4) + walks(2, 6, 4), r"\(6, 4\), \(8, 4\)"),
                          ([np.zeros(8)], r"\(8,\)"), ([np.zeros((8, 0))], r"\(8, 0\)")):  # fmt: skip
        with pytest.raises(DataError, match=found):
            kind.fit(chunks)
