"""What `tabletop-long` asks for: goals of three to four tabletop tasks each, in one sentence. Words only, no simulator needed.

A goal is a row of stages; the subtasks of one stage may be done in any order. Sentences name a goal, not its steps: which
instructions it takes, and which of them are done already, is for whoever plans to know. Touching leaves nothing behind that a
picture shows, nor does pushing there and back; a push or a lift does, to those who remember where the cubes lay.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """One goal: its sentence, and the tasks of `TABLETOP_TASKS` it is made of."""

    sentence: str
    stages: tuple[tuple[str, ...], ...]
    trace: bool
    """Whether what is done leaves the cubes elsewhere than they lay; else only memory knows it."""

    @property
    def subtasks(self) -> tuple[str, ...]:
        """All of them, in the order the expert prefers."""
        return tuple(task for stage in self.stages for task in stage)


def _in_turn(*tasks: str) -> tuple[tuple[str, ...], ...]:
    return tuple((task,) for task in tasks)


GOALS: dict[str, Goal] = {
    "touch-every": Goal("touch every cube", (("touch-red", "touch-green", "touch-blue", "touch-yellow"),), trace=False),
    "touch-return": Goal(
        "touch the red cube then the blue one then the red one again", _in_turn("touch-red", "touch-blue", "touch-red"),
        trace=False,
    ),
    "touch-twice": Goal(
        "touch the green cube twice and the yellow cube after that", _in_turn("touch-green", "touch-green", "touch-yellow"),
        trace=False,
    ),
    "touch-cold-first": Goal(
        "touch the cold cubes before the warm ones", (("touch-blue", "touch-green"), ("touch-red", "touch-yellow")), trace=False,
    ),
    "there-and-back": Goal(
        "push the blue cube aside and back again and finish at the yellow cube",
        (("push-blue-left", "push-blue-right"), ("touch-yellow",)), trace=False,
    ),
    "clear-by-colour": Goal(
        "clear the table by colour red left green right blue away", (("push-red-left", "push-green-right", "push-blue-away"),),
        trace=True,
    ),
    "all-away": Goal(
        "push everything away", (("push-red-away", "push-green-away", "push-blue-away", "push-yellow-away"),), trace=True,
    ),
    "warm-left-touch-cold": Goal(
        "push every warm cube left and touch the cold ones",
        (("push-red-left", "push-yellow-left", "touch-green", "touch-blue"),), trace=True,
    ),
    "warm-right-lift": Goal(
        "move the warm cubes right and pick up the green one",
        (("push-yellow-right", "push-red-right"), ("lift-green",)), trace=True,
    ),
    "weigh-cold": Goal(
        "weigh the cold cubes one by one and finish at the red cube", (("lift-blue", "lift-green"), ("touch-red",)), trace=False,
    ),
}  # fmt: skip
"""Goal -> what it asks for."""


def other_goals(goal: str) -> tuple[str, ...]:
    """Goals that may be told in place of `goal`: doing them does not do it as well."""
    wanted = set(GOALS[goal].subtasks)
    return tuple(name for name, other in GOALS.items() if name != goal and not wanted <= set(other.subtasks))
