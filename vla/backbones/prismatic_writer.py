"""The sentence of a Prismatic model: `[BOS][pictures][state][robot][text][end]`, by the tokenizer its folder brings.

The tokenizer is read from `tokenizer.json` alone, exactly as it is there; the other small files of a tokenizer are carried along
and written back, so that other programs find what they expect.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from vla.backbones.prismatic_model import PrismaticModelConfig
from vla.errors import CheckpointError
from vla.images import ImagePreparation
from vla.prompt import ANSWER_PROMPTS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model")
EMPTY_PIECE = "\u2581"
"""Llama's word boundary alone: what "Out: " ends with in training, id 29871 of Llama-2 (openvla#104)."""


class PrismaticWriter:
    """See the module's docstring. Picklable: it holds files and settings, the tokenizer is made from them."""

    def __init__(self, config: PrismaticModelConfig, files: dict[str, bytes], crop: float = 1.0) -> None:
        """`files`: those of `TOKENIZER_FILES` that there are. Raises `CheckpointError` when they are not this model's."""
        self.files, self.ids = files, config.ids
        self.image = ImagePreparation(config.image_sizes[0], "bicubic", crop)
        self.preprocessor = preprocessor(config)
        self._state, self._soft, self._end = config.state_token, config.soft_tokens, config.end_token
        self._text_ids = config.text_config.vocab_size
        self._question = ANSWER_PROMPTS[prompt_of(getattr(config, "llm_backbone_id", ""))]
        self._build()
        _check_vocabulary(self.tokenizer, config)

    def _build(self) -> None:
        self.tokenizer = Tokenizer.from_str(self.files["tokenizer.json"].decode())
        # "</s>" in an instruction is four characters somebody typed, not the end of the sentence.
        self.tokenizer.encode_special_tokens = True

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "tokenizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build()

    def act(self, text: str, cameras: int) -> list[int]:
        ids = self.tokenizer.encode(text).ids
        if ids[-1] == self.ids.act:  # the policy says it before the first symbol, and it is said once
            ids = ids[:-1]
        return self._prefix(ids, cameras, self._state, self._soft) + [self.ids.end] * self._end

    def ask(self, text: str, cameras: int) -> list[int]:
        return self._prefix(self.tokenizer.encode(self._question.format(question=text)).ids, cameras, False, 0)

    def _prefix(self, text: list[int], cameras: int, state: bool, soft: int) -> list[int]:
        seen = [self.ids.image] * (self.ids.image_tokens * cameras) + [self.ids.state] * state + [self.ids.soft] * soft
        return [*text[:1], *seen, *text[1:]]  # after the first id, BOS, whatever it is

    def words(self, text: str) -> list[int]:
        found: list[int] = []
        for piece in self.tokenizer.encode(text, add_special_tokens=False).ids:
            if piece < self.ids.words:
                found.append(piece)
                continue
            # A rare character whose piece is an action here: its bytes say the same, as for characters without a piece.
            data = str(self.tokenizer.id_to_token(piece)).replace(EMPTY_PIECE, " ").encode()
            found += [i for i in (self.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data) if i is not None]
        return found

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i < self._text_ids]).strip()

    def state_bytes(self) -> bytes:
        return self.files["tokenizer.json"] + json.dumps(self.preprocessor, sort_keys=True).encode()

    def save_pretrained(self, folder: Path) -> None:
        """The tokenizer's files as they were read, and preprocessor_config.json."""
        folder = Path(folder)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        (folder / "preprocessor_config.json").write_text(json.dumps(self.preprocessor, indent=2))


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files, without what asks for remote code. Raises `CheckpointError` without a tokenizer.json."""
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    if "tokenizer.json" not in files:
        raise CheckpointError(folder, found="no tokenizer.json", expected="the tokenizer the model was trained with",
                              fix="copy the whole folder again")  # fmt: skip
    if b"auto_map" in files.get("tokenizer_config.json", b""):
        settings = json.loads(files["tokenizer_config.json"])
        settings.pop("auto_map", None)
        files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
    return files


def prompt_of(llm_backbone_id: str) -> Literal["openvla-1", "openvla-v01"]:
    """The prompt's version: openvla-v01's language model was taught to chat as Vicuna."""
    return "openvla-v01" if llm_backbone_id.startswith("vicuna") else "openvla-1"


def act_piece(tokenizer_json: bytes, where: Path) -> int:
    """The id read before the first symbol. Raises `CheckpointError` when the tokenizer has no such piece."""
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    found = tokenizer.token_to_id(EMPTY_PIECE)
    if found is None:
        raise CheckpointError(where / "tokenizer.json", found=f"no piece {EMPTY_PIECE!r}",
                              expected="a tokenizer of Llama's kind, whose empty piece stands before the actions",
                              fix="for other language models use `backbone.kind: hf`")  # fmt: skip
    return found


def _check_vocabulary(tokenizer: Tokenizer, config: PrismaticModelConfig) -> None:
    own, padded = tokenizer.get_vocab_size(with_added_tokens=False), config.text_config.vocab_size
    all_of_it = tokenizer.get_vocab_size(with_added_tokens=True)
    if own != config.vocab_size or all_of_it > padded:
        raise CheckpointError("tokenizer.json and config.json", found=f"a tokenizer of {own} pieces, {all_of_it} with added ones",
                              expected=f"{config.vocab_size} pieces (text_config.vocab_size {padded} - pad_to_multiple_of "
                              f"{config.pad_to_multiple_of}): action symbols are counted down from there",
                              fix="use the tokenizer the model was trained with; another one shifts every bin")  # fmt: skip


def preprocessor(config: PrismaticModelConfig) -> dict:
    """preprocessor_config.json as OpenVLA's image processor writes it."""
    towers = range(len(config.timm_model_ids))
    sizes = config.image_sizes
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, sizes[i], sizes[i]] for i in towers],
        "interpolations": ["bicubic" for _ in towers],
        "means": config.image_means,
        "processor_class": "PrismaticProcessor",
        "stds": config.image_stds,
        "tvf_crop_params": [{"output_size": [sizes[i], sizes[i]]} for i in towers],
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_normalize_params": [{"inplace": False, "mean": config.image_means[i], "std": config.image_stds[i]} for i in towers],
        "tvf_resize_params": [{"antialias": True, "interpolation": 3, "max_size": None, "size": [sizes[i], sizes[i]]}
                              for i in towers],
        "use_fused_vision_backbone": len(towers) > 1,
    }  # fmt: skip
