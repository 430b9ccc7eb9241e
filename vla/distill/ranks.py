"""What one process does for all of them, before and between trainings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from vla.errors import VLAError


def by_one(work: Callable[[], Any]) -> Any:
    """What `work` returns on the main process, for all; its `VLAError` is everybody's."""
    state, answer = PartialState(), [None, None]
    if state.is_main_process:
        try:
            answer[0] = work()
        except VLAError as error:
            if state.num_processes == 1:
                raise
            answer[1] = error  # pyright: ignore[reportArgumentType, reportCallIssue]
    if state.num_processes > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def say(text: str) -> None:
    """On the main process, past a progress bar."""
    if PartialState().is_main_process:
        tqdm.write(text)
