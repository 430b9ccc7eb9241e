"""A small nano policy that was taught to plan by the colour of what it sees, in seconds: for tests of planners.

Asked what is next towards `GOAL`, it says `do thing 0` at a red picture, `do thing 1` at a green one and that all is done at a
blue one; asked whether something is finished, it says yes at a blue picture and no at others.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small_datasets import SIZE, write_dataset
from small_policies import BACKBONE

from vla.answers import Answers
from vla.checkpoint import publish
from vla.episodes import EpisodeStore
from vla.mixture import Mixture
from vla.policy import PolicyConfig, VLAPolicy, build_policy, save_policy
from vla.prompt import DONE, plan_prompt, progress_prompt

GOAL = "do all things"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220)}
NEXT = {"red": "do thing 0", "green": "do thing 1", "blue": DONE}


def picture(colour: str) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8, all of it `colour`."""
    return np.full((SIZE, SIZE, 3), COLOURS[colour], np.uint8)


def write_speaking_policy(root: Path, steps: int = 120) -> VLAPolicy:
    """Saves such a policy at `root`/policy; its data lie beside it."""
    write_dataset(root / "data", 3)
    (root / "quiz").mkdir()
    entries = []
    for colour, answer in NEXT.items():
        Image.fromarray(picture(colour)).save(root / "quiz" / f"{colour}.png")
        situations = [((), ""), (("do thing 0",), "do thing 0"), ((), "do thing 0"), (("do thing 0", "do thing 1"), "do thing 1")]
        pairs = [(plan_prompt(GOAL, done, last), answer) for done, last in situations]
        pairs += [(progress_prompt(f"do thing {n}"), "yes" if colour == "blue" else "no") for n in range(2)]
        turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
        entries.append({"id": colour, "image": f"{colour}.png", "conversations": turns})
    (root / "quiz" / "quiz.json").write_text(json.dumps(entries))
    store = EpisodeStore.open(root / "data", root / "cache", progress=False)
    mixture = Mixture([store], [1], 2, seed=0, answers=(Answers(root / "quiz" / "quiz.json"), 0.8))
    torch.manual_seed(0)
    config = {"backbone": BACKBONE, "chunk": 2, "execute": 1, "end_weight": 0.0, "answer_weight": 1.0}
    policy = build_policy(PolicyConfig.model_validate(config), mixture).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    for step in range(steps):
        loss = policy.loss(policy.collate([policy.encode(mixture.window(step * 16 + i)) for i in range(16)]))
        optimizer.zero_grad()
        loss.total(policy.loss_weights, loss.counts).backward()
        optimizer.step()
    policy.eval()
    publish(root / "policy", lambda folder: save_policy(policy, folder))
    return policy
