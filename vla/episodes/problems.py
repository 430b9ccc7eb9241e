"""Findings about one dataset, gathered while its files are read and raised together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from vla.errors import DataError

RESTORE = "restore this file from its source; an interrupted `vla data record` is mended by running it again"
RECOMPUTE = "vla data stats {} --write"


class Problems:
    """Findings about one dataset, raised as one `DataError`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.found: list[tuple[str, str, str, str]] = []

    def add(self, where: object, *, found: object, expected: object, fix: str) -> None:
        self.found.append((str(where), str(found), str(expected), fix))

    def raise_if_any(self) -> None:
        if not self.found:
            return
        if len(self.found) == 1:
            where, found, expected, fix = self.found[0]
            raise DataError(where, found=found, expected=expected, fix=fix)
        listed = fixes = ""
        for n, (where, found, expected, fix) in enumerate(self.found, 1):
            listed += f"\n    {n}. {where}: {found} (expected {expected})"
            fixes += f"\n    {n}. {fix}"
        raise DataError(self.root, found=f"{len(self.found)} problems{listed}",
                        expected="a complete LeRobot dataset", fix=fixes)  # fmt: skip


def short(error: BaseException) -> str:
    """`Kind: first line` of an error's text."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def only_numbers(path: Path, schema: pa.Schema, columns: Iterable[str], problems: Problems) -> bool:
    """Whether each of `columns` that `schema` has holds numbers, or lists of them; what else one holds is a finding.

    NumPy and Arrow would read the text "1" as a number without a word.
    """
    before = len(problems.found)
    for name in columns:
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        while pa.types.is_nested(kind) and kind.num_fields == 1:
            kind = kind.field(0).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            problems.add(f"{path}, column {name!r}", found=f"values of type {schema.field(name).type}", expected="numbers",
                         fix=RESTORE)  # fmt: skip
    return len(problems.found) == before
