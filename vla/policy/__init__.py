"""A policy: an observation and an instruction in, a chunk of actions in robot units out.

    policy = load_policy("runs/demo")
    chunk = policy.act({"images": {"front": frame}, "state": state}, "push the red cube left", "tabletop")

`config` says what a policy is made of, `build` makes a fresh one, `model` is the thing itself, `choose` turns probabilities
into numbers, `folder` saves and loads, `sharing` keeps several adapters over one base, `protocol` is what teachers, students
and servers share.
"""

from vla.policy.adapters import AdapterConfig
from vla.policy.build import build_policy, extend_policy
from vla.policy.config import Decode, PolicyConfig
from vla.policy.folder import load_policy, read_policy, save_policy
from vla.policy.model import VLAPolicy
from vla.policy.protocol import Chunk, Loss, Policy
from vla.policy.sharing import Adapters

__all__ = [
    "AdapterConfig", "Adapters", "Chunk", "Decode", "Loss", "Policy", "PolicyConfig", "VLAPolicy", "build_policy",
    "extend_policy", "load_policy", "read_policy", "save_policy",
]  # fmt: skip
