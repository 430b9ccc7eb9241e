"""Pruned teachers: fewer layers of the teacher's own, in an ordinary policy folder."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_datasets import write_dataset

from tests.families import FAMILIES
from tests.prismatic_folder import TINY, write_tiny
from vla.cli import main
from vla.episodes import EpisodeStore
from vla.errors import MachineError, UsageError
from vla.mixture import Mixture
from vla.policy import AdapterConfig, PolicyConfig, VLAPolicy, build_policy, load_policy, save_policy
from vla.policy.adapters import adapt, quantize_base
from vla.policy.decoding import greedy_logits
from vla.students.depth import layers_of, prune_depth, quantize_weights

LAYERS = 5
Make = Callable[..., VLAPolicy]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Mixture:
    root = tmp_path_factory.mktemp("depth")
    write_dataset(root / "data", 3)
    return Mixture([EpisodeStore.open(root / "data", root / "cache", progress=False)], [1], 2, seed=0)


NANO = {"hidden": 32, "layers": LAYERS, "heads": 2, "mlp": 64, "tower_channels": (8, 8, 16), "keypoints": 8, "text_vocab": 320}


def backbone(kind: str, root: Path) -> dict:
    if kind == "nano":
        return NANO
    if kind == "prismatic":
        write_tiny(root / kind, sizes=TINY | {"text": TINY["text"] | {"layers": LAYERS}})
        return {"kind": "prismatic", "path": str(root / kind)}
    import tests.families as families

    text, saved = families.TEXT, dict(families.TEXT)
    text["num_hidden_layers"] = LAYERS
    try:
        FAMILIES[kind](root / kind)
    finally:
        text.update(saved)
    return {"kind": "hf", "path": str(root / kind), "image_size": 32}


@pytest.fixture(scope="module", params=["nano", "SmolVLM", "Qwen2.5-VL", "prismatic"])
def make(request, mixture, tmp_path_factory) -> Make:
    root = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    said = backbone(request.param, root)

    def fresh(**settings) -> VLAPolicy:
        torch.manual_seed(1)
        config = {"backbone": said, "chunk": 2, "execute": 1, "decoding": "autoregressive", "decode": "argmax", **settings}
        return build_policy(PolicyConfig.model_validate(config), mixture).eval()

    return fresh


def batch_of(policy: VLAPolicy, mixture: Mixture):
    return policy.collate([policy.encode(mixture.window(n)) for n in range(3)])


def observation(mixture: Mixture) -> dict:
    window = mixture.window(0)
    return {"images": window.images, "state": window.state}  # pyright: ignore


def test_kept_layers_are_the_teachers_and_the_folder_comes_back(make, mixture, tmp_path):
    teacher, policy = make(), make()
    fingerprint, count = policy.fingerprint, len(layers_of(policy)[1])
    assert count == LAYERS
    assert prune_depth(policy, every=2) is policy
    kept = policy.provenance["pruned"][-1]
    assert kept == {"layers": LAYERS, "kept": [0, 2, 4], "from": fingerprint} and policy.fingerprint != fingerprint
    ours, theirs = layers_of(policy)[1], layers_of(teacher)[1]
    assert len(ours) == 3
    for mine, number in zip(ours, [0, 2, 4], strict=True):
        for (name, a), (_, b) in zip(mine.named_parameters(), theirs[number].named_parameters(), strict=True):
            assert torch.equal(a, b), name
    shared = {n: p for n, p in policy.named_parameters() if ".layers." not in n}
    whole = dict(teacher.named_parameters())
    assert shared and all(torch.equal(p, whole[n]) for n, p in shared.items())
    # Over a cache it says what it says in one pass, given what was said.
    batch = batch_of(policy, mixture)
    with torch.inference_mode():
        steps = greedy_logits(policy, batch, 4)
        told = type(batch)(**{**batch.__dict__, "symbols": steps.argmax(-1), "hidden": torch.zeros_like(batch.hidden)})
        torch.testing.assert_close(policy.action_logits(told), steps, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(policy.action_logits(batch), teacher.action_logits(batch), atol=1e-3)
    chunk = policy.act(observation(mixture), "do thing 1")
    save_policy(policy, tmp_path / "pruned")
    again = load_policy(tmp_path / "pruned", "cpu")
    assert again.fingerprint == policy.fingerprint and again.config.backbone.kind == teacher.config.backbone.kind
    assert len(layers_of(again)[1]) == 3
    with torch.inference_mode():
        torch.testing.assert_close(again.action_logits(batch), policy.action_logits(batch), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(again.act(observation(mixture), "do thing 1").actions, chunk.actions, atol=1e-5)
    # And again: what was left out adds up in its papers.
    assert [p["kept"] for p in prune_depth(again, keep=[0]).provenance["pruned"]] == [[0, 2, 4], [0, 2]]


def test_a_pruned_teacher_learns_with_an_adapter_on_int8(make, mixture, tmp_path):
    policy = prune_depth(make(decoding="parallel"), every=3)
    save_policy(policy, tmp_path / "base")
    policy = load_policy(tmp_path / "base", "cpu")
    config = AdapterConfig(rank=2, quantize="int8")
    adapt(policy, config, {"kind": "policy", "path": str(tmp_path / "base")}).train()
    learned = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.1)
    losses = []
    for _ in range(3):
        loss = policy.loss(batch_of(policy, mixture))
        total = loss.total(policy.loss_weights, loss.counts)
        total.backward()
        losses.append(total.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    save_policy(policy.eval(), tmp_path / "adapter")
    chunk = policy.act(observation(mixture), "do thing 1")
    again = load_policy(tmp_path / "adapter", "cpu")
    np.testing.assert_allclose(again.act(observation(mixture), "do thing 1").actions, chunk.actions, atol=1e-4)


def test_weights_in_eight_bits_act_alike(make, mixture):
    policy = prune_depth(make(decoding="parallel"), every=2)
    batch = batch_of(policy, mixture)
    with torch.inference_mode():
        before = policy.action_logits(batch)
        after = quantize_weights(policy, "int8").action_logits(batch)
    assert 0 < (after - before).abs().max() < 0.2 * before.abs().max()
    if not torch.cuda.is_available():
        with pytest.raises(MachineError, match="int4"):
            quantize_base(make(), AdapterConfig(quantize="int4", targets=("q_proj", "fc", "proj")))


def test_what_cannot_be_pruned_is_refused(mixture, tmp_path):
    def nano(**more) -> VLAPolicy:
        return build_policy(PolicyConfig.model_validate({"backbone": NANO | more, "chunk": 2, "execute": 1}), mixture)

    policy = nano()
    for wrong, words in (({}, "neither"), ({"every": 2, "keep": [1]}, "both"), ({"every": 1}, "fewer layers"),
                         ({"keep": [7]}, "layers 0 to 4"), ({"keep": range(5)}, "fewer layers")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            prune_depth(policy, **wrong)  # pyright: ignore
    with pytest.raises(UsageError, match="the first and the last stay"):
        prune_depth(nano(layers=2), every=2)
    adapted = adapt(nano(), AdapterConfig(rank=2), {"kind": "policy", "path": "x"})
    with pytest.raises(UsageError, match="merge it first"):
        prune_depth(adapted, every=2)
    small = {"kind": "student", "image_size": 32, "patch": 16, "channels": (8, 8, 16), "hidden": 32, "layers": 3, "heads": 2,
             "mlp": 64, "text_vocab": 320}  # fmt: skip
    with pytest.raises(UsageError, match="a student"):
        prune_depth(build_policy(PolicyConfig.model_validate({"backbone": small}), mixture), every=2)


def test_a_family_whose_layers_share_is_refused(mixture, tmp_path):
    torch.manual_seed(0)
    FAMILIES["Gemma 4"](tmp_path / "m")
    config = {"backbone": {"kind": "hf", "path": str(tmp_path / "m"), "image_size": 32}, "chunk": 2, "execute": 1,
              "decoding": "autoregressive"}  # fmt: skip
    policy = build_policy(PolicyConfig.model_validate(config), mixture)
    with pytest.raises(UsageError, match="num_kv_shared_layers"):
        prune_depth(policy, every=2)
    assert len(layers_of(policy)[1]) == 4


def test_the_command(mixture, tmp_path, capsys):
    policy = build_policy(PolicyConfig.model_validate({"backbone": NANO, "chunk": 2, "execute": 1}), mixture)
    save_policy(policy, tmp_path / "teacher")
    out = tmp_path / "half"
    assert main(["prune", str(tmp_path / "teacher"), "--every", "2", "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kept"] == [0, 2, 4] and facts["parameters"] < facts["before"]
    assert len(layers_of(load_policy(out, "cpu"))[1]) == 3
    assert main(["prune", str(tmp_path / "teacher"), "--every", "2", "--out", str(out)]) == 2
    assert "something there already" in capsys.readouterr().err
    file = tmp_path / "teacher" / "policy.json"
    assert main(["prune", str(tmp_path / "teacher"), "--every", "2", "--out", str(file / "x")]) == 2
    assert f"{file} is a file" in capsys.readouterr().err
    other = tmp_path / "other"
    assert main(["prune", str(tmp_path / "teacher"), "--keep", "1", "--bf16", "--out", str(other)]) == 0
    assert "layers 0, 1, 4 of 5" in capsys.readouterr().out
