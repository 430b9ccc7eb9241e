"""`vla push`: a policy or a dataset, with its card, to the Hugging Face Hub, or into a folder laid out like the Hub's cache.

What is sent is judged first, as strictly as what is fetched: whole safetensors, JSON and text. A policy is loaded before it
leaves, so its fingerprint holds. One commit carries everything; files of an earlier push that are no longer part of it go.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from vla.cards import dataset_card, measure_latency, policy_card, read_evaluations
from vla.checkpoint import MANIFEST
from vla.durable import replace_file, temporary_name
from vla.episodes import EpisodeStore, hub
from vla.errors import CheckpointError, UsageError
from vla.fetch import PATTERNS, explained
from vla.judging import refuse_unsafe
from vla.policy import load_policy

_DATA = ("meta", "data", "videos")


def add_push_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "push", help="share a policy or a dataset, with a card made of facts", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  vla push runs/demo you/tabletop-demo --license apache-2.0\n"
        "  vla push runs/demo you/tabletop-demo --hub hub && HF_HUB_OFFLINE=1 HF_HUB_CACHE=hub vla eval you/tabletop-demo "
        "--suite tabletop\n  vla push data/tabletop you/tabletop-data",
    )  # fmt: skip
    parser.add_argument("path", metavar="FOLDER", help="a run folder, a policy folder or a dataset folder")
    parser.add_argument("name", metavar="USER/NAME", help="the repository; it is made when it is not there")
    parser.add_argument("--hub", type=Path, metavar="DIR", help="a folder instead of the Hub, read with HF_HUB_CACHE=DIR")
    parser.add_argument("--license", help="e.g. apache-2.0; without it the card says that none was stated")
    parser.add_argument("--base", metavar="USER/NAME", help="where an adapter's base is for others, when it was a folder here")
    parser.add_argument("--eval", type=Path, nargs="+", metavar="JSON", help="evaluations for the card (default: the run's eval/)")
    parser.add_argument("--known", action="append", default=[], metavar="TEXT", help="a known failure, in your words; repeatable")
    parser.add_argument("--no-latency", action="store_true", help="do not measure the policy's latency here")
    parser.add_argument("--private", action="store_true", help="make the repository private when it is new")
    parser.add_argument("--card", action="store_true", help="print the card and send nothing")
    parser.add_argument("--json", action="store_true", help="print where it went as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Stage, judge, send. Raises `UsageError` for names and folders that do not fit, `CheckpointError` for a refused policy,
    `DataError` for a broken dataset, `MachineError` when the Hub cannot be reached or the disk is full."""
    name = hub.parse(f"{hub.PREFIX}{args.name}")
    assert name is not None
    if name.revision:
        raise UsageError("USER/NAME", found=args.name, expected="a name without a revision", fix=f"vla push ... {name.repo}")
    root = Path(args.path)
    is_data = (root / "meta" / "info.json").is_file()
    with tempfile.TemporaryDirectory(prefix="vla-push-") as scratch:
        staged = Path(scratch) / "staged"
        staged.mkdir()
        card = stage_dataset(root, staged, args) if is_data else stage_policy(root, staged, args)
        (staged / "README.md").write_text(card)
        if args.card:
            print(card, end="")
            return 0
        kind = "dataset" if is_data else "model"
        where, commit = to_folder(staged, args.hub, name.repo, kind) if args.hub else to_hub(staged, name, kind, args.private)
    facts = {"repository": name.repo, "commit": commit, "where": str(where)}
    print(json.dumps(facts) if args.json else f"{where}\nto pin it: {name.repo}@{commit}")
    return 0


def stage_policy(root: Path, staged: Path, args: argparse.Namespace) -> str:
    """Put what will be sent of a policy into `staged`; returns its card."""
    folder = root / "policy" if (root / "policy" / "policy.json").is_file() else root
    if not (folder / "policy.json").is_file():
        raise CheckpointError(root, found="no policy.json and no meta/info.json", expected="a run, a policy or a dataset",
                              fix="give a run folder, or a dataset's own")  # fmt: skip
    refuse_unsafe(folder)
    policy = load_policy(folder, "cpu")
    # Evaluations before the base is renamed below, for they were made of the policy as it is called here.
    paths = args.eval if args.eval is not None else sorted((root / "eval").glob("*.json"))
    evals, others = read_evaluations(paths, policy.fingerprint)
    if others:
        print(f"left out of the card, since they are not evaluations of these weights: {', '.join(others)}", file=sys.stderr)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST and any(path.match(pattern) for pattern in PATTERNS):
            _link(path, staged / path.relative_to(folder))
    meaning = json.loads((folder / "policy.json").read_text())
    if entry := meaning.get("adapter"):
        base = entry["base"]
        local = Path(base["path"]).is_absolute() or (folder / base["path"]).exists() or Path(base["path"]).exists()
        if args.base is None and local:
            raise UsageError("--base", found=f"an adapter whose base is {base['path']}, a folder of this machine",
                             expected="a base that others can have", fix="push the base first, then give --base USER/NAME; or "
                             "`vla merge` and push that")  # fmt: skip
        if args.base is not None:
            base["path"] = args.base
            if base["kind"] == "model":
                meaning["config"]["backbone"]["path"] = args.base
            meaning["fingerprint"] = policy.fingerprint_with(meaning)
            _replace(staged / "policy.json", json.dumps(meaning, indent=1))
            assert policy.adapter is not None
            policy.adapter.base["path"] = args.base
            policy.saved_meaning = meaning
    elif args.base is not None:
        raise UsageError("--base", found="a policy without an adapter", expected="an adapter", fix="leave --base out")
    latency = None if args.no_latency else measure_latency(policy)
    rows = [{key: result.get(key) for key in ("suite", "seed", "episodes", "policy", "rows", "per_task", "versions")}
            for result in evals]  # fmt: skip
    (staged / "evaluation.json").write_text(json.dumps({"results": rows, "latency": latency}, indent=1))
    return policy_card(policy, args.name, evals, latency, args.license, args.known)


def stage_dataset(root: Path, staged: Path, args: argparse.Namespace) -> str:
    """Put what will be sent of a dataset into `staged`; returns its card."""
    with tempfile.TemporaryDirectory(prefix="vla-push-cache-") as cache:
        store = EpisodeStore.open(root, cache, progress=False)
        info = json.loads((root / "meta" / "info.json").read_text())
        card = dataset_card(info, args.name, store.fingerprint, store.instructions, store.spec, args.license, store.recorded_seeds)
    for part in _DATA:
        for path in sorted((root / part).rglob("*")):
            if path.is_file() and not any(p.startswith(".") for p in path.relative_to(root).parts):
                _link(path, staged / path.relative_to(root))
    return card


def _link(path: Path, to: Path) -> None:
    """A hard link where the disk allows it: a policy may be large, and is only read from here."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), to)
    except OSError:
        shutil.copyfile(path, to)


def _replace(path: Path, text: str) -> None:
    path.unlink()  # it may be a link to the author's own file
    path.write_text(text)


def to_hub(staged: Path, name: hub.HubName, kind: str, private: bool = False) -> tuple[str, str]:
    """(address, commit) of one commit that makes the repository hold what `staged` holds."""
    from huggingface_hub import HfApi, errors

    api = HfApi(endpoint=hub.endpoint())
    try:
        with explained(name, "dataset" if kind == "dataset" else "policy"):
            api.create_repo(name.repo, repo_type=kind, private=private or None, exist_ok=True)
            commit = api.upload_folder(repo_id=name.repo, repo_type=kind, folder_path=staged, delete_patterns=["*"],
                                       commit_message="vla push")  # fmt: skip
    except errors.LocalTokenNotFoundError as error:
        raise UsageError(name, found="no login on this machine", expected="a token that may write",
                         fix="hf auth login, or push into a folder: --hub DIR") from error  # fmt: skip
    return str(api.endpoint) + ("/datasets/" if kind == "dataset" else "/") + name.repo, commit.oid


def to_folder(staged: Path, root: Path, repo: str, kind: str) -> tuple[Path, str]:
    """(snapshot folder, commit): the layout of the Hub's own cache, so that the Hub's client finds it under HF_HUB_CACHE.

    The commit is sha1 over the files' names and contents; pushing the same again changes nothing.
    """
    digest = hashlib.sha1()
    files = [path for path in sorted(staged.rglob("*")) if path.is_file()]
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{path.relative_to(staged).as_posix()}\0{hashlib.file_digest(file, 'sha1').hexdigest()}\0".encode())
    commit = digest.hexdigest()
    top = root / f"{kind}s--{repo.replace('/', '--')}"
    snapshot = top / "snapshots" / commit
    if not snapshot.is_dir():
        temporary = temporary_name(snapshot)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            shutil.copytree(staged, temporary)
            temporary.rename(snapshot)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    (top / "refs").mkdir(parents=True, exist_ok=True)
    replace_file(top / "refs" / "main", commit.encode())
    return snapshot, commit
