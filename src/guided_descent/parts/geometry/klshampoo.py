"""KL-Shampoo's geometry: each side's statistic is whitened by the other side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Found, Hyper, Part, Slot, State, key
from guided_descent.parts.estimate import AdamMoments
from guided_descent.parts.geometry.kronecker import (
    SIDES,
    Eigenbasis,
    average,
    next_basis,
    rotate,
    start_bases,
    transposes,
)
from guided_descent.parts.rows import Number
from guided_descent.routing.roles import Block

#: What the eigenvalues are before the second call.
FIRST_VALUE = 0.1
#: Upper bound of an eigenvalue's inverse root, beside the side's own length.
LARGEST_ROOT = 4000


@dataclass(frozen=True)
class KLEigenbasis(Eigenbasis):
    """Run another part in the eigenbases of KL-Shampoo's factors.

    ``S_L (x) S_R`` minimises the divergence between the Gaussians of covariance ``E[g g^T]`` and ``S_L (x) S_R``:
    ``S_L`` is the average of ``G S_R^-1 G^T / n`` and ``S_R`` that of ``G^T S_L^-1 G / m``. Each inverse is taken as
    ``Q diag(1 / lambda) Q^T`` of the last basis, and the eigenvalues are averages of their own, both made of the old
    ones: ``lambda_L,i <- b lambda_L,i + (1 - b) mean_j (G'_ij^2 / lambda_R,j)`` with ``G' = Q_L^T G Q_R``; a root
    ``lambda^(-1/2)`` never exceeds ``max(10, min(d, 4000))``. The first call sets ``S_L = (1 - b) G G^T / n``, ``S_R =
    (1 - b) G^T G / m``, their bases, and ``lambda = 0.1``, and makes no update. A refresh keeps every column at its
    place: eigenvalues and second moments stay.

    State, beside that of ``Eigenbasis``: ``left_values`` [m] and ``right_values`` [n]. Source: Lin et al. 2025,
    2509.03378.
    """

    inner: Part = field(default_factory=lambda: AdamMoments(late_correction=True))
    carry: str = key("")

    def slots(self, block: Block) -> dict[str, Slot]:
        """Eigenvalues beside factors, bases and the state of the inner part."""
        values = {
            f"{side}_values": Slot("factor", (*block.shape[:-2], d), fill=FIRST_VALUE)
            for side, d in self.sides(block).items()
        }
        return super().slots(block) | values

    def gather(self, x: Batch, g: Tensor, s: State, h: Hyper) -> None:
        """Advance factors and eigenvalues; the first factors are those of one gradient, not whitened."""
        if not x.first:
            whiten(x, g, s, inverse_roots(s), self.memory(h))
            return
        m, n = g.shape[-2:]
        for (side, a), count in zip(transposes(g), (n, m)):
            if side in s:
                average(s[side], a, self.memory(h), 1 / count)
                s[f"{side}_values"].fill_(FIRST_VALUE)

    def solve(self, inputs: Sequence[Tensor], h: Hyper) -> Found:
        """The next basis, every column at its place."""
        return next_basis(*inputs, method=h[self.method], sort=False)

    def land(self, x: Batch, s: State, h: Hyper, task: str, found: Found) -> None:
        """Move to the new basis; what a huge gradient has made of the eigenvalues starts anew."""
        super().land(x, s, {**h, self.carry: "keep"}, task, found)
        values = s[f"{task}_values"]
        values.copy_(torch.where(values.isfinite(), values, torch.full_like(values, FIRST_VALUE)))

    def flops(self, block: Block) -> float:
        """Factors and eigenvalues ``4 m^2 n + 4 m n^2`` and one product more, rotations in and out, the inner part."""
        m, n = block.shape[-2:]
        chosen = self.sides(block)
        left, right = 2.0 * m * m * n * ("left" in chosen), 2.0 * m * n * n * ("right" in chosen)
        return block.batch * (4 * left + 5 * right) + self.inner.flops(block)

    def scratch(self, block: Block) -> int:
        """Two products more than the rotation needs, in float32."""
        return super().scratch(block) + 8 * block.numel


@dataclass(frozen=True)
class KLRoots(KLEigenbasis):
    """KL-Shampoo: ``u <- Q_L [(Q_L^T m Q_R) d / (1 + eps d)] Q_R^T`` with ``d_ij = (lambda_L,i lambda_R,j)^(-1/2)``.

    Factors, bases and eigenvalues are those of ``KLEigenbasis``, and the direction uses the ones from before this
    gradient. ``m`` is the average of ``G`` without bias correction, which warms the first steps up. The exponent is 1/2
    for each side and nothing is grafted: ``S_L (x) S_R`` has the scale of ``E[g g^T]``. State, beside theirs:
    ``exp_avg``. Source: Lin et al. 2025, 2509.03378.
    """

    inner: Part = field(default_factory=Part)  # nothing lives in the eigenbasis
    eps: str = key("eps")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The filtered gradient beside factors, bases and eigenvalues."""
        return {"exp_avg": Slot()} | super().slots(block)

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the momentum, factors and eigenvalues; precondition with what was there before."""
        u = x.take()
        if x.first:
            self.gather(x, u.whole, s, h)
            start_bases(x, s)
            x.hold()
            return
        s["exp_avg"].lerp_(u, 1 - h[self.betas][0])
        roots = inverse_roots(s)
        self.gather(x, u.whole, s, h)
        value = u.copy_(s["exp_avg"]).whole
        rotate(x, value, s, into=True, dtype=h[self.product])
        if roots:
            self._divide(x, value, roots, h[self.eps] * x.eps_scale)
        rotate(x, value, s, into=False, dtype=h[self.product])

    @staticmethod
    def _divide(x: Batch, value: Tensor, roots: Mapping[str, Tensor], eps: Number) -> None:
        """``V d / (1 + eps d)``, elementwise, in place."""
        d = x.work.take("whitened", value.shape, value.dtype, value.device).fill_(1)
        if "left" in roots:
            d.mul_(roots["left"].unsqueeze(-1))
        if "right" in roots:
            d.mul_(roots["right"].unsqueeze(-2))
        value.mul_(d).div_(d.mul_(eps).add_(1))

    def flops(self, block: Block) -> float:
        """As with an inner part, whose place the momentum and the division take."""
        return super().flops(block) + 8.0 * block.numel


def inverse_roots(s: State) -> dict[str, Tensor]:
    """``lambda^(-1/2)`` of each side, bounded; 0 where the eigenvalue is not finite."""
    found: dict[str, Tensor] = {}
    for side in SIDES:
        if side in s:
            values = s[f"{side}_values"]
            bound = float(max(10, min(values.shape[-1], LARGEST_ROOT)))
            found[side] = values.rsqrt().clamp_(max=bound).nan_to_num_(nan=0.0)
    return found


def whiten(x: Batch, g: Tensor, s: State, roots: Mapping[str, Tensor], beta: Number) -> None:
    """Advance factors and eigenvalues with a gradient whitened by the other side; all inverses are the old ones."""
    m, n = g.shape[-2:]
    half = x.work.take("whitened", g.shape, g.dtype, g.device)
    both = x.work.take("rotated", g.shape, g.dtype, g.device)
    left, right = roots.get("left"), roots.get("right")
    if left is None:
        half.copy_(g)
    else:
        torch.matmul(s["left_basis"].mT, g, out=half)
    if right is None:
        both.copy_(half)
    else:
        torch.matmul(half, s["right_basis"], out=both)
    both.square_()
    if right is not None:
        half.mul_(1.0 if left is None else left.unsqueeze(-1))
        average(s["right"], half.mT, beta, 1 / m)
        _follow(s["right_values"], both.mT, left, beta)
    if left is not None:
        if right is None:
            half.copy_(g)
        else:
            torch.matmul(g, s["right_basis"], out=half).mul_(right.unsqueeze(-2))
        average(s["left"], half, beta, 1 / n)
        _follow(s["left_values"], both, right, beta)


def _follow(values: Tensor, square: Tensor, other: Tensor | None, beta: Number) -> None:
    """``lambda_i <- b lambda_i + (1 - b) mean_j (square_ij other_j^2)``, kept where its inverse root is bounded."""
    if other is None:
        new = square.mean(-1)
    else:
        new = (square @ other.square().unsqueeze(-1)).squeeze(-1).div_(square.shape[-1])
    weight = (1 - beta).to(values.dtype) if isinstance(beta, Tensor) else 1 - beta
    bound = float(max(10, min(values.shape[-1], LARGEST_ROOT)))
    values.lerp_(new, weight).clamp_(min=bound**-2)
