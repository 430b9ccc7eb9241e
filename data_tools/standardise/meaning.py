"""What a convention's name implies, and what a unit is worth. No arrays here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vla.embodiment import CONVENTIONS
from vla.rotation import width

RAW_CONVENTIONS = {*CONVENTIONS, "eef_rotation", "eef_delta_rotation"}
"""What a file may hold: the house's conventions, and rotations in any other form, named by `rotation`."""

BODY_FRAMES = {"eef", "tool", "hand", "body", "gripper"}
"""Frames that move with the hand: a delta in one of them is about the hand's own axes."""

_HOUSE_FORMS = {"euler_xyz": "euler_xyz", "euler_zyx": "euler_ZYX"}
"""Convention suffix -> form of `vla.rotation`, where they could be mistaken (CONVENTIONS defines zyx as intrinsic)."""

_UNIT = re.compile(r"(?:(?P<times>[0-9.]+(?:[eE][+-]?[0-9]+)?) )?(?P<base>m|cm|mm|rad|deg|1|%)(?P<per>/step|/s)?")
_BASES = {"m": ("m", 1.0), "cm": ("m", 1e-2), "mm": ("m", 1e-3), "rad": ("rad", 1.0), "deg": ("rad", 3.141592653589793 / 180),
          "1": ("1", 1.0), "%": ("1", 1e-2)}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A convention taken apart."""

    family: str  # position, rotation, joint, gripper, scalar
    delta: bool = False
    form: str = ""  # of a rotation
    open_positive: bool = True  # of a gripper

    @property
    def angular(self) -> bool:
        """Whether its numbers are angles, which have a unit."""
        return self.form.startswith("euler_") or self.form == "axis_angle"

    @property
    def exact_width(self) -> int | None:
        """How many numbers it takes; None where any number will do."""
        return width(self.form) if self.form else None


def kind_of(convention: str, rotation: str | None = None) -> Kind:
    """What `convention` says. Raises `ValueError` for a rotation form nobody defined."""
    if convention == "scalar":
        return Kind("scalar")
    if convention.startswith("gripper_"):
        return Kind("gripper", open_positive=convention == "gripper_open_positive")
    if convention.startswith("joint_"):
        return Kind("joint", delta=convention != "joint_position")
    rest = convention.removeprefix("eef_")
    delta, rest = rest.startswith("delta_"), rest.removeprefix("delta_")
    if rest == "position":
        return Kind("position", delta)
    return Kind("rotation", delta, rotation_of(convention, rotation))


def rotation_of(convention: str, rotation: str | None) -> str:
    """The form of `vla.rotation` a rotation convention means. Raises `ValueError` for one nobody defined."""
    from vla.errors import DataError

    rest = convention.removeprefix("eef_").removeprefix("delta_")
    form = rotation if rotation is not None else _HOUSE_FORMS.get(rest, rest)
    try:
        width(form)
    except DataError as error:
        raise ValueError(f"rotation {form!r}: expected {error.expected}") from error
    return form


def unit_factor(found: str | None, wanted: str | None, fps: float) -> float:
    """What to multiply numbers of unit `found` with to have unit `wanted`. `/s` and `/step` are the same thing at `fps` steps a
    second. Raises `ValueError` where one cannot become the other."""
    if found == wanted or found in (None, "-") and wanted in (None, "-"):
        return 1.0
    one, two = _parsed(found, fps), _parsed(wanted, fps)
    if one[:2] != two[:2]:
        raise ValueError(f"{found!r} cannot become {wanted!r}")
    return one[2] / two[2]


def to_base(unit: str | None, fps: float) -> float:
    """What a number of `unit` is worth in m or rad (per step)."""
    return _parsed(unit, fps)[2]


def _parsed(unit: str | None, fps: float) -> tuple[str, bool, float]:
    match = _UNIT.fullmatch(unit or "")
    if match is None:
        raise ValueError(f"unit {unit!r} cannot be converted (m, cm, mm, rad, deg, 1, %, with /step or /s, and a number in "
                         "front where 1 stands for more)")  # fmt: skip
    base, worth = _BASES[match["base"]]
    worth *= float(match["times"] or 1) / (fps if match["per"] == "/s" else 1)
    return base, bool(match["per"]), worth
