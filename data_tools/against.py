"""Whether a dataset fits a policy: the robot's description, and every dimension under the policy's own normaliser.

The policy may also be one of OpenVLA's or openpi's: of those only the statistics are compared, see `norm_stats.py`.

A policy sees numbers only after its normaliser, made from the data it was trained on. Data of another range arrives
clipped or squeezed: training goes on without complaint, and the robot moves wrongly (openpi #1025). `policy.json` is read
as JSON; neither weights nor torch are touched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_tools.norm_stats import FILES, holds_norm_stats, norm_stats_names, read_norm_stats
from vla.embodiment import EmbodimentSpec, explain
from vla.episodes.layout import Layout, read_layout
from vla.episodes.rows import Rows, read_rows
from vla.errors import CheckpointError, UsageError, VLAError
from vla.normalize import Normalizer, Stats

Verdict = Literal["fits", "look", "misfit"]
ORDER: dict[str, int] = {"misfit": 0, "look": 1, "fits": 2}

CLIPPED = (0.05, 0.20)
"""Shares of rows clipped from which a dimension deserves a look, and is a misfit. `q99` clips 2 % of its own data."""
SHIFTED = (1.0, 3.0)
"""The same, of the distance between the two means in standard deviations of the policy's data."""
SCALED = (3.0, 10.0)
"""The same, of the ratio of the standard deviations, either way round."""
_DEGREE = 180 / np.pi
MISTAKES = {
    "in degrees, the policy in radians": 1 / _DEGREE,
    "in radians, the policy in degrees": _DEGREE,
    "of the opposite sign": -1.0,
}
"""What makes all quantiles fit when the data is multiplied by it."""


@dataclass(frozen=True)
class Dimension:
    """One dimension of the data beside the policy's."""

    part: str
    name: str
    verdict: Verdict
    data: tuple[float, float]
    """q01 and q99 of the rows."""
    policy: tuple[float, float]
    """What the policy's normaliser maps to -1 and 1."""
    overlap: float
    """Share of the data's q01..q99 that lies inside the policy's range."""
    clipped: float
    """Share of the rows the normaliser clips."""
    shift: float
    """(mean of the data - mean of the policy's) / standard deviation of the policy's."""
    scale: float
    """Standard deviation of the data / that of the policy's."""
    reason: str = ""


@dataclass
class Fit:
    """The verdict. `differences` are those of the descriptions: (verdict, what)."""

    robot: str
    differences: list[tuple[Verdict, str]] = field(default_factory=list)
    dimensions: list[Dimension] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """The worst of all parts."""
        said = [verdict for verdict, _ in self.differences] + [d.verdict for d in self.dimensions]
        return "misfit" if "misfit" in said else "look" if "look" in said else "fits"

    def to_json(self) -> dict[str, Any]:
        return {"fits": self.verdict != "misfit", "verdict": self.verdict, "robot": self.robot,
                "differences": [{"verdict": v, "what": w} for v, w in self.differences],
                "dimensions": [asdict(d) for d in self.dimensions]}  # fmt: skip


def fit(root: str | Path, policy: str | Path, robot: str | None = None) -> Fit:
    """Hold the dataset at `root` against the policy folder (or run folder) `policy`; `robot` is one of the policy's, by key.

    `policy` may also be OpenVLA's or openpi's statistics, a file or the folder of a checkpoint; `robot` is then the name of
    the dataset they are of (left out: that of `root`'s folder, or the only one there is).

    Raises `DataError` for a damaged dataset or broken statistics, `CheckpointError` for what is no policy folder, `UsageError`
    for a robot the policy does not know.
    """
    if _policy_file(Path(policy)) is None and holds_norm_stats(policy):
        return _fit_statistics(Path(root), Path(policy), robot)
    specs, normalizers = read_meaning(Path(policy))
    layout, rows = _read(Path(root))
    declared = (Path(root) / "meta" / "embodiment.json").is_file()
    key = _choose(layout.spec, specs, robot)
    out = Fit(key)
    out.differences = _differences(specs[key], layout.spec, declared)
    _compare(out, rows, specs[key], normalizers[key])
    return out


def _read(root: Path) -> tuple[Layout, Rows]:
    layout, problems = read_layout(root, None, need_stats=False)
    rows = read_rows(layout, problems)
    problems.raise_if_any()
    assert rows is not None
    return layout, rows


def _compare(out: Fit, rows: Rows, spec: EmbodimentSpec, normalizers: Mapping[str, Normalizer]) -> None:
    """Add a verdict on every dimension, its name taken from `spec`; a part of another width is a difference."""
    for part, values in (("action", rows.action), ("state", rows.state)):
        normalizer = normalizers.get(part)
        if normalizer is None or normalizer.dims != values.shape[1]:
            said = normalizer.dims if normalizer else 0
            if said or part == "action":
                out.differences.append(("misfit", f"{part}: {values.shape[1]} dimensions, the policy's has {said}"))
            continue
        names = spec.action_names if part == "action" else spec.state_names
        out.dimensions += [_dimension(part, name, values[:, d], normalizer, d) for d, name in enumerate(names)]


def _fit_statistics(root: Path, path: Path, key: str | None) -> Fit:
    """`fit` against somebody else's statistics, which are all that is known of the policy."""
    names = norm_stats_names(path)
    if key is None and len(names) > 1 and root.resolve().name in names:
        key = root.resolve().name
    found = read_norm_stats(path, key)
    layout, rows = _read(root)
    out = Fit(key or names[0])
    out.differences.append(("look", "statistics say nothing of conventions, cameras and rate, so only numbers could be compared"))
    normalizers = {}
    for part, given, mask, wide in (("action", found.action, found.mask, rows.action.shape[1]),
                                    ("state", found.state, None, rows.state.shape[1])):  # fmt: skip
        if given is None:
            continue
        size = len(given.values["mean"])
        if size > wide and not any(values[wide:].any() for values in given.values.values()):  # openpi fills up to its width
            out.differences.append(("look", f"{part}: the last {size - wide} of {size} dimensions of the statistics are padding"))
            given = Stats({name: values[:wide] for name, values in given.values.items()}, given.count)
            mask = None if mask is None else mask[:wide]
        scheme = "q99" if {"q01", "q99"} <= given.values.keys() else "meanstd"
        normalizers[part] = Normalizer(given, scheme, mask, f"{path}: {out.robot}.{part}")
    _compare(out, rows, layout.spec, normalizers)
    return out


def _policy_file(folder: Path) -> Path | None:
    candidates = (folder / "policy" / "policy.json", folder / "policy.json", *([folder] if folder.name == "policy.json" else []))
    return next((path for path in candidates if path.is_file()), None)


def read_meaning(folder: Path) -> tuple[dict[str, EmbodimentSpec], dict[str, dict[str, Normalizer]]]:
    """(robots, their normalisers per part) of a policy folder or a run folder. Raises `CheckpointError`."""
    path = _policy_file(folder)
    if path is None:
        raise CheckpointError(folder, found="no policy.json" if folder.exists() else "no such folder",
                              expected=f"a policy folder, a run folder, or other projects' statistics ({', '.join(FILES)})",
                              fix="give the run.out of a training run, or its policy/ folder")  # fmt: skip
    try:
        meaning = json.loads(path.read_text())
        specs = {key: EmbodimentSpec.model_validate(spec) for key, spec in meaning["embodiments"].items()}
        normalizers = {
            robot: {part: Normalizer.from_json(entry, f"{path}: normalizers.{robot}.{part}") for part, entry in parts.items()}
            for robot, parts in meaning["normalizers"].items()
        }
        if not specs or specs.keys() - normalizers.keys():
            raise KeyError(f"normalizers of {sorted(specs.keys() - normalizers.keys()) or 'any robot'}")
    except (ValueError, KeyError, TypeError, AttributeError, VLAError) as error:
        raise CheckpointError(path, found=f"{type(error).__name__}: {error}", expected="embodiments and normalizers, as saved",
                              fix="copy the folder again; policy.json is not meant to be edited") from error  # fmt: skip
    return specs, normalizers


def _choose(spec: EmbodimentSpec, specs: Mapping[str, EmbodimentSpec], robot: str | None) -> str:
    """The policy's robot that the dataset is held against: the named one, its own, or the only one there is."""
    if robot is not None and robot not in specs:
        raise UsageError("--robot", found=robot, expected=f"one of {sorted(specs)}", fix="choose one of the policy's robots")
    if robot is not None or spec.key in specs:
        return robot or spec.key
    alike = [key for key, own in specs.items() if (own.state_dim, own.action_dim) == (spec.state_dim, spec.action_dim)]
    if len(specs) == 1 or len(alike) == 1:
        return alike[0] if alike else next(iter(specs))
    raise UsageError(f"robot {spec.key!r} of the dataset", found=f"the policy knows {sorted(specs)}", expected="one of these",
                     fix=f"say which one it is: --robot {sorted(specs)[0]}")  # fmt: skip


def _differences(policy: EmbodimentSpec, data: EmbodimentSpec, declared: bool) -> list[tuple[Verdict, str]]:
    """How the descriptions differ (the policy's first), each with what it means for the fit."""
    out: list[tuple[Verdict, str]] = []
    missing = sorted(policy.cameras.keys() - data.cameras.keys())
    if missing:
        out.append(("misfit", f"cameras {missing} are missing; the dataset has {sorted(data.cameras)}"))
    for line in explain(policy, data):
        what = line.split(":")[0]
        if what == "cameras":
            continue  # sizes are brought to the policy's own; names were said above
        described = what.split(".")[-1] in ("low", "high", "robot")
        if what in ("name", "mode") or described:
            out.append(("look", line))
        elif what == "control_hz":
            out.append(("look", f"{line} Hz: what a chunk does takes another time"))
        elif declared:
            out.append(("misfit", line))
    if not declared:
        out.append(("look", "the dataset declares no conventions, so only its numbers could be compared"))
    return out


def _dimension(part: str, name: str, values: np.ndarray, normalizer: Normalizer, d: int) -> Dimension:
    x = values.astype(np.float64)
    low, high = float(normalizer.low[d]), float(normalizer.high[d])
    if not normalizer.mask[d]:
        low, high = -1.0, 1.0  # passed through, clipped to the unit range
    q01, q50, q99 = np.quantile(x, [0.01, 0.5, 0.99]).tolist()
    stats = {k: float(v[d]) for k, v in normalizer.stats.values.items()}
    mean, std = stats.get("mean", (low + high) / 2), stats.get("std", (high - low) / 4)
    std = max(std, 1e-3 * (high - low), 1e-9)
    clipped = float(((x < low) | (x > high)).mean())
    shift, scale = (float(x.mean()) - mean) / std, float(x.std()) / std
    overlap = _overlap((q01, q99), (low, high))
    base = Dimension(part, name, "fits", (q01, q99), (low, high), overlap, clipped, shift, scale)
    if normalizer.constant[d]:
        same = bool(np.abs(x - (low + high) / 2).max() <= 1e-3 * max(abs(low), abs(high), 1e-3))
        base = Dimension(part, name, "fits", (q01, q99), (low, high), overlap, clipped, 0.0, 1.0)
        here = "it moves here" if q99 > q01 else f"{q50:g} here"
        return base if same else _said(base, "misfit", f"constant in the policy's data ({low:g}), so it is masked; {here}")
    wide = max(scale, 1 / scale) if scale > 0 else np.inf
    reasons = [
        (clipped, CLIPPED, f"{clipped:.0%} of the rows are clipped"),
        (abs(shift), SHIFTED, f"the mean is {shift:+.1f} standard deviations away"),
        (wide if scale > 1 else 0.0, SCALED, f"{scale:.1f} times as spread"),
    ]
    verdict: Verdict = "fits"
    words = []
    for value, (look, misfit), text in reasons:
        if value > look:
            words.append(text)
            verdict = "misfit" if value > misfit or verdict == "misfit" else "look"
    if scale < 1 / SCALED[0]:  # squeezed into a corner: poor resolution, but no wrong motion
        words.append("constant here" if scale < 1e-6 else f"{1 / scale:.1f} times less spread")
        verdict = "look" if verdict == "fits" else verdict
    if verdict == "misfit" and (guess := _mistake((q01, q50, q99), stats, low, high)):
        words.append(f"perhaps {guess}")
    return _said(base, verdict, "; ".join(words)) if words else base


def _said(base: Dimension, verdict: Verdict, reason: str) -> Dimension:
    return Dimension(**{**asdict(base), "verdict": verdict, "reason": reason})


def _overlap(inner: tuple[float, float], outer: tuple[float, float]) -> float:
    width = inner[1] - inner[0]
    if width <= 0:
        return float(outer[0] <= inner[0] <= outer[1])
    return max(0.0, min(inner[1], outer[1]) - max(inner[0], outer[0])) / width


def _mistake(data: tuple[float, float, float], stats: Mapping[str, float], low: float, high: float) -> str:
    """The usual mistake after whose correction the quantiles would lie where the policy's do; "" for none."""
    if not all(q in stats for q in ("q01", "q50", "q99")):
        return ""
    own, room = np.array([stats["q01"], stats["q50"], stats["q99"]]), 0.15 * (high - low)
    for words, factor in MISTAKES.items():
        if np.abs(np.sort(np.array(data) * factor) - own).max() <= room:
            return words
    if np.abs(np.sort(low + high - np.array(data)) - own).max() <= room:
        return "of the opposite sense (open and closed exchanged)"
    return ""


def lines(result: Fit) -> list[str]:
    """The verdict for the terminal, worst dimensions first."""
    out = [f"held against {result.robot}"]
    out += [f"  {verdict:6s} {what}" for verdict, what in sorted(result.differences, key=lambda entry: ORDER[entry[0]])]
    wide = max([len(f"{d.part} {d.name}") for d in result.dimensions] or [0])
    if result.dimensions:
        out.append(
            f"\n  {'':6s} {'':{wide}s} {'data q01..q99':>21s} {'policy -1..1':>21s} {'inside':>7s} "
            f"{'clipped':>8s} {'shift':>6s} {'spread':>7s}"
        )
    for d in sorted(result.dimensions, key=lambda d: ORDER[d.verdict]):
        spans = [f"{a:.4g} .. {b:.4g}" for a, b in (d.data, d.policy)]
        out.append(f"  {d.verdict:6s} {f'{d.part} {d.name}':{wide}s} {spans[0]:>21s} {spans[1]:>21s} {d.overlap:>7.0%} "
                   f"{d.clipped:>8.1%} {d.shift:>+6.1f} {d.scale:>7.2f}  {d.reason}".rstrip())  # fmt: skip
    ending = {"fits": "it fits", "look": "it fits, with differences worth a look", "misfit": "it does not fit"}[result.verdict]
    advice = "" if result.verdict != "misfit" else (
        "\n  fix: bring the data to the policy's conventions with a dataset card (`vla data convert --help`), or train with "
        "statistics of this data, as another robot or mode"
    )  # fmt: skip
    return [*out, "", f"{ending}{advice}"]
