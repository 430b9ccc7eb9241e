"""Numbers of a file into numbers of a channel: units, rotation forms, gripper senses, absolute and delta. Pure functions.

`problems_of` says beforehand, from the card alone, all that cannot be carried out; `fill` then carries out the rest.
Numbers whose meaning is already the channel's pass through unchanged, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data_tools.standardise.card import ChannelCard, Columns, GripperSpan, Meaning, positions
from data_tools.standardise.meaning import BODY_FRAMES, Kind, kind_of, to_base, unit_factor
from vla.embodiment import Channel
from vla.rotation import compose, continuous, from_quat, inverse, relative, rotate, to_quat


def meaning_kind(meaning: Meaning) -> Kind:
    """What the file's numbers are."""
    return kind_of(meaning.convention, meaning.rotation)


# --- beforehand -------------------------------------------------------------------------------------------------------


def problems_of(entry: ChannelCard, channel: Channel, fps: float) -> list[tuple[str, str, str]]:
    """(key of the entry, found, expected) for all that keeps `entry` from filling `channel`; widths are checked elsewhere."""
    have, want, raw = meaning_kind(entry.from_), kind_of(channel.convention), entry.from_
    if have.family != want.family:
        return [("from", f"convention {raw.convention!r}", f"{channel.convention!r}, the channel's, or what can become it")]
    found: list[tuple[str, str, str]] = []
    if have.family == "gripper":
        return _gripper_problems(entry, channel, have, want)
    for key in ("gripper", "to"):
        if getattr(entry, key) is not None:
            found.append((key, f"on a {have.family} channel", "a gripper channel"))
    if have.family != "rotation" and entry.sign != "as_is":
        found.append(("sign", f"{entry.sign!r} on a {have.family} channel", "a rotation channel"))
    found += _unit_problems(entry, channel, have, want, fps)
    found += _reference_problems(entry, channel, have, want, fps)
    crossing = have.delta != want.delta or entry.achieved is not None
    if have.family in ("position", "rotation") and raw.frame != channel.frame and entry.offset is None:
        delta_frame = channel.frame if want.delta else raw.frame
        if not (crossing and have.family == "rotation" and delta_frame in BODY_FRAMES):
            found.append(("from", f"frame {raw.frame!r}", f"frame {channel.frame!r}, the channel's, or an `offset` to it"))
    if entry.offset is not None and have.family not in ("position", "rotation"):
        found.append(("offset", f"on a {have.family} channel", "a position or a rotation of the hand"))
    if entry.offset is not None and entry.offset.tool is not None and (want.delta or have.family != "rotation"):
        found.append(("offset", "a `tool` turn", "an absolute orientation to turn"))
    return found


def _unit_problems(entry: ChannelCard, channel: Channel, have: Kind, want: Kind, fps: float) -> list[tuple[str, str, str]]:
    raw = entry.from_
    try:
        if have.family == "rotation":
            for kind, unit in ((have, raw.unit), (want, channel.unit)):
                if kind.angular:
                    unit_factor("rad/step" if kind.delta else "rad", unit, fps)
        elif have.family == "scalar":
            unit_factor(raw.unit if raw.unit is not None else channel.unit, channel.unit, fps)
        elif have.delta == want.delta and entry.achieved is None:
            unit_factor(raw.unit, channel.unit, fps)
        else:
            absolute, delta = (raw.unit, channel.unit) if want.delta else (channel.unit, raw.unit)
            unit_factor(f"{absolute}/step", delta, fps)
    except ValueError as error:
        return [("from", f"unit {raw.unit!r}: {error}", f"a unit that can become {channel.unit!r}, the channel's")]
    return []


def _reference_problems(entry: ChannelCard, channel: Channel, have: Kind, want: Kind, fps: float) -> list[tuple[str, str, str]]:
    """Of what the conversion between absolute and delta needs."""
    found, raw = [], entry.from_
    if entry.achieved is not None:
        if have.delta or not want.delta:
            found.append(("achieved", f"{raw.convention!r} into {channel.convention!r}", "absolute numbers into a delta"))
        if entry.relative_to is not None:
            found.append(("achieved", "together with relative_to", "one of the two"))
        if entry.achieved == "subtract" and have.family == "rotation" and not (have.form == want.form and have.angular):
            found.append(("achieved", f"subtract, {have.form} into {want.form}", "one Euler form on both sides, or compose"))
    elif have.delta != want.delta and entry.relative_to is None:
        found.append(("from", f"convention {raw.convention!r}",
                      f"{channel.convention!r}, or `relative_to` / `achieved` to say between what it is a step"))  # fmt: skip
    elif have.delta == want.delta and entry.relative_to is not None:
        found.append(("relative_to", f"{raw.convention!r} into {channel.convention!r}", "absolute into delta, or the other way"))
    crossing = (have.delta != want.delta) or entry.achieved is not None
    if crossing and have.family == "position" and BODY_FRAMES & {channel.frame, raw.frame}:
        found.append(("from", "a displacement in a frame that moves", "frame base or world; the other needs the orientation"))
    if entry.relative_to is not None:
        seen = entry.relative_to.from_
        kind = meaning_kind(seen)
        if kind.family != have.family or kind.delta:
            found.append(("relative_to", f"convention {seen.convention!r}", f"an absolute {have.family}"))
        elif kind.family != "rotation" or kind.angular:
            try:
                absolute = "rad" if kind.family == "rotation" else raw.unit if want.delta else channel.unit
                unit_factor(seen.unit, absolute, fps)
            except ValueError as error:
                found.append(("relative_to", f"unit {seen.unit!r}: {error}", "a unit of the same kind"))
        frame = raw.frame if want.delta else channel.frame
        if have.family in ("position", "rotation") and seen.frame != frame:
            found.append(("relative_to", f"frame {seen.frame!r}", f"frame {frame!r}, that of the other pose"))
    return found


def _gripper_problems(entry: ChannelCard, channel: Channel, have: Kind, want: Kind) -> list[tuple[str, str, str]]:
    raw, found = entry.from_, []
    for key in ("achieved", "relative_to", "offset"):
        if getattr(entry, key) is not None:
            found.append((key, "on a gripper", "joints, positions or rotations"))
    if raw.open is None or raw.closed is None:
        if entry.gripper is not None or entry.to is not None or have != want:
            found.append(("from", f"{raw.convention!r} without its range", "`open` and `closed`, as the file writes them"))
        else:
            try:
                unit_factor(raw.unit, channel.unit, 1.0)
            except ValueError as error:
                found.append(("from", f"unit {raw.unit!r}: {error}", f"what can become {channel.unit!r}, or `open` and `closed`"))
        return found
    target = _span(entry, channel)
    for where, kind, opened, closed in (("from", have, raw.open, raw.closed), ("to", want, target.open, target.closed)):
        if (opened > closed) != kind.open_positive:
            sense = "open above closed" if kind.open_positive else "closed above open"
            found.append((where, f"open {opened}, closed {closed}", f"{sense}, as its convention says"))
    if entry.gripper is not None and entry.gripper.relative is not None and raw.open * raw.closed >= 0:
        found.append(("gripper", f"relative, with open {raw.open} and closed {raw.closed}", "one of them above 0 and one below"))
    return found


def _span(entry: ChannelCard, channel: Channel) -> GripperSpan:
    if entry.to is not None:
        return entry.to
    low, high = channel.low[0], channel.high[0]
    return GripperSpan(open=high, closed=low) if kind_of(channel.convention).open_positive else GripperSpan(open=low, closed=high)


# --- carrying it out --------------------------------------------------------------------------------------------------


def take(fields: Mapping[str, np.ndarray], columns: Columns) -> np.ndarray:
    """(T, k) of the field's numbers, in its own dtype."""
    array = np.asarray(fields[columns.field])
    flat = array.reshape(len(array), -1)
    return flat[:, positions(columns.dims, flat.shape[1])]


def fill(entry: ChannelCard, channel: Channel, fields: Mapping[str, np.ndarray], fps: float) -> np.ndarray:
    """(T, k) of `fields` -> (T, D) of `channel`; T - 1 rows where the entry is `achieved`."""
    raw = take(fields, entry)
    have, want = meaning_kind(entry.from_), kind_of(channel.convention)
    if have.family == "scalar":
        found = entry.from_.unit if entry.from_.unit is not None else channel.unit
        return _scaled(raw, unit_factor(found, channel.unit, fps))
    if have.family == "gripper":
        return _gripper(entry, channel, raw)
    seen = take(fields, entry.relative_to) if entry.relative_to is not None else None
    if have.family == "rotation":
        return _rotation(entry, channel, have, want, raw, seen, fps)
    if entry.achieved is None and seen is None and entry.offset is None:
        return _scaled(raw, unit_factor(entry.from_.unit, channel.unit, fps))
    x = raw * to_base(entry.from_.unit, fps)
    if entry.achieved is not None:
        x = x[1:] - x[:-1]
    elif seen is not None and entry.relative_to is not None:
        x = x + seen * to_base(entry.relative_to.from_.unit, fps) * (-1 if want.delta else 1)
    if entry.offset is not None:
        x = rotate(to_quat(np.array(entry.offset.rotation), entry.offset.form), x)
        x = x if want.delta else x + np.array(entry.offset.translation)
    return x / to_base(channel.unit, fps)


def _rotation(
    entry: ChannelCard, channel: Channel, have: Kind, want: Kind, raw: np.ndarray, seen: np.ndarray | None, fps: float
) -> np.ndarray:  # fmt: skip
    inward = to_base(entry.from_.unit, fps) if have.angular else 1.0
    outward = to_base(channel.unit, fps) if want.angular else 1.0
    if entry.achieved == "subtract":
        step = (raw[1:] - raw[:-1].astype(np.float64)) * inward
        return (step - 2 * np.pi * np.round(step / (2 * np.pi))) / outward
    plain = entry.achieved is None and seen is None and entry.offset is None and have == want
    if plain and entry.sign == "as_is":
        return _scaled(raw, inward / outward)
    q = to_quat(raw * inward, have.form)
    if entry.achieved is not None:
        q = relative(q[:-1], q[1:], "body" if channel.frame in BODY_FRAMES else "base")
    elif seen is not None and entry.relative_to is not None:
        other = meaning_kind(entry.relative_to.from_)
        now = to_quat(seen * (to_base(entry.relative_to.from_.unit, fps) if other.angular else 1.0), other.form)
        if want.delta:
            q = relative(now, q, "body" if channel.frame in BODY_FRAMES else "base")
        else:
            q = compose(now, q) if entry.from_.frame in BODY_FRAMES else compose(q, now)
    if entry.offset is not None:
        turn = to_quat(np.array(entry.offset.rotation), entry.offset.form)
        q = compose(compose(turn, q), inverse(turn)) if want.delta else compose(turn, q)
        if entry.offset.tool is not None:
            q = compose(q, to_quat(np.array(entry.offset.tool), entry.offset.form))
    out = from_quat(q, want.form)
    if entry.sign == "continuous" and want.form.startswith("quat_"):
        out = continuous(out)
    return out / outward


def _gripper(entry: ChannelCard, channel: Channel, raw: np.ndarray) -> np.ndarray:
    meaning, command = entry.from_, entry.gripper
    if meaning.open is None or meaning.closed is None:
        return _scaled(raw, unit_factor(meaning.unit, channel.unit, 1.0))
    span = _span(entry, channel)
    if command is None and (span.open, span.closed) == (meaning.open, meaning.closed):
        return raw
    share = (raw.astype(np.float64) - meaning.closed) / (meaning.open - meaning.closed)
    if command is not None:
        if command.relative is not None:
            share = _held(raw.astype(np.float64), meaning.open, command.relative)
        if command.binarise is not None:
            share = _decided(share, *command.binarise)
        if command.clip:
            share = np.clip(share, 0, 1)
    return span.closed + share * (span.open - span.closed)


def _held(raw: np.ndarray, opening: float, dead: float) -> np.ndarray:
    """Signed moves (T, k) -> the state commanded (1 open, 0 closed), each held until the next move."""
    moved = np.abs(raw) > dead
    target = (np.sign(raw) == np.sign(opening)).astype(np.float64)
    last = np.maximum.accumulate(np.where(moved, np.arange(len(raw))[:, None], -1), axis=0)
    first = moved.argmax(0)
    before = np.where(moved.any(0), 1 - np.take_along_axis(target, first[None], 0)[0], 1.0)
    return np.where(last >= 0, np.take_along_axis(target, np.maximum(last, 0), 0), before)


def _decided(share: np.ndarray, low: float, high: float) -> np.ndarray:
    """Shares of opening (T, k) -> 0 or 1; undecided steps take the next decided one, at the end the nearer of the two."""
    T = len(share)
    decided = (share <= low) | (share >= high)
    value = np.where(decided, share >= high, share > (low + high) / 2).astype(np.float64)
    upcoming = np.minimum.accumulate(np.where(decided, np.arange(T)[:, None], T)[::-1], axis=0)[::-1]
    own = np.arange(T)[:, None]
    return np.take_along_axis(value, np.where(upcoming < T, upcoming, own), 0)


def _scaled(raw: np.ndarray, factor: float) -> np.ndarray:
    return raw if factor == 1.0 else raw * factor

