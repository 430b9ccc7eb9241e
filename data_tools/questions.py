"""`vla data questions`: pictures of simulated scenes with questions and their answers, for co-training.

A few hundred robot sentences teach a model which pictures go with which motion, not what the words in them mean. These pairs do:
the same scenes a robot is recorded in, asked about colours, places and distances, answered from the simulator's own state (RT-2's
co-fine-tuning, Brohan et al. 2023, with rendered instead of web data). The file is LLaVA's JSON, as `mixture.answers` reads it.

Sides are the robot's, as in its instructions: left is its left (+y), away is +x. Two things closer than 2 cm in what is asked
about are not asked about.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vla.durable import replace_file
from vla.errors import UsageError
from vla.sims.suites import expand_tasks

CLEAR = 0.02
"""Metres by which the answer must hold."""
_SIDES = {"left": (1, 1), "right": (1, -1), "away": (0, 1), "near": (0, -1)}
"""Side -> (axis, sign) in the robot's frame."""


def add_questions_parser(jobs: Any) -> None:
    parser = jobs.add_parser(
        "questions", help="render scenes with questions and answers about them", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: vla data questions --scenes 2000 --seed 0 --out data/questions\n"
        "then, in a training config:  mixture: {answers: {path: data/questions/questions.json, share: 0.1}}",
    )  # fmt: skip
    parser.add_argument("--scenes", type=int, required=True, metavar="N", help="pictures to draw")
    parser.add_argument("--task", nargs="+", metavar="T", help="demonstrations the moments are taken from (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="first scene (default 0)")
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="picture side in pixels (default 64)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for questions.json and pictures/")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON, no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the pairs of `args.scenes` scenes; the same command writes the same bytes."""
    if args.scenes < 1:
        raise UsageError("--scenes", found=args.scenes, expected="at least 1", fix="--scenes 2000")
    out, tasks = Path(args.out), expand_tasks("tabletop", args.task)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    entries, pairs = [], 0
    for seed in tqdm(range(args.seed, args.seed + args.scenes), unit="scene", disable=args.json):
        picture, cubes, hand = draw(seed, args.size, tasks)
        name = f"pictures/{seed:08d}.png"
        Image.fromarray(picture).save(out / name)
        asked = questions(cubes, hand, np.random.default_rng([seed, 2]))
        turns = [turn for question, answer in asked
                 for turn in ({"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer})]  # fmt: skip
        entries.append({"id": f"tabletop-{seed}", "image": name, "conversations": turns})
        pairs += len(asked)
    replace_file(out / "questions.json", json.dumps(entries, indent=0))
    summary = {"path": str(out / "questions.json"), "scenes": args.scenes, "questions": pairs}
    print(json.dumps(summary) if args.json else f"{pairs} questions about {args.scenes} scenes: {out / 'questions.json'}")
    return 0


def draw(seed: int, size: int, tasks: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """A moment of scene `seed`, some steps into a demonstration of one of `tasks`.

    Picture (size, size, 3) uint8, cube and hand places (3,) in metres."""
    from vla.sims import make_sim

    rng = np.random.default_rng([seed, 1])
    sim: Any = make_sim("tabletop", str(rng.choice(tasks)), image_size=size)
    observation, _ = sim.reset(seed=seed)
    for _ in range(int(rng.integers(0, 12))):
        observation, _, terminated, truncated, _ = sim.step(sim.expert())
        if terminated or truncated:
            break
    hand, cubes = sim.places()
    return observation["images"]["front"], cubes, hand


def questions(cubes: dict[str, np.ndarray], hand: np.ndarray, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Two to seven (question, answer) pairs, every one true by at least `CLEAR`."""
    pairs: list[tuple[str, str]] = []
    names = list(cubes)
    side, (axis, sign) = list(_SIDES.items())[rng.integers(4)]
    order = sorted(names, key=lambda name: -sign * cubes[name][axis])
    if abs(cubes[order[0]][axis] - cubes[order[1]][axis]) > CLEAR:
        pairs.append((f"which cube is furthest {side}?", f"the {order[0]} cube"))
    one, other = (names[i] for i in rng.choice(len(names), 2, replace=False))
    gap = cubes[one] - cubes[other]
    axis = int(rng.integers(2))
    if abs(gap[axis]) > CLEAR:
        word = next(side for side, (a, s) in _SIDES.items() if a == axis and s == np.sign(gap[axis]))
        pairs.append((f"where is the {one} cube, seen from the {other} cube?", word))
        claim = word if rng.random() < 0.5 else next(s for s, (a, _) in _SIDES.items() if a == axis and s != word)
        pairs.append((f"is the {one} cube {claim} of the {other} cube?", "yes" if claim == word else "no"))
    distances = {name: float(np.linalg.norm(place[:2] - hand[:2])) for name, place in cubes.items()}
    near = sorted(names, key=distances.__getitem__)
    if distances[near[1]] - distances[near[0]] > CLEAR:
        pairs.append(("which cube is nearest the hand?", f"the {near[0]} cube"))
    way = cubes[one] - hand
    if abs(way[1]) > CLEAR:
        pairs.append((f"which way is the {one} cube from the hand?", "left" if way[1] > 0 else "right"))
    if abs(way[0]) > CLEAR:
        pairs.append((f"is the {one} cube nearer to the robot than the hand?", "yes" if way[0] < 0 else "no"))
    column = "left" if cubes[one][1] > 0.05 else "right" if cubes[one][1] < -0.05 else "middle"
    if min(abs(abs(cubes[one][1]) - 0.05), 1) > CLEAR / 2:
        pairs.append((f"where on the table is the {one} cube?", column))
    return pairs

