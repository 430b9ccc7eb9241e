"""How a server behaves: flags of `vla serve`, or a YAML of `configs/serve/` (`--config`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from serve.wire import Limits
from vla.config import Config


class GuardSettings(Config):
    """What a robot's guard is told beyond its limits (`serve.guard.Guard`)."""

    jump: dict[str, float | list[float] | None] = {}
    """Channel -> most change from one step to the next, robot units; null waives it by name."""
    first_jump: float = Field(default=3.0, gt=0)
    """Times `jump` that the first step of a chunk may be from where the robot is seen: an arm trails behind its targets."""
    waive: tuple[str, ...] = ()
    """Channels without limits."""
    start: tuple[float, ...] | None = None
    """(A,): where the robot stands, where its state does not tell."""
    max_age: float | None = Field(default=0.5, gt=0)
    """Seconds an observation may be old, where the client says how old it is."""
    repeats: int | None = Field(default=20, ge=1)
    """Observations in a row that may equal the one before; null where nothing ever trembles."""
    longest: int | None = Field(default=None, ge=1)
    """Steps of a chunk."""
    window: int = Field(default=20, ge=1)
    most_holds: int = Field(default=10, ge=1)
    confidence: float = Field(default=0.0, ge=0, le=1)
    """Help is asked for when the mean confidence of a whole window is below."""


class PlannerSettings(Config):
    """Who says what is to be done next (`serve/planning.py`)."""

    kind: str = Field(default="policy", pattern=r"^(policy|scripted:.+|openai:https?://.+)$")
    """`policy`: the one that is served, in its own words; `scripted:FILE`; `openai:URL`, any server of chat completions."""
    model: str = "default"
    """Of `openai`: which model is asked."""
    key_file: Path | None = None
    """Of `openai`: the file whose first line is the key."""
    form: Literal["json_schema", "json_object", "none"] = "json_schema"
    """Of `openai`: how the form of an answer is asked for."""
    picture: Literal["jpeg", "png"] = "jpeg"
    """Of `openai`: how pictures are sent; `png` loses nothing."""
    timeout: float = Field(default=10.0, gt=0)
    """Seconds of one plan."""
    valid_for: float = Field(default=5.0, gt=0, le=3600)
    """Seconds a plan may be followed, from when it was asked for."""
    known_only: bool = True
    """Whether a plan must be one of `instructions`, or of those the policy was trained on."""
    instructions: tuple[str, ...] = ()
    camera: str | None = None
    """Of `policy`: which picture it is asked about; null: the robot's first."""


class ServeSettings(Config):
    """Everything about a server but its policy."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    token_file: Path | None = None
    """One token a line; those after `admin:` may also swap policies."""
    certificate: Path | None = None
    key: Path | None = None
    origins: tuple[str, ...] = ()
    """Pages elsewhere that may call, e.g. `https://console.example`."""
    robot: str | None = None
    """Which robot a client means that does not say."""
    adapter: str | None = None
    cameras: dict[str, str] = {}
    """Name on the wire -> camera, e.g. `observation/wrist_image: wrist`."""
    guard: dict[str, GuardSettings] = {}
    """Robot -> its guard; `*` for those not named."""
    audit: Path | None = None
    """Folder of the audit log."""
    audit_keep: int | None = Field(default=None, ge=1)
    """Files of it that stay, of 64 MiB each, the oldest are deleted; null: all of them."""
    planner: PlannerSettings | None = None
    """null: nobody plans here."""
    compat: tuple[Literal["openvla"], ...] = ()
    """Bad manners of other servers that a client depends on: `openvla` answers errors with 200 and "error"."""
    engine: Literal["process", "thread"] = "process"
    queue: int = Field(default=64, ge=1)
    batch: int = Field(default=8, ge=1)
    deadline: float = Field(default=2.0, gt=0)
    hang: float = Field(default=30.0, gt=0)
    drain: float = Field(default=20.0, ge=0)
    connections: int = Field(default=256, ge=1)
    message_mib: int = Field(default=32, ge=1)
    pixels: int = Field(default=Limits.pixels, ge=1)
    gr00t: int | None = Field(default=None, ge=0, le=65535)
    """Port of GR00T's ZMQ wire; null: none."""

    @property
    def limits(self) -> Limits:
        return Limits(message=self.message_mib << 20, pixels=self.pixels)

    def guard_of(self, robot: str) -> GuardSettings:
        """Of this robot."""
        return self.guard.get(robot) or self.guard.get("*") or GuardSettings()
