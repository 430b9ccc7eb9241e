"""Messages between a simulator's two interpreters: a JSON header and raw arrays over a socket, every size checked.

One message is `<header bytes><array bytes>` (two little-endian uint32), the header (UTF-8 JSON, `arrays` in it lists
[name, dtype, shape]), then the arrays' bytes one after the other in C order. Nothing in a message can run.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from typing import Any

import numpy as np

_SIZES = struct.Struct("<II")
MAX_HEADER, MAX_ARRAYS = 1 << 20, 1 << 26
"""Bytes of a header and of all its arrays: a larger number is not ours."""
_DTYPES = ("uint8", "float32", "float64")


class WireError(Exception):
    """Bytes that are no message of ours; the connection is of no use after it."""


def send(sock: socket.socket, header: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> None:
    """Write one message. `arrays`: name -> uint8, float32 or float64 of any shape. Raises `OSError` when nobody reads."""
    arrays = {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}
    listed = [[name, str(array.dtype), list(array.shape)] for name, array in arrays.items()]
    if any(dtype not in _DTYPES for _, dtype, _ in listed):
        raise TypeError(f"arrays of {_DTYPES} only: {listed}")
    text = json.dumps({**header, "arrays": listed}, allow_nan=False).encode()
    payload = b"".join(array.tobytes() for array in arrays.values())
    if len(text) > MAX_HEADER or len(payload) > MAX_ARRAYS:
        raise ValueError(f"a message of {len(text)} + {len(payload)} bytes")
    sock.sendall(_SIZES.pack(len(text), len(payload)) + text + payload)


def receive(sock: socket.socket) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read one message: (header, arrays by name). Raises `EOFError` at the end, `WireError` for anything not ours."""
    length, size = _SIZES.unpack(_exactly(sock, _SIZES.size))
    if length > MAX_HEADER or size > MAX_ARRAYS:
        raise WireError(f"a message of {length} + {size} bytes announced")
    text, payload = _exactly(sock, length), memoryview(_exactly(sock, size))
    try:
        header = json.loads(text)
        listed = [(str(name), str(dtype), tuple(int(n) for n in shape)) for name, dtype, shape in header.pop("arrays")]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WireError(f"a header that is not ours: {bytes(text[:80])!r}") from error
    arrays, at = {}, 0
    for name, dtype, shape in listed:
        if dtype not in _DTYPES or any(n < 0 for n in shape):
            raise WireError(f"array {name!r} of {dtype} {shape}")
        end = at + math.prod(shape) * np.dtype(dtype).itemsize
        if end > size:
            raise WireError(f"array {name!r} of {dtype} {shape} is longer than its message")
        arrays[name] = np.frombuffer(payload[at:end], dtype).reshape(shape).copy()
        at = end
    if at != size:
        raise WireError(f"{size - at} bytes beyond the last array")
    return header, arrays


def _exactly(sock: socket.socket, count: int) -> bytearray:
    """`count` bytes, or `EOFError`."""
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise EOFError("the other side has gone")
        view = view[got:]
    return data
