"""Which student: a preset, with anything of it changed by hand; or what fits a latency budget on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from vla.backbones import Sizes, StudentConfig
from vla.config import Config
from vla.errors import UsageError
from vla.students.budget import Budget, fit
from vla.students.presets import LIMITS, PRESETS, parameters, preset
from vla.students.timing import TORCH, Runner


class StudentChoice(Config):
    """What a training config says of its student. What is left out is the preset's, or with a budget what is measured."""

    preset: Literal["xs", "s", "m", "rt1"] = "s"
    budget: Budget | None = None
    """Pick image_size, patch, hidden and layers by measuring on this machine, within the preset's number of parameters."""
    tower: str | None = None
    pretrained: bool | None = None
    image_size: int | None = None
    patch: int | None = None
    channels: tuple[int, int, int] | None = None
    keypoints: int | None = None
    tokens: int | None = None
    hidden: int | None = None
    layers: int | None = None
    heads: int | None = None
    mlp: int | None = None
    text_layers: int | None = None
    text_vocab: int | None = Field(default=None)

    @property
    def own(self) -> dict[str, Any]:
        """Fields of `StudentConfig` that were said by hand."""
        return {name: value for name, value in self.model_dump(exclude={"preset", "budget"}).items() if value is not None}

    @model_validator(mode="after")
    def _check(self) -> StudentChoice:
        if self.budget is not None and (said := [name for name in ("tower", "heads", "mlp") if name in self.own]):
            raise ValueError(f"a budget picks the network itself; leave {', '.join(said)} out, or the budget")
        if self.budget is not None and self.preset == "rt1":
            raise ValueError("a budget picks among networks of patches; preset: rt1 is none of them")
        if self.budget is None:
            try:  # what does not go together is said where it is written, before anything is built
                preset(self.preset, **self.own)
            except ValidationError as error:
                raise ValueError("; ".join(_told(e["loc"], e["msg"]) for e in error.errors())) from None
        return self


def _told(where: tuple[int | str, ...], message: str) -> str:
    return ": ".join([".".join(map(str, where)), message] if where else [message.removeprefix("Value error, ")])


@dataclass(frozen=True)
class Chosen:
    """A student's sizes, and why they are these."""

    config: StudentConfig
    record: dict[str, Any]
    """JSON: the preset, what was changed by hand, parameters, and with a budget everything that was measured."""


def resolve(
    choice: StudentChoice, sizes: Sizes, runners: Mapping[str, Runner] = TORCH, tell: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Chosen:  # fmt: skip
    """The student `choice` means for a policy of `sizes` (`vla.policy.sizes.sizes_of`).

    `runners` are the runtimes a budget may be measured in (`vla.students.exported.runners()` has them all). Raises `UsageError`
    for a student with more parameters than its preset may have, or when no candidate meets the budget.
    """
    record: dict[str, Any] = {"preset": choice.preset, "by_hand": choice.own}
    if choice.budget is None:
        config = preset(choice.preset, **choice.own)
    else:
        found = fit(choice.budget, sizes, LIMITS[choice.preset], choice.own, runners, clock, tell)
        config, record = found.config, record | {"budget": found.record}
    count = parameters(config, sizes)
    check_size(choice.preset, count)
    return Chosen(config, record | {"parameters": count, "backbone": config.model_dump(mode="json")})


def check_size(name: str, count: int) -> None:
    """Raise `UsageError` for more parameters than the preset `name` stands for."""
    if count <= LIMITS[name]:
        return
    fits = [other for other in PRESETS if other != "rt1" and count <= LIMITS[other]]
    raise UsageError(f"student: preset {name}", found=f"{count / 1e6:.1f} M parameters",
                     expected=f"at most {LIMITS[name] / 1e6:.0f} M", fix=f"preset={fits[0]}, or fewer layers or hidden" if fits
                     else "fewer layers or hidden; or the sizes under policy.backbone, where nothing is bounded")  # fmt: skip
