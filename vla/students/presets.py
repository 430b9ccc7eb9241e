"""Sizes of students by budget, and what each of them costs.

For a robot of 7 action and 8 state dimensions, two cameras, chunks of 8 and 256 bins (`SIZES`); a multiplication and an addition
are two operations, of one look and one chunk; the sentence is computed once per instruction and is not in them:

    preset  parameters  at most  tokens a picture  tokens in all  GFLOP
    xs           7.8 M      8 M                50            111    1.9
    s           21.7 M     25 M                50            111    4.7
    m           56.4 M     60 M                50            111   12.1
    rt1         33.8 M     40 M                 8             27    4.8

`xs`, `s` and `m` are the cheap convolutional stem, patches of 32 pixels and a transformer: at equal parameters the number of
tokens decides what a step costs, and a patch of 16 makes four times as many. `rt1` is RT-1 (Brohan et al. 2022): an
EfficientNet-B3 steered by the sentence, 8 tokens of TokenLearner a picture, 8 layers. It differs from the paper: one frame and
no history of six, 224 pixels and not 300, FiLM after each of the seven stages and not inside each of 26 blocks, our sentence
encoder in place of the Universal Sentence Encoder, and it speaks all steps of a chunk at once from queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vla.backbones import Sizes, StudentConfig
from vla.backbones.student import StudentNet, network_config

PRESETS: dict[str, dict[str, Any]] = {
    "xs": {"hidden": 256, "layers": 7, "heads": 4, "mlp": 704},
    "s": {"hidden": 384, "layers": 10, "heads": 6, "mlp": 1024},
    "m": {"hidden": 512, "layers": 16, "heads": 8, "mlp": 1344},
    "rt1": {"tower": "efficientnet_b3", "tokens": 8, "keypoints": 0, "hidden": 512, "layers": 8, "heads": 8, "mlp": 832},
}
"""Name -> fields of `StudentConfig`, where they are not its defaults (224 pixels, patches of 32)."""

LIMITS = {"xs": 8_000_000, "s": 25_000_000, "m": 60_000_000, "rt1": 40_000_000}
"""Name -> the most parameters a student of that name has."""

SIZES = Sizes(symbols=256, slots=8 * 7, chunk=8, state=8, robots=1, soft_tokens=0, state_token=True, end_token=True)
"""The robot the figures above are for."""


def preset(name: str, **fields: Any) -> StudentConfig:
    """The preset `name`, with `fields` in place of its own."""
    return StudentConfig.model_validate({"kind": "student", **PRESETS[name], **fields})


def empty_network(config: StudentConfig, sizes: Sizes) -> StudentNet:
    """The network without numbers (meta device): shapes to count. Raises `UsageError` for an unknown tower."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # whoever asks for a size draws nothing
        return StudentNet(network_config(config, sizes))


def parameters(config: StudentConfig, sizes: Sizes) -> int:
    """Of the network; the heads of a policy (where does this end) come on top, a few thousand."""
    return sum(p.numel() for p in empty_network(config, sizes).parameters())


def cost(config: StudentConfig, sizes: Sizes, cameras: int = 2) -> dict[str, Any]:
    """`parameters`, `image_tokens` of a picture, `tokens` in all and `gflop` of one step with `cameras` pictures."""
    network = empty_network(config, sizes).eval().to_empty(device="cpu")  # whatever lies there: only operations are counted
    with torch.no_grad():
        sentence, slots = torch.zeros(1, config.hidden), torch.zeros(cameras, dtype=torch.long)
        pixels = torch.zeros(cameras, 3, config.image_size, config.image_size)
        robots = torch.zeros(1, dtype=torch.long) if sizes.soft_tokens else None
        with FlopCounterMode(display=False) as counted:
            seen = network.look(pixels, sentence.expand(cameras, -1), slots).reshape(1, -1, config.hidden)
            said, _ = network.act(seen, None, sentence, torch.zeros(1, sizes.state), robots)
            network.symbol_logits(said)
    tokens = seen.shape[1] + 1 + sizes.soft_tokens + sizes.state_token + sizes.end_token + sizes.chunk
    return {"parameters": sum(p.numel() for p in network.parameters()), "image_tokens": network.image_tokens, "tokens": tokens,
            "gflop": counted.get_total_flops() / 1e9}  # fmt: skip
