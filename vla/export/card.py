"""README.md of an export folder: what it is, how it is run, and the parity table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vla.cards import UNSTATED


def export_card(name: str, meaning: Mapping[str, Any], parity: Mapping[str, Any]) -> str:
    """The card, from what was recorded; a figure that was not measured is left out and said to be missing."""
    graphs = list(meaning["graphs"]["policy"])
    runtime = meaning["runtime"]
    parts = [
        "---", "library_name: onnxruntime", "pipeline_tag: robotics", f"license: {UNSTATED}",
        "tags: [robotics, vision-language-action, onnx]", "---", f"# {name}", "",
        f"A vision-language-action policy for {', '.join(meaning['robots'])} as ONNX graphs ({', '.join(graphs)}): pictures, "
        f"state and an instruction in, {meaning['chunk']} steps of action out. It runs with what `requirements.txt` lists and "
        "`pip install --no-deps tendon-vla`; no torch. Made with Tendon (`vla export`).", "",
        "`export.json` says what every number means (robots, statistics, picture preparation, prompt) and holds the sha256 of "
        "every other file; `parity.json` holds what is below for machines.", "",
        "## Runtime", "", f"Chosen by measuring: {runtime['graph']} on {runtime['threads']} thread"
        f"{'s' * (runtime['threads'] != 1)} ({runtime.get('why', 'not measured')}). `vla export DIR --choose` measures again on "
        "another machine.", "", "## Parity", "", *_errors(parity), *_latency(parity), *_fresh(parity), *_loop(parity),
        "## Identity", "", f"Fingerprint of the policy: `{meaning['policy']}`. Opset {meaning['opset']}. Made with "
        + ", ".join(f"{package} {version}" for package, version in meaning["versions"].items()) + ".",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _errors(parity: Mapping[str, Any]) -> list[str]:
    if "errors" not in parity:
        return ["Errors against the policy were not measured: no recorded windows were given.", ""]
    lines = [f"Against the policy in torch float32, on {parity['windows']} recorded windows, in % of the action range:", "",
             "| graph | mean | 99 % | max | same symbols |", "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for kind, found in parity["errors"].items():
        lines.append(f"| {_kind(kind, parity)} | {found['mean_percent']:.3g} | {found['p99_percent']:.3g} | "
                     f"{found['max_percent']:.3g} | {100 * found['agreement']:.2f} % |")  # fmt: skip
    lines += ["", "In robot units, by dimension (mean, max):", "", "| robot | dimension | " + " | ".join(parity["errors"]) + " |",
              "| --- | --- |" + " --- |" * len(parity["errors"])]  # fmt: skip
    for robot, entry in next(iter(parity["errors"].values()))["robots"].items():
        for i, dimension in enumerate(entry["dimensions"]):
            cells = [found["robots"][robot] for found in parity["errors"].values()]
            said = " | ".join(f"{c['mean'][i]:.2e}, {c['max'][i]:.2e}" for c in cells)
            lines.append(f"| {robot} | {dimension} | {said} |")
    return [*lines, ""]


def _kind(kind: str, parity: Mapping[str, Any]) -> str:
    return f"int8 ({parity['int8']['kind']})" if kind == "int8" and parity.get("int8") else kind


def _latency(parity: Mapping[str, Any]) -> list[str]:
    found = parity.get("latency")
    if found is None:
        return ["Time was not measured.", ""]
    where = found["machine"]
    lines = [f"One chunk from {found['views']} picture{'s' * (found['views'] != 1)}, in ms, contestants in turn, on "
             f"{where['processor']} ({where['cores']} cores, load {where['load']} beside this):", "",
             "| what | threads | p50 | p95 | p99 | least | processor |", "|" + " --- |" * 7]  # fmt: skip
    if where["busy"]:
        lines[0] = lines[0].removesuffix(":") + ". It was busy: only the processor's time says what one thread takes alone:"
    for name, t in found["times"].items():
        kind, _, threads = name.partition("/")
        lines.append(f"| {kind} | {threads} | {t['p50_ms']:.2f} | {t['p95_ms']:.2f} | {t['p99_ms']:.2f} | {t['min_ms']:.2f} | "
                     f"{t['cpu_p50_ms']:.2f} |")  # fmt: skip
    if share := parity.get("integer_products"):
        lines += ["", f"Integer products by themselves reach {share['rate_gops']:.0f} GOP/s here on one thread at this network's "
                  f"shapes; the int8 graph works {share['p50_ms']:.2f} ms on {share['gop']:.2f} GOP of them and all else: "
                  f"{share['percent']:.0f} % of that rate."]  # fmt: skip
    return [*lines, ""]


def _fresh(parity: Mapping[str, Any]) -> list[str]:
    if not parity.get("fresh"):
        return []
    lines = ["| fresh process | start to first chunk | peak memory | file |", "| --- | --- | --- | --- |"]
    for kind, found in parity["fresh"].items():
        size = parity["bytes"].get(kind)
        lines.append(f"| {kind} | {found['cold_start_s']:.2f} s | {found['peak_memory_mb']:.0f} MB | "
                     + (f"{size / 1e6:.1f} MB |" if size else "- |"))  # fmt: skip
    return [*lines, ""]


def _loop(parity: Mapping[str, Any]) -> list[str]:
    found = parity.get("closed_loop")
    if found is None:
        return ["Success in a simulator was not measured (`--verify SUITE`).", ""]
    lines = [f"Success in {found['suite']}, the same scenes for all (seeds from {found['seed']}):", "",
             f"| what | success | 95 % | against {found['against']} |", "| --- | --- | --- | --- |"]  # fmt: skip
    for name, row in found["rows"].items():
        d = found["differences"].get(name)
        versus = "-" if d is None else f"{100 * d['difference']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}] points"
        interval = f"{100 * row['low']:.0f} to {100 * row['high']:.0f} %"
        lines.append(f"| {_kind(name, parity)} | {row['successes']} of {row['n']} | {interval} | {versus} |")
    return [*lines, ""]
