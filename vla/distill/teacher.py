"""A teacher, or several as one: what it says of a window, on any codec and in any order of speaking.

Any `VLAPolicy` can teach. One that says a chunk at once is asked once; one that speaks symbol by symbol follows its own
likeliest ones (sequence-level distillation, Kim and Rush 2016), for a student that speaks at once cannot know what the history
in a demonstration would have told it. The opinions of several are averaged: as probabilities where they share a codec, otherwise
as expected actions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla.actions import is_sequence
from vla.batch import Batch
from vla.errors import UsageError
from vla.policy import VLAPolicy
from vla.policy.decoding import greedy_logits
from vla.prompt import act_prompt
from vla.schema import Window


@dataclass(frozen=True)
class Said:
    """Of B windows of one robot of `a` dimensions."""

    likely: np.ndarray  # (B, H, a, k) int64
    p: np.ndarray  # (B, H, a, k) float32
    actions: np.ndarray  # (B, n, a) float32: expected, in robot units, at the robot's rate
    pictures: np.ndarray  # (B, e) float32: mean hidden state over the pictures' tokens; e is 0 when not asked for


class Teacher:
    """`policies` act as one. Raises `UsageError` when they cannot."""

    def __init__(self, policies: Sequence[VLAPolicy]) -> None:
        self.policies = [policy.eval().requires_grad_(False) for policy in policies]
        self.first = first = self.policies[0]
        other = [p for p in self.policies[1:] if meaning(p) != meaning(first)]
        self.fingerprint = _together([p.fingerprint for p in self.policies])
        self.has_symbols = not other and not is_sequence(first.codec) and all(p.l1_head is None for p in self.policies)
        if different := [p for p in other if (p.chunk, p.config.chunk_seconds) != (first.chunk, first.config.chunk_seconds)]:
            raise UsageError("teacher.policy", found=f"chunks of {sorted({p.chunk for p in [first, *different]})} steps",
                             expected="teachers that look equally far ahead", fix="distil from one of them")  # fmt: skip

    def to(self, device: torch.device) -> Teacher:
        for policy in self.policies:
            policy.to(device)
        return self

    def knows(self, robot: str, needed_by: str) -> None:
        """Raise `UsageError` when the robot was never taught to it."""
        for policy in self.policies:
            if robot not in policy.embodiments:
                raise UsageError(needed_by, found=f"robot {robot!r}",
                                 expected=f"robots of the teacher: {sorted(policy.embodiments)}",
                                 fix="leave the dataset out, or fine-tune the teacher on it first")  # fmt: skip

    @torch.inference_mode()
    def say(self, windows: Sequence[Window], top: int, pictures: bool, autocast: AbstractContextManager[Any]) -> Said:
        """Of windows of one robot. `top` symbols are kept where it has symbols to share."""
        robot = windows[0].embodiment
        a = self.first.embodiments[robot].action_dim
        seen = [{"images": w.images, "state": w.state} for w in windows]
        told = [w.instruction for w in windows]
        with autocast:
            if not self.has_symbols:
                chunks = [policy.act_batch(seen, told, robot) for policy in self.policies]
                actions = np.mean([[c.actions for c in row] for row in chunks], axis=0).astype(np.float32)
                empty = np.zeros((len(windows), self.first.chunk, a, 0))
                likely, p = empty.astype(np.int64), empty.astype(np.float32)
            else:
                p, likely, actions = self._symbols(seen, told, robot, a, top)
            shown = self._pictures(seen, told, robot) if pictures else np.zeros((len(windows), 0), np.float32)
        return Said(likely, p, actions, shown)

    def _symbols(self, seen: list, told: list[str], robot: str, a: int, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        total: Tensor | float = 0.0
        for policy in self.policies:
            batch = _batch(policy, seen, told, robot)
            logits = policy.action_logits(batch) if policy.config.decoding == "parallel" else greedy_logits(policy, batch, a)
            B, H = len(batch), policy.chunk
            total = total + logits.float().softmax(-1).view(B, H, -1, logits.shape[-1])[:, :, :a] / len(self.policies)
        assert isinstance(total, Tensor)
        unit = (total * self.first.centres).sum(-1).cpu().numpy()  # no matrix product: autocast would round it
        p, likely = total.topk(min(top, total.shape[-1]), dim=-1)
        return p.cpu().numpy(), likely.cpu().numpy(), self.first.normalizers[robot]["action"].from_unit(unit)

    def _pictures(self, seen: list, told: list[str], robot: str) -> np.ndarray:
        """Mean hidden state over the tokens of the pictures, of the first teacher."""
        policy = self.first
        batch = _batch(policy, seen, told, robot)
        output = policy.output(batch)
        if policy.config.backbone.kind == "student":
            return output.seen.float().cpu().numpy()
        at = (batch.ids == policy.writer.ids.image)[..., None]
        hidden = output.last_hidden_state[:, : batch.ids.shape[1]].float()
        return ((hidden * at).sum(1) / at.sum(1).clamp(min=1)).cpu().numpy()

    @torch.inference_mode()
    def instruction(self, text: str, robot: str) -> np.ndarray:
        """(e,) float32: how the first teacher understands a sentence: the mean hidden state over its words, no picture shown."""
        policy = self.first
        ids = torch.tensor([policy.writer.words(act_prompt(text, policy.config.prompt, robot))], device=policy.device)
        if policy.config.backbone.kind == "student":
            return policy.model.text(ids, torch.ones_like(ids, dtype=torch.bool))[0].float().cpu().numpy()
        return policy.model.hidden(ids).last_hidden_state[0].float().mean(0).cpu().numpy()


def _together(fingerprints: list[str]) -> str:
    return fingerprints[0] if len(fingerprints) == 1 else hashlib.sha256("".join(fingerprints).encode()).hexdigest()


def _batch(policy: VLAPolicy, seen: list, told: list[str], robot: str) -> Batch:
    return policy.collate([policy.encoder.observation(o, i, robot) for o, i in zip(seen, told, strict=True)]).to(policy.device)


def meaning(policy: VLAPolicy) -> dict:
    """What must be equal for two policies' symbols to mean the same."""
    return {"codec": policy.codec.to_json(), "chunk": policy.chunk, "seconds": policy.config.chunk_seconds,
            "normalizers": {k: v["action"].to_json() for k, v in policy.normalizers.items()}}  # fmt: skip
