"""Plain float64 references of the sign methods, written from their formulas; frozen.

The arguments are those of ``elementwise``. ``independent`` is the peak rate of the decay ``(lr / peak) wd``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oracles.elementwise import Grad, Rate, at


def signum(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    independent: float | None = None,
) -> list[Tensor]:
    """b = mu b + (1 - mu) g from 0; p (1 - lr wd) - lr sign(b)."""
    p, b, path = p.double().clone(), torch.zeros_like(p, dtype=torch.float64), []
    for t in range(1, steps + 1):
        rate = at(lr, t)
        b = momentum * b + (1 - momentum) * grad(t, p).double()
        p = p * (1 - rate / (independent or 1) * weight_decay) - rate * torch.sign(b)
        path.append(p)
    return path


def lion(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    independent: float | None = None,
) -> list[Tensor]:
    """p (1 - lr wd) - lr sign(b1 m + (1 - b1) g) with the old m; then m = b2 m + (1 - b2) g."""
    (b1, b2), p, path = betas, p.double().clone(), []
    m = torch.zeros_like(p)
    for t in range(1, steps + 1):
        g, rate = grad(t, p).double(), at(lr, t)
        p = p * (1 - rate / (independent or 1) * weight_decay) - rate * torch.sign(b1 * m + (1 - b1) * g)
        m = b2 * m + (1 - b2) * g
        path.append(p)
    return path
