"""Small problems with a known optimum, seconds each: float64, deterministic, for tests and first looks.

Each reports ``distance``, relative to the start: 1 at the beginning, 0 at the optimum; and ``gap``, the loss minus the
optimal loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guided_descent.bench.data import digits, generator
from guided_descent.bench.models import Factors, Point
from guided_descent.bench.problem import Batch, Problem, tensor_hash

DECAY = 1e-3  # ridge of the logistic problem: without it separable data has no finite optimum


def quadratic(seed: int) -> Problem:
    """``f(x) = x^T A x / 2`` in 100 dimensions, A rotated, eigenvalues spaced evenly in log from 1e-6 to 1."""
    n = 100
    rotation = torch.linalg.qr(torch.randn(n, n, generator=generator(0, 1), dtype=torch.float64)).Q
    a = rotation * torch.logspace(-6, 0, n, dtype=torch.float64) @ rotation.T
    start = torch.randn(n, generator=generator(seed, 1), dtype=torch.float64)

    def value(model: nn.Module) -> Tensor:
        x = _point(model)
        half: Tensor = x @ a @ x / 2
        return half

    return _known(Point(start.clone()), value, _point, 0 * start, 0.0, steps=1000, data=a)


def factorisation(seed: int) -> Problem:
    """``f(U, V) = ||U V^T - M||^2 / 2`` for M [30, 20] of rank 5 with singular values 1, 1/2, ..., 1/16."""
    left, right = (torch.randn(m, 5, generator=generator(0, 2 + m), dtype=torch.float64) for m in (30, 20))
    target = torch.linalg.qr(left).Q * 0.5 ** torch.arange(5, dtype=torch.float64) @ torch.linalg.qr(right).Q.T
    u, v = (0.1 * torch.randn(m, 5, generator=generator(seed, 2 + m), dtype=torch.float64) for m in (30, 20))

    def product(model: nn.Module) -> Tensor:
        assert isinstance(model, Factors)
        return model.u @ model.v.T

    def value(model: nn.Module) -> Tensor:
        half: Tensor = (product(model) - target).square().sum() / 2
        return half

    return _known(Factors(u, v), value, product, target, 0.0, steps=1000, data=target)


def rosenbrock(seed: int) -> Problem:
    """``sum 100 (y - x^2)^2 + (1 - x)^2`` over five pairs, from near the classic start (-1.2, 1) to (1, 1)."""
    start = torch.tensor([[-1.2, 1.0]], dtype=torch.float64).repeat(5, 1)
    start += 0.1 * torch.randn(5, 2, generator=generator(seed, 3), dtype=torch.float64)

    def value(model: nn.Module) -> Tensor:
        x, y = _point(model).unbind(1)
        total: Tensor = (100 * (y - x**2) ** 2 + (1 - x) ** 2).sum()
        return total

    return _known(Point(start), value, _point, torch.ones_like(start), 0.0, steps=2000, data=torch.ones(1))


def logistic(seed: int) -> Problem:
    """Full-batch multinomial logistic regression on the digits with a ridge of 1e-3; the optimum is Newton's."""
    x, y, best = _logistic_optimum()
    model = nn.Linear(64, 10, dtype=torch.float64)
    with torch.no_grad():
        model.weight.normal_(std=0.1, generator=generator(seed, 4))
        model.bias.zero_()

    def weights(model: nn.Module) -> Tensor:
        assert isinstance(model, nn.Linear)
        return torch.cat([model.weight, model.bias[:, None]], 1)

    def value(model: nn.Module) -> Tensor:
        return _logistic_loss(weights(model), x, y)

    return _known(model, value, weights, best, _logistic_loss(best, x, y).item(), steps=500, data=x)


def _logistic_loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x @ w.T, y) + DECAY / 2 * w.square().sum()


@lru_cache(maxsize=1)
def _logistic_optimum() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with a column of ones [N, 65], labels, and the optimal weights [10, 65] to about 1e-13."""
    split = digits()
    x = torch.cat([split.x, torch.ones(len(split.x), 1)], 1).double()
    n, d = x.shape
    w = torch.zeros(10, d, dtype=torch.float64)
    hot = F.one_hot(split.y, 10).double()
    for _ in range(20):
        p = (x @ w.T).softmax(1)
        gradient = (p - hot).T @ x / n + DECAY * w
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        hessian = torch.einsum("nkl,ni,nj->kilj", curvature / n, x, x).reshape(10 * d, 10 * d)
        hessian.diagonal().add_(DECAY)
        step = torch.linalg.solve(hessian, gradient.flatten()).view_as(w)
        w = w - step
        if step.abs().max() < 1e-12:
            break
    return x, split.y, w


def _point(model: nn.Module) -> Tensor:
    assert isinstance(model, Point)
    return model.x


def _known(
    model: nn.Module,
    value: Callable[[nn.Module], Tensor],
    where: Callable[[nn.Module], Tensor],
    optimum: Tensor,
    least: float,
    *,
    steps: int,
    data: Tensor,
) -> Problem:
    """A problem without batches: ``value`` is the loss, at least ``least``; ``where`` is what reaches ``optimum``."""
    scale = (where(model).detach() - optimum).norm()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return value(model)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"distance": ((where(model) - optimum).norm() / scale).item(), "gap": value(model).item() - least}

    return Problem(
        model=model,
        loss=loss,
        batches=lambda step: None,
        evaluate=evaluate,
        steps=steps,
        metric="distance",
        unit="of start",
        data=tensor_hash([data]),
    )
