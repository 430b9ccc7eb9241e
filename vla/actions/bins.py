"""One symbol per action dimension and time step: uniform bins, in two exact variants.

`uniform`: K bins of width 2/K over [-1, 1], K symbols, round-trip error <= 1/K.
`openvla`: OpenVLA's tokenizer (Kim et al. 2024, `prismatic/vla/action_tokenizer.py`) as integers: K *edges*
`linspace(-1, 1, K)`, hence K-1 intervals; symbol = digitize - 1 in 0..K-1, where the last symbol is reached only by
exactly +1 and decodes to the last centre. Its vocabulary id is `vocab_size - 1 - symbol`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from vla.actions.codec import check_unit
from vla.errors import DataError


class BinCodec:
    """H x A symbols per chunk, time-major: symbol i is dimension i % A of step i // A."""

    def __init__(self, bins: int = 256, variant: Literal["uniform", "openvla"] = "uniform") -> None:
        if bins < 2 or variant not in ("uniform", "openvla"):
            raise ValueError(f"BinCodec(bins={bins}, variant={variant!r}): bins >= 2, variant uniform or openvla")
        self.size, self.variant = bins, variant
        if variant == "uniform":
            centres = (np.arange(bins) + 0.5) * (2.0 / bins) - 1.0
            self._edges = None
        else:
            self._edges = np.linspace(-1.0, 1.0, bins)
            centres = (self._edges[:-1] + self._edges[1:]) / 2.0
            centres = np.append(centres, centres[-1])  # symbol K-1 (a == +1 exactly) shares the last centre
        self._centres64 = centres
        self.centres: np.ndarray = centres.astype(np.float32)

    @property
    def max_error(self) -> float:
        """Largest |decode(encode(a)) - a| over [-1, 1]."""
        return 1.0 / self.size if self.variant == "uniform" else 1.0 / (self.size - 1)

    def slots(self, steps: int, room: int, widths: Sequence[int]) -> int:
        """N: one per step and dimension of the widest robot there is room for."""
        return steps * room

    def encode(self, unit: np.ndarray) -> np.ndarray:
        """(..., H, A) -> (..., H * A) int64. Values outside [-1, 1] are clipped; NaN and infinity raise `DataError`."""
        clipped = check_unit(unit)
        if self._edges is None:
            symbols = np.minimum(((clipped + 1.0) * (self.size / 2.0)).astype(np.int64), self.size - 1)
        else:
            symbols = np.digitize(clipped, self._edges).astype(np.int64) - 1
        return symbols.reshape(*clipped.shape[:-2], clipped.shape[-2] * clipped.shape[-1])

    def decode(self, symbols: np.ndarray, dims: int) -> np.ndarray:
        """(..., H * dims) ints in [0, K) -> (..., H, dims) float32 bin centres. Raises `DataError` outside [0, K)."""
        symbols = np.asarray(symbols)
        if symbols.shape[-1] % dims:
            raise DataError("action symbols", found=f"{symbols.shape[-1]} symbols", expected=f"a multiple of {dims}",
                            fix="decode with the action dimension the chunk was encoded with")  # fmt: skip
        if symbols.size and (symbols.min() < 0 or symbols.max() >= self.size):
            raise DataError("action symbols", found=f"{symbols.min()}..{symbols.max()}", expected=f"0..{self.size - 1}",
                            fix="mask the logits to the codec's symbols before choosing")  # fmt: skip
        return self.centres[symbols].reshape(*symbols.shape[:-1], -1, dims)

    def vocabulary_ids(self, symbols: np.ndarray, vocab_size: int) -> np.ndarray:
        """OpenVLA's ids: counted back from the end of the unpadded vocabulary (32000 for Llama-2), a=-1 -> 31999."""
        return vocab_size - 1 - np.asarray(symbols)

    def symbols_of(self, ids: np.ndarray, vocab_size: int) -> np.ndarray:
        """Inverse of `vocabulary_ids`; raises `DataError` for an id that is no action."""
        symbols = vocab_size - 1 - np.asarray(ids)
        if symbols.size and (symbols.min() < 0 or symbols.max() >= self.size):
            raise DataError("vocabulary ids", found=f"{np.min(ids)}..{np.max(ids)}",
                            expected=f"{vocab_size - self.size}..{vocab_size - 1}",
                            fix="use the tokenizer's own vocabulary size, not the padded one")  # fmt: skip
        return symbols

    def to_json(self) -> dict:
        return {"kind": "bins", "bins": self.size, "variant": self.variant}

    @classmethod
    def from_json(cls, entry: Mapping) -> BinCodec:
        return cls(entry["bins"], entry["variant"])
