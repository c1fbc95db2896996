"""BFGS and L-BFGS: torch's iterates, the product form, the Wolfe conditions, which pairs are kept."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from guided_descent.solvers import BFGS, LBFGS
from guided_descent.solvers.linesearch import Trial, cubic_minimiser, strong_wolfe
from oracles.solvers import bfgs_inverse


def quadratic(n: int = 20, condition: float = 100.0):
    """A quadratic whose Hessian has these many dimensions and this condition."""
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    a = q * torch.logspace(0, math.log10(condition), n, dtype=torch.float64) @ q.T
    b = torch.randn(n, dtype=torch.float64)
    return torch.randn(n, dtype=torch.float64), lambda x: x @ a @ x / 2 - b @ x


def rosenbrock():
    return torch.tensor([-1.2, 1.0], dtype=torch.float64), lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def closure_of(optimizer, x, f, calls):
    def closure():
        optimizer.zero_grad()
        loss = f(x)
        loss.backward()
        calls.append(loss.item())
        return loss

    return closure


@pytest.mark.parametrize("task", [quadratic, rosenbrock])
@pytest.mark.parametrize(("max_iter", "history"), [(1, 100), (4, 100), (20, 5)])
def test_lbfgs_makes_the_steps_of_torch(task, max_iter, history):
    """Iterates and number of evaluations, step for step, until the gradient is about 1e-6."""
    start, f = task()
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"max_iter": max_iter, "history_size": history}
    a = LBFGS([ours], **options, max_eval=1000)
    b = torch.optim.LBFGS([theirs], line_search_fn="strong_wolfe", max_eval=1000, **options)
    calls_a: list[float] = []
    calls_b: list[float] = []
    steps = 0
    while steps * max_iter < 60 and (steps == 0 or theirs.grad.abs().max() > 1e-6):
        first = a.step(closure_of(a, ours, f, calls_a))
        b.step(closure_of(b, theirs, f, calls_b))
        steps += 1
        assert (ours - theirs).abs().max() < 1e-10
        assert first.item() == pytest.approx(calls_b[0] if steps == 1 else first.item())
    assert steps * max_iter >= 10
    assert a.evaluations == a.gradients == len(calls_a) == len(calls_b)
    assert f(ours.detach()) < f(start)


def test_lbfgs_direction_is_the_product_form_of_its_pairs():
    """The two-loop recursion with 3 pairs against the dense matrix, for a history that has wrapped around."""
    start, f = quadratic(8)
    x = nn.Parameter(start)
    opt = LBFGS([x], max_iter=1, history_size=3)
    pairs = []
    for _ in range(6):
        before, g = x.detach().clone(), torch.autograd.grad(f(x), x)[0]
        opt.step(lambda: f(x))
        pairs.append((x.detach() - before, torch.autograd.grad(f(x), x)[0] - g))
    g = torch.randn(8, dtype=torch.float64)
    s, y = pairs[-1]
    reference = -bfgs_inverse(pairs[-3:], (s @ y) / (y @ y)) @ g
    torch.testing.assert_close(opt._direction(g), reference, rtol=1e-9, atol=1e-12)


def test_bfgs_keeps_the_product_form():
    start, f = quadratic(6)
    x = nn.Parameter(start)
    opt = BFGS([x], max_iter=1)
    pairs = []
    for _ in range(5):
        before, g = x.detach().clone(), torch.autograd.grad(f(x), x)[0]
        opt.step(lambda: f(x))
        pairs.append((x.detach() - before, torch.autograd.grad(f(x), x)[0] - g))
    s, y = pairs[0]
    h = opt.state[x]["inverse"]
    torch.testing.assert_close(h, bfgs_inverse(pairs, (s @ y) / (y @ y)), rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(h @ pairs[-1][1], pairs[-1][0], rtol=1e-8, atol=1e-10)  # the secant equation


def test_bfgs_with_exact_searches_ends_at_the_inverse_hessian():
    """On a quadratic of n dimensions, after n steps."""
    start, f = quadratic(5, 10.0)
    a = torch.autograd.functional.hessian(f, start)
    x = nn.Parameter(start)
    opt = BFGS([x])
    for _ in range(5):
        (g,) = torch.autograd.grad(f(x), x)
        d = opt._direction(g)
        t = -(g @ d) / (d @ a @ d)
        opt._pair(t * d, t * a @ d, -t * g)
        x.data.add_(d * t)
    torch.testing.assert_close(opt.state[x]["inverse"], torch.linalg.inv(a), rtol=1e-8, atol=1e-10)
    assert torch.autograd.grad(f(x), x)[0].abs().max() < 1e-9


def test_pairs_of_negative_curvature_are_refused_or_mended():
    for cls in (LBFGS, BFGS):
        x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        s = torch.tensor([1.0, 2.0, 0.5]).double()
        bs = 0.7 * s + 0.1
        plain, mended = cls([x]), cls([x], powell=True)
        plain._pair(s, -s, bs)
        assert plain.state[x]["pairs"] == 0
        mended._pair(s, -s, bs)
        assert mended.state[x]["pairs"] == 1
        if cls is LBFGS:  # s.y' = 0.2 s.B s exactly
            state = mended.state[x]
            assert (state["s"][0] @ state["y"][0]).item() == pytest.approx(0.2 * (s @ bs).item(), rel=1e-12)
        mended._pair(s, 2 * bs, bs)  # good enough: taken as it is
        if cls is LBFGS:
            assert torch.equal(mended.state[x]["y"][1], 2 * bs)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_a_search_that_succeeds_satisfies_both_wolfe_conditions(seed, exponent):
    """Smooth one-dimensional functions bounded below, first steps over six decades."""
    c = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def at(t: float) -> Trial:
        z = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        f = 0.05 * (z + c[0]) ** 4 + c[1] * torch.sin(2 * z + c[2]) + 0.1 * c[3] * z
        (g,) = torch.autograd.grad(f, z)
        return Trial(t, f.item(), g.item(), g.reshape(1))

    start = at(0.0)
    if start.slope >= -1e-3:
        return
    found = strong_wolfe(at, start, 10**exponent, 1.0, tolerance=1e-12, most=60)
    assert found.t > 0
    assert found.f <= start.f + 1e-4 * found.t * start.slope
    assert abs(found.slope) <= 0.9 * abs(start.slope) + 1e-12


def test_the_cubic_minimiser_is_exact_for_cubics():
    def cubic(t: float) -> Trial:
        return Trial(t, t**3 - 3 * t, 3 * t**2 - 3, torch.zeros(1))

    assert cubic_minimiser(cubic(0.0), cubic(2.0), 0.0, 2.0) == pytest.approx(1.0, abs=1e-14)
    assert cubic_minimiser(cubic(2.0), cubic(0.0), 0.0, 2.0) == pytest.approx(1.0, abs=1e-14)
    assert cubic_minimiser(cubic(0.0), cubic(2.0), 1.5, 1.8) == 1.5  # clamped
    infinite = Trial(1.0, math.inf, math.nan, torch.zeros(1))
    assert cubic_minimiser(Trial(0.0, 0.0, -1.0, torch.zeros(1)), infinite, 0.0, 1.0) == 0.5


@pytest.mark.parametrize("cls", [LBFGS, BFGS])
def test_a_step_into_a_region_without_a_loss_is_halved(cls):
    """``x - log x`` with first trials so long that x is negative, where the loss is NaN."""
    x = nn.Parameter(torch.tensor([5.0], dtype=torch.float64))
    opt = cls([x], lr=50.0)
    for _ in range(3):
        opt.step(lambda: (x - x.log()).sum())
    assert x.item() == pytest.approx(1.0, abs=1e-3)


def test_a_search_that_finds_nothing_forgets_and_moves_nothing():
    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    opt = LBFGS([x])

    def wrong():  # the gradient points downhill: no step along -g is lower
        x.grad = -2 * x.detach()
        return x.detach().square().sum()

    before = x.detach().clone()
    opt.step(wrong)
    assert torch.equal(x.detach(), before)
    assert (opt.rejected, opt.state[x]["pairs"], opt.state[x]["iterations"]) == (1, 0, 0)


def test_the_pair_is_of_one_batch():
    """Two batches with different curvature: the pair of the first step holds the curvature of the first batch."""
    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    opt = LBFGS([x], max_iter=1)
    opt.step(lambda: 2 * x.square().sum())
    state = opt.state[x]
    assert (state["y"][0] / state["s"][0]).item() == pytest.approx(4.0)
    x.data.fill_(1.0)
    opt.step(lambda: 50 * x.square().sum())
    assert (state["y"][1] / state["s"][1]).item() == pytest.approx(100.0)
