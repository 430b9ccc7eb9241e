"""Evaluation in the real tabletop: the processes, the judges, the films."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fake_sims import FakePolicy, row

from vla.evaluate import SimulatorPool, evaluate
from vla.evaluate.jobs import Job
from vla.evaluate.pool import run_jobs
from vla.sims.suites import SUITES


@pytest.fixture(scope="module")
def tabletop():
    pytest.importorskip("mujoco")
    with SimulatorPool(2) as running:
        yield running


class Still(FakePolicy):
    """Knows the tabletop's sentences and does nothing, deterministically."""

    def __init__(self) -> None:
        super().__init__()
        self.instructions = [SUITES["tabletop"].instruction(t) for t in SUITES["tabletop"].tasks]
        self.recorded_seeds = {}

    def act_batch(self, observations, instructions, embodiment, *, decode=None, seeds=None, drop_state=False):
        for observation in observations:
            self.embodiments[embodiment].check_observation(observation, "shown to the policy")
        zeros = np.zeros((self.chunk, 4), np.float32)
        return [SimpleNamespace(actions=zeros, confidence=zeros, symbols=zeros.astype(int)) for _ in observations]


def test_real_tabletop(tabletop, tmp_path):
    results = evaluate(
        Still(), "tabletop", episodes=8, conditions=("policy", "swap", "blank", "random", "expert"), pool=tabletop,
        progress=False, out=tmp_path / "tabletop.json", clips=2,
    )  # fmt: skip
    for group in ("touch", "push", "lift"):
        assert row(results, "expert", group)["rate"] == 1.0
        assert 4 < row(results, "expert", group)["mean_steps"] < 30
        assert row(results, "policy", group)["failures"] == {"failure": 0, "timeout": 8}
        assert row(results, "swap", group)["original"]["successes"] == row(results, "blank", group)["successes"] == 0
        assert row(results, "random", group)["rate"] <= 0.5
    assert len(results["clips"]) == 2 and all((tmp_path / c["file"]).stat().st_size > 1000 for c in results["clips"])


def test_the_expert_on_the_swapped_task_is_a_failure_of_the_original(tabletop):
    """The real judges: doing the given thing is never counted as the originally named one."""
    count = tabletop.open("tabletop", 64, 8, 1)
    pairs = [("lift-red", "lift-blue"), ("touch-red", "touch-blue"), ("push-red-left", "push-red-right")]
    jobs = [
        Job(i, "swap", task[:4], task, 900_000 + i, "", given=given, controller="expert") for i, (task, given) in enumerate(pairs)
    ]
    outcomes, _ = run_jobs(tabletop, count, Still(), "tabletop", jobs, execute=4, decode=None, width=4)
    assert [(o.success, o.original) for o in outcomes.values()] == [(True, False)] * 3
