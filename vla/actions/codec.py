"""What every action codec promises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from vla.errors import CheckpointError


class ActionCodec(Protocol):
    """Chunk <-> symbols. N symbols stand for a chunk of (H, A); K is the number of different symbols."""

    @property
    def size(self) -> int:
        """K."""
        ...

    @property
    def centres(self) -> np.ndarray | None:
        """(K,) float32 value of each symbol when symbols are ordered bins of one dimension, else None."""
        ...

    def encode(self, unit: np.ndarray) -> np.ndarray:
        """(..., H, A) in [-1, 1] -> (..., N) int64 in [0, K). Raises `DataError` on a non-finite value."""
        ...

    def decode(self, symbols: np.ndarray, dims: int) -> np.ndarray:
        """(..., N) -> (..., H, A = dims) float32 in [-1, 1], for any symbols in [0, K)."""
        ...

    def to_json(self) -> dict: ...


def codec_from_json(entry: Mapping) -> ActionCodec:
    """Rebuild a codec from `policy.json`. Raises `CheckpointError` for an unknown kind."""
    from vla.actions.bins import BinCodec

    kinds = {"bins": BinCodec}
    if entry.get("kind") not in kinds:
        raise CheckpointError("policy.json, codec.kind", found=entry.get("kind"), expected=f"one of {sorted(kinds)}",
                              fix="update tendon-vla, or save the policy again")  # fmt: skip
    return kinds[entry["kind"]].from_json(entry)
