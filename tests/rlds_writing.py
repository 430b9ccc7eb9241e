"""RLDS datasets for the tests: TFRecords, Examples and feature trees, written independently of the reader's code."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Values = Sequence[bytes] | np.ndarray


def plain_crc32c(data: bytes) -> int:
    """The definition, bit by bit."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def framed(payload: bytes, crc=plain_crc32c) -> bytes:
    """One record of a TFRecord file."""

    def stored(data: bytes) -> bytes:
        value = crc(data)
        return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(payload))
    return length + stored(length) + payload + stored(payload)


def varint(value: int) -> bytes:
    value &= 2**64 - 1  # negative numbers take ten bytes
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def delimited(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(values: Values, packed: bool = True) -> bytes:
    if not isinstance(values, np.ndarray):
        return delimited(1, b"".join(delimited(1, v) for v in values))
    if values.dtype == np.float32:
        one, kind, wire = [struct.pack("<f", v) for v in values], 2, 5
    else:
        one, kind, wire = [varint(int(v)) for v in values], 3, 0
    if packed:
        return delimited(kind, delimited(1, b"".join(one)))
    return delimited(kind, b"".join(varint(1 << 3 | wire) + v for v in one))


def example(features: Mapping[str, Values], packed: bool = True) -> bytes:
    """A serialised `tf.train.Example`."""
    entries = [delimited(1, delimited(1, n.encode()) + delimited(2, feature(v, packed))) for n, v in features.items()]
    return delimited(1, b"".join(entries))


def jpeg(array: np.ndarray, form: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, form)
    return stream.getvalue()


def tensor(*shape: int, dtype: str = "float32", **more: Any) -> dict[str, Any]:
    inside = {"shape": {"dimensions": [str(n) for n in shape]}, "dtype": dtype, "encoding": "none", **more}
    return {"pythonClassName": "Tensor", "tensor": inside}


def image(*shape: int, dtype: str = "uint8") -> dict[str, Any]:
    inside = {"shape": {"dimensions": [str(n) for n in shape]}, "dtype": dtype, "encodingFormat": "jpeg"}
    return {"pythonClassName": "Image", "image": inside}


TEXT = {"pythonClassName": "Text", "text": {}}
AUDIO = {"pythonClassName": "Audio", "audio": {}}
STEP = {"action": tensor(2), "is_first": tensor(dtype="bool"), "observation": {"image": image(8, 8, 3), "state": tensor(3)},
        "language_instruction": TEXT}  # fmt: skip


def tree(steps: Mapping[str, Any], **episode: Any) -> dict[str, Any]:
    """`features.json`: nested mappings become feature dictionaries."""

    def node(value: Any) -> Any:
        if "pythonClassName" in value or "sequence" in value:
            return value
        return {"featuresDict": {"features": {n: node(v) for n, v in value.items()}}}

    return node({"steps": {"sequence": {"feature": node(steps), "length": "-1"}}, **episode})


def record(number: int = 0, steps: int = 3, **changes: Any) -> dict[str, Values]:
    """The features of one episode of `STEP`; None takes a feature out."""
    rng = np.random.default_rng(number)
    values: dict[str, Any] = {
        "steps/action": rng.normal(size=2 * steps).astype(np.float32),
        "steps/is_first": np.arange(steps) == 0,
        "steps/observation/image": [jpeg(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(steps)],
        "steps/observation/state": rng.normal(size=3 * steps).astype(np.float32),
        "steps/language_instruction": [b"lift it"] * steps,
    }
    values["steps/is_first"] = values["steps/is_first"].astype(np.int64)
    values |= {name.replace("__", "/"): value for name, value in changes.items()}
    return {name: value for name, value in values.items() if value is not None}


def write(root: Path, shards: Sequence[Sequence[bytes]], features: Mapping[str, Any] | None = None, name: str = "toy",
          split: str = "train", crc=plain_crc32c, **info: Any) -> Path:  # fmt: skip
    """A dataset of one split whose records are the given payloads."""
    root.mkdir(parents=True)
    for number, payloads in enumerate(shards):
        file = root / f"{name}-{split}.tfrecord-{number:05d}-of-{len(shards):05d}"
        file.write_bytes(b"".join(framed(payload, crc) for payload in payloads))
    counts = [str(len(payloads)) for payloads in shards]
    described = {"name": name, "version": "1.0.0", "fileFormat": "tfrecord",
                 "splits": [{"name": split, "numBytes": "0", "shardLengths": counts}], **info}  # fmt: skip
    (root / "dataset_info.json").write_text(json.dumps(described))
    (root / "features.json").write_text(json.dumps(features or tree(STEP)))
    return root
