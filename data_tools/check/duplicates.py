"""Episodes that are there twice, in one dataset or in several, and those that are on both sides of the held-out split."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from data_tools.check.cameras import is_blank
from data_tools.check.dataset import Dataset
from data_tools.check.finding import Finding, register
from data_tools.check.timing import motion_scale
from vla import mixture

POINTS = 32
"""Points in time at which two episodes are compared."""
NEAR = 0.003
"""Largest difference, as a share of each dimension's range, of two episodes that are nearly the same."""
NAMED = 12
"""Episodes of a group that are named; the others are counted."""


def fingerprints(data: Dataset) -> dict[int, str]:
    """Episode -> sha256 of its actions and states."""

    def read() -> dict[int, str]:
        out = {}
        for e in data.healthy:
            digest = hashlib.sha256()
            for part in ("action", "state"):
                digest.update(np.ascontiguousarray(data.values(part)[data.span(e)], dtype=np.float32).tobytes())
            out[e] = digest.hexdigest()
        return out

    return data.once("fingerprints", read)


def groups(data: Dataset) -> list[tuple[list[int], bool]]:
    """(episodes that are one and the same, in order, whether to the byte), every episode in one group at most.

    Otherwise each differs from another one of its group by `NEAR` at most, not from all of them.
    """

    def find() -> list[tuple[list[int], bool]]:
        same: dict[str, list[int]] = defaultdict(list)
        for e, digest in fingerprints(data).items():
            same[digest].append(e)
        copies = {episodes[0]: episodes for episodes in same.values()}
        near = _near(data, list(copies))
        linked = {first for group in near for first in group}
        alone = [episodes for first, episodes in copies.items() if len(episodes) > 1 and first not in linked]
        joined = [sorted(e for first in group for e in copies[first]) for group in near]
        return [(episodes, True) for episodes in alone] + [(episodes, False) for episodes in joined]

    return data.once("groups", find)


def _near(data: Dataset, episodes: list[int]) -> list[set[int]]:
    """Episodes linked by pairs that differ by less than `NEAR` everywhere. Means over parts of them differ by less, too: sorted
    by one, sifted by the others, few are left to be compared whole; and none that are linked already."""
    long = [e for e in episodes if data.span(e).stop - data.span(e).start >= 8]
    if len(long) < 2:
        return []
    shapes = np.stack(
        [np.concatenate([_resampled(data, part, e) for part in ("action", "state")]) for e in long], dtype=np.float32
    )
    lengths = np.array([data.span(e).stop - data.span(e).start for e in long])
    sieve = np.stack([part.mean(1) for part in np.array_split(shapes, min(8, shapes.shape[1]), axis=1)], 1)
    order = np.argsort(sieve[:, 0], kind="stable")
    stops = np.searchsorted(sieve[order, 0], sieve[order, 0] + NEAR, "right")
    group = np.arange(len(long))  # of each, the number that all of its group carry
    for n, i in enumerate(order):
        rest = order[n + 1 : stops[n]]
        rest = rest[group[rest] != group[i]]
        rest = rest[
            (np.abs(sieve[rest] - sieve[i]) < NEAR).all(1) & (np.abs(lengths[rest] - lengths[i]) <= max(1, 0.02 * lengths[i]))
        ]
        if len(rest) and len(like := rest[np.abs(shapes[rest] - shapes[i]).max(1) < NEAR]):
            group[np.isin(group, group[like])] = group[i]
    linked: dict[int, set[int]] = defaultdict(set)
    for e, number in zip(long, group.tolist(), strict=True):
        linked[number].add(e)
    return [found for found in linked.values() if len(found) > 1]


def _resampled(data: Dataset, part: str, episode: int) -> np.ndarray:
    values = data.values(part)[data.span(episode)].astype(float)
    at = np.linspace(0, len(values) - 1, POINTS)
    scaled = values / motion_scale(data, part)
    return (
        np.concatenate([np.interp(at, np.arange(len(values)), column) for column in scaled.T]) if scaled.shape[1] else np.zeros(0)
    )


def _named(episodes: Sequence[int]) -> str:
    """`episode 3`, or `episodes 3, 4, 7`, or the first 12 and how many there are."""
    more = f" and {len(episodes) - NAMED:,} more ({len(episodes):,} in all)" if len(episodes) > NAMED else ""
    return f"episode{'s' * (len(episodes) > 1)} {', '.join(map(str, episodes[:NAMED]))}{more}"


@register("duplicate-episode", "episodes that are there twice")
def duplicate_episode(data: Dataset) -> Iterator[Finding]:
    """They count several times; and one of each group may end up in the held-out part, see `leaked-episode`."""
    for episodes, exact in groups(data):
        yield Finding(
            "warning",
            "data",
            f"{'the same numbers as' if exact else 'hardly differs from'} {_named(episodes[:-1])}",
            "episodes that differ",
            "drop all but one of them",
            episodes[-1],
        )


@register("duplicate-pictures", "different episodes with the same pictures", "pictures")
def duplicate_pictures(data: Dataset) -> Iterator[Finding]:
    """Offsets into a shared video went wrong (lerobot #2627), or a file was copied."""
    numbers = fingerprints(data)
    for camera, films in data.films.items():
        seen: dict[str, int] = {}
        for e, film in enumerate(films):
            if film is None or is_blank(film):
                continue
            first = seen.setdefault(film.digest, e)
            if first != e and numbers.get(first) != numbers.get(e) and len(film.still) > 1:
                yield Finding(
                    "error",
                    f"videos, camera {camera!r}",
                    f"the same pictures as episode {first}, but other actions",
                    "pictures of this episode",
                    "restore the video, or correct its offsets in meta/episodes",
                    e,
                )


@register("leaked-episode", "duplicates on both sides of the held-out split")
def leaked_episode(data: Dataset) -> Iterator[Finding]:
    """What was trained on must not be measured on. The split is the mixture's own."""
    count = data.layout.num_episodes if data.layout else 0
    if count < 2 or not data.holdout:
        return
    held = set(mixture.split_episodes(count, data.holdout, "holdout").tolist())
    for episodes, exact in groups(data):
        inside = [e for e in episodes if e in held]
        outside = [e for e in episodes if e not in held]
        if inside and outside:
            yield Finding(
                "error",
                "data",
                f"{_named(inside)}, held out for measuring (mixture.holdout={data.holdout:g}), but "
                f"{'the same as' if exact else 'nearly'} {_named(outside)}, trained on",
                "held-out episodes that no training episode repeats",
                f"drop {_named(min(inside, outside, key=len))}",
                inside[0],
            )


@register("leaked-between", "episodes or scenes that are in two of the datasets", "several")
def leaked_between(datasets: Sequence[Dataset]) -> Iterator[Finding]:
    """Train on one, measure on the other: the same episode or the same recorded scene must not be in both."""
    known: dict[str, tuple[Dataset, int]] = {}
    scenes: dict[tuple, tuple[Dataset, int]] = {}
    for data in datasets:
        repeated: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for e, digest in fingerprints(data).items() if data.rows is not None else ():
            other, first = known.setdefault(digest, (data, e))
            if other is not data:
                repeated[str(other.root)].append((e, first))
        for root, pairs in repeated.items():
            yield Finding(
                "error",
                "data",
                f"{len(pairs)} episodes that {root} holds as well (e.g. its episode {pairs[0][1]})",
                "episodes of their own",
                "leave these episodes out of one of the two",
                pairs[0][0],
                root=str(data.root),
            )
        if data.layout is None:
            continue
        suite, again = data.layout.recording.get("suite", ""), defaultdict(list)
        for e, entry in enumerate(data.layout.recording.get("episodes", [])[: data.layout.num_episodes]):
            if entry.get("seed") is None:
                continue
            other, first = scenes.setdefault((suite, entry["task"], entry["seed"]), (data, e))
            if other is not data and str(other.root) not in repeated:
                again[str(other.root)].append((e, first))
        for root, pairs in again.items():
            yield Finding(
                "warning",
                "meta/recording.json",
                f"{len(pairs)} scenes (task and seed) that {root} was recorded in as well",
                "scenes of their own, if one of the two is for measuring",
                "record with another --seed",
                pairs[0][0],
                root=str(data.root),
            )
