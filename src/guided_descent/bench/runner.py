"""Train one problem with one optimizer and one seed; a run that was killed continues bit for bit."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from guided_descent.bench import environment
from guided_descent.bench.checkpoint import Checkpoints
from guided_descent.bench.files import BenchError, make_folder
from guided_descent.bench.problem import Problem, load_problem, tensor_hash, tensors
from guided_descent.bench.ranks import PeerLost, Ranks, enter
from guided_descent.bench.session import Session, Tick
from guided_descent.bench.shares import check_parts
from guided_descent.bench.signals import SignalFlag
from guided_descent.bench.specs import TORCH_LBFGS
from guided_descent.bench.store import (
    CONFIG,
    METRICS,
    RESULT,
    OptimizerSpec,
    RunConfig,
    RunResult,
    RunStore,
    ScheduleSpec,
    read_run,
    write_record,
)
from guided_descent.solvers import SOLVERS, Solver

CHECKPOINTS = "checkpoints"

BuildOptimizer = Callable[[nn.Module, OptimizerSpec], Optimizer]
BuildSchedule = Callable[[Optimizer, ScheduleSpec, int], LRScheduler]


def build_optimizer(model: nn.Module, spec: OptimizerSpec) -> Optimizer:
    """A solver by its name, torch's L-BFGS, or ``guided_descent.optimizer(spec.name, model, **spec.hyper)``."""
    import guided_descent

    if spec.name in SOLVERS:
        return SOLVERS[spec.name](model, **spec.hyper)
    if spec.name == TORCH_LBFGS:
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.LBFGS(parameters, **{"line_search_fn": "strong_wolfe", **spec.hyper})
    optimizer: Optimizer = guided_descent.optimizer(spec.name, model, **spec.hyper)
    return optimizer


def knowing(spec: OptimizerSpec, problem: Problem) -> OptimizerSpec:
    """The spec with the problem's loss, for a recipe that samples labels from it and was not told another.

    Raises:
        BenchError: It samples labels and neither the problem nor the spec names the loss.
    """
    from guided_descent.recipes import REGISTRY

    info = REGISTRY.get(spec.name)
    if info is None or not (info.cls.reads_layers or info.cls.samples_labels) or "loss" in spec.hyper:
        return spec
    if problem.likelihood is None:
        fisher = spec.hyper.get("fisher", info.cls().values().get("fisher", "mc"))
        if fisher in ("mc", "exact"):
            other = f", or use {spec.name}:fisher=empirical" if info.cls.reads_layers else ""
            raise BenchError(
                f"optimizer {spec.name!r} samples labels from the model (fisher={fisher!r}) and this task names no "
                f"loss: give its Problem outputs, targets and likelihood{other}"
            )
        return spec
    return replace(spec, hyper={**spec.hyper, "loss": problem.likelihood})


def build_schedule(optimizer: Optimizer, spec: ScheduleSpec, steps: int) -> LRScheduler:
    """``guided_descent.schedules.<spec.name>(optimizer, total_steps=steps, **spec.options)``.

    Solvers find their step length themselves, so their ``lr`` stays constant whatever the schedule.
    """
    from guided_descent import schedules

    if isinstance(optimizer, Solver | torch.optim.LBFGS):
        return schedules.constant(optimizer)
    function = getattr(schedules, spec.name, None)
    if not callable(function) or spec.name.startswith("_"):
        raise BenchError(f"unknown schedule {spec.name!r}; it must be a function of guided_descent.schedules")
    scheduler: LRScheduler = function(optimizer, total_steps=steps, **spec.options)
    return scheduler


def train(
    problem: str,
    spec: OptimizerSpec,
    *,
    seed: int = 0,
    steps: int | None = None,
    out: str | os.PathLike[str] = "runs",
    resume: bool = True,
    checkpoint_every: int | None = None,
    eval_every: int | None = None,
    keep: int = 2,
    keep_best: int = 0,
    async_checkpoints: bool = False,
    micro_batches: int = 1,
    parallel: str | None = None,
    threads: int = 1,
    schedule: ScheduleSpec | None = None,
    progress: Callable[[Tick], None] | None = None,
    warn: Callable[[str], None] = warnings.warn,
    build_optimizer: BuildOptimizer = build_optimizer,
    build_schedule: BuildSchedule = build_schedule,
) -> RunResult:
    """Train, and leave config, metrics, checkpoints and result in the run's folder (``store.py``).

    A run that was killed or interrupted continues from its newest intact checkpoint with the numbers it would have had,
    bit for bit; a finished one is returned and not run again. SIGTERM and SIGINT are answered after the current step
    with all its micro-batches, or at once inside an evaluation: a checkpoint is written and the result has the status
    ``interrupted``.

    With ``parallel="ddp"`` every process that torchrun has started calls this with the same arguments: each trains on
    its rows of every batch, and rank 0 alone evaluates and writes. The result is the same everywhere. Another number
    of ranks, also one process alone, may continue the run; then sums are rounded in another order.

    Args:
        problem: A built-in workload or ``package.module:function``.
        spec: The optimizer.
        seed: Seed of initialisation and data order.
        steps: Optimizer steps; None: the problem's own number.
        out: Folder of the run store.
        resume: False deletes what the run's folder holds and starts afresh.
        checkpoint_every: Steps between checkpoints; None: a quarter of the run. The end is saved, too. 0: only an
            interrupted run is saved, and nothing stays once it has finished.
        eval_every: Steps between evaluations; None: the problem's own number.
        keep: The newest checkpoints that stay.
        keep_best: The best states by the metric, at evaluations after the first step, that are saved and stay beside.
        async_checkpoints: Write checkpoints on a thread, from a copy in host memory, while training goes on; a failure
            is raised by the next checkpoint or at the end. Its CPU seconds count among those of the steps.
        micro_batches: Parts of a batch whose gradients are added before a step, to save memory. The loss must be a mean
            over rows; normalisation over a batch sees a part.
        parallel: ``ddp``, or None for one process.
        threads: CPU threads of torch, in each process.
        schedule: None: linear warmup over 5 % of the steps, then linear to zero.
        progress: Called with a ``Tick``.
        warn: Called with one line, for instance about a damaged checkpoint.
        build_optimizer: Makes the optimizer from model and spec.
        build_schedule: Makes the schedule from optimizer, spec and number of steps.

    Raises:
        BenchError: Bad input, a folder that holds another run, a full disk, a loss that fails: one line with the fix.
    """
    for name, number, least in (
        ("steps", steps, 1),
        ("checkpoint_every", checkpoint_every, 0),
        ("eval_every", eval_every, 1),
        ("keep", keep, 1),
        ("keep_best", keep_best, 0),
        ("micro_batches", micro_batches, 1),
        ("threads", threads, 1),
    ):
        if number is not None and number < least:
            raise BenchError(f"{name} is {number}; it must be {least} or more")
    schedule = ScheduleSpec() if schedule is None else schedule
    folder = RunStore(out).path(problem, spec.label, seed)
    with SignalFlag() as flag, _threads(threads), _ranks(parallel, flag) as ranks:
        progress, warn = (progress, warn) if ranks.lead else (None, lambda line: None)
        task = load_problem(problem, seed)
        steps = task.steps if steps is None else steps
        eval_every = eval_every or task.eval_every or max(1, steps // 12)
        known = knowing(spec, task)
        config = describe(problem, task, spec, schedule, seed=seed, steps=steps, eval_every=eval_every)
        config = replace(config, micro_batches=micro_batches, parallel=parallel, ranks=ranks.size)
        ranks.check_same(
            config.data + config.init, "the task's data or its first weights; they may depend on the seed alone"
        )
        check_parts(task, ranks.size * micro_batches, warn)
        if ranks.lead:
            make_folder(folder)
        with _lock(folder) if ranks.lead else nullcontext():
            if ranks.lead and not resume:
                _clear(folder)
            finished = _enter(folder, config) if ranks.lead else None
            finished = ranks.told(None if finished is None else asdict(finished))
            if finished is not None:
                return RunResult(**finished)
            module = ranks.wrap(task)
            try:
                optimizer = build_optimizer(module, known)
            except (TypeError, ValueError, KeyError) as error:
                raise BenchError(f"optimizer {spec.name!r}: {' '.join(str(error).split())}") from error
            if isinstance(optimizer, Solver) and (micro_batches > 1 or parallel):
                raise BenchError(f"{spec.name} evaluates whole batches: leave out micro_batches and parallel")
            session = Session(
                folder=folder,
                config=config,
                problem=task,
                module=module,
                optimizer=optimizer,
                scheduler=build_schedule(optimizer, schedule, steps),
                checkpoints=Checkpoints(folder / CHECKPOINTS, keep, background=async_checkpoints),
                save_every=max(1, steps // 4) if checkpoint_every is None else checkpoint_every,
                keep_best=keep_best,
                progress=progress,
                warn=warn,
                ranks=ranks,
            )
            result = session.run(flag)
            if ranks.lead and result.status != "interrupted":
                write_record(folder / RESULT, result)
            return result


@contextmanager
def _ranks(parallel: str | None, flag: SignalFlag) -> Iterator[Ranks]:
    """The ranks; where another one is lost after a signal has come, that is why."""
    try:
        with enter(parallel) as ranks:
            yield ranks
    except PeerLost as error:
        error.signal = flag.received
        raise


def describe(
    workload: str,
    task: Problem,
    spec: OptimizerSpec,
    schedule: ScheduleSpec,
    *,
    seed: int,
    steps: int,
    eval_every: int,
) -> RunConfig:
    """The config of a run that is about to start."""
    parameters = task.trainable()
    return RunConfig(
        workload=workload,
        optimizer=spec,
        schedule=schedule,
        seed=seed,
        steps=steps,
        eval_every=eval_every,
        clip=task.clip,
        metric=task.metric,
        goal=task.goal,
        unit=task.unit,
        target=task.target,
        data=task.data or tensor_hash(tensors(task.batch(0))),
        init=tensor_hash(tensors(task.model.state_dict())),
        parameters=sum(p.numel() for p in parameters),
        dtype=str(parameters[0].dtype).removeprefix("torch."),
        device=parameters[0].device.type,
        threads=torch.get_num_threads(),
        versions=environment.versions(),
        git=environment.git_commit(),
        machine=environment.machine(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _enter(folder: Path, config: RunConfig) -> RunResult | None:
    """Claim an empty folder, or check that what it holds is the same run; the result of one that has finished."""
    if not (folder / CONFIG).exists():
        if (folder / METRICS).exists() or (folder / CHECKPOINTS).exists():
            raise BenchError(f"{folder} holds a run without {CONFIG}; start it afresh (resume=False) or move it away")
        write_record(folder / CONFIG, config)
        return None
    run = read_run(folder)
    difference = config.difference(run.config)
    if difference:
        raise BenchError(
            f"{folder} holds another run: {difference}; choose another folder or label, or start afresh (resume=False)"
        )
    return run.result


def _clear(folder: Path) -> None:
    try:
        for name in (RESULT, METRICS, CONFIG):
            (folder / name).unlink(missing_ok=True)
        if (folder / CHECKPOINTS).exists():
            shutil.rmtree(folder / CHECKPOINTS)
    except OSError as error:
        raise BenchError(f"cannot clear {folder}: {error.strerror or error}; choose another folder") from error


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process per run: the kernel releases the lock when its holder dies, however it dies."""
    try:
        import fcntl
    except ModuleNotFoundError:  # not a POSIX system
        yield
        return
    try:
        handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise BenchError(f"cannot write {folder}: {error.strerror or error}; choose a writable folder") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BenchError(f"another process is training in {folder}; wait for it or choose another folder") from None
    finally:
        os.close(handle)
