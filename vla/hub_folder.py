"""One commit of a folder to a repository on the Hub, or into a folder laid out as the Hub's own cache is.

The second needs no network and no account: `huggingface_hub` finds it with HF_HUB_OFFLINE=1 HF_HUB_CACHE=DIR, so it may lie on a
shared disk or travel on a stick.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from vla.durable import TEMPORARY, disk_full, flush, is_disk_full, replace_file, temporary_name
from vla.episodes import hub
from vla.errors import MachineError, UsageError


def to_hub(staged: Path, name: hub.HubName, kind: str, private: bool = False, tags: tuple[str, ...] = ()) -> tuple[str, str]:
    """(address, commit) of one commit that makes the repository hold what `staged` holds, and nothing else.

    Raises `UsageError` without a login or the right to write, `MachineError` when the Hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, get_token

    if not get_token():
        raise UsageError(name, found="no login on this machine", expected="a token that may write",
                         fix="hf auth login, or HF_TOKEN; or push into a folder: --hub DIR")  # fmt: skip
    api = HfApi(endpoint=hub.endpoint())
    files = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
    with _explained(name):
        api.create_repo(name.repo, repo_type=kind, private=private or None, exist_ok=True)
        stale = set(api.list_repo_files(name.repo, repo_type=kind)) - files.keys() - {".gitattributes"}
        # Not upload_folder: of large folders that makes several commits, and between them nobody could load it.
        commit = api.create_commit(
            name.repo, repo_type=kind, commit_message="vla push",
            operations=[*(CommitOperationDelete(path) for path in sorted(stale)),
                        *(CommitOperationAdd(path, file) for path, file in files.items())],
        )  # fmt: skip
    for tag in tags:
        with _explained(name, f"commit {commit.oid} is there, its tag {tag} is not"):
            with contextlib.suppress(errors.RevisionNotFoundError):
                api.delete_tag(name.repo, tag=tag, repo_type=kind)
            api.create_tag(name.repo, tag=tag, repo_type=kind, revision=commit.oid)
    return str(api.endpoint) + ("/datasets/" if kind == "dataset" else "/") + name.repo, commit.oid


@contextlib.contextmanager
def _explained(name: hub.HubName, state: str = "nothing was pushed") -> Iterator[None]:
    """Turns what `huggingface_hub` raises while sending into errors that say what to do."""
    from huggingface_hub import errors

    def unsent(found: str) -> MachineError:
        return MachineError(name, found=f"{state}: {found}", expected="a connection to the Hub",
                            fix="run the same line again, what got through is not sent twice; or push into a folder: "
                            "--hub DIR")  # fmt: skip

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status not in (400, 401, 403, 404):
            raise unsent(f"the Hub answered {status}") from error
        raise UsageError(name, found=f"the Hub answered {status}: {error.server_message or 'no more than that'}",
                         expected="a repository this login may write to",
                         fix="`hf auth whoami` says who you are: correct USER, or make a token with write access and "
                         "`hf auth login`") from error  # fmt: skip
    except ValueError as error:  # of a name, or of the card's front matter, which the Hub looks at first
        raise UsageError(name, found=" ".join(str(error).split()), expected="a name and metadata the Hub accepts",
                         fix="--license must be one of the Hub's, e.g. apache-2.0") from error  # fmt: skip
    except RuntimeError as error:  # a large file that did not get through
        raise unsent(f"{error} ({type(error.__cause__).__name__})") from error
    except OSError as error:  # also HF_HUB_OFFLINE
        raise unsent(f"no connection to the Hub ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error
    except Exception as error:
        if type(error).__module__.startswith("httpx"):  # connection errors pass through; which httpx depends on the version
            raise unsent(f"no connection to the Hub ({type(error).__name__})") from error
        raise


def to_folder(staged: Path, root: Path, name: hub.HubName, kind: str, tags: tuple[str, ...] = ()) -> tuple[Path, str]:
    """(snapshot folder, commit): the layout of the Hub's own cache, so that the Hub's client finds it under HF_HUB_CACHE.

    The commit is sha1 over the files' names and contents; pushing the same again changes nothing. A crash leaves `main` where it
    was. Raises `MachineError` on a full disk.
    """
    digest = hashlib.sha1()
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            digest.update(f"{path.relative_to(staged).as_posix()}\0{hashlib.file_digest(file, 'sha1').hexdigest()}\0".encode())
    commit = digest.hexdigest()
    top = root / f"{kind}s--{name.repo.replace('/', '--')}"
    snapshot = top / "snapshots" / commit
    if not snapshot.is_dir():
        for leftover in snapshot.parent.glob(f".{commit}{TEMPORARY}*"):  # of a push of the same that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = temporary_name(snapshot)
        try:
            shutil.copytree(staged, temporary)
            for path in temporary.rglob("*"):
                flush(path)
            temporary.rename(snapshot)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if is_disk_full(error):
                raise disk_full(root, error, "what was pushed before is intact") from error
            if not snapshot.is_dir():  # else somebody else has just pushed the very same
                raise
    for ref in ("main", *tags):
        path = top / "refs" / ref
        if not path.is_file() or path.read_text() != commit:
            replace_file(path, commit)
    return snapshot, commit
