"""The three HDF5 layouts and what each says of a recording: rate, instruction, pairing, which way up the pictures are.

    robomimic   data/demo_N/{actions, states, obs/..., next_obs/...}; `env_args` JSON on `data`; `mask/<name>` lists of demos
    libero      the same with obs/{agentview_rgb, eye_in_hand_rgb, ...}; `problem_info` JSON on `data`; one task per file
    aloha       {action, observations/{qpos, qvel, ..., images/<camera>}}; one episode per file

Two traps are the layouts' own. LIBERO steps its simulator first and stores what it saw then, so obs[t] comes *after*
actions[t]; robomimic and ALOHA store what was seen before. And LIBERO keeps MuJoCo's rows bottom-up, robomimic turns
them. LIBERO files replayed by OpenVLA's `regenerate_libero_dataset.py` look the same, carry no attributes at all, and
store the observation *before* the action: they are told apart by that lack, and `contradicts_pairing` holds every
LIBERO episode against its simulator states.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_tools.sources.hdf5_reading import load_h5py, named, read_array
from vla.errors import DataError

BEFORE, AFTER = "observation_before_action", "observation_after_action"
_LIBERO_CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
_SCENE = re.compile(r"^[A-Z0-9]+(_[A-Z0-9]+)*_SCENE\d+_")
_AGREE = ("control_freq", "robots", "controller_configs")
"""`env_kwargs` that must be equal in all files of one dataset."""


@dataclass
class FileFacts:
    """What one file says besides its arrays."""

    kind: str
    demos: list[str]
    """Names of its episodes in numeric order; [""] for ALOHA, whose file is one."""
    fps: float | None = None
    instruction: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, list[str]] = field(default_factory=dict)
    """`mask/<name>` -> the demos it lists, as far as they are there."""
    strangers: dict[str, int] = field(default_factory=dict)
    """`mask/<name>` -> how many names it lists beside those, of demos that are not in the file."""
    agree: dict[str, Any] = field(default_factory=dict)
    """What has to be equal in every file of a dataset."""
    problems: list[DataError] = field(default_factory=list)


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts `demo_2` before `demo_10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_facts(file: Any, where: str, stem: str) -> FileFacts:
    """What the open `file` says of itself; `stem` is its name without suffix.

    Raises `DataError` when it is in none of the layouts (naming what is inside) or holds no episode.
    """
    h5py = load_h5py()
    with named(where):
        data = file.get("data")
        observations = file.get("observations")
        if isinstance(data, h5py.Group):
            return _demonstrations(file, data, where, stem)
        if isinstance(observations, h5py.Group) and ("qpos" in observations or "images" in observations):
            return _aloha(file)
        inside = [_one_line(file, name) for name in sorted(file)[:8]]
    raise DataError(where, found=f"an unknown HDF5 layout: {', '.join(inside) or 'nothing inside'}",
                    expected="data/demo_0/actions (LIBERO, robomimic), or action and observations/qpos (ALOHA)",
                    fix="export it in one of these layouts, or leave this file out")  # fmt: skip


def _one_line(file: Any, name: str) -> str:
    item = file.get(name)
    if hasattr(item, "keys"):
        return f"{name}/ ({', '.join(sorted(item)[:5])})"
    return f"{name} {getattr(item, 'dtype', '')}{getattr(item, 'shape', ' (broken link)')}"


def _aloha(file: Any) -> FileFacts:
    # `compress` is absent, not False, in files of the plain recorder.
    attributes = {name: _plain(file.attrs[name]) for name in ("sim", "compress") if name in file.attrs}
    about = {"pairing": BEFORE, "image_orientation": "upright", "recorder_fps": 50.0,
             "jpeg_channel_order": "stored BGR (RGB handed to an encoder that expects BGR); given as RGB"}  # fmt: skip
    return FileFacts("aloha", [""], attributes=attributes | about)


def _demonstrations(file: Any, data: Any, where: str, stem: str) -> FileFacts:
    h5py = load_h5py()
    demos = sorted((n for n in data if isinstance(data.get(n), h5py.Group)), key=natural)
    if not demos:
        raise DataError(where, found="no demonstration in data/", expected="data/demo_0, data/demo_1, ...",
                        fix="leave this file out, or record it again")  # fmt: skip
    attributes = {name: _json(_plain(value)) for name, value in data.attrs.items()}
    attributes.pop("bddl_file_content", None)  # the whole task description, once per file
    first = data[demos[0]].get("obs")
    libero = "problem_info" in attributes or (first is not None and all(c in first for c in _LIBERO_CAMERAS))
    facts = FileFacts("libero" if libero else "robomimic", demos, attributes=attributes)
    kwargs = _kwargs(attributes)
    rate = kwargs.get("control_freq")
    facts.fps = float(rate) if isinstance(rate, int | float) and rate > 0 else None
    facts.agree = {name: kwargs[name] for name in _AGREE if name in kwargs}
    (_libero if libero else _robomimic)(facts, stem)
    _count(facts, data, where)
    _masks(facts, file.get("mask"), where)
    return facts


def _kwargs(attributes: dict[str, Any]) -> dict[str, Any]:
    env_args = attributes.get("env_args")
    kwargs = env_args.get("env_kwargs") if isinstance(env_args, dict) else attributes.get("env_info")  # robosuite's raw file
    return kwargs if isinstance(kwargs, dict) else {}


def _robomimic(facts: FileFacts, _stem: str) -> None:
    facts.attributes |= {"pairing": BEFORE, "image_orientation": "upright"}


def _libero(facts: FileFacts, stem: str) -> None:
    told = facts.attributes.get("problem_info")
    if isinstance(told, dict):
        words = told.get("language_instruction", "")
        words = "".join(words) if isinstance(words, list) else str(words)
        facts.instruction = words.strip().strip('"').strip()
        pairing = AFTER
    else:
        facts.instruction = _SCENE.sub("", stem.removesuffix("_demo")).replace("_", " ").strip()
        facts.attributes["instruction_from"] = "file name"
        facts.attributes["written_by"] = "no LIBERO attributes: taken for OpenVLA's regenerate_libero_dataset.py"
        pairing = BEFORE
    convention = facts.attributes.get("macros_image_convention", "opengl")
    upright = convention == "opencv"
    facts.attributes |= {"pairing": pairing, "image_orientation": "upright" if upright else "bottom_up"}


def _count(facts: FileFacts, data: Any, where: str) -> None:
    """Hold `num_demos` and `total` against what is there."""
    counted = {"num_demos": len(facts.demos)}
    steps = [data[demo].attrs.get("num_samples") for demo in facts.demos]
    if all(s is not None for s in steps):
        counted["total"] = sum(int(s) for s in steps)
    for name, there in counted.items():
        told = facts.attributes.get(name)
        if told is not None and told != there:
            unit = "demonstrations" if name == "num_demos" else "steps"
            facts.problems.append(DataError(
                f"{where} data@{name}", found=f"{there} {unit}", expected=f"{told}, as the file says",
                fix="fetch this file again; if demonstrations were removed on purpose, correct the attribute"))  # fmt: skip


def _masks(facts: FileFacts, group: Any, where: str) -> None:
    if group is None:
        return
    known = set(facts.demos)
    for name in sorted(group, key=natural):
        try:
            with named(f"{where} mask/{name}"):
                listed = [n.decode() if isinstance(n, bytes) else str(n) for n in np.ravel(group[name][()]).tolist()]
        except DataError as error:
            facts.problems.append(error)
            continue
        facts.masks[name] = [n for n in listed if n in known]
        if strangers := [n for n in listed if n not in known]:
            facts.strangers[name] = len(strangers)  # robomimic's own `--n 6` copies the lists whole: no damage


def contradicts_pairing(obs_joints: np.ndarray, states: np.ndarray, pairing: str) -> str | None:
    """Does a LIBERO episode show the other pairing than the one taken for its file? The evidence in words, or None.

    `states[t]` (time, qpos, qvel) is the simulator before action t in every writer, the arm being qpos[0:7];
    `obs_joints` (T, 7) equals it at once where the observation came before the action, one step late where it came after.
    """
    if len(obs_joints) < 4 or states.ndim != 2 or obs_joints.ndim != 2 or states.shape[1] < 1 + obs_joints.shape[1]:
        return None
    arm = states[:, 1 : 1 + obs_joints.shape[1]].astype(np.float64)
    joints = obs_joints.astype(np.float64)
    before = float(np.median(np.abs(joints[1:-1] - arm[1:-1])))
    after = float(np.median(np.abs(joints[1:-1] - arm[2:])))
    said, other = (before, after) if pairing == BEFORE else (after, before)
    if said <= 10 * other + 1e-6:
        return None
    return f"joint_states fit the states of the other pairing (median {other:.1e} rad apart, {said:.1e} as taken)"


def episode_attributes(group: Any, where: str) -> tuple[dict[str, Any], str]:
    """(attributes of one demonstration, JSON-like; the instruction among them or ""). Models and arrays are left out."""
    kept: dict[str, Any] = {}
    with named(where):
        for name in group.attrs:
            if name not in ("model_file", "init_state"):
                kept[name] = _json(_plain(group.attrs[name]))
    meta = kept.get("ep_meta")
    instruction = meta.get("lang") if isinstance(meta, dict) else None  # robosuite 1.5's episode description
    return kept, instruction if isinstance(instruction, str) else ""


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _json(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def check_lengths(file: Any, lengths: dict[str, np.ndarray], where: str) -> DataError | None:
    """Hold the JPEG lengths found against ALOHA's `compress_len` (cameras in an order the file does not tell)."""
    if "compress_len" not in file:
        return None
    told = read_array(file["compress_len"], f"{where} compress_len")
    rows = [tuple(row) for row in np.atleast_2d(told).tolist()]
    strangers = [name for name, found in lengths.items() if tuple(found.tolist()) not in rows]
    if not strangers:
        return None
    return DataError(f"{where} compress_len", found=f"other JPEG lengths than those of {', '.join(strangers)}",
                     expected="the length of each frame's JPEG", fix="fetch or record this file again")  # fmt: skip
