"""Honest judging, on constructed worlds and on played ones, and experts that obey."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from playing import play

from vla.sims import expand_tasks, make_sim, suites
from vla.sims.tabletop_tasks import LIFT_BY, PUSH_BY, SPOILT_BY, TOUCH_WITHIN, Judge

pytest.importorskip("mujoco")


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
