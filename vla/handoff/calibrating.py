"""`vla handoff calibrate`: detectors fitted to some rollouts, thresholds to the successes among others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from vla.errors import DataError, UsageError
from vla.handoff.conformal import LEVEL, check_alpha, coverage_band, needed
from vla.handoff.detectors import Fitted
from vla.handoff.gate import fingerprint_of, folder_of, write_handoff
from vla.handoff.learning import choose, cross_validated, fit
from vla.handoff.rollouts import Rollouts
from vla.handoff.scores import DETECTORS, Kind


def calibrate(
    folder: str | Path, train: Rollouts | None, held: Rollouts, alpha: float = 0.1, score: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Write `handoff.json` into the policy's folder; returns what it says.

    `train`: rollouts the detectors of hidden states are fitted to, and the detector (default for `score`) and its sum over an
    episode are chosen by; without, only what needs no fitting is calibrated, summed up by its maximum. `held`: rollouts whose
    successes make the thresholds, of other scenes than `train`'s.

    Raises `UsageError` for rollouts of another policy or of the same scenes, and `DataError` for too few successes.
    """
    path = folder_of(folder)
    beside = fingerprint_of(path)
    check_alpha(alpha, "--alpha")
    for name, rollouts in (("--train", train), ("--calibrate", held)):
        if rollouts is not None and rollouts.meta["policy"] != beside:
            raise UsageError(name, found=f"rollouts of policy {str(rollouts.meta['policy'])[:12]}",
                             expected=f"{beside[:12]}, the one in {path.name}",
                             fix="vla handoff collect with this policy")  # fmt: skip
    if train is not None and (both := np.intersect1d(train.episodes["seed"], held.episodes["seed"])).size:
        raise UsageError("--calibrate", found=f"{both.size} scenes that are in --train as well",
                         expected="other scenes: a detector is surer of what it was fitted to",
                         fix="collect with another --seed")  # fmt: skip
    fitted = Fitted()
    chosen: dict[str, Kind] = {name: "max" for name in DETECTORS if name in held.scores}
    figures: dict[str, Any] = {}
    if train is not None:
        chosen, figures = choose(cross_validated(train, seed=seed))
        fitted = fit(train, seed)
    held = held.judged(fitted)
    chosen = {name: kind for name, kind in chosen.items() if name in held.scores}
    if score is not None and score not in chosen:
        raise UsageError("--score", found=repr(score), expected=f"one of {', '.join(chosen)}", fix="leave it out for the best")
    good = held.where(held.success)
    if len(good) < needed(alpha):
        raise DataError("--calibrate", found=f"{len(good)} successful episodes of {len(held)}",
                        expected=f"at least {needed(alpha)} for alpha {alpha:g}, and better 200",
                        fix="collect more episodes, or fewer kinds of --perturb")  # fmt: skip
    best = score or next(iter(chosen))
    meaning = {
        "policy": beside, "robot": held.meta["robot"], "suite": held.meta["suite"], "tasks": held.meta["tasks"],
        "execute": held.meta["execute"], "decode": held.meta["decode"], "samples": held.meta["samples"],
        "scale": held.meta["scale"], "alpha": alpha, "level": LEVEL, "score": best, "n": len(good),
        "band": coverage_band(len(good), alpha)._asdict(),
        "perturb": dict(sorted(Counter(good.episodes["trouble"].tolist()).items())),
        "seeds": _seeds(held), "scores": {name: _entry(good, name, kind, alpha, figures) for name, kind in chosen.items()},
        "trained": None if train is None else {"episodes": len(train), "successes": int(train.success.sum()),
                                               "seeds": _seeds(train)},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    meaning["threshold"] = meaning["scores"][best]["threshold"]
    write_handoff(path, meaning, fitted.arrays())
    return meaning


def _entry(good: Rollouts, name: str, kind: Kind, alpha: float, figures: dict[str, Any]) -> dict[str, Any]:
    ordered = np.sort(good.largest(name, kind)).round(6)
    at = int(np.ceil((len(ordered) + 1) * (1 - alpha) - 1e-9))
    told = {"cross_validated": {key: round(value, 4) for key, value in figures[name][kind].items()}} if name in figures else {}
    return {"running": kind, "threshold": float(ordered[at - 1]), **told, "successes": ordered.tolist()}


def _seeds(rollouts: Rollouts) -> list[list[int]]:
    parts: Sequence[Any] = rollouts.meta.get("parts", [rollouts.meta])
    return [[int(part["seed"]), int(part["seed"]) + int(part["episodes"]) - 1] for part in parts]


def calibrated_text(meaning: dict[str, Any], says: str) -> str:
    """For a terminal."""
    rows: list[tuple[str, ...]] = [("detector", "sum", "threshold", "tells failures (whole)", "(same look)")]
    for name, entry in meaning["scores"].items():
        found = entry.get("cross_validated", {})
        rows.append((("* " if name == meaning["score"] else "  ") + name, entry["running"], f"{entry['threshold']:.4g}",
                     *(f"{found[key]:.3f}" if key in found else "-" for key in ("auroc", "matched"))))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows] + ["", says]
    )
