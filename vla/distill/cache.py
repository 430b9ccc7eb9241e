"""What a teacher says of every frame of a dataset, asked once and kept: many students learn from one pass.

    CACHE/teacher.json                who was asked, and how
    CACHE/<dataset>/likely.bin        (F, H, a, k) uint8 or uint16   its k likeliest symbols
                    p.bin             (F, H, a, k) float16           their probabilities
                    actions.bin       (F, n, a) float32              its expected actions, in robot units
                    pictures.bin      (F, e) float16                 mean hidden state over the pictures, when asked for
                    done.bin          (blocks,) uint8                which blocks of `batch` frames are there

How it understands each sentence is not kept: there are few, and they are read anew (`read_sentences`).

Frames are asked in fixed blocks, and a block is marked only after it is on disk: whatever interrupts it, and however many
processes share the work, the files end up the same to the byte. A cache belongs to one teacher, one way of asking and one
version of a dataset; for anything else it is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from vla.distill.teacher import Said, Teacher
from vla.durable import disk_full, is_disk_full, replace_file
from vla.errors import CheckpointError, MachineError
from vla.mixture import Mixture

FORMAT = 1
SUMS = "sums.json"
"""sha256 of a dataset's files, once all of it was asked."""
_SYNC = 16  # blocks between two times everything is forced to disk


class TeacherCache:
    """The answers for the datasets of one mixture. `open` before use."""

    def __init__(self, root: Path, mixture: Mixture, facts: dict[str, Any], parts: dict[int, dict[str, np.memmap]]) -> None:
        self.root, self.mixture, self.facts, self.parts, self.batch = root, mixture, facts, parts, facts["batch"]
        self.sentences: dict[tuple[str, str], np.ndarray] = {}

    @classmethod
    def open(
        cls, root: Path, teacher: Teacher, mixture: Mixture, *, top: int, batch: int, precision: str, pictures: int
    ) -> TeacherCache:  # fmt: skip
        """Lay out what is missing. `pictures` is the width of that feature, 0 for none.

        Raises `CheckpointError` for a folder that holds the answers of another teacher or to other questions.
        """
        facts = {"format": FORMAT, "teacher": teacher.fingerprint, "top": top, "batch": batch, "precision": precision,
                 "pictures": pictures, "symbols": teacher.has_symbols}  # fmt: skip
        where = root / "teacher.json"
        if where.is_file():
            try:
                known = json.loads(where.read_text())
            except ValueError:
                known = None
            if not isinstance(known, dict):
                raise CheckpointError(where, found="no JSON object", expected="who was asked, and how",
                                      fix=f"remove {root}: the teacher is asked again")  # fmt: skip
            if changed := [key for key in facts if known.get(key) != facts[key]]:
                raise CheckpointError(
                    where, found="; ".join(f"{key} {_short(known.get(key))}" for key in changed),
                    expected="; ".join(f"{key} {_short(facts[key])}" for key in changed) + ", as this distillation asks",
                    fix="give teacher.cache another folder, or leave it out: then every teacher has its own",
                )  # fmt: skip
        elif root.exists() and (not root.is_dir() or any(not path.name.startswith(".") for path in root.iterdir())):
            # Whose answers those are, nobody knows any more.
            raise CheckpointError(root, found="something without a teacher.json", expected="a new folder, or a teacher's answers",
                                  fix=f"remove {root}, or give teacher.cache another folder")  # fmt: skip
        else:
            replace_file(where, json.dumps(facts, indent=1))
        parts = {d: _lay_out(root, teacher, mixture, d, facts) for d in range(len(mixture.stores))}
        return cls(root, mixture, facts, parts)

    def frames(self, block: tuple[int, int]) -> int:
        """How many frames a (dataset, block) has."""
        return min(self.batch, self.mixture.stores[block[0]].num_frames - block[1] * self.batch)

    # ------------------------------------------------------------------------------------------------ asking

    def missing(self) -> list[tuple[int, int]]:
        """(dataset, block) of everything that has not been asked yet."""
        return [(d, int(b)) for d, arrays in self.parts.items() for b in np.flatnonzero(arrays["done"] == 0)]

    def ask(
        self, teacher: Teacher, autocast: Callable[[], AbstractContextManager[Any]], blocks: list[tuple[int, int]]
    ) -> Iterator[int]:  # fmt: skip
        """Fill `blocks`, yielding the frames done after each. Raises `MachineError` on a full disk: what is there stays."""
        waiting: list[tuple[int, int]] = []
        for number, (d, block) in enumerate(blocks):
            arrays, store = self.parts[d], self.mixture.stores[d]
            frames = range(block * self.batch, min((block + 1) * self.batch, store.num_frames))
            windows = []
            for at in frames:
                episode = int(np.searchsorted(store.episode_starts, at, side="right")) - 1
                windows.append(self.mixture.window_at(d, episode, at - int(store.episode_starts[episode])))
            said: Said = teacher.say(windows, self.facts["top"], self.facts["pictures"] > 0, autocast())
            here = slice(frames.start, frames.stop)
            try:
                for name in ("likely", "p", "actions", "pictures"):
                    if name in arrays:
                        arrays[name][here] = getattr(said, name)
                waiting.append((d, block))
                if len(waiting) == _SYNC or number + 1 == len(blocks):
                    self._mark(waiting)
                    waiting = []
            except OSError as error:
                if is_disk_full(error):
                    raise disk_full(self.root, error, "what was asked so far is kept") from error
                raise
            yield len(frames)

    def _mark(self, blocks: list[tuple[int, int]]) -> None:
        for d in {d for d, _ in blocks}:
            for name, array in self.parts[d].items():
                if name != "done":
                    array.flush()
        for d, block in blocks:
            self.parts[d]["done"][block] = 1
        for d in {d for d, _ in blocks}:
            self.parts[d]["done"].flush()

    def seal(self) -> None:
        """Write the sums of what is whole. By one process, after all have asked."""
        for d, arrays in self.parts.items():
            folder = self.root / _name(self.mixture, d)
            if arrays["done"].all() and not (folder / SUMS).is_file():
                sums = {path.name: _sum(path) for path in sorted(folder.glob("*.bin"))}
                replace_file(folder / SUMS, json.dumps(sums, indent=1))

    def read_sentences(self, teacher: Teacher) -> int:
        """Have the teacher read every instruction; returns the width of its understanding."""
        width = 0
        for store, spec in zip(self.mixture.stores, self.mixture.specs, strict=True):
            for text in store.sentences:
                if (spec.key, text) not in self.sentences:
                    self.sentences[spec.key, text] = teacher.instruction(text, spec.key)
                width = len(self.sentences[spec.key, text])
        return width


def _name(mixture: Mixture, d: int) -> str:
    """Folder of a dataset; told otherwise, it is asked anew."""
    store = mixture.stores[d]
    return store.fingerprint[:16] + ("" if store.language == "task" else f"-{store.language}")


def _lay_out(root: Path, teacher: Teacher, mixture: Mixture, d: int, facts: dict[str, Any]) -> dict[str, np.memmap]:
    """The arrays of one dataset, made (sparse, all zero) where they are missing."""
    store, spec = mixture.stores[d], mixture.specs[d]
    teacher.knows(spec.key, f"mixture: {store.root}")
    first, (n, _) = teacher.first, teacher.first.steps(spec.key)
    frames, a = store.num_frames, spec.action_dim
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        "actions": (np.float32, (frames, n, a)), "done": (np.uint8, (-(-frames // facts["batch"]),)),
    }
    if facts["symbols"]:
        k = min(facts["top"], first.codec.size)
        kind = np.uint8 if first.codec.size <= 256 else np.uint16
        shapes |= {"likely": (kind, (frames, first.chunk, a, k)), "p": (np.float16, (frames, first.chunk, a, k))}
    if facts["pictures"]:
        shapes["pictures"] = (np.float16, (frames, facts["pictures"]))
    folder = root / _name(mixture, d)
    folder.mkdir(parents=True, exist_ok=True)
    # `done` last: while there are no marks, an empty file beside it is a new one, and not one that was cut.
    begun = (folder / "done.bin").is_file() and np.fromfile(folder / "done.bin", np.uint8).any()
    arrays = {name: _array(folder / f"{name}.bin", *shapes[name], bool(begun)) for name in sorted(shapes, key="done".__eq__)}
    written = json.loads((folder / SUMS).read_text()) if (folder / SUMS).is_file() else {}
    if changed := [name for name, sum_ in written.items() if _sum(folder / name) != sum_]:
        raise _damaged(folder / changed[0], "other bytes than were written")
    return arrays


def _array(path: Path, kind: type, shape: tuple[int, ...], begun: bool) -> np.memmap:
    """The file, its room reserved on the disk: a full one must say so here, not by a signal at some later write."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    there = path.stat().st_size if path.is_file() else 0
    if there > size or (there < size and begun):
        raise _damaged(path, f"{there} bytes where there should be {size}")
    if there < size:  # several processes may come here at once: growing to one size is the same for all
        with open(path, "ab") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if is_disk_full(error):
                    path.unlink(missing_ok=True)
                    raise disk_full(path, error, "nothing was asked yet") from error
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise MachineError(path, found=str(error), expected="a place to write", fix="teacher.cache=DIR") from error
                file.truncate(size)  # a file system that cannot reserve
    return np.memmap(path, kind, "r+", shape=shape)


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(path, found=found, expected="what the teacher said",
                           fix=f"remove {path.parent}: the teacher is asked again")  # fmt: skip


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 12 else str(value)
