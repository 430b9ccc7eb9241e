"""Two servers as others build them, around a policy that does nothing: what `bench_serving.py` compares with.

    python benchmarks/peer_servers.py openpi 9101      msgpack over `websockets`' asyncio server, as openpi serves a policy
    python benchmarks/peer_servers.py openvla 9102     FastAPI, json-numpy, a synchronous handler, as OpenVLA's deploy.py does

Written from their published protocols (/act and the WebSocket's messages), without a model: the cost of the wire and the server.
Needs: pip install fastapi uvicorn json-numpy websockets msgpack
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import numpy as np

CHUNK = np.zeros((8, 4), np.float32)


def openpi(port: int) -> None:
    import msgpack
    import websockets.asyncio.server as server

    def pack(obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            return {b"__ndarray__": True, b"data": obj.tobytes(), b"dtype": obj.dtype.str, b"shape": obj.shape}
        return obj

    def unpack(obj: Any) -> Any:
        if b"__ndarray__" in obj:
            return np.ndarray(buffer=obj[b"data"], dtype=np.dtype(obj[b"dtype"]), shape=obj[b"shape"])
        return obj

    async def handle(socket: Any) -> None:
        await socket.send(msgpack.packb({"policy": "null"}))
        before = 0.0
        async for data in socket:
            began = time.monotonic()
            msgpack.unpackb(data, object_hook=unpack)
            said = {"actions": CHUNK, "server_timing": {"infer_ms": 0.0, "prev_total_ms": before}}
            await socket.send(msgpack.packb(said, default=pack))
            before = 1e3 * (time.monotonic() - began)

    async def main() -> None:
        async with server.serve(handle, "127.0.0.1", port, compression=None, max_size=None):
            await asyncio.Future()

    asyncio.run(main())


def openvla(port: int) -> None:
    import json_numpy
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

    json_numpy.patch()
    app = FastAPI()

    def act(payload: dict[str, Any]) -> Any:
        np.asarray(payload["full_image"]), np.asarray(payload["wrist"])
        return JSONResponse([json.loads(json_numpy.dumps(row.astype(np.float64))) for row in CHUNK])

    app.post("/act")(act)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    {"openpi": openpi, "openvla": openvla}[sys.argv[1]](int(sys.argv[2]))
