"""Batches from loader workers without a copy through a pipe or a new piece of shared memory each.

Every worker has a few shelves in one anonymous memory file that its parent maps too. It lays a batch's tensors on a free
shelf and sends only where they are; the parent's tensors point there, and the shelf is free again when the last of them is
gone. A worker that finds no free shelf, or a batch too large for one, sends the batch the ordinary way: nobody waits for a
shelf, so nothing can lock up.
"""

from __future__ import annotations

import itertools
import mmap
import os
import weakref
from dataclasses import dataclass, fields
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNED = 64
_NUMBERS = itertools.count()


class Shelves:
    """`count` shelves of `size` bytes for each of `workers`. Made in the parent; reaches workers by fork or by pickling."""

    def __init__(self, workers: int, count: int, size: int) -> None:
        self.workers, self.count = workers, count
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.number, self.owner = next(_NUMBERS), os.getpid()
        # Not /dev/shm, which containers keep small: a page beyond its limit kills the process with SIGBUS.
        self._file = os.memfd_create("vla-loader", os.MFD_CLOEXEC)
        os.ftruncate(self._file, workers * count * self.size + mmap.PAGESIZE * -(-workers * count // mmap.PAGESIZE))
        self._map()
        _OPEN[self.number] = self

    def _map(self) -> None:
        whole = np.frombuffer(mmap.mmap(self._file, 0), np.uint8)
        end = self.workers * self.count * self.size
        self._shelves = whole[:end].reshape(self.workers, self.count, self.size)
        self._taken = whole[end : end + self.workers * self.count].reshape(self.workers, self.count)
        """1 while a batch lies there: set by the worker, cleared by the parent."""

    def put(self, batch: Any, worker: int) -> Laid | Any:
        """Lay a dataclass of tensors on a free shelf of `worker`; the batch itself when there is none."""
        tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
        if any(not isinstance(t, Tensor) or not _dense(t) for t in tensors.values()):
            return batch
        free = np.flatnonzero(self._taken[worker] == 0)
        places, at = {}, 0
        for name, tensor in tensors.items():
            places[name] = at, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.stride()
            at += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        if not len(free) or at > self.size:
            return batch
        shelf = int(free[0])
        self._taken[worker, shelf] = 1
        whole = torch.from_numpy(self._shelves[worker, shelf])
        for name, tensor in tensors.items():
            _at(whole, *places[name]).copy_(tensor)
        return Laid(type(batch), self.number, worker, shelf, places)

    def take(self, laid: Laid) -> Any:
        """The batch that lies there, without copying it."""
        view = self._shelves[laid.worker, laid.shelf]
        # torch keeps this very array until the last tensor over it is gone, wherever that tensor has got to.
        weakref.finalize(view, self._clear, laid.worker, laid.shelf).atexit = False
        whole = torch.from_numpy(view)
        return laid.kind(**{name: _at(whole, *place) for name, place in laid.places.items()})

    def _clear(self, worker: int, shelf: int) -> None:
        if os.getpid() == self.owner:  # a forked child drops its copy of our tensors: that says nothing about ours
            self._taken[worker, shelf] = 0

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.__dict__.items() if key not in ("_shelves", "_taken")}
        return kept | {"_file": DupFd(self._file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_file": state["_file"].detach()})
        self._map()

    def __del__(self) -> None:
        if hasattr(self, "_file") and os is not None:  # at the interpreter's end modules are gone before objects are
            os.close(self._file)


_OPEN: weakref.WeakValueDictionary[int, Shelves] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Laid:
    """Where a batch of class `kind` lies: what a worker sends in its place."""

    kind: type
    shelves: int
    worker: int
    shelf: int
    places: dict[str, tuple[int, str, tuple[int, ...], tuple[int, ...]]]
    """Field -> (offset in bytes, dtype, shape, strides)."""

    def take(self) -> Any:
        """The batch. Once only, in the process the shelves were made in."""
        return _OPEN[self.shelves].take(self)

    def pin_memory(self) -> Any:
        """Called by the DataLoader's pinning thread; frees the shelf at once."""
        return self.take().pin_memory()


def _dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill a stretch of memory, in whatever order (channels last, say)."""
    if not tensor.numel():
        return tensor.is_contiguous()
    expected = 1
    for stride, length in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= length
    return True


def _at(whole: Tensor, offset: int, dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    return whole[offset : offset + size].view(kind).as_strided(shape, stride)
