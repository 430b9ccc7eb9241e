"""`vla data bench`: what it reports is there and adds up; nothing here depends on how fast the machine is."""

from __future__ import annotations

import json
import multiprocessing
import signal
from pathlib import Path

import numpy as np
import pytest
from small_datasets import write_dataset

import data_tools.bench as bench_module
from data_tools.bench import bench
from vla.cli import main
from vla.episodes import EpisodeStore
from vla.errors import DataError, UsageError
from vla.mixture import Mixture


@pytest.fixture()
def root(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "ds", 4, cameras=("front", "wrist"))
    return tmp_path / "ds"


def test_every_kind_and_number_of_workers_is_measured(root: Path, capsys: pytest.CaptureFixture[str]):
    common = ["--seconds", "0.05", "--batch", "3", "--step-ms", "2", "--cache", str(root.parent / "cache")]
    assert main(["data", "bench", str(root), "--workers", "0", "2", "--json", *common]) == 0
    records = json.loads(capsys.readouterr().out)
    kinds = [(r["frames"], r["workers"]) for r in records]
    assert kinds == [(f, w) for f in ("raw", "jpeg", "video") for w in (0, 2)]
    for r in records:
        assert r["samples_s"] > 0 and r["floor_samples_s"] > 0 and 0 <= r["data_wait"] <= 1 and r["first_batch_s"] > 0
        assert r["mb_s"] == pytest.approx(r["samples_s"] * 2 * 32 * 32 * 3 / 1e6)
    assert main(["data", "bench", str(root), "--workers", "0", "--frames", "raw", *common]) == 0
    assert "samples/s" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_is_timed_is_the_stream_in_its_order(root: Path, monkeypatch: pytest.MonkeyPatch, workers: int):
    store = EpisodeStore.open(root, root.parent / "cache", progress=False)
    mixture = Mixture([store], [1.0], 4, seed=0)
    shelves, real = [], bench_module._pages

    def spy(mixture, batch, memory):
        shelves.append(real(mixture, batch, memory))
        return shelves[-1]

    monkeypatch.setattr(bench_module, "_pages", spy)
    if workers:
        real_array = bench_module.multiprocessing.get_context().RawArray
        arrays = []
        context = bench_module.multiprocessing.get_context()
        monkeypatch.setattr(type(context), "RawArray", lambda self, *a: arrays.append(real_array(*a)) or arrays[-1])
    with bench_module._batches(mixture, workers, 5) as batches:
        for step in range(4):
            next(batches)
            if workers:
                pictures = real(mixture, 5, arrays[step % workers])[step // workers % bench_module._AHEAD]
            else:
                pictures = shelves[0][0]
            for row in range(5):
                expected = list(mixture.window(5 * step + row).images.values())  # pyright: ignore
                assert all(np.array_equal(p[row], e) for p, e in zip(pictures, expected, strict=True))


def test_an_error_in_a_worker_comes_out_in_words(root: Path):
    store = EpisodeStore.open(root, root.parent / "cache", "video", progress=False)
    mixture = Mixture([store], [1.0], 4, seed=0)
    for path in (root / "videos").rglob("*.mp4"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="file-000"), bench_module._batches(mixture, 1, 2) as batches:
        next(batches)


def test_numbers_that_make_no_sense_are_refused(root: Path):
    wrongs: list[dict] = [{"batch": 0}, {"seconds": 0.0}, {"step_ms": -1.0}]
    for wrong in wrongs:
        with pytest.raises(UsageError):
            bench(root, ["raw"], [0], progress=False, **wrong)
    with pytest.raises(UsageError, match="workers"):
        bench(root, ["raw"], [-1], progress=False)


def test_workers_end_whatever_their_parent_does_with_signals(root: Path, tmp_path: Path):
    """A training run in the same process leaves a handler behind that only takes note; forked workers inherit it."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        records = bench(root, ["raw"], [2], batch=3, seconds=0.05, cache_dir=tmp_path / "cache", progress=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert records and not multiprocessing.active_children()
