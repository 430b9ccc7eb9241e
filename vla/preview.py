"""What a training config will draw, said before anything is trained: `vla data mixture CONFIG`.

Per dataset: its share and how often it will be seen; how much of what is computed for it is padding (action dimensions other
robots have, steps beyond the ends of its episodes); how many of its numbers the normaliser will clip.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from vla.batch import Encoder
from vla.config import load_config
from vla.episodes.hub import parse
from vla.mixture import Mixture, open_mixture
from vla.normalize import Normalizer
from vla.policy import VLAPolicy, load_policy
from vla.policy.build import normalizers_of
from vla.policy.sizes import room_for
from vla.resample import native_steps
from vla.train import TrainConfig

CLIPPED_MUCH = 0.05
"""Share of clipped numbers of one dimension that is pointed at."""


def preview(config: TrainConfig, mixture: Mixture, base: VLAPolicy | None = None) -> dict[str, Any]:
    """`{"datasets": [...], "waste": ..., "notes": [...]}`; shares and fractions in 0..1. `base` is the policy started from."""
    settings = base.config if base else config.policy
    encoder: Encoder | None = base.encoder if base else None
    A = encoder.action_dim if encoder else room_for("action", settings.action_dim, mixture.embodiments)
    known = base.normalizers if base else {}
    normalizers = {key: known.get(key) or normalizers_of(key, mixture, settings.normalization) for key in mixture.embodiments}
    lines, notes, used = mixture.report(config.run.steps, config.optim.batch), [], 0.0
    for number, (store, spec) in enumerate(zip(mixture.stores, mixture.specs, strict=True)):
        line, native = lines[number], native_steps(mixture.seconds, mixture.horizon, spec.control_hz)
        lengths = store.stretches(mixture.episodes[number])
        past = 1 - _covered(lengths, native, mixture.horizon)
        rows = _rows(mixture, number)
        clipped = {part: _clipped(normalizers[spec.key][part], getattr(store, part)[rows]) for part in ("action", "state")}
        line |= {
            "hz": spec.control_hz, "chunk": native, "cameras": sum(own is not None for own in mixture.cameras[number].values()),
            "masked_cameras": sorted(name for name, own in mixture.cameras[number].items() if own is None),
            "action_dim": spec.action_dim, "state_dim": spec.state_dim, "padded_dims": 1 - spec.action_dim / A,
            "padded_steps": past, "clipped": {part: float(c.mean()) if c.size else 0.0 for part, c in clipped.items()},
        }  # fmt: skip
        used += line["share"] * spec.action_dim / A * (1 - past)
        for part, names in (("action", spec.action_names), ("state", spec.state_names)):
            notes += [f"{line['dataset']}: {share:.0%} of {part} {names[d]} lie outside the statistics and are clipped"
                      for d, share in enumerate(clipped[part]) if share > CLIPPED_MUCH]  # fmt: skip
            constant = [names[d] for d in np.flatnonzero(normalizers[spec.key][part].constant)]
            if constant:
                notes.append(f"{line['dataset']}: {part} {', '.join(constant)} never changes: 0 to the policy, itself after")
        span = native / spec.control_hz
        if mixture.seconds and abs(span / mixture.seconds - 1) > 0.05:
            notes.append(f"{line['dataset']}: a chunk of {mixture.seconds:g} s is {native} of its steps, {span:g} s")
        if line["epochs"] < 1:
            notes.append(f"{line['dataset']}: {line['epochs']:.0%} of its frames will be seen; more run.steps, or more weight")
    if mixture.answers is not None and mixture.answers.left_out:
        notes.append(f"{mixture.answers.path}: {mixture.answers.left_out} empty or very long questions or answers are left out")
    spoken = sum(line["share"] for line in lines[len(mixture.stores) :])
    return {"datasets": lines, "action_dim": A, "waste": 1 - used / (1 - spoken) if spoken < 1 else 1.0, "notes": notes}


def _covered(lengths: np.ndarray, native: int, horizon: int) -> float:
    """Mean share of a chunk's steps that lie inside the episode, over all its frames."""
    left = np.arange(1, native + 1)
    whole = np.maximum(1, np.floor(left * horizon / native + 1e-9)) / horizon  # with `left` of the robot's steps to go
    short = np.minimum(lengths, native)
    total = np.cumsum(whole)[short - 1].sum() + (lengths - short).sum()
    return float(total / max(1, lengths.sum()))


def _rows(mixture: Mixture, number: int) -> np.ndarray:
    """Row numbers of the chosen episodes, at most about 200,000, evenly spread."""
    starts = mixture.stores[number].episode_starts
    step = max(1, mixture.sizes[number] // 200_000)
    return np.concatenate([np.arange(int(starts[e]), int(starts[e + 1]), step) for e in mixture.episodes[number]])


def _clipped(normalizer: Normalizer, values: np.ndarray) -> np.ndarray:
    return normalizer.clipped_fraction(values) if values.shape[1] else np.zeros(0)


def text(result: dict[str, Any], config: TrainConfig) -> str:
    """The table for a terminal."""
    head = ["dataset", "robot", "episodes", "frames", "share", "draws", "epochs", "Hz", "chunk", "dims", "cams", "padded dims",
            "past the end", "clipped"]  # fmt: skip
    rows = [head]
    for line in result["datasets"]:
        rest = ["-"] * 7
        if "hz" in line:
            clipped = "/".join(f"{line['clipped'][part]:.1%}" for part in ("action", "state"))
            cameras = f"{line['cameras']}" + (f"+{len(line['masked_cameras'])} masked" if line["masked_cameras"] else "")
            rest = [f"{line['hz']:g}", f"{line['chunk']}", f"{line['action_dim']}/{result['action_dim']}", cameras,
                    f"{line['padded_dims']:.0%}", f"{line['padded_steps']:.0%}", clipped]  # fmt: skip
        told = f" ({line['language']})" if line.get("language", "task") != "task" else ""
        rows.append([line["dataset"] + told, line["robot"], str(line["episodes"]), f"{line['frames']:,}", f"{line['share']:.1%}",
                     f"{line['draws']:,}", f"{line['epochs']:g}", *rest])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]

    def line_of(row: list[str]) -> str:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    waste = f"{result['waste']:.0%} of the action positions are padding"
    said = [*map(line_of, rows), "", f"{config.run.steps:,} steps of {config.optim.batch}; {waste}. Clipped: action/state"]
    return "\n".join([*said, *(f"note: {note}" for note in result["notes"])])


def add_mixture_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add `mixture` to the `vla data` sub-commands; `run` carries it out."""
    parser = subparsers.add_parser(
        "mixture", help="print what a training config will draw", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  vla data mixture configs/train/robots.yaml\n"
        "  vla data mixture train/robots mixture.temperature=2 --json",
    )  # fmt: skip
    parser.add_argument("config", metavar="CONFIG", help="a training config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides, as for `vla train`")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry out `vla data mixture`. No picture is decoded, no video fetched."""
    config = load_config(args.config, args.overrides, TrainConfig)
    base = load_policy(config.start.policy, "cpu") if config.start else None
    settings = base.config if base else config.policy
    local = [entry.model_copy(update={"stream": entry.stream or parse(entry.path) is not None})
             for entry in config.mixture.datasets]  # fmt: skip
    unseen = config.mixture.model_copy(update={"frames": "none", "datasets": local})
    mixture, _ = open_mixture(unseen, settings.chunk, config.run.seed, progress=not args.json, seconds=settings.chunk_seconds)
    result = preview(config, mixture, base)
    print(json.dumps(result) if args.json else text(result, config))
    return 0
