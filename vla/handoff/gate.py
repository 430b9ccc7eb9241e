"""The gate: after every look, fine, ask, hold or retreat, by thresholds calibrated on this very policy. No torch.

    gate = Gate.load("runs/demo/policy", {"ask": 0.1, "hold": 0.02})
    gate.reset()                                               # an episode begins
    ruling = gate.look(chunk, step=t, features=features)       # ruling.say, ruling.reason
    gate.answered()                                            # whoever was asked has answered

A response comes with a rate: how many of a hundred episodes that would have gone well may be stopped by it. The rarest response
whose threshold is passed is the ruling, and it stands until `answered()`. `handoff.json` beside a policy (or an export made of
it) holds what thresholds are made of; another policy's is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla.durable import digest_of, replace_file
from vla.errors import CheckpointError, UsageError
from vla.handoff.conformal import Band, check_alpha, coverage_band, guarantee, needed, threshold
from vla.handoff.detectors import Fitted
from vla.handoff.scores import DETECTORS, NEEDS, Kind, Running, Scorer

FILE, WEIGHTS = "handoff.json", "handoff.safetensors"
FORMAT = 1
Say = Literal["fine", "ask", "hold", "retreat"]
RESPONSES: tuple[Say, ...] = ("ask", "hold", "retreat")
"""ask: somebody is called; hold: the robot stands still; retreat: it goes where it is safe. Each is the caller's to carry out."""
_NEEDED = ("format", "policy", "robot", "suite", "tasks", "alpha", "level", "score", "scores", "scale", "execute", "samples",
           "perturb", "weights")  # fmt: skip
_AGAIN = "vla handoff calibrate POLICY makes it again"


@dataclass(frozen=True)
class Ruling:
    """What to do after a look."""

    say: Say
    score: str
    """Which detector it is by."""
    value: float
    """Its running value in this episode."""
    threshold: float
    """Of the response, or of the first one that has not been reached."""
    reason: str
    """In words; empty when all is fine."""
    scores: Mapping[str, float]
    """What every detector said of this look, for logs and plots."""


@dataclass(frozen=True)
class Handoff:
    """What `handoff.json` says, understood."""

    meaning: Mapping[str, Any]
    fitted: Fitted

    @property
    def perturbed(self) -> list[str]:
        return [kind for kind in self.meaning["perturb"] if kind != "none"]

    def n(self, score: str) -> int:
        """Successful episodes it is calibrated on."""
        return len(self.meaning["scores"][score]["successes"])

    def threshold(self, score: str, rate: float) -> float:
        return threshold(self.meaning["scores"][score]["successes"], rate)

    def band(self, score: str, rate: float) -> Band:
        return coverage_band(self.n(score), rate, self.meaning["level"])

    def facts(self) -> dict[str, Any]:
        """What a card says of it."""
        name, told = self.meaning["score"], ("alpha", "suite", "tasks")
        entry = self.meaning["scores"][name]
        return {"score": name, "what": DETECTORS[name], "running": entry["running"], "n": self.n(name), "says": self.says(),
                "threshold": self.threshold(name, self.meaning["alpha"]), **{key: self.meaning[key] for key in told}}  # fmt: skip

    def says(self) -> str:
        """The promise, and when it fails."""
        return guarantee(self.n(self.meaning["score"]), self.meaning["alpha"], self.perturbed, self.meaning["level"])


class Gate:
    """Judges the looks of one robot, one episode at a time. Not thread-safe."""

    def __init__(self, handoff: Handoff, respond: Mapping[str, float] | None = None, score: str | None = None) -> None:
        """`respond`: response -> rate of it in episodes that go well (default: ask, at the rate it was calibrated for); `score`:
        the detector (default: the one it was calibrated with). Raises `UsageError` for a rate the calibration cannot keep."""
        meaning = handoff.meaning
        self.handoff, self.score = handoff, score or meaning["score"]
        self.respond = dict(respond) if respond else {"ask": meaning["alpha"]}
        if self.score not in meaning["scores"]:
            raise UsageError("gate: score", found=repr(self.score), expected=f"one of {', '.join(meaning['scores'])}",
                             fix="leave it out, or calibrate again")  # fmt: skip
        if unknown := sorted(self.respond.keys() - set(RESPONSES)):
            raise UsageError("gate: respond", found=", ".join(unknown), expected=f"some of {', '.join(RESPONSES)}",
                             fix="ask=0.1 hold=0.02")  # fmt: skip
        n, entry = handoff.n(self.score), meaning["scores"][self.score]
        if few := [f"{say}={rate:g} needs {needed(rate)}" for say, rate in self.respond.items()
                   if check_alpha(rate, f"gate: {say}") and n < needed(rate)]:  # fmt: skip
            raise UsageError("gate: respond", found="; ".join(few), expected=f"rates that {n} successful episodes can tell apart",
                             fix=f"a higher rate (at least {1 / (n + 1):.3g}), or calibrate on more")  # fmt: skip
        self._kind: Kind = entry["running"]
        by_rate = sorted(self.respond.items(), key=lambda item: (-item[1], RESPONSES.index(item[0])))  # pyright: ignore[reportArgumentType]
        self.thresholds: list[tuple[str, float]] = [(say, handoff.threshold(self.score, rate)) for say, rate in by_rate]
        """(response, threshold), rising."""
        self.needs = NEEDS.get(self.score, "")
        """What `look` must be given beside the chunk: "", "features" or "samples"."""
        self.samples = int(meaning["samples"]) if self.needs == "samples" else 0
        self._scorer = Scorer(np.array(meaning["scale"]), handoff.fitted)
        self.reset()

    @classmethod
    def load(cls, folder: str | Path, respond: Mapping[str, float] | None = None, score: str | None = None) -> Gate:
        """From a policy folder, a run or an export folder. Raises `CheckpointError` where there is none, or another policy's."""
        return cls(read_handoff(folder), respond, score)

    def reset(self) -> None:
        """Another episode begins."""
        self._forget()
        self.questions = 0
        """Asked in this episode so far."""

    def answered(self) -> None:
        """Somebody has helped: what was said before counts no more. From here on the promise is no longer one, for it is about
        whole episodes; the thresholds stay."""
        self._forget()

    def _forget(self) -> None:
        self._scorer.reset()
        self._running, self._step, self._stands = Running(self._kind), 0, ""

    def look(
        self, chunk: Any, step: int | None = None, features: np.ndarray | None = None, samples: np.ndarray | None = None
    ) -> Ruling:
        """Judge a look. `step`: the control step its chunk begins at (default: as many steps after the last look as when it was
        calibrated). Raises `UsageError` where the detector lacks what it looks at."""
        step = self._step if step is None else step
        scores = self._scorer(step, chunk, features, samples)
        self._step = step + self.handoff.meaning["execute"]
        if self.score not in scores:
            chunks = [name for name in self.handoff.meaning["scores"] if name not in NEEDS]
            raise UsageError(f"gate: {self.score}", found=f"a look without {self.needs or 'confidence'}",
                             expected="what the detector was calibrated on",
                             fix=f"act_inside(..., samples={self.handoff.meaning['samples']}) gives it; or score="
                             f"{chunks[0] if chunks else 'another'!r}, of the chunk alone")  # fmt: skip
        value = self._running(scores[self.score])
        passed = [(say, at) for say, at in self.thresholds if value > at]
        say, at = passed[-1] if passed else ("fine", self.thresholds[0][1])
        if passed and self._stands != say:
            self.questions += not self._stands
            self._stands = say
        reason = f"{DETECTORS[self.score].split(',')[0].split(' (')[0]}: {value:.3g}, above {at:.3g}" if passed else ""
        return Ruling(say, self.score, value, at, reason, scores)  # pyright: ignore[reportArgumentType]  one of RESPONSES


def folder_of(folder: str | Path) -> Path:
    """The folder that holds a policy's `handoff.json`: that of a run is its `policy/`."""
    path = Path(folder)
    return path / "policy" if (path / "policy" / "policy.json").is_file() else path


def fingerprint_of(folder: Path) -> str:
    """What the policy or the export in `folder` says it is. Raises `CheckpointError` when it is neither."""
    for name, key in (("policy.json", "fingerprint"), ("export.json", "policy")):
        try:
            return str(json.loads((folder / name).read_bytes())[key])
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(folder / name, found=f"{type(error).__name__}: {error}", expected=f"JSON with {key!r}",
                                  fix="copy the folder again") from error  # fmt: skip
    raise CheckpointError(folder, found="no policy.json and no export.json", expected="a policy folder or an export",
                          fix="give a run folder or its policy/ folder")  # fmt: skip


def read_handoff(folder: str | Path) -> Handoff:
    """Read `handoff.json` and its weights. Raises `CheckpointError` when there is none, when it is not whole, or when it was
    calibrated on another policy than the one beside it."""
    path = folder_of(folder)
    file = path / FILE
    try:
        meaning = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(path, found=f"no {FILE}", expected="a policy that was calibrated",
                              fix="vla handoff calibrate POLICY --train DIR --calibrate DIR") from None  # fmt: skip
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(file, found=f"{type(error).__name__}: {error}", expected="JSON", fix=_AGAIN) from error
    if not isinstance(meaning, dict) or (missing := [key for key in _NEEDED if key not in meaning]):
        found = f"no {missing}" if isinstance(meaning, dict) else type(meaning).__name__
        raise CheckpointError(file, found=found, expected=f"keys {list(_NEEDED)}", fix=_AGAIN)
    if meaning["format"] != FORMAT:
        raise CheckpointError(file, found=f"format {meaning['format']}", expected=f"format {FORMAT}", fix=_AGAIN)
    if meaning.get("digest") != digest_of(meaning):
        raise CheckpointError(file, found="another content than was written", expected="what `vla handoff calibrate` wrote",
                              fix=f"{_AGAIN}; it is not meant to be edited")  # fmt: skip
    if (beside := fingerprint_of(path)) != meaning["policy"]:
        raise CheckpointError(file, found=f"calibrated on policy {str(meaning['policy'])[:12]}", expected=f"{beside[:12]}, the "
                              "policy beside it", fix=f"thresholds hold for one policy alone: {_AGAIN}")  # fmt: skip
    try:
        return _understand(path, meaning)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(file, found=f"{type(error).__name__}: {error}", expected="what `vla handoff calibrate` wrote",
                              fix=_AGAIN) from error  # fmt: skip


def _understand(path: Path, meaning: dict[str, Any]) -> Handoff:
    arrays: dict[str, np.ndarray] = {}
    if entry := meaning["weights"]:
        from safetensors.numpy import load  # brings no torch

        data = (path / WEIGHTS).read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"{WEIGHTS} has another content than was written")
        arrays = load(data)
    fitted = Fitted.from_arrays(arrays)
    for name, found in meaning["scores"].items():
        ordered = np.array(found["successes"], np.float64)
        if (
            name not in DETECTORS
            or found["running"] not in ("max", "mean")
            or not np.isfinite(ordered).all()
            or ordered.ndim != 1
        ):
            raise ValueError(f"score {name}")
    if meaning["score"] not in meaning["scores"]:
        raise ValueError(f"score {meaning['score']}")
    check_alpha(meaning["alpha"])
    return Handoff(meaning, fitted)


def renamed(handoff: Handoff, fingerprint: str) -> str:
    """The content of `handoff.json` for the same policy under another name, as an adapter has whose base is renamed."""
    whole = {**handoff.meaning, "policy": fingerprint}
    return json.dumps({**whole, "digest": digest_of(whole)}, indent=1, allow_nan=False)


def write_handoff(folder: str | Path, meaning: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    """Write `handoff.json` (of `meaning` without what is filled in here) and the weights; returns the path of the first."""
    path = folder_of(folder)
    weights = None
    if arrays:
        from safetensors.numpy import save

        data = save(dict(arrays))
        replace_file(path / WEIGHTS, data)
        weights = {"file": WEIGHTS, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    whole = {**meaning, "format": FORMAT, "weights": weights}
    whole["digest"] = digest_of(whole)
    replace_file(path / FILE, json.dumps(whole, indent=1, allow_nan=False))
    return path / FILE
