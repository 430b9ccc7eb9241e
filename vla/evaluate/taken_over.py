"""An episode that one policy begins and another, or the scripted expert, ends; what the second one did is kept.

In the simulator's process: pictures of every kept step are encoded here, so that what travels is small and the parent
has nothing to do but to think. Which step is whose is `Job.takeover`; the parent knows it as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vla.evaluate.jobs import Outcome
from vla.evaluate.worker import Live
from vla.recording import encode_episode
from vla.schema import Episode


@dataclass
class TakenOver(Live):
    """The first `job.takeover` control steps are the learner's. All that follow are the labeller's, and kept."""

    before: dict[str, Any] = field(default_factory=dict)
    """What is seen before the labeller's next action."""
    images: dict[str, list[np.ndarray]] = field(default_factory=dict)
    states: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)

    def begin(self, observation: dict[str, Any]) -> bool:
        """The scene is set; whether the episode is over already (the expert was to do all of it)."""
        return self.job.takeover == 0 and self._take_over(observation)

    def advance(self, actions: np.ndarray, render: bool) -> tuple[dict[str, Any], bool]:
        """As `Live.advance`. Of a learner's chunk only what is before the takeover is played; all of a labeller's is kept."""
        assert self.job.takeover is not None
        if (left := self.job.takeover - self.steps) > 0:
            observation, over = super().advance(actions[:left], render)
            if not over and self.steps == self.job.takeover:
                over = self._take_over(observation)
            return observation, over
        over = False
        for action in actions:
            if over := self._label(action):
                break
        return self.before, over

    def _take_over(self, observation: dict[str, Any]) -> bool:
        self.before = observation
        if self.job.controller_after != "expert":
            return False
        while not self._label(self.sim.expert()):
            pass
        return True

    def _label(self, action: np.ndarray) -> bool:
        low, high = self.sim.spec.limits("action")
        action = np.clip(action, low, high).astype(np.float32)
        for camera in self.sim.spec.cameras:
            self.images.setdefault(camera, []).append(self.before["images"][camera])
        self.states.append(self.before["state"])
        self.actions.append(action)
        self.before, over = super().advance(action[None], render=True)
        return over

    def outcome(self) -> Outcome:
        """The verdict on the whole episode, with what the labeller did if it succeeded."""
        found, job = super().outcome(), self.job
        if not (found.success and self.actions):
            return found
        images = {camera: np.stack(frames) for camera, frames in self.images.items()}
        episode = Episode(images, np.stack(self.states).astype(np.float32), np.stack(self.actions), job.instruction,
                          self.sim.spec.name, True, job.task, job.seed)  # fmt: skip
        assert job.keep is not None
        return replace(found, kept=encode_episode(episode, job.keep.fps, job.keep.video))
