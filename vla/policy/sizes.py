"""How much room a policy needs for the robots it knows."""

from __future__ import annotations

from collections.abc import Sequence

from vla.actions import ActionCodec
from vla.backbones import Sizes
from vla.embodiment import EmbodimentSpec
from vla.errors import UsageError
from vla.policy.config import PolicyConfig


def room_for(part: str, asked: int | None, embodiments: dict[str, EmbodimentSpec]) -> int:
    """Dimensions of `part` ("action" or "state") a policy of these robots has: what was `asked`, or the widest robot's."""
    needed = {key: getattr(spec, f"{part}_dim") for key, spec in embodiments.items()}
    if asked is not None and asked < max(needed.values()):
        raise UsageError(f"policy.{part}_dim", found=asked, expected=f"at least {max(needed.values())}; the robots have {needed}",
                         fix=f"leave policy.{part}_dim out, or raise it")  # fmt: skip
    return asked or max(needed.values())


def sizes_of(
    config: PolicyConfig, embodiments: dict[str, EmbodimentSpec], codec: ActionCodec, corpus: Sequence[str] = ()
) -> Sizes:
    """What the backbone of such a policy must hold. Raises `UsageError` when a robot does not fit."""
    A = room_for("action", config.action_dim, embodiments)
    return Sizes(
        symbols=codec.size, chunk=config.chunk,
        slots=codec.slots(config.chunk, A, [spec.action_dim for spec in embodiments.values()]),
        state=room_for("state", config.state_dim, embodiments),
        robots=len(embodiments), soft_tokens=config.soft_tokens, state_token=config.state == "token",
        end_token=config.end_weight > 0, corpus=tuple(corpus),
    )  # fmt: skip


def check_cameras(embodiments: dict[str, EmbodimentSpec], most: int) -> None:
    """Raise `UsageError` when a robot has more cameras than the backbone can tell apart."""
    if many := {key: len(spec.cameras) for key, spec in embodiments.items() if len(spec.cameras) > most}:
        raise UsageError("cameras", found=many, expected=f"at most {most} a robot",
                         fix="leave some out of the embodiment, or set them to null under the dataset's cameras")  # fmt: skip
