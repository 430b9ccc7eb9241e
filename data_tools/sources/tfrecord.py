"""TFRecord files and the `tf.train.Example` messages in them, read without TensorFlow.

A TFRecord is `length (8 bytes, little endian), masked crc32c of these 8, payload, masked crc32c of the payload`, one after
the other. Both sums are verified here: the first when a file is indexed, the second when a record is read. The index is
what lets a worker read one record without touching the rest of its file.

No wheel of the house holds a compiled crc32c, so the sum is computed with numpy, see `crc32c`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from vla.errors import DataError

Values = list[memoryview] | np.ndarray
"""The values of one feature: byte strings, (n,) float32 or (n,) int64."""

RESTORE = "restore this file from its source"
_HEADER, _FOOTER = 12, 4
_POLYNOMIAL = 0x82F63B78  # Castagnoli, lowest bit first
_FAR, _NEAR, _NEXT = 5685, 5259, 4323  # words of 64 bits, see _shorten
_PIECE = 1 << 16  # words taken at once: half a megabyte stays in the second-level cache
_SMALL = 512  # bytes under which a plain loop is faster


# --- the checksum ----------------------------------------------------------------------------------------------------


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of `data`, at memory-like speed for records of a megabyte and more.

    A sum depends only on the message modulo its polynomial, so a long message is first shortened modulo a multiple of that
    polynomial with very few terms (`_shorten`, whole words XORed), then folded in halves (`_fold`), then looped over.
    """
    view = memoryview(data).cast("B")
    if len(view) < _SMALL:
        return _loop(0xFFFFFFFF, view) ^ 0xFFFFFFFF
    odd = len(view) % 8
    state = _loop(0xFFFFFFFF, view[:odd])
    body = np.frombuffer(view[odd:], np.uint8)
    words = _shorten(body, state) if len(body) > 8 * (_FAR + _NEXT) else _started(body, state)
    return _loop(0, memoryview(_fold(words.view("<u4")).tobytes())) ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """The form in which TFRecord stores a sum."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _table() -> list[int]:
    rows = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
        rows.append(byte)
    return rows


_TABLE = _table()


def _loop(state: int, data: memoryview) -> int:
    for byte in data:
        state = (state >> 8) ^ _TABLE[(state ^ byte) & 0xFF]
    return state


def _started(body: np.ndarray, state: int) -> np.ndarray:
    """`body` as words, with the state reached before it worked into its first four bytes."""
    words = np.empty(len(body) // 8, "<u8")
    words.view(np.uint8)[:] = body
    words[0] ^= np.uint64(state)
    return words


def _shorten(body: np.ndarray, state: int) -> np.ndarray:
    """A message of `_FAR` words with the same remainder as `body`.

    y^5685 + y^1362 + y^426 + 1, with y = x^64, is a multiple of the polynomial (found by matching sums of two powers; a
    test checks it). So a word may be replaced by itself 4323, 5259 and 5685 words later: three XORs of long rows, no
    table, and rows as long as the smallest of these distances can be done at once.
    """
    buffer = np.zeros(_FAR + _PIECE, "<u8")
    raw = buffer.view(np.uint8)
    for start in range(0, len(body), 8 * _PIECE):
        part = body[start : start + 8 * _PIECE]
        count = len(part) // 8
        raw[8 * _FAR : 8 * _FAR + len(part)] = part
        if not start:
            buffer[_FAR] ^= np.uint64(state)
        for first in range(0, count, _NEXT):
            last = min(first + _NEXT, count)
            row = buffer[first:last]
            for distance in (_NEXT, _NEAR, _FAR):
                buffer[first + distance : last + distance] ^= row
        buffer[:_FAR] = buffer[count : count + _FAR].copy()
    return buffer[:_FAR].copy()


def _fold(words: np.ndarray) -> np.ndarray:
    """The last 16 of a message of 32-bit words, the earlier ones folded in: (n,) -> (16,)."""
    while len(words) > 16:
        power = (len(words) - 1).bit_length() - 1
        move = len(words) - (1 << power)
        ahead = _ahead(power)
        heads = words[:move].view(np.uint8).reshape(-1, 4)
        words[1 << power :] ^= ahead[0][heads[:, 0]] ^ ahead[1][heads[:, 1]] ^ ahead[2][heads[:, 2]] ^ ahead[3][heads[:, 3]]
        words = words[move:]
    return words


@lru_cache
def _ahead(power: int) -> np.ndarray:
    """(4, 256) uint32: what each byte of a word amounts to 2^power words later."""
    bits = np.array(1, np.uint32) << np.arange(32, dtype=np.uint32)
    if power:
        half = _ahead(power - 1)
        bits = _advance(half, _advance(half, bits))
    else:
        table = np.array(_TABLE, np.uint32)
        for _ in range(4):
            bits = (bits >> np.uint32(8)) ^ table[bits & np.uint32(0xFF)]
    rows = np.zeros((4, 256), np.uint32)
    bytes_ = np.arange(256)
    for bit in range(32):
        rows[bit // 8] ^= np.where(bytes_ >> (bit % 8) & 1, bits[bit], np.uint32(0))
    return rows


def _advance(ahead: np.ndarray, words: np.ndarray) -> np.ndarray:
    parts = words.view(np.uint8).reshape(-1, 4)
    return ahead[0][parts[:, 0]] ^ ahead[1][parts[:, 1]] ^ ahead[2][parts[:, 2]] ^ ahead[3][parts[:, 3]]


# --- the framing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """Where the records of one file lie, and what is wrong with it."""

    path: Path
    offsets: np.ndarray
    """(n,) int64: where each record begins (its length field), for the records that are whole."""
    lengths: np.ndarray
    """(n,) int64: bytes of payload."""
    damage: list[DataError] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, number: int) -> memoryview:
        """The payload of record `number`, its checksum verified. Reads that record only.

        Raises `DataError` naming the file, the record and its byte offset.
        """
        offset, length = int(self.offsets[number]), int(self.lengths[number])
        where = f"{self.path}, record {number} at byte {offset}"
        try:
            with open(self.path, "rb", buffering=0) as file:
                data = _read_at(file.fileno(), offset + _HEADER, length + _FOOTER)
        except OSError as error:
            raise DataError(where, found=error.strerror or error, expected="a readable file", fix=RESTORE) from error
        if len(data) < length + _FOOTER:
            raise DataError(where, found=f"the file ends after {len(data)} of {length + _FOOTER} bytes; it has changed since "
                            "it was listed", expected="the file as it was", fix=RESTORE)  # fmt: skip
        payload, stored = memoryview(data)[:length], int.from_bytes(data[length:], "little")
        if masked(crc32c(payload)) != stored:
            raise DataError(where, found=f"{length} bytes whose crc32c differs from the stored one",
                            expected="an undamaged record", fix=RESTORE)  # fmt: skip
        return payload


def index_shard(path: Path) -> Shard:
    """Find the records of a TFRecord file by its length fields, each checked; payloads are not read.

    What follows a damaged or cut-off record cannot be found and is left out: `Shard.damage` says from where on.
    """
    offsets: list[int] = []
    lengths: list[int] = []

    def found(damage: list[DataError]) -> Shard:
        return Shard(path, np.array(offsets, np.int64), np.array(lengths, np.int64), damage)

    def broken(what: str, expected: str) -> Shard:
        where = f"{path}, record {len(offsets)} at byte {position}"
        return found([DataError(where, found=what, expected=expected, fix=RESTORE)])

    position = 0
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while position < size:
                header = _read_at(file.fileno(), position, _HEADER)
                if len(header) < _HEADER:
                    return broken(f"truncated: {len(header)} bytes of a record's header", f"{_HEADER} bytes, then the record")
                length = int.from_bytes(header[:8], "little")
                if masked(crc32c(header[:8])) != int.from_bytes(header[8:], "little"):
                    if not position and header[:2] == b"\x1f\x8b":
                        return broken("a gzip file", "an uncompressed TFRecord file")
                    return broken("a length whose crc32c differs from the stored one; nothing behind it can be found",
                                  "an undamaged header")  # fmt: skip
                end = position + _HEADER + length + _FOOTER
                if end > size:
                    return broken(f"truncated: the file ends at byte {size}", f"a record up to byte {end}")
                offsets.append(position)
                lengths.append(length)
                position = end
    except OSError as error:
        return found([DataError(path, found=error.strerror or error, expected="a readable TFRecord file", fix=RESTORE)])
    return found([])


def _read_at(fd: int, offset: int, count: int) -> bytes:
    data = os.pread(fd, count, offset)
    while len(data) < count:  # one call returns 2 GiB at most, and less from some network disks
        more = os.pread(fd, count - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


# --- tf.train.Example ------------------------------------------------------------------------------------------------


def parse_example(data: bytes | memoryview) -> dict[str, Values]:
    """The features of a serialised `tf.train.Example`: name -> byte strings, (n,) float32 or (n,) int64.

    Lists may be packed or not, features in any order, unknown fields are passed over as protobuf has it. A feature without
    any list is an empty list. Byte strings are views into `data`. Raises `ValueError` when `data` is no such message.
    """
    features: dict[str, Values] = {}
    for number, part in _message(memoryview(data)):
        if number == 1:  # Example.features
            for inner, entry in _message(part):
                if inner == 1:  # Features.feature, one entry of the map; a later one replaces an earlier
                    name, values = _entry(entry)
                    features[name] = values
    return features


def _entry(data: memoryview) -> tuple[str, Values]:
    name, value = "", memoryview(b"")
    for number, part in _message(data):
        if number == 1:
            name = bytes(part).decode()
        elif number == 2:
            value = part
    kind, lists = 0, []
    for number, part in _message(value):
        if number in (1, 2, 3):
            lists = [*lists, part] if number == kind else [part]  # it is a `oneof`: the last kind counts
            kind = number
    if kind == 1:
        return name, [part for one in lists for number, part in _message(one) if number == 1]
    if kind == 2:
        return name, np.concatenate([_floats(one) for one in lists])
    if kind == 3:
        return name, np.concatenate([_integers(one) for one in lists])
    return name, []


def _floats(data: memoryview) -> np.ndarray:
    parts = []
    for number, wire, part in _fields(data):
        if number == 1 and wire in (2, 5):
            if len(part) % 4:
                raise ValueError(f"a list of floats of {len(part)} bytes")
            parts.append(np.frombuffer(part, "<f4"))
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _integers(data: memoryview) -> np.ndarray:
    parts = [_varints(part) for number, wire, part in _fields(data) if number == 1 and wire in (0, 2)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _varints(data: memoryview) -> np.ndarray:
    """Integers of seven bits per byte, the lowest first, the highest bit saying that more follows: (n,) int64."""
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 0x80)
    if len(ends) == len(raw):
        return raw.astype(np.int64)
    if raw[-1] >= 0x80:
        raise ValueError("an integer that is cut off")
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > 10:
        raise ValueError("an integer of more than ten bytes")
    place = np.arange(len(raw)) - np.repeat(starts, sizes)
    return np.bitwise_or.reduceat((raw & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64), starts).view(np.int64)


def _message(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a message: (field number, content)."""
    return ((number, part) for number, wire, part in _fields(data) if wire == 2)


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Every field of a message: (field number, wire type, its bytes)."""
    position, end = 0, len(data)
    while position < end:
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if not number:
            raise ValueError("a field with the number 0")
        if wire == 2:
            length, position = _varint(data, position)
        elif wire == 0:
            length = _varint(data, position)[1] - position
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of wire type {wire}")
        if position + length > end:
            raise ValueError(f"field {number} is {length} bytes long, {end - position} are left")
        yield number, wire, data[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("an integer that is cut off")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("an integer of more than ten bytes")
