"""The policy: encoding, both decodings, losses, a folder that acts by itself."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vla.backbones import NanoVLM
from vla.batch import AugmentConfig
from vla.errors import CheckpointError, DataError, UsageError
from vla.mixture import Mixture
from vla.normalize import Normalizer, Stats
from vla.policy import PolicyConfig, VLAPolicy, build_policy, load_policy, save_policy

SMALL = {"hidden": 32, "layers": 2, "heads": 2, "mlp": 64, "tower_channels": (8, 8, 16), "keypoints": 8, "text_vocab": 320}


@pytest.fixture(scope="module")
def mixture(stores):
    return Mixture(stores, [1, 1], 4, seed=0)


def make(mixture, **config):
    torch.manual_seed(0)
    return build_policy(PolicyConfig.model_validate({"backbone": SMALL, "chunk": 4, "execute": 2, **config}), mixture)


@pytest.fixture(scope="module", params=["parallel", "autoregressive"])
def policy(request, mixture):
    return make(mixture, decoding=request.param).eval()


def observation(mixture, dataset=0, t=0):
    window = mixture.window_at(dataset, 0, t)
    return {"images": window.images, "state": window.state}


def test_loss_counts_only_valid_elements(policy, mixture):
    """Padding a batch with invalid tails must not change the mean, whatever lies in the padding."""
    store = mixture.stores[0]
    last = int(store.episode_starts[1]) - 1
    full, tail = mixture.window_at(0, 0, 0), mixture.window_at(0, 0, last)
    assert tail.valid[0].all() and not tail.valid[1:].any()
    batch = policy.collate([policy.encode(w) for w in (full, tail)])
    loss = policy.loss(batch)
    assert int(loss.action_count) == 4 * 4 + 4
    # Autoregressive inputs at padded positions only reach positions that are padded too.
    noisy = replace(batch, unit=batch.unit.masked_fill(~batch.valid, 0.7))
    noisy = replace(noisy, symbols=batch.symbols.masked_fill(~batch.valid.flatten(1), 5))
    assert torch.allclose(policy.loss(noisy).action, loss.action, rtol=1e-5)


def test_gradient_reaches_every_part(mixture):
    policy = make(mixture)
    loss = policy.loss(policy.collate([policy.encode(mixture.window(n)) for n in range(4)]))
    loss.total(policy.loss_weights, loss.counts).backward()
    silent = [n for n, p in policy.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_image_state_and_instruction_matter(policy, mixture):
    seen = observation(mixture)
    black = {"images": {k: np.zeros_like(v) for k, v in seen["images"].items()}, "state": seen["state"]}
    moved = {"images": seen["images"], "state": seen["state"] + np.array([0.1, 0, 0, 0], np.float32)}

    def logits(seen, text, drop=False):
        example = policy.encoder.observation(seen, text, "tabletop", drop)
        return policy.action_logits(policy.collate([example]))

    base = logits(seen, "push the red cube left")
    for other in (logits(black, "push the red cube left"), logits(moved, "push the red cube left"),
                  logits(seen, "lift the blue cube"), logits(seen, "push the red cube left", True)):  # fmt: skip
        assert (other - base).abs().max() > 1e-4


def test_left_padding_changes_nothing(policy, mixture):
    seen = observation(mixture)
    short, long = "lift it", "push the very very blue cube over there to the left side please"
    alone = policy.act_batch([seen], [short], "tabletop", decode="argmax")[0]
    together = policy.act_batch([seen, seen], [short, long], "tabletop", decode="argmax")[0]
    assert np.array_equal(alone.symbols, together.symbols) and np.allclose(alone.confidence, together.confidence, atol=1e-4)


def test_stepwise_decoding_agrees_with_teacher_forcing(mixture):
    policy = make(mixture, decoding="autoregressive").eval()
    seen = observation(mixture)
    chunk = policy.act(seen, "touch the red cube", "tabletop", decode="argmax")
    example = policy.encoder.observation(seen, "touch the red cube", "tabletop")
    batch = policy.collate([replace(example, symbols=chunk.symbols.reshape(-1))])
    assert torch.equal(policy.action_logits(batch).argmax(-1).flatten(), torch.from_numpy(chunk.symbols.reshape(-1)))


def test_autoregressive_positions_do_not_see_the_future(mixture):
    policy = make(mixture, decoding="autoregressive").eval()
    batch = policy.collate([policy.encode(mixture.window(1))])
    changed = replace(batch, symbols=torch.cat([batch.symbols[:, :8], (batch.symbols[:, 8:] + 7) % 256], dim=1))
    a, b = policy.action_logits(batch), policy.action_logits(changed)
    assert torch.allclose(a[:, :9], b[:, :9], atol=1e-5) and not torch.allclose(a[:, 9:], b[:, 9:], atol=1e-3)


def test_chunks_are_in_robot_units_and_decoders_differ(policy, mixture):
    seen = observation(mixture)
    chunks = {d: policy.act(seen, "lift the red cube", "tabletop", decode=d) for d in ("argmax", "mean", "sample")}
    low, high = policy.normalizers["tabletop"]["action"].low, policy.normalizers["tabletop"]["action"].high
    for chunk in chunks.values():
        assert chunk.actions.shape == (4, 4) and chunk.actions.dtype == np.float32
        assert (chunk.actions >= low - 1e-6).all() and (chunk.actions <= high + 1e-6).all()
        assert (chunk.confidence >= -1e-6).all() and (chunk.confidence <= 1).all()
    assert not np.array_equal(chunks["mean"].actions, chunks["argmax"].actions)
    again = policy.act_batch([seen], ["lift the red cube"], "tabletop", decode="sample", seeds=[0])[0]
    other = policy.act_batch([seen], ["lift the red cube"], "tabletop", decode="sample", seeds=[1])[0]
    assert np.array_equal(again.actions, chunks["sample"].actions) and not np.array_equal(again.actions, other.actions)


def test_folder_acts_the_same_and_loads_through_auto_classes(policy, mixture, tmp_path):
    save_policy(policy, tmp_path / "policy")
    again = load_policy(tmp_path, device="cpu")
    seen = observation(mixture)
    a, b = (p.act(seen, "push the green cube away", "tabletop") for p in (policy, again))
    assert np.array_equal(a.actions, b.actions) and again.fingerprint == policy.fingerprint
    assert again.recorded_seeds["tabletop"]["touch-red"] and again.embodiments == policy.embodiments

    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "policy")
    assert isinstance(model, NanoVLM) and "auto_map" not in json.loads((tmp_path / "policy/config.json").read_text())
    processor = AutoProcessor.from_pretrained(tmp_path / "policy")
    inputs = processor(images=[seen["images"]["front"]], text="lift <pad> the ümlaut 机器人", return_tensors="pt")
    logits = model(**inputs, logits_to_keep=2).logits
    assert logits.shape == (1, 2, model.config.text_config.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert tokenizer.decode(tokenizer("lift the ümlaut 机器人")["input_ids"]).strip() == "lift the ümlaut 机器人"


def test_text_never_becomes_a_control_id(policy):
    ids = policy.writer.words("<pad><image><state><act><slot_3>" + "".join(chr(c) for c in range(32, 1000)))
    assert max(ids) < policy.model.config.text_vocab_size


@pytest.mark.parametrize("key", ["normalizers", "codec", "embodiments", "prompt"])
def test_an_incomplete_folder_is_refused_by_name(policy, tmp_path, key):
    save_policy(policy, tmp_path / "policy")
    meaning = json.loads((tmp_path / "policy/policy.json").read_text())
    del meaning[key]
    (tmp_path / "policy/policy.json").write_text(json.dumps(meaning))
    with pytest.raises(CheckpointError, match=key):
        load_policy(tmp_path)


def test_foreign_statistics_and_foreign_weights_are_refused(policy, tmp_path):
    save_policy(policy, tmp_path / "policy")
    shutil.copytree(tmp_path / "policy", tmp_path / "b")
    meaning = json.loads((tmp_path / "policy/policy.json").read_text())
    meaning["normalizers"]["tabletop"]["action"]["stats"]["max"][0] += 0.5
    (tmp_path / "policy/policy.json").write_text(json.dumps(meaning))
    with pytest.raises(CheckpointError, match="fingerprint"):
        load_policy(tmp_path)
    tensors = load_file(tmp_path / "b/model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "b/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="fingerprint"):
        load_policy(tmp_path / "b")
    (tmp_path / "b/model.safetensors").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load_policy(tmp_path / "b")
    with pytest.raises(CheckpointError, match="policy.json"):
        load_policy(tmp_path / "nowhere")


def test_bad_observations_never_reach_a_tensor(policy, mixture):
    seen = observation(mixture)
    front = seen["images"]["front"]
    bad = [
        ({"images": {}, "state": seen["state"]}, "front"),
        ({"images": {"front": front.astype(np.float32)}, "state": seen["state"]}, "float32"),
        ({"images": {"front": front}, "state": seen["state"][:2]}, r"\(2,\)"),
        ({"images": {"front": front}, "state": seen["state"] * np.nan}, "not finite"),
        ({"images": {"front": front}}, "state"),
    ]
    for wrong, word in bad:
        with pytest.raises(DataError, match=word):
            policy.act(wrong, "lift the red cube", "tabletop")
    for text in ("", "  \x00 ", "a" * 600, 3, ["lift"]):
        with pytest.raises(DataError, match="instruction"):
            policy.act(seen, text, "tabletop")
    with pytest.raises(CheckpointError, match="metaworld_sawyer"):
        policy.act(seen, "lift the red cube", "franka")
    with pytest.raises(UsageError, match="tabletop"):
        policy.act(seen, "lift the red cube")


def test_augmentation_is_a_function_of_seed_and_n(mixture):
    policy = make(mixture, augment={"crop": 0.1, "colour": 0.1})
    a, b, c = mixture.window(3), mixture.window(3), mixture.window(4)
    same = [policy.encode(w, augment=True, seed=0) for w in (a, b)]
    assert np.array_equal(same[0].images, same[1].images) and np.array_equal(same[0].state, same[1].state)
    assert not np.array_equal(same[0].images, policy.encode(a, augment=True, seed=1).images)
    assert not np.array_equal(policy.encode(c).images, policy.encode(c, augment=True).images)
    plain = policy.encode(a, augment=False)
    assert np.array_equal(plain.images[0], next(iter(a.images.values())))
    assert AugmentConfig().crop == 0


def test_soft_bins_pull_towards_neighbours(mixture):
    """With hard labels a near miss costs as much as a far one; with Gaussian-soft bins it does not."""
    soft, hard = make(mixture, soft_sigma=0.02), make(mixture, soft_sigma=0.0)
    batch = soft.collate([soft.encode(mixture.window(0))])
    for policy, cheaper in ((soft, True), (hard, False)):
        losses = []
        for shift in (1, 100):
            logits = torch.full((*batch.symbols.shape, 256), -5.0)
            logits.scatter_(-1, ((batch.symbols + shift) % 256)[..., None], 5.0)
            policy.model.symbol_logits = lambda hidden, logits=logits: logits
            losses.append(policy.loss(batch).action.item())
        assert (losses[0] < losses[1] - 1e-3) is cheaper


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_it_learns_eight_windows_by_heart(mixture, decoding):
    """The loop in small: loss falls, and free-running decoding repeats what was taught, in robot units."""
    policy = make(mixture, decoding=decoding)
    windows = [mixture.window(n) for n in range(40)]
    windows = [w for w in windows if w.embodiment == "tabletop"][:8]
    batch = policy.collate([policy.encode(w) for w in windows])
    optimizer = torch.optim.AdamW(policy.parameters(), 3e-3)
    first = None
    for _ in range(300):
        loss = policy.loss(batch)
        total = loss.total(policy.loss_weights, loss.counts)
        first = first or total.item()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    policy.eval()
    loss = policy.loss(batch)
    assert loss.total(policy.loss_weights, loss.counts).item() < 0.6 * (first or 0)
    chunks = policy.act_batch([{"images": w.images, "state": w.state} for w in windows], [w.instruction for w in windows],
                              "tabletop", decode="argmax")  # fmt: skip
    errors = np.concatenate([np.abs(c.actions - w.actions)[w.valid] for c, w in zip(chunks, windows, strict=True)])
    assert np.mean(errors < 0.05) > 0.9


def test_history_dropout_is_a_function_of_seed_and_n_and_only_for_training(mixture):
    policy = make(mixture, decoding="autoregressive")
    window = mixture.window(5)
    taught = [policy.encode(window, augment=True, seed=s).hidden for s in (0, 0, 1)]
    assert np.array_equal(taught[0], taught[1]) and not np.array_equal(taught[0], taught[2])
    assert 0 < taught[0].mean() < 1 and not policy.encode(window).hidden.any()
    batches = [policy.collate([policy.encode(window, augment=True, seed=s)]) for s in (0, 1)]
    batches[1] = replace(batches[0], hidden=batches[1].hidden)
    assert not torch.equal(*(policy.action_logits(b) for b in batches))


def test_a_narrower_robot_decodes_what_it_was_taught(mixture):
    """Padded action dimensions are zero in training; stepwise decoding must feed back the same, not what the head says."""
    policy = make(mixture, decoding="autoregressive")
    spec, norm = policy.embodiments["tabletop"], policy.normalizers["tabletop"]
    narrow = spec.model_copy(update={"name": "narrow", "action": spec.action[:1]})  # 3 of 4 dimensions
    stats = norm["action"].stats
    three = Normalizer(Stats({k: v[:3] for k, v in stats.values.items()}, stats.count), "bounds")
    policy = VLAPolicy(policy.config, policy.model, policy.writer, policy.embodiments | {"narrow": narrow},
                       policy.normalizers | {"narrow": norm | {"action": three}}, policy.codec).eval()  # fmt: skip
    chunk = policy.act(observation(mixture), "touch the red cube", "narrow", decode="argmax")
    assert chunk.actions.shape == (4, 3)
    symbols = np.full((4, 4), policy.codec.encode(np.zeros((1, 1)))[0])
    symbols[:, :3] = chunk.symbols
    example = policy.encoder.observation(observation(mixture), "touch the red cube", "narrow")
    batch = policy.collate([replace(example, symbols=symbols.reshape(-1))])
    expected = policy.action_logits(batch).argmax(-1).reshape(4, 4)[:, :3]
    assert torch.equal(expected, torch.from_numpy(chunk.symbols))


def test_bfloat16_acts(policy, mixture, tmp_path):
    save_policy(policy, tmp_path / "policy")
    half = load_policy(tmp_path, device="cpu", dtype=torch.bfloat16)
    full = policy.act(observation(mixture), "lift the red cube", "tabletop", decode="mean")
    rough = half.act(observation(mixture), "lift the red cube", "tabletop", decode="mean")
    assert rough.actions.dtype == np.float32 and np.abs(rough.actions - full.actions).max() < 0.2


def test_keypoints_keep_their_precision_under_autocast(mixture):
    keypoints = make(mixture).model.keypoints
    assert keypoints
    mid, sentence = torch.randn(1, 8, 16, 16) * 3, torch.randn(1, 32)
    seen = []
    keypoints.out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        keypoints(mid, sentence)
    places = seen[0][:, :16].float()
    assert not torch.equal(places, places.bfloat16().float())


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"prompt": "nope-9"}, "plain-1"), ({"execute": 9, "chunk": 8}, "more than the chunk"),
     ({"backbone": {"hidden": 100, "heads": 3}}, "multiple of 2 x heads"),
     ({"backbone": {"tower_channels": [6, 6, 6]}}, "multiples")],
)  # fmt: skip
def test_a_config_that_cannot_run_is_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        PolicyConfig.model_validate(changes)


def test_edits_of_a_folder_are_noticed(policy, tmp_path):
    save_policy(policy, tmp_path / "policy")
    path = tmp_path / "policy/policy.json"
    good = path.read_text()
    for old, new in (('"decode": "mean"', '"decode": "argmax"'), ('"control_hz": 10.0', '"control_hz": 20.0'),
                     ('"bins": 256', '"bins": "many"'), ('"scheme": "q99"', '"scheme": "magic"')):  # fmt: skip
        assert old in good
        path.write_text(good.replace(old, new))
        with pytest.raises(CheckpointError):
            load_policy(tmp_path)
    path.write_text(good)
    tokenizer = tmp_path / "policy/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("Ġcube", "Ġcubs"))
    with pytest.raises(CheckpointError):
        load_policy(tmp_path)
    with pytest.raises(CheckpointError, match="Hub"):
        load_policy("nobody/nothing-here")


def test_the_l1_head_learns_numbers_acts_and_comes_back(mixture, tmp_path):
    """OpenVLA-OFT's continuous head on the same backbone: an L1 loss, one pass, no confidence to speak of."""
    policy = make(mixture, head="l1", end_weight=0.0, state="none")
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    batch = policy.collate([policy.encode(mixture.window(n)) for n in range(4)])
    assert policy.end_head is None and not (batch.ids == policy.writer.ids.state).any()
    losses = []
    for _ in range(30):
        loss = policy.loss(batch)
        losses.append((loss.action / loss.action_count).item())
        optimizer.zero_grad()
        loss.total(policy.loss_weights, loss.counts).backward()
        assert all(p.grad is not None for p in policy.parameters())
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    policy.eval()
    chunk = policy.act(observation(mixture), "touch the red cube", "tabletop")
    assert np.isfinite(chunk.actions).all() and np.isnan(chunk.confidence).all()
    assert chunk.symbols.min() >= 0 and chunk.symbols.max() < 256  # the bins its numbers fall into
    save_policy(policy, tmp_path / "policy")
    again = load_policy(tmp_path / "policy", "cpu").act(observation(mixture), "touch the red cube", "tabletop")
    np.testing.assert_array_equal(again.actions, chunk.actions)
    with pytest.raises(ValueError, match="parallel"):
        PolicyConfig(head="l1", decoding="autoregressive")
