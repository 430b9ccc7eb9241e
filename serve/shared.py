"""Pictures between a client, a server and the model's process on one computer: in memory all of them see, not through sockets.

    region = Region(1 << 20)                                        # the server; what it says of it:
    there = attach(region.offer())                                  # the client, None where it cannot see it
    entries = there.put({"front": frame})                           # copied once; sent instead of the pixels
    region.picture(entries["front"])                                # the server: (h, w, 3) uint8, where it lies

A region is an anonymous file (`memfd_create`, Linux) of a fixed size: it is sealed, so that nobody can shrink it under a reader.
Who wants to see it opens `/proc/PID/fd/N`, which the kernel grants to whoever may look into the server's process: its own user.
A random key at its beginning tells the client that what it opened is that region, and not another computer's or container's file.
The server opens nothing that a client names. What a client writes while its picture is read garbles that picture, and no other.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from serve.wire import LIMITS, Limits, WireError, bounded

try:
    import fcntl

    _SEAL = (fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    AVAILABLE = hasattr(os, "memfd_create")
except (ImportError, AttributeError):  # no Linux
    AVAILABLE = False

MARK = "__shared__"
"""Of an entry that says where a picture lies."""
_NAME = "tendon-looks"
_KEY, _ALIGN = 64, 64
"""Bytes at the beginning of a region that hold its key; what pictures are aligned to."""
_KEPT = 64
"""Pictures of a region that are remembered."""
_numbers = itertools.count(1)


class Placed(np.ndarray):
    """An array in a region. Arrays made of it are in none."""

    place: tuple[Region, int] | None = None
    """Where its first byte is."""


class Region:
    """The server's side: one client's, who writes the pictures of one look at a time into it."""

    def __init__(self, size: int) -> None:
        """`size` bytes. Raises `OSError` where there are no such files, or no room."""
        if not AVAILABLE:
            raise OSError("no anonymous files on this system")
        self.number, self.size = next(_numbers), size
        self.file = os.memfd_create(f"{_NAME}-{self.number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        """Its descriptor; -1 when it was closed."""
        self._memory = np.zeros(0, np.uint8)
        self._seen: dict[tuple[int, ...], Placed] = {}
        """Where pictures lay before: mostly they lie there again."""
        try:
            os.ftruncate(self.file, size)
            fcntl.fcntl(self.file, *_SEAL)
            self._memory = np.frombuffer(mmap.mmap(self.file, size), np.uint8)
        except (OSError, ValueError) as error:
            self.close()
            raise OSError(str(error)) from error
        self._key = secrets.token_bytes(_KEY)
        self._memory[:_KEY] = np.frombuffer(self._key, np.uint8)
        self._memory.flags.writeable = False

    def offer(self) -> dict[str, Any]:
        """What `attach` wants to know."""
        return {"pid": os.getpid(), "file": self.file, "number": self.number, "size": self.size, "key": self._key}

    def picture(self, entry: Any, limits: Limits = LIMITS) -> Placed:
        """(h, w, 3) uint8, read-only, of an entry `{"__shared__": True, "at", "shape"}`. Raises `WireError` for one that does not
        lie in it."""
        at, shape = (entry.get("at"), entry.get("shape")) if isinstance(entry, Mapping) else (None, None)
        whole = isinstance(shape, Sequence) and len(shape) == 3 and all(type(n) is int and n > 0 for n in (*shape, at))
        if not whole:
            raise WireError("picture", found=f"at {str(at)[:20]}, shape {str(shape)[:40]}", expected="at, (h, w, 3)",
                            fix="see docs/serving.md")  # fmt: skip
        assert isinstance(at, int) and isinstance(shape, Sequence)
        if (known := self._seen.get((at, *shape))) is not None:
            return known
        bounded(shape[0], shape[1], limits)
        size = math.prod(shape)
        if at < _KEY or at + size > self.size:
            raise WireError("picture", found=f"{size:,} bytes at {at:,}", expected=f"inside {self.size:,} shared bytes",
                            fix="see docs/serving.md")  # fmt: skip
        picture = self._memory[at : at + size].reshape(shape).view(Placed)
        picture.place = self, at
        if len(self._seen) < _KEPT:
            self._seen[at, *shape] = picture
        return picture

    @property
    def closed(self) -> bool:
        """Whether its client has left."""
        return self.file < 0

    def close(self) -> None:
        """Who has it open may go on reading. Idempotent."""
        if self.file >= 0:
            os.close(self.file)
            self.file, self._memory = -1, np.zeros(0, np.uint8)
            self._seen.clear()


def lying(said: Mapping[str, Any], region: Region, limits: Limits = LIMITS) -> dict[str, Any]:
    """`said`, camera -> picture, with those that are said to lie in `region`. Raises `WireError` for what does not, and for more
    than `limits` allow."""
    shared = {camera: entry for camera, entry in said.items() if isinstance(entry, dict) and MARK in entry}
    if len(shared) > limits.pictures:
        raise WireError("images", found=f"{len(shared)} pictures", expected=f"at most {limits.pictures}",
                        fix="see docs/serving.md")  # fmt: skip
    pictures: dict[str, Any] = {**said}
    for camera, entry in shared.items():
        try:
            pictures[camera] = region.picture(entry, limits)
        except WireError as error:
            error.where = f"camera {camera!r}"[:80]
            raise
    return pictures


def bare(name: str, entry: Mapping[str, Any]) -> bool:
    """Whether an entry of where a picture lies says nothing besides."""
    return len(name) <= 64 and len(entry) == 3 and entry[MARK] is True


class Regions:
    """The model's side: the regions of the server's clients, opened as they are named."""

    def __init__(self, pid: int) -> None:
        """`pid`: of the server."""
        self._pid, self._open = pid, dict[int, np.ndarray]()

    def named(self, regions: Mapping[int, tuple[int, int]], gone: Sequence[int]) -> None:
        """`regions`: number -> (descriptor, size) of those a batch speaks of; `gone`: those nobody needs any more."""
        for number in gone:
            self._open.pop(number, None)
        for number, (file, size) in regions.items():
            if number not in self._open:
                try:
                    self._open[number] = np.frombuffer(_map(self._pid, file, number, size, mmap.PROT_READ), np.uint8)
                except (OSError, ValueError):  # its client has left meanwhile, and nobody waits for an answer
                    self._open[number] = np.zeros(size, np.uint8)

    def picture(self, number: int, at: int, shape: Sequence[int]) -> np.ndarray:
        """(h, w, 3) uint8, read-only."""
        return self._open[number][at : at + math.prod(shape)].reshape(shape)


class Attached:
    """The client's side."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = np.frombuffer(memory, np.uint8)
        self._of: tuple[Any, ...] = ()
        self._places: list[tuple[str, np.ndarray, dict[str, Any]]] = []
        """Where the last pictures lie, and of which names and shapes they were: mostly the next are the same."""

    def holds(self, images: Mapping[str, np.ndarray]) -> bool:
        """Whether there is room for them."""
        return _kinds(images) == self._of or room_for(images) <= len(self._memory)

    def put(self, images: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        """Copy pictures (h, w, 3) uint8 to it, one behind the other from its beginning; what is sent in their place.

        It must be able to hold them.
        """
        if (wanted := _kinds(images)) != self._of:
            self._of, self._places, at = wanted, [], _KEY
            for camera, frame in images.items():
                room = self._memory[at : at + frame.size].reshape(frame.shape)
                self._places.append((camera, room, {MARK: True, "at": at, "shape": frame.shape}))
                at += _padded(frame.size)
        for camera, room, _ in self._places:
            np.copyto(room, images[camera])
        return {camera: entry for camera, _, entry in self._places}


def _kinds(images: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
    return (*images, *[frame.shape for frame in images.values()])


def attach(offer: Mapping[str, Any]) -> Attached | None:
    """The region that a server offers, for writing; None where it cannot be seen from here."""
    try:
        pid, file, number, size = (int(offer[name]) for name in ("pid", "file", "number", "size"))
        memory = _map(pid, file, number, size, mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return Attached(memory) if memory[:_KEY] == offer.get("key") else None


def room_for(images: Mapping[str, np.ndarray]) -> int:
    """Bytes of a region that holds them."""
    return _KEY + sum(_padded(frame.size) for frame in images.values())


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _map(pid: int, file: int, number: int, size: int, how: int) -> mmap.mmap:
    """Region `number` of process `pid`. Raises `OSError`, `ValueError`: whatever else stands at that place is never opened."""
    there, name = f"/proc/{pid}/fd/{file}", f"/memfd:{_NAME}-{number} (deleted)"
    if os.readlink(there) != name:
        raise FileNotFoundError(there)
    opened = os.open(there, (os.O_RDWR if how & mmap.PROT_WRITE else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        if os.readlink(f"/proc/self/fd/{opened}") != name or os.fstat(opened).st_size != size:
            raise FileNotFoundError(there)
        return mmap.mmap(opened, size, prot=how)
    finally:
        os.close(opened)
