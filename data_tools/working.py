"""What long jobs with worker processes share: how they are stopped, and that no worker outlives its parent."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM stops what runs inside as Ctrl-C does, with a `KeyboardInterrupt`."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Processes started inside compute with one OpenMP thread each: they read the environment as they start."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = before


def begin_worker(parent: int) -> None:
    """Called first in a worker process: Ctrl-C is left to `parent`, SIGTERM ends it, and so does the parent's end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    # A pool's worker waits for ever on a queue whose other end it holds itself, even after the parent was killed.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
