"""Finding out at load how a vision-language model behaves, by running the loaded weights our way and their own way.

Refused: a model whose answers our way differ from its own, that reads its batch's padding, that says something else over a cache
than in one pass, or that does not look at its pictures (a real one against black and another: silent blindness is what
openvla#346 was). Told, in `no_parallel`: one whose action positions cannot read one another, or whose words before them change
when they do. Two sentences are tried, the second with two pictures where the family can have them.

It costs 13 passes over a sentence or two and their pictures, three of them with a chunk's action positions behind, and two single
steps; a habit tried in vain costs one pass more, or three where it fails only beside padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vla.errors import CheckpointError

_SENTENCES = ("pick up the red cube and put it into the bowl", "open the drawer")
_NOTHING = 1e-7  # two runs of the same shapes differ by less than this share where nothing they read differs


@dataclass(frozen=True)
class Habits:
    """What was found out."""

    prefix: Literal["causal", "both", "pictures"] = "causal"
    """Who reads whom before the actions: earlier tokens, all, or earlier ones and the rest of the own picture."""
    first: int = 0
    """The first position."""
    mask_by_layer: bool = False
    """A ready mask is taken only as one per kind of layer."""
    filler: int = 0
    """An ordinary id that stands in for ours."""
    grid: Tensor | None = None
    """(1, 3) patches of a picture in time, height and width, where positions are made of it."""


@dataclass(frozen=True)
class Sample:
    """One sentence and its pictures."""

    ids: Tensor  # (1, T)
    images: Tensor  # (I, 3, s, s) uint8


@torch.no_grad()
def probe(model: Any, writer: Any, look: bool) -> Habits:
    """How `model` behaves; sets its `habits` and `no_parallel` (a reason, or empty). With `look` it must see its pictures.

    Raises `CheckpointError` when it cannot be imitated, or with `look` when it ignores a picture.
    """
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    size = writer.image.size
    pictures = torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.uint8).to(weight.device)
    counts = (1, min(2, writer.most_pictures))
    samples = [Sample(torch.tensor([writer.ask(text, count)], device=weight.device), pictures[:count])
               for text, count in zip(_SENTENCES, counts, strict=True)]  # fmt: skip
    run = _Run(model, weight.dtype)
    run.habits(samples, int(writer.words("a")[0]))
    if look:
        run.sees(samples, pictures[2:])
    run.cache(samples[0])
    model.no_parallel = run.parallel(samples[0])
    return model.habits


class _Run:
    """The model under examination."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype, self.ids = model, dtype, model.ids
        self.close = 1e-4 if dtype == torch.float32 else 6e-2
        self.alone: list[Tensor] = []
        """Hidden states (1, T, d) of every sample by itself, our way."""

    def habits(self, samples: list[Sample], filler: int) -> None:
        """Try every habit until our way gives what the model's own way gives, in a batch of several lengths too."""
        model, natural = self.model, [self._natural(sample) for sample in samples[:1]]
        grid = model.picture_inputs(samples[0].images).get("image_grid_thw")
        seen: dict[str, str] = {}
        for by_layer in (False, True):
            for prefix in ("causal", "both", "pictures"):
                for first in (0, 1):
                    model.habits = Habits(prefix, first, by_layer, filler, grid)  # pyright: ignore
                    self.alone, said = [], ""
                    try:
                        for i, sample in enumerate(samples):
                            if i == len(natural):
                                natural.append(self._natural(sample))
                            self.alone.append(self(sample.ids, sample.images))
                            difference = _off(self.alone[i], natural[i])
                            said += f"{difference:.1e} "
                            if not difference <= self.close:
                                break
                        else:
                            difference = max(self.rows(samples))
                            if difference <= self.close:
                                return
                            said += f"and {difference:.1e} beside padding"
                    except Exception as error:  # a form of mask the model does not take
                        said += f"{type(error).__name__}: {error}"
                    seen[f"{prefix}, {first}, {by_layer}"] = said.strip()
        raise CheckpointError("the model, run our way", found=f"other hidden states than its own way: {seen}",
                              expected=f"the same within {self.close:.0e} of their largest value",
                              fix="this family is not supported; report it with the line above")  # fmt: skip

    def rows(self, samples: list[Sample]) -> list[float]:
        """How far every sentence is from what it says alone, all in one batch and each with padding."""
        T = 3 + max(sample.ids.shape[1] for sample in samples)
        ids = torch.cat([torch.nn.functional.pad(s.ids, (T - s.ids.shape[1], 0), value=self.ids.pad) for s in samples])
        lengths = torch.tensor([s.ids.shape[1] for s in samples], device=ids.device)
        mask = torch.arange(T, device=ids.device) >= T - lengths[:, None]
        together = self(ids, torch.cat([s.images for s in samples]), mask=mask)
        return [_off(row[None, T - alone.shape[1] :], alone) for row, alone in zip(together, self.alone, strict=True)]

    def sees(self, samples: list[Sample], other: Tensor) -> None:
        """Every picture matters to the answer."""
        for sample, alone in zip(samples, self.alone, strict=True):
            last, nth = self.model.symbol_logits(alone[:, -1]), len(sample.images) - 1
            for what, picture in (("black", torch.zeros_like(other)), ("another", other))[: 2 - nth]:
                changed = torch.cat([sample.images[:nth], picture])
                if not _changed(self.model.symbol_logits(self(sample.ids, changed)[:, -1]), last):
                    raise CheckpointError(
                        "the model", found=f"the same answer to {'a second' if nth else 'a'} picture and to {what} one",
                        expected="a model that looks at its picture",
                        fix="check weights and transformers' version; probe_image: false loads it blind",
                    )  # fmt: skip

    def cache(self, sample: Sample) -> None:
        """Read on over a cache, symbol by symbol, the model says what it says in one pass."""
        tail = [self.ids.act, *self.ids.symbols[:2]]
        whole = self(sample.ids, sample.images, tail)[:, -3:]
        ids, mask, positions = self._inputs(sample.ids, torch.ones_like(sample.ids, dtype=torch.bool), tail, False)
        cache, T, steps = self.model.new_cache(), sample.ids.shape[1] + 1, []
        for start, end in ((0, T), (T, T + 1), (T + 1, T + 2)):
            out = self.model.hidden(
                ids[:, start:end], sample.images if start == 0 else None, attention_mask=mask[:, :, start:end, :end],
                position_ids=positions[..., start:end], past_key_values=cache, use_cache=True,
            )  # fmt: skip
            steps.append(out.last_hidden_state[:, -1:])
        if not (difference := _off(torch.cat(steps, 1), whole)) <= self.close:
            raise CheckpointError("the model, over a cache", found=f"hidden states that differ by {difference:.1e}",
                                  expected=f"the same as in one pass, within {self.close:.0e} of their largest value",
                                  fix="this family is not supported; report it with the line above")  # fmt: skip

    def parallel(self, sample: Sample) -> str:
        """Why the action positions cannot be read all at once; empty when they can."""
        tail = self.model.parallel_tail(self.model.num_slots)
        T, other = sample.ids.shape[1], [*tail[:-1], self.ids.symbols[0]]
        try:
            told, changed = (self(sample.ids, sample.images, t, both=True) for t in (tail, other))
            if _off(told[:, :T], self.alone[0]) > self.close or _changed(changed[:, :T], told[:, :T]):
                return "what stands before the actions changes with what comes after"
            if len(tail) > 1 and not _changed(changed[:, T], told[:, T]):
                return "an action position does not read the ones after it, whatever the mask"
            blind = self(sample.ids, torch.zeros_like(sample.images), tail, both=True)
        except Exception as error:  # a form of mask the model does not take
            return f"it does not take such a mask ({type(error).__name__}: {error})"
        read = self.model.symbol_logits(told[:, T:]), self.model.symbol_logits(blind[:, T:])
        if not all(_changed(read[0][:, i], read[1][:, i]) for i in range(len(tail))):
            return "an action position does not look at the picture" if _changed(told[:, :T], blind[:, :T]) else ""
        return ""

    # ------------------------------------------------------------------------------------------------ running it

    def __call__(
        self, ids: Tensor, images: Tensor, tail: list[int] | tuple[int, ...] = (), both: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, T + M, d) our way, of prefixes (B, T) and `tail`, which looks ahead where `both` says so."""
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        whole, additive, positions = self._inputs(ids, mask, tail, both)
        return self.model.hidden(whole, images, attention_mask=additive, position_ids=positions).last_hidden_state

    def _inputs(self, ids: Tensor, mask: Tensor, tail: list[int] | tuple[int, ...], both: bool) -> tuple[Tensor, Tensor, Tensor]:
        (B, T), M = ids.shape, len(tail)
        allowed = torch.zeros(B, T + M, T + M, dtype=torch.bool, device=ids.device)
        allowed[:, :T, :T], positions = self.model.prefix_attention(ids, mask, torch.zeros_like(mask))
        allowed[:, T:, :T] = mask[:, None]
        square = torch.ones(M, M, dtype=torch.bool, device=ids.device)
        allowed[:, T:, T:] = square if both else square.tril()
        least = max(-1e9, torch.finfo(self.dtype).min)
        additive = torch.zeros(allowed.shape, dtype=self.dtype, device=ids.device).masked_fill(~allowed, least)[:, None]
        whole = torch.cat([ids, torch.tensor(list(tail), dtype=ids.dtype, device=ids.device).expand(B, -1)], 1)
        return whole, additive, self.model.tail_positions(positions, M) if M else positions

    def _natural(self, sample: Sample) -> Tensor:
        inputs = self.model.picture_inputs(sample.images)
        inputs |= {"attention_mask": torch.ones_like(sample.ids), **self.model.types(sample.ids)}
        return self.model.vlm.model(input_ids=sample.ids, **inputs).last_hidden_state


def _off(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected value (of 1 at least)."""
    return (found - expected).float().abs().max().item() / max(1.0, expected.float().abs().max().item())


def _changed(found: Tensor, before: Tensor) -> bool:
    return _off(found, before) > _NOTHING
