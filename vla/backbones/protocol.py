"""What a policy asks of a vision-language model, whichever it is.

Two objects per backbone. The *writer* turns words and cameras into ids; it is small, holds no weights and travels to loader
workers. The *model* turns ids, pictures and states into hidden states and logits.

Ids live in an extended vocabulary: the language model's own ids first, then ours (state, soft tokens, slots, symbols, ...),
which no text can ever become. A model whose embedding matrix has no such rows keeps them in small tables of its own and
splices them in by position. Where an action symbol *weighs* as one of the base's rows (OpenVLA's last 256 ids) is the
backbone's business.

Shapes: B batch, T prefix tokens, M tail tokens, N symbols, K symbols of the codec, I images, S state, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vla.images import ImagePreparation


@dataclass(frozen=True)
class Ids:
    """Where the parts of a sentence stand in a backbone's extended vocabulary."""

    pad: int
    image: int  # stands `image_tokens` times for one picture
    image_tokens: int
    soft: int  # stands `soft_tokens` times: what was learned about the robot
    soft_tokens: int
    state: int  # where the robot's state goes
    end: int  # the query of the auxiliary loss "where does this episode end"; the last of a prefix that has it
    act: int  # what an autoregressive model reads before the first symbol
    eos: int  # ends an answer in words
    symbols: range  # K ids
    slots: range  # N ids: the learned queries of parallel decoding
    words: int  # ids below this may be said in an answer

    def of_symbols(self, symbols: Tensor) -> Tensor:
        """Symbols 0..K-1 -> ids (OpenVLA counts them down)."""
        return symbols * self.symbols.step + self.symbols.start


@dataclass(frozen=True)
class Sizes:
    """What a mixture and a policy's settings ask of a fresh backbone."""

    symbols: int  # K
    slots: int  # N, the most symbols of a chunk
    state: int  # S
    robots: int
    soft_tokens: int
    state_token: bool  # the state is a token of the prefix
    end_token: bool  # so is the end query
    chunk: int = 1  # H
    corpus: tuple[str, ...] = ()  # sentences, for a tokenizer learned from them


class Writer(Protocol):
    """Words and cameras -> ids. Picklable, deterministic."""

    ids: Ids
    image: ImagePreparation

    def act(self, text: str, cameras: int) -> list[int]:
        """The prefix before the actions: pictures of `cameras` cameras, `text` (already templated by `vla/prompt.py`), the
        robot's soft tokens, state and end query where the policy has them; the end query last."""
        ...

    def ask(self, text: str, cameras: int) -> list[int]:
        """The prefix before an answer in words; the answer's first word is predicted at its last position."""
        ...

    def words(self, text: str) -> list[int]:
        """Ids of an answer, all below `ids.words`, without the final `eos`."""
        ...

    def text(self, ids: list[int]) -> str: ...

    def state_bytes(self) -> bytes:
        """Everything that decides what it writes, for the policy's fingerprint."""
        ...

    def save_pretrained(self, folder: Path) -> Any:
        """Write the processor: tokenizer and image preparation, as transformers keeps them."""
        ...


class Backbone(Protocol):
    """A vision-language model a policy can speak actions through; an `nn.Module`."""

    hidden_size: int
    state_dim: int
    num_slots: int
    max_cameras: int
    no_parallel: str
    """Why it cannot attend in both directions over the action positions; empty when it can."""
    tables: tuple[str, ...]
    """Names of the parameters that are words, symbols, slots or robots: always learned, beside an adapter too."""
    parts: dict[str, tuple[str, ...]]
    """`vision`, `projector`, `language` -> prefixes of their parameters' names; what can be frozen apart."""
    attention_only: bool
    """Positions read one another through the attention mask alone, so one that it hides can as well be left out. Not so where a
    layer convolves its neighbours (LFM2)."""
    prefix_reads_tail: bool
    """In a parallel pass the prefix reads the action positions too (OpenVLA-OFT)."""

    @property
    def adapted(self) -> Any:
        """The module adapters go into; the names in an adapter's file are relative to it."""
        ...

    def prefix_attention(self, ids: Tensor, mask: Tensor, causal: Tensor) -> tuple[Tensor, Tensor]:
        """Who reads whom, and where each stands, inside the prefix.

        `ids` (B, T), `mask` (B, T) False at padding (always on the left), `causal` (B, T) positions only later ones may
        read. Returns allowed (B, T, T) bool and positions (B, T) or whatever the model takes as `position_ids`, long.
        """
        ...

    def tail_positions(self, positions: Tensor, tail: int) -> Tensor:
        """`positions` of a prefix continued by `tail` further tokens: the whole, in the same form."""
        ...

    def parallel_tail(self, n: int) -> list[int]:
        """Ids at the action positions of a parallel pass over `n` symbols; outputs are read at the first `n` of them."""
        ...

    def hidden(
        self, input_ids: Tensor, images: Tensor | None = None, states: Tensor | None = None, *,
        slots: Tensor | None = None, robots: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Cache | None = None, use_cache: bool = False,
    ) -> Any:  # fmt: skip
        """An output whose `last_hidden_state` is (B, T', d), before the head.

        `input_ids` (B, T') extended ids; `images` (I, 3, s, s) uint8 as `writer.image` prepares them, in order of
        appearance, normalised by the model; `states` (B, S) in [-1, 1]; `slots` (I,) camera number of each image; `robots`
        (B,); `attention_mask` (B, 1, T', T_total) additive; `position_ids` as `tail_positions` gives them.
        """
        ...

    def symbol_logits(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., K): only the rows of the head that are actions, so a malformed chunk cannot be said."""
        ...

    def word_logits(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., ids.words or fewer), float: the rows that are words or control ids, never an action."""
        ...

    def get_input_embeddings(self) -> Any:
        """The language model's embedding table; its weight tells a policy its device and dtype."""
        ...

    def new_cache(self) -> Cache: ...

    def add_robots(self, count: int) -> None:
        """Rows of soft tokens for `count` further robots: the mean of those known and a little of their own."""
        ...

    def save_pretrained(self, folder: Path) -> Any: ...


class OwnModel:
    """What our own models answer alike: they are what adapters go into, their config has the room they were built with, and a
    token stands after the one before it."""

    config: Any

    @property
    def adapted(self) -> Any:
        return self

    @property
    def state_dim(self) -> int:
        return self.config.state_dim

    @property
    def num_slots(self) -> int:
        return self.config.num_slots

    @property
    def max_cameras(self) -> int:
        return self.config.max_cameras

    def tail_positions(self, positions: Tensor, tail: int) -> Tensor:
        after = positions[:, -1:] + 1 + torch.arange(tail, device=positions.device)
        return torch.cat([positions, after], dim=1)
