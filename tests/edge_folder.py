"""An export folder made by hand, in a moment and without torch: graphs of a few nodes whose answers numpy can restate."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from vla.embodiment import Camera, EmbodimentSpec, load_embodiment
from vla.normalize import Normalizer, Stats
from vla.prompt import PROMPTS

H, D, SIZE = 4, 8, 32
INSTRUCTIONS = ["do thing 0", "do thing 1"]


def edge_spec(cameras: tuple[str, ...] = ("front", "wrist"), **changes: Any) -> EmbodimentSpec:
    """The tabletop robot with small pictures."""
    sizes = {name: Camera(height=SIZE, width=SIZE) for name in cameras}
    return load_embodiment("tabletop").model_copy(update={"cameras": sizes, **changes})


def weights(state: int = 4, action: int = 4) -> dict[str, np.ndarray]:
    """The graphs' numbers."""
    rng = np.random.default_rng(0)
    return {
        "embed": rng.normal(size=(256, D)).astype(np.float32),
        "state": rng.normal(size=(state, H * action)).astype(np.float32),
        "said": rng.normal(size=(D, H * action)).astype(np.float32),
        "slots": np.linspace(0.5, 1.5, 8).astype(np.float32),
    }


def restated(images: list[np.ndarray], ids: list[int], state: np.ndarray, action: int = 4) -> np.ndarray:
    """(H, A) `unit` of the policy graph, by numpy."""
    w = weights(len(state), action)
    seen = np.mean([frame.astype(np.float32).mean() * w["slots"][i] for i, frame in enumerate(images)]) / 255
    said = w["embed"][ids].mean(0)
    return np.tanh(0.1 * (said @ w["said"] + state @ w["state"]) + seen - 0.5).reshape(H, action)


def write_edge_folder(
    root: Path, specs: dict[str, EmbodimentSpec] | None = None, opset: int = 17, state_token: bool = True, **changes: Any
) -> Path:  # fmt: skip
    """An export folder at `root`; `changes` overwrite keys of export.json."""
    root.mkdir(parents=True)
    specs = specs or {"tabletop": edge_spec()}
    action, state = (max(getattr(s, f"{part}_dim") for s in specs.values()) for part in ("action", "state"))
    onnx.save(sentence_graph(opset), root / "sentence.onnx")
    for name in ("policy.onnx", "policy.int8.onnx"):
        onnx.save(policy_graph(opset, state, action, state_token), root / name)
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore
    tokenizer.save(str(root / "tokenizer.json"))
    (root / "requirements.txt").write_text("onnxruntime>=1.20\nnumpy>=2.0\ntokenizers>=0.22\npillow>=11\n")
    meaning = {
        "format": 1, "embodiments": {k: s.model_dump(mode="json") for k, s in specs.items()},
        "normalizers": {k: {p: normalizer(s, p).to_json() for p in ("action", "state")} for k, s in specs.items()},
        "codec": {"kind": "bins", "bins": 256}, "image": {"size": SIZE, "resample": "bilinear", "crop": 1.0},
        "prompt": {"version": "plain-1", "template": PROMPTS["plain-1"]}, "chunk": H, "execute": 2, "chunk_seconds": None,
        "decode": "mean", "action_dim": action, "state_dim": state, "symbols": 256, "state_token": state_token,
        "robots": list(specs), "instructions": INSTRUCTIONS, "recorded_seeds": {}, "text": {"vocab": 256, "positions": 64},
        "opset": opset, "graphs": {"sentence": "sentence.onnx", "policy": {"float32": "policy.onnx", "int8": "policy.int8.onnx"}},
        "runtime": {"graph": "int8", "threads": 1}, "policy": "0" * 64, "versions": {}, **changes,
    }  # fmt: skip
    seal(root, meaning)
    return root


def seal(root: Path, meaning: dict[str, Any]) -> None:
    """Write export.json with the sums of what lies there now."""
    others = [p for p in sorted(root.iterdir()) if p.name != "export.json"]
    files = {p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest(), "bytes": p.stat().st_size} for p in others}
    (root / "export.json").write_text(json.dumps({**meaning, "files": files}))


def edit(root: Path, **changes: Any) -> Path:
    """Overwrite keys of export.json."""
    path = root / "export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return root


def normalizer(spec: EmbodimentSpec, part: str) -> Normalizer:
    """Statistics that lie well inside the robot's limits."""
    low, high = (v.astype(np.float64) for v in spec.limits(part))
    ends = low + 0.1 * (high - low), high - 0.2 * (high - low)
    return Normalizer(Stats({"min": ends[0], "max": ends[1]}, 9), "bounds")


def look(n: int = 0, cameras: tuple[str, ...] = ("front", "wrist")) -> dict[str, Any]:
    """An observation of noise."""
    rng = np.random.default_rng(n)
    pictures = {camera: rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8) for camera in cameras}
    return {"images": pictures, "state": rng.uniform(-0.5, 0.5, 4).astype(np.float32)}


# ------------------------------------------------------------------------------------------------------------ graphs


def _model(nodes: list, inputs: list, outputs: list, constants: dict[str, np.ndarray], opset: int) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(v, k) for k, v in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def sentence_graph(opset: int) -> onnx.ModelProto:
    """The mean of the words' rows."""
    nodes = [
        helper.make_node("Gather", ["embed", "ids"], ["words"]),
        helper.make_node("ReduceMean", ["words"], ["sentence"], axes=[1], keepdims=0),
    ]
    return _model(
        nodes, [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "L"])],
        [helper.make_tensor_value_info("sentence", TensorProto.FLOAT, [1, D])], {"embed": weights()["embed"]}, opset,
    )  # fmt: skip


def policy_graph(opset: int, state: int, action: int, state_token: bool) -> onnx.ModelProto:
    """What `restated` says."""
    w = weights(state, action)
    node = helper.make_node
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.UINT8, ["C", SIZE, SIZE, 3]),
        helper.make_tensor_value_info("slots", TensorProto.INT64, ["C"]),
        helper.make_tensor_value_info("sentence", TensorProto.FLOAT, [1, D]),
    ]
    nodes = [
        node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        node("ReduceMean", ["pixels"], ["means"], axes=[1, 2, 3], keepdims=0),
        node("Gather", ["w_slots", "slots"], ["scales"]),
        node("Mul", ["means", "scales"], ["scaled"]),
        node("ReduceMean", ["scaled"], ["seen"], axes=[0], keepdims=1),
        node("Div", ["seen", "white"], ["light"]),
        node("MatMul", ["sentence", "w_said"], ["told"]),
    ]
    if state_token:
        inputs.append(helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, state]))
        nodes += [node("MatMul", ["state", "w_state"], ["felt"]), node("Add", ["told", "felt"], ["both"])]
    nodes += [
        node("Mul", ["both" if state_token else "told", "tenth"], ["small"]),
        node("Add", ["small", "light"], ["sum"]),
        node("Sub", ["sum", "half"], ["centred"]),
        node("Tanh", ["centred"], ["flat"]),
        node("Reshape", ["flat", "shape"], ["unit"]),
        node("Sigmoid", ["unit"], ["confidence"]),
        node("Mul", ["confidence", "white"], ["bins"]),
        node("Cast", ["bins"], ["symbols"], to=TensorProto.INT64),
    ]
    outputs = [helper.make_tensor_value_info(name, kind, [H, action]) for name, kind in
               (("unit", TensorProto.FLOAT), ("symbols", TensorProto.INT64), ("confidence", TensorProto.FLOAT))]  # fmt: skip
    constants = {
        "w_slots": w["slots"], "w_said": w["said"], "shape": np.array([H, action], np.int64),
        **{k: np.array([v], np.float32) for k, v in (("white", 255), ("tenth", 0.1), ("half", 0.5))},
    }  # fmt: skip
    return _model(nodes, inputs, outputs, constants | ({"w_state": w["state"]} if state_token else {}), opset)
