"""Recording: repeatable whatever the workers do, interruptible at any moment, honest about what failed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from children import LIMIT
from small_datasets import ToySim, content

import data_tools.record as recorder
from data_tools.record import demonstrate, record
from vla.cli import main
from vla.episodes import EpisodeStore
from vla.errors import DataError, UsageError

TASKS = ["touch-red", "touch-green", "lift-blue"]


def toy(out: Path, episodes: int = 14, workers: int = 0, tasks: list[str] | None = None, **kw) -> dict:
    return record("tabletop", tasks or TASKS, episodes, 100, out, workers=workers, image_size=32, progress=False,
                  make=kw.pop("make", ToySim), **kw)  # fmt: skip


def test_counts_seeds_and_order(tmp_path: Path):
    summary = toy(tmp_path / "ds", 14)
    meta = json.loads((tmp_path / "ds/meta/recording.json").read_text())
    assert summary["episodes"] == 14 and summary["tried"] - summary["failed"] == 14
    # Task k of 3 has the scenes 100 + k, 103 + k, ...; those that end in 7 fail; the rest are kept in order.
    expected, counts = [], {task: {"tried": 0, "kept": 0} for task in TASKS}
    quota = dict(zip(TASKS, (5, 5, 4), strict=True))
    for i in range(60):
        task = TASKS[i % 3]
        if counts[task]["kept"] < quota[task]:
            counts[task]["tried"] += 1
            if (100 + i) % 10 != 7:
                counts[task]["kept"] += 1
                expected.append({"episode_index": len(expected), "task": task, "seed": 100 + i})
    hashes = [episode.pop("pixels")["front"] for episode in meta["episodes"]]
    assert len(set(hashes)) == 14 and all(len(digest) == 64 for digest in hashes)
    assert meta["episodes"] == expected and summary["tasks"] == counts == meta["tasks"]
    assert (meta["suite"], meta["version"]) == ("tabletop", 1) and meta["noise"]["sigma"] == 0.3
    store = EpisodeStore.open(tmp_path / "ds", tmp_path / "cache", progress=False)
    assert store.instructions == ["touch-red it", "touch-green it", "lift-blue it"]
    assert sum(map(len, store.recorded_seeds.values())) == len(set(sum(store.recorded_seeds.values(), []))) == 14


def test_workers_do_not_change_the_dataset(tmp_path: Path):
    here, there = toy(tmp_path / "here"), toy(tmp_path / "there", workers=2)
    assert content(tmp_path / "here", tmp_path / "cache") == content(tmp_path / "there", tmp_path / "cache")
    assert here["tasks"] == there["tasks"] and here["failed"] == there["failed"] > 0
    one, two = (json.loads((tmp_path / name / "meta/recording.json").read_text()) for name in ("here", "there"))
    assert one == two


def test_the_label_is_clean_and_what_is_seen_comes_before_it():
    sim = ToySim("tabletop", "touch-red", 32)
    noisy = clean = 0
    for seed in range(40):
        sim.executed = []
        episode = demonstrate(sim, seed, noise=True)
        if episode is None:
            continue
        executed = np.array(sim.executed, np.float32)
        assert len(executed) == len(episode) and np.abs(executed).max() <= 1
        disturbed = not np.array_equal(executed, episode.action)
        noisy, clean = noisy + disturbed, clean + (not disturbed)
        assert np.array_equal(executed[:, 3], episode.action[:, 3]), "the gripper is never disturbed"
        # The expert is a function of the place seen in the same row.
        assert np.allclose(episode.action[:, :3], np.clip(-4 * episode.state[:, :3], -1, 1), atol=1e-5)
        assert np.allclose(episode.state[1:, :3] - episode.state[:-1, :3], 0.15 * executed[:-1, :3], atol=1e-5)
    assert noisy > clean > 5
    quiet = demonstrate(sim, 3, noise=False)
    sim.executed = []
    again = demonstrate(sim, 3, noise=False)
    assert quiet is not None and again is not None and np.array_equal(quiet.action, np.array(sim.executed))


def test_running_it_again_continues_extends_and_never_repeats(tmp_path: Path):
    toy(tmp_path / "whole", 11)
    toy(tmp_path / "ds", 4)
    again = toy(tmp_path / "ds", 11)
    assert again["recorded_now"] == 7 and again["episodes"] == 11
    assert toy(tmp_path / "ds", 11)["recorded_now"] == 0 and toy(tmp_path / "ds", 5)["episodes"] == 11
    seeds = [e["seed"] for e in json.loads((tmp_path / "ds/meta/recording.json").read_text())["episodes"]]
    assert len(set(seeds)) == 11
    assert sorted(content(tmp_path / "ds", tmp_path / "c")) == sorted(content(tmp_path / "whole", tmp_path / "c"))
    with pytest.raises(UsageError, match="task_order"):
        toy(tmp_path / "ds", 11, tasks=["touch-red"])
    with pytest.raises(UsageError, match="a dataset"):
        toy(tmp_path / "ds", 11, resume=False)


_RECORD = """
import sys
sys.path[:0] = {paths!r}
import vla.recording.writer as lerobot
lerobot._COMMIT_SECONDS, lerobot._COMMIT_SHARE = 0.05, 0.5
from data_tools.record import record
from small_datasets import slow_toy
if __name__ == "__main__":
    record("tabletop", {tasks!r}, 24, 100, sys.argv[1], workers={workers}, image_size=32, progress=False, make=slow_toy)
"""


@pytest.mark.parametrize(("workers", "kills"), [(0, 2), (2, 1)])
def test_killed_at_any_moment_and_run_again_equals_never_killed(tmp_path: Path, workers: int, kills: int):
    """SIGKILL, with commits as often as possible; the dataset opens after each."""
    toy(tmp_path / "whole", 24)
    expected = content(tmp_path / "whole", tmp_path / "cache")
    script, out, info = tmp_path / "run.py", tmp_path / "ds", tmp_path / "ds/meta/info.json"
    script.write_text(_RECORD.format(paths=[str(Path(__file__).parent), *sys.path], tasks=TASKS, workers=workers))
    stopped_at, rng = [], np.random.default_rng(workers)

    def committed() -> int:
        return json.loads(info.read_text())["total_episodes"] if info.exists() else 0

    for _ in range(kills):
        process = subprocess.Popen([sys.executable, script, out])
        began = committed()
        while process.poll() is None and committed() < began + 3:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait(60)
        stopped_at.append(committed())
        assert content(out, tmp_path / "cache") == expected[: stopped_at[-1]]
    assert [0, *stopped_at, 24] == sorted({0, *stopped_at, 24}), f"the kills came at {stopped_at}, not during a recording"
    subprocess.run([sys.executable, script, out], check=True, timeout=LIMIT)
    assert content(out, tmp_path / "cache") == expected
    one, two = (json.loads((r / "meta/recording.json").read_text()) for r in (tmp_path / "whole", out))
    assert one == two
    assert json.loads((out / "meta/stats.json").read_text()) == json.loads((tmp_path / "whole/meta/stats.json").read_text())


class Hopeless(ToySim):
    """Solves its first three scenes and none after."""

    def reset(self, *, seed: int, options: dict | None = None):
        out = super().reset(seed=seed)
        self.solvable = seed < 103
        return out


def test_an_expert_that_always_fails_is_reported_and_the_rest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recorder, "_GIVE_UP", 8)
    with pytest.raises(DataError, match="8 failed attempts in a row"):
        toy(tmp_path / "ds", 9, tasks=["touch-red"], make=Hopeless)
    assert len(content(tmp_path / "ds", tmp_path / "cache")) == 3


class Mortal(ToySim):
    """Takes its process with it in scene 109."""

    def reset(self, *, seed: int, options: dict | None = None):
        if seed == 109:
            os._exit(3)
        return super().reset(seed=seed)


def test_a_worker_that_dies_is_reported_and_what_came_before_is_kept(tmp_path: Path):
    from vla.errors import MachineError

    with pytest.raises(MachineError, match="a worker process died"):
        toy(tmp_path / "ds", 20, workers=2, make=Mortal)
    recorded = json.loads((tmp_path / "ds/meta/recording.json").read_text())["episodes"] if (
        tmp_path / "ds/meta/recording.json"
    ).exists() else []  # fmt: skip
    assert all(e["seed"] < 109 for e in recorded)
    assert toy(tmp_path / "ds", 20)["episodes"] == 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "tabeltop"], "tabletop"), (["--suite", "tabletop", "--task", "tuch"], "touch"),
        (["--suite", "tabletop", "--episodes", "0"], "--episodes"), (["--suite", "tabletop", "--size", "4"], "--size"),
    ],
)  # fmt: skip
def test_the_command_refuses_nonsense_and_writes_nothing(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    line = ["data", "record", "--episodes", "2", "--out", str(tmp_path / "ds"), *arguments]
    assert main(line) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "ds").exists()


@pytest.mark.parametrize("given", [["--task", "a", "b"], ["--task", "a", "--task", "b"]])
def test_tasks_are_listed_or_repeated(given: list[str]):
    parser = argparse.ArgumentParser()
    recorder.add_record_parser(parser.add_subparsers())
    line = ["record", "--suite", "tabletop", *given, "--episodes", "2", "--out", "ds"]
    assert parser.parse_args(line).task == ["a", "b"]
    assert parser.parse_args([w for w in line if w not in given]).task is None


def test_the_command_records_both_simulators(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("mujoco")
    for suite, task in (("tabletop", "touch-red"), ("metaworld", "button-press-topdown-v3")):
        if suite == "metaworld":
            pytest.importorskip("metaworld")
        out = tmp_path / suite
        line = ["data", "record", "--suite", suite, "--task", task, "--episodes", "2", "--out", str(out), "--json"]
        assert main([*line, "--workers", "1"]) == 0
        summary = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        store = EpisodeStore.open(out, tmp_path / "cache", progress=False)
        assert summary["episodes"] == store.num_episodes == 2 and summary["frames"] == store.num_frames
        assert store.frame(store.cameras[0], 0).shape == (64, 64, 3)
        assert store.frame(store.cameras[0], 0).std() > 5, "an empty picture"
        low, high = store.spec.limits("action")
        assert (store.action >= low).all() and (store.action <= high).all()
        if suite == "tabletop":
            assert store.instructions == ["touch the red cube"]
