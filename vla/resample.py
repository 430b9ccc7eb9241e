"""A chunk is a length of *time*: actions of robots with different control rates, brought to one number of steps and back.

A policy predicts H steps that span `seconds`; a robot at `hz` plays n = round(seconds * hz) of its own steps in that time.
How a value crosses depends on what its channel means (`vla/embodiment.py`):

    per-step motion (eef_delta_*, joint_delta, joint_velocity)  averaged over the longer step, repeated over the shorter ones:
                      the total is kept, and so is the range, so that one set of statistics serves both rates
    targets (positions, angles, rotations)                      the target at the end of the step; linear in between, rotations
                      along the shortest turn, written the way the nearest recorded one is (sign, side of pi)
    commands (gripper, scalar)                                  the command at the end of the step, held

With n == H everything is returned as it came, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from vla.errors import DataError
from vla.rotation import convert
from vla.rotation import resample as turn_along

_RATES = ("eef_delta_position", "eef_delta_euler_xyz", "eef_delta_axis_angle", "eef_delta_rot6d", "joint_delta", "joint_velocity")
_ROTATIONS = {
    "eef_euler_xyz": "euler_xyz", "eef_euler_zyx": "euler_ZYX", "eef_quat_xyzw": "quat_xyzw", "eef_quat_wxyz": "quat_wxyz",
    "eef_axis_angle": "axis_angle", "eef_rot6d": "rot6d",
}  # fmt: skip
_TARGETS = ("eef_position", "joint_position")


class Moved(Protocol):
    """All that is asked of a robot here: `vla.embodiment.EmbodimentSpec` has it, and `serve.robot.Robot`, without pydantic."""

    @property
    def action(self) -> Sequence[Any]:
        """Its action channels, each with `dims` and `convention`."""
        ...


def native_steps(seconds: float | None, chunk: int, hz: float) -> int:
    """n: how many of a robot's own steps a chunk of `chunk` policy steps spans; `chunk` itself when `seconds` is None."""
    return chunk if seconds is None else max(1, round(seconds * hz))


def chunk_steps(seconds: float | None, chunk: int, execute: int, hz: float) -> tuple[int, int]:
    """(n, how many of them are carried out before looking again): a chunk and `execute` of its steps at a robot's own rate."""
    n = native_steps(seconds, chunk, hz)
    return n, max(1, min(n, round(execute * n / chunk)))


def to_policy_steps(actions: np.ndarray, valid: int, steps: int, spec: Moved) -> tuple[np.ndarray, np.ndarray]:
    """(n, A) actions at the robot's rate, the first `valid` of them real -> (steps, A) and which steps (steps,) are whole.

    A policy step counts when the recording covers all of it; the first one always does, with what there is.
    """
    n = len(actions)
    if n == steps:
        return actions, np.arange(steps) < valid
    ends = np.arange(1, steps + 1) * n / steps
    whole = ends <= valid + 1e-9
    whole[0] = True
    known = actions[:valid].astype(np.float64)
    out = np.zeros((steps, actions.shape[1]))
    for kind, dims in _groups(spec):
        part = known[:, dims]
        if kind == "rate":
            total = np.concatenate([np.zeros((1, len(dims))), np.cumsum(part, 0)])
            stops = np.minimum(np.concatenate([[0.0], ends]), valid)
            at = _interpolate(np.arange(valid + 1), total, stops)
            out[:, dims] = np.diff(at, axis=0) / np.maximum(np.diff(stops), 1e-9)[:, None]
        elif kind == "command":
            out[:, dims] = part[np.clip(np.ceil(ends - 1e-9).astype(int) - 1, 0, valid - 1)]
        else:
            out[:, dims] = _targets(np.arange(1, valid + 1), part, ends, kind)
    out[~whole] = 0.0
    return out.astype(np.float32), whole


def to_robot_steps(actions: np.ndarray, n: int, spec: Moved) -> np.ndarray:
    """(H, A) predicted actions -> (n, A) float32 at the robot's own rate."""
    steps = len(actions)
    if n == steps:
        return actions
    ends, held = np.arange(1, n + 1) * steps / n, source_step(n, steps)
    out = np.zeros((n, actions.shape[1]))
    for kind, dims in _groups(spec):
        part = actions[:, dims].astype(np.float64)
        if kind == "rate":
            total = np.concatenate([np.zeros((1, len(dims))), np.cumsum(part, 0)])
            out[:, dims] = np.diff(_interpolate(np.arange(steps + 1), total, np.concatenate([[0.0], ends])), axis=0) * n / steps
        elif kind == "command":
            out[:, dims] = part[held]
        else:
            out[:, dims] = _targets(np.arange(1, steps + 1), part, ends, kind)
    return out.astype(np.float32)


def source_step(n: int, steps: int) -> np.ndarray:
    """(n,) int: which policy step each of the robot's steps lies in (where its middle falls)."""
    return np.minimum(((np.arange(n) + 0.5) * steps / n).astype(int), steps - 1)


def rotations_of(spec: Moved) -> list[tuple[list[int], str]]:
    """The action dimensions that are one absolute rotation together, and its form as `vla.rotation` names it."""
    return [(dims, kind) for kind, dims in _groups(spec) if kind in _ROTATIONS.values()]


def standstill(spec: Moved, last: np.ndarray) -> np.ndarray:
    """The action (A,) float32 that holds the robot where it is after `last`: no displacement, no velocity, the rest as it was."""
    action, at = np.array(last, np.float32), 0
    for channel in spec.action:
        dims = slice(at, at := at + len(channel.dims))
        if channel.convention in _RATES:  # no turn, written as two columns of a matrix, is not zeros
            action[dims] = (1, 0, 0, 0, 1, 0) if channel.convention == "eef_delta_rot6d" else 0.0
    return action


def _groups(spec: Moved) -> list[tuple[str, list[int]]]:
    groups, at = [], 0
    for channel in spec.action:
        dims = list(range(at, at + len(channel.dims)))
        at += len(dims)
        kinds = {"rate": _RATES, "target": _TARGETS, **{form: (name,) for name, form in _ROTATIONS.items()}}
        groups.append((next((kind for kind, names in kinds.items() if channel.convention in names), "command"), dims))
    return groups


def _targets(times: np.ndarray, values: np.ndarray, wanted: np.ndarray, kind: str) -> np.ndarray:
    linear = _interpolate(times, values, wanted)
    if kind == "target":
        return linear
    try:
        out = convert(turn_along(convert(values, kind, "quat_xyzw"), times, wanted), "quat_xyzw", kind)
    except DataError:  # no rotation at all, as an untrained policy may say: nothing better is known than what it said
        return linear
    # One rotation has two quaternions, two rotation vectors and many angles; statistics were made of the recorded one.
    near = values[np.abs(times[None] - wanted[:, None]).argmin(1)]
    length = np.linalg.norm(out, axis=-1, keepdims=True)
    if kind.startswith("quat"):
        other = -out
    elif kind == "axis_angle":
        other = out * (1 - 2 * np.pi / np.maximum(length, 1e-9))
    elif kind.startswith("euler"):
        return out + 2 * np.pi * np.round((near - out) / (2 * np.pi))
    else:
        return out
    closer = np.linalg.norm(other - near, axis=-1) < np.linalg.norm(out - near, axis=-1)
    return np.where(closer[:, None], other, out)


def _interpolate(times: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Linear in between, held beyond the ends. `times` are consecutive integers."""
    at = np.clip(wanted - times[0], 0, len(times) - 1)
    low = np.minimum(at.astype(int), len(times) - 1)
    high = np.minimum(low + 1, len(times) - 1)
    share = (at - low)[:, None]
    return values[low] * (1 - share) + values[high] * share
