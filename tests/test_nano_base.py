"""The pretrained nano backbone in the repository: small, whole, able to act; not in the wheel."""

import tomllib

import numpy as np

from vla.policy import load_policy


def test_nano_base_is_small_whole_and_acts(checkout):
    folder = checkout / "models/nano-base"
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 16 * 2**20
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".md"}
    policy = load_policy(folder, "cpu")
    for key, spec in policy.embodiments.items():
        images = {name: np.full((c.height, c.width, 3), 90, np.uint8) for name, c in spec.cameras.items()}
        chunk = policy.act({"images": images, "state": np.zeros(spec.state_dim, np.float32)}, "lift the cube", key)
        assert chunk.actions.shape == (policy.steps(key)[0], spec.action_dim) and np.isfinite(chunk.actions).all()
    assert not any("lift" in sentence and "cube" in sentence and sentence in policy.instructions
                   for sentence in ("lift the red cube", "lift the green cube"))  # fmt: skip
    wheel = tomllib.loads((checkout / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "models" not in wheel["only-include"]
