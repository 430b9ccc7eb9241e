"""What a server costs without a model: two 224-pixel pictures there, a chunk back; ours beside servers as others build them.

    python benchmarks/bench_serving.py [--looks 500] [--block 25] [--out FILE.json]

A block of looks of each in turn: our WebSocket with our client, the same with `websockets`' own client, openpi's protocol on our
server, a server as openpi's, OFT's payload on our /act, a server as OpenVLA's; and the floor, the same bytes over a bare blocking
socket. Then, with the model in a process and in a thread: 8 clients of a model that takes 100 ms a batch against one that takes
them singly; /livez while a look takes 3 s.
Needs, for the servers it is compared with: pip install fastapi json-numpy requests
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

HERE = Path(__file__).parent
RNG = np.random.default_rng(0)
FRAMES = {"front": RNG.integers(0, 255, (224, 224, 3), np.uint8), "wrist": RNG.integers(0, 255, (224, 224, 3), np.uint8)}
STATE = np.array([0.0, 0.0, 0.4, 0.5], np.float32)
WORDS = "touch the red cube"


@contextlib.contextmanager
def ours(policy: str, *flags: str) -> Iterator[int]:
    """A server of ours; its port."""
    code = "import sys; from vla.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", policy, "--port", "0", *flags]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    found = next(m for line in child.stderr if (m := re.search(r"http://127\.0\.0\.1:(\d+)", line)))
    threading.Thread(target=child.stderr.read, daemon=True).start()
    port = int(found[1])
    until(lambda: get(port, "/readyz") == 200)
    try:
        yield port
    finally:
        child.terminate()
        child.wait(30)


@contextlib.contextmanager
def peer(kind: str) -> Iterator[int]:
    """A server as another project builds it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = subprocess.Popen([sys.executable, str(HERE / "peer_servers.py"), kind, str(port)])
    until(lambda: reachable(port) or child.poll() is not None)
    if child.poll() is not None:
        raise SystemExit(f"the server as {kind}'s did not start: pip install fastapi json-numpy requests")
    try:
        yield port
    finally:
        child.terminate()
        child.wait(30)


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "a server did not start"
        time.sleep(0.05)


def reachable(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def get(port: int, path: str) -> int:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as line:
        try:
            line.request("GET", path)
            return line.getresponse().status
        except OSError:
            return 0


@contextlib.contextmanager
def floor(size: int) -> Iterator[Callable[[], None]]:
    """The same bytes to another process and a few back, nothing else."""
    listener = socket.create_server(("127.0.0.1", 0))
    if (child := os.fork()) == 0:
        line, _ = listener.accept()
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        room = memoryview(bytearray(size))
        while True:
            got = 0
            while got < size:
                if not (part := line.recv_into(room[got:])):
                    os._exit(0)
                got += part
            line.sendall(bytes(600))
    line = socket.create_connection(listener.getsockname())
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data = bytes(size)

    def once() -> None:
        line.sendall(data)
        got = 0
        while got < 600:
            got += len(line.recv(600))

    yield once
    line.close()
    os.waitpid(child, 0)


def openpi_client(address: str) -> Callable[[], Any]:
    """As openpi-client asks: the blocking client of `websockets`, msgpack, one answer."""
    from websockets.sync.client import connect

    from serve.wire import pack_openpi

    line = connect(address, compression=None, max_size=None).__enter__()
    line.recv()
    look = {
        "observation/image": FRAMES["front"],
        "observation/wrist_image": FRAMES["wrist"],
        "observation/state": STATE,
        "prompt": WORDS,
    }

    def once() -> Any:
        line.send(pack_openpi(look))
        return msgpack.unpackb(line.recv())

    return once


def plain_client(port: int) -> Callable[[], Any]:
    """Our protocol by the blocking client of `websockets`."""
    from websockets.sync.client import connect

    from serve.wire import pack, unpack

    line = connect(f"ws://127.0.0.1:{port}/v1/ws?protocol=1", compression=None, max_size=None).__enter__()

    def once() -> Any:
        line.send(pack({"type": "look", "images": FRAMES, "state": STATE, "instruction": WORDS}))
        return unpack(line.recv())

    return once


def act_client(port: int) -> Callable[[], Any]:
    """OFT's payload over HTTP, the connection kept."""
    import requests

    line = requests.Session()

    def numpy(array: np.ndarray) -> dict[str, Any]:
        return {"__numpy__": base64.b64encode(array).decode(), "dtype": array.dtype.str, "shape": array.shape}

    def once() -> Any:
        look = {
            "full_image": numpy(FRAMES["front"]),
            "wrist": numpy(FRAMES["wrist"]),
            "state": numpy(STATE),
            "instruction": WORDS,
        }
        reply = line.post(f"http://127.0.0.1:{port}/act", json=look)
        assert reply.status_code == 200, reply.text
        return reply.json()

    return once


def interleaved(contenders: dict[str, Callable[[], Any]], looks: int, block: int) -> dict[str, dict[str, float]]:
    """ms of each: p50, p99. Turns are blocks of looks, the first five of which count for nothing: what ran before has left
    others' bytes in the caches."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    number = 0
    for _ in range(-(-looks // block)):
        for name, once in contenders.items():
            for look in range(block + 5):
                number += 1
                for frame in FRAMES.values():  # another picture every time: a camera that froze would be held
                    frame[0, 0] = number % 251, number // 251 % 251, number // 63001
                began = time.perf_counter()
                once()
                if look >= 5:
                    times[name].append(1e3 * (time.perf_counter() - began))
    return {name: {"p50": float(np.percentile(t, 50)), "p99": float(np.percentile(t, 99))} for name, t in times.items()}


def overhead(looks: int, block: int) -> dict[str, Any]:
    """Every contender's p50 and p99."""
    from serve.client import Client

    with ours("null:tabletop_wrist") as port, ours("null:tabletop_wrist", "--engine", "thread") as threaded, \
            peer("openpi") as pi, peer("openvla") as oft, floor(2 * 224 * 224 * 3) as bare:  # fmt: skip
        client, inside = Client(f"ws://127.0.0.1:{port}"), Client(f"ws://127.0.0.1:{threaded}")
        observation = {"images": FRAMES, "state": STATE}
        return interleaved({
            "bare socket": bare,
            "ours": lambda: client.act(observation, WORDS),
            "ours, policy in a thread": lambda: inside.act(observation, WORDS),
            "ours, websockets' client": plain_client(port),
            "ours, openpi's protocol": openpi_client(f"ws://127.0.0.1:{port}/openpi"),
            "a server as openpi's": openpi_client(f"ws://127.0.0.1:{pi}"),
            "ours, OFT's /act": act_client(port),
            "a server as OpenVLA's /act": act_client(oft),
        }, looks, block)  # fmt: skip


def crowd(clients: int, looks: int, *flags: str) -> dict[str, float]:
    """Looks a second of many clients, batched and one by one."""
    from serve.client import Client

    def rate(port: int) -> float:
        lines = [Client(f"ws://127.0.0.1:{port}", timeout=30.0) for _ in range(clients)]
        observation = {"images": FRAMES, "state": STATE}

        def work(line: Client) -> None:
            for _ in range(looks):
                line.act(observation, WORDS)

        threads = [threading.Thread(target=work, args=(line,)) for line in lines]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return clients * looks / (time.perf_counter() - began)

    same = ("--deadline", "20", "--guard", str(_no_repeats()), *flags)
    with ours("null:tabletop_wrist?ms=100", "--batch", "8", *same) as port:
        batched = rate(port)
    with ours("null:tabletop_wrist?ms=100", "--batch", "1", *same) as port:
        serial = rate(port)
    return {"batched": batched, "serial": serial, "ratio": batched / serial}


def _no_repeats() -> Path:
    path = Path("/tmp") / f"bench-guard-{os.getpid()}.yaml"
    path.write_text("'*': {repeats: null}\n")
    return path


def alive(port: int, seconds: float) -> dict[str, float]:
    """/livez, while a look takes `seconds`."""
    from serve.client import Client

    client, times = Client(f"ws://127.0.0.1:{port}", timeout=30.0), []
    thread = threading.Thread(target=lambda: client.act({"images": FRAMES, "state": STATE}, WORDS))
    thread.start()
    time.sleep(0.2)
    line = http.client.HTTPConnection("127.0.0.1", port)
    end = time.monotonic() + seconds - 0.5
    while time.monotonic() < end:
        began = time.perf_counter()
        line.request("GET", "/livez")
        line.getresponse().read()
        times.append(1e3 * (time.perf_counter() - began))
        time.sleep(0.02)
    assert thread.is_alive(), "the look was over before the probes"
    thread.join()
    return {"p50": float(np.percentile(times, 50)), "max": max(times), "probes": len(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--looks", type=int, default=500)
    parser.add_argument("--block", type=int, default=25, help="looks of one before it is the next one's turn; 5 go before them")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    said = {"overhead": overhead(args.looks, args.block)}
    one = said["overhead"]["ours"]["p50"]
    print(f"{'two 224-pixel pictures, ms':34s} {'p50':>8s} {'p99':>8s} {'to ours':>8s}")
    for name, t in said["overhead"].items():
        print(f"{name:34s} {t['p50']:8.3f} {t['p99']:8.3f} {t['p50'] / one:8.1f}")
    for engine in ("process", "thread"):
        flags = ("--engine", engine)
        said[f"crowd, {engine}"] = rates = crowd(8, 12, *flags)
        print(f"the model in a {engine}: 8 clients, 100 ms a batch: {rates['batched']:.1f} looks/s, one by one "
              f"{rates['serial']:.1f}: {rates['ratio']:.1f} x", end="")  # fmt: skip
        with ours("null:tabletop_wrist?ms=3000", "--deadline", "20", *flags) as port:
            said[f"livez, {engine}"] = probed = alive(port, 3.0)
        print(f"; /livez during a look of 3 s {probed['p50']:.2f} ms, at most {probed['max']:.2f} of {probed['probes']}")
    if args.out:
        args.out.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
