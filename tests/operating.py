"""A station as its users start it, for tests: `vla operate expert ...` as a process of its own; its API as a script speaks it.

with operating(tmp_path, "--speed", 0, "--handoff", "drill=12") as station:        # station.address, station.log
    post(station.address, "run", goal="touch every cube")
    assert snapshot(station.address)["run"]["state"] == "running"
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from children import LIMIT
from serving import Server, alive, until


@contextmanager
def operating(folder: Path, *flags: object, port: int = 0) -> Iterator[Server]:
    """A station of the scripted expert as its users start it; it must leave with exit code 0 and nothing broken in its log."""
    log = folder / f"log{len(list(folder.glob('log*')))}"
    command = [sys.executable, "-m", "vla.cli", "operate", "expert", "--sim", "tabletop-long", "--port", str(port),
               "--incidents", str(folder / "incidents"), *map(str, flags)]  # fmt: skip
    with log.open("wb") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    server = Server("", process, log, {})
    try:
        (server.address,) = until(lambda: alive(server) and re.findall(r"^(http://\S+:\d+)  ", server.log, re.M))
        yield server
        if server.leave is not None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(LIMIT) == server.leave, server.log[-4000:]
            assert not server.complaints()
    finally:
        process.kill()
        process.wait(LIMIT)


def get(url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, bytes]:
    """(status, headers, body)."""
    data = None if body is None else json.dumps(body).encode()
    given = {"content-type": "application/json"} if body is not None else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, given | (headers or {})), timeout=LIMIT) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def snapshot(address: str) -> Any:
    return json.loads(get(f"{address}/v1/station")[2])


def post(address: str, name: str, **body: Any) -> Any:
    status, _, content = get(f"{address}/v1/station/{name}", body)
    assert status == 200, content
    return json.loads(content)


def events(address: str) -> list[dict[str, Any]]:
    """All that the station remembers, up to now."""
    last, found = snapshot(address)["last"], []
    with urllib.request.urlopen(f"{address}/v1/station/events?after=0", timeout=LIMIT) as stream:
        while last and not (found and found[-1]["number"] >= last):
            line = stream.readline().decode()
            if line.startswith("data: "):
                found.append(json.loads(line[6:]))
    return found


def folded(happened: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without plans that say again what the one before said."""
    kept: list[dict[str, Any]] = []
    for event in happened:
        if event["kind"] == "tick":
            continue
        again = kept and event["kind"] == kept[-1]["kind"] == "plan"
        if again and all(event[part] == kept[-1][part] for part in ("now", "remaining", "confidence")):
            kept[-1] = event
        else:
            kept.append(event)
    return kept
