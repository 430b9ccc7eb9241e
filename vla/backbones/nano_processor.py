"""What stands before a `NanoVLM`: a byte-level tokenizer, image preparation, and both as a transformers processor."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedTokenizerFast, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from vla.backbones.nano import NanoVLMConfig


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


def prepare_image(frame: np.ndarray, size: int) -> np.ndarray:
    """(h, w, 3) uint8 -> (size, size, 3) uint8: the whole frame, bilinear, antialiased. A frame of that size is untouched."""
    if frame.shape[:2] == (size, size):
        return frame
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR))


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
    def of(cls, config: NanoVLMConfig, tokenizer: PreTrainedTokenizerFast) -> NanoProcessor:
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


AutoImageProcessor.register(NanoVLMConfig, slow_image_processor_class=NanoImageProcessor, exist_ok=True)
AutoProcessor.register(NanoVLMConfig, NanoProcessor, exist_ok=True)
