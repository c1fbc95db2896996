"""Damped Newton, Gauss-Newton, Levenberg-Marquardt, natural gradient and Hessian-free against dense references."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from guided_descent.solvers import (
    DampedNewton,
    GaussNewton,
    HessianFree,
    LevenbergMarquardt,
    Likelihood,
    NaturalGradient,
    Objective,
)
from guided_descent.solvers.curvature import Linearization
from guided_descent.solvers.hessian_free import conjugate_gradients
from oracles.solvers import flat_function, ggn, jacobian, levenberg_marquardt, softmax_fisher


def fit(n: int = 12, hidden: int = 3):
    """A small regression: model, objective, and the residual as a function of the flat parameters."""
    model = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 1)).double()
    x = torch.randn(n, 2, dtype=torch.float64)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:] ** 2
    function, theta = flat_function(model, lambda m: (m(x) - y).flatten())
    return model, Objective(residuals=lambda: model(x) - y), function, theta


def classify(n: int = 8):
    model = nn.Linear(3, 4).double()
    x, y = torch.randn(n, 3, dtype=torch.float64), torch.randint(4, (n,))
    function, theta = flat_function(model, lambda m: m(x))
    return model, Objective(outputs=lambda: model(x), likelihood=Likelihood("cross_entropy", y)), function, theta, y


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("space", ["parameters", "samples", "auto"])
@pytest.mark.parametrize("rows", [4, 30])
def test_gauss_newton_solves_linear_least_squares_in_one_step(space, rows):
    x, y = torch.randn(rows, 6, dtype=torch.float64), torch.randn(rows, 2, dtype=torch.float64)
    model = nn.Linear(6, 2, bias=False).double()
    opt = GaussNewton(model, damping=0.0 if rows > 6 else 1e-12, space=space)
    first = (model(x) - y).square().mean().item()
    assert opt.step(Objective(residuals=lambda: model(x) - y)).item() == pytest.approx(first)
    best = torch.linalg.lstsq(x, y, driver="gelsd").solution
    assert (model(x) - y).square().sum().item() == pytest.approx((x @ best - y).square().sum().item(), abs=1e-9)
    if rows > 6:
        torch.testing.assert_close(model.weight.detach(), best.T, rtol=1e-8, atol=1e-9)
    assert (opt.evaluations, opt.gradients, opt.products) == (2, 1, 2 * rows)


@pytest.mark.parametrize("space", ["parameters", "samples"])
def test_gauss_newton_step_is_the_damped_dense_solve(space):
    """For softmax outputs: d = -(J'HJ + lam I)^-1 g with H and J from autograd."""
    model, objective, function, theta, y = classify()
    loss = lambda z: F.cross_entropy(z, y)  # noqa: E731
    t = theta.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(function(t)), t)
    reference = theta - torch.linalg.solve(ggn(function, loss, theta) + 0.1 * eye(len(theta)), g)
    opt = GaussNewton(model, damping=0.1, space=space)
    opt.step(objective)
    torch.testing.assert_close(flat(model), reference, rtol=1e-10, atol=1e-12)
    assert loss(function(flat(model))) < loss(function(theta))
    torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in model.parameters()]), g, rtol=1e-10, atol=1e-13)


def test_gauss_newton_backtracks_by_halves():
    """atan from 3: the full step overshoots; the taken one is the first of 1, 1/2, ... with enough decrease."""
    x = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    opt = GaussNewton([x], damping=1e-14)
    opt.step(Objective(residuals=lambda: x.atan(), scale=1.0))
    full = -math.atan(3.0) * 10
    t = 1.0
    while math.atan(3 + t * full) ** 2 > math.atan(3) ** 2 - 1e-4 * t * 2 * math.atan(3) ** 2:
        t /= 2
    assert t < 1
    assert x.item() == pytest.approx(3 + t * full, rel=1e-9)
    assert opt.evaluations == 2 - math.log2(t)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("space", ["parameters", "samples"])
def test_levenberg_marquardt_follows_the_dense_reference(diagonal, space):
    """Thirty steps of one trial each: parameters and damping, rejections included."""
    model, objective, function, theta = fit()
    metric = "diagonal" if diagonal else "identity"
    opt = LevenbergMarquardt(model, damping=1e-4, metric=metric, space=space, trials=1)
    path = levenberg_marquardt(function, theta, 1e-4, 30, diagonal)
    for reference, lam in path:
        opt.step(objective)
        torch.testing.assert_close(flat(model), reference, rtol=1e-6, atol=1e-7)
        assert opt.param_groups[0]["damping"] == pytest.approx(lam, rel=1e-12)
    refused = sum(torch.equal(a, b) for (a, _), (b, _) in zip(path, [(theta, 0), *path]))
    assert opt.rejected == refused
    assert function(flat(model)).square().mean() < 0.3 * function(theta).square().mean()


def test_a_refused_step_changes_no_bit_and_raises_the_damping():
    x = nn.Parameter(torch.tensor([3.0, 0.1], dtype=torch.float64))
    before = x.detach().clone()
    opt = LevenbergMarquardt([x], damping=1e-9, trials=1)
    objective = Objective(residuals=lambda: torch.atan(x), scale=1.0)
    opt.step(objective)  # the full step overshoots
    assert torch.equal(x.detach(), before)
    assert opt.param_groups[0]["damping"] == 2e-9
    assert (opt.steps, opt.rejected, opt.evaluations) == (1, 1, 2)
    patient = LevenbergMarquardt([x], damping=1e-9, trials=60)
    patient.step(objective)  # the same, tried again within the step with one Jacobian
    assert x.detach().atan().square().sum() < before.atan().square().sum()
    assert (patient.rejected, patient.products) == (0, 2)


def test_levenberg_marquardt_bounds_its_damping():
    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    opt = LevenbergMarquardt([x], damping=1e-2, least=4e-3)
    for _ in range(3):
        opt.step(Objective(residuals=lambda: x, scale=1.0))
    assert opt.param_groups[0]["damping"] == 4e-3
    worse = LevenbergMarquardt([x], damping=1.0, most=6.0, trials=9)
    calls = []

    def rising():  # every trial is worse than the start
        calls.append(1)
        return x + len(calls)

    before = x.detach().clone()
    worse.step(Objective(residuals=rising))
    assert worse.param_groups[0]["damping"] == 6.0
    assert torch.equal(x.detach(), before)
    assert len(calls) == 10


@pytest.mark.parametrize("space", ["parameters", "samples"])
def test_natural_gradient_uses_the_exact_fisher_matrix(space):
    """Against the enumeration of all labels; other targets change the gradient, not the matrix."""
    model, objective, function, theta, y = classify()
    t = theta.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(function(t), y), t)
    fisher = softmax_fisher(function, theta)
    NaturalGradient(model, lr=0.3, damping=0.05, space=space).step(objective)
    reference = theta - 0.3 * torch.linalg.solve(fisher + 0.05 * eye(len(theta)), g)
    torch.testing.assert_close(flat(model), reference, rtol=1e-10, atol=1e-12)


def test_natural_gradient_moves_by_no_more_than_the_bound():
    """The true divergence of a short step, mean_x KL(p || p'), against the bound to second order."""
    model, objective, function, theta, _ = classify()
    NaturalGradient(model, kl=1e-5).step(objective)
    p, q = function(theta).log_softmax(-1), function(flat(model)).log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean().item() == pytest.approx(1e-5, rel=0.02)


def test_natural_gradient_does_not_see_a_linear_change_of_coordinates():
    """theta = M phi: without damping the same path in theta, where plain gradients would differ."""
    n = 40
    x, y = torch.randn(n, 3, dtype=torch.float64), torch.rand(n, 1, dtype=torch.float64)
    m = torch.randn(3, 3, dtype=torch.float64)
    a = nn.Parameter(torch.randn(3, 1, dtype=torch.float64))
    b = nn.Parameter(torch.linalg.solve(m, a.detach()))
    first = NaturalGradient([a], lr=0.5, damping=0.0, space="parameters")
    second = NaturalGradient([b], lr=0.5, damping=0.0, space="parameters")
    for _ in range(4):
        first.step(Objective(residuals=lambda: torch.tanh(x @ a) - y))
        second.step(Objective(residuals=lambda: torch.tanh(x @ (m @ b)) - y))
        torch.testing.assert_close(m @ b.detach(), a.detach(), rtol=1e-7, atol=1e-9)


def test_damped_newton_is_exact_on_a_quadratic_and_leaves_a_saddle():
    h = torch.randn(5, 5, dtype=torch.float64)
    h = h @ h.T + eye(5)
    x = nn.Parameter(torch.randn(5, dtype=torch.float64))
    opt = DampedNewton([x], damping=1e-12)
    opt.step(lambda: (x - 1) @ h @ (x - 1) / 2)
    assert (x - 1).abs().max() < 1e-10
    assert (opt.evaluations, opt.gradients, opt.products) == (2, 1, 5)
    z = nn.Parameter(torch.tensor([1.0, 1e-3], dtype=torch.float64))
    saddle = lambda: z[0] ** 2 - z[1] ** 2 + z[1] ** 4 / 2  # noqa: E731
    newton = DampedNewton([z], damping=1e-2)
    values = [newton.step(saddle).item() for _ in range(25)]
    assert all(b <= a for a, b in pairwise(values))
    torch.testing.assert_close(z.detach().abs(), torch.tensor([0.0, 1.0]).double(), rtol=1e-4, atol=1e-4)


def test_damped_newton_step_is_the_dense_solve():
    model, objective, function, theta, y = classify()
    loss = lambda t: F.cross_entropy(function(t), y)  # noqa: E731
    h, t = torch.autograd.functional.hessian(loss, theta), theta.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(t), t)
    mu = 0.2 + max(0.0, -torch.linalg.eigvalsh(h)[0].item())
    DampedNewton(model, damping=0.2).step(objective)
    reference = theta - torch.linalg.solve(h + mu * eye(len(theta)), g)
    torch.testing.assert_close(flat(model), reference, rtol=1e-9, atol=1e-11)


def test_conjugate_gradients_solve_and_know_their_value():
    n = 30
    b_root = torch.randn(n, n, dtype=torch.float64)
    matrix = b_root @ b_root.T / n + 0.1 * eye(n)
    b, start = torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    m = matrix.diagonal() ** 0.75
    found = conjugate_gradients(lambda v: matrix @ v, b, start, m, 250)
    for iterate in found:
        assert iterate.phi == pytest.approx((iterate.d @ matrix @ iterate.d / 2 - b @ iterate.d).item(), rel=1e-9)
    assert all(y.phi < x.phi for x, y in pairwise(found))
    exact = torch.linalg.solve(matrix, b)
    least = -(b @ exact / 2).item()
    assert found[-1].phi == pytest.approx(least, rel=1e-2)  # it stops when progress is small
    assert len(conjugate_gradients(lambda v: matrix @ v, b, 0 * start, m, 3)) == 3


def test_conjugate_gradients_keep_the_iterates_of_index_1_3_to_the_j():
    n = 300
    values = torch.logspace(-7, 0, n, dtype=torch.float64)
    products = []

    def product(v):
        products.append(v)
        return values * v

    found = conjugate_gradients(product, torch.ones(n, dtype=torch.float64), torch.zeros(n).double(), torch.ones(n), 40)
    assert len(products) == 40  # none for a start at zero
    due = sorted({math.ceil(1.3**j) for j in range(15)})
    assert len(found) == len([i for i in due if i <= 40]) + (40 not in due)


def test_conjugate_gradients_stop_at_negative_curvature_and_for_lack_of_progress():
    d = torch.tensor([1.0, -1.0], dtype=torch.float64)
    found = conjugate_gradients(lambda v: d * v, torch.ones(2).double(), torch.zeros(2).double(), torch.ones(2), 50)
    assert len(found) == 1
    assert bool((found[0].d == 0).all())
    n, calls = 200, []
    values = torch.linspace(1, 2, n, dtype=torch.float64)

    def product(v):
        calls.append(1)
        return values * v

    conjugate_gradients(product, torch.ones(n).double(), torch.zeros(n).double(), torch.ones(n), 250)
    assert 10 < len(calls) < 20  # solved after a few; then i > k = 10 lets it stop


def test_hessian_free_takes_the_damped_gauss_newton_step():
    """With the iterations run to their end, the last iterate the best one and a full step."""
    model, objective, function, theta = fit()
    j, r = jacobian(function, theta), function(theta)
    n, lam = len(r), 5.0
    d = -torch.linalg.solve(2 / n * j.T @ j + lam * eye(len(theta)), 2 / n * j.T @ r)
    opt = HessianFree(model, damping=lam, probes=0)
    opt.step(objective)
    torch.testing.assert_close(flat(model), theta + d, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(opt.state[next(model.parameters())]["direction"], d, rtol=1e-3, atol=1e-5)
    big = 2 / n * j.T @ j
    g = 2 / n * j.T @ r
    rho = (r.square().mean() - function(theta + d).square().mean()) / -(g @ d + d @ big @ d / 2)
    factor = 3 / 2 if rho < 0.25 else 2 / 3 if rho > 0.75 else 1.0
    assert opt.param_groups[0]["damping"] == pytest.approx(lam * factor)


def test_the_preconditioner_estimates_the_diagonal_without_bias():
    model, objective, _, _ = fit()
    linear = Linearization(objective, list(model.parameters()), lambda n: None)
    exact = linear.dense().square().sum(0)
    opt = HessianFree(model, probes=3000)
    found = opt._preconditioner(linear, 0.01) ** (4 / 3) - 0.01
    torch.testing.assert_close(found, exact, rtol=0.15, atol=0.02 * exact.max().item())
    assert torch.equal(opt._preconditioner(linear, 0.01), opt._preconditioner(linear, 0.01))  # drawn from the step
    few = HessianFree(model, probes=1)
    first = few._preconditioner(linear, 0.01)
    few.param_groups[0]["steps"] = 1
    assert not torch.equal(few._preconditioner(linear, 0.01), first)


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda m: GaussNewton(m, damping=1e-6), 40),
        (lambda m: LevenbergMarquardt(m), 40),
        (lambda m: LevenbergMarquardt(m, metric="diagonal"), 40),
        (lambda m: HessianFree(m, damping=1e-2), 60),
    ],
)
def test_they_fit_a_small_network(make, steps):
    """A tanh network of 8 hidden units on 12 points, far below what gradient descent reaches in as many steps."""
    model, objective, _, _ = fit(12, 8)
    opt = make(model)
    first = opt.step(objective).item()
    for _ in range(steps - 1):
        last = opt.step(objective).item()
    assert last < 1e-3 * first
