"""Where a policy or a foreign model lies, here or on the Hub.

On the Hub the list of files is judged first (`vla/judging.py`), then the small JSON files, and only then are weights downloaded;
a folder here is judged the same way. Downloads go through `huggingface_hub`: its cache, its login, its retries.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vla.durable import is_disk_full
from vla.episodes import hub
from vla.errors import CheckpointError, DataError, MachineError
from vla.judging import OPENVLA, complain, is_openvla, judge_indices, judge_keys, judge_names, refuse_unsafe

logger = logging.getLogger(__name__)

PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.md", "*.jinja", "*.model")
"""What a policy consists of, and all that is downloaded: `.jinja` are chat templates, `.model` sentencepiece vocabularies."""
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def fetch_policy(
    path: str | Path, allow_ignored: tuple[str, ...] = (), cache: str | Path | None = None, progress: bool = True
) -> Path:
    """The policy folder of a path (a policy or run folder) or of `user/name`, `user/name@revision`, `hub:user/name@revision`.

    `allow_ignored` is as in `judging.refuse_unsafe`, `cache` as in `episodes.hub.resolve`. A commit that is already there needs
    no network, and anything else on the Hub is printed to stderr with the line that pins it.

    Raises `CheckpointError` for what is not there, cannot be reached or is refused, `UsageError` for a malformed name,
    `MachineError` on a full disk.
    """
    name = hub_name(path)
    if name is None:
        folder = Path(path)
        folder = folder / "policy" if (folder / "policy" / "policy.json").is_file() else folder
        if any((folder / one).is_file() for one in ("policy.json", "config.json", "adapter_config.json")):
            refuse_unsafe(folder, allow_ignored)
        return folder
    return _fetched(name, "policy", allow_ignored, cache, progress)


def fetch_model(path: str | Path, progress: bool = True) -> Path:
    """The folder of a foreign vision-language model: `path` itself, or of a name on the Hub what was downloaded; judged alike.

    Raises as `fetch_policy` does.
    """
    name = hub_name(path)
    if name is None:
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(path, found="no such folder", expected="a folder with a model, or user/name on the Hub",
                                  fix="check the path")  # fmt: skip
        refuse_unsafe(folder)
        return folder
    return _fetched(name, "model", (), None, progress)


def hub_name(path: str | Path) -> hub.HubName | None:
    """What `path` names on the Hub; None for a folder, and for what can be none."""
    name = hub.parse(path)
    if name is None and not Path(path).exists() and _NAME.fullmatch(str(path)):
        name = hub.HubName(str(path), None)
    return name


def origin(path: str | Path, folder: Path) -> dict[str, str]:
    """How `policy.json` writes down where something came from that `fetch_...(path)` found in `folder`: {path} as given, or for a
    name on the Hub {path: user/name, revision: the commit}."""
    name = hub_name(path)
    return {"path": str(path)} if name is None else {"path": name.repo, "revision": folder.name}


def _fetched(name: hub.HubName, kind: str, ignored: tuple[str, ...], cache: str | Path | None, progress: bool) -> Path:
    folder = _download(name, kind, ignored, cache, progress)
    if not name.pinned:
        print(f"{name.repo} is commit {folder.name} today; to pin it: {name.repo}@{folder.name}", file=sys.stderr)
    return folder


def _download(name: hub.HubName, kind: str, allow_ignored: tuple[str, ...], cache: str | Path | None, progress: bool) -> Path:
    from huggingface_hub import HfApi, errors, snapshot_download

    def snapshot(patterns: Iterable[str], revision: str | None, **options: Any) -> Path:
        found = snapshot_download(
            name.repo, revision=revision, allow_patterns=list(patterns), endpoint=hub.endpoint(),
            cache_dir=Path(cache) / "hub" if cache else None, tqdm_class=None if progress else hub.quiet(), **options,
        )  # fmt: skip
        return Path(found)

    def cached() -> Path:
        folder = snapshot(PATTERNS, name.revision, local_files_only=True)
        refuse_unsafe(folder, allow_ignored)
        return folder

    with explained(name, kind, missing="no such folder here, and on the Hub: "):
        if name.pinned:
            with suppress(errors.LocalEntryNotFoundError, CheckpointError):  # not there, or not all of it: looked at again below
                if _whole(folder := cached()).is_file():
                    return folder
        try:
            info = HfApi(endpoint=hub.endpoint()).model_info(name.repo, revision=name.revision)
        except errors.HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
            return cached()
        except (OSError, ValueError, RuntimeError) as error:  # no connection, or told to have none: perhaps it is here already
            logger.info("%s: %s", name, error)
            return cached()
        except Exception as error:
            if not type(error).__module__.startswith("httpx"):  # which httpx depends on the version of the client
                raise
            return cached()
        names = sorted(entry.rfilename for entry in info.siblings or [])
        _need(name, kind, names)
        first = snapshot([n for n in names if n.endswith(".json") and "/" not in n], info.sha)
        native = is_openvla(first)
        ignored = (*allow_ignored, *OPENVLA) if native else allow_ignored
        complain(name, [*judge_names(names, ignored), *judge_keys(first, ignored, quiet=native), *judge_indices(first, names)])
        folder = snapshot([*PATTERNS, *([OPENVLA[-1]] if native else [])], info.sha)
    refuse_unsafe(folder, allow_ignored)
    with suppress(OSError):  # a cache of somebody else's may be read, not written
        _whole(folder).parent.mkdir(exist_ok=True)
        _whole(folder).touch()
    return folder


def _whole(snapshot: Path) -> Path:
    """A mark in the Hub's cache that a snapshot was downloaded to its end; what an interrupted download left has none."""
    return snapshot.parent.parent / ".whole" / snapshot.name


def _need(name: hub.HubName, kind: str, names: list[str]) -> None:
    wanted = ("policy.json", "config.json") if kind == "policy" else ("config.json",)
    if not set(wanted) & set(names):
        fix = "choose a repository that `vla push` wrote" if kind == "policy" else "choose another repository"
        raise CheckpointError(name, found=f"no {wanted[0]} among its {len(names)} files", expected=f"a {kind} folder", fix=fix)


@contextmanager
def explained(name: hub.HubName, kind: str = "policy", missing: str = "") -> Iterator[None]:
    """`vla.episodes.hub.explained`, which speaks of datasets, for a repository of this `kind` ("policy", "model" or "dataset").

    A policy that cannot be had is a `CheckpointError`, also without a connection; `missing` begins what it says it found.
    """

    def worded(text: str) -> str:
        return re.sub(r"(?<![\w/-])dataset(?![\w/-])", kind, text.replace(" --repo-type dataset", "").replace("/datasets/", "/"))

    try:
        with hub.explained(name):
            yield
    except (DataError, MachineError) as error:
        if kind == "dataset" or isinstance(error.__cause__, DataError | None) or is_disk_full(error.__cause__):
            raise
        raise CheckpointError(name, found=missing + worded(error.found), expected=worded(error.expected),
                              fix=("check the path; " if missing else "") + worded(error.fix)) from error  # fmt: skip
