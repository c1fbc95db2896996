"""Plain float64 references of steps on the balls of norms: Scion's LMOs and their norms, Modula's algebra; frozen.

A weight is a matrix (out, in), a table (vocabulary, width), a kernel (out, in, k, k) or a vector. An LMO is the point
of the unit ball that has the largest product with its argument; the norm is the one whose ball it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from oracles.elementwise import Grad, Rate, at
from oracles.muon import svd_polar


def spectral(u: Tensor) -> Tensor:
    """sqrt(out / in) U V^T."""
    return math.sqrt(u.shape[0] / u.shape[1]) * svd_polar(u)


def spectral_max(u: Tensor) -> Tensor:
    """max(1, sqrt(out / in)) U V^T."""
    return max(1.0, math.sqrt(u.shape[0] / u.shape[1])) * svd_polar(u)


def conv(u: Tensor) -> Tensor:
    """sqrt(out / in) / k^2 U V^T of the kernel flattened to (out, in k^2)."""
    k2 = u.shape[2] * u.shape[3]
    return math.sqrt(u.shape[0] / u.shape[1]) / k2 * svd_polar(u.flatten(1)).view(u.shape)


def conv_each(u: Tensor) -> Tensor:
    """The same position by position."""
    out = torch.empty_like(u)
    for i in range(u.shape[2]):
        for j in range(u.shape[3]):
            out[:, :, i, j] = spectral(u[:, :, i, j]) / (u.shape[2] * u.shape[3])
    return out


def sign(u: Tensor) -> Tensor:
    """Signs over in."""
    return torch.sign(u) / u.shape[1]


def rows(u: Tensor) -> Tensor:
    """Each row to a norm of 1 / sqrt(in); a row of zeros stays."""
    return torch.stack([row / (row.norm() * math.sqrt(len(row))) if bool(row.any()) else row for row in u])


def columns(u: Tensor) -> Tensor:
    """Each column to a norm of sqrt(out); a column of zeros stays."""
    return torch.stack([c * math.sqrt(len(c)) / c.norm() if bool(c.any()) else c for c in u.T]).T


def table(u: Tensor) -> Tensor:
    """The columns of the transposed table."""
    return columns(u.T).T


def rms(u: Tensor) -> Tensor:
    """The whole to a root mean square of 1."""
    return u / u.square().mean().sqrt() if bool(u.any()) else u


def two(a: Tensor) -> float:
    """Spectral norm."""
    return float(torch.linalg.matrix_norm(a, 2))


#: LMO and norm, by a name.
BALLS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], float]]] = {
    "spectral": (spectral, lambda w: two(w) * math.sqrt(w.shape[1] / w.shape[0])),
    "spectral_max": (spectral_max, lambda w: two(w) / max(1.0, math.sqrt(w.shape[0] / w.shape[1]))),
    "conv": (conv, lambda w: two(w.flatten(1)) * w[0, 0].numel() * math.sqrt(w.shape[1] / w.shape[0])),
    "sign": (sign, lambda w: float(w.abs().max()) * w.shape[1]),
    "plain": (torch.sign, lambda w: float(w.abs().max())),
    "rows": (rows, lambda w: max(float(row.norm()) for row in w) * math.sqrt(w.shape[1])),
    "columns": (columns, lambda w: max(float(c.norm()) for c in w.T) / math.sqrt(w.shape[0])),
    "table": (table, lambda w: max(float(row.norm()) for row in w) / math.sqrt(w.shape[1])),
    "rms": (rms, lambda w: float(w.square().mean().sqrt())),
}


def scion(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    ball: str,
    radius: float,
    momentum: float = 0.9,
    constrained: bool = True,
) -> list[Tensor]:
    """d = b d + (1 - b) g; p (1 - lr) - lr rho lmo(d), or p - lr rho lmo(d)."""
    p, path, d = p.double().clone(), [], torch.zeros_like(p, dtype=torch.float64)
    for t in range(1, steps + 1):
        d = momentum * d + (1 - momentum) * grad(t, p).double()
        kept = (1 - at(lr, t)) * p if constrained else p
        p = kept - at(lr, t) * radius * BALLS[ball][0](d)
        path.append(p)
    return path


# -- Modula ----------------------------------------------------------------------------------------------------------
# A module is a dict with mass, sens and a function targets(t) -> {atom: target}.

Module = Mapping[str, Any]


def atom(name: str, mass: float = 1.0, sens: float = 1.0) -> Module:
    """A weight."""
    return {"mass": mass, "sens": sens, "targets": lambda t: {name: t}}


def bond(sens: float = 1.0) -> Module:
    """No weights."""
    return {"mass": 0.0, "sens": sens, "targets": lambda t: {}}


def after(m1: Module, m0: Module) -> Module:
    """m1 o m0: masses add, sensitivities multiply; m0 gets t (m0 / m) / s1 and m1 gets t m1 / m."""
    mass = m0["mass"] + m1["mass"]

    def targets(t: float) -> dict[str, float]:
        if mass == 0:
            return {}
        found = dict(m0["targets"](t * m0["mass"] / mass / m1["sens"]))
        return found | m1["targets"](t * m1["mass"] / mass)

    return {"mass": mass, "sens": m1["sens"] * m0["sens"], "targets": targets}


def beside(*modules: Module) -> Module:
    """A tuple: masses and sensitivities add; each gets t m_i / m."""
    mass = sum(m["mass"] for m in modules)

    def targets(t: float) -> dict[str, float]:
        found: dict[str, float] = {}
        for m in modules:
            if mass:
                found |= m["targets"](t * m["mass"] / mass)
        return found

    return {"mass": mass, "sens": sum(m["sens"] for m in modules), "targets": targets}


def modula(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    lmo: Callable[[Tensor], Tensor],
    target: float,
    momentum: float = 0.95,
) -> list[Tensor]:
    """m = mu m + (1 - mu) g; p - lr target lmo(m)."""
    p, path, m = p.double().clone(), [], torch.zeros_like(p, dtype=torch.float64)
    for t in range(1, steps + 1):
        m = momentum * m + (1 - momentum) * grad(t, p).double()
        p = p - at(lr, t) * target * lmo(m)
        path.append(p)
    return path
