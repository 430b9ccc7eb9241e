"""A teacher's answers on a student's positions: what the loader adds to every window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from vla.batch import Example, Taught
from vla.distill.cache import TeacherCache
from vla.distill.teacher import Teacher, meaning
from vla.policy import VLAPolicy
from vla.resample import native_steps, to_policy_steps
from vla.schema import Window


class Targets:
    """`add(example, window, place)` with what the teacher said there.

    Where codec, chunk and statistics are the teacher's own, its symbols are; otherwise its expected actions cross over: stitched
    from the chunks it said along the episode, resampled to the student's steps, and told as a narrow Gaussian over the student's
    bins. No torch and no weights: it travels to loader workers.
    """

    def __init__(self, cache: TeacherCache, teacher: Teacher, student: VLAPolicy, sigma: float) -> None:
        self.cache, self.parts, self.sentences = cache, cache.parts, cache.sentences
        mine, theirs = meaning(student), meaning(teacher.first)
        shared = all(mine["normalizers"][robot] == theirs["normalizers"].get(robot) for robot in mine["normalizers"])
        same = shared and all(mine[key] == theirs[key] for key in ("codec", "chunk", "seconds"))
        self.same = same and teacher.has_symbols
        """Whether symbols mean the same to both."""
        self.encoder, self.specs, self.stores = student.encoder, cache.mixture.specs, cache.mixture.stores
        self.seconds, self.centres, self.sigma = student.config.chunk_seconds, student.codec.centres, max(sigma, 1e-3)
        self.k = cache.facts["top"]

    def __getstate__(self) -> dict[str, Any]:
        """A worker maps the files again: pickled, they would be copied whole."""
        parts = {d: {name: (a.filename, a.dtype.str, a.shape) for name, a in arrays.items()} for d, arrays in self.parts.items()}
        return {k: v for k, v in self.__dict__.items() if k != "cache"} | {"parts": parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parts = {d: {name: np.memmap(path, kind, "r", shape=shape) for name, (path, kind, shape) in arrays.items()}
                 for d, arrays in state["parts"].items()}  # fmt: skip
        self.__dict__.update(state | {"parts": parts})

    def add(self, example: Example, window: Window, place: tuple[int, int, int]) -> Example:
        """`place` is (dataset, episode, frame) of the window."""
        d, episode, t = place
        store, spec, arrays = self.stores[d], self.specs[d], self.parts[d]
        at = int(store.episode_starts[episode]) + t
        _, stop = store.told(at, int(store.episode_starts[episode + 1]))
        H, A, a = *example.unit.shape, spec.action_dim
        mean = np.zeros((H, A), np.float32)
        mean[:, :a] = self._expected(arrays["actions"], at, stop, d)
        if self.same:
            k = arrays["p"].shape[-1]
            likely, p = np.zeros((H, A, k), np.int64), np.zeros((H, A, k), np.float32)
            likely[:, :a], p[:, :a] = arrays["likely"][at], arrays["p"][at]
        else:
            likely, p = self._around(mean)
            p[:, a:] = 0.0
        features = np.zeros(0, np.float32)
        if "pictures" in arrays:
            said = self.sentences[spec.key, window.instruction]
            features = np.concatenate([said, arrays["pictures"][at].astype(np.float32)])
        taught = Taught(likely.reshape(H * A, -1), p.reshape(H * A, -1), mean.reshape(-1), features)
        return replace(example, taught=taught)

    def _expected(self, actions: np.ndarray, at: int, stop: int, d: int) -> np.ndarray:
        """(H, a) in [-1, 1]: what the teacher would do from frame `at` on, in the student's steps and statistics."""
        spec, n, H = self.specs[d], actions.shape[1], self.encoder.horizon
        m = native_steps(self.seconds, H, spec.control_hz)
        i = np.arange(m)
        frames = np.minimum(at + i // n * n, stop - 1)  # beyond the episode nothing is learned
        steps, _ = to_policy_steps(np.asarray(actions[frames, i % n]), m, H, spec)
        return np.clip(self.encoder.normalizers[spec.key]["action"].to_unit(steps), -1, 1)

    def _around(self, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(H, A) -> the k bins nearest and a Gaussian over them, (H, A, k) each."""
        centres: Any = self.centres
        distance = (centres - mean[..., None]) / self.sigma
        likely = np.argsort(np.abs(distance), axis=-1, kind="stable")[..., : self.k]
        p = np.exp(-0.5 * np.take_along_axis(distance, likely, -1) ** 2)
        return likely, (p / p.sum(-1, keepdims=True)).astype(np.float32)
