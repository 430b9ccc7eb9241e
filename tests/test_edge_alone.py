"""The promise to a robot, kept for real: a bare environment, the folder's own requirements, the wheel without its own."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from edge_folder import look, write_edge_folder

from serve.edge import EdgePolicy

ACTS = """
import importlib.util, json, sys
import numpy as np
from serve.edge import EdgePolicy
seen = np.load(sys.argv[2])
observation = {"images": {c: seen[c] for c in ("front", "wrist")}, "state": seen["state"]}
actions = EdgePolicy.load(sys.argv[1]).act(observation, "do thing 1").actions
there = [m for m in ("torch", "pydantic", "transformers", "gymnasium", "pyarrow") if importlib.util.find_spec(m)]
print(json.dumps({"actions": actions.tolist(), "there": there, "from": sys.modules["serve"].__file__}))
"""


@pytest.mark.slow
def test_a_bare_environment_acts(checkout: Path, tmp_path: Path):
    import numpy as np

    folder, seen = write_edge_folder(tmp_path / "export"), look()
    np.savez(tmp_path / "seen.npz", **seen["images"], state=seen["state"])
    wheels = tmp_path / "wheels"
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)], cwd=checkout, check=True,
                   capture_output=True)  # fmt: skip
    venv.create(tmp_path / "bare", with_pip=True)
    python = str(tmp_path / "bare" / "bin" / "python")

    def pip(*words: str) -> subprocess.CompletedProcess[str]:
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    done = pip("--retries", "1", "-r", str(folder / "requirements.txt"))
    if done.returncode and any(sign in done.stderr for sign in ("No matching distribution", "onnection", "resolve", "SSLError")):
        pytest.skip("no package registry can be reached")
    assert done.returncode == 0, done.stderr
    done = pip("--no-deps", str(next(wheels.glob("*.whl"))))
    assert done.returncode == 0, done.stderr
    (tmp_path / "acts.py").write_text(ACTS)
    done = subprocess.run([python, "-I", str(tmp_path / "acts.py"), str(folder), str(tmp_path / "seen.npz")], capture_output=True,
                          text=True, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["there"] == [] and str(tmp_path) in said["from"]
    assert said["actions"] == EdgePolicy.load(folder).act(seen, "do thing 1").actions.tolist()
    command = str(tmp_path / "bare" / "bin" / "vla-edge")
    done = subprocess.run([command, "check", str(folder), "--runs", "3"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "5 files" in done.stdout, done.stderr
    done = subprocess.run([command, "run", str(folder), "--sim", "tabletop"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 5 and "pip install 'tendon-vla[sim]'" in done.stderr
