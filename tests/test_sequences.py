"""Policies that say chunks as sequences (FAST, VQ): constrained in both decodings, learned, saved, loaded, fitted by command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_tools.tokenizer import read_chunks
from tests.small_datasets import write_dataset
from vla.actions import BinCodec, FastCodec, VQCodec, hold
from vla.cli import main
from vla.embodiment import EmbodimentSpec
from vla.episodes import EpisodeStore
from vla.errors import CheckpointError, UsageError
from vla.mixture import Mixture
from vla.normalize import Normalizer, Stats
from vla.policy import PolicyConfig, VLAPolicy, build_policy, load_policy, save_policy
from vla.policy.choose import SequenceChooser

SMALL = {"hidden": 32, "layers": 2, "heads": 2, "mlp": 64, "tower_channels": (8, 8, 16), "keypoints": 8, "image_size": 32}
H = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_dataset(root / "set", 8)
    return root / "set"


@pytest.fixture(scope="module")
def mixture(data, tmp_path_factory):
    return Mixture([EpisodeStore.open(data, tmp_path_factory.mktemp("cache"), progress=False)], [1], H, seed=0)


@pytest.fixture(scope="module")
def files(data, tmp_path_factory):
    """{"fast": FILE, "vq": FILE}, fitted by the command."""
    out = tmp_path_factory.mktemp("codecs")
    for kind, more in {"fast": ["--vocabulary", "128"], "vq": ["--rounds", "3", "--codes", "16"]}.items():
        assert main(["data", "tokenizer", str(data), "--kind", kind, "--chunk", str(H), "--out", str(out / kind), *more]) == 0
    return {kind: str(out / kind) for kind in ("fast", "vq")}


def config(files, kind, **more):
    return PolicyConfig.model_validate({
        "backbone": SMALL, "chunk": H, "execute": 2, "codec": {"kind": kind, "path": files[kind]}, **more,
    })  # fmt: skip


def build(mixture, files, kind, **more):
    torch.manual_seed(0)
    return build_policy(config(files, kind, **more), mixture)


def windows(mixture, count=6):
    return [mixture.window_at(0, e, 0) for e in range(count)]


def narrow_too(policy):
    """`policy`, which also knows a robot of the first three action dimensions."""
    (key, spec), norm = next(iter(policy.embodiments.items())), next(iter(policy.normalizers.values()))
    small = EmbodimentSpec.model_validate({**spec.model_dump(), "name": "narrow", "action": [
        {**c.model_dump(), "dims": c.dims[:3], "low": c.low[:3], "high": c.high[:3]} for c in spec.action[:1]]})  # fmt: skip
    a = small.action_dim
    less = Normalizer(Stats({k: v[:a] for k, v in norm["action"].stats.values.items()}, 1), norm["action"].scheme)
    policy.model.add_robots(1)
    return a, VLAPolicy(policy.config, policy.model, policy.writer, {key: spec, "narrow": small},
                        {key: norm, "narrow": {**norm, "action": less}}, policy.codec)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- constrained choice


@pytest.fixture(scope="module")
def codecs():
    rng = np.random.default_rng(0)
    chunks = [np.clip(np.cumsum(rng.normal(0, 0.2, (H, a)), 0), -1, 1) for a in (2, 3, 5) for _ in range(100)]
    return {"fast": FastCodec.fit(chunks, vocabulary=128), "vq": VQCodec.fit(chunks, rounds=3, codes=16)}


@given(st.sampled_from(["fast", "vq"]), st.sampled_from(["argmax", "mean", "sample"]), st.integers(0, 10_000),
       st.lists(st.sampled_from([2, 3, 5]), min_size=1, max_size=4), st.sampled_from([0.1, 5.0, 1000.0]))  # fmt: skip
def test_random_logits_of_both_decodings_say_whole_chunks(codecs, kind, decode, seed, dims, sharp):
    codec = codecs[kind]
    N = codec.slots(H, 5, [2, 3, 5])
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, sharp, (len(dims), N, codec.size)).astype(np.float32))
    at_once = SequenceChooser(decode, codec, np.array(dims), range(len(dims)))
    said = at_once(logits)
    stepwise = SequenceChooser(decode, codec, np.array(dims), range(len(dims)))
    for i in range(N):
        if not stepwise.done:
            assert torch.equal(stepwise(logits[:, i : i + 1])[:, 0], said[:, i])
    assert at_once.done and stepwise.done
    for row, a in enumerate(dims):
        unit, confidence, symbols = at_once.chunk(row)
        assert unit.shape == confidence.shape == (H, a) and len(symbols) <= N
        assert np.isfinite(unit).all() and np.abs(unit).max() <= 1 and 0 <= confidence.min() <= confidence.max() <= 1 + 1e-6
        assert np.array_equal(unit, stepwise.chunk(row)[0])
        assert codec.decode(symbols, a).shape == (H, a)
        if kind == "vq" and decode == "mean":
            assert np.allclose(unit, codec.expected(logits[row].softmax(-1).numpy(), a), atol=1e-5)


def test_what_is_allowed_and_likeliest_is_said(codecs):
    codec = codecs["fast"]
    unit = np.clip(np.cumsum(np.random.default_rng(5).normal(0, 0.2, (H, 3)), 0), -1, 1)
    wanted = codec.encode(unit)
    logits = np.zeros((1, codec.most, codec.size), np.float32)
    logits[0, np.arange(len(wanted)), wanted] = 30.0
    choose = SequenceChooser("argmax", codec, np.array([3]), [0])
    choose(torch.from_numpy(logits))
    back, confidence, symbols = choose.chunk(0)
    assert symbols.tolist() == wanted.tolist() and confidence.min() > 0.99
    assert np.abs(back - unit).max() <= codec.max_error + 1e-6


# ---------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
@pytest.mark.parametrize("kind", ["fast", "vq"])
def test_learns_acts_saves_and_loads(mixture, files, kind, decoding, tmp_path):
    policy = build(mixture, files, kind, decoding=decoding, end_weight=0.0).train()
    some = windows(mixture)
    batch = policy.collate([policy.encode(w) for w in some])
    optimizer, losses = torch.optim.AdamW(policy.parameters(), 3e-3), []
    for _ in range(120):
        loss = policy(batch)
        assert loss.action_count == batch.said.sum() > 0
        total = loss.total(policy.loss_weights, loss.counts)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.2 * losses[0], losses[::20]
    policy.eval()
    seen = [{"images": w.images, "state": w.state} for w in some]
    key, texts = some[0].embodiment, [w.instruction for w in some]
    chunks = policy.act_batch(seen, texts, key, decode="argmax")
    true = [policy.codec.encode(policy.normalizers[key]["action"].to_unit(hold(w.actions, w.valid[:, 0]))) for w in some]
    right = [np.array_equal(c.symbols, s) for c, s in zip(chunks, true, strict=True)]
    assert np.mean(right) >= 0.5  # what was learned by heart is said, symbol for symbol
    for chunk in chunks:
        assert chunk.actions.shape == chunk.confidence.shape == (H, 4) and chunk.symbols.ndim == 1
        assert 0 <= chunk.confidence.min() <= chunk.confidence.max() <= 1 + 1e-6
    save_policy(policy, tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy", "cpu")
    assert loaded.fingerprint == policy.fingerprint and loaded.codec.to_json() == policy.codec.to_json()
    for mode in ("argmax", "mean", "sample"):
        ours, theirs = (p.act_batch(seen[:2], texts[:2], key, decode=mode, seeds=[3, 4]) for p in (policy, loaded))
        for one, two in zip(ours, theirs, strict=True):
            assert np.array_equal(one.actions, two.actions) and np.array_equal(one.symbols, two.symbols)


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_robots_of_two_widths_share_a_batch(mixture, files, decoding):
    a, policy = narrow_too(build(mixture, files, "fast", decoding=decoding, soft_tokens=1))
    assert isinstance(policy.codec, FastCodec)
    wide = windows(mixture, 2)
    slim = [replace(w, actions=w.actions[:, :a], valid=w.valid[:, :a], embodiment="narrow") for w in wide]
    examples = [policy.encode(w) for w in (*wide, *slim)]
    batch = policy.collate(examples)
    assert batch.dims.tolist() == [4, 4, a, a] and batch.said.shape == (4, policy.codec.most)
    assert torch.isfinite(policy(batch).action)
    for w, example in zip(slim, examples[2:], strict=True):
        own = policy.codec.encode(policy.normalizers["narrow"]["action"].to_unit(hold(w.actions, w.valid[:, 0])))
        assert example.symbols[example.said].tolist() == own.tolist()
        chunk = policy.eval().act({"images": w.images, "state": w.state}, w.instruction, "narrow")
        assert chunk.actions.shape == (H, a)


def test_the_last_action_is_held_beyond_the_end(mixture, files):
    policy = build(mixture, files, "vq")
    last = int(np.diff(mixture.stores[0].episode_starts)[0]) - 1
    window = mixture.window_at(0, 0, last)
    example = policy.encode(window)
    assert window.valid[:, 0].tolist() == [True, False, False, False] and example.valid.sum() == 4
    unit = policy.normalizers[window.embodiment]["action"].to_unit(window.actions)
    assert example.symbols.tolist() == policy.codec.encode(np.repeat(unit[:1], H, 0)).tolist() and example.said.all()


def test_autoregressive_stops_when_all_is_said(mixture, files, monkeypatch):
    policy = build(mixture, files, "fast", decoding="autoregressive").eval()
    assert isinstance(policy.codec, FastCodec)
    codec, calls, real = policy.codec, [], policy.model.symbol_logits

    def favour_long(hidden):
        """The longest token there is, again and again: few are needed."""
        calls.append(1)
        logits = real(hidden)
        logits[..., int(codec._count[0].argmax())] += 1e4
        return logits

    monkeypatch.setattr(policy.model, "symbol_logits", favour_long)
    window = windows(mixture, 1)[0]
    chunk = policy.act({"images": window.images, "state": window.state}, window.instruction)
    assert len(calls) == len(chunk.symbols) < codec.most


# ---------------------------------------------------------------------------------------------------- configs, command


def test_configs_that_do_not_fit_are_refused(mixture, files, tmp_path):
    with pytest.raises(ValidationError, match="needs path"):
        PolicyConfig.model_validate({"codec": {"kind": "fast"}})
    with pytest.raises(ValidationError, match="not for vq"):
        PolicyConfig.model_validate({"codec": {"kind": "vq", "path": "x", "bins": 128}})
    with pytest.raises(ValidationError, match="bins are not fitted"):
        PolicyConfig.model_validate({"codec": {"path": "x"}})
    with pytest.raises(ValidationError, match="leave codec out"):
        PolicyConfig.model_validate({"codec": {"kind": "vq", "path": "x"}, "head": "l1"})
    with pytest.raises(UsageError, match=r"kind fast, and .*vq[\s\S]*codec.kind=vq"):
        build(mixture, {"fast": files["vq"]}, "fast")
    with pytest.raises(UsageError, match=r"chunk 4[\s\S]*chunk 6[\s\S]*--chunk 6"):
        build(mixture, files, "fast", chunk=6)
    with pytest.raises(UsageError, match=r"normalization q99[\s\S]*--normalization bounds"):
        build(mixture, files, "vq", normalization={"action": "bounds"})
    with pytest.raises(UsageError, match="seconds None"):
        build(mixture, files, "vq", chunk_seconds=0.4)
    with pytest.raises(CheckpointError, match="vla data tokenizer DATASET"):
        build(mixture, {"fast": str(tmp_path / "missing")}, "fast")
    (tmp_path / "broken").write_text("[")
    with pytest.raises(CheckpointError, match="JSON"):
        build(mixture, {"fast": str(tmp_path / "broken")}, "fast")


def test_bins_say_of_themselves_what_they_always_did(mixture):
    assert BinCodec(64).to_json() == {"kind": "bins", "bins": 64, "variant": "uniform"}
    codec = {"kind": "bins", "bins": 64, "variant": "uniform"}  # as older policies have it
    old = PolicyConfig.model_validate({"codec": codec, "backbone": SMALL, "chunk": H})
    policy = build_policy(old, mixture)
    batch = policy.collate([policy.encode(w) for w in windows(mixture, 3)])
    assert torch.equal(batch.said, batch.valid.flatten(1)) and policy.narrows


def test_command_measures_what_it_wrote(data, tmp_path, capsys):
    out = tmp_path / "vq.json"
    arguments = ["data", "tokenizer", str(data), "--kind", "vq", "--chunk", "4", "--rounds", "2", "--codes", "8", "--json"]
    assert main([*arguments, "--out", str(out)]) == 0
    said = json.loads(capsys.readouterr().out)
    robot, (chunks,) = said["robots"][0], read_chunks([data], 4)
    codec = VQCodec.from_json(json.loads(out.read_text()))
    error = [np.abs(chunks.normalizer.from_unit(codec.decode(codec.encode(u), 4)) - x)[v]
             for u, x, v in zip(chunks.unit, chunks.actions, chunks.valid, strict=True)]  # fmt: skip
    assert robot["error_mean"] == pytest.approx(np.concatenate(error).mean(), rel=1e-5)
    assert robot["error_max"] == pytest.approx(max(e.max() for e in error), rel=1e-5)
    assert robot["symbols_per_second"] == pytest.approx(2 / (4 / chunks.spec.control_hz)) and said["most"] == 2
    assert main([*arguments, "--out", str(out), "--from", "x"]) == 2
    assert main([*arguments[:-1], "--out", str(out), "--chunk", "0"]) == 2


def test_command_reads_the_published_layout(data, tmp_path, capsys):
    from tests.test_fast import publish, walks

    publish(tmp_path / "fast", walks(200, 4, 4))
    out = tmp_path / "universal.json"
    assert main(["data", "tokenizer", str(data), "--kind", "fast", "--from", str(tmp_path / "fast"), "--chunk", "4", "--json",
                 "--out", str(out)]) == 0  # fmt: skip
    said = json.loads(capsys.readouterr().out)
    assert said["robots"][0]["longest"] == said["most"] <= 16
    assert FastCodec.from_json(json.loads(out.read_text())).fitted == {"chunk": 4}
