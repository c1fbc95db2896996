"""Plain float64 references of the Shampoo family for one matrix, written from their formulas; frozen.

Each takes the start ``p`` [m, n] and ``grad(t, p)`` with t = 1, 2, ... and returns the parameter after every call. Slow
work is done after the step of calls t > 1 with (t - 1) % frequency == 0, so that the next call uses it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oracles.elementwise import Grad, Rate, at
from oracles.soap import descending_basis, refreshed

Bases = tuple[Tensor | None, Tensor | None]


def inverse_root(a: Tensor, p: float, eps: float) -> Tensor:
    """(A + eps lambda I)^(-1/p) by eigenvalues, lambda the largest one."""
    values, q = torch.linalg.eigh((a + a.T) / 2)
    return (q * (values - values[0].clamp(max=0) + eps * values[-1]) ** (-1 / p)) @ q.T


def grafted_direction(kind: str, m: Tensor, v: Tensor, b2: float, t: int, eps: float) -> Tensor:
    """The direction of the grafted method for a filtered gradient."""
    if kind in ("none", "sgd"):
        return m
    return m / ((v / (1 - b2**t) if kind == "adam" else v).sqrt() + eps)


def shampoo(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    shampoo_beta: float | None = None,
    eps: float = 1e-6,
    graft: str = "adam",
    graft_eps: float = 1e-8,
    start_preconditioning_step: int = 1,
    exponent: str = "quarter",
    statistics: str = "ema",
    weight_decay: float = 0.0,
    decay: str = "decoupled",
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    frequency: int = 10,
    sides: tuple[bool, bool] = (True, True),
) -> list[Tensor]:
    """L^(-1/4) m R^(-1/4), or (L (x) R / tr L)^(-1/2) m, with the length of another method's step.

    Args:
        p: Start, [m, n].
        grad: Gradient by call and parameter.
        steps: Calls.
        lr: Learning rate.
        betas: Memory of m and of v (and of the factors).
        shampoo_beta: Memory of the factors; None is betas[1].
        eps: Damping of the roots, times the largest eigenvalue.
        graft: Method whose length is taken; ``none`` takes none.
        graft_eps: Its eps.
        start_preconditioning_step: Before it the graft's direction is used.
        exponent: ``quarter`` or ``half``; a single side has -1/2.
        statistics: ``ema`` with bias correction, or ``sum``.
        weight_decay: Decay.
        decay: ``decoupled`` (before), ``l2`` or ``direction``.
        momentum: Heavy ball on the direction; its first value is the direction.
        dampening: Share of the direction that it leaves out.
        nesterov: Look-ahead.
        frequency: Calls between refreshes.
        sides: Which sides have a factor.
    """
    (b1, b2), bs = betas, betas[1] if shampoo_beta is None else shampoo_beta
    p, path, ball = p.double().clone(), [], None
    left, right = torch.zeros(p.shape[0], p.shape[0]).double(), torch.zeros(p.shape[1], p.shape[1]).double()
    roots = [torch.eye(d).double() for d in p.shape]
    m, v = torch.zeros_like(p), torch.zeros_like(p)

    def solve(t: int) -> None:
        fix = 1.0 if statistics == "sum" else 1 - bs**t
        for side, factor in enumerate((left / fix, right / fix)):
            if sides[side]:
                two = exponent == "half" or not all(sides)
                roots[side] = inverse_root(factor, 2 if two else 4, eps)
                if exponent == "half" and all(sides):
                    roots[side] = roots[side] * factor.trace() ** 0.25

    for t in range(1, steps + 1):
        rate, g = at(lr, t), grad(t, p).double()
        if decay == "l2":
            g = g + weight_decay * p
        if statistics == "sum":
            left, right = left + g @ g.T, right + g.T @ g
        else:
            left, right = bs * left + (1 - bs) * g @ g.T, bs * right + (1 - bs) * g.T @ g
        if t == 1:
            solve(t)
        m = b1 * m + (1 - b1) * g
        v = v + g**2 if graft == "adagrad" else b2 * v + (1 - b2) * g**2
        filtered = m / (1 - b1**t)
        other = grafted_direction(graft, filtered, v, b2, t, graft_eps)
        u = roots[0] @ filtered @ roots[1]
        if graft != "none":
            u = other if t < start_preconditioning_step else u * other.norm() / u.norm()
        if decay == "direction":
            u = u + weight_decay * p
        if momentum:
            ball = u if ball is None else momentum * ball + (1 - dampening) * u
            u = u + momentum * ball if nesterov else ball
        p = p * (1 - rate * weight_decay if decay == "decoupled" else 1.0) - rate * u
        if t > 1 and (t - 1) % frequency == 0:
            solve(t)
        path.append(p)
    return path


def asgo(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-3,
    statistics: str = "ema",
    weight_decay: float = 0.0,
    frequency: int = 10,
) -> list[Tensor]:
    """(V^(1/2) + eps lambda^(1/2) I)^-1 m with V the Gram of the shorter side (the left one of a square matrix)."""
    b1, b2 = betas
    p, path = p.double().clone(), []
    tall = p.shape[0] > p.shape[1]
    gram, m = torch.zeros(min(p.shape), min(p.shape)).double(), torch.zeros_like(p)
    root = gram

    def solve(t: int) -> Tensor:
        values, q = torch.linalg.eigh(gram / (1.0 if statistics == "sum" else 1 - b2**t))
        values = values.clamp(min=0).sqrt()
        return (q / (values + eps * values[-1])) @ q.T

    for t in range(1, steps + 1):
        rate, g = at(lr, t), grad(t, p).double()
        now = g.T @ g if tall else g @ g.T
        gram = gram + now if statistics == "sum" else b2 * gram + (1 - b2) * now
        root = solve(t) if t == 1 else root
        m = b1 * m + (1 - b1) * g
        u = m / (1 - b1**t)
        p = p * (1 - rate * weight_decay) - rate * (u @ root if tall else root @ u)
        if t > 1 and (t - 1) % frequency == 0:
            root = solve(t)
        path.append(p)
    return path


def ec_shampoo(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    shampoo_beta: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    frequency: int = 10,
    second_moment: str = "keep",
    sides: tuple[bool, bool] = (True, True),
    bases: Bases = (None, None),
) -> list[Tensor]:
    """Q_L [(Q_L^T m Q_R / bc1) / (sqrt(D / bc2) + eps)] Q_R^T; m in the parameter's space, the first call silent.

    ``second_moment``: ``keep`` (no sort, no move), ``permute`` (sort, D follows) or ``rank`` (sort, D stays).
    """
    (b1, b2), bs = betas, betas[1] if shampoo_beta is None else shampoo_beta
    p, path = p.double().clone(), []
    factors = [torch.zeros(d, d).double() for d in p.shape]
    q = [torch.eye(d).double() for d in p.shape]
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, steps + 1):
        rate, g = at(lr, t), grad(t, p).double()
        factors = [bs * f + (1 - bs) * x for f, x in zip(factors, (g @ g.T, g.T @ g))]
        if t == 1:
            for side in (0, 1):
                if sides[side]:
                    given = bases[side]
                    q[side] = descending_basis(factors[side]) if given is None else given.double()
        else:
            k = t - 1
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (q[0].T @ g @ q[1]) ** 2
            inner = (q[0].T @ m @ q[1]) / (1 - b1**k) / ((v / (1 - b2**k)).sqrt() + eps)
            p = p * (1 - rate * weight_decay) - rate * q[0] @ inner @ q[1].T
            if k % frequency == 0:
                for side in (0, 1):
                    if not sides[side]:
                        continue
                    if second_moment == "keep":
                        q[side] = torch.linalg.qr(factors[side] @ q[side]).Q
                        continue
                    q[side], order = refreshed(factors[side], q[side], "qr")
                    assert order is not None
                    if second_moment == "permute":
                        v = v[order] if side == 0 else v[:, order]
        path.append(p)
    return path


def kl(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.98),
    shampoo_beta: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: str = "before",
    frequency: int = 10,
    soap: bool = False,
    bases: Bases = (None, None),
) -> list[Tensor]:
    """KL-Shampoo, or KL-SOAP: Adam (corrected late, momentum carried along) in the same bases; call 1 is silent."""
    (b1, b2), bs = betas, betas[1] if shampoo_beta is None else shampoo_beta
    p, path = p.double().clone(), []
    rows, columns = p.shape
    left, right = torch.zeros(rows, rows).double(), torch.zeros(columns, columns).double()
    ql, qr = torch.eye(rows).double(), torch.eye(columns).double()
    laml, lamr = (torch.full((d,), 0.1, dtype=torch.float64) for d in p.shape)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, steps + 1):
        rate, g = at(lr, t), grad(t, p).double()
        if t == 1:
            left, right = (1 - bs) * g @ g.T / columns, (1 - bs) * g.T @ g / rows
            ql = descending_basis(left) if bases[0] is None else bases[0].double()
            qr = descending_basis(right) if bases[1] is None else bases[1].double()
            path.append(p)
            continue
        turned = ql.T @ g @ qr
        m = b1 * m + (1 - b1) * g
        if soap:
            v = b2 * v + (1 - b2) * turned**2
            u = (ql.T @ m @ qr) / (v.sqrt() + eps) * (1 - b2 ** (t - 1)) ** 0.5 / (1 - b1 ** (t - 1))
        else:
            d = torch.outer(laml, lamr) ** -0.5
            u = (ql.T @ m @ qr) * d / (1 + eps * d)
        shrink = 1 - rate * weight_decay
        u = rate * ql @ u @ qr.T
        p = p * shrink - u if decay == "before" else (p - u) * shrink
        left = bs * left + (1 - bs) / columns * g @ (qr / lamr) @ qr.T @ g.T
        right = bs * right + (1 - bs) / rows * g.T @ (ql / laml) @ ql.T @ g
        newl, newr = (turned**2 / lamr).mean(1), (turned**2 / laml[:, None]).mean(0)
        laml = (bs * laml + (1 - bs) * newl).clamp(min=max(10, min(rows, 4000)) ** -2)
        lamr = (bs * lamr + (1 - bs) * newr).clamp(min=max(10, min(columns, 4000)) ** -2)
        if (t - 1) % frequency == 0:
            ql, qr = torch.linalg.qr(left @ ql).Q, torch.linalg.qr(right @ qr).Q
        path.append(p)
    return path


def splus(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    decay: str = "shaped",
    frequency: int = 100,
) -> list[Tensor]:
    """2 / (m + n) Q_L sign(Q_L^T m Q_R) Q_R^T, the identity in the first step; ``after`` decays after the step."""
    b1, b2 = betas
    p, path = p.double().clone(), []
    factors = [torch.zeros(d, d).double() for d in p.shape]
    q = [torch.eye(d).double() for d in p.shape]
    m, scale = torch.zeros_like(p), 2 / sum(p.shape)
    for t in range(1, steps + 1):
        rate, g = at(lr, t), grad(t, p).double()
        factors = [b2 * f + (1 - b2) * x for f, x in zip(factors, (g @ g.T, g.T @ g))]
        m = b1 * m + (1 - b1) * g
        u = q[0] @ torch.sign(q[0].T @ m @ q[1]) @ q[1].T
        shrink = 1 - rate * weight_decay * (1.0 if decay == "decoupled" else scale)
        p = (p - rate * scale * u) * shrink if decay == "after" else p * shrink - rate * scale * u
        if t == 1 or (t - 1) % frequency == 0:
            q = [descending_basis(f) for f in factors]
        path.append(p)
    return path
