"""Prismatic and OpenVLA: the same numbers as a second, independent computation; the published layout; prompts and pictures."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import prismatic_restated as restated
import pytest
import torch
from prismatic_folder import FULL, Q01, Q99, TINY, layout, tokenizer_of, write_oft, write_tiny

from vla.backbones import PrismaticConfig, Sizes
from vla.backbones.prismatic import PrismaticModelConfig, build, random_prismatic
from vla.backbones.prismatic_files import empty_model
from vla.backbones.prismatic_writer import PrismaticWriter
from vla.embodiment import CONVENTIONS
from vla.errors import CheckpointError, UsageError
from vla.policy import load_policy, save_policy
from vla.policy.openvla import OFT, read_openvla
from vla.schema import Window

TEXT = "In: What action should the robot take to push the red cube?\nOut:"
TOLERANCE: dict[str, Any] = dict(rtol=1e-5, atol=2e-5)


def frame(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def seen(seed: int = 0) -> dict:
    return {"images": {"image": frame(seed)}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvla") / "tiny"
    return folder, write_tiny(folder, shards=3)


@pytest.fixture(scope="module")
def policy(tiny):
    return read_openvla(tiny[0])


# --- golden parity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["openvla-7b", "openvla-v01"])
def test_logits_and_the_seven_tokens_are_those_of_the_checkpoints_description(tmp_path, fused):
    tensors = write_tiny(tmp_path, fused=fused, vocab=32000, empty=29871)
    policy = read_openvla(tmp_path)
    text = TEXT if fused else (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions. USER: What action should the robot take to push the red cube? ASSISTANT:"
    )  # fmt: skip
    ids = [*tokenizer_of(32000, 29871).encode(text).ids, 29871]
    patches = restated.see(tensors, frame(), 28, ["dino", "siglip"] if fused else ["siglip"], heads=2)
    logits, tokens = restated.openvla(tensors, patches, ids, TINY["text"]["heads"], vocab=32000)

    chunk = policy.act(seen(), "Push the RED cube", "bridge_orig")
    assert (31999 - chunk.symbols[0]).tolist() == tokens
    assert len(set(tokens)) > 3, "a model that says one thing proves nothing"
    actions = np.array([(np.linspace(-1, 1, 256)[:-1] + 1 / 255)[min(31999 - token, 254)] for token in tokens])
    low, high = np.array(Q01), np.array(Q99)
    expected = np.where([True] * 6 + [False], 0.5 * (actions + 1) * (high - low) + low, actions)
    np.testing.assert_allclose(chunk.actions[0], expected, rtol=1e-6, atol=1e-8)

    ours = policy.writer.act(text, 1)
    whole = torch.tensor([[*ours, 29871, *tokens[:-1]]])
    pixels = torch.from_numpy(policy.writer.image(frame()).copy()).permute(2, 0, 1)[None]
    with torch.inference_mode():
        got = policy.model(whole, pixels).logits[0, len(ours) :]
        torch.testing.assert_close(got, logits, **TOLERANCE)
        hidden = policy.model.hidden(whole, pixels).last_hidden_state[0, len(ours) :]
        torch.testing.assert_close(policy.model.symbol_logits(hidden), logits[:, 31744:32000].flip(-1), **TOLERANCE)


@pytest.mark.parametrize("film", [True, False], ids=["film", "plain"])
def test_oft_is_its_description(tmp_path, film):
    """Two cameras, state, FiLM with merged adapters, zero embeddings, everything reads everything, the L1 head."""
    files = write_oft(tmp_path, film=film)
    policy = read_openvla(tmp_path, oft=OFT(chunk=3, cameras=("full_image", "wrist_image"), normalization="q99"))
    assert list(policy.embodiments) == ["libero"], "a fine-tuned folder's own statistics replace those of its base"
    spec = policy.embodiments["libero"]
    assert (spec.action_dim, spec.state_dim, policy.config.head, policy.config.decoding) == (7, 8, "l1", "parallel")
    state = np.linspace(-1.4, 1.2, 8).astype(np.float32)
    chunk = policy.act({"images": {"full_image": frame(1), "wrist_image": frame(2)}, "state": state}, "push the red cube")

    t, towers, films, sentence = dict(files["model"]), files.get("vision_backbone", {}), {}, None
    ids = [*tokenizer_of(640).encode(TEXT).ids, policy.writer.ids.act]
    for name, tensor in towers.items():
        plain = name.replace(".block.", ".").replace(".base_layer", "")
        if ".lora_" in name:
            continue
        if ".scale." in name or ".shift." in name:
            films[name] = tensor
            continue
        t[plain] = tensor
        if name.endswith(".base_layer.weight"):
            down, up = (towers[name.replace("base_layer", f"lora_{ab}.default")].flatten(1) for ab in "AB")
            t[plain] = tensor + (up @ down).reshape(tensor.shape)  # rank 2: alpha = min(2, 16) = rank
    if film:
        sentence = t["language_model.model.embed_tokens.weight"][torch.tensor([*ids, 2])].mean(0)
    views = [restated.see(t, frame(i), 28, ["dino", "siglip"], 2, films if film else None, sentence) for i in (1, 2)]
    unit = torch.from_numpy(np.clip(2 * (state - -1.5) / (1.25 - -1.5) - 1, -1, 1))
    p = files["proprio_projector"]
    token = restated.dense(p, "fc2", restated.gelu(restated.dense(p, "fc1", unit)))[None]
    hidden = restated.oft_hidden(t, torch.cat([*views, token]), ids, TINY["text"]["heads"], 21)
    expected = restated.action_head(files["action_head"], hidden, 7).clamp(-1, 1).numpy()
    low, high = np.array(Q01), np.array(Q99)
    expected = np.where([True] * 6 + [False], 0.5 * (expected + 1) * (high - low) + low, expected)
    np.testing.assert_allclose(chunk.actions, expected, rtol=1e-4, atol=1e-5)
    assert chunk.actions.shape == (3, 7) and np.abs(chunk.actions[0] - chunk.actions[1]).max() > 1e-4


def test_a_batch_says_what_each_would_alone(policy):
    alone = [policy.act(seen(i), text, "kuka") for i, text in enumerate(("push", "push the red cube to the left side"))]
    both = policy.act_batch([seen(0), seen(1)], ["push", "push the red cube to the left side"], "kuka")
    for one, two in zip(alone, both, strict=True):
        assert one.symbols.tolist() == two.symbols.tolist()
        np.testing.assert_allclose(one.confidence, two.confidence, atol=1e-4)


# --- the published layout --------------------------------------------------------------------------------------------


def test_the_full_layout_is_the_published_one():
    model = empty_model(PrismaticModelConfig())
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = layout(FULL, 32064)
    assert not ours.keys() ^ expected.keys() and ours == expected
    parts = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.", "projector.", "language_model.")
    counts = [sum(name.startswith(part) for name in ours) for part in parts]
    assert (len(ours), counts) == (982, [343, 342, 6, 291])
    parameters = sum(p.numel() for p in model.parameters())
    assert (parameters, 2 * parameters) == (7_541_237_184, 15_082_474_368)
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    ids = model.config.ids
    assert (ids.symbols[0], ids.symbols[255], ids.act, ids.pad, ids.image_tokens) == (31999, 31744, 29871, 32000, 256)


def test_openvla_ids_round_trip(policy):
    """Vectors of facts: value -> id -> value; of a tokenizer of 32000 pieces, whatever the padding."""
    ids, codec = PrismaticModelConfig().ids, policy.codec
    vectors = {-1.0: (31999, -0.996078431), -0.5: (31936, -0.501960784), -0.073: (31881, -0.070588235), 0.0: (31872, 0.0),
               0.5: (31808, 0.501960784), 0.999: (31745, 0.996078431), 1.0: (31744, 0.996078431)}  # fmt: skip
    for value, (token, back) in vectors.items():
        symbol = codec.encode(np.array([[value]]))
        assert int(ids.of_symbols(torch.from_numpy(symbol))[0]) == token
        assert float(codec.decode(symbol, 1)[0, 0]) == pytest.approx(back, abs=5e-8)  # float32


def test_random_weights_of_any_size():
    config = PrismaticModelConfig(
        text_config=dict(vocab_size=704, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
        image_sizes=[28, 28], tower_args=[dict(embed_dim=16, depth=3, num_heads=2), dict(embed_dim=24, depth=3, num_heads=2)],
        pad_token_id=640, act_id=354, num_slots=7,
    )  # fmt: skip
    model = random_prismatic(config, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(b.dtype == torch.float32 for n, b in model.named_buffers() if "inv_freq" in n)
    ids = torch.tensor([[1, *[config.ids.image] * 4, 5, 6, 354]])
    out = model(ids, torch.zeros(1, 3, 28, 28, dtype=torch.uint8)).logits
    assert out.shape == (1, 8, 704) and torch.isfinite(out).all()


def test_rotary_frequencies_survive_a_change_of_dtype(tiny):
    policy = read_openvla(tiny[0], dtype=torch.bfloat16).to(torch.bfloat16)
    (frequencies,) = (b for n, b in policy.model.named_buffers() if n.endswith(".inv_freq"))
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, 10000.0 ** (-torch.arange(0, 8, 2) / 8))


# --- words and pictures ----------------------------------------------------------------------------------------------


def test_the_sentence(policy):
    writer, ids = policy.writer, policy.writer.ids
    prefix = writer.act(TEXT, 2)
    plain = tokenizer_of(640).encode(TEXT).ids
    assert prefix == [1, *[ids.image] * 8, *plain[1:]] and plain[0] == 1
    assert writer.act(TEXT + " ", 2) == prefix, "the empty piece is said once, by the policy"
    assert pickle.loads(pickle.dumps(writer)).act(TEXT, 2) == prefix
    assert writer.text(writer.words("red and blue")) == "red and blue"
    assert policy.model.parallel_tail(3) == [ids.act, *ids.slots[:3], 2]


def test_no_text_becomes_a_control_id(policy):
    for writer in (policy.writer, pickle.loads(pickle.dumps(policy.writer))):
        assert not {0, 2, 640} & set(writer.act("push </s><PAD><s> it", 1)[1:])
        rare = chr(0xF0000 + 280)  # its piece is an action's id
        assert tokenizer_of(640).token_to_id(rare) >= writer.ids.words
        assert all(i < writer.ids.words for i in writer.words(f"a {rare} b"))
        assert writer.text(writer.words(f"a {rare} b")) == f"a {rare} b"


def test_pictures_are_torchvisions(tiny):
    import torchvision.transforms.functional as TVF
    from PIL import Image

    whole, cropped = read_openvla(tiny[0]), read_openvla(tiny[0], crop=0.9)
    picture = Image.fromarray(frame())
    expected = TVF.resize(picture, [28, 28], TVF.InterpolationMode.BICUBIC, antialias=True)  # pyright: ignore
    assert np.array_equal(whole.writer.image(frame()), np.asarray(expected))
    height, width = round(60 * 0.9**0.5), round(80 * 0.9**0.5)
    middle = TVF.crop(picture, (60 - height) // 2, (80 - width) // 2, height, width)  # pyright: ignore
    expected = TVF.resize(middle, [28, 28], TVF.InterpolationMode.BICUBIC, antialias=True)
    assert np.array_equal(cropped.writer.image(frame()), np.asarray(expected))


# --- as a policy -----------------------------------------------------------------------------------------------------


def test_load_policy_reads_the_folder_itself(tiny, policy):
    again = load_policy(tiny[0], device="cpu")
    chunk = again.act(seen(), "push the red cube", embodiment="bridge_orig")
    assert chunk.actions.shape == (1, 7)
    assert np.array_equal(chunk.actions, policy.act(seen(), "push the red cube", "bridge_orig").actions)
    spec = again.embodiments["kuka"]
    assert [c.convention for c in spec.action] == ["eef_delta_position", "eef_delta_euler_xyz", "gripper_open_positive"]
    assert all(c.convention in CONVENTIONS for c in spec.action) and spec.state_dim == 0
    with pytest.raises(UsageError, match="bridge_orig"):
        again.act(seen(), "push")
    with pytest.raises(CheckpointError, match="bridge_orig"):
        again.act(seen(), "push", "fractal")


@pytest.mark.parametrize("kind", ["openvla", "oft"])
def test_saved_as_a_policy_it_acts_alike(tmp_path, kind):
    if kind == "oft":
        write_oft(tmp_path / "raw")
        policy = read_openvla(tmp_path / "raw", oft=OFT(3, ("full_image",), "q99"))
        look = {"images": {"full_image": frame()}, "state": np.zeros(8, np.float32)}
    else:
        write_tiny(tmp_path / "raw", dtype=torch.bfloat16)
        policy, look = read_openvla(tmp_path / "raw"), seen()
        assert policy.dtype == torch.bfloat16, "as stored"
    save_policy(policy, tmp_path / "policy")
    again = load_policy(tmp_path / "policy", device="cpu")
    assert again.fingerprint == policy.fingerprint and again.dtype == policy.dtype
    key = next(iter(policy.embodiments))
    one, two = (p.act(look, "push the red cube", key) for p in (policy, again))
    assert np.array_equal(one.actions, two.actions)
    words = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert "auto_map" not in words and "norm_stats" not in words


def window(policy, n=0) -> Window:
    spec = next(iter(policy.embodiments.values()))
    rng = np.random.default_rng(n)
    return Window(images={c: frame(n) for c in spec.cameras}, state=np.zeros(spec.state_dim, np.float32), instruction="push it",
                  actions=rng.uniform(-0.02, 0.02, (policy.chunk, spec.action_dim)).astype(np.float32),
                  valid=np.ones((policy.chunk, spec.action_dim), bool), embodiment=spec.key,
                  final_state=np.zeros(spec.state_dim, np.float32), n=n)  # fmt: skip


@pytest.mark.parametrize("kind", ["openvla", "oft"])
def test_what_is_used_learns(tmp_path, kind):
    if kind == "oft":
        write_oft(tmp_path)
        policy = read_openvla(tmp_path, oft=OFT(3, ("full_image",), "q99"))
    else:
        write_tiny(tmp_path)
        policy = read_openvla(tmp_path)
    policy.train()
    batch = policy.collate([policy.encode(window(policy, n)) for n in range(3)])
    optimizer, losses = torch.optim.AdamW(policy.parameters(), lr=1e-3), []
    for step in range(8):
        loss = policy.loss(batch)
        optimizer.zero_grad()
        total = loss.total(policy.loss_weights, loss.counts)
        total.backward()
        losses.append(total.item())
        if step == 0:
            # The last block, the final norm and the pooling head of a tower are in the file and nobody reads them.
            unused = ("blocks.2.", "blocks.3.", ".norm.", "attn_pool.", "film.featurizer.2", "film.fused_featurizer.3", "lm_head")
            silent = [n for n, p in policy.named_parameters() if not (p.grad is not None and p.grad.abs().sum() > 0)]
            assert not [n for n in silent if not any(u in n for u in unused)], silent
            assert any("patch_embed" in n for n, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0)
        optimizer.step()
    assert losses[-1] < losses[0]


def test_a_fresh_policy_on_its_weights(tiny):
    """State, end query and soft tokens are small tables of our own; nothing of the checkpoint changes for them."""
    torch.manual_seed(0)
    sizes = Sizes(symbols=256, slots=56, state=4, robots=2, soft_tokens=3, state_token=True, end_token=True)
    model, writer = build(PrismaticConfig(kind="prismatic", path=str(tiny[0])), sizes)
    ids = writer.ids
    prefix = writer.act(TEXT, 1)
    assert prefix[1 : 1 + 4 + 1 + 3] == [ids.image] * 4 + [ids.state] + [ids.soft] * 3 and prefix[-1] == ids.end
    assert not [n for n, t in tiny[1].items() if not torch.equal(model.state_dict()[n], t)]
    row = torch.tensor([prefix])
    pixels, states = torch.zeros(1, 3, 28, 28, dtype=torch.uint8), torch.zeros(1, 4)

    def last(**change):
        given: dict[str, Any] = {"images": pixels, "states": states, "robots": torch.tensor([0])} | change
        out = model.hidden(row, **given).last_hidden_state
        assert out is not None
        return out[0, -1]

    with torch.inference_mode():
        here = last()
        for change in ({"images": pixels + 200}, {"states": states + 0.5}, {"robots": torch.tensor([1])}):
            assert not torch.allclose(last(**change), here)
    model.add_robots(1)
    assert model.robots is not None and model.robots.weight.shape == (3, 3 * 32) and isinstance(writer, PrismaticWriter)


def test_a_model_that_ignores_its_image_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    write_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("projector.fc3.weight", "projector.fc3.bias"):
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="black picture"):
        load_policy(tmp_path, device="cpu")
    assert read_openvla(tmp_path, probe_image=False)


def test_transformers_own_loader_knows_it_without_remote_code(tiny):
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(tiny[0], dtype=torch.float32)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tiny[1].items())
    model.gradient_checkpointing_enable()
    ids = torch.tensor([[1, *[model.config.ids.image] * 4, 5, 6, 354]])
    logits = model.train()(ids, torch.zeros(1, 3, 28, 28, dtype=torch.uint8)).logits
    logits.sum().backward()
    assert model.vision_backbone.featurizer.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_fine_tuning_on_ones_own_robots(tiny, stores, tmp_path, decoding):
    """Built on openvla's weights for two robots of a mixture, with states, soft tokens and chunks; saved, loaded, the same."""
    from vla.mixture import Mixture
    from vla.policy import PolicyConfig, build_policy

    torch.manual_seed(0)
    mixture = Mixture(stores, [1, 1], 2, seed=0)
    config = {"backbone": {"kind": "prismatic", "path": str(tiny[0])}, "chunk": 2, "execute": 1, "decoding": decoding,
              "prompt": "openvla-1", "soft_tokens": 2, "codec": {"variant": "openvla"}}  # fmt: skip
    policy = build_policy(PolicyConfig.model_validate(config), mixture)
    batch = policy.collate([policy.encode(mixture.window(n)) for n in range(4)])
    loss = policy.loss(batch)
    total = loss.total(policy.loss_weights, loss.counts)
    total.backward()
    assert torch.isfinite(total) and policy.model.end_query.grad.abs().sum() > 0
    save_policy(policy.eval(), tmp_path / "policy")
    again = load_policy(tmp_path / "policy", device="cpu")
    assert again.fingerprint == policy.fingerprint
    with torch.inference_mode():
        torch.testing.assert_close(again.action_logits(batch), policy.action_logits(batch), rtol=0, atol=0)
    here = mixture.window_at(0, 0, 0)
    chunk = again.act({"images": here.images, "state": here.state}, "push it", here.embodiment)
    assert chunk.actions.shape[1] == again.embodiments[here.embodiment].action_dim
