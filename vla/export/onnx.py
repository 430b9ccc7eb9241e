"""The graphs of a student as ONNX files, each compared with the policy before anybody sees it.

    sentence.onnx  ids (1, L) int64 -> sentence (1, d) float32
    policy.onnx    images (C, s, s, 3) uint8, slots (C,) int64, sentence (1, d), state (1, S) in [-1, 1], robot (1,) int64
                   -> unit (H, A) in [-1, 1], symbols (H, A) int64, confidence (H, A) float32

C is the number of cameras a robot has; `state` and `robot` are inputs only where the policy is told them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from vla.actions import is_sequence
from vla.backbones.student import StudentNet
from vla.errors import CheckpointError, MachineError, UsageError
from vla.export.graphs import PolicyGraph, SentenceGraph
from vla.policy import VLAPolicy
from vla.schema import Observation

OPSET = 20
OPSETS = range(18, 24)
"""What the exporter writes and the runtime reads."""
_IR = {18: 10, 19: 10, 20: 10, 21: 10, 22: 10, 23: 11}
"""opset -> version of the file format, the oldest it fits in: an older runtime on a robot refuses newer ones."""
RUNTIMES = {18: "1.20", 19: "1.20", 20: "1.20", 21: "1.20", 22: "1.20", 23: "1.23"}
"""opset -> the oldest onnxruntime that reads it."""
TOLERANCE = 1e-3
"""Largest difference of an action in [-1, 1] between a float32 graph and the policy."""


def require_onnx() -> None:
    """Raise `MachineError` unless the packages of the extra `edge` are there."""
    missing = []
    for package in ("onnx", "onnxruntime", "onnxscript"):
        try:
            __import__(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise MachineError("vla export --to onnx", found=f"no {', '.join(missing)}", expected="the packages of the extra `edge`",
                           fix="pip install 'tendon-vla[edge]'")  # fmt: skip


def check_opset(opset: int) -> int:
    """Raise `UsageError` unless graphs can be written in this opset."""
    if opset not in OPSETS:
        raise UsageError("--opset", found=opset, expected=f"{OPSETS.start} to {OPSETS.stop - 1}, what the exporter writes and "
                         "onnxruntime reads", fix=f"leave it out ({OPSET}), or give the highest your runtime knows")  # fmt: skip
    return opset


def check_student(policy: VLAPolicy) -> StudentNet:
    """The network to export. Raises `UsageError` naming all that keeps a policy from being one."""
    config, no = policy.config, []
    if not isinstance(policy.model, StudentNet):
        no.append(f"a {config.backbone.kind} backbone")
    if policy.adapter is not None:
        no.append("an adapter")
    if is_sequence(policy.codec):
        no.append(f"codec {policy.codec.to_json()['kind']}, which is decoded on the host")
    if config.decode == "sample":
        no.append("decode: sample, which draws")
    if no:
        raise UsageError("--to onnx", found=", ".join(no), expected="a student (policy.backbone.kind: student) whose bins become "
                         "numbers by decode mean or argmax, or by an L1 head",
                         fix="distil it into a student (vla distill) and export it; an adapter is merged first (vla merge); "
                         "of a nano policy --parts writes the tower and the decode step")  # fmt: skip
    return cast(StudentNet, policy.model)


def inputs_of(net: StudentNet) -> list[str]:
    """Names of the inputs of policy.onnx, in order."""
    return ["images", "slots", "sentence", *(["state"] if net.state_in is not None else []),
            *(["robot"] if net.robots is not None else [])]  # fmt: skip


@torch.inference_mode()
def write_graphs(policy: VLAPolicy, folder: Path, opset: int = OPSET) -> dict[str, str]:
    """Write sentence.onnx and policy.onnx into `folder`; returns {"sentence": name, "policy": name}.

    Raises `UsageError` for another policy than a student, an opset that cannot be written and a tower that has no graph.
    """
    net = check_student(policy)
    check_opset(opset)
    policy = policy.eval()
    words = torch.arange(5)[None]
    cameras, length = torch.export.Dim("cameras", min=1, max=net.max_cameras), torch.export.Dim("words", min=1, max=4096)
    s, d = net.config.image_size, net.hidden_size
    example = {
        "images": torch.zeros(2, s, s, 3, dtype=torch.uint8), "slots": torch.arange(2), "sentence": torch.ones(1, d),
        "state": torch.zeros(1, net.state_dim), "robot": torch.zeros(1, dtype=torch.long),
    }  # fmt: skip
    names = inputs_of(net)
    shapes: dict[str, Any] = {name: {0: cameras} if name in ("images", "slots") else None for name in names}
    trace(SentenceGraph(net.text), {"ids": words}, ["sentence"], {"ids": {1: length}}, folder / "sentence.onnx", opset)
    trace(PolicyGraph(policy), {name: example[name] for name in names}, ["unit", "symbols", "confidence"], shapes,
          folder / "policy.onnx", opset)  # fmt: skip
    return {"sentence": "sentence.onnx", "policy": "policy.onnx"}


def trace(
    module: nn.Module, inputs: Mapping[str, torch.Tensor], outputs: Sequence[str], shapes: Mapping[str, Any], path: Path,
    opset: int,
) -> None:  # fmt: skip
    """Write `module` as an ONNX file, checked by onnx, with nothing in it of the machine it was written on."""
    import onnx

    # The exporter talks to the terminal about its own steps; what it cannot do it raises.
    logger, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(), tuple(inputs.values()), None, dynamo=True, opset_version=opset, input_names=list(inputs),
                output_names=list(outputs), dynamic_shapes=tuple(shapes[name] for name in inputs), optimize=True, verbose=False,
            )  # fmt: skip
        assert program is not None
        model = program.model_proto
    except Exception as error:  # the exporter raises many kinds; all of them mean that there is no graph of this module
        raise UsageError(f"graph of {path.name}", found=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}",
                         expected="a network that torch.onnx can write",
                         fix="another tower (conv and patch are tested), or another --opset") from error  # fmt: skip
    finally:
        logger.setLevel(level)
    found = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if found != opset:
        raise UsageError("--opset", found=opset, expected=f"{found}, which this network can be written in",
                         fix=f"--opset {found}, or leave it out")  # fmt: skip
    _strip(model)
    model.ir_version = _IR[opset]
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _strip(model: Any) -> None:
    """Remove what only tells where and how the graph was made: call stacks with paths, names of classes."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""


def open_graph(path: Path, threads: int = 1, profile: Path | None = None) -> Any:
    """An onnxruntime session on the CPU with `threads` threads. Raises `CheckpointError` for a file it cannot run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Threads that wait for the next call by spinning would take the cores from the simulator, or from who is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds share no base class
        raise CheckpointError(path, found=f"{type(error).__name__}: {str(error)[:200]}", expected="a graph onnxruntime can run",
                              fix="export it again, with a lower --opset where the runtime is old") from error  # fmt: skip


def torch_chunks(
    policy: VLAPolicy, observations: Sequence[Observation], instructions: Sequence[str], robot: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(unit, symbols, confidence), each (B, H, A): what the policy itself says, before it becomes robot units."""
    pairs = zip(observations, instructions, strict=True)
    batch = policy.collate([policy.encoder.observation(o, i, robot) for o, i in pairs]).to(policy.device)
    unit, confidence, symbols = policy.decide(batch)
    return unit, np.stack(symbols), confidence


def noise(policy: VLAPolicy, robot: str, seed: int) -> Observation:
    """Random pictures and a random state of a robot."""
    rng, spec = np.random.default_rng(seed), policy.embodiments[robot]
    low, high = (getattr(policy.normalizers[robot]["state"], side) for side in ("low", "high"))
    images = {name: rng.integers(0, 256, (c.height, c.width, 3)).astype(np.uint8) for name, c in spec.cameras.items()}
    return {"images": images, "state": rng.uniform(low, high).astype(np.float32)}


def compare(policy: VLAPolicy, actor: Any) -> float:
    """Largest difference |unit| between the float32 graphs and the policy, over every robot and sentences of several lengths.

    Raises `CheckpointError` where it is above `TOLERANCE`: such a graph is another policy.
    """
    sentences = [*policy.instructions[:2], "go", "put the other one " * 24]
    worst = 0.0
    for robot in policy.embodiments:
        seen = [noise(policy, robot, seed) for seed in range(len(sentences))]
        wanted, _, sure = torch_chunks(policy, seen, sentences, robot)
        for i, (observation, sentence) in enumerate(zip(seen, sentences, strict=True)):
            unit, _, confidence = actor.unit(observation, sentence, robot)
            found = float(np.abs(unit - wanted[i]).max())
            if policy.l1_head is None:
                found = max(found, float(np.abs(confidence - sure[i]).max()))
            if not found < TOLERANCE:  # NaN is not, either
                raise CheckpointError("policy.onnx", found=f"an action {found:.2e} off, of robot {robot}",
                                      expected=f"the policy's own to {TOLERANCE}, in [-1, 1]",
                                      fix="nothing was published; try another --opset, and tell us the tower")  # fmt: skip
            worst = max(worst, found)
    return worst
