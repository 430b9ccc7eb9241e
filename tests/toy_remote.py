"""A world of four numbers for `tests/test_remote.py`, hosted by another interpreter; some scene numbers make trouble."""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np

from vla.sims.base import OneTask


class Toy(OneTask):
    """Poses as the tabletop: the state moves by a tenth of the action, success is x beyond 0.25."""

    suite = "tabletop"
    max_steps = 7
    camera = "front"

    def _scene(self, seed: int) -> None:
        if seed == 660:
            os._exit(3)
        if seed == 661:
            os.kill(os.getpid(), signal.SIGKILL)
        if seed == 662:
            raise RuntimeError("the physics exploded")
        if seed == 663:
            os.write(int(sys.argv[1]), b"HTTP/1.1 200 OK\r\n\r\n" * 9)
            time.sleep(60)
        if seed == 664:
            print("noise " * 40_000, flush=True)
        self.world = np.full(4, seed / 1000)

    def _act(self, command: np.ndarray) -> None:
        self.world = self.world + command / 10
        self._done = bool(self.world[0] > 0.25)

    def _state(self) -> np.ndarray:
        return self.world.astype(np.float32)

    def expert(self) -> np.ndarray:
        return np.array([1, 0.5, -self.world[2], 0], np.float32)

    def frame(self, size: int = 240) -> np.ndarray:
        return np.full((size, size, 3), round(float(self.world[0]) * 100) % 256, np.uint8)


def local_sim(suite: str, task: str, **kw: object) -> Toy:
    return Toy(task, **kw)
