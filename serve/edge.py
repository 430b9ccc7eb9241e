"""A policy on the robot's own computer: an export folder, onnxruntime, numpy, tokenizers, pillow; no torch.

    policy = EdgePolicy.load("exports/student")
    chunk = policy.act({"images": {"front": frame}, "state": state}, "push the red cube left")
    chunk.actions        # (n, a) float32, robot units, at the robot's own control rate

Means what `vla.policy.VLAPolicy.act` means: frames are prepared by the same function, states and actions by the same
normaliser, and what is refused there is refused here. `serve/loop.py` plays the chunks, `serve/guard.py` watches them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve.robot import Robot, robots_of
from vla.errors import CheckpointError, DataError, MachineError, UsageError
from vla.export_folder import ExportFolder, Graph, read_export
from vla.prompt import act_prompt, clean_instruction
from vla.resample import chunk_steps, source_step, to_robot_steps

logger = logging.getLogger(__name__)

SENTENCES = 256
"""Instructions whose embedding is kept."""
_POLICY_INPUTS = {"images": "uint8", "slots": "int64", "sentence": "float", "state": "float", "robot": "int64"}


@dataclass(frozen=True)
class Chunk:
    """What the policy wants to do next; the fields of `vla.policy.Chunk`."""

    actions: np.ndarray  # (n, a) float32, robot units, at the robot's own control rate
    confidence: np.ndarray  # (n, a) float32 in [0, 1]: 1 - entropy / log K of each symbol; NaN where numbers are said (L1)
    symbols: np.ndarray  # (n, a) int64; repeated where a policy step spans several of the robot's


class EdgePolicy:
    """An exported policy, ready to act. One thread at a time."""

    def __init__(self, folder: ExportFolder, sentence: Any, policy: Any, tokenizer: Any, runtime: str, threads: int) -> None:
        """`sentence` and `policy` are `Graph`s, or what answers as they do; use `load`."""
        self.folder, self.runtime, self.threads = folder, runtime, threads
        self._sentence, self._policy, self._tokenizer = sentence, policy, tokenizer
        meaning = folder.meaning
        self.chunk, self.execute, self.chunk_seconds = meaning["chunk"], meaning["execute"], meaning["chunk_seconds"]
        self.robots: Mapping[str, Robot] = robots_of(folder)
        """Every robot it can move, by the key of its embodiment."""
        self._robot_index = {name: np.array([i], np.int64) for i, name in enumerate(self.robots)}
        self._known = {clean_instruction(text) for text in self.instructions}
        self._sentences: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._warned: set[str] = set()

    @classmethod
    def load(cls, folder: str | Path, runtime: str | None = None, threads: int | None = None, verify: bool = True) -> EdgePolicy:
        """Read an export folder. `runtime` ("int8", "float32") and `threads` default to what was fastest when it was exported.

        The files it uses are compared with their sha256 unless `verify` is False. Raises `CheckpointError` for a folder that is
        incomplete, damaged or too new, `MachineError` for packages that are missing or too old, `UsageError` for a runtime the
        folder does not have.
        """
        export = read_export(folder)
        meaning = export.meaning
        runtime = runtime or str(meaning["runtime"]["graph"])
        workers: int = meaning["runtime"]["threads"] if threads is None else threads
        if workers < 1:
            raise UsageError("threads", found=workers, expected="at least 1", fix="leave it out")
        graph, sentence = export.graph(runtime), meaning["graphs"]["sentence"]
        if verify:
            export.verify([sentence, graph, "tokenizer.json"])
        tokenizer = _load_tokenizer(export)
        optional = ("slots", *(() if meaning["state_token"] else ("state",)), "robot")
        return cls(
            export, Graph(export.path / sentence, 1, {"ids": "int64"}, ["sentence"]),
            Graph(export.path / graph, workers, _POLICY_INPUTS, ["unit", "symbols", "confidence"], optional),
            tokenizer, runtime, workers,
        )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """Of the policy that was exported."""
        return self.folder.meaning["policy"]

    @property
    def instructions(self) -> Sequence[str]:
        """Every sentence of the training data."""
        return self.folder.meaning.get("instructions") or []

    @property
    def recorded_seeds(self) -> Mapping[str, Mapping[str, Sequence[Sequence[int]]]]:
        """suite -> task -> [first, last] ranges of every seed seen in training."""
        return self.folder.meaning.get("recorded_seeds") or {}

    def steps(self, robot: str) -> tuple[int, int]:
        """(steps of a chunk, steps carried out before looking again) at the control rate of `robot`."""
        return chunk_steps(self.chunk_seconds, self.chunk, self.execute, self.robots[robot].control_hz)

    def the_robot(self, robot: str | None = None) -> str:
        """`robot`, checked; the only one when it is None."""
        if robot is None:
            if len(self.robots) != 1:
                raise UsageError("act()", found="no robot", expected=f"one of {sorted(self.robots)}", fix="pass robot=...")
            return next(iter(self.robots))
        if robot not in self.robots:
            raise CheckpointError("act()", found=f"robot {robot!r}", expected=f"one of {sorted(self.robots)}",
                                  fix="export a policy trained on this robot")  # fmt: skip
        return robot

    def act(self, observation: Mapping[str, Any], instruction: str, robot: str | None = None) -> Chunk:
        """One chunk for one observation `{"images": {camera: (h, w, 3) uint8}, "state": (S,) float32}`.

        Raises `DataError` for an observation that does not fit the robot or an instruction that is none.
        """
        robot = self.the_robot(robot)
        spec, normalizers, meaning = self.robots[robot], self.folder.normalizers[robot], self.folder.meaning
        spec.check_observation(observation, f"observation for {robot!r}")
        state = np.zeros((1, meaning["state_dim"]), np.float32)
        if spec.state_dim:
            state[0, : spec.state_dim] = normalizers["state"].to_unit(np.asarray(observation["state"], np.float32))
        images = np.stack([self.folder.image(observation["images"][camera]) for camera in spec.cameras])
        unit, symbols, confidence = self._policy(
            images=images, slots=np.arange(len(images), dtype=np.int64), sentence=self.sentence(instruction, robot), state=state,
            robot=self._robot_index[robot],
        )  # fmt: skip
        a, (n, _) = spec.action_dim, self.steps(robot)
        try:
            actions = normalizers["action"].from_unit(unit[:, :a])
        except DataError as error:
            raise CheckpointError(
                self.folder.path / self.folder.graph(self.runtime), found=f"an output that is {error.found}",
                expected="finite numbers", fix="use runtime='float32', or export the policy again",
            ) from error  # fmt: skip
        held = source_step(n, self.chunk)
        return Chunk(to_robot_steps(actions, n, spec), confidence[held, :a].astype(np.float32), symbols[held, :a])

    def sentence(self, instruction: str, robot: str) -> np.ndarray:
        """(1, d) float32: what the policy makes of an instruction; computed once while it is among the last `SENTENCES`."""
        if not isinstance(instruction, str):
            clean_instruction(instruction)  # refuses it, before somebody asks for its hash
        key = instruction, robot
        if key in self._sentences:
            self._sentences.move_to_end(key)
            return self._sentences[key]
        text = act_prompt(instruction, self.folder.meaning["prompt"]["version"], robot)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        (vector,) = self._sentence(ids=np.array([ids], np.int64))
        self._warn_of(clean_instruction(instruction))
        self._sentences[key] = vector
        if len(self._sentences) > SENTENCES:
            self._sentences.popitem(last=False)
        return vector

    def _warn_of(self, instruction: str) -> None:
        if not self._known or instruction in self._known or instruction in self._warned or len(self._warned) >= SENTENCES:
            return
        self._warned.add(instruction)
        logger.warning("%r is none of the %d sentences the policy was trained on; it will do something, perhaps not that",
                       instruction, len(self._known))  # fmt: skip


def _load_tokenizer(export: ExportFolder) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MachineError("tokenizers", found=str(error), expected="the packages of the folder's requirements.txt",
                           fix=f"pip install -r {export.path / 'requirements.txt'}") from error  # fmt: skip
    path = export.path / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise CheckpointError(path, found=str(error)[:200], expected="a tokenizer", fix="copy the whole folder again") from error
    if (size := tokenizer.get_vocab_size()) > export.meaning["text"]["vocab"]:
        raise CheckpointError(path, found=f"{size} words", expected=f"at most {export.meaning['text']['vocab']} (export.json)",
                              fix="copy the whole folder again: tokenizer and graphs are not of one export")  # fmt: skip
    return tokenizer
