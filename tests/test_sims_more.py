"""Fetch, ALOHA and robosuite's arms: scenes by number, experts that do the task, pictures that show what matters.

A suite whose packages are missing is skipped by name; robosuite's run where `.venv-robosuite` exists.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from children import LIMIT
from playing import fingerprint

from data_tools import record as recorder
from data_tools.record import demonstrate, record
from vla.errors import UsageError
from vla.sims import SUITES, make_sim
from vla.sims.remote import ROBOSUITE

PACKAGES = {"fetch": "gymnasium_robotics", "aloha": "gym_aloha"}
CASES = [(suite, task) for suite in ("fetch", "aloha", "robosuite-panda", "robosuite-ur5e") for task in SUITES[suite].known]
SOME = [("fetch", "push"), ("aloha", "lift"), ("robosuite-panda", "lift"), ("robosuite-ur5e", "lift")]


def need(suite: str) -> None:
    if suite in PACKAGES and importlib.util.find_spec(PACKAGES[suite]) is None:
        pytest.skip(f"{suite}: {PACKAGES[suite]} is not installed (pip install 'tendon-vla[sim]')")
    if suite.startswith("robosuite") and ROBOSUITE.python() is None:
        pytest.skip(f"{suite}: no .venv-robosuite (make setup-robosuite)")


@pytest.fixture(scope="module")
def sims():
    """`sims(suite, task)`: one simulator per task of this file, skipping where it cannot be made."""
    made = {}

    def get(suite: str, task: str):
        need(suite)
        if (suite, task) not in made:
            made[suite, task] = make_sim(suite, task)
        return made[suite, task]

    yield get
    for sim in made.values():
        sim.close()


# ---------------------------------------------------------------- scenes


@pytest.mark.parametrize(("suite", "task"), SOME[:3])
def test_same_seed_is_the_same_scene_in_another_process(suite, task, sims):
    sims(suite, task).reset(seed=3)  # what was played before in this process must not matter
    code = (
        "import json, sys; sys.path[:0] = json.loads(sys.argv[1]); from playing import fingerprint;"
        f"print(json.dumps(fingerprint({suite!r}, {task!r}, 7)))"
    )
    paths = json.dumps([os.path.dirname(__file__), *sys.path])
    done = subprocess.run([sys.executable, "-c", code, paths], capture_output=True, text=True, check=True, timeout=LIMIT)
    assert json.loads(done.stdout) == fingerprint(suite, task, 7)
    assert "Error" not in done.stderr, "renderers are closed quietly at exit"


@pytest.mark.parametrize(("suite", "task"), SOME)
def test_simulators_that_share_a_world_play_as_if_alone(suite, task, sims):
    one, other = sims(suite, task), make_sim(suite, task)

    def play(disturbed: bool) -> np.ndarray:
        states = [one.reset(seed=5, options={"render": False})[0]["state"]]
        if disturbed:
            other.reset(seed=6)
        for _ in range(8):
            states.append(one.step(one.expert(), render=False)[0]["state"])
            if disturbed:
                other.step(other.expert(), render=True)
        return np.array(states)

    assert np.array_equal(play(disturbed=True), play(disturbed=False))
    other.close()


@pytest.mark.parametrize(("suite", "task"), CASES)
def test_observations_and_labels_have_the_promised_form(suite, task, sims):
    sim = sims(suite, task)
    pictures = []
    for seed in (0, 1):
        observation, info = sim.reset(seed=seed)
        sim.spec.check_observation(observation, "reset")
        assert observation["images"][sim.camera].shape == (64, 64, 3) and observation["images"][sim.camera].std() > 20
        assert info == {"success": False, "failure": False, "watched": {}, "step": 0}
        pictures.append(observation["images"][sim.camera])
        low, high = sim.spec.limits("state")
        for _ in range(5):
            action = sim.expert()
            assert action.dtype == np.float32 and action.shape == (sim.spec.action_dim,)
            assert np.all(action >= sim.spec.limits("action")[0]) and np.all(action <= sim.spec.limits("action")[1])
            state = sim.step(action, render=False)[0]["state"]
            assert state.dtype == np.float32 and np.all(state > low) and np.all(state < high)
    assert not np.array_equal(*pictures), "scenes 0 and 1 look different"
    with pytest.raises(UsageError, match="randomise"):
        make_sim(suite, task, randomise=True)
    with pytest.raises(UsageError, match="make another simulator"):
        sim.reset(seed=0, options={"task": "something-else"})


def test_a_fetch_scene_is_never_solved_before_anything_moved(sims):
    sim = sims("fetch", "reach")
    for seed in range(200):  # one in fifty would be
        sim.reset(seed=seed, options={"render": False})
        assert np.linalg.norm(sim._hand() - sim._env.goal) > 0.05
    assert sim._env.goal.dtype == np.float64


def test_the_goal_can_be_seen(sims):
    for suite, task, least in (("fetch", "reach", 0.97), ("fetch", "push", 0.9), ("aloha", "lift", 1.0)):
        sim, seen = sims(suite, task), 0
        for seed in range(40):
            picture = sim.reset(seed=seed)[0]["images"][sim.camera].astype(int)
            seen += np.sum((picture[..., 0] > 120) & (picture[..., 1] < 60)) >= 4
        assert seen >= least * 40, f"{suite} {task}: {seen} of 40"


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize(("suite", "task"), CASES)
def test_the_expert_does_the_task_and_doing_nothing_does_not(suite, task, sims, monkeypatch):
    sim = sims(suite, task)
    slow = suite.startswith("robosuite")
    lengths = []
    for seed in range(1 if slow else 4):
        episode = demonstrate(sim, 900 + seed, noise=False)
        assert episode is not None, f"scene {900 + seed}"
        lengths.append(len(episode.action))
    assert 2 <= min(lengths) and max(lengths) < sim.max_steps * 0.9
    monkeypatch.setitem(recorder.NOISE, "episodes", 1.0)
    tried = 1 if slow else 5
    disturbed = sum(demonstrate(sim, 800 + seed, noise=True) is not None for seed in range(tried))
    assert disturbed >= 0.6 * tried
    still = sim.reset(seed=900, options={"render": False})[0]["state"][: sim.spec.action_dim]
    nothing = np.where([c.convention == "joint_position" for c in sim.spec.action for _ in c.dims], still[: sim.spec.action_dim]
                       if len(still) == sim.spec.action_dim else 0, 0)  # fmt: skip
    for _ in range(20):
        info = sim.step(nothing, render=False)[4]
    assert not info["success"]


def test_the_expert_of_a_robosuite_arm_meets_a_turned_cube_and_the_label_says_so(sims):
    sim = sims("robosuite-panda", "lift")
    turns = []
    for seed in range(6):
        sim.reset(seed=seed, options={"render": False})
        turns.append(float(sim.expert()[5]))
    assert np.ptp(turns) > 0.2 and min(turns) < 0.9


def test_aloha_reaches_places_with_either_arm_in_closed_form(sims):
    sim = sims("aloha", "lift")
    import mujoco

    from vla.sims.aloha import solve

    mj: object = mujoco
    sim.reset(seed=0)
    for side, start in (("left", 0), ("right", 8)):
        for place in ([0.1, 0.5, 0.1], [0.0, 0.4, 0.02], [0.2, 0.6, 0.2]):
            at = np.array(place) * ([-1, 1, 1] if side == "left" else [1, 1, 1])
            sim._data.qpos[start : start + 6] = solve(side, at, pitch=1.2)
            mj.mj_kinematics(sim._model, sim._data)  # pyright: ignore[reportAttributeAccessIssue]
            assert np.allclose(sim._tip(side), at, atol=1e-4)
    assert np.isfinite(solve("right", np.array([-3.0, 9.0, 4.0]), 0.0)).all()  # out of reach: the nearest, not NaN


def test_success_of_aloha_is_a_cube_in_the_air_between_the_fingers(sims):
    sim = sims("aloha", "lift")
    sim.reset(seed=0, options={"render": False})
    over = False
    while not over:
        *_, over, late, info = sim.step(sim.expert(), render=False)
        assert not late
    assert info["success"] and sim._data.xpos[sim._cube, 2] > 0.06 and sim._world.get_reward(sim._physics) == 2
    assert 0.4 < sim._state()[13] < 0.68


# ---------------------------------------------------------------- recording


def test_recording_noise_is_small_where_an_action_is_a_place(sims, monkeypatch):
    sim = sims("aloha", "lift")
    monkeypatch.setitem(recorder.NOISE, "episodes", 1.0)
    monkeypatch.setitem(recorder.NOISE, "burst_probability", 0.0)
    off, step = [], type(sim).step

    def spy(self, action, render=True):
        off.append(np.asarray(action) - np.clip(self.expert(), self._low, self._high))
        return step(self, action, render)

    monkeypatch.setattr(type(sim), "step", spy)
    for seed in range(4):
        demonstrate(sim, seed, noise=True)
    spread = np.std(off, axis=0)
    assert np.all(spread[[6, 13]] == 0), "grippers are not motion"
    assert np.all((spread[:6] > 0.012) & (spread[:6] < 0.024)) and np.all(spread[7:13] < 0.03)  # 0.3 x 0.06 rad


@pytest.mark.parametrize(("suite", "task"), [("fetch", "reach"), ("robosuite-panda", "lift")])
def test_what_is_recorded_can_be_opened_as_that_robot(suite, task, tmp_path):
    need(suite)
    from vla.episodes import EpisodeStore

    summary = record(suite, [task], 2, 0, tmp_path / "out", workers=0, progress=False)
    assert summary["episodes"] == 2
    store = EpisodeStore.open(tmp_path / "out", cache_dir=tmp_path / "cache", progress=False)
    assert store.spec.name == SUITES[suite].embodiment and store.num_episodes == 2
