"""Files of a Hub dataset fetched when they are wanted, in a folder that stays below a size.

Any number of processes share the folder. Who wants a file holds it by a hard link of its own, so the file system counts
the users: a file with one name left is in nobody's hands, and the one unused for longest is removed when room is needed.
What is held stays, so the folder exceeds its bound by at most what all processes hold at once. A crashed process leaves
links behind; the next removal clears those whose process is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vla.durable import disk_full, is_alive, is_disk_full
from vla.episodes.hub import HubName, endpoint, explained, quiet
from vla.errors import DataError, MachineError

_TRIES = 5
"""Attempts at a download, 1, 2, 4, ... seconds apart, before a run gives up: a Hub that is down for a moment is common."""


class FetchedFiles:
    """Files of `name` (a pinned revision) under `folder`, at most `max_bytes` of them beside those in use.

    `files`: path in the repository -> (size, sha256, "" when the Hub keeps none).
    """

    def __init__(self, name: HubName, folder: Path, files: Mapping[str, tuple[int, str]], max_bytes: int) -> None:
        self.name, self.folder, self.files, self.max_bytes = name, folder, dict(files), max_bytes

    def hold(self, path: str) -> Path:
        """This process's own name of `path`, fetched if need be; `release` it when done.

        Raises `DataError` when what arrives is not what the Hub lists, `MachineError` without a connection or room.
        """
        here = self.folder / path
        held = self._links / f"{socket.gethostname()}@{os.getpid()}@{time.time_ns()}@{here.name}"
        self._links.mkdir(parents=True, exist_ok=True)
        with _locked(self._lock_of(path)):
            with contextlib.suppress(FileNotFoundError):
                self._link(here, held)
                os.utime(held)
                return held
            arrived = self._download(path)
            self._link(arrived, held)  # ours before others can see it, hence before anybody can remove it
            here.parent.mkdir(parents=True, exist_ok=True)
            os.utime(arrived)
            os.replace(arrived, here)
        self._make_room()
        return held

    def release(self, held: Path) -> None:
        """Give a file back that `hold` returned."""
        held.unlink(missing_ok=True)

    def bring(self, path: str) -> None:
        """Fetch a file for later, unless it is here or somebody is fetching it now. Raises as `hold` does."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.folder / path)  # the last to be removed
            return
        if not _is_locked(self._lock_of(path)):
            self.release(self.hold(path))

    def local_bytes(self) -> int:
        """Bytes of fetched files that lie in the folder now."""
        return sum(status.st_size for status, _ in self._present())

    @property
    def _links(self) -> Path:
        return self.folder / "held"

    @property
    def _locks(self) -> Path:
        return self.folder / "locks"

    def _lock_of(self, path: str) -> Path:
        return self._locks / hashlib.sha256(path.encode()).hexdigest()[:16]

    def _link(self, path: Path, held: Path) -> None:
        try:
            os.link(path, held)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            raise MachineError(self.folder, found=f"a file system without hard links ({error.strerror})",
                               expected="one that has them", fix="set VLA_CACHE to a local disk") from error  # fmt: skip

    def _present(self) -> list[tuple[os.stat_result, Path]]:
        found = []
        for path in (self.folder / "videos").rglob("*"):  # and not `self.files`, of which there may be very many
            with contextlib.suppress(FileNotFoundError):
                if path.relative_to(self.folder).as_posix() in self.files:
                    found.append((path.stat(), path))
        return found

    def _make_room(self) -> None:
        with _locked(self._locks / "room"):
            for link in self._links.glob(f"{socket.gethostname()}@*"):  # no host's name holds an @, many hold a -
                if not is_alive(link.name.split("@")[1]):
                    link.unlink(missing_ok=True)
            present = self._present()
            total = sum(status.st_size for status, _ in present)
            for status, path in sorted(present, key=lambda entry: entry[0].st_mtime_ns):
                if total <= self.max_bytes:
                    return
                if path.stat().st_nlink == 1:
                    path.unlink()
                    total -= status.st_size

    def _download(self, path: str) -> Path:
        size, sha = self.files[path]
        for attempt in range(_TRIES):
            try:
                arrived = _fetch(self.name, path, self.folder / "arriving")
            except MachineError:
                if attempt == _TRIES - 1:
                    raise
                time.sleep(2**attempt)
                continue
            except OSError as error:
                if is_disk_full(error):
                    raise disk_full(self.folder, error, "nothing is lost; a smaller max_gb needs less") from error
                raise
            with open(arrived, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest() if sha else ""
            if arrived.stat().st_size == size and digest == sha:
                return arrived
            arrived.unlink()
        raise DataError(f"{self.name}, {path}", found=f"other bytes than the Hub lists, {_TRIES} times",
                        expected=f"{size} bytes with sha256 {sha}", fix="train from a full download: stream: false")  # fmt: skip


class Ahead:
    """Brings files in the background, one request after the other; a request that has not begun gives way to a newer one.

    What fails is left: who needs the file asks for it again and is told. Belongs to one process; make another after a fork.
    """

    def __init__(self, files: FetchedFiles) -> None:
        self._files, self._lock = files, threading.Lock()
        self._pending: Sequence[str] = ()
        self._thread: threading.Thread | None = None

    def want(self, paths: Sequence[str]) -> threading.Thread:
        """Ask for `paths`, in this order, up to half of what the folder may hold: the rest is for what is in use.

        Returns at once. The thread ends when nothing is asked for any more.
        """
        chosen, room = [], self._files.max_bytes // 2
        for path in paths:
            room -= self._files.files[path][0]
            if room < 0:
                break
            chosen.append(path)
        with self._lock:
            self._pending = chosen
            if self._thread is None:
                from huggingface_hub.utils import get_session

                get_session()  # made under a lock, which a fork must not find taken by the thread
                self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
                self._thread.start()
            return self._thread

    def _work(self) -> None:
        while True:
            with self._lock:
                paths, self._pending = self._pending, ()
                if not paths:
                    self._thread = None
                    return
            with contextlib.suppress(Exception):  # see above
                for path in paths:
                    self._files.bring(path)


def _fetch(name: HubName, path: str, into: Path) -> Path:
    from huggingface_hub import hf_hub_download

    with explained(name):
        found = hf_hub_download(name.repo, path, repo_type="dataset", revision=name.revision, local_dir=into,
                                endpoint=endpoint(), tqdm_class=quiet())  # fmt: skip
    return Path(str(found))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:  # said, and not left to closing: a child forked meanwhile has the file open too
            fcntl.flock(file, fcntl.LOCK_UN)


def _is_locked(path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
        return False
