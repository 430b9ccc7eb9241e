"""On-policy rounds: the student acts, is relieved where it got to, and learns from what was done there.

    RUN/round-0                 a run of its own: the student from the datasets
    RUN/round-1 ...             a run each, started from the one before, on the datasets and every round's new one
    RUN/data/round-1 ...        what the labeller did from the states the student reached (`vla/takeover.py`)
    RUN/rounds.json             success after each round, the minutes spent so far, and the `rounds:` it was begun with
    RUN/policy                  the best student so far, by success on validation scenes

Each step is resumable by itself, so the whole is. DAgger (Ross et al. 2011) aggregates: nothing collected is dropped.
"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from vla.checkpoint import MANIFEST, publish
from vla.distill.config import DistillConfig, RoundsConfig
from vla.distill.ranks import by_one, say
from vla.durable import replace_file
from vla.embodiment import load_embodiment
from vla.errors import UsageError, VLAError
from vla.evaluate import SimulatorPool, evaluate, same_robot, wilson
from vla.evaluate.curve import CURVE_SEED
from vla.mixture import MixtureConfig
from vla.mixture.config import DatasetConfig
from vla.policy import PolicyConfig, load_policy
from vla.sims import expand_tasks, find_suite
from vla.takeover import collect
from vla.train import StartConfig, check_unchanged, train

if TYPE_CHECKING:
    from vla.distill import Distillation


def play_rounds(config: DistillConfig, teaching: Distillation, resume: bool, allow_change: tuple[str, ...]) -> Path:
    """All rounds; returns the run folder. Raises `VLAError`s, on every process alike."""
    rounds, root = config.rounds, Path(config.run.out)
    assert rounds is not None
    if config.mixture.temperature is not None or config.mixture.named:
        raise UsageError("mixture", found="named: or temperature:", expected="datasets and weights, to which rounds add theirs",
                         fix="list the datasets with their weights")  # fmt: skip
    _check(rounds, teaching)
    if root.exists() and any(root.iterdir()) and not resume:
        raise UsageError(root, found="a run", expected="an empty run folder",
                         fix="add --resume to continue it, or choose another run.out=...")  # fmt: skip
    if (root / "checkpoints").is_dir():
        raise UsageError(root, found="a run without rounds:", expected="a run that began with them",
                         fix="leave rounds: out, or choose another run.out=...")  # fmt: skip
    log = _Log(root, rounds, allow_change)
    try:
        _play(config, teaching, resume, allow_change, log)
    except BaseException:  # the time a training took before it was stopped is spent as well
        if (root / "round-0" / "config.yaml").is_file():
            with suppress(VLAError, OSError):  # a full disk must not hide why the run ended
                log.write()
        raise
    return root


def _play(config: DistillConfig, teaching: Distillation, resume: bool, allow_change: tuple[str, ...], log: _Log) -> None:
    rounds, root = log.rounds, Path(config.run.out)
    with SimulatorPool() as pool:
        for number in range(rounds.rounds + 1):
            data = root / "data" / f"round-{number}"
            if number and log.lacks(number, "collected"):
                log.entry(number)["collected"] = by_one(partial(_collect, teaching, rounds, root, number, data, pool))
                log.write()
            stage = _stage(config, number, root, log)
            out = train(stage, resume or stage_begun(stage), allow_change, teaching)
            if log.lacks(number, "success"):
                found = by_one(lambda out=out: {"success": _measure(rounds, out, pool), "minutes": log.minutes()})
                log.entry(number).update(found)
                log.write()
            say(log.line(number))
            by_one(partial(_keep_best, root, log))
            if stop := log.stop(number):
                say(f"no further round: {stop}")
                break


def _check(rounds: RoundsConfig, teaching: Distillation) -> None:
    """Raise `UsageError` before the first training for what would end the first round after it."""
    expand_tasks(rounds.suite, rounds.tasks)
    last = rounds.seed + rounds.rounds * rounds.episodes - 1
    if last >= CURVE_SEED:
        raise UsageError("rounds.seed", found=f"scenes {rounds.seed} to {last}", expected=f"scenes below {CURVE_SEED}",
                         fix="a lower rounds.seed, or fewer rounds.episodes")  # fmt: skip
    if rounds.labeller == "teacher":
        same_robot(teaching.teacher.first, load_embodiment(find_suite(rounds.suite).embodiment))


def _stage(config: DistillConfig, number: int, root: Path, log: _Log) -> DistillConfig:
    """The training of one round. One in which no takeover was kept adds no data, and the next may."""
    rounds = config.rounds
    assert rounds is not None
    run = config.run.model_copy(update={"out": str(root / f"round-{number}")})
    if number == 0:
        return config.model_copy(update={"run": run, "rounds": None})
    run = run.model_copy(update={"steps": rounds.steps, "save_every": min(run.save_every, rounds.steps)})
    before, full = config.mixture.datasets, [n for n in range(1, number + 1) if log.entry(n)["collected"]["episodes"]]
    weight = sum(d.weight for d in before) * rounds.share / (1 - rounds.share) / max(len(full), 1)
    new = [DatasetConfig(path=str(root / "data" / f"round-{n}"), weight=weight) for n in full]
    mixture = MixtureConfig.model_validate(config.mixture.model_dump() | {"datasets": [d.model_dump() for d in [*before, *new]]})
    lr = rounds.lr or config.optim.lr / 3
    optim = config.optim.model_copy(update={"lr": lr, "warmup": min(config.optim.warmup, rounds.steps // 10)})
    start = StartConfig(policy=str(root / f"round-{number - 1}"))
    return config.model_copy(update={
        "run": run, "rounds": None, "mixture": mixture, "optim": optim, "start": start, "policy": PolicyConfig(), "student": None,
    })  # fmt: skip


def stage_begun(stage: DistillConfig) -> bool:
    return (Path(stage.run.out) / "config.yaml").is_file()


def _collect(teaching: Distillation, rounds: RoundsConfig, root: Path, number: int, out: Path, pool: SimulatorPool) -> dict:
    """One process: what the labeller does where the student of the round before gets to."""
    student = load_policy(root / f"round-{number - 1}")
    labeller = teaching.teacher.first.to(student.device) if rounds.labeller == "teacher" else "expert"
    seed = rounds.seed + (number - 1) * rounds.episodes
    found = collect(student, rounds.suite, rounds.tasks, rounds.episodes, seed, out, labeller=labeller, pool=pool)
    say(f"round {number}: {found['episodes']} of {found['scenes']} takeovers kept, {found['frames']} frames")
    return {key: found[key] for key in ("scenes", "episodes", "frames", "ends", "seconds")}


def _measure(rounds: RoundsConfig, run: Path, pool: SimulatorPool) -> dict:
    """One process: success on validation scenes, by task group and in all."""
    found = evaluate(load_policy(run), rounds.suite, rounds.tasks, rounds.measure, CURVE_SEED, ("policy",), clips=0, pool=pool)
    groups = {row["group"]: {"successes": row["successes"], "n": row["n"]} for row in found["rows"]}
    won, n = (sum(g[key] for g in groups.values()) for key in ("successes", "n"))
    low, high = wilson(won, n)
    return {"successes": won, "n": n, "rate": won / n, "low": low, "high": high, "groups": groups}


class _Log:
    """`rounds.json`: what each round brought, and what it all took."""

    def __init__(self, root: Path, rounds: RoundsConfig, allow_change: tuple[str, ...] = ()) -> None:
        """Raises `UsageError` where the run began with other `rounds`."""
        self.path, self.rounds, self.began = root / "rounds.json", rounds, time.monotonic()
        known = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.entries: list[dict[str, Any]] = known.get("rounds", [])
        self.before: float = known.get("minutes", 0.0)
        if then := known.get("config"):
            check_unchanged({"rounds": then}, {"rounds": rounds.model_dump(mode="json")}, root, allow_change)

    def minutes(self) -> float:
        """Spent so far, before the last interruption too; but for what a process that was killed had not yet written."""
        return self.before + (time.monotonic() - self.began) / 60

    def entry(self, number: int) -> dict[str, Any]:
        while len(self.entries) <= number:
            self.entries.append({"round": len(self.entries)})
        return self.entries[number]

    def lacks(self, number: int, key: str) -> bool:
        return key not in self.entry(number)

    def write(self) -> None:
        if PartialState().is_main_process:
            known = {"rounds": self.entries, "best": self.best(), "minutes": self.minutes(),
                     "config": self.rounds.model_dump(mode="json")}  # fmt: skip
            replace_file(self.path, json.dumps(known, indent=1))

    def best(self) -> int | None:
        """The round of the most success; of equals the first."""
        rates = [(entry["success"]["rate"], -entry["round"]) for entry in self.entries if "success" in entry]
        return -max(rates)[1] if rates else None

    def line(self, number: int) -> str:
        found = self.entry(number)["success"]
        parts = "  ".join(f"{name} {g['successes']}/{g['n']}" for name, g in found["groups"].items())
        return (f"round {number}: success {found['successes']}/{found['n']} = {found['rate']:.1%} "
                f"[{found['low']:.1%}, {found['high']:.1%}]   {parts}")  # fmt: skip

    def stop(self, number: int) -> str:
        """Why no round follows `number`; empty when one does. A resumed run decides as it did."""
        rounds, best = self.rounds, self.best()
        if number == rounds.rounds:
            return f"rounds.rounds {rounds.rounds}"
        if self.entry(number)["success"]["rate"] >= rounds.until:
            return f"success reached rounds.until {rounds.until}"
        if best is not None and number - best >= rounds.patience:
            return f"{rounds.patience} rounds without a better one than round {best}"
        if rounds.minutes is not None and self.entry(number).get("minutes", 0.0) >= rounds.minutes:
            return f"rounds.minutes {rounds.minutes}"
        return ""


def _keep_best(root: Path, log: _Log) -> None:
    source = root / f"round-{log.best()}" / "policy"

    def copy(into: Path) -> None:
        shutil.copytree(source, into, ignore=shutil.ignore_patterns(MANIFEST))  # the copy is given its own

    publish(root / "policy", copy)
