"""Burgers' equation: the exact solution, the derivatives through the network, the residuals and their Jacobian."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate

from guided_descent.bench import burgers
from guided_descent.bench.problem import load_problem
from guided_descent.solvers.curvature import Linearization
from guided_descent.solvers.objective import Objective

NU = 0.01 / math.pi


def by_adaptive_quadrature(x: float, t: float) -> float:
    """The Cole-Hopf integrals over the real line, by QUADPACK in pieces around the peak."""

    def weight(y: float) -> float:  # the exponent's largest value is 1 / (2 pi nu) = 50
        return math.exp(-math.cos(math.pi * y) / (2 * math.pi * NU) - 50 - (x - y) ** 2 / (4 * NU * t))

    edges = np.linspace(x - 1.2, x + 1.2, 25)
    parts = list(pairwise(edges))
    options = {"epsabs": 0, "epsrel": 1e-12, "limit": 200}
    above = sum(integrate.quad(lambda y: math.sin(math.pi * y) * weight(y), a, b, **options)[0] for a, b in parts)
    below = sum(integrate.quad(weight, a, b, **options)[0] for a, b in parts)
    return -above / below


@pytest.mark.filterwarnings("ignore::scipy.integrate.IntegrationWarning")
@pytest.mark.parametrize(("x", "t"), [(0.5, 0.25), (0.01, 0.5), (-0.3, 0.75), (0.05, 1.0), (0.9, 0.99)])
def test_the_reference_agrees_with_adaptive_quadrature(x, t):
    assert float(burgers.exact(np.array(x), np.array(t))) == pytest.approx(by_adaptive_quadrature(x, t), abs=1e-9)


def test_the_reference_has_the_published_largest_slope():
    """Basdevant et al. 1986: |du/dx| at x = 0 is largest at t = 1.6037/pi, where it is 152.00516."""
    t, h = np.linspace(1.55, 1.65, 1001) / math.pi, 1e-6
    slope = -(burgers.exact(np.full_like(t, h), t) - burgers.exact(np.full_like(t, -h), t)) / (2 * h)
    assert slope.max() == pytest.approx(152.00516, abs=2e-4)
    assert t[slope.argmax()] * math.pi == pytest.approx(1.6037, abs=2e-4)


def test_the_reference_satisfies_equation_start_and_walls():
    """Finite differences of fourth order at places that the layer does not reach within the stencil's error."""
    x, t = np.meshgrid(np.linspace(-0.9, 0.9, 19), np.linspace(0.1, 0.9, 9))
    h = 1e-3

    def u(dx: int, dt: int) -> np.ndarray:
        return burgers.exact(x + dx * h, t + dt * h)

    u_x = (u(-2, 0) - 8 * u(-1, 0) + 8 * u(1, 0) - u(2, 0)) / (12 * h)
    u_t = (u(0, -2) - 8 * u(0, -1) + 8 * u(0, 1) - u(0, 2)) / (12 * h)
    u_xx = (-u(-2, 0) + 16 * u(-1, 0) - 30 * u(0, 0) + 16 * u(1, 0) - u(2, 0)) / (12 * h * h)
    assert np.abs(u_t + u(0, 0) * u_x - NU * u_xx).max() < 1e-6
    places = np.linspace(-1, 1, 41)
    np.testing.assert_allclose(burgers.exact(places, np.zeros(41)), -np.sin(np.pi * places), atol=1e-14)
    walls = burgers.exact(np.array([-1.0, 1.0]), np.array([0.7, 0.7]))
    assert np.abs(walls).max() < 1e-12
    np.testing.assert_allclose(burgers.exact(-x, t), -burgers.exact(x, t), atol=1e-12)


def test_more_nodes_change_nothing():
    grid, u = burgers.reference()
    more = burgers.exact(grid[:, 0].numpy(), grid[:, 1].numpy(), 150)
    assert np.abs(u.numpy() - more).max() < 1e-12
    assert grid.shape == (25_600, 2)
    assert grid.min(0).values.tolist() == [-1.0, 0.0]
    assert grid.max(0).values.tolist() == [1.0, 1.0]


def test_the_four_streams_are_the_derivatives():
    """Against double backward through the plain forward pass."""
    net = burgers.BurgersNet(width=7, depth=3)
    points = torch.rand(6, 2, dtype=torch.float64).mul(2).sub(1).requires_grad_()
    u = net(points)
    first = torch.autograd.grad(u.sum(), points, create_graph=True)[0]
    second = torch.autograd.grad(first[:, 0].sum(), points)[0]
    streams = net.jet(points.detach())
    for found, expected in zip(streams, (u, first[:, 0], first[:, 1], second[:, 0]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_residuals_are_the_equation_and_the_edge():
    net, at = burgers.BurgersNet(), burgers.points()
    r = burgers.residuals(net, at)
    u, u_x, u_t, u_xx = net.jet(at.inside)
    equation, start, walls = (u_t + u * u_x - NU * u_xx), net(at.edge[:100]), net(at.edge[100:])
    start = start + torch.sin(math.pi * at.edge[:100, 0])
    terms = equation.square().mean() + start.square().mean() + walls.square().mean()
    torch.testing.assert_close(r.square().mean(), terms, rtol=1e-12, atol=0)
    assert len(r) == 2200
    assert at.inside[:, 0].abs().max() <= 1
    assert bool(((at.inside[:, 1] >= 0) & (at.inside[:, 1] <= 1)).all())
    assert bool((at.edge[:100, 1] == 0).all())
    assert bool((at.edge[100:, 0].abs() == 1).all())


def test_the_jacobian_is_that_of_autograd():
    """Against batched backward passes through the residuals, on some of the points."""
    net, at = burgers.BurgersNet(width=5, depth=3), burgers.points()
    few = burgers.Points(at.inside[::100], at.edge[::20], at.values[::20], torch.rand(30, dtype=torch.float64) + 0.5)
    objective = Objective(residuals=lambda: burgers.residuals(net, few), scale=0.5)
    expected = Linearization(objective, list(net.parameters()), lambda n: None).dense()
    torch.testing.assert_close(burgers.jacobian(net, few), expected, rtol=1e-11, atol=1e-13)


def test_the_workload_is_the_written_one():
    task = load_problem("pinn-burgers", 0)
    assert sum(p.numel() for p in task.trainable()) == 3297
    assert all(p.dtype == torch.float64 for p in task.trainable())
    assert (task.steps, task.metric, task.target) == (1000, "error", 5e-3)
    with torch.no_grad():
        grid, u = burgers.reference()
        expected = ((task.model(grid) - u).norm() / u.norm()).item()
        assert task.evaluate(task.model)["error"] == pytest.approx(expected)


def test_a_few_steps_of_levenberg_marquardt_halve_the_error():
    """Five steps from the first weights; sample space, since there are fewer residuals than parameters."""
    from guided_descent.solvers import LevenbergMarquardt

    task = load_problem("pinn-burgers", 0)
    small = burgers.BurgersNet(width=12, depth=3)
    at = burgers.points()
    few = burgers.Points(at.inside[::4], at.edge[::2], at.values[::2], torch.ones(600, dtype=torch.float64))
    objective = Objective(
        residuals=lambda: burgers.residuals(small, few), jacobian=lambda: burgers.jacobian(small, few)
    )
    assert task.objective(None).jacobian is not None
    opt = LevenbergMarquardt(small)
    losses = [opt.step(objective).item() for _ in range(15)]
    assert losses[-1] < 0.25 * losses[0]
    assert burgers.relative_error(small) < 0.7
