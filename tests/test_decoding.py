"""Cached decoding says what the plain loop without a cache says, whatever the batch."""

import numpy as np
import pytest
import torch

from vla.mixture import Mixture
from vla.policy import PolicyConfig, build_policy
from vla.policy.choose import Chooser
from vla.policy.decoding import Graphs, Room, decode_steps, graphs_of, greedy_logits, new_cache, parallel_logits, use_graphs
from vla.policy.packing import use_packed

SMALL = {"hidden": 32, "layers": 2, "heads": 2, "mlp": 64, "tower_channels": (8, 8, 16), "keypoints": 8, "text_vocab": 320}
WORDS = ["lift it", "push the very very blue cube over there to the left side please", "touch the red cube", "push"]


@pytest.fixture(scope="module")
def mixture(stores):
    return Mixture(stores, [1, 1], 4, seed=0)


def make(mixture, **config):
    torch.manual_seed(0)
    return build_policy(PolicyConfig.model_validate({"backbone": SMALL, "chunk": 4, "execute": 2, **config}), mixture).eval()


@pytest.fixture(scope="module")
def policy(mixture):
    return make(mixture, decoding="autoregressive")


def batch_of(policy, mixture, n):
    """`n` observations with prompts of different lengths."""
    made = []
    for i in range(n):
        window = mixture.window_at(0, i % 2, i % 3)
        made.append(policy.encoder.observation({"images": window.images, "state": window.state}, WORDS[i % 4], "tabletop"))
    return policy.collate(made)


def chooser(policy, batch, decode):
    return Chooser(decode, policy.codec, policy.centres, range(len(batch)))


@torch.inference_mode()
def plain(policy, batch, choose, dims):
    """Everything again for each symbol: no cache, no buffer."""
    A, (B, N) = policy.encoder.action_dim, batch.symbols.shape
    T, ids = batch.ids.shape[1], policy.writer.ids
    zero = int(policy.codec.encode(np.zeros((1, 1)))[0])
    mask, positions = policy.attention(batch, N)
    tail = torch.full((B, 1), ids.act)
    for i in range(N):
        n = T + i + 1
        hidden = policy.model.hidden(
            torch.cat([batch.ids, tail], 1), batch.images, batch.state, slots=batch.slots, robots=batch.robot,
            attention_mask=mask[:, :, :n, :n], position_ids=positions[..., :n],
        ).last_hidden_state  # fmt: skip
        symbols = choose(policy.model.symbol_logits(hidden[:, -1:]))
        if i % A >= dims:
            symbols = torch.full_like(symbols, zero)
        tail = torch.cat([tail, ids.of_symbols(symbols)], 1)


@pytest.mark.parametrize("decode", ["argmax", "mean", "sample"])
@pytest.mark.parametrize(("n", "dims"), [(1, 4), (8, 4), (8, 2)])
@torch.inference_mode()
def test_same_symbols_as_without_a_cache(policy, mixture, decode, n, dims):
    batch = batch_of(policy, mixture, n)
    assert n == 1 or not batch.mask.all()
    ours, theirs = chooser(policy, batch, decode), chooser(policy, batch, decode)
    decode_steps(policy, batch, ours, dims)
    plain(policy, batch, theirs, dims)
    for mine, other in zip(ours.parts, theirs.parts, strict=True):
        mine, other = np.concatenate(mine, 1), np.concatenate(other, 1)
        assert np.array_equal(mine, other) if mine.dtype.kind == "i" else np.allclose(mine, other, atol=1e-4)


@torch.inference_mode()
def test_rows_do_not_read_each_other(policy, mixture):
    batch = batch_of(policy, mixture, 8)
    together = greedy_logits(policy, batch, 4).argmax(-1)
    for i in range(8):
        window = mixture.window_at(0, i % 2, i % 3)
        one = policy.encoder.observation({"images": window.images, "state": window.state}, WORDS[i % 4], "tabletop")
        assert torch.equal(greedy_logits(policy, policy.collate([one]), 4)[0].argmax(-1), together[i])


@torch.inference_mode()
def test_the_cache_is_allocated_once(policy, mixture):
    cache = new_cache(policy.model, 9)
    assert all(isinstance(layer, Room) for layer in cache.layers)
    first, _ = cache.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4), 0)
    place = first.data_ptr()
    second, _ = cache.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 0)
    assert second.shape[2] == 6 and second.data_ptr() == place and cache.get_seq_length() == 6


@torch.inference_mode()
def test_parallel_pass_is_the_policys_own(mixture):
    policy = make(mixture)
    batch = batch_of(policy, mixture, 3)
    tail = torch.tensor(policy.model.parallel_tail(batch.symbols.shape[1]))
    assert torch.equal(parallel_logits(policy, batch, tail), policy.action_logits(batch))


def test_graphs_are_for_cuda(policy):
    assert graphs_of(use_graphs(policy)) is None


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_a_chunk_that_cannot_be_captured_is_said_once_and_acted_without(mixture, monkeypatch, decoding):
    policy = make(mixture, decoding=decoding)
    window = mixture.window_at(0, 0, 0)
    seen = {"images": window.images, "state": window.state}
    expected = policy.act(seen, "lift it", "tabletop", decode="argmax")

    def refuse(self, policy, batch, dims):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graphs, "_capture", refuse)
    policy.__dict__["_graphs"] = Graphs()
    with pytest.warns(RuntimeWarning, match="without CUDA graphs.*stream is capturing") as said:
        chunks = [policy.act(seen, "lift it", "tabletop", decode="argmax") for _ in range(3)]
    assert len([w for w in said if w.category is RuntimeWarning]) == 1 and graphs_of(policy) is None
    for chunk in chunks:
        np.testing.assert_array_equal(chunk.actions, expected.actions)


def test_packed_weights_say_the_same_and_can_be_put_away(mixture):
    """Two orders of adding up: the same to rounding, on one row and on many."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    for decoding in ("autoregressive", "parallel"):
        policy = make(mixture, decoding=decoding)
        for n in (1, 8):
            batch = batch_of(policy, mixture, n)
            with torch.inference_mode():
                plain = policy.action_logits(batch)
                packed = use_packed(policy).action_logits(batch)
                torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-4)
                assert "forward" in policy.model.language_model.layers[0].self_attn.q_proj.__dict__
                assert torch.equal(use_packed(policy, False).action_logits(batch), plain)
    assert not [m for m in policy.model.modules() if "forward" in m.__dict__]


def test_training_never_computes_the_whole_vocabulary(monkeypatch, checkout):
    """Through a Prismatic model no tensor of a step, forward or backward, has a row of V logits for a position."""
    monkeypatch.syspath_prepend(str(checkout / "benchmarks"))
    from bench_decode import model_of  # pyright: ignore
    from prismatic_policy import bench_policy, prefixes  # pyright: ignore
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        seen: set[tuple[int, ...]] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else [out]
            self.seen |= {tuple(t.shape) for t in made if isinstance(t, torch.Tensor)}
            return out

    policy = bench_policy(model_of("tiny"), 18, 1, "autoregressive").train()
    batch = prefixes(policy, 2)
    vocabulary = policy.model.config.text_config.vocab_size
    with Shapes() as shapes:
        policy(batch).action.backward()
    assert (2, 7, 256) in shapes.seen
    assert not [s for s in shapes.seen if s[-1:] == (vocabulary,) or s[-1:] == (policy.writer.ids.words,)]
