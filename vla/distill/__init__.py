"""Distil a teacher into a student: `vla.train`'s loop with one more opinion on every window.

    accelerate launch -m vla.distill CONFIG [a.b=c ...] [--resume]

The student shares the teacher's codec, statistics and chunk unless `policy:` says otherwise, so what is learned are the teacher's
probabilities of action symbols (`vla/policy/lesson.py`). The teacher is asked once (`cache`), by all processes together; what it
said is added to each window by the loader (`targets`). Everything else is training: the stream, exact resume, checkpoints, the
run folder. With `rounds:` the student then acts, and is corrected where it went wrong (`rounds`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from vla.distill.cache import TeacherCache
from vla.distill.config import DistillConfig, LessonConfig, RoundsConfig, TeacherConfig
from vla.distill.ranks import by_one, say
from vla.distill.targets import Targets
from vla.distill.teacher import Teacher
from vla.errors import CheckpointError, UsageError, VLAError
from vla.fetch import fetch_policy
from vla.mixture import Mixture
from vla.policy import PolicyConfig, VLAPolicy, build_policy, load_policy
from vla.policy.build import build_codec
from vla.policy.lesson import Lesson
from vla.policy.sizes import sizes_of
from vla.students import StudentChoice, preset, resolve
from vla.students.exported import runners
from vla.train import precision_of, run_main, train

__all__ = ["DistillConfig", "LessonConfig", "RoundsConfig", "Teacher", "TeacherCache", "TeacherConfig", "distill"]

_INHERITED = ("chunk", "chunk_seconds", "execute", "decode", "soft_sigma", "end_weight", "normalization", "prompt", "soft_tokens",
              "state", "augment")  # fmt: skip


def distill(config: DistillConfig, resume: bool = False, allow_change: tuple[str, ...] = ()) -> Path:
    """Run to the end and return the run folder. Raises `VLAError`s."""
    teaching = Distillation(config)
    told = config.model_copy(update={"policy": teaching.student})
    if config.rounds is None:
        if (root := Path(config.run.out)).joinpath("round-0").is_dir():
            raise UsageError(root, found="a run that began with rounds:", expected="the config the run was started with",
                             fix="put rounds: back, or choose another run.out=...")  # fmt: skip
        return train(told, resume, allow_change, teaching)
    from vla.distill.rounds import play_rounds  # with it come the simulators

    return play_rounds(told, teaching, resume, allow_change)


class Distillation:
    """`vla.train.Teaching`: the student's settings, its lesson, and the teacher's answers."""

    def __init__(self, config: DistillConfig) -> None:
        """Loads the teacher onto the CPU. Raises `VLAError`s for one that cannot be had."""
        self.config = config
        folders = [fetch_policy(name) for name in config.teacher.policy]
        self.teacher = Teacher([load_policy(folder, "cpu") for folder in folders])
        self.student = student_of(config.policy, self.teacher)
        if config.start is None:
            _check_bins(self.student)
        asked = config.backbone_asked or config.start
        self.choice = config.student or (None if asked else StudentChoice())

    def build(self, config: PolicyConfig, mixture: Mixture) -> VLAPolicy:
        """The fresh student, with the teacher's statistics where the robot and the scheme are the teacher's."""
        known, record = self.teacher.first, {}
        for robot in mixture.embodiments:
            self.teacher.knows(robot, "mixture")
        if (choice := self.choice) is not None:  # a latency budget is measured by one process; a resumed run never comes here
            sizes = sizes_of(config, mixture.embodiments, build_codec(config))
            chosen = by_one(lambda: resolve(choice, sizes, runners(), say))
            config, record = config.model_copy(update={"backbone": chosen.config}), {"student": chosen.record}
            say(f"student: {chosen.record['parameters'] / 1e6:.2f} M parameters, {chosen.config.model_dump(exclude={'kind'})}")
        same = config.normalization == known.config.normalization
        policy = build_policy(config, mixture, known.normalizers if same else None)
        policy.provenance |= record
        return policy

    def begin(self, policy: VLAPolicy, mixture: Mixture, accelerator: Accelerator) -> Targets:
        """See `Teaching.begin`. Raises `CheckpointError` when a resumed student was taught by another teacher, `UsageError` for
        one that says no bins."""
        config, teacher = self.config, self.teacher
        _check_bins(policy.config)
        if config.lesson.features and policy.config.backbone.kind != "student":
            raise UsageError("lesson", found=f"instruction or pictures, and a {policy.config.backbone.kind} backbone",
                             expected="a student, whose sentence and view are compared",
                             fix="lesson.instruction=0 lesson.pictures=0")  # fmt: skip
        before = policy.provenance.get("teacher")
        if before and before["fingerprint"] != teacher.fingerprint:
            raise CheckpointError(
                "teacher.policy", found=f"{', '.join(config.teacher.policy)} with fingerprint {teacher.fingerprint[:12]}...",
                expected=f"the teacher this run began with ({before['policy']}, {before['fingerprint'][:12]}...)",
                fix="put that teacher back, or begin another run: run.out=...")  # fmt: skip
        policy.provenance = policy.provenance | {
            "teacher": {"policy": ", ".join(config.teacher.policy), "fingerprint": teacher.fingerprint,
                        "parameters": sum(p.numel() for p in teacher.first.parameters())}
        }  # fmt: skip
        cache, widths = self.ask(mixture, accelerator)
        # The lesson's own maps are drawn after the student, so a student begins the same with or without a teacher.
        policy.lesson = Lesson(config.lesson, policy.model.hidden_size, widths).to(accelerator.device)
        return Targets(cache, teacher, policy, policy.config.soft_sigma)

    def ask(self, mixture: Mixture, accelerator: Accelerator) -> tuple[TeacherCache, tuple[int, int]]:
        """Have the teacher answer for every frame of the mixture's datasets, shared among the processes. Returns the cache and
        the widths of the features (instruction, pictures)."""
        config, teacher = self.config.teacher, self.teacher.to(accelerator.device)
        precision = precision_of(config.precision)
        autocast: Callable[[], AbstractContextManager[Any]] = partial(
            torch.autocast, accelerator.device.type, torch.bfloat16, enabled=precision == "bf16"
        )
        pictures = teacher.first.model.hidden_size if self.config.lesson.features else 0
        where = config.cache or f".cache/teacher/{teacher.fingerprint[:16]}-{config.top}-{config.batch}-{precision}-{pictures}"
        with accelerator.main_process_first():
            cache = TeacherCache.open(Path(where), teacher, mixture, top=config.top, batch=config.batch, precision=precision,
                                      pictures=pictures)  # fmt: skip
        missing = cache.missing()
        accelerator.wait_for_everyone()  # all have seen the same list before anybody shortens it
        mine, problem = missing[accelerator.process_index :: accelerator.num_processes], None
        with tqdm(total=sum(cache.frames(block) for block in mine), unit="frame", desc="asking the teacher", dynamic_ncols=True,
                  disable=not accelerator.is_main_process or not mine,
                  mininterval=0.5 if sys.stderr.isatty() else 20.0) as bar:  # fmt: skip
            try:
                for done in cache.ask(teacher, autocast, mine):
                    bar.update(done)
            except VLAError as error:
                problem = error
        accelerator.wait_for_everyone()  # also who failed comes here: nobody waits for one who has gone
        if problem is not None:
            raise problem
        if accelerator.is_main_process:
            cache.seal()
        words = cache.read_sentences(teacher) if pictures else 0
        teacher.to(torch.device("cpu"))  # its memory on the device is the student's now
        return cache, (words, pictures)


def student_of(asked: PolicyConfig, teacher: Teacher) -> PolicyConfig:
    """The student's settings: what was asked, and for the rest the teacher's."""
    known, own = teacher.first.config, asked.model_fields_set
    update: dict[str, Any] = {key: getattr(known, key) for key in _INHERITED if key not in own}
    if "codec" not in own and known.codec.kind == "bins":
        update["codec"] = known.codec
    if "backbone" not in own:  # `student:` decides, once the mixture is open; a resumed run has its own
        update["backbone"] = preset("s")
    return PolicyConfig.model_validate(asked.model_dump() | {k: _plain(v) for k, v in update.items()})


def _check_bins(student: PolicyConfig) -> None:
    """A lesson is about probabilities of bins: to another student the teacher would say nothing, and nobody would notice."""
    if student.head != "symbols" or student.codec.kind != "bins":
        raise UsageError("policy", found=f"a student with head {student.head} and codec {student.codec.kind}",
                         expected="head: symbols and codec.kind: bins, whose probabilities a teacher's can be compared with",
                         fix="leave policy.head and policy.codec out")  # fmt: skip


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def main(argv: list[str] | None = None) -> int:
    """Entry point of `accelerate launch -m vla.distill`."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m vla.distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: accelerate launch -m vla.distill configs/distill/demo.yaml teacher.policy=runs/teacher",
    )  # fmt: skip
    return run_main(parser, DistillConfig, distill, argv)
