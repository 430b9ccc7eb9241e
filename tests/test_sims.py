"""The simulators as others meet them: one scene per seed, the promised form, tasks and their sentences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
from children import LIMIT
from playing import fingerprint

from vla.errors import DataError, UsageError
from vla.sims import SUITES, expand_tasks, make_sim, suites

pytest.importorskip("mujoco")


# ---------------------------------------------------------------- scenes


def test_same_seed_is_the_same_scene_in_another_process(table, button):
    button.reset(seed=3)  # what was played before in this process must not matter
    table.reset(seed=3)
    cases = [("tabletop", "push-blue-left", 7), ("metaworld", "button-press-topdown-v3", 7)]
    code = (
        "import json, sys; sys.path[:0] = json.loads(sys.argv[1]); from playing import fingerprint;"
        f"print(json.dumps([fingerprint(*case) for case in {cases!r}]))"
    )
    paths = json.dumps([os.path.dirname(__file__), *sys.path])
    done = subprocess.run([sys.executable, "-c", code, paths], capture_output=True, text=True, check=True, timeout=LIMIT)
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
