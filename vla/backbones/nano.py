"""The embedded default backbone: a Prismatic-style vision-language model small enough to learn from scratch on a CPU.

    image --conv tower--> P patch tokens --projector--\
      \\--FiLM(instruction), spatial softmax--> 1 keypoint token -> [images][text][robot][state][end][action slots] -> Llama
    state (S,) --MLP--> 1 token ----------------------/

The language model is transformers' own Llama; only the tower, the keypoint token and the splice are ours. It is
registered with the Auto classes, so `AutoModelForImageTextToText.from_pretrained(folder)` works without remote code
once `vla` is imported. Keypoint token: spatial softmax (Levine et al. 2016, "End-to-End Training of Deep Visuomotor
Policies") under FiLM (Perez et al. 2018); the state as a token of the sentence: PaLM-E (Driess et al. 2023). `robot` are a
few learned soft tokens per embodiment (prompt tuning, Lester et al. 2021; per embodiment as in X-VLA, Zheng et al.
2025); they also take part in the FiLM.

Vocabulary: `[text bytes and merges | pad image state end act soft say eos | slots | action symbols]`. Only the first part
belongs to the tokenizer, so no text a user types can ever become a control id.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from vla.backbones.head import head_logits
from vla.backbones.protocol import Ids, OwnModel

SPECIALS = ("pad", "image", "state", "end", "act", "soft", "say", "eos")
"""Control ids that follow the text vocabulary, in this order. `say` begins an answer in words, `eos` ends it."""


class NanoVLMConfig(PreTrainedConfig):
    """Sizes of a `NanoVLM`. `text_config` is a `LlamaConfig`; its `vocab_size` is derived, never given."""

    model_type = "tendon_nano"
    sub_configs = {"text_config": LlamaConfig}  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        text_config: LlamaConfig | dict | None = None,
        text_vocab_size: int = 512,
        num_slots: int = 32,
        num_symbols: int = 256,
        image_size: int = 64,
        tower_channels: tuple[int, ...] = (32, 64, 128),
        keypoints: int = 64,
        state_dim: int = 4,
        num_robots: int = 1,
        soft_tokens: int = 0,
        max_cameras: int = 8,
        embedding_std: float = 0.3,
        steered_by_words: bool = False,
        **kwargs: Any,
    ) -> None:
        self.text_vocab_size, self.num_slots, self.num_symbols = text_vocab_size, num_slots, num_symbols
        vocab_size = text_vocab_size + len(SPECIALS) + num_slots + num_symbols
        if not isinstance(text_config, LlamaConfig):
            text_config = LlamaConfig(**{**_TEXT_DEFAULTS, **(text_config or {}), "vocab_size": vocab_size})
        if text_config.vocab_size != vocab_size:
            raise ValueError(f"text_config.vocab_size is {text_config.vocab_size}, the parts add up to {vocab_size}")
        self.text_config = text_config
        self.image_size, self.tower_channels = image_size, tuple(tower_channels)
        self.keypoints, self.state_dim, self.embedding_std = keypoints, state_dim, embedding_std
        self.steered_by_words = steered_by_words
        self.num_robots, self.soft_tokens, self.max_cameras = num_robots, soft_tokens, max_cameras
        super().__init__(**kwargs)

    def special_id(self, name: str) -> int:
        """Vocabulary id of one of `SPECIALS`."""
        return self.text_vocab_size + SPECIALS.index(name)

    @property
    def slot_ids(self) -> range:
        """Ids of the learned queries that stand at the action positions in parallel decoding."""
        start = self.text_vocab_size + len(SPECIALS)
        return range(start, start + self.num_slots)

    @property
    def action_ids(self) -> range:
        """Ids of the codec's symbols 0..K-1."""
        start = self.slot_ids.stop
        return range(start, start + self.num_symbols)

    @property
    def ids(self) -> Ids:
        """Where the parts of a sentence stand."""
        special = {name: self.special_id(name) for name in ("pad", "image", "soft", "state", "end", "act", "eos")}
        return Ids(**special, image_tokens=self.image_tokens, soft_tokens=self.soft_tokens, symbols=self.action_ids,
                   slots=self.slot_ids, words=self.slot_ids.start)  # fmt: skip

    @property
    def image_tokens(self) -> int:
        """Tokens one camera image becomes."""
        return (self.image_size // _PATCH) ** 2 + (1 if self.keypoints else 0)


_PATCH = 16  # stride of the conv tower: three stride-2 stages and a 2x2 unshuffle
_TEXT_DEFAULTS: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
    max_position_embeddings=2048, initializer_range=0.05, rope_theta=10000.0, attention_dropout=0.0,
    tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=False,
)  # fmt: skip


class ConvTower(nn.Module):
    """(I, 5, 64, 64) pixels and coordinates -> a mid map (I, C1, 16, 16) and patch features (I, 4 * C2, P).

    Small convolutional stem with GroupNorm; stride 16 in all, the last 2x by pixel-unshuffle so no detail is pooled away.
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        c0, c1, c2 = channels
        self.early = nn.Sequential(
            nn.Conv2d(5, c0, 5, stride=2, padding=2), nn.GroupNorm(4, c0), nn.ReLU(),
            nn.Conv2d(c0, c1, 3, stride=2, padding=1), nn.GroupNorm(4, c1), nn.ReLU(),
        )  # fmt: skip
        self.late = nn.Sequential(
            nn.Conv2d(c1, c2, 3, stride=2, padding=1), nn.GroupNorm(8, c2), nn.ReLU(),
            nn.Conv2d(c2, c2, 3, padding=1), nn.GroupNorm(8, c2), nn.ReLU(), nn.PixelUnshuffle(2),
        )  # fmt: skip
        self.mid_channels, self.out_channels = c1, c2 * 4

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mid = self.early(pixels)
        return mid, self.late(mid).flatten(2)


class Keypoints(nn.Module):
    """Where the things the instruction names are: FiLM, one convolution, spatial softmax, one token.

    Each of K channels attends to one place; the token is an MLP of its expected (x, y) in [-1, 1] and the feature there.
    """

    def __init__(self, channels: int, keypoints: int, hidden: int, loud: bool) -> None:
        super().__init__()
        self.loud = loud
        self.film = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2 * channels))
        if loud:
            # As loud as the picture from the start: at the usual scale two sentences differ by a hundredth, and thousands of
            # steps pass before anything but the picture is learned.
            self.film[0].init_std, self.film[2].init_std = (2 / hidden) ** 0.5, 0.7 * hidden**-0.5
        self.conv = nn.Conv2d(channels, keypoints, 3, padding=1)
        self.value = nn.Conv2d(channels, keypoints, 1)
        self.out = nn.Sequential(nn.Linear(3 * keypoints, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, hidden))

    def forward(self, mid: Tensor, sentence: Tensor) -> Tensor:
        """`mid` (I, C, h, w), `sentence` (I, d): the mean embedding of the instruction's words -> (I, d)."""
        if self.loud:
            sentence = F.rms_norm(sentence, sentence.shape[-1:])
        scale, shift = self.film(sentence)[:, :, None, None].chunk(2, dim=1)
        modulated = torch.relu(mid * (1 + scale) + shift)
        h, w = mid.shape[-2:]
        scores, features = self.conv(modulated).flatten(2), self.value(modulated).flatten(2)
        # Sub-pixel positions are the reason for this token: bf16 would round them to a sixteenth of the picture's half.
        with torch.autocast(mid.device.type, enabled=False):
            weights = scores.float().softmax(-1)  # (I, K, h*w)
            places = weights @ coordinates(h, w, mid.device).flatten(1).T  # (I, K, 2)
            values = (weights * features.float()).sum(-1)
        return self.out(torch.cat([places.flatten(1), values], dim=-1).to(sentence.dtype))


def coordinates(h: int, w: int, device: torch.device) -> Tensor:
    """(2, h, w): x to the right and y downward, both in [-1, 1]."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, h, device=device), torch.linspace(-1, 1, w, device=device), indexing="ij"
    )
    return torch.stack([x, y])


class NanoVLM(OwnModel, PreTrainedModel):
    """The model: ids, images and states in, hidden states or logits out."""

    config_class = NanoVLMConfig
    config: NanoVLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["LlamaDecoderLayer"]
    _tied_weights_keys = {}

    def __init__(self, config: NanoVLMConfig) -> None:
        super().__init__(config)
        d = config.text_config.hidden_size
        self.tower = ConvTower(config.tower_channels)
        self.projector = nn.Sequential(nn.Linear(self.tower.out_channels, d), nn.ReLU(), nn.Linear(d, d))
        patches = (config.image_size // _PATCH) ** 2
        self.patch_positions = nn.Parameter(torch.zeros(patches, d))
        self.camera_positions = nn.Parameter(torch.zeros(config.max_cameras, d))
        self.robots = nn.Embedding(config.num_robots, config.soft_tokens * d) if config.soft_tokens else None
        loud = config.steered_by_words
        self.keypoints = Keypoints(self.tower.mid_channels, config.keypoints, d, loud) if config.keypoints else None
        self.state_in = nn.Sequential(nn.Linear(config.state_dim, d), nn.ReLU(), nn.Linear(d, d))
        self.language_model = LlamaModel._from_config(config.text_config)
        self.lm_head = nn.Linear(d, config.text_config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.text_config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=getattr(module, "init_std", std))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.embedding_std)
        elif isinstance(module, NanoVLM):
            nn.init.normal_(module.patch_positions, std=self.config.embedding_std)
            nn.init.zeros_(module.camera_positions)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def embed(
        self, input_ids: Tensor, pixel_values: Tensor | None, states: Tensor | None, slots: Tensor | None = None,
        robots: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Splice images, states and robots into the sentence.

        `input_ids` (B, T); `pixel_values` (I, 3, h, w) uint8 or float in 0..255, images in order of appearance over the
        batch; `states` (B, S) in [-1, 1]; `slots` (I,) which camera of its robot an image comes from (default: the first);
        `robots` (B,) whose soft tokens a row has. Returns (B, T, d).
        """
        config = self.config
        embeddings = self.get_input_embeddings()(input_ids)
        at_soft = input_ids == config.special_id("soft")
        if self.robots is not None and robots is not None:
            table = self.robots(robots).view(len(input_ids), config.soft_tokens, -1)
            which = (at_soft.cumsum(-1) - 1).clamp(0, config.soft_tokens - 1)
            soft = table.gather(1, which[..., None].expand(-1, -1, table.shape[-1]))
            embeddings = torch.where(at_soft[..., None], soft.to(embeddings.dtype), embeddings)
        if pixel_values is not None and len(pixel_values):
            at_image = input_ids == config.special_id("image")
            pixels = pixel_values.to(embeddings.dtype) * (2.0 / 255.0) - 1.0
            grid = coordinates(pixels.shape[-2], pixels.shape[-1], pixels.device).to(pixels.dtype)
            mid, patches = self.tower(torch.cat([pixels, grid.expand(len(pixels), -1, -1, -1)], dim=1))
            slots = torch.zeros(len(pixels), dtype=torch.long, device=pixels.device) if slots is None else slots
            camera = F.one_hot(slots, config.max_cameras).to(self.camera_positions.dtype) @ self.camera_positions
            tokens = self.projector(patches.transpose(1, 2)) + self.patch_positions + camera[:, None]
            if self.keypoints is not None:
                is_text = input_ids < config.text_vocab_size
                if not config.steered_by_words:  # older models: in their mean the word for a thing drowns in the robot's
                    is_text |= at_soft
                # An answer must not be read before it is said, and the sentence is read by every position.
                is_text &= (input_ids == config.special_id("say")).cumsum(-1) == 0
                count = is_text.sum(-1, keepdim=True).clamp(min=1)
                sentence = (embeddings * is_text[..., None]).sum(1) / count
                # Row of each image, from where its first token stands (repeat_interleave has no deterministic backward).
                row_of_image = at_image.nonzero()[:: config.image_tokens, 0]
                sentence = sentence[row_of_image]
                tokens = torch.cat([tokens, self.keypoints(mid, sentence)[:, None]], dim=1)
            embeddings = embeddings.masked_scatter(at_image[..., None], tokens.to(embeddings.dtype))
        if states is not None:
            at_state = input_ids == config.special_id("state")
            token = self.state_in(states.to(embeddings.dtype)).to(embeddings.dtype)
            embeddings = torch.where(at_state[..., None], token[:, None], embeddings)
        return embeddings

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, states: Tensor | None = None,
        labels: Tensor | None = None, logits_to_keep: int | Tensor = 0, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """transformers' view: logits (B, T, V), or of the last `logits_to_keep` positions; `labels` (B, T) add a loss.

        Further arguments are those of `hidden`. A policy calls `hidden` and applies the head where it needs it.
        """
        out = self.hidden(input_ids, pixel_values, states, **kwargs)
        assert out.last_hidden_state is not None
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.text_config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)  # pyright: ignore

    def hidden(
        self, input_ids: Tensor, images: Tensor | None = None, states: Tensor | None = None,
        attention_mask: Tensor | None = None, position_ids: Tensor | None = None, past_key_values: Cache | None = None,
        use_cache: bool = False, slots: Tensor | None = None, robots: Tensor | None = None, **kwargs: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """Last hidden states (B, T, d). `attention_mask` is (B, T) or a 4-D additive mask (B, 1, T, T_total)."""
        return self.language_model(
            inputs_embeds=self.embed(input_ids, images, states, slots, robots),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )

    # ---------------------------------------------------------------------------- what a policy asks (protocol.Backbone)

    no_parallel = ""
    attention_only = True
    prefix_reads_tail = False
    tables = ("robots.weight", "lm_head.weight", "language_model.embed_tokens.weight")
    parts = {"vision": ("tower", "keypoints", "patch_positions", "camera_positions"), "projector": ("projector", "state_in"),
             "language": ("language_model.layers", "language_model.norm")}  # fmt: skip

    @property
    def hidden_size(self) -> int:
        return self.config.text_config.hidden_size

    def prefix_attention(self, ids: Tensor, mask: Tensor, causal: Tensor) -> tuple[Tensor, Tensor]:
        """Both directions, but for an answer in words, which only later positions may read."""
        T = mask.shape[1]
        earlier = torch.ones(T, T, dtype=torch.bool, device=mask.device).tril()
        return mask[:, None, :] & (earlier | ~causal[:, None, :]), (mask.cumsum(-1) - 1).clamp(min=0)

    def parallel_tail(self, n: int) -> list[int]:
        return list(self.config.slot_ids[:n])

    def symbol_logits(self, hidden: Tensor) -> Tensor:
        ids = self.config.action_ids
        return head_logits(self.lm_head, hidden, slice(ids.start, ids.stop))

    def word_logits(self, hidden: Tensor) -> Tensor:
        return head_logits(self.lm_head, hidden, slice(0, self.config.slot_ids.start)).float()

    def new_cache(self) -> Cache:
        return DynamicCache(config=self.config.text_config)

    def add_robots(self, count: int) -> None:
        """A new robot starts as the average of those known, and a little of its own."""
        table = self.robots
        assert table is not None
        self.robots = more_rows(table, count)
        self.config.num_robots = self.robots.num_embeddings


def more_rows(table: nn.Embedding, count: int) -> nn.Embedding:
    """`table` with `count` further rows: the mean of those there are, and a little noise."""
    rows = nn.Embedding(table.num_embeddings + count, table.embedding_dim)
    with torch.no_grad():
        rows.weight[: table.num_embeddings] = table.weight
        noise = torch.randn(count, table.embedding_dim) * table.weight.std().item() * 0.1
        rows.weight[table.num_embeddings :] = table.weight.mean(0) + noise
    return rows


AutoConfig.register(NanoVLMConfig.model_type, NanoVLMConfig, exist_ok=True)
AutoModel.register(NanoVLMConfig, NanoVLM, exist_ok=True)
AutoModelForImageTextToText.register(NanoVLMConfig, NanoVLM, exist_ok=True)
