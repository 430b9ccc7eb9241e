"""Episodes in ALOHA's HDF5 layout, written by the recorders of ACT, ALOHA and Mobile ALOHA themselves.

    python benchmarks/foreign/hdf5_aloha.py sim OUT --act ACT --episodes 4 --steps 100 --size 120 160
    python benchmarks/foreign/hdf5_aloha.py replay OUT --recorder MOBILE/aloha_scripts --frames OUT_OF_SIM
    python benchmarks/foreign/hdf5_aloha.py dump FILE.hdf5 DUMP.npz
    .venv/bin/python benchmarks/foreign/hdf5_aloha.py compare FILE.hdf5 DUMP.npz

The first three in a foreign environment (Python 3.11):

    pip install "numpy<2" mujoco==2.3.7 dm_control==1.0.14 h5py opencv-python-headless matplotlib ipython pyquaternion tqdm

ACT, ALOHA, MOBILE are checkouts of github.com/tonyzhaozh/act (742c753), github.com/tonyzhaozh/aloha (06369f0) and
github.com/MarkFzp/mobile-aloha (0e40324).

`sim` runs ACT's `record_sim_episodes.py` (two simulated arms hand over a cube, plain pictures). The picture size is
fixed in its text, so the numbers 480 and 640 are exchanged in it; the number of steps and the cameras are its settings.
`replay` runs the `capture_one_episode` of ALOHA (plain) or Mobile ALOHA (JPEG, `compress`) with their robots and
cameras replaced by the playback of episodes that `sim` wrote: no such robot is here, the code that writes is theirs.
`dump` decodes as their `visualize_episodes.py` does, with cv2.imdecode.
"""

from __future__ import annotations

import argparse
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CAMERAS = ["top", "angle"]


def load(name: str, path: Path, edit: Callable[[str], str]) -> Any:
    """The module at `path` with its text edited, entered as `name`."""
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    exec(compile(edit(path.read_text()), str(path), "exec"), module.__dict__)
    return module


def resize(height: int, width: int) -> Callable[[str], str]:
    return lambda text: text.replace("480", str(height)).replace("640", str(width))


def sim(out: Path, act: Path, episodes: int, steps: int, size: tuple[int, int], seed: int) -> None:
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("MPLBACKEND", "agg")
    sys.path.insert(0, str(act))
    np.random.seed(seed)
    # ACT's utils.py holds its training set beside the cube's poses; only the poses are used here.
    data = types.SimpleNamespace(Dataset=object, TensorDataset=None, DataLoader=None)
    sys.modules |= {"torch": types.SimpleNamespace(utils=types.SimpleNamespace(data=data)), "torch.utils": data,
                    "torch.utils.data": data}  # type: ignore[dict-item]  # fmt: skip
    constants = load("constants", act / "constants.py", str)
    constants.SIM_TASK_CONFIGS["sim_transfer_cube_scripted"] |= {"episode_len": steps, "camera_names": CAMERAS}
    for name in ("sim_env", "ee_sim_env", "record_sim_episodes"):
        load(name, act / f"{name}.py", resize(*size))
    sys.modules["record_sim_episodes"].main({"task_name": "sim_transfer_cube_scripted", "dataset_dir": str(out),
                                             "num_episodes": episodes, "onscreen_render": False})  # fmt: skip


class _Playback:
    """Stands in for the robot: its observations and the operator's actions are those of a recorded file."""

    def __init__(self, path: Path) -> None:
        import h5py

        with h5py.File(path, "r") as file:
            self.action = file["action"][()]  # type: ignore[index]
            self.qpos, self.qvel = file["observations/qpos"][()], file["observations/qvel"][()]  # type: ignore[index]
            self.images = {name: file[f"observations/images/{name}"][()] for name in CAMERAS}  # type: ignore[index]
        self.puppet_bot_left = self.puppet_bot_right = types.SimpleNamespace(dxl=_Anything())
        self.t = 0

    def _see(self) -> Any:
        t = min(self.t, len(self.qpos) - 1)
        seen = {"qpos": self.qpos[t], "qvel": self.qvel[t], "effort": self.qvel[t] * 0.1, "base_vel": self.qpos[t][:2],
                "images": {name: frames[t] for name, frames in self.images.items()}}  # fmt: skip
        return types.SimpleNamespace(observation=seen)

    def reset(self, fake: bool = False) -> Any:
        self.t = 0
        return self._see()

    def step(self, action: np.ndarray) -> Any:
        self.t += 1
        return self._see()


class _Anything:
    """Takes any call and does nothing."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return self


def replay(out: Path, recorder: Path, frames: Path, size: tuple[int, int]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("h5py_cache", "rospy"):
        sys.modules[name] = types.ModuleType(name)
    constants = types.SimpleNamespace(DT=0.02, FPS=50, START_ARM_POSE=[0] * 16, TASK_CONFIGS={}, MASTER_GRIPPER_JOINT_MID=0,
                                      PUPPET_GRIPPER_JOINT_CLOSE=0, PUPPET_GRIPPER_JOINT_OPEN=0)  # fmt: skip
    robots = dict.fromkeys(("Recorder", "ImageRecorder", "move_arms", "torque_on", "torque_off", "move_grippers"), _Anything())
    sys.modules |= {
        "constants": constants,
        "robot_utils": types.SimpleNamespace(**robots, get_arm_gripper_positions=lambda _: -9.0),
        "interbotix_xs_modules": types.ModuleType("interbotix_xs_modules"),
        "interbotix_xs_modules.arm": types.SimpleNamespace(InterbotixManipulatorXS=_Anything()),
    }  # type: ignore[assignment]
    for path in sorted(frames.glob("episode_*.hdf5")):
        played = _Playback(path)
        sys.modules["real_env"] = types.SimpleNamespace(  # type: ignore[assignment]
            make_real_env=lambda played=played, **_: played, get_action=lambda *_, played=played: played.action[played.t]
        )
        module = load("record_episodes", recorder / "record_episodes.py", resize(*size))
        done = module.capture_one_episode(0.02, len(played.action), CAMERAS, str(out), path.stem, True)
        assert done, "the recorder rejected its own rate: the machine is too busy, run it again"


def dump(path: Path, out: Path) -> None:
    """All values with h5py, pictures with cv2 as ALOHA's own viewer has them."""
    import cv2
    import h5py

    values: dict[str, Any] = {}
    with h5py.File(path, "r") as file:
        compressed = bool(file.attrs.get("compress", False))

        def take(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                values[name] = item[()]

        file.visititems(take)
    for name in [n for n in values if "/images/" in n and compressed]:
        values[name] = np.stack([cv2.imdecode(row, 1) for row in values[name]])
    np.savez(out, **values)
    print(f"{len(values)} arrays, {'JPEG' if compressed else 'plain'}")


def compare(path: Path, dumped: Path) -> None:
    """Our reader against h5py and cv2: numbers equal, JPEG pictures within a level of the other decoder."""
    from data_tools.sources import open_source

    source = open_source(path, "hdf5")
    theirs = np.load(dumped)
    for key in source.keys():
        raw = source.read(key)
        for name in theirs.files:
            if name == "compress_len":
                continue
            ours = (raw.images if name in raw.images else raw.fields)[name]
            assert ours.dtype == theirs[name].dtype and ours.shape == theirs[name].shape, (name, ours.dtype, ours.shape)
            apart = np.abs(ours.astype(np.float64) - theirs[name].astype(np.float64))
            print(f"{key} {name}: {ours.size} values, {int((apart > 0).sum())} differ, at most by {apart.max():g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("sim", "replay"):
        command = commands.add_parser(name)
        command.add_argument("out", type=Path)
        command.add_argument("--size", type=int, nargs=2, default=(120, 160), metavar=("HEIGHT", "WIDTH"))
        if name == "sim":
            command.add_argument("--act", type=Path, required=True)
            command.add_argument("--episodes", type=int, default=4)
            command.add_argument("--steps", type=int, default=100)
            command.add_argument("--seed", type=int, default=0)
        else:
            command.add_argument("--recorder", type=Path, required=True)
            command.add_argument("--frames", type=Path, required=True)
    for name in ("dump", "compare"):
        command = commands.add_parser(name)
        command.add_argument("path", type=Path)
        command.add_argument("values", type=Path)
    a = parser.parse_args()
    if a.command == "sim":
        sim(a.out.resolve(), a.act.resolve(), a.episodes, a.steps, tuple(a.size), a.seed)
    elif a.command == "replay":
        replay(a.out.resolve(), a.recorder.resolve(), a.frames.resolve(), tuple(a.size))
    else:
        {"dump": dump, "compare": compare}[a.command](a.path, a.values)


if __name__ == "__main__":
    main()
