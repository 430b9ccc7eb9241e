"""Time: rates that do not agree, episodes that are short, robots that wait."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from data_tools.check.dataset import Dataset
from data_tools.check.finding import Finding, register
from vla.episodes.layout import ACTION, STATE

IDLE_SECONDS, IDLE_SHARE = 1.0, 0.10
"""A start without motion is reported from this long on, if it is also this share of its episode."""
MOTION = 0.01
"""Share of a dimension's range that counts as motion."""
_TIGHT = 1e-4
"""Seconds by which lerobot lets a timestamp differ (`tolerance_s`)."""


@register("wrong-fps", "rates of rows, videos and control that do not agree")
def wrong_fps(data: Dataset) -> Iterator[Finding]:
    """Velocities and chunks in seconds are wrong by the same factor."""
    assert data.rows is not None and data.layout is not None
    if abs(data.spec.control_hz / data.fps - 1) > 0.02:
        yield Finding(
            "error",
            "meta/embodiment.json",
            f"control_hz {data.spec.control_hz:g}",
            f"{data.fps:g}, the fps of meta/info.json",
            f'set "control_hz": {data.fps:g} in meta/embodiment.json, or the true fps in meta/info.json',
        )
    rates = []
    for e in range(len(data.rows.episodes)):
        step = np.diff(data.rows.timestamp[data.span(e)])
        if len(step) and np.isfinite(step).all() and np.median(step) > 0:
            rates.append((e, 1 / float(np.median(step)), float(np.abs(step - np.median(step)).max())))
    usual = float(np.median([rate for _, rate, _ in rates])) if rates else data.fps
    if abs(usual / data.fps - 1) > 0.01:
        yield Finding(
            "error",
            "data, timestamp",
            f"rows at {usual:.4g} Hz",
            f"{data.fps:g}, the fps of meta/info.json",
            f'set "fps": {usual:.4g} in meta/info.json if the timestamps are right, else rewrite them as row / fps',
        )
    else:
        for e, rate, _ in rates:
            if abs(rate / usual - 1) > 0.02:
                yield Finding(
                    "error",
                    "data, timestamp",
                    f"rows at {rate:.4g} Hz",
                    f"{usual:.4g} Hz, as in the other episodes",
                    "resample or drop this episode",
                    e,
                )
    loose = [e for e, _, jitter in rates if jitter > _TIGHT]
    if loose:
        worst = max(rates, key=lambda entry: entry[2])
        yield Finding(
            "note",
            "data, timestamp",
            f"steps that vary by up to {worst[2] * 1000:.2g} ms in {len(loose)} episodes",
            f"less than {_TIGHT * 1000:g} ms, lerobot's tolerance",
            "`vla data convert` writes even timestamps",
            worst[0],
        )
    for camera, key in data.layout.cameras.items():
        about = data.layout.info["features"][key]
        said = {**(about.get("info") or {}), **(about.get("video_info") or {})}.get("video.fps")
        if isinstance(said, int | float) and said > 0 and abs(said / data.fps - 1) > 0.01:
            yield Finding(
                "error",
                "meta/info.json",
                f"video of camera {camera!r} at {said:g} fps",
                f"{data.fps:g}, as the rows",
                "correct the wrong one of both in meta/info.json",
            )


@register("not-from-zero", "episodes whose time does not begin at 0")
def not_from_zero(data: Dataset) -> Iterator[Finding]:
    """Offsets into a video are counted from the start of the episode."""
    assert data.rows is not None
    first = data.rows.timestamp[data.rows.starts[:-1]]
    late = np.flatnonzero(np.abs(first) > 0.5 / data.fps)
    if len(late):
        yield Finding(
            "warning",
            "data, timestamp",
            f"{first[late[0]]:g} s at the first row ({len(late)} episodes)",
            "0 s",
            "`vla data convert` rewrites the timestamps",
            int(late[0]),
            0,
        )


@register("short-episode", "episodes much shorter than the others")
def short_episode(data: Dataset) -> Iterator[Finding]:
    """Aborted recordings; of a chunk longer than them most is padding."""
    assert data.rows is not None
    lengths = np.diff(data.rows.starts)
    usual = float(np.median(lengths))
    for e in np.flatnonzero((lengths < 0.2 * usual) | (lengths < 2)):
        yield Finding(
            "warning",
            "data",
            f"{lengths[e]} rows",
            f"about {usual:.0f}, as the others have",
            "drop it if the recording was aborted",
            int(e),
        )


@register("splits", "splits of meta/info.json that name episodes there are none of")
def splits(data: Dataset) -> Iterator[Finding]:
    """lerobot reads them as they are."""
    assert data.layout is not None and data.rows is not None
    for name, text in (data.layout.info.get("splits") or {}).items():
        if any(int(end) > data.layout.num_episodes for end in re.findall(r":(\d+)", str(text))):
            yield Finding(
                "warning",
                "meta/info.json",
                f"split {name} {text}",
                f"within 0:{data.layout.num_episodes}",
                f"end split {name} at {data.layout.num_episodes} in meta/info.json",
            )


@register("idle-start", "robots that wait before they move")
def idle_start(data: Dataset) -> Iterator[Finding]:
    """A policy that has learned to wait may wait for ever: nothing in what it sees says that the wait is over."""
    counts = {e: still_rows(data, e) for e in data.healthy}
    idle = {}
    for e, count in counts.items():
        length = data.span(e).stop - data.span(e).start
        if count >= max(IDLE_SECONDS * data.fps, 5) and count >= IDLE_SHARE * length:
            idle[e] = (count, length)
    for e, (count, length) in idle.items():
        if count >= length:
            yield Finding("warning", STATE, f"the robot does not move in {length} rows", "motion", "drop this episode", e)
        else:
            yield Finding(
                "warning",
                STATE,
                f"{count} of {length} rows ({count / data.fps:.1f} s) before the robot moves",
                f"less than {IDLE_SECONDS:g} s",
                f"drop rows 0 to {count - 1 - int(0.2 * data.fps)} of this episode",
                e,
                0,
            )


def still_rows(data: Dataset, episode: int) -> int:
    """Rows at the start during which no dimension leaves its first value by more than `MOTION` of its range."""
    part = "state" if data.values("state").shape[1] else "action"
    values = data.values(part)[data.span(episode)].astype(float)
    scale = motion_scale(data, part)
    moved = (np.abs(values - values[0]) > MOTION * scale).any(1)
    return int(moved.argmax()) if moved.any() else len(values)


def motion_scale(data: Dataset, part: str) -> np.ndarray:
    """Range per dimension (q01 to q99), infinite for those that never move."""

    def measure() -> np.ndarray:
        values = data.finite(part)
        span = np.ptp(np.quantile(values, [0.01, 0.99], axis=0), axis=0) if len(values) else np.zeros(values.shape[1])
        return np.where(span > 1e-9, span, np.inf)

    return data.once(f"scale {part}", measure)


@register("silent-actions", "actions that are all zero while the robot moves")
def silent_actions(data: Dataset) -> Iterator[Finding]:
    """Actions that were not recorded. One and the same action is no sign: a saturated controller gives it too."""
    for e in data.healthy:
        a = data.values("action")[data.span(e)]
        if len(a) >= 10 and a.size and not a.any() and still_rows(data, e) < len(a) // 2:
            yield Finding(
                "warning", ACTION, f"0 in all {len(a)} rows while the state changes", "commands as sent", "drop this episode", e
            )
