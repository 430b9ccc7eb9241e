"""From logits over symbols to chunks: the decoding policy is a choice, not a constant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vla.actions import ActionCodec, SequenceCodec, is_sequence
from vla.policy.config import Decode
from vla.randomness import Purpose, generator

Chosen = tuple[np.ndarray, np.ndarray, list[np.ndarray]]
"""(unit (B, H, A), confidence (B, H, A), what was said: of each row (H, A), or (n,) where symbols are parts of a sequence)."""


def chooser(decode: Decode, codec: ActionCodec, centres: Tensor, dims: np.ndarray, seeds: Sequence[int]) -> Choose:
    """For B chunks of robots of `dims` (B,) dimensions; `seeds` (B,) decide what "sample" draws."""
    return SequenceChooser(decode, codec, dims, seeds) if is_sequence(codec) else Chooser(decode, codec, centres, seeds)


class Chooser:
    """Logits over bins -> values, confidences, symbols, piece by piece."""

    waits = False

    def __init__(self, decode: Decode, codec: ActionCodec, centres: Tensor, seeds: Sequence[int]) -> None:
        self.decode, self.codec, self.centres = decode, codec, centres.float()
        self.parts: tuple[list[np.ndarray], ...] = ([], [], [])
        self._draws = [generator(Purpose.SAMPLE, seed, 0) for seed in seeds] if decode == "sample" else []

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, n, K) -> symbols (B, n)."""
        p = logits.float().softmax(-1)
        entropy = -(p * p.clamp(min=1e-12).log()).sum(-1)
        if self.decode == "mean":
            # What is done is the expectation; what an autoregressive model reads next is a symbol it has seen in training,
            # the likeliest one: between two modes lies a symbol that never occurs.
            values, symbols = p @ self.centres, p.argmax(-1)
        else:
            if self.decode == "sample":
                draws = np.stack([rng.random(p.shape[1]) for rng in self._draws]).astype(np.float32)
                below = p.cumsum(-1) < torch.from_numpy(draws).to(p.device)[..., None]
                symbols = below.sum(-1).clamp(max=p.shape[-1] - 1)
            else:
                symbols = p.argmax(-1)
            values = self.centres[symbols]
        confidence = 1.0 - entropy / np.log(max(p.shape[-1], 2))  # an only symbol is certain: log 1 is no divisor
        for part, tensor in zip(self.parts, (values, confidence, symbols), strict=True):
            part.append((tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy())  # numpy has no bfloat16
        return symbols

    @property
    def done(self) -> bool:
        """Never before all N symbols are said."""
        return False

    def result(self, steps: int) -> Chosen:
        """What was chosen, as chunks of `steps`."""
        unit, confidence, symbols = (np.concatenate(part, axis=1) for part in self.parts)
        shape = len(unit), steps, -1
        return unit.reshape(shape), confidence.reshape(shape), list(symbols.reshape(shape))


class SequenceChooser:
    """Logits over the symbols of a `SequenceCodec` -> chunks, symbol by symbol on the host, where what may follow is decided.

    Both decodings are constrained alike: in a parallel pass all logits are there at once, and are read from left to right.
    "mean" is the expectation where the codec has one (VQ), and else the likeliest (FAST). A symbol's confidence is
    1 - entropy / log K of what was allowed, and a number's the mean over the symbols that made it.
    """

    waits = True
    """What is said next depends on what was said, so the host decides after every symbol (no CUDA graph of a whole chunk)."""

    def __init__(self, decode: Decode, codec: SequenceCodec, dims: np.ndarray, seeds: Sequence[int]) -> None:
        self.decode, self.codec, self.dims = decode, codec, np.asarray(dims)
        self.speech = codec.speech(self.dims)
        self.symbols: list[list[int]] = [[] for _ in self.dims]
        self.confidence: list[list[float]] = [[] for _ in self.dims]
        self._p: list[list[np.ndarray]] = [[] for _ in self.dims]
        self._draws = [generator(Purpose.SAMPLE, seed, 0) for seed in seeds] if decode == "sample" else None

    @property
    def done(self) -> bool:
        """Whether every chunk is whole."""
        return bool(self.speech.done.all())

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, n, K) -> symbols (B, n); 0 after a chunk is whole."""
        host = logits.float().cpu().numpy()
        said = np.zeros(host.shape[:2], np.int64)
        for i in range(host.shape[1]):
            if self.done:
                break
            said[:, i] = self._say(host[:, i])
        return torch.from_numpy(said).to(logits.device)

    def _say(self, logits: np.ndarray) -> np.ndarray:
        going = ~self.speech.done
        allowed = self.speech.allowed()
        allowed = np.where(going[:, None], allowed, np.arange(allowed.shape[1]) == 0)  # a row that is done says nothing, as 0
        p = np.where(allowed, logits, -np.inf)
        p = np.exp(p - p.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        symbols = p.argmax(-1)
        if self._draws is not None:
            for row in np.flatnonzero(going):
                below = int((np.cumsum(p[row]) <= self._draws[row].random()).sum())
                # Rounding may leave the last of the cumulated a hair below 1, and what is forbidden adds nothing to it.
                symbols[row] = min(below, int(np.flatnonzero(p[row])[-1]))
        entropy = -(p * np.log(np.maximum(p, 1e-12))).sum(-1)
        for row in np.flatnonzero(going):
            self.symbols[row].append(int(symbols[row]))
            self.confidence[row].append(float(1.0 - entropy[row] / np.log(max(p.shape[1], 2))))  # K = 1 is certain
            if self.decode == "mean":
                self._p[row].append(p[row])
        self.speech.say(symbols)
        return symbols

    def chunk(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(unit (H, a), confidence (H, a), symbols (n,)) of one row, once it is whole."""
        symbols, dims = np.array(self.symbols[row], np.int64), int(self.dims[row])
        unit = self.codec.expected(np.stack(self._p[row]), dims) if self.decode == "mean" else None
        if unit is None:
            unit = self.codec.decode(symbols, dims)
        return unit, self.codec.spread(np.array(self.confidence[row]), symbols, dims), symbols

    def result(self, steps: int) -> Chosen:
        """What was chosen, where all robots have one width; `chunk` for others."""
        rows = [self.chunk(row) for row in range(len(self.dims))]
        return np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows]), [r[2] for r in rows]


Choose = Chooser | SequenceChooser
