"""What a station shows whoever watches: events, ticks and the newest picture of each camera, all of it bounded. No torch.

    board = Board(["front"])
    board.say("answer", number=3, answer="go_on")           # from the loop's thread, which never waits for anybody here
    events = board.after(0)                                  # from any other

Who watches fetches: nothing is pushed at anybody, so a browser that reads slowly, or has gone, costs nothing here and misses
what is forgotten meanwhile. Pictures are encoded for those who ask, once each.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from serve.wire import encode

EVENTS, TICKS = 1000, 600
"""Events that are no ticks, and ticks, that are remembered."""
BATCH_SECONDS = 0.1
"""Ticks of so long are one event."""
WATCHED_SECONDS = 3.0
"""Somebody who asked for a picture so long ago is taken to be still there."""


class Board:
    """See the module. `say`, `tick`, `flush` and `show` from one thread, everything else from any."""

    def __init__(self, cameras: Iterable[str]) -> None:
        self.began = time.monotonic()
        self._lock = threading.Lock()  # held for as long as it takes to append or to copy a list, by nobody while it waits
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self._ticks: deque[dict[str, Any]] = deque()
        self._kept = 0
        """Ticks in `_ticks`."""
        self._batch: list[dict[str, Any]] = []
        self._due = -np.inf
        self.last = 0
        """Number of the newest event."""
        self.closed = False
        """Nothing more comes."""
        self._pictures: dict[str, tuple[int, np.ndarray]] = {}
        self._files: dict[str, tuple[int, bytes]] = {}
        self._cameras = tuple(cameras)
        self._asked = -np.inf

    @property
    def seconds(self) -> float:
        """Since it was hung up."""
        return time.monotonic() - self.began

    # ------------------------------------------------------------------------------------------------ what happens

    def say(self, kind: str, **facts: Any) -> None:
        """An event that is no tick; the ticks before it come first."""
        self.flush()
        with self._lock:
            self._events.append(self._numbered(kind, facts))

    def tick(self, facts: Mapping[str, Any]) -> None:
        """A control tick. Those of a tenth of a second are one event."""
        self._batch.append({"t": round(self.seconds, 3), **facts})
        if self.seconds >= self._due or len(self._batch) >= TICKS:
            self.flush()

    def flush(self) -> None:
        """The ticks so far become an event."""
        if not self._batch:
            return
        batch, self._batch = self._batch, []
        self._due = self.seconds + BATCH_SECONDS
        with self._lock:
            self._ticks.append(self._numbered("tick", {**batch[-1], "ticks": batch}))
            self._kept += len(batch)
            while self._kept > TICKS and len(self._ticks) > 1:
                self._kept -= len(self._ticks.popleft()["ticks"])

    def _numbered(self, kind: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        self.last += 1
        said = {"number": self.last, "t": round(self.seconds, 3), "kind": kind}
        return said | {name: value for name, value in facts.items() if name not in said}

    def show(self, images: Mapping[str, np.ndarray]) -> None:
        """The newest pictures; copied, since drivers reuse their buffers."""
        for camera, frame in images.items():
            if camera in self._cameras:
                copied = np.array(frame, np.uint8)
                with self._lock:
                    self._pictures[camera] = self.shown(camera) + 1, copied

    def close(self) -> None:
        """Nothing more comes."""
        self.flush()
        self.closed = True

    # ------------------------------------------------------------------------------------------------ who watches

    @property
    def watched(self) -> bool:
        """Whether somebody asks for pictures."""
        return time.monotonic() - self._asked < WATCHED_SECONDS

    def after(self, number: int) -> list[dict[str, Any]]:
        """What is remembered of the events after `number`, in order."""
        with self._lock:
            if number >= self.last:
                return []
            found = [event for kept in (self._events, self._ticks) for event in kept if event["number"] > number]
        return sorted(found, key=lambda event: event["number"])

    def shown(self, camera: str) -> int:
        """Number of the newest picture, 0 where there is none yet."""
        return self._pictures[camera][0] if camera in self._pictures else 0

    def wanted(self) -> None:
        """Somebody asks for pictures."""
        self._asked = time.monotonic()

    def picture(self, camera: str) -> tuple[int, bytes] | None:
        """(number, JPEG) of the newest picture, None where there is none yet. Takes as long as a JPEG does."""
        with self._lock:
            newest = self._pictures.get(camera)
        if newest is None:
            return None
        known = self._files.get(camera)
        if known is None or known[0] != newest[0]:
            known = self._files[camera] = newest[0], encode(newest[1], "jpeg", quality=85).data
        return known
