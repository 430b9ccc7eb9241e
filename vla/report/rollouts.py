"""The films of the report, each above the action symbols the policy emitted while it was moving."""

from __future__ import annotations

import base64
import json
from html import escape
from typing import Any

import numpy as np

from vla.report.charts import heat_strip
from vla.report.gather import Gathered

FILM_BYTES = 3_000_000
"""Films are embedded up to this much in all (a third more as text), so that the file can be sent by mail."""


def rollouts(run: Gathered) -> str:
    """The section; "" without films."""
    cards, left = [], FILM_BYTES
    dropped = 0
    for results in [r for r in run.evals if r["label"] == r["suite"]] or run.evals:
        for clip in results.get("clips", []):
            try:
                film = (results["folder"] / clip["file"]).read_bytes()
                if len(film) > left:
                    dropped += 1
                    continue
                cards.append(_card(run, results, clip, film))
                left -= len(film)
            except (OSError, KeyError, TypeError, ValueError) as error:
                run.problems.append(f"clip of {results['label']}: {type(error).__name__}: {error}")
    if not cards:
        return ""
    more = f" {dropped} more did not fit." if dropped else ""
    return (
        '<section id="rollouts"><h2>Rollouts</h2><p>Fresh scenes, successes and failures, through the camera the policy '
        "sees. Below each film is what the policy said: one strip per action dimension, one cell per control step, from "
        '<b class="cold">lowest</b> to <b class="warm">highest</b> symbol; under it, the <b class="sure">confidence</b> '
        f"(1 − entropy / log K). Ticks mark the moments it looked again.{more}</p>"
        f'<div class="films">{"".join(cards)}</div></section>'
    )


def _card(run: Gathered, results: dict[str, Any], clip: dict[str, Any], film: bytes) -> str:
    won = bool(clip["success"])
    verdict = "success" if won else "failure" if clip.get("failure") else "time out"
    rate = float(clip["fps"]) * int(clip["stride"])
    swapped = f' <span class="muted">(swapped: scene drawn for {escape(str(clip["task"]))})</span>' if clip.get("given") else ""
    source = "data:video/mp4;base64," + base64.b64encode(film).decode()
    return (
        f'<article class="card film"><video muted loop playsinline controls preload="auto" width="240" height="240" '
        f'aria-label="{escape(str(clip["instruction"]))}: {verdict}" src="{source}" data-hz="{rate:g}"></video>'
        f'<div class="said"><p class="caption">“{escape(str(clip["instruction"]))}”{swapped}</p>'
        f'<p class="muted"><span class="badge {"good" if won else "bad"}">{"✓" if won else "✗"} {verdict}</span> '
        f"{escape(results['suite'])} · seed {escape(str(clip['seed']))} · {escape(str(clip['steps']))} steps</p>"
        f"{_strips(run, clip)}</div></article>"
    )


def _strips(run: Gathered, clip: dict[str, Any]) -> str:
    """Symbols (or, for a codec without one symbol per element, actions) and confidences over time."""
    # NaN would make the data for the script invalid JSON, and the page lifeless.
    actions, confidence = (np.nan_to_num(np.asarray(clip[key], np.float64)) for key in ("actions", "confidence"))
    steps, dims = actions.shape
    if clip.get("symbols") is not None:
        symbols = np.asarray(clip["symbols"], np.int64)
        size = number_of_symbols(run, symbols)
        values = 2 * symbols / max(size - 1, 1) - 1
        label = f"symbols 0–{size - 1}"
    else:
        symbols, label = None, "actions"
        values = actions / np.maximum(np.abs(actions).max(0), 1e-9)
    rows = []
    for d in range(dims):
        name = str(clip["action_names"][d]).split(".")[-1]
        rows.append(f'<span class="dim">{escape(name)}</span><span class="cells">'
                    f'<img alt="" src="{heat_strip(values[:, d], "value")}">'
                    f'<img alt="" class="sure" src="{heat_strip(confidence[:, d], "confidence")}"></span>')  # fmt: skip
    marks = "".join(f'<i style="left:{100 * at / steps:.2f}%"></i>' for at in clip.get("decisions", []))
    data = {
        "names": [str(n).split(".")[-1] for n in clip["action_names"]], "c": confidence.round(2).tolist(),
        "a": actions.round(3).tolist(), "s": None if symbols is None else symbols.tolist(),
    }  # fmt: skip
    title = f"{label} of {dims} action dimensions over {steps} steps"
    return (
        f'<div class="strips" role="img" aria-label="{title}" data-steps="{steps}" '
        f'data-cells="{escape(json.dumps(data, separators=(",", ":")))}">{"".join(rows)}'
        f'<span class="dim"></span><span class="marks">{marks}</span><b class="cursor"></b></div>'
        f'<output class="muted">{label}, {steps} steps</output>'
    )


def number_of_symbols(run: Gathered, symbols: np.ndarray) -> int:
    """K of the run's codec, or 256 when it does not say; never fewer than were seen."""
    codec = run.policy.get("codec")
    said = codec.get("bins") if isinstance(codec, dict) else None
    return max(said if isinstance(said, int) else 256, int(symbols.max(initial=0)) + 1)
