"""The way back: what a robot did last, undone in reverse, one action a tick. No torch.

    trail.add(state, action)                     # every tick that moved
    for action in trail.back():                  # the newest undone first
        guard.judge(guard.reach(action))

Displacements and velocities are played negated, the newest first; targets are the places the state was seen at, in reverse; what
no state tells (a gripper), and rotations, are told again what they were told then. The guard judges each of them like any other
action.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from serve.robot import Robot
from vla.resample import rotations_of, standstill
from vla.rotation import from_quat, inverse, to_quat

_RATES = ("eef_delta", "joint_delta", "joint_velocity")
_TURNS = {"eef_delta_euler_xyz": "euler_xyz", "eef_delta_rot6d": "rot6d"}
"""Displacements whose opposite is no minus."""


class Trail:
    """The last seconds of one robot's motion."""

    def __init__(self, robot: Robot, seconds: float) -> None:
        self.robot = robot
        self._steps: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=max(1, round(seconds * robot.control_hz)))
        turned = {dims[0] for dims, _ in rotations_of(robot)}
        self._seen: list[tuple[slice, slice]] = []
        """(dims of the action, dims of the state) of the targets that the state tells."""
        for channel, dims in robot.spans("action"):
            fits = [(c.name == channel.name, at) for c, at in robot.spans("state")
                    if c.convention == channel.convention and len(c.dims) == len(channel.dims)]  # fmt: skip
            if channel.convention in ("eef_position", "joint_position") and dims.start not in turned and fits:
                self._seen.append((dims, max(fits, key=lambda fit: fit[0])[1]))

    def __len__(self) -> int:
        return len(self._steps)

    def clear(self) -> None:
        """Nothing before this is undone."""
        self._steps.clear()

    def add(self, state: np.ndarray | None, action: np.ndarray) -> None:
        """An action (A,) that was sent, and the state (S,) before it."""
        seen = np.zeros(0, np.float32) if state is None else np.array(state, np.float32)
        self._steps.append((seen, np.array(action, np.float32)))

    def back(self) -> list[np.ndarray]:
        """The actions (A,) that undo it, in the order they are to be sent. What it held is forgotten."""
        steps, self._steps = list(self._steps), deque(maxlen=self._steps.maxlen)
        return [self._undo(*steps[n], steps[max(0, n - 1)][1]) for n in reversed(range(len(steps)))]

    def _undo(self, state: np.ndarray, action: np.ndarray, before: np.ndarray) -> np.ndarray:
        """`action`, sent at `state` after the action `before`, undone."""
        out = before.copy()  # grippers and commands as they were told before
        rest = standstill(self.robot, before)
        for channel, dims in self.robot.spans("action"):
            if not channel.convention.startswith(_RATES):
                continue
            form = _TURNS.get(channel.convention)
            out[dims] = rest[dims] - action[dims] if form is None else from_quat(inverse(to_quat(action[dims], form)), form)
        for dims, at in self._seen:
            if len(state) >= at.stop:
                out[dims] = state[at]
        return out
