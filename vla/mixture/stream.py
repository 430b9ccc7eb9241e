"""The weighted stream of Windows: `window(n)` is a pure function of (seed, n).

No shuffle buffer, no iterator state, no index array. Rank r of W at step s reads positions of one global stream, so any
world size, any number of loader workers and any restart see the same samples in the same order.

How n becomes a frame: the stream is cut into blocks of `BLOCK` draws. Each dataset owns an exact number of draws in each
block (cumulative rounding, so shares are right to one draw at every block's end); a keyed shuffle of the block says
which position is whose. The k-th draw of a dataset is element k % F of a keyed permutation of its F frames, with a new
key for each epoch k // F: without replacement inside an epoch. That permutation is computed, not stored
(`vla/randomness.py`). Only a dataset that is streamed is permuted in two levels, its shards and then the frames of a few
shards together, so that a few files at a time are enough.

Image-text data (`vla/answers.py`) is one more owner of draws: at its positions `window(n)` is a `Question`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from vla.answers import Answers, Question
from vla.embodiment import EmbodimentSpec, explain
from vla.episodes.surface import Store
from vla.errors import DataError, UsageError
from vla.randomness import Purpose, generator, mix, permute
from vla.resample import native_steps, to_policy_steps
from vla.schema import Window

BLOCK = 4096
"""Draws per block, doubled until every dataset is drawn at least twice in each."""
LARGEST_BLOCK = 2**20

SHARDS_AT_ONCE = 4
"""Shards of a streamed dataset whose frames are shuffled together."""


class Mixture:
    """Windows of `horizon` actions over several datasets, addressed by position in the stream.

    `stores` are opened datasets; `weights` their relative shares; `part` is "train" or "holdout". `seconds` makes a chunk a
    length of time (`vla/resample.py`). `specs[i]` is what robot dataset i shows (default: its own description) and
    `cameras[i]` maps that robot's cameras to the dataset's, None where one was not recorded.
    Raises `DataError` when two datasets of one robot and control mode disagree about it.
    """

    def __init__(
        self, stores: Sequence[Store], weights: Sequence[float], horizon: int, seed: int,
        holdout: float = 0.0, part: str = "train", *, seconds: float | None = None, temperature: float | None = None,
        specs: Sequence[EmbodimentSpec] | None = None, cameras: Sequence[Mapping[str, str | None]] | None = None,
        answers: tuple[Answers, float] | None = None,
    ) -> None:  # fmt: skip
        self.stores, self.horizon, self.seed, self.part = list(stores), horizon, seed, part
        self.seconds = seconds
        self.specs = list(specs) if specs else [store.spec for store in self.stores]
        every = [{name: name for name in spec.cameras} for spec in self.specs]
        self.cameras: Sequence[Mapping[str, str | None]] = list(cameras) if cameras else every
        self.answers = answers[0] if answers else None
        self.embodiments: dict[str, EmbodimentSpec] = {}
        for store, spec in zip(self.stores, self.specs, strict=True):
            known = self.embodiments.setdefault(spec.key, spec)
            if lines := explain(known, spec):
                raise DataError(store.root, found="; ".join(lines), expected=f"one description of robot {known.key!r}",
                                fix="give the other robot its own name, or this control mode a `mode`")  # fmt: skip
        self.episodes = [split_episodes(store.num_episodes, holdout, part) for store in self.stores]
        # Frame starts of the chosen episodes, as if they lay one after the other.
        self._starts = []
        for store, chosen in zip(self.stores, self.episodes, strict=True):
            lengths = np.diff(store.episode_starts)[chosen]
            self._starts.append(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        self.sizes = [int(starts[-1]) for starts in self._starts]
        if part == "train" and (empty := [str(s.root) for s, size in zip(self.stores, self.sizes, strict=True) if size == 0]):
            raise DataError(", ".join(empty), found="no training episode", expected="at least one",
                            fix="record more, or lower mixture.holdout")  # fmt: skip
        self.shares = _shares(weights, self.sizes, temperature, answers[1] if answers and part == "train" else 0.0)
        # Where each dataset's share of [0, 1] ends. Its draws up to n are floor(end * n) less floor(start * n): they add up
        # to n, are right to one draw, and never decrease from block to block where a share is a draw of a block or more.
        self._ends = np.minimum(np.cumsum(self.shares), 1.0)
        self._ends[self._ends > 1 - 1e-9] = 1.0
        self.block = BLOCK
        while min((s for s in self.shares if s), default=1.0) * self.block < 2:
            self.block *= 2
        if self.block > LARGEST_BLOCK:
            d = int(np.argmin([s or 1.0 for s in self.shares]))
            where = self.stores[d].root if d < len(self.stores) else "mixture.answers"
            raise UsageError(where, found=f"share {self.shares[d]:.1e} of the samples",
                             expected=f"{2 / LARGEST_BLOCK:.1e} or more",
                             fix="raise its weight, or leave it out")  # fmt: skip
        self._shards = [_shards_of(store, chosen, starts)
                        for store, chosen, starts in zip(self.stores, self.episodes, self._starts, strict=True)]  # fmt: skip
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._orders: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._fetching: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        """Frames in one pass over every dataset."""
        return sum(self.sizes)

    def drawn(self, block: int) -> list[int]:
        """How many draws of each dataset (and, last, of the questions) the first `block` blocks hold."""
        return np.diff(np.floor(self._ends * (self.block * block)).astype(np.int64), prepend=0).tolist()

    def locate(self, n: int) -> tuple[int, int, int]:
        """Stream position -> (dataset, episode of its store, frame inside the episode); (-1, pair, 0) for a question."""
        dataset, draw = self._owner(n)
        size = len(self.answers) if dataset == len(self.stores) and self.answers is not None else self.sizes[dataset]
        epoch, i = divmod(draw, size)
        key = mix(self.seed, Purpose.EPOCH, dataset, epoch)
        if dataset == len(self.stores):
            return -1, permute(i, size, key), 0
        found = self._shards[dataset]
        frame = permute(i, size, key) if found is None else self._streamed(dataset, epoch, i, key, found[0])
        return dataset, *self.place(dataset, frame)

    def _owner(self, n: int) -> tuple[int, int]:
        """(whose position n is, the how-manieth of its draws)."""
        block, position = divmod(n, self.block)
        owner, rank, before = self._block(block)
        dataset = int(owner[position])
        return dataset, int(before[dataset]) + int(rank[position])

    def _streamed(self, dataset: int, epoch: int, i: int, key: int, shards: np.ndarray) -> int:
        """The i-th frame of an epoch over shards: groups of shuffled shards one after the other, frames shuffled inside one."""
        order, ends = self._order(dataset, epoch)
        group = self._group(ends, i)
        first, last = int(ends[group]), int(ends[min(group + SHARDS_AT_ONCE, len(order))])
        at = first + permute(i - first, last - first, mix(key, group))
        shard = int(np.searchsorted(ends, at, "right")) - 1
        return int(shards[order[shard]]) + at - int(ends[shard])

    def _order(self, dataset: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the shards of a dataset as an epoch has them, where each begins and the last ends in it)."""
        if (dataset, epoch) not in self._orders:
            found = self._shards[dataset]
            assert found is not None
            key, lengths = mix(self.seed, Purpose.EPOCH, dataset, epoch), np.diff(found[0])
            order = np.array([permute(p, len(lengths), key) for p in range(len(lengths))])
            if len(self._orders) > 2 * len(self.stores):
                self._orders.clear()
            self._orders[dataset, epoch] = order, np.concatenate([[0], np.cumsum(lengths[order])])
        return self._orders[dataset, epoch]

    def _group(self, ends: np.ndarray, i: int) -> int:
        return (int(np.searchsorted(ends, i, "right")) - 1) // SHARDS_AT_ONCE * SHARDS_AT_ONCE

    def _look_ahead(self, dataset: int, draw: int) -> None:
        """Of a streamed dataset: when a group of shards begins, the next one is fetched in the background."""
        found = self._shards[dataset]
        assert found is not None
        epoch, i = divmod(draw, self.sizes[dataset])
        order, ends = self._order(dataset, epoch)
        group = self._group(ends, i)
        if self._fetching.get(dataset) == (epoch, group):
            return
        self._fetching[dataset] = epoch, group
        following = order[group + SHARDS_AT_ONCE : group + 2 * SHARDS_AT_ONCE]
        if not len(following):
            following = self._order(dataset, epoch + 1)[0][:SHARDS_AT_ONCE]
        self.stores[dataset].prefetch(*found[1][following].tolist())

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each position of a block: whose it is, and how many earlier positions are the same dataset's."""
        if block not in self._blocks:
            before = np.array(self.drawn(block))
            counts = np.array(self.drawn(block + 1)) - before
            shuffled = generator(Purpose.BLOCK, self.seed, block).random(self.block).argsort(kind="stable")
            owner = np.repeat(np.arange(len(counts)), counts)[shuffled]
            rank = np.empty(self.block, np.int64)
            together = owner.argsort(kind="stable")  # each dataset's positions, in their order
            rank[together] = np.arange(self.block) - np.repeat(np.cumsum(counts) - counts, counts)
            if len(self._blocks) * self.block > 8 * BLOCK:
                self._blocks.clear()
            self._blocks[block] = (owner, rank, before)
        return self._blocks[block]

    def place(self, dataset: int, frame: int) -> tuple[int, int]:
        """Frame number among the chosen episodes -> (episode of the store, frame inside it)."""
        starts = self._starts[dataset]
        chosen = int(np.searchsorted(starts, frame, side="right")) - 1
        return int(self.episodes[dataset][chosen]), frame - int(starts[chosen])

    def window(self, n: int) -> Window | Question:
        """The n-th sample of the stream, validated."""
        dataset, episode, t = self.locate(n)
        if dataset < 0:
            assert self.answers is not None
            return self.answers.question(episode, n)
        if self._shards[dataset] is not None:
            self._look_ahead(dataset, self._owner(n)[1])
        return self.window_at(dataset, episode, t, n=n)

    def window_at(self, dataset: int, episode: int, t: int, n: int = -1) -> Window:
        """The window at frame t of an episode; actions past the episode's end, or the subtask's where those are told, are zero
        and not valid."""
        store, spec = self.stores[dataset], self.specs[dataset]
        start, stop = int(store.episode_starts[episode]), int(store.episode_starts[episode + 1])
        at = start + t
        instruction, stop = store.told(at, stop)
        native = native_steps(self.seconds, self.horizon, spec.control_hz)
        count = min(native, stop - at)
        actions = np.zeros((native, store.action.shape[1]), np.float32)
        actions[:count] = store.action[at : at + count]
        actions, whole = to_policy_steps(actions, count, self.horizon, spec)
        return Window(
            images={name: store.frame(own, at) for name, own in self.cameras[dataset].items() if own is not None},
            state=np.asarray(store.state[at]), instruction=instruction,
            actions=actions, valid=np.repeat(whole[:, None], actions.shape[1], axis=1), embodiment=spec.key,
            final_state=np.asarray(store.state[stop - 1]), n=n, source=f"{store.root.name}:{episode}:{t}",
        ).validate()  # fmt: skip

    def report(self, steps: int, batch: int) -> list[dict]:
        """What a run of `steps` x `batch` will draw: share, draws and epochs per dataset."""
        lines = [
            {"dataset": str(store.root), "robot": spec.key, "episodes": len(episodes), "frames": size, "language": store.language}
            for store, spec, episodes, size in zip(self.stores, self.specs, self.episodes, self.sizes, strict=True)
        ]
        if self.answers is not None and len(self.shares) > len(lines):
            lines.append({"dataset": str(self.answers.path), "robot": "-", "episodes": 0, "frames": len(self.answers)})
        for line, share in zip(lines, self.shares, strict=True):
            draws = share * steps * batch
            line |= {"share": round(share, 4), "draws": round(draws), "epochs": round(draws / max(1, line["frames"]), 2)}
        return lines


def _shares(weights: Sequence[float], sizes: Sequence[int], temperature: float | None, answers: float) -> list[float]:
    """Share of the samples per dataset, summing to 1; `answers` > 0 adds theirs at the end."""
    scaled = [(w * size ** (1 / temperature) if temperature else w) if size else 0.0
              for w, size in zip(weights, sizes, strict=True)]  # fmt: skip
    total = math.fsum(scaled)
    shares = [w / total * (1 - answers) if total else 0.0 for w in scaled]
    return [*shares, answers] if answers else shares


def _shards_of(store: Store, chosen: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(where a streamed dataset's shards begin among the frames of the chosen episodes (P + 1,), their numbers (P,)); shards
    without a chosen episode are left out. None for a dataset that lies here whole."""
    if store.shards is None:
        return None
    episodes = np.searchsorted(store.episode_starts, store.shards)  # a shard begins with an episode
    begins = starts[np.searchsorted(chosen, episodes)]
    kept = np.flatnonzero(np.diff(begins))
    return np.append(begins[kept], begins[-1]), kept


def split_episodes(count: int, holdout: float, part: str) -> np.ndarray:
    """Episodes of `part`. The split does not depend on the run's seed, so that figures of two seeds compare."""
    held = min(max(round(count * holdout), 1), count - 1) if holdout else 0
    key = mix(Purpose.SPLIT, count)
    out = np.array([permute(i, count, key) for i in range(held)], np.int64)
    return np.sort(out) if part == "holdout" else np.setdiff1d(np.arange(count), out, assume_unique=True)
