"""Processes a test starts: none outlives it, and none makes it wait for ever."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LIMIT = 300
"""Seconds any process of a test may take. Far more than it needs: who reaches them hangs."""


@contextmanager
def children(context: Any, target: Callable[..., object], *arguments: tuple) -> Iterator[list[Any]]:
    """One process per tuple of arguments. At the end of the block each must have ended well; before that, what the block
    expects of them is theirs to send. Killed, not asked: a forked child has its parent's handlers for SIGTERM."""
    started = [context.Process(target=target, args=each, daemon=True) for each in arguments]
    try:
        for process in started:
            process.start()
        yield started
        for process in started:
            process.join(LIMIT)
            assert process.exitcode == 0
    finally:
        for process in started:
            if process.pid is not None:
                process.kill()
                process.join(10)


def call(context: Any, function: Callable[[Any], Any], argument: Any) -> Any:
    """`function(argument)` in one other process; EOFError when it died of it.

    Not a Pool: that ends its workers by SIGTERM, and one that was forked where a handler merely takes note of it is waited
    for without end.
    """
    here, there = context.Pipe(duplex=False)
    with here, children(context, _answer, (there, function, argument)):
        there.close()
        assert here.poll(LIMIT), f"no answer in {LIMIT} s"
        return here.recv()


def _answer(there: Any, function: Callable[[Any], Any], argument: Any) -> None:
    there.send(function(argument))


def dead_process() -> int:
    """The id of a process that is no more."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait(LIMIT)
    return done.pid
