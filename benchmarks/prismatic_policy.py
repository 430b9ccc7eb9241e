"""A real `VLAPolicy` around a Prismatic model with random weights, for benchmarks: no folder, no tokenizer, no data.

Only the writer is a stand-in: it makes a prefix of a fixed number of text ids, so that nothing but numbers is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla.actions import BinCodec
from vla.backbones.config import PrismaticConfig
from vla.backbones.prismatic_model import PrismaticModelConfig, PrismaticVLM
from vla.embodiment import Camera, Channel, EmbodimentSpec
from vla.images import ImagePreparation
from vla.normalize import Normalizer, Stats
from vla.policy.config import CodecConfig, PolicyConfig
from vla.policy.model import VLAPolicy

ROBOT = "bench"


class FixedWriter:
    """`[BOS][pictures][text]` with `text` ids whatever the sentence says, but for one id fewer per word beyond the first."""

    def __init__(self, config: PrismaticModelConfig, text: int) -> None:
        self.ids, self.text_ids = config.ids, text
        self.image = ImagePreparation(config.image_sizes[0], "bicubic", 1.0)

    def act(self, text: str, cameras: int) -> list[int]:
        words = list(range(100, 100 + self.text_ids - max(0, len(text.split()) - 1)))
        return [1, *[self.ids.image] * (self.ids.image_tokens * cameras), *words]

    ask = act

    def words(self, text: str) -> list[int]:
        return [3] * len(text.split())

    def text(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def state_bytes(self) -> bytes:
        return str(self.text_ids).encode()

    def save_pretrained(self, folder: Path) -> None:
        raise NotImplementedError("a benchmark's policy is not saved")


def bench_policy(model: PrismaticVLM, text: int, chunk: int, decoding: str, cameras: int = 1) -> VLAPolicy:
    """7 action dimensions, `chunk` steps; prefixes of 1 + pictures + `text` ids. The model's slots are set to fit."""
    model.config.num_slots = 7 * chunk
    size = model.config.image_sizes[0]
    names = tuple("xyzabcg")
    robot = EmbodimentSpec(
        name=ROBOT, cameras={f"camera{i}": Camera(height=size, width=size) for i in range(cameras)}, state=(),
        action=(Channel(name="arm", dims=names, convention="joint_delta", unit="1", low=(-1.0,) * 7, high=(1.0,) * 7),),
        control_hz=5.0,
    )  # fmt: skip
    parts = {}
    for part, n in (("action", 7), ("state", 0)):
        ends = {name: np.full(n, value) for name, value in
                (("min", -1.0), ("max", 1.0), ("mean", 0.0), ("std", 0.5), ("q01", -1.0), ("q99", 1.0))}  # fmt: skip
        parts[part] = Normalizer(Stats(ends, 100), "q99", where=part)
    config = PolicyConfig.model_validate(dict(
        backbone=PrismaticConfig(kind="prismatic", path="random"), codec=CodecConfig(bins=256, variant="openvla"), chunk=chunk,
        execute=chunk, decoding=decoding, decode="argmax", soft_sigma=0.0, end_weight=0.0, state="none",
    ))  # fmt: skip
    codec: Any = BinCodec(256, "openvla")
    policy = VLAPolicy(config, model, FixedWriter(model.config, text), {ROBOT: robot}, {ROBOT: parts}, codec)
    return policy.to(policy.device).eval()


def observations(policy: VLAPolicy, n: int) -> list[Any]:
    rng = np.random.default_rng(0)
    cameras = policy.embodiments[ROBOT].cameras
    return [{"images": {name: rng.integers(0, 256, (c.height, c.width, 3), np.uint8) for name, c in cameras.items()},
             "state": np.zeros(0, np.float32)} for _ in range(n)]  # fmt: skip


def prefixes(policy: VLAPolicy, n: int, words: list[str] | None = None) -> Any:
    """A batch of `n` encoded observations on the policy's device."""
    texts = words or ["lift"] * n
    return policy.collate([policy.encoder.observation(o, text, ROBOT, False)
                           for o, text in zip(observations(policy, n), texts, strict=True)]).to(policy.device)  # fmt: skip


def rule_out_words(model: PrismaticVLM) -> None:
    """Rows of the head that are no symbols become zero, so that plain `generate` says symbols too: the best of 256 random
    logits is positive. Costs and weights of both sides stay equal."""
    symbols = model.config.ids.symbols
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        kept = weight[symbols[-1] : symbols[0] + 1].clone()
        weight.zero_()
        weight[symbols[-1] : symbols[0] + 1] = kept
