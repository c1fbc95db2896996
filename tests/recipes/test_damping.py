"""How a damping is chosen: cross-validation against explicit hat matrices, alignment in the single-index model, LM."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.parts.damping import (
    GRID,
    LevenbergMarquardt,
    QuadraticStep,
    add_joint,
    cross_validated,
    dominant,
    factored,
    two_steps,
)
from guided_descent.parts.geometry.kfac import Kfac
from guided_descent.recipes.kfac import KFAC
from oracles.kfac import Bed, block, damped_solve, factors, layer, numbers


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_eigenvalues_of_both_forms() -> None:
    left, right = rand(2, 3, seed=1).square(), rand(2, 4, seed=2).square()
    lam = torch.tensor([0.1, 0.2]).double()
    out = add_joint(torch.empty(2, 3, 4).double(), left, right, lam)
    torch.testing.assert_close(out[1], torch.outer(left[1], right[1]) + 0.2)
    torch.testing.assert_close(add_joint(out, None, right, 0.3)[0], right[0].expand(3, 4) + 0.3)
    pi = (right.mean(1) / left.mean(1)).sqrt()
    out = factored(out, left, right, 0.25)
    torch.testing.assert_close(out[0], torch.outer(left[0] + 0.5 / pi[0], right[0] + 0.5 * pi[0]))
    out = factored(out, left * 0, right, 0.25)
    torch.testing.assert_close(out[0], 0.5 * (right[0] + 0.5).expand(3, 4))  # pi is 1 where a trace is 0
    out = factored(out, left * 1e-30, right, 0.25)
    assert out.isfinite().all()
    assert float(out.min()) > 0


def test_the_leading_direction() -> None:
    g = torch.outer(rand(6, seed=1), rand(5, seed=2)) + 0.1 * rand(6, 5, seed=3)
    u = dominant(torch.stack([g, g * 1e-12, g * 0]))
    exact = torch.linalg.svd(g).U[:, 0]
    assert float((u[0] @ exact).abs()) == pytest.approx(1, abs=1e-9)
    assert float((u[1] @ exact).abs()) == pytest.approx(1, abs=1e-9)
    assert not u[2].any()


def scores(x: Tensor, y: Tensor, grid: Tensor) -> Tensor:
    """GCV with the explicit hat matrix."""
    n, found = len(x), []
    for lam in grid.tolist():
        hat = x @ torch.linalg.solve(x.T @ x + n * lam * torch.eye(x.shape[1]).double(), x.T)
        residual = y - hat @ y
        found.append(residual.square().mean() / (1 - hat.trace() / n) ** 2)
    return torch.stack(found)


@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
def test_cross_validation_is_that_of_the_hat_matrix(noise: float) -> None:
    x = rand(40, 12, seed=1) * torch.logspace(0, -1.5, 12)
    y = x @ rand(12, seed=2) + noise * 0.1 * rand(40, seed=3)
    values, q = torch.linalg.eigh(x.T @ x / 40)
    w = q.T @ x.T @ y / 40
    lam = cross_validated(values[None], w.square()[None], y.square().mean()[None], torch.tensor([40.0]))
    grid = GRID * values.mean()
    assert float(lam) == pytest.approx(float(grid[scores(x, y, grid).argmin()]))


def test_cross_validation_of_nothing_is_harmless() -> None:
    zeros = torch.zeros(1, 4).double()
    assert not float(cross_validated(zeros, zeros, torch.zeros(1).double(), torch.zeros(1))) > 0
    few = cross_validated(torch.ones(1, 4).double(), torch.ones(1, 4).double(), torch.ones(1).double(), torch.ones(1))
    assert few.isfinite().all()


@pytest.mark.parametrize("sides", ["right", "both"])
def test_a_layer_is_damped_by_the_ridge_of_its_own_batch(sides: str) -> None:
    n, m, samples, passes = 6, 4, 50, 2
    x, d = rand(samples, n, seed=1) * torch.logspace(0, -1, n), rand(samples, m, seed=2)
    d = d + 2 * torch.outer(x @ rand(n, seed=3), rand(m, seed=4))
    g = d.T @ x / samples
    bed = Bed(Kfac(rule="gcv", sides=sides), [block(m, n)], numbers(fisher="empirical"))
    for half in range(passes):
        rows = slice(25 * half, 25 * half + 25)
        bed.capture(layer(x[rows, None], d[rows, None] / passes, 25))
    out = bed.update(g[None])[0]
    grid = GRID * (x.T @ x / samples).trace() / n
    lam = float(grid[scores(x, d @ torch.linalg.svd(g).U[:, 0], grid).argmin()])
    big_a, big_b = factors(x[:, None], d[:, None], samples)
    curvature = torch.kron(torch.eye(m).double(), big_a) if sides == "right" else torch.kron(big_b, big_a)
    lam = lam if sides == "right" else lam * float(big_b.trace()) / m
    assert float(bed.state["damping"][0]) == pytest.approx(lam)
    torch.testing.assert_close(out, damped_solve(curvature, g, lam))


def single_index(kappa: float, where: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, output gradients of the first layer and the target direction of a two-layer ReLU network at its start.

    ``f(x) = N^-1/2 a^T relu(G x)`` with a ~ N(0, 1/N), ``y = relu(beta^T x) + noise``, inputs with a log-spaced
    spectrum of trace d in a random basis, and beta in all of it or in its quarter of least variance, with
    ``beta^T Sigma beta = 1``.
    """
    d, n, width = 400, 1600, 800
    made = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    basis = torch.linalg.qr(draw(d, d)).Q
    spectrum = torch.logspace(0, math.log10(kappa), d, dtype=torch.float64)
    spectrum *= d / spectrum.sum()
    loads = draw(d)
    if where == "low":
        loads[d // 4 :] = 0
    beta = basis @ loads / (loads.square() * spectrum).sum().sqrt()
    x = draw(n, d) * spectrum.sqrt() @ basis.T
    y = torch.relu(x @ beta) + 0.3 * draw(n)
    hidden = x @ (draw(width, d) / d**0.5).T
    a = draw(width) / width
    residual = torch.relu(hidden) @ a - y
    return x, residual[:, None] * a * (hidden > 0), beta


def alignment(step: Tensor, beta: Tensor) -> float:
    """Cosine of the leading right singular vector of a step and beta."""
    direction = dominant(step.mT[None], steps=60)[0]
    return abs(float(direction @ beta / beta.norm()))


@pytest.mark.parametrize(
    ("kappa", "where"), [(1.0, "random"), (30.0, "random"), (30.0, "low"), (300.0, "random"), (300.0, "low")]
)
def test_it_aligns_as_the_best_of_twenty_fixed_dampings(kappa: float, where: str) -> None:
    x, d, beta = single_index(kappa, where, seed=1)
    g = (d.T @ x / len(x))[None]
    bed = Bed(Kfac(sides="right", rule="gcv"), [block(800, 400)], numbers(fisher="empirical"))
    bed.capture(layer(x[:, None], d[:, None], len(x)))
    found = alignment(bed.update(g)[0], beta)
    values, q = torch.linalg.eigh(x.T @ x / len(x))
    turned = g[0] @ q
    fixed = [alignment(turned / (values + lam), q.T @ beta) for lam in torch.logspace(-4, 2, 20).tolist()]
    assert found > 0.97 * max(fixed), (found, fixed)
    assert alignment(g[0], beta) < found  # the plain gradient


# -- the quadratic model -----------------------------------------------------------------------------------------------


def beds(part: Any, count: int = 2) -> list[tuple[Bed, Tensor]]:
    """Layers with statistics, and their dense curvature."""
    found = []
    for k in range(count):
        a, d = rand(9, 1, 4, seed=10 + k), rand(9, 1, 3, seed=20 + k)
        bed = Bed(Kfac(), [block(3, 4, f"w{k}")], numbers(lr=0.5, damping=0.1))
        bed.capture(layer(a, d, 9))
        bed.update(rand(1, 3, 4))
        for name, slot in part.slots(bed.blocks[0]).items():
            if slot.layout == "param":
                made = rand(1, 3, 4, seed=30 + k)
                bed.state[name] = type(bed.x.g)(list(made.unbind()), made)
        big_a, big_b = factors(a, d, 9)
        found.append((bed, torch.kron(big_b, big_a)))
    return found


@pytest.mark.parametrize("dependent", [False, True])
def test_step_size_and_momentum_minimise_the_model(dependent: bool) -> None:
    part = QuadraticStep(coupled="weight_decay")
    total: dict[str, Tensor] = {}
    pieces = []
    for k, (bed, curvature) in enumerate(beds(part)):
        h = bed.h | {"weight_decay": 0.05}
        g, p, u = rand(1, 3, 4, seed=40 + k), rand(1, 3, 4, seed=50 + k), rand(1, 3, 4, seed=60 + k)
        x = bed.batch(g, p)
        x.own().whole.copy_(u)
        if dependent:
            bed.state["last_step"].whole.copy_(-3 * u)
        for name, value in part.sums(x, bed.state, h).items():
            total[name] = total.get(name, torch.zeros(()).double()) + value
        pieces.append((bed, h, x, g + 0.05 * p, -u, bed.state["last_step"].whole.clone(), curvature))
    model = [curvature + (0.1 + 0.05) * torch.eye(12).double() for *_, curvature in pieces]

    def value(alpha: float, mu: float) -> float:
        total = 0.0
        for (_, _, _, g, d, v, _), m in zip(pieces, model):
            delta = (alpha * d + mu * v).flatten()
            total += float(g.flatten() @ delta + delta @ m @ delta / 2)
        return total

    alpha, mu = two_steps(total)
    best = value(alpha, mu)
    for da, dm in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3), (1e-3, 1e-3), (-1e-3, 1e-3)):
        assert value(alpha + da, mu + dm) > best - 1e-12 * abs(best)
    assert (mu == 0) is dependent
    for bed, h, x, _, d, v, _ in pieces:
        part.update(x, bed.state, h, total)
        torch.testing.assert_close(x.read().whole, -(alpha * d + mu * v))
        torch.testing.assert_close(bed.state["last_step"].whole, alpha * d + mu * v)


def test_the_predicted_change_is_that_of_the_dense_model() -> None:
    part, slope, expected = LevenbergMarquardt(), [], 0.0
    shared = {
        "predicted_change": torch.zeros((), dtype=torch.float64),
        "damping_factor": torch.ones((), dtype=torch.float64),
    }
    total: dict[str, Tensor] = {}
    for k, (bed, curvature) in enumerate(beds(part)):
        g, u = rand(1, 3, 4, seed=40 + k), rand(1, 3, 4, seed=60 + k)
        x = bed.batch(g)
        x.own().whole.copy_(u)
        x.scale(0.7)
        delta = (-0.5 * 0.7 * u).flatten()
        expected += float(g.flatten() @ delta + delta @ curvature @ delta / 2)
        for name, value in part.sums(x, bed.state, bed.h).items():
            total[name] = total.get(name, torch.zeros(()).double()) + value
        slope.append(x)
    part.combine(total, shared, numbers())
    assert float(shared["predicted_change"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("actual", "power"), [(-0.95, 1), (-0.76, 1), (-0.74, 0), (-0.26, 0), (-0.24, -1), (0.3, -1), (math.nan, -1)]
)
def test_the_damping_follows_the_ratio(actual: float, power: int) -> None:
    part, h = LevenbergMarquardt(), numbers()
    shared = {
        "predicted_change": torch.tensor(-1.0, dtype=torch.float64),
        "damping_factor": torch.tensor(2.0, dtype=torch.float64),
    }
    part.judge(shared, h, 3.0, 3.0 + actual)
    assert float(shared["damping_factor"]) == pytest.approx(2 * 0.95 ** (5 * power))
    assert [part.judges(h, step) for step in (1, 4, 5, 10)] == [False, False, True, True]


def test_a_model_that_predicts_no_descent_is_distrusted_and_the_damping_is_bounded() -> None:
    part, h = LevenbergMarquardt(), numbers(damping=1.0)
    shared = {
        "predicted_change": torch.tensor(0.5, dtype=torch.float64),
        "damping_factor": torch.tensor(1.0, dtype=torch.float64),
    }
    part.judge(shared, h, 1.0, 1.5)
    assert float(shared["damping_factor"]) > 1
    shared["predicted_change"].fill_(-1.0)
    for _ in range(1000):
        part.judge(shared, h, 1.0, 0.0)
    assert float(shared["damping_factor"]) == pytest.approx(1e-8)


def test_the_model_predicts_the_change_of_a_quadratic_loss() -> None:
    net = nn.Linear(4, 3).double()
    x, y = rand(30, 4, seed=1), rand(30, 3, seed=2)
    opt = gd.optimizer(
        "kfac", net, loss="mse", fisher="exact", lr=0.5, momentum=0.0, kl_clip=None, damping_rule="lm", damping=0.1
    )
    assert KFAC(damping_rule="lm").damping_rule == "lm"
    before = F.mse_loss(net(x), y)
    before.backward()
    opt.step()
    after = F.mse_loss(net(x), y)
    assert float(opt.param_groups[0]["extra"]["predicted_change"]) == pytest.approx(float((after - before).detach()))


def test_cross_validated_training_and_its_state() -> None:
    x = rand(200, 6, seed=1).float() * torch.logspace(0, -2, 6)
    y = (x @ torch.ones(6) > 0).long()
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    opt = gd.optimizer("foof", net, loss="cross_entropy", fisher="empirical", damping_rule="gcv", lr=0.1)
    losses = []
    for _ in range(40):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    for name in ("0.weight", "2.weight"):
        assert 1e-9 < float(opt.state[net.get_parameter(name)]["damping"]) < 1e3
