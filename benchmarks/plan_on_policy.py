"""Questions about what a policy sees when it acts itself: is it finished, and what comes next, answered by the simulator.

    python benchmarks/plan_on_policy.py runs/planner/policy --beside data/long-plans.json --out data/long-seen.json
    vla train configs/train/planner_seen.yaml

Demonstrations show how a subtask looks while an expert does it, and for a frame or two when it is done. A policy slow to be
told so goes on beyond that, and stops short of it where the expert did not. Here the policy acts on `tabletop-long` under the
simulator's own plan, is told that it is finished up to three looks late, and every look becomes two questions, in the words and
the form of `vla data plan-pairs`. The same command writes the same questions.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm
from two_speeds import SUITE, Bench, Row, load

from serve.planner import Planner, ScriptedPlanner
from serve.progress import Progress, Told
from serve.station_sim import World
from vla.durable import replace_file
from vla.errors import UsageError
from vla.prompt import DONE, clean_instruction, plan_prompt, progress_prompt
from vla.sims.tabletop_goals import GOALS


class Noting:
    """A judge that always knows, says so late, and writes down what was to be seen."""

    def __init__(self, world: World, rng: np.random.Generator) -> None:
        self._world, self._rng = world, rng
        self._before, self._instruction, self._patience = 0, "", 0
        self._memory: list[str] = []
        self.noted: list[tuple[np.ndarray, str, list[str], bool, str]] = []
        """(picture, instruction, done before it, whether it is finished, what comes next)."""

    def begin(self, instruction: str, now: float) -> None:
        self._before, self._memory, self._instruction = self._world.done, list(self._world.reached), instruction
        self._patience = int(self._rng.integers(0, 4))

    def saw(self, observation: Mapping[str, Any], chunk: Any, now: float) -> Told:
        done = self._world.done > self._before
        following = self._world.left[0] if self._world.left else DONE
        picture = np.array(next(iter(observation["images"].values())))
        self.noted.append((picture, self._instruction, self._memory, done, following if done else self._instruction))
        self._patience -= done
        return Told(done=float(self._patience < 0))


class Watched(Bench):
    """The bench, with somebody who writes down."""

    noting: Noting

    def watched(self, world: World, rng: np.random.Generator) -> Noting:
        """One episode."""
        self.noting = Noting(world, rng)
        self.play(Row("student" if "student" in self.policies else "vla", "script", 0.0), world, False)
        return self.noting

    def _planner(self, row: Row, world: World, realtime: bool) -> tuple[Planner, Progress]:
        return ScriptedPlanner(world.plan), self.noting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="a policy folder")
    parser.add_argument("--export", type=Path, help="the student that acts instead: an export folder")
    parser.add_argument("--execute", type=int, help="steps of a chunk played before the next look (default: the policy's)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="pictures go to a folder beside it")
    parser.add_argument("--beside", type=Path, metavar="FILE.json", help="questions of the same folder that go into it as well")
    parser.add_argument("--times", type=int, default=4, help="how often its own stand in the file (default %(default)s)")
    parser.add_argument("--episodes", type=int, default=400, help="goals in turn (default %(default)s)")
    parser.add_argument("--seed", type=int, default=200_000, help="of the first scene (default %(default)s)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.expert, args.flat = False, None
    policies, robot = load(args)
    bench, rng = Watched(policies, robot, args.execute, {}), np.random.default_rng(args.seed)
    before = [] if args.beside is None else json.loads(args.beside.read_text())
    goals, folder = list(GOALS), args.out.with_name(f"{args.out.stem}-pictures")
    if folder.exists() or args.out.exists():
        raise UsageError("--out", found=f"{args.out} or {folder}, which is there", expected="a new file", fix="another name")
    folder.mkdir(parents=True)
    entries, answers = [], Counter[str]()
    for n in tqdm(range(args.episodes), unit="ep"):
        goal = goals[n % len(goals)]
        noted = bench.watched(bench.world(goal, args.seed + n), rng).noted
        for k, (picture, instruction, memory, done, following) in enumerate(noted):
            name = f"{folder.name}/s{args.seed + n}-{k:03d}.png"
            Image.fromarray(picture).save(args.out.parent / name)
            told = plan_prompt(clean_instruction(GOALS[goal].sentence), [*memory, instruction] if done else memory, instruction)
            pairs = [(progress_prompt(instruction), "yes" if done else "no"), (told, following)]
            turns = [turn for question, answer in pairs for turn in (
                {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer})]  # fmt: skip
            answers.update(answer for _, answer in pairs)
            entries.append({"id": f"{SUITE}-{goal}-{args.seed + n}-{k}", "image": name, "episode": n, "frame": k,
                            "kind": "seen", "conversations": turns})  # fmt: skip
    replace_file(args.out, json.dumps([*before, *entries * args.times], indent=0))
    print(f"{args.out}: {2 * len(entries)} questions about {len(entries)} looks of {args.episodes} episodes; {dict(answers)}")


if __name__ == "__main__":
    main()
