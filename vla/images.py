"""How a camera's frame becomes the square picture a model is shown: one function for training, evaluation and the robot."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from PIL import Image

Resample = Literal["bilinear", "bicubic", "lanczos"]
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


def prepare_image(frame: np.ndarray, size: int, resample: Resample = "bilinear") -> np.ndarray:
    """(h, w, 3) uint8 -> (size, size, 3) uint8: the whole frame, antialiased. A frame of that size is untouched."""
    if frame.shape[:2] == (size, size):
        return frame
    return np.asarray(Image.fromarray(frame).resize((size, size), _FILTERS[resample]))


def centre_crop(frame: np.ndarray, area: float) -> np.ndarray:
    """The middle of (h, w, 3), `area` of it in (0, 1]; sides shrink by sqrt(area)."""
    height, width = (max(1, round(side * area**0.5)) for side in frame.shape[:2])
    top, left = (frame.shape[0] - height) // 2, (frame.shape[1] - width) // 2
    return frame[top : top + height, left : left + width]


@dataclass(frozen=True)
class ImagePreparation:
    """What a policy does to every frame before a model sees it; part of `policy.json`."""

    size: int
    resample: Resample = "bilinear"
    crop: float = 1.0
    """Share of the area kept by a centred crop. Models trained with random crops of 90 % want 0.9 when they act (OpenVLA)."""

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """(h, w, 3) uint8 -> (size, size, 3) uint8."""
        if self.crop < 1.0:
            frame = centre_crop(frame, self.crop)
        return prepare_image(frame, self.size, self.resample)

    def to_json(self) -> dict:
        return asdict(self)
