"""`vla export --to onnx`: a student as graphs that act as it does, whole or not there at all."""

import copy
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_datasets import SIZE, make_episode, small_spec, write_dataset

from vla.checkpoint import publish
from vla.cli import main
from vla.episodes import EpisodeStore
from vla.errors import CheckpointError, DataError, UsageError
from vla.mixture import Mixture
from vla.policy import PolicyConfig, build_policy, save_policy
from vla.recording import LeRobotWriter

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from vla.export.actor import OnnxPolicy  # noqa: E402
from vla.export.folder import export_onnx, sha256  # noqa: E402
from vla.export.int8 import KINDS, affine, quantise, symmetric  # noqa: E402
from vla.export.parity import paired  # noqa: E402
from vla.export.runtime import choose, noise_feed  # noqa: E402
from vla.export.windows import read_windows  # noqa: E402
from vla.export_folder import read_export  # noqa: E402

STUDENT = {"kind": "student", "tower": "patch", "image_size": 32, "patch": 16, "channels": [8, 8, 8], "keypoints": 4,
           "hidden": 32, "layers": 2, "heads": 2, "mlp": 64, "text_layers": 1, "text_vocab": 300}  # fmt: skip


def student(root: Path, backbone=None, **config):
    """A fresh student for the robot of `small_datasets`, no weight of which is zero."""
    if not (root / "data" / "meta").exists():
        write_dataset(root / "data", 3)
    store = EpisodeStore.open(root / "data", root / "cache", progress=False)
    torch.manual_seed(0)
    chosen = {"backbone": STUDENT | (backbone or {}), "chunk": 3, "execute": 1, "end_weight": 1.0, "soft_tokens": 2, **config}
    policy = build_policy(PolicyConfig.model_validate(chosen), Mixture([store], [1], 3, seed=0)).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return policy


def seen(n: int = 0) -> dict:
    rng = np.random.default_rng(n)
    return {"images": {"front": rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)},
            "state": rng.uniform(-0.5, 0.5, 4).astype(np.float32)}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def policy(root):
    policy = student(root)
    publish(root / "policy", lambda folder: save_policy(policy, folder))
    return policy


@pytest.fixture(scope="module")
def exported(root, policy):
    """By the command line, with everything that can be measured without a simulator."""
    few = ["--windows", "6", "--rounds", "3"]
    assert main(["export", str(root / "policy"), "--to", "onnx", "--int8", *few, "--out", str(root / "out")]) == 0
    return root / "out"


def test_the_folder_is_whole(exported, policy):
    meaning = read_export(exported).meaning
    names = {"policy.onnx", "policy.int8.onnx", "sentence.onnx", "tokenizer.json", "requirements.txt", "parity.json", "README.md"}
    assert set(meaning["files"]) == names == {path.name for path in exported.iterdir()} - {"export.json"}
    for name, entry in meaning["files"].items():
        assert sha256(exported / name) == entry["sha256"] and (exported / name).stat().st_size == entry["bytes"]
    assert meaning["policy"] == policy.fingerprint and meaning["robots"] == ["tabletop"]
    assert meaning["runtime"]["graph"] in ("float32", "int8") and meaning["runtime"]["threads"] >= 1
    assert (exported / "requirements.txt").read_text().split("\n")[0].startswith("onnxruntime>=")
    for path in exported.glob("*.onnx"):  # nothing of the machine it was written on
        assert b"site-packages" not in path.read_bytes() and str(Path.cwd()).encode() not in path.read_bytes()


def test_it_acts_as_the_policy_does(exported, policy):
    actor = OnnxPolicy(exported)
    sentences = ["do thing 1", "do thing 2", "Etwas Anderes: \u00fc\u4e16", "again and " * 40]
    observations = [seen(n) for n in range(len(sentences))]
    wanted = policy.act_batch(observations, sentences, "tabletop")
    found = actor.act_batch(observations, sentences, "tabletop")
    for a, b in zip(wanted, found, strict=True):
        assert np.abs(a.actions - b.actions).max() < 1e-4 and np.abs(a.confidence - b.confidence).max() < 1e-4
        assert np.array_equal(a.symbols, b.symbols) and b.actions.dtype == np.float32
    assert np.ptp([c.actions for c in found], axis=0).max() > 1e-3  # what is seen and said matters, so agreeing means something
    a, b = (p.act_batch(observations[:1], sentences[:1], "tabletop", drop_state=True)[0] for p in (policy, actor))
    assert np.abs(a.actions - b.actions).max() < 1e-4 and actor.steps("tabletop") == policy.steps("tabletop")
    with pytest.raises(CheckpointError, match="embodiment"):
        actor.act_batch(observations[:1], sentences[:1], "another")
    with pytest.raises(UsageError, match="decode"):
        actor.act_batch(observations[:1], sentences[:1], "tabletop", decode="sample")
    with pytest.raises(DataError, match="camera"):
        actor.act_batch([seen() | {"images": {}}], sentences[:1], "tabletop")


def test_several_pictures_and_their_order(exported, policy):
    """One graph for any number of cameras: each is told by its number."""
    actor = OnnxPolicy(exported)
    feed = noise_feed(actor, 3)
    feed["images"] = np.random.default_rng(1).integers(0, 256, feed["images"].shape).astype(np.uint8)
    unit = actor.policy_graph.run(None, feed)[0]
    turned = actor.policy_graph.run(None, feed | {"images": feed["images"][::-1].copy(), "slots": feed["slots"][::-1].copy()})[0]
    swapped = actor.policy_graph.run(None, feed | {"images": feed["images"][::-1].copy()})[0]
    assert np.abs(unit - turned).max() < 1e-5 < np.abs(unit - swapped).max()


def test_parity_is_measured(exported):
    parity = json.loads((exported / "parity.json").read_text())
    plain, int8 = parity["errors"]["float32"], parity["errors"]["int8"]
    assert plain["max_percent"] < 0.01 and plain["agreement"] == 1.0
    assert 0 < int8["mean_percent"] < 3 and int8["agreement"] > 0.5
    assert set(parity["int8"]["tried"]) == {"delicate in float32", "everything"}
    times = parity["latency"]["times"]
    assert {"torch float32/1", "torch bfloat16/1", "float32/1", "int8/1"} <= set(times)
    assert all(0 < t["min_ms"] <= t["p50_ms"] <= t["p95_ms"] <= t["p99_ms"] for t in times.values())
    assert parity["integer_products"]["rate_gops"] > 0 and 0 < parity["integer_products"]["percent"] < 150
    assert parity["fresh"]["torch"]["peak_memory_mb"] > parity["fresh"]["int8"]["peak_memory_mb"] > 10
    card = (exported / "README.md").read_text()
    assert "## Parity" in card and "int8 (dynamic)" in card and "tabletop | " in card


def test_choosing_again_changes_nothing_else(exported, capsys):
    before = read_export(exported).meaning
    assert main(["export", str(exported), "--choose", "--rounds", "3", "--json"]) == 0
    chosen, after = json.loads(capsys.readouterr().out), read_export(exported).meaning
    new = ("runtime", "digest")
    assert after["runtime"] == chosen and {k: v for k, v in after.items() if k not in new} == {
        k: v for k, v in before.items() if k not in new}  # fmt: skip
    times = {"float32/1": {"p50_ms": 9.0}, "float32/2": {"p50_ms": 8.5}, "int8/1": {"p50_ms": 4.0}, "int8/2": {"p50_ms": 3.8}}
    assert (choose(times, 1.0)["graph"], choose(times, 1.0)["threads"]) == ("int8", 1)  # a core for 5 % is not worth it
    assert choose(times, 5.0)["graph"] == "float32"  # fast, and wrong
    assert choose({"float32/1": {"p50_ms": 4.2}, "int8/1": {"p50_ms": 4.0}}, 1.0)["graph"] == "int8"  # the same core either way


@pytest.mark.parametrize("kind", KINDS)
def test_every_int8_runs(exported, policy, root, kind):
    folder = root / f"int8-{kind}"
    shutil.copytree(exported, folder)
    feeds = [noise_feed(OnnxPolicy(exported))]
    made = quantise(exported / "policy.onnx", folder / f"{kind}.onnx", kind, feeds)
    assert "head.weight" not in made["products"] and made["on_bytes"] == (0 if kind.startswith("weight") else 1)
    meaning = copy.deepcopy(dict(read_export(exported).meaning))
    meaning["graphs"]["policy"]["int8"] = f"{kind}.onnx"
    actors = OnnxPolicy(exported), OnnxPolicy(folder, meaning, "int8")
    wanted, found = (actor.unit(seen(), "do thing 1", "tabletop")[0] for actor in actors)
    assert 0 < np.abs(wanted - found).max() < (0.5 if kind.endswith("4") else 0.1)
    with pytest.raises(UsageError, match="--int8"):
        quantise(exported / "policy.onnx", root / "no.onnx", "static" if kind == "static" else "fp3")


def test_rounding():
    whole, scale = symmetric(np.array([[1.0, -3.0], [-2.0, 0.0]], np.float32))
    assert whole.dtype == np.int8 and np.abs(whole).max(0).tolist() == [127, 127]
    assert np.abs(whole * scale - [[1, -3], [-2, 0]]).max() <= scale.max() / 2
    for low, high in ((-1.0, 2.0), (0.5, 3.0), (-4.0, -1.0), (0.0, 0.0)):  # zero is one of the steps
        size, zero = affine(low, high)
        assert size > 0 and 0 <= int(zero) <= 255


def test_paired_difference():
    wins = {i: i < 80 for i in range(100)}
    same = paired(wins, wins)
    assert same["difference"] == 0 and same["low"] < 0 < same["high"] < 0.03
    worse = paired(wins, {i: i < 60 for i in range(100)})
    assert worse["difference"] == pytest.approx(-0.2) and worse["low"] < -0.2 < worse["high"] < 0


@pytest.mark.parametrize("backbone, config", [
    ({"tower": "conv", "tokens": 2, "keypoints": 0, "text_layers": 0}, {"soft_tokens": 0, "state": "none", "end_weight": 0.0}),
    ({"layers": 1}, {"head": "l1", "end_weight": 0.0}),
])  # fmt: skip
def test_other_students(root, backbone, config):
    policy = student(root, backbone, **config)
    out = root / f"other-{config.get('head', 'symbols')}"
    meaning = export_onnx(policy, out, 18)
    assert meaning["opset"] == 18 and meaning["difference"] < 1e-3
    wanted, found = (p.act_batch([seen()], ["do thing 1"], "tabletop")[0] for p in (policy, OnnxPolicy(out)))
    assert np.abs(wanted.actions - found.actions).max() < 1e-4 and np.array_equal(wanted.symbols, found.symbols)
    assert np.isnan(found.confidence).all() == (config.get("head") == "l1")


def test_refusals(root, policy, tmp_path, capsys):
    from small_policies import small_policy

    def refused(*words: str, code: int = 2) -> str:
        assert main(["export", str(root / "policy"), *words, "--out", str(tmp_path / "out")]) == code
        assert not list(tmp_path.glob("*out*"))
        return capsys.readouterr().err

    assert "18 to 23" in refused("--to", "onnx", "--opset", "7")
    assert "--int8, --views" in refused("--to", "policy", "--int8", "--views", "2")
    assert "no --to" in refused()
    assert "--calibrate" in refused("--to", "onnx", "--calibrate", str(tmp_path / "nowhere"), code=3)
    assert "windows to calibrate" in refused("--to", "onnx", "--int8", "static", "--windows", "0")
    assert "nonsense" in refused("--to", "onnx", "--verify", "nonsense")
    with pytest.raises(UsageError, match="nano backbone"):
        export_onnx(small_policy(root / "data"), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    with pytest.raises(UsageError, match="new or empty"):
        export_onnx(policy, tmp_path / "full")
    with pytest.raises(UsageError, match="is a file"):
        export_onnx(policy, tmp_path / "full" / "a" / "x")
    with pytest.raises(CheckpointError, match=r"export\.json"):
        OnnxPolicy(tmp_path)
    write_dataset(tmp_path / "one", 1)
    with pytest.raises(DataError, match=f"no held-out episodes in {tmp_path / 'one'}"):
        read_windows(policy, [str(tmp_path / "one")], 4)
    spec = small_spec().model_copy(update={"name": "other"})
    with LeRobotWriter(tmp_path / "other", spec) as writer:
        for n in range(3):
            writer.add(replace(make_episode(n), embodiment="other"))
    with pytest.raises(DataError, match=r"robots \['other'\]"):
        read_windows(policy, [str(tmp_path / "other")], 4)
    policy.provenance, kept = policy.provenance | {"datasets": []}, policy.provenance
    try:
        with pytest.raises(DataError, match="--calibrate"):
            read_windows(policy, [], 4)
    finally:
        policy.provenance = kept


def test_interrupted_it_leaves_nothing(root, policy, tmp_path, monkeypatch):
    def graphs(policy, folder, opset):
        (folder / "sentence.onnx").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("vla.export.folder.write_graphs", graphs)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(policy, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    from children import dead_process

    from vla.export.folder import whole_folder

    stale, others = tmp_path / f".out.tmp-{dead_process()}", [tmp_path / f".out.tmp-{os.getppid()}", tmp_path / ".out2.tmp-x"]
    for folder in (stale, *others):
        (folder / "inside").mkdir(parents=True)
    with whole_folder(tmp_path / "out") as temporary:
        assert not stale.exists() and temporary.is_dir()
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "out", *others])


def test_a_graph_that_does_something_else_is_not_published(exported, policy, tmp_path, monkeypatch):
    def graphs(policy, folder, opset):
        for name in ("sentence.onnx", "policy.onnx"):
            (folder / name).write_bytes((exported / name).read_bytes())
        return {"sentence": "sentence.onnx", "policy": "policy.onnx"}

    monkeypatch.setattr("vla.export.folder.write_graphs", graphs)
    other = student(exported.parent)
    with torch.no_grad():
        other.model.head.weight.mul_(1.5)
    with pytest.raises(CheckpointError, match="off, of robot"):
        export_onnx(other, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_damage_is_noticed(exported, tmp_path):
    import shutil

    from vla.export.runtime import choose_again

    shutil.copytree(exported, tmp_path / "copy")
    with open(tmp_path / "copy" / "policy.onnx", "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="copy the whole folder"):
        choose_again(tmp_path / "copy")


def test_parts_of_a_teacher(root, tmp_path, capsys):
    from small_policies import BACKBONE, small_policy

    from vla.export.parts import export_parts

    teacher = small_policy(root / "data", decoding="autoregressive", backbone=BACKBONE | {"keypoints": 4}, soft_tokens=1)
    meaning = export_parts(teacher, tmp_path / "out")
    assert max(meaning["differences"].values()) < 1e-3 and set(meaning["differences"]) == {"vision", "decode"}
    assert set(meaning["files"]) == {"vision.onnx", "decode.onnx"}
    assert main(["export", str(tmp_path / "out"), "--choose"]) == 4 and "a whole policy" in capsys.readouterr().err
    with pytest.raises(UsageError, match="parallel"):
        export_parts(small_policy(root / "data"), tmp_path / "no")
    assert main(["export", str(root / "policy"), "--to", "onnx", "--parts", "--out", str(tmp_path / "no")]) == 2
    assert "student backbone" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_an_edited_description_is_refused(exported, tmp_path):
    edge = pytest.importorskip("serve.edge")
    folder = tmp_path / "edited"
    shutil.copytree(exported, folder)
    meaning = json.loads((folder / "export.json").read_text())
    meaning["chunk_seconds"] = 0.5
    (folder / "export.json").write_text(json.dumps(meaning))
    with pytest.raises(CheckpointError, match="another content than was written"):
        edge.EdgePolicy.load(folder)
