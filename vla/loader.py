"""The stream as batches: positions for a rank and a step, Examples in loader workers, micro-batches."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vla.batch import Batch, Example, collate
from vla.errors import VLAError
from vla.mixture import Mixture
from vla.policy import VLAPolicy


class _Stream(Dataset):
    """Stream positions -> Examples. Map-style over positions: order is the caller's, so workers cannot change it."""

    def __init__(self, mixture: Mixture, policy: VLAPolicy, seed: int) -> None:
        self.mixture, self.encoder, self.augment, self.seed = mixture, policy.encoder, policy.config.augment, seed

    def __getitem__(self, n: int) -> Example | VLAError:
        try:
            return self.encoder.window(self.mixture.window(n), self.augment, self.seed)
        except VLAError as error:  # as a value: torch rebuilds a worker's exception from its text alone
            return error


class _Positions(Sampler[list[int]]):
    """For each step, the stream positions of one rank: rows [rank * share, (rank + 1) * share) of the global batch."""

    def __init__(self, batch: int, rank: int, world: int, first_step: int, steps: int) -> None:
        self.batch, self.share, self.rank = batch, batch // world, rank
        self.first_step, self.steps = first_step, steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps):
            start = step * self.batch + self.rank * self.share
            yield list(range(start, start + self.share))

    def __len__(self) -> int:
        return self.steps - self.first_step


def make_loader(
    mixture: Mixture, policy: VLAPolicy, *, seed: int, batch: int, steps: int, first_step: int = 0, rank: int = 0,
    world: int = 1, workers: int = 0,
) -> DataLoader:  # fmt: skip
    """Batches of `rank` for steps [first_step, steps); the same whatever the number of workers."""
    return DataLoader(
        _Stream(mixture, policy, seed), batch_sampler=_Positions(batch, rank, world, first_step, steps),
        collate_fn=_Collate(policy.encoder.layout["pad"]), num_workers=workers, worker_init_fn=_quiet_worker,
        pin_memory=torch.cuda.is_available(), prefetch_factor=4 if workers else None,
    )  # fmt: skip


class _Collate:
    """`policy.collate` without the policy, for workers."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, examples: list[Example | VLAError]) -> Batch | VLAError:
        good = [e for e in examples if isinstance(e, Example)]
        if len(good) < len(examples):
            return next(e for e in examples if isinstance(e, VLAError))
        return collate(good, self.pad)


def _quiet_worker(worker: int) -> None:
    # A launcher signals the whole process group; a worker that died would fail the run before it can save.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def split_batch(batch: Batch, policy: VLAPolicy, micro: int | None) -> list[Batch]:
    """Cut a batch into micro-batches of at most `micro` rows."""
    if micro is None or micro >= len(batch):
        return [batch]
    image_id, per_image = policy.encoder.layout["image"], policy.encoder.layout["image_tokens"]
    images = ((batch.ids == image_id).sum(-1) // per_image).tolist()
    starts = np.concatenate([[0], np.cumsum(images)])
    parts = []
    for first in range(0, len(batch), micro):
        last = min(first + micro, len(batch))
        rows = {k: getattr(batch, k)[first:last] for k in batch.__dataclass_fields__ if k != "images"}
        parts.append(Batch(images=batch.images[starts[first] : starts[last]], **rows))
    return parts
