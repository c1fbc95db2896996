"""Solvers in runs: reachable by name, recorded truly, resumed bit for bit; ordinary optimizers notice nothing."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from guided_descent.bench.files import BenchError
from guided_descent.bench.problem import Problem, ProblemError, check_problem, tensor_hash, tensors
from guided_descent.bench.runner import build_optimizer, build_schedule, train
from guided_descent.bench.specs import known_optimizers
from guided_descent.bench.store import OptimizerSpec, RunStore, ScheduleSpec, read_metrics
from guided_descent.solvers import LBFGS, SOLVERS, Solver

TIMES = ("seconds", "wall", "cpu", "optimizer_wall", "optimizer_cpu", "eval_wall")
REF = "test_solver_runs:flowers"


def flowers(seed: int) -> Problem:
    """Three classes in the plane; full batch."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(60, 2, generator=generator)
    y = (x[:, 0].sin() * 2 + x[:, 1]).clamp(-1.4, 1.4).round().long() + 1
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3))
    return Problem(
        model=model,
        loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        batches=[(x, y)],
        evaluate=lambda m: {"nats": F.cross_entropy(m(x), y).item()},
        steps=8,
        metric="nats",
        eval_every=4,
        outputs=lambda m, b: m(b[0]),
        targets=lambda b: b[1],
        likelihood="cross_entropy",
    )


def rows(out, spec: OptimizerSpec):
    metrics = read_metrics(RunStore(out).path(REF, spec.label, 0) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics.train + metrics.evals]


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])


@pytest.mark.parametrize("name", [*SOLVERS, "torch_lbfgs"])
def test_a_run_by_name_learns_and_is_recorded(name, tmp_path):
    options = {"natural_gradient": {"kl": 0.1}}
    spec = OptimizerSpec(name, {"max_iter": 2} if "bfgs" in name else options.get(name, {}))
    result = train(REF, spec, out=tmp_path, checkpoint_every=0)
    assert result.status == "complete"
    recorded = rows(tmp_path, spec)
    losses = [row["loss"] for row in recorded if row["kind"] == "train"]
    assert len(losses) == 8
    assert losses[0] == pytest.approx(recorded[8]["values"]["nats"], rel=1e-5)  # the loss before the step
    assert result.final < 0.5 * losses[0]
    assert [row["lr"] for row in recorded if row["kind"] == "train"] == [1.0] * 8  # the schedule leaves it alone
    assert recorded[0]["grad_norm"] > 0
    assert recorded[0]["update_rms"] > 0


@pytest.mark.parametrize("name", ["lbfgs", "hessian_free", "levenberg_marquardt"])
def test_an_interrupted_run_ends_as_if_never_stopped(name, tmp_path, monkeypatch):
    spec = OptimizerSpec(name, {"max_iter": 2} if "bfgs" in name else {})
    whole = train(REF, spec, out=tmp_path / "whole")
    stop = []

    def progress(tick):
        if tick.step >= 3 and not stop:
            stop.append(tick.step)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("guided_descent.bench.session.TICK_SECONDS", 0.0)
    first = train(REF, spec, out=tmp_path / "cut", progress=progress)
    assert first.status == "interrupted"
    second = train(REF, spec, out=tmp_path / "cut")
    assert second.final == whole.final
    assert rows(tmp_path / "cut", spec) == rows(tmp_path / "whole", spec)


def test_ordinary_optimizers_see_a_closure_and_nothing_else(tmp_path):
    """The same run with and without outputs in the problem, and against a loop by hand."""
    spec = OptimizerSpec("sgd", {"lr": 0.1, "momentum": 0.9})
    result = train(REF, spec, out=tmp_path, checkpoint_every=0, schedule=ScheduleSpec("constant", {}))
    torch.manual_seed(0)
    task = flowers(0)
    opt = build_optimizer(task.model, spec)
    x, y = task.batch(0)
    for row in (r for r in rows(tmp_path, spec) if r["kind"] == "train"):
        opt.zero_grad()
        loss = F.cross_entropy(task.model(x), y)
        loss.backward()
        assert loss.item() == row["loss"]
        opt.step()
    assert task.evaluate(task.model)["nats"] == result.final


def test_names_and_builds():
    names = known_optimizers()
    assert names == sorted(set(names))
    assert {"adamw", "lbfgs", "gauss_newton", "levenberg_marquardt", "hessian_free", "torch_lbfgs"} <= set(names)
    net = nn.Linear(2, 2)
    ours = build_optimizer(net, OptimizerSpec("lbfgs", {"history_size": 7}))
    assert isinstance(ours, LBFGS)
    assert ours.param_groups[0]["history_size"] == 7
    theirs = build_optimizer(net, OptimizerSpec("torch_lbfgs", {"max_iter": 4}))
    assert isinstance(theirs, torch.optim.LBFGS)
    assert (theirs.param_groups[0]["line_search_fn"], theirs.param_groups[0]["max_iter"]) == ("strong_wolfe", 4)
    for opt in (ours, theirs):
        schedule = build_schedule(opt, ScheduleSpec(), 100)
        schedule.step()
        assert opt.param_groups[0]["lr"] == 1.0


def test_a_wrong_option_is_one_line(tmp_path):
    with pytest.raises(BenchError, match=r"optimizer 'levenberg_marquardt': up=0\.5 must be > 1"):
        train(REF, OptimizerSpec("levenberg_marquardt", {"up": 0.5}), out=tmp_path)


def test_a_solver_that_needs_more_says_so_in_a_run(tmp_path):
    with pytest.raises(TypeError, match="GaussNewton needs the residuals or the outputs"):
        train("test_solver_runs:bare", OptimizerSpec("gauss_newton"), out=tmp_path)


def bare(seed: int) -> Problem:
    """``flowers`` with its loss alone."""
    problem = flowers(seed)
    problem.outputs = problem.targets = problem.likelihood = None
    return problem


def test_a_solver_takes_the_loss_alone_where_that_is_enough(tmp_path):
    result = train("test_solver_runs:bare", OptimizerSpec("damped_newton"), out=tmp_path, checkpoint_every=0)
    assert result.status == "complete"
    assert result.final < 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"likelihood": None}, "Problem has outputs and targets alone; outputs, targets and likelihood go together"),
        ({"likelihood": "poisson"}, "Problem.likelihood is 'poisson'; it must be one of cross_entropy, mse"),
        ({"residuals": lambda m, b: m(b)}, "Problem has outputs and residuals"),
        ({"jacobian": lambda m, b: m(b)}, "Problem.jacobian belongs to residuals"),
    ],
)
def test_half_descriptions_are_refused(changes, message):
    names = ("model", "loss", "batches", "outputs", "targets", "likelihood")
    fields = {name: getattr(flowers(0), name) for name in names}
    with pytest.raises(ProblemError, match=message):
        Problem(**(fields | changes))


def test_a_description_of_another_loss_is_refused():
    problem = flowers(0)
    problem.loss = lambda m, b: 2 * F.cross_entropy(m(b[0]), b[1])
    with pytest.raises(ProblemError, match=r"cross_entropy of the outputs is .* and the loss .* the same loss"):
        check_problem(problem)
    problem.outputs = lambda m, b: 1 / 0
    with pytest.raises(ProblemError, match="outputs and likelihood fail on the first batch with ZeroDivisionError"):
        check_problem(problem)


def test_every_solver_is_a_solver():
    assert all(issubclass(cls, Solver) for cls in SOLVERS.values())
    assert tensor_hash(tensors(flowers(0).batch(0))) == tensor_hash(tensors(flowers(1).batch(0)))
