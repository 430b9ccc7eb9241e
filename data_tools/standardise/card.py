"""Dataset cards: what the fields of a foreign dataset mean, as YAML (`configs/datasets/`), and how they fill a robot's channels.

    name: libero
    match: {kinds: [libero]}
    embodiment: libero_panda            # a shipped name, an EmbodimentSpec written here, or `derived`
    pairing: observation_after_action   # what the file's row t holds: the picture after action t
    cameras:
      agentview: {field: obs/agentview_rgb, flip: vertical}
    action:
      - channel: eef
        field: actions
        dims: "0:3"
        from: {convention: eef_delta_position, unit: 0.05 m/step, frame: base}

`from` says what the numbers are in the file; the embodiment's channel of that name says what they shall be. The difference
is carried out, or refused: a card never guesses. What nobody knows stays convention `scalar` and passes through unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator

from data_tools.standardise.meaning import RAW_CONVENTIONS, rotation_of
from vla.config import CONFIGS, Config, find_config, load_config
from vla.embodiment import EmbodimentSpec, load_embodiment
from vla.errors import UsageError
from vla.rotation import to_quat

DERIVED = "derived"


class _Entry(Config):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class Meaning(_Entry):
    """What numbers are, in the file."""

    convention: str = "scalar"
    """One of `vla.embodiment.CONVENTIONS`; or `eef_rotation` / `eef_delta_rotation` with `rotation` naming the form."""
    rotation: str | None = None
    """A form `vla.rotation` knows, e.g. `euler_XYZ`, `rot6d_interleaved`, `matrix`."""
    unit: str | None = None
    """As in a Channel. May be left out for `scalar`, and for a gripper whose `open` and `closed` are given."""
    frame: str = "-"
    open: float | None = None
    closed: float | None = None
    """What the file writes for a gripper all the way open, and closed: any range, either sense."""

    @model_validator(mode="after")
    def _check(self) -> Meaning:
        if self.convention not in RAW_CONVENTIONS:
            raise ValueError(f"unknown convention {self.convention!r}; one of {sorted(RAW_CONVENTIONS)}")
        generic = self.convention in ("eef_rotation", "eef_delta_rotation")
        if generic != (self.rotation is not None):
            raise ValueError("`rotation` goes with convention eef_rotation or eef_delta_rotation, and only with those")
        if self.rotation is not None:
            rotation_of(self.convention, self.rotation)
        if (self.open is None) != (self.closed is None) or (self.open is not None and self.open == self.closed):
            raise ValueError("`open` and `closed` come together, and differ")
        if self.open is not None and not self.convention.startswith("gripper_"):
            raise ValueError("`open` and `closed` belong to a gripper convention")
        if self.unit is None and self.convention != "scalar" and self.open is None:
            raise ValueError(f"say the unit of {self.convention}; a card never guesses it")
        return self


Dims = str | tuple[int, ...] | None
"""Which numbers of the field, flattened: a slice `"0:3"`, `"-1:"`, or positions `[3, 7, 11]`. Default: all."""


def positions(dims: str | tuple[int, ...] | None, size: int) -> list[int]:
    """The positions `dims` picks out of `size` numbers. Raises `ValueError` when one lies outside."""
    if dims is None:
        return list(range(size))
    if isinstance(dims, str):
        first, _, last = dims.partition(":")
        low, high = int(first or 0), int(last or size)
        low, high = low + size * (low < 0), high + size * (high < 0)
        if not 0 <= low < high <= size:
            raise ValueError(f"{dims} of {size}")
        return list(range(low, high))
    wanted = [d + size * (d < 0) for d in dims]
    if not wanted or min(wanted) < 0 or max(wanted) >= size:
        raise ValueError(f"{list(dims)} of {size}")
    return wanted


class Columns(_Entry):
    """Some numbers of one field, and what they are."""

    field: str
    """Path as in the file: `obs/ee_states`, `observation/state`, `action`."""
    dims: Dims = None
    from_: Meaning = Field(default=Meaning(), alias="from")

    @field_validator("dims")
    @classmethod
    def _slice(cls, dims: str | tuple[int, ...] | None) -> str | tuple[int, ...] | None:
        if isinstance(dims, str) and not re.fullmatch(r"(-?\d+)?:(-?\d+)?", dims):
            raise ValueError(f"{dims!r}: write a slice such as \"0:3\", or a list of positions")
        return dims


class Offset(_Entry):
    """The constant difference between the frame of the file and the frame of the robot's channel."""

    rotation: tuple[float, ...] = (0.0, 0.0, 0.0, 1.0)
    form: str = "quat_xyzw"
    """How `rotation` and `tool` are written; angles in rad."""
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """m. A point p of the file is `rotation * p + translation` of the robot."""
    tool: tuple[float, ...] | None = None
    """The file's hand to the robot's hand, about the hand's own axes (the 90 degrees between flange and grip, for instance)."""

    @model_validator(mode="after")
    def _check(self) -> Offset:
        for name in ("rotation", "tool"):
            if (value := getattr(self, name)) is not None:
                to_quat_or_refuse(name, value, self.form)
        return self


def to_quat_or_refuse(name: str, value: tuple[float, ...], form: str) -> None:
    """Raise `ValueError` unless `value` is a rotation of `form`."""
    from vla.errors import DataError

    try:
        to_quat(list(value), form)  # pyright: ignore[reportArgumentType]
    except DataError as error:
        raise ValueError(f"{name}: found {error.found}, expected {error.expected}") from error


class GripperSpan(_Entry):
    """What the robot's channel shall hold for a gripper all the way open, and closed."""

    open: float
    closed: float


class GripperCommand(_Entry):
    """How a gripper field becomes a command that holds."""

    binarise: tuple[float, float] | None = None
    """(closed at or below, open at or above) as a share of opening. Between them a step takes what the gripper reaches next,
    or, when it never decides again, the nearer of the two."""
    relative: float | None = Field(default=None, gt=0)
    """The field says which way to move: beyond +-this it opens or closes (by the signs of `open` and `closed`), within it the
    last command holds. Before the first move the gripper is in the opposite of it; if it never moves, it is open."""
    clip: bool = False
    """Values beyond `open` and `closed` are held to them."""

    @model_validator(mode="after")
    def _check(self) -> GripperCommand:
        if self.binarise and not 0 <= self.binarise[0] <= self.binarise[1] <= 1:
            raise ValueError("binarise: (low, high) with 0 <= low <= high <= 1")
        if self.binarise and self.relative:
            raise ValueError("binarise an absolute gripper or hold a relative one, not both")
        return self


class ChannelCard(Columns):
    """How one channel of the robot is filled."""

    channel: str
    """Its name in the embodiment."""
    to: GripperSpan | None = None
    """For a gripper with `open` and `closed`. Default: the channel's own low and high, by its sense."""
    gripper: GripperCommand | None = None
    relative_to: Columns | None = None
    """The absolute pose or joints seen at the same step, where the file is absolute and the channel a delta, or the other way."""
    achieved: Literal["compose", "subtract"] | None = None
    """The field is observed and absolute; the action is what came of it: the step from t to t + 1. The last step has none and is
    dropped. `subtract` differences Euler angles one by one, wrapped, as OpenVLA does for Bridge (alike at small angles);
    `compose` gives the true rotation."""
    offset: Offset | None = None
    sign: Literal["as_is", "canonical", "continuous"] = "as_is"
    """Quaternions: leave their sign, w >= 0, or no jump along time. Rotation vectors: `canonical` brings the angle to [0, pi]."""


class CameraCard(_Entry):
    """Where a camera's pictures are, and what it takes to have them upright and RGB."""

    field: str
    flip: Literal["none", "vertical", "rotate180", "as_source"] = "none"
    """`vertical` reverses the rows (OpenGL's bottom-up pictures); `rotate180` rows and columns (mirrors left and right too);
    `as_source`: vertical where the reader found the pictures bottom-up (attribute `image_orientation`)."""
    channels: Literal["rgb", "bgr"] = "rgb"
    resize: tuple[int, int] | None = None
    """(height, width), Lanczos with antialiasing."""
    optional: bool = False
    """Leave the camera out where the dataset has no such pictures; otherwise that is an error."""


class Instruction(_Entry):
    """Where the words come from. Tried in order: `field`, `attribute`, `text`; without any, what the reader found."""

    field: tuple[str, ...] = ()
    """Fields with the text, the first that is not empty; numbers are read as Unicode code points (language_table)."""
    attribute: str | None = None
    """Dotted path in the episode's, then the dataset's attributes."""
    text: str | None = None

    @field_validator("field", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class SkipSteps(_Entry):
    """Steps to leave out of every episode, before anything else is done."""

    first: int = Field(default=0, ge=0)
    last: int = Field(default=0, ge=0)


class Match(_Entry):
    """Which datasets the card is for."""

    kinds: tuple[str, ...] = ()
    """`Source.kind`s."""
    names: tuple[str, ...] = ()
    """Names of the dataset: its folder, its parent (RLDS version folders), or attribute `name`."""
    attributes: dict[str, Any] = {}
    """Dotted path -> value, or list of allowed values; all must hold. `*` stands for any one key, `**` for any number of them."""


class Card(_Entry):
    """One dataset: what its fields mean."""

    name: str
    about: str = ""
    """What the dataset is, where the meanings were taken from."""
    checked: str = ""
    """What of this card was compared with real files, and what was not."""
    match: Match = Match()
    embodiment: str | EmbodimentSpec = DERIVED
    """A shipped name, a spec written out (cameras may be `{}`: their sizes are the dataset's), or `derived`: every number as it
    is, convention `scalar`."""
    fps: float | None = Field(default=None, gt=0)
    """Control rate in Hz. Left out: the rate of a shipped embodiment; else the dataset's own, if it carries one, else the
    written embodiment's. Two that disagree are refused."""
    instruction: Instruction = Instruction()
    pairing: Literal["observation_before_action", "observation_after_action", "as_source"] = "observation_before_action"
    """Whether row t of the observations was seen before or after action t. After: shifted by one, so that row t was seen before
    action t; the first action and the last observation have no partner and go. `as_source`: what the reader found out
    (attribute `pairing`), else before. A card that contradicts the reader is refused."""
    skip_steps: SkipSteps = SkipSteps()
    cameras: dict[str, CameraCard] = {}
    state: tuple[ChannelCard, ...] = ()
    action: tuple[ChannelCard, ...] = ()

    _file: str = PrivateAttr(default="")
    _lines: dict[tuple, int] = PrivateAttr(default_factory=dict)
    _robot: EmbodimentSpec | None = PrivateAttr(default=None)
    _fitted: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _check(self) -> Card:
        if self.embodiment == DERIVED:
            if self.state or self.action:
                raise ValueError("a derived embodiment takes every number as it is; name an embodiment to fill its channels")
        elif not self.action:
            raise ValueError("no action channels")
        return self

    @property
    def robot(self) -> EmbodimentSpec | None:
        """The embodiment as named or written in the card, None for `derived`. Camera sizes may be missing, see `spec`."""
        if self._robot is None and self.embodiment != DERIVED:
            named = self.embodiment
            self._robot = named if isinstance(named, EmbodimentSpec) else load_embodiment(named)
        return self._robot

    @property
    def spec(self) -> EmbodimentSpec:
        """The robot of the standardised episodes. Raises `UsageError` while its cameras are not known: see `fit`."""
        robot = self.robot
        if robot is None or robot.cameras.keys() != self.cameras.keys():
            raise UsageError(self.at(), found="a card that has not met its dataset", expected="sizes of the cameras",
                             fix="call data_tools.standardise.fit(card, source.info) first")  # fmt: skip
        return robot

    @property
    def fitted(self) -> bool:
        """Whether the card has met its dataset: see `fit`."""
        return self._fitted

    def with_robot(self, robot: EmbodimentSpec, fitted: bool = False, /, **fields: Any) -> Card:
        """A copy for another robot and with other `fields`, unchecked; `fitted` when both come from the dataset itself."""
        card = self.model_copy(update={"embodiment": robot, **fields})
        card._robot, card._fitted = None, fitted
        return card

    def at(self, *path: str | int) -> str:
        """`file:line: path` of an entry, for messages."""
        known = next((self._lines[path[:k]] for k in range(len(path), 0, -1) if path[:k] in self._lines), None)
        place = f"{self._file or f'card {self.name!r}'}" + (f":{known}" if known else "")
        return f"{place}: {'.'.join(map(str, path))}" if path else place


def load_card(name: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Card:
    """A card by shipped name (`libero`) or path to a YAML file, with `a.b=c` overrides.

    Raises `UsageError` naming every line that is wrong, and the nearest card where there is none of that name.
    """
    path = Path(name)
    shipped = CONFIGS / "datasets" / f"{name}.yaml"
    file = path if path.is_file() else shipped if shipped.is_file() else find_config(f"datasets/{name}")
    card = load_config(file, overrides, Card)
    card._file = str(file) if file != shipped else f"datasets/{name}.yaml"
    card._lines = _lines(yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))
    _ = card.robot  # an embodiment that does not exist is said now
    return card


def match_of(name: str) -> Match:
    """Which datasets the shipped card `name` is for, without reading the rest of it."""
    values = yaml.safe_load((CONFIGS / "datasets" / f"{name}.yaml").read_text(encoding="utf-8"))
    return Match.model_validate(values.get("match", {}))


def shipped_cards() -> list[str]:
    """Names of the cards in `configs/datasets/`, sorted."""
    return sorted(p.stem for p in (CONFIGS / "datasets").glob("*.yaml"))


def _lines(node: Any, at: tuple = ()) -> dict[tuple, int]:
    pairs = [(k.value, v, k) for k, v in node.value] if isinstance(node, yaml.MappingNode) else (
        [(i, v, v) for i, v in enumerate(node.value)] if isinstance(node, yaml.SequenceNode) else [])  # fmt: skip
    found = {}
    for key, value, mark in pairs:
        found[(*at, key)] = mark.start_mark.line + 1
        found |= _lines(value, (*at, key))
    return found


def lookup(attributes: Mapping[str, Any], dotted: str) -> list[Any]:
    """Every value at a dotted path (`*` matches any one key, `**` any number of them); empty when there is none."""
    if dotted in attributes:
        return [attributes[dotted]]
    found: list[Any] = [attributes]
    for part in dotted.split("."):
        if part == "**":
            found = [inner for value in found for inner in _below(value)]
            continue
        found = [v for m in found if isinstance(m, Mapping) for k, v in m.items() if part == "*" or k == part]
    return found


def _below(value: Any) -> list[Any]:
    return [value] + [found for v in value.values() for found in _below(v)] if isinstance(value, Mapping) else [value]
