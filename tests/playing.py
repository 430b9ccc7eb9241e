"""Playing a simulator in tests: the expert to the end of an episode, and the checksums of a scene.

Its own module because other processes import it by name.
"""

from __future__ import annotations

import zlib

import numpy as np

from vla.sims import make_sim


def play(sim, seed, noise=None, **options):
    """Run the expert to the end; (info, steps). `noise` as recording does it: wide, with bursts of three steps."""
    _, info = sim.reset(seed=seed, options={"render": False, **options})
    over, burst, push = False, 0, np.zeros(3)
    while not over:
        action = sim.expert()
        assert action.shape == (sim.spec.action_dim,) and action.dtype == np.float32 and abs(action).max() <= 1
        if noise is not None:
            action[:3] += noise.normal(0, 0.3, 3)
            if burst == 0 and noise.random() < 0.06:
                burst, push = 3, noise.uniform(-1, 1, 3)
            if burst:
                action[:3], burst = push, burst - 1
        _, _, terminated, truncated, info = sim.step(action, render=False)
        over = terminated or truncated
    return info, info["step"]


def fingerprint(suite, task, seed):
    """Checksums of the first picture and of the state after ten expert steps; run in this process and in others."""
    sim = make_sim(suite, task)
    observation, _ = sim.reset(seed=seed)
    picture = observation["images"][sim.camera]
    for _ in range(10):
        observation, *_ = sim.step(sim.expert(), render=False)
    return [zlib.crc32(picture.tobytes()), zlib.crc32(observation["state"].tobytes())]
