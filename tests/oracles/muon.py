"""Plain float64 reference of Muon for one matrix, written from its formulas; frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oracles.elementwise import Grad, Rate, at

#: (a, b, c) of five steps, and the factor that the Frobenius norm is multiplied by before.
TABLES: dict[str, tuple[Sequence[tuple[float, float, float]], float]] = {
    "jordan": ([(3.4445, -4.7750, 2.0315)] * 5, 1.0),
    "polar_express": (
        [
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ],
        1.01,  # published with 1.02; 1.01 is this library's choice
    ),
}


def svd_polar(x: Tensor) -> Tensor:
    """U V^T."""
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def polynomial_polar(x: Tensor, name: str) -> Tensor:
    """The table's polynomials, applied to the singular values one by one: no matrix iteration at all."""
    triples, safety = TABLES[name]
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / (safety * torch.linalg.vector_norm(s))
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return u * s @ vh


def scale_of(name: str, m: int, n: int) -> float:
    """The length conventions by name, for (m, n) = (out, in)."""
    return {
        "original": max(1.0, m / n) ** 0.5,
        "match_rms_adamw": 0.2 * max(m, n) ** 0.5,
        "spectral": (m / n) ** 0.5,
    }[name]


def muon(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    scale: str = "original",
    coefficients: str = "exact",
) -> list[Tensor]:
    """m = mu m + (1 - mu) g; O = polar((1 - mu) g + mu m); p (1 - lr wd) - lr scale O."""
    p, path = p.double().clone(), []
    m = torch.zeros_like(p)
    for t in range(1, steps + 1):
        g = grad(t, p).double()
        m = momentum * m + (1 - momentum) * g
        u = (1 - momentum) * g + momentum * m if nesterov else m
        o = svd_polar(u) if coefficients == "exact" else polynomial_polar(u, coefficients)
        p = p * (1 - at(lr, t) * weight_decay) - at(lr, t) * scale_of(scale, *p.shape) * o
        path.append(p)
    return path
