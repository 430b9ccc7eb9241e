"""Cards: what a stranger must know about a policy or a dataset before a robot moves, put together from recorded facts.

Nothing here is opinion or copied from elsewhere: a figure without a record is left out and said to be missing.
Format: the Hub's README.md with YAML front matter (Mitchell et al. 2019, "Model Cards for Model Reporting").
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vla.embodiment import EmbodimentSpec
from vla.policy import VLAPolicy
from vla.report.lines import interval, lines_of, percent

UNSTATED = "other"
"""The Hub's word for a licence it has no name for; here: the author has not said."""
_MUST_BE_LOW = ("blank", "swap: does the original", "replay", "random")


def policy_card(
    policy: VLAPolicy, name: str, evals: Sequence[Mapping[str, Any]] = (), latency: Mapping[str, Any] | None = None,
    licence: str | None = None, known: Sequence[str] = (),
) -> str:  # fmt: skip
    """README.md of a policy.

    `evals`: the content of `results.json` files of this very policy (the caller has compared fingerprints); `latency` as
    `measure_latency` returns it; `known`: failures in the author's words, beside those the evaluations show.
    """
    base, config = _base(policy), policy.config
    front = {
        "library_name": "tendon-vla", "pipeline_tag": "robotics", "license": licence or UNSTATED,
        "tags": ["robotics", "vision-language-action", *(["lora"] if policy.adapter else [])],
        **({"base_model": base["path"]} if base and "/" in base["path"] and not Path(base["path"]).exists() else {}),
    }  # fmt: skip
    size = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for n, p in policy.named_parameters() if n in policy.adapter.trained) if policy.adapter else size
    parts = [
        _front(front), f"# {name.rpartition('/')[2]}", "",
        f"A vision-language-action policy: pictures and an instruction in, {config.chunk} steps of action out "
        f"({config.head}, {config.decoding}). Backbone `{config.backbone.kind}`, {size:,} parameters"
        + (f", of which this adapter brings {trained:,}." if policy.adapter else "."), "",
        "```python", "from vla.policy import load_policy", f'policy = load_policy("{name}")',
        f'chunk = policy.act({{"images": images, "state": state}}, "{_sentence(policy)}", "{next(iter(policy.embodiments))}")',
        "```", "", "## Base", "", _base_words(base), "", "## Robots and limits", "",
        *(_robot(key, spec) for key, spec in policy.embodiments.items()), "", "## Data", "", _datasets(policy.provenance), "",
        "## Evaluation", "", _evaluations(evals), "", "## Latency", "", _latency(latency), "", "## Known failures", "",
        *(f"- {line}" for line in [*failures(evals), *known, _reach(policy)]), "", "## Licence", "",
        licence or "Not stated by the author. Ask before using it.", "",
        f"Fingerprint `{policy.fingerprint}`; `policy.json` holds what is above in machine-readable form.",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def dataset_card(info: Mapping[str, Any], name: str, fingerprint: str, instructions: Sequence[str], spec: EmbodimentSpec,
                 licence: str | None = None, seeds: Mapping[str, Sequence[int]] | None = None) -> str:  # fmt: skip
    """README.md of a LeRobot v3.0 dataset; `info` is its `meta/info.json`."""
    front = {"license": licence or UNSTATED, "task_categories": ["robotics"], "tags": ["LeRobot"],
             "configs": [{"config_name": "default", "data_files": "data/*/*.parquet"}]}  # fmt: skip
    hours = info["total_frames"] / info["fps"] / 3600
    shown = [f"- {sentence}" for sentence in sorted(instructions)[:40]]
    shown += [f"- and {len(instructions) - 40} more"] if len(instructions) > 40 else []
    return "\n".join([
        _front(front), f"# {name.rpartition('/')[2]}", "",
        f"{info['total_episodes']:,} episodes, {info['total_frames']:,} frames at {info['fps']} Hz ({hours:.2f} h), LeRobot "
        f"{info['codebase_version']}.", "", "## Robot", "", _robot(spec.name, spec), "", "## Instructions", "", *shown, "",
        "## Origin", "", (f"Recorded in simulation by a scripted expert, {sum(map(len, seeds.values())):,} reset seeds in "
                          "`meta/`." if seeds else "Not recorded by this program, or on a real robot."), "",
        "## Licence", "", licence or "Not stated by the author. Ask before using it.", "",
        f"Fingerprint of the content `{fingerprint}`.",
    ]) + "\n"  # fmt: skip


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
    return {"robot": key, "runs": runs, "p50_ms": round(statistics.median(times), 1), "p95_ms": round(times[int(0.95 * runs)], 1),
            "device": str(policy.device), "threads": torch.get_num_threads(), "machine": platform.machine()}  # fmt: skip


def _front(fields: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True)}---"


def _sentence(policy: VLAPolicy) -> str:
    return (policy.instructions or ["move"])[0].replace('"', "'")


def _base(policy: VLAPolicy) -> dict[str, Any] | None:
    if policy.adapter:
        return policy.adapter.base
    if merged := policy.provenance.get("merged"):
        return merged["adapter"]["base"]
    start = policy.provenance.get("start")
    if start is None and (path := getattr(policy.config.backbone, "path", None)):
        start = {"kind": "model", "path": path}
    return start


def _base_words(base: Mapping[str, Any] | None) -> str:
    if not base:
        return "None: trained from random weights."
    revision = f", revision `{base['revision']}`" if base.get("revision") else ""
    mark = f", fingerprint `{base['fingerprint']}`" if base.get("fingerprint") else ", no fingerprint recorded"
    return f"`{base['path']}` ({base['kind']}){revision}{mark}."


def _robot(key: str, spec: EmbodimentSpec) -> str:
    rows = [f"**{key}**: {spec.robot or 'no description'}; {spec.control_hz:g} Hz; cameras "
            + ", ".join(f"`{n}` {c.height}x{c.width}" for n, c in spec.cameras.items()) + ".", "",
            "| action | unit | frame | low | high |", "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for group in spec.action:
        for i, dim in enumerate(group.dims):
            low, high = (f"{bound[i]:g}" if bound is not None else "none" for bound in (group.low, group.high))
            rows.append(f"| {group.name}.{dim} | {group.unit} | {group.frame} | {low} | {high} |")
    return "\n".join([*rows, ""])


def _datasets(provenance: Mapping[str, Any]) -> str:
    entries = provenance.get("datasets", [])
    if not entries:
        return "Not recorded."
    rows = ["| dataset | robot | episodes | frames | fingerprint |", "| --- | --- | --- | --- | --- |"]
    rows += [f"| {Path(e['path']).name if Path(e['path']).is_absolute() else e['path']} | {e['robot']} | {e['episodes']:,} "
             f"| {e['frames']:,} | `{e['fingerprint'][:16]}` |" for e in entries]  # fmt: skip
    return "\n".join(rows)


def _evaluations(evals: Sequence[Mapping[str, Any]]) -> str:
    if not evals:
        return "None was recorded for these weights. Do not trust it with a robot."
    rows = ["| suite | group | condition | success | % [95 %] |", "| --- | --- | --- | --- | --- |"]
    for result in evals:
        for label, groups in lines_of(result["rows"]):
            rows += [f"| {result['suite']} | {group} | {label} | {row['successes']}/{row['n']} | {percent(row['rate'])} "
                     f"{interval(row)} |" for group, row in groups.items() if row["rate"] is not None]  # fmt: skip
    seeds = ", ".join(f"{r['suite']} from {r['seed']}" for r in evals)
    return "\n".join([*rows, "", f"Wilson intervals; closed loop; seeds: {seeds}. Simulation unless a suite's name says otherwise."])


def _latency(latency: Mapping[str, Any] | None) -> str:
    if not latency:
        return "Not measured."
    return (f"One observation of `{latency['robot']}` to one chunk: p50 {latency['p50_ms']} ms, p95 {latency['p95_ms']} ms "
            f"({latency['runs']} runs, {latency['device']}, {latency['threads']} thread(s), {latency['machine']}).")  # fmt: skip


def _reach(policy: VLAPolicy) -> str:
    return (f"Anything but its {len(policy.embodiments)} robot(s), their cameras and the {len(policy.instructions)} instruction(s) "
            "it was trained on is untried.")  # fmt: skip


def read_evaluations(paths: Sequence[Path], fingerprint: str) -> tuple[list[dict[str, Any]], list[str]]:
    """(results of the policy with this fingerprint, names of the files that are of another policy or not results)."""
    mine, others = [], []
    for path in paths:
        try:
            result = json.loads(path.read_text())
            fits = result["policy"] == fingerprint and bool(lines_of(result["rows"]))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            fits, result = False, {}
        mine.append(result) if fits else others.append(path.name)
    return mine, others
