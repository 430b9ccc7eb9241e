"""Brings any dataset `data_tools/sources` can read to LeRobot v3.0 (or v2.1), and proves that nothing changed on the way.

Episodes are read, understood through a dataset card, and encoded in worker processes; this process writes them in the
order of the source, so the number of workers and interruptions change nothing. Afterwards every episode is read back
from the written files and compared with the source (`data_tools/verify.py`).

A damaged episode is left out, named and counted in `meta/conversion.json`; the other episodes are converted. With more
damaged than whole there is nothing to trust, and the conversion is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.convert_pool import Job, Pool
from data_tools.convert_report import COVERS, REPORT, Tally, begin, card_digest, fingerprint, keep, report_of, sentence
from data_tools.lerobot_v21 import refuse_other_things
from data_tools.sources import Source, open_source
from data_tools.verify import verify_episodes
from data_tools.working import terminable
from vla.embodiment import EmbodimentSpec
from vla.errors import DataError, UsageError
from vla.recording import EncodedEpisode, LeRobotWriter, encode_episode
from vla.recording.video import VIDEO

FORMATS = ("lerobot-v3.0", "lerobot-v2.1")


@dataclass
class _Outcome:
    """What became of one key: an encoded episode, or the damage that was found."""

    key: str
    episode: EncodedEpisode | None = None
    damage: DataError | None = None
    raw_bytes: int = 0


def convert(
    src: str | Path, dst: str | Path, *, kind: str | None = None, card: Any = None, to: str = FORMATS[0], workers: int = 1,
    video: str = "lossless", strict: bool = False, episodes: str | None = None, fps: float | None = None,
    instruction: str | None = None, verify: bool = True, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Convert the dataset at `src` into the folder `dst`; returns the summary that is also in `meta/conversion.json`.

    `kind`: `lerobot`, `rlds` or `hdf5` (None: recognised). `card`: a shipped card's name, a YAML file or a `Card` (None:
    the shipped one that fits, else one derived from the fields). `episodes`: `A:B`, half open, in the source's order.
    `fps` and `instruction`: the control rate and the words of every episode, for a source that has none. `workers` 0
    works in this process. The same call continues an interrupted conversion.

    Raises `UsageError` for a folder begun with another source or card, `DataError` for a source that is more damaged
    than whole, at any damage when `strict`, or when what was written differs from the source; `MachineError` when the
    disk is full (what was committed stays).
    """
    began = time.monotonic()
    if to not in FORMATS:
        raise UsageError("--to", found=to, expected=f"one of {FORMATS}", fix="choose one of these")
    if workers < 0:
        raise UsageError("--workers", found=workers, expected="0 or more", fix="pass --workers 0 or more")
    src, dst = Path(src), Path(dst)
    if dst.resolve().is_relative_to(src.resolve()):
        raise UsageError(dst, found="a folder inside the source", expected="a place of its own", fix="choose another DST")
    source = open_source(src, kind)
    as_it_is = card is None and video == "lossless" and not (episodes or fps or instruction)
    if to == FORMATS[1] and source.kind.startswith("lerobot") and as_it_is:
        return _lerobot_to_v21(source, dst, workers, verify, progress)
    options = _options(kind, card, to, video, episodes, fps, instruction)
    card = _fitted(card, source, fps, instruction)
    spec, rate = card.spec, max(1, round(card.spec.control_hz))
    _check_sizes(spec, video)
    listed = source.keys()
    keys = _slice(listed, episodes)
    if not keys:
        raise DataError(source.root, found=f"no episodes in {episodes or 'it'}", expected="at least one",
                        fix="check the path, or --episodes")  # fmt: skip
    tally = Tally(source, len(listed), len(keys), strict)
    tally.judge_listing()
    _ask_for_words(Job(source, card, rate, video), keys)
    header = {"source_name": _name(source), "source_kind": source.kind, "source_listing_sha256": fingerprint(source.root),
              "card": card.name, "card_sha256": card_digest(card), "selected": episodes or ":"}  # fmt: skip
    work = dst if to == FORMATS[0] else dst.with_name(f".{dst.name}.v30")
    if work != dst:
        refuse_other_things(dst)  # said now, not after hours of work
        if not work.exists() and (report := _finished(dst, header | {"video": video})) is not None:
            return report | {"out": str(dst), "format": to, "converted_now": 0, "megabytes": _megabytes(dst),
                             "raw_megabytes": 0.0, "seconds": 0.0, "verify_seconds": 0.0}  # fmt: skip
    with Pool(workers, Job(source, card, rate, video)) as pool:
        with LeRobotWriter(work, spec, fps=rate, video=video, header=header, resume=True) as writer:
            begin(work, writer.header, options)
            already, raw = writer.num_episodes, _append(writer, pool, spec, keys, tally, progress)
        report = report_of(source, card, writer, tally)
        written = time.monotonic()
        if verify and writer.num_episodes:
            report["verified"] = verify_episodes(pool, work, spec, writer.recorded, video, progress)
    keep(work, report)
    if work != dst:
        from data_tools.convert_v21 import to_v21

        _, proof = to_v21(work, dst, workers=workers, verify=verify, progress=progress)
        keep(dst, report | ({"verified": proof} if proof and proof["differences"] else {}))
        shutil.rmtree(work)
    return report | {
        "out": str(dst), "format": to, "converted_now": writer.committed - already, "megabytes": _megabytes(dst),
        "raw_megabytes": round(raw / 1e6, 1), "seconds": round(written - began, 1),
        "verify_seconds": round(time.monotonic() - written, 1),
    }  # fmt: skip


def _lerobot_to_v21(source: Source, dst: Path, workers: int, verify: bool, progress: bool) -> dict[str, Any]:
    """Straight from LeRobot to LeRobot: numbers in their own type, videos without decoding where that is possible."""
    from data_tools.convert_v21 import to_v21

    done, proof = to_v21(source.root, dst, workers=workers, verify=verify, progress=progress)
    notes = [f"{done['clips_encoded']} clips could not be cut out as they are and were encoded anew, without loss"]
    report = {
        "source_name": _name(source), "source_kind": source.kind, "card": None, "complete": True,
        "source_listing_sha256": fingerprint(source.root), "source_listing_covers": COVERS,
        "robot": source.info.attributes.get("robot_type"), "fps": source.info.fps, "episodes": done["episodes"],
        "frames": done["frames"], "damaged_files": [], "quarantined": [], "not_carried": done["left_out"],
        "notes": notes if done["clips_encoded"] else [], "verified": proof,
    }  # fmt: skip
    keep(dst, report)
    return report | {"out": str(dst), "format": FORMATS[1], "converted_now": done["episodes"] - done["resumed"],
                     "megabytes": _megabytes(dst), "seconds": done["seconds"]}  # fmt: skip


def _ask_for_words(job: Job, keys: list[str]) -> None:
    """Raise `DataError` when a source has no instructions, by its first episode, and if that is mute or damaged, two others."""
    if job.card is not None and job.card.instruction.text is not None:
        return
    mute: list[DataError] = []
    for key in dict.fromkeys((keys[0], keys[len(keys) // 2], keys[-1])):
        try:
            job.read(key)
        except DataError as damage:
            if damage.where.endswith(", instruction"):
                mute.append(damage)
            continue  # other damage is told when its turn comes
        return
    if mute:
        raise DataError(mute[0].where, found=f"{mute[0].found}, nor in any other episode looked at", expected=mute[0].expected,
                        fix="pass --instruction TEXT, what every episode is told to do, or say in a card which field holds "
                        "the words (instruction: {field: ...})")  # fmt: skip


def _options(
    kind: str | None, card: Any, to: str, video: str, episodes: str | None, fps: float | None, instruction: str | None
) -> list[str]:
    """What is typed after `vla data convert SRC DST` to get these settings again."""
    from data_tools.standardise import shipped_cards

    # A file of this machine is nobody else's business; which card it was, `card` in the header says.
    named = card if card is None or card in shipped_cards() else "CARD.yaml"
    pairs = (("--from", kind), ("--card", named), ("--fps", fps), ("--instruction", instruction), ("--episodes", episodes))
    said = [word for flag, value in pairs if value is not None for word in (flag, str(value))]
    said += ["--to", to] if to != FORMATS[0] else []
    return said + (["--video", video] if video != "lossless" else [])


def _name(source: Source) -> str:
    """What the source calls itself, else its folder: that of RLDS is only the version."""
    return str(source.info.attributes.get("name") or source.root.name)


def _finished(dst: Path, header: dict[str, Any]) -> dict[str, Any] | None:
    """The report of this very conversion, when it ended well before."""
    path = dst / REPORT
    report = json.loads(path.read_text()) if path.is_file() and (dst / "meta" / "info.json").is_file() else {}
    return report if report and all(report.get(key) == value for key, value in header.items()) else None


def _megabytes(root: Path) -> float:
    return round(sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) / 1e6, 1)


def _fitted(card: Any, source: Source, fps: float | None, instruction: str | None) -> Any:
    from data_tools.standardise import card_for, fit, load_card

    if card is None:
        card = card_for(source, fps)
    elif isinstance(card, str | Path):
        card = load_card(card)
    if fps is not None:
        card = card.model_copy(update={"fps": fps})
    if instruction is not None:
        words = card.instruction.model_copy(update={"text": instruction})
        card = card.model_copy(update={"instruction": words})
    return fit(card, source.info)


def _check_sizes(spec: EmbodimentSpec, video: str) -> None:
    odd = [f"{name} {c.height}x{c.width}" for name, c in spec.cameras.items() if c.height % 2 or c.width % 2]
    if odd and video == "yuv420p":
        raise UsageError("--video", found=f"yuv420p for pictures of {odd}", expected="even height and width",
                         fix="pass --video lossless or --video rgb")  # fmt: skip


def _slice(keys: list[str], episodes: str | None) -> list[str]:
    try:
        first, _, last = (episodes or ":").partition(":")
        if ":" not in (episodes or ":"):
            raise ValueError
        return keys[int(first) if first else None : int(last) if last else None]
    except ValueError:
        raise UsageError("--episodes", found=episodes, expected="A:B, such as 0:100, 100: or :20", fix="correct it") from None


def _append(
    writer: LeRobotWriter, pool: Pool, spec: EmbodimentSpec, keys: list[str], tally: Tally, progress: bool
) -> int:
    """Convert what is not yet in the dataset. Returns the bytes of raw episodes that were read."""
    if writer.orphans:
        tqdm.write(f"removed what an interrupted conversion had left: {', '.join(writer.orphans)}", file=sys.stderr)
    done = {entry.get("source") for entry in writer.recorded}
    # A key before the last one written that is not there was damaged; it is tried again, and named again.
    missing = [key for key in keys if key not in done]
    sizes = {camera: (size.height, size.width) for camera, size in spec.cameras.items()}
    raw, began = 0, time.monotonic()
    with tqdm(total=len(keys), initial=len(keys) - len(missing), unit="ep", desc="converting", disable=not progress) as bar:
        for outcome in pool.ordered(_encode, ((key, sizes) for key in missing)):
            if outcome.damage is not None:
                tally.add(outcome.key, outcome.damage)
                tqdm.write(f"QUARANTINED {outcome.key}: {outcome.damage.found}", file=sys.stderr)
            else:
                assert outcome.episode is not None
                writer.add(outcome.episode)
            raw += outcome.raw_bytes
            bar.update()
            rate = raw / 1e6 / (time.monotonic() - began)
            bar.set_postfix_str(f"{rate:.1f} MB/s, {len(tally.quarantined)} damaged", refresh=False)
    return raw


# ---- in a worker ----


def _encode(job: Job, key: str, sizes: dict[str, tuple[int, int]]) -> _Outcome:
    try:
        raw, episode = job.read(key)
        found = {camera: (frames.shape[1], frames.shape[2]) for camera, frames in episode.images.items()}
        if found != sizes:
            raise DataError(raw.where, found=f"pictures of {found}", expected=f"{sizes}, as the episodes before it",
                            fix="convert these episodes into a dataset of their own (--episodes A:B)")  # fmt: skip
    except DataError as damage:
        return _Outcome(key, damage=damage)
    size = sum(array.nbytes for array in (*raw.fields.values(), *raw.images.values()))
    several, split = len(raw.attributes.get("instructions", ())) > 1, str(raw.attributes.get("split", ""))
    del raw  # its pictures need not live while the standardised ones are encoded
    encoded = encode_episode(episode, job.fps, job.video)
    encoded.source, encoded.split, encoded.several = key, split, several
    return _Outcome(key, encoded, raw_bytes=size)


def add_convert_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add `convert` to the `vla data` sub-commands; `run` carries it out."""
    parser = subparsers.add_parser(
        "convert", help="bring LeRobot v2.x, RLDS or HDF5 data to LeRobot v3.0, or v3.0 to v2.1",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  vla data convert downloads/libero_spatial data/libero_spatial\n"
        "  vla data convert downloads/bridge data/bridge --from rlds --card bridge_orig --video yuv420p --workers 8\n"
        "  vla data convert data/tabletop export/tabletop --to lerobot-v2.1\n\n"
        "Run the same line again to continue an interrupted conversion.",
    )  # fmt: skip
    add = parser.add_argument
    add("src", type=Path, metavar="SRC", help="a folder or file in LeRobot v2.0/v2.1/v3.0, RLDS or HDF5 layout")
    add("dst", type=Path, metavar="DST", help="the new dataset's folder, new or begun by the same command")
    add("--from", dest="kind", choices=("lerobot", "rlds", "hdf5"), help="layout of SRC (default: recognised)")
    add("--card", metavar="NAME|YAML", help="dataset card: what the fields mean (default: the shipped one that fits)")
    add("--fps", type=float, metavar="HZ", help="control rate, for a source without a card that does not say it")
    add("--instruction", metavar="TEXT", help="what every episode is told to do, for a source without words (robomimic, ALOHA)")
    add("--to", choices=FORMATS, default=FORMATS[0], help="default %(default)s")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="W", help="processes (default: cores, %(default)s)")
    add("--video", choices=sorted(VIDEO), default="lossless",
        help="how frames are stored (default %(default)s; yuv420p is small and plays in browsers)")  # fmt: skip
    add("--episodes", metavar="A:B", help="only these, counted in the source's order, B not included")
    add("--strict", action="store_true", help="refuse a source with any damage, instead of leaving out what is damaged")
    add("--no-verify", action="store_true", help="do not read everything back and compare it with the source")
    add("--json", action="store_true", help="print the summary as JSON, no progress bar")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry out `vla data convert`. Returns 0, or 130 after Ctrl-C or SIGTERM (what was committed is kept)."""
    try:
        with terminable():
            summary = convert(
                args.src, args.dst, kind=args.kind, card=args.card, to=args.to, workers=args.workers, video=args.video,
                strict=args.strict, episodes=args.episodes, fps=args.fps,
                instruction=args.instruction, verify=not args.no_verify, progress=not args.json,
            )  # fmt: skip
    except KeyboardInterrupt:
        print(f"\ninterrupted; {args.dst} holds what was converted so far. Run the same command again to continue.",
              file=sys.stderr)  # fmt: skip
        return 130
    print(json.dumps(summary) if args.json else sentence(summary))
    return 0
