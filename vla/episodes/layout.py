"""What a LeRobot v3.0 dataset says about itself, and whether its files keep the promise. Nothing is decoded here.

Read as released versions of `lerobot` write it (0.4.4 and 0.6.x differ): the task text is the column `task` or
`__index_level_0__`; several episodes share a Parquet file and an MP4; each camera has its own span and offset in its
video; only `info.json`'s `total_episodes` count, rows behind them are an unfinished append.

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
from vla.errors import DataError
from vla.normalize import QUANTILES

STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
STATISTICS = ("min", "max", "mean", "std", *QUANTILES)
RESTORE = "restore this file from its source; an interrupted `vla data record` is mended by running it again"
RECOMPUTE = "vla data stats {} --write"
CONVERT = ("with `lerobot[dataset]` in an environment of its own: python -m lerobot.scripts.convert_dataset_v21_to_v30 "
           "--repo-id=local/{name} --root={root} --push-to-hub=false (in 0.4: lerobot.datasets.v30...)")  # fmt: skip
"""lerobot's own converter works in place on v2.1; where it lies was looked up in its 0.4.4 and 0.6.1 wheels."""


class Problems:
    """Findings about one dataset, raised as one `DataError`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.found: list[tuple[str, str, str, str]] = []

    def add(self, where: object, *, found: object, expected: object, fix: str) -> None:
        self.found.append((str(where), str(found), str(expected), fix))

    def raise_if_any(self) -> None:
        if not self.found:
            return
        if len(self.found) == 1:
            where, found, expected, fix = self.found[0]
            raise DataError(where, found=found, expected=expected, fix=fix)
        listed = fixes = ""
        for n, (where, found, expected, fix) in enumerate(self.found, 1):
            listed += f"\n    {n}. {where}: {found} (expected {expected})"
            fixes += f"\n    {n}. {fix}"
        raise DataError(self.root, found=f"{len(self.found)} problems{listed}",
                        expected="a complete LeRobot v3.0 dataset", fix=fixes)  # fmt: skip


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

    def pixel_hash(self, camera: str, episode: int) -> str | None:
        """sha256 of an episode's frames as they were recorded; None unless it was recorded here, without loss."""
        recorded = self.recording.get("episodes", [])
        return (recorded[episode].get("pixels") or {}).get(camera) if episode < len(recorded) else None

    def path(self, template: str, row: Mapping[str, Any], prefix: str, key: str = "") -> Path:
        """The file an episode row points to. `prefix` is `data` or `videos/<key>`."""
        numbers = {f"{kind}_index": row[f"{prefix}/{kind}_index"] for kind in ("chunk", "file")}
        return self.root / self.info[template].format(video_key=key, **numbers)


def read_layout(root: Path, embodiment: EmbodimentSpec | None, need_stats: bool) -> tuple[Layout, Problems]:
    """Metadata of the dataset at `root`. Raises `DataError` at once when it is no v3.0 dataset; other findings are
    returned."""
    problems = Problems(root)
    info = _read_info(root)
    features = info["features"]
    cameras = {}
    for key, feature in features.items():
        about = {**(feature.get("info") or {}), **(feature.get("video_info") or {})}
        depth = about.get("is_depth_map") or about.get("video.is_depth_map")
        if feature["dtype"] in ("video", "image") and not depth:
            cameras[key.removeprefix(IMAGES).removeprefix("observation.")] = key
    stats = _read_json(root / "meta" / "stats.json", problems) or {}
    recording = _read_recording(root / "meta" / "recording.json", problems)
    for finding in _lacking_statistics(root, features, stats) if need_stats else []:
        problems.add(root / "meta" / "stats.json", found=finding, expected=f"{', '.join(STATISTICS)} per feature",
                     fix=RECOMPUTE.format(root))  # fmt: skip
    spec = _specification(root, embodiment, info, cameras, stats, problems)
    tasks = _read_tasks(root, info, problems)
    layout = Layout(root, info, spec, cameras, tasks, stats, recording, need_stats)
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
        problems.add(layout.root / "meta" / "stats.json",
                     found=f"{key}[{d}] of the data spans {lowest[d]:g} to {highest[d]:g}",
                     expected=f"within its statistics, {low[d]:g} to {high[d]:g}",
                     fix=f"these are another dataset's statistics: {RECOMPUTE.format(layout.root)}")  # fmt: skip


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    if not path.is_file():
        old, rlds = root / "meta" / "episodes.jsonl", root / "dataset_info.json"
        found, fix = "no such folder", "check the path; `vla data record --help` makes a dataset"
        if root.is_dir():
            found = "no meta/info.json"
        if old.exists():
            found, fix = f"{found} (but {old.name}, of LeRobot v2)", f"restore meta/info.json; then, {_convert(root)}"
        elif rlds.exists():
            found = f"{found} (but {rlds.name}, of RLDS)"
            fix = "port it to LeRobot v3.0 first (lerobot's documentation, `Porting Large Datasets`)"
        raise DataError(root, found=found, expected="a LeRobot v3.0 dataset", fix=fix)
    try:
        info = json.loads(path.read_text())
        version = str(info["codebase_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(path, found=f"{type(error).__name__}: {error}", expected="JSON with codebase_version",
                        fix=RESTORE) from error  # fmt: skip
    major = version.removeprefix("v").split(".")[0]
    if major != "3":
        fix = f"it is an older format; {_convert(root)}" if major in ("1", "2") else "use a version of tendon-vla that reads it"
        raise DataError(path, found=f"codebase_version {version}", expected="v3.0", fix=fix)
    needed = {"fps", "features", "total_episodes", "total_frames", "data_path"}
    if needed - info.keys() or ACTION not in info["features"]:
        missing = sorted(needed - info.keys()) or [f"feature {ACTION!r}"]
        raise DataError(path, found=f"no {', '.join(missing)}", expected="what LeRobot v3.0 requires", fix=RESTORE)
    if not (isinstance(info["fps"], int | float) and 0 < info["fps"] < float("inf")):
        raise DataError(path, found=f"fps {info['fps']!r}", expected="a number above 0", fix=RESTORE)
    for name in ("data_path", "video_path"):
        try:
            (info.get(name) or "").format(video_key="", chunk_index=0, file_index=0)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise DataError(path, found=f"{name} {info[name]!r}", expected="fields video_key, chunk_index and file_index only",
                            fix=RESTORE) from error  # fmt: skip
    return info


def _convert(root: Path) -> str:
    return CONVERT.format(name=root.resolve().name, root=root)


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


def _lacking_statistics(root: Path, features: dict[str, Any], stats: dict[str, Any]) -> list[str]:
    if not stats:
        return ["no such file" if not (root / "meta" / "stats.json").is_file() else "no statistics in it"]
    lacking = []
    for key in (STATE, ACTION):
        if key not in features:
            continue
        entry, width = stats.get(key) or {}, int(np.prod(features[key]["shape"]))
        missing = [name for name in STATISTICS if name not in entry]
        wrong = [name for name in STATISTICS if name in entry and np.size(entry[name]) != width]
        if missing:
            lacking.append(f"{key}: no {', '.join(missing)}")
        if wrong:
            lacking.append(f"{key}: {wrong[0]} has {np.size(entry[wrong[0]])} dimensions, the data {width}")
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
            dims, entry = _names(features[key]), stats.get(key) or {}
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


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
