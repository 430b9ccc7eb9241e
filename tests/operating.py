"""A station as its users start it, for tests: `vla operate STUDENT ...` as a process of its own; its API as a script speaks it.

with operating(tmp_path, "--speed", 0, "--handoff", "drill=12") as station:        # station.address, station.log
    station.post("run", goal="touch every cube")
    assert station.snapshot()["run"]["state"] == "running"
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from children import LIMIT
from serving import Server, alive, fetch, until


@dataclass
class Operated(Server):
    """A `vla operate` that runs, or ran."""

    folder: Path = Path()
    """Of incidents, corrections and answers."""
    out: Path = Path()
    """What it printed: a line of JSON when it listens, one at its end."""

    def post(self, what: str, **body: Any) -> tuple[int, Any]:
        """(status, the snapshot or a refusal)."""
        status, _, said = self.get(f"/v1/station/{what}", body)
        return status, json.loads(said)

    def snapshot(self) -> dict[str, Any]:
        return snapshot(self.address, self.headers)

    def asked(self, number: int = 1) -> dict[str, Any]:
        """The snapshot, once question `number` is open."""
        until(lambda: (self.snapshot()["question"] or {}).get("number") == number, f"question {number}")
        return self.snapshot()

    def ended(self) -> dict[str, Any]:
        """The snapshot, once the run is over."""
        from serve.station_run import ENDED

        until(lambda: self.snapshot()["run"]["state"] in ENDED, "the end")
        return self.snapshot()

    def events(self, after: int = 0, last: int | None = None, headers: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """As `events`."""
        return events(self.address, after, last, {**self.headers, **(headers or {})})


@contextmanager
def operating(folder: Path, *flags: object, student: object = "expert", suite: str = "tabletop-long", token: str = "",
              port: int = 0) -> Iterator[Operated]:  # fmt: skip
    """See the module. At the end of the block it is asked to leave; it must, with exit code `leave`, and nothing broken in its
    log. `token` goes along with every request."""
    folder.mkdir(parents=True, exist_ok=True)
    times = len(list(folder.glob("log*")))
    log, out, kept = folder / f"log{times}", folder / f"out{times}", folder / "kept"
    command = [sys.executable, "-m", "vla.cli", "operate", str(student), "--sim", suite, "--port", str(port), "--json",
               "--incidents", str(kept), *map(str, flags)]  # fmt: skip
    with out.open("wb") as printed, log.open("wb") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=printed, stderr=said)
    station = Operated("", process, log, {"authorization": f"Bearer {token}"} if token else {}, folder=kept, out=out)
    try:
        (station.address,) = until(lambda: alive(station) and re.findall(r'"address": "(\S+)"', out.read_text()))
        yield station
        if station.leave is not None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(LIMIT) == station.leave, station.log[-4000:]
            assert not station.complaints()
    finally:
        process.kill()
        process.wait(LIMIT)


def snapshot(address: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    status, _, content = fetch(f"{address}/v1/station", headers=headers)
    assert status == 200, content
    return json.loads(content)


def post(address: str, name: str, **body: Any) -> Any:
    """The snapshot after what must be accepted."""
    status, _, content = fetch(f"{address}/v1/station/{name}", body)
    assert status == 200, content
    return json.loads(content)


def events(
    address: str, after: int = 0, last: int | None = None, headers: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """What a stream says of the events after number `after` until number `last` (default: the newest now). `after` less than 0
    is not asked for."""
    last, found = snapshot(address, headers)["last"] if last is None else last, list[dict[str, Any]]()
    query = f"?after={after}" if after >= 0 else ""
    request = urllib.request.Request(f"{address}/v1/station/events{query}", headers=dict(headers or {}))
    with urllib.request.urlopen(request, timeout=LIMIT) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        number = 0
        while last and not (found and found[-1]["number"] >= last):
            line = stream.readline().decode()
            assert line, "the stream has ended"
            if line.startswith("id: "):
                number = int(line[4:])
            if line.startswith("data: "):
                found.append(json.loads(line[6:]))
                assert found[-1]["number"] == number
    return found


def folded(happened: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without ticks, and plans that say again what the one before said."""
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
