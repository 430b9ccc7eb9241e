"""`vla data check`: what is wrong with a dataset, before it is trained on.

    findings = check("data/tabletop")       # [Finding(severity, code, where, episode, frame, dimension, found, expected, fix)]

Every check is filed under a code in `CHECKS`. `dataset.py` opens, `damage.py` takes over what the readers refuse,
`values.py`, `commands.py`, `rotations.py`, `timing.py`, `cameras.py`, `duplicates.py`, `words.py` and `together.py` judge,
`command.py` prints. They are written to stay silent on sound data: every threshold has to be well clear of what real
recordings show, and what the data cannot decide is not claimed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Importing a module files its checks.
from data_tools.check import cameras, commands, damage, duplicates, rotations, timing, together, values, words
from data_tools.check.command import add_check_parser, table
from data_tools.check.dataset import Dataset, open_dataset
from data_tools.check.finding import CHECKS, ORDER, Check, Finding
from vla.embodiment import EmbodimentSpec
from vla.errors import UsageError

__all__ = ["CHECKS", "Dataset", "Finding", "add_check_parser", "check", "check_all", "judge", "open_dataset", "table", "unread"]
ROOMS = (damage, values, commands, rotations, timing, cameras, duplicates, words, together)


def check(
    root: str | Path,
    *,
    frames: bool = True,
    skip: Collection[str] = (),
    progress: bool = False,
    embodiment: EmbodimentSpec | None = None,
    holdout: float | None = None,
) -> list[Finding]:
    """Everything found in one dataset, worst first. Bad data raises nothing; an unknown code in `skip` is a `UsageError`."""
    return check_all([root], frames=frames, skip=skip, progress=progress, embodiment=embodiment, holdout=holdout)


def check_all(
    roots: Sequence[str | Path],
    *,
    frames: bool = True,
    skip: Collection[str] = (),
    progress: bool = False,
    embodiment: EmbodimentSpec | None = None,
    holdout: float | None = None,
) -> list[Finding]:
    """Every dataset by itself, then all of them together. `embodiment` stands in for their own descriptions."""
    if unknown := sorted(set(skip) - CHECKS.keys()):
        raise UsageError("--skip", found=unknown, expected=f"one of {sorted(CHECKS)}", fix="see `vla data check --help`")
    found: list[Finding] = []
    opened: list[Dataset] = []
    for root in map(Path, roots):
        beforehand = unread(root, skip)
        found += beforehand
        if any(f.severity == "error" for f in beforehand):
            continue  # nothing is read through a link that leads out of the dataset
        data = open_dataset(root, embodiment, frames, progress, holdout=holdout)
        opened.append(data)
        found += judge(data, skip)
    if len(opened) > 1:
        found += _run("several", opened, Path(""), skip)
    return sorted(
        found, key=lambda f: (ORDER[f.severity], [str(r) for r in roots].index(f.root) if f.root in map(str, roots) else -1)
    )


def unread(root: Path, skip: Collection[str] = ()) -> list[Finding]:
    """The findings of a folder's names and links, before anything in it is read."""
    return list(_run("folder", root, root, skip)) if root.is_dir() else []


def judge(data: Dataset, skip: Collection[str] = ()) -> list[Finding]:
    """The findings of an opened dataset: what the readers refused and, where there are rows, everything else."""
    found = list(_run("dataset", data, data.root, skip))
    if data.films and data.rows is not None:
        found += _run("pictures", data, data.root, skip)
    return sorted(found, key=lambda f: ORDER[f.severity])


def _run(scope: str, subject: Any, root: Path, skip: Collection[str]) -> Iterator[Finding]:
    for check in CHECKS.values():
        readers_own = check.code in damage.KINDS
        blind = isinstance(subject, Dataset) and (subject.rows is None or not subject.healthy) and not readers_own
        if check.scope == scope and check.code not in skip and not blind:
            yield from (_filed(finding, check, root) for finding in check.run(subject))


def _filed(finding: Finding, check: Check, root: Path) -> Finding:
    return replace(finding, code=check.code, root=finding.root or str(root))
