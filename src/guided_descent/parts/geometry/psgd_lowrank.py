"""PSGD with a low-rank Q on the vector of all elements of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Slot
from guided_descent.parts.geometry.psgd import BALANCE, HUGE, TINY, Fit, Fitted, clip_rms_, peak, start, track
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class LowRankWhiten(Fitted):
    """PSGD with ``Q = (I + U Vᵀ) diag(d)``: ``u <- Qᵀ Q m``, m as the vector of all elements of a tensor.

    With v standard normal, ``h = g + (1e-9 + eps |g|) v``, ``a = Q h``, ``b = Q^-T v`` (by the Woodbury identity, one
    solve with ``I + VᵀU`` [r, r]), ``P h`` and ``P^-1 v``, a fit takes, at the rate mu,

    - ``d <- d - (mu / L_d)(h P h - v P^-1 v) d`` elementwise, L_d following ``max |h P h| + max |v P^-1 v|``;
    - with even chances ``U <- U - (mu / L_u)(a aᵀV - b bᵀV)(I + VᵀU)``, L_u following ``|a| |V Vᵀa| + |b| |V Vᵀb|``, or
      ``V <- V - (mu / L_v)(I + V Uᵀ)(a aᵀU - b bᵀU)``, L_v following ``|a| |U Uᵀa| + |b| |U Uᵀb|``.

    Balancing scales U and V to one Frobenius norm. The paper has one vector for the whole model, which would take four
    global sums in each step, one of them for a maximum; here each tensor has its own Q, so that an update needs nothing
    but its tensor. Whitening across tensors is given up. State: ``momentum_buffer``, shaped like the parameter; ``u``,
    ``v`` [r, numel], which start as noise of norm ``sqrt(0.1)``, ``d`` [numel], ``lipschitz`` [3]. Source: Li 2024,
    2402.11858.
    """

    fitted: ClassVar[tuple[str, ...]] = ("u", "v", "d", "lipschitz")
    rank: int = 10

    def slots(self, block: Block) -> dict[str, Slot]:
        """Momentum, both low-rank factors, the diagonal and the curvature bounds."""
        shape = (min(self.rank, block.numel), block.numel)
        return {
            "momentum_buffer": Slot(),
            "u": Slot("factor", shape),
            "v": Slot("factor", shape),
            "d": Slot("factor", (block.numel,)),
            "lipschitz": Slot("factor", (3,)),
        }

    def whiten(self, g: Tensor, m: Tensor, q: Sequence[Tensor], now: Fit) -> None:
        """Fit Q to ``g`` or ``m``, [B, ...], and write ``Qᵀ Q m`` over g."""
        out, m = g.view(len(g), -1), m.view(len(g), -1)
        target = m if self.source == "momentum" else out
        u, v, d, bounds = q
        if now.first:
            d.copy_(start(target, now.init)[:, None])
            for factor, name in ((u, "u"), (v, "v")):
                factor.copy_(now.normals(factor, f"psgd/{name}"))
                factor.mul_(0.1**0.5 / torch.linalg.vector_norm(factor, dim=(1, 2), keepdim=True))
        if now.due():
            if now.coin("balance") < BALANCE:
                _balance(u, v)
            _fit(u, v, d, bounds, *now.perturbed(target), now)
        top = peak(m)
        m.div_(top).mul_(d)
        low_rank_(m, u, v)
        low_rank_(m, v, u)
        clip_rms_(torch.mul(m, d, out=out), top, now.clip)

    def flops(self, block: Block) -> float:
        """Of a step that fits: 18 products with U or V and one with both, ``36 r + 2 r^2`` per element."""
        r = min(self.rank, block.numel)
        return (36.0 * r + 2.0 * r * r) * block.numel

    def scratch(self, block: Block) -> int:
        """Six vectors and one product of low rank, in float32."""
        return 4 * (6 + min(self.rank, block.numel)) * block.numel


def low_rank_(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``x <- (I + U Vᵀ) x``, in place."""
    return x.add_(mix(project(x, v), u))


def project(x: Tensor, v: Tensor) -> Tensor:
    """``Vᵀ x`` [B, r]."""
    return torch.bmm(v, x[:, :, None])[:, :, 0]


def mix(c: Tensor, u: Tensor) -> Tensor:
    """``U c`` [B, numel]."""
    return torch.bmm(c[:, None, :], u)[:, 0]


def _balance(u: Tensor, v: Tensor) -> None:
    """Scale U and V to one Frobenius norm."""
    share = torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True).clamp_min_(TINY)
    share = (share / torch.linalg.vector_norm(u, dim=(1, 2), keepdim=True).clamp_min_(TINY)).sqrt_()
    u.mul_(share)
    v.div_(share)


def _fit(u: Tensor, v: Tensor, d: Tensor, bounds: Tensor, h: Tensor, z: Tensor, now: Fit) -> None:
    """One step on d and, with even chances, on U or V, to the pair (z, h); z is kept and h overwritten."""
    a, p, b, w = (now.spare(name, h) for name in "apbw")
    mu, left = now.mu, now.coin("side") < 0.5
    top = peak(h)
    h.div_(top)
    low_rank_(torch.mul(h, d, out=a), u, v)  # Q h
    low_rank_(p.copy_(a), v, u).mul_(d).mul_(h)  # h P h
    size = torch.minimum(torch.minimum(top, HUGE / peak(a)), HUGE / peak(p).sqrt())
    a.mul_(size)
    p.mul_(size).mul_(size)
    inner = torch.bmm(v, u.mT)  # I + VᵀU
    inner.diagonal(dim1=1, dim2=2).add_(1.0)
    torch.div(z, d, out=b)
    b.sub_(mix(_solve(inner.mT, project(b, u)), v))  # Q^-T z
    w.copy_(b).sub_(mix(_solve(inner, project(b, v)), u)).div_(d).mul_(z)  # z P^-1 z
    bound = track(bounds[:, 0], (peak(p) + peak(w))[:, 0])
    d.sub_(p.sub_(w).mul_((mu / bound)[:, None]).mul_(d))
    other = v if left else u
    ca, cb = project(a, other), project(b, other)
    bound = track(
        bounds[:, 1 if left else 2], _length(a) * _length(mix(ca, other)) + _length(b) * _length(mix(cb, other))
    )
    each = (mu / bound.clamp_min(TINY))[:, None]
    if left:
        ca, cb = (torch.bmm(c[:, None, :], inner)[:, 0] for c in (ca, cb))
        u.baddbmm_((ca * each)[:, :, None], a[:, None, :], alpha=-1.0).baddbmm_((cb * each)[:, :, None], b[:, None, :])
    else:
        a.add_(mix(ca, v))
        b.add_(mix(cb, v))
        v.baddbmm_((ca * each)[:, :, None], a[:, None, :], alpha=-1.0).baddbmm_((cb * each)[:, :, None], b[:, None, :])


def _length(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=1)
    return length


def _solve(a: Tensor, c: Tensor) -> Tensor:
    """``A^-1 c`` for each row; 0 where A is singular, so that the step leaves out the low-rank part."""
    solution: Tensor = torch.linalg.solve_ex(a, c[:, :, None])[0]
    return solution[:, :, 0].nan_to_num_(0.0, 0.0, 0.0)
