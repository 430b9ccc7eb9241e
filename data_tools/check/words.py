"""Instructions: empty, unreadable, ambiguous, or meant for somebody else."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from data_tools.check.dataset import Dataset
from data_tools.check.finding import Finding, register
from vla.errors import DataError
from vla.prompt import clean_instruction

_PLACEHOLDER = re.compile(
    r"^(task|episode|test|demo|default|none|null|todo|n/?a|unknown|dummy|instruction|untitled)[\W_\d]*$", re.I
)
_ORDERS = re.compile(
    r"ignore (all|any|the|previous)|system prompt|<\|.*\|>|\[/?inst\]|^(system|assistant|user)\s*:|https?://", re.I | re.M
)
_TASKS = "meta/tasks"
REWRITE = "correct this task in meta/tasks.parquet (or the source, and convert again)"


@register("instruction", "instructions a model cannot be given")
def instruction(data: Dataset) -> Iterator[Finding]:
    """Empty, or longer than a prompt takes; `vla.prompt.clean_instruction` is the judge, as in training."""
    for text, episode, _ in _used(data):
        try:
            clean_instruction(text)
        except DataError as error:
            yield Finding("error", _TASKS, f"{text[:60]!r}: {error.found}", error.expected, REWRITE, episode)


@register("odd-instruction", "instructions with hidden characters, placeholders, orders to a chat model")
def odd_instruction(data: Dataset) -> Iterator[Finding]:
    """Cleaned or harmless to us, but hardly what somebody meant to say to a robot."""
    for text, episode, count in _used(data):
        hidden = sorted(
            {unicodedata.name(c, f"U+{ord(c):04X}") for c in text if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn")}
        )
        scripts = {unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()}
        mixed = {s for s in scripts if s in ("LATIN", "CYRILLIC", "GREEK")}
        if hidden:
            yield Finding("warning", _TASKS, f"{text[:60]!r}: {', '.join(hidden[:3])}", "visible characters", REWRITE, episode)
        if len(mixed) > 1:
            yield Finding(
                "warning",
                _TASKS,
                f"{text[:60]!r}: {' and '.join(sorted(mixed))} letters in one sentence",
                "one script",
                REWRITE,
                episode,
            )
        if _PLACEHOLDER.match(text.strip()):
            yield Finding(
                "warning",
                _TASKS,
                f"{text[:60]!r} in {count} episodes: a placeholder",
                "what the robot is to do",
                REWRITE,
                episode,
            )
        if _ORDERS.search(text):
            yield Finding(
                "warning",
                _TASKS,
                f"{text[:80]!r}: reads like an order to a chat model",
                "what the robot is to do",
                REWRITE,
                episode,
            )


@register("uneven-instruction", "one sentence written in several ways")
def uneven_instruction(data: Dataset) -> Iterator[Finding]:
    """`Pick up the cup.` and `pick up the cup`: policies react to a full stop (openvla-oft #95)."""
    ways: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for text, episode, count in _used(data):
        plain = " ".join(re.sub(r"[^\w\s]", " ", unicodedata.normalize("NFKC", text)).lower().split())
        ways[plain][text] = (episode, count)
    for written in ways.values():
        if len(written) > 1:
            rare = min(written, key=lambda text: written[text][1])
            listed = ", ".join(f"{text[:40]!r} ({count})" for text, (_, count) in written.items())
            yield Finding(
                "warning", _TASKS, f"{len(written)} spellings: {listed}", "one", f"keep one of them: {REWRITE}", written[rare][0]
            )


@register("changing-instruction", "instructions that change inside an episode")
def changing_instruction(data: Dataset) -> Iterator[Finding]:
    """Allowed; but readers that take the first row's instruction for the whole episode will not see it."""
    assert data.rows is not None
    changed = [e for e in range(len(data.rows.episodes)) if len(np.unique(data.rows.task[data.span(e)])) > 1]
    if changed:
        yield Finding(
            "note",
            _TASKS,
            f"more than one instruction inside {len(changed)} episodes",
            "one per episode",
            "nothing, if sub-tasks are meant; training here reads the first",
            changed[0],
        )


def _used(data: Dataset) -> Iterator[tuple[str, int, int]]:
    """(instruction, first episode, episodes) of every instruction some row has."""
    assert data.rows is not None and data.layout is not None
    numbers, rows = np.unique(data.rows.task, return_index=True)
    opening = data.rows.task[np.minimum(data.rows.starts[:-1], len(data.rows.task) - 1)]
    episodes = np.bincount(np.searchsorted(numbers, opening), minlength=len(numbers))
    for number, row, count in zip(numbers.tolist(), rows, episodes.tolist(), strict=True):
        if 0 <= number < len(data.layout.instructions):
            yield data.layout.instructions[number], int(np.searchsorted(data.rows.starts, row, "right")) - 1, max(1, count)
