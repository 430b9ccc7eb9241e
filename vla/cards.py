"""Cards: what a stranger must know about a policy or a dataset before a robot moves, put together from recorded facts.

Nothing here is opinion or copied from elsewhere: a figure without a record is left out and said to be missing. The author's own
words stand apart, as such.
Format: the Hub's README.md with YAML front matter (Mitchell et al. 2019, "Model Cards for Model Reporting").
"""

from __future__ import annotations

import json
import math
import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, Field, model_validator

from vla.embodiment import EmbodimentSpec
from vla.episodes import Store
from vla.policy import VLAPolicy
from vla.report.lines import interval, lines_of, percent

CARD = "README.md"
UNSTATED = "unknown"
"""The Hub's word for a licence nobody has stated."""
_ASK = "Not stated by the author. Ask before using it."
_MUST_BE_LOW = ("blank", "swap: does the original", "replay", "random")
_LONG = 12  # rows of a table that are shown; longer ones are folded
_SNAPSHOT = re.compile(r"datasets--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})")


# ------------------------------------------------------------------------------------------------------------ a policy


def policy_card(
    policy: VLAPolicy, name: str, evals: Sequence[Mapping[str, Any]] = (), latency: Mapping[str, Any] | None = None,
    licence: str | None = None, known: Sequence[str] = (), about: str = "", asking: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """README.md of a policy.

    `evals`: the content of `results.json` files of this very policy (the caller has compared fingerprints); `latency` as
    `measure_latency` returns it; `known`: failures in the author's words, beside those the evaluations show; `about`: Markdown of
    the author's; `asking`: when it stops and asks, as `vla.handoff.gate.Handoff.facts()` says.
    """
    base, config, short = _base(policy), policy.config, name.rpartition("/")[2]
    size = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for n, p in policy.named_parameters() if n in policy.adapter.trained) if policy.adapter else size
    brings = f", of which this adapter brings {trained:,}" if policy.adapter else ""
    robots, robot = len(policy.embodiments), next(iter(policy.embodiments))
    said = f'"{_sentence(policy)}"' if robots == 1 else "instruction"  # whose the sentences are is not recorded
    made_with = (policy.saved_meaning or policy.describe())["versions"]
    parts = [
        _front(_policy_front(policy, short, base, evals, licence)), f"# {short}", "",
        f"A vision-language-action policy for {robots} robot{'s' * (robots > 1)}: pictures and an instruction in, {config.chunk} "
        f"steps of action out ({config.head}, {config.decoding} decoding). Backbone `{config.backbone.kind}`, {size:,} "
        f"parameters{brings}. Made with Tendon (`pip install tendon-vla`).", "",
        *([about, ""] if about else []),
        "```python", "from vla.policy import load_policy", "", f'policy = load_policy("{name}")',
        f'chunk = policy.act({{"images": images, "state": state}}, {said}, "{robot}")',
        "```", "", "## Base", "", _base_words(base), "", "## Robots and limits", "",
        *(part for key, spec in policy.embodiments.items() for part in _robot(key, spec, fold=robots > 1)),
        *(["## When it asks", "", _asking(asking), ""] if asking else []),
        "## Data", "", _datasets(policy.provenance), "", _told(policy.instructions), "",
        "## Evaluation", "", _evaluations(evals), "", "## Latency", "", _latency(latency), "", "## Known failures", "",
        *(f"- {line}" for line in [*failures(evals), *known, _reach(policy)]), "", "## Licence", "", licence or _ASK, "",
        "## Identity", "", f"Fingerprint of weights, tokenizer and meaning: `{policy.fingerprint}`. Saved with "
        + ", ".join(f"{package} {version}" for package, version in made_with.items())
        + ". `policy.json` and `evaluation.json` hold what is above for machines.",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _policy_front(
    policy: VLAPolicy, short: str, base: Mapping[str, Any] | None, evals: Sequence[Mapping[str, Any]], licence: str | None
) -> dict[str, Any]:
    """The card's metadata, in the Hub's own keys."""
    front: dict[str, Any] = {
        "library_name": "tendon-vla", "pipeline_tag": "robotics", "license": licence or UNSTATED,
        "tags": ["robotics", "vision-language-action", *(["lora"] if policy.adapter else []), *policy.embodiments],
    }  # fmt: skip
    if base and (public := _public(base["path"])):
        front |= {"base_model": public, "base_model_relation": "adapter" if policy.adapter else "finetune"}
    datasets = [found.partition("@")[0] for e in policy.provenance.get("datasets", []) if (found := _on_the_hub(e["path"]))]
    if datasets:
        front["datasets"] = list(dict.fromkeys(datasets))
    results = []
    for result in evals:
        for label, groups in lines_of(result["rows"]):
            for group, row in groups.items():
                if label == "policy" and row["rate"] is not None:
                    results.append({
                        "task": {"type": "robotics", "name": group},
                        "dataset": {"type": result["suite"], "name": f"{result['suite']} (simulation)"},
                        "metrics": [{"type": "success_rate", "value": round(100 * row["rate"], 2), "verified": False,
                                     "name": f"success in per cent, {row['successes']} of {row['n']}, 95% {interval(row)}"}],
                    })  # fmt: skip
    if results:
        front["model-index"] = [{"name": short, "results": results}]
    return front


def failures(evals: Sequence[Mapping[str, Any]]) -> list[str]:
    """What evaluations show to go wrong: groups below nine in ten, and controls that succeed where they should not."""
    found = []
    for result in evals:
        for label, groups in lines_of(result["rows"]):
            for group, row in groups.items():
                if row["rate"] is None:
                    continue
                says = f"{result['suite']}, {group}: {row['successes']} of {row['n']} {interval(row)}"
                if label == "policy" and row["rate"] < 0.9:
                    how = row.get("failures") or {}
                    why = f" ({how.get('failure', 0)} wrong, {how.get('timeout', 0)} out of time)" if how else ""
                    found.append(f"{says} succeed{why}")
                elif label in _MUST_BE_LOW and row["low"] > 0.1:
                    found.append(f"{says} succeed under the control `{label}`, which should be low: part of its success is blind")
    return found


def measure_latency(policy: VLAPolicy, runs: int = 20) -> dict[str, Any]:
    """{robot, runs, p50_ms, p95_ms, device, threads, machine}: one observation to one chunk, on noise, after two warm-ups."""
    import torch

    key, spec = next(iter(policy.embodiments.items()))
    rng = np.random.default_rng(0)
    images = {n: rng.integers(0, 256, (c.height, c.width, 3)).astype(np.uint8) for n, c in spec.cameras.items()}
    observation = {"images": images, "state": np.zeros(spec.state_dim, np.float32)}
    times = []
    for _ in range(runs + 2):
        began = time.perf_counter()
        policy.act(observation, _sentence(policy), key)  # actions come back as numpy, so the device has finished
        times.append(1000 * (time.perf_counter() - began))
    times = sorted(times[2:])
    p50, p95 = statistics.median(times), times[math.ceil(0.95 * runs) - 1]
    return {"robot": key, "runs": runs, "p50_ms": round(p50, 1), "p95_ms": round(p95, 1),
            "device": str(policy.device), "threads": torch.get_num_threads(), "machine": platform.machine()}  # fmt: skip


class _Part(BaseModel, strict=True, allow_inf_nan=False):
    successes: int | None
    n: int
    rate: float | None = Field(ge=0, le=1)
    low: float | None
    high: float | None

    @model_validator(mode="after")
    def _whole(self) -> _Part:
        if self.rate is not None and None in (self.successes, self.low, self.high):
            raise ValueError("a rate without its interval")
        return self


class _Row(_Part):
    group: str
    condition: str
    original: _Part | None
    failures: dict[str, int] | None = None


class _Task(_Part):
    task: str
    instruction: str


class _Results(BaseModel, strict=True):
    """What a card takes from a `results.json`; there is more in one."""

    policy: str
    suite: str
    seed: int
    rows: list[_Row] = Field(min_length=1)
    per_task: list[_Task] | None = None
    created: str | None = None


def read_evaluations(paths: Sequence[Path], fingerprint: str) -> tuple[list[dict[str, Any]], list[str]]:
    """(results of the policy with this fingerprint, names of the files that are of another policy or not results)."""
    mine, others = [], []
    for path in paths:
        try:
            result = json.loads(path.read_text())
            fits = _Results.model_validate(result).policy == fingerprint and bool(lines_of(result["rows"]))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            fits, result = False, {}
        mine.append(result) if fits else others.append(path.name)
    return mine, others


# ----------------------------------------------------------------------------------------------------------- a dataset


def dataset_card(
    info: Mapping[str, Any], name: str, store: Store, licence: str | None = None, known: Sequence[str] = (), about: str = ""
) -> str:
    """README.md of a LeRobot dataset; `info` is its `meta/info.json`."""
    front = {"license": licence or UNSTATED, "task_categories": ["robotics"], "tags": ["LeRobot", store.spec.key],
             "configs": [{"config_name": "default", "data_files": "data/*/*.parquet"}]}  # fmt: skip
    hours = info["total_frames"] / info["fps"] / 3600
    seeds = store.recorded_seeds
    origin = "Not recorded by this program, or on a real robot: nothing is known of how it came about."
    if seeds:
        numbers = [seed for found in seeds.values() for seed in found]
        origin = (f"Recorded in simulation ({store.suite or 'unnamed suite'}) by a scripted expert: {len(seeds)} tasks, "
                  f"{len(numbers):,} reset seeds between {min(numbers)} and {max(numbers)}. Seeds from 500000 up are kept for "
                  "evaluation.")  # fmt: skip
    return "\n".join([
        _front(front), f"# {name.rpartition('/')[2]}", "",
        f"{info['total_episodes']:,} episodes, {info['total_frames']:,} frames at {info['fps']} Hz ({hours:.2f} h), LeRobot "
        f"{info['codebase_version']}.", "", *([about, ""] if about else []),
        "```yaml", "mixture:", "  datasets:", f"    - {{path: hub:{name}}}", "```", "",
        "## Robot and limits", "", *_robot(store.spec.name, store.spec), "## Instructions", "", _told(store.instructions), "",
        "## Origin", "", origin, "", "## Known faults", "",
        *(f"- {line}" for line in known or ["None stated. `vla data check` looks for them."]), "",
        "## Licence", "", licence or _ASK, "", "## Identity", "", f"Fingerprint of the content: `{store.fingerprint}`.",
    ]) + "\n"  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ its parts


def _front(fields: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, width=1000)}---"


def _table(head: str, rows: Sequence[str], fold: str = "") -> str:
    """A Markdown table; under the line `fold` when it is given, or when the table is long."""
    lines = [head, "|" + " --- |" * (head.count("|") - 1), *rows]
    if not fold and len(rows) <= _LONG:
        return "\n".join(lines)
    return "\n".join([f"<details><summary>{fold or f'{len(rows)} rows'}</summary>", "", *lines, "", "</details>"])


def _sentence(policy: VLAPolicy) -> str:
    return (policy.instructions or ["move"])[0].replace('"', "'")


def _base(policy: VLAPolicy) -> dict[str, Any] | None:
    """{kind, path, revision, fingerprint} of what the policy was trained from, as far as it is recorded."""
    if policy.adapter:
        return policy.adapter.base
    if merged := policy.provenance.get("merged"):
        return merged["adapter"]["base"]
    start = policy.provenance.get("start")
    if start is None and (path := getattr(policy.config.backbone, "path", None)):
        start = {"kind": "model", "path": path}
    return start


def _public(path: str) -> str | None:
    """`user/name` when `path` is one on the Hub, as far as can be told from here."""
    name = path.partition("@")[0]
    return name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not Path(path).exists() else None


def _on_the_hub(path: str) -> str | None:
    """`user/name@commit` of a dataset whose folder lies in the Hub's cache."""
    found = _SNAPSHOT.search(path)
    return f"{found[1]}/{found[2]}@{found[3]}" if found else None


def _shown(path: str) -> str:
    """A path as strangers may see it: of a folder on the author's machine, its own name only."""
    return _on_the_hub(path) or (Path(path).name if Path(path).is_absolute() else path)


def _base_words(base: Mapping[str, Any] | None) -> str:
    if not base:
        return "None: trained from random weights."
    name, _, revision = str(base["path"]).partition("@")
    revision = base.get("revision") or revision
    says = f"`{_shown(name)}` (a {base['kind']})"
    unpinned = ", no revision recorded" if _public(name) else ", a folder of the author's"
    says += f", revision `{revision}`" if revision else unpinned
    return says + (f", fingerprint `{base['fingerprint']}`." if base.get("fingerprint") else ", no fingerprint recorded.")


def _robot(key: str, spec: EmbodimentSpec, fold: bool = False) -> list[str]:
    cameras = ", ".join(f"`{n}` {c.height}x{c.width}" for n, c in spec.cameras.items()) or "none"
    rows = [f"| {part} | {group.name}.{dim} | {group.convention} | {group.unit} | {group.frame} | {low:g} | {high:g} |"
            for part, groups in (("action", spec.action), ("state", spec.state)) for group in groups
            for dim, low, high in zip(group.dims, group.low, group.high, strict=True)]  # fmt: skip
    fold = fold or len(rows) > _LONG
    what = f"{spec.action_dim} action and {spec.state_dim} state dimensions, with their units, frames and limits"
    return [f"**{key}**: {spec.robot or 'no description'}; {spec.control_hz:g} Hz; cameras {cameras}.", "",
            _table("| | dimension | convention | unit | frame | low | high |", rows, what if fold else ""), ""]  # fmt: skip


def _datasets(provenance: Mapping[str, Any]) -> str:
    entries = provenance.get("datasets", [])
    if not entries:
        return "Not recorded."
    rows = [f"| {_shown(e['path'])} | {e['robot']} | {e['episodes']:,} | {e['frames']:,} | `{e['fingerprint']}` |"
            for e in entries]  # fmt: skip
    return _table("| dataset | robot | episodes | frames | fingerprint of its content |", rows)


def _told(sentences: Sequence[str]) -> str:
    if not sentences:
        return "No instructions recorded."
    lines = [f"- {sentence}" for sentence in sorted(sentences)]
    if len(lines) <= _LONG:
        return "\n".join(["Instructions:", "", *lines])
    return "\n".join([f"<details><summary>{len(lines)} instructions</summary>", "", *lines, "", "</details>"])


def _evaluations(evals: Sequence[Mapping[str, Any]]) -> str:
    if not evals:
        return "None was recorded for these weights. Do not trust it with a robot."
    own, parts = [], []
    for result in evals:
        lines = lines_of(result["rows"])
        rows = {label: [f"| {group} | {label} | {row['successes']}/{row['n']} | {percent(row['rate'])} {interval(row)} |"
                        for group, row in groups.items() if row["rate"] is not None] for label, groups in lines}  # fmt: skip
        when = f", {result['created'][:10]}" if result.get("created") else ""
        own += [f"| {result['suite']} {row}".replace(" | policy |", " |") for row in rows.get("policy", [])]
        controls = [row for label, found in rows.items() if label != "policy" for row in found]
        tasks = [f"| {t['instruction']} | {t['task']} | {t['successes']}/{t['n']} | {percent(t['rate'])} {interval(t)} |"
                 for t in result.get("per_task") or [] if t["rate"] is not None]  # fmt: skip
        seeds = f"seeds from {result['seed']}{when}"
        if controls:
            parts += ["", _table("| group | control | success | % [95%] |", controls,
                                 f"{result['suite']}: the same scenes with one explanation taken away ({seeds})")]  # fmt: skip
        if len(tasks) > 1:
            parts += ["", _table("| instruction | task | success | % [95%] |", tasks,
                                 f"{result['suite']}: task by task ({seeds})")]  # fmt: skip
    seeds = ", ".join(f"{r['suite']} from {r['seed']}" for r in evals)
    how = f"Closed loop in simulation, Wilson intervals, scenes whose seeds no recording used: {seeds}."
    return "\n".join([_table("| suite | group | success | % [95%] |", own), "", how, *parts])


def _asking(facts: Mapping[str, Any]) -> str:
    return (f"By `{facts['score']}` ({facts['what']}; {facts['running']} over an episode, threshold {facts['threshold']:.4g}). "
            f"{facts['says']}\n\nCalibrated in {facts['suite']}: {', '.join(facts['tasks'])}.")  # fmt: skip


def _latency(latency: Mapping[str, Any] | None) -> str:
    if not latency:
        return "Not measured."
    return (f"One observation of `{latency['robot']}` to one chunk: p50 {latency['p50_ms']} ms, p95 {latency['p95_ms']} ms "
            f"({latency['runs']} runs, {latency['device']}, {latency['threads']} thread(s), {latency['machine']}).")  # fmt: skip


def _reach(policy: VLAPolicy) -> str:
    return (f"Anything but its {len(policy.embodiments)} robot(s), their cameras and the {len(policy.instructions)} "
            "instruction(s) it was trained on is untried.")  # fmt: skip
