"""Stop-watches: contestants run in turn, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from vla.backbones.student import StudentNet
from vla.errors import MachineError
from vla.evaluate.pool import usable_cores
from vla.export.int8 import Feed, input_shapes
from vla.export.onnx import open_graph
from vla.policy import VLAPolicy
from vla.policy.choose import chooser

Run = Callable[[], Any]


def race(entrants: Mapping[str, Run], rounds: int, warm: int = 3) -> dict[str, dict[str, float]]:
    """name -> {p50_ms, p95_ms, p99_ms, min_ms, cpu_p50_ms, rounds}: every entrant once a round, in a new order each time.

    `cpu` is the processor time of all threads of this process: on a busy machine, where the clock measures the others as well,
    it is what a single thread would have taken alone.
    """
    names, times, busy_for = list(entrants), {name: [] for name in entrants}, {name: [] for name in entrants}
    rng = np.random.default_rng(0)
    for turn in range(warm + rounds):
        for i in rng.permutation(len(names)):
            run = entrants[names[i]]
            began, worked = time.perf_counter(), time.process_time()
            run()
            spent, work = time.perf_counter() - began, time.process_time() - worked
            if turn >= warm:
                times[names[i]].append(1000 * spent)
                busy_for[names[i]].append(1000 * work)
    return {name: _figures(times[name]) | {"cpu_p50_ms": round(float(np.median(busy_for[name])), 3)} for name in names}


def _figures(spent: Sequence[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(spent, (50, 95, 99))
    figures = {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "min_ms": min(spent)}
    return {name: round(float(value), 3) for name, value in figures.items()} | {"rounds": len(spent)}


def thread_counts() -> list[int]:
    """1, 2 and all cores, as far as there are so many. Only 1 where they are all taken: threads that wait for one another on
    cores that others use measure the others."""
    cores = usable_cores()
    return [1] if busy() else sorted({1, min(2, cores), cores})


def busy() -> bool:
    """Whether as many processes want to run as there are cores, before anything is measured."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > usable_cores()


def graph_run(path: Path, threads: int, feed: Feed) -> Run:
    """One chunk from a graph."""
    session = open_graph(path, threads)
    return lambda: session.run(None, feed)


def torch_run(policy: VLAPolicy, feed: Feed, threads: int, bf16: bool = False) -> Run:
    """One chunk from the network in eager mode, from the very inputs a graph gets."""
    policy = copy.deepcopy(policy).to(torch.bfloat16) if bf16 else policy
    net, chooses = cast(StudentNet, policy.model), policy.l1_head is None
    dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.inference_mode()
    def run() -> Any:
        before = torch.get_num_threads()
        if before != threads:
            torch.set_num_threads(threads)
        pixels = torch.from_numpy(feed["images"]).permute(0, 3, 1, 2)
        told = torch.from_numpy(feed["sentence"]).to(dtype)
        seen = net.look(pixels, told.expand(len(pixels), -1), torch.from_numpy(feed["slots"]))
        state = torch.from_numpy(feed["state"]) if "state" in feed else None
        robot = torch.from_numpy(feed["robot"]) if "robot" in feed else None
        said, _ = net.act(seen.reshape(1, -1, net.hidden_size), None, told, state, robot)
        if not chooses:
            return policy.l1_head(said).clamp(-1, 1).float().numpy()  # pyright: ignore[reportOptionalCall]
        choose = chooser(policy.config.decode, policy.codec, policy.centres, np.ones(1, np.int64), [0])
        choose(net.symbol_logits(said))
        return choose.result(policy.chunk)

    return run


def several_views(feed: Feed, views: int) -> Feed:
    """`feed` with so many cameras: pictures are repeated, for time does not depend on what is on them."""
    at = np.arange(views) % len(feed["images"])
    return feed | {"images": np.ascontiguousarray(feed["images"][at]), "slots": np.arange(views)}


# ------------------------------------------------------------------------------------------------- a fresh process

_PEAK = """
import json, resource, sys, time
def peak():  # bytes; a child inherits the other figure from whoever started it, so the kernel's own is asked for first
    try:
        return next(1024 * int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
"""

_GRAPHS = _PEAK + """
import numpy as np, onnxruntime as ort
from tokenizers import Tokenizer
folder, graph, feed, threads = sys.argv[1:5]
began = float(sys.argv[5])
options = ort.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = int(threads), 3
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
sentence = ort.InferenceSession(folder + "/sentence.onnx", options, providers=["CPUExecutionProvider"])
policy = ort.InferenceSession(folder + "/" + graph, options, providers=["CPUExecutionProvider"])
inputs = dict(np.load(feed))
sentence.run(None, {"ids": np.array([tokenizer.encode("go there").ids])})
policy.run(None, inputs)
print(json.dumps({"seconds": time.time() - began, "peak": peak()}))
"""

_TORCH = _PEAK + """
began = float(sys.argv[5])
import numpy as np, torch
torch.set_num_threads(int(sys.argv[4]))
from vla.policy import load_policy
policy = load_policy(sys.argv[1], "cpu")
robot, spec = next(iter(policy.embodiments.items()))
images = {name: np.zeros((c.height, c.width, 3), np.uint8) for name, c in spec.cameras.items()}
state = policy.normalizers[robot]["state"].low
policy.act({"images": images, "state": state}, "go there", robot)
print(json.dumps({"seconds": time.time() - began, "peak": peak()}))
"""


def fresh_graph(folder: Path, graph: str, feed: Feed, threads: int = 1) -> dict[str, float]:
    """{cold_start_s, peak_memory_mb} of a process that has only onnxruntime, numpy and tokenizers, up to its first chunk."""
    with tempfile.TemporaryDirectory() as place:
        np.savez(Path(place) / "feed.npz", allow_pickle=False, **feed)  # pyright: ignore[reportArgumentType]
        return _fresh(_GRAPHS, str(folder), graph, str(Path(place) / "feed.npz"), str(threads))


def fresh_torch(policy_folder: Path, threads: int = 1) -> dict[str, float]:
    """The same of the policy itself."""
    return _fresh(_TORCH, str(policy_folder), "", "", str(threads))


def _fresh(script: str, *words: str) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": words[-1], "TOKENIZERS_PARALLELISM": "false"}
    line = [sys.executable, "-W", "ignore", "-c", script, *words, str(time.time())]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False, timeout=600)
    if done.returncode:
        raise MachineError("a fresh process", found=done.stderr[-500:] or f"exit code {done.returncode}",
                           expected="one chunk from it, to measure start and memory",
                           fix="python -c 'import onnxruntime, tokenizers, torch' tells more")  # fmt: skip
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {"cold_start_s": round(found["seconds"], 3), "peak_memory_mb": round(found["peak"] / 2**20, 1)}


# ------------------------------------------------------------------------------------------------- the machine's own rate


def gemm_rate(graph: Path, names: Sequence[str], feed: Feed, rounds: int = 30) -> dict[str, Any]:
    """What integer products of the shapes in `graph` cost by themselves, on one thread.

    {gop, ideal_ms, rate_gops, shapes: [{shape: [M, K, N], count, gops}]}: every shape as a model of one MatMulInteger, the
    fastest of `rounds`; `ideal_ms` is what all of them would take at these rates, one after the other.
    """
    from onnx import TensorProto, helper, numpy_helper

    counts: dict[tuple[int, int, int], int] = {}
    for shape in input_shapes(graph, names, feed):
        counts[shape] = counts.get(shape, 0) + 1
    rows, ideal, work = [], 0.0, 0.0
    rng = np.random.default_rng(0)
    for (m, k, n), count in sorted(counts.items(), key=lambda item: -np.prod(item[0]) * item[1]):
        weight = numpy_helper.from_array(rng.integers(-127, 128, (k, n)).astype(np.int8), "b")
        one = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "one",
                                [helper.make_tensor_value_info("a", TensorProto.UINT8, [m, k])],
                                [helper.make_tensor_value_info("y", TensorProto.INT32, [m, n])], [weight])  # fmt: skip
        model = helper.make_model(one, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "one.onnx"
            path.write_bytes(model.SerializeToString())
            session, a = open_graph(path, 1), {"a": rng.integers(0, 256, (m, k)).astype(np.uint8)}
            best = race({"one": lambda s=session, a=a: s.run(None, a)}, rounds)["one"]["min_ms"]
        gop = 2e-9 * m * k * n
        rows.append({"shape": [m, k, n], "count": count, "gops": round(1000 * gop / best, 1)})
        ideal, work = ideal + best * count, work + gop * count
    return {"gop": round(work, 4), "ideal_ms": round(ideal, 3), "rate_gops": round(1000 * work / ideal, 1), "shapes": rows}


def machine() -> dict[str, Any]:
    """What the figures are of, and how busy it was."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"processor": name, "cores": usable_cores(), "load": load, "busy": busy(), "system": platform.system(),
            "machine": platform.machine()}  # fmt: skip
