"""`vla export --to openvla`: what another program finds, and what comes back when it is read again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from prismatic_folder import TINY, layout, statistics, write_oft, write_tiny
from safetensors import safe_open
from safetensors.torch import load_file

from vla.cli import main
from vla.errors import UsageError
from vla.export import export_openvla
from vla.policy import load_policy
from vla.policy.openvla import read_openvla


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for name in sorted(set(index["weight_map"].values())):
        part = load_file(folder / name)
        assert all(index["weight_map"][k] == name for k in part)
        found |= part
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["openvla-7b", "openvla-v01"])
def exported(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    stats = {"bridge_orig": statistics(proprio=7), "kuka": statistics(seed=1)}
    tensors = write_tiny(root / "raw", fused=request.param, dtype=torch.bfloat16, norm_stats=stats)
    policy = read_openvla(root / "raw")
    export_openvla(policy, root / "out", shard_bytes=40_000)
    return root, policy, tensors, request.param, stats


def test_names_and_shapes_are_the_tables(exported):
    root, _, tensors, fused, _ = exported
    found = tensors_in(root / "out")
    assert {k: tuple(v.shape) for k, v in found.items()} == layout(TINY, 704, fused)
    assert all(torch.equal(found[k], v) and v.dtype == torch.bfloat16 for k, v in tensors.items())
    assert len(list((root / "out").glob("model-*.safetensors"))) > 2
    with safe_open(next((root / "out").glob("model-*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_read_again_it_is_the_same(exported):
    root, policy, _, _, stats = exported
    again = load_policy(root / "out", device="cpu")
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in policy.model.state_dict().items())
    assert again.config.prompt == policy.config.prompt
    look = {"images": {"image": np.random.default_rng(3).integers(0, 256, (40, 30, 3), dtype=np.uint8)}}
    for key in policy.embodiments:
        one, two = (p.act(look, "push it", key) for p in (policy, again))
        assert np.array_equal(one.actions, two.actions)
        assert policy.normalizers[key]["action"].fingerprint == again.normalizers[key]["action"].fingerprint
    assert json.loads((root / "out" / "dataset_statistics.json").read_text()) == stats
    export_openvla(again, root / "twice", shard_bytes=40_000)
    names = sorted(p.name for p in (root / "out").iterdir())
    assert names == sorted(p.name for p in (root / "twice").iterdir())
    assert [n for n in names if (root / "out" / n).read_bytes() != (root / "twice" / n).read_bytes()] == []


def test_what_the_original_client_and_vllm_look_for(exported):
    root, _, _, fused, stats = exported
    config = json.loads((root / "out" / "config.json").read_text())
    before = json.loads((root / "raw" / "config.json").read_text())
    assert "auto_map" not in config and config["norm_stats"] == stats
    for key in ("model_type", "architectures", "vision_backbone_id", "llm_backbone_id", "arch_specifier", "timm_model_ids",
                "timm_override_act_layers", "image_sizes", "use_fused_vision_backbone", "image_resize_strategy", "hf_llm_id",
                "llm_max_length", "pad_token_id", "pad_to_multiple_of", "n_action_bins", "output_projector_states", "torch_dtype",
                ):  # fmt: skip
        assert config[key] == before[key], key
    text = config["text_config"]
    assert {k: text[k] for k in before["text_config"]} == before["text_config"]
    assert (text["rms_norm_eps"], text["rope_theta"], text["max_position_embeddings"]) == (1e-6, 10000.0, 2048)
    images = json.loads((root / "out" / "preprocessor_config.json").read_text())
    was = json.loads((root / "raw" / "preprocessor_config.json").read_text())
    assert {k: images[k] for k in was} == was
    assert images["tvf_resize_params"][0] == {"antialias": True, "interpolation": 3, "max_size": None, "size": [28, 28]}
    for name in ("tokenizer.json", "added_tokens.json"):
        assert (root / "out" / name).read_bytes() == (root / "raw" / name).read_bytes()
    special = json.loads((root / "out" / "tokenizer_config.json").read_text())
    assert special["tokenizer_class"] == "LlamaTokenizer" and "auto_map" not in special
    assert not list((root / "out").glob("*.py")) and fused == config["use_fused_vision_backbone"]


def test_all_that_does_not_fit_is_said_at_once(tmp_path):
    write_oft(tmp_path / "oft", film=False)
    policy = read_openvla(tmp_path / "oft", oft="libero")
    with pytest.raises(UsageError) as caught:
        export_openvla(policy, tmp_path / "out")
    for part in ("decoding: parallel", "head: l1", "chunk: 8", "state: token", "2 cameras"):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_verb(tmp_path, capsys):
    write_tiny(tmp_path / "raw")
    assert main(["export", str(tmp_path / "raw"), "--to", "policy", "--crop", "0.9", "--out", str(tmp_path / "policy")]) == 0
    policy = load_policy(tmp_path / "policy", device="cpu")
    assert policy.writer.image.crop == 0.9 and policy.config.backbone.kind == "prismatic"
    capsys.readouterr()
    assert main(["export", str(tmp_path / "policy"), "--to", "openvla", "--out", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert "model.safetensors" in said["files"] and said["bytes"] > 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == (tmp_path / "raw" / "model.safetensors").stat().st_size
    assert main(["export", str(tmp_path / "policy"), "--to", "openvla", "--out", str(tmp_path / "out")]) == 2
    assert "new or empty" in capsys.readouterr().err
    write_oft(tmp_path / "oft", film=False)
    assert main(["export", str(tmp_path / "oft"), "--to", "policy", "--out", str(tmp_path / "p2")]) == 2
    assert main(["export", str(tmp_path / "oft"), "--to", "policy", "--oft", "libero", "--out", str(tmp_path / "p2")]) == 0
    again = load_policy(tmp_path / "p2", device="cpu")
    look = {"images": dict.fromkeys(("full_image", "wrist_image"), np.zeros((30, 40, 3), np.uint8)),
            "state": np.zeros(8, np.float32)}  # fmt: skip
    assert again.act(look, "push it").actions.shape == (8, 7)
