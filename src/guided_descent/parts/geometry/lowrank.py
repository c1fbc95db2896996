"""Low-rank geometry: moments of a projection of the gradient, and directions of full size made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from guided_descent.linalg.eigen import FAILED, eigenbasis
from guided_descent.linalg.workspace import Workspace
from guided_descent.parts.base import Batch, Found, Hyper, Part, Slot, State, Task, Unit, key
from guided_descent.parts.estimate import AdamMoments
from guided_descent.parts.geometry.kronecker import stacked
from guided_descent.parts.geometry.psgd import number
from guided_descent.parts.rows import Number, Rows
from guided_descent.parts.slow import Slow
from guided_descent.routing.roles import Block

#: Which side is projected: ``std`` the shorter one, else always the rows or always the columns.
SIDES = ("std", "left", "right")
#: What becomes of the moments when their subspace changes.
CARRIES = ("keep", "rotate", "reset")


@dataclass(frozen=True)
class LowRank(Part):
    """Run another part on a projection of the gradient: ``R = P^T G`` [k, n], or ``R = G P`` [m, k].

    ``k`` is ``rank``, or the shorter side where that is less; ``side`` says which side is projected, one of ``SIDES``.
    The inner part is elementwise with parameter-shaped state, which becomes state of R's shape. Counted:
    ``projections``.
    """

    slot: ClassVar[str] = "geometry"
    unit: ClassVar[Unit] = "matrix"
    inner: Part = field(default_factory=AdamMoments)
    rank: int = 128
    side: str = "std"

    def left(self, shape: Sequence[int]) -> bool:
        """Whether the rows of ``[..., m, n]`` are projected."""
        return self.side == "left" or (self.side == "std" and shape[-2] <= shape[-1])

    def sizes(self, block: Block) -> tuple[int, int, int]:
        """Length of the projected side, rank, and length of the other side."""
        m, n = block.shape[-2:]
        d, other = (m, n) if self.left(block.shape) else (n, m)
        return d, min(self.rank, m, n), other

    def low(self, block: Block) -> tuple[int, ...]:
        """Shape of R."""
        _, k, other = self.sizes(block)
        return (*block.shape[:-2], *((k, other) if self.left(block.shape) else (other, k)))

    def slots(self, block: Block) -> dict[str, Slot]:
        """The state of the inner part."""
        low = self.low(block)
        inner = self.inner.slots(block).items()
        return {name: replace(slot, layout="factor", shape=low) for name, slot in inner}

    def adapt(self, x: Batch, low: Tensor, s: State, h: Hyper) -> Tensor:
        """What the inner part makes of R [B, ...], which stays as it is."""
        inside = Batch(
            g=Rows([low], low),
            p=_no_parameters,
            blocks=x.blocks,
            scratch=lambda tag: _rows(x.work.take(f"low.{tag}", low.shape, low.dtype, low.device)),
            step=x.step,
            first=x.first,
            work=x.work,
        )
        self.inner.update(inside, {name: _rows(s[name]) for name in self.inner.slots(x.blocks[0])}, h, {})
        return inside.take().whole

    def project(self, x: Batch, g: Tensor, basis: Tensor) -> Tensor:
        """R of G [B, ..., m, n], P being [B, ..., d, k], in scratch."""
        shape = (*g.shape[:-2], *self.low(x.blocks[0])[-2:])
        low = x.work.take("low", shape, g.dtype, g.device)
        a, b = (basis.mT, g) if self.left(g.shape) else (g, basis)
        torch.bmm(stacked(a), stacked(b), out=stacked(low))
        x.tick("projections")
        return low

    def lift(self, low: Tensor, basis: Tensor, out: Tensor, alpha: float | None = None) -> None:
        """``out <- P R``, or R P^T; or ``out <- out + alpha P R``."""
        a, b = (basis, low) if self.left(out.shape) else (low, basis.mT)
        if alpha is None:
            torch.bmm(stacked(a), stacked(b), out=stacked(out))
        else:
            stacked(out).baddbmm_(stacked(a), stacked(b), alpha=alpha)

    def ratios(self, x: Batch, top: Tensor, low: Tensor, channel: bool = True) -> Tensor:
        """``||top|| / ||low||`` along the projected side, or of whole matrices, where that is not 0 / 0."""
        axes = ((-2,) if self.left(x.shape) else (-1,)) if channel else (-2, -1)
        spare = x.work.take("low.squares", low.shape, low.dtype, low.device)
        above, below = (torch.mul(a, a, out=spare).sum(axes, keepdim=True).sqrt_() for a in (top, low))
        return torch.where(below > 0, above / below, 0.0)

    def flops(self, block: Block) -> float:
        """The projection and its inverse, ``4 m n k``, and the inner part."""
        d, k, other = self.sizes(block)
        return block.batch * (4.0 * d * k * other + 12.0 * k * other)

    def scratch(self, block: Block) -> int:
        """R, what is made of it, and its squares, in float32."""
        _, k, other = self.sizes(block)
        return 12 * block.batch * k * other


@dataclass(frozen=True)
class Subspace(LowRank, Slow):
    """GaLore: ``u <- scale P f(P^T G)``, f the inner part, P the leading singular vectors of a recent gradient.

    The first update takes P from its gradient. A refresh takes it from the gradient of its step, before the update, by
    the eigenvectors of the Gram matrix in float64 (``refresh_method`` ``eigh``), or turns it by one step of orthogonal
    iteration, ``P <- qr(G G^T P)`` (``qr``). Each new column has the sign under which it is nearer to the old one. A
    gradient that is zero or not finite keeps P. Meanwhile the inner state stays as it is (``carry`` ``keep``, as in the
    paper), is seen in the new subspace, with ``T = P'^T P`` as ``T m`` and ``T^2 v`` with squared elements
    (``rotate``), or begins at 0 (``reset``). Drift is the share of the gradient's norm outside the subspace. State:
    ``basis`` [d, k], and the inner state in R's shape. Counted: ``refreshes``, ``skipped_refreshes``, ``fallbacks``.
    Source: Zhao et al. 2024, 2403.03507.
    """

    reads_gradient: ClassVar[bool] = True
    frequency: str = key("update_proj_gap")
    scale: str = key("scale")
    method: str = key("refresh_method")
    carry: str = key("carry")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The basis and the inner state."""
        d, k, _ = self.sizes(block)
        return {"basis": Slot("factor", (*block.shape[:-2], d, k))} | super().slots(block)

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Project, run the inner part, lift."""
        u = x.take().whole
        self.start(x, u, s)
        self.lift(self.adapt(x, self.project(x, u, s["basis"]), s, h), s["basis"], u)
        x.scale(h[self.scale])

    def start(self, x: Batch, g: Tensor, s: State) -> None:
        """The first basis, that of the first gradient."""
        if x.first:
            basis, fallbacks = self.leading(g, s["basis"].shape[-1])
            s["basis"].copy_(basis)
            if bool((fallbacks > 0).any()):
                x.tick("fallbacks", (fallbacks > 0).reshape(len(x.blocks), -1).sum(1).tolist())

    def leading(self, g: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k leading singular vectors [..., d, k] of the projected side, in g's dtype, and fallbacks [...]."""
        a = (g if self.left(g.shape) else g.mT).double()  # the Gram matrix has the square of the condition
        found = eigenbasis(a @ a.mT)
        return found.basis[..., :k].to(g.dtype), found.fallbacks

    # -- refreshes -------------------------------------------------------------------------------------------------

    def tasks(self, block: Block) -> dict[str, Task]:
        """One, of about ``2 d^2 c + 20 d^3`` with c the other side."""
        d, k, other = self.sizes(block)
        lead = block.shape[:-2]
        results = {"basis": Slot("factor", (*lead, d, k)), "fallbacks": Slot("factor", lead, torch.int8)}
        return {"basis": Task(block.batch * (2.0 * d * d * other + 20.0 * d**3), results)}

    def inputs(self, task: str, s: State, h: Hyper) -> tuple[Tensor, ...]:
        """The gradient and the last basis."""
        return s["gradient"], s["basis"]

    def drift(self, inputs: Sequence[Tensor], h: Hyper) -> Tensor:
        """The share of the gradient's norm that lies outside the subspace, the largest of a block; 0 for zero."""
        g, basis = inputs
        whole = torch.linalg.matrix_norm(g).square()
        inside = torch.linalg.matrix_norm(basis.mT @ g if self.left(g.shape) else g @ basis).square()
        share = torch.where(whole == 0, 0.0, (1 - inside / whole).clamp(min=0.0).sqrt())
        return share.flatten(1).amax(1) if share.ndim > 1 else share

    def solve(self, inputs: Sequence[Tensor], h: Hyper) -> Found:
        """The next basis, in the old one's signs; the old one where the gradient does not tell."""
        g, old = inputs
        if h[self.method] == "qr":
            a = g if self.left(g.shape) else g.mT
            new = torch.linalg.qr(a @ (a.mT @ old)).Q
            good = new.isfinite().flatten(-2).all(-1)
            fallbacks = (~good * FAILED).to(torch.int8)
        else:
            new, fallbacks = self.leading(g, old.shape[-1])
            good = fallbacks != FAILED
        good = good & (g != 0).flatten(-2).any(-1)
        new = torch.where((new * old).sum(-2, keepdim=True) < 0, -new, new)
        return {"basis": torch.where(good[..., None, None], new, old), "fallbacks": fallbacks}

    def land(self, x: Batch, s: State, h: Hyper, task: str, found: Found) -> None:
        """Move to the new subspace and carry the inner state along."""
        old, new = s["basis"], found["basis"]
        if h[self.carry] != "keep":
            turn, left = new.mT @ old, self.left(x.shape)
            for name, slot in self.inner.slots(x.blocks[0]).items():
                if h[self.carry] == "reset":
                    s[name].fill_(slot.fill)
                elif slot.basis != "none":
                    by = turn if slot.basis == "vector" else turn.square()
                    s[name].copy_(by @ s[name] if left else s[name] @ by.mT)
        old.copy_(new)


@dataclass(frozen=True)
class FullRankSubspace(Subspace):
    """Fira: GaLore's direction, and what it leaves out of the gradient, at the lengths that the inner part gives.

    ``u <- scale P f(R) + phi (G - P R)``, ``phi_j = ||f(R)_j|| / ||R_j||`` for each column (or row) along the projected
    side. The second term may grow by a factor of ``growth`` from one step to the next; see ``limit_growth``. State:
    GaLore's, and ``last_norm``, one number for each matrix. Source: Chen et al. 2024, 2410.01623.
    """

    growth: str = key("growth_limit")

    def slots(self, block: Block) -> dict[str, Slot]:
        """GaLore's state, and the length of the last residual."""
        return super().slots(block) | {"last_norm": Slot("factor", block.shape[:-2])}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Project, run the inner part, scale and limit the residual, lift."""
        u = x.take().whole
        self.start(x, u, s)
        low = self.project(x, u, s["basis"])
        top = self.adapt(x, low, s, h)
        self.lift(low, s["basis"], u, alpha=-1.0)
        u.mul_(self.ratios(x, top, low))
        limit_growth(u, s["last_norm"], h[self.growth])
        self.lift(top.mul_(h[self.scale]), s["basis"], u, alpha=1.0)

    def flops(self, block: Block) -> float:
        """GaLore's, a second inverse of the projection, and 5 per element."""
        d, k, other = self.sizes(block)
        return super().flops(block) + block.batch * 2.0 * d * k * other + 5.0 * block.numel


@dataclass(frozen=True)
class ProjectedScale(LowRank):
    """APOLLO: the gradient itself, at the lengths that the inner part gives to a random projection of it.

    ``R = P G`` with ``P`` [k, d] of normals of variance 1 / k, drawn anew every ``gap`` updates from (seed, number of
    the draw, shape): it is never stored, and the same for all blocks of one shape. ``u <- sqrt(scale) s G`` with
    ``s_j = ||f(R)_j|| / ||R_j||`` for each column (or row) along the projected side (``channel``), or one ratio for the
    matrix. State: the inner state in R's shape. Source: Zhu et al. 2024, 2412.05270.
    """

    gap: str = key("update_proj_gap")
    scale: str = key("scale")
    seed: str = key("seed")
    channel: bool = True

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Project, run the inner part, compare lengths, scale."""
        u = x.take().whole
        d, k, _ = self.sizes(x.blocks[0])
        basis = gaussian(d, k, h[self.seed], x.step, h[self.gap], u.dtype, u.device, x.work)
        low = self.project(x, u, basis.expand(*u.shape[:-2], d, k))
        ratios = self.ratios(x, self.adapt(x, low, s, h), low, self.channel)
        u.mul_(ratios.mul_(h[self.scale] ** 0.5))

    def flops(self, block: Block) -> float:
        """The projection, the inner part, and 1 per element."""
        d, k, other = self.sizes(block)
        return block.batch * (2.0 * d * k * other + 16.0 * k * other) + block.numel

    def scratch(self, block: Block) -> int:
        """R, what is made of it, its squares, and P, in float32."""
        d, k, _ = self.sizes(block)
        return super().scratch(block) + 4 * d * k


@dataclass(frozen=True)
class GrowthLimit(Part):
    """Bound how fast directions grow: no matrix is longer than ``growth`` times what it was; ``None`` bounds none.

    See ``limit_growth``. State: ``last_norm``, one number for each matrix. Source: Chen et al. 2024, 2410.01623.
    """

    slot: ClassVar[str] = "scale"
    unit: ClassVar[Unit] = "matrix"
    growth: str = key("growth_limit")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The last length."""
        return {"last_norm": Slot("factor", block.shape[:-2])}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Measure and shorten."""
        limit_growth(x.take().whole, s["last_norm"], h[self.growth])

    def flops(self, block: Block) -> float:
        """About 3 per element."""
        return 3.0 * block.numel


def limit_growth(u: Tensor, last: Tensor, growth: Number | None) -> None:
    """Shorten each matrix to ``growth`` times its last length, and remember the length; in place.

    A length of 0 bounds nothing and is not remembered, so that a gradient of zeros does not stop a matrix for good.
    """
    size = torch.linalg.matrix_norm(u)
    if growth is not None:
        bound = last * growth
        share = torch.where((last > 0) & (size > bound), bound / size, 1.0)
        u.mul_(share[..., None, None])
        size = size * share
    last.copy_(torch.where(size > 0, size, last))


@_disable_dynamo
@torch.no_grad()
def gaussian(
    d: int, k: int, seed: int, step: Number, gap: int, dtype: torch.dtype, device: torch.device, work: Workspace
) -> Tensor:
    """P^T [d, k] of normals of variance 1 / k, fixed by (seed, number of the draw, shape); a new one every gap steps.

    It is drawn in float32 whatever the dtype, which then sees the same numbers; a graph does not look inside.
    """
    draw = (int(step) - 1) // int(gap)
    made = torch.Generator(device).manual_seed(number(f"{seed}/{draw}/{d}x{k}/projection"))
    raw = work.take("low.gaussian", (d, k), torch.float32, device).normal_(generator=made).mul_(k**-0.5)
    return raw if dtype == raw.dtype else work.take("low.gaussian", (d, k), dtype, device).copy_(raw)


def _rows(stack: Tensor) -> Rows:
    return Rows([stack], stack)


def _no_parameters() -> Rows:
    raise TypeError("a part inside a projection has no parameters to read: they are not projected")
