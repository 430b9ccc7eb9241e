"""Prismatic vision-language models, OpenVLA's among them: building, loading, drawing at random.

`prismatic_model` is the model, `prismatic_writer` its sentence, `prismatic_files` its folder, `prismatic_oft` the further files
of OpenVLA-OFT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla.backbones.config import PrismaticConfig
from vla.backbones.prismatic_files import empty_model, finish, read_config, read_weights
from vla.backbones.prismatic_model import PrismaticModelConfig, PrismaticVLM
from vla.backbones.prismatic_oft import read_further
from vla.backbones.prismatic_writer import PrismaticWriter, act_piece, read_tokenizer_files
from vla.backbones.protocol import Sizes
from vla.errors import CheckpointError
from vla.fetch import fetch_model

__all__ = ["PrismaticModelConfig", "PrismaticVLM", "PrismaticWriter", "build", "load", "open_folder", "random_prismatic"]

_FRESH = ("proprio_projector.", "robots.", "end_query")


def build(config: PrismaticConfig, sizes: Sizes) -> tuple[PrismaticVLM, PrismaticWriter]:
    """A pretrained model with room for a policy of `sizes`; what the folder lacks of that is drawn.

    Weights as stored (openvla-7b: bfloat16). Raises `CheckpointError` for a folder that cannot be had or is not whole.
    """
    return open_folder(config, sizes)


def load(
    folder: Path, config: PrismaticConfig, sizes: Sizes, dtype: torch.dtype | None, attention: str | None
) -> tuple[PrismaticVLM, PrismaticWriter]:
    """Model and writer of a saved policy."""
    own = PrismaticModelConfig.from_pretrained(folder)
    model = empty_model(own, attention or config.attention)
    read_weights(model, folder, None, dtype)
    return model, PrismaticWriter(own, read_tokenizer_files(folder), config.crop)


def open_folder(
    config: PrismaticConfig, sizes: Sizes, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[PrismaticVLM, PrismaticWriter]:
    """`build`, straight onto a device."""
    folder = fetch_model(config.path)
    files = read_tokenizer_files(folder)
    further = read_further(folder)
    own = read_config(
        folder, num_symbols=sizes.symbols, num_slots=sizes.slots, state_dim=sizes.state, state_token=sizes.state_token,
        end_token=sizes.end_token, num_robots=sizes.robots, soft_tokens=sizes.soft_tokens,
        act_id=act_piece(files["tokenizer.json"], folder), film=any(name.startswith("film.") for name in further),
    )  # fmt: skip
    writer = PrismaticWriter(own, files, config.crop)
    if not sizes.state_token:
        further = {name: t for name, t in further.items() if not name.startswith("proprio_projector.")}
    model = empty_model(own, config.attention)
    read_weights(model, folder, device, dtype, _FRESH, further)
    if config.probe_image:
        check_image_matters(model, writer, folder)
    return model, writer


def random_prismatic(
    config: PrismaticModelConfig | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16,
    attention: str | None = None,
) -> PrismaticVLM:  # fmt: skip
    """A model of these sizes (default: openvla-7b's) with random weights, drawn where they lie. For benchmarks and tests."""
    model = empty_model(config or PrismaticModelConfig(), attention)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device, dtype=dtype))
    model.draw()
    finish(model, device)
    return model


@torch.inference_mode()
def check_image_matters(model: PrismaticVLM, writer: PrismaticWriter, where: object) -> None:
    """Raise `CheckpointError` for a model that says the same whatever it sees (openvla#346)."""
    size, ids = writer.image.size, writer.ids
    device = model.get_input_embeddings().weight.device
    ramp = torch.arange(size, dtype=torch.float32).expand(3, size, size) * (255.0 / size)
    pictures = torch.stack([torch.zeros_like(ramp), ramp, 255.0 - ramp.transpose(1, 2)]).to(torch.uint8).to(device)
    prefix = torch.tensor([[*writer.act("In: What action should the robot take to move?\nOut:", 1), ids.act]], device=device)
    said: list[Tensor] = []
    for picture in pictures:  # one by one: three pictures at once would need three times the memory
        states: Any = torch.zeros(1, model.state_dim, device=device) if model.config.state_token else None
        robots = torch.zeros(1, dtype=torch.long, device=device)
        out = model.hidden(prefix, picture[None], states, robots=robots).last_hidden_state
        assert out is not None
        said.append(model.symbol_logits(out[0, -1]).float())
    if not all(torch.isfinite(logits).all() for logits in said):
        raise CheckpointError(where, found="logits that are not finite", expected="numbers",
                              fix="the weights are damaged, or too large for this dtype: copy them again, or load as "
                              "bfloat16")  # fmt: skip
    if torch.equal(said[0], said[1]) and torch.equal(said[0], said[2]):
        raise CheckpointError(where, found="the same logits for a black picture and two others", expected="a model that looks",
                              fix="the image tower or the projector is damaged: copy the weights again, or set "
                              "backbone.probe_image=false if you know why")  # fmt: skip
