"""Who acts in `vla operate`: a policy folder, an export, a server, or the tabletop's scripted expert. May load torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serve.robot import Robot
from serve.speaking import LocalSpeaker, Speaker
from vla.errors import UsageError
from vla.handoff.gate import FILE, Gate, folder_of, read_handoff
from vla.prompt import DONE

logger = logging.getLogger(__name__)

EXPERT = "expert"


@dataclass
class Student:
    """What a station needs to know of it."""

    acts: Any
    """`serve.loop.Acts`."""
    name: str
    robots: Mapping[str, Robot] = field(default_factory=dict)
    """Empty: whatever stands there."""
    instructions: Sequence[str] = ()
    """What it can be told; never `done`, which is a planner's word."""
    folder: Path | None = None
    """Where `handoff.json` may lie."""
    inside: bool = False
    """Whether its looks can be given hidden states and draws."""
    speaker: Speaker | None = None
    close: Any = None

    def __post_init__(self) -> None:
        self.instructions = tuple(text for text in self.instructions if text != DONE)


@dataclass(frozen=True)
class Look:
    """A chunk, with what a gate's detector wants to know of it."""

    actions: np.ndarray
    confidence: np.ndarray
    symbols: np.ndarray
    features: np.ndarray | None
    samples: np.ndarray | None


class Inside:
    """A `vla.policy.VLAPolicy` as a student, whose looks carry hidden states, and draws where they are wanted."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.samples = policy, 0
        self.looks_inside = False

    def act(self, observation: Any, instruction: str, robot: str | None = None) -> Any:
        if not self.looks_inside:
            return self.policy.act(observation, instruction, robot)
        from vla.policy.inside import act_inside

        (look,) = act_inside(self.policy, [observation], [instruction], robot or self.policy.robot, samples=self.samples)
        chunk = look.chunk
        return Look(chunk.actions, chunk.confidence, chunk.symbols, look.features, look.samples if self.samples else None)

    def steps(self, robot: str) -> tuple[int, int]:
        return self.policy.steps(robot)


def student_of(given: str, *, device: str | None = None, token: str | None = None, robot: str | None = None) -> Student:
    """The one that `vla operate` was given. Raises `UsageError`, `CheckpointError`, `Refusal` for a server that is not there."""
    if given == EXPERT:
        from serve.station_sim import Expert

        return Student(Expert(), "the scripted expert", instructions=Expert.instructions)
    if given.startswith(("http://", "https://", "ws://", "wss://")):
        from serve.client import Client
        from serve.remote_planner import ServerSpeaker

        client = Client(given, token, robot=robot)
        known = tuple(map(str, client.said.get("instructions") or ()))
        return Student(client, f"{client.policy[:12]} at {client.address}", client.robots, known,
                       speaker=ServerSpeaker(given, token), close=client.close)  # fmt: skip
    path = Path(given)
    if (path / "export.json").is_file():
        from serve.edge import EdgePolicy

        edge = EdgePolicy.load(path)
        return Student(edge, path.name, edge.robots, edge.instructions, path)
    from vla.policy import load_policy

    policy = load_policy(given, device)
    robots = {key: Robot.from_json(spec.model_dump(mode="json"), f"robot {key!r}") for key, spec in policy.embodiments.items()}
    name = path.resolve().parent.name if path.name == "policy" else path.name
    return Student(Inside(policy), name, robots, tuple(policy.instructions), folder_of(path) if path.is_dir() else None, True,
                   LocalSpeaker(policy))  # fmt: skip


def gate_of(student: Student, wanted: str, folder: Path | None) -> Any:
    """What `--handoff` says: `auto`, `off`, `drill=N`, or responses with their rates; None for nobody. Raises `UsageError`."""
    from serve.answering import Drill

    if wanted == "off":
        return None
    if wanted.startswith("drill="):
        return Drill(_number("drill", wanted.partition("=")[2], int))
    where = folder or student.folder
    if wanted == "auto":
        if where is None or not (folder_of(where) / FILE).is_file():
            logger.warning(
                "no %s beside the policy: nobody is asked for doubt (vla handoff calibrate, or --handoff drill=20)", FILE
            )
            return None
        respond = None
    else:
        respond = {name: _number(name, value, float) for name, _, value in (p.partition("=") for p in wanted.split(","))}
        if where is None:
            raise UsageError("--handoff", found="a policy without a folder here", expected=f"where its {FILE} lies",
                             fix="--handoff-folder DIR")  # fmt: skip
    gate = Gate.load(where, respond)
    if gate.needs and not student.inside:
        known = [name for name in ("overlap", "entropy", "entropy_max") if name in gate.handoff.meaning["scores"]]
        if not known:
            raise UsageError("--handoff", found=f"detector {gate.score!r}, which looks inside", expected="one of the chunk alone",
                             fix="--handoff off, or calibrate again")  # fmt: skip
        logger.warning("%s cannot be seen from outside: the hand-off is by %s", gate.score, known[0])
        gate = Gate(read_handoff(where), respond, known[0])
    if gate.needs and isinstance(student.acts, Inside):
        student.acts.looks_inside, student.acts.samples = True, gate.samples
    return gate


def _number(name: str, text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UsageError("--handoff", found=f"{name}={text}", expected="auto, off, drill=N, or ask=0.1,hold=0.02",
                         fix="--handoff ask=0.1") from None  # fmt: skip
