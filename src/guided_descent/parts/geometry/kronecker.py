"""Kronecker geometry: statistics of both sides of a matrix, and methods that work in their eigenbases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.linalg.eigen import eigenbasis, refresh_basis
from guided_descent.parts.base import Batch, Hyper, Part, Slot, State, Unit
from guided_descent.parts.estimate import AdamMoments
from guided_descent.parts.rows import Number
from guided_descent.routing.roles import Block

SIDES = ("left", "right")


@dataclass(frozen=True)
class Eigenbasis(Part):
    """Run another part in the eigenbases of both sides: ``u <- Q_L f(Q_L^T G Q_R) Q_R^T``.

    The bases are those of ``L = EMA[G G^T]`` and ``R = EMA[G^T G]``. The first call sets L, R and their exact
    eigenbases and makes no update, so that no gradient is ever projected onto a basis made of it alone; the inner
    part's step counter leaves it out. Every ``frequency`` steps the columns are sorted by ``diag(Q^T A Q)`` and one
    step of orthogonal iteration is taken (``refresh_method`` ``qr``), or the bases are solved anew (``eigh``). The
    inner part's ``vector`` slots are rotated along, its ``square`` slots follow the permutation. A side longer than
    ``max_dim`` keeps the identity. The factors' memory is ``beta``, or the second of ``betas`` where that is
    ``None``. State: ``left``, ``right`` and ``left_basis``, ``right_basis``, ``[m, m]`` and ``[n, n]``, at least
    float32. Counted: ``refreshes``, ``fallbacks``. Source: Vyas et al. 2024, 2409.11321.
    """

    slot: ClassVar[str] = "geometry"
    unit: ClassVar[Unit] = "matrix"
    inner: Part = field(default_factory=lambda: AdamMoments(late_correction=True))
    beta: str = "shampoo_beta"
    betas: str = "betas"
    frequency: str = "precondition_frequency"
    method: str = "refresh_method"
    schedule: str = "refresh_schedule"
    max_dim: int = 10_000

    @property
    def keys(self) -> tuple[str, ...]:
        """Group keys it reads, those of the inner part included."""
        return (self.beta, self.betas, self.frequency, self.method, self.schedule, *self.inner.keys)

    def sides(self, block: Block) -> dict[str, int]:
        """The preconditioned sides and their lengths."""
        return {side: d for side, d in zip(SIDES, block.shape[-2:]) if d <= self.max_dim}

    def slots(self, block: Block) -> dict[str, Slot]:
        """Factors and bases of each side, and the state of the inner part."""
        lead = block.shape[:-2]
        slots = {}
        for side, d in self.sides(block).items():
            slots[side] = Slot("factor", (*lead, d, d))
            slots[f"{side}_basis"] = Slot("factor", (*lead, d, d))
        return slots | self.inner.slots(block)

    def begin(self, s: State, h: Hyper, step: int) -> None:
        """Advance the scalar state of the inner part, which does not count the first call."""
        if step > 1:
            self.inner.begin(s, h, step - 1)

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the factors, then run the inner part between a rotation and its inverse."""
        g = x.take().whole
        beta = h[self.betas][1] if h[self.beta] is None else h[self.beta]
        if "left" in s:
            _average(s["left"], g, g.mT, beta)
        if "right" in s:
            _average(s["right"], g.mT, g, beta)
        if x.first:
            self._solve(x, s)
            x.hold()
            return
        self._rotate(x, g, s, into=True)
        number = x.step
        x.step, x.first = number - 1, not isinstance(number, Tensor) and number == 2  # the first call does not count
        self.inner.update(x, s, h, total)
        x.step, x.first = number, False
        self._rotate(x, x.own().whole, s, into=False)

    def refresh(self, x: Batch, s: State, h: Hyper) -> None:
        """Move to the new bases and carry the inner state along."""
        old = {side: s[f"{side}_basis"].clone() for side in SIDES if side in s}
        orders: dict[str, Tensor] = {}
        if h[self.method] == "eigh":
            self._solve(x, s)
        else:
            for side in old:
                basis, orders[side] = refresh_basis(s[side], s[f"{side}_basis"])
                s[f"{side}_basis"].copy_(basis)
        stack = x.spare("direction")
        for name, slot in self.inner.slots(x.blocks[0]).items():
            if slot.basis == "none":
                continue
            value = stack.copy_(s[name]).whole
            if slot.basis == "vector":
                if "left" in old:
                    value.copy_(s["left_basis"].mT @ (old["left"] @ value))
                if "right" in old:
                    value.copy_((value @ old["right"].mT) @ s["right_basis"])
            else:
                if "left" in orders:
                    value.copy_(value.gather(-2, orders["left"].unsqueeze(-1).expand_as(value)))
                if "right" in orders:
                    value.copy_(value.gather(-1, orders["right"].unsqueeze(-2).expand_as(value)))
            s[name].copy_(stack)
        x.tick("refreshes")

    def period(self, h: Hyper) -> int:
        """Steps between refreshes."""
        return int(h[self.frequency])

    def refresh_phase(self, h: Hyper) -> bool:
        """Whether the refreshes of the blocks are spread over the period."""
        return bool(h[self.schedule] == "staggered")

    def flops(self, block: Block) -> float:
        """Factors, rotation into the bases and back: ``6 (m^2 n + m n^2)``, and the inner part."""
        m, n = block.shape[-2:]
        sides = self.sides(block)
        products = 6.0 * (m * m * n * ("left" in sides) + m * n * n * ("right" in sides))
        return block.batch * products + self.inner.flops(block)

    def refresh_flops(self, block: Block) -> float:
        """About ``(6 + 8/3) d^3`` for each side."""
        return block.batch * sum((6 + 8 / 3) * d**3 for d in self.sides(block).values())

    def scratch(self, block: Block) -> int:
        """Two matrices and one product for each side, in float32."""
        m, n = block.shape[-2:]
        return 4 * block.batch * (2 * m * n + m * m + n * n)

    def _solve(self, x: Batch, s: State) -> None:
        """Exact eigenbases; a row that cannot be solved keeps the basis it has (the identity at first)."""
        fallbacks = torch.zeros(len(x.blocks), dtype=torch.long)
        for side in SIDES:
            if side not in s:
                continue
            found = eigenbasis(s[side])
            basis = s[f"{side}_basis"]
            if x.first:
                basis.copy_(torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device).expand_as(basis))
            basis.copy_(torch.where(found.failed[..., None, None], basis, found.basis))
            fallbacks += (found.fallbacks > 0).reshape(len(x.blocks), -1).sum(1).cpu()
        if bool(fallbacks.any()):
            x.tick("fallbacks", fallbacks.tolist())

    def _rotate(self, x: Batch, value: Tensor, s: State, *, into: bool) -> None:
        """``Q_L^T V Q_R`` into the bases, or ``Q_L V Q_R^T`` out of them, in place."""
        half = x.work.take("rotate", value.shape, value.dtype, value.device)
        source = value
        if "left" in s:
            left = s["left_basis"]
            torch.matmul(left.mT if into else left, value, out=half)
            source = half
        if "right" in s:
            right = s["right_basis"]
            target = value if source is half else half
            torch.matmul(source, right if into else right.mT, out=target)
            source = target
        if source is not value:
            value.copy_(source)


def _average(factor: Tensor, a: Tensor, b: Tensor, beta: Number) -> None:
    """``F <- beta F + (1 - beta) A B``, without a temporary where the weight is a plain number."""
    if isinstance(beta, Tensor):
        factor.lerp_(a @ b, (1 - beta).to(factor.dtype))
    else:
        flat = factor.view(-1, *factor.shape[-2:])
        flat.baddbmm_(a.flatten(0, -3), b.flatten(0, -3), beta=beta, alpha=1 - beta)
