"""Messages that are alike: most of a conversation is read in one step.

    read = Reader(unpack)                                    # one for each conversation, in place of `unpack`
    message = read(data)                                     # what `unpack(data)` returns, or raises

A robot's looks differ in a few numbers, and so do the chunks it is answered with. Where those lie in a message is found out once;
the next one that has the same bytes around them is taken apart by `struct` in one step, and nothing else of it is looked at: it
was judged before. Whatever is different is read as ever. It takes half the time, on either end (docs/results.md).

Between a server and its model's process, who trust each other, what is alike is not even said: such a message begins with
`AGAIN`, and numbers follow.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

_MOST = 4 << 10
"""Bytes of a message that is worth remembering: what is larger holds pictures, and is not walked through for long."""
_NUMBERS = {0xCB: "d", 0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q"}
"""msgpack's tags of numbers, and what `struct` calls what follows."""
_BYTES = {0xC4: 2, 0xC5: 3, 0xC6: 5}
"""Its tags of byte strings, and how long it and their length are together."""
_SMALL = 0x80
"""Whole numbers below it are their own tag."""


class Reader:
    """Reads mappings as `unpack` does, sooner where they are alike. What is equal in two of them may be one and the same object:
    it is nobody's to change."""

    def __init__(self, unpack: Callable[[bytes | memoryview], Any]) -> None:
        self._unpack = unpack
        self._form: _Form | None = None
        self._size = -1
        """Bytes of the last message that was read by `unpack`: of two as long as each other the second is worth learning."""
        self._wasted = self._pause = 0
        """Forms in a row that fitted nothing; messages until one is learnt again."""

    def __call__(self, data: bytes | memoryview) -> Any:
        form = self._form
        if form is not None and len(data) == form.size and (message := form.read(data)) is not None:
            return message
        message = self._unpack(data)
        if len(data) == self._size and len(data) <= _MOST and isinstance(message, dict):
            self._learn(bytes(data), message)
        self._size = len(data)
        return message

    def _learn(self, data: bytes, message: dict[Any, Any]) -> None:
        """To learn costs twice as much as to read: who sends what is never alike does not pay that for every message."""
        if self._form is not None:
            self._wasted = 0 if self._form.used else self._wasted + 1
            self._form, self._pause = None, (1 << min(self._wasted, 10)) - 1
        if self._pause:
            self._pause -= 1
            return
        self._form = _Form(data, message)


@dataclass(frozen=True)
class _Gap:
    """A number, or the numbers of an array, in a message."""

    begin: int
    code: str
    """What `struct` calls it."""
    outer: Any
    """Key of the mapping it is in; None for the message itself."""
    key: Any
    dtype: np.dtype | None = None
    shape: tuple[int, ...] = ()
    small: bool = False
    """It is its own tag."""


class _Form:
    """One message, and where its numbers lie."""

    def __init__(self, data: bytes, message: dict[Any, Any]) -> None:
        self.size, self.used = len(data), False
        self._message = message
        gaps, at, layout = list(_gaps(data, message)), 0, ">"
        for gap in gaps:
            layout += f"{gap.begin - at}s{gap.code}"
            at = gap.begin + struct.calcsize(f">{gap.code}")
        self._parts = struct.Struct(f"{layout}{len(data) - at}s")
        self._same = self._parts.unpack(data)[::2]
        self._gaps = [(gap.outer, gap.key, gap.dtype, gap.shape, gap.small) for gap in gaps]
        self._inner = {gap.outer: message[gap.outer] for gap in gaps if gap.outer is not None}

    def read(self, data: bytes | memoryview) -> dict[Any, Any] | None:
        """None for a message that is another."""
        parts = self._parts.unpack(data)
        if parts[::2] != self._same:
            return None
        message = self._message.copy()
        for key, inner in self._inner.items():
            message[key] = inner.copy()
        for (outer, key, dtype, shape, small), value in zip(self._gaps, parts[1::2], strict=True):
            if dtype is not None:
                value = np.frombuffer(value, dtype).reshape(shape)
            elif small and value >= _SMALL:
                return None
            if outer is None:
                message[key] = value
            else:
                message[outer][key] = value
        self.used = True
        return message


def _gaps(data: bytes, message: Mapping[Any, Any]) -> Iterator[_Gap]:
    """In their order: floats and arrays of numbers in the message and in mappings in it; whole numbers and byte strings in the
    message itself."""
    walk = msgpack.Unpacker(max_buffer_size=len(data), raw=False)
    walk.feed(data)
    for _ in range(walk.read_map_header()):
        key = walk.unpack()
        begin, value = walk.tell(), message[key]
        if (tag := data[begin]) & 0xF0 == 0x80 or tag in (0xDE, 0xDF):
            inner = [(walk.unpack(), walk.tell(), walk.skip()) for _ in range(walk.read_map_header())]
            if isinstance(value, dict):
                yield from (_Gap(at + 1, "d", key, name) for name, at, _ in inner if data[at] == 0xCB)
            elif isinstance(value, np.ndarray) and value.nbytes:
                found = [at for name, at, _ in inner if name in ("data", b"data")]
                if len(found) == 1 and (head := _BYTES.get(data[found[0]])) is not None:
                    yield _Gap(found[0] + head, f"{value.nbytes}s", None, key, value.dtype, value.shape)
            continue
        walk.skip()
        if (code := _NUMBERS.get(tag)) is not None:
            yield _Gap(begin + 1, code, None, key)
        elif tag < _SMALL:
            yield _Gap(begin, "B", None, key, small=True)
        elif (head := _BYTES.get(tag)) is not None and value:
            yield _Gap(begin + head, f"{len(value)}s", None, key)


# ---------------------------------------------------------------------------------------------------- to and from the model

AGAIN = b"\xc1\0\0\0"
"""As the last message that did not begin so, but for its numbers. No msgpack begins so."""
_HEAD = struct.Struct("<4s4xd")
"""`AGAIN`, and the seconds a batch took; arrays behind it are aligned."""
Kinds = list[tuple[np.dtype, tuple[int, ...], int]]
"""Type, shape and size of each array of a chunk."""


def kinds_of(results: Sequence[Any]) -> Kinds | None:
    """Of a batch's one chunk (actions, confidence, symbols); None where it came to anything else."""
    if len(results) != 1 or not isinstance(results[0], tuple):
        return None
    kinds = [(part.dtype, part.shape, part.size) for part in results[0]]
    return kinds if all(size for _, _, size in kinds) else None


def chunk_said(chunk: Sequence[np.ndarray], seconds: float) -> bytes:
    """A chunk of the same kinds as the last."""
    return b"".join((_HEAD.pack(AGAIN, seconds), *[part.tobytes() for part in chunk]))


def chunk_heard(data: bytes, kinds: Kinds) -> tuple[list[Any], float]:
    """The results that `chunk_said` says, and the seconds. Raises `ValueError` for other kinds."""
    parts, at = list[np.ndarray](), _HEAD.size
    for kind, shape, size in kinds:
        parts.append(np.frombuffer(data, kind, size, at).reshape(shape))
        at += parts[-1].nbytes
    if at != len(data):
        raise ValueError(f"a chunk of {len(data)} bytes, not {at}")
    return [tuple(parts)], _HEAD.unpack_from(data)[1]
