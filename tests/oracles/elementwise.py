"""Plain float64 references of the elementwise methods, written from their formulas; frozen.

Each takes the start ``p`` and a function ``grad(t, p)`` with t = 1, 2, ... and returns the parameter after every step.
``lr`` is a number, or a function of t.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Grad = Callable[[int, Tensor], Tensor]
Rate = float | Callable[[int], float]


def at(rate: Rate, t: int) -> float:
    """The learning rate of step t."""
    return rate(t) if callable(rate) else rate


def sgd(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> list[Tensor]:
    """g += wd p; b = mu b + (1 - tau) g with b_1 = g; p -= lr b, or lr (g + mu b)."""
    p, b, path = p.double().clone(), None, []
    for t in range(1, steps + 1):
        g = grad(t, p).double() + weight_decay * p
        b = g if b is None else momentum * b + (1 - dampening) * g
        p = p - at(lr, t) * ((g + momentum * b) if nesterov else b)
        path.append(p)
    return path


def adamw(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    independent: float | None = None,
    late: bool = False,
    lr_scale: float = 1.0,
) -> list[Tensor]:
    """p (1 - lr wd) - lr (m / bc1) / (sqrt(v / bc2) + eps), or - lr sqrt(bc2) / bc1 m / (sqrt(v) + eps) when late.

    ``independent`` is the peak rate of the decay (lr / peak) wd; ``lr_scale`` multiplies the step and not the decay.
    """
    (b1, b2), p, path = betas, p.double().clone(), []
    m, v, top = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, steps + 1):
        rate, g = at(lr, t), grad(t, p).double()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        top = torch.maximum(top, v) if amsgrad else v
        bc1, bc2 = 1 - b1**t, 1 - b2**t
        u = bc2**0.5 / bc1 * m / (top.sqrt() + eps) if late else (m / bc1) / ((top / bc2).sqrt() + eps)
        p = p * (1 - (rate if independent is None else rate / independent) * weight_decay) - rate * lr_scale * u
        path.append(p)
    return path


def nadam_mu(t: int, b1: float, momentum_decay: float) -> float:
    """mu_t = b1 (1 - 0.5 * 0.96^(t md))."""
    return b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))


def nadamw(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
) -> list[Tensor]:
    """p (1 - lr wd) - lr [(1 - mu_t) / (1 - Pi_t) g + mu_{t+1} / (1 - Pi_t mu_{t+1}) m] / (sqrt(v / bc2) + eps)."""
    (b1, b2), p, path = betas, p.double().clone(), []
    m, v, product = torch.zeros_like(p), torch.zeros_like(p), 1.0
    for t in range(1, steps + 1):
        g, now, after = grad(t, p).double(), nadam_mu(t, b1, momentum_decay), nadam_mu(t + 1, b1, momentum_decay)
        product *= now
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        mixed = (1 - now) / (1 - product) * g + after / (1 - product * after) * m
        u = mixed / ((v / (1 - b2**t)).sqrt() + eps)
        p = p * (1 - at(lr, t) * weight_decay) - at(lr, t) * u
        path.append(p)
    return path
