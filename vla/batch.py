"""Window or Question -> Example -> Batch, and the shape legend of the house.

    B batch        T tokens            H chunk length (steps)     A action dimensions (padded to the policy's widest robot,
                                                             or to the batch's: see `collate`)
    I images       S state dimensions  N action symbols: H * A of them, or the most a sequence codec says (FAST, VQ)
                   K symbols of the codec        V vocabulary
    h, w pixels    F frames of a dataset    E episodes            d hidden size
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vla.actions import ActionCodec, hold, is_sequence
from vla.answers import Question
from vla.backbones.protocol import Writer
from vla.config import Config
from vla.embodiment import EmbodimentSpec
from vla.images import prepare_image
from vla.normalize import Normalizer
from vla.prompt import act_prompt, answer_prompt, clean_instruction
from vla.randomness import Purpose, generator
from vla.schema import Observation, Window


@dataclass(frozen=True)
class Example:
    """One Window or Question as the model will read it: numpy, ready to be stacked.

    What a robot does not have is not there, or masked: a camera that was not recorded brings no tokens, dimensions beyond
    its own are zero in `state` and not `valid`, steps beyond the episode's end are not `valid`.
    """

    ids: np.ndarray  # (T,) int64 prefix: images, text, robot, state, end query; or images, question, answer
    images: np.ndarray  # (I, h, w, 3) uint8
    slots: np.ndarray  # (I,) int64: which camera of its robot each image comes from
    robot: np.ndarray  # () int64: position among the policy's embodiments
    state: np.ndarray  # (S,) float32 in [-1, 1], padded
    unit: np.ndarray  # (H, A) float32 in [-1, 1], padded
    valid: np.ndarray  # (H, A) bool
    dims: np.ndarray  # () int64: the robot's own action dimensions, at most A; 0 where there is nothing to do
    symbols: np.ndarray  # (N,) int64
    said: np.ndarray  # (N,) bool: the symbols that are learned: `valid`, or of a sequence codec as many as the chunk takes
    end: np.ndarray  # (S,) float32: final state in [-1, 1]
    end_valid: np.ndarray  # (S,) bool: the dimensions the end loss looks at
    hidden: np.ndarray  # (N,) bool: symbols an autoregressive model may not read as history in this example
    labels: np.ndarray  # (T,) int64: the id to be said after each position of the prefix, -100 where nothing is to be learned
    causal: np.ndarray  # (T,) bool: positions only later ones may read (an answer, said word by word)
    n: int = -1
    taught: Taught | None = None
    """What a teacher says here, when the policy is distilled from one."""


@dataclass(frozen=True)
class Taught:
    """A teacher's opinion of one window, on the student's positions (`vla/distill/`)."""

    likely: np.ndarray  # (N, k) int64: its k likeliest symbols; k is 0 where only its actions are known
    p: np.ndarray  # (N, k) float32: their probabilities, 0 where the teacher has no say
    mean: np.ndarray  # (N,) float32 in [-1, 1]: its expected action
    features: np.ndarray  # (e,) float32: of the instruction, and of the pictures behind it; e is 0 where none are matched


@dataclass(frozen=True)
class Batch:
    """Examples on a device. Prefixes are padded on the left, so the action positions stand at the same place in each row."""

    ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool, False at padding
    images: Tensor  # (I, 3, h, w) uint8, in order of appearance
    slots: Tensor  # (I,) int64
    robot: Tensor  # (B,) int64
    state: Tensor  # (B, S) float32
    unit: Tensor  # (B, H, A) float32
    valid: Tensor  # (B, H, A) bool
    dims: Tensor  # (B,) int64
    symbols: Tensor  # (B, N) int64
    said: Tensor  # (B, N) bool
    end: Tensor  # (B, S) float32
    end_valid: Tensor  # (B, S) bool
    hidden: Tensor  # (B, N) bool
    labels: Tensor  # (B, T) int64, -100 at padding
    causal: Tensor  # (B, T) bool
    n: Tensor  # (B,) int64 stream positions
    likely: Tensor  # (B, N, k) int64: a teacher's likeliest symbols; k is 0 without a teacher
    p: Tensor  # (B, N, k) float32
    mean: Tensor  # (B, N) float32; (B, 0) without a teacher
    features: Tensor  # (B, e) float32

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def pin_memory(self) -> Batch:
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    def __len__(self) -> int:
        return len(self.ids)


def collate(examples: list[Example], pad_id: int, narrow: bool = False) -> Batch:
    """Stack examples; the shorter prefixes get `pad_id` on the left. `narrow` leaves out the action dimensions that no robot of
    this batch has: A is the batch's own, N = H * A with it."""
    B, T = len(examples), max(len(e.ids) for e in examples)
    H, A = examples[0].unit.shape
    width = max(1, *(int(e.dims) for e in examples)) if narrow else A
    ids, labels = np.full((B, T), pad_id, np.int64), np.full((B, T), -100, np.int64)
    mask, causal = np.zeros((B, T), bool), np.zeros((B, T), bool)
    for row, example in enumerate(examples):
        at = slice(T - len(example.ids), T)
        ids[row, at], labels[row, at], mask[row, at], causal[row, at] = example.ids, example.labels, True, example.causal
    images = np.concatenate([e.images for e in examples]).transpose(0, 3, 1, 2)

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(e, name) for e in examples]))

    def cut(name: str) -> Tensor:
        whole = stack(name)
        if width == A:
            return whole
        narrower = whole.view(B, H, A)[..., :width]
        return narrower.contiguous() if whole.ndim == 3 else narrower.reshape(B, H * width)

    return Batch(
        ids=torch.from_numpy(ids), mask=torch.from_numpy(mask), images=torch.from_numpy(np.ascontiguousarray(images)),
        slots=torch.from_numpy(np.concatenate([e.slots for e in examples])), n=torch.tensor([e.n for e in examples]),
        labels=torch.from_numpy(labels), causal=torch.from_numpy(causal),
        **{name: stack(name) for name in ("robot", "dims", "state", "end", "end_valid")},
        **{name: cut(name) for name in ("unit", "valid", "symbols", "said", "hidden")},
        **_taught(examples, width),
    )  # fmt: skip


def _taught(examples: list[Example], width: int) -> dict[str, Tensor]:
    """What the teacher says of each, its padded action dimensions cut to `width`."""
    said = [e.taught for e in examples if e.taught is not None]
    B, (H, A) = len(examples), examples[0].unit.shape
    assert len(said) in (0, B), "a teacher speaks of all windows of a batch, or of none"
    if not said:
        return {"likely": torch.zeros(B, 0, 0, dtype=torch.long), "p": torch.zeros(B, 0, 0), "mean": torch.zeros(B, 0),
                "features": torch.zeros(B, 0)}  # fmt: skip

    def cut(name: str) -> Tensor:
        whole = torch.from_numpy(np.stack([getattr(t, name) for t in said]))
        return whole if width == A else whole.view(B, H, A, -1)[:, :, :width].reshape(B, H * width, *whole.shape[2:])

    return {name: cut(name) for name in ("likely", "p", "mean")} | {
        "features": torch.from_numpy(np.stack([t.features for t in said]))
    }


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
    """Window or Question -> Example: numpy only, so that loader workers carry no model.

    Action and state vectors of robots narrower than `action_dim` (A) and `state_dim` (S) are padded with zeros and masked.
    `writer` is the backbone's: it knows how a sentence of its model looks.
    """

    def __init__(
        self, *, embodiments: dict[str, EmbodimentSpec], normalizers: dict[str, dict[str, Normalizer]], codec: ActionCodec,
        writer: Writer, prompt: str, horizon: int, action_dim: int, state_dim: int, slots: int | None = None,
    ) -> None:  # fmt: skip
        """`slots`: N, where it is not H * A."""
        self.embodiments, self.normalizers, self.codec = embodiments, normalizers, codec
        self.writer, self.prompt, self.horizon = writer, prompt, horizon
        self.action_dim, self.state_dim, self.slots = action_dim, state_dim, slots or horizon * action_dim
        self._ids: dict[tuple[str, int, str], np.ndarray] = {}
        self._robots = {name: np.array(i, np.int64) for i, name in enumerate(embodiments)}
        self._dims = {name: np.array(spec.action_dim, np.int64) for name, spec in embodiments.items()}
        self._end_valid = {name: _end_dims(spec, self.state_dim) for name, spec in embodiments.items()}

    def window(self, window: Window | Question, augment: AugmentConfig | None = None, seed: int = 0) -> Example:
        """Raises `DataError` on non-finite values (from the normaliser and the codec)."""
        if isinstance(window, Question):
            return self.question(window)
        H, A = self.horizon, self.action_dim
        spec, norm = self.embodiments[window.embodiment], self.normalizers[window.embodiment]
        unit, valid = np.zeros((H, A), np.float32), np.zeros((H, A), bool)
        unit[:, : spec.action_dim] = norm["action"].to_unit(window.actions)
        valid[:, : spec.action_dim] = window.valid
        own = unit[:, : spec.action_dim].copy()
        unit[~valid] = 0.0
        symbols, said = (self._say(own, window.valid) if is_sequence(self.codec)
                         else (self.codec.encode(unit), valid.reshape(-1)))  # fmt: skip
        images, slots = self._images(window.images, spec)
        state, hidden = self._state(norm["state"], window.state), np.zeros(self.slots, bool)
        if augment is not None:
            rng = generator(Purpose.AUGMENT, seed, window.n)
            images = np.stack([_augment(image, augment, rng) for image in images])
            noise = rng.normal(0.0, augment.state_noise, spec.state_dim) if augment.state_noise else 0.0
            state[: spec.state_dim] += noise
            hidden = rng.random(self.slots) < augment.history_dropout
        ids = self._prefix(window.instruction, len(images), window.embodiment)
        return Example(
            ids=ids, images=images, slots=slots, robot=self._robots[window.embodiment], state=state, unit=unit, valid=valid,
            dims=self._dims[window.embodiment],
            symbols=symbols, said=said, end=self._state(norm["state"], window.final_state),
            end_valid=self._end_valid[window.embodiment], hidden=hidden, **_nothing_to_say(ids), n=window.n,
        )  # fmt: skip

    def observation(self, observation: Observation, instruction: str, embodiment: str, drop_state: bool = False) -> Example:
        """An Example to act on: no targets. `drop_state` replaces the state by the middle of its range."""
        spec, norm = self.embodiments[embodiment], self.normalizers[embodiment]
        spec.check_observation(observation, f"observation for {embodiment!r}")
        state = np.zeros(self.state_dim, np.float32)
        if not drop_state and spec.state_dim:
            state = self._state(norm["state"], np.asarray(observation["state"], np.float32))
        images, slots = self._images(observation["images"], spec)  # pyright: ignore[reportArgumentType]
        ids = self._prefix(instruction, len(images), embodiment)
        return Example(ids=ids, images=images, slots=slots, robot=self._robots[embodiment], dims=self._dims[embodiment],
                       **self._no_actions(state), **_nothing_to_say(ids))  # fmt: skip

    def question(self, question: Question) -> Example:
        """Picture, question, answer: the answer's words are learned one after the other, no action is."""
        writer, size = self.writer, self.writer.image.size
        images = [] if question.image is None else [writer.image(question.image)]
        ask = writer.ask(answer_prompt(question.text), len(images))
        answer = writer.words(answer_prompt(question.answer)) if question.answer else []
        ids = np.array([*ask, *answer], np.int64)
        labels = np.full(len(ids), -100, np.int64)
        if answer:
            labels[len(ask) - 1 :] = [*answer, writer.ids.eos]
        return Example(
            ids=ids, images=np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8),
            slots=np.zeros(len(images), np.int64), robot=np.array(0, np.int64), dims=np.array(0, np.int64),
            **self._no_actions(np.zeros(self.state_dim, np.float32)), labels=labels, causal=np.arange(len(ids)) >= len(ask) - 1,
            n=question.n,
        )  # fmt: skip

    def _say(self, unit: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(H, a) of one robot in symbols of a sequence codec: (N,) int64 and (N,) bool, those that are said."""
        own = self.codec.encode(hold(unit, valid[:, 0]))
        symbols, said = np.zeros(self.slots, np.int64), np.arange(self.slots) < len(own)
        symbols[: len(own)] = own
        return symbols, said

    def _no_actions(self, state: np.ndarray) -> dict[str, Any]:
        none, silent = np.zeros((self.horizon, self.action_dim), np.float32), np.zeros(self.slots, bool)
        return {"state": state, "unit": none, "valid": none.astype(bool), "symbols": np.zeros(self.slots, np.int64),
                "said": silent, "hidden": silent, "end": np.zeros_like(state),
                "end_valid": np.zeros(self.state_dim, bool)}  # fmt: skip

    def _images(self, images: dict[str, np.ndarray], spec: EmbodimentSpec) -> tuple[np.ndarray, np.ndarray]:
        """(I, h, w, 3) of the cameras that are there, and (I,) which of the robot's they are."""
        there = [(slot, camera) for slot, camera in enumerate(spec.cameras) if camera in images]
        frames = np.stack([self.writer.image(images[camera]) for _, camera in there])
        return frames, np.array([slot for slot, _ in there], np.int64)

    def _state(self, normalizer: Normalizer, state: np.ndarray) -> np.ndarray:
        padded = np.zeros(self.state_dim, np.float32)
        padded[: normalizer.dims] = normalizer.to_unit(state)
        return padded

    def _prefix(self, instruction: str, cameras: int, robot: str) -> np.ndarray:
        key = (instruction if isinstance(instruction, str) else clean_instruction(instruction), cameras, robot)
        if key not in self._ids:
            if len(self._ids) > 10_000:  # a server meets many sentences; a dictionary must not grow for ever
                self._ids.clear()
            self._ids[key] = np.array(self.writer.act(act_prompt(instruction, self.prompt, robot), cameras), np.int64)
        return self._ids[key]


def _nothing_to_say(ids: np.ndarray) -> dict[str, Any]:
    return {"labels": np.full(len(ids), -100, np.int64), "causal": np.zeros(len(ids), bool)}


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
