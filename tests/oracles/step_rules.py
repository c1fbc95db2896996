"""Plain float64 references of the multiplicative steps, of Madam and of steps on a sphere, from their formulas; frozen.

The arguments are those of ``elementwise``. A direction is made by a rule of ``adam_family``, or by ``sgd`` below.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from oracles.elementwise import Grad, Rate, at


def walk(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    base: str = "sgd",
    rule: str = "m_abs",
    lr_in: float = 1.0,
    lr_out: float = 1e-3,
    gamma: Rate = 1.0,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> list[Tensor]:
    """g += wd p; u = b of SGD, or m / (sqrt(v / bc2) + eps) with both rates over bc1; then the rule."""
    p, path = p.double().clone(), []
    b = m = v = None
    for t in range(1, steps + 1):
        g = grad(t, p).double() + weight_decay * p
        out, add, share = lr_out, at(lr, t), at(gamma, t)
        if base == "sgd":
            b = g if b is None else momentum * b + g
            u = b
        else:
            m = (1 - betas[0]) * g if m is None else betas[0] * m + (1 - betas[0]) * g
            v = (1 - betas[1]) * g**2 if v is None else betas[1] * v + (1 - betas[1]) * g**2
            u = m / ((v / (1 - betas[1] ** t)).sqrt() + eps)
            out, add = out / (1 - betas[0] ** t), add / (1 - betas[0] ** t)
        new = []
        for w, d in zip(p.flatten().tolist(), u.flatten().tolist()):
            squash = math.tanh(lr_in * d)
            if rule == "m_abs":
                w = w - out * abs(w) * squash
            elif rule == "m_spow":
                w = w * 2 ** (-math.copysign(1, w) * out * squash)
            else:
                w = w - share * out * abs(w) * squash - (1 - share) * add * d
            new.append(w)
        p = torch.tensor(new, dtype=torch.float64).view_as(p)
        path.append(p)
    return path


def madam(
    p: Tensor, grad: Grad, steps: int, lr: Rate, *, beta: float = 0.999, p_scale: float = 3.0, g_bound: float = 10.0
) -> list[Tensor]:
    """v = EMA of g^2; p exp(-lr sign(p) clip(g / sqrt(v / bc))); clipped at p_scale times the RMS of the start."""
    p, path, v = p.double().clone(), [], torch.zeros_like(p, dtype=torch.float64)
    limit = p_scale * math.sqrt(float((p**2).sum()) / p.numel())
    for t in range(1, steps + 1):
        g = grad(t, p).double()
        v = beta * v + (1 - beta) * g**2
        ratio = torch.nan_to_num(g / (v / (1 - beta**t)).sqrt(), nan=0.0).clamp(-g_bound, g_bound)
        p = (p * torch.exp(-at(lr, t) * torch.sign(p) * ratio)).clamp(-limit, limit)
        path.append(p)
    return path


def on_sphere(p: Tensor, grad: Grad, steps: int, lr: Rate, rule: Any) -> list[Tensor]:
    """R normalise(p - lr R normalise(u)), with R the Frobenius norm of the start and u what a rule makes."""
    p, path, memory = p.double().clone(), [], {}
    radius = math.sqrt(float((p**2).sum()))
    for t in range(1, steps + 1):
        u = rule(t, grad(t, p).double(), p, memory)
        p = p - at(lr, t) * radius * u / math.sqrt(float((u**2).sum()))
        p = p * (radius / math.sqrt(float((p**2).sum())))
        path.append(p)
    return path
