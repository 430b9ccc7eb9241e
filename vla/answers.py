"""Questions about pictures with their answers, for co-training: a robot policy that still speaks keeps what it saw and read.

The file is the JSON most image-text sets come in (LLaVA's): a list of

    {"id": ..., "image": "folder/name.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                               {"from": "gpt", "value": "a red cube"}]}

`image` may be missing (text alone). Every human turn followed by an answer is one sample. That a share of such data keeps a
VLA's language alive is RT-2's finding (Brohan et al. 2023, co-fine-tuning).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import Field

from vla.config import Config
from vla.errors import DataError

MAX_PIXELS = 50_000_000
"""A picture whose header promises more is refused before it is decoded."""
MAX_CHARACTERS = 2000
"""A longer question or answer is left out, and counted."""


class AnswersConfig(Config):
    """Image-text data mixed in with the robots'."""

    path: str
    """JSON file, a list of conversations."""
    images: str = ""
    """Folder the pictures' names are relative to; default: the file's own."""
    share: float = Field(default=0.1, gt=0, lt=1)
    """Share of all samples."""


@dataclass(frozen=True)
class Question:
    """One question, its picture (or none) and the answer to learn."""

    image: np.ndarray | None  # (h, w, 3) uint8
    text: str
    answer: str
    n: int = -1
    source: str = field(default="", compare=False)


class Answers:
    """Question-answer pairs of one JSON file, opened lazily: only texts and names are held."""

    def __init__(self, path: str | Path, images: str | Path = "") -> None:
        """Raises `DataError` naming every entry that is not what the docstring above shows (the first twenty)."""
        self.path = Path(path)
        self.images = (Path(images) if images else self.path.parent).resolve()
        self.left_out = 0
        """Questions whose text or answer is empty or longer than `MAX_CHARACTERS`."""
        self.pairs: list[tuple[str | None, str, str]] = []  # (picture's name, question, answer)
        try:
            data = self.path.read_bytes()
            entries = json.loads(data)
        except (OSError, ValueError) as error:
            raise DataError(self.path, found=f"{type(error).__name__}: {error}", expected="a JSON list of conversations",
                            fix="check mixture.answers.path") from error  # fmt: skip
        self.fingerprint = hashlib.sha256(data).hexdigest()
        problems: list[str] = []
        for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            problem = self._add(entry)
            if problem:
                problems.append(f"entry {number}: {problem}")
        if not problems and not self.pairs:
            problems = [f"no question with an answer in it ({self.left_out} left out)"]
        if problems:
            more = f"\n    and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise DataError(self.path, found="\n    ".join(problems[:20]) + more,
                            expected='{"image": name, "conversations": [{"from": "human", ...}, {"from": "gpt", ...}]}',
                            fix="correct or remove these entries")  # fmt: skip

    def _add(self, entry: object) -> str | None:
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(turns, list):
            return "no list of conversations"
        name = entry.get("image")
        if name is not None:
            path = self.images / str(name)
            inside = ".." not in path.parts and (not path.is_symlink() or path.resolve().is_relative_to(self.images))
            if not isinstance(name, str) or not inside or not path.is_relative_to(self.images) or not path.is_file():
                return f"image {name!r} is not a file under {self.images}"
        met = 0
        for ask, reply in zip(turns, turns[1:], strict=False):
            if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in (ask, reply)):
                return "a turn without text"
            if (ask.get("from"), reply.get("from")) != ("human", "gpt"):
                continue
            question, answer = " ".join(ask["value"].replace("<image>", " ").split()), " ".join(reply["value"].split())
            met += 1
            if not question or not answer or max(len(question), len(answer)) > MAX_CHARACTERS:
                self.left_out += 1
                continue
            self.pairs.append((name, question, answer))
        return None if met else "no human turn followed by a gpt turn"

    def __len__(self) -> int:
        return len(self.pairs)

    def question(self, index: int, n: int = -1) -> Question:
        """Pair `index`, its picture decoded. Raises `DataError` when that cannot be done."""
        name, text, answer = self.pairs[index]
        image = None
        if name is not None:
            path = self.images / name
            try:
                with Image.open(path) as picture:
                    if picture.width * picture.height > MAX_PIXELS:
                        raise ValueError(f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS}")
                    image = np.asarray(picture.convert("RGB"))
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise DataError(path, found=f"{type(error).__name__}: {error}", expected="a picture",
                                fix=f"replace it, or remove entry with image {name!r} from {self.path}") from error  # fmt: skip
        return Question(image, text, answer, n, f"{self.path.name}:{index}")
