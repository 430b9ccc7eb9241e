"""What stands before a `NanoVLM`: a byte-level tokenizer, image preparation, and both as a transformers processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from vla.backbones.config import NanoConfig
from vla.backbones.nano import NanoVLM, NanoVLMConfig
from vla.backbones.protocol import Ids, Sizes
from vla.errors import CheckpointError
from vla.images import ImagePreparation, prepare_image


def build_tokenizer(corpus: list[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from `corpus` (the instructions of the mixture).

    All 256 bytes are in the vocabulary, so any text has ids; words of the corpus become single tokens while merges last.
    It owns no special tokens on purpose: text can never turn into a control id.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    # BPE breaks ties by frequency: sorted and repeated input makes the merges a function of the set of sentences.
    tokenizer.train_from_iterator(sorted(set(corpus)) * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


class NanoImageProcessor(BaseImageProcessor):
    """transformers' view of `prepare_image`: frames in, `pixel_values` (I, 3, size, size) uint8 out."""

    model_input_names = ["pixel_values"]

    def __init__(self, size: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = size

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        frames = images if isinstance(images, (list, tuple)) else [images]
        stack = np.stack([prepare_image(np.asarray(frame, np.uint8), self.size) for frame in frames])
        return BatchFeature({"pixel_values": stack.transpose(0, 3, 1, 2)}, tensor_type=kwargs.get("return_tensors"))


class Lexicon(Protocol):
    """What a sentence's writer asks of a model's config: ids laid out as `NanoVLMConfig`'s are."""

    image_size: int
    text_vocab_size: int
    soft_tokens: int

    @property
    def image_tokens(self) -> int: ...

    @property
    def ids(self) -> Ids: ...

    def special_id(self, name: str) -> int: ...


class NanoProcessor(ProcessorMixin):
    """Images and text -> the inputs of a `NanoVLM`, image placeholders first. State and action ids are the policy's business."""

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, image_token_id: int = 0, image_tokens: int = 0,
                 **kwargs: Any) -> None:  # fmt: skip
        self.image_token_id, self.image_tokens = image_token_id, image_tokens
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def of(cls, config: Lexicon, tokenizer: PreTrainedTokenizerFast) -> NanoProcessor:
        """The processor that belongs to `config`."""
        return cls(NanoImageProcessor(config.image_size), tokenizer, config.special_id("image"), config.image_tokens)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:  # pyright: ignore
        """One sentence and its images (a list of (h, w, 3) uint8) -> `input_ids` (1, T), `pixel_values` (I, 3, s, s)."""
        frames = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        ids = [self.image_token_id] * (self.image_tokens * len(frames)) + self.tokenizer(text)["input_ids"]
        data: dict[str, Any] = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        if frames:
            data |= self.image_processor.preprocess(frames)
        return BatchFeature(data, tensor_type=kwargs.get("return_tensors"))


class NanoWriter:
    """The sentence of a `NanoVLM` or a `StudentNet`: `[images][text][robot][state][end]`; before an answer in words
    `[images][question][say]`."""

    def __init__(self, config: Lexicon, tokenizer: PreTrainedTokenizerFast, state: bool, end: bool) -> None:
        self.config, self.tokenizer, self.ids = config, tokenizer, config.ids
        self.image = ImagePreparation(config.image_size)
        self._tail = [self.ids.soft] * config.soft_tokens + [self.ids.state] * state + [self.ids.end] * end

    def act(self, text: str, cameras: int) -> list[int]:
        return [self.ids.image] * (self.ids.image_tokens * cameras) + self.words(text) + self._tail

    def ask(self, text: str, cameras: int) -> list[int]:
        return [self.ids.image] * (self.ids.image_tokens * cameras) + self.words(text) + [self.config.special_id("say")]

    def words(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode([i for i in ids if i < self.config.text_vocab_size])).strip()

    def state_bytes(self) -> bytes:
        return self.tokenizer.backend_tokenizer.to_str().encode()

    def save_pretrained(self, folder: Path) -> None:
        NanoProcessor.of(self.config, self.tokenizer).save_pretrained(folder)


def build(config: NanoConfig, sizes: Sizes) -> tuple[NanoVLM, NanoWriter]:
    """A fresh model and its writer, whose tokenizer is learned from `sizes.corpus`."""
    model = NanoVLM(NanoVLMConfig(
        text_config=dict(hidden_size=config.hidden, num_hidden_layers=config.layers, num_attention_heads=config.heads,
                         num_key_value_heads=config.heads, intermediate_size=config.mlp),
        text_vocab_size=config.text_vocab, num_slots=sizes.slots, num_symbols=sizes.symbols, image_size=config.image_size,
        tower_channels=config.tower_channels, keypoints=config.keypoints, state_dim=sizes.state, num_robots=sizes.robots,
        soft_tokens=sizes.soft_tokens, steered_by_words=True,
    ))  # fmt: skip
    model.set_attn_implementation("eager")  # SDPA's backward is slow for ~60 tokens on a CPU
    tokenizer = build_tokenizer(list(sizes.corpus), config.text_vocab)
    return model, NanoWriter(model.config, tokenizer, sizes.state_token, sizes.end_token)


def load(
    folder: Path, config: NanoConfig, sizes: Sizes, dtype: torch.dtype | None, attention: str | None
) -> tuple[NanoVLM, NanoWriter]:
    """Model and writer of a saved policy. Raises `CheckpointError` for another model than a `NanoVLM`."""
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype or torch.float32, attn_implementation=attention or "eager"
    )
    if not isinstance(model, NanoVLM):
        raise CheckpointError(folder / "config.json", found=f"a {type(model).__name__}",
                              expected="a NanoVLM, as policy.json says", fix="copy the whole folder again")  # fmt: skip
    return model, NanoWriter(model.config, AutoTokenizer.from_pretrained(folder), sizes.state_token, sizes.end_token)


AutoImageProcessor.register(NanoVLMConfig, slow_image_processor_class=NanoImageProcessor, exist_ok=True)
AutoProcessor.register(NanoVLMConfig, NanoProcessor, exist_ok=True)
