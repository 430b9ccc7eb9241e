"""Fine-tune a policy on a mixture: the whole loop in one file.

    accelerate launch -m vla.train CONFIG [a.b=c ...] [--resume]

One process per device. Every rank reads its slice of one global stream (`vla/mixture/`), so a run is the same run on
one process or four, with any number of loader workers, and after any restart: order, augmentation and dropout are
functions of (seed, n) or (seed, step, rank), and no random state is ever saved.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from vla.averaging import averaged, update_average
from vla.batch import Batch
from vla.checkpoint import Run, pack_optimizer, publish, unpack_optimizer
from vla.config import Config, dump_config, flatten, load_config
from vla.durable import replace_file
from vla.errors import DivergedError, MachineError, Preempted, UsageError, VLAError
from vla.fetch import fetch_model, fetch_policy, origin
from vla.launch import StopSignal, add_arguments, answer_launcher, die_with_launcher, introduce
from vla.loader import make_loader, split_batch
from vla.mixture import Mixture, MixtureConfig, open_mixture
from vla.open_loop import describe, evaluate_open_loop
from vla.policy import AdapterConfig, PolicyConfig, VLAPolicy, build_policy, extend_policy, load_policy, read_policy, save_policy
from vla.policy.adapters import adapt
from vla.randomness import Purpose, mix


class _OtherRank(Exception):
    """Another process has an error to report; this one only stops."""


class OptimConfig(Config):
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    warmup: int = Field(default=100, ge=0)
    """Steps of linear warm-up; a cosine to `final_lr` follows."""
    final_lr: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    batch: int = Field(default=32, ge=1)
    """Samples per optimizer step, over all processes."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Samples per forward pass and process; smaller than the process's share means accumulation, with the same result."""
    ema: float = Field(default=0.995, ge=0, lt=1)
    """Decay of the averaged weights that are evaluated and saved as the policy; 0 turns averaging off."""


class StartConfig(Config):
    """Begin from a trained policy instead of a fresh one. It brings its own `policy:` settings."""

    policy: Annotated[str, Field(min_length=1)]
    """Policy folder, run folder or Hub id. Robots of the mixture it does not know are added to it."""
    train: Literal["all", "robots"] = "all"
    """`robots`: the soft tokens alone, so that what it answers to the robots it knows does not change."""


class RunConfig(Config):
    out: Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
    """The run folder."""
    steps: int = Field(ge=1)
    seed: int = 0
    log_every: int = Field(default=20, ge=1)
    eval_every: int = Field(default=500, ge=1)
    """Steps between open-loop evaluations on held-out episodes."""
    eval_windows: int = Field(default=256, ge=1)
    save_every: int = Field(default=1000, ge=1)
    keep: int = Field(default=3, ge=0)
    """Checkpoints to keep; 0 keeps all."""
    on_save_error: Literal["stop", "warn"] = "stop"
    """What a full disk does to the run. The previous checkpoint is intact either way."""
    processes: int | Literal["auto"] = "auto"
    """Processes `vla train` launches, and the number the run insists on (a launcher that silently starts fewer is refused).
    `auto`: one per GPU; without a GPU one per core, as far as they divide the batch."""
    workers: int = Field(default=0, ge=0)
    """Loader workers per process."""
    threads: int | None = Field(default=1, ge=1)
    """torch threads per process on a CPU. One is right when each core has a process."""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """`auto`: bf16 where the device computes in it."""
    deterministic: bool = True
    """Ask torch for deterministic algorithms (CUDA; a CPU with one thread per process is so anyway)."""


class TrainConfig(Config):
    """A fine-tuning run; see configs/train/ for annotated examples."""

    run: RunConfig
    mixture: MixtureConfig
    policy: PolicyConfig = PolicyConfig()
    start: StartConfig | None = None
    adapter: AdapterConfig | None = None
    """Train an adapter (LoRA) and the tables and heads, and leave the rest as it is."""
    freeze: tuple[Literal["vision", "projector", "language"], ...] = ()
    """Parts that are not trained, where there is no adapter."""
    optim: OptimConfig = OptimConfig()

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.start and self.policy != PolicyConfig():
            raise ValueError("policy: and start: exclude each other; a policy that is started from brings its own settings")
        if self.adapter and (self.freeze or (self.start and self.start.train != "all")):
            raise ValueError("adapter: already freezes everything else; leave out freeze: and start.train")
        if self.adapter and not self.start and not hasattr(self.policy.backbone, "path"):
            raise ValueError("adapter: needs something that was trained before: start: {policy: ...} or a pretrained backbone")
        if self.run.processes != "auto" and (self.run.processes < 1 or self.optim.batch % self.run.processes):
            raise ValueError(f"optim.batch {self.optim.batch} must be a multiple of run.processes {self.run.processes}")
        return self


def processes(config: TrainConfig) -> int:
    """How many processes the run has on this machine."""
    if config.run.processes != "auto":
        return config.run.processes
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(n for n in range(1, cores + 1) if config.optim.batch % n == 0)


_RESUMABLE = ("run.out", "run.log_every", "run.eval_every", "run.eval_windows", "run.save_every", "run.keep",
              "run.on_save_error", "run.processes", "run.deterministic", "run.workers", "run.threads",
              "mixture.cache_dir")  # fmt: skip
"""Keys that do not change what is learned, so a resumed run may change them."""


class Teaching(Protocol):
    """What distillation adds to a training run (`vla/distill/`)."""

    def build(self, config: PolicyConfig, mixture: Mixture) -> VLAPolicy:
        """The fresh student."""
        ...

    def begin(self, policy: VLAPolicy, mixture: Mixture, accelerator: Accelerator) -> Any:
        """Called on every process with the student that is going to learn: give it its lesson, have the teacher asked, and
        return the targets `vla.loader.make_loader` adds to each window."""
        ...


def train(
    config: TrainConfig, resume: bool = False, allow_change: tuple[str, ...] = (), teaching: Teaching | None = None
) -> Path:  # fmt: skip
    """Run to the end and return the run folder. See the module docstring; raises `VLAError`s."""
    stop = StopSignal()  # from here on a signal means: save at the next step, and go
    try:
        return _train(config, resume, allow_change, teaching, stop)
    finally:
        stop.restore()


def _train(
    config: TrainConfig, resume: bool, allow_change: tuple[str, ...], teaching: Teaching | None, stop: StopSignal
) -> Path:  # fmt: skip
    # The timeout covers the slowest thing one process does alone: decoding a large dataset into the cache, once.
    state = PartialState(cpu=not torch.cuda.is_available(), **_timeout(hours=12))
    rank, world = state.process_index, state.num_processes
    if config.run.processes not in (world, "auto"):
        raise UsageError("run.processes", found=f"{world} process(es) started", expected=str(config.run.processes),
                         fix=f"start it with `vla train`, or set run.processes={world}")  # fmt: skip
    if config.optim.batch % world:
        raise UsageError("optim.batch", found=config.optim.batch, expected=f"a multiple of {world} processes",
                         fix=f"optim.batch={config.optim.batch // world * world or world}")  # fmt: skip
    if torch.cuda.is_available() and config.run.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    if config.run.threads and not torch.cuda.is_available():
        torch.set_num_threads(config.run.threads)
    accelerator = Accelerator(mixed_precision=precision_of(config.run.precision), cpu=not torch.cuda.is_available())
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UsageError("accelerate", found=str(accelerator.distributed_type), expected="plain data parallelism",
                         fix="launch without FSDP or DeepSpeed; saving sharded state is not built yet")  # fmt: skip
    main = accelerator.is_main_process
    say = (lambda text: tqdm.write(text, file=sys.stderr)) if main else (lambda text: None)
    transformers_logging.disable_progress_bar()  # one bar is enough
    run = Run(Path(config.run.out))

    # ------------------------------------------------------------------------------------ what there is already
    def open_all() -> tuple:
        found = run.newest(say)
        if found and not resume:
            raise UsageError(run.root, found=f"a run at step {found[1]['step']}", expected="an empty run folder",
                             fix="add --resume to continue it, or choose another run.out=...")  # fmt: skip
        if found:
            check_unchanged(found[1]["config"], config.model_dump(mode="json"), run.root, allow_change)
        base, start = None, None  # the policy to continue or to start from: it brings its own settings
        if found:
            base = read_policy(found[0] / "policy")
        elif config.start:
            folder = fetch_policy(config.start.policy)
            base = load_policy(folder, "cpu")
            start = {"kind": "policy", **origin(config.start.policy, folder), "fingerprint": base.fingerprint}
            start |= {"start": earlier} if (earlier := base.provenance.get("start")) else {}
        elif path := getattr(config.policy.backbone, "path", None):
            start = {"kind": "model", **origin(path, fetch_model(path))}
        wanted = base.config if base else config.policy
        opened = open_mixture(config.mixture, wanted.chunk, config.run.seed, progress=main, seconds=wanted.chunk_seconds)
        if found and base:
            _check_same_data(base, opened[0], run.root, allow_change)
        return found, base, start, *opened

    def together(error: BaseException | None) -> None:
        """Every process calls it after a step that only one of them could fail at: they go on, or stop, as one."""
        if _sum_over_ranks(torch.tensor(float(error is not None), device=accelerator.device)) > 0:
            raise error or _OtherRank()

    opened, problem, existed, claimed = None, None, run.root.exists(), False
    if main:  # the main process looks first and builds caches; the others then find them, or stop with it
        try:
            run.claim()
            claimed = True
            opened = open_all()
        except VLAError as error:
            problem = error
            if claimed and not existed:
                shutil.rmtree(run.root, ignore_errors=True)  # a run that never began leaves nothing behind
            run.release()
    together(problem)
    found, base, start, mixture, heldout = opened or open_all()
    for line in mixture.report(config.run.steps, config.optim.batch):
        say("  ".join(f"{key} {value}" for key, value in line.items()))

    # ------------------------------------------------------------------------------------ policy and optimizer
    torch.manual_seed(config.run.seed)
    if found:
        policy = base.train()
    elif base:
        policy = extend_policy(base, mixture).train()
    elif teaching:
        policy = teaching.build(_pinned(config.policy, start), mixture).train()
    else:
        policy = build_policy(_pinned(config.policy, start), mixture).train()
    if config.start and config.start.train == "robots":
        _freeze_but_robots(policy)
    if start:
        policy.provenance = policy.provenance | {"start": start}
        if config.adapter:
            policy = adapt(policy, config.adapter, _base(start)).train()
    _freeze(policy, config.freeze)
    targets, problem = None, None
    if teaching:
        try:
            targets = teaching.begin(policy, mixture, accelerator)
        except VLAError as error:
            problem = error
        together(problem)
    names: dict[Tensor, str] = {parameter: name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    decayed = decayed_of(policy)
    plain = [p for p, name in names.items() if name not in decayed]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p, name in names.items() if name in decayed], "weight_decay": config.optim.weight_decay},
         {"params": plain, "weight_decay": 0.0}],
        lr=config.optim.lr, betas=config.optim.betas, fused=True,
    )  # fmt: skip
    policy.to(accelerator.device)
    ema = {name: p.detach().clone() for p, name in names.items()} if config.optim.ema else {}
    step = 0
    if found:
        _, facts, tensors = found
        step = facts["step"]
        with torch.no_grad():
            for parameter, name in names.items():
                parameter.copy_(tensors[f"model/{name}"])
                if ema:
                    ema[name].copy_(tensors[f"ema/{name}"])
        unpack_optimizer(optimizer, names, tensors)
        say(f"resuming {run.root} at step {step}")
        if main:  # a crash between the two publishes of the last save left an older policy/ behind
            publish(run.root / "policy", partial(_copy, found[0] / "policy"))
    wrapped, optimizer = accelerator.prepare(policy, optimizer)

    # ------------------------------------------------------------------------------------ one owner writes
    parameters = sum(p.numel() for p in names)
    if main:
        replace_file(run.root / "config.yaml", dump_config(config))
        run.trim_log(step)
        run.status("running", step=step, steps=config.run.steps, pid=os.getpid())
        say(f"{parameters / 1e6:.2f} M parameters, {accelerator.device}, {accelerator.mixed_precision}, {world} process(es)")

    def save() -> None:
        # Copies: `averaged` exchanges the live and the averaged values in place while the policy is written.
        tensors = {f"model/{name}": p.detach().clone() for p, name in names.items()}
        tensors |= {f"ema/{name}": average.clone() for name, average in ema.items()}
        tensors |= pack_optimizer(optimizer.optimizer, names)
        facts = {"config": config.model_dump(mode="json"), "world": world}
        try:
            with averaged(names, ema):
                folder = run.save(step, tensors, facts, partial(save_policy, policy), config.run.keep)
                publish(run.root / "policy", partial(_copy, folder / "policy"))
        except MachineError as error:
            if config.run.on_save_error == "stop" or step == config.run.steps:  # a run without a policy has not succeeded
                raise
            say(f"warning: not saved, training goes on\n{error}")

    loader = make_loader(
        mixture, policy, seed=config.run.seed, batch=config.optim.batch, steps=config.run.steps, first_step=step, rank=rank,
        world=world, workers=config.run.workers, targets=targets,
    )  # fmt: skip
    batches = iter(loader)
    calm = 0.5 if sys.stderr.isatty() else 20.0  # a log file needs no animation
    bar = tqdm(total=config.run.steps, initial=step, disable=not main, unit="step", dynamic_ncols=True, smoothing=0.05,
               mininterval=calm)  # fmt: skip
    started, logged_at, logged_step, waited, bad_steps = time.perf_counter(), time.perf_counter(), step, 0.0, 0

    # ------------------------------------------------------------------------------------ the loop
    try:
        while step < config.run.steps:
            before = time.perf_counter()
            batch: Batch | VLAError = next(batches)  # a bad sample comes as an error, for all processes to stop at
            waited += time.perf_counter() - before

            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(mix(config.run.seed, Purpose.STEP, step, rank) >> 1)  # dropout = f(seed, step, rank)
            # Every rank divides by the global number of valid elements; DDP then averages, hence the factor `world`.
            if isinstance(batch, VLAError):
                mine = [0, 0, 0, stop.asked, 1]
            else:
                mine = [*(int(x.sum()) for x in (batch.said, batch.end_valid, batch.labels != -100)), stop.asked, 0]
            agreed = _sum_over_ranks(torch.tensor(mine, dtype=torch.float64, device=accelerator.device))
            if isinstance(batch, VLAError) or agreed[4] > 0:
                raise batch if isinstance(batch, VLAError) else _OtherRank("another process met a bad sample")
            batch = batch.to(accelerator.device)
            losses, totals = [], []
            micros = split_batch(batch, policy, config.optim.micro_batch)
            for i, micro in enumerate(micros):
                with accelerator.no_sync(wrapped) if i + 1 < len(micros) else nullcontext():
                    loss = wrapped(micro)
                    total = loss.total(policy.loss_weights, agreed[:3])
                    accelerator.backward(total * world)
                losses.append(loss)
                totals.append(total.detach())
            norm = torch.as_tensor(accelerator.clip_grad_norm_(wrapped.parameters(), config.optim.clip))
            if torch.isfinite(norm):
                optimizer.step()
                bad_steps = 0
            else:  # gradients are already summed over ranks, so every rank comes here together
                bad_steps += 1
                say(f"step {step}: gradient norm {norm.item()}, not applied; windows {batch.n.tolist()[:8]} ...")
            optimizer.zero_grad()
            step += 1
            if ema:
                update_average(ema, names, min(config.optim.ema, (1 + step) / (10 + step)))

            if step % config.run.log_every == 0 or step == config.run.steps:
                parts = [torch.stack([x.action, x.end, x.correct.float(), x.answer]).detach() for x in losses]
                sums = torch.stack(parts).double().sum(0)
                sums = _sum_over_ranks(torch.cat([sums, torch.stack(totals).double().sum().view(1)]))
                shares = (sums[:4] / agreed[[0, 1, 0, 2]].clamp(min=1)).tolist()
                now = time.perf_counter()
                record = {
                    "kind": "train", "step": step, "loss": sums[4].item(), "action_loss": shares[0], "aux": shares[1],
                    "token_accuracy": shares[2], **({"answer_loss": shares[3]} if mixture.answers else {}), "lr": lr,
                    "grad_norm": norm.item(), "samples_s": (step - logged_step) * config.optim.batch / (now - logged_at),
                    "data_wait": waited / (now - logged_at), "elapsed": now - started,
                }  # fmt: skip
                logged_at, logged_step, waited = now, step, 0.0
                if main:
                    run.log(record)
                    bar.set_postfix_str(
                        f"loss {record['loss']:.3f} aux {record['aux']:.3f} acc {record['token_accuracy']:.2f} "
                        f"{record['samples_s']:.0f} samples/s wait {record['data_wait']:.0%}",
                        refresh=False,
                    )
            bar.update()
            if bad_steps >= 3 or (bad_steps and step == config.run.steps):
                raise DivergedError(f"step {step}", found=f"{bad_steps} steps in a row with a non-finite gradient",
                                    expected="finite gradients",
                                    fix="lower optim.lr, or look at the windows named above")  # fmt: skip

            healthy = bad_steps == 0  # a policy that just met NaN is neither measured nor kept
            if healthy and (step % config.run.eval_every == 0 or step == config.run.steps):
                problem = None
                if main and sum(heldout.sizes):
                    try:
                        with averaged(names, ema):
                            record = {"kind": "heldout", "step": step}
                            record |= evaluate_open_loop(policy, heldout, config.run.eval_windows)
                        run.log(record)
                        say(describe(record))
                    except VLAError as error:
                        problem = error
                together(problem)
            if healthy and (step % config.run.save_every == 0 or step == config.run.steps or agreed[3] > 0):
                problem = None
                if main:
                    try:
                        save()
                    except VLAError as error:
                        problem = error
                together(problem)
            if agreed[3] > 0 and step < config.run.steps:
                if main:
                    run.status("preempted", step=step, steps=config.run.steps)
                raise Preempted(f"step {step}", found=f"signal {stop.name}", expected="to run to the end",
                                fix="the run saved itself; continue with --resume")  # fmt: skip
        if main:
            run.status("finished", step=step, steps=config.run.steps, seconds=time.perf_counter() - started)
    except BaseException as error:
        if main and not isinstance(error, Preempted):
            state_name = "diverged" if isinstance(error, DivergedError) else "failed"
            with suppress(VLAError):  # a disk too full for a status must not hide why the run ended
                run.status(state_name, step=step, steps=config.run.steps, error=str(error)[:2000])
        raise
    finally:
        bar.close()
        # Workers ignore SIGTERM (see loader.py), so leaving them to the interpreter's exit would wait for ever.
        getattr(batches, "_shutdown_workers", lambda: None)()
        run.release()
    return run.root


# ---------------------------------------------------------------------------------------------------- small parts


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from `lr` to `final_lr`."""
    optim = config.optim
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    progress = (step - optim.warmup) / max(1, config.run.steps - optim.warmup)
    return optim.final_lr + (optim.lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def decayed_of(policy: VLAPolicy) -> set[str]:
    """Names of the parameters that weight decay shrinks: the matrices of layers.

    Rows of tables, positions and learned queries stand for one thing each: a row that is seldom drawn would only ever shrink.
    Those that are no `Embedding` lie beside the layers under names of their own, as what is a matrix is called a weight (or, of
    a mixture's experts, a projection) by everybody.
    """
    tables = {id(p) for module in policy.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()}
    return {name for name, p in policy.named_parameters()
            if p.ndim >= 2 and id(p) not in tables and name.endswith(("weight", "_proj"))}  # fmt: skip


def _pinned(config: PolicyConfig, start: dict | None) -> PolicyConfig:
    """`config` with a model of the Hub at the commit that was looked at, so that what is built is what is written down."""
    if start is None or "revision" not in start:
        return config
    return config.model_copy(update={"backbone": config.backbone.model_copy(update={"path": _base(start)["path"]})})


def _base(start: dict) -> dict[str, str]:
    """Where an adapter's base is, as its folder remembers it: a whole path, or a name on the Hub with its commit."""
    path = f"{start['path']}@{start['revision']}" if "revision" in start else str(Path(start["path"]).resolve())
    return {"kind": start["kind"], "path": path}


def _freeze(policy: VLAPolicy, parts: tuple[str, ...]) -> None:
    prefixes = tuple(f"model.{prefix}" for part in parts for prefix in policy.model.parts[part])
    for name, parameter in policy.named_parameters():
        if prefixes and name.startswith(prefixes):
            parameter.requires_grad_(False)


def _freeze_but_robots(policy: VLAPolicy) -> None:
    """Leave only the soft tokens to be learned. Rows of robots that are not drawn get no gradient, no decay, no change."""
    if not policy.config.soft_tokens:
        raise UsageError("start.train", found="a policy without soft tokens", expected="soft tokens to train",
                         fix="start.train=all, or start from a policy trained with policy.soft_tokens")  # fmt: skip
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name == "model.robots.weight")


def precision_of(wanted: str) -> str:
    """`wanted`, or what this device computes in."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    flags = Path("/proc/cpuinfo")
    return "bf16" if flags.is_file() and "avx512_bf16" in flags.read_text() else "no"


def _sum_over_ranks(values: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def _copy(source: Path, into: Path) -> None:
    shutil.copytree(source, into)


def check_unchanged(then: dict, now: dict, where: Path, allowed: tuple[str, ...]) -> None:
    """Raise `UsageError` naming every value of a run's config that is not what it was, and may not be another."""
    before, after = flatten(then), flatten(now)
    changed = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
    changed = [k for k in changed if k not in _RESUMABLE and k not in allowed or k.startswith("policy.")]
    if changed:
        raise UsageError(where, found="; ".join(f"{k}: {before.get(k)} then, {after.get(k)} now" for k in changed),
                         expected="the config the run was started with",
                         fix="undo the change" + "".join(f", or add --allow-change {k}" for k in changed if k[:7] != "policy.")
                         + "; what is under policy. is fixed for a run's life")  # fmt: skip


def _check_same_data(policy: VLAPolicy, mixture: Mixture, where: Path, allowed: tuple[str, ...]) -> None:
    """A run that goes on with other data would know neither their seeds nor their statistics."""
    known = {d["fingerprint"] for d in policy.provenance.get("datasets", [])}
    if "mixture.datasets" not in allowed and (other := [str(s.root) for s in mixture.stores if s.fingerprint not in known]):
        raise UsageError(where, found=f"other content than the run began with: {', '.join(other)}", expected="the same datasets",
                         fix="begin another run from this one: start.policy=RUN; or --allow-change mixture.datasets")  # fmt: skip


def _timeout(hours: int) -> dict:
    """Arguments for the process group; one process alone has none."""
    return {"timeout": timedelta(hours=hours)} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}


def main(argv: list[str] | None = None) -> int:
    """Entry point of `accelerate launch -m vla.train`."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m vla.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: accelerate launch -m vla.train configs/smoke/train.yaml run.steps=50",
    )  # fmt: skip
    return run_main(parser, TrainConfig, train, argv)


C = TypeVar("C", bound=TrainConfig)


def run_main(
    parser: argparse.ArgumentParser, kind: type[C], work: Callable[[C, bool, tuple[str, ...]], Path], argv: list[str] | None
) -> int:  # fmt: skip
    """One process of a training command: its config read, `work` done, the launcher answered, the report written."""
    add_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    die_with_launcher()
    introduce(int(os.environ.get("RANK", "0")))
    code, root = 0, None
    try:
        config = load_config(args.config, args.overrides, kind)
        root = Path(config.run.out)
        work(config, args.resume, tuple(args.allow_change))
    except _OtherRank:
        code = None
    except VLAError as error:
        code = error.exit_code
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    rank = int(os.environ.get("RANK", "0"))
    exit_code = answer_launcher(code, speak=code is not None and (rank == 0 or code != 0))
    if rank == 0 and root and (root / "metrics.jsonl").is_file() and code not in (2, 3):
        # A run that failed or was stopped gets its report too.
        from vla.report import write_report

        report, status = write_report(root), Run(root).read_status()
        print(json.dumps(status | {"report": str(report)}) if args.json else f"report: {report}")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
