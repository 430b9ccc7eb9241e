"""Frames straight from videos: the same pixels as decoding in order, from any process, in any order."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from children import children
from PIL import Image
from small_datasets import write_dataset

import vla.episodes.store as store_module
import vla.episodes.video as video
from vla.episodes import EpisodeStore
from vla.errors import DataError

CODECS = {
    "av1, groups of 2": ("libsvtav1", {"g": "2", "crf": "30", "preset": "12"}),
    "h264, groups of 2": ("libx264", {"g": "2", "crf": "23"}),
    "h264, b-frames": ("libx264", {"g": "12", "bf": "3", "crf": "23"}),
    "h264, open groups": ("libx264", {"x264-params": "keyint=8:min-keyint=8:bframes=3:open-gop=1:scenecut=0"}),
    "h264, one keyframe": ("libx264", {"g": "600", "crf": "23"}),
    "mpeg4": ("mpeg4", {"g": "5"}),
}


def picture(t: int, size: int = 64) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return np.stack([x * 3 + t * 5, y * 3, (x + y + 7 * t) % 256], axis=-1).astype(np.uint8)


def write_video(path: Path, codec: str, options: dict[str, str], count: int = 40) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=10, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for t in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(t), format="rgb24")))
        container.mux(stream.encode())


def in_order(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def direct(path: Path) -> video.VideoFrames:
    packets, _, _ = video.read_packets(path)
    index = video.Index()
    index.add(path.parent, path, np.sort(packets["ticks"]))
    return video.VideoFrames(path.parent, index.files, index.packets, index.places)


@pytest.mark.parametrize("kind", CODECS)
def test_any_frame_in_any_order_is_the_frame_of_decoding_in_order(tmp_path: Path, kind: str):
    path = tmp_path / "v.mp4"
    write_video(path, *CODECS[kind])
    expected, frames = in_order(path), direct(path)
    assert len(expected) == 40
    for i in np.random.default_rng(0).permutation(40):
        assert np.array_equal(frames.frame(int(i)), expected[i]), (kind, i)
    wanted = [7, 3, 39, 3, 12, 0, 13, 14]
    out = np.zeros((len(wanted), 64, 64, 3), np.uint8)
    frames.frames(wanted, out)
    assert all(np.array_equal(got, expected[i]) for got, i in zip(out, wanted, strict=True))


def test_an_open_group_begins_one_keyframe_earlier():
    ticks = [0, 3, 1, 2, 6, 4, 5, 9, 7, 8]  # keyframes at 0 and 6; 4 and 5 are shown before the second
    packets = np.array([(0, t, 1) for t in ticks], video.PACKET)
    keys = np.array([t in (0, 6) for t in ticks])
    first = dict(zip(ticks, video._keyframes(packets, keys).tolist(), strict=True))
    assert first == {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 4, 7: 4, 8: 4, 9: 4}


def test_a_group_is_decoded_once_however_many_of_its_frames_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_video(tmp_path / "v.mp4", *CODECS["h264, b-frames"])
    frames, read = direct(tmp_path / "v.mp4"), []
    real = os.pread
    monkeypatch.setattr(video.os, "pread", lambda *a: read.append(a[2]) or real(*a))
    frames.frames(list(range(24)), np.zeros((24, 64, 64, 3), np.uint8))
    assert len(read) == len(set(read)) < 30


@pytest.fixture()
def root(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "ds", 6, cameras=("front", "wrist"))
    return tmp_path / "ds"


def open_video(root: Path, **kw) -> EpisodeStore:
    return EpisodeStore.open(root, root.parent / "cache", "video", progress=False, **kw)


def digest(store: EpisodeStore) -> str:
    everything = hashlib.sha256()
    for camera in store.cameras:
        for i in np.random.default_rng(1).permutation(store.num_frames):
            everything.update(store.frame(camera, int(i)).tobytes())
    return everything.hexdigest()


def test_video_and_raw_stores_hold_the_same_pixels_and_columns(root: Path):
    raw, direct = EpisodeStore.open(root, root.parent / "cache", "raw", progress=False), open_video(root)
    assert digest(raw) == digest(direct)
    assert np.array_equal(raw.action, direct.action) and np.array_equal(raw.episode_starts, direct.episode_starts)
    assert not list(direct._entry.glob("*.arrow")), "no decoded frames are kept"
    for store in (raw, direct):
        wanted = [5, 0, 5, store.num_frames - 1]
        assert np.array_equal(store.frames("wrist", wanted), np.stack([raw.frame("wrist", i) for i in wanted]))
    with pytest.raises(IndexError):
        direct.frame("front", direct.num_frames)


def _digest_into(store: EpisodeStore, results) -> None:
    results.put(digest(store))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_decoder_that_was_open_before_survives_new_processes(root: Path, method: str):
    context: Any = multiprocessing.get_context(method)
    store = open_video(root)
    expected, results = digest(store), context.Queue()
    with children(context, _digest_into, *[(store, results)] * 2) as started:
        assert digest(store) == expected, "children must not disturb their parent"
        assert {results.get(timeout=60) for _ in started} == {expected}


def test_threads_have_decoders_of_their_own(root: Path):
    store = open_video(root)
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(lambda _: digest(store), range(6))) == {digest(store)}


def test_few_decoders_and_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(video, "_DECODERS", 1)
    monkeypatch.setattr(video, "_FILES", 1)
    monkeypatch.setattr(video, "_KEPT", [video._Mine()])
    frames = []
    for name, codec in enumerate(("libx264", "mpeg4")):
        write_video(tmp_path / f"{name}.mp4", codec, {"g": "4"}, count=8)
        frames.append((direct(tmp_path / f"{name}.mp4"), in_order(tmp_path / f"{name}.mp4")))
    for i in range(8):
        for got, expected in frames:
            assert np.array_equal(got.frame(i), expected[i])
    assert len(video._mine()._decoders) == len(video._mine()._opened) == 1


def open_descriptors(path: Path) -> int:
    """Of this file, whatever it is called now."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(link.removesuffix(" (deleted)") == str(path) for link in links)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="a Linux way of looking")
def test_a_forgotten_file_is_open_nowhere_and_its_decoder_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(video, "_KEPT", [video._Mine()])  # without the decoders of other tests
    paths = [tmp_path / f"{n}.mp4" for n in range(2)]
    for path in paths:
        write_video(path, *CODECS["h264, groups of 2"])
    first, second = map(direct, paths)
    expected = first.frame(3)
    assert np.array_equal(second.frame(3), expected), "one decoder for both"
    assert open_descriptors(paths[0]) == 2 and open_descriptors(paths[1]) == 1
    paths[0].unlink()
    video.forget(str(paths[0]))
    assert open_descriptors(paths[0]) == 0, "its space is given back"
    assert np.array_equal(second.frame(3), expected) and open_descriptors(paths[1]) == 2
    video.forget(str(paths[1]))
    assert open_descriptors(paths[1]) == 0
    assert np.array_equal(second.frame(5), direct(paths[1]).frame(5))
    video.forget(str(paths[1]))


def test_a_video_that_changes_under_us_is_an_error_not_a_picture(root: Path):
    store = open_video(root)
    path = next((root / "videos" / "observation.images.front").rglob("*.mp4"))
    whole = path.read_bytes()
    offset, size = (int(store._videos["front"]._packets[name][2]) for name in ("offset", "size"))
    path.write_bytes(whole[:offset] + bytes(size) + whole[offset + size :])
    with pytest.raises(DataError, match=r"file-000\.mp4"):
        [store.frame("front", i) for i in range(4)]
    path.write_bytes(whole[: offset + 1])
    with pytest.raises(DataError, match="did not shrink"):
        store.frame("front", 2)
    path.write_bytes(whole)
    assert store.frame("front", 2).shape == (32, 32, 3)


def test_pixels_other_than_recorded_are_refused_without_a_cache_of_frames(root: Path):
    recording = root / "meta" / "recording.json"
    text = recording.read_text()
    at = text.index('"front": "') + len('"front": "')
    recording.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    with pytest.raises(DataError, match="other pixels than were recorded"):
        open_video(root)


def test_jpeg_keeps_the_colour_a_video_has(tmp_path: Path):
    layers = {}
    for kind in ("lossless", "yuv420p"):
        write_dataset(tmp_path / kind, 2, video=kind)
        store = EpisodeStore.open(tmp_path / kind, tmp_path / "cache", "jpeg", progress=False)
        data, offsets = store._batches["front"][1][0]
        with Image.open(io.BytesIO(data[offsets[0] : offsets[1]])) as image:
            layers[kind] = [(h, v) for _, h, v, _ in image.layer]  # pyright: ignore[reportAttributeAccessIssue]
    assert layers == {"lossless": [(1, 1)] * 3, "yuv420p": [(2, 2), (1, 1), (1, 1)]}


def test_both_jpeg_decoders_give_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("simplejpeg")
    write_dataset(tmp_path / "ds", 2, video="yuv420p")
    store = EpisodeStore.open(tmp_path / "ds", tmp_path / "cache", "jpeg", progress=False)
    fast = store.frames("front", range(5))
    monkeypatch.setattr(store_module, "simplejpeg", None)
    assert np.array_equal(fast, store.frames("front", range(5)))


def test_more_datasets_open_than_the_usual_limit_on_files_allows(root: Path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, before[1]))
        stores = [open_video(root) for _ in range(40)]
        assert len(os.listdir("/proc/self/fd")) > used + 40
        assert all(store.frame("front", 1).shape == (32, 32, 3) for store in stores)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
