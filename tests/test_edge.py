"""An exported policy on the robot: the policy's own actions, every fault said clearly, no package it does not need."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import edge_folder
import numpy as np
import onnx
import pytest
from edge_folder import edge_spec, edit, look, normalizer, restated, write_edge_folder
from small_policies import seen, small_policy

from serve.edge import SENTENCES, EdgePolicy
from serve.robot import Robot
from vla.embodiment import EmbodimentSpec
from vla.errors import CheckpointError, DataError, MachineError, UsageError, VLAError
from vla.resample import to_robot_steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder nobody spoils."""
    return write_edge_folder(tmp_path_factory.mktemp("edge") / "export")


@pytest.fixture(scope="module")
def policy(whole: Path) -> EdgePolicy:
    return EdgePolicy.load(whole)


def ids(policy: EdgePolicy, text: str) -> list[int]:
    return policy._tokenizer.encode(text, add_special_tokens=False).ids


# --- acting ----------------------------------------------------------------------------------------------------------


def test_actions_are_what_the_graph_says_in_robot_units(policy: EdgePolicy):
    observation = look()
    chunk = policy.act(observation, " Do  thing\n1")
    unit = restated(list(observation["images"].values()), ids(policy, "do thing 1"),
                    normalizer(edge_spec(), "state").to_unit(observation["state"]))  # fmt: skip
    np.testing.assert_allclose(chunk.actions, normalizer(edge_spec(), "action").from_unit(unit), atol=1e-6)
    assert chunk.actions.dtype == chunk.confidence.dtype == np.float32 and chunk.symbols.dtype == np.int64
    assert chunk.confidence.shape == chunk.symbols.shape == (4, 4) and policy.steps("tabletop") == (4, 2)


def test_cameras_are_numbered_by_the_robot_and_not_by_the_observation(policy: EdgePolicy):
    one = look()
    other = {**one, "images": dict(reversed(one["images"].items())), "unused": 1}
    np.testing.assert_array_equal(policy.act(one, "go").actions, policy.act(other, "go").actions)


def test_a_chunk_of_time_is_played_at_the_robots_own_rate(tmp_path: Path):
    fast, wide = edge_spec(control_hz=20, name="fast"), edge_spec()
    folder = write_edge_folder(tmp_path / "e", {"fast": fast, "tabletop": wide}, chunk_seconds=0.4)
    policy = EdgePolicy.load(folder)
    assert policy.steps("fast") == (8, 4) and policy.steps("tabletop") == (4, 2)
    slow, quick = (policy.act(look(), "go", robot) for robot in ("tabletop", "fast"))
    np.testing.assert_array_equal(quick.actions, to_robot_steps(slow.actions, 8, fast))
    np.testing.assert_array_equal(quick.symbols[::2], slow.symbols)
    with pytest.raises(UsageError, match="no robot"):
        policy.act(look(), "go")
    with pytest.raises(CheckpointError, match="robot 'table'"):
        policy.act(look(), "go", "table")


def test_it_is_the_policys_own_act(tmp_path: Path):
    """Everything but the graphs, whose parity the exporter proves: here they are the policy itself, called as they would be."""
    import torch

    student = {"kind": "student", "image_size": 48, "patch": 16, "hidden": 32, "layers": 1, "heads": 2, "mlp": 64,
               "channels": (8, 8, 16), "keypoints": 4, "text_vocab": 300}  # fmt: skip
    teacher = small_policy(tmp_path / "data", backbone=student, chunk=4, execute=2, chunk_seconds=0.3, prompt="robot-1")
    said = teacher.describe()
    folder = write_edge_folder(
        tmp_path / "e", {"tabletop": teacher.embodiments["tabletop"]}, chunk_seconds=0.3,
        **{key: said[key] for key in ("normalizers", "image", "prompt")}, text={"vocab": 300, "positions": 64},
    )  # fmt: skip
    teacher.writer.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))  # pyright: ignore
    net, shape = teacher.model, (4, 4)

    def sentence(ids):
        return [net.text(torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.bool)).numpy()]

    def graph(images, slots, sentence, state, robot):
        pixels, told = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(sentence)
        tokens = net.look(pixels, told.expand(len(pixels), -1), torch.from_numpy(slots))
        hidden, _ = net.act(tokens.reshape(1, -1, tokens.shape[-1]), None, told, torch.from_numpy(state), torch.from_numpy(robot))
        p = net.symbol_logits(hidden).float().softmax(-1)
        entropy = -(p * p.clamp(min=1e-12).log()).sum(-1)
        parts = p @ teacher.centres, p.argmax(-1), 1 - entropy / np.log(p.shape[-1])
        return [part.numpy().reshape(shape) for part in parts]

    edge = EdgePolicy.load(folder, verify=False)
    edge._sentence, edge._policy = sentence, graph
    with torch.inference_mode():
        for n in range(3):
            mine, own = edge.act(seen(n), "Do thing 1"), teacher.act(seen(n), "Do thing 1")
            assert mine.actions.shape == (3, 4) and mine.actions.dtype == own.actions.dtype
            np.testing.assert_allclose(mine.actions, own.actions, atol=1e-6)
            np.testing.assert_allclose(mine.confidence, own.confidence, atol=1e-6)
            np.testing.assert_array_equal(mine.symbols, own.symbols)


def test_sentences_are_computed_once_and_not_kept_for_ever(policy: EdgePolicy):
    asked, real = [], policy._sentence
    policy._sentence = lambda ids: asked.append(ids) or real(ids=ids)
    try:
        for n in [*range(SENTENCES + 10), SENTENCES + 9, 0]:
            policy.sentence(f"number {n}", "tabletop")
    finally:
        policy._sentence = real
    assert len(asked) == SENTENCES + 11 and len(policy._sentences) == SENTENCES


@pytest.mark.parametrize("text", ["schiebe den Würfel", "押す", "🤖 go", "\ud800 left", "a\x00b\u202e", "x" * 512])
def test_any_text_is_an_instruction(policy: EdgePolicy, text: str):
    assert np.isfinite(policy.act(look(), text).actions).all()


@pytest.mark.parametrize("text", ["", " \n\t", "\x00\x07", "x" * 513, 7, None])
def test_what_is_no_instruction_is_refused(policy: EdgePolicy, text):
    with pytest.raises(DataError, match="instruction"):
        policy.act(look(), text)


def test_a_sentence_that_was_not_trained_is_said_once(whole: Path, caplog: pytest.LogCaptureFixture):
    policy = EdgePolicy.load(whole)
    with caplog.at_level(logging.WARNING):
        for text in ("Do thing 1", "fly", "do thing 0", "FLY", "fly"):
            policy.act(look(), text)
    assert [r.getMessage()[:30] for r in caplog.records] == ["'fly' is none of the 2 sentenc"]


def test_a_policy_without_state_takes_none(tmp_path: Path):
    folder = write_edge_folder(tmp_path / "e", state_token=False)
    policy = EdgePolicy.load(folder, "float32", threads=2)
    one, other = look(), look()
    other["state"] = other["state"] + 0.1
    np.testing.assert_array_equal(policy.act(one, "go").actions, policy.act(other, "go").actions)


BAD = [
    {"images": {"front": look()["images"]["front"]}, "state": np.zeros(4)},
    {"images": {"a": look()["images"]["front"], "wrist": look()["images"]["wrist"]}, "state": np.zeros(4)},
    {**look(), "state": np.zeros(5)}, {**look(), "state": None}, {"images": look()["images"]}, {**look(), "state": [0, 0, 0]},
    {**look(), "state": np.array([0, np.nan, 0, 0])}, {**look(), "state": [np.inf] * 4},
    {**look(), "images": {"front": np.zeros((8, 8, 3)), "wrist": np.zeros((8, 8), np.uint8)}},
    {**look(), "images": {"front": None, "wrist": np.zeros((8, 8, 4), np.uint8)}},
    {**look(), "images": {"front": np.zeros((0, 8, 3), np.uint8), "wrist": look()["images"]["wrist"]}},
    {**look(), "state": ["0", "0", "0", "0"]}, {**look(), "state": [0, None, 0, 0]}, {**look(), "state": [10**400] * 4},
    {"state": np.zeros(4)}, {"images": [1]}, [1],
]  # fmt: skip


@pytest.mark.parametrize("observation", BAD)
def test_observations_are_refused_as_the_policy_refuses_them(policy: EdgePolicy, observation):
    with pytest.raises(DataError) as own:
        edge_spec().check_observation(observation, "here")
    with pytest.raises(DataError) as mine:
        policy.act(observation, "go")
    assert mine.value.found == own.value.found


def test_a_robot_is_what_its_embodiment_is():
    spec = EmbodimentSpec.model_validate(edge_spec(mode="joint").model_dump())
    robot = Robot.from_json(spec.model_dump(mode="json"), "here")
    assert (robot.key, robot.state_dim, robot.action_dim, robot.control_hz) == ("tabletop/joint", 4, 4, 10)
    assert robot.names("action") == spec.action_names and list(robot.cameras) == list(spec.cameras)


# --- folders that are wrong ------------------------------------------------------------------------------------------


def refuse(folder: Path, kind: type[VLAError], *parts: str, **options) -> None:
    with pytest.raises(kind) as caught:
        EdgePolicy.load(folder, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert caught.value.fix


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    return write_edge_folder(tmp_path / "export")


def resealed(folder: Path) -> Path:
    edge_folder.seal(folder, json.loads((folder / "export.json").read_text()))
    return folder


def test_damage_is_found_before_anything_is_run(folder: Path):
    graph = folder / "policy.int8.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(bytes(data))
    refuse(folder, CheckpointError, "policy.int8.onnx: other content (sha256)", "copy the whole folder")
    graph.write_bytes(bytes(data[:-9]))
    (folder / "tokenizer.json").unlink()
    refuse(folder, CheckpointError, f"policy.int8.onnx: {len(data) - 9:,} bytes, not", "tokenizer.json: missing")
    refuse(resealed(folder), CheckpointError, "tokenizer.json: not among the files")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_graph_cut_short_is_no_graph(folder: Path, keep: int):
    graph = folder / "policy.int8.onnx"
    graph.write_bytes(graph.read_bytes()[:keep])
    refuse(resealed(folder), CheckpointError, "policy.int8.onnx", "onnxruntime")


def test_a_folder_may_be_called_anything(tmp_path: Path):
    folder = write_edge_folder(tmp_path / "opset 20, IR version 10")
    graph = folder / "policy.int8.onnx"
    graph.write_bytes(graph.read_bytes()[:100])
    refuse(resealed(folder), CheckpointError, "a whole ONNX graph")


@pytest.mark.parametrize(("opset", "ir"), [(999, 10), (17, 99)])
def test_a_graph_too_new_for_the_runtime(folder: Path, opset: int, ir: int):
    model = onnx.load(folder / "policy.int8.onnx")
    model.opset_import[0].version, model.ir_version = opset, ir
    onnx.save(model, folder / "policy.int8.onnx")
    refuse(resealed(folder), MachineError, "onnxruntime", "pip install -U -r")


def test_another_graph_than_the_folder_says(folder: Path):
    (folder / "policy.int8.onnx").write_bytes((folder / "sentence.onnx").read_bytes())
    refuse(resealed(folder), CheckpointError, "input images is missing", "an input ids", "no output unit")


def test_folders_that_say_too_little_or_too_much(folder: Path, tmp_path: Path):
    meaning = json.loads((folder / "export.json").read_text())
    refuse(edit(folder, format=2), CheckpointError, "format 2", "pip install --no-deps -U tendon-vla")
    refuse(edit(folder, format=1, normalizers={}), CheckpointError, "no statistics of tabletop.action, tabletop.state")
    broken = {"tabletop": {**meaning["normalizers"]["tabletop"], "state": {"scheme": "bounds"}}}
    refuse(edit(folder, normalizers=broken), CheckpointError, "normalizers.tabletop.state", "'mask'")
    short = {"tabletop": {**meaning["normalizers"]["tabletop"], "state": normalizer(edge_spec(), "state").to_json()}}
    short["tabletop"]["state"]["stats"] = {"min": [0], "max": [1], "count": 1}
    short["tabletop"]["state"]["mask"] = [True]
    refuse(edit(folder, normalizers=short), CheckpointError, "statistics of 1")
    edit(folder, normalizers=meaning["normalizers"])
    refuse(edit(folder, prompt={"version": "plain-9", "template": "{instruction}!"}), CheckpointError, "plain-9", "newer version")
    edit(folder, prompt=meaning["prompt"])
    refuse(edit(folder, graphs={"sentence": "../x.onnx", "policy": {}}), CheckpointError, "'../x.onnx' does not lie in")
    refuse(edit(folder, graphs=meaning["graphs"], robots=["other"]), CheckpointError, "robots ['other']")
    refuse(edit(folder, robots=["tabletop"], text={"vocab": 9, "positions": 64}), CheckpointError, "tokenizer.json", "256 words")
    edit(folder, text=meaning["text"])
    refuse(folder, UsageError, "runtime 'bf16'", "one of ['float32', 'int8']", runtime="bf16")
    (folder / "tokenizer.json").write_text("{}")
    refuse(resealed(folder), CheckpointError, "tokenizer.json")
    (folder / "export.json").write_text("{")
    refuse(folder, CheckpointError, "JSONDecodeError")
    (folder / "export.json").write_text('{"format": 1}')
    refuse(folder, CheckpointError, "no ['embodiments'")
    refuse(tmp_path, CheckpointError, "no export.json", "vla export POLICY --to onnx")


@pytest.mark.parametrize("key", ["embodiments", "normalizers", "image", "prompt", "chunk", "robots", "text", "files", "graphs",
                                 "runtime", "chunk_seconds"])  # fmt: skip
@pytest.mark.parametrize("value", [None, 7, "x", [], {"x": 1}, -1])
def test_nonsense_in_export_json_is_an_error_that_says_so(folder: Path, key: str, value):
    if (key, value) not in (("chunk_seconds", None), ("chunk_seconds", 7), ("chunk", 7)):  # which make sense
        refuse(edit(folder, **{key: value}), VLAError, "export")


def test_a_graph_that_says_nan_is_refused(folder: Path):
    policy = EdgePolicy.load(folder)
    policy._policy = lambda **feeds: [np.full((4, 4), np.nan, np.float32), np.zeros((4, 4), np.int64), np.zeros((4, 4))]
    with pytest.raises(CheckpointError, match="policy.int8.onnx\n  found:    an output that is nan"):
        policy.act(look(), "go")


# --- alone -----------------------------------------------------------------------------------------------------------

ALONE = """
import sys

class Refuse:
    banned = {"torch", "torchvision", "transformers", "pydantic", "yaml", "av", "gymnasium", "tqdm", "safetensors", "onnx",
              "scipy", "pyarrow", "pandas", "datasets", "accelerate", "huggingface_hub", "timm", "mujoco"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.banned:
            raise ModuleNotFoundError(f"No module named {name!r}, which a robot has not", name=name)

sys.meta_path.insert(0, Refuse())
from edge_looking import look  # noqa
from serve.edge_command import main
from serve.edge import EdgePolicy
from serve.guard import Guard
from serve.loop import ControlLoop, Hurried

policy = EdgePolicy.load(sys.argv[1])
print(policy.act(look(), "do thing 1").actions.tolist())
class Robot:
    left = 6
    def observe(self):
        return look(self.left)
    def act(self, action):
        self.left -= 1
        return not self.left
loop = ControlLoop(policy, Robot(), 10, Guard(policy.robots["tabletop"], longest=4), clock=Hurried(), ensemble=0.01)
report = loop.run("do thing 1")
print(report.to_json()["ticks"], report.holds)
assert main(["check", sys.argv[1], "--runs", "3", "--json"]) == 0
print(sorted(Refuse.banned & set(sys.modules)))
"""


def test_nothing_but_onnxruntime_numpy_tokenizers_and_pillow(whole: Path, policy: EdgePolicy, tmp_path: Path):
    source = Path(edge_folder.__file__).read_text()
    looking = source[source.index("def look(") : source.index("# ----------")]
    head = "from typing import Any\nimport numpy as np\nSIZE = 32\n"
    (tmp_path / "edge_looking.py").write_text(head + looking)
    (tmp_path / "alone.py").write_text(ALONE)
    done = subprocess.run([sys.executable, str(tmp_path / "alone.py"), str(whole)], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1], env={"PYTHONPATH": str(Path(__file__).parents[1])})  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert json.loads(lines[0]) == policy.act(look(), "do thing 1").actions.tolist()
    assert lines[1] == "6 0" and lines[-1] == "[]"
