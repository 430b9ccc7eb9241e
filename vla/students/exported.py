"""A student's step as a robot runs it: exported, with random weights, by onnxruntime.

A file of its own since only it needs the exporter: `timing` knows torch, and `vla/export/` knows nothing of choosing students.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch

from vla.backbones import Sizes
from vla.backbones.student import StudentNet
from vla.errors import MachineError
from vla.export.graphs import PolicyGraph
from vla.export.int8 import quantise
from vla.export.onnx import OPSET, inputs_of, open_graph, require_onnx, trace
from vla.policy import VLAPolicy
from vla.students.timing import TORCH, Runner, Step


def runners() -> Mapping[str, Runner]:
    """Every runtime that is installed here, the likeliest first."""
    try:
        require_onnx()
    except MachineError:
        return TORCH
    return {"onnx-int8": partial(_onnx_step, int8=True), "onnx": partial(_onnx_step, int8=False), **TORCH}


@torch.inference_mode()
def _onnx_step(network: StudentNet, sizes: Sizes, cameras: int, threads: int, int8: bool) -> Step:
    """The exported graph of `network`, in memory once it is made."""
    config = network.config
    # What a graph asks of a policy, without robots and statistics.
    policy = SimpleNamespace(model=network, l1_head=None, encoder=SimpleNamespace(action_dim=sizes.slots // sizes.chunk),
                             config=SimpleNamespace(decode="mean"), centres=torch.linspace(-1, 1, sizes.symbols))  # fmt: skip
    side = config.image_size
    pictures = torch.randint(0, 256, (cameras, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = {"images": pictures, "slots": torch.arange(cameras) % config.max_cameras, "sentence": torch.ones(1, config.hidden),
             "state": torch.zeros(1, config.state_dim), "robot": torch.zeros(1, dtype=torch.long)}  # fmt: skip
    inputs = {name: whole[name] for name in inputs_of(network)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.onnx"
        trace(PolicyGraph(cast(VLAPolicy, policy)), inputs, ["unit", "symbols", "confidence"], dict.fromkeys(inputs), path, OPSET)
        if int8:
            source, path = path, Path(folder) / "int8.onnx"
            quantise(source, path, "dynamic")
        session = open_graph(path, threads)
    feed = {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()}

    def step() -> list[np.ndarray]:
        return session.run(None, feed)

    return step
