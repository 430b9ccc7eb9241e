"""Several adapters over one base in memory: each acts as it does alone, and costs what it trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.families import FAMILIES
from tests.test_adapters import trained
from tests.test_policy import make, mixture, observation  # noqa: F401
from vla.errors import CheckpointError, UsageError
from vla.normalize import Normalizer
from vla.policy import AdapterConfig, Adapters, PolicyConfig, build_policy, load_policy, save_policy
from vla.policy.adapters import adapt, merge, own_name

WORDS = "touch the red cube"


@pytest.fixture
def base(mixture, tmp_path):  # noqa: F811
    save_policy(make(mixture), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def folders(base, tmp_path) -> dict[str, Path]:
    """Two adapters that differ in all they may: shape, place, kind and statistics."""
    one, two = trained(base, 1), trained(base, 2, targets="attention", dora=True)
    stats = two.normalizers["tabletop"]["action"].to_json()
    for name in ("min", "q01", "mean", "max", "q99"):
        stats["stats"][name] = [2 * value + 0.1 for value in stats["stats"][name]]
    two.normalizers["tabletop"]["action"] = Normalizer.from_json(stats, "test")
    save_policy(one, tmp_path / "one")
    save_policy(two, tmp_path / "two")
    return {"one": tmp_path / "one", "two": tmp_path / "two"}


def same(chunk, other) -> None:
    for name in ("actions", "confidence", "symbols"):
        np.testing.assert_array_equal(getattr(chunk, name), getattr(other, name))


def storages(policies) -> dict[int, int]:
    """Every piece of memory the parameters take -> its bytes, each once."""
    found = {}
    for policy in policies:
        for p in policy.parameters():
            for t in (p.qdata, p.scale) if hasattr(p, "qdata") else (p,):
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return found


def own(policy) -> int:
    return sum(p.numel() * p.element_size() for n, p in policy.named_parameters() if n in policy.adapter.trained)


def test_each_acts_as_it_does_alone_in_any_order(folders, mixture):  # noqa: F811
    alone = {name: load_policy(folder, "cpu") for name, folder in folders.items()}
    adapters = Adapters(folders, "cpu")
    assert list(adapters) == ["one", "two"] and len(adapters) == 2 and "one" in adapters
    seen = observation(mixture)
    expected = {name: policy.act(seen, WORDS, "tabletop") for name, policy in alone.items()}
    assert not np.array_equal(expected["one"].actions, expected["two"].actions)
    for name in ("one", "two", "two", "one", "two", "one"):
        same(adapters.act(seen, WORDS, "tabletop", adapter=name), expected[name])
        assert adapters[name].fingerprint == alone[name].fingerprint
    order = ["two", "one", "two"]
    for decode in ("argmax", "sample"):
        chunks = adapters.act_batch([seen] * 3, [WORDS] * 3, "tabletop", adapter=order, decode=decode, seeds=[5, 6, 7])
        rows = {"one": [1], "two": [0, 2]}
        for name, places in rows.items():
            other = alone[name].act_batch([seen] * len(places), [WORDS] * len(places), "tabletop", decode=decode,  # pyright: ignore
                                          seeds=[5 + i for i in places])  # fmt: skip
            for place, chunk in zip(places, other, strict=True):
                same(chunks[place], chunk)
    same(adapters.act_batch([seen], [WORDS], "tabletop", adapter="one")[0], expected["one"])


def test_the_bases_tensors_are_one_and_memory_grows_by_the_adapter_alone(folders, base, tmp_path):
    adapters = Adapters({"one": folders["one"]}, "cpu")
    before = storages([adapters["one"]])
    adapters.add("two", folders["two"])
    one, two = (dict(adapters[name].named_parameters()) for name in adapters)
    shared = {n.replace(".base_layer.", "."): p for n, p in one.items() if n not in adapters["one"].adapter.trained}
    assert len(shared) > 20
    for name, parameter in two.items():
        mine = shared.get(name.replace(".base_layer.", "."))
        if name in adapters["two"].adapter.trained:
            assert mine is None
            assert parameter.data_ptr() not in before
        else:
            assert mine is not None and mine.data_ptr() == parameter.data_ptr(), name
    after = storages(adapters[name] for name in adapters)
    assert sum(after.values()) - sum(before.values()) == own(adapters["two"])
    whole = load_policy(base, "cpu")
    frozen = sum(p.numel() * 4 for n, p in whole.named_parameters() if not own_name(whole, n))
    assert sum(after.values()) == frozen + own(adapters["one"]) + own(adapters["two"])
    # One learned row moves in one of them alone.
    adapters["one"].model.lm_head.weight.data.add_(1)
    assert not torch.equal(adapters["one"].model.lm_head.weight, adapters["two"].model.lm_head.weight)


def _stranger(base: Path, folder: Path) -> None:
    """`folder`/stranger: an adapter of another base, one number away from `base`."""
    other = load_policy(base, "cpu")
    with torch.no_grad():
        other.model.projector[0].weight[0, 0] += 1e-3
    save_policy(other, folder / "elsewhere")
    save_policy(trained(folder / "elsewhere"), folder / "stranger")


def test_what_does_not_belong_is_refused_and_nothing_changes(folders, base, tmp_path, mixture):  # noqa: F811
    _stranger(base, tmp_path)
    adapters = Adapters(folders, "cpu")
    fingerprint = adapters.base
    with pytest.raises(CheckpointError, match="an adapter of base"):
        adapters.add("stranger", tmp_path / "stranger")
    with pytest.raises(CheckpointError, match="a whole policy"):
        adapters.add("base", base)
    with pytest.raises(UsageError, match="a second 'one'"):
        adapters.add("one", folders["one"])
    with pytest.raises(UsageError, match="did you mean 'two'"):
        adapters.act(observation(mixture), WORDS, "tabletop", adapter="twoo")
    with pytest.raises(UsageError, match="as many of each"):
        adapters.act_batch([observation(mixture)], [WORDS], "tabletop", adapter=["one", "two"])
    with pytest.raises(UsageError, match="'three'"):
        adapters.remove("three")
    assert list(adapters) == ["one", "two"] and adapters.base == fingerprint
    adapters.remove("one")
    assert list(adapters) == ["two"]
    with pytest.raises(CheckpointError, match="which this adapter was trained on"):
        Adapters(folders, "cpu", base=tmp_path / "elsewhere")
    (folders["one"] / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        adapters.add("one", folders["one"])
    assert list(adapters) == ["two"]
    same(adapters.act(observation(mixture), WORDS, "tabletop", adapter="two"),
         load_policy(folders["two"], "cpu").act(observation(mixture), WORDS, "tabletop"))  # fmt: skip


def test_one_of_several_is_not_merged_since_the_others_would_change(folders):  # noqa: F811
    adapters = Adapters(folders, "cpu")
    with pytest.raises(CheckpointError, match="several adapters on one base"):
        merge(adapters[next(iter(adapters))], lambda policy: torch.zeros(1), "a")


def test_the_base_goes_with_its_last_adapter(folders, base, tmp_path):
    _stranger(base, tmp_path)
    adapters = Adapters(folders, "cpu")
    adapters.remove("one")
    with pytest.raises(CheckpointError, match="an adapter of base"):
        adapters.add("stranger", tmp_path / "stranger")
    adapters.remove("two")
    assert adapters.base is None and not adapters._below
    adapters.add("stranger", tmp_path / "stranger")
    assert adapters.base == adapters["stranger"].adapter.base["fingerprint"]


@pytest.mark.parametrize("entry", [{"base": {}}, {"base": None}, [1], 5, {}, {"base": {"path": 1}, "config": {}}])
def test_an_adapter_that_does_not_say_its_base_is_refused(folders, entry):
    path = folders["one"] / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"adapter": entry}))
    for read in (lambda: Adapters({"one": folders["one"]}, "cpu"), lambda: load_policy(folders["one"], "cpu")):
        with pytest.raises(CheckpointError, match="kind, path and fingerprint"):
            read()


def test_an_adapter_is_not_its_own_base_nor_anothers(folders):
    def on(name: str, path: Path) -> None:
        file = folders[name] / "policy.json"
        meaning = json.loads(file.read_text())
        meaning["adapter"]["base"]["path"] = str(path)
        file.write_text(json.dumps(meaning))

    on("one", folders["one"])
    on("two", folders["one"])
    for name, words in (("one", "its own base"), ("two", "a base that is an adapter itself")):
        for read in (lambda n: load_policy(folders[n], "cpu"), lambda n: Adapters({n: folders[n]}, "cpu")):
            with pytest.raises(CheckpointError, match=words):
                read(name)
    with pytest.raises(CheckpointError, match="its own base"):
        load_policy(folders["two"], "cpu", base=folders["two"])


def test_another_dtype_is_the_one_it_has_alone(folders, mixture):  # noqa: F811
    adapters = Adapters(folders, "cpu", torch.bfloat16)
    for name, folder in folders.items():
        assert {p.dtype for p in adapters[name].parameters()} == {torch.bfloat16}
        alone = load_policy(folder, "cpu", torch.bfloat16)
        same(adapters.act(observation(mixture), WORDS, "tabletop", adapter=name),
             alone.act(observation(mixture), WORDS, "tabletop"))  # fmt: skip
    one, two = (adapters[name].model.projector[0] for name in folders)
    assert one.base_layer.weight.data_ptr() == two.weight.data_ptr()  # `attention` leaves the projector alone


def test_quantized_bases_are_shared_too(base, tmp_path, mixture):  # noqa: F811
    pytest.importorskip("torchao")
    folders = {}
    for i, how in enumerate(("int8", "int8", "none")):
        folders[str(i)] = tmp_path / str(i)
        save_policy(trained(base, i, quantize=how), folders[str(i)])
    adapters = Adapters(folders, "cpu")
    for name, folder in folders.items():
        same(adapters.act(observation(mixture), WORDS, "tabletop", adapter=name),
             load_policy(folder, "cpu").act(observation(mixture), WORDS, "tabletop"))  # fmt: skip
    first, second, whole = (adapters[name].model.language_model for name in folders)
    assert first.layers[0].mlp.up_proj.base_layer.weight.qdata is second.layers[0].mlp.up_proj.base_layer.weight.qdata
    assert first.norm.weight is whole.norm.weight
    together = storages(adapters[name] for name in ("0", "1"))
    assert sum(together.values()) - sum(storages([adapters["0"]]).values()) == own(adapters["1"])


def test_over_a_pretrained_model_tables_may_differ_in_size(tmp_path, mixture):  # noqa: F811
    torch.manual_seed(0)
    FAMILIES["LLaVA"](tmp_path / "m")
    folders = {}
    for chunk in (4, 2, 4):
        torch.manual_seed(chunk)
        config = PolicyConfig.model_validate({"backbone": {"kind": "hf", "path": str(tmp_path / "m"), "image_size": 32},
                                              "chunk": chunk, "execute": 1, "soft_tokens": 2})  # fmt: skip
        policy = adapt(build_policy(config, mixture), AdapterConfig(rank=2), {"kind": "model", "path": str(tmp_path / "m")})
        with torch.no_grad():
            for p in policy.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.05)
        folders[f"{len(folders)}"] = tmp_path / f"{len(folders)}"
        save_policy(policy.eval(), folders[f"{len(folders) - 1}"])
    adapters = Adapters(folders, "cpu")
    for name in ("0", "1", "2", "1", "0"):
        same(adapters.act(observation(mixture), WORDS, "tabletop", adapter=name),
             load_policy(folders[name], "cpu").act(observation(mixture), WORDS, "tabletop"))  # fmt: skip
    sets = [{p.data_ptr() for n, p in adapters[name].named_parameters() if n not in adapters[name].adapter.trained}
            for name in folders]  # fmt: skip
    assert sets[0] == sets[1] == sets[2] and len(sets[0]) > 20
