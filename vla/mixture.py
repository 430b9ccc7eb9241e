"""The weighted stream of Windows: `window(n)` is a pure function of (seed, n).

No shuffle buffer, no iterator state, no index array. Rank r of W at step s reads positions of one global stream, so any
world size, any number of loader workers and any restart see the same samples in the same order.

How n becomes a frame: the stream is cut into blocks of `BLOCK` draws. Each dataset owns an exact number of draws in each
block (cumulative rounding, so shares are right to one draw at every block's end); a keyed shuffle of the block says
which position is whose. The k-th draw of a dataset is element k % F of a keyed permutation of its F frames, with a new
key for each epoch k // F: without replacement inside an epoch. That permutation is computed, not stored
(`vla/randomness.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from vla.config import Config
from vla.embodiment import EmbodimentSpec, explain, load_embodiment
from vla.episodes import EpisodeStore
from vla.errors import DataError, UsageError, VLAError
from vla.randomness import Purpose, generator, mix, permute
from vla.schema import Window

BLOCK = 4096
"""Draws per block. Large enough that every dataset of a mixture of 60 gets its share to the draw."""


class DatasetConfig(Config):
    """One dataset of the mixture."""

    path: str
    """Folder of a LeRobot v3.0 dataset."""
    embodiment: str | None = None
    """Which robot it is: a shipped name or a YAML file. Default: the dataset's own `meta/embodiment.json`, else a spec derived
    from its features (convention `scalar`)."""
    weight: float = Field(default=1.0, gt=0, le=1e6)
    """Share of the samples, relative to the other datasets' weights (not multiplied by size)."""


class MixtureConfig(Config):
    """What is drawn, and in which shares."""

    datasets: list[DatasetConfig] = Field(min_length=1)
    holdout: float = Field(default=0.02, ge=0, lt=1)
    """Share of each dataset's episodes kept out of training (at least one), chosen by a keyed hash; for open-loop figures."""
    frames: Literal["raw", "jpeg"] = "raw"
    """How the training cache stores frames."""
    cache_dir: str | None = None


class Mixture:
    """Windows of `horizon` actions over several datasets, addressed by position in the stream.

    `stores` are opened datasets; `weights` their relative shares; `part` is "train" or "holdout".
    Raises `DataError` when two datasets of one robot disagree about it.
    """

    def __init__(
        self, stores: Sequence[EpisodeStore], weights: Sequence[float], horizon: int, seed: int,
        holdout: float = 0.0, part: str = "train",
    ) -> None:  # fmt: skip
        self.stores, self.horizon, self.seed, self.part = list(stores), horizon, seed, part
        self.embodiments: dict[str, EmbodimentSpec] = {}
        for store in self.stores:
            known = self.embodiments.setdefault(store.spec.name, store.spec)
            if lines := explain(known, store.spec):
                raise DataError(store.root, found="; ".join(lines), expected=f"one description of robot {known.name!r}",
                                fix="give the other robot its own name in meta/embodiment.json")  # fmt: skip
        self.episodes = [_split(store.num_episodes, holdout, part) for store in self.stores]
        # Frame starts of the chosen episodes, as if they lay one after the other.
        self._starts = []
        for store, chosen in zip(self.stores, self.episodes, strict=True):
            lengths = np.diff(store.episode_starts)[chosen]
            self._starts.append(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        self.sizes = [int(starts[-1]) for starts in self._starts]
        if part == "train" and (empty := [str(s.root) for s, size in zip(self.stores, self.sizes, strict=True) if size == 0]):
            raise DataError(", ".join(empty), found="no training episode", expected="at least one",
                            fix="record more, or lower mixture.holdout")  # fmt: skip
        total = math.fsum(w for w, size in zip(weights, self.sizes, strict=True) if size)
        self.shares = [w / total if size else 0.0 for w, size in zip(weights, self.sizes, strict=True)]
        self._heaviest = int(np.argmax(self.shares))
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray, list[int]]] = {}

    def __len__(self) -> int:
        """Frames in one pass over every dataset."""
        return sum(self.sizes)

    def drawn(self, block: int) -> list[int]:
        """How many draws of each dataset the first `block` blocks hold."""
        counts = [math.floor(share * BLOCK * block) for share in self.shares]
        counts[self._heaviest] = 0
        counts[self._heaviest] = BLOCK * block - sum(counts)
        return counts

    def locate(self, n: int) -> tuple[int, int, int]:
        """Stream position -> (dataset, episode of its store, frame inside the episode)."""
        block, position = divmod(n, BLOCK)
        owner, rank, before = self._block(block)
        dataset = int(owner[position])
        epoch, i = divmod(before[dataset] + int(rank[position]), self.sizes[dataset])
        frame = permute(i, self.sizes[dataset], mix(self.seed, Purpose.EPOCH, dataset, epoch))
        return dataset, *self.place(dataset, frame)

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """For each position of a block: whose it is, and how many earlier positions are the same dataset's."""
        if block not in self._blocks:
            before, after = self.drawn(block), self.drawn(block + 1)
            counts = [b - a for a, b in zip(before, after, strict=True)]
            shuffled = generator(Purpose.BLOCK, self.seed, block).random(BLOCK).argsort(kind="stable")
            owner = np.repeat(np.arange(len(counts)), counts)[shuffled]
            rank = np.zeros(BLOCK, np.int64)
            for dataset, count in enumerate(counts):
                rank[owner == dataset] = np.arange(count)
            if len(self._blocks) > 8:
                self._blocks.clear()
            self._blocks[block] = (owner, rank, before)
        return self._blocks[block]

    def place(self, dataset: int, frame: int) -> tuple[int, int]:
        """Frame number among the chosen episodes -> (episode of the store, frame inside it)."""
        starts = self._starts[dataset]
        chosen = int(np.searchsorted(starts, frame, side="right")) - 1
        return int(self.episodes[dataset][chosen]), frame - int(starts[chosen])

    def window(self, n: int) -> Window:
        """The n-th window of the stream, validated."""
        return self.window_at(*self.locate(n), n=n)

    def window_at(self, dataset: int, episode: int, t: int, n: int = -1) -> Window:
        """The window at frame t of an episode; actions past the episode's end are zero and not valid."""
        store = self.stores[dataset]
        start, stop = int(store.episode_starts[episode]), int(store.episode_starts[episode + 1])
        at = start + t
        count = min(self.horizon, stop - at)
        actions = np.zeros((self.horizon, store.action.shape[1]), np.float32)
        actions[:count] = store.action[at : at + count]
        valid = np.zeros(actions.shape, bool)
        valid[:count] = True
        return Window(
            images={camera: store.frame(camera, at) for camera in store.cameras},
            state=np.asarray(store.state[at]), instruction=store.instructions[store.task_of_episode[episode]],
            actions=actions, valid=valid, embodiment=store.spec.name, final_state=np.asarray(store.state[stop - 1]),
            n=n, source=f"{store.root.name}:{episode}:{t}",
        ).validate()  # fmt: skip

    def report(self, steps: int, batch: int) -> list[dict]:
        """What a run of `steps` x `batch` will draw: share, draws and epochs per dataset."""
        draws = [share * steps * batch for share in self.shares]
        return [
            {"dataset": str(s.root), "robot": s.spec.name, "episodes": len(e), "frames": size, "share": round(share, 4),
             "draws": round(d), "epochs": round(d / size, 2) if size else 0.0}
            for s, e, size, share, d in zip(self.stores, self.episodes, self.sizes, self.shares, draws, strict=True)
        ]  # fmt: skip


def _split(count: int, holdout: float, part: str) -> np.ndarray:
    """Episodes of `part`. The split does not depend on the run's seed, so that figures of two seeds compare."""
    held = min(max(round(count * holdout), 1), count - 1) if holdout else 0
    order = [permute(i, count, mix(Purpose.SPLIT, count)) for i in range(count)]
    return np.sort(np.array(order[:held] if part == "holdout" else order[held:], np.int64))


def open_mixture(config: MixtureConfig, horizon: int, seed: int, progress: bool = True) -> tuple[Mixture, Mixture]:
    """Open every dataset (building caches) and return the training and the held-out mixture.

    All datasets that cannot be opened are reported in one `DataError`.
    """
    stores: list[EpisodeStore] = []
    problems: list[VLAError] = []
    for entry in config.datasets:
        try:
            cache = Path(config.cache_dir) if config.cache_dir else None
            spec = load_embodiment(entry.embodiment) if entry.embodiment else None
            stores.append(EpisodeStore.open(entry.path, cache, config.frames, progress, embodiment=spec))
        except (DataError, UsageError) as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise DataError("mixture", found="\n".join(map(str, problems)), expected="datasets that open",
                        fix="mend each dataset named above")  # fmt: skip
    weights = [entry.weight for entry in config.datasets]
    return (
        Mixture(stores, weights, horizon, seed, config.holdout, "train"),
        Mixture(stores, weights, horizon, seed, config.holdout, "holdout"),
    )
