"""Pictures the right way up, looks that vary and places that do not, and machines that cannot draw."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from children import LIMIT, call
from playing import play

from vla.errors import MachineError
from vla.sims import make_sim, suites

pytest.importorskip("mujoco")


# ---------------------------------------------------------------- pictures


COLOURS = np.array([[0.85, 0.1, 0.1], [0.1, 0.65, 0.15], [0.1, 0.2, 0.9], [0.95, 0.82, 0.1]])


def seen_at(sim, cube):
    """(row, column) of a cube in the picture: what changes when it is taken away."""
    import mujoco

    frame, place = sim.frame(240).astype(int), sim._data.qpos.copy()
    sim._data.qpos[8 + 7 * cube] = 10
    mujoco.mj_kinematics(sim._model, sim._data)  # pyright: ignore[reportAttributeAccessIssue]
    without = sim.frame(240)
    sim._data.qpos[:] = place
    mujoco.mj_kinematics(sim._model, sim._data)  # pyright: ignore[reportAttributeAccessIssue]
    changed = np.argwhere(np.abs(frame - without).max(axis=2) > 30)
    return changed.mean(axis=0) if len(changed) > 100 else None  # fewer: hidden by the hand


def test_tabletop_picture_is_the_right_way_up(table):
    """The robot's left (+y) is the picture's right, and away (+x, towards the camera) is down; every cube is in it."""
    compared = 0
    for seed in range(5):
        table.reset(seed=seed)
        cubes, seen = table._cube_places(), [seen_at(table, i) for i in range(4)]
        for i, a in enumerate(seen):
            for j, b in enumerate(seen[:i]):
                if a is None or b is None:
                    continue
                if abs(cubes[i, 1] - cubes[j, 1]) > 0.05:
                    assert (a[1] > b[1]) == (cubes[i, 1] > cubes[j, 1])
                    compared += 1
                if abs(cubes[i, 0] - cubes[j, 0]) > 0.05:
                    assert (a[0] > b[0]) == (cubes[i, 0] > cubes[j, 0])
                    compared += 1
    assert compared > 30


def test_metaworld_picture_is_the_right_way_up(button):
    """The Sawyer stands at the left, its red arm above its hand; the wooden table fills the foot of the picture."""
    button.reset(seed=0)
    frame = button.frame(120).astype(int)
    red = np.argwhere((frame[..., 0] > frame[..., 1] + 60) & (frame[..., 0] > frame[..., 2] + 60)).mean(axis=0)
    assert red[0] < 60 and red[1] < 60
    wood = frame[100:, 60:90].mean(axis=(0, 1))
    assert wood[0] > wood[2] + 15


def test_a_randomised_scene_keeps_places_and_changes_looks(table):
    wild: Any = make_sim("tabletop", "touch-red", randomise=True)
    plain = table.reset(seed=40, options={"task": "touch-red"})[0]["images"]["front"]
    frames = []
    for seed in (40, 41, 40):
        frames.append(wild.reset(seed=seed)[0]["images"]["front"])
        if seed == 40:
            assert np.allclose(wild._cube_places(), table._cube_places())
    assert np.array_equal(frames[0], frames[2]) and not np.array_equal(frames[0], plain)
    for seed in range(40, 60):
        wild.reset(seed=seed, options={"render": False})
        rgba = np.array([wild._model.geom(c).rgba[:3] for c in suites.COLOURS])
        unit = rgba / np.linalg.norm(rgba, axis=1, keepdims=True)
        names = (unit @ (COLOURS / np.linalg.norm(COLOURS, axis=1, keepdims=True)).T).argmax(axis=1)
        assert names.tolist() == [0, 1, 2, 3], "a colour stays within its name"
    assert np.array_equal(table.reset(seed=40)[0]["images"]["front"], plain), "the plain scene was not touched"
    assert all(play(wild, 620_000 + i, task=t)[0]["success"] for i, t in enumerate(["lift-red", "push-blue-away"] * 3))


# ---------------------------------------------------------------- machines that cannot draw


def render_elsewhere(**environment):
    """Run check_renderer in a process with other variables."""
    code = "from vla.sims.render import check_renderer; print(check_renderer())"
    env = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False, timeout=LIMIT)


@pytest.mark.skipif(sys.platform != "linux", reason="EGL")
def test_no_renderer_names_the_packages_to_install(tmp_path):
    done = render_elsewhere(MUJOCO_GL="egl", __EGL_VENDOR_LIBRARY_DIRS=str(tmp_path))
    assert done.returncode == 1 and "MachineError" in done.stderr
    assert "apt-get install -y libegl1 libgl1-mesa-dri" in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="EGL")
def test_the_backend_is_chosen_and_closed_without_a_word():
    done = render_elsewhere()
    assert done.stdout.strip() in ("egl", "osmesa") and done.returncode == 0 and done.stderr == ""


def _draw(_: int) -> str:
    try:
        make_sim("tabletop", "touch-red").reset(seed=0)
    except MachineError as error:
        return error.fix
    return "drawn"


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_process_is_told_to_spawn(table):
    """OpenGL does not survive a fork; without the check the child dies deep inside the driver."""
    table.reset(seed=0)
    assert "spawn" in call(multiprocessing.get_context("fork"), _draw, 0)


def test_pictures_of_any_thread_are_the_same():
    """In a process of its own: it is for good."""
    code = """
import threading
from vla.sims import make_sim
from vla.sims.render import draw_in_any_thread

pictures = []

def draw():
    sim = make_sim("tabletop", "touch-red", image_size=64)
    sim.reset(seed=3)
    pictures.append(sim.view("front", 64).copy())

draw()
draw_in_any_thread()
for _ in range(3):
    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
draw()
assert len(pictures) == 5 and pictures[0].std() > 10
assert all((picture == pictures[0]).all() for picture in pictures), [picture.std() for picture in pictures]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT)
