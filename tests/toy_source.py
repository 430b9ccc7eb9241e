"""A foreign dataset for the tests of conversion: one small file per episode, contents a function of the number in it."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

import numpy as np

from data_tools.sources import RawEpisode, SourceInfo
from vla.errors import DataError

SIZE = 32
HZ = 10.0


def write_toy(root: Path, episodes: int) -> Path:
    """Episode `n` is the file `ep-<n>` with the text `n`; the text `damaged` makes it unreadable."""
    root.mkdir(parents=True, exist_ok=True)
    for n in range(episodes):
        (root / f"ep-{n:03d}").write_text(str(n))
    return root


class ToySource:
    """A `Source` over such a folder. `delay` seconds per episode; pictures are smooth, so that lossy video suits them."""

    kind = "toy"

    def __init__(self, root: Path, delay: float = 0.0, unlisted: int = 0, noise: bool = False, missing: int = 0) -> None:
        self.root, self.delay, self.noise, self.missing = Path(root), delay, noise, missing
        self.info = SourceInfo(
            HZ, {"actions": ("float64", (4,)), "obs/place": ("float32", (3,)), "rewards": ("float32", ()),
                 "obs/flag": ("bool", ())},
            {"obs/front": (SIZE, SIZE), "obs/wrist": (SIZE, SIZE)}, {"robot_type": "toy"},
        )  # fmt: skip
        self.damage = [DataError(f"{self.root}/shard-{n}", found="no footer", expected="a whole file", fix="copy it again")
                       for n in range(unlisted)]  # fmt: skip

    def keys(self) -> list[str]:
        return sorted(p.name for p in self.root.iterdir())

    def read(self, key: str, only: Collection[str] | None = None) -> RawEpisode:
        time.sleep(self.delay)
        text = (self.root / key).read_text()
        where = f"{self.root / key}"
        if text == "damaged":
            raise DataError(where, found="a flipped bit", expected="the bytes of its checksum", fix="copy it again")
        if text == "crash":
            raise ValueError("invalid literal")
        n = int(text)
        rng = np.random.default_rng(n)
        T = 4 + n % 5
        fields = {"actions": rng.uniform(-1, 1, (T, 4)), "obs/place": rng.normal(size=(T, 3)).astype(np.float32),
                  "rewards": np.zeros(T, np.float32), "obs/flag": np.zeros(T, bool)}  # fmt: skip
        size = SIZE + 16 * (text == "999")
        images = {path: self._pictures(rng, T, size) for path in self.info.images}
        return RawEpisode(fields, images, f"do thing {n % 3}", where, key, {})

    def _pictures(self, rng: np.random.Generator, T: int, size: int) -> np.ndarray:
        if self.noise:
            return rng.integers(0, 256, (T, size, size, 3), dtype=np.uint8)
        y, x, t, c = np.ogrid[:size, :size, :T, :3]
        wave = np.sin(x / 9 + rng.uniform(0, 6) + t * 0.8) + np.cos(y / 7 + rng.uniform(0, 6)) + 0.3 * c
        return np.ascontiguousarray((110 + 50 * wave).clip(0, 255).astype(np.uint8).transpose(2, 0, 1, 3))
