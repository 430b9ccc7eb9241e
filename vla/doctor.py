"""`vla doctor`: what this machine has, what it lacks, and the command that mends it.

Whatever can crash, hang or print to the terminal is tried in a process of its own (`python -m vla.doctor NAME`): a
torchvision that does not fit its torch breaks imports, a wrong OpenGL driver aborts the interpreter, and a doctor must
survive its patients. Nothing is read off a version number that can be tried: frames are encoded, a scene is rendered.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"

REQUIRED = {"torch": "2.10", "torchvision": "0.25", "transformers": "5.3", "accelerate": "1.10", "peft": "0.18",
            "datasets": "4.0", "timm": "1.0", "numpy": "2.0", "pyarrow": "19", "av": "14"}
"""Packages of the core and the oldest version that works; the floors of torch and transformers are security floors."""

OPTIONAL = {"mujoco": "sim", "metaworld": "sim", "gymnasium-robotics": "sim", "gym-aloha": "sim", "h5py": "hdf5",
            "onnxruntime": "edge", "starlette": "serve"}
"""Packages of the extras, by the extra that brings them."""

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the table. `status` is ok, warn (something will not work or be slow) or fail (the core will not)."""

    group: str
    name: str
    status: str
    found: str
    fix: str = ""


def diagnose(timeout: float = 90.0) -> list[Check]:
    """Every check of this machine, in the order of the table. Takes some 10 s; writes nothing, asks no network.

    `timeout`: seconds a single trial may take before it counts as failed.
    """
    backends = ["egl", "osmesa"] if platform.system() == "Linux" else ["native"]
    have_mujoco = _version("mujoco") is not None
    trials = ["torch", "accelerate", "video"] + [f"render-{b}" for b in backends if have_mujoco]
    # Two at a time: the trials are mostly imports, and a small machine has two cores.
    with ThreadPoolExecutor(max_workers=2) as pool:
        results = dict(zip(trials, pool.map(lambda t: _try_apart(t, timeout), trials), strict=True))
    checks = [*_packages(), *_machine(), *_torch(results["torch"]), *_accelerate(results["accelerate"]),
              _video(results["video"])]
    if have_mujoco:
        checks += _renderers({b: results[f"render-{b}"] for b in backends})
    else:
        checks.append(Check("renderer", "mujoco", WARN, "not installed: no simulator on this machine",
                            "pip install 'tendon-vla[sim]'"))
    return checks


# --- read off --------------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _parts(version: str) -> tuple[int, ...]:
    """`2.10.1+cpu` -> (2, 10, 1). Enough to compare with a floor; no pre-release subtleties."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _packages() -> list[Check]:
    tendon = _version("tendon-vla")
    checks = [
        Check("software", "python", OK if sys.version_info >= (3, 11) else FAIL, platform.python_version(),
              "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer, then: make setup"),
        Check("software", "tendon-vla", OK if tendon else WARN, tendon or "not installed (running from a checkout)",
              "" if tendon else "make setup"),
    ]
    for package, floor in REQUIRED.items():
        version = _version(package)
        if version is None:
            checks.append(Check("software", package, FAIL, "not installed", "pip install tendon-vla"))
        elif _parts(version) < _parts(floor):
            checks.append(Check("software", package, FAIL, f"{version}, older than {floor}",
                                f"pip install '{package}>={floor}'"))
        else:
            checks.append(Check("software", package, OK, version))
    for package, extra in OPTIONAL.items():
        version = _version(package)
        checks.append(Check("software", package, OK, version or f"not installed (extra {extra!r})"))
    return [*checks, _robosuite()]


def _robosuite() -> Check:
    """The one package that lives in another environment, read off there."""
    from vla.sims.remote import ROBOSUITE

    python = ROBOSUITE.python()
    if python is None:
        return Check("software", "robosuite", OK, f"not installed ({ROBOSUITE.fix})")
    code = "from importlib.metadata import version as v; print(v('robosuite'), v('numpy'), v('tendon-vla'))"
    try:
        done = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("software", "robosuite", WARN, f"{python} does not start: {error}", ROBOSUITE.fix)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no word"]
        return Check("software", "robosuite", WARN, f"{python}: {said[-1]}", ROBOSUITE.fix)
    version, numpy, tendon = done.stdout.split()
    return Check("software", "robosuite", OK, f"{version}, numpy {numpy}, tendon-vla {tendon} in {python.parents[1].name}")


def _machine() -> list[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    text = f"{cores} usable, OMP_NUM_THREADS={threads or 'not set'}"
    crowded = threads.isdigit() and int(threads) > cores
    checks = [Check("machine", "cores", WARN if crowded else OK, text,
                    f"export OMP_NUM_THREADS={max(1, cores // 2)}" if crowded else "")]
    memory = _memory()
    if memory is not None:
        total, free = memory
        low = free < 4 * GIB
        checks.append(Check("machine", "memory", WARN if low else OK,
                            f"{free / GIB:.1f} of {total / GIB:.1f} GiB free",
                            "close other programs, or train with a smaller batch" if low else ""))
    free = shutil.disk_usage(Path.cwd()).free
    status = FAIL if free < 1 * GIB else WARN if free < 10 * GIB else OK
    checks.append(Check("machine", "disk here", status, f"{free / GIB:.1f} GiB free",
                        "" if status == OK else "free some space, or work in a folder on another disk"))
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").free
        low = shared < GIB // 4
        checks.append(Check("machine", "shared memory", WARN if low else OK, f"{shared / GIB:.1f} GiB free",
                            "docker run --shm-size=2g, or train with loader workers 0" if low else ""))
    return checks


def _memory() -> tuple[int, int] | None:
    """(total, free) bytes, the container's limit counted in; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        try:
            page = os.sysconf("SC_PAGE_SIZE")
            return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
        except (ValueError, OSError):
            return None
    info = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
    total, free = info["MemTotal"], info["MemAvailable"]
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists():
        limit = (group / "memory.max").read_text().strip()
        if limit.isdigit() and int(limit) < total:
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # that cache gives way
            total, free = int(limit), min(free, int(limit) - used)
    return total, free


# --- tried, each in its own process ----------------------------------------------------------------------------------


def _try_torch() -> dict[str, Any]:
    import time

    import torch
    import torchvision  # noqa: F401  its operators refuse a torch they were not built for

    _ = torch.ops.torchvision.nms
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        devices.append({"name": p.name, "free": free, "total": total, "bf16": torch.cuda.is_bf16_supported(False)})
    side, seconds = 768, {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(side, side, dtype=dtype)
        torch.mm(a, a)  # first call: threads start, kernels are chosen
        start = time.perf_counter()
        for _i in range(5):
            torch.mm(a, a)
        seconds[str(dtype)] = (time.perf_counter() - start) / 5
    return {"cuda": devices, "built_for_cuda": torch.version.cuda, "mps": torch.backends.mps.is_available(),
            "cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
            "bf16_speedup": seconds["torch.float32"] / seconds["torch.bfloat16"]}


def _try_accelerate() -> dict[str, Any]:
    from accelerate import PartialState
    from accelerate.commands.config.config_args import default_config_file

    state = PartialState()
    return {"device": str(state.device), "processes": state.num_processes, "type": state.distributed_type.name,
            "config": Path(default_config_file).exists()}


def _try_video() -> dict[str, Any]:
    """Encode 12 frames in memory, decode them, compare: the whole road a recorded episode takes."""
    import io

    import av
    import numpy as np
    from av.error import FFmpegError

    ramp = np.linspace(0, 200, 64, dtype=np.uint8)
    frames = np.stack([np.broadcast_to(ramp[None, :, None] + 4 * i, (64, 64, 3)) for i in range(12)])
    works = []
    for codec in ("libx264", "libsvtav1"):
        try:
            buffer = io.BytesIO()
            with av.open(buffer, "w", format="mp4") as out:
                stream: Any = out.add_stream(codec, rate=10)
                stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
                for frame in frames:
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
                out.mux(stream.encode())
            buffer.seek(0)
            source: Any = av.open(buffer, "r")
            with source:
                back = np.stack([f.to_ndarray(format="rgb24") for f in source.decode(video=0)])
            if back.shape == frames.shape and np.abs(back.astype(int) - frames).mean() < 8:
                works.append(codec)
        except (FFmpegError, ValueError):
            continue  # counted by its absence from `works`
    return {"codecs": works}


def _try_render() -> dict[str, Any]:
    import time

    mujoco: Any = importlib.import_module("mujoco")  # a native module without type stubs
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><worldbody><light pos="0 0 2"/><geom type="box" size=".3 .3 .3" rgba="1 0 0 1"/>'
        '<camera name="c" pos="0 -2 0" xyaxes="1 0 0 0 0 1"/></worldbody></mujoco>'
    )
    model.vis.quality.offsamples = 0
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = mujoco.Renderer(model, 64, 64)
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0  # as our simulators do: 13 to 19 times as fast
    renderer.update_scene(data, "c")
    red = renderer.render()[32, 32].tolist()
    start = time.perf_counter()
    for _ in range(20):
        renderer.render()
    fps = 20 / (time.perf_counter() - start)
    renderer.close()
    return {"red": red, "fps": fps}


_TRIALS = {"torch": _try_torch, "accelerate": _try_accelerate, "video": _try_video, "render": _try_render}


def _try_apart(trial: str, timeout: float) -> dict[str, Any]:
    """The trial's answer, or `{"error": last line it said}`. `render-egl` is the trial `render` under MUJOCO_GL=egl."""
    name, _, backend = trial.partition("-")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *_pythonpath()])}
    if backend and backend != "native":
        env |= {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    else:
        env.pop("MUJOCO_GL", None)
    try:
        done = subprocess.run([sys.executable, "-m", "vla.doctor", name], env=env, capture_output=True, text=True,
                              timeout=timeout, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout:.0f} s"}
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and answers:
        return json.loads(answers[-1])
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {"error": said[-1][:200] if said else f"the process ended with {done.returncode}"}


def _pythonpath() -> list[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


# --- judged ----------------------------------------------------------------------------------------------------------


def _torch(got: dict[str, Any]) -> list[Check]:
    if "error" in got:
        packages = "torch torchvision" if "torchvision" in got["error"] else "torch"
        return [Check("devices", "torch", FAIL, got["error"], f"pip install -U {packages}")]
    checks = []
    for index, gpu in enumerate(got["cuda"]):
        bf16 = "bf16" if gpu["bf16"] else "no bf16"
        found = f"{gpu['name']}, {gpu['free'] / GIB:.0f} of {gpu['total'] / GIB:.0f} GiB free, {bf16}"
        checks.append(Check("devices", f"cuda:{index}", OK, found))
    if not got["cuda"]:
        driver = shutil.which("nvidia-smi") is not None
        found = "an NVIDIA driver is here, but torch sees no device" if driver else "none"
        why = f"torch is built for CUDA {got['built_for_cuda']}: update the driver or install that torch's match"
        checks.append(Check("devices", "cuda", WARN if driver else OK, found, why if driver else ""))
    if got["mps"]:
        checks.append(Check("devices", "mps", OK, "Apple GPU"))
    faster = got["bf16_speedup"]
    advice = "" if faster > 1.2 else ": train in fp32 here"
    checks.append(Check("devices", "cpu", OK, f"{got['cpu']}, {got['threads']} torch threads, "
                        f"bf16 matmul {faster:.1f} x as fast as fp32{advice}"))
    return checks


def _accelerate(got: dict[str, Any]) -> list[Check]:
    if "error" in got:
        return [Check("devices", "accelerate", FAIL, got["error"], "pip install -U accelerate")]
    config = "accelerate's default config file" if got["config"] else "no accelerate config file, its defaults"
    return [Check("devices", "accelerate", OK, f"trains on {got['device']}; {config}")]


def _video(got: dict[str, Any]) -> Check:
    fix = "pip install --force-reinstall av"
    if "error" in got:
        return Check("video", "PyAV", FAIL, got["error"], fix)
    if "libx264" not in got["codecs"]:
        return Check("video", "PyAV", FAIL, f"H.264 does not survive the round trip (works: {got['codecs']})", fix)
    return Check("video", "PyAV", OK, "encodes and decodes " + ", ".join(got["codecs"]))


def _renderers(got: dict[str, dict[str, Any]]) -> list[Check]:
    fixes = {"egl": "apt-get install -y libegl1 libgl1-mesa-dri", "osmesa": "apt-get install -y libosmesa6",
             "native": "run vla doctor in a logged-in desktop session"}
    works = {b: "error" not in g and g["red"][0] > 2 * g["red"][2] for b, g in got.items()}
    checks = []
    for backend, g in got.items():
        if works[backend]:
            checks.append(Check("renderer", backend, OK, f"{g['fps']:.0f} frames/s, 64 pixels"))
        else:
            # One renderer is enough: a second that is missing is worth a word, not a failure.
            found = g.get("error") or f"renders the wrong picture (centre pixel {g['red']})"
            checks.append(Check("renderer", backend, WARN if any(works.values()) else FAIL, found,
                                fixes[backend]))
    chosen = os.environ.get("MUJOCO_GL", "")
    if chosen in works and not works[chosen] and any(works.values()):
        other = next(b for b, good in works.items() if good)
        checks.append(Check("renderer", "MUJOCO_GL", FAIL, f"{chosen}, which does not render here",
                            f"export MUJOCO_GL={other}"))
    return checks


# --- the verb --------------------------------------------------------------------------------------------------------


def add_doctor_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the verb `doctor` to the command line's subparsers."""
    parser = subparsers.add_parser(
        "doctor", help="look at this machine: versions, devices, disk, video, renderer",
        description=(__doc__ or "").split("\n")[0], epilog="example: vla doctor --json > machine.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the table; return 0, or 5 when something the core needs does not work."""
    checks = diagnose()
    failed = [c for c in checks if c.status == FAIL]
    if args.json:
        print(json.dumps({"ok": not failed, "checks": [asdict(c) for c in checks]}, indent=2))
    else:
        print(table(checks))
    return 5 if failed else 0


def table(checks: list[Check]) -> str:
    """The checks as text: one line each, the fix below what needs one, a count at the end."""
    lines, group = [], ""
    for check in checks:
        if check.group != group:
            group = check.group
            lines.append(f"\n{group}" if lines else group)
        mark = {OK: "ok  ", WARN: "warn", FAIL: "FAIL"}[check.status]
        lines.append(f"  {mark}  {check.name:<14} {check.found}")
        if check.fix:
            lines.append(f"        {'':<14} fix: {check.fix}")
    count = {s: sum(c.status == s for c in checks) for s in (OK, WARN, FAIL)}
    return "\n".join([*lines, "", f"{count[OK]} ok, {count[WARN]} warnings, {count[FAIL]} failures"])


if __name__ == "__main__":
    print(json.dumps(_TRIALS[sys.argv[1]]()))
