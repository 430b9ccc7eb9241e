"""OpenVLA's folders on disk: what is refused and how it is said, memory while reading, torch's files without their pickle."""

from __future__ import annotations

import io
import json
import logging
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from children import LIMIT
from prismatic_folder import TINY, statistics, tokenizer_of, write_oft, write_tiny
from safetensors.torch import load_file, save_file

from vla.backbones import PrismaticConfig, Sizes
from vla.backbones.prismatic import build
from vla.backbones.prismatic_zip import read_torch_zip
from vla.errors import CheckpointError, UsageError
from vla.policy import load_policy
from vla.policy.openvla import read_openvla

SIZES = Sizes(symbols=256, slots=7, state=0, robots=1, soft_tokens=0, state_token=False, end_token=False)


def edit(folder: Path, **changes: object) -> None:
    """Change fields of config.json; None takes one away."""
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_policy(folder, device="cpu")
    return str(caught.value)


# --- whole, or refused -----------------------------------------------------------------------------------------------


def test_every_difference_between_config_and_weights_is_said_at_once(tmp_path):
    write_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["projector.fc2.bias"], tensors["vision_backbone.featurizer.blocks.0.ls1.scale_factor"]
    tensors["language_model.model.norm.weight"] = torch.zeros(31)
    tensors["language_model.model.extra"] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors")
    said = refused(tmp_path)
    for part in ("2 missing", "projector.fc2.bias", "ls1.scale_factor", "1 unexpected", "model.extra", "1 of another shape",
                 "model.norm.weight: (31,) instead of (32,)"):  # fmt: skip
        assert part in said


def test_truncated_and_missing_shards_are_named_with_their_bytes(tmp_path):
    write_tiny(tmp_path, shards=3)
    names = sorted(p.name for p in tmp_path.glob("model-*.safetensors"))
    data = (tmp_path / names[1]).read_bytes()
    (tmp_path / names[1]).write_bytes(data[:-1000])
    (tmp_path / names[2]).unlink()
    said = refused(tmp_path)
    assert f"{names[1]}: expected {len(data)} bytes, found {len(data) - 1000}" in said
    assert f"{names[2]}: No such file" in said and names[0] not in said
    (tmp_path / names[1]).write_bytes(data[:40])
    assert f"{names[1]}: expected at least" in refused(tmp_path)


@pytest.mark.parametrize(
    "header",
    [b"{", b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"[]", b'{"a": 3}'],
)  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path, header):
    write_tiny(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    assert "model.safetensors" in refused(tmp_path)


def test_an_index_cannot_lead_elsewhere(tmp_path):
    write_tiny(tmp_path / "one", shards=2)
    path = tmp_path / "one" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    path.write_text(json.dumps(index))
    assert "weight_map" in refused(tmp_path / "one")


def test_pickled_weights_are_not_opened(tmp_path):
    write_tiny(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(tmp_path)


@pytest.mark.parametrize("found", [None, {}, {"bridge_orig": {}}, {"bridge_orig": {"action": {"q01": [0.0] * 7}}},
                                   {"bridge_orig": {"action": {"q01": [0.0] * 7, "q99": [float("nan")] * 7}}}])  # fmt: skip
def test_missing_statistics(tmp_path, found):
    write_tiny(tmp_path)
    edit(tmp_path, norm_stats=found)
    assert "missing statistics" in refused(tmp_path)


def test_a_fine_tuned_folders_own_statistics(tmp_path):
    write_tiny(tmp_path)
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"mine": statistics()}))
    assert list(load_policy(tmp_path, device="cpu").embodiments) == ["mine"]


def test_the_wrong_vocabulary(tmp_path):
    write_tiny(tmp_path / "padded")
    edit(tmp_path / "padded", pad_to_multiple_of=0)
    said = refused(tmp_path / "padded")
    assert "640 pieces" in said and "expected: 704 pieces" in said and "shifts every bin" in said
    write_tiny(tmp_path / "other")
    tokenizer_of(700).save(str(tmp_path / "other" / "tokenizer.json"))
    assert "700 pieces" in refused(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refused(tmp_path / "other")


@pytest.mark.parametrize("change", [{"image_resize_strategy": "letterbox"}, {"text_config": None}, {"timm_model_ids": ["x", "y"]},
                                    {"use_fused_vision_backbone": False}, {"image_sizes": [28, 42]}])  # fmt: skip
def test_what_is_not_supported_is_said(tmp_path, change):
    write_tiny(tmp_path)
    edit(tmp_path, **change)
    assert str(next(iter(change))).split("_")[0] in refused(tmp_path) or "towers" in refused(tmp_path)


def test_remote_code_is_named_once_and_never_run(tmp_path, caplog):
    write_tiny(tmp_path / "folder")
    proof = tmp_path / "ran"
    for name in ("modeling_prismatic", "configuration_prismatic", "processing_prismatic"):
        (tmp_path / "folder" / f"{name}.py").write_text(f"open({str(proof)!r}, 'w')\nraise SystemExit\n")
    with caplog.at_level(logging.WARNING):
        load_policy(tmp_path / "folder", device="cpu")
    said = [r.getMessage() for r in caplog.records if "remote code" in r.getMessage()]
    assert len(said) == 1 and "auto_map" in said[0] and "modeling_prismatic.py" in said[0]
    assert not proof.exists() and not [m for m in sys.modules if "modeling_prismatic" in m]


def test_attention_without_masks_is_refused(tmp_path):
    write_tiny(tmp_path)
    with pytest.raises(UsageError, match="flash_attention_2"):
        build(PrismaticConfig(kind="prismatic", path=str(tmp_path), attention="flash_attention_2"), SIZES)


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="somebody/nothing"):
        read_openvla("somebody/nothing")


# --- memory ----------------------------------------------------------------------------------------------------------

READ = """
import resource, sys, torch
torch.set_num_threads(1)
from vla.backbones.prismatic_files import empty_model, read_config, read_weights
def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
from pathlib import Path
folder = Path(sys.argv[1])
warm = torch.empty(4_000_000).normal_()  # whatever torch allocates once, before counting
del warm
model = empty_model(read_config(folder))
before = memory()
read_weights(model, folder, None, getattr(torch, sys.argv[2]) if len(sys.argv) > 2 else None)
after = memory()
print(after - before, sum(p.nbytes for p in model.parameters()), max(p.numel() for p in model.parameters()))
"""


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_reading_never_holds_more_than_the_weights_and_one_tensor(tmp_path, dtype):
    """About 200 MB in five shards, in a process of its own: the peak while reading, against the weights."""
    sizes = TINY | {"text": dict(width=1024, mlp=4096, layers=5, heads=8)}
    write_tiny(tmp_path, shards=5, sizes=sizes, vocab=9000, dtype=torch.bfloat16)
    stored = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert stored > 180_000_000
    command = [sys.executable, "-c", READ, str(tmp_path), *([dtype] if dtype else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    grown, weights, largest = map(int, done.stdout.split())
    assert weights == pytest.approx(stored * (2 if dtype else 1), rel=0.01)
    slack = 12_000_000  # malloc's and Python's own
    # Converted, tensors pass through room for the largest, as stored.
    assert grown <= weights + (2 * largest if dtype else 0) + slack, f"{grown:,} for {weights:,} and one of {2 * largest:,}"


# --- torch's files ---------------------------------------------------------------------------------------------------


def rewrite(path: Path, change) -> None:
    """The zip at `path` with `change(name, data) -> data` applied to each entry, stored as they were."""
    with zipfile.ZipFile(path) as archive:
        entries = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def test_torchs_own_files_are_read_to_the_bit(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    table = module.state_dict()  # an OrderedDict with versions attached
    base = torch.arange(24.0).reshape(4, 6)
    table |= {"view": base[1:, ::2], "same": base.T, "half": torch.ones(3).bfloat16(), "none": torch.zeros(0, 2),
              "one": torch.tensor(5), "parameter": torch.nn.Parameter(torch.ones(2))}  # fmt: skip
    for kind, content in (("ordered", module.state_dict()), ("plain", dict(table))):
        path = tmp_path / f"{kind}.pt"
        torch.save(content, path)
        read = read_torch_zip(path)
        assert list(read) == list(content)
        assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in content.items())


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def malicious(tmp_path: Path) -> dict[str, bytes]:
    """Pickles that would do something, or pretend to be tensors."""
    proof = tmp_path / "ran"
    evil = pickle.dumps({"a": Evil(proof)}, protocol=2)
    return {
        "a call": evil,
        "an old call": f"cos\nsystem\n(S'touch {proof}'\ntR.".encode(),
        "a call at the end": pickle.dumps({"a": 1}, protocol=2)[:-1] + b"0" + pickle.dumps(Evil(proof), protocol=2)[2:],
        "a new call": pickle.dumps({"a": Evil(proof)}, protocol=4),
        "an instance": b"(S'x'\nios\nsystem\n.",
        "an object": pickle.dumps(Path("x"), protocol=2),
        "a builder": b"\x80\x02ccollections\nOrderedDict\n)R}(U\x01xcos\nsystem\nub.",
        "its own class": b"\x80\x02ctorch\n_utils._rebuild_tensor_v2\n)R.",
        "not a table": pickle.dumps([1, 2, 3], protocol=2),
        "not a tensor": pickle.dumps({"a": 1}, protocol=2),
        "no end": b"\x80\x02}",
        "nothing": b"",
        "noise": bytes(range(256)),
        "an empty stack": b"\x80\x02R.",
        "a memo out of nowhere": b"\x80\x02h\x07.",
    }


def test_no_pickle_is_run(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pt")
    for what, data in malicious(tmp_path).items():
        path = tmp_path / "bad.pt"
        path.write_bytes((tmp_path / "good.pt").read_bytes())
        rewrite(path, lambda name, old, data=data: data if name.endswith("data.pkl") else old)
        with pytest.raises(CheckpointError, match="no pickle is ever run"):
            read_torch_zip(path)
            pytest.fail(what)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "plain.pt").write_bytes(malicious(tmp_path)["a call"])
    with pytest.raises(CheckpointError, match="zip"):
        read_torch_zip(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()


def test_the_name_that_was_refused_is_said(tmp_path):
    torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="io open"):
        read_torch_zip(tmp_path / "x.pt")


def test_a_tensor_beyond_its_bytes_or_packed_is_refused(tmp_path):
    torch.save({"a": torch.ones(64)}, tmp_path / "a.pt")
    rewrite(tmp_path / "a.pt", lambda name, data: data[:-8] if name.endswith("data/0") else data)
    with pytest.raises(CheckpointError, match="beyond its 248 bytes"):
        read_torch_zip(tmp_path / "a.pt")
    torch.save({"a": torch.ones(64)}, tmp_path / "b.pt")
    with zipfile.ZipFile(tmp_path / "b.pt") as archive:
        entries = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="compressed"):
        read_torch_zip(tmp_path / "b.pt")
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "old.pt").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="safetensors"):
        read_torch_zip(tmp_path / "old.pt")


# --- OFT's folders ---------------------------------------------------------------------------------------------------


def test_what_an_oft_folder_does_not_say_is_asked_for(tmp_path):
    write_oft(tmp_path, film=False)
    with pytest.raises(UsageError) as caught:
        load_policy(tmp_path, device="cpu")
    for part in ("action_head, proprio_projector", "steps of a chunk", "cameras", "q99 or bounds", "--oft libero"):
        assert part in str(caught.value)
    with pytest.raises(UsageError, match="aloha"):
        read_openvla(tmp_path, oft="robocasa")


def test_oft_setups(tmp_path):
    write_oft(tmp_path / "libero", film=False)
    policy = read_openvla(tmp_path / "libero", oft="libero")
    assert (policy.chunk, policy.encoder.action_dim, policy.encoder.state_dim) == (8, 7, 8)
    assert list(policy.embodiments["libero"].cameras) == ["full_image", "wrist_image"]
    write_oft(tmp_path / "aloha", film=False, dims=14, proprio=14)
    policy = read_openvla(tmp_path / "aloha", oft="aloha")
    assert (policy.chunk, policy.encoder.action_dim, policy.normalizers["libero"]["action"].scheme) == (25, 14, "bounds")


def test_oft_parts_that_do_not_fit_are_refused(tmp_path):
    write_oft(tmp_path / "dims", film=False)
    (tmp_path / "dims" / "dataset_statistics.json").write_text(json.dumps({"x": statistics(14, 8)}))
    with pytest.raises(CheckpointError, match="action_head"):
        read_openvla(tmp_path / "dims", oft="libero")
    write_oft(tmp_path / "two", film=False)
    torch.save({}, tmp_path / "two" / "action_head--200_checkpoint.pt")
    with pytest.raises(CheckpointError, match="one action_head"):
        read_openvla(tmp_path / "two", oft="libero")
    write_oft(tmp_path / "diffusion", film=False)
    torch.save({}, tmp_path / "diffusion" / "noisy_action_projector--150_checkpoint.pt")
    with pytest.raises(CheckpointError, match="diffusion"):
        read_openvla(tmp_path / "diffusion", oft="libero")
    write_oft(tmp_path / "no-state", film=False)
    (tmp_path / "no-state" / "dataset_statistics.json").unlink()
    edit(tmp_path / "no-state", norm_stats={"x": {"action": statistics()["action"]}})
    with pytest.raises(CheckpointError, match="missing statistics: no proprio"):
        read_openvla(tmp_path / "no-state", oft="libero")


def test_oft_with_symbols_has_no_head(tmp_path):
    write_oft(tmp_path, film=False, head=False)
    policy = read_openvla(tmp_path, oft="libero")
    assert policy.config.head == "symbols" and policy.config.decoding == "parallel"


def test_converted_files_are_preferred(tmp_path):
    files = write_oft(tmp_path, film=False)
    head = {f"module.{k}": v + 1 for k, v in files["action_head"].items()}
    save_file(head, tmp_path / "action_head--150_checkpoint.safetensors")
    policy = read_openvla(tmp_path, oft="libero")
    assert policy.l1_head is not None
    assert torch.equal(policy.l1_head.state_dict()["model.fc2.bias"], files["action_head"]["model.fc2.bias"] + 1)
