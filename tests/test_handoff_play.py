"""Episodes in which something goes wrong: what is disturbed, what help would have done, and the whole way once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_sims
import numpy as np
import pytest
from fake_sims import FakePolicy

from vla.cli import main
from vla.errors import UsageError
from vla.handoff import learning
from vla.handoff.collecting import collect, scenes_of
from vla.handoff.play import Live, Look, Scene, Stage
from vla.handoff.rollouts import load
from vla.handoff.trouble import TROUBLES, Trouble, check_troubles
from vla.policy import load_policy

MOVES = np.array([True, True, True, False])


def picture(seed: int = 0, size: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 200, (size, size, 3)).astype(np.uint8)


def shown(kind: str, seed: int = 3, step: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """(a picture, what becomes of it late in an episode)."""
    clean = picture()
    observation = {"images": {"front": clean}, "state": np.zeros(4, np.float32)}
    return clean, Trouble(kind, seed, 40).see(observation, step)["images"]["front"]


@pytest.mark.parametrize("kind", list(TROUBLES))
def test_a_kind_disturbs_its_own_thing_and_the_same_every_time(kind: str):
    clean, seen = shown(kind)
    again = shown(kind)[1]
    np.testing.assert_array_equal(seen, again)
    assert seen.shape == clean.shape and seen.dtype == np.uint8
    assert (seen != clean).any() == (kind in ("occlusion", "noise", "brightness", "shift"))
    action = np.array([0.5, -0.5, 1.0, 0.7], np.float32)
    given = Trouble(kind, 3, 40).act(action, MOVES)
    assert (given != action).any() == (kind == "gain") and given[3] == action[3]
    assert Trouble(kind, 3, 40).randomise == (kind == "physics")


def test_half_begin_later_and_severity_says_how_much():
    troubles = [Trouble("noise", seed, 40) for seed in range(400)]
    late = [t for t in troubles if t.begins]
    assert 0.4 < len(late) / 400 < 0.6 and max(t.begins for t in late) <= 10
    clean = {"images": {"front": picture()}, "state": np.zeros(4, np.float32)}
    assert late[0].see(clean, late[0].begins - 1)["images"]["front"] is clean["images"]["front"]
    by = sorted(troubles, key=lambda t: t.severity)
    weak, strong = (np.abs(t.see(clean, 30)["images"]["front"].astype(int) - picture()).mean() for t in (by[0], by[-1]))
    assert by[0].severity < 0.05 and by[-1].severity > 0.95 and weak < strong


def test_kinds_a_suite_cannot_have_are_refused():
    assert check_troubles(["all"], "tabletop") == list(TROUBLES)
    assert set(TROUBLES) - set(check_troubles(["all"], "metaworld")) == {"physics", "shove"}
    assert check_troubles(["noise", "noise", "none"], "fetch") == ["noise", "none"] and check_troubles([], "fetch") == ["none"]
    for kinds, suite in ((["shove"], "metaworld"), (["rain"], "tabletop")):
        with pytest.raises(UsageError, match="--perturb"):
            check_troubles(kinds, suite)


def test_a_shove_moves_the_named_cube_and_neither_fulfils_nor_spoils(table: Any):
    moved = 0
    for seed in range(30):
        table.reset(seed=seed, options={"task": "push-blue-left", "render": False})
        trouble = Trouble("shove", seed, 40)
        for step in range(12):  # the hand stays where it is
            _, before = table.places()
            trouble.before(table, step)
            _, after = table.places()
            far = {colour: float(np.linalg.norm(after[colour] - before[colour])) for colour in before}
            moved += far["blue"] > 0.015
            assert max(far[c] for c in far if c != "blue") < 1e-6 and far["blue"] < 0.062
            info = table.step(np.zeros(4), render=False)[4]
            assert not info["success"] and not info["failure"]
    assert moved > 20


def test_scenes_are_dealt_to_groups_in_turn_and_follow_from_their_seeds():
    room = fake_sims.SUITES["lone"]  # every task its own group
    scenes = scenes_of(room, ["reach-red", "reach-blue"], ["none", "noise"], 40, 1000)
    assert [s.task for s in scenes[:4]] == ["reach-red", "reach-blue"] * 2 and {s.trouble for s in scenes} == {"none", "noise"}
    assert scenes_of(room, ["reach-red", "reach-blue"], ["none", "noise"], 10, 1030) == scenes[30:]


def test_what_a_collection_holds(tmp_path: Path):
    """The fake policy that always goes to the middle succeeds in a third of the scenes."""
    policy: Any = FakePolicy("blind")
    found = collect(policy, "fake", None, 40, 1000, perturb=["none"], samples=2, relief=True, out=tmp_path, progress=False,
                    sims="fake_sims")  # fmt: skip
    assert 4 < found.success.sum() < 25 and found.features is None and found.relief is not None
    assert found.scores.keys() == {"entropy", "entropy_max", "overlap", "spread", "stac"}
    assert np.allclose(found.scores["entropy"], 0.5) and np.allclose(found.scores["spread"], 0)
    assert (found.step[found.starts[:-1]] == 0).all() and (
        np.diff(found.step)[found.of_episode[1:] == found.of_episode[:-1]] == 4
    ).all()
    assert found.relief[found.starts[:-1]].all(), "asked at once, the expert does it"
    wrong = ~found.success & found.episodes["failure"]
    assert wrong.any()
    again = load([tmp_path])
    np.testing.assert_array_equal(again.success, found.success)
    np.testing.assert_array_equal(again.relief, found.relief)
    assert again.meta["policy"] == policy.fingerprint and again.meta["perturb"] == ["none"] and again.meta["execute"] == 4
    twice = collect(policy, "fake", None, 40, 1000, perturb=["none"], samples=2, relief=True, progress=False, sims="fake_sims")
    for name in found.scores:
        np.testing.assert_array_equal(twice.scores[name], found.scores[name])


def test_help_that_comes_too_late_is_of_no_use():
    """In the fake simulator a wrong way is declared a failure at y > 0.1; until then one can still turn."""
    stage = Stage("fake", 64, "fake_sims")
    for seed in range(1000, 1010):
        live = Live(Scene("reach-red", seed, "none"), stage, np.ones(4))
        wrong = 0.2 if live.sim.x["red"] < 0.1 else -0.2
        far, n = np.array([np.sign(wrong), 0, 0, 0], np.float32), 0
        while not live.over:
            rows = np.stack([far if n < 10 else np.array([0, 1, 0, 0], np.float32)] * 4)
            live.look(Look(SimpleNamespace(actions=rows, confidence=np.ones_like(rows)), None, None), 4)
            n += 4
        live.relieve()
        rollout = live.close()
        assert not rollout.success and rollout.failure and rollout.relief[0]
        assert len(rollout.relief) == len(rollout.at) and live.sim.max_steps == 40


def test_what_does_not_fit_is_refused(tmp_path: Path):
    policy: Any = FakePolicy()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"seed": 5}, "trained on"), ({"samples": 1}, "samples"), ({"execute": 9}, "execute"),
        ({"perturb": ["shove"]}, "--perturb"),
    ]  # fmt: skip
    for kw, words in wrong:
        with pytest.raises(UsageError, match=words):
            collect(policy, "fake", None, 3, **{"seed": 1000, "progress": False, "sims": "fake_sims", **kw})
    with pytest.raises(UsageError, match="episodes"):
        collect(policy, "fake", None, 0, 1000, progress=False, sims="fake_sims")


def test_the_whole_way_with_a_real_policy(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """nano-base: collected with every trouble, calibrated, reported, watched; the incidents are a dataset of real pictures."""
    monkeypatch.setattr(learning, "EPOCHS", 40)
    folder = tmp_path / "policy"
    shutil.copytree(checkout / "models" / "nano-base", folder)
    policy = load_policy(folder, "cpu")
    played = ["--suite", "tabletop", "--task", "touch", "push"]

    def run(*words: str) -> dict:
        assert main(["handoff", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    for name, seed, episodes in (("train", 500_000, 48), ("held", 600_000, 36), ("report", 900_000, 36)):
        more = ["--samples", "4", *(["--relief"] if name == "report" else []), "--out", str(tmp_path / name)]
        told = run("collect", str(folder), *played, "--episodes", str(episodes), "--seed", str(seed), *more)
        assert 0 < told["successes"] < told["episodes"] == episodes
    meaning = run("calibrate", str(folder), "--train", str(tmp_path / "train"), "--calibrate", str(tmp_path / "held"),
                  "--alpha", "0.2", "--score", "learned")  # fmt: skip
    assert meaning["policy"] == policy.fingerprint and meaning["n"] >= 15
    found = run("report", str(folder), "--rollouts", str(tmp_path / "report"))
    assert (
        found["detectors"]["learned"]["auroc"]["value"] > 0.6 and found["always_asking"]["rate"] > found["never_asking"]["rate"]
    )
    assert load_policy(folder, "cpu").fingerprint == policy.fingerprint, "a policy with a gate is the same policy"
    seen = run("watch", str(folder), *played, "--episodes", "10", "--seconds", "1", "--out", str(tmp_path / "incidents"))
    assert sum(seen["ends"].values()) == 10 and seen["questions"] > 0 and seen["lost"] == 0
    assert seen["incidents"] == 10 - seen["ends"].get("succeeded", 0)
    lines = [json.loads(line) for line in (tmp_path / "incidents/meta/incidents.jsonl").read_text().splitlines()]
    asked = next(line for line in lines if line["incidents"][0]["kind"] == "handoff")
    assert asked["incidents"][0]["reason"].startswith("ask: ") and asked["incidents"][0]["scores"].keys() >= {
        "learned",
        "entropy",
    }
    start, stop, by = asked["spans"][-1]
    assert by == "expert" and start == asked["incidents"][0]["frame"] <= 10, "a second from before, then the expert"
    stopped = run(
        "watch", str(folder), *played, "--episodes", "4", "--respond", "hold=0.3", "--out", str(tmp_path / "held-still")
    )
    assert stopped["questions"] == 0 and set(stopped["ends"]) <= {"succeeded", "failed", "stopped (hold)"}
