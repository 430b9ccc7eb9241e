"""Reading a dataset on the Hub while it is fetched. The server is a stand-in that counts bytes (tests/hub_stand_in.py)."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_stand_in import HubStandIn, hub  # noqa: F401  the fixture
from small_datasets import make_episode, small_spec

import vla.episodes.fetched as fetched
import vla.episodes.streaming as streaming
from data_tools.lerobot_v21 import write_v21
from vla.episodes import EpisodeStore
from vla.episodes.hub import resolve
from vla.episodes.streaming import StreamingStore
from vla.errors import DataError, MachineError, UsageError
from vla.mixture import Mixture
from vla.recording import LeRobotWriter
from vla.schema import Window

REPO = "someone/toy"
CAMERAS = ("front", "wrist")
GOLDEN = Path(__file__).parent / "golden" / "lerobot_v21"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 episodes, 2 cameras, several videos per camera: a video file is closed at 1 MB."""
    root = tmp_path_factory.mktemp("hub") / "ds"
    with LeRobotWriter(root, small_spec(CAMERAS), video_mb=0) as writer:
        for n in range(12):
            writer.add(make_episode(n, length=8 + n % 3, cameras=CAMERAS))
    assert len(list(root.rglob("*.mp4"))) > 8
    return root


@pytest.fixture()
def pushed(hub: HubStandIn, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> str:  # noqa: F811
    monkeypatch.setattr(streaming, "SHARD_BYTES", 1)
    monkeypatch.setattr(fetched.time, "sleep", lambda seconds: None)
    return f"hub:{REPO}@{hub.push(REPO, dataset)}"


def stream(path: str, tmp_path: Path, **kw) -> StreamingStore:
    return StreamingStore.open(path, tmp_path / "cache", progress=False, **kw)


def whole(dataset: Path) -> EpisodeStore:
    return EpisodeStore.open(dataset, dataset.parent / "cache", progress=False)


def test_it_is_the_same_dataset(pushed: str, dataset: Path, tmp_path: Path):
    there, here = stream(pushed, tmp_path), whole(dataset)
    assert there.fingerprint == here.fingerprint, "a run may change from streaming to a download and go on"
    for name in ("spec", "cameras", "instructions", "suite", "recorded_seeds", "num_frames", "num_episodes", "stats"):
        assert getattr(there, name) == getattr(here, name), name
    for name in ("state", "action", "episode_starts", "task_of_frame", "task_of_episode"):
        assert np.array_equal(getattr(there, name), getattr(here, name)), name
    assert there.camera_key("wrist") == "observation.images.wrist"
    for camera in CAMERAS:
        for index in range(0, here.num_frames, 7):
            assert np.array_equal(there.frame(camera, index), here.frame(camera, index))
    picked = np.array([5, 90, 5, 0, 63])
    assert np.array_equal(there.frames("front", picked), np.stack([here.frame("front", i) for i in picked]))
    with pytest.raises(IndexError):
        there.frame("front", there.num_frames)


def test_opening_fetches_no_video_and_a_frame_only_its_own(
    hub: HubStandIn, pushed: str, dataset: Path, tmp_path: Path  # noqa: F811
):
    store = stream(pushed, tmp_path)
    assert hub.videos_sent() == 0 and any(path.startswith("data/") for path in hub.sent)
    first = dataset / "videos/observation.images.front/chunk-000/file-000.mp4"
    store.frame("front", 0)
    store.frame("front", 3)
    assert hub.videos_sent() == first.stat().st_size, "one file of one camera, once"
    total = sum(p.stat().st_size for p in dataset.rglob("*.mp4"))
    for camera in CAMERAS:
        store.frames(camera, range(*store.shards[0:2]))
    assert 0 < hub.videos_sent() < total / 4, "the frames of one shard, not the dataset"
    again = stream(pushed, tmp_path)
    sent, requests = sum(hub.sent.values()), hub.requests
    again.frame("front", 3)
    assert (sum(hub.sent.values()), hub.requests) == (sent, requests), "what is here is not asked for again"


def test_shards_cover_the_frames_and_each_lies_in_the_same_files(pushed: str, tmp_path: Path):
    store = stream(pushed, tmp_path)
    assert store.shards.dtype == np.int64 and store.shards[0] == 0 and store.shards[-1] == store.num_frames
    assert (np.diff(store.shards) > 0).all() and len(store.shards) > 4
    assert set(store.shards.tolist()) <= set(store.episode_starts.tolist()), "a shard begins with an episode"
    episodes = np.searchsorted(store.episode_starts, store.shards)
    for first, last in zip(episodes[:-1], episodes[1:], strict=True):
        assert (store._file[:, first:last] == store._file[:, first : first + 1]).all()


def test_episodes_with_files_of_their_own_share_shards_up_to_a_size():
    starts, sizes = np.arange(7) * 10, np.array([10, 20, 30, 40, 50, 60]) * 2**20
    file = np.arange(6)[None]
    assert streaming._shards(starts, file, sizes).tolist() == [0, 30, 40, 50, 60]
    shared = np.array([[0, 0, 1, 1, 2, 2], [3, 3, 3, 4, 4, 4]])
    assert streaming._shards(starts, shared, np.full(5, 2**27)).tolist() == [0, 20, 30, 40, 60]
    assert streaming._shards(starts, np.zeros((0, 6), int), sizes).tolist() == [0, 60]


def test_the_folder_stays_below_its_bound(
    hub: HubStandIn, pushed: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
):
    sizes = [p.stat().st_size for p in dataset.rglob("*.mp4")]
    monkeypatch.setattr(streaming, "_HELD", 1)  # with two cameras: at most 12 at hand
    bound = 14 * max(sizes)
    store, here = stream(pushed, tmp_path, max_gb=bound / 2**30), whole(dataset)
    assert sum(sizes) > bound, "or the test shows nothing"
    for _ in range(2):
        for index in range(0, store.num_frames, 3):
            for camera in CAMERAS:
                assert np.array_equal(store.frame(camera, index), here.frame(camera, index))
                assert store.files.local_bytes() <= bound
    assert hub.videos_sent() > sum(sizes), "removed, and fetched again in the second round"
    oldest = store.root / store._paths[store._file[0, 0]]
    assert not oldest.exists(), "the longest unused goes first"


def test_what_is_held_is_not_removed_however_small_the_bound(pushed: str, tmp_path: Path):
    """Removing it would free nothing, and hide from the count what lies on the disk."""
    store = stream(pushed, tmp_path, max_gb=1e-9)
    for index in range(0, store.num_frames, 5):
        store.frame("front", index)
    held = {path.stat().st_ino for path in (store.root / "held").iterdir()}
    assert len(held) > 4 and held == {path.stat().st_ino for path in store.root.glob("videos/**/*.mp4")}


def test_held_files_are_given_back_and_those_of_the_dead_cleared(pushed: str, tmp_path: Path):
    store = stream(pushed, tmp_path)
    store.frame("front", 0)
    held = list((store.root / "held").iterdir())
    assert len(held) == 1
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = held[0].with_name(held[0].name.replace(f"@{os.getpid()}@", f"@{gone.pid}@"))
    dead.hardlink_to(held[0])
    store.frame("front", store.num_frames - 1)
    assert not dead.exists() and held[0].exists()
    root = store.root
    del store
    assert not list((root / "held").iterdir())
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [link for link in links if link.startswith(f"{root}/") and ".mp4" in link], "and their space with them"


def test_what_another_machine_holds_is_not_judged_here(pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a shared disk: whether its process lives cannot be seen, and its name may begin with ours."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    store = stream(pushed, tmp_path)
    held = store.files.hold(store._paths[0])
    parts = held.name.split("@")
    others = [held.with_name("@".join([host, str(gone.pid), *parts[2:]])) for host in ("node-gpu", f"node-{gone.pid}", "nod")]
    ours = held.with_name("@".join(["node", str(gone.pid), *parts[2:]]))
    for link in (*others, ours):
        link.hardlink_to(held)
    store.files.release(held)
    monkeypatch.setattr(fetched.socket, "gethostname", lambda: "node")
    store.files.release(store.files.hold(store._paths[1]))
    assert sorted((store.root / "held").iterdir()) == sorted(others)


def _child(store: StreamingStore, seed: int, queue) -> None:
    rng = np.random.default_rng(seed)
    wanted = rng.permutation(store.num_frames)[:40]
    queue.put((wanted, [int(store.frame(c, int(i)).astype(np.int64).sum()) for i in wanted for c in CAMERAS]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_what_they_fetch(
    method: str, hub: HubStandIn, pushed: str, dataset: Path, tmp_path: Path  # noqa: F811
):
    store, here = stream(pushed, tmp_path), whole(dataset)
    store.frame("front", 0)  # a reader that the fork inherits
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=_child, args=(store, seed, queue), daemon=True)
               for seed in range(3 if method == "fork" else 1)]  # fmt: skip
    for worker in workers:
        worker.start()
    for _ in workers:
        wanted, sums = queue.get(timeout=60)
        assert sums == [int(here.frame(c, int(i)).astype(np.int64).sum()) for i in wanted for c in CAMERAS]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert all(hub.sent[path] == (dataset / path).stat().st_size for path in hub.sent if path.endswith(".mp4")), "each once"
    assert np.array_equal(store.frame("front", 1), here.frame("front", 1)), "and the parent's is untouched"


def test_workers_that_want_more_than_there_is_room_for_still_get_their_frames(pushed: str, dataset: Path, tmp_path: Path):
    store = stream(pushed, tmp_path, max_gb=1e-9)
    context: Any = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_child, args=(store, seed, queue), daemon=True) for seed in range(3)]
    for worker in workers:
        worker.start()
    here = whole(dataset)
    for _ in workers:
        wanted, sums = queue.get(timeout=60)
        assert sums == [int(here.frame(c, int(i)).astype(np.int64).sum()) for i in wanted for c in CAMERAS]
    for worker in workers:
        worker.join(60)


def test_pickle_carries_names_only(pushed: str, tmp_path: Path):
    store = stream(pushed, tmp_path)
    data = pickle.dumps(store)
    assert len(data) < 20_000
    back = pickle.loads(data)
    assert np.array_equal(back.frame("wrist", 9), store.frame("wrist", 9)) and np.array_equal(back.action, store.action)


def test_prefetch_brings_a_shard(hub: HubStandIn, pushed: str, tmp_path: Path):  # noqa: F811
    store = stream(pushed, tmp_path)
    store.prefetch(2).join(30)
    sent = hub.videos_sent()
    assert sent > 0
    for camera in CAMERAS:
        store.frames(camera, range(*store.shards[2:4]))
    assert hub.videos_sent() == sent


def test_prefetch_is_one_thread_and_what_waits_gives_way(pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = stream(pushed, tmp_path)
    begun, go, bring, brought = threading.Event(), threading.Event(), store.files.bring, []

    def slowly(path: str) -> None:
        begun.set()
        assert go.wait(60)
        brought.append(path)
        bring(path)

    monkeypatch.setattr(store.files, "bring", slowly)
    thread = store.prefetch(0)
    assert begun.wait(60)
    assert all(store.prefetch(shard) is thread for shard in (1, 2)) and store.prefetch(3, 5) is thread
    go.set()
    thread.join(60)

    def of(*shards: int) -> list[str]:
        return [store._paths[f] for s in shards for f in
                np.unique(store._file[:, np.searchsorted(store.episode_starts, store.shards[s])])]  # fmt: skip

    assert brought == list(dict.fromkeys(of(0))) + list(dict.fromkeys(of(3, 5)))
    again = store.prefetch(1)
    again.join(60)
    assert again is not thread and all((store.root / path).exists() for path in of(0, 1, 3, 5))
    with pytest.raises(IndexError):
        store.prefetch(len(store.shards) - 1)


def test_prefetch_leaves_room_for_what_is_in_use(pushed: str, dataset: Path, tmp_path: Path):
    size = max(p.stat().st_size for p in dataset.rglob("*.mp4"))
    store = stream(pushed, tmp_path, max_gb=6 * size / 2**30)
    store.prefetch(*range(len(store.shards) - 1)).join(60)
    assert 0 < store.files.local_bytes() <= 3 * size


def test_prefetch_that_fails_is_told_when_the_frame_is_asked_for(hub: HubStandIn, pushed: str, tmp_path: Path):  # noqa: F811
    store = stream(pushed, tmp_path)
    hub.close()
    store.prefetch(0).join(60)
    with pytest.raises(MachineError, match="no connection"):
        store.frame("front", 0)


def _ahead_child(store: StreamingStore, queue) -> None:
    store.prefetch(1).join(60)
    at = int(store.shards[1])
    files = store._file[:, np.searchsorted(store.episode_starts, at)]
    queue.put(([(store.root / store._paths[f]).exists() for f in files], int(store.frame("front", at).astype(np.int64).sum())))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_prefetch_works_in_a_worker_begun_while_its_parent_prefetches(
    method: str, pushed: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, here = stream(pushed, tmp_path), whole(dataset)
    begun, go, download = threading.Event(), threading.Event(), fetched.FetchedFiles._download

    def slowly(self, path: str) -> Path:
        if threading.current_thread().name == "prefetch" and os.getpid() == parent:
            begun.set()
            assert go.wait(60)
        return download(self, path)

    parent = os.getpid()
    monkeypatch.setattr(fetched.FetchedFiles, "_download", slowly)
    thread = store.prefetch(0)
    assert begun.wait(60)  # it holds a lock, which a fork inherits
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_ahead_child, args=(store, queue), daemon=True)
    worker.start()
    there, total = queue.get(timeout=60)
    assert all(there) and total == int(here.frame("front", int(store.shards[1])).astype(np.int64).sum())
    go.set()
    thread.join(60)
    assert np.array_equal(store.frame("front", 0), here.frame("front", 0))
    worker.join(60)
    assert worker.exitcode == 0


def test_a_lock_that_a_forked_child_inherits_is_given_back(tmp_path: Path):
    with fetched._locked(tmp_path / "lock"):
        assert fetched._is_locked(tmp_path / "lock")
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        assert not fetched._is_locked(tmp_path / "lock")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_mixture_draws_all_frames_of_a_stream_from_a_few_files_at_a_time(
    hub: HubStandIn, pushed: str, dataset: Path, tmp_path: Path  # noqa: F811
):
    store, here = stream(pushed, tmp_path), whole(dataset)
    mixture = Mixture([store], [1.0], 4, seed=1)  # pyright: ignore  the same reading surface
    videos = sum(p.stat().st_size for p in dataset.rglob("*.mp4"))
    seen, sent = set(), []
    for n in range(len(mixture)):
        window = mixture.window(n)
        assert isinstance(window, Window)
        _, episode, t = mixture.locate(n)
        at = int(store.episode_starts[episode]) + t
        seen.add(at)
        assert np.array_equal(window.images["wrist"], here.frame("wrist", at))
        sent.append(hub.videos_sent())
    assert len(seen) == store.num_frames, "every frame once in an epoch"
    assert sent[len(sent) // 5] < 0.8 * videos and sent[-1] == videos, "fetched as it goes, each file once"


def test_version_2_streams_too(hub: HubStandIn, dataset: Path, tmp_path: Path):  # noqa: F811
    write_v21(dataset, tmp_path / "v21", progress=False)
    store, here = stream(f"hub:{REPO}@{hub.push(REPO, tmp_path / 'v21')}", tmp_path), whole(dataset)
    for index in (0, 40, here.num_frames - 1):
        assert np.array_equal(store.frame("wrist", index), here.frame("wrist", index))
    assert hub.videos_sent() == sum(p.stat().st_size for e in (0, 4, 11)
                                    for p in (tmp_path / "v21").rglob(f"*.wrist/episode_{e:06d}.mp4"))  # fmt: skip


def test_real_files_of_lerobot_stream(hub: HubStandIn, tmp_path: Path):  # noqa: F811
    store = stream(f"hub:{REPO}@{hub.push(REPO, GOLDEN)}", tmp_path)
    written = dict(np.load(GOLDEN.with_suffix(".npz")))
    assert np.array_equal(store.action, written["action"]) and any("q01" in note for note in store.notes)
    assert len(store.stats["action"]["q99"]) == 2
    for index in range(store.num_frames):
        assert np.abs(store.frame("front", index).astype(int) - written["frames/front"][index]).mean() < 2


def test_a_download_that_breaks_off_is_begun_again(hub: HubStandIn, pushed: str, dataset: Path, tmp_path: Path):  # noqa: F811
    store = stream(pushed, tmp_path)
    hub.broken["videos/observation.images.front/chunk-000/file-000.mp4"] = 1
    assert np.array_equal(store.frame("front", 0), whole(dataset).frame("front", 0))


def test_other_bytes_than_listed_never_reach_training(hub: HubStandIn, pushed: str, tmp_path: Path):  # noqa: F811
    store = stream(pushed, tmp_path)
    files = hub.commits[REPO][pushed.partition("@")[2]]
    path = "videos/observation.images.front/chunk-000/file-000.mp4"
    data = bytearray(files[path])
    data[len(data) // 2] ^= 1
    files[path] = bytes(data)
    with pytest.raises(DataError) as caught:
        store.frame("front", 0)
    assert path in caught.value.where and "sha256" in caught.value.expected
    assert not list(store.root.rglob("file-000.mp4"))


def test_without_a_connection(hub: HubStandIn, pushed: str, tmp_path: Path):  # noqa: F811
    store = stream(pushed, tmp_path)
    store.frame("front", 0)
    hub.close()
    again = stream(pushed, tmp_path)
    assert np.array_equal(again.frame("front", 1), store.frame("front", 1)), "what is here needs no connection"
    with pytest.raises(MachineError, match="no connection"):
        again.frame("wrist", 0)


def test_what_cannot_be_streamed_says_so(hub: HubStandIn, pushed: str, dataset: Path, tmp_path: Path):  # noqa: F811
    with pytest.raises(UsageError, match="stream: true"):
        stream(str(dataset), tmp_path)
    folder = Path(shutil.copytree(dataset, tmp_path / "ds"))
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"]["observation.images.front"]["dtype"] = "image"
    (folder / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="inside the Parquet files"):
        stream(f"hub:{REPO}@{hub.push(REPO, folder)}", tmp_path)
    assert not hub.videos_sent()


def test_a_video_the_hub_lacks_is_named_at_opening(hub: HubStandIn, dataset: Path, tmp_path: Path):  # noqa: F811
    folder = Path(shutil.copytree(dataset, tmp_path / "ds"))
    for path in (folder / "videos").rglob("file-001.mp4"):
        path.unlink()
    with pytest.raises(DataError) as caught:
        stream(f"hub:{REPO}@{hub.push(REPO, folder)}", tmp_path)
    assert "2 problems" in str(caught.value) and "wrist/chunk-000/file-001.mp4" in str(caught.value)


def test_a_video_that_does_not_fit_its_rows_is_an_error_when_it_is_read(hub: HubStandIn, dataset: Path, tmp_path: Path):  # noqa: F811
    folder = Path(shutil.copytree(dataset, tmp_path / "ds"))
    shutil.copy(GOLDEN / "videos/chunk-000/observation.images.front/episode_000000.mp4",
                folder / "videos/observation.images.front/chunk-000/file-000.mp4")  # fmt: skip
    store = stream(f"hub:{REPO}@{hub.push(REPO, folder)}", tmp_path)
    with pytest.raises(DataError, match="file-000.mp4"):
        store.frame("front", 0)


def test_a_stream_and_a_download_agree_on_what_they_are(hub: HubStandIn, pushed: str, tmp_path: Path):  # noqa: F811
    folder = resolve(pushed, tmp_path / "cache", progress=False)
    down = EpisodeStore.open(folder, tmp_path / "cache", progress=False)
    assert down.fingerprint == stream(pushed, tmp_path).fingerprint
