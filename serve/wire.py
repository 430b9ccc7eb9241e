"""Messages between a robot and a server: msgpack with numpy arrays and pictures in it. No torch, no pickle, nothing is trusted.

    data = pack({"images": {"front": frame}, "state": state})     # arrays raw; `Encoded` pictures as they are
    unpack(data)["images"]["front"]                               # (h, w, 3) uint8, a view of `data`

One reader understands three dialects: our own, which is vla-eval's (`{"__ndarray__": true, "data", "dtype", "shape"}`,
`{"__image__": true, "format": "jpeg" | "png" | "raw", "data", "shape"}`), and openpi's, whose markers are byte strings. Sizes are
compared with the bytes that are there before anything is made of them; a picture in a file format is only looked at (`Encoded`):
its header is read and bounded, and who needs its pixels calls `decode()`.

Shapes as in `vla/batch.py`; h, w pixels.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgpack
import numpy as np

from vla.errors import DataError

PROTOCOL = 1
"""Of our own WebSocket; a server and a client of different ones refuse each other."""
KINDS = "biuf"
"""Kinds of numbers that travel: booleans, integers, floats. Objects, records, strings and complex numbers do not."""
_DTYPE = re.compile(r"[|<>=]?(?:\?|b1|[iu][1248]|f[248])|bool|u?int(?:8|16|32|64)|float(?:16|32|64)")
_MARKS = frozenset(("__image__", "__ndarray__", b"__ndarray__", b"__npgeneric__"))
"""Keys of a mapping that stands for something else."""
_MAGIC = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png"}


@dataclass(frozen=True)
class Limits:
    """What one message may hold."""

    message: int = 32 << 20
    """Bytes of a message, whichever wire it comes by."""
    pixels: int = 4096 * 2304
    """Of one picture, by its header."""
    side: int = 8192
    """Pixels of a picture's longer side."""
    pictures: int = 16
    text: int = 20_000
    """Characters of one string that is no picture."""
    items: int = 4_096
    """Entries of one list or mapping."""
    values: int = 100_000
    """Entries of all of them: a byte on the wire may be a mapping of 64 bytes here."""
    segments: int = 8_192
    """Of a picture's file; somebody has to walk over all of them."""


LIMITS = Limits()


class WireError(DataError):
    """A message that cannot be read, or holds more than it may. `too_large` tells the two apart."""

    def __init__(self, where: object, *, found: object, expected: object, fix: str, too_large: bool = False) -> None:
        super().__init__(where, found=found, expected=expected, fix=fix)
        self.too_large = too_large


@dataclass(frozen=True)
class Encoded:
    """A picture as a file: its header was read, its pixels were not."""

    data: bytes
    format: str
    """`jpeg` or `png`."""
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of what `decode` returns."""
        return self.height, self.width, 3

    def decode(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB. Raises `WireError` for a file that is damaged behind its header."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.data), formats=(self.format.upper(),)) as picture:
                if picture.size != (self.width, self.height):
                    raise ValueError(f"{picture.size[0]} x {picture.size[1]} pixels for one reader, other ones for another")
                frame = np.asarray(picture.convert("RGB"))
        except Exception as error:  # damaged files make readers raise nearly anything
            said = str(error).partition("<")[0][:200]  # "cannot identify image file <_io.BytesIO object at 0x..."
            raise _wrong("picture", f"a damaged {self.format}: {said}", "a whole file") from error
        if frame.shape != self.shape:
            raise _wrong("picture", f"{frame.shape} of a file that says {self.shape}", "what its header says")
        return frame


Picture = np.ndarray | Encoded
_KNOWN = {name: np.dtype(name) for name in ("|u1", "<f4", "<f8", "<i8")}
"""The ones that come all the time."""


def picture_of(data: bytes, limits: Limits = LIMITS) -> Encoded:
    """A JPEG or PNG file's bytes, header read. Raises `WireError` for another format and for more pixels than allowed."""
    data = bytes(data)
    kind = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
    if kind is None:
        raise _wrong("picture", f"{len(data)} bytes that begin with {data[:8].hex() or 'nothing'}", "a JPEG or PNG file")
    width, height = (_png_size if kind == "png" else _jpeg_size)(data, limits)
    bounded(height, width, limits)
    return Encoded(data, kind, height, width)


def _png_size(data: bytes, limits: Limits) -> tuple[int, int]:
    """(width, height). Who decodes it walks over every chunk, so they are counted."""
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise _wrong("picture", "a png without a header", "a whole file")
    at = 8
    for _ in range(limits.segments):
        kind, at = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if at >= len(data) or kind == b"IEND":
            return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    raise _wrong("picture", f"a png of more than {limits.segments:,} chunks", "fewer", too_large=True)


_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
"""Markers before a JPEG's size: baseline, extended, progressive. Nobody sends the other kinds, few can read them."""
_SCANS = 100
"""Of a progressive JPEG; each costs as much as all of its pixels."""


def _jpeg_size(data: bytes, limits: Limits) -> tuple[int, int]:
    """(width, height), from the segments before the first scan."""
    at, size = 2, (0, 0)
    for _ in range(limits.segments):
        while data[at : at + 2] == b"\xff\xff":  # filling
            at += 1
        marker, length = data[at + 1 : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        if at + 4 > len(data) or data[at] != 0xFF or length < 2:
            break
        if marker[0] in _FRAMES and length >= 8 and size == (0, 0):
            size = int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        if marker == b"\xda" and size != (0, 0):
            if data.count(b"\xff\xda", at) > _SCANS:
                raise _wrong("picture", f"a jpeg of more than {_SCANS} scans", "fewer", too_large=True)
            return size
        at += 2 + length
    else:
        raise _wrong("picture", f"a jpeg of more than {limits.segments:,} segments", "fewer", too_large=True)
    raise _wrong("picture", "a jpeg without a header we read", "a whole file: baseline or progressive")


def encode(frame: np.ndarray, format: str = "png", quality: int = 95) -> Encoded:
    """(h, w, 3) uint8 -> a file: `png` (the same pixels) or `jpeg`."""
    from PIL import Image

    file = io.BytesIO()
    options = {"quality": quality} if format == "jpeg" else {"compress_level": 1}
    Image.fromarray(frame).save(file, format.upper(), **options)
    return Encoded(file.getvalue(), format, frame.shape[0], frame.shape[1])


def bounded(height: int, width: int, limits: Limits) -> None:
    """Raise `WireError` for a picture of more pixels than allowed."""
    if not (0 < height <= limits.side and 0 < width <= limits.side and height * width <= limits.pixels):
        raise _wrong("picture", f"{width} x {height} pixels",
                     f"at most {limits.pixels:,} pixels, {limits.side} a side", too_large=True)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- reading


def unpack(data: bytes | bytearray | memoryview, limits: Limits = LIMITS) -> Any:
    """A message's content. Arrays are read-only views of copies of its bytes, pictures arrays or `Encoded`.

    Raises `WireError` for what is no msgpack, too large, or holds an array that is not what it says.
    """
    if len(data) > limits.message:
        raise _wrong("message", f"{len(data):,} bytes", f"at most {limits.message:,}", too_large=True)
    pictures, left = 0, limits.values
    few = len(data) <= limits.values  # no value takes less than a byte

    def listed(entries: list[Any]) -> list[Any]:
        nonlocal left
        if (left := left - 1 - len(entries)) < 0:
            raise _too_many(limits)
        return entries

    def mapping(pairs: list[tuple[Any, Any]]) -> Any:
        nonlocal pictures, left
        entries = dict(pairs)
        if (left := left - 1 - len(pairs)) < 0:
            raise _too_many(limits)
        if len(entries) != len(pairs):
            raise _wrong("message", "a key twice in one mapping", "every key once")
        if _MARKS.isdisjoint(entries):
            return entries
        if "__image__" in entries:
            pictures += 1
            if pictures > limits.pictures:
                raise _wrong("message", f"more than {limits.pictures} pictures", f"at most {limits.pictures}", too_large=True)
            return _picture(entries, limits)
        if "__ndarray__" in entries:
            return _array(entries)
        if b"__ndarray__" in entries:
            return _array({k.decode("ascii", "replace") if isinstance(k, bytes) else k: v for k, v in entries.items()})
        return _number(entries.get(b"data"), entries.get(b"dtype"))

    try:
        return msgpack.unpackb(
            data, object_pairs_hook=mapping, list_hook=None if few else listed, raw=False, strict_map_key=True,
            max_str_len=limits.text, max_ext_len=0, max_bin_len=limits.message, max_array_len=limits.items,
            max_map_len=limits.items,
        )  # fmt: skip
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.UnpackException) as error:
        text = str(error)[:200] or type(error).__name__
        raise _wrong("message", f"not msgpack we read: {text}", "one msgpack value within the limits") from error


def _too_many(limits: Limits) -> WireError:
    return _wrong("message", f"more than {limits.values:,} values", "fewer: pictures and states are arrays", too_large=True)


def array_of(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    """The array that `data` bytes, a dtype's name and a shape say. Raises `WireError` unless the three agree."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise _wrong("array", f"data that is {type(data).__name__}", "bytes")
    kind = _dtype(dtype)
    if not isinstance(shape, (list, tuple)) or len(shape) > 8:
        raise _no_shape(shape)
    size = kind.itemsize
    for n in shape:
        if type(n) is not int or n < 0:
            raise _no_shape(shape)
        size *= n
    if size != len(data):
        raise _wrong("array", f"{len(data):,} bytes", f"{size:,}: {kind} {tuple(shape)}")
    return np.frombuffer(data, kind).reshape(shape)


def _no_shape(shape: Any) -> WireError:
    return _wrong("array", f"shape {str(shape)[:80]}", "at most 8 whole numbers, none below 0")


def _array(entry: Mapping[Any, Any]) -> np.ndarray:
    return array_of(entry.get("data"), entry.get("dtype"), entry.get("shape"))


def _picture(entry: Mapping[Any, Any], limits: Limits) -> Picture:
    if entry.get("format") == "raw":
        frame = array_of(entry.get("data"), entry.get("dtype", "|u1"), entry.get("shape"))
        if frame.dtype != np.uint8 or frame.ndim != 3:
            raise _wrong("picture", f"{frame.dtype} {frame.shape}", "uint8 (h, w, channels)")
        bounded(frame.shape[0], frame.shape[1], limits)
        return frame
    if not isinstance(data := entry.get("data"), bytes):
        raise _wrong("picture", f"data that is {type(data).__name__}", "a file's bytes; nothing is fetched")
    return picture_of(data, limits)


def _number(value: Any, dtype: Any) -> Any:
    kind = _dtype(dtype)
    if not isinstance(value, (bool, int, float)):
        raise _wrong("number", type(value).__name__, "a number")
    try:
        with np.errstate(over="raise"):
            return kind.type(value)
    except (OverflowError, ValueError, FloatingPointError) as error:
        raise _wrong("number", f"{value} as {kind}", "one that fits") from error


def _dtype(name: Any) -> np.dtype:
    if (known := _KNOWN.get(name) if isinstance(name, str) else None) is not None:
        return known
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):  # numpy itself reads a small language there
        raise _wrong("array", f"dtype {str(name)[:40]!r}", f"a name of one of the kinds {', '.join(KINDS)}: <f4, float32, |u1")
    return np.dtype(name)


def _wrong(where: str, found: str, expected: str, too_large: bool = False) -> WireError:
    return WireError(where, found=found, expected=expected, fix="see docs/serving.md for the formats", too_large=too_large)


# ---------------------------------------------------------------------------------------------------- writing


def binary_head(size: int, masked: bool) -> bytes:
    """How a WebSocket's frame of a whole binary message of `size` bytes begins, without the mask itself (RFC 6455, 5.2)."""
    bit = 0x80 if masked else 0
    if size < 126:
        return bytes((0x82, bit | size))
    width = 2 if size < 1 << 16 else 8
    return bytes((0x82, bit | (126 if width == 2 else 127))) + size.to_bytes(width, "big")


def pack(message: Any) -> bytes:
    """Our own and vla-eval's dialect. Raises `WireError` for an array whose numbers do not travel."""
    return _packed(message, _plain)


def pieces(message: Mapping[str, Any], images: Mapping[str, Picture]) -> list[bytes | memoryview]:
    """`pack(message | {"images": images})` in pieces, for who can send them one after the other: pixels are not copied."""
    if not any(isinstance(picture, np.ndarray) for picture in images.values()):
        return [pack({**message, "images": images})]
    behind = _map_of(len(message) + 1) + pack(message)[len(_map_of(len(message))) :] + pack("images") + _map_of(len(images))
    out: list[bytes | memoryview] = []
    for name, picture in images.items():
        behind += pack(name)
        if not isinstance(picture, np.ndarray):
            behind += pack(picture)
            continue
        before, after = _around(picture.dtype, picture.shape)
        out += [behind + before, np.ascontiguousarray(picture).reshape(-1).view(np.uint8).data]
        behind = after
    return [*out, behind]


def _map_of(entries: int) -> bytes:
    """How msgpack begins a mapping."""
    return bytes((0x80 | entries,)) if entries < 16 else b"\xde" + entries.to_bytes(2, "big")


@lru_cache(64)
def _around(dtype: np.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What stands before the numbers of an array, and behind them."""
    _travels(dtype)
    size = math.prod(shape) * dtype.itemsize
    width = 1 if size < 1 << 8 else 2 if size < 1 << 16 else 4
    head = bytes((0xC3 + width.bit_length(),)) + size.to_bytes(width, "big")  # of a byte string
    before = _map_of(4) + b"".join(map(pack, ("__ndarray__", True, "data"))) + head
    return before, b"".join(map(pack, ("dtype", dtype.str, "shape", shape)))


def pack_openpi(message: Any) -> bytes:
    """openpi's dialect: the markers of arrays are byte strings."""
    return _packed(message, _plain_openpi)


def _packed(message: Any, default: Any) -> bytes:
    data = msgpack.packb(message, default=default)
    assert data is not None
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        _travels(value.dtype)
        return {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": value.shape}
    if isinstance(value, Encoded):
        return {"__image__": True, "format": value.format, "data": value.data, "shape": value.shape}
    if isinstance(value, np.generic):
        _travels(value.dtype)
        return value.item()
    raise TypeError(f"{type(value).__name__} does not travel")


def _plain_openpi(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        _travels(value.dtype)
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return _plain(value)


def _travels(dtype: np.dtype) -> None:
    if dtype.kind not in KINDS:
        raise _wrong("array", f"dtype {dtype}", f"one of the kinds {', '.join(KINDS)}")
