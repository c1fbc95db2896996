"""Plain float64 references of the methods that find their learning rate, over all parameters at once; frozen.

Each takes the starts, a function ``grads(t, ps)`` with t = 1, 2, ... and, for every tensor, its learning rate (a number
or a function of t) and decay; it returns the parameters after every step, and the estimate of the distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Grads = Callable[[int, Sequence[Tensor]], Sequence[Tensor]]
Rates = Sequence[float | Callable[[int], float]]
Path = tuple[list[list[Tensor]], list[float]]


def at(rates: Rates, t: int) -> list[float]:
    """The learning rates of step t."""
    return [rate(t) if callable(rate) else rate for rate in rates]


def prodigy(
    starts: Sequence[Tensor],
    grads: Grads,
    steps: int,
    rates: Rates,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    beta3: float | None = None,
    eps: float = 1e-8,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    growth: float = math.inf,
    decays: Sequence[float] | None = None,
    coupled: bool = False,
    corrected: bool = False,
    safeguard: bool = False,
    every: int = 1,
) -> Path:
    """Every estimate from d of the step before; the new d stands beside eps alone."""
    b1, b2 = betas
    b3 = b2**0.5 if beta3 is None else beta3
    ps = [p.double().clone() for p in starts]
    decays = decays or [0.0] * len(ps)
    m, v = [torch.zeros_like(p) for p in ps], [torch.zeros_like(p) for p in ps]
    p0 = [p.flatten()[::every].clone() for p in ps]
    s = [torch.zeros_like(p) for p in p0]
    d = largest = d0
    num, path, found = 0.0, [], []
    for t in range(1, steps + 1):
        lrs, factor = at(rates, t), (1 - b2**t) ** 0.5 / (1 - b1**t) if corrected else 1.0
        gs = [g + wd * p if coupled else g for g, p, wd in zip(grads(t, ps), ps, decays)]
        added, norm = 0.0, 0.0
        for i, g in enumerate(gs):
            if lrs[i] == 0:
                continue
            dlr = d * lrs[i] * factor
            added += d / d0 * dlr * float(g.flatten()[::every] @ (p0[i] - ps[i].flatten()[::every]))
            m[i] = b1 * m[i] + d * (1 - b1) * g
            v[i] = b2 * v[i] + d**2 * (1 - b2) * g**2
            s[i] = b3 * s[i] + d / d0 * (d if safeguard else dlr) * g.flatten()[::every]
            norm += float(s[i].abs().sum())
        if norm:
            num, old = b3 * num + added, d
            hat = d_coef * num / norm
            if d == d0:
                d = max(d, hat)
            largest = max(largest, hat)
            d = min(largest, d * growth)
            for i, p in enumerate(ps):
                dlr = old * lrs[i] * factor
                decayed = p if coupled else p - dlr * decays[i] * p
                ps[i] = decayed - (dlr * m[i] / (v[i].sqrt() + d * eps) if lrs[i] else 0.0)
        path.append([p.clone() for p in ps])
        found.append(d)
    return path, found


def dadapt_adam(
    starts: Sequence[Tensor],
    grads: Grads,
    steps: int,
    rates: Rates,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    d0: float = 1e-6,
    growth: float = math.inf,
    decays: Sequence[float] | None = None,
    coupled: bool = False,
    corrected: bool = False,
) -> Path:
    """The denominator of the product is that of the step before; the momentum holds the learning rate."""
    b1, b2 = betas
    c = b2**0.5
    ps = [p.double().clone() for p in starts]
    decays = decays or [0.0] * len(ps)
    m, v, s = ([torch.zeros_like(p) for p in ps] for _ in range(3))
    d, num, path, found = d0, 0.0, [], []
    for t in range(1, steps + 1):
        lrs, factor = at(rates, t), (1 - b2**t) ** 0.5 / (1 - b1**t) if corrected else 1.0
        gs = [g + wd * p if coupled else g for g, p, wd in zip(grads(t, ps), ps, decays)]
        added, norm, old = 0.0, 0.0, d
        for i, g in enumerate(gs):
            if lrs[i] == 0:
                continue
            dlr = d * lrs[i] * factor
            added += dlr * float((g * s[i] / (v[i].sqrt() + eps)).sum())
            m[i] = b1 * m[i] + dlr * (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g**2
            s[i] = c * s[i] + dlr * (1 - c) * g
            norm += float(s[i].abs().sum())
        if norm:
            num = c * num + (1 - c) * added
            d = max(d, min(num / ((1 - c) * norm), d * growth))
            for i, p in enumerate(ps):
                if lrs[i]:
                    decayed = p if coupled else p - old * lrs[i] * factor * decays[i] * p
                    ps[i] = decayed - m[i] / (v[i].sqrt() + eps)
        path.append([p.clone() for p in ps])
        found.append(d)
    return path, found


def dadapt_sgd(
    starts: Sequence[Tensor],
    grads: Grads,
    steps: int,
    rates: Rates,
    *,
    momentum: float = 0.9,
    d0: float = 1e-6,
    growth: float = math.inf,
    decays: Sequence[float] | None = None,
) -> Path:
    """Dual averaging: z from the start, p a moving average of z."""
    ps, p0 = [p.double().clone() for p in starts], [p.double().clone() for p in starts]
    decays = decays or [0.0] * len(ps)
    s = [torch.zeros_like(p) for p in ps]
    d, num, first, path, found = d0, 0.0, 0.0, [], []
    for t in range(1, steps + 1):
        lrs = at(rates, t)
        gs = [g + wd * p for g, p, wd in zip(grads(t, ps), ps, decays)]
        active = [i for i, lr in enumerate(lrs) if lr]
        if not first:
            first = math.sqrt(sum(float((gs[i] ** 2).sum()) for i in active))
        if first:
            for i in active:
                num += d * lrs[i] / first * float((gs[i] * s[i]).sum())
                s[i] = s[i] + d * lrs[i] / first * gs[i]
            norm = math.sqrt(sum(float((s[i] ** 2).sum()) for i in active))
            if norm:
                d = max(d, min(2 * num / norm, d * growth))
                for i in active:
                    ps[i] = momentum * ps[i] + (1 - momentum) * (p0[i] - s[i])
        path.append([p.clone() for p in ps])
        found.append(d)
    return path, found


def dog(
    starts: Sequence[Tensor],
    grads: Grads,
    steps: int,
    rates: Rates,
    *,
    r_eps: float = 1e-6,
    eps: float = 1e-8,
    decays: Sequence[float] | None = None,
    weighted: bool = False,
) -> Path:
    """The distance and the sum of squares are those of all tensors; ``weighted`` is DoWG."""
    ps, p0 = [p.double().clone() for p in starts], [p.double().clone() for p in starts]
    decays = decays or [0.0] * len(ps)
    r, total, path, found = 0.0, 0.0, [], []
    for t in range(1, steps + 1):
        lrs = at(rates, t)
        gs = [g + wd * p for g, p, wd in zip(grads(t, ps), ps, decays)]
        active = [i for i, lr in enumerate(lrs) if lr]
        if active:
            r = r or r_eps * (1 + math.sqrt(sum(float((p0[i] ** 2).sum()) for i in active)))
            r = max(r, math.sqrt(sum(float(((ps[i] - p0[i]) ** 2).sum()) for i in active)))
            squares = sum(float((gs[i] ** 2).sum()) for i in active)
            total += r**2 * squares if weighted else squares
            rate = r**2 / (math.sqrt(total) + eps) if weighted else r / math.sqrt(total + eps)
            for i in active:
                ps[i] = ps[i] - lrs[i] * rate * gs[i]
        path.append([p.clone() for p in ps])
        found.append(r)
    return path, found
