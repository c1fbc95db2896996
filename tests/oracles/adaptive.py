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
