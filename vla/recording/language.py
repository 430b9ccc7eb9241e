"""The column `language_persistent` of LeRobot datasets: sentences that hold from a moment on, until the next of their style.

A row is `{role, content, style, timestamp, camera, tool_calls}`; every frame of an episode carries all rows of the episode
(LeRobot's own layout: a reader of one frame sees what held before and what comes). The styles written here are `subtask` (what is
to be done now), `plan` (that and what is left after it, numbered, anew at every subtask) and `memory` (what was done before, from
the second subtask on, separated by commas). After the last subtask, the subtask is `done`. `vla/episodes/language.py` reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from vla.prompt import DONE
from vla.schema import Said

COLUMN = "language_persistent"
FEATURE: dict[str, Any] = {"dtype": "language", "shape": [1], "names": None}
"""Its entry in `info.json`."""
STYLES = ("subtask", "plan", "memory")
ROW = pa.struct([
    pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string()), pa.field("style", pa.string()),
    pa.field("timestamp", pa.float32(), nullable=False), pa.field("camera", pa.string()),
    pa.field("tool_calls", pa.list_(pa.string())),  # JSON; as text, since Arrow makes no lists of its JSON type from Python's
])  # fmt: skip


class Segment(NamedTuple):
    """From `frame` on, `subtask` is under way; `plan` is what is left to do then (it first), `done` what was done before."""

    frame: int
    subtask: str
    plan: tuple[str, ...] = ()
    done: tuple[str, ...] = ()


def in_turn(starts: Sequence[int], subtasks: Sequence[str]) -> list[Segment]:
    """Segments of an episode whose subtask n begins at frame `starts[n]`, each done when the next begins. A last one called
    `DONE` is no subtask, but the time after them."""
    real = [text for text in subtasks if text != DONE]
    return [Segment(int(frame), text, tuple(real[n:]), tuple(real[:n]))
            for n, (frame, text) in enumerate(zip(starts, subtasks, strict=True))]  # fmt: skip


def narrate(segments: Iterable[Segment]) -> tuple[Said, ...]:
    """What is said of them, in the three styles."""
    said: list[Said] = []
    for frame, subtask, plan, done in segments:
        said.append(Said(frame, "subtask", subtask))
        if plan:
            said.append(Said(frame, "plan", "\n".join(f"{i}. {text}" for i, text in enumerate(plan, 1))))
        if done:
            said.append(Said(frame, "memory", ", ".join(done)))
    return tuple(said)


def to_rows(language: Iterable[Said], times: np.ndarray) -> list[dict[str, Any]]:
    """Rows as the column holds them, in order of time. `times` (T,) are the timestamps of the episode's frames, in seconds."""
    ordered = sorted(language, key=lambda said: said.frame)
    return [{"role": "assistant", "content": said.content, "style": said.style, "camera": None, "tool_calls": None,
             "timestamp": float(np.float32(times[said.frame]))} for said in ordered]  # fmt: skip


def to_column(rows: Sequence[Sequence[dict[str, Any]]], lengths: Sequence[int]) -> pa.Array:
    """The column of consecutive episodes: each episode's rows at every one of its frames."""
    once = pa.array([list(some) for some in rows], pa.list_(ROW))
    return once.take(pa.array(np.repeat(np.arange(len(rows)), lengths)))
