"""How well a policy plans in words: held-out questions of `vla data plan-pairs`, answered by what it holds likeliest.

    python benchmarks/plan_words.py runs/planner/policy data/long-plans-heldout.json [--most 40]

*next*: what is to be done next, among every instruction of the file and `done`. *right* counts the word that was recorded, *fits*
also another subtask of the same open stage of a `tabletop-long` goal, whose order is free and which the picture cannot tell; by
kind of moment. *finished*: yes or no. Intervals are bootstrapped over episodes, since questions of one episode are alike.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vla.prompt import DONE, NOTHING, clean_instruction
from vla.sims.suites import tabletop_instruction
from vla.sims.tabletop_goals import GOALS

_PLAN = re.compile(r"goal: (.*)\. done: (.*)\. last: (.*)\. what next\?")
_GOALS = {clean_instruction(goal.sentence): goal for goal in GOALS.values()}


def fitting(question: str) -> set[str]:
    """The answers that are as good as the one recorded: the open subtasks of the first stage that has any, or `done`."""
    found = _PLAN.fullmatch(question)
    assert found is not None, question
    goal, done, last = found.groups()
    left = Counter([] if done == NOTHING else done.split(", "))
    for stage in _GOALS[goal].stages:
        wanted = Counter(tabletop_instruction(task) for task in stage)
        over = wanted & left
        left -= over
        if rest := wanted - over:
            # What is under way goes on; and where the memory lags behind by the last one, both that and the next are fit.
            return {last} if last in rest else set(rest)
    return {DONE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="a policy folder")
    parser.add_argument("file", type=Path, help="questions held out")
    parser.add_argument("--most", type=int, help="episodes (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from vla.policy import load_policy

    policy: Any = load_policy(args.policy, args.device)
    moments = json.loads(args.file.read_text())
    episodes = sorted({moment["episode"] for moment in moments})[: args.most]
    turns = [(m, *(m["conversations"][i]["value"] for i in (n, n + 1))) for m in moments if m["episode"] in set(episodes)
             for n in range(0, len(m["conversations"]), 2)]  # fmt: skip
    known = sorted({answer for _, _, answer in turns} - {"yes", "no"})
    rows: list[tuple[int, str, bool, bool]] = []
    for moment, asked, answer in tqdm(turns, unit="question", disable=args.json):
        question = asked.removeprefix("<image>\n")
        frame = np.asarray(Image.open(args.file.parent / moment["image"]).convert("RGB"))
        judged = answer in ("yes", "no")
        candidates = ["yes", "no"] if judged else known
        said = candidates[int(np.argmax(np.asarray(policy.score_answers(frame, question, candidates), np.float64)))]
        kind = f"finished: {answer}" if judged else f"next: {moment['kind']}"
        rows.append((moment["episode"], kind, said == answer, said == answer or (not judged and said in fitting(question))))
    kinds = {"next": lambda kind: kind.startswith("next"), "finished": lambda kind: kind.startswith("finished")}
    kinds |= {kind: lambda one, kind=kind: one == kind for kind in sorted({row[1] for row in rows})}
    result = {name: {"n": sum(test(row[1]) for row in rows), "right": _share(rows, test, 2), "fits": _share(rows, test, 3)}
              for name, test in kinds.items()}  # fmt: skip
    if args.json:
        print(json.dumps({"policy": args.policy, "file": str(args.file), "episodes": len(episodes), "rows": result}))
        return
    for name, row in result.items():
        right, fits = ("{:.1%} [{:.1%}, {:.1%}]".format(*row[what]) for what in ("right", "fits"))
        print(f"{name:<18} {row['n']:>6}   right {right}   fits {fits}")


def _share(rows: list[tuple[int, str, bool, bool]], test: Any, column: int) -> list[float]:
    """(share, low, high), 95 %, bootstrapped over episodes."""
    sums: dict[int, list[int]] = {}
    for row in rows:
        if test(row[1]):
            entry = sums.setdefault(row[0], [0, 0])
            entry[0] += bool(row[column])
            entry[1] += 1
    table = np.array(list(sums.values()), np.float64)
    draws = table[np.random.default_rng(0).integers(0, len(table), (2000, len(table)))].sum(1)
    low, high = np.percentile(draws[:, 0] / draws[:, 1], [2.5, 97.5])
    return [float(table[:, 0].sum() / table[:, 1].sum()), float(low), float(high)]


if __name__ == "__main__":
    main()
