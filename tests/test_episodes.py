"""Reading any LeRobot v3.0 dataset, and the decoded cache."""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from children import children
from PIL import Image
from small_datasets import SIZE, content, make_episode, small_spec, write_dataset

import vla.episodes.cache as cache
from data_tools.stats import add_stats_parser
from vla.embodiment import load_embodiment
from vla.episodes import EpisodeStore
from vla.errors import DataError, UsageError


def open_quietly(root: Path, **kw) -> EpisodeStore:
    return EpisodeStore.open(root, kw.pop("cache_dir", root.parent / "cache"), progress=False, **kw)


@pytest.fixture()
def root(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "ds", 6)
    return tmp_path / "ds"


def rewrite(path: Path, change) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def test_columns_are_read_only_and_frames_are_views(root: Path):
    store = open_quietly(root)
    assert store.state.dtype == store.action.dtype == np.float32
    for array in (store.state, store.action, store.frame("front", 0)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert store.frame("front", 3).base is not None
    assert store.episode_starts[0] == 0 and store.episode_starts[-1] == store.num_frames
    assert store.spec == small_spec() and store.camera_key("front") == "observation.images.front"
    with pytest.raises(IndexError):
        store.frame("front", store.num_frames)


def test_jpeg_cache_is_smaller_and_close(tmp_path: Path):
    made = write_dataset(tmp_path / "ds", 2)
    store = open_quietly(tmp_path / "ds", frames="jpeg")
    got = store.frame("front", 1).astype(int)
    assert got.shape == (SIZE, SIZE, 3) and np.abs(got - made[0].images["front"][1]).mean() < 8


def test_the_cache_is_keyed_by_content_and_options(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built = []
    build = cache._build
    monkeypatch.setattr(cache, "_build", lambda *a: (built.append(a[3]), build(*a)))
    first = open_quietly(root)
    assert open_quietly(root).fingerprint == first.fingerprint and len(built) == 1
    shutil.copytree(root, tmp_path / "moved")
    moved = open_quietly(tmp_path / "moved")
    assert moved.fingerprint == first.fingerprint and len(built) == 1, "a copy elsewhere is the same content"
    open_quietly(root, frames="jpeg")
    assert len(built) == 2
    flip = root / "data/chunk-000/file-000.parquet"
    rewrite(flip, lambda t: t.set_column(t.column_names.index("next.done"), "next.done", pa.array([False] * len(t))))
    assert open_quietly(root).fingerprint != first.fingerprint and len(built) == 3


def test_a_failed_build_leaves_nothing_and_the_next_one_works(root: Path, monkeypatch: pytest.MonkeyPatch):
    decode = cache.decode_spans

    def half(*arguments):
        for n, frame in enumerate(decode(*arguments)):
            if n == 7:
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(cache, "decode_spans", half)
    with pytest.raises(KeyboardInterrupt):
        open_quietly(root)
    assert not [p for p in (root.parent / "cache").iterdir() if p.is_dir() and p.name != "hashes"]
    monkeypatch.setattr(cache, "decode_spans", decode)
    (root.parent / "cache" / ".0123.tmp-1").mkdir()
    assert open_quietly(root).num_episodes == 6


def _digest(store: EpisodeStore) -> int:
    return sum(int(store.frame("front", i).astype(np.int64).sum()) for i in range(store.num_frames))


def _child(store: EpisodeStore, queue) -> None:
    queue.put((_digest(store), float(store.action.sum())))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_works_in_forked_and_spawned_workers(root: Path, method: str):
    store = open_quietly(root)
    expected = (_digest(store), float(store.action.sum()))  # opened and used before the fork
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    with children(context, _child, *[(store, queue)] * 2) as workers:
        assert [queue.get(timeout=60) for _ in workers] == [expected] * 2


def test_pickle_carries_names_not_frames(root: Path):
    store = open_quietly(root)
    data = pickle.dumps(store)
    assert len(data) < 20_000
    back = pickle.loads(data)
    assert _digest(back) == _digest(store) and np.array_equal(back.state, store.state)


def test_rows_behind_the_last_commit_do_not_count(root: Path):
    """An append that was cut short: more rows, frames and episodes than info.json admits."""
    before = content(root, root.parent / "cache")
    info = json.loads((root / "meta/info.json").read_text())
    lengths = [len(make_episode(n)) for n in range(6)]
    info |= {"total_episodes": 4, "total_frames": sum(lengths[:4])}
    (root / "meta/info.json").write_text(json.dumps(info))
    assert content(root, root.parent / "cache") == before[:4]
    assert sum(map(len, open_quietly(root).recorded_seeds.values())) == 4


@pytest.mark.parametrize(("number", "to", "first"), [(2, 3, 2), (3, -1, 3), (5, 10**12, 5), (0, 1, 0)])
def test_the_first_episode_whose_rows_do_not_add_up_is_named(root: Path, number: int, to: int, first: int):
    def move(table: pa.Table) -> pa.Table:
        belongs = table["episode_index"].to_numpy().copy()
        belongs[np.flatnonzero(belongs == number)[0]] = to
        return table.set_column(table.column_names.index("episode_index"), "episode_index", pa.array(belongs))

    rewrite(root / "data/chunk-000/file-000.parquet", move)
    with pytest.raises(DataError, match=f"first episode that differs: {first}"):
        open_quietly(root)


@pytest.mark.parametrize("text", ["1", "0.5", "left"])
@pytest.mark.parametrize("name", ["action", "observation.state", "timestamp", "episode_index", "index", "task_index"])
def test_a_column_of_text_is_refused_by_name_even_when_it_reads_as_numbers(root: Path, name: str, text: str):
    path = root / "data/chunk-000/file-000.parquet"

    def spell(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        wide = isinstance(values[0], list)
        spelt = pa.array([[text] * len(value) if wide else text for value in values])
        return table.set_column(table.column_names.index(name), name, spelt)

    rewrite(path, spell)
    for frames in ("raw", "none"):
        with pytest.raises(DataError) as caught:
            open_quietly(root, frames=frames)
        assert caught.value.where == f"{path}, column {name!r}" and caught.value.expected == "numbers"
        assert "string" in caught.value.found


def test_other_writers_habits(root: Path):
    """Task text as `__index_level_0__` (lerobot 0.4.4), float64 actions in plain lists, no files of ours, names as a dict."""
    before = content(root, root.parent / "cache")
    rewrite(root / "meta/tasks.parquet",
            lambda t: t.rename_columns([{"task": "__index_level_0__"}.get(c, c) for c in t.column_names]))  # fmt: skip

    def plain(table: pa.Table) -> pa.Table:
        at = table.column_names.index("action")
        return table.set_column(at, "action", pa.array(table["action"].to_pylist(), pa.list_(pa.float64())))

    rewrite(root / "data/chunk-000/file-000.parquet", plain)
    for name in ("embodiment", "recording", "pixels"):
        (root / "meta" / f"{name}.json").unlink()
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["action"]["names"] = {"motors": ["dx", "dy", "dz", "close"]}
    info["robot_type"], info["an_unknown_key"] = None, 1
    (root / "meta/info.json").write_text(json.dumps(info))
    store = open_quietly(root)
    assert store.spec.action_names == ["action.dx", "action.dy", "action.dz", "action.close"]
    assert store.spec.action[0].convention == "scalar" and store.spec.name == "ds" and store.recorded_seeds == {}
    low, high = store.spec.limits("action")
    assert np.allclose(low, store.action.min(0)) and np.allclose(high, store.action.max(0))
    assert content(root, root.parent / "cache") == before
    given = open_quietly(root, embodiment=load_embodiment("tabletop"))
    assert given.spec.action == load_embodiment("tabletop").action and given.spec.cameras["front"].height == SIZE


def test_pictures_inside_the_parquet_files(root: Path):
    """`dtype: image`: encoded pictures as a struct column, no video."""
    before = content(root, root.parent / "cache")
    store = open_quietly(root)

    def embed(table: pa.Table) -> pa.Table:
        values = []
        for i in range(store.num_frames):
            sink = io.BytesIO()
            Image.fromarray(store.frame("front", i)).save(sink, "PNG")
            values.append({"bytes": sink.getvalue(), "path": f"{i}.png"})
        return table.append_column("observation.images.front", pa.array(values))

    rewrite(root / "data/chunk-000/file-000.parquet", embed)
    shutil.rmtree(root / "videos")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["observation.images.front"] |= {"dtype": "image"}
    (root / "meta/info.json").write_text(json.dumps(info))
    assert content(root, root.parent / "cache") == before
    assert np.array_equal(open_quietly(root, frames="none").action, store.action)


def test_a_store_without_pictures_looks_at_none(root: Path, monkeypatch: pytest.MonkeyPatch):
    seen = open_quietly(root)
    recording = root / "meta" / "recording.json"  # other pixels than were recorded: only decoding would show it
    recording.write_text(recording.read_text().replace('"front": "', '"front": "0'))
    for name in ("av.open", "decode_spans", "unpack_pictures", "find_frames"):
        monkeypatch.setattr(f"vla.episodes.cache.{name}", lambda *a, **kw: pytest.fail("looked at a picture"))
    blind = open_quietly(root, frames="none")
    for store in (blind, pickle.loads(pickle.dumps(blind))):
        for name in ("state", "action", "episode_starts", "task_of_frame"):
            assert np.array_equal(getattr(store, name), getattr(seen, name)), name
        assert store.stats == seen.stats and store.spec == seen.spec
        for ask in (lambda store=store: store.frame("front", 0), lambda store=store: store.frames("front", [0])):
            with pytest.raises(UsageError, match="opened without its pictures"):
                ask()
    assert sorted(path.name for path in blind._entry.iterdir()) == [
        "action.npy", "cache.json", "starts.npy", "state.npy", "task.npy"]  # fmt: skip
    monkeypatch.undo()
    with pytest.raises(DataError, match="other pixels"):
        open_quietly(root)


def test_episodes_in_another_order_than_their_video(root: Path):
    """Merged datasets store episodes anywhere in a file; spans are then read by seeking."""
    before = content(root, root.parent / "cache")
    (root / "meta/recording.json").unlink()  # what other tools merge has none
    meta = root / "meta/episodes/chunk-000/file-000.parquet"
    data = root / "data/chunk-000/file-000.parquet"
    rows, table = pq.read_table(meta).to_pylist(), pq.read_table(data)
    order = [3, 0, 5, 1, 4, 2]
    parts, new, start = [], [], 0
    for number, old in enumerate(order):
        row = dict(rows[old])
        part = table.slice(row["dataset_from_index"], row["length"])
        for column, values in (("episode_index", [number] * len(part)), ("index", range(start, start + len(part)))):
            part = part.set_column(part.column_names.index(column), column, pa.array(values, pa.int64()))
        parts.append(part)
        row |= {"episode_index": number, "dataset_from_index": start, "dataset_to_index": start + len(part)}
        start += len(part)
        new.append(row)
    pq.write_table(pa.concat_tables(parts), data)
    pq.write_table(pa.Table.from_pylist(new), meta)
    assert content(root, root.parent / "cache") == [before[old] for old in order]


def test_missing_statistics_are_computed_when_asked_for(root: Path):
    exact = open_quietly(root).stats
    path = root / "meta/stats.json"
    path.write_text(json.dumps(exact | {"action": exact["action"] | {"max": [0.1] * 4}}))
    assert np.allclose(open_quietly(root, compute_stats=True).stats["action"]["max"], exact["action"]["max"])
    with pytest.raises(DataError, match="spans"):  # also when the decoded frames are already there
        open_quietly(root)
    path.unlink()
    store = open_quietly(root, compute_stats=True)
    for key in ("action", "observation.state"):
        for name in ("min", "max", "mean", "std", "q01", "q99"):
            assert np.allclose(store.stats[key][name], exact[key][name], atol=1e-9)


def test_the_statistics_command_mends_a_dataset(root: Path, capsys: pytest.CaptureFixture):
    exact = json.loads((root / "meta/stats.json").read_text())
    (root / "meta/stats.json").unlink()
    parser = argparse.ArgumentParser()
    add_stats_parser(parser.add_subparsers())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLA_CACHE", str(root.parent / "cache"))
        args = parser.parse_args(["stats", str(root), "--json"])
        assert args.run(args) == 0 and not (root / "meta/stats.json").exists()
        args = parser.parse_args(["stats", str(root), "--json", "--write"])
        assert args.run(args) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown == json.loads((root / "meta/stats.json").read_text())
    for key, entry in shown.items():
        assert all(np.allclose(entry[name], exact[key][name], atol=1e-9) for name in exact[key])
    assert open_quietly(root).num_episodes == 6


def test_two_processes_that_open_at_once_decode_once(root: Path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def go() -> None:
        build = cache._build
        cache._build = lambda *a: (queue.put(os.getpid()), build(*a))
        open_quietly(root)

    with children(context, go, *[()] * 3):
        pass
    assert queue.get(timeout=5) and queue.empty()
