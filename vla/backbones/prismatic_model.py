"""The Prismatic model: one or two timm image towers, a projector, any causal language model (Karamcheti et al. 2024; OpenVLA).

    image --DINOv2--\\
          --SigLIP---+--projector--> P tokens --> [BOS][images][state][robot][text][end] [act][symbols] -> language model

A tower gives its second-to-last block's output, without the final norm and without prefix tokens. Parameters carry the names
and shapes of OpenVLA's checkpoints (`vision_backbone.featurizer.`, `.fused_featurizer.`, `projector.`, `language_model.`), the
unused ones too (last blocks, final norms, pooling head), so that what was read can be written again whole. timm's `gamma` of a
layer scale is called `scale_factor` there, and here.

In a parallel pass (OpenVLA-OFT, Kim et al. 2025) the action positions are placeholders whose embeddings are zero, and
everything reads everything. FiLM (Perez et al. 2018): scale and shift of each block's features from the mean embedding of the
words, after the attention residual.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from vla.backbones.head import head_logits
from vla.backbones.protocol import Ids, OwnModel

TOWERS = ("featurizer", "fused_featurizer")
_MEANS = {"dinov2": (0.485, 0.456, 0.406), "siglip": (0.5, 0.5, 0.5)}
_STDS = {"dinov2": (0.229, 0.224, 0.225), "siglip": (0.5, 0.5, 0.5)}


class PrismaticModelConfig(PreTrainedConfig):
    """Sizes of a `PrismaticVLM`: the fields of OpenVLA's config.json, and below `film` our own.

    Without arguments it is openvla-7b. `tower_args` overrides timm's sizes, one mapping per tower, for small models.
    """

    model_type = "openvla"
    sub_configs = {"text_config": AutoConfig}  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        text_config: PreTrainedConfig | dict | None = None,
        timm_model_ids: tuple[str, ...] | list[str] = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"),
        timm_override_act_layers: tuple[str | None, ...] | list[str | None] | None = None,
        tower_args: list[dict] | None = None,
        image_sizes: tuple[int, ...] | list[int] | None = None,
        image_means: list | None = None,
        image_stds: list | None = None,
        pad_to_multiple_of: int = 64,
        pad_token_id: int = 32000,
        film: bool = False,
        bidirectional: bool = True,
        num_symbols: int = 256,
        num_slots: int = 7,
        state_dim: int = 0,
        state_token: bool = False,
        end_token: bool = False,
        num_robots: int = 1,
        soft_tokens: int = 0,
        act_id: int = 29871,
        max_cameras: int = 8,
        **kwargs: Any,
    ) -> None:
        if text_config is None:
            text_config = {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000, "tie_word_embeddings": False}
        if isinstance(text_config, dict):
            fields = {"model_type": "llama", **text_config}
            text_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.text_config = text_config
        self.timm_model_ids = list(timm_model_ids)
        towers = len(self.timm_model_ids)
        self.timm_override_act_layers = list(timm_override_act_layers or [None] * towers)
        self.tower_args = tower_args
        self.image_sizes = list(image_sizes or [224] * towers)
        kinds = ["dinov2" if "dinov2" in name else "siglip" for name in self.timm_model_ids]
        self.image_means = [list(m) for m in image_means or [_MEANS[kind] for kind in kinds]]
        self.image_stds = [list(s) for s in image_stds or [_STDS[kind] for kind in kinds]]
        self.pad_to_multiple_of = pad_to_multiple_of
        self.film, self.bidirectional = film, bidirectional
        self.num_symbols, self.num_slots, self.act_id, self.max_cameras = num_symbols, num_slots, act_id, max_cameras
        self.state_dim, self.state_token, self.end_token = state_dim, state_token, end_token
        self.num_robots, self.soft_tokens = num_robots, soft_tokens
        super().__init__(**kwargs)
        self.pad_token_id = pad_token_id

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer: the language model's rows without those added to make a round number."""
        return self.text_config.vocab_size - self.pad_to_multiple_of

    @property
    def image_tokens(self) -> int:
        """Tokens one picture becomes."""
        patch = (self.tower_args or [{}])[0].get("patch_size", 14)
        return (self.image_sizes[0] // patch) ** 2

    @property
    def ids(self) -> Ids:
        """Text ids are the language model's own, symbols the last of the tokenizer's counted down; ours follow all of them."""
        own = self.text_config.vocab_size
        last = self.vocab_size - 1
        return Ids(
            pad=self.pad_token_id, image=own, image_tokens=self.image_tokens, soft=own + 1, soft_tokens=self.soft_tokens,
            state=own + 2, end=own + 3, act=self.act_id, eos=_one(self.text_config.eos_token_id),
            symbols=range(last, last - self.num_symbols, -1), slots=range(own + 4, own + 4 + self.num_slots),
            words=self.vocab_size - self.num_symbols,
        )  # fmt: skip


def _one(ids: int | list[int] | None) -> int:
    return (ids[0] if isinstance(ids, list) else ids) if ids is not None else 2


class LayerScale(nn.Module):
    """timm's, under the name OpenVLA's files have for its parameter."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class FiLM(nn.Module):
    """Scale and shift of one block's features from the sentence (OFT's `FiLMedVisionTransformerBlock`, without the block)."""

    def __init__(self, sentence: int, features: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Linear(sentence, features), nn.Linear(sentence, features)


class Projector(nn.Module):
    """Patches -> tokens: three linear layers for two towers, two for one, GELU between."""

    def __init__(self, vision: int, text: int, fused: bool) -> None:
        super().__init__()
        widths = [vision, 4 * vision, text, text] if fused else [vision, text, text]
        self.depth = len(widths) - 1
        for i in range(self.depth):
            self.add_module(f"fc{i + 1}", nn.Linear(widths[i], widths[i + 1]))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, self.depth + 1):
            x = self.get_submodule(f"fc{i}")(x)
            x = F.gelu(x) if i < self.depth else x
        return x


class ProprioProjector(nn.Module):
    """The robot's state -> one token (OFT's, and the one a fresh policy learns)."""

    def __init__(self, state: int, text: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(state, text), nn.Linear(text, text)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def build_tower(config: PrismaticModelConfig, i: int) -> nn.Module:
    """Tower `i` as timm makes it, its layer scales renamed."""
    args = (config.tower_args or [{}] * len(config.timm_model_ids))[i]
    tower = timm.create_model(
        config.timm_model_ids[i], pretrained=False, num_classes=0, img_size=config.image_sizes[i],
        act_layer=config.timm_override_act_layers[i], **args,
    )  # fmt: skip
    blocks: Any = tower.blocks
    for block in blocks:
        for name in ("ls1", "ls2"):
            old = getattr(block, name)
            if hasattr(old, "gamma"):
                new = LayerScale(old.gamma.numel())
                with torch.no_grad():
                    new.scale_factor.copy_(old.gamma)
                setattr(block, name, new)
    return tower


class Towers(nn.Module):
    """(I, 3, s, s) uint8 -> (I, P, features of all towers), each picture normalised as its tower was trained."""

    def __init__(self, config: PrismaticModelConfig) -> None:
        super().__init__()
        self.names = TOWERS[: len(config.timm_model_ids)]
        for i, name in enumerate(self.names):
            self.add_module(name, build_tower(config, i))
        self.means, self.stds = config.image_means, config.image_stds

    @property
    def widths(self) -> list[int]:
        """Features of a patch, tower by tower."""
        return [int(getattr(self, name).embed_dim) for name in self.names]

    def forward(self, images: Tensor, films: nn.ModuleDict | None = None, sentence: Tensor | None = None) -> Tensor:
        """`sentence` (I, d): what the FiLMs read."""
        parts = []
        for name, mean, std in zip(self.names, self.means, self.stds, strict=True):
            tower: Any = getattr(self, name)
            unit = images.float() / 255.0  # normalised in float32 whatever the weights are, as OpenVLA's processor does
            channels = [(unit[:, c] - mean[c]) / std[c] for c in range(3)]
            pixels = torch.stack(channels, dim=1).to(tower.patch_embed.proj.weight.dtype)
            parts.append(_patches(tower, pixels, None if films is None else films[name], sentence))
        return torch.cat(parts, dim=-1)


def _patches(tower: Any, pixels: Tensor, films: Any, sentence: Tensor | None) -> Tensor:
    x = tower.norm_pre(tower.patch_drop(tower._pos_embed(tower.patch_embed(pixels))))
    for i, block in enumerate(tower.blocks[:-1]):
        if films is None or sentence is None:
            x = block(x)
            continue
        film = films[i]
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        x = x * (1 + film.scale(sentence)[:, None]) + film.shift(sentence)[:, None]
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return x[:, tower.num_prefix_tokens :]


class PrismaticVLM(OwnModel, PreTrainedModel):
    """The model: ids, images and states in, hidden states or logits out. A `vla.backbones.Backbone`."""

    config_class = PrismaticModelConfig
    config: PrismaticModelConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LlamaDecoderLayer", "Block"]

    no_parallel = ""
    tables = ("robots.weight", "end_query", "proprio_projector.fc1.weight", "proprio_projector.fc1.bias",
              "proprio_projector.fc2.weight", "proprio_projector.fc2.bias")  # fmt: skip
    parts = {"vision": ("vision_backbone", "film"), "projector": ("projector",), "language": ("language_model",)}

    def __init__(self, config: PrismaticModelConfig) -> None:
        super().__init__(config)
        d = config.text_config.hidden_size
        self.vision_backbone = Towers(config)
        self.projector = Projector(sum(self.vision_backbone.widths), d, len(config.timm_model_ids) > 1)
        self.language_model = AutoModelForCausalLM.from_config(
            config.text_config, dtype=torch.float32, attn_implementation=getattr(config, "_attn_implementation", None) or "sdpa"
        )
        self.proprio_projector = ProprioProjector(config.state_dim, d) if config.state_token else None
        self.robots = nn.Embedding(config.num_robots, config.soft_tokens * d) if config.soft_tokens else None
        self.end_query = nn.Parameter(torch.zeros(d)) if config.end_token else None
        self.film = None
        if config.film:
            self.film = nn.ModuleDict({name: nn.ModuleList(FiLM(d, width) for _ in getattr(self.vision_backbone, name).blocks)
                                       for name, width in zip(self.vision_backbone.names, self.vision_backbone.widths,
                                                              strict=True)})  # fmt: skip
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: weights are read, or drawn by `draw`; what is neither keeps what its own class gave it."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Rotary frequencies stay float32 when the weights become bfloat16: rounded, far positions run together."""
        kept = [(module, name, buffer) for module in self.language_model.modules() for name, buffer in module._buffers.items()
                if buffer is not None and name in module._non_persistent_buffers_set
                and buffer.dtype == torch.float32]  # fmt: skip
        super()._apply(fn, recurse)
        for module, name, buffer in kept:
            module._buffers[name] = buffer.to(module._buffers[name].device)  # pyright: ignore
        return self

    @torch.no_grad()
    def draw(self, names: list[str] | None = None) -> None:
        """Random numbers for the parameters `names` (default: all), where they lie: N(0, 0.02), norms at 1, biases at 0."""
        for name, parameter in self.named_parameters():
            if names is not None and name not in names:
                continue
            if parameter.ndim == 1 and name.endswith(("weight", "scale_factor")):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02)

    # ---------------------------------------------------------------------------------------------- transformers' view

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, states: Tensor | None = None,
        logits_to_keep: int | Tensor = 0, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits (B, T, V) over the language model's rows, or of the last `logits_to_keep` positions.

        `input_ids` (B, T) has the picture's placeholder where pictures go; further arguments are those of `hidden`.
        """
        out = self.hidden(input_ids, pixel_values, states, **kwargs)
        assert out.last_hidden_state is not None
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(out.last_hidden_state[:, keep])
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    # ---------------------------------------------------------------------------------- what a policy asks (protocol.Backbone)

    attention_only = True

    @property
    def prefix_reads_tail(self) -> bool:
        return self.config.bidirectional

    @property
    def hidden_size(self) -> int:
        return self.config.text_config.hidden_size

    def prefix_attention(self, ids: Tensor, mask: Tensor, causal: Tensor) -> tuple[Tensor, Tensor]:
        """Causal, as the language model was trained."""
        earlier = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
        return mask[:, None, :] & earlier, (mask.cumsum(-1) - 1).clamp(min=0)

    def parallel_tail(self, n: int) -> list[int]:
        ids = self.config.ids
        return [ids.act, *ids.slots[:n], ids.eos]

    def embed(
        self, input_ids: Tensor, images: Tensor | None = None, states: Tensor | None = None, robots: Tensor | None = None
    ) -> Tensor:
        """Splice pictures, states, robots and placeholders into the sentence: (B, T) extended ids -> (B, T, d)."""
        config, ids = self.config, self.config.ids
        is_text = input_ids < config.text_config.vocab_size
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(~is_text, 0))
        embeddings = embeddings * is_text[..., None]  # what is no text is zero unless it is filled below
        if self.robots is not None and robots is not None:
            at_soft = input_ids == ids.soft
            table = self.robots(robots).view(len(input_ids), config.soft_tokens, -1)
            which = (at_soft.cumsum(-1) - 1).clamp(0, config.soft_tokens - 1)
            soft = table.gather(1, which[..., None].expand(-1, -1, table.shape[-1]))
            embeddings = torch.where(at_soft[..., None], soft.to(embeddings.dtype), embeddings)
        if self.end_query is not None:
            embeddings = torch.where((input_ids == ids.end)[..., None], self.end_query.to(embeddings.dtype), embeddings)
        if self.proprio_projector is not None and states is not None:
            token = self.proprio_projector(states.to(self.proprio_projector.fc1.weight.dtype)).to(embeddings.dtype)
            embeddings = torch.where((input_ids == ids.state)[..., None], token[:, None], embeddings)
        if images is not None and len(images):
            at_image = input_ids == ids.image
            sentence = None
            if self.film is not None:
                words = is_text & (input_ids != ids.pad)
                mean = (embeddings * words[..., None]).sum(1) / words.sum(-1, keepdim=True).clamp(min=1)
                sentence = mean[at_image.nonzero()[:: config.image_tokens, 0]]  # the row each picture stands in
            tokens = self.projector(self.vision_backbone(images, self.film, sentence))
            embeddings = embeddings.masked_scatter(at_image[..., None], tokens.to(embeddings.dtype))
        return embeddings

    def hidden(
        self, input_ids: Tensor, images: Tensor | None = None, states: Tensor | None = None, *,
        slots: Tensor | None = None, robots: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Cache | None = None, use_cache: bool = False,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """Last hidden states (B, T, d). `slots` is not used: cameras are told apart by their order."""
        return self.get_decoder()(
            inputs_embeds=self.embed(input_ids, images, states, robots), attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache,
        )  # fmt: skip

    def _rows(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """The head's rows `start`..`stop`."""
        head: Any = self.get_output_embeddings()
        logits = head_logits(head, hidden, slice(start, stop))
        return logits if head.bias is None else logits + head.bias[start:stop]  # Phi's has one

    def symbol_logits(self, hidden: Tensor) -> Tensor:
        symbols = self.config.ids.symbols
        return self._rows(hidden, symbols[-1], symbols[0] + 1).flip(-1)

    def word_logits(self, hidden: Tensor) -> Tensor:
        return self._rows(hidden, 0, self.config.ids.words).float()

    def new_cache(self) -> Cache:
        return DynamicCache(config=self.config.text_config)

    @torch.no_grad()
    def add_robots(self, count: int) -> None:
        """A new robot starts as the average of those known, and a little of its own."""
        table = self.robots
        assert table is not None
        noise = torch.randn(count, table.embedding_dim).to(table.weight) * table.weight.float().std().item() * 0.1
        weight = torch.cat([table.weight, table.weight.mean(0) + noise])
        self.robots = nn.Embedding(len(weight), table.embedding_dim, _weight=weight)
        self.config.num_robots = len(weight)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """config.json and safetensors in shards, under OpenVLA's names. See `prismatic_files`."""
        from vla.backbones.prismatic_files import save_model

        save_model(self, save_directory)


AutoConfig.register(PrismaticModelConfig.model_type, PrismaticModelConfig, exist_ok=True)
AutoModelForImageTextToText.register(PrismaticModelConfig, PrismaticVLM, exist_ok=True)
