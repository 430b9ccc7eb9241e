"""What a conversion says about itself: damage as it is found, `meta/conversion.json`, one error that lists everything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.convert_pool import fields_used
from data_tools.sources import Source
from vla.durable import replace_file
from vla.errors import DataError
from vla.recording import LeRobotWriter, splits

REPORT = "meta/conversion.json"
COVERS = "names and sizes of the files, and the first and last 64 KiB of each; not what lies between"
"""What `source_listing_sha256` depends on, see `fingerprint`."""
RECOMPUTED = {"timestamp", "frame_index", "episode_index", "index", "task_index", "next.done", "next.success"}
"""LeRobot's own columns, written anew: they follow from the episodes."""
_MOST_NAMED = 20
_EDGE = 1 << 16
_AGAIN = "copy or download it again, then convert into another folder"


@dataclass
class Tally:
    """Damage so far, against how much there is to convert."""

    source: Source
    listed: int
    """Episodes the source lists."""
    chosen: int
    """Those of them that are to be converted (`--episodes`)."""
    strict: bool
    quarantined: list[tuple[str, DataError]] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """What the source was meant to hold and cannot list: episodes where it knows how many, else files."""
        return max(len(self.source.damage), self.source.missing)

    def add(self, key: str, damage: DataError) -> None:
        """Count a damaged episode. Raises `DataError` when `strict`, or when that makes it more than half."""
        if self.strict:
            raise DataError(damage.where, found=damage.found, expected=f"{damage.expected}; --strict stops at any damage",
                            fix=f"{damage.fix}; or drop --strict to leave it out")  # fmt: skip
        self.quarantined.append((key, damage))
        # What is lost of the whole source says nothing of a chosen part of it: that part stands for itself.
        lost = self.lost if self.chosen == self.listed else 0
        self._refuse_ruins(lost + len(self.quarantined), lost + self.chosen)

    def judge_listing(self) -> None:
        """What opening the source has found already."""
        if self.strict and self.source.damage:
            raise all_of(_findings(self.source.damage), self.source.root, f"{len(self.source.damage)} damaged files",
                         "none, as --strict demands", f"{_AGAIN}; or leave them out: drop --strict")  # fmt: skip
        self._refuse_ruins(self.lost, self.lost + self.listed)

    def _refuse_ruins(self, bad: int, total: int) -> None:
        if bad * 2 > total:
            damage = [*self.source.damage, *(d for _, d in self.quarantined)]
            advice = list(dict.fromkeys(d.fix for d in damage))[:3]
            if any(d.where.endswith(", instruction") for d in damage):
                advice.insert(0, "pass --instruction TEXT")
            raise all_of(_findings(damage), self.source.root,
                         f"{bad} of {total} damaged (files that cannot be listed, episodes missing or unreadable)",
                         "at most half damaged", "; ".join(advice) + "; then convert into another folder")  # fmt: skip


def card_digest(card: Any) -> str:
    """sha256 of what a card says, whatever file it came from."""
    return hashlib.sha256(json.dumps(card.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def fingerprint(root: Path) -> str:
    """`source_listing_sha256`: over the names and sizes of a dataset's files and both ends (64 KiB) of each, without hidden
    ones. It tells sources apart without reading 50 GB, and is the same for a copy elsewhere. It is no checksum of the
    content: what changes in the middle of a file, sizes kept, is not seen."""
    files = [root]
    if root.is_dir():  # without hidden ones: `.cache` of a download holds times
        files = [p for p in sorted(root.rglob("*")) if p.is_file() and not any(s[0] == "." for s in p.relative_to(root).parts)]
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root) if root.is_dir() else path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(_EDGE, size - _EDGE))
            digest.update(file.read(_EDGE))
    return digest.hexdigest()


def begin(root: Path, header: dict[str, Any], options: Sequence[str]) -> None:
    """Say beside the data that this conversion is not finished, and what to add to `vla data convert SRC DST` to finish it."""
    unfinished = {**header, "complete": False, "options": list(options)}
    replace_file(root / REPORT, json.dumps(unfinished, indent=2), "the episodes written so far are whole")


def report_of(source: Source, card: Any, writer: LeRobotWriter, tally: Tally) -> dict[str, Any]:
    """What `meta/conversion.json` holds, before the proof. No paths of this machine, no times: equal for equal conversions."""
    rate, notes = card.spec.control_hz, []
    if abs(rate - writer.fps) > 1e-6:
        notes.append(f"{rate:g} Hz is stored as {writer.fps} fps (LeRobot's fps is an integer); meta/embodiment.json "
                     f"keeps {rate:g}")  # fmt: skip
    ranges = splits(writer.recorded)
    if len(ranges) > 1:
        notes.append(f"splits of the source, as episodes of this dataset: {ranges}; pass --episodes to convert one of them")
    if masks := source.info.attributes.get("masks"):
        notes.append(f"filter lists of the source are not carried over: {sorted(masks)}")
    if strangers := source.info.attributes.get("mask_strangers"):
        listed = ", ".join(f"{count} in {name!r}" for name, count in sorted(strangers.items()))
        notes.append(f"filter lists of the source name demonstrations that are in none of its files: {listed}")
    if source.missing:
        notes.append(f"{source.missing} episodes that the source promises are in none of its files that can be listed")
    several = sum(entry.get("several", False) for entry in writer.recorded)
    if several:
        notes.append(f"{several} episodes change their instruction midway; the first was kept for all of each")
    used, images = fields_used(card), source.info.images.keys()
    there = source.info.fields.keys() | set(source.info.attributes.get("left_out", ()))
    return {
        **writer.header, "complete": True, "source_listing_covers": COVERS,
        "robot": writer.spec.key, "episodes": writer.num_episodes, "frames": writer.num_frames,
        "damaged_files": [_placeless(finding, source.root) for finding in _findings(source.damage)],
        "quarantined": [_placeless({"key": key, **_findings([d])[0]}, source.root) for key, d in tally.quarantined],
        "splits": ranges, "not_carried": sorted(there - images - used - RECOMPUTED),
        "pictures_not_carried": sorted(images - used), "rounded": _rounded(source, card),
        "instructions_changing": several, "notes": notes, "verified": None,
    }  # fmt: skip


def _rounded(source: Source, card: Any) -> list[str]:
    """Fields that hold float64 and are stored as float32, by their declared type: whether a value changed is not asked."""
    columns = [*card.state, *card.action, *(c.relative_to for c in (*card.state, *card.action) if c.relative_to)]
    wide = {c.field for c in columns if source.info.fields.get(c.field, ("",))[0] == "float64"}
    return sorted(wide)


def _findings(damage: Sequence[DataError]) -> list[dict[str, str]]:
    return [{"where": d.where, "found": d.found, "expected": d.expected} for d in damage]


def _placeless(finding: dict[str, str], root: Path) -> dict[str, str]:
    """Without the folder the source lay in: a dataset is handed on."""
    return {key: value.replace(str(root), root.name) for key, value in finding.items()}


def all_of(findings: Sequence[dict[str, str]], where: object, found: str, expected: str, fix: str) -> DataError:
    """One error that lists them all, or the first 20."""
    lines = [f"\n    {n}. {f['where']}: {f['found']} (expected {f['expected']})" for n, f in enumerate(findings[:_MOST_NAMED], 1)]
    more = f"\n    and {len(findings) - _MOST_NAMED} more" if len(findings) > _MOST_NAMED else ""
    return DataError(where, found=found + "".join(lines) + more, expected=expected, fix=fix)


def keep(root: Path, report: dict[str, Any]) -> None:
    """Write the report beside the data, `complete` unless the proof has failed: then raises `DataError`."""
    differing = (report["verified"] or {}).get("differences") or []
    report = report | {"complete": not differing}
    replace_file(root / REPORT, json.dumps(report, indent=2, allow_nan=False), "the dataset itself is complete")
    if differing:
        raise all_of(differing, root, f"{len(differing)} differences between the source and what was written", "none",
                     "remove the folder and convert again; if it happens again, report it with this message")  # fmt: skip


def sentence(summary: dict[str, Any]) -> str:
    """The summary for people, warnings last."""
    proof = summary["verified"]
    lines = [f"{summary['out']}: {summary['episodes']} episodes, {summary['frames']:,} frames of {summary['robot']} at "
             f"{summary['fps']} fps, {summary['megabytes']} MB in {summary['seconds']} s"
             + (f", card {summary['card']}" if summary["card"] else "")]  # fmt: skip
    if proof is None:
        lines.append("NOT verified (--no-verify)")
    elif proof["pictures_identical"]:
        lines.append(f"verified: {proof['episodes']} episodes, {proof['pictures']:,} pictures identical; {_equal(summary)}")
    else:
        lines.append(f"verified: {proof['episodes']} episodes, {proof['pictures']:,} pictures, worst PSNR "
                     f"{proof['worst_psnr']} dB (limit {proof['psnr_limit']}); {_equal(summary)}")  # fmt: skip
    lines += [f"note: {note}" for note in summary["notes"]]
    if summary["not_carried"]:
        lines.append(f"not carried over: {', '.join(summary['not_carried'])}")
    if pictures := summary.get("pictures_not_carried"):
        lines.append(f"WARNING: pictures left out, no camera of the card takes them: {', '.join(pictures)}")
    for name, words in (("damaged_files", "files that cannot be listed"), ("quarantined", "damaged episodes left out")):
        found = summary[name]
        if found:
            lines.append(f"WARNING: {words}: {len(found)} (all in {REPORT})")
            lines += [f"  {f['where']}: {f['found']}" for f in found[:_MOST_NAMED]]
    return "\n".join(lines)


def _equal(summary: dict[str, Any]) -> str:
    """What the proof found equal, beside the pictures, and equal to what."""
    rounded, changing = summary.get("rounded") or [], summary.get("instructions_changing", 0)
    numbers = "states, actions identical"
    if rounded:
        numbers += f" as float32 ({len(rounded)} float64 field{'s' * (len(rounded) != 1)} rounded: {', '.join(rounded)})"
    words = "instructions identical"
    if changing:
        words += f" (the first of an episode; {changing} episode{'s change theirs' if changing != 1 else ' changes its own'})"
    return f"{numbers}; {words}; timestamps identical"
