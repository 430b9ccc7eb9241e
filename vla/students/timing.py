"""How long one step of a student takes: candidates side by side, in turns, on as many threads as the robot will give.

A `Runner` makes a step of a network that is run again and again. This file knows torch; `exported` makes the graphs a robot runs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from vla.backbones import Sizes, StudentConfig
from vla.backbones.student import StudentNet
from vla.students.presets import empty_network

Step = Callable[[], object]
"""One look and one chunk."""
Runner = Callable[[StudentNet, Sizes, int, int], Step]
"""(network, sizes, cameras, threads) -> its step."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step over `rounds`."""

    p50_ms: float
    p95_ms: float
    rounds: int


@torch.no_grad()
def random_network(config: StudentConfig, sizes: Sizes) -> StudentNet:
    """A network to be timed. Its numbers do not matter; but no two tensors are alike, or a graph would keep one of them."""
    network = empty_network(config, sizes).to_empty(device="cpu").eval()
    pool = torch.randn(999_983, generator=torch.Generator().manual_seed(0)) * 0.05
    for i, tensor in enumerate([*network.parameters(), *network.buffers()]):
        some = pool.roll(7919 * i).repeat(-(-tensor.numel() // len(pool)))[: tensor.numel()].view(tensor.shape)
        tensor.copy_(some if isinstance(tensor, torch.nn.Parameter) else some.abs() + 0.5)  # a variance is positive
    return network


def torch_step(network: StudentNet, sizes: Sizes, cameras: int, threads: int) -> Step:
    """torch, layer by layer, float32; the number of threads is the process's (`timed` sets it)."""
    side, d = network.config.image_size, network.config.hidden
    pixels = torch.randint(0, 256, (cameras, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sentence, state, slots = torch.ones(1, d), torch.zeros(1, sizes.state), torch.arange(cameras) % network.max_cameras
    robots = torch.zeros(1, dtype=torch.long) if sizes.soft_tokens else None

    @torch.inference_mode()
    def step() -> torch.Tensor:
        seen = network.look(pixels, sentence.expand(cameras, -1), slots).reshape(1, -1, d)
        return network.symbol_logits(network.act(seen, None, sentence, state, robots)[0]).softmax(-1)

    return step


TORCH: Mapping[str, Runner] = {"torch": torch_step}
"""Runtimes this room knows by itself."""


def timed(
    steps: Sequence[Step], threads: int, rounds: int, warm_up: int = 5, clock: Callable[[], float] = time.perf_counter
) -> list[Timing]:
    """Time `steps` in turns, so that whatever else the machine does meets all of them alike."""
    with _threads(threads):
        for step in steps:
            for _ in range(warm_up):
                step()
        spent = np.zeros((rounds, len(steps)))
        for turn in spent:
            for i, step in enumerate(steps):
                step()  # caches are this step's before it is timed, as they are on a robot that does nothing else
                start = clock()
                step()
                turn[i] = clock() - start
    p50, p95 = np.percentile(spent, [50, 95], axis=0) * 1e3
    return [Timing(float(a), float(b), rounds) for a, b in zip(p50, p95, strict=True)]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(count)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()
