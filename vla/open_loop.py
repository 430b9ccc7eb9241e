"""Open-loop figures: how well a policy repeats held-out demonstrations, per dimension and in robot units."""

from __future__ import annotations

import numpy as np
import torch

from vla.mixture import Mixture
from vla.policy import VLAPolicy
from vla.resample import to_policy_steps


def evaluate_open_loop(policy: VLAPolicy, heldout: Mixture, windows: int) -> dict:
    """Loss, token accuracy and per-dimension L1 in robot units on about `windows` windows spread over held-out episodes."""
    was_training = policy.training
    policy.eval()
    totals, errors = {"action": 0.0, "count": 0, "correct": 0, "end": 0.0, "ends": 0}, {}
    per_dataset = max(1, windows // len(heldout.stores))
    for dataset, size in enumerate(heldout.sizes):
        at = np.unique(np.linspace(0, size - 1, min(per_dataset, size)).astype(int)) if size else []
        chosen = [heldout.window_at(dataset, *heldout.place(dataset, int(i))) for i in at]
        for first in range(0, len(chosen), 64):
            some = chosen[first : first + 64]
            with torch.inference_mode():
                loss = policy.loss(policy.collate([policy.encode(w) for w in some]).to(policy.device))
            totals["action"] += loss.action.item()
            totals["count"] += int(loss.action_count)
            totals["correct"] += int(loss.correct)
            totals["end"] += loss.end.item()
            totals["ends"] += int(loss.end_count)
            seen = [{"images": w.images, "state": w.state} for w in some]
            chunks = policy.act_batch(seen, [w.instruction for w in some], some[0].embodiment)
            for window, chunk in zip(some, chunks, strict=True):
                spec = policy.embodiments[window.embodiment]
                predicted, _ = to_policy_steps(chunk.actions, len(chunk.actions), policy.chunk, spec)
                error = np.where(window.valid, np.abs(predicted - window.actions), np.nan)
                errors.setdefault(window.embodiment, []).append(error)
    policy.train(was_training)
    l1 = {
        robot: dict(zip(policy.embodiments[robot].action_names, np.nanmean(np.concatenate(e), axis=0).tolist(), strict=True))
        for robot, e in errors.items()
    }
    return {"loss": totals["action"] / max(1, totals["count"]), "token_accuracy": totals["correct"] / max(1, totals["count"]),
            "aux": totals["end"] / max(1, totals["ends"]), "l1": l1}  # fmt: skip


def describe(record: dict) -> str:
    """One line for the terminal."""
    l1 = "; ".join(f"{robot} " + " ".join(f"{k} {v:.3f}" for k, v in dims.items()) for robot, dims in record["l1"].items())
    return (f"step {record['step']}: held-out loss {record['loss']:.3f}, aux {record['aux']:.3f}, "
            f"token accuracy {record['token_accuracy']:.2f}, L1 {l1}")  # fmt: skip
