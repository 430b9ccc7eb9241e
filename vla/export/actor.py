"""`OnnxPolicy`: an export folder that acts as the policy does, so that `vla.evaluate` and the parity report can judge it.

A robot uses `serve/edge.py`, which needs neither torch nor pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla.actions import codec_from_json
from vla.embodiment import EmbodimentSpec
from vla.errors import CheckpointError, UsageError
from vla.export.onnx import open_graph
from vla.export_folder import read_export, understand
from vla.policy.protocol import Chunk
from vla.prompt import act_prompt
from vla.resample import chunk_steps, source_step, to_robot_steps
from vla.schema import Observation

_MOST_SENTENCES = 1000


class OnnxPolicy:
    """Acts from the graphs of `folder`; implements `vla.evaluate.jobs.Actor`."""

    def __init__(self, folder: Path, meaning: Mapping[str, Any] | None = None, graph: str = "float32", threads: int = 1) -> None:
        """`meaning`: the content of export.json, where it is not written yet; `graph`: `float32` or `int8`."""
        from tokenizers import Tokenizer

        self.export = read_export(folder) if meaning is None else understand(folder, meaning)
        self.folder, self.meaning = folder, self.export.meaning
        kept, file = self.meaning, self.export.graph(graph)
        self.embodiments = {key: EmbodimentSpec.model_validate(kept["embodiments"][key]) for key in kept["robots"]}
        self.normalizers = self.export.normalizers
        self.codec, self.image = codec_from_json(kept["codec"]), self.export.image
        self.decode, self.fingerprint = kept["decode"], kept["policy"]
        self.recorded_seeds, self.instructions = kept["recorded_seeds"], kept["instructions"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.sentence_graph = open_graph(folder / kept["graphs"]["sentence"], 1)
        self.policy_graph = open_graph(folder / file, threads)
        self.inputs = [entry.name for entry in self.policy_graph.get_inputs()]
        self._sentences: dict[tuple[str, str], np.ndarray] = {}

    def steps(self, embodiment: str) -> tuple[int, int]:
        """(length of a chunk, steps carried out before looking again), at the robot's control rate."""
        kept = self.meaning
        return chunk_steps(kept["chunk_seconds"], kept["chunk"], kept["execute"], self.embodiments[embodiment].control_hz)

    def sentence(self, instruction: str, robot: str) -> np.ndarray:
        """(1, d): computed once per instruction and robot."""
        key = instruction, robot
        if key not in self._sentences:
            if len(self._sentences) >= _MOST_SENTENCES:
                self._sentences.clear()
            text = act_prompt(instruction, self.meaning["prompt"]["version"], robot)
            ids = np.array([self.tokenizer.encode(text, add_special_tokens=False).ids], np.int64)
            self._sentences[key] = self.sentence_graph.run(None, {"ids": ids})[0]
        return self._sentences[key]

    def feed(self, observation: Observation, instruction: str, robot: str, drop_state: bool = False) -> dict[str, np.ndarray]:
        """The inputs of policy.onnx. Raises `DataError` for an observation that is not this robot's."""
        spec, kept = self.embodiments[robot], self.meaning
        spec.check_observation(observation, f"observation for {robot!r}")
        images: Any = observation["images"]
        there = [(slot, name) for slot, name in enumerate(spec.cameras) if name in images]
        state = np.zeros((1, kept["state_dim"]), np.float32)
        if spec.state_dim and not drop_state:
            state[0, : spec.state_dim] = self.normalizers[robot]["state"].to_unit(np.asarray(observation["state"], np.float32))
        whole = {
            "images": np.stack([self.image(images[name]) for _, name in there]),
            "slots": np.array([slot for slot, _ in there], np.int64), "sentence": self.sentence(instruction, robot),
            "state": state, "robot": np.array([kept["robots"].index(robot)], np.int64),
        }  # fmt: skip
        return {name: whole[name] for name in self.inputs}

    def unit(
        self, observation: Observation, instruction: str, robot: str, drop_state: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(unit, symbols, confidence), each (H, A), of the widest robot's dimensions."""
        unit, symbols, confidence = self.policy_graph.run(None, self.feed(observation, instruction, robot, drop_state))
        if np.isnan(confidence).all():  # an L1 head says numbers: which bin they lie in is the codec's to say
            symbols = self.codec.encode(unit).reshape(unit.shape)
        return unit, symbols, confidence

    def act_batch(
        self, observations: Sequence[Observation], instructions: Sequence[str], embodiment: str, *, decode: Any = None,
        seeds: Sequence[int] | None = None, drop_state: bool = False,
    ) -> list[Chunk]:  # fmt: skip
        """As `VLAPolicy.act_batch`, one observation after the other. `decode` is the graph's own."""
        if decode is not None and decode != self.decode:
            raise UsageError("decode", found=decode, expected=f"{self.decode}, which is in the graph",
                             fix="set policy.decode and export again")  # fmt: skip
        if embodiment not in self.embodiments:
            raise CheckpointError("act()", found=f"embodiment {embodiment!r}", expected=f"one of {sorted(self.embodiments)}",
                                  fix="use a policy trained on this robot")  # fmt: skip
        spec, (n, _) = self.embodiments[embodiment], self.steps(embodiment)
        chunks = []
        for observation, instruction in zip(observations, instructions, strict=True):
            said = self.unit(observation, instruction, embodiment, drop_state)
            unit, symbols, confidence = (part[:, : spec.action_dim] for part in said)
            held = source_step(n, len(unit))
            actions = to_robot_steps(self.normalizers[embodiment]["action"].from_unit(unit), n, spec)
            chunks.append(Chunk(actions, confidence[held].astype(np.float32), symbols[held]))
        return chunks
