"""Training tasks as a user would write them, good and broken, and what child processes of the bench tests run."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guided_descent.bench.checkpoint import Checkpoints
from guided_descent.bench.problem import Problem, load_problem
from guided_descent.bench.runner import train
from guided_descent.bench.session import Tick
from guided_descent.bench.store import OptimizerSpec, RunResult, RunStore, read_metrics

STEPS = 60
ADAMW = OptimizerSpec("AdamW", {"lr": 0.01})
TIMES = ("seconds", "wall", "cpu", "optimizer_wall", "optimizer_cpu", "eval_wall")


def torch_optimizer(model: nn.Module, spec: OptimizerSpec) -> torch.optim.Optimizer:
    return getattr(torch.optim, spec.name)(model.parameters(), **spec.hyper)


def one_cycle(optimizer: torch.optim.Optimizer, spec: object, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """A scheduler of torch with state of its own, one that also moves the momentum."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps + 1)


def train_torch(ref: str, out: Path, spec: OptimizerSpec = ADAMW, **options: object) -> RunResult:
    options = {"build_optimizer": torch_optimizer, "build_schedule": one_cycle, **options}
    return train(ref, spec, out=out, **options)  # type: ignore[arg-type]


def noisy(seed: int) -> Problem:
    """Dropout, batch norm, two micro-batches, draws from every global generator, and an evaluation that draws too."""
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        shift = 0.01 * (random.random() + float(np.random.rand()))
        halves = zip(x.chunk(2), y.chunk(2), strict=True)
        return torch.stack([F.mse_loss(model(a + shift).squeeze(-1), b) for a, b in halves]).mean()

    def batches(step: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(1000 * seed + step)
        x = torch.randn(8, 6, generator=g)
        return x, x.sin().sum(-1)

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training
        x, y = batches(-1)
        return {"error": F.mse_loss(model(x + 0.1 * torch.rand_like(x)).squeeze(-1), y).item() + random.random()}

    return Problem(
        model=model, loss=loss, batches=batches, evaluate=evaluate, steps=STEPS, metric="error", eval_every=7, clip=1.0
    )


def smooth(seed: int) -> Problem:
    """Float64, 12 rows, a mean over rows, nothing random: parts of a batch add up to the batch."""
    g = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(60, 5, generator=g, dtype=torch.float64), torch.randint(3, (60,), generator=g)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return Problem(
        model=model,
        loss=lambda model, rows: F.cross_entropy(model(x[rows]), labels[rows]),
        batches=lambda step: torch.arange(12) + 12 * (step % 5),
        evaluate=lambda model: {"error": F.cross_entropy(model(x), labels).item()},
        steps=16,
        metric="error",
        eval_every=4,
        clip=1.0,
        outputs=lambda model, rows: model(x[rows]),
        targets=lambda rows: labels[rows],
        likelihood="cross_entropy",
    )


def astray(seed: int) -> Problem:
    """``smooth``, but the loss goes past the model that it is given, in which ranks join their gradients."""
    problem = smooth(seed)
    inner, own = problem.loss, problem.model
    problem.loss = lambda model, batch: inner(own, batch)
    return problem


def apart(seed: int) -> Problem:
    """``smooth`` with first weights that depend on the rank."""
    problem = smooth(seed)
    with torch.no_grad():
        next(problem.model.parameters()).add_(int(os.environ.get("RANK", "0")))
    return problem


def summed(seed: int) -> Problem:
    """``smooth`` with a sum over rows for a loss, and a parameter that it does not use."""
    problem = smooth(seed)
    inner = problem.loss
    problem.model.register_parameter("unused", nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    problem.loss = lambda model, rows: inner(model, rows) * len(rows)
    problem.outputs = problem.targets = problem.likelihood = None
    return problem


def half(seed: int) -> Problem:
    """``noisy`` in bfloat16."""
    problem = noisy(seed)
    problem.model.to(torch.bfloat16)
    inner = problem.loss
    problem.loss = lambda model, batch: inner(model, tuple(t.bfloat16() for t in batch)).float()
    x = torch.linspace(-1, 1, 48, dtype=torch.bfloat16).view(8, 6)
    problem.evaluate = lambda model: {"error": model(x).float().square().mean().item()}
    return problem


def waiting(seed: int) -> Problem:
    """``noisy``, but its evaluation at step 14 waits for a file named ``go`` and says so in a file ``waiting``."""
    problem = noisy(seed)
    inner, calls = problem.evaluate, [0]
    assert inner is not None

    def evaluate(model: nn.Module) -> dict[str, float]:
        folder = Path(os.environ["WAIT_FOLDER"])
        calls[0] += 1
        if calls[0] == 3 and not (folder / "go").exists():
            (folder / "waiting").touch()
            time.sleep(60)
        return inner(model)

    problem.evaluate = evaluate
    return problem


def meddling(seed: int) -> Problem:
    """``waiting``, but the evaluation changes the weights while it waits."""
    problem = waiting(seed)
    inner = problem.evaluate
    assert inner is not None

    def evaluate(model: nn.Module) -> dict[str, float]:
        weights = next(model.parameters())
        weights.mul_(2)
        result = inner(model)
        weights.div_(2)
        return result

    problem.evaluate = evaluate
    return problem


def explodes(seed: int) -> Problem:
    """The loss becomes infinite at step 5."""
    model = nn.Linear(2, 1)

    def loss(model: nn.Module, batch: int) -> Tensor:
        return model(torch.ones(2)).square().sum() / (0.0 if batch == 5 else 1.0) + 1.0

    return Problem(model=model, loss=loss, batches=lambda step: step, steps=20)


def singular(seed: int) -> Problem:
    """The fourth batch makes a matrix singular."""
    model = nn.Linear(2, 2)

    def loss(model: nn.Module, scale: float) -> Tensor:
        return torch.linalg.inv(scale * model.weight).square().sum()

    return Problem(model=model, loss=loss, batches=[1.0, 1.0, 1.0, 0.0], steps=20)


def steep(seed: int) -> Problem:
    """A finite loss with an infinite gradient: the square root at zero."""
    model = nn.Linear(3, 1)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).mean() + (0 * model(batch)).square().sum().sqrt()

    return Problem(model=model, loss=loss, batches=lambda step: torch.ones(2, 3), steps=60, eval_every=60)


def plain() -> Problem:
    """No seed, a list of batches, no evaluation."""
    model = nn.Linear(3, 1)
    batches = [torch.full((4, 3), float(i)) for i in range(3)]
    return Problem(model=model, loss=lambda m, x: (m(x) - 1).square().mean(), batches=batches, steps=10, eval_every=5)


def fails_later(seed: int) -> Problem:
    """The loss raises at step 3."""
    problem = plain()
    problem.loss = lambda m, x: m(x).sum() * (1 / 0 if float(x[0, 0]) == 2 else 1)
    return problem


def frozen(seed: int) -> Problem:
    """The task of the frozen runs: weights and batches are written down, no generator is asked for them."""
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(8.0).view(2, 4) / 8)
        model.bias.zero_()
    x = torch.arange(32.0).view(8, 4) / 32
    return Problem(
        model=model,
        loss=lambda model, rows: (model(x[rows]) - 1).square().mean(),
        batches=[torch.arange(4), torch.arange(4, 8)],
        evaluate=lambda model: {"error": (model(x) - 1).square().mean().item()},
        steps=12,
        metric="error",
        eval_every=4,
        data="written down",
    )


def rows(out: Path, ref: str, spec: OptimizerSpec = ADAMW) -> tuple[list[dict], list[dict]]:
    """Train and eval rows of seed 0 without the clocks."""
    metrics = read_metrics(RunStore(out).path(ref, spec.label, 0) / "metrics.jsonl")
    strip = [{k: v for k, v in row.items() if k not in TIMES} for row in metrics.train + metrics.evals]
    return strip[: len(metrics.train)], strip[len(metrics.train) :]


def checkpoints(out: Path, ref: str, spec: OptimizerSpec = ADAMW) -> Checkpoints:
    return Checkpoints(RunStore(out).path(ref, spec.label, 0) / "checkpoints")


def child(ref: str, out: str, started: object, options: dict, errors: object = None) -> None:
    """What a child process runs; it exits with the result's code, or with 2 and the error put into ``errors``.

    With ``errors`` it runs as nobody: root may write anywhere.
    """
    torch.set_num_threads(1)
    if errors is not None and os.geteuid() == 0:
        load_problem(ref)  # imports what it needs while it may
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    def progress(tick: Tick) -> None:
        if tick.step:
            started.set()  # type: ignore[attr-defined]

    try:
        result = train_torch(ref, Path(out), progress=progress, **options)
    except Exception as error:
        if errors is None:
            raise
        errors.put(f"{type(error).__name__}: {error}")  # type: ignore[attr-defined]
        os._exit(2)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os._exit(result.exit_code)
