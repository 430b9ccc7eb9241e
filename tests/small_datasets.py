"""Small datasets and a toy simulator for the tests of recording, writing and reading. No MuJoCo, no renderer."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np

from vla.embodiment import Camera, EmbodimentSpec, load_embodiment
from vla.episodes import EpisodeStore
from vla.recording import LeRobotWriter
from vla.schema import Episode

SIZE = 32


def small_spec(cameras: tuple[str, ...] = ("front",), size: int = SIZE) -> EmbodimentSpec:
    """The tabletop robot with small pictures."""
    sizes = {name: Camera(height=size, width=size) for name in cameras}
    return load_embodiment("tabletop").model_copy(update={"cameras": sizes})


def make_episode(n: int, length: int | None = None, cameras: tuple[str, ...] = ("front",), size: int = SIZE) -> Episode:
    """Episode `n`: its own noise, length and one of three instructions."""
    rng = np.random.default_rng(n)
    T = length or 3 + n % 5
    return Episode(
        {c: rng.integers(0, 256, (T, size, size, 3), dtype=np.uint8) for c in cameras},
        rng.uniform(-0.5, 0.5, (T, 4)).astype(np.float32), rng.uniform(-1, 1, (T, 4)).astype(np.float32),
        f"do thing {n % 3}", "tabletop", True, f"thing-{n % 3}", n,
    )  # fmt: skip


def write_dataset(root: Path, episodes: int = 6, cameras: tuple[str, ...] = ("front",), **kw) -> list[Episode]:
    """A dataset of `make_episode(0..episodes)` at `root`."""
    made = [make_episode(n, cameras=cameras) for n in range(episodes)]
    with LeRobotWriter(root, small_spec(cameras), **kw) as writer:
        for episode in made:
            writer.add(episode)
    return made


def content(root: Path, cache: Path) -> list[tuple]:
    """Everything a dataset says, per episode, whatever its file layout."""
    store = EpisodeStore.open(root, cache, progress=False)
    out = []
    for e in range(store.num_episodes):
        rows = slice(*store.episode_starts[e : e + 2])
        frames = hashlib.sha256()
        for camera in store.cameras:
            for index in range(rows.start, rows.stop):
                frames.update(store.frame(camera, index).tobytes())
        out.append((store.instructions[store.task_of_episode[e]], store.state[rows].tobytes(),
                    store.action[rows].tobytes(), frames.hexdigest()))  # fmt: skip
    return out


class ToySim:
    """A point that must come within 0.05 of the origin. Every scene whose seed ends in 7 cannot be solved."""

    max_steps = 12

    def __init__(self, suite: str, task: str, image_size: int = SIZE, delay: float = 0.0) -> None:
        self.spec = small_spec(size=image_size)
        self.task, self.instruction, self.size, self.delay = task, f"{task} it", image_size, delay
        self.executed: list[np.ndarray] = []

    def reset(self, *, seed: int, options: dict | None = None):
        self.place = np.random.default_rng(seed).uniform(-0.3, 0.3, 3)
        self.solvable, self.steps = seed % 10 != 7, 0
        return self._look(), {"success": False}

    def expert(self) -> np.ndarray:
        return np.array([*np.clip(-4 * self.place, -1, 1), 0], np.float32)

    def step(self, action, render: bool = True):
        time.sleep(self.delay)
        self.executed.append(np.array(action))
        self.place = self.place + 0.15 * np.asarray(action[:3], float)
        self.steps += 1
        success = self.solvable and bool(np.linalg.norm(self.place) < 0.1)
        return self._look(), float(success), success, self.steps >= self.max_steps, {"success": success}

    def _look(self):
        picture = np.zeros((self.size, self.size, 3), np.uint8)
        x, y = np.clip((self.place[:2] + 0.5) * self.size, 0, self.size - 4).astype(int)
        picture[y : y + 4, x : x + 4] = (255, 80, 0)
        return {"images": {"front": picture}, "state": np.array([*self.place, 1], np.float32)}

    def close(self) -> None:
        pass


def slow_toy(suite: str, task: str, image_size: int = SIZE) -> ToySim:
    """A toy that takes 20 ms a step, so that a recording of it can be interrupted."""
    return ToySim(suite, task, image_size, delay=0.02)
