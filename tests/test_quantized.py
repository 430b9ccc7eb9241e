"""Frozen weights in fewer bits: an adapter learns over them, acts, comes back, and is merged into the whole numbers."""

import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from children import LIMIT
from torch import nn

from tests.test_policy import make, mixture, observation  # noqa: F401
from vla.errors import CheckpointError, MachineError
from vla.merge import _logits, _some_batch
from vla.merge import run as merge_command
from vla.policy import AdapterConfig, load_policy, save_policy
from vla.policy.adapters import adapt, base_fingerprint, merge
from vla.policy.quantized import quantize

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


@pytest.fixture
def base(mixture, tmp_path):  # noqa: F811
    wide = {"hidden": 64, "layers": 2, "heads": 2, "mlp": 128, "tower_channels": (8, 8, 16), "keypoints": 8, "text_vocab": 320}
    save_policy(make(mixture, backbone=wide), tmp_path / "base")
    return tmp_path / "base"


def stored(module: nn.Module) -> int:
    """Bytes the frozen layers' numbers take, scales included."""
    total = 0
    for name, p in module.named_parameters():
        if not p.requires_grad and name.endswith("weight") and p.ndim == 2:
            inner = [getattr(p, n) for n in ("qdata", "scale") if isinstance(getattr(p, n, None), torch.Tensor)]
            state = getattr(p, "quant_state", None)
            inner += [] if state is None else [p.data, state.absmax]
            total += sum(t.numel() * t.element_size() for t in inner or [p])
    return total


@pytest.mark.parametrize(("how", "share", "error"), [("int8", 0.3, 0.02), ("nf4", 0.2, 0.25)])
def test_an_adapter_learns_over_fewer_bits(base, mixture, tmp_path, how, share, error):  # noqa: F811
    pytest.importorskip(PACKAGES[how])
    whole = load_policy(base, "cpu")
    fingerprint, batch = base_fingerprint(whole), _some_batch(whole)
    with torch.inference_mode():
        expected = _logits(whole, batch)
    place = {"kind": "policy", "path": str(base)}
    plain = adapt(load_policy(base, "cpu"), AdapterConfig(rank=4), place)
    policy = adapt(load_policy(base, "cpu"), AdapterConfig(rank=4, quantize=how), place)
    # The fingerprint is of the whole numbers, the memory that of the few, the answers nearly the base's.
    assert policy.adapter.base["fingerprint"] == fingerprint
    small = stored(policy.model.language_model.layers)
    assert small < share * stored(plain.model.language_model.layers), (small, stored(plain.model.language_model.layers))
    with torch.inference_mode():
        off = (_logits(policy.eval(), batch) - expected).abs().max() / expected.abs().max()
    assert 0 < off < error
    # It has acted; it still learns, and gradients pass through the quantized layers to what lies below them.
    optimizer = torch.optim.SGD([p for p in policy.train().parameters() if p.requires_grad], lr=0.3)
    losses = []
    for _ in range(8):
        loss = policy.loss(policy.collate([policy.encode(mixture.window(n)) for n in range(4)]))
        optimizer.zero_grad()
        loss.total(policy.loss_weights, loss.counts).backward()
        losses.append(loss.action.item())
        lowest = policy.model.language_model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad
        assert lowest is not None and lowest.abs().sum() > 0
        optimizer.step()
    assert losses[-1] < losses[0]
    chunk = policy.eval().act(observation(mixture), "touch the red cube", "tabletop")
    save_policy(policy, tmp_path / "adapter")
    assert not (tmp_path / "adapter/model.safetensors").exists()
    again = load_policy(tmp_path / "adapter", "cpu")
    np.testing.assert_array_equal(again.act(observation(mixture), "touch the red cube", "tabletop").actions, chunk.actions)
    # What is quantized is not merged; what is merged is the whole base.
    with pytest.raises(CheckpointError, match="unquantized=True"):
        merge(policy, lambda p: _logits(p, batch), "adapter")
    over = load_policy(tmp_path / "adapter", "cpu", unquantized=True)
    assert over.adapter.config.quantize == "none" and type(over.model.language_model.norm.weight) is nn.Parameter
    with torch.inference_mode():
        before = _logits(over, batch)
    out = tmp_path / "merged"
    asked = Namespace(policy=str(tmp_path / "adapter"), out=str(out), base=None, bf16=False, json=True)
    assert merge_command(asked) == 0
    with torch.inference_mode():
        torch.testing.assert_close(_logits(load_policy(out, "cpu"), batch), before, rtol=1e-3, atol=1e-3)


def test_int4_on_a_cpu_is_refused_with_what_works_there(base):
    pytest.importorskip("torchao")
    policy = load_policy(base, "cpu")
    linear = nn.Sequential(nn.Linear(128, 8))
    with pytest.raises(MachineError, match="no int4 kernel") as error:
        quantize(linear, "int4", ["0"])
    assert "quantize=nf4" in error.value.fix and type(linear[0].weight) is nn.Parameter
    with pytest.raises(MachineError, match="int4"):
        adapt(policy, AdapterConfig(quantize="int4"), {"kind": "policy", "path": str(base)})


@pytest.mark.parametrize(("how", "package"), [("int8", "torchao.quantization"), ("nf4", "bitsandbytes")])
def test_a_missing_package_is_named(monkeypatch, how, package):
    monkeypatch.setitem(sys.modules, package, None)
    linear = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(MachineError, match=r"tendon-vla\[quant\]"):
        quantize(linear, how, ["0"])


def test_only_the_named_layers_change():
    pytest.importorskip("torchao")
    module = nn.ModuleDict({"one": nn.Linear(64, 64), "two": nn.Linear(64, 64), "norm": nn.LayerNorm(64)})
    quantize(module, "int8", ["one", "norm"])
    assert hasattr(module["one"].weight, "qdata") and type(module["two"].weight) is nn.Parameter


def test_native_code_is_not_fetched_where_the_package_for_it_is_installed(tmp_path):
    """bitsandbytes asks `kernels` for code from the Hub while peft imports it."""
    pytest.importorskip("bitsandbytes")
    (tmp_path / "kernels.py").write_text("def get_kernel(*a, **k):\n    print('FETCHED')\n    raise OSError\n")
    code = "import sys; sys.path.insert(0, sys.argv[1])\nimport vla.policy, bitsandbytes, kernels\nprint('there', kernels)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert "there" in done.stdout and "FETCHED" not in done.stdout and not done.stderr.strip()
