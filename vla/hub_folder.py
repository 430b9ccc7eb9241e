"""One commit of a folder to a repository on the Hub, or into a folder laid out as the Hub's own cache is.

The second needs no network and no account: `huggingface_hub` finds it with HF_HUB_OFFLINE=1 HF_HUB_CACHE=DIR, so it may lie on a
shared disk or travel on a stick.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from vla.durable import TEMPORARY, disk_full, flush, is_alive, is_disk_full, replace_file
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
    was; what a push left half is made whole. Raises `MachineError` on a full disk, or where no folder can be made.
    """
    digest, sizes = hashlib.sha1(), {}
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        inside = path.relative_to(staged).as_posix()
        sizes[inside] = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(f"{inside}\0{hashlib.file_digest(file, 'sha1').hexdigest()}\0".encode())
    commit = digest.hexdigest()
    top = root / f"{kind}s--{name.repo.replace('/', '--')}"
    snapshot = top / "snapshots" / commit
    try:
        if _lacking(snapshot, sizes):
            _put(staged, snapshot, sizes)
        for ref in ("main", *tags):
            path = top / "refs" / ref
            if not path.is_file() or path.read_text() != commit:
                replace_file(path, commit)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(root, error, "what was pushed before is intact") from error
        raise MachineError(root, found=" ".join(str(error).split())[:200], expected="a folder that can be made and written to",
                           fix="give another: --hub DIR") from error  # fmt: skip
    return snapshot, commit


def _put(staged: Path, snapshot: Path, sizes: dict[str, int]) -> None:
    """Make `snapshot` hold what `staged` does, whoever else is doing the same, on this machine or on another."""
    mine = f".{snapshot.name}{TEMPORARY}{socket.gethostname()}-"
    with contextlib.suppress(OSError):
        for leftover in snapshot.parent.glob(f"{mine}*"):  # of a push of the same that was killed, here
            if not is_alive(leftover.name.removeprefix(mine).partition("-")[0]):
                shutil.rmtree(leftover, ignore_errors=True)
    temporary = snapshot.with_name(f"{mine}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        shutil.copytree(staged, temporary)
        for path in temporary.rglob("*"):
            flush(path)
        try:
            temporary.rename(snapshot)
        except OSError:
            if not snapshot.is_dir():
                raise
            # Somebody else has pushed the very same, or a part of it: what is not there is put there, file by file, so that
            # nobody ever finds less than before.
            for name in _lacking(snapshot, sizes):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary / name, snapshot / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _lacking(snapshot: Path, sizes: dict[str, int]) -> list[str]:
    """Files that are not in `snapshot`, or not whole."""
    return [name for name, size in sizes.items() if not (p := snapshot / name).is_file() or p.stat().st_size != size]
