"""What the clients here drive: a robot at the other end of a pipe, JSON lines on standard input and output. numpy and no more.

The other end is a test (`tests/test_stock_clients.py`), which has the simulator; nothing of it can be imported here.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from typing import Any

import numpy as np

_answers = sys.stdin
_requests = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a library prints is no message
SETTINGS: dict[str, Any] = json.loads(sys.argv[1])
"""What the test wants of this run."""


def reset() -> dict[str, Any]:
    """The next scene's first look: {"images": {camera: (h, w, 3) uint8}, "state": (S,), "instruction", "over", "success"}."""
    return _ask({"do": "reset"})


def act(action: np.ndarray) -> dict[str, Any]:
    """Moves by one control step; the look after it."""
    return _ask({"do": "act", "action": _said(np.asarray(action))})


def tell(**notes: Any) -> None:
    """For the test: arrays, bytes and what JSON can say."""
    _send({"do": "tell", "notes": {name: _said(note) for name, note in notes.items()}})


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    _send(request)
    look = json.loads(_answers.readline())
    return look | {"images": {name: _heard(said) for name, said in look["images"].items()}, "state": _heard(look["state"])}


def _send(request: dict[str, Any]) -> None:
    _requests.write(json.dumps(request) + "\n")
    _requests.flush()


def _said(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray):
        return {"array": base64.b64encode(value.tobytes()).decode(), "dtype": value.dtype.str, "shape": value.shape}
    return value


def _heard(said: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(said["array"]), said["dtype"]).reshape(said["shape"])
