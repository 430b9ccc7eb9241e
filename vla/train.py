"""Fine-tune a policy on a mixture: the whole loop in one file.

    accelerate launch -m vla.train CONFIG [a.b=c ...] [--resume]

One process per device. Every rank reads its slice of one global stream (`vla/mixture.py`), so a run is the same run on
one process or four, with any number of loader workers, and after any restart: order, augmentation and dropout are
functions of (seed, n) or (seed, step, rank), and no random state is ever saved.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from pydantic import Field
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from vla.batch import Batch
from vla.checkpoint import Run, pack_optimizer, publish, unpack_optimizer, write_atomic
from vla.config import Config, dump_config, load_config
from vla.errors import DivergedError, MachineError, Preempted, UsageError, VLAError
from vla.loader import make_loader, split_batch
from vla.mixture import MixtureConfig, mix, open_mixture
from vla.open_loop import describe, evaluate_open_loop
from vla.policy import PolicyConfig, build_policy, read_policy, save_policy


class _OtherRank(Exception):
    """The main process has an error to report; this one only stops."""


class OptimConfig(Config):
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
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


class RunConfig(Config):
    out: str
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
    on_save_error: str = Field(default="stop", pattern="^(stop|warn)$")
    """What a full disk does to the run. The previous checkpoint is intact either way."""
    processes: int = Field(default=1, ge=1)
    """Processes `vla train` launches, and the number the run insists on (a launcher that silently starts fewer is refused)."""
    workers: int = Field(default=0, ge=0)
    """Loader workers per process."""
    threads: int | None = Field(default=1, ge=1)
    """torch threads per process on a CPU. One is right when each core has a process."""
    precision: str = Field(default="auto", pattern="^(auto|no|bf16)$")
    """`auto`: bf16 where the device computes in it."""


class TrainConfig(Config):
    """A fine-tuning run; see configs/train/ for annotated examples."""

    run: RunConfig
    mixture: MixtureConfig
    policy: PolicyConfig = PolicyConfig()
    optim: OptimConfig = OptimConfig()


_RESUMABLE = ("run.out", "run.log_every", "run.eval_every", "run.eval_windows", "run.save_every", "run.keep",
              "run.on_save_error", "run.processes", "run.workers", "run.threads", "mixture.cache_dir")  # fmt: skip
"""Keys that do not change what is learned, so a resumed run may change them."""


def train(config: TrainConfig, resume: bool = False, allow_change: tuple[str, ...] = ()) -> Path:
    """Run to the end and return the run folder. See the module docstring; raises `VLAError`s."""
    state = PartialState(cpu=not torch.cuda.is_available())
    rank, world = state.process_index, state.num_processes
    if world != config.run.processes:
        raise UsageError("run.processes", found=f"{world} process(es) started", expected=str(config.run.processes),
                         fix=f"start it with `vla train`, or set run.processes={world}")  # fmt: skip
    if config.optim.batch % world:
        raise UsageError("optim.batch", found=config.optim.batch, expected=f"a multiple of {world} processes",
                         fix=f"optim.batch={config.optim.batch // world * world or world}")  # fmt: skip
    if config.run.threads and not torch.cuda.is_available():
        torch.set_num_threads(config.run.threads)
    accelerator = Accelerator(mixed_precision=_precision(config.run.precision), cpu=not torch.cuda.is_available())
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
            _check_unchanged(found[1]["config"], config, run.root, allow_change)
        return found, *open_mixture(config.mixture, config.policy.chunk, config.run.seed, progress=main)

    opened, problem = None, None
    if main:  # the main process looks first and builds caches; the others then find them, or stop with it
        try:
            existed = run.root.exists()
            run.claim()
            opened = open_all()
        except VLAError as error:
            problem = error
            run.release()
            if not existed:
                shutil.rmtree(run.root, ignore_errors=True)  # a run that never began leaves nothing behind
    if _sum_over_ranks(torch.tensor(float(problem is not None), device=accelerator.device)) > 0:
        raise problem or _OtherRank()
    found, mixture, heldout = opened or open_all()
    for line in mixture.report(config.run.steps, config.optim.batch):
        say("  ".join(f"{key} {value}" for key, value in line.items()))

    # ------------------------------------------------------------------------------------ policy and optimizer
    torch.manual_seed(config.run.seed)
    if found:
        policy = read_policy(found[0] / "policy").train()
    else:
        policy = build_policy(config.policy, mixture).train()
    names: dict[Tensor, str] = {parameter: name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    decayed = [p for n, p in policy.named_parameters() if p.requires_grad and p.ndim >= 2 and "embed" not in n]
    plain = [p for p in names if all(p is not q for q in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.optim.weight_decay}, {"params": plain, "weight_decay": 0.0}],
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
    wrapped, optimizer = accelerator.prepare(policy, optimizer)

    # ------------------------------------------------------------------------------------ one owner writes
    parameters = sum(p.numel() for p in names)
    if main:
        write_atomic(run.root / "config.yaml", dump_config(config))
        run.trim_log(step)
        run.status("running", step=step, steps=config.run.steps, pid=os.getpid())
        say(f"{parameters / 1e6:.2f} M parameters, {accelerator.device}, {accelerator.mixed_precision}, {world} process(es)")

    def save() -> None:
        # Copies: `_averaged` exchanges the live and the averaged values in place while the policy is written.
        tensors = {f"model/{name}": p.detach().clone() for p, name in names.items()}
        tensors |= {f"ema/{name}": average.clone() for name, average in ema.items()}
        tensors |= pack_optimizer(optimizer.optimizer, names)
        facts = {"config": config.model_dump(mode="json"), "world": world}
        try:
            with _averaged(names, ema):
                folder = run.save(step, tensors, facts, partial(save_policy, policy), config.run.keep)
                publish(run.root / "policy", partial(_copy, folder / "policy"))
        except MachineError as error:
            if config.run.on_save_error == "stop":
                raise
            say(f"warning: not saved, training goes on\n{error}")

    stop = _StopSignal()
    loader = make_loader(
        mixture, policy, seed=config.run.seed, batch=config.optim.batch, steps=config.run.steps, first_step=step, rank=rank,
        world=world, workers=config.run.workers,
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
            batch: Batch = next(batches).to(accelerator.device)
            waited += time.perf_counter() - before

            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(mix(config.run.seed, 5, step, rank) >> 1)  # dropout = f(seed, step, rank)
            # Every rank divides by the global number of valid elements; DDP then averages, hence the factor `world`.
            agreed = torch.stack([batch.valid.sum(), batch.end_valid.sum(), torch.tensor(stop.asked, device=batch.n.device)])
            agreed = _sum_over_ranks(agreed.double())
            losses, totals = [], []
            micros = split_batch(batch, policy, config.optim.micro_batch)
            for i, micro in enumerate(micros):
                with accelerator.no_sync(wrapped) if i + 1 < len(micros) else nullcontext():
                    loss = wrapped(micro)
                    total = loss.total(config.policy.end_weight, agreed[0], agreed[1])
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
                _update_average(ema, names, min(config.optim.ema, (1 + step) / (10 + step)))

            if step % config.run.log_every == 0 or step == config.run.steps:
                sums = torch.stack([torch.stack([x.action, x.end, x.correct.float()]).detach() for x in losses]).sum(0)
                sums = _sum_over_ranks(torch.cat([sums.double(), torch.stack(totals).double().sum().view(1)]))
                now = time.perf_counter()
                record = {
                    "kind": "train", "step": step, "loss": sums[3].item(), "action_loss": (sums[0] / agreed[0]).item(),
                    "aux": (sums[1] / agreed[1]).item(), "token_accuracy": (sums[2] / agreed[0]).item(), "lr": lr,
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
            if bad_steps >= 3:
                raise DivergedError(f"step {step}", found="3 steps in a row with a non-finite gradient", expected="finite",
                                    fix="lower optim.lr, or look at the windows named above with `vla data check`")  # fmt: skip

            if step % config.run.eval_every == 0 or step == config.run.steps:
                if main and heldout.sizes and sum(heldout.sizes):
                    with _averaged(names, ema):
                        record = {"kind": "heldout", "step": step} | evaluate_open_loop(policy, heldout, config.run.eval_windows)
                    run.log(record)
                    say(describe(record))
                accelerator.wait_for_everyone()
            if step % config.run.save_every == 0 or step == config.run.steps or agreed[2] > 0:
                if main:
                    save()
                accelerator.wait_for_everyone()
            if agreed[2] > 0 and step < config.run.steps:
                if main:
                    run.status("preempted", step=step, steps=config.run.steps)
                raise Preempted(f"step {step}", found=f"signal {stop.name}", expected="to run to the end",
                                fix="the run saved itself; continue with --resume")  # fmt: skip
        if main:
            run.status("finished", step=step, steps=config.run.steps, seconds=time.perf_counter() - started)
    except BaseException as error:
        if main and not isinstance(error, Preempted):
            state_name = "diverged" if isinstance(error, DivergedError) else "failed"
            run.status(state_name, step=step, steps=config.run.steps, error=str(error)[:2000])
        raise
    finally:
        bar.close()
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


def _precision(wanted: str) -> str:
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


@torch.no_grad()
def _update_average(ema: dict[str, Tensor], names: dict[Tensor, str], decay: float) -> None:
    torch._foreach_lerp_([ema[name] for name in names.values()], [p.detach() for p in names], 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


def _copy(source: Path, into: Path) -> None:
    shutil.copytree(source, into)


class _averaged:
    """Inside the block the policy has its averaged weights."""

    def __init__(self, names: dict[Tensor, str], ema: dict[str, Tensor]) -> None:
        self.pairs = [(parameter.data, ema[name]) for parameter, name in names.items()] if ema else []

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    def _swap(self) -> None:
        for live, average in self.pairs:
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)


class _StopSignal:
    """Remembers SIGTERM, SIGINT or SIGUSR1; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.asked, self.name = 0, ""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked, self.name = 1, signal.Signals(number).name


def _check_unchanged(then: dict, now: TrainConfig, where: Path, allowed: tuple[str, ...]) -> None:
    before, after = _flat(then), _flat(now.model_dump(mode="json"))
    changed = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
    changed = [k for k in changed if k not in _RESUMABLE and k not in allowed]
    if changed:
        raise UsageError(where, found="; ".join(f"{k}: {before.get(k)} then, {after.get(k)} now" for k in changed),
                         expected="the config the run was started with",
                         fix="undo the change, or add " + " ".join(f"--allow-change {k}" for k in changed))  # fmt: skip


def _flat(values: object, at: str = "") -> dict[str, object]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if items is None:
        return {at: values}
    return {k: v for key, value in items for k, v in _flat(value, f"{at}.{key}" if at else str(key)).items()}


def main(argv: list[str] | None = None) -> int:
    """Entry point of `accelerate launch -m vla.train`."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m vla.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: accelerate launch -m vla.train configs/smoke/train.yaml run.steps=50",
    )  # fmt: skip
    parser.add_argument("config", help="a YAML file, or a shipped name such as smoke/train")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the file's")
    parser.add_argument("--resume", action="store_true", help="continue from the newest intact checkpoint, if there is one")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="a key that may differ on resume")
    parser.add_argument("--json", action="store_true", help="print the final status as JSON")
    args = parser.parse_intermixed_args(argv)
    _die_with_launcher()
    code, root = 0, None
    try:
        config = load_config(args.config, args.overrides, TrainConfig)
        root = Path(config.run.out)
        train(config, args.resume, tuple(args.allow_change))
    except _OtherRank:
        code = 1
    except VLAError as error:
        code = error.exit_code
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    answer = os.environ.get("TENDON_EXIT_CODE")  # set by `vla train`: launchers do not pass an exit code on
    if int(os.environ.get("RANK", "0")) != 0:
        return 0 if answer else code
    if root is not None and (root / "metrics.jsonl").is_file() and code not in (2, 3):
        # A run that failed or was stopped gets its report too.
        from vla.report import write_report

        report, status = write_report(root), Run(root).read_status()
        print(json.dumps(status | {"report": str(report)}) if args.json else f"report: {report}")
    if answer:
        Path(answer).write_text(str(code))
        return 0  # the error is printed already; the launcher would add a traceback of its own
    return code


def _die_with_launcher() -> None:
    """Ask Linux for SIGTERM when the parent goes: `accelerate launch` with one process dies without telling us."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main())
