"""Raw fields of a foreign dataset -> episodes in a robot's own channels, as its card says (`configs/datasets/`).

    card = card_for(source)                       # or fit(load_card("libero"), source.info)
    episode = standardise(source.read(key), card, source.info)

A card says what the numbers of a file mean; the embodiment says what they shall mean; the difference is carried out here by
`channels.py`, or refused. Nothing is guessed: what nobody knows stays convention `scalar` and passes through to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from data_tools.sources import RawEpisode, SourceInfo
from data_tools.standardise.card import CameraCard, Card, ChannelCard, load_card, lookup, shipped_cards
from data_tools.standardise.channels import fill
from data_tools.standardise.fitting import card_for, fit, nearest
from vla.errors import DataError
from vla.schema import Episode

__all__ = ["SUCCESS", "Card", "card_for", "fit", "load_card", "shipped_cards", "standardise"]

SUCCESS = "next.success"
"""The field in which LeRobot says of every row whether the task is done."""


def standardise(raw: RawEpisode, card: Card, info: SourceInfo) -> Episode:
    """`raw` in the units, frames and signs of `card.spec`, `state[t]` and `images[t]` seen before `action[t]`.

    Raises `UsageError` when the card does not fit the dataset, `DataError` naming every field of this episode that is missing,
    of another shape than the dataset promises, of unequal length, or not what the card says it is.
    """
    if not card.fitted:
        card = fit(card, info)
    spec, fps = card.spec, card.fps
    assert fps is not None
    _check_raw(raw, card, info)
    T = len(next(iter(_needed(raw, card).values())))
    first, last = card.skip_steps.first, card.skip_steps.last
    observed, acted = slice(first, T - last), slice(first, T - last)
    if card.pairing == "observation_after_action":
        observed, acted = slice(first, T - last - 1), slice(first + 1, T - last)
    achieved = any(entry.achieved for entry in card.action)
    steps = max(0, T - first - last - (card.pairing == "observation_after_action")) - achieved
    if steps < 1:
        raise DataError(raw.where, found=f"{T} steps, of which the card leaves {max(steps, 0)}",
                        expected="at least one step after skipping and pairing", fix="drop the episode")  # fmt: skip
    problems: list[str] = []
    seen = {path: array[observed] for path, array in raw.fields.items()}
    done = {path: array[acted] for path, array in raw.fields.items()}
    columns = {}
    for part, entries, channels in (("state", card.state, spec.state), ("action", card.action, spec.action)):
        by_name = {entry.channel: (index, entry) for index, entry in enumerate(entries)}
        filled = []
        for channel in channels:
            index, entry = by_name[channel.name]
            fields = seen if part == "state" or entry.achieved else _acting(entry, done, seen)
            try:
                filled.append(fill(entry, channel, fields, fps)[:steps])
            except DataError as error:
                problems.append(f"{card.at(part, index)}, {entry.field!r} {entry.dims or ''}: {error.where}: {error.found}, "
                                f"expected {error.expected}")  # fmt: skip
        columns[part] = filled
    if problems:
        raise DataError(raw.where, found="; ".join(problems), expected="numbers of the kind the card names",
                        fix="correct the card, or drop the episode")  # fmt: skip
    images = {name: _pictures(raw.images[entry.field][observed][:steps], entry) for name, entry in card.cameras.items()}
    attributes = raw.attributes
    seed = attributes.get("seed")
    episode = Episode(
        images, _joined(columns["state"], steps), _joined(columns["action"], steps), _words(raw, card, info), spec.key,
        success=_success(raw), task=str(attributes.get("task", "")),
        seed=int(seed) if isinstance(seed, int) and not isinstance(seed, bool) else None,
    )  # fmt: skip
    episode.validate(raw.where)
    return episode


def _success(raw: RawEpisode) -> bool:
    """What the source says of the episode in the place its format has for that; True when it does not say, as demonstrations
    are kept for being one."""
    if "success" in raw.attributes:
        return bool(raw.attributes["success"])
    if SUCCESS in raw.fields:
        return bool(raw.fields[SUCCESS].any())
    said = raw.attributes.get("episode")  # RLDS
    said = said.get("episode_metadata/success") if isinstance(said, Mapping) else None
    return bool(said) if isinstance(said, bool | np.bool_) else True


def _acting(entry: ChannelCard, done: Mapping[str, np.ndarray], seen: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Commands are read at the step they were given; what they are relative to, as it was seen before."""
    if entry.relative_to is None or entry.relative_to.field not in seen:
        return done
    return {**done, entry.relative_to.field: seen[entry.relative_to.field]}


def _needed(raw: RawEpisode, card: Card) -> dict[str, np.ndarray]:
    entries = [*card.state, *card.action]
    paths = {e.field for e in entries} | {e.relative_to.field for e in entries if e.relative_to is not None}
    pictures = {e.field for e in card.cameras.values()}
    found = {path: raw.fields[path] for path in sorted(paths) if path in raw.fields}
    return found | {path: raw.images[path] for path in sorted(pictures) if path in raw.images}


def _check_raw(raw: RawEpisode, card: Card, info: SourceInfo) -> None:
    entries = [*card.state, *card.action]
    wanted = {e.field: info.fields[e.field] for e in entries}
    wanted |= {e.relative_to.field: info.fields[e.relative_to.field] for e in entries if e.relative_to is not None}
    problems = []
    for path, (_, shape) in wanted.items():
        if path not in raw.fields:
            problems.append(f"no field {path!r} (nearest: {nearest(path, raw.fields)})")
        elif raw.fields[path].shape[1:] != tuple(shape):
            problems.append(f"{path!r} is {raw.fields[path].shape[1:]} a step, the dataset says {tuple(shape)}")
    for path in {e.field for e in card.cameras.values()}:
        if path not in raw.images:
            problems.append(f"no pictures {path!r} (nearest: {nearest(path, raw.images)})")
        elif raw.images[path].shape[1:] != (*info.images[path], 3) or raw.images[path].dtype != np.uint8:
            frames = raw.images[path]
            problems.append(f"{path!r} is {frames.dtype} {frames.shape[1:]}, the dataset says uint8 {(*info.images[path], 3)}")
    lengths = {path: len(array) for path, array in _needed(raw, card).items()}
    if len(set(lengths.values())) > 1:
        problems.append(f"lengths differ: {lengths}")
    if problems:
        raise DataError(raw.where, found="; ".join(problems), fix="drop the episode, or correct the card",
                        expected="every field of the card, of the dataset's shape, one row per step")  # fmt: skip


def _joined(filled: list[np.ndarray], steps: int) -> np.ndarray:
    table = np.concatenate(filled, -1) if filled else np.zeros((steps, 0))
    with np.errstate(over="ignore"):  # what does not fit float32 becomes inf, which `validate` names
        return np.ascontiguousarray(table, np.float32)


def _pictures(frames: np.ndarray, entry: CameraCard) -> np.ndarray:
    if entry.flip != "none":
        frames = frames[:, ::-1] if entry.flip == "vertical" else frames[:, ::-1, ::-1]
    if entry.channels == "bgr":
        frames = frames[..., ::-1]
    if entry.resize is not None and frames.shape[1:3] != entry.resize:
        height, width = entry.resize
        small = [Image.fromarray(np.ascontiguousarray(f)).resize((width, height), Image.Resampling.LANCZOS) for f in frames]
        frames = np.stack([np.asarray(picture) for picture in small])
    return np.ascontiguousarray(frames)


def _words(raw: RawEpisode, card: Card, info: SourceInfo) -> str:
    try:
        return _spoken(raw, card, info)
    except ValueError as error:
        raise DataError(f"{raw.where}, instruction", found=error, expected="text",
                        fix="name another field in the card, or drop the episode") from error  # fmt: skip


def _spoken(raw: RawEpisode, card: Card, info: SourceInfo) -> str:
    tried, rule = [], card.instruction
    for path in rule.field:
        tried.append(f"field {path!r}")
        places = (raw.fields, raw.attributes.get("texts") or {}, raw.attributes.get("episode") or {}, raw.attributes)
        if text := next((text for place in places if (text := _text(place.get(path)))), ""):
            return text
    if rule.attribute is not None:
        tried.append(f"attribute {rule.attribute!r}")
        for attributes in (raw.attributes, info.attributes):
            for value in lookup(attributes, rule.attribute):
                if text := _text(value):
                    return text
    if rule.text is not None:
        return rule.text
    if text := _text(raw.instruction):
        return text
    raise DataError(f"{raw.where}, instruction", found=f"no words in {', '.join(tried) or 'the episode'}",
                    expected="an instruction", fix=f"give one in the card ({card.at('instruction')}): "
                    "instruction: {text: ...}, or drop the episode")  # fmt: skip


def _text(value: Any) -> str:
    """Text of a string, bytes, an array of either (the first that is not empty), or (T, n) rows of Unicode code points.

    Raises `ValueError` for numbers that are none."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").strip()
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size:
        points = value.reshape(len(value), -1)[0] if value.ndim > 1 else value
        if not ((points >= 0) & (points <= 0x10FFFF)).all():
            raise ValueError("numbers that are no Unicode code points")
        return "".join(chr(int(p)) for p in points).split("\0", 1)[0].strip()
    if isinstance(value, (list, tuple, np.ndarray)):
        return next((text for item in value if (text := _text(item.item() if isinstance(item, np.generic) else item))), "")
    return ""
