"""Plain float64 references of the methods that divide by a curvature's diagonal, for one tensor; frozen.

Each takes the start ``p``, a function ``grad(t, p)`` with t = 1, 2, ..., and ``estimate(t)``: the new estimate of the
diagonal in step t, or ``None``. The decay is ``p (1 - lr wd)`` before the step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oracles.elementwise import Grad

Estimate = Callable[[int], Tensor | None]


def adahessian(
    p: Tensor,
    grad: Grad,
    estimate: Estimate,
    steps: int,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-4,
    power: float = 1.0,
    kernel: bool = False,
    weight_decay: float = 0.0,
) -> list[Tensor]:
    """The squares of the estimates, corrected by their number; ``kernel`` averages sizes over the axes from 2 on."""
    p, path = p.double().clone(), []
    m, v, n = torch.zeros_like(p), torch.zeros_like(p), 0
    for t in range(1, steps + 1):
        m = betas[0] * m + (1 - betas[0]) * grad(t, p)
        d = estimate(t)
        if d is not None:
            if kernel:
                d = d.abs().flatten(2).mean(2).reshape(*d.shape[:2], *[1] * (d.ndim - 2)).expand(d.shape)
            v, n = betas[1] * v + (1 - betas[1]) * d**2, n + 1
        p = p * (1 - lr * weight_decay)
        if n:
            p = p - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** n)) ** (power / 2) + eps)
        path.append(p)
    return path


def sophia(
    p: Tensor,
    grad: Grad,
    estimate: Estimate,
    steps: int,
    lr: float,
    *,
    betas: tuple[float, float] = (0.965, 0.99),
    gamma: float = 0.01,
    eps: float = 1e-12,
    weight_decay: float = 0.0,
    labels: Callable[[int], int] | None = None,
) -> list[Tensor]:
    """Clipped quotients. With ``labels`` the estimates are squared gradients, and h times the last number in use."""
    p, path = p.double().clone(), []
    m, h, count = torch.zeros_like(p), torch.zeros_like(p), 0
    for t in range(1, steps + 1):
        m = betas[0] * m + (1 - betas[0]) * grad(t, p)
        new = estimate(t)
        if new is not None:
            h = betas[1] * h + (1 - betas[1]) * new
            count = labels(t) if labels else 1
        quotient = m / torch.clamp(gamma * count * h, min=eps)
        p = p * (1 - lr * weight_decay) - lr * torch.clamp(quotient, -1, 1)
        path.append(p)
    return path
