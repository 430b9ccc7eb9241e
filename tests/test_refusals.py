"""Everything that is refused, in one place: what is dangerous, and what does not fit.

Each refusal is named as people name it (the parameters of `test_each_refusal_has_its_words`) and shown once, cheaply; its depths
are tested beside the code that refuses:

    pickle              here; torch's own files of OFT, read without their pickle: test_prismatic_files.py
    remote code         here; OpenVLA's modules, passed over and named: test_prismatic_files.py; no line loads such: test_house.py
    wrong base          test_adapters.py (one weight off, moved, named parts); by a name on the Hub: test_push.py
    wrong vocabulary    test_families.py (a tokenizer too large), test_prismatic_files.py (padding that shifts every bin)
    missing statistics  test_adapters.py, test_prismatic_files.py; of a dataset: test_lerobot.py
    image ignored       test_prismatic.py, test_families.py
    truncated shard     test_prismatic_files.py (several, with their bytes); of a checkpoint: test_checkpoint.py
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_stand_in import HubStandIn, hub  # noqa: F401  the fixture
from prismatic_folder import write_tiny
from safetensors.torch import load_file, save_file
from small_policies import write_policy, write_small_adapter

from vla.backbones import HFConfig, Sizes, build_backbone
from vla.cli import main
from vla.errors import CheckpointError
from vla.policy import load_policy

SIZES = Sizes(symbols=16, slots=2, state=0, robots=1, soft_tokens=0, state_token=False, end_token=False)


class Canary:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def change(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def torch_zip(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": Canary(canary)}, buffer)
    return buffer.getvalue()


def zipped(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


def cut(folder: Path) -> str:
    """The file of weights, half of it; returns what will be said."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 100])
    return f"model.safetensors: expected {len(data)} bytes, found {len(data) - 100}"


def index(folder: Path, **shards: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


Spoil = Callable[[Path, Path], object]
"""(folder, canary) -> what the refusal must say, where that is text; else the words beside it."""

DANGERS: dict[str, tuple[Spoil, str]] = {
    ".bin": (lambda f, c: (f / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(c))) and None, "pytorch_model.bin"),
    ".pt": (lambda f, c: (f / "head.pt").write_bytes(torch_zip(c)) and None, "head.pt"),
    ".pkl below": (lambda f, c: (f / "extra").mkdir() or (f / "extra/a.PKL").write_bytes(b"x") and None, "extra/a.PKL"),
    "a pickle by another name": (lambda f, c: (f / "notes.txt").write_bytes(pickle.dumps(Canary(c), 4)) and None,
                                 "notes.txt: a pickle under another name"),
    "a pickle called safetensors": (lambda f, c: (f / "model.safetensors").write_bytes(pickle.dumps(Canary(c), 4)) and None,
                                    "model.safetensors: a pickle under another name"),
    "a zip with a pickle": (lambda f, c: (f / "vocab.txt").write_bytes(torch_zip(c)) and None, "vocab.txt: a zip archive"),
    "a zip with an array": (lambda f, c: (f / "a.txt").write_bytes(zipped("a.npy", b"x")) and None, "a.txt: a zip archive"),
    "auto_map": (lambda f, c: change(f / "config.json", auto_map={"AutoModel": "m.M"}), "config.json: auto_map"),
    "auto_map of a processor": (lambda f, c: (f / "processor_config.json").write_text('{"a": [{"auto_map": {"b": "c.D"}}]}')
                                and None, "processor_config.json: a.0.auto_map"),
    "trust_remote_code": (lambda f, c: change(f / "config.json", text_config={"trust_remote_code": True}),
                          "config.json: text_config.trust_remote_code"),
    "kernels from the Hub": (lambda f, c: change(f / "config.json", _attn_implementation_internal="evil/kernel"),
                             "config.json: _attn_implementation_internal"),
    "kernels by their usual key": (lambda f, c: change(f / "config.json", attn_implementation="evil/kernel"), "evil/kernel"),
    "kernels by part of the model": (lambda f, c: change(f / "config.json", _attn_implementation={"": "sdpa", "text_config":
                                     {"": ["evil/kernel"]}}), "config.json: _attn_implementation, which names code"),
    "kernels in a list": (lambda f, c: change(f / "config.json", text_config={"attn_implementation": ["a", ["evil/kernel"]]}),
                          "config.json: text_config.attn_implementation, which names code on the Hub (evil/kernel)"),
    "kernels of experts": (lambda f, c: change(f / "config.json", _experts_implementation={"": "evil/kernel"}), "evil/kernel"),
    "kernels inside": (lambda f, c: change(f / "config.json", _attn_implementation_internal={"": "evil/kernel"}),
                       "config.json: _attn_implementation_internal"),
    "a class of other code": (lambda f, c: change(f / "config.json", tokenizer_class="evil.Tokenizer"), "evil.Tokenizer"),
    "a module": (lambda f, c: (f / "modeling.py").write_text(f"open({str(c)!r}, 'w')") and None, "modeling.py: code beside"),
    "a library": (lambda f, c: (f / "kernel.so").write_bytes(b"\x7fELF") and None, "kernel.so: code beside"),
    "truncated": (lambda f, c: cut(f), "model.safetensors"),
    "a missing shard": (lambda f, c: index(f, a="model-00001-of-00002.safetensors"),
                        "model-00001-of-00002.safetensors is missing"),
    "a shard elsewhere": (lambda f, c: index(f, a="../other.safetensors"), "'../other.safetensors' is not beside it"),
    "no JSON": (lambda f, c: (f / "config.json").write_text("{") and None, "config.json: not JSON"),
}  # fmt: skip
SEEN_IN_CONTENT = {"a pickle by another name", "a pickle called safetensors", "a zip with a pickle", "a zip with an array",
                   "truncated"}  # fmt: skip
"""Dangers that neither a list of files nor a small JSON file can show."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole policy folder."""
    root = tmp_path_factory.mktemp("policy")
    write_policy(root)
    return root / "policy"


@pytest.fixture(scope="module")
def adapter(policy: Path) -> Path:
    """An adapter that looks for its base at `base` beside its own folder."""
    write_small_adapter(policy.parent / "lora", policy, path="../base")
    return policy.parent / "lora/policy"


def spoiled(policy: Path, folder: Path, danger: str, canary: Path) -> str:
    """A copy of `policy` at `folder` with a danger in it; returns what must be said of it."""
    shutil.copytree(policy, folder)
    spoil, words = DANGERS[danger]
    said = spoil(folder, canary)
    return said if isinstance(said, str) else words


@pytest.mark.parametrize("danger", list(DANGERS))
def test_a_dangerous_folder_is_refused_wherever_it_comes_from(
    danger: str, policy: Path, adapter: Path, hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture  # noqa: F811
):
    canary = tmp_path / "ran"
    words = spoiled(policy, tmp_path / "run/policy", danger, canary)
    folder = tmp_path / "run/policy"
    shutil.copytree(folder, tmp_path / "adapted/base")
    shutil.copytree(adapter, tmp_path / "adapted/policy")
    hub.push("evil/policy", folder)
    reading = {
        "a policy folder": lambda: load_policy(folder, "cpu"),
        "a run folder": lambda: load_policy(tmp_path / "run", "cpu"),
        "a foreign model": lambda: build_backbone(HFConfig(kind="hf", path=str(folder)), SIZES),
        "an adapter's base": lambda: load_policy(tmp_path / "adapted/policy", "cpu"),
        "a repository": lambda: load_policy("evil/policy", "cpu"),
        "a model's repository": lambda: build_backbone(HFConfig(kind="hf", path="evil/policy"), SIZES),
    }
    for what, read in reading.items():
        with pytest.raises(CheckpointError) as caught:
            read()
            pytest.fail(what)
        assert words in caught.value.found, f"{what}: {caught.value}"
    assert main(["push", str(folder), "you/evil", "--hub", str(tmp_path / "hub")]) == 4 and words in capsys.readouterr().err
    assert not canary.exists() and not (tmp_path / "hub").exists()
    if danger not in SEEN_IN_CONTENT:
        assert all(path.endswith(".json") for path in hub.asked), "only the list of files and small JSON had been looked at"


def test_a_link_that_leads_out_is_refused(policy: Path, tmp_path: Path):
    shutil.copytree(policy, tmp_path / "policy")
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "policy/notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(CheckpointError, match=r"notes\.txt: a link that leads out"):
        load_policy(tmp_path / "policy", "cpu")
    (tmp_path / "policy/notes.txt").unlink()
    (tmp_path / "policy/notes.txt").symlink_to("policy.json")
    assert load_policy(tmp_path / "policy", "cpu")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "a.txt").symlink_to("nobody"), "a.txt: a link that leads nowhere"),
        (lambda f: (f / "a.json").symlink_to("a.json"), "a.json: a link that leads nowhere"),
        (lambda f: (f / "inside").mkdir() or (f / "a.txt").symlink_to("inside"), "a.txt: a link to a folder"),
        (lambda f: (f / ".in").mkdir() or (f / "a.index.json").symlink_to(".in"), "a.index.json: a link to a folder"),
        (lambda f: (f / "policy.json").unlink() or (f / "policy.json").mkdir(), "Is a directory"),
        (lambda f: (f / "config.json").unlink() or (f / "config.json").mkdir(), "config.json"),
        (lambda f: (f / "policy.json").write_text("5"), "'5'"),
        (lambda f: (f / "policy.json").write_text("null"), "'None'"),
        (lambda f: (f / "policy.json").write_text("[" * 100_000), "recursion"),
    ],
)  # fmt: skip
def test_what_is_no_file_is_refused_and_no_traceback(spoil: Callable[[Path], object], words: str, policy: Path, tmp_path: Path):
    shutil.copytree(policy, tmp_path / "policy")
    spoil(tmp_path / "policy")
    with pytest.raises(CheckpointError) as caught:
        load_policy(tmp_path / "policy", "cpu")
    assert words in str(caught.value)


def test_folders_called_json_are_nobodys(policy: Path, tmp_path: Path):
    shutil.copytree(policy, tmp_path / "policy")
    (tmp_path / "policy/x.json").mkdir()
    (tmp_path / "policy/x.index.json").mkdir()
    assert load_policy(tmp_path / "policy", "cpu")


def test_words_that_only_look_like_keys_are_words(policy: Path, tmp_path: Path):
    shutil.copytree(policy, tmp_path / "policy")
    (tmp_path / "policy/vocab.json").write_text('{"auto_map": 1}')
    (tmp_path / "policy/generation_config.json").write_text('{"auto_map": null, "trust_remote_code": false}')
    assert load_policy(tmp_path / "policy", "cpu")


# ----------------------------------------------------------------------------------------------- each by its usual name


def _pickle(policy: Path, tmp_path: Path) -> Path:
    spoiled(policy, tmp_path / "p", ".bin", tmp_path / "ran")
    return tmp_path / "p"


def _remote_code(policy: Path, tmp_path: Path) -> Path:
    spoiled(policy, tmp_path / "p", "auto_map", tmp_path / "ran")
    return tmp_path / "p"


def _wrong_base(policy: Path, tmp_path: Path) -> Path:
    write_small_adapter(tmp_path / "lora", policy, path="../base")
    write_policy(tmp_path / "other", seed=7)
    (tmp_path / "other/policy").rename(tmp_path / "lora/base")
    return tmp_path / "lora/policy"


def _wrong_vocabulary(policy: Path, tmp_path: Path) -> Path:
    write_tiny(tmp_path / "p")
    change(tmp_path / "p/config.json", pad_to_multiple_of=0)
    return tmp_path / "p"


def _another_tokenizer(policy: Path, tmp_path: Path) -> Path:
    shutil.copytree(policy, tmp_path / "p")
    path = tmp_path / "p/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(tokenizer))
    return tmp_path / "p"


def _missing_statistics(policy: Path, tmp_path: Path) -> Path:
    shutil.copytree(policy, tmp_path / "p")
    change(tmp_path / "p/policy.json", normalizers={})
    return tmp_path / "p"


def _missing_statistics_openvla(policy: Path, tmp_path: Path) -> Path:
    write_tiny(tmp_path / "p")
    change(tmp_path / "p/config.json", norm_stats={})
    return tmp_path / "p"


def _image_ignored(policy: Path, tmp_path: Path) -> Path:
    write_tiny(tmp_path / "p")
    file = tmp_path / "p/model.safetensors"
    tensors = load_file(file)
    save_file({n: torch.zeros_like(t) if n.startswith("projector.fc3") else t for n, t in tensors.items()}, file)
    return tmp_path / "p"


def _truncated_shard(policy: Path, tmp_path: Path) -> Path:
    write_tiny(tmp_path / "p", shards=2)
    path = tmp_path / "p/model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return tmp_path / "p"


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("pickle", _pickle, "pytorch_model.bin"),
        ("remote code", _remote_code, "config.json: auto_map"),
        ("wrong base", _wrong_base, "which this adapter was trained on"),
        ("wrong vocabulary", _wrong_vocabulary, "shifts every bin"),
        ("wrong vocabulary of our own", _another_tokenizer, "fingerprint"),
        ("missing statistics", _missing_statistics, "no statistics of tabletop"),
        ("missing statistics of OpenVLA's", _missing_statistics_openvla, "missing statistics"),
        ("image ignored", _image_ignored, "black picture"),
        ("truncated shard", _truncated_shard, "model-00002-of-00002.safetensors: expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_refusal_has_its_words(name: str, make: Callable[[Path, Path], Path], words: str, policy: Path, tmp_path: Path):
    with pytest.raises(CheckpointError) as caught:
        load_policy(make(policy, tmp_path), "cpu")
    assert words in str(caught.value) and caught.value.fix
