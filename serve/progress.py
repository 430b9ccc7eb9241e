"""How an instruction goes: is it finished, is anything still moving? Rules and learned judges behind one interface. No torch.

    progress = Several(Stillness(robot), Asking(speaker))
    progress.begin("touch the red cube", now)
    told = progress.saw(observation, chunk, now)           # after every look; told.done, told.stalled, told.why

`begin` and `saw` are called by the control loop, between two ticks: what takes long thinks in a thread and is heard later.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from serve.planner import ranked
from serve.robot import Robot
from serve.speaking import Speaker
from vla.errors import VLAError
from vla.prompt import progress_prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Told:
    """What is known of an instruction after a look."""

    done: float = 0.0
    """Probability that it is finished."""
    stalled: bool = False
    why: str = ""


class Progress(Protocol):
    """Judges one robot. Times in seconds, on the loop's clock."""

    def begin(self, instruction: str, now: float) -> None:
        """From now on `instruction` is followed, anew where it is the one before."""
        ...

    def saw(self, observation: Mapping[str, Any], chunk: Any, now: float) -> Told:
        """After a look, and what the policy said of it."""
        ...

    # Who is asked elsewhere may also have `heard(now) -> float`: the probability that it is finished, as far as is known in a
    # tick between two looks.


class Stillness:
    """The fixed rule: stalled when the state does not move any more, or when it takes too long. Never says that it is done."""

    def __init__(self, robot: Robot, still: float = 2.0, limit: float | None = 30.0, least: float = 0.002) -> None:
        """`still` s during which no dimension of the state moves by more than `least` of its range; `limit` s an instruction may
        take, None for as long as it likes."""
        self.still, self.limit = still, limit
        low, high = (np.array([v for c in robot.state for v in (getattr(c, end) or [np.nan] * len(c.dims))], np.float64)
                     for end in ("low", "high"))  # fmt: skip
        span = np.where(np.isfinite(high - low), high - low, 1.0)  # a channel without limits: in its own unit
        self._least = least * span
        self._seen: deque[tuple[float, np.ndarray]] = deque()
        self._since = 0.0

    def begin(self, instruction: str, now: float) -> None:
        self._seen.clear()
        self._since = now

    def saw(self, observation: Mapping[str, Any], chunk: Any, now: float) -> Told:
        if self.limit is not None and now - self._since >= self.limit:
            return Told(stalled=True, why=f"longer than {self.limit:g} s")
        if observation.get("state") is None:
            return Told()
        self._seen.append((now, np.array(observation["state"], np.float64)))
        while len(self._seen) > 2 and now - self._seen[1][0] >= self.still:
            self._seen.popleft()
        if now - self._seen[0][0] < self.still:
            return Told()
        states = np.array([state for _, state in self._seen])
        if (np.ptp(states, axis=0) > self._least).any():
            return Told()
        return Told(stalled=True, why=f"nothing moved for {self.still:g} s")


class Asking:
    """The learned judge: a policy that speaks is asked whether it is finished, and its yes is weighed against its no.

    In a thread of its own, every `every` seconds; what it said of an instruction that is over is thrown away. While it does not
    answer, nothing is known. Of an instruction that repeats one that was finished (touch it again) a yes counts only after a no:
    at its beginning the picture shows what was done before.
    """

    def __init__(self, speaker: Speaker, *, every: float = 0.5, agree: int = 2, camera: str | None = None,
                 threaded: bool = True) -> None:  # fmt: skip
        """`agree`: how many answers in a row are needed; the least of them is told. Without `threaded` each look waits for its
        answer, for loops whose time is counted in steps."""
        self.speaker, self.every, self.camera, self.threaded = speaker, every, camera, threaded
        self._answers: deque[float] = deque(maxlen=agree)
        self._heard: queue.SimpleQueue[tuple[int, float | None]] = queue.SimpleQueue()
        self._number, self._busy, self._next = 0, False, 0.0
        self._instruction, self._again = "", False
        self.asked = self.failed = 0

    def begin(self, instruction: str, now: float) -> None:
        finished = len(self._answers) == self._answers.maxlen and min(self._answers) >= 0.5
        # Begun again before it was finished (it stalled, a person said go on), it is the same still.
        self._again = instruction == self._instruction and (finished or self._again)
        self._instruction, self._next = instruction, now
        self._number += 1
        self._answers.clear()

    def saw(self, observation: Mapping[str, Any], chunk: Any, now: float) -> Told:
        self._listen()
        if not self._busy and now >= self._next:
            self._next, self._busy = now + self.every, True
            self.asked += 1
            images = observation["images"]
            picture = images[self.camera] if self.camera is not None else next(iter(images.values()))
            if self.threaded:
                picture = np.array(picture) if isinstance(picture, np.ndarray) else picture  # drivers reuse their buffers
                threading.Thread(target=self._ask, args=(self._number, self._instruction, picture), daemon=True).start()
            else:
                self._ask(self._number, self._instruction, picture)
                self._listen()
        return Told(done=done, why="the policy says so") if (done := self._done()) else Told()

    def heard(self, now: float) -> float:
        """The probability that it is finished, as far as answers have come."""
        self._listen()
        return self._done()

    def _done(self) -> float:
        return min(self._answers) if len(self._answers) == self._answers.maxlen else 0.0

    def _ask(self, number: int, instruction: str, picture: Any) -> None:
        try:
            shares = dict(ranked(self.speaker, picture, progress_prompt(instruction), ["yes", "no"]))
            self._heard.put((number, shares["yes"]))
        except VLAError as error:
            logger.warning("whether it is finished is not known: %s", error.found)
            self._heard.put((number, None))
        except Exception:  # never a thread that dies and leaves the judge waiting
            logger.exception("whether it is finished is not known")
            self._heard.put((number, None))

    def _listen(self) -> None:
        while True:
            try:
                number, yes = self._heard.get_nowait()
            except queue.Empty:
                return
            self._busy = False
            self.failed += yes is None
            if number == self._number and yes is not None:
                self._again = self._again and yes >= 0.5
                if not self._again:
                    self._answers.append(yes)


class Several:
    """All of them: done as the surest says, stalled as soon as one says so."""

    def __init__(self, *judges: Progress) -> None:
        self._judges: Sequence[Progress] = judges

    def begin(self, instruction: str, now: float) -> None:
        for judge in self._judges:
            judge.begin(instruction, now)

    def saw(self, observation: Mapping[str, Any], chunk: Any, now: float) -> Told:
        told = [judge.saw(observation, chunk, now) for judge in self._judges]
        done, stalled = max((t.done for t in told), default=0.0), any(t.stalled for t in told)
        why = next((t.why for t in told if t.stalled or t.done == done > 0), "")
        return Told(done, stalled, why)

    def heard(self, now: float) -> float:
        """As the surest of those that say anything between two looks."""
        return max((heard(now) for judge in self._judges if (heard := getattr(judge, "heard", None)) is not None), default=0.0)
