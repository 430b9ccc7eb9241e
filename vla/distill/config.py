"""A distillation: who teaches, what is learned from it, and how often the student is corrected where it went wrong."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from vla.backbones import NanoConfig
from vla.config import Config
from vla.policy.lesson import LessonConfig
from vla.students import StudentChoice, preset
from vla.train import TrainConfig


class TeacherConfig(Config):
    policy: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    """Policy folder, run folder or Hub id; several are an ensemble, whose opinions are averaged."""
    top: int = Field(default=16, ge=1, le=256)
    """k: symbols kept of each distribution."""
    batch: int = Field(default=64, ge=1)
    """Windows per pass of the teacher. Part of what its answers are, to the last bit: another batch is another cache."""
    cache: str | None = Field(default=None, min_length=1)
    """Folder of its answers; default: one of its own under `.cache/teacher`. Students of one teacher share it."""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """`auto`: bf16 where the device computes in it."""

    @field_validator("policy", mode="before")
    @classmethod
    def _several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class RoundsConfig(Config):
    """On-policy rounds (DAgger, Ross et al. 2011): the student acts, and from where it got to, somebody better goes on."""

    suite: Annotated[str, Field(min_length=1)]
    tasks: tuple[str, ...] | None = None
    rounds: int = Field(default=3, ge=0)
    episodes: int = Field(default=200, ge=1)
    """Scenes of each round."""
    seed: int = Field(default=200_000, ge=0)
    """First scene of the first round; disjoint from what was recorded, below those of evaluation."""
    labeller: Literal["teacher", "expert"] = "teacher"
    """Who goes on: the (first) teacher, or the simulator's scripted expert."""
    steps: int = Field(default=500, ge=1)
    """Optimizer steps after each round, on everything so far."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """Share of the samples that come from the rounds."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate of the rounds; default: a third of `optim.lr`."""
    measure: int = Field(default=60, ge=1)
    """Episodes a task group, on scenes kept for validation, by which success is told after each round."""
    until: float = Field(default=1.0, gt=0, le=1)
    """Stop rule: no further round once success reaches this."""
    patience: int = Field(default=2, ge=1)
    """Stop rule: no further round after so many without a better one."""
    minutes: float | None = Field(default=None, gt=0)
    """Budget: no further round begins after this time."""


class DistillConfig(TrainConfig):
    """`vla.train`'s config and a teacher. What `policy:` leaves out is the teacher's (codec, chunk, statistics)."""

    teacher: TeacherConfig
    student: StudentChoice | None = None
    """The student's network by preset or by a latency budget on this machine; else what `policy.backbone` says, or preset s."""
    lesson: LessonConfig = LessonConfig()
    rounds: RoundsConfig | None = None

    @model_validator(mode="after")
    def _students(self) -> DistillConfig:
        if self.mixture.answers is not None:
            raise ValueError("mixture.answers: a student is taught actions; leave it out")
        # A run's own config.yaml names the placeholder beside `student:`, and must read as what it was.
        if self.student is not None and (self.start or self.policy.backbone not in (NanoConfig(), preset("s"))):
            raise ValueError("student: chooses the network; leave out policy.backbone and start:")
        if self.lesson.features and self.backbone_asked not in (None, "student"):
            raise ValueError("lesson.instruction and lesson.pictures compare a student's sentence and view: "
                             "policy.backbone.kind must be student")  # fmt: skip
        if not (self.lesson.soft or self.lesson.hard or self.lesson.expectation):
            raise ValueError("lesson: soft, hard and expectation are all 0, so nothing is learned")
        return self

    @property
    def backbone_asked(self) -> str | None:
        """The kind `policy.backbone` names; None when it names none."""
        return self.policy.backbone.kind if "backbone" in self.policy.model_fields_set else None
