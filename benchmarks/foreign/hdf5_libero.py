"""Demonstrations in LIBERO's HDF5 layout, written by LIBERO's own scripts.

    python benchmarks/foreign/hdf5_libero.py write OUT --libero LIBERO --task STUDY_SCENE1_... --demos 3
    python benchmarks/foreign/hdf5_libero.py replay OUT --libero LIBERO --openvla OPENVLA --source OUT_OF_WRITE
    .venv/bin/python benchmarks/foreign/hdf5_libero.py compare FILE.hdf5

The first two in a foreign environment (Python 3.11):

    pip install "numpy<2" mujoco==2.3.7 h5py opencv-python-headless matplotlib easydict bddl==1.0.1 future thop gym==0.25.2 \\
        cloudpickle numba scipy pyyaml termcolor imageio tqdm
    pip install --no-deps robosuite==1.4.0

LIBERO is a checkout of github.com/Lifelong-Robot-Learning/LIBERO (8f1084e), OPENVLA one of github.com/openvla/openvla.

`write` moves LIBERO's Panda with a scripted hand through robosuite's `DataCollectionWrapper`, gathers with
`gather_demonstrations_as_hdf5` of LIBERO's `collect_demonstration.py`, and runs its `create_dataset.py`
(`--use-camera-obs`). The hand reaches for an object and lifts; it need not solve the task, and the writer does not ask.
The picture size is fixed in the script's text (128), so that number is exchanged in it, and one line that adds a string
to a list, and stops it at this commit, is mended (its result is used nowhere). Where the checkout lacks large
meshes and textures, specks and plain textures are put there: backgrounds look bare, formats do not change.
`replay` runs OpenVLA's `regenerate_libero_dataset.py` over such a file: no attributes, observation before the action. Its
robot helpers (which import TensorFlow) are replaced by the few lines they amount to, and every replay counts as solved.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SUITE = "libero_90"
_SPECK = [(0, 0, 0), (0.002, 0, 0), (0, 0.002, 0), (0, 0, 0.002)]
"""Stands in for a mesh: too small to hide anything from a camera."""


def stand_ins(libero: Path) -> int:
    """Put something in the place of every asset the checkout lists and lacks; how many."""
    listed = subprocess.run(["git", "ls-files", "-d"], cwd=libero, capture_output=True, text=True, check=True).stdout.split("\n")
    count = 0
    for path in (libero / name for name in listed if "/assets/" in name):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            from PIL import Image

            Image.new("RGB", (64, 64), (150, 140, 130)).save(path)
        elif path.suffix == ".obj":
            corners = [f"v {x} {y} {z}" for x, y, z in _SPECK]
            path.write_text("\n".join([*corners, "f 1 3 2", "f 1 2 4", "f 1 4 3", "f 2 3 4"]))
        elif path.suffix == ".msh":  # MuJoCo's own: four counts, positions, faces
            faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]], np.int32)
            path.write_bytes(
                np.array([4, 0, 0, 4], np.int32).tobytes() + np.array(_SPECK, np.float32).tobytes() + faces.tobytes()
            )
        count += 1
    return count


def prepare(libero: Path, out: Path) -> None:
    """LIBERO's configuration file, which it would ask for at the keyboard, and its folders on the path."""
    import yaml

    os.environ.setdefault("MUJOCO_GL", "egl")
    out.mkdir(parents=True, exist_ok=True)
    root = libero / "libero" / "libero"
    config = out / "libero_config"
    config.mkdir(exist_ok=True)
    folders = {"benchmark_root": root, "bddl_files": root / "bddl_files", "init_states": root / "init_files",
               "datasets": out / "datasets", "assets": root / "assets"}  # fmt: skip
    (config / "config.yaml").write_text(yaml.safe_dump({name: str(path) for name, path in folders.items()}))
    os.environ["LIBERO_CONFIG_PATH"] = str(config)
    sys.path[:0] = [str(libero), str(libero / "scripts")]
    # Keyboards and 3-D mice, which want a display.
    sys.modules["robosuite.utils.input_utils"] = types.SimpleNamespace(input2action=None)  # type: ignore[assignment]
    print(f"{stand_ins(libero)} assets replaced by stand-ins")


def load(name: str, path: Path, edit: Callable[[str], str] = str) -> Any:
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    exec(compile(edit(path.read_text()), str(path), "exec"), module.__dict__)
    return module


def hand(observation: dict[str, Any], thing: str, step: int) -> np.ndarray:
    away = observation[f"{thing}_pos"] - observation["robot0_eef_pos"]
    if step < 25:
        move, grip = away + [0, 0, 0.1], -1.0
    elif step < 40:
        move, grip = away, -1.0
    else:
        move, grip = (np.zeros(3), 1.0) if step < 46 else (np.array([0.0, 0.01, 0.05]), 1.0)
    turn = 0.1 * np.sin(step / 6.0) * np.array([0.0, 0.5, 1.0])  # the rotations are to be read back, too
    return np.concatenate([np.clip(move / 0.05, -1, 1), turn, [grip]])


def write(out: Path, libero: Path, task: str, demos: int, steps: int, size: int, seed: int) -> None:
    prepare(libero, out)
    bddl = libero / "libero" / "libero" / "bddl_files" / SUITE / f"{task}.bddl"
    collect = load("collect_demonstration", libero / "scripts" / "collect_demonstration.py")
    from robosuite import load_controller_config
    from robosuite.wrappers import DataCollectionWrapper

    np.random.seed(seed)
    problem = collect.BDDLUtils.get_problem_info(str(bddl))
    config = {"robots": ["Panda"], "controller_configs": load_controller_config(default_controller="OSC_POSE")}
    env = collect.TASK_MAPPING[problem["problem_name"]](
        bddl_file_name=str(bddl), **config, has_renderer=False, has_offscreen_renderer=False, ignore_done=True,
        use_camera_obs=False, reward_shaping=True, control_freq=20)  # fmt: skip
    raw = out / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    recorder = DataCollectionWrapper(env, str(raw))
    for _ in range(demos):
        observation = recorder.reset()
        observation = env._get_observations() if observation is None else observation
        thing = next(name for name in sorted(env.objects_dict) if f"{name}_pos" in observation)
        for step in range(steps):
            observation, *_ = recorder.step(hand(observation, thing, step))
    recorder.close()
    collect.problem_info = problem
    collect.gather_demonstrations_as_hdf5(str(raw), str(out), json.dumps(config), types.SimpleNamespace(bddl_file=str(bddl)))
    sys.argv = ["create_dataset.py", "--demo-file", str(out / "demo.hdf5"), "--use-camera-obs"]

    def edit(text: str) -> str:
        return text.replace("=128", f"={size}").replace('[:-1] + "bddl_files"', '[:-1] + ["bddl_files"]')

    load("create_dataset", libero / "scripts" / "create_dataset.py", edit).main()
    # This version names the file after the suite's folder; the published ones are named after the task.
    done = next(p for p in (out / "datasets").rglob(f"{SUITE}*") if p.is_file())
    done.replace(out / f"{task}_demo.hdf5")
    for path in (raw, out / "datasets", out / "libero_config"):
        shutil.rmtree(path)
    (out / "demo.hdf5").unlink()


def replay(out: Path, libero: Path, openvla: Path, source: Path, size: int) -> None:
    prepare(libero, out)
    from libero.libero.envs import OffScreenRenderEnv

    tasks = [types.SimpleNamespace(name=p.name.removesuffix("_demo.hdf5")) for p in sorted(source.glob("*_demo.hdf5"))]
    suite = types.SimpleNamespace(n_tasks=len(tasks), get_task=lambda i: tasks[i])

    class Solved(OffScreenRenderEnv):
        def step(self, action: Any) -> Any:
            observation, reward, _, info = super().step(action)
            return observation, reward, True, info

    def make(task: Any, _model: str, resolution: int) -> Any:
        bddl = libero / "libero" / "libero" / "bddl_files" / SUITE / f"{task.name}.bddl"
        return Solved(bddl_file_name=str(bddl), camera_heights=size, camera_widths=size), task.name

    for name in ("experiments", "experiments.robot", "experiments.robot.libero"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules |= {
        "libero.libero.benchmark": types.SimpleNamespace(get_benchmark_dict=lambda: {SUITE: lambda: suite}),
        "experiments.robot.libero.libero_utils": types.SimpleNamespace(
            get_libero_dummy_action=lambda _: [0, 0, 0, 0, 0, 0, -1], get_libero_env=make
        ),
    }  # type: ignore[assignment]
    sys.modules["libero.libero"].__dict__["benchmark"] = sys.modules["libero.libero.benchmark"]
    module = load("regenerate", openvla / "experiments" / "robot" / "libero" / "regenerate_libero_dataset.py")
    (out / "experiments" / "robot" / "libero").mkdir(parents=True)
    os.chdir(out)  # it writes a report below the working folder
    target = out / "target"
    settings = {"libero_task_suite": SUITE, "libero_raw_data_dir": str(source), "libero_target_dir": str(target)}
    module.main(argparse.Namespace(**settings))
    for path in target.iterdir():
        path.replace(out / path.name)
    for path in ("target", "experiments", "libero_config"):
        shutil.rmtree(out / path)


def compare(path: Path) -> None:
    """Our reader against h5py, every number; and the pairing against the simulator states."""
    import h5py

    from data_tools.sources import open_source

    source = open_source(path, "hdf5")
    print(source.info.fps, source.info.attributes["pairing"], source.info.attributes["image_orientation"])
    with h5py.File(path, "r") as file:
        total = 0
        for key in source.keys():
            raw = source.read(key)
            group = file[f"data/{key.split(':')[1]}"]
            seen: list[str] = []
            group.visit(seen.append)  # type: ignore[attr-defined]
            seen = [name for name in seen if isinstance(group[name], h5py.Dataset)]  # type: ignore[index]
            assert set(seen) == {*raw.fields, *raw.images}, set(seen) ^ {*raw.fields, *raw.images}
            for name in seen:
                ours, theirs = {**raw.fields, **raw.images}[name], group[name][()]  # type: ignore[index]
                assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), (key, name)
                total += ours.size
            states, joints = raw.fields["states"][:, 1:8], raw.fields["obs/joint_states"]
            same, late = np.abs(states[1:] - joints[1:]).max(), np.abs(states[1:] - joints[:-1]).max()
            apart = f"joint_states off the states by {same:.1e} rad, a step late by {late:.1e}"
            print(f"{key} {raw.instruction!r} {len(raw)} steps; {apart}")
    print(f"{total} values: all equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("write", "replay"):
        command = commands.add_parser(name)
        command.add_argument("out", type=Path)
        command.add_argument("--libero", type=Path, required=True)
        command.add_argument("--size", type=int, default=128)
        if name == "write":
            command.add_argument("--task", required=True)
            command.add_argument("--demos", type=int, default=3)
            command.add_argument("--steps", type=int, default=70)
            command.add_argument("--seed", type=int, default=0)
        else:
            command.add_argument("--openvla", type=Path, required=True)
            command.add_argument("--source", type=Path, required=True)
    commands.add_parser("compare").add_argument("path", type=Path)
    a = parser.parse_args()
    if a.command == "write":
        write(a.out.resolve(), a.libero.resolve(), a.task, a.demos, a.steps, a.size, a.seed)
    elif a.command == "replay":
        replay(a.out.resolve(), a.libero.resolve(), a.openvla.resolve(), a.source.resolve(), a.size)
    else:
        compare(a.path)


if __name__ == "__main__":
    main()
