"""Batches out of loader workers: the same stream however they are made and carried."""

from __future__ import annotations

import gc
import os
import signal
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from small_datasets import write_dataset
from torch import Tensor

from vla.episodes import EpisodeStore
from vla.errors import DataError
from vla.loader import Batches, Loader, _Positions
from vla.mixture import Mixture
from vla.shelves import Laid, Shelves


@dataclass(frozen=True)
class Pair:
    pictures: Tensor
    n: Tensor


class Read:
    """Stands for an encoder: a sample is a function of n; position `bad` is a bad sample."""

    def __init__(self, bad: int = -1) -> None:
        self.bad = bad

    def __call__(self, n: int) -> np.ndarray:
        if n == self.bad:
            raise DataError(f"sample {n}", found="a flipped bit", expected="none", fix="restore it")
        return np.full((4, 4, 3), n % 256, np.uint8)


def stack(samples: list[np.ndarray]) -> Pair:
    pictures = torch.from_numpy(np.stack(samples)).permute(0, 3, 1, 2)  # channels last in memory
    return Pair(pictures, pictures[:, 0, 0, 0].long())


def numbers(**kw) -> list[list[int]]:
    return [batch.n.tolist() for batch in Loader(Read(), stack, _Positions(6, 0, 1, 2, 12), **kw)]


EXPECTED = [list(range(6 * step, 6 * step + 6)) for step in range(2, 12)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_order_is_the_callers_whatever_the_workers(workers: int):
    assert numbers(workers=workers) == EXPECTED


def test_batches_too_large_for_a_shelf_arrive_as_well():
    assert numbers(workers=1, shelf=1) == EXPECTED


def test_batches_kept_are_not_overwritten():
    kept = list(Loader(Read(), stack, _Positions(6, 0, 1, 0, 30), workers=1))
    assert [b.n.tolist() for b in kept] == [list(range(6 * s, 6 * s + 6)) for s in range(30)]
    for batch in kept:
        assert batch.pictures.shape == (6, 3, 4, 4)
        assert torch.equal(batch.pictures[:, 1, 2, 3].long(), batch.n)


def test_a_batch_comes_on_a_shelf_that_is_free_again_when_its_last_tensor_is_gone():
    shelves = Shelves(2, 2, 4096)
    first = shelves.put(stack([Read()(n) for n in range(5)]), worker=1)
    second = shelves.put(stack([Read()(n) for n in range(5, 10)]), worker=1)
    assert isinstance(first, Laid) and isinstance(second, Laid) and {first.shelf, second.shelf} == {0, 1}
    third = stack([Read()(n) for n in range(3)])
    assert shelves.put(third, worker=1) is third, "no free shelf: the ordinary way, never a wait"
    assert isinstance(shelves.put(third, worker=0), Laid)
    batch = first.take()
    assert batch.n.tolist() == list(range(5)) and batch.pictures.is_contiguous(memory_format=torch.channels_last)
    last = batch.pictures[2:3]
    del batch
    gc.collect()
    assert shelves._taken[1].tolist() == [1, 1]
    del last
    gc.collect()
    assert sorted(shelves._taken[1].tolist()) == [0, 1]
    assert second.take().n.tolist() == list(range(5, 10))


def test_a_forked_child_that_drops_a_batch_frees_nothing():
    shelves = Shelves(1, 1, 4096)
    laid = shelves.put(stack([Read()(1)]), worker=0)
    assert isinstance(laid, Laid)
    batch = laid.take()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        del batch
        gc.collect()
        os._exit(int(shelves._taken[0, 0] != 1))
    assert os.waitpid(child, 0)[1] == 0 and shelves._taken[0, 0] == 1 and batch.n.tolist() == [1]


def test_tensors_that_do_not_fill_memory_go_the_ordinary_way():
    shelves = Shelves(1, 1, 2**16)
    batch = Pair(torch.zeros(8, 8)[:, ::2], torch.arange(3))
    assert shelves.put(batch, 0) is batch
    empty = shelves.put(Pair(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.tensor(7)), 0)
    assert isinstance(empty, Laid)
    taken = empty.take()
    assert taken.pictures.shape == (0, 3, 4, 4) and taken.n.item() == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_a_value_and_the_batches_around_it_arrive(workers: int):
    got = list(Loader(Read(bad=14), stack, _Positions(6, 0, 1, 0, 4), workers=workers))
    assert isinstance(got[2], DataError) and "flipped bit" in str(got[2]) and "sample 14" in str(got[2])
    assert [b.n[0].item() for b in got if isinstance(b, Pair)] == [0, 6, 18]


@pytest.mark.parametrize("frames", ["raw", "jpeg", "video"])
def test_workers_read_every_kind_of_store_forked_and_spawned(tmp_path: Path, frames: str):
    write_dataset(tmp_path / "ds", 5, cameras=("front", "wrist"))
    store = EpisodeStore.open(tmp_path / "ds", tmp_path / "cache", frames, progress=False)  # pyright: ignore
    read = Windows(Mixture([store], [1.0], 4, seed=3))
    read(0)  # decoders of this process are open before any other process starts
    ways: list[dict] = [{"workers": 0}, {"workers": 2, "start": "fork"}]
    if frames == "video":  # a spawned worker imports everything anew: once is slow enough
        ways.append({"workers": 1, "start": "spawn"})
    runs = [list(Loader(read, stack_windows, _Positions(4, 0, 1, 0, 3), **way)) for way in ways]
    for run in runs[1:]:
        for batch, reference in zip(run, runs[0], strict=True):
            assert all(torch.equal(getattr(batch, f.name), getattr(reference, f.name)) for f in fields(Pair))


class Windows:
    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def __call__(self, n: int) -> np.ndarray:
        return np.stack(list(self.mixture.window(n).images.values()))  # pyright: ignore


def stack_windows(samples: list[np.ndarray]) -> Pair:
    return Pair(torch.from_numpy(np.stack(samples)), torch.arange(len(samples)))


def test_stopping_early_ends_the_workers():
    batches = iter(Loader(Read(), stack, _Positions(6, 0, 1, 0, 1000), workers=2))
    assert isinstance(batches, Batches)
    next(batches)
    workers = batches._inner._workers
    batches._shutdown_workers()
    assert not any(worker.is_alive() for worker in workers)
