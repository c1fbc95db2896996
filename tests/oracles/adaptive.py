"""Plain float64 references of the diagonal methods where torch has no such form; frozen.

The arguments are those of ``elementwise``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oracles.elementwise import Grad, Rate, at


def rmsprop_tensorflow(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
) -> list[Tensor]:
    """v from 1; b = mu b + lr g / sqrt(v + eps), or sqrt(v - a^2 + eps) when centered; p -= b."""
    p, path = p.double().clone(), []
    v, a, b = torch.ones_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, steps + 1):
        g = grad(t, p).double()
        v, a = alpha * v + (1 - alpha) * g**2, alpha * a + (1 - alpha) * g
        b = momentum * b + at(lr, t) * g / ((v - a**2 if centered else v) + eps).sqrt()
        p = p - b
        path.append(p)
    return path


def radam(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    skip: bool = False,
    independent: float | None = None,
    weight_decay: float = 0.0,
) -> list[Tensor]:
    """r_t (m / bc1) sqrt(bc2) / (sqrt(v) + eps) where rho_t > 5, else m / bc1, or nothing; decay beside it.

    The decay is p (1 - lr wd), or p (1 - lr / independent wd).
    """
    (b1, b2), p, path = betas, p.double().clone(), []
    m, v, most = torch.zeros_like(p), torch.zeros_like(p), 2 / (1 - b2) - 1
    for t in range(1, steps + 1):
        g, rate = grad(t, p).double(), at(lr, t)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        rho = most - 2 * t * b2**t / (1 - b2**t)
        if rho > 5:
            r = ((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho)) ** 0.5
            u = r * (m / (1 - b1**t)) * (1 - b2**t) ** 0.5 / (v.sqrt() + eps)
        else:
            u = torch.zeros_like(m) if skip else m / (1 - b1**t)
        p = p * (1 - rate / (independent or 1) * weight_decay) - rate * u
        path.append(p)
    return path
