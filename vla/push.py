"""`vla push`: a policy or a dataset, with its card, to the Hugging Face Hub, or into a folder laid out like the Hub's cache.

What is sent is judged first, as strictly as what is fetched: whole safetensors, JSON and text. A policy is loaded before it
leaves, so its fingerprint holds. One commit carries everything; files of an earlier push that are no longer part of it go.

The card (README.md) is always made anew from what is recorded. A README.md in the policy's own folder is neither sent nor
changed; to have your own words in the card, give them with --about FILE. Nothing in FOLDER is ever written to.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from vla.cards import CARD, dataset_card, measure_latency, policy_card, read_evaluations
from vla.checkpoint import MANIFEST
from vla.episodes import EpisodeStore, hub
from vla.errors import CheckpointError, UsageError
from vla.fetch import PATTERNS
from vla.handoff.gate import FILE as HANDOFF
from vla.handoff.gate import read_handoff, renamed
from vla.hub_folder import to_folder, to_hub
from vla.judging import complain, judge_names, refuse_unsafe
from vla.policy import VLAPolicy, load_policy

EVALUATION = "evaluation.json"
_DATA = ("meta", "data", "videos")


def add_push_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "push", help="share a policy or a dataset, with a card made of facts", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  vla push runs/demo you/tabletop-demo --license apache-2.0\n"
        "  vla push runs/demo you/tabletop-demo --hub hub\n"
        "  HF_HUB_OFFLINE=1 HF_HUB_CACHE=hub vla eval you/tabletop-demo --suite tabletop\n"
        "  vla push data/tabletop you/tabletop-data\n"
        "  vla push runs/demo --card --license apache-2.0 --known 'drops the cube near the edge' > card.md",
    )  # fmt: skip
    add = parser.add_argument
    add("path", metavar="FOLDER", help="a run folder, a policy folder or a dataset folder")
    add("name", metavar="USER/NAME", nargs="?", help="the repository; it is made when it is not there. Not needed with --card")
    add("--hub", type=Path, metavar="DIR", help="a folder instead of the Hub, read with HF_HUB_OFFLINE=1 HF_HUB_CACHE=DIR")
    add("--license", metavar="ID", help="one of the Hub's, e.g. apache-2.0; without it the card says that none was stated")
    add("--base", metavar="USER/NAME", help="where an adapter's base is for others, when it was a folder here")
    add("--eval", type=Path, nargs="+", metavar="JSON", help="evaluations for the card (default: those in the run's eval/)")
    add("--known", action="append", default=[], metavar="TEXT", help="a known failure, in your words; may be repeated")
    add("--about", type=Path, metavar="FILE", help="Markdown of your own, set into the card under its first paragraph")
    add("--no-latency", action="store_true", help="do not measure the policy's latency here")
    add("--private", action="store_true", help="make the repository private when it is new")
    add("--card", action="store_true", help="print the card and send nothing")
    add("--json", action="store_true", help="print where it went as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Stage, judge, send. Raises `UsageError` for names and options that do not fit, `CheckpointError` for a refused policy,
    `DataError` for a broken dataset, `MachineError` when the Hub cannot be reached or the disk is full."""
    name = _name(args)
    root = Path(args.path)
    is_data = (root / "meta" / "info.json").is_file()
    about = _about(args.about)
    with tempfile.TemporaryDirectory(prefix="vla-push-") as scratch:
        staged = Path(scratch) / "staged"
        staged.mkdir()
        tags: tuple[str, ...] = ()
        if is_data:
            card, tags = stage_dataset(root, staged, args, about)
        else:
            card = stage_policy(root, staged, args, about)
        if args.card:
            print(card, end="")
            return 0
        _write(staged / CARD, card)
        assert name is not None
        kind = "dataset" if is_data else "model"
        if args.hub:
            where, commit = to_folder(staged, args.hub, name, kind, tags)
        else:
            where, commit = to_hub(staged, name, kind, args.private, tags)
    facts = {"repository": name.repo, "commit": commit, "where": str(where)}
    print(json.dumps(facts) if args.json else f"{where}\nto pin it: {name.repo}@{commit}")
    return 0


def _name(args: argparse.Namespace) -> hub.HubName | None:
    if args.name is None:
        if args.card:
            return None
        raise UsageError("vla push", found="no USER/NAME", expected="where to push to", fix=f"vla push {args.path} you/name")
    try:
        name = hub.parse(f"{hub.PREFIX}{args.name}")
    except UsageError as error:  # which speaks of a dataset
        raise UsageError("USER/NAME", found=repr(args.name), expected="a user and a name, of letters, digits, '-', '_' and '.'",
                         fix=f"vla push {args.path} you/name") from error  # fmt: skip
    assert name is not None
    if name.revision:
        raise UsageError("USER/NAME", found=args.name, expected="a name without a revision",
                         fix=f"vla push {args.path} {name.repo}")  # fmt: skip
    return name


def _local_name(root: Path) -> str:
    """What a card that is only printed calls its subject: no folder of this machine but what was typed."""
    return root.name if root.is_absolute() else root.as_posix()


def _about(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("--about", found=str(error), expected="a Markdown file", fix="check the path") from error


# ------------------------------------------------------------------------------------------------------------ a policy


def stage_policy(root: Path, staged: Path, args: argparse.Namespace, about: str = "") -> str:
    """Put what will be sent of a policy into `staged`, all but its card; returns that."""
    folder = root / "policy" if (root / "policy" / "policy.json").is_file() else root
    if not (folder / "policy.json").is_file():
        raise CheckpointError(root, found="no policy.json and no meta/info.json", expected="a run, a policy or a dataset",
                              fix="give a run folder, or a dataset's own")  # fmt: skip
    refuse_unsafe(folder)
    policy = load_policy(folder, "cpu")
    # Evaluations before the base is renamed below, for they were made of the policy as it is called here.
    paths = args.eval if args.eval is not None else sorted((root / "eval").glob("*.json"))
    evals, others = read_evaluations(paths, policy.fingerprint)
    if others and args.eval is not None:
        raise UsageError("--eval", found=f"not evaluations of these weights: {', '.join(others)}",
                         expected=f"results of policy {policy.fingerprint[:12]}",
                         fix=f"vla eval {root} --suite SUITE --out FILE")  # fmt: skip
    if others:
        print(f"left out of the card, since they are not evaluations of these weights: {', '.join(others)}", file=sys.stderr)
    handoff = read_handoff(folder) if (folder / HANDOFF).is_file() else None  # refuses thresholds of another policy
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and inside.as_posix() not in (MANIFEST, CARD, EVALUATION, HANDOFF, "policy.json") and _wanted(inside):
            _link(path, staged / inside)
    _write(staged / "policy.json", json.dumps(_meaning(policy, folder, args.base), indent=1))
    if handoff is not None:
        _write(staged / HANDOFF, renamed(handoff, policy.fingerprint))
    latency = None if args.no_latency else measure_latency(policy)
    rows = [
        {key: result.get(key) for key in ("suite", "seed", "episodes", "rows", "per_task", "versions", "created")}
        | {"policy": policy.fingerprint}
        for result in evals
    ]  # fmt: skip  under the name it leaves with
    _write(staged / EVALUATION, json.dumps({"results": rows, "latency": latency}, indent=1))
    return policy_card(policy, args.name or _local_name(root), evals, latency, args.license, args.known, about,
                       handoff.facts() if handoff else None)  # fmt: skip


def _wanted(path: Path) -> bool:
    return any(path.match(pattern) for pattern in PATTERNS) and not any(part.startswith(".") for part in path.parts)


def _meaning(policy: VLAPolicy, folder: Path, base: str | None) -> dict[str, Any]:
    """What `policy.json` will say: what it says, or for an adapter with its base under the name others know it by."""
    meaning = json.loads((folder / "policy.json").read_text())
    entry = meaning.get("adapter")
    if entry is None:
        if base is not None:
            raise UsageError("--base", found="a policy without an adapter", expected="an adapter", fix="leave --base out")
        return meaning
    below = entry["base"]
    path = Path(below["path"])
    if base is None and (path.is_absolute() or path.exists() or (folder / path).exists()):
        raise UsageError("--base", found=f"an adapter whose base is {path}, a folder of this machine",
                         expected="a base that others can have", fix="push the base first, then give --base USER/NAME; or "
                         "`vla merge` and push that")  # fmt: skip
    if base is not None:
        below["path"] = base
        if below["kind"] == "model":
            meaning["config"]["backbone"]["path"] = base
        meaning["fingerprint"] = policy.fingerprint_with(meaning)
        assert policy.adapter is not None
        policy.adapter.base["path"] = base
        policy.saved_meaning = meaning
    return meaning


# ------------------------------------------------------------------------------------------------------------ a dataset


def stage_dataset(root: Path, staged: Path, args: argparse.Namespace, about: str = "") -> tuple[str, tuple[str, ...]]:
    """Put what will be sent of a dataset into `staged`, all but its card; returns (card, tags of the commit)."""
    for option in ("base", "eval"):
        if getattr(args, option) is not None:
            raise UsageError(f"--{option}", found="a dataset", expected="a policy", fix=f"leave --{option} out")
    with tempfile.TemporaryDirectory(prefix="vla-push-cache-") as cache:
        store = EpisodeStore.open(root, cache, frames="none", progress=False)
    info = json.loads((root / "meta" / "info.json").read_text())
    paths = [path for part in _DATA for path in sorted((root / part).rglob("*")) if path.is_file()]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    complain(root, judge_names(path.relative_to(root).as_posix() for path in paths))
    for path in paths:
        _link(path, staged / path.relative_to(root))
    # LeRobot looks for the tag of its own format's version, and moves it when a dataset is pushed again.
    card = dataset_card(info, args.name or _local_name(root), store, args.license, args.known, about)
    return card, (str(info["codebase_version"]),)


def _link(path: Path, to: Path) -> None:
    """A hard link where the disk allows it: weights may be large, and are only read from here. Never to be written to."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), to)
    except OSError:
        shutil.copyfile(path, to)


def _write(path: Path, text: str) -> None:
    """Write a file of our own; never through a link, which would be the author's file."""
    path.unlink(missing_ok=True)
    path.write_text(text)
