"""A small policy network for the robot's own computer: one look at the cameras, one pass, a whole chunk.

    each camera's picture --tower (FiLM by the instruction)--> P tokens \\
    instruction --text encoder--> 1 token (once per instruction)         \\
    robot, state ------------------> 1 token each                         > encoder, both directions --> H steps x A symbols
    "where does this end", H steps -> learned queries                    /

What a step costs is decided by the number of tokens (docs/results.md), so a picture is few of them, a sentence is one that does
not have to be computed again while the instruction stays, and a chunk is H queries whose outputs each say A symbols. The
instruction steers the tower by FiLM (Perez et al. 2018) as in RT-1 (Brohan et al. 2022); which thing is meant is found by a
spatial softmax (`vla/backbones/nano.py`). To a policy it is one more `Backbone`: it learns, is distilled, saved and evaluated
as the large ones are. It answers no questions in words, and it speaks all symbols at once.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from vla.backbones.config import StudentConfig
from vla.backbones.nano import SPECIALS, Keypoints, coordinates, more_rows
from vla.backbones.nano_processor import NanoWriter, build_tokenizer
from vla.backbones.protocol import Ids, OwnModel, Sizes
from vla.backbones.student_towers import LinearFrom, Tower, make_tower
from vla.errors import CheckpointError, UsageError

WORDS = 64
"""Positions the text encoder tells apart; further words all stand at the last."""


class StudentNetConfig(PreTrainedConfig):
    """Sizes of a `StudentNet`. The ids of its sentences are laid out as `NanoVLMConfig`'s are."""

    model_type = "tendon_student"

    def __init__(
        self, tower: str = "conv", image_size: int = 64, patch: int = 16, channels: tuple[int, int, int] = (32, 64, 128),
        keypoints: int = 64, tokens: int = 0, hidden: int = 256, layers: int = 8, heads: int = 4, mlp: int = 1024,
        text_layers: int = 1, text_vocab_size: int = 512, chunk: int = 8, num_slots: int = 32, num_symbols: int = 256,
        state_dim: int = 4, state_token: bool = True, end_token: bool = True, num_robots: int = 1, soft_tokens: int = 0,
        max_cameras: int = 8, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.tower, self.image_size, self.patch, self.channels = tower, image_size, patch, tuple(channels)
        self.keypoints, self.tokens = keypoints, tokens
        self.hidden, self.layers, self.heads, self.mlp, self.text_layers = hidden, layers, heads, mlp, text_layers
        self.text_vocab_size, self.chunk, self.num_slots, self.num_symbols = text_vocab_size, chunk, num_slots, num_symbols
        self.state_dim, self.state_token, self.end_token = state_dim, state_token, end_token
        self.num_robots, self.soft_tokens, self.max_cameras = num_robots, soft_tokens, max_cameras
        super().__init__(**kwargs)

    def special_id(self, name: str) -> int:
        return self.text_vocab_size + SPECIALS.index(name)

    image_tokens = 1
    """Places a picture takes in a sentence; how many tokens the network makes of it is its own business."""

    @property
    def ids(self) -> Ids:
        special = {name: self.special_id(name) for name in ("pad", "image", "soft", "state", "end", "act", "eos")}
        slots = self.text_vocab_size + len(SPECIALS)
        symbols = slots + self.num_slots
        return Ids(**special, image_tokens=1, soft_tokens=self.soft_tokens, slots=range(slots, symbols),
                   symbols=range(symbols, symbols + self.num_symbols), words=slots)  # fmt: skip


class Layer(nn.Module):
    """One pre-normalised transformer layer; every position that is there reads every other.

    RMS norms and a gate, as in Llama: with layer norms and a plain ReLU, students of the same size did not find out within 900
    steps which word means which thing; with these they do in 400 (docs/results.md).
    """

    def __init__(self, hidden: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.RMSNorm(hidden, 1e-6), nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.norm2, self.up, self.down = nn.RMSNorm(hidden, 1e-6), nn.Linear(hidden, 2 * mlp), nn.Linear(mlp, hidden)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`x` (B, T, d); `mask` (B, 1, 1, T) added to the scores, None where every position is there."""
        B, T, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (d // self.heads) ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, d))
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Sentence(nn.Module):
    """An instruction's words -> one vector (B, d): their mean, and what a small encoder makes of their order."""

    def __init__(self, vocab: int, hidden: int, heads: int, layers: int, mlp: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads, mlp) for _ in range(layers))
        self.positions: Any = nn.Parameter(torch.zeros(WORDS, hidden)) if layers else None
        self.norm: Any = nn.LayerNorm(hidden) if layers else None
        # At first a sentence is its words, two of which differ loudly.
        self.mix: Any = LinearFrom(hidden, hidden, 0.0) if layers else None

    def forward(self, ids: Tensor, there: Tensor) -> Tensor:
        """`ids` (B, T) and `there` (B, T) bool: which of them are words. A row without words is the zero vector."""
        words = self.embed(ids.clamp(max=self.embed.num_embeddings - 1))
        share = (there / there.sum(-1, keepdim=True).clamp(min=1)).to(words.dtype)
        bag = (words * share[..., None]).sum(1)
        if not len(self.layers):
            return bag
        at = (there.long().cumsum(-1) - 1).clamp(0, WORDS - 1)
        x, mask = words + self.positions[at], additive(there, words.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        return bag + self.mix((self.norm(x) * share[..., None]).sum(1))


def additive(there: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T) bool -> (B, 1, 1, T): 0, or so little that nothing is read there."""
    return torch.zeros(there.shape, dtype=dtype, device=there.device).masked_fill(~there, -1e9)[:, None, None]


class StudentNet(OwnModel, PreTrainedModel):
    """See the module. `hidden` is what a policy calls; `act` the part an exported graph consists of."""

    config_class = StudentNetConfig
    config: StudentNetConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _tied_weights_keys = {}

    def __init__(self, config: StudentNetConfig) -> None:
        super().__init__(config)
        d = config.hidden
        self.text = Sentence(config.text_vocab_size, d, config.heads, config.text_layers, config.mlp)
        self.tower: Tower = make_tower(config)
        self.keypoints = Keypoints(self.tower.mid_channels, config.keypoints, d, True) if config.keypoints else None
        self.found = nn.Linear(d, d) if config.keypoints else None
        """Where the named things are, told to every query at once: attention need not find it first."""
        if self.keypoints is not None:  # that token is one among many, so it is as loud as they are
            for layer in (self.keypoints.out[0], self.keypoints.out[2]):
                layer.init_std = (2 / int(layer.in_features)) ** 0.5  # pyright: ignore[reportArgumentType]
        self.projector = nn.Linear(self.tower.out_channels, d)
        self.patch_positions = nn.Parameter(torch.zeros(self.tower.tokens, d))
        self.camera_positions = nn.Parameter(torch.zeros(config.max_cameras, d))
        self.robots = nn.Embedding(config.num_robots, config.soft_tokens * d) if config.soft_tokens else None
        self.said = nn.Linear(d, d)
        self.state_in = nn.Sequential(nn.Linear(config.state_dim, d), nn.ReLU(), nn.Linear(d, d)) if config.state_token else None
        self.end = nn.Parameter(torch.zeros(1, d)) if config.end_token else None
        self.steps = nn.Parameter(torch.zeros(config.chunk, d))
        self.layers = nn.ModuleList(Layer(d, config.heads, config.mlp) for _ in range(config.layers))
        self.norm = nn.LayerNorm(d)
        self.dimensions = nn.Embedding(config.num_slots // config.chunk, d)
        self.speak = nn.Linear(d, d)
        self.head = nn.Linear(d, config.num_symbols)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            std = getattr(module, "init_std", 0.57 * module.in_features**-0.5)
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
        elif isinstance(module, Sentence) and len(module.layers):
            nn.init.normal_(module.positions, std=0.3)
        elif isinstance(module, StudentNet):
            for table in (module.patch_positions, module.steps, *([] if module.end is None else [module.end])):
                nn.init.normal_(table, std=0.3)

    # ---------------------------------------------------------------------------------------------- the network

    @property
    def image_tokens(self) -> int:
        """Tokens the network makes of one picture."""
        return self.tower.tokens + (self.keypoints is not None)

    def look(self, pixels: Tensor, sentence: Tensor, slots: Tensor) -> Tensor:
        """`pixels` (I, 3, s, s) in 0..255, `sentence` (I, d) told with each, `slots` (I,) camera numbers -> (I, P, d)."""
        sentence = F.rms_norm(sentence, sentence.shape[-1:])
        pixels = pixels.to(sentence.dtype) * (2.0 / 255.0) - 1.0
        grid = coordinates(pixels.shape[-2], pixels.shape[-1], pixels.device).to(pixels.dtype)
        mid, patches = self.tower(pixels, grid, sentence)
        tokens = self.projector(patches) + self.patch_positions
        if self.keypoints is not None:
            tokens = torch.cat([tokens, self.keypoints(mid, sentence)[:, None]], dim=1)
        return tokens + self.camera_positions[slots][:, None]

    def act(self, seen: Tensor, there: Tensor | None, sentence: Tensor, states: Tensor | None, robots: Tensor | None) -> Any:
        """What is done: hidden states (B, H * A, d) the symbols are read from, and (B, d) of the end query (or None).

        `seen` (B, P, d) tokens of all cameras, `there` (B, P) which of them are (None: all), `sentence` (B, d), `states` (B, S).
        """
        B, parts = len(sentence), [seen, self.said(F.rms_norm(sentence, sentence.shape[-1:]))[:, None]]
        if self.robots is not None and robots is not None:
            parts.append(self.robots(robots).view(B, self.config.soft_tokens, -1))
        if self.state_in is not None and states is not None:
            parts.append(self.state_in(states.to(seen.dtype))[:, None])
        queries = self.steps if self.end is None else torch.cat([self.end, self.steps])
        asked = queries.expand(B, -1, -1)
        if self.found is not None:  # the last token of each camera; of those that are not there it is zero
            asked = asked + self.found(seen.view(B, -1, self.image_tokens, seen.shape[-1])[:, :, -1].sum(1))[:, None]
        parts.append(asked)
        x, mask = torch.cat([p.to(seen.dtype) for p in parts], dim=1), None
        if there is not None:
            mask = additive(F.pad(there, (0, x.shape[1] - there.shape[1]), value=True), x.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x[:, -len(queries) :])
        steps = x[:, -self.config.chunk :]
        said = torch.relu(self.speak(steps)[:, :, None] + self.dimensions.weight)
        return said.flatten(1, 2), None if self.end is None else x[:, 0]

    # ---------------------------------------------------------------------------- what a policy asks (protocol.Backbone)

    no_parallel = ""
    attention_only = False
    prefix_reads_tail = False
    tables = ("robots.weight", "text.embed.weight", "dimensions.weight", "head.weight")
    parts = {"vision": ("tower", "keypoints", "patch_positions", "camera_positions"), "projector": ("projector", "state_in"),
             "language": ("text", "layers", "norm")}  # fmt: skip

    def hidden(
        self, input_ids: Tensor, images: Tensor | None = None, states: Tensor | None = None, *, slots: Tensor | None = None,
        robots: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """`last_hidden_state` (B, T', d): zero but for the end query's place and the action positions; `sentence` and `seen`
        (B, d) are what a teacher's features are compared with."""
        config, N = self.config, self.config.num_slots
        if images is None or not len(images):
            raise UsageError("a student", found="no picture", expected="at least one a sample",
                             fix="leave mixture.answers out: a student answers no questions")  # fmt: skip
        sentence = self.text(input_ids, input_ids < config.text_vocab_size)
        at_image = input_ids == config.special_id("image")
        row = at_image.nonzero()[:, 0]
        slots = torch.zeros_like(row) if slots is None else slots
        tokens = self.look(images, sentence[row], slots)
        seen, there = self._arrange(tokens, row, at_image)
        said, end = self.act(seen, there, sentence, states, robots)
        before = input_ids.shape[1] - N - (end is not None)
        filled = [said.new_zeros(len(said), before, said.shape[-1]), *([] if end is None else [end[:, None]]), said]
        whole = torch.cat(filled, dim=1)
        if there is not None:  # a camera that a row does not have is not looked at, and not counted
            seen = seen * (there.shape[1] / there.sum(1, keepdim=True))[..., None].to(seen.dtype)
        return SimpleNamespace(last_hidden_state=whole, sentence=sentence, seen=seen.mean(1))

    def _arrange(self, tokens: Tensor, row: Tensor, at_image: Tensor) -> tuple[Tensor, Tensor | None]:
        """(I, P, d) of all pictures -> (B, C * P, d), C the most a row has, and which are there (None: all)."""
        B, (_, P, d) = len(at_image), tokens.shape
        counts = at_image.sum(-1)
        C = int(counts.max())
        if len(tokens) == B * C:
            return tokens.reshape(B, C * P, d), None
        place = row * C + (at_image.cumsum(-1)[at_image] - 1)
        seen = tokens.new_zeros(B * C, P, d).index_copy(0, place, tokens).view(B, C * P, d)
        there = torch.arange(C, device=row.device) < counts[:, None]
        return seen, there.repeat_interleave(P, dim=1)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden

    def prefix_attention(self, ids: Tensor, mask: Tensor, causal: Tensor) -> tuple[Tensor, Tensor]:
        """Nobody asks: who reads whom is fixed in `act`."""
        return mask[:, None, :].expand(-1, mask.shape[1], -1), (mask.cumsum(-1) - 1).clamp(min=0)

    def parallel_tail(self, n: int) -> list[int]:
        return list(self.config.ids.slots[:n])

    def symbol_logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def word_logits(self, hidden: Tensor) -> Tensor:
        raise UsageError("a student", found="a question", expected="actions to learn", fix="leave mixture.answers out")

    def get_input_embeddings(self) -> nn.Module:
        return self.text.embed

    def add_robots(self, count: int) -> None:
        """A new robot starts as the average of those known, and a little of its own."""
        table = self.robots
        assert table is not None
        self.robots = more_rows(table, count)
        self.config.num_robots = self.robots.num_embeddings


def build(config: StudentConfig, sizes: Sizes) -> tuple[StudentNet, NanoWriter]:
    """A fresh network and its writer, whose tokenizer is learned from `sizes.corpus` and spells what it does not know.

    Raises `UsageError` for a tower timm does not know, `MachineError` where its pretrained weights cannot be had.
    """
    network = StudentNet(network_config(config, sizes))
    if config.pretrained:
        network.tower.load_pretrained()
    tokenizer = build_tokenizer(list(sizes.corpus), config.text_vocab)
    return network, NanoWriter(network.config, tokenizer, sizes.state_token, sizes.end_token)


def network_config(config: StudentConfig, sizes: Sizes) -> StudentNetConfig:
    """What was asked, with the room a policy needs."""
    return StudentNetConfig(
        tower=config.tower, image_size=config.image_size, patch=config.patch, channels=config.channels,
        keypoints=config.keypoints, tokens=config.tokens, hidden=config.hidden, layers=config.layers, heads=config.heads,
        mlp=config.mlp, text_layers=config.text_layers, text_vocab_size=config.text_vocab, chunk=sizes.chunk,
        num_slots=sizes.slots, num_symbols=sizes.symbols, state_dim=sizes.state, state_token=sizes.state_token,
        end_token=sizes.end_token, num_robots=sizes.robots, soft_tokens=sizes.soft_tokens,
    )  # fmt: skip


def load(
    folder: Path, config: StudentConfig, sizes: Sizes, dtype: torch.dtype | None, attention: str | None
) -> tuple[StudentNet, NanoWriter]:
    """Network and writer of a saved policy. Raises `CheckpointError` for another model than a `StudentNet`."""
    network = AutoModel.from_pretrained(folder, dtype=dtype or torch.float32)
    if not isinstance(network, StudentNet):
        raise CheckpointError(folder / "config.json", found=f"a {type(network).__name__}",
                              expected="a StudentNet, as policy.json says", fix="copy the whole folder again")  # fmt: skip
    with torch.no_grad():
        # Weights that lie askew, as in the file, go through other kernels: the last bit of what is said would not be the same.
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()
    return network, NanoWriter(network.config, AutoTokenizer.from_pretrained(folder), sizes.state_token, sizes.end_token)


AutoConfig.register(StudentNetConfig.model_type, StudentNetConfig, exist_ok=True)
AutoModel.register(StudentNetConfig, StudentNet, exist_ok=True)
