"""A card meets its dataset: every mistake said at once, camera sizes filled in, a robot derived where the card names none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import numpy as np

from data_tools.sources import Source, SourceInfo
from data_tools.standardise.card import (
    DERIVED,
    CameraCard,
    Card,
    ChannelCard,
    Columns,
    Match,
    Meaning,
    load_card,
    lookup,
    match_of,
    positions,
    shipped_cards,
)
from data_tools.standardise.channels import meaning_kind, problems_of
from vla.config import CONFIGS
from vla.embodiment import Camera, Channel, EmbodimentSpec
from vla.errors import UsageError

UNLIMITED = 1e6
"""Limits of a derived channel: nothing is known, so nothing is clipped. `vla data check` takes a `scalar` with these limits for
undeclared. A converter that has seen the data may tighten them."""
_WIDEST = 64
"""A numeric observation with more numbers than this (a sentence embedding, a flattened image) is not taken for a state."""


def fit(card: Card, info: SourceInfo) -> Card:
    """`card` completed by what the dataset says of itself: `fps`, and a `spec` with the sizes of its cameras.

    Raises `UsageError` with every line of the card that does not fit, and the nearest names; also where the dataset has
    pictures, the card takes none, and has not said so by `cameras: {}`.
    """
    return _with_pictures(card, _meet(card, info), info)


def _meet(card: Card, info: SourceInfo) -> Card:
    """As `fit`, without asking whether any picture is taken."""
    if card.embodiment == DERIVED:
        card = _derived(card, info)
    robot, problems = card.robot, _Problems(card)
    assert robot is not None  # named or derived by now
    fps = _rate(card, robot, info, problems)
    for part in ("state", "action"):
        _match_channels(card, robot, part, info, fps, problems)
    cameras = _cameras(card, robot, info, problems)
    words = [name for name in card.instruction.field if name in info.images]
    if words:
        problems.add(("instruction", "field"), f"{words[0]!r} holds pictures", "a field with text")
    told = info.attributes.get("pairing")
    pairing = (told or "observation_before_action") if card.pairing == "as_source" else card.pairing
    if told not in (None, pairing):
        problems.add(("pairing",), f"{pairing!r}", f"{told!r}, as this dataset's layout has it")
    problems.raise_any()
    bottom_up = info.attributes.get("image_orientation") == "bottom_up"
    turned = {name: entry.model_copy(update={"flip": "vertical" if bottom_up else "none"}) if entry.flip == "as_source" else entry
              for name, entry in card.cameras.items() if name in cameras}  # fmt: skip
    spec = robot.model_copy(update={"cameras": cameras, "control_hz": fps})
    return card.with_robot(spec, True, fps=fps, pairing=pairing, cameras=turned)


def card_for(source: Source, fps: float | None = None) -> Card:
    """The card of `source`, fitted: a shipped one by the dataset's name, then by layout; else one derived from its fields,
    convention `scalar`, at `fps`. What was not taken is said in `about`."""
    passed = []
    rules = {name: match_of(name) for name in shipped_cards()}
    for by_name in (True, False):
        for shipped, match in rules.items():
            if bool(match.names) == by_name and _matches(match, source):
                card = load_card(shipped)
                try:
                    fitted = _meet(card, source.info)
                except UsageError as error:
                    if by_name:
                        raise
                    reasons = " | ".join(line.strip() for line in error.found.splitlines())
                    passed.append(f"the shipped card {card.name!r} does not fit: {reasons}")
                else:  # it knows what the numbers mean: not to be given up for other cameras
                    return _with_pictures(card, fitted, source.info)
    name = str(source.info.attributes.get("name") or source.root.stem)
    card = Card(name=name, about="; ".join(["derived from the fields, meanings not known", *passed]), fps=fps)
    return fit(card, source.info)


def names_of(source: Source) -> set[str]:
    """What the dataset may be called: its folder, the folder above (RLDS keeps versions below the name), its own `name`."""
    return {source.root.name, source.root.stem, source.root.parent.name, str(source.info.attributes.get("name", ""))} - {""}


def _matches(match: Match, source: Source) -> bool:
    if not match.kinds and not match.names:
        return False
    if match.kinds and source.kind not in match.kinds or match.names and not set(match.names) & names_of(source):
        return False
    for dotted, allowed in match.attributes.items():
        values = lookup(source.info.attributes, dotted)
        if not any(value in (allowed if isinstance(allowed, list) else [allowed]) for value in values):
            return False
    return True


class _Problems:
    def __init__(self, card: Card) -> None:
        self.card, self.lines = card, []

    def add(self, path: tuple[str | int, ...], found: object, expected: object) -> None:
        self.lines.append((f"{self.card.at(*path)}: {found}", str(expected)))

    def raise_any(self) -> None:
        if self.lines:
            pad = "\n            "
            raise UsageError(f"card {self.card.name!r}", found=pad.join(f for f, _ in self.lines),
                             expected=pad.join(dict.fromkeys(e for _, e in self.lines)),
                             fix="correct the lines named above, or give another card with --card")  # fmt: skip


def _with_pictures(card: Card, fitted: Card, info: SourceInfo) -> Card:
    """`fitted`, unless pictures are there and it takes none: optional cameras are some, not none at all."""
    asked_for_none = not card.cameras and "cameras" in card.model_fields_set
    if not info.images or fitted.cameras or asked_for_none:
        return fitted
    wanted = [entry.field for entry in card.cameras.values()]
    there = {name: f"{{field: {path}, flip: as_source}}" for name, path in _camera_names(info.images).items()}
    named = ", ".join(f"{name}: {entry}" for name, entry in there.items())
    file = CONFIGS / card.at()
    raise UsageError(
        card.at("cameras"), found=f"pictures {sorted(info.images)}, of which the card takes none",
        expected=f"one of {wanted}, as the card names them" if wanted else "a camera for at least one of them",
        fix=f"copy {file if file.is_file() else card.at()} to my_card.yaml, write `cameras: {{{named}}}` in the copy "
        "(`cameras: {}` for numbers without pictures), and pass --card my_card.yaml",
    )  # fmt: skip


def nearest(name: str, known: Iterable[str]) -> str:
    """`'obs/ee_pos', 'obs/ee_ori'`: the known names most like `name`, else all of them."""
    known = sorted(known)
    tail = {k: k.rsplit("/", 1)[-1].rsplit(".", 1)[-1] for k in known}
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    last = name.rsplit("/", 1)[-1]
    close += [k for k in known if k not in close and difflib.get_close_matches(last, [tail[k]], n=1, cutoff=0.7)]
    return ", ".join(map(repr, close[:4] or known)) or "nothing"


def _rate(card: Card, robot: EmbodimentSpec, info: SourceInfo, problems: _Problems) -> float:
    shipped = isinstance(card.embodiment, str)
    fps = card.fps or (robot.control_hz if shipped else info.fps or robot.control_hz)
    if shipped and abs(fps - robot.control_hz) > 1e-3 * robot.control_hz:
        problems.add(("fps",), f"{fps} Hz", f"the {robot.control_hz} Hz of embodiment {robot.key!r}, or none")
    if info.fps is not None and abs(info.fps - fps) > 1e-3 * fps:
        problems.add(("fps",), f"{fps} Hz", f"the dataset's own {info.fps} Hz")
    return fps


def _match_channels(card: Card, robot: EmbodimentSpec, part: str, info: SourceInfo, fps: float, problems: _Problems) -> None:
    channels: dict[str, Channel] = {c.name: c for c in getattr(robot, part)}
    entries: tuple[ChannelCard, ...] = getattr(card, part)
    for missing in [name for name in channels if name not in {e.channel for e in entries}]:
        problems.add((part,), f"nothing fills channel {missing!r} of {robot.key!r}", f"an entry for each of {sorted(channels)}")
    seen = set()
    for index, entry in enumerate(entries):
        at = (part, index)
        if entry.channel not in channels:
            near = nearest(entry.channel, channels)
            problems.add((*at, "channel"), f"{robot.key!r} has no {part} channel {entry.channel!r}", near)
            continue
        if entry.channel in seen:
            problems.add((*at, "channel"), f"{entry.channel!r} is filled twice", "one entry per channel")
        seen.add(entry.channel)
        channel = channels[entry.channel]
        if part == "state" and entry.achieved is not None:
            problems.add((*at, "achieved"), "on a state channel", "an action: what came of it is seen a step later")
        for key, found, expected in problems_of(entry, channel, fps):
            problems.add((*at, key), found, expected)
        _widths(entry, channel, at, info, problems)


def _widths(entry: ChannelCard, channel: Channel, at: tuple, info: SourceInfo, problems: _Problems) -> None:
    got = _picked(entry, at, info, problems)
    if entry.relative_to is not None:
        _picked(entry.relative_to, (*at, "relative_to"), info, problems)
    if got is None:
        return
    need = meaning_kind(entry.from_).exact_width
    if need is not None and got != need:
        problems.add((*at, "dims"), f"{got} of the numbers of {entry.field!r}", f"{need}: what {entry.from_.convention!r} takes")
    elif need is None and got != len(channel.dims):
        wanted = f"{len(channel.dims)}: {list(channel.dims)} of {channel.name!r}"
        problems.add((*at, "dims"), f"{got} of the numbers of {entry.field!r}", wanted)


def _picked(columns: Columns, at: tuple, info: SourceInfo, problems: _Problems) -> int | None:
    """How many numbers `columns` takes; None, and said, when it cannot."""
    if columns.field not in info.fields:
        near = nearest(columns.field, info.fields)
        problems.add((*at, "field"), f"no numeric field {columns.field!r}", f"one of the dataset's: {near}")
        return None
    dtype, shape = info.fields[columns.field]
    if np.dtype(dtype).kind not in "fiub":
        problems.add((*at, "field"), f"{columns.field!r} holds {dtype}", "numbers")
        return None
    size = int(np.prod(shape))
    try:
        return len(positions(columns.dims, size))
    except ValueError as error:
        problems.add((*at, "dims"), f"{error} numbers of {columns.field!r}, {dtype} {shape}", f"positions below {size}")
        return None


def _cameras(card: Card, robot: EmbodimentSpec, info: SourceInfo, problems: _Problems) -> dict[str, Camera]:
    known = robot.cameras
    filled = {name for name, entry in card.cameras.items() if entry.field in info.images or not entry.optional}
    for missing in sorted(known.keys() - filled):
        problems.add(("cameras",), f"nothing fills camera {missing!r} of {robot.key!r}", f"an entry for each of {sorted(known)}")
    sizes = {}
    for name, entry in card.cameras.items():
        if known and name not in known:
            problems.add(("cameras", name), f"{robot.key!r} has no camera {name!r}", nearest(name, known))
        if entry.field not in info.images and entry.optional:
            continue
        if entry.field not in info.images:
            near = nearest(entry.field, info.images)
            problems.add(("cameras", name, "field"), f"no pictures {entry.field!r}", f"one of the dataset's: {near}")
            continue
        height, width = entry.resize or info.images[entry.field]
        sizes[name] = Camera(height=height, width=width)
    return sizes


# --- a robot nobody described -----------------------------------------------------------------------------------------


def _derived(card: Card, info: SourceInfo) -> Card:
    """`card` with an entry for every number and picture, as it is. Cameras and pairing the card names itself stay."""
    if "embodiment" in info.attributes:  # one of our own datasets: its robot travels with it
        spec = EmbodimentSpec.model_validate(info.attributes["embodiment"])
        parts = {part: _sliced(getattr(spec, part), key) for part, key in (("state", "observation.state"), ("action", "action"))}
        cameras = {name: CameraCard(field=f"observation.images.{name}") for name in spec.cameras}
        return card.with_robot(spec.model_copy(update={"cameras": {}}), cameras=card.cameras or cameras, **parts)
    state, action, wide = _numeric(info)
    problems = _Problems(card)
    if not action:
        found = f"no field looks like an action among {sorted(info.fields)}"
        problems.add(("action",), found, "`action`, `actions` or `action/...`")
    fps = card.fps or info.fps
    if fps is None:
        problems.add(("fps",), "the format carries no control rate", "fps in the card, or --fps")
    problems.raise_any()
    channels, entries = {}, {}
    for part, paths in (("state", state), ("action", action)):
        channels[part] = tuple(_channel(path, info) for path in paths)
        entries[part] = tuple(ChannelCard(channel=_short(path), field=path) for path in paths)
    found = {name: CameraCard(field=path, flip="as_source") for name, path in _camera_names(info.images).items()}
    if "cameras" in card.model_fields_set:
        found = card.cameras  # none at all, if it says so
    pairing = card.pairing if "pairing" in card.model_fields_set else "as_source"
    name = str(info.attributes.get("robot_type") or card.name)
    spec = EmbodimentSpec(name=name, cameras={}, control_hz=float(fps or 0), **channels)
    left = f"; left out as too wide for a state: {wide}" if wide else ""
    return card.with_robot(spec, about=card.about + left, cameras=found, pairing=pairing, **entries)


def _sliced(channels: tuple[Channel, ...], field: str) -> tuple[ChannelCard, ...]:
    at, entries = 0, []
    for c in channels:
        entry = {"channel": c.name, "field": field, "dims": f"{at}:{at + len(c.dims)}",
                 "from": Meaning(convention=c.convention, unit=c.unit, frame=c.frame)}  # fmt: skip
        entries.append(ChannelCard.model_validate(entry))
        at += len(c.dims)
    return tuple(entries)


def _numeric(info: SourceInfo) -> tuple[list[str], list[str], list[str]]:
    """(state, action, too wide) paths."""
    small = [p for p, (dtype, shape) in info.fields.items()
             if np.dtype(dtype).kind in "fiub" and len(shape) <= 1 and min(shape, default=1) > 0]  # fmt: skip
    action = [p for p in small if p in ("action", "actions")] or [p for p in small if p.startswith("action/")]
    if "observation.state" in small:
        return ["observation.state"], action, []
    seen = [p for p in small if p.startswith(("observation/", "observations/", "obs/", "observation."))]
    seen = [p for p in seen if np.dtype(info.fields[p][0]).kind == "f"]
    wide = [p for p in seen if np.prod(info.fields[p][1]) > _WIDEST]
    return [p for p in seen if p not in wide], action, wide


def _channel(path: str, info: SourceInfo) -> Channel:
    size = int(np.prod(info.fields[path][1]))
    names = _flat((info.attributes.get("names") or {}).get(path))
    dims = tuple(names) if len(names) == size else tuple(f"d{i}" for i in range(size))
    return Channel(name=_short(path), dims=dims, convention="scalar", unit="-",
                   low=(-UNLIMITED,) * size, high=(UNLIMITED,) * size)  # fmt: skip


def _flat(names: Any) -> list[str]:
    """Names of dimensions as LeRobot writes them: a list, a list of lists, a mapping of lists."""
    if isinstance(names, dict):
        return [name for group in names.values() for name in _flat(group)]
    if isinstance(names, list):
        return [name for group in names for name in _flat(group)]
    return [] if names is None else [str(names)]


def _short(path: str) -> str:
    """`observation/robot/state` -> `robot_state`."""
    for prefix in ("observations/", "observation/", "obs/", "observation.", "action/"):
        path = path.removeprefix(prefix)
    return path.replace("/", "_")


def _camera_names(images: Iterable[str]) -> dict[str, str]:
    """Name -> path: the last word where that tells them apart, else all of it."""
    images = list(images)
    last = [path.removeprefix("observation.images.").rsplit("/", 1)[-1] for path in images]
    return {short if last.count(short) == 1 else _short(path): path for short, path in zip(last, images, strict=True)}
