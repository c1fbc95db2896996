"""Plain float64 reference of SGD along an averaged gradient; frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from oracles.elementwise import Grad, Rate, at


def average_sgd(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    momentum: float,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    corrected: bool = False,
) -> list[Tensor]:
    """Every gradient by its weight: (1 - mu) mu^(t - s) for the one of step s; Nesterov's; and with a sum of 1."""
    p, seen, path = p.double().clone(), [], []
    for t in range(1, steps + 1):
        seen.append(grad(t, p).double() + weight_decay * p)
        weights = [(1 - momentum) * momentum ** (t - s) for s in range(1, t + 1)]
        if nesterov:
            weights = [momentum * w + (1 - momentum) * (s == t) for s, w in enumerate(weights, 1)]
        length = sum(weights) if corrected else 1.0
        u = torch.zeros_like(p)
        for w, g in zip(weights, seen):
            u = u + w / length * g
        p = p - at(lr, t) * u
        path.append(p)
    return path
