"""Every word the model is asked, versioned: a policy remembers which version it was trained with.

An instruction is cleaned once, here, before it reaches any tokenizer; what cannot be cleaned is refused.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from vla.errors import DataError

MAX_INSTRUCTION = 512
"""Characters, after cleaning."""

_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

PROMPTS: dict[str, str] = {
    "plain-1": "{instruction}",
    "robot-1": "{robot}: {instruction}",
    "openvla-1": "In: What action should the robot take to {instruction}?\nOut:",
    "openvla-v01": _VICUNA + " USER: What action should the robot take to {instruction}? ASSISTANT:",
}
"""Version -> template. `plain-1` is for models learned from scratch, where each further word costs a position; `robot-1`
says which robot is meant, so that a mixture of them can be told apart by words; `openvla-1` is OpenVLA's (lower-cased
instruction, right-stripped), `openvla-v01` that of its first version, on Vicuna."""

ANSWER_PROMPTS: dict[str, str] = {
    "openvla-1": "In: {question}\nOut:",
    "openvla-v01": _VICUNA + " USER: {question} ASSISTANT:",
}
"""What the same models were asked other questions with."""

DONE = "done"
"""What is answered, and written into datasets, when nothing is left to do."""
NOTHING = "nothing"
"""What stands where no instruction has been given or followed yet."""

PLAN_PROMPTS: dict[str, str] = {"plan-1": "goal: {goal}. done: {done}. last: {last}. what next?"}
"""Version -> what a planner is asked. The answer is the next instruction, or `DONE`. Instructions done are separated by commas;
beside those and the goal there are seven words, so a vocabulary learned from the questions has each whole."""
PROGRESS_PROMPTS: dict[str, str] = {"progress-1": "is it finished: {instruction}?"}
"""Version -> what whoever watches is asked about the instruction that is being followed. The answer is `yes` or `no`."""
PLAN_VERSION, PROGRESS_VERSION = "plan-1", "progress-1"
"""What is asked where nobody says otherwise."""


def clean_instruction(text: str) -> str:
    """NFC, control characters and runs of white space to one space, lower case.

    Raises `DataError` for an empty instruction or one longer than `MAX_INSTRUCTION` characters.
    """
    if not isinstance(text, str):
        raise DataError("instruction", found=type(text).__name__, expected="text", fix="pass a string")
    kept = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in unicodedata.normalize("NFC", text))
    cleaned = " ".join(kept.split()).lower()
    if not cleaned or len(cleaned) > MAX_INSTRUCTION:
        raise DataError("instruction", found=f"{len(cleaned)} characters", expected=f"1 to {MAX_INSTRUCTION}",
                        fix="say in one sentence what the robot should do")  # fmt: skip
    return cleaned


def act_prompt(instruction: str, version: str, robot: str = "") -> str:
    """The text before the actions for `instruction` given to `robot` (an embodiment's key), in prompt `version`."""
    words = " ".join(robot.replace("_", " ").replace("/", " ").replace("-", " ").split()).lower()
    return PROMPTS[version].format(instruction=clean_instruction(instruction), robot=words or "robot")


def answer_prompt(question: str) -> str:
    """The text before an answer: the question, white space and control characters cleaned, its case kept."""
    kept = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in unicodedata.normalize("NFC", question))
    return " ".join(kept.split())


def plan_prompt(goal: str, done: Sequence[str] = (), last: str = "", version: str = PLAN_VERSION) -> str:
    """The question whose answer is what to do next towards `goal`, once `done` was done and `last` was the last instruction.

    Raises `DataError` where one of them is no instruction (`clean_instruction`).
    """
    known = ", ".join(map(clean_instruction, done)) or NOTHING
    return PLAN_PROMPTS[version].format(goal=clean_instruction(goal), done=known,
                                        last=clean_instruction(last) if last else NOTHING)  # fmt: skip


def progress_prompt(instruction: str, version: str = PROGRESS_VERSION) -> str:
    """The question whether `instruction` is carried out by what the picture shows."""
    return PROGRESS_PROMPTS[version].format(instruction=clean_instruction(instruction))
