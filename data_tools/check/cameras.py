"""Pictures: cameras that changed places, hang upside down, stand still, show nothing, or show the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_tools.check.dataset import Dataset
from data_tools.check.finding import Finding, register
from data_tools.check.pictures import Film
from data_tools.check.timing import motion_scale

FROZEN_SECONDS, FROZEN_MOTION = 1.0, 0.08
"""A picture that does not change for this long while the state covers this share of its range is frozen."""
_LEAST = 4
"""Episodes below which nothing can be said to be unlike the others."""
TURNS = {
    "upside down": lambda m: m[::-1, ::-1],
    "mirrored top to bottom": lambda m: m[::-1],
    "mirrored left to right": lambda m: m[:, ::-1],
}


def usual(films: list[Film | None]) -> np.ndarray | None:
    """The median average picture of a camera, (GRID, GRID, 3)."""
    means = [film.mean for film in films if film is not None]
    return np.median(means, axis=0) if len(means) >= _LEAST else None


def is_blank(film: Film) -> bool:
    """One colour all over; what `blank-camera` says, nobody else need say again."""
    return bool(np.ptp(film.mean, axis=(0, 1)).max() < 3)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance in levels of two average pictures."""
    return float(np.abs(a - b).mean())


@register("camera-swap", "episodes in which two cameras have changed places", "pictures")
def camera_swap(data: Dataset) -> Iterator[Finding]:
    """An episode's picture of camera A that looks like everybody's camera B, and the reverse."""
    known = {camera: mean for camera, films in data.films.items() if (mean := usual(films)) is not None}
    for one in known:
        for two in list(known)[list(known).index(one) + 1 :]:
            for e, (a, b) in enumerate(zip(data.films[one], data.films[two], strict=True)):
                if a is None or b is None or apart(known[one], known[two]) < 8:
                    continue
                crossed = max(apart(a.mean, known[two]), apart(b.mean, known[one]))
                straight = min(apart(a.mean, known[one]), apart(b.mean, known[two]))
                if crossed < 0.5 * straight:
                    yield Finding(
                        "error",
                        "videos",
                        f"the pictures of {one!r} look like {two!r} and the reverse "
                        f"({crossed:.0f} against {straight:.0f} levels apart)",
                        "each camera in its own place",
                        f"swap the two cameras' files in this episode, or drop it: {data.root}",
                        e,
                    )


@register("camera-turned", "episodes whose picture is upside down or mirrored", "pictures")
def camera_turned(data: Dataset) -> Iterator[Finding]:
    """Held against the usual picture of the same camera, turned each way."""
    for camera, films in data.films.items():
        mean = usual(films)
        if mean is None:
            continue
        for e, film in enumerate(films):
            if film is None or (straight := apart(film.mean, mean)) < 6:
                continue
            ways = {name: apart(turn(film.mean), mean) for name, turn in TURNS.items()}
            best = min(ways, key=lambda name: ways[name])
            if ways[best] < 0.5 * straight:
                yield Finding(
                    "error",
                    f"videos, camera {camera!r}",
                    f"a picture {best} ({ways[best]:.0f} against {straight:.0f} levels from the usual one)",
                    "the orientation of the other episodes",
                    "turn it back, or drop this episode",
                    e,
                )


@register("frozen-camera", "pictures that stand still while the robot moves", "pictures")
def frozen_camera(data: Dataset) -> Iterator[Finding]:
    """The state covers much of its range and not one of 256 blocks changes."""
    if not data.values("state").shape[1]:
        return
    scale = motion_scale(data, "state")
    for camera, films in data.films.items():
        for e in data.healthy:
            film, state = films[e] if e < len(films) else None, data.values("state")[data.span(e)].astype(float)
            if film is None or is_blank(film) or len(film.still) != len(state):
                continue
            for start, stop in _runs(film.still, max(int(FROZEN_SECONDS * data.fps), 5)):
                covered = float((np.ptp(state[start - 1 : stop], axis=0) / scale).max())
                if covered > FROZEN_MOTION:
                    whole = stop - start >= 0.9 * (len(state) - 1)
                    yield Finding(
                        "error" if whole else "warning",
                        f"videos, camera {camera!r}",
                        f"one picture for {stop - start + 1} rows while the state covers {covered:.0%} of its range",
                        "pictures that move with the robot",
                        "drop this episode, or these rows" if not whole else "drop this episode",
                        e,
                        start - 1,
                    )
                    break


def _runs(flags: np.ndarray, least: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of True of at least `least`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    for start, stop in edges.reshape(-1, 2):
        if stop - start >= least:
            yield int(start), int(stop)


@register("repeated-frames", "a camera that is slower than the rows", "pictures")
def repeated_frames(data: Dataset) -> Iterator[Finding]:
    """Every second picture a copy of the one before: recorded at another rate and filled up."""
    if not data.values("state").shape[1]:
        return
    scale = motion_scale(data, "state")
    for camera, films in data.films.items():
        copies = moving = 0
        for e in data.healthy:
            film, state = films[e] if e < len(films) else None, data.values("state")[data.span(e)].astype(float)
            if film is None or len(film.same) != len(state) or len(state) < 10 or film.same[1:].mean() > 0.95:
                continue
            fast = (np.abs(np.diff(state, axis=0)) / scale).max(1) > 0.005
            copies, moving = copies + int((film.same[1:] & fast).sum()), moving + int(fast.sum())
        if moving >= 100 and copies > 0.2 * moving:
            yield Finding(
                "warning",
                f"videos, camera {camera!r}",
                f"{copies / moving:.0%} of the pictures are copies of the one before while the robot moves",
                "a new picture per row",
                f"record this camera at {data.fps:g} fps, or store fewer rows per second",
            )


@register("blank-camera", "cameras that show nothing", "pictures")
def blank_camera(data: Dataset) -> Iterator[Finding]:
    """One colour all over."""
    for camera, films in data.films.items():
        blank = [e for e, film in enumerate(films) if film is not None and is_blank(film)]
        if blank:
            yield Finding(
                "error",
                f"videos, camera {camera!r}",
                f"one colour in {len(blank)} of {len(films)} episodes",
                "a picture of the scene",
                "drop these episodes, or leave the camera out of the embodiment",
                blank[0],
            )


@register("same-camera", "two cameras with the same pictures", "pictures")
def same_camera(data: Dataset) -> Iterator[Finding]:
    """One file under two names: it costs time and teaches nothing."""
    names = list(data.films)
    for n, one in enumerate(names):
        for two in names[n + 1 :]:
            both = [(a, b) for a, b in zip(data.films[one], data.films[two], strict=True) if a and b]
            equal = sum(a.digest == b.digest for a, b in both)
            if equal:
                yield Finding(
                    "warning",
                    "videos",
                    f"cameras {one!r} and {two!r} show the same in {equal} of {len(both)} episodes",
                    "two views",
                    "leave one of them out of the embodiment, or restore the right file",
                )


@register("other-scene", "episodes filmed quite differently from the others", "pictures")
def other_scene(data: Dataset) -> Iterator[Finding]:
    """A note only: another background or light may be meant. Ten times the usual distance from the usual picture."""
    for camera, films in data.films.items():
        mean = usual(films)
        if mean is None:
            continue
        far = {e: apart(film.mean, mean) for e, film in enumerate(films) if film is not None}
        limit = max(10 * float(np.median(list(far.values()))), 25.0)
        for e, distance in far.items():
            if distance > limit:
                yield Finding(
                    "note",
                    f"videos, camera {camera!r}",
                    f"{distance:.0f} levels from the usual picture",
                    f"under {limit:.0f}",
                    "look at it: vla data report " + str(data.root),
                    e,
                )
