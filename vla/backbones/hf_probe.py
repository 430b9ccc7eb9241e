"""Finding out at load how a vision-language model behaves, by running it: one sentence, our way and its own way.

Refuses a model whose answers our way differ from its own, and one that does not look at its picture (a real one against black and
another: silent blindness is what openvla#346 was).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vla.errors import CheckpointError


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


@torch.no_grad()
def probe(model: Any, writer: Any, look: bool) -> Habits:
    """How `model` behaves. Raises `CheckpointError` when it cannot be imitated, or with `look` when it ignores its picture."""
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    size = writer.image.size
    image, other = torch.randint(0, 256, (2, 1, 3, size, size), generator=generator, dtype=torch.uint8).to(device)
    ids = torch.tensor([writer.ask("pick up the red cube and put it into the bowl", 1)], device=device)
    filler = int(writer.words("a")[0])
    inputs = model.picture_inputs(image)
    grid = inputs.get("image_grid_thw")
    inputs |= {"attention_mask": torch.ones_like(ids), **model.types(ids)}
    natural = model.vlm.model(input_ids=ids, **inputs).last_hidden_state
    mask, scale = torch.ones_like(ids, dtype=torch.bool), natural.float().abs().max().item()
    seen: dict[str, str] = {}
    dtype = model.get_input_embeddings().weight.dtype
    close = 1e-4 if dtype == torch.float32 else 6e-2
    for by_layer in (False, True):
        for prefix in ("causal", "both", "pictures"):
            for first in (0, 1):
                habits = Habits(prefix, first, by_layer, filler, grid)  # pyright: ignore
                model.habits = habits
                try:
                    ours = _run(model, ids, mask, image, dtype)
                except Exception as error:  # a form of mask the model does not take
                    seen[f"{prefix}, {first}, {by_layer}"] = f"{type(error).__name__}: {error}"
                    continue
                difference = (ours - natural).float().abs().max().item()
                seen[f"{prefix}, {first}, {by_layer}"] = f"{difference:.1e}"
                if difference <= close * max(scale, 1.0):
                    if look:
                        _sees(model, ids, mask, image, other, ours, dtype)
                    return replace(habits)
    raise CheckpointError("the model, run our way", found=f"other hidden states than its own way: {seen}",
                          expected=f"the same within {close:.0e} of their largest value",
                          fix="this family is not supported; report it with the line above")  # fmt: skip


def _run(model: Any, ids: Tensor, mask: Tensor, image: Tensor, dtype: torch.dtype) -> Tensor:
    allowed, positions = model.prefix_attention(ids, mask, torch.zeros_like(mask))
    least = max(-1e9, torch.finfo(dtype).min)
    additive = torch.zeros(allowed.shape, dtype=dtype, device=ids.device).masked_fill(~allowed, least)[:, None]
    return model.hidden(ids, image, attention_mask=additive, position_ids=positions).last_hidden_state


def _sees(model: Any, ids: Tensor, mask: Tensor, image: Tensor, other: Tensor, real: Tensor, dtype: torch.dtype) -> None:
    last = model.symbol_logits(real[:, -1]).float()
    for what, picture in (("black", torch.zeros_like(image)), ("another", other)):
        told = model.symbol_logits(_run(model, ids, mask, picture, dtype)[:, -1]).float()
        if (told - last).abs().max().item() <= 1e-7 * max(1.0, last.abs().max().item()):
            raise CheckpointError("the model", found=f"the same answer to a picture and to {what} one",
                                  expected="a model that looks at its picture",
                                  fix="check weights and transformers' version; probe_image: false loads it blind")  # fmt: skip

