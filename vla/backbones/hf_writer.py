"""The sentences of a Hugging Face vision-language model: what its own processor writes, and after it what is ours."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoProcessor

from vla.backbones.config import HFConfig
from vla.backbones.protocol import Ids, Sizes
from vla.errors import CheckpointError
from vla.images import ImagePreparation


def open_processor(path: str, revision: str | None = None) -> Any:
    """The model's own processor, one picture one block of tokens: tiles and crops are switched off where it has them."""
    try:
        processor: Any = AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # many kinds, all meaning that it cannot be read here
        raise CheckpointError(path, found=f"{type(error).__name__}: {error}",
                              expected="a processor transformers knows natively",
                              fix="give a folder with processor files; code in it is never run") from error  # fmt: skip
    pictures = getattr(processor, "image_processor", None)
    if pictures is None or getattr(processor, "tokenizer", None) is None:
        raise CheckpointError(path, found=type(processor).__name__, expected="a processor of pictures and text",
                              fix="give a vision-language model") from None  # fmt: skip
    for switch in ("do_image_splitting", "crop_to_patches", "do_pan_and_scan"):
        if getattr(pictures, switch, None):
            setattr(pictures, switch, False)
    return processor


class HFWriter:
    """Prefixes by the processor itself (chat template or plain), then soft tokens, state and end query under ids of ours."""

    def __init__(self, processor: Any, config: HFConfig, vocabulary: int, image_id: int | None, sizes: Sizes) -> None:
        self.processor = processor
        template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
        self.chat = bool(template) if config.chat == "auto" else config.chat == "template"
        self.image = ImagePreparation(config.image_size or _wanted_size(processor.image_processor), "bicubic")
        tokenizer: Any = processor.tokenizer
        without, one = Counter(self._written("move", 0)), Counter(self._written("move", 1))
        grown = one - without
        if not grown:
            raise CheckpointError("processor", found="the same ids with and without a picture", expected="ids for a picture",
                                  fix="give a vision-language model")  # fmt: skip
        image = image_id if image_id is not None and image_id in grown else max(grown, key=lambda i: grown[i])
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
        V = vocabulary
        slots = range(V + 4, V + 4 + sizes.slots)
        self.ids = Ids(
            pad=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos, image=image, image_tokens=grown[image],
            soft=V, soft_tokens=sizes.soft_tokens, state=V + 1, end=V + 2, act=V + 3, eos=eos, slots=slots,
            symbols=range(slots.stop, slots.stop + sizes.symbols), words=V,
        )  # fmt: skip
        # Some write a picture otherwise when it is not the only one; they can have one camera.
        self.most_pictures = 16 if Counter(self._written("move", 2))[image] == 2 * grown[image] else 1
        ids = self.ids
        self._tail = [ids.soft] * sizes.soft_tokens + [ids.state] * sizes.state_token + [ids.end] * sizes.end_token

        self.types = self._types(image)
        """Further inputs that tell words from pictures -> their values (at a word, at a picture)."""

    def _types(self, image: int) -> dict[str, tuple[int, int]]:
        out = self._processed("move", 1)
        ids, found = np.asarray(out["input_ids"][0]).reshape(-1), {}
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in out:
                values = np.asarray(out[name][0]).reshape(-1)
                found[name] = (int(values[ids != image][-1]), int(values[ids == image][0]))
        return found

    def act(self, text: str, cameras: int) -> list[int]:
        return self._written(text, cameras) + self._tail

    def ask(self, text: str, cameras: int) -> list[int]:
        return self._written(text, cameras)

    def words(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def text(self, ids: list[int]) -> str:
        return str(self.processor.tokenizer.decode([i for i in ids if i < self.ids.words], skip_special_tokens=True)).strip()

    def state_bytes(self) -> bytes:
        facts = {"chat": self.chat, "template": getattr(self.processor, "chat_template", None), "ids": repr(self.ids),
                 "pictures": self.processor.image_processor.to_dict(), "size": self.image.to_json()}  # fmt: skip
        said = json.dumps(facts, sort_keys=True, default=str)
        words = Tokenizer.from_str(self.processor.tokenizer.backend_tokenizer.to_str())
        words.no_padding()  # a processor that pads leaves that in it, until somebody reads without
        words.no_truncation()
        return said.encode() + words.to_str().encode()

    def save_pretrained(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)

    def _written(self, text: str, cameras: int) -> list[int]:
        return [int(i) for i in np.asarray(self._processed(text, cameras)["input_ids"][0]).reshape(-1)]

    def _processed(self, text: str, cameras: int) -> Any:
        """What the model's own processor makes of `text` and so many pictures."""
        blank = [np.zeros((self.image.size, self.image.size, 3), np.uint8)] * cameras
        if self.chat:
            content = [*({"type": "image"} for _ in range(cameras)), {"type": "text", "text": text}]
            prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        else:
            mark = getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", None) or "<image>"
            prompt = str(mark) * cameras + text
        if cameras:  # a list of lists: one sentence with its pictures, the form every processor understands
            return self.processor(text=[prompt], images=[blank])
        return self.processor.tokenizer([prompt])  # some processors insist on a picture

    def __deepcopy__(self, memo: dict) -> HFWriter:
        return copy.copy(self)  # nothing in it changes


def _wanted_size(pictures: Any) -> int:
    """The side of a square the image processor takes as it is, as far as it says."""
    for name in ("max_image_size", "size"):
        found = getattr(pictures, name, None)
        if found:
            sides = [found.get(key) for key in ("height", "shortest_edge", "longest_edge")]
            sides = [side for side in sides if side and side <= 1024]  # some say a number of pixels there
            if sides:
                return int(sides[0])
    return 224
