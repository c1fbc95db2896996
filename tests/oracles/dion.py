"""Plain float64 references of Dion and Dion2 for one matrix, from their formulas; frozen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oracles.elementwise import Grad, Rate, at
from oracles.muon import scale_of, svd_polar


def gram_schmidt(a: Tensor) -> Tensor:
    """Orthonormal columns one by one, each cleaned twice of those before it."""
    columns: list[Tensor] = []
    for j in range(a.shape[1]):
        v = a[:, j]
        for _ in range(2):
            for other in columns:
                v = v - (other @ v) * other
        columns.append(v / v.norm())
    return torch.stack(columns, 1)


def dion(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    q: Tensor,
    *,
    momentum: float,
    weight_decay: float,
    scale: str = "spectral",
    eps: float = 0.0,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """M += G; P = orth(M Q); R = M^T P; M -= (1 - mu) P R^T; Q = R, columns over norm + eps; step c P Q^T, decayed.

    Returns the path, M and Q. A wide matrix takes its transpose for M.
    """
    p, q, path = p.double().clone(), q.double().clone(), []
    tall = p.shape[0] >= p.shape[1]
    m = torch.zeros_like(p if tall else p.T)
    for t in range(1, steps + 1):
        g = grad(t, p).double()
        m = m + (g if tall else g.T)
        left = gram_schmidt(m @ q)
        r = m.T @ left
        m = m - (1 - momentum) * left @ r.T
        q = torch.stack([column / (column.norm() + eps) for column in r.T], 1)
        o = left @ q.T if tall else q @ left.T
        p = p * (1 - at(lr, t) * weight_decay) - at(lr, t) * scale_of(scale, *p.shape) * o
        path.append(p)
    return path, (m if tall else m.T), q


def dion2(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    fraction: float,
    momentum: float,
    weight_decay: float,
    scale: str = "spectral",
) -> tuple[list[Tensor], Tensor]:
    """M += G; the slices of the shorter side with the largest L1 norms: their polar factor, then M_S *= mu.

    Returns the path and M.
    """
    if p.shape[0] > p.shape[1]:
        swapped = scale_of(scale, *p.shape) / scale_of(scale, p.shape[1], p.shape[0])
        numbers = {"fraction": fraction, "momentum": momentum, "scale": scale}
        rate = lr if callable(lr) else lambda t: lr
        path, m = dion2(
            p.T,
            lambda t, x: grad(t, x.T).T,
            steps,
            lambda t: swapped * rate(t),
            weight_decay=weight_decay / swapped,
            **numbers,
        )
        return [x.T for x in path], m.T
    p, path = p.double().clone(), []
    m = torch.zeros_like(p)
    for t in range(1, steps + 1):
        m = m + grad(t, p).double()
        sizes = [float(row.abs().sum()) for row in m]
        ranking = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
        chosen = sorted(ranking[: math.ceil(fraction * len(sizes))])
        o = torch.zeros_like(p)
        o[chosen] = svd_polar(m[chosen])
        m[chosen] *= momentum
        p = p * (1 - at(lr, t) * weight_decay) - at(lr, t) * scale_of(scale, *p.shape) * o
        path.append(p)
    return path, m
