"""Errors a user can act on: where it happened, what was found, what was expected, what to run next.

Every error raised for bad *input* (a file, a config, a machine) is a `VLAError`; its class decides the exit code of
the command. Broken invariants of our own code stay plain `AssertionError`/`ValueError`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class VLAError(Exception):
    """Base class. `exit_code` is what the command line returns (see DESIGN: 2 config, 3 data, 4 checkpoint, ...)."""

    exit_code = 1

    def __init__(self, where: object, *, found: object, expected: object, fix: str) -> None:
        self.where, self.found, self.expected, self.fix = str(where), str(found), str(expected), fix
        super().__init__(where, found, expected, fix)

    def __str__(self) -> str:
        return f"{self.where}\n  found:    {self.found}\n  expected: {self.expected}\n  fix:      {self.fix}"

    def __reduce__(self):
        # Keyword-only arguments do not survive the default reduction; simulator and loader workers send errors home.
        return _rebuild, (type(self), self.where, self.found, self.expected, self.fix)


def _rebuild(cls: type[VLAError], where: str, found: str, expected: str, fix: str) -> VLAError:
    return cls(where, found=found, expected=expected, fix=fix)


class UsageError(VLAError):
    """A command line or a config that cannot be carried out."""

    exit_code = 2


class DataError(VLAError):
    """A dataset that is missing, broken, or not of the shape its description promises."""

    exit_code = 3


class CheckpointError(VLAError):
    """A run or policy folder that is incomplete, damaged or of another kind."""

    exit_code = 4


class MachineError(VLAError):
    """The machine lacks something: a renderer, disk space, a package, a device."""

    exit_code = 5


class DivergedError(VLAError):
    """Training produced non-finite losses or gradients and stopped."""

    exit_code = 6


class Preempted(VLAError):
    """The run was asked to stop and saved itself first."""

    exit_code = 75


def exit_code_of(work: Callable[[], int | None]) -> int:
    """Do a command's work and say how it ended: its own code, an error's message and code, 130 when interrupted, 141 when nobody
    reads what it prints any more (`vla ... | head`)."""
    try:
        return work() or 0
    except VLAError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
