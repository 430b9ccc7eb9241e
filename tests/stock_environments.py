"""Environments of foreign clients: made once, kept beside the user's other caches, each with nothing of ours in it.

Where a package cannot be fetched the test is skipped and says which.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import pytest

PACKAGES = {
    # typing_extensions: imported by openpi-client 0.1.2, which does not declare it.
    "openpi": (("openpi-client==0.1.2", "typing_extensions"),),
    # What vla-eval's orchestrator and runners import; its benchmarks' video and its command line want another 200 MB.
    "vla_eval": (("--no-deps", "vla-eval==0.8.0"),
                 ("anyio", "lazyregistry", "msgpack", "numpy", "pillow", "pyyaml", "rich", "websockets")),
    "openvla": (("json-numpy==2.1.1", "requests"),),
}  # fmt: skip
"""Name -> what `pip install` is called with, one call after another."""
_UNREACHED = ("No matching distribution", "onnection", "resolve", "SSLError", "Could not find a version")


def python_of(name: str) -> str:
    """The interpreter of environment `name`, made when it is not there; skips where its packages cannot be had."""
    wanted = f"{PACKAGES[name]} {sys.version}"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tendon-vla" / "stock-clients"
    place = root / f"{name}-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    if not place.exists():
        root.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        try:
            _make(fresh, PACKAGES[name])
            fresh.rename(place)  # whole or not at all; who comes second finds the first one's
        except OSError:
            if not place.exists():
                raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return str(place / "bin" / "python")


def _make(folder: Path, calls: tuple[tuple[str, ...], ...]) -> None:
    venv.create(folder, with_pip=False, clear=True)
    python = folder / "bin" / "python"
    for packages in calls:
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check",
                   "--retries", "1", *packages]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=600)
        if done.returncode and (not done.stderr or any(sign in done.stderr for sign in (*_UNREACHED, "No module named pip"))):
            pytest.skip(f"pip cannot install {' '.join(packages)}: {done.stderr.strip().splitlines()[-1:]}")
        assert done.returncode == 0, done.stderr
