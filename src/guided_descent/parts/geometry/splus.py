"""SPlus's geometry: the sign of the momentum in Shampoo's eigenbases, with a length that depends on the shape alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from guided_descent.linalg.eigen import eigenbasis
from guided_descent.parts.base import Batch, Found, Hyper, Part, Slot, State, Task, key
from guided_descent.parts.decay import Decoupled
from guided_descent.parts.geometry.kronecker import Eigenbasis, next_basis, rotate, start_bases
from guided_descent.routing.roles import Block

#: The scale of a matrix with a side that has no basis.
UNSHAPED = 0.001


def length(shape: tuple[int, ...], max_dim: int) -> float:
    """``2 / (m + n)``, or 0.001 where a side is longer than ``max_dim``."""
    m, n = shape[-2:]
    return 2.0 / (m + n) if max(m, n) <= max_dim else UNSHAPED


@dataclass(frozen=True)
class SignEigenbasis(Eigenbasis):
    """``u <- s Q_L sign(Q_L^T m Q_R) Q_R^T`` with ``s = 2 / (m + n)``, ``m`` the average of ``G`` in its own space.

    The bases are those of ``L = EMA[G G^T]`` and ``R = EMA[G^T G]`` at the last refresh, and the identity at the first
    update, after which they are solved for the first time. A side longer than ``max_dim`` keeps the identity, and
    ``s`` is then 0.001. State: ``exp_avg``, and each side's factor and basis. Source: Frans, Levine and Abbeel 2025,
    2506.07254.
    """

    inner: Part = field(default_factory=Part)  # nothing lives in the eigenbasis
    carry: str = key("")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The filtered gradient, factors and bases."""
        return {"exp_avg": Slot()} | super().slots(block)

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance factors and momentum, and take the sign of the momentum in the bases of the last refresh."""
        u = x.take()
        self.gather(x, u.whole, s, h)
        s["exp_avg"].lerp_(u, 1 - h[self.betas][0])
        u.copy_(s["exp_avg"])
        if x.first:
            _signs(x, u.whole)
            start_bases(x, s)
        else:
            rotate(x, u.whole, s, into=True, dtype=h[self.product])
            _signs(x, u.whole)
            rotate(x, u.whole, s, into=False, dtype=h[self.product])
        x.scale(length(x.shape, self.max_dim))

    def tasks(self, block: Block) -> dict[str, Task]:
        """One for each side, of about ``20 d^3``."""
        lead = block.shape[:-2]
        return {
            side: Task(
                20.0 * d**3 * block.batch,
                {"basis": Slot("factor", (*lead, d, d)), "fallbacks": Slot("factor", lead, torch.int8)},
            )
            for side, d in self.sides(block).items()
        }

    def solve(self, inputs: Sequence[Tensor], h: Hyper) -> Found:
        """The next basis; its order and signs do not matter to a sign."""
        factor, last = inputs
        if h[self.method] == "qr":
            tracked = next_basis(factor, last, method="qr", sort=False)
            return {key: tracked[key] for key in ("basis", "fallbacks")}
        found = eigenbasis(factor)
        basis = torch.where(found.failed[..., None, None], last, found.basis)
        return {"basis": basis, "fallbacks": found.fallbacks}

    def land(self, x: Batch, s: State, h: Hyper, task: str, found: Found) -> None:
        """Move to the new basis; nothing is stored in it."""
        super().land(x, s, {**h, self.carry: "keep"}, task, found)

    def flops(self, block: Block) -> float:
        """Factors, rotation into the bases and back: ``6 (m^2 n + m n^2)``, momentum and sign."""
        return super().flops(block) + 5.0 * block.numel


def _signs(x: Batch, value: Tensor) -> None:
    """Signs in place; NaN stays NaN, of which torch makes 0, so that a poisoned momentum would go unnoticed."""
    signs = x.work.take("rotate", value.shape, value.dtype, value.device)
    torch.sign(value, out=signs)
    value.mul_(0).add_(signs)


@dataclass(frozen=True)
class ShapedDecay(Decoupled):
    """Decoupled decay that shares the scale of the step, which depends on the shape: ``p <- p (1 - lr s wd)``."""

    max_dim: int = 10_000

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Shrink the parameters."""
        super().update(x, s, {**h, self.lr: h[self.lr] * length(x.shape, self.max_dim)}, total)
