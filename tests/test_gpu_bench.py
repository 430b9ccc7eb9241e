"""The GPU benchmark runs whole at tiny sizes, and with the packages missing that a bare machine lacks."""

import json
import subprocess
import sys

BARE = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("datasets", "av", "mujoco", "simplejpeg", "gymnasium", "metaworld", "cv2"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
sys.argv = ["gpu.py", *sys.argv[2:]]
import runpy
runpy.run_path({path!r}, run_name="__main__")
"""


def test_every_section_runs_on_a_bare_machine(tmp_path, checkout):
    out = tmp_path / "gpu.json"
    script = BARE.replace("{path!r}", repr(str(checkout / "benchmarks" / "gpu.py")))
    done = subprocess.run(
        [sys.executable, "-c", script, "-", "--tiny", "--device", "cpu", "--out", str(out)],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert set(found) == {"machine", "probes", "7b", "training", "256m", "500m", "weight-only"}
    assert "datasets" in found["machine"]["gone"]
    assert "error" not in json.dumps({name: part for name, part in found.items() if name != "weight-only"}), done.stdout
    assert found["7b"]["same_tokens"] and found["7b"]["eager7"]["p50"] > 0 and found["7b"]["eager8x7"]["p50"] > 0
    assert found["training"]["gradient checkpointing"]["samples_per_s"] > 0
    assert "| device copy" in done.stdout and "% of the floor" in done.stdout
