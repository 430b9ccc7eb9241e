"""`vla data plan-pairs`: questions for a planner with their answers, out of recorded episodes whose subtasks are named.

At several moments of every subtask the picture is asked two things, in the words of `vla/prompt.py`: what is to be done next,
given the goal, what was done and the last instruction (answer: the next instruction, or `done`); and whether the instruction that
is followed is finished (yes, no). The moments:

- begun: a few frames into a subtask; midway; late. What is under way goes on.
- just after: the first frame at which the one before is finished. Asked twice, with a memory that knows it and with one that does
  not yet: then the picture must say it.
- the end: all is done.

Training and held-out episodes go to two files; the same episodes are held out as `vla train` holds out. The file is LLaVA's JSON,
as `mixture.answers` reads it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vla.durable import check_place, replace_file
from vla.episodes import EpisodeStore
from vla.errors import DataError, UsageError
from vla.mixture import MixtureConfig, split_episodes
from vla.prompt import DONE, PLAN_PROMPTS, PLAN_VERSION, PROGRESS_PROMPTS, PROGRESS_VERSION, plan_prompt, progress_prompt

HELD_OUT = "-heldout"
"""Added to the name of the file for the episodes held out."""
_BEGUN = 3
"""Frames into a subtask after which it is called begun: the hand has left what was before."""


@dataclass(frozen=True)
class Moment:
    """One picture, and what is asked about it."""

    frame: int
    """In its episode."""
    kind: str
    """`begun`, `midway`, `late`, `after`, `end`."""
    pairs: tuple[tuple[str, str], ...]


def moments(
    goal: str, starts: list[int], subtasks: list[str], length: int, *, plan: str = PLAN_VERSION, progress: str = PROGRESS_VERSION
) -> Iterator[Moment]:
    """Of an episode of `length` frames whose subtask n begins at frame `starts[n]`; a last one called `DONE` is the end.

    Nothing is asked that the picture and the words of the question cannot tell: not whether a touch has just begun that repeats
    the one before, nor about the last subtask where no frame comes after it.
    """
    for n, (start, subtask) in enumerate(zip(starts, subtasks, strict=True)):
        stop = starts[n + 1] if n + 1 < len(starts) else length
        before, last = subtasks[:n], subtasks[n - 1] if n else ""
        over, again = subtask == DONE, subtask == last

        def ask(done: list[str], told: str, answer: str = subtask) -> tuple[str, str]:
            return plan_prompt(goal, done, told, plan), answer

        if n:
            finished = (progress_prompt(last, progress), "yes")
            yield Moment(start, "after", (ask(before, last), ask(before[:-1], last), finished))
            if start + 1 < stop:
                yield Moment(start + 1, "after", (ask(before, last), finished))
        if over:
            if stop - 1 > start + 1:
                yield Moment(stop - 1, "end", (ask(before, last),))
            continue
        inside = {"begun": start + (_BEGUN if n else 0), "midway": (start + stop) // 2, "late": (start + 3 * stop) // 4}
        for kind, frame in inside.items():
            if frame >= stop - 1 or (n and frame <= start + 1):
                continue
            pairs = [ask(before, subtask)]
            if kind == "begun" and not n:
                pairs = [ask(before, ""), *pairs]
            if kind == "midway" or not again:
                pairs.append((progress_prompt(subtask, progress), "no"))
            yield Moment(frame, kind, tuple(pairs))


def plan_pairs(
    root: str | Path, out: str | Path, *, holdout: float = MixtureConfig.model_fields["holdout"].default, camera: str = "",
    plan: str = PLAN_VERSION, progress: str = PROGRESS_VERSION, bar: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Write the questions of the dataset `root` to the JSON file `out` and, of the share `holdout` of its episodes, to one beside
    it; pictures go to a folder of its name. The same call writes the same bytes.

    Returns `{"path", "heldout" (or None), "episodes", "heldout_episodes", "pictures", "questions", "kinds" {kind: pictures},
    "answers" {answer: questions}, "plan", "progress"}`. Raises `DataError` for a dataset that names no subtasks, `UsageError`
    for an unknown camera or version, or a file that exists.
    """
    out = Path(out)
    store = EpisodeStore.open(root, frames="video", progress=False).speaking("subtask")
    camera = camera or store.cameras[0]
    wanted = {"--camera": (camera, store.cameras), "--plan": (plan, PLAN_PROMPTS), "--progress": (progress, PROGRESS_PROMPTS)}
    for option, (value, known) in wanted.items():
        if value not in known:
            raise UsageError(option, found=value, expected=f"one of {sorted(known)}", fix="leave it out")
    folder = out.with_name(f"{out.stem}-pictures")
    there = next((path for path in (out, folder) if path.exists()), None)
    if there or out.suffix != ".json":
        raise UsageError("--out", found=f"{there} exists" if there else str(out), expected="a new .json file",
                         fix="choose another name")  # fmt: skip
    check_place(out)
    held = set(split_episodes(store.num_episodes, holdout, "holdout").tolist())
    files: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    kinds: dict[str, int] = {}
    answers: dict[str, int] = {}
    folder.mkdir(parents=True)
    for e in tqdm(range(store.num_episodes), unit="ep", disable=not bar):
        begin, end = (int(edge) for edge in store.episode_starts[e : e + 2])
        mine = np.flatnonzero((store.segment_starts[:-1] >= begin) & (store.segment_starts[:-1] < end))
        mine = [g for g in mine.tolist() if store.subtask_of_segment[g] >= 0]
        starts = [int(store.segment_starts[g]) - begin for g in mine]
        subtasks = [store.subtasks[store.subtask_of_segment[g]] for g in mine]
        goal = store.instructions[store.task_of_episode[e]]
        for moment in moments(goal, starts, subtasks, end - begin, plan=plan, progress=progress):
            name = f"{folder.name}/e{e:06d}-f{moment.frame:05d}.png"
            if not (out.parent / name).exists():
                Image.fromarray(store.frame(camera, begin + moment.frame)).save(out.parent / name)
            turns = [turn for question, answer in moment.pairs for turn in (
                {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer})]  # fmt: skip
            files[e in held].append({"id": f"{store.root.name}-e{e}-f{moment.frame}-{moment.kind}", "image": name, "episode": e,
                                     "frame": moment.frame, "kind": moment.kind, "conversations": turns})  # fmt: skip
            kinds[moment.kind] = kinds.get(moment.kind, 0) + 1
            for _, answer in moment.pairs:
                answers[answer] = answers.get(answer, 0) + 1
    if not files[False]:
        raise DataError(store.root, found="no subtask to ask about in its training episodes", expected="at least one",
                        fix="lower --holdout, or name subtasks: vla data segment")  # fmt: skip
    replace_file(out, json.dumps(files[False], indent=0))
    aside = out.with_name(f"{out.stem}{HELD_OUT}.json") if held else None
    if aside is not None:
        replace_file(aside, json.dumps(files[True], indent=0))
    return {
        "path": str(out), "heldout": str(aside) if aside else None, "episodes": store.num_episodes - len(held),
        "heldout_episodes": len(held), "pictures": sum(kinds.values()), "questions": sum(answers.values()), "kinds": kinds,
        "answers": dict(sorted(answers.items())), "plan": plan, "progress": progress,
    }  # fmt: skip


# ---- the command ----


def add_plan_pairs_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add `plan-pairs` to the `vla data` sub-commands; `run` carries it out."""
    parser = subparsers.add_parser(
        "plan-pairs", help="questions for a planner with their answers, out of episodes with subtasks",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: vla data plan-pairs data/long --out data/long-plans.json\n"
        "then, in a training config:  mixture: {answers: {path: data/long-plans.json, share: 0.2}}",
    )  # fmt: skip
    add = parser.add_argument
    add("root", type=Path, metavar="DATASET", help="a LeRobot v3.0 dataset that names its subtasks (see `vla data segment`)")
    add("--out", type=Path, required=True, metavar="FILE.json", help="a new file; pictures go to a folder beside it")
    add("--holdout", type=float, default=MixtureConfig.model_fields["holdout"].default, metavar="SHARE",
        help="share of the episodes that go to FILE-heldout.json (default %(default)s, the same as in training)")  # fmt: skip
    add("--camera", default="", metavar="NAME", help="whose pictures (default: the robot's first)")
    add("--plan", default=PLAN_VERSION, choices=sorted(PLAN_PROMPTS),
        help="words of the planner's question (default %(default)s)")  # fmt: skip
    add("--progress", default=PROGRESS_VERSION, choices=sorted(PROGRESS_PROMPTS),
        help="words of the question about progress (default %(default)s)")  # fmt: skip
    add("--json", action="store_true", help="print the summary as JSON, no progress bar")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry out `vla data plan-pairs`."""
    if not 0 <= args.holdout < 1:
        raise UsageError("--holdout", found=args.holdout, expected="0 up to, but not, 1", fix="--holdout 0.1")
    summary = plan_pairs(args.root, args.out, holdout=args.holdout, camera=args.camera, plan=args.plan, progress=args.progress,
                         bar=not args.json)  # fmt: skip
    if args.json:
        print(json.dumps(summary))
        return 0
    aside = f"; {summary['heldout_episodes']} held out in {summary['heldout']}" if summary["heldout"] else ""
    print(f"{summary['path']}: {summary['questions']} questions about {summary['pictures']} pictures of {summary['episodes']} "
          f"episodes{aside}")  # fmt: skip
    return 0
