"""The smoke problems: their optimum is the optimum, and their shape is the one they claim."""

from __future__ import annotations

import pytest
import torch

from guided_descent.bench.problem import Problem, load_problem
from guided_descent.bench.smoke import _logistic_optimum
from guided_descent.bench.workloads import FAMILIES

KNOWN = [name for name in FAMILIES["smoke"] if name.startswith("smoke-")]  # those whose optimum is known


def value(task: Problem, **weights: torch.Tensor) -> float:
    """The loss at given weights."""
    with torch.no_grad():
        for name, tensor in weights.items():
            task.model.get_parameter(name).copy_(tensor)
        return task.loss(task.model, task.batch(0)).item()


def gradients(task: Problem) -> list[torch.Tensor]:
    return list(torch.autograd.grad(task.loss(task.model, task.batch(0)), list(task.model.parameters())))


@pytest.mark.parametrize("name", KNOWN)
def test_the_distance_starts_at_one_in_float64(name):
    task = load_problem(name, 0)
    with torch.no_grad():
        values = task.evaluate(task.model)
    assert values["distance"] == pytest.approx(1, rel=1e-12)
    assert values["gap"] > 0
    assert all(p.dtype == torch.float64 for p in task.model.parameters())


@pytest.mark.parametrize(
    ("name", "optimum"),
    [("smoke-quadratic", torch.zeros(100)), ("smoke-rosenbrock", torch.ones(5, 2))],
)
def test_the_known_optimum_is_stationary_with_distance_and_gap_zero(name, optimum):
    task = load_problem(name, 0)
    assert value(task, x=optimum) == 0
    with torch.no_grad():
        assert task.evaluate(task.model) == {"distance": 0, "gap": 0}
    assert gradients(task)[0].abs().max() == 0


def test_the_quadratic_has_condition_a_million():
    task = load_problem("smoke-quadratic", 0)
    columns = []
    for unit in torch.eye(100):
        value(task, x=unit)
        columns += gradients(task)
    hessian = torch.stack(columns)
    spectrum = torch.linalg.eigvalsh(hessian)
    assert spectrum[-1].item() == pytest.approx(1, rel=1e-10)
    assert (spectrum[-1] / spectrum[0]).item() == pytest.approx(1e6, rel=1e-6)
    off_diagonal = hessian - hessian.diagonal().diag()
    assert off_diagonal.norm() > 0.5 * hessian.norm()  # rotated: no diagonal scaling can cure it


def test_the_factorisation_has_the_written_spectrum_and_reaches_zero():
    """With one 1 in each factor, ``f = 1/2 - M_ij + f(0)``: so f itself tells the target."""
    task = load_problem("smoke-factorisation", 0)
    u, v = torch.zeros(30, 5), torch.zeros(20, 5)
    at_zero = value(task, u=u, v=v)
    target = torch.empty(30, 20, dtype=torch.float64)
    for i in range(30):
        for j in range(20):
            u[i, 0] = v[j, 0] = 1
            target[i, j] = 0.5 + at_zero - value(task, u=u, v=v)
            u[i, 0] = v[j, 0] = 0
    left, singular, right = torch.linalg.svd(target, full_matrices=False)
    assert singular[:5].tolist() == pytest.approx([1, 0.5, 0.25, 0.125, 0.0625], rel=1e-9)
    assert singular[5:].max() < 1e-12
    root = singular[:5].sqrt()
    assert value(task, u=left[:, :5] * root, v=right[:5].T * root) < 1e-24


def test_the_logistic_optimum_is_stationary_and_least():
    task = load_problem("smoke-logistic", 0)
    _, _, best = _logistic_optimum()
    least = value(task, weight=best[:, :-1], bias=best[:, -1])
    assert max(g.abs().max() for g in gradients(task)) < 1e-13
    with torch.no_grad():
        assert task.evaluate(task.model) == pytest.approx({"distance": 0, "gap": 0}, abs=1e-14)
    for direction in torch.randn(5, 10, 64, generator=torch.Generator().manual_seed(0)):
        assert value(task, weight=best[:, :-1] + 1e-3 * direction, bias=best[:, -1]) > least


@pytest.mark.parametrize("name", KNOWN)
def test_a_second_order_method_gets_there(name):
    """L-BFGS with a line search reduces the gap by 1e6: the optimum can be reached from the start."""
    task = load_problem(name, 1)
    optimizer = torch.optim.LBFGS(
        task.model.parameters(),
        max_iter=1000,
        history_size=100,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-14,
        tolerance_change=1e-18,
    )

    def closure():
        optimizer.zero_grad()
        loss = task.loss(task.model, task.batch(0))
        loss.backward()
        return loss

    with torch.no_grad():
        start = task.evaluate(task.model)["gap"]
    optimizer.step(closure)
    with torch.no_grad():
        assert task.evaluate(task.model)["gap"] < 1e-6 * start
