"""Plain float64 reference of SOAP for one matrix, in the order of the paper's code; frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from oracles.elementwise import Grad, Rate, at


def descending_basis(a: Tensor) -> Tensor:
    """Eigenvectors as columns, largest eigenvalue first."""
    return torch.linalg.eigh((a + a.T) / 2).eigenvectors.flip(-1)


def soap(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    betas: tuple[float, float] = (0.95, 0.95),
    shampoo_beta: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    frequency: int = 10,
    phase: int | tuple[int, int] = 0,
    method: str = "qr",
    decay: str = "before",
    sides: tuple[bool, bool] = (True, True),
    bases: tuple[Tensor | None, Tensor | None] = (None, None),
) -> list[Tensor]:
    """The parameter after each call; the first call only sets the factors and their eigenbases.

    Args:
        p: Start, [m, n].
        grad: Gradient by call (from 1) and parameter.
        steps: Calls.
        lr: Learning rate.
        betas: Memory of the moments.
        shampoo_beta: Memory of the factors; None is betas[1].
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay.
        frequency: Calls between refreshes.
        phase: Calls by which the refreshes come earlier; one number for both sides, or one for each.
        method: ``qr`` (sort, permute v, one step of orthogonal iteration) or ``eigh``.
        decay: ``before`` or ``after`` the step.
        sides: Which sides have a factor; the others keep the identity.
        bases: Eigenbases of the first call, given because a rank-deficient factor leaves its null space free.
    """
    (b1, b2), bs = betas, betas[1] if shampoo_beta is None else shampoo_beta
    p, path = p.double().clone(), []
    m_rows, n_cols = p.shape
    left, right = torch.zeros(m_rows, m_rows).double(), torch.zeros(n_cols, n_cols).double()
    ql, qr = torch.eye(m_rows).double(), torch.eye(n_cols).double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for call in range(1, steps + 1):
        rate, g = at(lr, call), grad(call, p).double()
        if call > 1:
            k = call - 1
            turned = ql.T @ g @ qr
            m, v = b1 * m + (1 - b1) * turned, b2 * v + (1 - b2) * turned**2
            u = ql @ (m / (v.sqrt() + eps)) @ qr.T
            shrink = 1 - rate * weight_decay
            before, after = (shrink, 1.0) if decay == "before" else (1.0, shrink)
            p = (p * before - rate * (1 - b2**k) ** 0.5 / (1 - b1**k) * u) * after
        left, right = bs * left + (1 - bs) * g @ g.T, bs * right + (1 - bs) * g.T @ g
        if call == 1:
            if sides[0]:
                ql = descending_basis(left) if bases[0] is None else bases[0].double()
            if sides[1]:
                qr = descending_basis(right) if bases[1] is None else bases[1].double()
        else:
            plain = ql @ m @ qr.T
            due = [(call - 1 + side) % frequency == 0 for side in (phase if isinstance(phase, tuple) else (phase,) * 2)]
            if sides[0] and due[0]:
                ql, order = refreshed(left, ql, method)
                v = v if order is None else v[order]
            if sides[1] and due[1]:
                qr, order = refreshed(right, qr, method)
                v = v if order is None else v[:, order]
            m = ql.T @ plain @ qr
        path.append(p)
    return path


def refreshed(a: Tensor, q: Tensor, method: str) -> tuple[Tensor, Tensor | None]:
    """The next basis, and how its columns were sorted."""
    if method == "eigh":
        return descending_basis(a), None
    order = torch.argsort(torch.diag(q.T @ a @ q), descending=True)
    return torch.linalg.qr(a @ q[:, order]).Q, order
