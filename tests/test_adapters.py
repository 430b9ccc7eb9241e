"""An adapted policy: starts as its base, brings only what it trained, refuses every other base, merges once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from children import LIMIT
from safetensors.torch import load_file, save_file

from tests.test_policy import make, mixture, observation  # noqa: F401
from vla.backbones.prismatic_model import PrismaticModelConfig, PrismaticVLM
from vla.errors import CheckpointError, UsageError
from vla.merge import _logits, _some_batch
from vla.policy import AdapterConfig, load_policy, save_policy
from vla.policy.adapters import adapt, lora_config, merge, target_modules


@pytest.fixture
def base(mixture, tmp_path):  # noqa: F811
    save_policy(make(mixture), tmp_path / "base")
    return tmp_path / "base"


def trained(base: Path, seed: int = 0, **settings):
    """An adapter on the policy of `base` that has learned something: noise on all it may train."""
    policy = load_policy(base, "cpu")
    torch.manual_seed(seed)
    adapt(policy, AdapterConfig(rank=4, **settings), {"kind": "policy", "path": str(base)})
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return policy.eval()


@pytest.mark.parametrize("settings", [{}, {"targets": "all"}, {"targets": "openvla"}, {"dora": True}, {"rslora": True},
                                      {"targets": "attention", "init": "gaussian"}])  # fmt: skip
def test_a_fresh_adapter_changes_nothing_and_a_saved_one_comes_back(base, tmp_path, settings):
    plain = load_policy(base, "cpu")
    batch = _some_batch(plain)
    fresh = adapt(load_policy(base, "cpu"), AdapterConfig(rank=4, **settings), {"kind": "policy", "path": str(base)})
    torch.testing.assert_close(_logits(fresh, batch), _logits(plain, batch), rtol=0, atol=1e-5)
    policy = trained(base, **settings)
    expected = _logits(policy, batch)
    assert not torch.allclose(expected, _logits(plain, batch), atol=1e-3)
    save_policy(policy, tmp_path / "adapter")
    again = load_policy(tmp_path / "adapter", "cpu")
    assert torch.equal(_logits(again, batch), expected) and again.fingerprint == policy.fingerprint
    assert not (tmp_path / "adapter/model.safetensors").exists()
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(policy.adapter.trained)


def test_gradients_reach_the_adapter_alone(base, mixture):  # noqa: F811
    policy = trained(base).train()
    policy.loss(policy.collate([policy.encode(mixture.window(0))])).action.backward()
    moved = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("lora_A" in n for n in moved) and any("lora_B" in n for n in moved) and "model.lm_head.weight" in moved
    assert moved <= set(policy.adapter.trained)


def test_the_matrices_are_readable_by_peft(base, tmp_path):
    policy = trained(base)
    save_policy(policy, tmp_path / "adapter")
    plain = load_policy(base, "cpu")
    theirs = peft.PeftModel.from_pretrained(plain.model, tmp_path / "adapter")
    mine = dict(policy.model.named_parameters())
    for name, tensor in theirs.base_model.model.named_parameters():  # pyright: ignore
        if "lora_" in name:
            assert torch.equal(tensor, mine[name]), name


def test_another_base_is_refused(base, tmp_path, mixture):  # noqa: F811
    save_policy(trained(base), tmp_path / "adapter")
    torch.manual_seed(7)
    save_policy(make(mixture, execute=2), tmp_path / "other")
    other = load_policy(tmp_path / "other", "cpu")
    with torch.no_grad():
        other.model.projector[0].weight[0, 0] += 1e-3  # as little as that
    save_policy(other, tmp_path / "other")
    with pytest.raises(CheckpointError, match="which this adapter was trained on"):
        load_policy(tmp_path / "adapter", "cpu", base=tmp_path / "other")
    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError):
        load_policy(tmp_path / "adapter", "cpu")
    assert load_policy(tmp_path / "adapter", "cpu", base=tmp_path / "moved").adapter is not None


def test_what_does_not_fit_is_named_all_at_once(base, tmp_path):
    save_policy(trained(base), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    first, second = sorted(tensors)[:2]
    tensors["base_model.model.nowhere.lora_A.weight"] = tensors.pop(first)
    tensors[second] = tensors[second][:1].contiguous()
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as error:
        load_policy(tmp_path / "adapter", "cpu")
    assert all(word in str(error.value) for word in (f"{first} missing", "nowhere.lora_A.weight unknown", f"{second} is (1,"))


def test_statistics_are_the_adapters_own_and_missing_ones_are_refused(base, tmp_path):
    policy = trained(base)
    save_policy(policy, tmp_path / "adapter")
    path = tmp_path / "adapter/policy.json"
    meaning = json.loads(path.read_text())
    del meaning["normalizers"]
    path.write_text(json.dumps(meaning))
    with pytest.raises(CheckpointError, match="normalizers"):
        load_policy(tmp_path / "adapter", "cpu")


@pytest.mark.parametrize("settings", [{}, {"targets": "all"}, {"targets": "openvla"}, {"dora": True}])
def test_merging_happens_once_and_changes_no_answer(base, tmp_path, settings):
    policy = trained(base, **settings)
    batch, expected = _some_batch(policy), None
    expected = _logits(policy, batch)
    assert merge(policy, lambda p: _logits(p, batch), "adapter") < 1e-3
    save_policy(policy, tmp_path / "merged")
    whole = load_policy(tmp_path / "merged", "cpu")
    assert whole.adapter is None and not any("lora" in n for n, _ in whole.named_parameters())
    torch.testing.assert_close(_logits(whole, batch), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(CheckpointError, match="merged already"):
        merge(whole, lambda p: _logits(p, batch), "merged")


def test_a_merge_that_would_change_the_policy_is_refused(base):
    policy, calls = trained(base), iter([torch.zeros(3), torch.ones(3)])
    with pytest.raises(CheckpointError, match="differ by"):
        merge(policy, lambda p: next(calls), "adapter")


def test_targets_that_are_nowhere_are_refused(base):
    with pytest.raises(UsageError, match=r"adapter\.targets"):
        adapt(load_policy(base, "cpu"), AdapterConfig(targets=("no_such_layer",)), {"kind": "policy", "path": str(base)})
    policy = trained(base)
    with pytest.raises(UsageError, match="has one already"):
        adapt(policy, AdapterConfig(), {"kind": "policy", "path": str(base)})


@pytest.mark.parametrize(("recipe", "published"), [("openvla", 110_828_288), ("all-linear", 109_563_904)])
def test_openvlas_recipe_has_its_published_number_of_parameters(recipe, published):
    """On the true 7B layout, without a byte of it, at rank 32. Modern peft's all-linear leaves head and convolutions out."""
    with torch.device("meta"):
        model = PrismaticVLM(PrismaticModelConfig())
        names = target_modules(model, recipe)
        peft.inject_adapter_in_model(lora_config(AdapterConfig(rank=32), names), model, "default", low_cpu_mem_usage=True)
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == published


def test_training_an_adapter_resumes_to_the_bit(base, mixture, tmp_path):  # noqa: F811
    """Killed after its third step and resumed, a run ends with the very tensors of one that was left alone."""
    values = {"mixture": {"datasets": [{"path": str(s.root)} for s in mixture.stores], "holdout": 0},
              "start": {"policy": str(base)}, "adapter": {"rank": 2},
              "optim": {"batch": 4, "warmup": 1}}  # fmt: skip
    ends = []
    for name in ("whole", "cut"):
        out = tmp_path / name
        run = {"out": str(out), "steps": 6, "save_every": 3, "eval_every": 100, "processes": 1}
        config = tmp_path / f"{name}.yaml"
        config.write_text(json.dumps({**values, "run": run}))
        command = [sys.executable, "-m", "vla.cli", "train", str(config), "--no-check"]
        subprocess.run(command, check=True, capture_output=True, timeout=LIMIT)
        if name == "cut":
            shutil.rmtree(out / "checkpoints/step_00000006")
            subprocess.run([*command, "--resume"], check=True, capture_output=True, timeout=LIMIT)
        ends.append(load_file(out / "checkpoints/step_00000006/state.safetensors"))
        assert load_policy(out, "cpu").adapter is not None
    assert ends[0].keys() == ends[1].keys() and any("lora_B" in name for name in ends[0])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
