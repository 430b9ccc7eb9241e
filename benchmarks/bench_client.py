"""What a robot waits for a server beside the model: our client and `websockets`' own, in turn, on the same `vla serve null:...`.

python benchmarks/bench_client.py                    two 224 x 224 pictures, 500 looks each
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from websockets.sync.client import connect

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from serving import serving  # noqa: E402  # pyright: ignore[reportMissingImports]

from serve.client import Client  # noqa: E402
from serve.loop import percentiles  # noqa: E402
from serve.wire import pack, unpack  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--looks", type=int, default=500)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--address", help="of a server that runs already, with null:tabletop_wrist")
    args = parser.parse_args()
    if args.address:
        print(json.dumps(measure(args.address, args.looks, args.size)))
        return
    with serving("null:tabletop_wrist") as address:
        print(json.dumps(measure(address, args.looks, args.size)))


def measure(address: str, looks: int, size: int) -> dict[str, object]:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (4, 2, size, size, 3)).astype(np.uint8)
    state = np.zeros(4, np.float32)
    took: dict[str, list[float]] = {"ours": [], "socket": [], "masked": [], "websockets": [], "server": []}
    busy: dict[str, list[float]] = {"ours": [], "socket": [], "masked": [], "websockets": []}
    url = address.replace("http://", "ws://") + "/v1/ws?protocol=1"
    with (
        Client(address, robot="tabletop_wrist") as ours,
        Client(address, robot="tabletop_wrist", shared=False) as plain,
        Client(address, robot="tabletop_wrist", shared=False, mask=True) as masked,
        connect(url, max_size=None, compression=None, proxy=None) as theirs,
    ):
        for n in range(-20, looks):
            images = dict(zip(("front", "wrist"), frames[n % 4], strict=True))
            order = [("ours", ours), ("socket", plain), ("masked", masked), ("websockets", None)]
            for name, client in order if n % 2 else reversed(order):
                began, worked = time.perf_counter(), time.process_time()
                if client is not None:
                    timing = client.act({"images": images, "state": state}, "go").timing
                    if n >= 0 and name == "ours":
                        took["server"].append(timing["serve"] / 1e3)
                else:
                    theirs.send(pack({"type": "look", "seq": n + 21, "images": images, "state": state, "instruction": "go"}))
                    assert unpack(theirs.recv())["type"] == "chunk"  # pyright: ignore[reportArgumentType]
                if n >= 0:
                    took[name].append(time.perf_counter() - began)
                    busy[name].append(time.process_time() - worked)
    wall, cpu = ({name: 1e3 * float(np.median(times)) for name, times in of.items()} for of in (took, busy))
    return {"ms": {name: percentiles(times) for name, times in took.items()},
            "cpu_ms": {name: round(each, 3) for name, each in cpu.items()},
            "ratio": round(wall["ours"] / wall["websockets"], 3), "cpu_ratio": round(cpu["ours"] / cpu["websockets"], 3),
            "looks": looks, "size": size}  # fmt: skip


if __name__ == "__main__":
    main()
