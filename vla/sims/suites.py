"""What can be simulated: suites, their tasks and the one sentence that names each. Words only, no simulator needed.

Kept apart from the adapters so that `vla eval --help`, a config check or a report can name tasks on a machine that has
neither MuJoCo nor a renderer.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vla.errors import UsageError
from vla.sims.tabletop_goals import GOALS, other_goals

COLOURS = ("red", "green", "blue", "yellow")
DIRECTIONS = ("left", "right", "away")
"""Seen by the robot (x forward, y to its left): left is +y, right is -y, away is +x, which is towards the camera."""

TABLETOP_TASKS = (
    *(f"touch-{colour}" for colour in COLOURS),
    *(f"push-{colour}-{direction}" for colour in COLOURS for direction in DIRECTIONS),
    *(f"lift-{colour}" for colour in COLOURS),
)

METAWORLD_SENTENCES = {
    "assembly-v3": "put the ring onto the peg",
    "basketball-v3": "dunk the basketball into the hoop",
    "bin-picking-v3": "move the block from one bin to the other",
    "box-close-v3": "put the lid on the box",
    "button-press-topdown-v3": "press the button from above",
    "button-press-topdown-wall-v3": "reach over the wall and press the button from above",
    "button-press-v3": "press the button from the front",
    "button-press-wall-v3": "reach around the wall and press the button from the front",
    "coffee-button-v3": "press the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial",
    "disassemble-v3": "take the ring off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "lock the door",
    "door-open-v3": "open the door",
    "door-unlock-v3": "unlock the door",
    "drawer-close-v3": "close the drawer",
    "drawer-open-v3": "open the drawer",
    "faucet-close-v3": "turn the faucet off",
    "faucet-open-v3": "turn the faucet on",
    "hammer-v3": "drive the nail in with the hammer",
    "hand-insert-v3": "insert the hand into the hole",
    "handle-press-side-v3": "press the handle down from the side",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle up from the side",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever up",
    "peg-insert-side-v3": "insert the peg into the hole from the side",
    "peg-unplug-side-v3": "unplug the peg sideways",
    "pick-out-of-hole-v3": "pick the puck out of the hole",
    "pick-place-v3": "pick up the puck and place it at the goal",
    "pick-place-wall-v3": "lift the puck over the wall and place it at the goal",
    "plate-slide-back-side-v3": "slide the plate sideways out of the cabinet",
    "plate-slide-back-v3": "slide the plate back out of the cabinet",
    "plate-slide-side-v3": "slide the plate sideways into the cabinet",
    "plate-slide-v3": "slide the plate into the cabinet",
    "push-back-v3": "pull the puck back to the goal",
    "push-v3": "push the puck to the goal",
    "push-wall-v3": "push the puck around the wall to the goal",
    "reach-v3": "reach the goal",
    "reach-wall-v3": "reach over the wall to the goal",
    "shelf-place-v3": "put the block on the shelf",
    "soccer-v3": "kick the ball into the net",
    "stick-pull-v3": "pull the jug with the stick",
    "stick-push-v3": "push the jug with the stick",
    "sweep-into-v3": "sweep the puck into the hole",
    "sweep-v3": "sweep the block off the table",
    "window-close-v3": "close the window",
    "window-open-v3": "open the window",
}
"""Meta-World ships no language; these are ours. All 50 tasks of Meta-World 3.1, all sentences distinct."""

FETCH_SENTENCES = {
    "reach": "move the hand to the red ball",
    "push": "push the block to the red ball",
    "pick-and-place": "pick up the block and hold it at the red ball",
}

ALOHA_SENTENCES = {
    "lift": "lift the red cube with the right arm",
    "transfer-cube": "hand the red cube from the right arm to the left arm",
}


def tabletop_instruction(task: str) -> str:
    """`push-red-left` -> `push the red cube left`."""
    verb, colour, *direction = task.split("-")
    return " ".join([verb, "the", colour, "cube", *direction])


@dataclass(frozen=True)
class Suite:
    """A simulator as the commands see it."""

    name: str
    embodiment: str
    """Shipped name of its `EmbodimentSpec`."""
    tasks: tuple[str, ...]
    """Default tasks: what is recorded and evaluated when none is named."""
    known: tuple[str, ...] = field(repr=False)
    """Every task that can be named."""
    group: Callable[[str], str] = field(repr=False)
    """What a task's results are summed under: the verb on the tabletop, the task itself in Meta-World."""
    instruction: Callable[[str], str] = field(repr=False)
    """The one sentence of a task, lower-case words."""
    scenes: str = ""
    """The suite whose scenes it draws: scene n is the same in both; default: its own."""
    swaps: Callable[[str], tuple[str, ...]] | None = field(default=None, repr=False)
    """Tasks that can be told and judged in the scenes of another; default: those of its group."""
    subtask: Callable[[str], str] | None = field(default=None, repr=False)
    """Where tasks are made of subtasks, the sentence of one; else None."""


SUITES: dict[str, Suite] = {
    "tabletop": Suite(
        name="tabletop", embodiment="tabletop", tasks=TABLETOP_TASKS, known=TABLETOP_TASKS,
        group=lambda task: task.split("-")[0], instruction=tabletop_instruction,
    ),
    "tabletop-wrist": Suite(
        name="tabletop-wrist", embodiment="tabletop_wrist", tasks=TABLETOP_TASKS, known=TABLETOP_TASKS,
        group=lambda task: task.split("-")[0], instruction=tabletop_instruction, scenes="tabletop",
    ),
    "tabletop-long": Suite(
        name="tabletop-long", embodiment="tabletop", tasks=tuple(GOALS), known=tuple(GOALS), group=lambda goal: goal,
        instruction=lambda goal: GOALS[goal].sentence, scenes="tabletop", swaps=other_goals,
        subtask=tabletop_instruction,
    ),
    "metaworld": Suite(
        name="metaworld", embodiment="metaworld_sawyer", tasks=("button-press-topdown-v3",),
        known=tuple(METAWORLD_SENTENCES), group=lambda task: task, instruction=METAWORLD_SENTENCES.__getitem__,
    ),
    "fetch": Suite(
        name="fetch", embodiment="fetch", tasks=("reach",), known=tuple(FETCH_SENTENCES),
        group=lambda task: task, instruction=FETCH_SENTENCES.__getitem__,
    ),
    "aloha": Suite(
        name="aloha", embodiment="aloha", tasks=("lift",), known=tuple(ALOHA_SENTENCES),
        group=lambda task: task, instruction=ALOHA_SENTENCES.__getitem__,
    ),
    "robosuite-panda": Suite(
        name="robosuite-panda", embodiment="robosuite_panda", tasks=("lift",), known=("lift",),
        group=lambda task: task, instruction={"lift": "lift the wooden cube"}.__getitem__,
    ),
    "robosuite-ur5e": Suite(
        name="robosuite-ur5e", embodiment="robosuite_ur5e", tasks=("lift",), known=("lift",),
        group=lambda task: task, instruction={"lift": "lift the wooden cube"}.__getitem__,
    ),
}  # fmt: skip


def find_suite(name: str) -> Suite:
    """The suite called `name`; `UsageError` naming the nearest one otherwise."""
    if name not in SUITES:
        raise UsageError(f"suite {name!r}", found="no such suite", expected=f"one of {list(SUITES)}",
                         fix=f"use --suite {_nearest(name, list(SUITES))[0]}")  # fmt: skip
    return SUITES[name]


def same_scenes(name: str) -> list[str]:
    """Suites whose scene n is the one of suite `name`, itself included; [name] for a suite that is not known here."""
    own = SUITES[name].scenes or name if name in SUITES else name
    return [name, *(other for other, suite in SUITES.items() if other != name and (suite.scenes or other) == own)]


def expand_tasks(suite: str, tasks: Sequence[str] | None) -> list[str]:
    """Task ids in the order named, each once. None or [] is the suite's default; a group (`push`) is all its tasks.

    Raises `UsageError` for a name that is neither a task nor a group, with the nearest names.
    """
    chosen = find_suite(suite)
    groups: dict[str, list[str]] = {}
    for task in chosen.known:
        groups.setdefault(chosen.group(task), []).append(task)
    out: dict[str, None] = {}
    for name in tasks or chosen.tasks:
        if name in chosen.known:
            out[name] = None
        elif name in groups:
            out.update(dict.fromkeys(groups[name]))
        else:
            near = _nearest(name, [*groups, *chosen.known])
            raise UsageError(f"task {name!r} of suite {suite!r}", found="no such task",
                             expected=f"one of its {len(chosen.known)} tasks or groups, nearest {near}",
                             fix=f"use --task {near[0]}")  # fmt: skip
    return list(out)


def _nearest(name: str, known: list[str]) -> list[str]:
    """The closest known names, best first; never empty."""
    return difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.4) or known[:3]
