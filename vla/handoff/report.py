"""`vla handoff report`: on episodes nothing was fitted to, what every detector is worth, as JSON and as a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from vla.errors import DataError, UsageError
from vla.evaluate.results import proportion
from vla.handoff.conformal import observed_band
from vla.handoff.gate import Handoff
from vla.handoff.learning import fit
from vla.handoff.measures import Pairs, area, curve, detection, interval, outcome_of, point, values_of
from vla.handoff.rollouts import Rollouts
from vla.handoff.scores import Kind

RATES = (0.02, 0.05, 0.1, 0.2, 0.3)
"""Of questions in successful episodes, at which coverage and what comes of asking are told."""
CLOCK = "clock"
TONES = {"learned": "#b45206", "fused": "#c2185b", "distance": "#7a3ea8", "overlap": "#0b6e4f", "stac": "#2a9d8f",
         "spread": "#7f7f7f", "entropy": "#1f5fa8", "entropy_max": "#8fb3d9", CLOCK: "#000000"}  # fmt: skip


def report(rollouts: Rollouts, handoff: Handoff, train: Rollouts | None = None, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """The figures of `rollouts` (collected with `relief`), by the detectors and thresholds of `handoff`.

    `leave_out`: groups, words of tasks (a verb, a colour) or troubles; for each, detectors are fitted anew to the episodes of
    `train` that have nothing to do with it, and judged on those of `rollouts` that do. Raises `UsageError` for rollouts of
    another policy or scenes that were fitted to, `DataError` without failures, successes or relief.
    """
    meaning = handoff.meaning
    if rollouts.meta["policy"] != meaning["policy"]:
        raise UsageError(
            "--rollouts",
            found=f"of policy {str(rollouts.meta['policy'])[:12]}",
            expected=f"{str(meaning['policy'])[:12]}, which was calibrated",
            fix="collect with this policy",
        )
    used = [*meaning["seeds"], *((meaning["trained"] or {}).get("seeds") or [])]
    seed = rollouts.episodes["seed"]
    if any(((seed >= low) & (seed <= high)).any() for low, high in used):
        raise UsageError("--rollouts", found="scenes that thresholds or detectors are made of", expected="other ones",
                         fix="vla handoff collect --seed 900000")  # fmt: skip
    if rollouts.relief is None or not 0 < rollouts.success.sum() < len(rollouts):
        raise DataError("--rollouts", found=f"{int(rollouts.success.sum())} successes of {len(rollouts)}, "
                        f"{'no ' * (rollouts.relief is None)}relief",
                        expected="successes, failures, and what help would have done",
                        fix="vla handoff collect ... --perturb all --relief")  # fmt: skip
    whole = rollouts.judged(handoff.fitted)
    kinds: dict[str, Kind] = {name: entry["running"] for name, entry in meaning["scores"].items() if name in whole.scores}
    values = {name: values_of(whole, name, kind) for name, kind in [*kinds.items(), (CLOCK, "max")]}
    never, always = float(whole.success.mean()), float(outcome_of(whole, np.zeros(len(whole), int)).mean())
    return {
        "policy": meaning["policy"], "suite": meaning["suite"], "robot": meaning["robot"],
        "seeds": [int(seed.min()), int(seed.max())],
        "episodes": len(whole), "successes": int(whole.success.sum()), "by_trouble": _by(whole, "trouble"),
        "by_group": _by(whole, "group"), "calibrated_on": meaning["n"], "score": meaning["score"],
        "never_asking": proportion(int(whole.success.sum()), len(whole)),
        "always_asking": proportion(int(outcome_of(whole, np.zeros(len(whole), int)).sum()), len(whole)),
        "detectors": _detectors(whole, values, kinds), "coverage": _coverage(whole, handoff, values, kinds),
        "asking": {name: {f"{rate:g}": point(whole, values[name], handoff.threshold(name, rate)) for rate in RATES}
                   for name in kinds},
        "clock": _clock(whole, values[CLOCK]),
        "curves": {name: curve(whole, found) for name, found in values.items()},
        "areas": {name: round(area(curve(whole, found, 200), never, always), 3) for name, found in values.items()},
        "left_out": [] if train is None else [_left_out(train, rollouts, word, kinds) for word in leave_out],
        "shift": _shift(whole, handoff, values, kinds), "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _by(rollouts: Rollouts, column: str) -> dict[str, dict[str, Any]]:
    names = rollouts.episodes[column]
    return {
        str(name): proportion(int(rollouts.success[names == name].sum()), int((names == name).sum())) for name in np.unique(names)
    }


def _detectors(rollouts: Rollouts, values: Mapping[str, np.ndarray], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    pairs = {name: detection(rollouts, found) for name, found in values.items()}
    found = {name: {"running": kinds.get(name, "max"), "auroc": both[0].share()._asdict(), "matched": both[1].share()._asdict()}
             for name, both in pairs.items()}  # fmt: skip
    if "entropy" in pairs:
        for name, both in pairs.items():
            found[name]["against_entropy"] = _against(both, pairs["entropy"])
    return found


def _against(ours: tuple[Pairs, Pairs], theirs: tuple[Pairs, Pairs]) -> dict[str, Any]:
    """Differences over the same draws of episodes."""
    return {name: interval(a.value - b.value, a.draws - b.draws)._asdict()
            for name, a, b in zip(("auroc", "matched"), ours, theirs, strict=True)}  # fmt: skip


def _coverage(
    rollouts: Rollouts, handoff: Handoff, values: Mapping[str, np.ndarray], kinds: Mapping[str, Kind]
) -> dict[str, Any]:
    """Share of successful episodes without a question, against what was promised."""
    good, found = rollouts.success, {}
    for name in kinds:
        largest = np.maximum.reduceat(values[name], rollouts.starts[:-1])[good]
        found[name] = {}
        for rate in RATES:
            band = observed_band(handoff.n(name), len(largest), rate, handoff.meaning["level"])
            quiet = int((largest <= handoff.threshold(name, rate)).sum())
            found[name][f"{rate:g}"] = {**proportion(quiet, len(largest)), "promised": 1 - rate,
                                        "true_band": handoff.band(name, rate)._asdict(), "band": band._asdict(),
                                        "inside": bool(band.low <= quiet / len(largest) <= band.high)}  # fmt: skip
    return found


def _shift(rollouts: Rollouts, handoff: Handoff, values: Mapping[str, np.ndarray], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """What becomes of coverage where the promise was not made: each trouble by itself, at the rate of the calibration."""
    name, rate = handoff.meaning["score"], handoff.meaning["alpha"]
    largest = np.maximum.reduceat(values[name], rollouts.starts[:-1])
    quiet, trouble = largest <= handoff.threshold(name, rate), rollouts.episodes["trouble"]
    return {str(kind): proportion(int((quiet & mine).sum()), int(mine.sum())) for kind in np.unique(trouble)
            if (mine := rollouts.success & (trouble == kind)).any()}  # fmt: skip


def _clock(rollouts: Rollouts, values: np.ndarray) -> dict[str, dict[str, Any]]:
    """Asking whoever is still at it at look k, which needs no detector."""
    return {f"look {k}": point(rollouts, values, k - 0.5) for k in range(int(rollouts.looks.max()))}


def _left_out(train: Rollouts, rollouts: Rollouts, word: str, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    rest, other = train.where(~train.about(word)), rollouts.where(rollouts.about(word))
    if not len(other) or len(rest) == len(train) or not 0 < rest.success.sum() < len(rest):
        raise UsageError("--leave-out", found=repr(word), expected="a group, a word of a task's name or a trouble, of some "
                         "of the episodes", fix=f"e.g. {rollouts.episodes['group'][0]}")  # fmt: skip
    told = {"word": word, "fitted_on": len(rest), "episodes": len(other), "successes": int(other.success.sum())}
    if not 0 < other.success.sum() < len(other):
        return {**told, "detectors": None}
    judged = other.judged(fit(rest))
    values = {name: values_of(judged, name, kind) for name, kind in kinds.items() if name in judged.scores}
    return {**told, "detectors": _detectors(judged, values, kinds)}


# ---------------------------------------------------------------------------------------------------------- for people


def report_text(found: Mapping[str, Any]) -> str:
    """The tables, for a terminal."""
    never, always = found["never_asking"], found["always_asking"]
    lines = [
        f"{found['episodes']} episodes, seeds {found['seeds'][0]}..{found['seeds'][1]}: {found['successes']} succeed; if "
        f"somebody were asked at once {always['successes']}",
        "",
        _row("detector", "AUROC, whole episode", "at the same look", "area", "asked, success at 0.1", "median step"),
    ]
    for name, entry in sorted(found["detectors"].items(), key=lambda item: -item[1]["matched"]["value"]):
        at = found["asking"].get(name, {}).get("0.1")
        lines.append(_row(("* " if name == found["score"] else "") + name, _share(entry["auroc"]), _share(entry["matched"]),
                          f"{found['areas'][name]:.2f}", "-" if at is None else f"{100 * at['questions']['rate']:.0f} %, "
                          f"{100 * at['success']['rate']:.0f} %",
                          "-" if at is None else str(at["median_step_of_question_in_failures"])))  # fmt: skip
    lines += ["", f"never asking {100 * never['rate']:.1f} % succeed, always {100 * always['rate']:.1f} %", "",
              _row("coverage of " + found["score"], "promised", "seen", "band", "", "")]  # fmt: skip
    for rate, entry in found["coverage"][found["score"]].items():
        band = entry["band"]
        lines.append(_row(f"rate {rate}", f"{100 * entry['promised']:.0f} %", f"{100 * entry['rate']:.1f} % of {entry['n']}",
                          f"{100 * band['low']:.1f} to {100 * band['high']:.1f}",
                          "inside" if entry["inside"] else "OUTSIDE", ""))  # fmt: skip
    for entry in found["left_out"]:
        lines += ["", f"without {entry['word']!r} ({entry['fitted_on']} episodes), judged on its {entry['episodes']} "
                  f"({entry['successes']} succeed)"]  # fmt: skip
        for name, told in (entry["detectors"] or {}).items():
            lines.append(_row(f"  {name}", _share(told["auroc"]), _share(told["matched"]), "", "", ""))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, (24, 22, 22, 16, 22, 12), strict=True)).rstrip()


def _share(entry: Mapping[str, float]) -> str:
    return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def draw(found: Mapping[str, Any], shown: Sequence[str] = ("learned", "fused", "overlap", "entropy", CLOCK)) -> str:
    """Success against questions, one line a detector, as one SVG."""
    left, right, top, bottom = 50, 470, 30, 270
    never, always = (100 * found[key]["rate"] for key in ("never_asking", "always_asking"))
    floor = min(90, int(never // 10) * 10)

    def x(share: float) -> float:
        return left + (right - left) * share

    def y(per_cent: float) -> float:
        return bottom - (bottom - top) * (per_cent - floor) / (100 - floor)

    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 320" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text((left + right) / 2, 16, f"{found['suite']}, {found['episodes']} episodes: success against questions", "middle"),
    ]
    for tick in range(floor, 101, 10):
        out += [f'<line x1="{left}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>',
                _text(left - 6, y(tick) + 4, f"{tick}%", "end")]  # fmt: skip
    out += [_text(x(share / 100), bottom + 16, f"{share}%", "middle") for share in range(0, 101, 20)]
    out += [_text((left + right) / 2, bottom + 34, "episodes in which somebody is asked", "middle"),
            f'<line x1="{x(0):.1f}" y1="{y(never):.1f}" x2="{x(1):.1f}" y2="{y(always):.1f}" '
            'stroke="#aaa" stroke-dasharray="4 3"/>']  # fmt: skip
    names = [name for name in shown if name in found["curves"]]
    for name in names:
        line = " ".join(f"{x(p['questions']):.1f},{y(100 * p['success']):.1f}" for p in found["curves"][name])
        dash = ' stroke-dasharray="2 3"' if name == CLOCK else ""
        out.append(f'<polyline points="{line}" fill="none" stroke="{TONES[name]}" stroke-width="1.5"{dash}/>')
        if at := found["asking"].get(name, {}).get("0.1"):
            out.append(f'<circle cx="{x(at["questions"]["rate"]):.1f}" cy="{y(100 * at["success"]["rate"]):.1f}" r="4" '
                       f'fill="{TONES[name]}"/>')  # fmt: skip
    for k, name in enumerate([*names, "at random", "rate 0.1"]):
        at = 44 + 20 * k
        mark = (f'<circle cx="488" cy="{at - 4}" r="4" fill="#555"/>' if name == "rate 0.1" else
                f'<line x1="480" x2="496" y1="{at - 4}" y2="{at - 4}" stroke="{TONES.get(name, "#aaa")}" '
                'stroke-width="2"/>')  # fmt: skip
        out += [mark, _text(502, at, {"clock": "clock (no detector)"}.get(name, name), "start")]
    out += [_text(x(0.05), y(never) + 4, f"never asking: {never:.0f} %", "start"),
            _text(x(1), y(always) + 18, f"always: {always:.0f} %", "end")]  # fmt: skip
    return "\n".join([*out, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'
