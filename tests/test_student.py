"""Students: a small network as one more backbone, with every tower."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small_datasets import write_dataset

from vla.backbones.student import StudentNet
from vla.batch import Batch
from vla.embodiment import EmbodimentSpec
from vla.episodes import EpisodeStore
from vla.errors import CheckpointError, UsageError
from vla.mixture import Mixture
from vla.policy import AdapterConfig, PolicyConfig, VLAPolicy, build_policy, load_policy, save_policy
from vla.policy.adapters import adapt
from vla.policy.build import extend_policy
from vla.schema import Window
from vla.train import decayed_of

SMALL = {"kind": "student", "image_size": 32, "patch": 16, "channels": (8, 8, 16), "keypoints": 8, "hidden": 32, "layers": 2,
         "heads": 2, "mlp": 64, "text_vocab": 320}  # fmt: skip
TOWERS = {
    "conv": {}, "patch": {"tower": "patch"}, "conv, one token a patch condensed": {"tokens": 3}, "no keypoints": {"keypoints": 0},
    "mobilenetv4_conv_small": {"tower": "mobilenetv4_conv_small"},
    "efficientnet_b0": {"tower": "efficientnet_b0", "tokens": 3, "text_layers": 0, "image_size": 64},
}  # fmt: skip


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> list[EpisodeStore]:
    """A robot of two cameras, and one of one."""
    root = tmp_path_factory.mktemp("students")
    found = []
    for name, cameras in (("both", ("front", "wrist")), ("one", ("front",))):
        write_dataset(root / name, 3, cameras)
        found.append(EpisodeStore.open(root / name, root / "cache", progress=False))
    return found


def other(spec: EmbodimentSpec) -> EmbodimentSpec:
    return spec.model_copy(update={"name": "other"})


@pytest.fixture(scope="module")
def mixture(opened) -> Mixture:
    return Mixture(opened, [1, 1], 4, seed=0, specs=[opened[0].spec, other(opened[1].spec)])


def make(mixture: Mixture, backbone: dict | None = None, **config) -> VLAPolicy:
    torch.manual_seed(0)
    settings = {"backbone": SMALL | (backbone or {}), "chunk": 4, "execute": 2, **config}
    return build_policy(PolicyConfig.model_validate(settings), mixture)


@pytest.fixture(scope="module", params=list(TOWERS))
def policy(request, mixture) -> VLAPolicy:
    return make(mixture, TOWERS[request.param]).eval()


def batch_of(policy: VLAPolicy, mixture: Mixture, count: int = 4) -> Batch:
    return policy.collate([policy.encode(mixture.window(n)) for n in range(count)])


def learn(policy: VLAPolicy, batch: Batch) -> None:
    loss = policy.train().loss(batch)
    loss.total(policy.loss_weights, loss.counts).backward()


def seen(mixture: Mixture, n: int = 0) -> tuple[dict, str]:
    window = mixture.window(n)
    assert isinstance(window, Window)
    return {"images": window.images, "state": window.state}, window.embodiment


def test_weight_decay_shrinks_layers_and_neither_queries_nor_positions(policy):
    layers = [n for n, m in policy.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    decayed, whole = decayed_of(policy), {n for n, p in policy.named_parameters() if p.ndim >= 2}
    assert decayed == {f"{name}.weight" for name in layers}
    kept = {"steps", "end", "patch_positions", "camera_positions", "text.embed.weight", "dimensions.weight"}
    kept |= {"text.positions"} if policy.config.backbone.text_layers else set()
    assert {name.removeprefix("model.") for name in whole - decayed} == kept


@torch.inference_mode()
def test_shapes(policy, mixture):
    batch = batch_of(policy, mixture)
    images = [int((row == policy.writer.ids.image).sum()) for row in batch.ids]
    assert set(images) == {1, 2} and len(batch.images) == sum(images)  # both robots
    assert policy.action_logits(batch).shape == (4, 16, 256)
    net = policy.model
    tokens = net.look(batch.images, torch.randn(len(batch.images), 32), batch.slots)
    assert tokens.shape == (len(batch.images), net.image_tokens, 32)
    assert net.image_tokens == net.tower.tokens + (net.keypoints is not None)
    out = net.hidden(policy_ids(policy, batch), batch.images, batch.state, slots=batch.slots, robots=batch.robot)
    assert out.sentence.shape == out.seen.shape == (4, 32)


def policy_ids(policy: VLAPolicy, batch: Batch) -> torch.Tensor:
    return torch.cat([batch.ids, policy.tail_of(batch).expand(len(batch), -1)], 1)


@torch.inference_mode()
def test_a_row_says_alone_what_it_says_among_robots_of_other_cameras_and_longer_sentences(policy, mixture):
    said = ["go", "push the very very blue cube over there to the left side please", "lift", "stop now"]
    examples = [policy.encode(replace(mixture.window(n), instruction=text)) for n, text in enumerate(said)]
    batch = policy.collate(examples)
    together = policy.action_logits(batch)
    whole = policy.model.hidden(policy_ids(policy, batch), batch.images, batch.state, slots=batch.slots, robots=batch.robot)
    for row, example in enumerate(examples):
        alone = policy.collate([example])
        torch.testing.assert_close(together[row], policy.action_logits(alone)[0], rtol=1e-4, atol=1e-4)
        own = policy.model.hidden(policy_ids(policy, alone), alone.images, alone.state, slots=alone.slots, robots=alone.robot)
        for name in ("sentence", "seen"):
            torch.testing.assert_close(getattr(whole, name)[row], getattr(own, name)[0], rtol=1e-4, atol=1e-4)


def test_gradient_reaches_every_part(policy, mixture):
    fresh = VLAPolicy(policy.config, policy.model, policy.writer, policy.embodiments, policy.normalizers, policy.codec)
    learn(fresh, batch_of(fresh, mixture))
    fresh.eval()
    # FiLM begins at zero and so does what the text encoder adds: their inputs learn from the second step on.
    late = ("model.text.layers", "model.text.norm", "model.text.positions")
    silent = [n for n, p in fresh.named_parameters() if (p.grad is None or not p.grad.abs().sum() > 0) and not n.startswith(late)]
    assert silent == []
    reached = {n.split(".")[1] for n, p in fresh.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"tower", "text", "projector", "layers", "head"} <= reached
    fresh.zero_grad()


@torch.inference_mode()
def test_pictures_state_and_instruction_matter_from_the_start(policy, mixture):
    observation, robot = seen(mixture, next(n for n in range(9) if len(mixture.window(n).images) == 2))
    black = {name: np.zeros_like(picture) for name, picture in observation["images"].items()}

    def logits(observation, text="do thing 1", drop=False):
        return policy.action_logits(policy.collate([policy.encoder.observation(observation, text, robot, drop)]))

    base = logits(observation)
    assert base.std() > 0.05
    for changed in (logits(observation, "do thing 2"), logits(observation, "lift the blue cube"), logits(observation, drop=True),
                    logits(observation | {"images": black})):  # fmt: skip
        assert (changed - base).abs().max() > 1e-4


def test_cameras_are_told_apart(mixture):
    policy = make(mixture)
    both = next(n for n in range(9) if len(mixture.window(n).images) == 2)  # pyright: ignore
    batch = policy.collate([policy.encode(mixture.window(both))])
    learn(policy, batch)  # at first no camera is another; what is learned differs from the first step on
    places = policy.model.camera_positions
    assert not torch.equal(places.grad[0], places.grad[1]) and not places.grad[2:].any()
    with torch.inference_mode():
        places.add_(torch.randn_like(places))
        assert (policy.action_logits(replace(batch, slots=batch.slots.flip(0))) - policy.action_logits(batch)).abs().max() > 1e-3


def test_a_folder_comes_back_to_the_bit(policy, mixture, tmp_path):
    save_policy(policy, tmp_path / "policy")
    again = load_policy(tmp_path / "policy", "cpu")
    assert again.fingerprint == policy.fingerprint and isinstance(again.model, StudentNet)
    ours, theirs = policy.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    batch = batch_of(policy, mixture)
    with torch.inference_mode():
        assert torch.equal(policy.action_logits(batch), again.action_logits(batch))
    half = load_policy(tmp_path / "policy", "cpu", dtype=torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(half.action_logits(batch).float(), policy.action_logits(batch), rtol=0.1, atol=0.2)


def test_another_model_under_a_student_is_refused(mixture, tmp_path):
    save_policy(make(mixture), tmp_path / "policy")
    config = json.loads((tmp_path / "policy/config.json").read_text())
    llama = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8,
             "intermediate_size": 8, "num_key_value_heads": 1}  # fmt: skip
    (tmp_path / "policy/config.json").write_text(json.dumps({"architectures": config["architectures"]} | llama))
    with pytest.raises(CheckpointError):
        load_policy(tmp_path / "policy", "cpu")


SENTENCES = ["a", "?", "do thing 1", "x" * 512, "Grüße: nimm das Würfelchen", "立方体を押して", "ادفع المكعب", "🤖" * 50,
             "a\x00b\u202e", "<pad> <image> [act]"]  # fmt: skip


def test_any_instruction_acts(mixture):
    policy = make(mixture).eval()
    observation, robot = seen(mixture)
    chunks = policy.act_batch([observation] * len(SENTENCES), SENTENCES, robot)
    for chunk in chunks:
        assert chunk.actions.shape == (4, 4) and np.isfinite(chunk.actions).all() and np.isfinite(chunk.confidence).all()
    alone = policy.act(observation, SENTENCES[4], robot)
    np.testing.assert_allclose(alone.actions, chunks[4].actions, atol=1e-5)


def test_robots_added_later_change_nothing_for_the_known_ones(mixture, opened):
    first = Mixture(opened[:1], [1], 4, seed=0)
    policy = make(first, soft_tokens=2).eval()
    batch = batch_of(policy, first)
    with torch.inference_mode():
        before = policy.action_logits(batch)
    more = extend_policy(policy, mixture)
    assert set(more.embodiments) == {"tabletop", "other"} and more.model.config.num_robots == 2
    with torch.inference_mode():
        assert torch.equal(more.action_logits(batch), before)
    observation, _ = seen(mixture, next(n for n in range(9) if mixture.window(n).embodiment == "other"))
    assert np.isfinite(more.act(observation, "do thing 0", "other").actions).all()
    example = more.encoder.observation(observation, "do thing 0", "other")
    moved = more.collate([replace(example, robot=np.array(0, np.int64))])
    with torch.inference_mode():
        assert not torch.equal(more.action_logits(moved), more.action_logits(more.collate([example])))


def test_an_adapter_goes_on_a_student(mixture, tmp_path):
    policy = make(mixture)
    save_policy(policy, tmp_path / "base")
    adapt(policy, AdapterConfig(rank=2), {"kind": "policy", "path": str(tmp_path / "base")})
    learn(policy, batch_of(policy, mixture))
    save_policy(policy.eval(), tmp_path / "adapter")
    assert load_policy(tmp_path / "adapter", "cpu").fingerprint == policy.fingerprint


def test_what_a_student_cannot_do_is_refused(mixture):
    with pytest.raises(ValidationError, match="decoding: parallel"):
        make(mixture, decoding="autoregressive")
    with pytest.raises(ValidationError, match="multiple of patch"):
        make(mixture, {"image_size": 40})
    with pytest.raises(ValidationError, match="multiple of heads"):
        make(mixture, {"heads": 3})
    with pytest.raises(UsageError, match="MobileNet families"):
        make(mixture, {"tower": "resnet50"})
    with pytest.raises(UsageError, match="MobileNet families"):
        make(mixture, {"tower": "no such thing"})
    with pytest.raises(UsageError, match="pretrained weights"):
        make(mixture, {"pretrained": True})
    asking = SimpleNamespace(**vars(mixture) | {"answers": [("what is it?", "a cube")]})
    for refused in (lambda: make(asking), lambda: extend_policy(make(mixture), asking)):  # pyright: ignore
        with pytest.raises(UsageError, match="says actions and no words"):
            refused()
    policy = make(mixture).eval()
    with pytest.raises(UsageError, match="answers no questions"):
        policy.answer(None, "what is it?")
