"""The other interpreter of `vla/sims/remote.py`: hosts simulators for one parent and ends when that parent does.

    python -m vla.sims.remote_child FD [MODULE]

FD is an inherited socket; MODULE (default `vla.sims`) has `local_sim(suite, task, **kw)`. Requests are answered in order.
An error of ours goes home as its four parts, any other as a traceback; neither ends the process.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import traceback
from typing import Any

import numpy as np

import vla
from vla.errors import VLAError
from vla.sims.remote_wire import WireError, receive, send

PROTOCOL = 1


def serve(sock: socket.socket, make: Any) -> None:
    """Answer requests on `sock` until the other side goes."""
    sims: dict[int, Any] = {}
    while True:
        try:
            request, arrays = receive(sock)
        except (EOFError, OSError, WireError):
            return  # the parent has gone, or is no parent
        out: dict[str, np.ndarray] = {}
        try:
            reply = _answer(sims, make, request, arrays, out)
        except VLAError as error:
            reply = {"error": [type(error).__name__, error.where, error.found, error.expected, error.fix]}
        except Exception:  # whatever a simulator package throws is the parent's to report
            reply, out = {"crash": traceback.format_exc(limit=-6)}, {}
        try:
            send(sock, reply, out)
        except OSError:
            return


def _answer(sims: dict[int, Any], make: Any, request: dict[str, Any], arrays: dict[str, np.ndarray], out: dict[str, Any]) -> Any:
    """Carry out one request; the reply's header, its arrays put into `out`."""
    op, number = request["op"], int(request.get("sim", 0))
    if op == "hello":
        return {"version": vla.__version__, "protocol": PROTOCOL}
    if op == "make":
        sim = make(request["suite"], request["task"], **request["arguments"])
        sims[number] = sim
        return {"camera": sim.camera, "max_steps": sim.max_steps, "spec": sim.spec.model_dump(mode="json")}
    sim = sims[number]
    if op == "reset":
        observation, info = sim.reset(seed=request["seed"], options=request["options"])
        _put(observation, out)
        return {"info": info, "task": sim.task, "instruction": sim.instruction}
    if op == "step":
        observation, reward, terminated, truncated, info = sim.step(arrays["action"], render=request["render"])
        _put(observation, out)
        return {"reward": reward, "terminated": bool(terminated), "truncated": bool(truncated), "info": info}
    if op == "expert":
        out["action"] = np.asarray(sim.expert(), np.float32)
        return {}
    if op == "frame":
        out["frame"] = sim.frame(request["size"])
        return {}
    if op == "close":
        sims.pop(number).close()
        return {}
    raise ValueError(f"no such request: {op!r}")


def _put(observation: dict[str, Any], out: dict[str, np.ndarray]) -> None:
    out["state"] = observation["state"]
    out.update({f"images/{camera}": picture for camera, picture in observation["images"].items()})


def main() -> None:
    """See the module."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.settimeout(None)
    module = importlib.import_module(sys.argv[2] if len(sys.argv) > 2 else "vla.sims")
    serve(sock, module.local_sim)
    sys.stdout.flush()
    os._exit(0)  # renderers of a dead parent need no orderly end, and some packages hang in theirs


if __name__ == "__main__":
    main()
