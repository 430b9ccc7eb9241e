"""The stream: a pure function of (seed, n), right shares, no repetition inside an epoch, no leak across episodes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.config import load_config
from vla.errors import DataError, UsageError
from vla.loader import make_loader
from vla.mixture import BLOCK, Mixture, MixtureConfig, open_mixture
from vla.policy import PolicyConfig, build_policy
from vla.randomness import Purpose, generator, mix, permute


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_differ_by_key_and_look_shuffled():
    a, b = ([permute(i, 10_000, key) for i in range(10_000)] for key in (1, 2))
    assert np.mean(np.array(a) == np.array(b)) < 0.01
    assert abs(np.corrcoef(a, range(10_000))[0, 1]) < 0.05
    assert len({mix(1, i) for i in range(100_000)}) == 100_000


def test_generator_depends_on_every_argument():
    keys = [(Purpose.BLOCK, 0, 0), (Purpose.BLOCK, 0, 1), (Purpose.BLOCK, 1, 0), (Purpose.AUGMENT, 0, 0)]
    assert len({generator(*key).random() for key in keys}) == 4
    assert generator(Purpose.SAMPLE, 3, 4).random() == generator(Purpose.SAMPLE, 3, 4).random()


@settings(max_examples=15)
@given(st.lists(st.floats(0.01, 5), min_size=2, max_size=2), st.integers(0, 2**32))
def test_shares_are_exact_at_every_block(stores, weights, seed):
    mixture = Mixture(stores, weights, 8, seed)
    for block in (1, 2, 7):
        drawn = mixture.drawn(block)
        assert sum(drawn) == block * BLOCK
        for count, weight in zip(drawn, weights, strict=True):
            assert abs(count - block * BLOCK * weight / sum(weights)) <= 2
    located = Counter(mixture.locate(n)[0] for n in range(BLOCK))
    assert [located[d] for d in range(2)] == mixture.drawn(1)


def test_without_replacement_inside_an_epoch(stores):
    mixture = Mixture(stores[:1], [1.0], 8, seed=5)
    size = len(mixture)
    for epoch in range(2):
        seen = {mixture.locate(n) for n in range(epoch * size, (epoch + 1) * size)}
        assert len(seen) == size
    first, second = ([mixture.locate(e * size + i) for i in range(50)] for e in range(2))
    assert first != second


def test_pure_function_of_seed_and_n(stores):
    a, b = (Mixture(stores, [1, 1], 8, seed=3) for _ in range(2))
    order = list(range(200))
    forward = [a.locate(n) for n in order]
    assert [b.locate(n) for n in reversed(order)] == forward[::-1]
    assert [Mixture(stores, [1, 1], 8, seed=4).locate(n) for n in order] != forward
    one, two = (m.window_at(*m.locate(17)) for m in (a, b))
    assert np.array_equal(one.actions, two.actions) and one.source == two.source


def test_chunks_never_cross_an_episode_and_tails_are_masked(stores):
    mixture = Mixture(stores, [1, 1], 8, seed=0)
    for dataset, store in enumerate(stores):
        for episode in range(store.num_episodes):
            start, stop = store.episode_starts[episode : episode + 2]
            for t in {0, stop - start - 3, stop - start - 1}:
                window = mixture.window_at(dataset, episode, int(t))
                count = min(8, stop - start - t)
                assert window.valid.sum(0).tolist() == [count] * 4
                assert np.array_equal(window.actions[:count], store.action[start + t : start + t + count])
                assert not window.actions[count:].any()
                assert np.array_equal(window.final_state, store.state[stop - 1])


def test_holdout_and_train_share_no_episode(stores):
    train, held = (Mixture(stores, [1, 1], 8, 0, 0.2, part) for part in ("train", "holdout"))
    for a, b, store in zip(train.episodes, held.episodes, stores, strict=True):
        assert not set(a) & set(b) and len(a) + len(b) == store.num_episodes
    drawn = {train.locate(n)[:2] for n in range(2000)}
    assert not drawn & {(d, int(e)) for d, episodes in enumerate(held.episodes) for e in episodes}


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_stream_is_the_same_for_any_world_size_and_worker_count(stores, workers):
    mixture = Mixture(stores, [3, 1], 8, seed=1)
    policy = build_policy(PolicyConfig(), mixture)

    def stream(world: int, workers: int) -> list[list[int]]:
        ranks = [
            iter(make_loader(mixture, policy, seed=1, batch=8, steps=5, first_step=2, rank=r, world=world, workers=workers))
            for r in range(world)
        ]
        return [[n for batch in step for n in batch.n.tolist()] for step in zip(*ranks, strict=True)]

    expected = [list(range(step * 8, step * 8 + 8)) for step in range(2, 5)]
    assert all(stream(world, workers) == expected for world in (1, 2, 4))


def test_batches_are_bit_equal_for_any_worker_count(stores):
    mixture = Mixture(stores, [3, 1], 8, seed=1)
    policy = build_policy(PolicyConfig(), mixture)
    runs = [list(make_loader(mixture, policy, seed=1, batch=8, steps=3, workers=w)) for w in (0, 2)]
    for a, b in zip(*runs, strict=True):
        assert all(bool((getattr(a, f) == getattr(b, f)).all()) for f in a.__dataclass_fields__)


def test_every_missing_dataset_is_named_at_once(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(f"datasets: [{{path: {tmp_path}/a}}, {{path: {tmp_path}/b}}]")
    with pytest.raises(DataError) as error:
        open_mixture(load_config(path, [], MixtureConfig), 8, 0)
    assert f"{tmp_path}/a" in str(error.value) and f"{tmp_path}/b" in str(error.value)


def test_a_dataset_can_be_told_which_robot_it_is(demos, tmp_path):
    from vla.config import CONFIGS

    text = (CONFIGS / "embodiments/tabletop.yaml").read_text().replace("name: tabletop", "name: my_arm")
    (tmp_path / "my_arm.yaml").write_text(text)
    (tmp_path / "two.yaml").write_text(text.replace("front:", "wrist:"))
    path, cache = demos["tabletop"], str(tmp_path / "cache")

    def opened(robot):
        config = MixtureConfig.model_validate({"datasets": [{"path": str(path), "embodiment": robot}], "cache_dir": cache})
        return open_mixture(config, 4, 0, progress=False)[0]

    assert list(opened(str(tmp_path / "my_arm.yaml")).embodiments) == ["my_arm"]
    with pytest.raises(DataError, match="wrist"):
        opened(str(tmp_path / "two.yaml"))
    with pytest.raises(UsageError, match="tabletop"):
        opened("no-such-robot")
