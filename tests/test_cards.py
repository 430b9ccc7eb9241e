"""Cards: every fact a stranger needs is in them, as recorded; the real client can read their metadata."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import DatasetCard, ModelCard
from small_datasets import make_episode, small_spec, write_dataset
from small_policies import small_policy, write_evaluation, write_policy, write_small_adapter

from vla.cards import dataset_card, failures, measure_latency, policy_card, read_evaluations
from vla.cli import main
from vla.config import validate
from vla.episodes import EpisodeStore
from vla.policy import VLAPolicy, load_policy
from vla.recording import LeRobotWriter
from vla.train import TrainConfig, train

COMMIT = "0f" * 20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("card")
    write_policy(root)
    return root


def test_every_fact_is_in_the_card_and_as_recorded(root: Path):
    policy = load_policy(root / "policy", "cpu")
    start = {"kind": "policy", "path": "someone/base", "revision": COMMIT, "fingerprint": "ab" * 32}
    policy.provenance = policy.provenance | {"start": start}
    result = write_evaluation(root / "eval/tabletop.json", policy.fingerprint, 31, 40)
    latency = {"robot": "tabletop", "runs": 20, "p50_ms": 12.3, "p95_ms": 45.6, "device": "cpu", "threads": 1, "machine": "x"}
    card = policy_card(policy, "you/small", [result], latency, "apache-2.0", ["It drops things."], "Words of my own.")
    meaning = json.loads((root / "policy/policy.json").read_text())
    (data,) = meaning["provenance"]["datasets"]
    spec = policy.embodiments["tabletop"]
    facts = {
        "base and revision": f"`someone/base` (a policy), revision `{COMMIT}`, fingerprint `{'ab' * 32}`",
        "data hash": data["fingerprint"], "episodes": f"| {data['episodes']} | {data['frames']} |",
        "rate": f"{spec.control_hz:g} Hz", "camera": "`front` 32x32",
        "evaluation": "| tabletop | push | 31/40 | 78 [62, 88] |", "control": "| push | blank | 20/40 | 50 [35, 65] |",
        "task by task": "| push the red cube | push-red |", "seeds": "tabletop from 900000",
        "latency": "p50 12.3 ms, p95 45.6 ms (20 runs, cpu, 1 thread(s), x)",
        "known failure": "- It drops things.", "seen failure": "- tabletop, push: 31 of 40 [62, 88] succeed (9 wrong",
        "seen blindness": "succeed under the control `blank`", "licence": "## Licence\n\napache-2.0", "about": "Words of my own.",
        "fingerprint": policy.fingerprint, "versions": f"transformers {meaning['versions']['transformers']}",
        "how to use it": 'load_policy("you/small")',
    }  # fmt: skip
    assert not {what: words for what, words in facts.items() if words not in card}
    for channel in (*spec.action, *spec.state):
        for dim, low, high in zip(channel.dims, channel.low, channel.high, strict=True):
            row = f"{channel.name}.{dim} | {channel.convention} | {channel.unit} | {channel.frame} | {low:g} | {high:g} |"
            assert f"| action | {row}" in card or f"| state | {row}" in card
    assert all(f"- {sentence}\n" in card for sentence in policy.instructions)
    assert str(root) not in card, "folders of the author's machine are nobody's business"


def test_the_metadata_are_the_hubs_own(root: Path):
    policy = load_policy(root / "policy", "cpu")
    path = f"/x/hub/datasets--someone--thing/snapshots/{COMMIT}"
    start = {"kind": "model", "path": "someone/vlm", "revision": COMMIT}
    entry = {"path": path, "robot": "tabletop", "episodes": 3, "frames": 9, "fingerprint": "cd" * 32}
    policy.provenance = policy.provenance | {"start": start, "datasets": [entry]}
    result = write_evaluation(root / "eval/other.json", policy.fingerprint, 31, 40)
    text = policy_card(policy, "you/small", [result], None, "mit")
    data: Any = ModelCard(text).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "tendon-vla", "robotics")
    assert data.base_model == "someone/vlm" and data.datasets == ["someone/thing"] and "tabletop" in (data.tags or [])
    (found,) = data.eval_results
    assert (found.dataset_type, found.metric_type, found.metric_value) == ("tabletop", "success_rate", 77.5)
    assert "31 of 40" in str(found.metric_name) and f"someone/thing@{COMMIT}" in text


def test_what_is_not_recorded_is_said_to_be_missing(root: Path):
    policy = load_policy(root / "policy", "cpu")
    text = policy_card(policy, "you/small")
    for words in ("None: trained from random weights.", "None was recorded for these weights. Do not trust it with a robot.",
                  "Not measured.", "Not stated by the author", "is untried"):  # fmt: skip
        assert words in text
    data: Any = ModelCard(text).data
    assert data.license == "unknown" and data.base_model is None and data.eval_results is None
    policy.provenance = {}
    assert "Not recorded." in policy_card(policy, "you/small") and "No instructions recorded." in policy_card(policy, "you/small")


def test_an_adapters_card_names_its_base(root: Path, tmp_path: Path):
    policy = write_small_adapter(tmp_path, root / "policy")
    text = policy_card(policy, "you/lora")
    size = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert f"of which this adapter brings {size:,}" in text and f"fingerprint `{policy.adapter.base['fingerprint']}`" in text
    assert "`policy` (a policy), a folder of the author's" in text and "base_model" not in text and str(tmp_path) not in text
    policy.adapter.base["path"] = f"someone/base@{COMMIT}"
    text = policy_card(policy, "you/lora")
    assert "base_model: someone/base\nbase_model_relation: adapter" in text
    assert f"`someone/base` (a policy), revision `{COMMIT}`" in text


def test_a_run_records_what_it_was_started_from(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A name on the Hub with its commit, so that nothing can move below it; and what that was started from."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(["push", str(root), "you/base", "--hub", str(tmp_path / "hub"), "--no-latency"]) == 0
    commit = (tmp_path / "hub/models--you--base/refs/main").read_text()
    base = load_policy(root / "policy", "cpu")

    def tuned(name: str, start: str, **more: object) -> VLAPolicy:
        values = {"run": {"out": str(tmp_path / name), "steps": 1, "eval_windows": 1, "processes": 1, "precision": "no"},
                  "mixture": {"datasets": [{"path": str(root / "data")}], "cache_dir": str(root / "cache"), "holdout": 0},
                  "start": {"policy": start}, "optim": {"batch": 2, "warmup": 1, "ema": 0}, **more}  # fmt: skip
        train(validate(values, TrainConfig, "test"))
        return load_policy(tmp_path / name, "cpu")

    first = tuned("first", "you/base")
    known = {"kind": "policy", "path": "you/base", "revision": commit, "fingerprint": base.fingerprint}
    assert first.provenance["start"] == known and first.fingerprint != base.fingerprint
    assert f"`you/base` (a policy), revision `{commit}`, fingerprint `{base.fingerprint}`" in policy_card(first, "you/first")
    second = tuned("second", str(tmp_path / "first"))
    own = {"kind": "policy", "path": str(tmp_path / "first"), "fingerprint": first.fingerprint, "start": known}
    assert second.provenance["start"] == own
    adapter = tuned("lora", "you/base", adapter={"rank": 2})
    assert adapter.adapter.base["path"] == f"you/base@{commit}" and adapter.provenance["start"] == known
    assert "base_model: you/base\nbase_model_relation: adapter" in policy_card(adapter, "you/lora")
    assert main(["push", str(tmp_path / "lora"), "you/lora", "--hub", str(tmp_path / "hub"), "--no-latency"]) == 0
    assert load_policy("you/lora", "cpu").fingerprint == adapter.fingerprint


def test_evaluations_of_other_weights_are_left_out(tmp_path: Path):
    write_evaluation(tmp_path / "mine.json", "a")
    write_evaluation(tmp_path / "other.json", "b")
    (tmp_path / "curve.jsonl").write_text("{}\n")
    (tmp_path / "broken.json").write_text("[]")
    mine, others = read_evaluations([tmp_path / n for n in ("mine.json", "other.json", "broken.json", "gone.json")], "a")
    assert [r["policy"] for r in mine] == ["a"] and others == ["other.json", "broken.json", "gone.json"]


def test_failures_are_those_the_figures_show(tmp_path: Path):
    good = write_evaluation(tmp_path / "a.json", "a", 40, 40)
    good["rows"] = [row for row in good["rows"] if row["condition"] != "blank"]
    assert failures([good]) == []
    bad = write_evaluation(tmp_path / "a.json", "a", 10, 40)
    assert len(failures([bad])) == 2 and "10 of 40" in failures([bad])[0]


def test_files_that_only_look_like_results_are_named(tmp_path: Path):
    good = write_evaluation(tmp_path / "good.json", "a")
    row, task = good["rows"][0], good["per_task"][0]
    wrong = {
        **{f"no {key}": {k: v for k, v in good.items() if k != key} for key in ("suite", "seed", "rows", "policy")},
        **{f"{key} is {value}": good | {key: value} for key, value in
           (("suite", {}), ("seed", "x"), ("rows", []), ("rows", [5]), ("rows", {}), ("per_task", 5), ("created", 5))},
        **{f"a row without {key}": good | {"rows": [{k: v for k, v in row.items() if k != key}]}
           for key in ("n", "group", "condition", "rate", "low", "original")},
        **{f"a row's {key} is {value}": good | {"rows": [row | {key: value}]} for key, value in
           (("n", "40"), ("rate", "x"), ("rate", 7), ("low", None), ("successes", None), ("original", {}), ("failures", [1]),
            ("group", ["a"]))},
        "no instruction": good | {"per_task": [{k: v for k, v in task.items() if k != "instruction"}] * 2},
    }  # fmt: skip
    for i, content in enumerate(wrong.values()):
        (tmp_path / f"{i}.json").write_text(json.dumps(content))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "folder.json").mkdir()
    for name, path in {**{what: f"{i}.json" for i, what in enumerate(wrong)}, "deep": "deep.json", "dir": "folder.json"}.items():
        assert read_evaluations([tmp_path / path], "a") == ([], [path]), name
    assert read_evaluations([tmp_path / "good.json"], "a") == ([good], [])
    unplayed = good | {"rows": [row, row | {"condition": "nostate", "successes": None, "rate": None, "low": None, "high": None,
                                            "failures": None}]}  # fmt: skip
    (tmp_path / "good.json").write_text(json.dumps(unplayed))
    assert read_evaluations([tmp_path / "good.json"], "a") == ([unplayed], [])


def test_latency_is_measured_on_the_policy(root: Path):
    policy = load_policy(root / "policy", "cpu")
    found = measure_latency(policy, runs=4)
    assert found["robot"] == "tabletop" and found["runs"] == 4 and 0 < found["p50_ms"] <= found["p95_ms"]
    assert found["device"] == "cpu" and found["threads"] >= 1


def test_long_tables_are_folded(tmp_path: Path):
    policy = small_policy(tmp_path / "data")
    policy.provenance = policy.provenance | {"instructions": [f"do {i}" for i in range(30)]}
    text = policy_card(policy, "you/small")
    assert "<details><summary>30 instructions</summary>\n\n- do 0\n" in text
    assert text.count("<details>") == text.count("</details>")
    assert "Instructions:\n\n- do thing 0" in policy_card(small_policy(tmp_path / "data"), "you/small")


def test_a_datasets_card(tmp_path: Path):
    write_dataset(tmp_path / "ds", 4)
    store = EpisodeStore.open(tmp_path / "ds", tmp_path / "cache", frames="none", progress=False)
    info = json.loads((tmp_path / "ds/meta/info.json").read_text())
    text = dataset_card(info, "you/thing", store, "cc-by-4.0", ["Episode 3 is blurred."], "Words of my own.")
    seeds = [seed for found in store.recorded_seeds.values() for seed in found]
    for words in (store.fingerprint, f"4 episodes, {info['total_frames']} frames at {info['fps']} Hz", "LeRobot v3.0",
                  "- Episode 3 is blurred.", "Words of my own.", "## Licence\n\ncc-by-4.0", "path: hub:you/thing",
                  f"{len(seeds)} reset seeds between {min(seeds)} and {max(seeds)}", "`front` 32x32"):  # fmt: skip
        assert words in text, words
    assert all(f"- {sentence}\n" in text for sentence in store.instructions)
    for channel in store.spec.action:
        assert f"| action | {channel.name}.{channel.dims[0]} | {channel.convention} | {channel.unit} |" in text
    data: Any = DatasetCard(text).data
    assert data.license == "cc-by-4.0" and data.task_categories == ["robotics"] and "LeRobot" in (data.tags or [])


def test_a_dataset_of_unknown_origin_says_so(tmp_path: Path):
    with LeRobotWriter(tmp_path / "ds", small_spec()) as writer:
        writer.add(replace(make_episode(0), seed=None, task=""))
    store = EpisodeStore.open(tmp_path / "ds", tmp_path / "cache", frames="none", progress=False)
    text = dataset_card(json.loads((tmp_path / "ds/meta/info.json").read_text()), "you/thing", store)
    assert "nothing is known of how it came about" in text and "license: unknown" in text and "None stated." in text
