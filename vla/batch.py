"""Window -> Example -> Batch, and the shape legend of the house.

    B batch        T tokens            H chunk length (steps)     A action dimensions (padded to the policy's widest robot)
    I images       S state dimensions  N = H * A action symbols   K symbols of the codec        V vocabulary
    h, w pixels    F frames of a dataset    E episodes            d hidden size
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vla.actions import ActionCodec
from vla.backbones import prepare_image
from vla.config import Config
from vla.embodiment import EmbodimentSpec
from vla.normalize import Normalizer
from vla.prompt import act_prompt, clean_instruction
from vla.randomness import Purpose, generator
from vla.schema import Observation, Window


@dataclass(frozen=True)
class Example:
    """One Window as the model will read it: numpy, ready to be stacked."""

    ids: np.ndarray  # (T,) int64 prefix: images, text, state, end query
    images: np.ndarray  # (I, h, w, 3) uint8
    state: np.ndarray  # (S,) float32 in [-1, 1], padded
    unit: np.ndarray  # (H, A) float32 in [-1, 1], padded
    valid: np.ndarray  # (H, A) bool
    symbols: np.ndarray  # (N,) int64
    end: np.ndarray  # (S,) float32: final state in [-1, 1]
    end_valid: np.ndarray  # (S,) bool: the dimensions the end loss looks at
    hidden: np.ndarray  # (N,) bool: symbols an autoregressive model may not read as history in this example
    n: int = -1


@dataclass(frozen=True)
class Batch:
    """Examples on a device. Prefixes are padded on the left, so the action positions stand at the same place in each row."""

    ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool, False at padding
    images: Tensor  # (I, 3, h, w) uint8, in order of appearance
    state: Tensor  # (B, S) float32
    unit: Tensor  # (B, H, A) float32
    valid: Tensor  # (B, H, A) bool
    symbols: Tensor  # (B, N) int64
    end: Tensor  # (B, S) float32
    end_valid: Tensor  # (B, S) bool
    hidden: Tensor  # (B, N) bool
    n: Tensor  # (B,) int64 stream positions

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def pin_memory(self) -> Batch:
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    def __len__(self) -> int:
        return len(self.ids)


def collate(examples: list[Example], pad_id: int) -> Batch:
    """Stack examples; the shorter prefixes get `pad_id` on the left."""
    B, T = len(examples), max(len(e.ids) for e in examples)
    ids = np.full((B, T), pad_id, np.int64)
    mask = np.zeros((B, T), bool)
    for row, example in enumerate(examples):
        ids[row, T - len(example.ids) :] = example.ids
        mask[row, T - len(example.ids) :] = True
    images = np.concatenate([e.images for e in examples]).transpose(0, 3, 1, 2)

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(e, name) for e in examples]))

    return Batch(
        ids=torch.from_numpy(ids), mask=torch.from_numpy(mask), images=torch.from_numpy(np.ascontiguousarray(images)),
        n=torch.tensor([e.n for e in examples]),
        **{name: stack(name) for name in ("state", "unit", "valid", "symbols", "end", "end_valid", "hidden")},
    )  # fmt: skip


class AugmentConfig(Config):
    """Image and state augmentation; every draw is a function of (seed, n)."""

    brightness: float = Field(default=0.15, ge=0, lt=1)
    """Additive, +- this share of the full range."""
    contrast: float = Field(default=0.15, ge=0, lt=1)
    """Multiplicative around mid-grey, 1 +- this."""
    colour: float = Field(default=0.0, ge=0, lt=1)
    """Multiplicative per channel, 1 +- this. Off by default: hue is what tells one cube from another."""
    crop: float = Field(default=0.0, ge=0, lt=0.5)
    """Side share of a random crop that is resized back. Off by default: a shifted image is a wrong label for an
    absolute target."""
    state_noise: float = Field(default=0.02, ge=0)
    """Standard deviation of Gaussian noise on the state, in unit space."""
    history_dropout: float = Field(default=0.5, ge=0, lt=1)
    """Autoregressive training: share of the true previous symbols hidden from the model. Without it the cheapest prediction
    is "like the step before", and at test time the model's own errors run away (docs/results.md)."""


class Encoder:
    """Window -> Example: numpy only, so that loader workers carry no model.

    Action and state vectors of narrower robots are padded to A and S with zeros and masked.
    """

    def __init__(
        self, *, embodiments: dict[str, EmbodimentSpec], normalizers: dict[str, dict[str, Normalizer]], codec: ActionCodec,
        tokenize: Callable[[str], list[int]], layout: dict[str, int], prompt: str, image_size: int, horizon: int,
    ) -> None:  # fmt: skip
        self.embodiments, self.normalizers, self.codec = embodiments, normalizers, codec
        self.tokenize, self.layout, self.prompt = tokenize, layout, prompt
        self.image_size, self.horizon = image_size, horizon
        self.action_dim = max(spec.action_dim for spec in embodiments.values())
        self.state_dim = max(spec.state_dim for spec in embodiments.values())
        self._ids: dict[tuple[str, int], np.ndarray] = {}
        self._end_valid = {name: _end_dims(spec, self.state_dim) for name, spec in embodiments.items()}

    def window(self, window: Window, augment: AugmentConfig | None = None, seed: int = 0) -> Example:
        """Raises `DataError` on non-finite values (from the normaliser and the codec)."""
        H, A = self.horizon, self.action_dim
        spec, norm = self.embodiments[window.embodiment], self.normalizers[window.embodiment]
        unit, valid = np.zeros((H, A), np.float32), np.zeros((H, A), bool)
        unit[:, : spec.action_dim] = norm["action"].to_unit(window.actions)
        valid[:, : spec.action_dim] = window.valid
        unit[~valid] = 0.0
        images = self._images(window.images, spec)
        state, hidden = self._state(norm["state"], window.state), np.zeros(H * A, bool)
        if augment is not None:
            rng = generator(Purpose.AUGMENT, seed, window.n)
            images = np.stack([_augment(image, augment, rng) for image in images])
            noise = rng.normal(0.0, augment.state_noise, spec.state_dim) if augment.state_noise else 0.0
            state[: spec.state_dim] += noise
            hidden = rng.random(H * A) < augment.history_dropout
        return Example(
            ids=self._prefix(window.instruction, len(images)), images=images, state=state, unit=unit, valid=valid,
            symbols=self.codec.encode(unit), end=self._state(norm["state"], window.final_state),
            end_valid=self._end_valid[window.embodiment], hidden=hidden, n=window.n,
        )  # fmt: skip

    def observation(self, observation: Observation, instruction: str, embodiment: str, drop_state: bool = False) -> Example:
        """An Example to act on: no targets. `drop_state` replaces the state by the middle of its range."""
        spec, norm = self.embodiments[embodiment], self.normalizers[embodiment]
        spec.check_observation(observation, f"observation for {embodiment!r}")
        state = np.zeros(self.state_dim, np.float32)
        if not drop_state:
            state = self._state(norm["state"], np.asarray(observation["state"], np.float32))
        images = self._images(observation["images"], spec)  # pyright: ignore[reportArgumentType]
        none = np.zeros((self.horizon, self.action_dim), np.float32)
        return Example(
            ids=self._prefix(instruction, len(images)), images=images, state=state, unit=none,
            valid=none.astype(bool), symbols=np.zeros(none.size, np.int64), end=np.zeros_like(state),
            end_valid=np.zeros(self.state_dim, bool), hidden=np.zeros(none.size, bool),
        )  # fmt: skip

    def _images(self, images: dict[str, np.ndarray], spec: EmbodimentSpec) -> np.ndarray:
        return np.stack([prepare_image(images[camera], self.image_size) for camera in spec.cameras])

    def _state(self, normalizer: Normalizer, state: np.ndarray) -> np.ndarray:
        padded = np.zeros(self.state_dim, np.float32)
        padded[: normalizer.dims] = normalizer.to_unit(state)
        return padded

    def _prefix(self, instruction: str, cameras: int) -> np.ndarray:
        key = (instruction if isinstance(instruction, str) else clean_instruction(instruction), cameras)
        if key not in self._ids:
            if len(self._ids) > 10_000:  # a server meets many sentences; a dictionary must not grow for ever
                self._ids.clear()
            text = self.tokenize(act_prompt(instruction, self.prompt))
            tail = [self.layout["state"], self.layout["end"]]
            head = [self.layout["image"]] * (self.layout["image_tokens"] * cameras)
            self._ids[key] = np.array(head + list(text) + tail, np.int64)
        return self._ids[key]


def _end_dims(spec: EmbodimentSpec, width: int) -> np.ndarray:
    """Where an episode ends is a place: the end effector's position where the robot has one, else its whole state."""
    dims = spec.dims_with("state", "eef_position") or list(range(spec.state_dim))
    valid = np.zeros(width, bool)
    valid[dims] = True
    return valid


def _augment(image: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    brightness, contrast, left, top, *colour = rng.uniform(-1.0, 1.0, 7)
    if config.crop:
        size = image.shape[0]
        side = round(size * (1 - config.crop))
        x, y = (int((v + 1) / 2 * (size - side)) for v in (left, top))
        image = prepare_image(image[y : y + side, x : x + side], size)
    scale = (1 + config.contrast * contrast) * (1 + config.colour * np.array(colour, np.float32))
    # One table lookup per channel instead of float arithmetic per pixel: the map has only 256 inputs.
    table = (np.arange(256, dtype=np.float32)[:, None] - 127.5) * scale + 127.5 + 255.0 * config.brightness * brightness
    table = np.clip(table, 0, 255).astype(np.uint8)
    if not config.colour:
        return table[:, 0][image]
    return np.stack([table[:, c][image[..., c]] for c in range(3)], axis=-1)
