"""The stream as batches: positions for a rank and a step, Examples in loader workers, micro-batches.

Pictures stay uint8 until they are on the device. Workers hand batches over in memory they share with this process
(`vla/shelves.py`); what is in a batch does not depend on how many workers there are.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from vla.batch import Batch, Example, collate
from vla.errors import MachineError, VLAError
from vla.mixture import Mixture
from vla.policy import VLAPolicy
from vla.shelves import Laid, Shelves

PREFETCH = 4
"""Batches each worker makes ahead of the one that is wanted."""


class _Stream(Dataset):
    """Stream positions -> samples. Map-style over positions: order is the caller's, so workers cannot change it."""

    def __init__(self, read: Callable[[int], Any]) -> None:
        self.read = read

    def __getitem__(self, n: int) -> Any | VLAError:
        try:
            return self.read(n)
        except VLAError as error:  # as a value: torch rebuilds a worker's exception from its text alone
            return error


class _Examples:
    """Stream position -> Example: the policy's encoder without the policy, for workers."""

    def __init__(self, mixture: Mixture, policy: VLAPolicy, seed: int, targets: Any = None) -> None:
        self.mixture, self.encoder, self.augment, self.seed = mixture, policy.encoder, policy.config.augment, seed
        self.targets = targets

    def __call__(self, n: int) -> Example:
        window = self.mixture.window(n)
        example = self.encoder.window(window, self.augment, self.seed)
        return example if self.targets is None else self.targets.add(example, window, self.mixture.locate(n))


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


class Loader:
    """Batches of `collate([read(n), ...])` for each list of positions in `positions`, made by `workers` processes.

    A batch is a dataclass of tensors, or the first `VLAError` that `read` raised for it. `shelf` is the most bytes a batch is
    expected to have; larger ones arrive as well, more slowly. `start` is how workers are started: `fork`, `spawn`,
    `forkserver`, None for Python's default.
    """

    def __init__(
        self, read: Callable[[int], Any], collate: Callable[[list[Any]], Any], positions: Sampler[list[int]], *,
        workers: int = 0, shelf: int = 2**24, start: str | None = None,
    ) -> None:  # fmt: skip
        self.positions = positions
        self._shelves = None
        if workers and hasattr(os, "memfd_create"):  # Linux
            # Those made ahead, the one being used, and the one before, whose last tensor may not be gone yet.
            self._shelves = Shelves(workers, PREFETCH + 2, shelf)
        self._loader = DataLoader(
            _Stream(read), batch_sampler=positions, collate_fn=_Collate(collate, self._shelves), num_workers=workers,
            worker_init_fn=_quiet_worker, pin_memory=torch.cuda.is_available(), prefetch_factor=PREFETCH if workers else None,
            multiprocessing_context=start if workers else None,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Batches:
        return Batches(iter(self._loader), self._shelves)


class Batches:
    """The batches of a `Loader` in order."""

    def __init__(self, inner: Any, shelves: Shelves | None) -> None:
        self._inner, self._shelves = inner, shelves

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self._inner)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            return MachineError("loader", found=f"a worker died ({str(error).splitlines()[0]})", expected="workers that live",
                                fix="often memory ran out: fewer run.workers, or mixture.frames=jpeg; then --resume")  # fmt: skip
        return batch.take() if isinstance(batch, Laid) else batch

    def _shutdown_workers(self) -> None:
        getattr(self._inner, "_shutdown_workers", lambda: None)()


def make_loader(
    mixture: Mixture, policy: VLAPolicy, *, seed: int, batch: int, steps: int, first_step: int = 0, rank: int = 0,
    world: int = 1, workers: int = 0, start: str | None = None, targets: Any = None,
) -> Loader:  # fmt: skip
    """Batches of `rank` for steps [first_step, steps); the same whatever the number of workers.

    `targets` (`vla.distill.targets.Targets`) adds what a teacher says of each window.
    """
    encoder = policy.encoder
    cameras = max(len(spec.cameras) for spec in encoder.embodiments.values())
    pictures = cameras * encoder.writer.image.size**2 * 3
    return Loader(
        _Examples(mixture, policy, seed, targets), _Batch(encoder.writer.ids.pad, policy.narrows),
        _Positions(batch, rank, world, first_step, steps), workers=workers, start=start,
        shelf=batch // world * (pictures + 2**16) + 2**16,
    )  # fmt: skip


class _Batch:
    """`policy.collate` without the policy, for workers."""

    def __init__(self, pad: int, narrow: bool) -> None:
        self.pad, self.narrow = pad, narrow

    def __call__(self, examples: list[Example]) -> Batch:
        return collate(examples, self.pad, self.narrow)


class _Collate:
    """Samples -> a batch, laid on a shelf where this is a worker; an error instead if there is one."""

    def __init__(self, collate: Callable[[list[Any]], Any], shelves: Shelves | None) -> None:
        self.collate, self.shelves = collate, shelves

    def __call__(self, samples: list[Any | VLAError]) -> Any:
        for sample in samples:
            if isinstance(sample, VLAError):
                return sample
        batch, worker = self.collate(samples), get_worker_info()
        return batch if worker is None or self.shelves is None else self.shelves.put(batch, worker.id)


def _quiet_worker(worker: int) -> None:
    # A launcher signals the whole process group; a worker that died would fail the run before it can save.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def split_batch(batch: Batch, policy: VLAPolicy, micro: int | None) -> list[Batch]:
    """Cut a batch into micro-batches of at most `micro` rows."""
    if micro is None or micro >= len(batch):
        return [batch]
    image_id, per_image = policy.encoder.writer.ids.image, policy.encoder.writer.ids.image_tokens
    images = ((batch.ids == image_id).sum(-1) // per_image).tolist()
    starts = np.concatenate([[0], np.cumsum(images)])
    parts = []
    for first in range(0, len(batch), micro):
        last = min(first + micro, len(batch))
        rows = {k: getattr(batch, k)[first:last] for k in batch.__dataclass_fields__ if k not in ("images", "slots")}
        mine = slice(int(starts[first]), int(starts[last]))
        parts.append(Batch(images=batch.images[mine], slots=batch.slots[mine], **rows))
    return parts
