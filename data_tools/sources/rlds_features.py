"""What `features.json` of an RLDS dataset promises, and how the flat lists of one record become arrays per step.

tensorflow-datasets (TFDS) writes one leaf of the feature tree as one list of a `tf.train.Example`, all steps behind each
other: `steps/action` holds 7 x T floats. A leaf within a further sequence has its lists in `<leaf>/ragged_flat_values` and
`<leaf>/ragged_row_lengths_<n>`. Booleans, classes and all integers are int64, all floats float32, pictures JPEG or PNG.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data_tools.sources.tfrecord import Values

_SAMPLES = {("uint8", 1): "L", ("uint8", 3): "RGB", ("uint8", 4): "RGBA", ("uint16", 1): "I;16", ("float32", 1): "RGBA"}
"""(dtype, channels) of a picture -> the Pillow mode that holds it; a float32 map is four bytes per point kept as RGBA."""


class NoArray(ValueError):
    """Values that are sound, but that no array or text can hold: left out and named, the episode is still good."""


@dataclass(frozen=True)
class Leaf:
    """One leaf of the feature tree."""

    path: str  # slash-joined, without `steps/`
    name: str  # in the Example
    kind: str  # "number", "image", "text"
    dtype: str = ""
    shape: tuple[int, ...] = ()  # of one step; -1 where it is not fixed
    sequences: int = 0  # how many further sequences it lies in: leading axes of `shape`
    encoding: str = "none"  # "none", "bytes", "zlib"
    optional: bool = False
    sized: bool = False  # whether its shape is stored beside it

    @property
    def is_picture(self) -> bool:
        """Whether it is an ordinary camera picture: one (h, w, 3) uint8 per step. Depth maps and the like are fields."""
        return self.kind == "image" and self.dtype == "uint8" and len(self.shape) == 3 and self.shape[2] == 3


@dataclass(frozen=True)
class Features:
    """The leaves of a dataset whose records are episodes."""

    steps: tuple[Leaf, ...]
    episode: tuple[Leaf, ...]
    unread: Mapping[str, str]
    """Path -> why this leaf is left out. Named to the user, never skipped in silence."""


def parse_features(tree: Any) -> Features:
    """The leaves of `features.json`. Raises `ValueError` saying what is wrong when it is no RLDS feature tree."""
    if isinstance(tree, dict) and "content" in tree:  # `FeatureConnector.to_json`, rather than the file of a dataset
        tree = tree["content"]
        tree = tree if "featuresDict" in tree else {"featuresDict": tree}
    top = _children(tree)
    if top is None:
        raise ValueError("no featuresDict at its top")
    steps = [name for name, node in top.items() if name == "steps" and "sequence" in node]
    if not steps:
        raise ValueError(f"no sequence `steps` among its features {sorted(top)}: its records are not episodes")
    unread: dict[str, str] = {}
    inner = list(_leaves(top["steps"]["sequence"]["feature"], (), "steps", (), unread))
    outer = [leaf for name, node in top.items() if name != "steps" for leaf in _leaves(node, (name,), "", (), unread)]
    return Features(tuple(sorted(inner, key=lambda leaf: leaf.path)), tuple(sorted(outer, key=lambda leaf: leaf.path)), unread)


def _children(node: Any) -> Mapping[str, Any] | None:
    inside = node.get("featuresDict") if isinstance(node, dict) else None
    features = inside.get("features") if isinstance(inside, dict) else None
    return features if isinstance(features, dict) else None


def _leaves(node: Mapping[str, Any], path: tuple[str, ...], under: str, axes: tuple[int, ...],
            unread: dict[str, str]) -> Iterator[Leaf]:  # fmt: skip
    children = _children(node)
    if children is not None:
        for name, child in children.items():
            yield from _leaves(child, (*path, name), under, axes, unread)
        return
    where, name = "/".join(path), "/".join([under, *path] if under else path)
    if "sequence" in node:
        length = int(node["sequence"].get("length", -1))
        yield from _leaves(node["sequence"]["feature"], path, under, (*axes, length), unread)
    elif "video" in node:
        length, *size = _shape(node["video"])
        yield from _leaves({"image": {**node["video"], "shape": {"dimensions": size}}}, path, under, (*axes, length), unread)
    elif "image" in node:
        dtype, shape = node["image"].get("dtype", "uint8"), _shape(node["image"]) or (-1, -1, 3)
        if (dtype, shape[-1]) in _SAMPLES:
            yield Leaf(where, name, "image", dtype, (*axes, *shape), len(axes))
        else:
            unread[where] = f"pictures of {shape[-1]} channels of {dtype}"
    elif "text" in node:
        yield Leaf(where, name, "text", shape=axes, sequences=len(axes))
    elif "classLabel" in node:
        yield Leaf(where, name, "number", "int64", axes, len(axes))
    elif "tensor" in node or "boundingBox" in node:
        tensor = node.get("tensor") or {"dtype": "float32", "shape": {"dimensions": [4]}}
        dtype, shape, encoding = tensor.get("dtype", ""), _shape(tensor), str(tensor.get("encoding", "none")).lower()
        optional = bool(tensor.get("optional"))
        if dtype in ("string", "object", "str"):
            yield Leaf(where, name, "text", shape=(*axes, *shape), sequences=len(axes), optional=optional)
        elif not _is_number(dtype):
            unread[where] = f"numbers of type {dtype!r}"
        elif encoding not in ("none", "bytes", "zlib"):
            unread[where] = f"the encoding {encoding!r}"
        else:
            sized = shape.count(-1) > 1
            yield Leaf(where, name, "number", dtype, (*axes, *shape), len(axes), encoding, optional, sized)
    else:
        unread[where] = f"the feature {node.get('pythonClassName', sorted(node))}"


def _shape(node: Mapping[str, Any]) -> tuple[int, ...]:
    """Sizes are strings in JSON; -1, or older `None`, stands for any."""
    sizes = node.get("shape", {}).get("dimensions", [])
    return tuple(-1 if size is None else int(size) for size in sizes)


def _is_number(dtype: str) -> bool:
    try:
        return np.dtype(dtype).kind in "biuf"
    except TypeError:  # bfloat16
        return False


# --- values ----------------------------------------------------------------------------------------------------------


def count_steps(example: Mapping[str, Values], features: Features) -> int:
    """The number of steps of an episode: as many as `is_first` has values, else a scalar, else pictures, else texts.

    Raises `ValueError` when nothing in the record tells.
    """
    def rank(leaf: Leaf) -> tuple[bool, bool, bool]:
        return leaf.path != "is_first", leaf.kind != "number", leaf.kind != "image"

    for leaf in sorted(features.steps, key=rank):
        size = math.prod(leaf.shape) if leaf.kind != "image" else 1
        if leaf.name in example and not leaf.sequences and not leaf.sized and (size > 0 or leaf.encoding != "none"):
            return len(example[leaf.name]) // (size if leaf.encoding == "none" else 1)
    raise ValueError("nothing in it tells how many steps it has")


def leaf_values(example: Mapping[str, Values], leaf: Leaf, steps: int) -> np.ndarray | list[Any]:
    """The values of one leaf: (steps, ...) numbers in the declared type, (steps, h, w, channels) pictures, a list of texts.

    Raises `ValueError` saying what is wrong, `NoArray` when nothing is wrong but no array can hold them.
    """
    name = leaf.name
    if leaf.sequences and f"{name}/ragged_flat_values" in example:
        shape = _even(example, leaf, steps)
        name = f"{name}/ragged_flat_values"
    else:
        shape = (steps, *leaf.shape)
    if leaf.sized:
        name = f"{name}/value"
    if name not in example:
        raise ValueError(f"no values under {name!r} in the record")
    values = example[name]
    if leaf.kind == "text":
        return _texts(values, _fitted(len(values), shape))
    if leaf.kind == "image":
        return _pictures(values, leaf, shape)
    if leaf.encoding != "none":
        return _unpacked(example, values, leaf, shape)
    return _numbers(values, leaf.dtype, shape)


def _even(example: Mapping[str, Values], leaf: Leaf, steps: int) -> tuple[int, ...]:
    """The shape of a leaf in further sequences, which have to be equally long for an array to hold them."""
    sizes = [steps]
    for axis in range(leaf.sequences):
        rows = example.get(f"{leaf.name}/ragged_row_lengths_{axis}")
        if not isinstance(rows, np.ndarray) or len(rows) != math.prod(sizes):
            raise ValueError(f"{0 if rows is None else len(rows)} row lengths for {math.prod(sizes)} rows")
        if len(rows) and rows.min() != rows.max():
            raise NoArray(f"rows of {rows.min()} to {rows.max()} values; only rows of one length can be read")
        sizes.append(int(rows[0]) if len(rows) else 0)
    return (*sizes, *leaf.shape[leaf.sequences :])


def _fitted(count: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with its open size filled in, so that it holds `count` values."""
    known = math.prod(size for size in shape if size >= 0)
    unknown = shape.count(-1)
    if unknown == 1 and known and count % known == 0:
        return tuple(count // known if size < 0 else size for size in shape)
    if unknown or known != count:
        raise ValueError(f"{count} values where {shape[0]} steps of {shape[1:]} are promised")
    return shape


def _numbers(values: Values, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    wanted = np.dtype(dtype)
    stored = np.float32 if wanted.kind == "f" else np.int64
    if not len(values):
        values = np.empty(0, stored)
    if not isinstance(values, np.ndarray) or values.dtype != stored:
        kind = values.dtype if isinstance(values, np.ndarray) else "byte strings"
        raise ValueError(f"{kind} where {np.dtype(stored)} is promised")
    shape = _fitted(len(values), shape)
    with np.errstate(over="ignore"):
        array = values.astype(wanted)  # uint64 is stored as the int64 of the same bits
    if wanted.kind in "biu" and not np.array_equal(array.astype(np.int64), values):
        raise ValueError(f"values from {values.min()} to {values.max()} do not fit into {dtype}")
    return array.reshape(shape)


def _unpacked(example: Mapping[str, Values], values: Values, leaf: Leaf, shape: tuple[int, ...]) -> np.ndarray:
    """Tensors kept as raw or zlib-compressed bytes, one string per step."""
    inner = leaf.shape[leaf.sequences :]
    outer = shape[: len(shape) - len(inner)]
    strings = _strings(values, math.prod(outer))
    if leaf.sized:
        sizes = _numbers(example.get(f"{leaf.name}/shape", []), "int32", (len(strings), len(inner)))
    else:
        sizes = np.broadcast_to(np.array(inner, np.int64), (len(strings), len(inner)))
    rows = []
    for string, size in zip(strings, sizes, strict=True):
        try:
            raw = zlib.decompress(string) if leaf.encoding == "zlib" else bytes(string)
        except zlib.error as error:
            raise ValueError(f"a damaged zlib stream ({error})") from error
        wanted = np.dtype(leaf.dtype).newbyteorder("<")
        if len(raw) % wanted.itemsize:
            raise ValueError(f"{len(raw)} bytes, which is no number of {leaf.dtype}")
        row = np.frombuffer(raw, np.uint8 if wanted.kind == "b" else wanted).astype(leaf.dtype)
        rows.append(row.reshape(_fitted(len(row), (1, *(int(n) for n in size)))[1:]))
    return _stacked(rows).reshape(*outer, *rows[0].shape)


def _texts(values: Values, shape: tuple[int, ...]) -> list[str]:
    """One text per step; several in a step become its lines."""
    strings = _strings(values, math.prod(shape))
    lines = math.prod(shape[1:])
    return ["\n".join(_text(s) for s in strings[n * lines : (n + 1) * lines]) for n in range(shape[0])]


def _text(string: memoryview) -> str:
    try:
        return bytes(string).decode()
    except UnicodeDecodeError as error:
        raise NoArray(f"bytes that are no UTF-8 text ({error.reason} at {error.start})") from error


def _strings(values: Values, count: int) -> list[memoryview]:
    if isinstance(values, np.ndarray):
        raise ValueError(f"{values.dtype} where byte strings are promised")
    if len(values) != count:
        raise ValueError(f"{len(values)} values where {count} are promised")
    return values


# --- pictures --------------------------------------------------------------------------------------------------------


def _pictures(values: Values, leaf: Leaf, shape: tuple[int, ...]) -> np.ndarray:
    outer = shape[:-3]
    strings = _strings(values, math.prod(outer))
    frames = np.empty((0, 0, 0, leaf.shape[-1]), leaf.dtype)
    for number, string in enumerate(strings):
        try:
            frame = _picture(string, leaf)
            if not number:  # one array for all of them, rather than a copy of a list of arrays
                frames = np.empty((len(strings), *frame.shape), leaf.dtype)
            if frame.shape != frames.shape[1:]:
                raise ValueError(f"{frame.shape} after steps of {frames.shape[1:]}; only one size can be read")
        except ValueError as error:
            raise ValueError(f"picture {number}: {error}") from error
        frames[number] = frame
    return frames.reshape(*outer, *frames.shape[1:])


def _picture(string: memoryview, leaf: Leaf) -> np.ndarray:
    """One decoded picture, (h, w, channels).

    libjpeg's accurate inverse cosine transform, as Pillow has it: what TensorFlow calls `INTEGER_ACCURATE`. TensorFlow's
    default is the fast one, up to 7 of 255 away.
    """
    mode = _SAMPLES[leaf.dtype, leaf.shape[-1]]
    try:
        with Image.open(io.BytesIO(string), formats=("JPEG", "PNG", "BMP")) as picture:
            width, height = picture.size
            wanted = leaf.shape[-3:-1]
            if wanted[0] not in (-1, height) or wanted[1] not in (-1, width):
                raise ValueError(f"{height} x {width} pixels where {wanted[0]} x {wanted[1]} are promised")
            wide = picture.mode.startswith("I")  # 16 bits per point
            if wide != (mode == "I;16"):
                raise ValueError(f"{picture.mode} samples where {leaf.dtype} is promised")
            # `tobytes` and not `np.array(picture)`, which copies once more
            raw = (picture if wide or picture.mode == mode else picture.convert(mode)).tobytes()
            stored = "<i4" if picture.mode == "I" else f"<u{np.dtype(leaf.dtype).itemsize}"
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{len(string)} bytes that cannot be decoded ({error})") from error
    array = np.frombuffer(raw, "<f4" if leaf.dtype == "float32" else stored)
    return array.astype(leaf.dtype, copy=False).reshape(height, width, leaf.shape[-1])


def _stacked(rows: list[np.ndarray]) -> np.ndarray:
    shapes = {row.shape for row in rows}
    if len(shapes) != 1:
        raise ValueError(f"steps of different sizes {sorted(shapes)[:3]}; only one size can be read")
    return np.stack(rows)
