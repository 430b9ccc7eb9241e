"""TFRecord framing, its checksum and Example messages: published vectors, round trips, every flipped bit, every cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlds_writing import delimited, example, feature, framed, plain_crc32c, record

from data_tools.sources.tfrecord import _FAR, _NEAR, _NEXT, crc32c, index_shard, parse_example
from vla.errors import DataError

# --- the checksum and the framing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "crc"),
    [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E)],
)
def test_crc32c_of_published_vectors(data: bytes, crc: int):
    assert crc32c(data) == plain_crc32c(data) == crc


@given(st.integers(0, 3), st.sampled_from([0, 511, 512, 600, 4096, 8 * (_FAR + _NEXT)]), st.integers(0, 20))
def test_crc32c_is_the_same_by_every_road(seed: int, size: int, more: int):
    data = np.random.default_rng(seed).integers(0, 256, size + more, dtype=np.uint8).tobytes()
    slow, table = 0xFFFFFFFF, [plain_crc32c(bytes([n])) for n in range(256)]
    zero = plain_crc32c(b"\0")
    for byte in data:  # linear: the table of sums gives the table of steps
        slow = (slow >> 8) ^ table[(slow ^ byte) & 0xFF] ^ zero ^ _step0
    assert crc32c(data) == slow ^ 0xFFFFFFFF


def _steps_of_zero() -> int:
    state = 0
    for _ in range(8):
        state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state


_step0 = _steps_of_zero()


def test_crc32c_of_more_than_one_piece():
    """The sum of 1.3 million bytes as the bit by bit definition gives it, computed once: that takes seconds."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 1_300_007, dtype=np.uint8).tobytes()
    assert crc32c(data) == 0xC1B6C1AC


def test_the_sparse_multiple_is_one():
    """x^(64 * 5685) + x^(64 * 1362) + x^(64 * 426) + 1 = 0 modulo the polynomial."""
    def power(words: int) -> int:
        state = 0x80000000  # 1, lowest bit first
        for _ in range(64 * words):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
        return state

    assert power(_FAR) ^ power(_FAR - _NEXT) ^ power(_FAR - _NEAR) ^ power(0) == 0


@given(st.lists(st.binary(max_size=600), max_size=6))
def test_records_come_back_as_written(tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes]):
    path = tmp_path_factory.mktemp("records") / "x.tfrecord"
    path.write_bytes(b"".join(map(framed, payloads)))
    shard = index_shard(path)
    assert not shard.damage and [shard.read(n) for n in range(len(shard))] == payloads


@given(st.data())
def test_no_flipped_bit_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    payloads = [b"one", bytes(700), b"three"]
    whole = b"".join(map(framed, payloads))
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    broken = bytearray(whole)
    broken[bit // 8] ^= 1 << bit % 8
    path = tmp_path_factory.mktemp("records") / "x.tfrecord"
    path.write_bytes(broken)
    shard = index_shard(path)
    found = list(shard.damage)
    for number in range(len(shard)):
        try:
            assert shard.read(number) == payloads[number]
        except DataError as error:
            found.append(error)
    assert len(found) == 1 and "byte" in found[0].where and "crc32c" in found[0].found and path.name in found[0].where


@given(st.integers(1, 16 * 3 + 3 + 700 + 5 - 1))
def test_every_cut_is_named_and_what_lies_before_it_is_read(tmp_path_factory: pytest.TempPathFactory, kept: int):
    payloads = [b"one", bytes(700), b"three"]
    records = [framed(payload) for payload in payloads]
    path = tmp_path_factory.mktemp("records") / "x.tfrecord"
    path.write_bytes(b"".join(records)[:kept])
    shard = index_shard(path)
    ends = np.cumsum([len(record) for record in records])
    assert [shard.read(n) for n in range(len(shard))] == payloads[: int((ends <= kept).sum())]
    if kept in ends:
        assert not shard.damage  # whole records are missing: only shardLengths can tell
    else:
        assert "truncated" in shard.damage[0].found and f"record {len(shard)} at byte" in shard.damage[0].where


# --- Example messages ------------------------------------------------------------------------------------------------

FEATURES = st.dictionaries(
    st.text(max_size=20),
    st.one_of(
        st.lists(st.binary(max_size=300), max_size=4),
        st.lists(st.floats(width=32), max_size=40).map(lambda v: np.array(v, np.float32)),
        st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 300), max_size=40).map(lambda v: np.array(v, np.int64)),
    ),
    max_size=6,
)


@given(FEATURES, st.booleans())
def test_examples_come_back_as_written(features: dict, packed: bool):
    found = parse_example(example(features, packed))
    assert found.keys() == features.keys()
    for name, values in features.items():
        if isinstance(values, np.ndarray):
            assert isinstance(found[name], np.ndarray) and found[name].dtype == values.dtype  # pyright: ignore
            assert found[name].tobytes() == values.tobytes()  # pyright: ignore
        else:
            assert [bytes(v) for v in found[name]] == values


def test_unknown_fields_are_passed_over_and_the_last_of_two_kinds_counts():
    data = example({"a": np.array([1.5], np.float32)})
    later = example({"a": [b"x"]})
    unknown = bytes([9 << 3 | 0, 200, 1]) + bytes([9 << 3 | 1]) + bytes(8) + bytes([9 << 3 | 5]) + bytes(4)
    assert parse_example(unknown + data) == {"a": np.array([1.5], np.float32)}
    assert parse_example(data + later) == {"a": [b"x"]}
    both = feature(np.array([1.5], np.float32)) + feature([b"x"]) + feature([b"y"])
    assert parse_example(delimited(1, delimited(1, delimited(1, b"a") + delimited(2, both)))) == {"a": [b"x", b"y"]}
    assert parse_example(b"") == {}


@given(st.binary(max_size=60) | st.tuples(st.integers(0, 10_000), st.integers(0, 255)))
def test_rubbish_is_refused_or_read_but_never_breaks_the_parser(rubbish: bytes | tuple[int, int]):
    if isinstance(rubbish, tuple):
        data = bytearray(example(record()))
        data[rubbish[0] % len(data)] = rubbish[1]
        rubbish = bytes(data)
    try:
        parse_example(rubbish)
    except ValueError:
        pass
