"""Demonstrations in robomimic's HDF5 layout, written by robosuite's and robomimic's own code, and read back by both.

    python benchmarks/foreign/hdf5_robomimic.py write OUT --demos 12 --size 84     # in the foreign environment
    python benchmarks/foreign/hdf5_robomimic.py dump OUT/image.hdf5 DUMP.npz       # there: what SequenceDataset reads
    .venv/bin/python benchmarks/foreign/hdf5_robomimic.py compare OUT/image.hdf5 DUMP.npz      # in ours

The foreign environment (Python 3.11):

    pip install "numpy<2" mujoco==3.3.0 robosuite==1.5.2 h5py torch matplotlib imageio tensorboardX
    pip install --no-deps robomimic==0.3.0

`write` lets a scripted hand lift robosuite's cube with a Panda through `DataCollectionWrapper`, gathers the
demonstrations with robosuite's `gather_demonstrations_as_hdf5`, and runs robomimic's own scripts over the file:
`convert_robosuite` (which also splits train and validation) and `dataset_states_to_obs` with two cameras. What this
script adds is the hand and three stand-ins for modules that robomimic 0.3.0 imports and this does not use: mujoco_py,
egl_probe (it would look for GPUs) and torchvision.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

CAMERAS = ("agentview", "robot0_eye_in_hand")


def stand_ins() -> None:
    """Empty modules in place of what robomimic 0.3.0 imports at the top and only needs elsewhere."""
    os.environ.setdefault("MUJOCO_GL", "egl")

    def module(name: str, **contents: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(contents)

    module("mujoco_py", builder=types.SimpleNamespace(MujocoException=RuntimeError))
    module("egl_probe", get_available_devices=list)
    for name in ("torchvision", "torchvision.models", "torchvision.transforms", "torchvision.transforms.functional"):
        module(name, Lambda=None, Compose=None)
    sys.modules["torchvision"].__dict__.update(
        models=sys.modules["torchvision.models"], transforms=sys.modules["torchvision.transforms"]
    )
    sys.modules["torchvision.transforms"].__dict__["functional"] = sys.modules["torchvision.transforms.functional"]


def hand(observation: dict[str, Any], state: dict[str, int]) -> np.ndarray:
    """Above the cube, down, close, up: seven numbers in [-1, 1], the first three a move of 5 cm at most."""
    away = observation["cube_pos"] - observation["robot0_eef_pos"]
    move, grip = np.zeros(3), -1.0
    if state["closed"] == 0 and np.linalg.norm(away[:2]) > 0.01:
        move = away + [0, 0, 0.06]
    elif state["closed"] == 0 and away[2] < -0.008:
        move = away
    elif state["closed"] < 6:
        state["closed"] += 1
        grip = 1.0
    else:
        move, grip = np.array([0, 0, 0.05]), 1.0
    return np.concatenate([np.clip(move / 0.05, -1, 1), np.zeros(3), [grip]])


def collect(raw: Path, demos: int, seed: int) -> str:
    """Successful episodes under `raw`; returns the JSON description of the environment that the gatherer wants."""
    import robosuite
    from robosuite.controllers import load_composite_controller_config
    from robosuite.wrappers import DataCollectionWrapper

    config = {"env_name": "Lift", "robots": "Panda", "control_freq": 20, "reward_shaping": False,
              "controller_configs": load_composite_controller_config(robot="Panda")}  # fmt: skip
    env = DataCollectionWrapper(
        robosuite.make(**config, has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False,
                       ignore_done=True, horizon=200, seed=seed),
        str(raw), collect_freq=1, flush_freq=1000,
    )  # fmt: skip
    for number in range(demos):
        observation, state, held = env.reset(), {"closed": 0}, 0
        # The wrapper only starts to record with the model saved by the first step, as under a human hand.
        for _ in range(150):
            observation, *_ = env.step(hand(observation, state))
            held += bool(env._check_success())
            if held >= 3:
                break
        print(f"demonstration {number}: {'lifted' if held else 'FAILED'}")
    env.close()
    return json.dumps(config)


def cut(path: Path, steps: int) -> None:
    """Shorten what robosuite gathered, before robomimic sees it: for test files of a few kilobytes."""
    import h5py

    with h5py.File(path, "a") as file:
        for demo in file["data"].values():  # type: ignore[attr-defined]
            for name in ("states", "actions"):
                values = demo[name][:steps]
                del demo[name]
                demo[name] = values


def write(out: Path, demos: int, size: int, seed: int, steps: int | None) -> None:
    stand_ins()
    from robosuite.scripts.collect_human_demonstrations import gather_demonstrations_as_hdf5

    raw = out / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir(parents=True)
    np.random.seed(seed)
    info = collect(raw, demos, seed)
    gather_demonstrations_as_hdf5(str(raw), str(out), info)
    shutil.rmtree(raw)
    # Beside OUT, not in it: it holds the same demonstrations without observations.
    demo = out.with_name(f"{out.name}_raw") / "demo.hdf5"
    demo.parent.mkdir(exist_ok=True)
    (out / "demo.hdf5").replace(demo)
    if steps:
        cut(demo, steps)
    script("robomimic.scripts.conversion.convert_robosuite", "--dataset", str(demo))
    script("robomimic.scripts.dataset_states_to_obs", "--dataset", str(demo), "--output_name", "image.hdf5",
           "--done_mode", "2", "--camera_names", *CAMERAS, "--camera_height", str(size), "--camera_width", str(size))  # fmt: skip
    (demo.parent / "image.hdf5").replace(out / "image.hdf5")
    print(f"wrote {out / 'image.hdf5'} ({(out / 'image.hdf5').stat().st_size / 1e6:.1f} MB)")


def script(module: str, *arguments: str) -> None:
    """Run a script of the foreign package as its command line would."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")


def dump(path: Path, out: Path) -> None:
    """Every value robomimic's SequenceDataset hands to its training, item by item, in one .npz."""
    stand_ins()
    import h5py
    import robomimic.utils.obs_utils as ObsUtils
    from robomimic.utils.dataset import SequenceDataset

    with h5py.File(path, "r") as file:
        demos = sorted(file["data"], key=lambda name: int(name[5:]))  # type: ignore[arg-type]
        keys = sorted(file[f"data/{demos[0]}/obs"])  # type: ignore[arg-type]
        cameras = [key for key in keys if key.endswith("_image")]
    low = [key for key in keys if key not in cameras]
    ObsUtils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": low, "rgb": cameras}})
    data = SequenceDataset(str(path), obs_keys=keys, dataset_keys=["actions", "rewards", "dones"], load_next_obs=True,
                           hdf5_cache_mode=None, hdf5_use_swmr=False)  # fmt: skip
    values: dict[str, list[np.ndarray]] = {}
    for i in range(len(data)):
        item = data[i]
        for key in keys:
            values.setdefault(f"obs/{key}", []).append(item["obs"][key][0])
            if key not in cameras:
                values.setdefault(f"next_obs/{key}", []).append(item["next_obs"][key][0])
        for key in ("actions", "rewards", "dones"):
            values.setdefault(key, []).append(item[key][0])
    arrays: dict[str, Any] = {key: np.stack(rows) for key, rows in values.items()}
    lengths = [data._demo_id_to_demo_length[demo] for demo in data.demos]
    np.savez(out, demos=np.array(data.demos), lengths=np.array(lengths), **arrays)
    print(f"{len(data)} steps of {len(data.demos)} demonstrations, {len(arrays)} fields")


def compare(path: Path, dumped: Path) -> None:
    """Our reader against robomimic's own: every value, with the dtypes both give."""
    from data_tools.sources import open_source

    source = open_source(path, "hdf5")
    theirs = np.load(dumped)
    order = [str(name) for name in theirs["demos"]]
    assert [key.split(":")[1] for key in source.keys()] == sorted(order, key=lambda name: int(name[5:]))
    ends = dict(zip(order, np.cumsum(theirs["lengths"]).tolist(), strict=True))
    lengths = dict(zip(order, theirs["lengths"].tolist(), strict=True))
    fields = [name for name in theirs.files if name not in ("demos", "lengths")]
    compared = dict.fromkeys(fields, 0)
    arrays = {name: theirs[name] for name in fields}
    for key in source.keys():
        raw, demo = source.read(key), key.split(":")[1]
        rows = slice(ends[demo] - lengths[demo], ends[demo])
        for name in fields:
            ours, other = (raw.images if name in raw.images else raw.fields)[name], arrays[name][rows]
            assert ours.shape == other.shape, (key, name, ours.shape, other.shape)
            different = int((ours.astype(np.float64) != other.astype(np.float64)).sum())
            assert different == 0, f"{key} {name}: {different} values differ"
            compared[name] += ours.size
    print(f"{len(source.keys())} demonstrations, {len(fields)} fields, {sum(compared.values())} values: all equal")
    unread = set(source.info.fields) | set(source.info.images)
    print(f"not read by SequenceDataset, so not compared: {sorted(unread - set(fields))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writer = commands.add_parser("write")
    writer.add_argument("out", type=Path)
    writer.add_argument("--demos", type=int, default=12)
    writer.add_argument("--size", type=int, default=84)
    writer.add_argument("--seed", type=int, default=0)
    writer.add_argument("--steps", type=int, help="cut the gathered demonstrations to so many")
    for name in ("dump", "compare"):
        command = commands.add_parser(name)
        command.add_argument("path", type=Path)
        command.add_argument("values", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "write":
        write(arguments.out.resolve(), arguments.demos, arguments.size, arguments.seed, arguments.steps)
    else:
        {"dump": dump, "compare": compare}[arguments.command](arguments.path, arguments.values)


if __name__ == "__main__":
    main()
