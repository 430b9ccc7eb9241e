"""Datasets that live on the Hugging Face Hub, named by a revision that cannot change under a run.

`hub:user/name@<commit>` is a dataset as much as a folder is. A branch or a tag is looked up and its commit is said, with the
line that pins it: lerobot moves its version tags when a dataset is pushed again. Downloads go through `huggingface_hub`
(its cache, its login, its retries), and only what a LeRobot dataset consists of is fetched.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vla.durable import disk_full, is_disk_full
from vla.episodes.layout import read_info
from vla.errors import DataError, MachineError, UsageError

PREFIX = "hub:"
PARTS = ("meta/*", "data/*", "videos/*")
"""What is downloaded; `*` also crosses folders."""
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A dataset on the Hub: `repo` is `user/name`, `revision` a commit, tag or branch, None for the newest."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f"@{self.revision}" if self.revision else "")

    @property
    def pinned(self) -> bool:
        """Whether `revision` is a whole commit hash."""
        return bool(self.revision and _COMMIT.fullmatch(self.revision))


def parse(path: str | Path) -> HubName | None:
    """`hub:user/name[@revision]`, or `user/name@revision` where no such folder exists; None for anything else, a folder.

    Raises `UsageError` when what follows `hub:` is no name.
    """
    text = str(path)
    asked = text.startswith(PREFIX)
    repo, at, revision = text.removeprefix(PREFIX).partition("@")
    if not asked and (not at or not _NAME.fullmatch(repo) or Path(text).exists()):
        return None
    if not _NAME.fullmatch(repo) or (at and not revision):
        raise UsageError(f"dataset {text!r}", found=f"{repo!r} at {revision!r}", expected="hub:user/name@<commit or tag>",
                         fix="e.g. hub:lerobot/pusht@v2.1")  # fmt: skip
    return HubName(repo, revision or None)


def resolve(path: str | Path, cache: str | Path | None = None, *, progress: bool = True) -> Path:
    """The folder of a dataset: `path` itself, or for a name on the Hub (see `parse`) where it was downloaded to.

    Nothing is fetched twice, and a commit that is already there needs no network. `cache` is where `hub/` goes, None for
    the Hub's own cache (`HF_HOME`), which other programs share. Unless the revision is a commit, the commit it stands for
    is printed to stderr with the line that pins it.

    Raises `UsageError` for a malformed name, `DataError` for a dataset or revision that does not exist, is gated, or is in
    no format read here (said before its data is downloaded), `MachineError` without a connection or room for it.
    """
    name = parse(path)
    if name is None:
        return Path(path)
    folder = snapshot(name, cache, ("meta/*",), progress)
    read_info(folder)
    pinned = HubName(name.repo, folder.name)
    snapshot(pinned, cache, PARTS, progress)
    if not name.pinned:
        print(announce(name, folder.name), file=sys.stderr)
    return folder


def announce(name: HubName, commit: str) -> str:
    """The line that says which commit an unpinned name stands for."""
    return f"{name} is commit {commit} today; to pin it: path: {PREFIX}{name.repo}@{commit}"


def snapshot(name: HubName, cache: str | Path | None, patterns: tuple[str, ...], progress: bool) -> Path:
    """Download the files of a revision that match `patterns`; the folder is called after its commit.

    Raises as `resolve` does.
    """
    from huggingface_hub import snapshot_download

    with explained(name):
        found = snapshot_download(
            name.repo, repo_type="dataset", revision=name.revision, allow_patterns=list(patterns),
            cache_dir=Path(cache) / "hub" if cache else None, endpoint=endpoint(), tqdm_class=None if progress else quiet(),
        )  # fmt: skip
    assert isinstance(found, str)
    return Path(found)


def endpoint() -> str | None:
    """`$HF_ENDPOINT`, read now rather than when `huggingface_hub` was imported."""
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def explained(name: HubName) -> Iterator[None]:
    """Turns what `huggingface_hub` raises into errors that say what to do."""
    from huggingface_hub import errors

    page = f"{endpoint() or 'https://huggingface.co'}/datasets/{name.repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise DataError(name, found="a gated dataset, and this machine has no access to it", expected="access",
                        fix=f"ask for it at {page}, then `hf auth login`") from error  # fmt: skip
    except errors.RepositoryNotFoundError as error:
        raise DataError(name, found="no such dataset on the Hub, or a private one this machine is not logged in for",
                        expected=f"a dataset at {page}", fix="correct the name, or `hf auth login`") from error  # fmt: skip
    except errors.RevisionNotFoundError as error:
        raise DataError(name, found=f"no revision {name.revision!r}", expected=f"one of {_revisions(name)}",
                        fix=f"choose a commit or tag from {page}/commits/main") from error  # fmt: skip
    except errors.HFValidationError as error:
        raise UsageError(name, found=str(error).splitlines()[0], expected="hub:user/name@<commit or tag>",
                         fix="correct the name") from error  # fmt: skip
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, errors.GatedRepoError | errors.RevisionNotFoundError):
            with explained(name):
                raise error.__cause__ from error
        raise _unreachable(name, error) from error
    except errors.HfHubHTTPError as error:
        raise MachineError(name, found=f"the Hub answered {error.response.status_code}", expected="the dataset",
                           fix="try again later; https://status.huggingface.co says whether it is down") from error  # fmt: skip
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(name, error, "what was downloaded is kept") from error
        raise
    except Exception as error:
        if type(error).__module__.startswith("httpx"):  # connection errors pass through; which httpx depends on the version
            raise _unreachable(name, error) from error
        raise


def _unreachable(name: HubName, error: BaseException) -> MachineError:
    revision = f" --revision {name.revision}" if name.revision else ""
    return MachineError(name, found=f"no connection to the Hub ({type(error).__name__}), and no complete copy in its cache",
                        expected="a connection, or the dataset in the cache",
                        fix=f"where there is one: hf download {name.repo} --repo-type dataset{revision}; then copy the "
                        "cache (HF_HOME); or unset HF_HUB_OFFLINE")  # fmt: skip


def _revisions(name: HubName) -> str:
    from huggingface_hub import HfApi

    try:
        refs = HfApi(endpoint=endpoint()).list_repo_refs(name.repo, repo_type="dataset")
        return ", ".join(ref.name for ref in [*refs.branches, *refs.tags]) or "its commits"
    except Exception:  # noqa: BLE001  a list of names is worth no second error
        return "its branches, tags and commits"


def quiet() -> type:
    """A progress bar for `huggingface_hub` that shows nothing."""
    from tqdm.auto import tqdm

    class Quiet(tqdm):
        def __init__(self, *args, **kw) -> None:
            super().__init__(*args, **{key: value for key, value in kw.items() if key != "name"} | {"disable": True})

    return Quiet
