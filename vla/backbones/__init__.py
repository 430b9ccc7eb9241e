"""Vision-language backbones. Importing this package registers the embedded default natively with transformers."""

from vla.backbones.nano import NanoVLM, NanoVLMConfig
from vla.backbones.nano_processor import NanoProcessor, build_tokenizer, prepare_image

__all__ = ["NanoProcessor", "NanoVLM", "NanoVLMConfig", "build_tokenizer", "prepare_image"]
