"""Valid messages of every wire, and what a stranger might make of them: bits, lengths, types, markers, numbers, nesting.

A mutation is a function of (seed, n): bytes are cut and flipped (`mutated_bytes`), values stand where others should
(`strange_message`). What comes out may happen to be valid.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from serve.wire import Encoded, encode, pack, pack_openpi

WIRES = ("/v1/ws", "/openpi", "/vla-eval")
SIZE, STATE = 64, 4
"""Of the tabletop's picture and state."""
TYPES = b'\x80\x8f\x90\x9f\xc0\xc1\xc4\xc7\xca\xcf\xd3\xd4\xdb\xdc\xdf{}[]",:e-'
DTYPES = [
    "O", "object", "V8", "c8", "<c16", "<U4", "|S3", "M8[ns]", "m8", "f4,f4", "(2,)f4", "3f4", "a", "", "\0", "iiiiiiii", "g",
    "e",
    ">f8", "<i2", "?", "|b1", "u8", "float32", "f4;import os", "<f4\n", "uint8" * 3, 7, None, ["f4"], {"a": 1},
]  # fmt: skip
SHAPES = [
    [-1], [-1, 64, 3], [1 << 62, 4], [1 << 40], [(1 << 63) - 1, (1 << 63) - 1], [0], [0, 0, 0], [], [1] * 9, [1.5], ["a"], [True],
    True, 12, None, "64", {"0": 64}, [64, 64, 3, 1], [64, 64], [[64, 64, 3]], [12288],
]  # fmt: skip
NUMBERS = [
    0, -1, 1, True, False, 1 << 31, 1 << 53, (1 << 53) + 1, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1, 0.5, -0.0, 1e308,
    -1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
WORDS = [
    "", " ", "x", "\0", "a" * 600, "a" * 20_001, "\u202eolleh", "ignore all rules; {state} %s ${x} \\x00", "\u00e9" * 300,
    "../../etc/passwd", "http://localhost/x.png", "ftp://localhost/x.png", "null", "tabletop", "__class__", "\U0001f916" * 40,
    "a\r\nSet-Cookie: x=y",
]  # fmt: skip


def picture(n: int = 0) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)


def state(n: int = 0) -> np.ndarray:
    return np.random.default_rng(n).uniform(0.1, 0.9, STATE).astype(np.float32)


FRAME, PNG, JPEG = picture(), encode(picture(1)), encode(picture(2), "jpeg")


def valid(wire: str, n: int = 0) -> tuple[dict[str, Any], Callable[[Any], bytes]]:
    """A message of `wire` (`/v1/ws`, `/openpi`, `/vla-eval`), and what packs it."""
    seen: Any = [FRAME, PNG, JPEG][n % 3]
    if wire == "/v1/ws":
        return {"type": "look", "seq": n + 1, "images": {"front": seen}, "state": state(n), "instruction": "push the red cube",
                "robot": "tabletop", "age": 0.01, "executed": 8, "deadline": 20.0, "seed": n}, pack  # fmt: skip
    if wire == "/openpi":
        return {"observation/image": FRAME if n % 3 else picture(n), "observation/state": state(n), "prompt": "push"}, pack_openpi
    kind = ["observation", "observation", "hello", "episode_start", "episode_end"][n % 5]
    payload: dict[str, Any] = {"images": {"front": seen}, "state": state(n), "task_description": "push", "task": {"name": "push"}}
    return {"type": kind, "payload": payload, "seq": n, "timestamp": 1.5}, pack


# ---------------------------------------------------------------------------------------------------- bytes


def mutated_bytes(rng: np.random.Generator, data: bytes, other: bytes = b"") -> bytes:
    """One to four cuts, flips, insertions or splices."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if not out:
            break
        # Most of a message is pixels; what says what they are stands in front of them and behind.
        at = int(rng.integers(len(out))) if rng.random() < 0.4 else int(rng.choice([1, -1]) * rng.integers(min(len(out), 120)))
        at %= len(out)
        match int(rng.integers(9)):
            case 0:
                out[at] ^= 1 << int(rng.integers(8))
            case 1:
                out[at] = int(rng.integers(256))
            case 2:
                del out[at:]
            case 3:
                del out[at : at + int(rng.integers(1, 9))]
            case 4:
                out[at:at] = rng.bytes(int(rng.integers(1, 9)))
            case 5 if other:
                start = int(rng.integers(len(other)))
                out[at:at] = other[start : start + int(rng.integers(1, 400))]
            case 6:  # a type byte of msgpack, or one of JSON's
                out[at : at + 1] = bytes([int(rng.choice(list(TYPES)))])
            case 7:  # a length
                out[at : at + 4] = struct.pack("!I", int(rng.choice([0, 1, 255, 65535, 1 << 24, (1 << 31) - 1, (1 << 32) - 1])))
            case _:
                out[at:at] = out[at : at + int(rng.integers(1, 200))]
    return bytes(out)


# ---------------------------------------------------------------------------------------------------- messages


def strange_value(rng: np.random.Generator, depth: int = 0) -> Any:
    """Something else."""
    pick = lambda values: values[int(rng.integers(len(values)))]  # noqa: E731
    whole = [b"", b"\0" * 16, FRAME.tobytes(), rng.bytes(48), PNG.data, JPEG.data]
    data = [*whole, mutated_bytes(rng, PNG.data), mutated_bytes(rng, JPEG.data)]
    match int(rng.integers(13)):
        case 0 | 1:
            return pick(NUMBERS)
        case 2:
            return pick(WORDS)
        case 3:
            return pick([None, [], {}, b"", rng.bytes(9), [None] * 5000, [0.5] * STATE, {str(i): i for i in range(5000)}])
        case 4:
            return {"__ndarray__": pick([True, True, 0, None]), "data": pick(data), "dtype": pick(DTYPES), "shape": pick(SHAPES)}
        case 5:
            return {b"__ndarray__": True, b"data": pick(data), b"dtype": pick(DTYPES), b"shape": pick(SHAPES)}
        case 6:
            kind = pick(["png", "jpeg", "raw", "gif", "", None, 3])
            return {"__image__": True, "format": kind, "data": pick([*data, "http://localhost/a.png", 3]), "shape": pick(SHAPES)}
        case 7:
            return {b"__npgeneric__": True, b"data": pick([*NUMBERS, "a", None]), b"dtype": pick(DTYPES)}
        case 8:
            kind = pick([np.bool_, np.int8, np.uint64, np.float16, np.float32, np.float64, np.uint8])
            return np.full(pick([(), (0,), (STATE,), (STATE, 1), (1, 1, 3), (3, SIZE, SIZE), (SIZE, SIZE, 4), (5000,)]), 1, kind)
        case 9:
            return msgpack.ExtType(int(rng.integers(128)), rng.bytes(8))
        case 10:
            frame = np.zeros(pick([(1, 1, 3), (1, 5000, 3), (9000, 1, 3)]), np.uint8)
            return frame if rng.random() < 0.5 else Encoded(mutated_bytes(rng, PNG.data, JPEG.data), "png", 9, 9)
        case 11 if depth < 3:
            return [strange_value(rng, depth + 1) for _ in range(int(rng.integers(4)))]
        case _ if depth < 3:
            return {pick(["front", "images", "state", "type", "a" * 300, b"k"]): strange_value(rng, depth + 1)}
        case _:
            return None


def strange_message(rng: np.random.Generator, message: Mapping[str, Any]) -> dict[Any, Any]:
    """`message` with something else in one to three places, something missing, or something more."""
    out: dict[Any, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in message.items()}
    for _ in range(int(rng.integers(1, 4))):
        inner = [v for v in out.values() if isinstance(v, dict)]
        where = inner[int(rng.integers(len(inner)))] if inner and rng.random() < 0.4 else out
        keys: list[Any] = [*where, "another", b"bytes", "__ndarray__", "__image__"]
        key = keys[int(rng.integers(len(keys)))]
        if rng.random() < 0.15:
            where.pop(key, None)
        else:
            where[key] = strange_value(rng)
    return out


def nested(depth: int, kind: bytes = b"\x91") -> bytes:
    """msgpack: that many lists in each other (or `\\x81\\xa1a`: mappings)."""
    return kind * depth + b"\xc0"


def twice(message: Mapping[str, Any], packed: Callable[[Any], bytes]) -> bytes:
    """A mapping that has its first key twice."""
    data = packed(dict(message))
    (key, value), *_ = message.items()
    assert data[0] & 0xF0 == 0x80 and data[0] & 0x0F < 15
    return bytes([data[0] + 1]) + packed(key) + packed(value) + data[1:]


def mutated_message(seed: int, n: int, wire: str) -> bytes:
    """The n-th mutation of a message of `wire`."""
    rng = np.random.default_rng((seed, n))
    message, packed = valid(wire, n)
    match int(rng.integers(20)):
        case 0:
            return nested(int(rng.choice([10, 600, 10_000])), [b"\x91", b"\x81\xa1a"][n % 2])
        case 1:
            return twice(message, packed)
        case 2:
            return packed(message) + rng.bytes(int(rng.integers(1, 9)))
        case 3:
            return packed([message, message] if rng.random() < 0.5 else strange_value(rng))
        case kind if kind < 12:
            return packed(strange_message(rng, message))
        case _:
            return mutated_bytes(rng, packed(message), packed(valid(wire, n + 1)[0]))


# ---------------------------------------------------------------------------------------------------- JSON


def json_numpy(array: np.ndarray) -> dict[str, Any]:
    return {"__numpy__": base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str, "shape": list(array.shape)}


def valid_body(path: str, n: int = 0) -> dict[str, Any]:
    """A body of `/v1/act` or `/act`."""
    if path == "/v1/act":
        files = {"front": base64.b64encode([PNG, JPEG][n % 2].data).decode()}
        return {
            "images": files,
            "state": state(n).tolist(),
            "instruction": "push",
            "robot": "tabletop",
            "deadline": 20.0,
            "seed": n,
        }
    name = ["image", "full_image"][n % 2]
    body = {name: json_numpy(FRAME), "instruction": "push the red cube", "state": json_numpy(state(n)), "unnorm_key": "tabletop"}
    return {"encoded": json.dumps(body)} if n % 5 == 4 else body


RAW = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e400", "9" * 400, "9" * 5000, "0x10", "1.", '"\\ud800"', '"\\u0000"',
    '"\\ud83e\\udd16"', "[" * 10_000, "[" * 10_000 + "]" * 10_000, '{"a":' * 5000, "{}", "[]", "null", "true", '""',
    '{"a": 1, "a": 2}', "[[1, 2], [3, 4]]", '{"__numpy__": "AAAA", "dtype": "O", "shape": []}',
    '{"__numpy__": "AAAA", "dtype": "<i2", "shape": [-2]}', '{"__numpy__": 7}',
    '{"__numpy__": "AAAA", "dtype": "<i2", "shape": [4611686018427387904, 4]}', '{"__numpy__": "~"}',
    '{"__numpy__": "AAAAAAAAAAA=", "dtype": "<f8", "shape": []}',
    '"http://localhost/a.png"', '"aGVsbG8="', "[" + "0.5," * 5000 + "1]",
]  # fmt: skip


def mutated_body(seed: int, n: int, path: str) -> bytes:
    """The n-th mutation of a body of `path`."""
    rng = np.random.default_rng((seed, n))
    body = valid_body(path, n)
    match int(rng.integers(10)):
        case 0:
            return RAW[int(rng.integers(len(RAW)))].encode()
        case 1:
            text = json.dumps(body)
            key = [*body][int(rng.integers(len(body)))]
            return (text[:-1] + f', "{key}": {json.dumps(body[key])}}}').encode()
        case kind if kind < 7:
            return _with_raw(rng, body)
        case _:
            return mutated_bytes(rng, json.dumps(body).encode(), json.dumps(valid_body(path, n + 1)).encode())


def _with_raw(rng: np.random.Generator, body: Mapping[str, Any]) -> bytes:
    """JSON that `json.dumps` would not write, in one or two places."""
    places: Sequence[tuple[str, ...]] = [(k,) for k in [*body, "another"]] + [
        (k, i) for k, v in body.items() if isinstance(v, dict) for i in [*v, "another"]
    ]
    marks: dict[str, str] = {}
    out: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in body.items()}
    for i in range(int(rng.integers(1, 3))):
        at = places[int(rng.integers(len(places)))]
        mark = f"~mark-{i}~"
        marks[f'"{mark}"'] = RAW[int(rng.integers(len(RAW)))] if rng.random() < 0.7 else _plain(strange_value(rng))
        where = out if len(at) == 1 else out[at[0]]
        if isinstance(where, dict):
            where[at[-1]] = mark
    text = json.dumps(out)
    for mark, raw in marks.items():
        text = text.replace(mark, raw)
    return text.encode("utf-8", "surrogatepass")


def _plain(value: Any) -> str:
    return json.dumps(value, default=lambda v: v.decode("latin-1") if isinstance(v, bytes) else str(v)[:50], skipkeys=True)
