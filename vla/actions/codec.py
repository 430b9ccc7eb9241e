"""What action codecs promise: those of one symbol per number, and those that say a chunk as a sequence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeGuard

import numpy as np

from vla.errors import CheckpointError, DataError, UsageError, VLAError


class ActionCodec(Protocol):
    """Chunk <-> symbols. K is the number of different symbols, N the most that a chunk takes."""

    @property
    def size(self) -> int:
        """K."""
        ...

    @property
    def centres(self) -> np.ndarray | None:
        """(K,) float32 value of each symbol when symbols are ordered bins of one dimension, one per step and dimension;
        None for a `SequenceCodec`."""
        ...

    def slots(self, steps: int, room: int, widths: Sequence[int]) -> int:
        """N of chunks of `steps` where the policy has `room` for action dimensions and its robots have `widths`.

        Raises `UsageError` when chunks of that shape cannot be said.
        """
        ...

    def encode(self, unit: np.ndarray) -> np.ndarray:
        """(H, A) in [-1, 1] -> (n,) int64 in [0, K), n <= N. Raises `DataError` on a non-finite value."""
        ...

    def decode(self, symbols: np.ndarray, dims: int) -> np.ndarray:
        """(n,) -> (H, A = dims) float32 in [-1, 1]."""
        ...

    def to_json(self) -> dict: ...


class SequenceCodec(ActionCodec, Protocol):
    """A codec whose symbols each say a part of the whole chunk of one robot; how many are said may differ from chunk to chunk.

    `fitted` is what it was fitted for: {"chunk", "seconds", "normalization", ...}; missing keys are not known.
    """

    fitted: dict

    def speech(self, dims: np.ndarray) -> Speech:
        """Begin to say one chunk for each of B robots of `dims` (B,) dimensions."""
        ...

    def expected(self, p: np.ndarray, dims: int) -> np.ndarray | None:
        """(n, K) probabilities of each symbol of a chunk -> (H, dims) expectation, where it has one."""
        ...

    def spread(self, values: np.ndarray, symbols: np.ndarray, dims: int) -> np.ndarray:
        """(n,) one value per symbol -> (H, dims): each number's is the mean over the symbols that made it."""
        ...


class Speech(Protocol):
    """Which symbols may come next in B chunks that are being said, so that each ends as a whole chunk after at most N symbols."""

    @property
    def done(self) -> np.ndarray:
        """(B,) bool: whole, nothing more is to be said."""
        ...

    def allowed(self) -> np.ndarray:
        """(B, K) bool. A row that is not done allows at least one symbol."""
        ...

    def say(self, symbols: np.ndarray) -> None:
        """(B,) one allowed symbol each; those of rows that are done are not heard."""
        ...


def is_sequence(codec: ActionCodec) -> TypeGuard[SequenceCodec]:
    """Whether its symbols are not one per step and dimension."""
    return codec.centres is None


def hold(unit: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(H, a) with the last valid step repeated over those beyond the episode's end; `valid` (H,) bool begins with True.

    A sequence says all steps together, so those nobody recorded must be something. Holding is what LeRobot's and openpi's
    loaders feed, and costs least: zeros would be a jump to mid-range, which every coefficient and code had to pay for.
    """
    return unit[np.minimum(np.arange(len(unit)), int(valid.sum()) - 1)]


def check_unit(unit: np.ndarray) -> np.ndarray:
    """As float64 within [-1, 1]; raises `DataError` on NaN and infinity, naming the place."""
    unit = np.asarray(unit, np.float64)
    if not np.isfinite(unit).all():
        at = np.argwhere(~np.isfinite(unit))[0].tolist()
        raise DataError(f"action at {at}", found=unit[tuple(at)], expected="a finite number in [-1, 1]",
                        fix="repair the data: a NaN would be read as a full-scale move")  # fmt: skip
    return np.clip(unit, -1.0, 1.0)


def check_chunk(kind: str, chunk: int, steps: int) -> None:
    """Raise `UsageError` when a codec fitted for chunks of `chunk` steps is asked for `steps`."""
    if steps != chunk:
        raise UsageError(f"policy.codec ({kind})", found=f"a chunk of {steps} steps", expected=f"{chunk}, as it was fitted for",
                         fix=f"policy.chunk={chunk}, or fit it again with --chunk {steps}: vla data tokenizer")  # fmt: skip


def check_chunks(chunks: Sequence[np.ndarray]) -> int:
    """H of chunks (H, a) to fit a codec to; raises `DataError` when there are none, or they are not chunks of one H."""
    shapes = sorted({np.shape(c) for c in chunks})
    if not shapes or any(len(s) != 2 or min(s) < 1 for s in shapes) or len({s[0] for s in shapes}) > 1:
        raise DataError("action chunks", found=f"chunks of shape {shapes[:8]}" if shapes else "no chunk at all",
                        expected="one or more (steps, dimensions), all of the same number of steps",
                        fix="fit it to one chunk length, on episodes that have actions")  # fmt: skip
    return shapes[0][0]


def codec_from_json(entry: Mapping, where: str = "policy.json, codec") -> ActionCodec:
    """Rebuild a codec from `policy.json` or a tokenizer's file. Raises `CheckpointError` for an unknown or broken one."""
    from vla.actions.bins import BinCodec
    from vla.actions.fast import FastCodec
    from vla.actions.vq import VQCodec

    kinds = {"bins": BinCodec, "fast": FastCodec, "vq": VQCodec}
    if entry.get("kind") not in kinds:
        raise CheckpointError(f"{where}.kind", found=entry.get("kind"), expected=f"one of {sorted(kinds)}",
                              fix="update tendon-vla, or save the policy again")  # fmt: skip
    try:
        return kinds[entry["kind"]].from_json(entry)
    except VLAError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise CheckpointError(where, found=f"{type(error).__name__}: {error}", expected=f"what a {entry['kind']} codec writes",
                              fix="copy it again, or fit it again: vla data tokenizer") from error  # fmt: skip


def read_codec(path: str | Path) -> ActionCodec:
    """The codec in a file of `vla data tokenizer`. Raises `CheckpointError` when it is missing or broken."""
    path = Path(path)
    try:
        entry = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(path, found=error.strerror or error, expected="a file of `vla data tokenizer`",
                              fix=f"vla data tokenizer DATASET --kind fast --chunk 8 --out {path}") from None  # fmt: skip
    except (ValueError, RecursionError) as error:  # RecursionError: JSON nested too deep
        raise CheckpointError(path, found=str(error), expected="JSON", fix="copy the file again, or fit it again") from error
    if not isinstance(entry, dict):
        raise CheckpointError(path, found=type(entry).__name__, expected="a JSON object", fix="fit it again")
    return codec_from_json(entry, str(path))
