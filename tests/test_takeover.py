"""Takeover collection: whose steps are kept, which scenes are played, and that nothing but the arguments decides."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_sims import TASKS, FakePolicy, FakeSim, fake_pool

import vla.takeover as takeover
from vla.episodes import EpisodeStore
from vla.errors import MachineError, UsageError
from vla.mixture import MixtureConfig, open_mixture
from vla.schema import Window
from vla.takeover import collect, label_logged

EPISODES = "meta/episodes/chunk-000/file-000.parquet"


@pytest.fixture(scope="module")
def pool():
    with fake_pool() as running:
        yield running


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(takeover, "WIDTH", 5)


def go(learner, out: Path, pool, episodes: int = 24, seed: int = 1000, **kw):
    return collect(learner, "fake", None, episodes, seed, out, pool=pool, sims="fake_sims", progress=False, **kw)


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "meta/takeover.jsonl").read_text().splitlines()]


def recorded(out: Path) -> list[dict]:
    return json.loads((out / "meta/recording.json").read_text())["episodes"]


def digests(out: Path) -> dict[str, str]:
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.rglob("*")) if p.is_file()}


class Wavering(FakePolicy):
    """What it says depends on how many it is asked at once, as a network's last bits may. Stops at its `calls`-th answer."""

    def __init__(self, kind: str = "blind", calls: int = 10**6) -> None:
        super().__init__(kind)
        self.calls = calls

    def act_batch(self, observations, instructions, embodiment, **kw):
        if len(self.batches) == self.calls:
            raise KeyboardInterrupt
        chunks = super().act_batch(observations, instructions, embodiment, **kw)
        for chunk in chunks:
            chunk.actions[:, 0] += np.float32(0.01 * len(observations))
        return chunks


def replay(line: dict, learner: FakePolicy, teacher: FakePolicy | None) -> tuple[list, list]:
    """(states before, actions) of what comes after the takeover in the scene of a line of the log, played here."""
    sim = FakeSim(line["task"], 64)
    seen, _ = sim.reset(seed=line["seed"], options={"task": line["task"]})
    told, states, actions = f"reach {line['task'][6:]}", [], []

    def chunk(policy: FakePolicy) -> np.ndarray:
        return policy.act_batch([seen], [told], "tabletop", seeds=[0])[0].actions[:4]

    for n in range(line["takeover"]):
        if n % 4 == 0:
            plan = chunk(learner)
        seen, *_ = sim.step(plan[n % 4])  # pyright: ignore[reportPossiblyUnboundVariable]
    over, n = False, 0
    while not over:
        if n % 4 == 0:
            plan = chunk(teacher) if teacher else np.zeros(0)
        states.append(seen["state"])
        actions.append(plan[n % 4] if teacher else sim.expert())  # pyright: ignore[reportPossiblyUnboundVariable]
        seen, _, ended, late, _ = sim.step(actions[-1])
        over, n = ended or late, n + 1
    return states, actions


@pytest.mark.parametrize("who", ["expert", "teacher"])
def test_what_is_kept_is_the_labellers_alone(who: str, pool, tmp_path: Path):
    learner, teacher = FakePolicy("blind"), FakePolicy() if who == "teacher" else None
    summary = go(learner, tmp_path / "ds", pool, labeller=teacher or "expert", alone=0.2, reach=0.8)
    lines, store = log_of(tmp_path / "ds"), EpisodeStore.open(tmp_path / "ds", tmp_path / "cache", progress=False)
    assert [(line["seed"], line["task"]) for line in lines] == [(1000 + n, TASKS[n % 3]) for n in range(24)]
    kept = [line for line in lines if line["end"] == "labeller succeeded"]
    assert len(kept) == store.num_episodes == summary["episodes"] > 8 and len({line["takeover"] for line in kept}) > 4
    assert [(e["seed"], e["task"]) for e in recorded(tmp_path / "ds")] == [(line["seed"], line["task"]) for line in kept]
    for n, line in enumerate(kept):
        rows = slice(*store.episode_starts[n : n + 2])
        states, actions = replay(line, learner, teacher)
        np.testing.assert_array_equal(store.state[rows], states)
        np.testing.assert_allclose(store.action[rows], actions, atol=1e-6)
        assert len(actions) == line["steps"] - line["takeover"]
        assert store.instructions[store.task_of_episode[n]] == f"reach {line['task'][6:]}"
        first, sim = int(store.episode_starts[n]), FakeSim(line["task"], 64)
        picture = sim.reset(seed=line["seed"], options={})[0]["images"]["front"]
        np.testing.assert_array_equal(store.frame("front", first), picture)
    assert bool(teacher and teacher.batches) == (who == "teacher")
    assert summary["ends"] == Counter(line["end"] for line in lines) and sum(summary["ends"].values()) == summary["scenes"] == 24
    assert {task: (t["scenes"], t["kept"]) for task, t in summary["tasks"].items()} == {
        task: (8, sum(line["task"] == task for line in kept)) for task in TASKS
    }


def test_scenes_left_alone_measure_the_learner_and_add_nothing(pool, tmp_path: Path):
    honest = go(FakePolicy(), tmp_path / "honest", pool, alone=1.0, episodes=12)
    assert honest["success_of_learner"] == {
        "n": 12, "successes": 12, "rate": 1.0, "low": pytest.approx(0.7575, abs=1e-3), "high": 1.0,
        "groups": {"reach": {"n": 12, "successes": 12, "rate": 1.0, "low": pytest.approx(0.7575, abs=1e-3), "high": 1.0}},
    }  # fmt: skip
    assert honest["episodes"] == 0 and honest["ends"] == {"learner succeeded": 12}
    deaf = go(FakePolicy("deaf"), tmp_path / "deaf", pool, episodes=60)
    alone = [line for line in log_of(tmp_path / "deaf") if line["takeover"] is None]
    assert 6 <= len(alone) == deaf["success_of_learner"]["n"] <= 26
    assert deaf["success_of_learner"]["successes"] == sum(line["task"] == "reach-red" for line in alone)
    assert not {line["seed"] for line in alone} & {e["seed"] for e in recorded(tmp_path / "deaf")}
    never = go(FakePolicy("deaf"), tmp_path / "never", pool, alone=0.0, episodes=12)
    assert never["success_of_learner"]["n"] == 0 and never["success_of_learner"]["rate"] is None


def test_an_expert_from_the_first_step(pool, tmp_path: Path):
    learner = FakePolicy("deaf")
    summary = go(learner, tmp_path / "ds", pool, alone=0.0, reach=0.0, episodes=6)
    assert summary["ends"] == {"labeller succeeded": 6} and not learner.batches
    assert summary["usual_steps"].keys() == set(TASKS)


def test_neither_processes_nor_interruptions_nor_batches_change_a_bit(pool, tmp_path: Path):
    whole = tmp_path / "whole"
    learner = Wavering()
    summary = go(learner, whole, pool)
    assert len(set(learner.batches)) > 2 and summary["episodes"] > 6
    with fake_pool(1) as one:
        go(Wavering(), tmp_path / "one", one)
        for calls in (3, len(learner.batches) // 2):
            with pytest.raises(KeyboardInterrupt):
                go(Wavering(calls=calls), tmp_path / "cut", one)
        partly = len(recorded(tmp_path / "cut"))
        assert 0 < partly < summary["episodes"]
        assert recorded(tmp_path / "cut") == recorded(whole)[:partly]
        rest = go(Wavering(), tmp_path / "cut", one)
    assert digests(tmp_path / "one") == digests(whole)
    assert rest["recorded_now"] == summary["episodes"] - partly and log_of(tmp_path / "cut") == log_of(whole)
    cut, uncut = digests(tmp_path / "cut"), digests(whole)
    assert {name for name in uncut if cut[name] != uncut[name]} <= {EPISODES}  # Parquet pages follow the commits, values do not
    assert pq.read_table(tmp_path / "cut" / EPISODES).equals(pq.read_table(whole / EPISODES))
    again = Wavering()
    assert go(again, whole, pool)["recorded_now"] == 0 and not again.batches and digests(whole) == digests(tmp_path / "one")
    assert {k: v for k, v in rest.items() if k not in ("seconds", "out", "recorded_now")} == {
        k: v for k, v in summary.items() if k not in ("seconds", "out", "recorded_now")
    }


def test_a_lost_log_stores_nothing_twice_and_more_scenes_extend(pool, tmp_path: Path):
    go(Wavering(), tmp_path / "whole", pool)
    go(Wavering(), tmp_path / "ds", pool, episodes=15)
    (tmp_path / "ds/meta/takeover.jsonl").unlink()
    summary = go(Wavering(), tmp_path / "ds", pool)
    assert recorded(tmp_path / "ds") == recorded(tmp_path / "whole") and summary["scenes"] == 24
    assert log_of(tmp_path / "ds") == log_of(tmp_path / "whole")


def test_refusals(pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(match: str, **kw):
        with pytest.raises(UsageError, match=match):
            go(FakePolicy(), tmp_path / "ds", pool, **kw)
        assert not (tmp_path / "ds").exists()

    refused("scenes no evaluation uses", seed=499_990)
    refused("scenes no evaluation uses", seed=900_000)
    refused("the learner was trained on .*25", seed=25)
    refused("the learner was trained on", seed=0)
    refused("alone", alone=1.5)
    refused("reach", reach=-1.0)
    refused("execute", execute=9)
    refused("episodes", episodes=0)
    refused("labeller", labeller="human")
    stranger = FakePolicy()
    stranger.embodiments = {}
    refused("embodiments \\[\\]", labeller=stranger)
    go(FakePolicy(), tmp_path / "ds", pool, episodes=5)
    other = FakePolicy("blind")
    other.fingerprint = "0" * 64
    for learner, labeller, alone in ((other, "expert", 0.25), (FakePolicy(), "expert", 0.5), (FakePolicy(), other, 0.25)):
        with pytest.raises(UsageError, match="the settings it was begun with"):
            go(learner, tmp_path / "ds", pool, labeller=labeller, alone=alone)


def test_a_process_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAKE_SIM", "die")
    with fake_pool() as dying, pytest.raises(MachineError, match="no GPU, goodbye"):
        go(FakePolicy(), tmp_path / "ds", dying)


# ---- labels for logged deployments ----


def test_logged_states_are_labelled_by_the_teacher(pool, tmp_path: Path):
    go(FakePolicy("blind"), tmp_path / "logged", pool, alone=0.0)
    teacher = FakePolicy()
    summary = label_logged(tmp_path / "logged", teacher, tmp_path / "out", batch=7, cache_dir=tmp_path / "c", progress=False)
    before, after = (EpisodeStore.open(tmp_path / n, tmp_path / "c", progress=False) for n in ("logged", "out"))
    assert summary["episodes"] == after.num_episodes == before.num_episodes and max(teacher.batches) == 7
    np.testing.assert_array_equal(before.state, after.state)
    every = np.arange(before.num_frames)
    np.testing.assert_array_equal(before.frames("front", every), after.frames("front", every))
    for t in range(0, before.num_frames, 5):
        seen = {"images": {"front": before.frame("front", t)}, "state": before.state[t]}
        said = teacher.act_batch([seen], [before.instructions[before.task_of_frame[t]]], "tabletop", seeds=[0])[0].actions[0]
        np.testing.assert_array_equal(after.action[t], said)
    np.testing.assert_allclose(summary["moved"], np.abs(after.action - before.action).mean(0), atol=1e-5)
    assert after.recorded_seeds == before.recorded_seeds and after.suite == "fake"
    assert label_logged(tmp_path / "logged", teacher, tmp_path / "out", batch=7, cache_dir=tmp_path / "c",
                        progress=False)["recorded_now"] == 0  # fmt: skip
    other = FakePolicy("deaf")
    other.fingerprint = "0" * 64
    with pytest.raises(UsageError, match="the settings it was begun with"):
        label_logged(tmp_path / "logged", other, tmp_path / "out", cache_dir=tmp_path / "c", progress=False)


# ---- the real tabletop ----


class Still(FakePolicy):
    """Knows the tabletop and does nothing."""

    def act_batch(self, observations, instructions, embodiment, **kw):
        for observation in observations:
            self.embodiments[embodiment].check_observation(observation, "shown to the policy")
        zeros = np.zeros((self.chunk, 4), np.float32)
        return [SimpleNamespace(actions=zeros, confidence=zeros, symbols=zeros.astype(int)) for _ in observations]


def test_the_tabletop_and_a_mixture_with_demonstrations(tmp_path: Path):
    pytest.importorskip("mujoco")
    from data_tools.record import record

    tasks = ["touch-red", "lift-blue"]
    summary = collect(Still(), "tabletop", tasks, 8, 300_000, tmp_path / "round", alone=0.0, workers=2, progress=False)
    assert summary["ends"] == {"labeller succeeded": 8} and all(4 < n < 30 for n in summary["usual_steps"].values())
    record("tabletop", tasks, 4, 0, tmp_path / "demos", workers=0, progress=False)
    config = MixtureConfig.model_validate({
        "datasets": [{"path": str(tmp_path / name), "weight": 1.0} for name in ("demos", "round")],
        "cache_dir": str(tmp_path / "cache"), "holdout": 0.0,
    })  # fmt: skip
    mixture, _ = open_mixture(config, 8, 0, progress=False)
    windows = [window.validate() for n in range(24) if isinstance(window := mixture.window(n), Window)]
    assert len(windows) == 24
    assert {Path(w.source.split(":")[0]).name for w in windows} == {"demos", "round"}
    assert {w.embodiment for w in windows} == {"tabletop"} and {w.instruction for w in windows} == {
        "touch the red cube", "lift the blue cube",
    }  # fmt: skip
