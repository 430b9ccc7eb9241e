"""The audit log: every judgement of a guard in files that are only added to, and enough of each to judge again.

    with AuditLog("audit") as log:
        log.watch(guard, session="3f2a")        # from here on whatever this guard is asked; it begins anew
    check("audit")                              # {"compared": 812, "differing": 0, "torn": 0, ...}

A folder of `audit-000001.jsonl`, `audit-000002.jsonl`, ...: a line an event, each written at once with O_APPEND, readable by the
owner alone. Numbers travel as their float32 bytes, so that what is judged again is the same to the bit. Neither pictures (a
checksum stands for them) nor instructions nor tokens are written.

    {"n": 17, "t": 1767225600.25, "session": "3f2a", "guard": 1, "i": 4, "do": "chunk", "actions": "AACA...", "sent": "AACA...",
     "hold": false, ...}

`n` only grows, from file to file; `i` counts one guard's events: a number missing is an event that was dropped. A robot never
stops for the log: where nothing can be written (a full disk, a folder that may not be written), one warning is logged, events
are counted in `dropped`, and it goes on. With `strict=True` the guard raises `MachineError` instead: whoever asks for that has
to stop the robot himself. What was written outlives a crash of the process; a crash of the machine may take what the kernel had
not put on the disk yet (fsync comes at the end of each file, in a thread of its own, and with `close`).
"""

from __future__ import annotations

import base64
import errno
import json
import logging
import math
import os
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from serve.bounds import Unread
from serve.guard import SETTINGS, ChunkVerdict, Guard, Verdict
from serve.seen import Seen
from vla.durable import disk_full, flush, is_disk_full
from vla.errors import DataError, MachineError, UsageError, VLAError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"audit-(\d{6,})\.jsonl")
_TAIL = 1 << 20
"""Bytes at the end of a file in which its last number is looked for."""


class AuditLog:
    """The writer. Any number of guards, in any threads; one writer a folder at a time."""

    def __init__(self, folder: str | Path, max_bytes: int = 64 << 20, keep: int | None = None, strict: bool = False) -> None:
        """A file ends with the line that brings it to `max_bytes`. `keep`: how many files to leave, the oldest are deleted; None
        leaves all. Every log begins a file of its own, so that nothing is added to a line cut short by a crash."""
        if max_bytes < 1 or keep is not None and keep < 1:
            raise UsageError("audit log", found=f"max_bytes {max_bytes}, keep {keep}", expected="at least 1 each",
                             fix="keep=None keeps every file")  # fmt: skip
        self.folder, self.max_bytes, self.keep, self.strict = Path(folder), max_bytes, keep, strict
        self.dropped = 0
        """Events that could not be written."""
        self._lock = threading.Lock()
        self._file, self._size, self._torn, self._closed = -1, 0, False, False
        self._next, self._guards, self._warned = 0, 0, False
        self._told: set[int] = set()
        """Guards that the present file says how to make."""

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def watch(self, guard: Guard, session: str = "", **about: Any) -> str:
        """Write down whatever `guard` is asked from now on, under a session's name, which is returned. The guard is reset, since
        what it was asked before is not in the log. `about`: what else to know of the session; no secrets."""
        session = session or uuid.uuid4().hex[:12]
        with self._lock:
            self._guards += 1
            number = self._guards
        guard.on_event = _Watch(self, session, number, about)
        guard.reset()
        return session

    def note(self, what: str, session: str = "", **facts: Any) -> None:
        """An event that is nobody's judgement: who came, which policy took over. No secrets."""
        self.write([{**facts, "session": session, "do": "note", "what": what}])

    def write(
        self, events: list[dict[str, Any]], number: int | None = None, opening: Callable[[], dict[str, Any]] | None = None
    ) -> None:
        """Add `events` in one write. `opening` says how guard `number` is made, where the present file does not yet."""
        with self._lock:
            try:
                self._make_room()
                first = [opening()] if opening is not None and number not in self._told else []
                self._put(b"".join(map(self._line, [*first, *events])))
                if number is not None:
                    self._told.add(number)
            except OSError as error:
                self._told.clear()  # what is lost may be how a guard is made
                self.dropped += len(events)
                self._complain(error)

    def close(self) -> None:
        """Put everything on the disk. Events after this are dropped."""
        with self._lock:
            file, self._file, self._closed = self._file, -1, True
        if file >= 0:
            try:
                _finish(file, self.folder)
            except OSError as error:
                self._complain(error)

    def _complain(self, error: OSError) -> None:
        if self.strict:
            if is_disk_full(error):
                raise disk_full(self.folder, error, "every line before is intact") from error
            raise MachineError(self.folder, found=error.strerror or error, expected="a folder that can be written",
                               fix="mend it, or let the robot go on without: strict=False") from error  # fmt: skip
        if not self._warned:
            self._warned = True
            logger.warning("audit log %s: %s; the robot goes on, events are dropped and counted", self.folder, error)

    def _line(self, event: dict[str, Any]) -> bytes:
        number, self._next = self._next, self._next + 1
        body = json.dumps(_plain(event), separators=(",", ":"), allow_nan=False, default=str)
        return f'{{"n":{number},"t":{time.time():.6f},{body[1:]}\n'.encode("ascii")

    def _put(self, data: bytes) -> None:
        if self._torn:  # what is left of a line must not swallow the next
            data = b"\n" + data
        written = os.write(self._file, data)
        self._size += written
        self._torn = written < len(data)
        if self._torn:
            raise OSError(errno.ENOSPC, "No space left on device for more than a part of a line")

    def _make_room(self) -> None:
        """A file to write to, the next one where the present one is full."""
        if self._closed:
            raise OSError(errno.EBADF, "the log was closed")
        if self._file >= 0 and self._size < self.max_bytes:
            return
        if not self._next:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._next = _last_number(self.folder) + 1
        number = max([number for number, _ in _files(self.folder)], default=0) + 1
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        file = os.open(self.folder / f"audit-{number:06d}.jsonl", flags, 0o600)
        before, self._file, self._size, self._torn = self._file, file, 0, False
        self._told.clear()
        if before >= 0 or self.keep is not None:
            try:
                threading.Thread(target=self._put_away, args=(before,), name="audit").start()
            except RuntimeError:  # no more threads, or the interpreter is ending
                self._put_away(before)

    def _put_away(self, file: int) -> None:
        try:
            if file >= 0:
                _finish(file, self.folder)
            if self.keep is not None:
                for _, path in _files(self.folder)[: -self.keep]:
                    path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("audit log %s: %s", self.folder, error)


class _Watch:
    """One guard's `on_event`."""

    def __init__(self, log: AuditLog, session: str, number: int, about: Mapping[str, Any]) -> None:
        self.log, self.session, self.number, self.about = log, session, number, dict(about)
        self.count = 0
        self.settings: dict[str, Any] = {}

    def __call__(self, guard: Guard, what: str, given: dict[str, Any], answer: Any) -> None:
        # Read before anything else changes them; `opening` tells them too, to who begins to read with this file.
        settings, first = {name: getattr(guard, name) for name in SETTINGS}, self.count
        events = [self._event("set", {"settings": settings})] if first and settings != self.settings else []
        events.append(self._event(what, {**_given(given), **_answer(answer)}))
        self.settings = settings
        self.log.write(events, self.number, lambda: self._opening(guard, first))

    def _event(self, do: str, content: dict[str, Any]) -> dict[str, Any]:
        self.count += 1
        return {"session": self.session, "guard": self.number, "i": self.count - 1, "do": do, **content}

    def _opening(self, guard: Guard, at: int) -> dict[str, Any]:
        return {"session": self.session, "guard": self.number, "i": at, "do": "open", "about": self.about, **guard.to_json()}


# --- reading ---------------------------------------------------------------------------------------------------------


def read(folder: str | Path, counts: Counter[str] | None = None) -> Iterator[dict[str, Any]]:
    """The events of a folder in the order they were written. Lines that are none (cut short by a crash or a full disk) are passed
    over and counted under `torn`. Raises `DataError` for a folder without a log."""
    counts = Counter() if counts is None else counts
    files = _files(Path(folder))
    if not files:
        raise DataError(folder, found="no audit-*.jsonl", expected="the folder of an audit log", fix="name the one of `AuditLog`")
    for _, path in files:
        try:
            lines = open(path, "rb")
        except FileNotFoundError:  # `keep` has deleted it since
            continue
        counts["files"] += 1
        with lines:
            for line in filter(bytes.strip, lines):
                try:
                    event = json.loads(line)
                except (ValueError, RecursionError):
                    event = None
                if isinstance(event, dict) and isinstance(event.get("do"), str):
                    counts["events"] += 1
                    yield event
                else:
                    counts["torn"] += 1


def replay(folder: str | Path, counts: Counter[str] | None = None) -> Iterator[tuple[dict[str, Any], Any]]:
    """Each event with what the guard, made again, answers now: a text for `saw` and `said`, a verdict for `judge` and `chunk`;
    None for all else, and where it cannot be known: between events that are missing, or a beginning that was deleted, and the
    guard's next reset. `counts` are those of `check`."""
    counts = Counter() if counts is None else counts
    guards: dict[tuple[Any, Any], _Replayed] = {}
    for event in read(folder, counts):
        key, answer = (event.get("session"), event.get("guard")), None
        try:
            if event["do"] == "open":
                guards[key] = _open(event, guards.get(key), counts)
            elif event["do"] in _AGAIN:
                if key in guards:
                    answer = guards[key].again(event, counts)
                else:
                    counts["skipped"] += 1
        except (KeyError, TypeError, ValueError, AttributeError, VLAError):
            counts["unreadable"] += 1
            if key in guards:
                guards[key].ready = False
        yield event, answer


def check(folder: str | Path) -> dict[str, Any]:
    """Judge a whole log again. `compared` verdicts, of which `differing` came out otherwise than they were written, the first of
    them line `first_difference`; `skipped`: could not be judged again (see `replay`); `lost`: events that are missing; `torn`:
    lines that are none; `unreadable`: lines that were tampered with."""
    counts, sessions, first = Counter[str](), set(), None
    for event, answer in replay(folder, counts):
        sessions.add(event.get("session") or None)
        if answer is not None:
            counts["compared"] += 1
            if not same(event, answer):
                counts["differing"] += 1
                first = event.get("n") if first is None else first
    names = ("files", "events", "compared", "differing", "skipped", "lost", "torn", "unreadable")
    return {"sessions": len(sessions - {None}), **{name: counts[name] for name in names}, "first_difference": first}


def same(event: Mapping[str, Any], answer: Any) -> bool:
    """Whether an event was answered with `answer`, to the byte."""
    return all(event.get(name) == value for name, value in _plain(_answer(answer)).items())


class _Replayed:
    """A guard that is asked again what it was asked."""

    def __init__(self, guard: Guard, at: int) -> None:
        self.guard, self.next, self.ready = guard, at, at == 0

    def again(self, event: dict[str, Any], counts: Counter[str]) -> Any:
        if event["i"] != self.next:
            counts["lost"] += max(0, event["i"] - self.next)
            self.ready = False
        self.next = event["i"] + 1
        self.ready = self.ready or event["do"] == "reset"
        if event["do"] != "set" and not self.ready:
            counts["skipped"] += 1
            return None
        return _AGAIN[event["do"]](self.guard, event)


def _open(event: dict[str, Any], known: _Replayed | None, counts: Counter[str]) -> _Replayed:
    options = {**event["options"]}
    settings = {name: options[name] if name in _COUNTS else _number(options[name]) for name in SETTINGS}
    if known is not None and event["i"] == known.next > 0:  # said again, at the beginning of a file
        _set(known.guard, settings)
        return known
    if known is not None:
        counts["lost"] += max(0, event["i"] - known.next)
    options |= {**settings, "first_jump": _number(options["first_jump"])}
    return _Replayed(Guard(event["robot"], **options), event["i"])


def _set(guard: Guard, settings: Mapping[str, Any]) -> None:
    for name in SETTINGS:
        setattr(guard, name, settings[name] if name in _COUNTS else _number(settings[name]))


def _late(event: dict[str, Any]) -> dict[str, Any]:
    return {"confidence": event["confidence"], "late": _number(event["late"] or 0.0), "why": event["why"]}


def _sums(event: dict[str, Any]) -> tuple[int, int | None]:
    """Of what was seen; logs of before there were glances have one of all of it."""
    return (event["digest"], None) if "digest" in event else (event["glance"], event["whole"])


_COUNTS = ("repeats", "longest", "window", "most_holds")
_AGAIN: dict[str, Callable[[Guard, dict[str, Any]], Any]] = {
    "set": lambda guard, event: _set(guard, event["settings"]),
    "reset": lambda guard, event: guard.reset(),
    "resume": lambda guard, event: guard.resume(),
    "saw": lambda guard, event: guard.judge_seen(
        Seen(event["problem"], *_sums(event), _array(event["state"])), _number(event["age"] or 0.0), event["executed"]
    ),
    "said": lambda guard, event: guard.said(np.broadcast_to(np.float32(0), tuple(event["shape"]))),
    "judge": lambda guard, event: guard.judge(_read(guard, event, "action"), **_late(event)),
    "chunk": lambda guard, event: guard.chunk(_read(guard, event, "actions"), **_late(event)),
}


# --- how things are written ------------------------------------------------------------------------------------------


def _given(given: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Seen):
            out |= {"problem": value.problem, "glance": value.glance, "whole": value.whole, "state": _bytes(value.state)}
        elif isinstance(value, Unread):
            out |= {name: None, "unread": str(value)}
        elif isinstance(value, np.ndarray):
            out[name] = _bytes(value)
        elif name in ("age", "late"):
            out[name] = _float(value)
        else:
            out[name] = value
    return out


def _answer(answer: Any) -> dict[str, Any]:
    if isinstance(answer, Verdict | ChunkVerdict):
        told = dict(vars(answer))
        sent = told.pop("action" if isinstance(answer, Verdict) else "actions")
        return {"sent": _bytes(sent), **told}
    return {} if answer is None else {"says": answer}


def _read(guard: Guard, event: dict[str, Any], name: str) -> np.ndarray | Unread:
    numbers = _array(event[name])
    if numbers is None:
        return Unread(event["unread"])
    return numbers.reshape(-1, guard.robot.action_dim) if name == "actions" else numbers


def _bytes(values: np.ndarray | None) -> str | None:
    return None if values is None else base64.b64encode(values.astype("<f4").tobytes()).decode()


def _array(text: str | None) -> np.ndarray | None:
    return None if text is None else np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)


def _float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):  # nobody looked at it, or the guard would have raised
        return None


def _number(value: Any) -> Any:
    """What `_plain` made of a number; None stays None."""
    return None if value is None else float(value)


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they are written "nan", "inf", "-inf"."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _files(folder: Path) -> list[tuple[int, Path]]:
    found = [(int(match[1]), path) for path in folder.glob("audit-*.jsonl") if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def _last_number(folder: Path) -> int:
    """`n` of the newest line there is; 0 when there is none."""
    for _, path in reversed(_files(folder)):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            for line in reversed(file.read().split(b"\n")):
                try:
                    return int(json.loads(line)["n"])
                except (ValueError, TypeError, KeyError, RecursionError):
                    continue
    return 0


def _finish(file: int, folder: Path) -> None:
    try:
        os.fsync(file)
    finally:
        os.close(file)
    flush(folder)
