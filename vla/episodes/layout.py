"""What a LeRobot dataset says about itself, and whether its files keep the promise. Nothing is decoded here.

v3.0 is read as released versions of `lerobot` write it (0.4.4 and 0.6.x differ): the task text is the column `task` or
`__index_level_0__`; several episodes share a Parquet file and an MP4; each camera has its own span and offset in its
video; only `info.json`'s `total_episodes` count, rows behind them are an unfinished append. What v2.0 and v2.1 have in
other places is `layout_v2.py`'s business.

Statistics without quantiles (v2.x never had them) are computed from the rows, and said so in `Layout.notes`.

All problems are gathered and raised together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.embodiment import Camera, Channel, EmbodimentSpec
from vla.episodes import layout_v2
from vla.episodes.problems import RECOMPUTE, RESTORE, Problems, short
from vla.errors import DataError
from vla.normalize import QUANTILES

STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
STATISTICS = ("min", "max", "mean", "std", *QUANTILES)
_V1 = ("with `lerobot==0.3.3` in an environment of its own: python -m lerobot.datasets.v2.convert_dataset_v1_to_v2 "
       "--repo-id USER/NAME --single-task 'what the robot does'; the v2.0 it makes is read here as it is")  # fmt: skip


@dataclass
class Layout:
    """What the metadata says. Cheap to read; `read_rows` and `find_frames` look at the rest."""

    root: Path
    info: dict[str, Any]
    spec: EmbodimentSpec
    cameras: dict[str, str]  # camera -> feature key
    instructions: list[str]
    stats: dict[str, dict[str, Any]]
    recording: dict[str, Any]
    judge_stats: bool
    """Whether `stats` are going to be used, so that missing or foreign ones are findings."""
    to_compute: tuple[str, ...] = ()
    """Features whose statistics lack quantiles (or, in v2.x, are missing): whoever uses them computes them exactly."""
    notes: tuple[str, ...] = ()
    """What was made good while reading, for people to see."""

    @property
    def version(self) -> str:
        """`v2.0`, `v2.1`, `v3.0`, ..."""
        return str(self.info["codebase_version"])

    @property
    def is_v2(self) -> bool:
        """One file per episode, and metadata in JSON lines."""
        return _major(self.version) == "2"

    @property
    def fps(self) -> float:
        return float(self.info["fps"])

    @property
    def num_episodes(self) -> int:
        return int(self.info["total_episodes"])

    @property
    def num_frames(self) -> int:
        return int(self.info["total_frames"])

    def is_video(self, camera: str) -> bool:
        return self.info["features"][self.cameras[camera]]["dtype"] == "video"

    @property
    def seeds(self) -> dict[str, list[int]]:
        """Task -> reset seeds of the episodes that count; {} when they did not come from a simulator here."""
        seeds: dict[str, list[int]] = {}
        for episode in self.recording.get("episodes", [])[: self.num_episodes]:
            if episode.get("seed") is not None:
                seeds.setdefault(episode["task"], []).append(int(episode["seed"]))
        return seeds

    def pixel_hash(self, camera: str, episode: int) -> str | None:
        """sha256 of an episode's frames as they were recorded; None unless it was recorded here, without loss."""
        recorded = self.recording.get("episodes", [])
        return (recorded[episode].get("pixels") or {}).get(camera) if episode < len(recorded) else None

    def path(self, template: str, row: Mapping[str, Any], prefix: str, key: str = "") -> Path:
        """The file an episode row points to. `prefix` is `data` or `videos/<key>`."""
        if self.is_v2:
            episode = row["episode_index"]
            numbers = {"episode_index": episode, "episode_chunk": episode // self.info["chunks_size"]}
        else:
            numbers = {f"{kind}_index": row[f"{prefix}/{kind}_index"] for kind in ("chunk", "file")}
        return self.root / self.info[template].format(video_key=key, **numbers)


def read_layout(root: Path, embodiment: EmbodimentSpec | None, need_stats: bool) -> tuple[Layout, Problems]:
    """Metadata of the dataset at `root`. Raises `DataError` at once when it is no v2.0, v2.1 or v3.0 dataset; other
    findings are returned."""
    problems = Problems(root)
    info = read_info(root)
    features = info["features"]
    cameras = {}
    for key, feature in features.items():
        about = {**(feature.get("info") or {}), **(feature.get("video_info") or {})}
        depth = about.get("is_depth_map") or about.get("video.is_depth_map")
        if feature["dtype"] in ("video", "image") and not depth:
            cameras[key.removeprefix(IMAGES).removeprefix("observation.")] = key
    version = str(info["codebase_version"])
    v2 = _major(version) == "2"
    source = _statistics_file(root, version)
    stats = layout_v2.read_stats(root, version, problems) if v2 else _read_json(source, problems) or {}
    recording = _read_recording(root / "meta" / "recording.json", problems)
    to_compute, notes = [], []
    for key, finding, mendable in _lacking_statistics(source, features, stats, v2) if need_stats else []:
        if mendable:
            to_compute.append(key)
            notes.append(f"{source}: {finding}; computed exactly from the rows")
            continue
        problems.add(source, found=finding, expected=f"{', '.join(STATISTICS)} per feature", fix=RECOMPUTE.format(root))
    spec = _specification(root, embodiment, info, cameras, stats, problems)
    tasks = layout_v2.read_tasks(root, problems) if v2 else _read_tasks(root, info, problems)
    layout = Layout(root, info, spec, cameras, tasks, stats, recording, need_stats, tuple(to_compute), tuple(notes))
    if layout.num_episodes < 1 or layout.num_frames < 1:
        problems.add(root / "meta" / "info.json", found=f"{layout.num_episodes} episodes, {layout.num_frames} frames",
                     expected="at least one of each", fix="record some, e.g. `vla data record --help`")  # fmt: skip
    return layout, problems


def check_statistics(layout: Layout, key: str, lowest: np.ndarray, highest: np.ndarray, problems: Problems) -> None:
    """Statistics of another dataset are worse than none: what the rows span must lie in [min, max] of their own."""
    entry = layout.stats.get(key) or {}
    if not layout.judge_stats or any(np.size(entry.get(name, ())) != lowest.size for name in ("min", "max")):
        return
    low, high = (np.asarray(entry[name], np.float64).reshape(-1) for name in ("min", "max"))
    slack = 1e-4 * np.maximum(high - low, np.maximum(np.abs(low), np.abs(high))) + 1e-9
    outside = (lowest < low - slack) | (highest > high + slack)
    if outside.any():
        d = int(np.argmax(outside))
        problems.add(_statistics_file(layout.root, layout.version),
                     found=f"{key}[{d}] of the data spans {lowest[d]:g} to {highest[d]:g}",
                     expected=f"within its statistics, {low[d]:g} to {high[d]:g}",
                     fix=f"these are another dataset's statistics: {RECOMPUTE.format(layout.root)}")  # fmt: skip


def _statistics_file(root: Path, version: str) -> Path:
    per_episode = root / "meta" / "episodes_stats.jsonl"
    return per_episode if version == "v2.1" and per_episode.is_file() else root / "meta" / "stats.json"


def _major(version: str) -> str:
    return version.removeprefix("v").split(".")[0]


def read_info(root: Path) -> dict[str, Any]:
    """`meta/info.json`. Raises `DataError` when it is missing, malformed or of a version that is not read here."""
    path = root / "meta" / "info.json"
    if not path.is_file():
        old, rlds = root / "meta" / "episodes.jsonl", root / "dataset_info.json"
        found, fix = "no such folder", "check the path; `vla data record --help` makes a dataset"
        if root.is_dir():
            found = "no meta/info.json"
        if old.exists():
            found, fix = f"{found} (but {old.name}, of LeRobot v2)", "restore meta/info.json from where the dataset came from"
        elif rlds.exists():
            found, fix = f"{found} (but {rlds.name}, of RLDS)", f"vla data convert {root} {root.name}-lerobot"
        raise DataError(root, found=found, expected="a LeRobot dataset", fix=fix)
    try:
        info = json.loads(path.read_text())
        version = str(info["codebase_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(path, found=f"{type(error).__name__}: {error}", expected="JSON with codebase_version",
                        fix=RESTORE) from error  # fmt: skip
    major = _major(version)
    if major != "3" and version not in ("v2.0", "v2.1"):
        raise DataError(path, found=f"codebase_version {version}", expected="v2.0, v2.1 or v3.0",
                        fix=_V1 if major == "1" else "use a version of tendon-vla that reads it")  # fmt: skip
    needed = {"fps", "features", "total_episodes", "total_frames", "data_path"}
    if needed - info.keys() or not isinstance(info["features"], dict) or ACTION not in info["features"]:
        missing = sorted(needed - info.keys()) or [f"feature {ACTION!r}"]
        raise DataError(path, found=f"no {', '.join(missing)}", expected=f"what LeRobot {version} requires", fix=RESTORE)
    if not (isinstance(info["fps"], int | float) and 0 < info["fps"] < float("inf")):
        raise DataError(path, found=f"fps {info['fps']!r}", expected="a number above 0", fix=RESTORE)
    fields = ("chunk_index", "file_index") if major == "3" else ("episode_chunk", "episode_index")
    size = info.setdefault("chunks_size", layout_v2.CHUNK_EPISODES)
    if not (isinstance(size, int) and size > 0):
        raise DataError(path, found=f"chunks_size {size!r}", expected="files per folder, a number above 0", fix=RESTORE)
    for name in ("data_path", "video_path"):
        try:
            (info.get(name) or "").format(video_key="", **dict.fromkeys(fields, 0))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise DataError(path, found=f"{name} {info[name]!r}", expected=f"fields video_key, {' and '.join(fields)} only",
                            fix=RESTORE) from error  # fmt: skip
    return info


def _read_json(path: Path, problems: Problems) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        problems.add(path, found=f"not JSON: {error}", expected="a JSON object", fix=RESTORE)
        return None
    return value if isinstance(value, dict) else None


def _read_recording(path: Path, problems: Problems) -> dict[str, Any]:
    recording = _read_json(path, problems) or {}
    episodes = recording.get("episodes", [])
    for number, entry in enumerate(episodes if isinstance(episodes, list) else [None]):
        seed, task, pixels = map(entry.get, ("seed", "task", "pixels")) if isinstance(entry, dict) else ("?", None, None)
        if not (seed is None or (isinstance(seed, int) and isinstance(task, str))) or not isinstance(pixels, dict | None):
            problems.add(path, found=f"episode {number}: {str(entry)[:100]}", expected="its task, seed and hashes of its pixels",
                         fix=RESTORE)  # fmt: skip
            return {}
    return recording


def _lacking_statistics(
    source: Path, features: dict[str, Any], stats: dict[str, Any], v2: bool
) -> list[tuple[str, str, bool]]:
    """(feature, what is wrong with its statistics, whether computing them from the rows is the whole remedy)."""
    if not stats and not v2:
        return [("", "no such file" if not source.is_file() else "no statistics in it", False)]
    lacking = []
    for key in (STATE, ACTION):
        if key not in features:
            continue
        entry, width = stats.get(key) or {}, int(np.prod(features[key]["shape"]))
        missing = [name for name in STATISTICS if name not in entry]
        wrong = [name for name in STATISTICS if name in entry and np.size(entry[name]) != width]
        if wrong:
            lacking.append((key, f"{key}: {wrong[0]} has {np.size(entry[wrong[0]])} dimensions, the data {width}", False))
        elif missing:
            mendable = set(missing) <= QUANTILES.keys() or (v2 and not entry)
            lacking.append((key, f"{key}: no {', '.join(missing)}", mendable))
    return lacking


def _read_tasks(root: Path, info: dict[str, Any], problems: Problems) -> list[str]:
    path = root / "meta" / "tasks.parquet"
    try:
        table = pq.read_table(path, page_checksum_verification=True).to_pydict()
        text = next(table[name] for name in ("task", "__index_level_0__") if name in table)
        by_index = dict(zip(table["task_index"], text, strict=True))
        count = int(info.get("total_tasks") or len(by_index))
        return [str(by_index[number]) for number in range(count)]
    except (OSError, pa.ArrowException, StopIteration, KeyError, ValueError) as error:
        found = short(error) if path.is_file() else "no such file"
        problems.add(path, found=found, expected="columns task_index and task", fix=RESTORE)
        return []


def _names(feature: dict[str, Any]) -> tuple[str, ...]:
    names = feature.get("names")
    if isinstance(names, dict):  # {"motors": [...]} of older recorders
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    width = int(np.prod(feature["shape"]))
    return tuple(map(str, names)) if names and len(names) == width else tuple(f"d{i}" for i in range(width))


def _measured(root: Path, key: str, width: int) -> dict[str, Any]:
    """min and max of a column over all data files: limits of a robot nobody described. {} when they cannot be read, which
    `read_rows` then says."""
    low, high = np.full(width, np.inf), np.full(width, -np.inf)
    for path in sorted((root / "data").glob("*/*.parquet")):
        try:
            column = pq.read_table(path, columns=[key])[key].combine_chunks()
            flat = column.flatten() if pa.types.is_nested(column.type) else column
            values = flat.to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, width)
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError):
            return {}
        finite = np.isfinite(values)
        low, high = np.minimum(low, values.min(0, initial=np.inf, where=finite)), np.maximum(
            high, values.max(0, initial=-np.inf, where=finite))  # fmt: skip
    return {"min": low.tolist(), "max": high.tolist()} if np.isfinite([low, high]).all() else {}


def _specification(
    root: Path, given: EmbodimentSpec | None, info: dict[str, Any], cameras: dict[str, str], stats: dict[str, Any],
    problems: Problems,
) -> EmbodimentSpec:  # fmt: skip
    """The given spec, else the dataset's own, else one derived from its features; checked against them."""
    features, own = info["features"], root / "meta" / "embodiment.json"
    sizes = {}
    for camera, key in cameras.items():
        shape, names = list(features[key]["shape"]), features[key].get("names") or []
        shape = shape[1:] if names and str(names[0]).startswith("channel") else shape[:2]
        sizes[camera] = Camera(height=shape[0], width=shape[1])
    spec = given
    if spec is None and own.is_file():
        try:
            spec = EmbodimentSpec.model_validate_json(own.read_text())
        except ValueError as error:
            problems.add(own, found=str(error).replace("\n", " "), expected="an EmbodimentSpec", fix=RESTORE)
    if spec is None:
        parts = {}
        for part, key in (("state", STATE), ("action", ACTION)):
            if key not in features:
                parts[part] = ()
                continue
            dims, entry = _names(features[key]), stats.get(key) or _measured(root, key, len(_names(features[key])))
            low, high = (np.asarray(entry.get(k, [v] * len(dims)), float) for k, v in (("min", -1.0), ("max", 1.0)))
            if low.size != len(dims) or high.size != len(dims):
                low, high = -np.ones(len(dims)), np.ones(len(dims))
            high = np.where(high > low, high, low + np.maximum(1e-6, 1e-6 * np.abs(low)))
            limits = {"low": tuple(low), "high": tuple(high)}
            parts[part] = (Channel(name=part, dims=dims, convention="scalar", unit="-", **limits),)
        name = str(info.get("robot_type") or root.name)
        return EmbodimentSpec(name=name, cameras=sizes, control_hz=float(info["fps"]), **parts)
    origin = "the embodiment given" if given is not None else "meta/embodiment.json"
    for camera in sorted(spec.cameras.keys() - cameras.keys()):
        problems.add(root / "meta" / "info.json", found=f"camera {camera!r} missing; the dataset has {sorted(cameras)}",
                     expected=f"cameras {sorted(spec.cameras)} ({origin}, {spec.name!r})",
                     fix="rename the dataset's camera, or use the embodiment it was recorded with")  # fmt: skip
    for part, key, width in (("state", STATE, spec.state_dim), ("action", ACTION, spec.action_dim)):
        got = int(np.prod(features[key]["shape"])) if key in features else 0
        if got != width:
            names = spec.state_names if part == "state" else spec.action_names
            problems.add(root / "meta" / "info.json", found=f"{key} has {got} dimensions",
                         expected=f"{width} = {names} ({origin}, {spec.name!r})",
                         fix="use the embodiment this dataset was recorded with, or convert it")  # fmt: skip
    return spec.model_copy(update={"cameras": {c: sizes.get(c, size) for c, size in spec.cameras.items()}})

