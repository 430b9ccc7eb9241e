"""`OnnxPolicy`: an export folder that acts as the policy does, so that `vla.evaluate` and the parity report can judge it.

A robot uses `serve/edge.py`, which needs neither torch nor pydantic.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla.actions import codec_from_json
from vla.embodiment import EmbodimentSpec
from vla.errors import CheckpointError, UsageError
from vla.export.onnx import open_graph
from vla.images import ImagePreparation
from vla.normalize import Normalizer
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

        self.folder, self.meaning = folder, read_export(folder) if meaning is None else meaning
        kept = self.meaning
        graphs = kept["graphs"]["policy"]
        if graph not in graphs:
            raise UsageError(folder, found=f"graph {graph!r}", expected=f"one of {sorted(graphs)}",
                             fix="export it with --int8 dynamic")  # fmt: skip
        self.embodiments = {key: EmbodimentSpec.model_validate(entry) for key, entry in kept["embodiments"].items()}
        self.normalizers = {
            robot: {part: Normalizer.from_json(entry, f"{folder}: {robot}.{part}") for part, entry in parts.items()}
            for robot, parts in kept["normalizers"].items()
        }
        self.codec, self.image = codec_from_json(kept["codec"]), ImagePreparation(**kept["image"])
        self.decode, self.fingerprint = kept["decode"], kept["policy"]
        self.recorded_seeds, self.instructions = kept["recorded_seeds"], kept["instructions"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.sentence_graph = open_graph(folder / kept["graphs"]["sentence"], 1)
        self.policy_graph = open_graph(folder / graphs[graph], threads)
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


def read_export(folder: Path) -> dict[str, Any]:
    """The content of export.json of a whole policy. Raises `CheckpointError` for another folder."""
    try:
        meaning = json.loads((folder / "export.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(folder, found=f"no readable export.json ({error})",
                              expected="a folder written by vla export --to onnx", fix="export it again") from None  # fmt: skip
    found = meaning.get("format") if isinstance(meaning, dict) else None
    if found != 1:
        raise CheckpointError(folder / "export.json", found=f"format {found}", expected="format 1",
                              fix="export it again with this version")  # fmt: skip
    if meaning.get("parts"):
        raise CheckpointError(folder / "export.json", found="parts of a teacher (vla export --parts)", expected="a whole policy",
                              fix="give an export made without --parts")  # fmt: skip
    return meaning
