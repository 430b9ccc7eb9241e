"""What a check says, and the list of all checks.

A check is a generator over one opened dataset (or over several); it is registered under the code its findings carry, so
that any of them can be left out by name and a test can show that a finding is that check's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
ORDER: dict[str, int] = {"error": 0, "warning": 1, "note": 2}
"""An error spoils training or its figures; a warning probably costs; a note is worth knowing."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a dataset, and where."""

    severity: Severity
    where: str
    """File or part, relative to the dataset."""
    found: str
    expected: str
    fix: str
    """A command that can be typed, or an exact edit."""
    episode: int | None = None
    frame: int | None = None
    """Row inside the episode."""
    dimension: str | None = None
    code: str = ""
    root: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def place(self) -> str:
        """`data, episode 3, frame 7, eef.x`."""
        parts = [self.where]
        parts += [f"{name} {value}" for name, value in (("episode", self.episode), ("frame", self.frame)) if value is not None]
        return ", ".join([*parts, self.dimension] if self.dimension else parts)


@dataclass(frozen=True)
class Check:
    """One entry of `CHECKS`. `scope`: `folder` looks at the files before anything is read, `dataset` at the numbers and
    words, `pictures` at what was decoded, `several` at all datasets together."""

    code: str
    about: str
    scope: Literal["folder", "dataset", "pictures", "several"]
    run: Callable[[Any], Iterator[Finding]]


CHECKS: dict[str, Check] = {}


def register(code: str, about: str, scope: Literal["folder", "dataset", "pictures", "several"] = "dataset") -> Callable:
    """Decorator: file a generator of findings under `code`."""

    def keep(run: Callable[[Any], Iterator[Finding]]) -> Callable[[Any], Iterator[Finding]]:
        CHECKS[code] = Check(code, about, scope, run)
        return run

    return keep
