"""Orthogonal directions that cost less than a polar factor: of low rank, or of some rows or columns alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from guided_descent.linalg.norms import full_float32
from guided_descent.linalg.orthonormal import orthonormal
from guided_descent.linalg.workspace import Workspace
from guided_descent.parts.base import Batch, Count, Hyper, Part, Slot, State, Unit, key
from guided_descent.parts.geometry.psgd import number
from guided_descent.parts.geometry.spectral import Polar
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class LowRankPolar(Part):
    """Dion: an orthogonal direction of low rank by one power iteration a step, with error feedback.

    With the buffer M [m, n], m >= n, and Q [n, k], ``k = ceil(rank_fraction n)``: ``M <- M + u``; ``P = orth(M Q)``;
    ``R = MᵀP``; ``M <- M - (1 - mu) P Rᵀ``, so that what P does not reach is kept whole; ``Q <- R`` with columns of
    norm 1; ``u <- P Qᵀ``. A matrix with ``m < n`` is worked on as its transpose, so that Q is on the shorter side.

    ``orth`` is ``linalg.orthonormal``; where its fast route fails that is counted as ``fallbacks``. Columns of R that
    are 0 to rounding add nothing to the direction and leave 0 in Q; columns of Q that are 0 or not finite, all of them
    at first, are drawn anew from (seed, step), the same for all matrices of one shape. ``eps`` ``None`` divides by the
    norm alone, so that the length of gradients does not matter; a number is added to it. Counted as
    ``orthogonalizations``.

    State: ``momentum_buffer``, shaped like the parameter, and ``right``, [min(m, n), k]: together 1 + k / max(m, n)
    numbers for each element. Source: Ahn et al. 2025, 2504.05295.
    """

    slot: ClassVar[str] = "geometry"
    unit: ClassVar[Unit] = "matrix"
    rank_fraction: float = 0.25
    momentum: str = key("momentum")
    eps: str = key("eps")
    seed: str = key("seed")

    def rank(self, block: Block) -> int:
        """Columns of Q."""
        short = min(block.shape[-2:])
        return min(short, math.ceil(self.rank_fraction * short))

    def slots(self, block: Block) -> dict[str, Slot]:
        """The buffer and the right factor."""
        shape = (*block.shape[:-2], min(block.shape[-2:]), self.rank(block))
        return {"momentum_buffer": Slot(), "right": Slot("factor", shape)}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the buffer, iterate once, feed the error back, make the direction."""
        u = x.take()
        buffer = s["momentum_buffer"].add_(u)
        u.copy_(buffer)
        flat, right = u.whole.view(-1, *x.shape[-2:]), s["right"]
        tall = flat.mT if flat.shape[1] < flat.shape[2] else flat
        q = right.view(-1, *right.shape[-2:])
        p, r = _iterate(tall, q, (h[self.seed], x.step, h[self.eps]), len(x.blocks), x.work, x.ticks)
        _product(flat, p, r)
        buffer.add_(u, alpha=h[self.momentum] - 1)
        _product(flat, p, q)

    def flops(self, block: Block) -> float:
        """Four products of rank k and the orthonormal columns, ``8 m n k + 6 max(m, n) k^2``."""
        k = self.rank(block)
        return 8.0 * block.numel * k + 6.0 * block.batch * max(block.shape[-2:]) * k * k

    def scratch(self, block: Block) -> int:
        """M Q and what becomes of it, in float32."""
        return 4 * block.batch * self.rank(block) * (4 * max(block.shape[-2:]) + 2 * min(block.shape[-2:]))


def _product(out: Tensor, p: Tensor, q: Tensor) -> None:
    """``out <- P Qᵀ``, or its transpose where out is wide."""
    left, right = (q, p) if out.shape[1] < out.shape[2] else (p, q)
    out.baddbmm_(left, right.mT, beta=0)


@_disable_dynamo
@torch.no_grad()
def _iterate(
    m: Tensor,
    q: Tensor,
    numbers: tuple[int, float | Tensor, float | Tensor | None],
    blocks: int,
    work: Workspace,
    ticks: dict[str, Count],
) -> tuple[Tensor, Tensor]:
    """P and R of M [B, m, n] and Q [B, n, k], which takes the columns of R with norm 1."""
    seed, step, eps = numbers
    ticks["orthogonalizations"] = 1
    p = work.take("dion.p", (len(m), m.shape[1], q.shape[2]), m.dtype, m.device)
    r = work.take("dion.r", tuple(q.shape), m.dtype, m.device)
    if not m.numel():
        return p.zero_(), r.zero_()
    generator = torch.Generator(m.device).manual_seed(number(f"{seed}/{int(step)}/dion/{tuple(m.shape[1:])}"))
    _restart(q, generator)
    with full_float32():
        columns, failed = orthonormal(torch.bmm(m, q, out=p), generator)
        p.copy_(columns)
        torch.bmm(m.mT, p, out=r)
    if bool(failed.any()):
        ticks["fallbacks"] = failed.view(blocks, -1).sum(1).tolist()
    norm = torch.linalg.vector_norm(r, dim=1, keepdim=True, dtype=torch.float64)
    floor = math.sqrt(sum(m.shape[1:])) * torch.finfo(m.dtype).eps * norm.amax(2, keepdim=True)
    scale = torch.where(norm > floor, 1 / (norm + (eps or 0.0)), torch.where(norm.isnan(), norm, 0.0))
    q.copy_(r * scale)
    return p, r


def _restart(q: Tensor, generator: torch.Generator) -> None:
    """Draw the columns that are 0 or not finite anew, with norm 1."""
    norm = torch.linalg.vector_norm(q, dim=1, keepdim=True)
    dead = ~((norm > 0) & norm.isfinite())
    if bool(dead.any()):
        drawn = torch.randn(q.shape[1:], dtype=torch.float64, device=q.device, generator=generator)
        drawn = drawn / torch.linalg.vector_norm(drawn, dim=0)
        q.copy_(torch.where(dead, drawn.to(q.dtype), q))


@dataclass(frozen=True)
class SelectedPolar(Polar):
    """Dion2: the polar factor of the rows, or columns, of the buffer with the largest sums of magnitudes.

    ``M <- M + u``; S: of the shorter side's d slices (rows where m <= n) the ``ceil(fraction d)`` with the largest sum
    ``|M_ij|``, the first ones among equals; ``u_S <- U Vᵀ`` of ``M_S``, 0 elsewhere; ``M_S <- mu M_S``: what has not
    been used is kept whole. With ``fraction`` 1 it is the polar factor of the heavy-ball buffer. Counted as
    ``orthogonalizations``. State: ``momentum_buffer``, shaped like the parameter. Source: Ahn, Amsel and Langford 2025,
    2512.16928.
    """

    fraction: float = 0.25
    momentum: str = key("momentum")

    def chosen(self, block: Block) -> int:
        """How many slices are used in a step."""
        short = min(block.shape[-2:])
        return min(short, math.ceil(self.fraction * short))

    def slots(self, block: Block) -> dict[str, Slot]:
        """The buffer."""
        return {"momentum_buffer": Slot()}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the buffer, choose, orthogonalise what is chosen, decay it in the buffer."""
        u = x.take()
        buffer = s["momentum_buffer"].add_(u)
        u.copy_(buffer)
        rows = u.whole if x.shape[-2] <= x.shape[-1] else u.whole.mT  # [..., d, longer side]
        sizes = rows.abs().sum(-1, keepdim=True)
        order = sizes.argsort(dim=-2, descending=True, stable=True)[..., : self.chosen(x.blocks[0]), :]
        index = order.sort(dim=-2).values.expand(*order.shape[:-1], rows.shape[-1])
        selected = rows.gather(-2, index)
        used = torch.zeros_like(sizes, dtype=torch.bool).scatter_(-2, order, True)
        rows.mul_(torch.where(used, h[self.momentum], torch.ones_like(sizes)))
        buffer.copy_(u)
        self.factor(x, selected, h)  # of the transpose it is the transpose
        rows.zero_().scatter_(-2, index, selected)

    def flops(self, block: Block) -> float:
        """Those of the polar factor of the chosen slices."""
        short, long = sorted((self.chosen(block), max(block.shape[-2:])))
        return block.batch * (20.0 * short**2 * long + 10.0 * short**3) + 6.0 * block.numel

    def scratch(self, block: Block) -> int:
        """The chosen slices and their polar factor."""
        return 8 * block.batch * self.chosen(block) * max(block.shape[-2:])
