"""A server as its users start it, for tests: `vla serve POLICY ...` as a process of its own, ended by SIGTERM, and how it ended.

    with serving("null:tabletop?ms=20", "--batch", "1") as address:      # "http://127.0.0.1:41873", ready
        ...
    with started("null:tabletop") as server:                             # the same, and its process and its log
        os.kill(server.model, signal.SIGKILL)
        ...
        assert not server.complaints()

At the end of the block the server is asked to leave; it must, with exit code 0, and with no traceback in what it said.
"""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any, TypeVar

import psutil
from children import LIMIT

T = TypeVar("T")
_COMPLAINTS = re.compile(r"Traceback|Exception|Fatal error|never retrieved|never awaited|was destroyed|ERROR|CRITICAL")


@dataclass
class Server:
    """One that runs, or ran."""

    address: str
    process: subprocess.Popen[bytes]
    log_file: Path
    headers: Mapping[str, str]
    """What `get` sends along."""
    leave: int | None = 0
    """Exit code it must end with; None when the test has seen to its end."""

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def log(self) -> str:
        """All it has said so far."""
        return self.log_file.read_text(errors="replace")

    def complaints(self, but: str = r"(?!)") -> list[str]:
        """Lines of its log that speak of something broken, without those that match `but`."""
        return [line for line in self.log.splitlines() if _COMPLAINTS.search(line) and not re.search(but, line)]

    @property
    def model(self) -> int:
        """The process that has the model."""
        (child,) = psutil.Process(self.process.pid).children()
        return child.pid

    def memory(self) -> dict[str, int]:
        """Resident bytes of the server and of the model's process."""
        both = {"server": self.process.pid, "model": self.model}
        return {name: psutil.Process(pid).memory_info().rss for name, pid in both.items()}

    @contextmanager
    def bounded(self, most: int) -> Iterator[dict[str, int]]:
        """Neither process may be more than `most` bytes larger at any moment of the block than it was at its beginning. How much
        each of them was lies in the mapping afterwards."""
        both = {"server": self.process.pid, "model": self.model}
        for pid in both.values():
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is counted from now on
        before, grown = self.memory(), dict.fromkeys(both, 0)
        yield grown
        for name, pid in both.items():
            (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)
            grown[name] = (int(peak) << 10) - before[name]
        assert max(grown.values()) < most, f"{grown}, allowed {most}"

    def get(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> tuple[int, Mapping[str, str], bytes]:
        """`fetch` from it, with its own headers and these."""
        return fetch(self.address + path, body, {**self.headers, **(headers or {})})

    def metric(self, name: str) -> float:
        """A counter or gauge of /metrics, its labels added up."""
        text = self.get("/metrics")[2].decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.M))


def fetch(url: str, body: Any = None, headers: Mapping[str, str] | None = None) -> tuple[int, Mapping[str, str], bytes]:
    """(status, headers by their names in small letters, body) of a GET; of a POST of JSON where there is something to say."""
    data = None if body is None else json.dumps(body).encode()
    given = {} if body is None else {"content-type": "application/json"}
    request = urllib.request.Request(url, data, {**given, **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=LIMIT, context=ssl._create_unverified_context()) as answer:
            return answer.status, _lower(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _lower(error.headers), error.read()


def _lower(headers: Message) -> dict[str, str]:
    return {name.lower(): ", ".join(headers.get_all(name, [])) for name in headers}


@contextmanager
def started(
    policy: object, *flags: object, token: str = "", wait: bool = True, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """See the module. `token` goes along with every `get`; without `wait` the policy may still be loading."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "vla.cli", "serve", str(policy), "--port", "0", *map(str, flags)]
        with log.open("wb") as said:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=os.environ | dict(env or {})
            )
        server = Server("", process, log, {"authorization": f"Bearer {token}"} if token else {})
        try:
            (server.address,) = until(lambda: alive(server) and re.findall(r"^(https?://\S+:\d+)  ", server.log, re.M))
            if wait:
                until(lambda: alive(server) and server.get("/readyz")[0] == 200)
            yield server
            if server.leave is not None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(LIMIT) == server.leave, server.log[-4000:]
        finally:
            process.kill()
            process.wait(LIMIT)


@contextmanager
def serving(policy: object, *flags: object) -> Iterator[str]:
    """The address of a server of `policy` that is ready. It must end well, and must not have complained."""
    with started(policy, *flags) as server:
        yield server.address
        assert not server.complaints(), server.log[-4000:]


def alive(server: Server) -> bool:
    """True; fails, and shows the log, when the server has ended."""
    assert server.process.poll() is None, server.log[-4000:]
    return True


def until(true: Callable[[], T | bool], what: str = "") -> T:
    """What `true()` says as soon as that is something. Gives up after `LIMIT` s."""
    end = time.monotonic() + LIMIT
    while not (said := true()):
        assert time.monotonic() < end, f"not within {LIMIT} s: {what or true}"
        time.sleep(0.02)
    return said  # pyright: ignore[reportReturnType]
