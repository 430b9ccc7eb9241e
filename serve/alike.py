"""Messages that are alike: most of a conversation is read in one step.

    read = Alike(unpack)                                     # one for each conversation, in place of `unpack`
    message = read(data)                                     # what `unpack(data)` returns, or raises

A robot's looks differ in a few numbers, and so do the chunks it is answered with. Where those lie in a message is found out once;
the next one that has the same bytes around them is taken apart by `struct` in one step, since whether the rest can be read was
found out before. Whatever is different, or larger than a look without its pixels, is read as ever. What a message *means* is
judged every time (`serve/wires/websocket.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import msgpack
import numpy as np

_MOST = 1 << 10
"""Bytes of a message that is worth remembering, mostly: what is larger holds pictures, and what a stranger sends is not kept."""
_GAPS = 32
"""Numbers and arrays of a message that is worth remembering; a chunk has nine."""
_WORTH = 8
"""Messages read by a form that make up for learning it."""
_NUMBERS = {0xCB: "d", 0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q"}
"""msgpack's tags of numbers, and what `struct` calls what follows."""
_BYTES = {0xC4: 2, 0xC5: 3, 0xC6: 5}
"""Its tags of byte strings, and how long it and their length are together."""
_SMALL = 0x80
"""Whole numbers below it are their own tag."""


class Alike:
    """Reads mappings as `unpack` does, sooner where they are alike. A mapping or list in them that is without such numbers is one
    and the same object from then on, by which it is known again: it is nobody's to change."""

    def __init__(self, unpack: Callable[[bytes | memoryview], Any], most: int = _MOST) -> None:
        """`most` bytes of a message that is remembered."""
        self._unpack, self._most = unpack, most
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
        if len(data) == self._size and len(data) <= self._most and isinstance(message, dict):
            self._learn(bytes(data), message)
        self._size = len(data)
        return message

    def _learn(self, data: bytes, message: dict[Any, Any]) -> None:
        """To learn costs twice as much as to read: who sends what is hardly ever alike does not pay that for every message."""
        if self._form is not None:
            self._wasted = 0 if self._form.used >= _WORTH else self._wasted + 1
            self._form, self._pause = None, (1 << min(self._wasted, 10)) - 1
        if self._pause:
            self._pause -= 1
            return
        gaps = list(islice(_gaps(data, message), _GAPS + 1))
        self._form = _Form(data, message, gaps) if len(gaps) <= _GAPS else None
        if self._form is None:
            self._wasted += 1
            self._pause = (1 << min(self._wasted, 10)) - 1


_Gap = tuple[int, str, tuple[Any, Any, np.dtype | None, tuple[int, ...], bool]]
"""Where a number or an array's numbers begin and what `struct` calls them; the key of the mapping they are in (None: the message
itself), their own key, type and shape of an array, whether a number is its own tag."""


class _Form:
    """One message, and where its numbers lie."""

    def __init__(self, data: bytes, message: dict[Any, Any], gaps: Sequence[_Gap]) -> None:
        self.size, self.used = len(data), 0
        self._gaps, at, layout = [gap for _, _, gap in gaps], 0, ">"
        for begin, code, _ in gaps:
            layout += f"{begin - at}s{code}"
            at = begin + struct.calcsize(f">{code}")
        self._parts = struct.Struct(f"{layout}{len(data) - at}s")
        self._same = self._parts.unpack(data)[::2]
        self._message = message.copy()
        self._inner = {outer: message[outer].copy() for outer, *_ in self._gaps if outer is not None}

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
        self.used += 1
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
            inner = list[tuple[Any, int]]()
            for _ in range(walk.read_map_header()):
                inner.append((walk.unpack(), walk.tell()))
                walk.skip()
            if isinstance(value, dict):
                yield from ((at + 1, "d", (key, name, None, (), False)) for name, at in inner if data[at] == 0xCB)
            elif isinstance(value, np.ndarray) and value.nbytes:
                found = [at for name, at in inner if name in ("data", b"data")]
                if len(found) == 1 and (head := _BYTES.get(data[found[0]])) is not None:
                    yield found[0] + head, f"{value.nbytes}s", (None, key, value.dtype, value.shape, False)
            continue
        walk.skip()
        if (code := _NUMBERS.get(tag)) is not None:
            yield begin + 1, code, (None, key, None, (), False)
        elif tag < _SMALL:
            yield begin, "B", (None, key, None, (), True)
        elif (head := _BYTES.get(tag)) is not None and value:
            yield begin + head, f"{len(value)}s", (None, key, None, (), False)
