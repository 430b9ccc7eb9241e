"""Overlapping chunks become one action a step: as ACT's own code has it, for any number of executed steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.embodiment import Channel, EmbodimentSpec
from vla.ensemble import DECAY, Ensemble
from vla.errors import UsageError
from vla.resample import rotations_of
from vla.rotation import angle_between, convert


def restated(chunks: dict[int, np.ndarray], most: int, decay: float) -> np.ndarray:
    """ACT's evaluation loop (imitate_episodes.py), which keeps a table (time said, time meant) and reads its columns."""
    n, A = next(iter(chunks.values())).shape
    table, there = np.zeros((most, most + n, A)), np.zeros((most, most + n), bool)
    done = []
    for t in range(most):
        if t in chunks:
            table[t, t : t + n], there[t, t : t + n] = chunks[t], True
        for_now = table[:, t][there[:, t]]
        weights = np.exp(-decay * np.arange(len(for_now)))
        weights = weights / weights.sum()
        done.append((for_now * weights[:, None]).sum(0))
    return np.array(done, np.float32)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, DECAY, 0.5, -0.3]), st.integers(0, 2**31))
def test_it_is_acts_own(n, execute, decay, seed):
    execute, most = min(n, execute), 24
    rng = np.random.default_rng(seed)
    chunks = {t: rng.normal(size=(n, 3)).astype(np.float32) for t in range(0, most, execute)}
    ensemble, done = Ensemble(decay), []
    for step, chunk in chunks.items():
        done.append(ensemble(step, chunk, execute))
    np.testing.assert_allclose(np.concatenate(done)[:most], restated(chunks, most, decay), rtol=1e-6, atol=1e-7)
    assert all(part.dtype == np.float32 and part.shape == (execute, 3) for part in done)


def test_without_overlap_a_chunk_is_what_it_was():
    rng, ensemble = np.random.default_rng(0), Ensemble()
    for step in range(0, 12, 4):
        chunk = rng.normal(size=(4, 2)).astype(np.float32)
        np.testing.assert_array_equal(ensemble(step, chunk, 4), chunk)


def test_steps_may_be_uneven_and_an_episode_ends():
    """A robot looks again when it can; what nobody spoke of any more is forgotten."""
    ensemble = Ensemble(0.0)
    ensemble(0, np.full((6, 1), 1.0), 2)
    np.testing.assert_allclose(ensemble(2, np.full((6, 1), 3.0), 5)[:, 0], [2, 2, 2, 2, 3])
    np.testing.assert_allclose(ensemble(7, np.full((6, 1), 5.0), 2)[:, 0], [4, 5])
    np.testing.assert_allclose(ensemble(100, np.full((6, 1), 7.0), 1), [[7]])
    assert len(ensemble._chunks) == 1
    with pytest.raises(UsageError, match="a later step"):
        ensemble(0, np.zeros((6, 1)), 1)
    ensemble.reset()
    np.testing.assert_allclose(ensemble(0, np.full((6, 1), 9.0), 1), [[9]])


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="1 to 4"):
        Ensemble()(0, np.zeros((4, 2)), 5)
    with pytest.raises(UsageError, match="finite"):
        Ensemble(float("nan"))


FORMS = {"eef_euler_xyz": "euler_xyz", "eef_quat_xyzw": "quat_xyzw", "eef_axis_angle": "axis_angle", "eef_rot6d": "rot6d"}


@pytest.mark.parametrize("convention", list(FORMS))
def test_the_mean_of_two_turns_lies_between_them(convention):
    """Just either side of pi the mean of the numbers is no turn at all, and the robot would swing round."""
    form = FORMS[convention]
    turns = np.array([[0, 0, np.pi - 0.1], [0, 0, -np.pi + 0.1]])
    said = convert(turns, "axis_angle", form)
    if form == "quat_xyzw":
        said[0] *= -1
    names = tuple("abcdef"[: said.shape[1]])
    ends = (9.0,) * len(names)
    spec = EmbodimentSpec(name="r", cameras={}, state=(), control_hz=10, action=(
        Channel(name="x", dims=("x",), convention="eef_position", unit="m", low=(0.0,), high=(1.0,)),
        Channel(name="turn", dims=names, convention=convention, unit="rad", low=tuple(-e for e in ends), high=ends)))  # fmt: skip
    (dims, found), = rotations_of(spec)
    assert found == form and list(dims) == list(range(1, 1 + len(names)))
    ensemble = Ensemble(0.0, rotations_of(spec))
    ensemble(0, np.concatenate([np.zeros((2, 1)), np.repeat(said[:1], 2, 0)], 1), 1)
    (now,) = ensemble(1, np.concatenate([np.ones((2, 1)), np.repeat(said[1:], 2, 0)], 1), 1)
    assert now[0] == 0.5
    middle = convert(np.array([0, 0, np.pi]), "axis_angle", "quat_xyzw")
    assert angle_between(convert(now[1:].astype(np.float64), form, "quat_xyzw"), middle) < 1e-3
    assert np.linalg.norm(now[1:] - said[1]) < 0.3  # written as the newest was, so nothing jumps


def test_evaluation_carries_out_the_mean():
    """What the simulator was moved by is what the ensemble of the recorded chunks says, episode by episode."""
    from fake_sims import FakePolicy, fake_pool, run

    class Wavering(FakePolicy):
        said: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {}

        def act_batch(self, observations, instructions, embodiment, *, decode=None, seeds=None, drop_state=False):
            chunks = super().act_batch(observations, instructions, embodiment, decode=decode, seeds=seeds)
            for chunk, observation, seed in zip(chunks, observations, seeds or [], strict=True):
                noise = np.random.default_rng(seed).normal(0, 0.2, chunk.actions.shape)
                chunk.actions = (chunk.actions + noise).astype(np.float32)
                self.said.setdefault(seed // 1009, {})[seed % 1009] = (observation["state"][:2], chunk.actions)
            return chunks

    with fake_pool() as pool:
        for execute, decay in ((1, 0.3), (3, 0.0)):
            policy = Wavering()
            Wavering.said = {}
            results = run(policy, pool, ("policy",), episodes=6, execute=execute, ensemble=decay)
            assert results["ensemble"] == decay and results["execute"] == execute
            compared = 0
            for steps in Wavering.said.values():
                ensemble, at = Ensemble(decay), None
                for step, (state, chunk) in sorted(steps.items()):
                    if at is not None:
                        np.testing.assert_allclose(state, at, atol=1e-5)
                        compared += 1
                    at = state + 0.02 * np.clip(ensemble(step, chunk, execute)[:, :2], -1, 1).sum(0)
            assert compared > 30 / execute
        with pytest.raises(UsageError, match="finite"):
            run(FakePolicy(), pool, ("policy",), ensemble=float("inf"))
        assert run(FakePolicy(), pool, ("policy",), episodes=3)["ensemble"] is None
