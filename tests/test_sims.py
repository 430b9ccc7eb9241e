"""The simulators: one scene per seed, honest judging, an expert that obeys, pictures the right way up."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest

from vla.errors import DataError, MachineError, UsageError
from vla.sims import SUITES, expand_tasks, make_sim, suites
from vla.sims.tabletop_tasks import LIFT_BY, PUSH_BY, SPOILT_BY, TOUCH_WITHIN, Judge

pytest.importorskip("mujoco")
COLOURS = np.array([[0.85, 0.1, 0.1], [0.1, 0.65, 0.15], [0.1, 0.2, 0.9], [0.95, 0.82, 0.1]])


@pytest.fixture(scope="module")
def table():
    """One tabletop, reset by every test that uses it."""
    return make_sim("tabletop", "touch-red")


@pytest.fixture(scope="module")
def button():
    """One Meta-World button."""
    pytest.importorskip("metaworld")
    return make_sim("metaworld", "button-press-topdown-v3")


def play(sim, seed, noise=None, **options):
    """Run the expert to the end; (info, steps). `noise` as recording does it: wide, with bursts of three steps."""
    _, info = sim.reset(seed=seed, options={"render": False, **options})
    over, burst, push = False, 0, np.zeros(3)
    while not over:
        action = sim.expert()
        assert action.shape == (sim.spec.action_dim,) and action.dtype == np.float32 and abs(action).max() <= 1
        if noise is not None:
            action[:3] += noise.normal(0, 0.3, 3)
            if burst == 0 and noise.random() < 0.06:
                burst, push = 3, noise.uniform(-1, 1, 3)
            if burst:
                action[:3], burst = push, burst - 1
        _, _, terminated, truncated, info = sim.step(action, render=False)
        over = terminated or truncated
    return info, info["step"]


def fingerprint(suite, task, seed):
    """Checksums of the first picture and of the state after ten expert steps; run in this process and in others."""
    sim = make_sim(suite, task)
    observation, _ = sim.reset(seed=seed)
    picture = observation["images"][sim.camera]
    for _ in range(10):
        observation, *_ = sim.step(sim.expert(), render=False)
    return [zlib.crc32(picture.tobytes()), zlib.crc32(observation["state"].tobytes())]


# ---------------------------------------------------------------- scenes


def test_same_seed_is_the_same_scene_in_another_process(table, button):
    button.reset(seed=3)  # what was played before in this process must not matter
    table.reset(seed=3)
    cases = [("tabletop", "push-blue-left", 7), ("metaworld", "button-press-topdown-v3", 7)]
    code = (
        "import json, sys; sys.path[:0] = json.loads(sys.argv[1]); from test_sims import fingerprint;"
        f"print(json.dumps([fingerprint(*case) for case in {cases!r}]))"
    )
    paths = json.dumps([os.path.dirname(__file__), *sys.path])
    done = subprocess.run([sys.executable, "-c", code, paths], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [fingerprint(*case) for case in cases]
    assert "Error" not in done.stderr, "renderers are closed quietly at exit"


def test_the_tabletop_scene_does_not_depend_on_the_task(table):
    first, _ = table.reset(seed=11)
    for task in ("lift-yellow", "push-green-away"):
        fresh = make_sim("tabletop", task)
        assert np.array_equal(fresh.reset(seed=11)[0]["images"]["front"], first["images"]["front"])
    table.reset(seed=12)
    again, _ = table.reset(seed=11, options={"task": "lift-yellow"})
    assert np.array_equal(again["images"]["front"], first["images"]["front"])
    assert (table.task, table.instruction) == ("lift-yellow", "lift the yellow cube")


def test_tabletop_cubes_lie_apart_on_their_area(table):
    places = []
    for seed in range(40):
        table.reset(seed=seed, options={"render": False})
        cubes = table._cube_places()
        gaps = [np.linalg.norm(a - b) for i, a in enumerate(cubes) for b in cubes[:i]]
        assert min(gaps) >= 0.09
        places.append(cubes[:, :2].copy())
    assert len({p.tobytes() for p in places}) == 40
    spread = np.ptp(np.concatenate(places), axis=0)
    assert np.all(spread > [0.16, 0.27]) and np.all(spread <= [0.18, 0.30])


def test_many_simulators_of_a_process_do_not_disturb_each_other(button):
    """They share models, renderer and the inverse-kinematics twin; each must still play as if alone."""
    for suite, task in (("tabletop", "push-red-left"), ("metaworld", "button-press-topdown-v3")):
        alone = fingerprint(suite, task, 5)
        one, other = make_sim(suite, task), make_sim(suite, task)
        picture = one.reset(seed=5)[0]["images"][one.camera]
        other.reset(seed=6)
        state = None
        for _ in range(10):
            state = one.step(one.expert(), render=False)[0]["state"]
            other.step(other.expert(), render=True)
        assert state is not None
        assert [zlib.crc32(picture.tobytes()), zlib.crc32(state.tobytes())] == alone


# ---------------------------------------------------------------- the interface


def test_observation_and_info_have_the_promised_form(table, button):
    for sim in (table, button):
        observation, info = sim.reset(seed=0)
        sim.spec.check_observation(observation, "reset")
        assert observation["images"][sim.camera].shape == (64, 64, 3)
        assert {"success", "failure", "watched"} <= info.keys()
        low, high = sim.spec.limits("state")
        assert np.all(observation["state"] >= low) and np.all(observation["state"] <= high)
        before = sim.frame(64)
        observation, reward, terminated, truncated, _ = sim.step(np.zeros(4, np.float32), render=False)
        assert observation["images"] == {} and (reward, terminated, truncated) == (0.0, False, False)
        assert sim.frame(120).shape == (120, 120, 3) and before.std() > 5


def test_an_action_of_one_moves_the_hand_two_centimetres_and_the_fingers_follow(table):
    for axis in range(3):
        table.reset(seed=1, options={"render": False})
        before = table._hand().copy()
        action = np.zeros(4, np.float32)
        action[axis] = -1
        state = table.step(action, render=False)[0]["state"]
        moved = state[:3] - before
        assert moved[axis] == pytest.approx(-0.02, abs=0.0015)
        assert np.abs(np.delete(moved, axis)).max() < 0.001
        assert state[3] == pytest.approx(0.5, abs=0.03)  # close = 0 is half-way


@pytest.mark.parametrize("action", [np.zeros(3), np.zeros((1, 4)), [0, np.nan, 0, 0], [np.inf, 0, 0, 0], 1.0])
def test_a_bad_action_is_refused_before_anything_moves(table, action):
    table.reset(seed=0, options={"render": False})
    before = table._data.qpos.copy()
    with pytest.raises(DataError, match="eef.dx"):
        table.step(action)
    assert np.array_equal(table._data.qpos, before)


def test_bad_requests_name_what_was_expected(table, button):
    with pytest.raises(UsageError, match="a seed of 0 or more"):
        table.reset(seed=None)
    with pytest.raises(UsageError, match="options"):
        table.reset(seed=0, options={"wtach": ["touch-red"]})
    with pytest.raises(UsageError, match="20 tasks"):
        table.reset(seed=0, options={"watch": ["touch-pink"]})
    with pytest.raises(UsageError, match="another simulator"):
        button.reset(seed=0, options={"task": "door-open-v3"})
    with pytest.raises(UsageError, match="reset first"):
        make_sim("tabletop", "touch-red").step(np.zeros(4))
    with pytest.raises(UsageError, match="tabletop"):
        make_sim("tabeltop", "touch-red")
    with pytest.raises(UsageError, match="one task"):
        make_sim("tabletop", "push")
    with pytest.raises(UsageError, match="pixels"):
        table.frame(4000)


def test_a_task_ends_in_time(table):
    table.reset(seed=0, options={"render": False})
    for step in range(1, table.max_steps + 1):
        *_, terminated, truncated, info = table.step(np.zeros(4), render=False)
        assert not terminated and truncated == (step == table.max_steps), info


# ---------------------------------------------------------------- tasks and sentences


def test_tasks_expand_by_group_and_by_name():
    assert len(expand_tasks("tabletop", None)) == 20
    assert len(expand_tasks("tabletop", ["push"])) == 12
    assert expand_tasks("tabletop", ["lift-red", "lift"])[0] == "lift-red"
    assert len(expand_tasks("tabletop", ["lift-red", "lift"])) == 4
    assert expand_tasks("metaworld", None) == ["button-press-topdown-v3"]
    with pytest.raises(UsageError, match="drawer-open-v3"):
        expand_tasks("metaworld", ["drawer-opn"])
    with pytest.raises(UsageError, match="metaworld"):
        expand_tasks("meta", None)


def test_every_task_has_its_own_sentence():
    for suite in SUITES.values():
        sentences = [suite.instruction(task) for task in suite.known]
        assert len(set(sentences)) == len(suite.known)
        assert all(s == s.lower().strip() and s.replace(" ", "").isalpha() for s in sentences)
    assert SUITES["tabletop"].instruction("push-red-left") == "push the red cube left"
    assert [SUITES["tabletop"].group(t) for t in ("touch-red", "push-red-left", "lift-red")] == [
        "touch",
        "push",
        "lift",
    ]


def test_metaworld_is_covered_whole():
    env_dict = pytest.importorskip("metaworld.env_dict")
    assert set(suites.METAWORLD_SENTENCES) == set(env_dict.ENV_CLS_MAP) and len(suites.METAWORLD_SENTENCES) == 50


# ---------------------------------------------------------------- judging, on constructed worlds

START = np.array([[0.25, -0.1, 0.017], [0.4, -0.1, 0.017], [0.25, 0.1, 0.017], [0.4, 0.1, 0.017]])
FAR = np.array([0.3, 0.0, 0.2])


def judged(task, hand=FAR, **moved):
    """The verdict on START with cubes displaced by keyword (colour -> (dx, dy, dz))."""
    cubes = START.copy()
    for colour, by in moved.items():
        cubes[suites.COLOURS.index(colour)] += by
    return Judge(task, START).update(np.asarray(hand), cubes)


def test_touch_is_judged_by_distance_to_the_named_centre():
    above = [0, 0, TOUCH_WITHIN - 1e-4]
    assert judged("touch-red", START[0] + above) == 1
    assert judged("touch-red", START[0] + [0, 0, TOUCH_WITHIN + 1e-4]) == 0
    assert judged("touch-red", START[2] + above) == -1


@pytest.mark.parametrize(("direction", "axis"), [("left", (0, 1, 0)), ("right", (0, -1, 0)), ("away", (1, 0, 0))])
def test_push_is_judged_by_direction_distance_and_the_others(direction, axis):
    axis = np.array(axis, float)
    across = np.array([axis[1], axis[0], 0])
    task = f"push-green-{direction}"
    enough = axis * (PUSH_BY + 1e-4)
    assert judged(task, green=enough) == 1
    assert judged(task, green=axis * (PUSH_BY - 1e-3)) == 0
    assert judged(task, green=-enough) == 0
    assert judged(task, green=enough + across * 0.024) == 1
    assert judged(task, green=enough + across * 0.026) == 0
    assert judged(task, green=enough - across * 0.026) == 0
    assert judged(task, green=enough, blue=across * (SPOILT_BY + 1e-4)) == -1
    assert judged(task, green=enough, blue=across * (SPOILT_BY - 1e-3)) == 1


def test_lift_is_judged_by_height_and_the_others():
    up = np.array([0, 0, LIFT_BY + 1e-4])
    assert judged("lift-blue", blue=up) == 1
    assert judged("lift-blue", blue=up * 0.9) == 0
    assert judged("lift-blue", red=up) == -1
    assert judged("lift-blue", blue=up, yellow=(0.016, 0, 0)) == -1


def test_a_verdict_is_final():
    judge = Judge("touch-red", START)
    assert judge.update(START[1], START) == -1
    assert judge.update(START[0], START) == -1


def test_watched_tasks_are_judged_on_the_same_rollout(table):
    """Ordered to touch red, the expert touches red: watching sees that, and nothing else, done."""
    watch = ["touch-red", "touch-blue", "lift-red"]
    info, _ = play(table, 21, task="touch-red", watch=watch)
    assert info["success"] and info["watched"] == {"touch-red": True, "touch-blue": False, "lift-red": False}
    # Ordered to touch blue while red is played: a definite failure of blue, and red is seen to be done.
    table.reset(seed=21, options={"task": "touch-blue", "watch": ["touch-red"], "render": False})
    table.task = "touch-red"  # the expert is told something else than the judge
    for _ in range(table.max_steps):
        *_, terminated, _, info = table.step(table.expert(), render=False)
        if terminated:
            break
    assert info["failure"] and not info["success"] and info["watched"] == {"touch-red": True}


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize("verb", ["touch", "push", "lift"])
def test_tabletop_expert_does_every_task(table, verb):
    tasks = expand_tasks("tabletop", [verb])
    steps = []
    for i in range(24):
        info, taken = play(table, 600_000 + i, task=tasks[i % len(tasks)])
        assert info["success"], (tasks[i % len(tasks)], i)
        steps.append(taken)
    assert np.mean(steps) < 15


@pytest.mark.parametrize("verb", ["touch", "push", "lift"])
def test_tabletop_expert_recovers_from_recording_noise(table, verb):
    tasks = expand_tasks("tabletop", [verb])
    rng = np.random.default_rng(0)
    done = [play(table, 610_000 + i, noise=rng, task=tasks[i % len(tasks)])[0]["success"] for i in range(24)]
    assert sum(done) >= 21  # the noise alone spoils some scenes: bursts knock other cubes over


def test_tabletop_expert_is_markov(table):
    """The label depends on the world, not on how it got there: two experts asked at one state answer the same."""
    table.reset(seed=30, options={"task": "lift-green", "render": False})
    for _ in range(6):
        table.step(np.random.default_rng(1).uniform(-1, 1, 4), render=False)
    first = table.expert()
    assert np.array_equal(first, table.expert())
    other: Any = make_sim("tabletop", "lift-green")
    other.reset(seed=31, options={"render": False})
    other._data.qpos[:] = table._data.qpos
    import mujoco

    mujoco.mj_kinematics(other._model, other._data)  # pyright: ignore[reportAttributeAccessIssue]
    assert np.allclose(first, other.expert(), atol=1e-5)


@pytest.mark.parametrize("task", ["button-press-topdown-v3", "reach-v3"])
def test_metaworld_expert_sees_the_goal(task):
    """reach-v3 is at 0 % when the goal is hidden from the expert, Meta-World's default."""
    pytest.importorskip("metaworld")
    sim = make_sim("metaworld", task)
    assert all(play(sim, seed)[0]["success"] for seed in range(3))
    assert sim.reset(seed=0)[0]["state"].shape == (4,), "proprioception only: no object positions"


def test_metaworld_seeds_give_distinct_scenes(button):
    """Meta-World's own reset ignores its seed."""
    boxes = []
    for seed in (0, 1, 2, 0):
        button.reset(seed=seed, options={"render": False})
        boxes.append(button._full[4:7].copy())
    assert np.array_equal(boxes[0], boxes[3])
    assert min(np.linalg.norm(boxes[i] - boxes[j]) for i in range(3) for j in range(i)) > 1e-3


# ---------------------------------------------------------------- pictures


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
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


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
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert "spawn" in pool.map(_draw, [0])[0]
