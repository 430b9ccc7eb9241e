"""Collected episodes as tables: one row an episode, one a look. Written as Parquet, with what they were made of as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.durable import replace_file
from vla.errors import DataError, UsageError
from vla.handoff.detectors import Fitted
from vla.handoff.play import Rollout
from vla.handoff.scores import Kind, running

_EPISODE = {"task": str, "group": str, "trouble": str, "seed": np.int64, "severity": np.float32, "success": bool,
            "failure": bool, "steps": np.int32}  # fmt: skip
_SAME = ("format", "policy", "robot", "suite", "execute", "decode", "samples", "scale")
FORMAT = 1


@dataclass(frozen=True)
class Rollouts:
    """E episodes of L looks in all."""

    meta: Mapping[str, Any]
    """What they were collected with: policy, suite, tasks, seeds, troubles, scale, ..."""
    episodes: Mapping[str, np.ndarray]
    """task, group, trouble, seed, severity, success, failure, steps: (E,) each."""
    starts: np.ndarray  # (E + 1,): looks of episode e are starts[e] .. starts[e + 1]
    step: np.ndarray  # (L,): the control step of a look
    scores: Mapping[str, np.ndarray]  # detector -> (L,)
    features: np.ndarray | None  # (L, d) float32
    relief: np.ndarray | None  # (L,) bool

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def success(self) -> np.ndarray:
        """(E,) bool."""
        return self.episodes["success"]

    @property
    def looks(self) -> np.ndarray:
        """(E,): how many an episode has."""
        return np.diff(self.starts)

    @property
    def of_episode(self) -> np.ndarray:
        """(L,): whose a look is."""
        return np.repeat(np.arange(len(self)), self.looks)

    def where(self, wanted: np.ndarray) -> Rollouts:
        """Those episodes; `wanted` (E,) bool."""
        kept = wanted[self.of_episode]
        return replace(
            self, episodes={name: column[wanted] for name, column in self.episodes.items()},
            starts=np.concatenate([[0], np.cumsum(self.looks[wanted])]), step=self.step[kept],
            scores={name: score[kept] for name, score in self.scores.items()},
            features=None if self.features is None else self.features[kept],
            relief=None if self.relief is None else self.relief[kept],
        )  # fmt: skip

    def judged(self, fitted: Fitted) -> Rollouts:
        """With what fitted detectors say."""
        return replace(self, scores={**self.scores, **fitted.said(self.features, self.scores)})

    def running(self, score: str, kind: Kind) -> np.ndarray:
        """(L,): the running value at every look."""
        values = self.scores[score]
        return np.concatenate([running(values[a:b], kind) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)])

    def largest(self, score: str, kind: Kind, looks: int | None = None) -> np.ndarray:
        """(E,): the largest running value of an episode, of its first `looks` looks where given."""
        values = self.running(score, kind)
        return np.array([values[a : b if looks is None else min(b, a + looks)].max()
                         for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)])  # fmt: skip

    def about(self, word: str) -> np.ndarray:
        """(E,) bool: of that group, trouble, or with that word in the name of the task."""
        task, group, trouble = (self.episodes[name] for name in ("task", "group", "trouble"))
        return np.array([word in (g, t, *name.split("-")) for name, g, t in zip(task, group, trouble, strict=True)], bool)


def gather(rollouts: Sequence[Rollout], meta: Mapping[str, Any], group: Any) -> Rollouts:
    """`play`'s rollouts as tables; `group`: task -> group."""
    columns = {
        "task": [r.scene.task for r in rollouts], "group": [group(r.scene.task) for r in rollouts],
        "trouble": [r.scene.trouble for r in rollouts], "seed": [r.scene.seed for r in rollouts],
        "severity": [r.severity for r in rollouts], "success": [r.success for r in rollouts],
        "failure": [r.failure for r in rollouts], "steps": [r.steps for r in rollouts],
    }  # fmt: skip
    said = [scores for r in rollouts for scores in r.scores]
    names = [name for name in said[0] if all(name in scores for scores in said)]
    features = [row for r in rollouts for row in r.features]
    relief = [row for r in rollouts for row in r.relief]
    return Rollouts(
        dict(meta), {name: np.array(columns[name], kind) for name, kind in _EPISODE.items()},
        np.concatenate([[0], np.cumsum([len(r.at) for r in rollouts])]).astype(np.int64),
        np.array([at for r in rollouts for at in r.at], np.int32),
        {name: np.array([scores[name] for scores in said], np.float64) for name in names},
        np.stack(features).astype(np.float32) if features else None, np.array(relief, bool) if relief else None,
    )  # fmt: skip


def save(rollouts: Rollouts, folder: Path) -> None:
    """Write `collect.json`, `episodes.parquet` and `looks.parquet`. Raises `MachineError` on a full disk."""
    episodes = {name: pa.array(column.tolist() if column.dtype.kind == "U" else column)
                for name, column in rollouts.episodes.items()}  # fmt: skip
    looks: dict[str, Any] = {"episode": rollouts.of_episode.astype(np.int32), "step": rollouts.step, **rollouts.scores}
    if rollouts.relief is not None:
        looks["relief"] = rollouts.relief
    table = pa.table(looks)
    if rollouts.features is not None:
        flat = pa.array(rollouts.features.reshape(-1))
        table = table.append_column("features", pa.FixedSizeListArray.from_arrays(flat, rollouts.features.shape[1]))
    for name, content in (("episodes", pa.table(episodes)), ("looks", table)):
        sink = pa.BufferOutputStream()
        pq.write_table(content, sink, compression="zstd", write_page_checksum=True)
        replace_file(folder / f"{name}.parquet", memoryview(sink.getvalue()))
    replace_file(folder / "collect.json", json.dumps({"format": FORMAT, **rollouts.meta}, indent=1))


def load(folders: Sequence[Path]) -> Rollouts:
    """What `save` wrote, of several folders as one. Raises `DataError` for a folder that is no collection, `UsageError` where
    they are of different policies, or were played otherwise."""
    parts = [_load(Path(folder)) for folder in folders]
    first = parts[0]
    for folder, part in zip(folders, parts, strict=True):
        if differ := [key for key in _SAME if part.meta[key] != first.meta[key]]:
            raise UsageError(folder, found="; ".join(f"{key} {str(part.meta[key])[:40]}" for key in differ),
                             expected="; ".join(f"{key} {str(first.meta[key])[:40]}" for key in differ) + f", as in {folders[0]}",
                             fix="collect again with the same policy and options")  # fmt: skip
    if len(parts) == 1:
        return first
    seen = np.concatenate([part.episodes["seed"] for part in parts])
    if len(np.unique(seen)) < len(seen):
        raise UsageError(", ".join(map(str, folders)), found="scenes that are in more than one", expected="each seed once",
                         fix="collect with other seeds")  # fmt: skip
    names = [name for name in first.scores if all(name in part.scores for part in parts)]
    features = [part.features for part in parts if part.features is not None]
    relief = [part.relief for part in parts if part.relief is not None]
    return Rollouts(
        {**first.meta, "parts": [dict(part.meta) for part in parts]},
        {name: np.concatenate([part.episodes[name] for part in parts]) for name in first.episodes},
        np.concatenate([[0], np.cumsum(np.concatenate([part.looks for part in parts]))]),
        np.concatenate([part.step for part in parts]),
        {name: np.concatenate([part.scores[name] for part in parts]) for name in names},
        np.concatenate(features) if len(features) == len(parts) else None,
        np.concatenate(relief) if len(relief) == len(parts) else None,
    )  # fmt: skip


def _load(folder: Path) -> Rollouts:
    try:
        meta = json.loads((folder / "collect.json").read_text())
        episodes, looks = (pq.read_table(folder / f"{name}.parquet", page_checksum_verification=True)
                           for name in ("episodes", "looks"))  # fmt: skip
        if missing := [key for key in _SAME if key not in meta]:
            raise KeyError(f"no {missing}")
        columns = {name: np.array(episodes[name].to_pylist(), kind) for name, kind in _EPISODE.items()}
        of = looks["episode"].to_numpy()
        counts = np.bincount(of, minlength=len(episodes))
        if (np.diff(of) < 0).any() or len(counts) != len(episodes) or not counts.all():
            raise ValueError("looks and episodes do not fit together")
        scores = {name: looks[name].to_numpy() for name in looks.column_names
                  if name not in ("episode", "step", "features", "relief")}  # fmt: skip
        features = None
        if "features" in looks.column_names:
            features = looks["features"].combine_chunks().flatten().to_numpy().reshape(len(looks), -1)
        relief = looks["relief"].to_numpy() if "relief" in looks.column_names else None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(folder, found=f"{type(error).__name__}: {error}", expected="what `vla handoff collect --out DIR` wrote",
                        fix="vla handoff collect POLICY --suite S --out DIR") from error  # fmt: skip
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Rollouts(meta, columns, starts, looks["step"].to_numpy(), scores, features, relief)
