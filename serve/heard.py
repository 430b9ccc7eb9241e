"""What a server says, as a robot's computer reads it: where it is, what it is, one chunk. Nothing it says is believed unread.

short, url, headers = address_of("http://gpu-box:8000", token)
hello = hello_of(unpack(data), short, expect=robot)
chunk = chunk_of(unpack(data), action_dim=7, total=12.5)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.asking import bearer
from serve.connection import uri_of
from serve.refusal import Refusal
from serve.robot import Robot, differences
from serve.wire import PROTOCOL
from vla.errors import UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """What a server answered."""

    actions: np.ndarray
    """(n, A) float32, robot units, finite and inside the limits. Of a hold: as many steps that stand still."""
    confidence: np.ndarray
    """(n, A) in 0..1; NaN where the policy knows nothing of its confidence (L1)."""
    symbols: np.ndarray
    execute: int
    """Steps to carry out before looking again."""
    hold: bool
    reason: str
    """Why it holds; empty when it does not."""
    needs_help: str
    """Why somebody should look; empty when nobody has to. The server holds from then on until `Client.resume()`."""
    policy: str
    """Fingerprint of the policy that answered."""
    timing: Mapping[str, float]
    """ms: `infer`, `wait` and `serve` as the server says, `total` as seen from here."""


@dataclass(frozen=True)
class Hello:
    """What a server said of itself."""

    policy: str
    """Fingerprint."""
    robots: Mapping[str, Robot]
    steps: Mapping[str, tuple[int, int]]
    """Robot -> (steps of a chunk, steps carried out before looking again)."""
    said: Mapping[str, Any]
    """All of it."""


def chunk_of(said: Mapping[str, Any], action_dim: int | None, total: float) -> Chunk:
    """Raises `KeyError`, `TypeError` or `ValueError` for what is no chunk, or one of another robot."""
    parts = actions, confidence, symbols = said["actions"], said["confidence"], said["symbols"]
    if not all(isinstance(part, np.ndarray) for part in parts) or actions.ndim != 2:
        raise ValueError("actions that are no array (n, A)")
    if action_dim is not None and actions.shape[1] != action_dim:
        raise ValueError(f"actions {actions.shape}, not (n, {action_dim})")
    return Chunk(
        actions.astype(np.float32), confidence, symbols, int(said["execute"]), bool(said["hold"]), str(said["reason"]),
        str(said["needs_help"]), str(said["policy"]), {**said["timing"], "total": total},
    )  # fmt: skip


def hello_of(said: Any, address: str, expect: Robot | None = None) -> Hello:
    """Raises `Refusal` for what is no hello of our protocol, `UsageError` with all that differs where `expect` stands here."""
    try:
        if (given := (said["type"], said["protocol"])) != ("hello", PROTOCOL):
            raise ValueError(f"{str(given[0])[:20]!r} of protocol {str(given[1])[:20]}")
        robots = {str(name): Robot.from_json(entry, f"{address}: robot {name!r}") for name, entry in said["robots"].items()}
        steps = {str(name): (int(steps[0]), int(steps[1])) for name, steps in said["steps"].items()}
        if robots.keys() != steps.keys():
            raise ValueError(f"steps of {sorted(steps)}, robots {sorted(robots)}")
        hello = Hello(str(said["policy"]), robots, steps, said)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise Refusal("bad_request", where=address, found=f"{type(error).__name__}: {error}"[:300],
                      expected=f"a hello of protocol {PROTOCOL}",
                      fix="pip install the same tendon-vla on both sides") from None  # fmt: skip
    if expect is None:
        return hello
    there = robots.get(expect.key)
    wrong = [f"only {', '.join(map(repr, robots))}"] if there is None else differences(expect, there)
    if wrong:
        raise UsageError(f"{address}: robot {expect.key!r}", found="; ".join(wrong), expected="the robot that stands here",
                         fix="serve a policy that was trained on this robot")  # fmt: skip
    return hello


def address_of(address: str, token: str | None) -> tuple[str, str, dict[str, str]]:
    """What to call a server, the address of its WebSocket, and the headers that open it. Raises `UsageError`."""
    scheme, there, rest = address.partition("://") if "://" in address else ("ws", "://", address)
    scheme = {"http": "ws", "https": "wss"}.get(scheme.lower(), scheme)  # as `vla serve` prints it
    uri = uri_of(f"{scheme}{there}{rest}")
    if uri.query:
        raise UsageError("address", found="a query", expected="ws://HOST:PORT", fix="leave out what begins with '?'")
    host = f"[{uri.host}]" if ":" in uri.host else uri.host
    short = f"{scheme}://{host}:{uri.port}{uri.path.rstrip('/').removesuffix('/v1/ws')}"
    return short, f"{short}/v1/ws?protocol={PROTOCOL}", bearer(token, short, "token")
