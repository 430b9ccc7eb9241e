"""Messages that are alike are read in one step: as the message itself says, or not at all."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import msgpack
import numpy as np
import pytest
from mutations import WIRES, mutated_message, valid

import serve.alike
from serve.alike import Alike
from serve.wire import WireError, pack, pack_openpi, unpack


class Counted:
    """`unpack`, and how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, data: bytes | memoryview) -> Any:
        self.asked += 1
        return unpack(data)


def said(read: Any, data: bytes) -> Any:
    """What a message says, as bytes, since NaN equals nothing; or what is wrong with it."""
    try:
        message = read(data)
    except WireError as error:
        return error.found
    return pack(message), _kinds(message)


def _kinds(value: Any, deep: int = 2) -> Any:
    if isinstance(value, dict) and deep:
        return {key: _kinds(inner, deep - 1) for key, inner in value.items()}
    return (value.dtype, value.shape, value.flags.writeable) if isinstance(value, np.ndarray) else type(value)


def look(rng: np.random.Generator, seq: int, **more: Any) -> dict[str, Any]:
    """As a client on this computer says one."""
    images = {"front": {"__shared__": True, "at": 64, "shape": [64, 64, 3]}}
    return {"type": "look", "state": rng.standard_normal(4).astype(np.float32), "instruction": "push", "robot": None,
            "executed": int(rng.integers(8)), "deadline": float(rng.random()), "seq": seq, "images": images} | more  # fmt: skip


def chunk(rng: np.random.Generator, seq: int) -> dict[str, Any]:
    actions = rng.standard_normal((8, 4)).astype(np.float32)
    timing = {"infer": float(rng.random()), "wait": float(rng.random()), "serve": 0.25}
    return {"type": "chunk", "seq": seq, "actions": actions, "confidence": np.full((8, 4), np.nan, np.float32), "hold": False,
            "symbols": rng.integers(0, 256, (8, 4)), "timing": timing, "execute": 8, "raw": rng.bytes(40)}  # fmt: skip


@pytest.mark.parametrize("pack_one", [pack, pack_openpi])
@pytest.mark.parametrize("make", [look, chunk])
def test_what_is_alike_is_read_as_ever_and_walked_through_once(make: Any, pack_one: Any):
    rng, counted = np.random.default_rng(0), Counted()
    read, numbers = Alike(counted), [*range(1, 300), *range(65_500, 65_600), 2**32 - 2, 2**32 - 1, 2**32, 2**53]
    for seq in numbers:
        data = pack_one(make(rng, seq))
        assert said(read, data) == said(unpack, data), seq
    assert counted.asked <= 30, "six lengths of `seq`, two messages to learn each, and every one that is longer for a while"


@pytest.mark.parametrize("wire", WIRES)
def test_strange_messages_in_between_are_read_as_ever(wire: str):
    counted = Counted()
    read = Alike(counted)
    message, packed = valid(wire, 0)
    small = {key: value for key, value in message.items() if "image" not in key and key != "payload"}
    fitted = 0
    for n in range(1500):
        data: Any = mutated_message(3, n, wire) if n % 5 == 4 else packed(small | {"n": n % 100})
        before = counted.asked
        assert said(read, data) == said(unpack, data), n
        fitted += counted.asked == before
    assert fitted > 500, "of 1,200 that are alike"


def test_what_is_not_quite_alike_is_another_message():
    """Flips in what was read in one step a moment ago."""
    rng, counted = np.random.default_rng(1), Counted()
    read, fitted = Alike(counted), Counter[tuple[bool, bool]]()
    for n in range(12_000):
        data = bytearray(pack((look, chunk)[n // 6000](rng, 1000 + n)))
        if n % 25 == 24:
            for _ in range(int(rng.integers(1, 3))):
                data[int(rng.integers(len(data)))] = int(rng.integers(256))
        before = counted.asked
        assert said(read, bytes(data)) == said(unpack, bytes(data)), n
        fitted[n % 25 == 24, counted.asked == before] += 1
    assert fitted[False, True] > 10_000 and min(fitted[True, True], fitted[True, False]) > 50, fitted


@pytest.mark.parametrize("strange", [
    {b"__ndarray__": True, "data": b"abcd", b"data": b"efgh", b"dtype": "<f4", b"shape": [1]},
    {"__ndarray__": True, "data": b"", "dtype": "<f4", "shape": [0]},
    {"__ndarray__": True, "data": bytes(8), "dtype": ">f8", "shape": []},
    {b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f4"},
    {"__image__": True, "format": "raw", "data": bytes(12), "shape": [2, 2, 3]},
    {"a": 0.5, "b": {"c": 0.5}, "d": [0.5, 1]}, {}, [0.5, 7], 0.5, -1, -200, 2**64 - 1, True, None, b"", b"bytes", "text",
])  # fmt: skip
def test_whatever_stands_in_a_message_comes_out_of_it(strange: Any):
    counted = Counted()
    read = Alike(counted)
    for number in (0.5, math.nan, -0.0, math.inf, 7.25):
        message = {"first": number, "strange": strange, "last": number, "inner": {"number": number, "same": 3}}
        data: Any = msgpack.packb(message)
        assert said(read, data) == said(unpack, data)


def test_who_sends_nothing_alike_is_not_learnt_from_for_ever(monkeypatch: pytest.MonkeyPatch):
    learnt, form = [0], serve.alike._Form

    def counting(*args: Any) -> Any:
        learnt[0] += 1
        return form(*args)

    monkeypatch.setattr(serve.alike, "_Form", counting)
    read = Alike(unpack)
    for n in range(3000):  # as long as each other, and never the same words
        assert read(pack({"type": "look", "instruction": f"number {n:05d}"}))["instruction"].endswith(f"{n:05d}")
    assert learnt[0] <= 12
    large = {"type": "look", "state": np.zeros(20_000, np.float32)}
    for _ in range(5):
        read(pack(large))
    for n in range(3000):  # three of a kind each time: one that would have been read sooner, and two that were not
        read(pack({"type": "look", "instruction": f"number {n // 3:05d}", "number": n % 100}))
    assert learnt[0] <= 24


def test_a_message_of_hundreds_of_numbers_is_not_learnt(monkeypatch: pytest.MonkeyPatch):
    """It would take far longer than to read it, and be kept."""
    walked, gaps = [0], serve.alike._gaps

    def counting(*args: Any) -> Any:
        for gap in gaps(*args):
            walked[0] += 1
            yield gap

    monkeypatch.setattr(serve.alike, "_gaps", counting)
    counted = Counted()
    read = Alike(counted)
    for n in range(2000):
        read(pack({str(key): key % 7 for key in range(100)} | {"number": n % 100}))
    assert counted.asked == 2000 and walked[0] < 12 * 40


def test_a_message_is_its_readers_own_but_for_what_never_changes():
    read = Alike(unpack)
    rng = np.random.default_rng(0)
    _, first, *rest = [read(pack(chunk(rng, n))) for n in range(-1, 4)]
    timing = dict(rest[1]["timing"])
    for message in (first, *rest[:1]):
        message["timing"]["infer"] = message["seq"] = message["type"] = message["more"] = message["timing"]["more"] = "mine"
    assert read(pack(chunk(rng, 1)))["type"] == "chunk" and "more" not in read(pack(chunk(rng, 2)))
    assert "more" not in read(pack(chunk(rng, 3)))["timing"]
    assert rest[1]["timing"] == timing and rest[1]["seq"] == 2
    assert not np.shares_memory(rest[1]["actions"], rest[2]["actions"])
