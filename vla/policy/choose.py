"""From probabilities over bins to numbers: the decoding policy is a choice, not a constant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vla.actions import ActionCodec
from vla.policy.config import Decode
from vla.randomness import Purpose, generator


class Chooser:
    """Logits over the codec's symbols -> values, confidences, symbols, piece by piece."""

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
        confidence = 1.0 - entropy / np.log(p.shape[-1])
        for part, tensor in zip(self.parts, (values, confidence, symbols), strict=True):
            part.append(tensor.cpu().numpy())
        return symbols
