"""Plain float64 references of the spectral family for one matrix, and of attention logits; frozen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oracles.elementwise import Grad, Rate, at
from oracles.muon import polynomial_polar, scale_of, svd_polar

#: The four steps that are made for input rescaled by AOL.
TURBO = [
    (4.6051, -9.6552, 5.6769),
    (4.7505, -6.0861, 2.1790),
    (2.7763, -2.3190, 0.5523),
    (2.4231, -2.2861, 0.8193),
]


def aol(x: Tensor) -> Tensor:
    """Row i of the shorter side times (sum_j |x_i . x_j|)^-1/2."""
    if x.shape[0] > x.shape[1]:
        return aol(x.T).T
    rows = []
    for row in x:
        total = sum(abs(float(row @ other)) for other in x)
        rows.append(row / math.sqrt(total) if total else torch.zeros_like(row))
    return torch.stack(rows)


def turbo_polar(x: Tensor) -> Tensor:
    """The four polynomials on the singular values of the rescaled matrix, one by one."""
    u, s, vh = torch.linalg.svd(aol(x), full_matrices=False)
    for a, b, c in TURBO:
        s = a * s + b * s**3 + c * s**5
    return u * s @ vh


def moonlight(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool = True,
) -> list[Tensor]:
    """M = mu M + g; O = polar(g + mu M), or of M; p (1 - lr wd) - lr .2 sqrt(max(m, n)) O."""
    p, path = p.double().clone(), []
    total = torch.zeros_like(p)
    for t in range(1, steps + 1):
        g = grad(t, p).double()
        total = momentum * total + g
        o = svd_polar(g + momentum * total if nesterov else total)
        p = p - at(lr, t) * (0.2 * math.sqrt(max(p.shape)) * o + weight_decay * p)
        path.append(p)
    return path


def normuon(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    momentum: float,
    beta2: float,
    weight_decay: float,
    nesterov: bool = True,
    scale: str = "match_rms",
    longer: bool = False,
    eps: float = 1e-10,
) -> list[Tensor]:
    """O = polar of the momentum; v = EMA of the mean squares of its rows; O / (sqrt v + eps), back to |O|_F; scaled."""
    if longer and p.shape[0] < p.shape[1]:
        assert scale == "match_rms"  # which does not tell rows from columns
        numbers = {"momentum": momentum, "beta2": beta2, "weight_decay": weight_decay, "nesterov": nesterov}
        turned = normuon(p.T, lambda t, q: grad(t, q.T).T, steps, lr, eps=eps, **numbers)
        return [q.T for q in turned]
    p, path = p.double().clone(), []
    m, v = torch.zeros_like(p), [0.0] * p.shape[0]
    for t in range(1, steps + 1):
        g = grad(t, p).double()
        m = momentum * m + (1 - momentum) * g
        o = svd_polar((1 - momentum) * g + momentum * m if nesterov else m)
        length = o.norm()
        for i in range(len(v)):
            v[i] = beta2 * v[i] + (1 - beta2) * float(o[i].square().mean())
        o = torch.stack([row / (math.sqrt(v[i]) + eps) for i, row in enumerate(o)])
        o = o * (length / o.norm())
        if scale == "match_rms":
            o = 0.2 * math.sqrt(o.numel()) / o.norm() * o
        else:
            o = scale_of(scale, *p.shape) * o
        p = p * (1 - at(lr, t) * weight_decay) - at(lr, t) * o
        path.append(p)
    return path


def adamuon(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool = True,
    eps: float = 1e-8,
    coefficients: str = "exact",
) -> list[Tensor]:
    """O = polar(sign(momentum)); V = EMA of O^2; O / (sqrt V + eps); times .2 sqrt(mn) / |O|_F."""
    p, path = p.double().clone(), []
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, steps + 1):
        g = grad(t, p).double()
        m = momentum * m + g
        signs = torch.sign(g + momentum * m if nesterov else m)
        o = svd_polar(signs) if coefficients == "exact" else polynomial_polar(signs, coefficients)
        v = momentum * v + (1 - momentum) * o * o
        o = o / (v.sqrt() + eps)
        o = 0.2 * math.sqrt(o.numel()) / o.norm() * o
        p = p * (1 - at(lr, t) * weight_decay) - at(lr, t) * o
        path.append(p)
    return path


def spectral_descent(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = True,
) -> list[Tensor]:
    """p (1 - lr wd) - lr |u|_* polar(u), with u the gradient or its momentum."""
    p, path = p.double().clone(), []
    m = torch.zeros_like(p)
    for t in range(1, steps + 1):
        g = grad(t, p).double()
        m = momentum * m + (1 - momentum) * g
        u = (1 - momentum) * g + momentum * m if nesterov and momentum else m
        step = float(torch.linalg.svdvals(u).sum()) * svd_polar(u)
        p = p * (1 - at(lr, t) * weight_decay) - at(lr, t) * step
        path.append(p)
    return path


def logits(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Every logit [B, H, L, S] of query [B, H, L, E] and key [B, K, S, E]; -inf for the pairs that are masked out."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    found = scale * torch.einsum("bhle,bhse->bhls", query, key)
    if causal:
        keep = torch.ones(found.shape[-2:], dtype=torch.bool).tril()
        found = found.masked_fill(~keep, -math.inf)
    if mask is not None:
        found = found.masked_fill(~mask if mask.dtype == torch.bool else mask < -9999, -math.inf)
    return found
