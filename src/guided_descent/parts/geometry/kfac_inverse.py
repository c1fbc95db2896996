"""K-FAC with factored damping and explicit inverses: two products a step, and Cholesky factorisations to refresh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guided_descent.linalg.eigen import FAILED, eigenbasis
from guided_descent.parts.base import Batch, Found, Hyper, Slot, State, Task
from guided_descent.parts.damping import PI
from guided_descent.parts.geometry.kfac import Kfac
from guided_descent.parts.geometry.kronecker import SIDES, sandwich
from guided_descent.parts.geometry.reading import finite, hold_uncaptured, over
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class KfacInverse(Kfac):
    """Precondition by the factored inverse: ``u <- (B + sqrt(lam) / pi I)^-1 u (A + pi sqrt(lam) I)^-1``.

    The same step as ``Kfac`` with ``form`` ``pi``, at a fraction of the cost: an inverse by Cholesky is about a tenth
    of an eigendecomposition, and a step has two products in place of four. ``lam`` and ``pi`` enter when an inverse is
    made, so that a new damping takes effect with the next refresh. A matrix that Cholesky refuses is inverted by its
    eigenvalues, counted as a fallback, and keeps its last inverse where that fails too. State: ``left``, ``right``,
    ``left_inverse``, ``right_inverse``, ``captures``; sides longer than ``max_dim`` are diagonal. Source: Martens and
    Grosse 2015, 1503.05671, section 6.3.
    """

    form: str = "pi"

    def slots(self, block: Block) -> dict[str, Slot]:
        """Factors, the inverses of the dense ones, and the number of captures."""
        slots = super().slots(block)
        for side, d in self.lengths(block).items():
            if self.dense(block, side):
                del slots[f"{side}_basis"], slots[f"{side}_values"]
                slots[f"{side}_inverse"] = Slot("factor", (d, d))
        return slots

    def start(self, x: Batch, s: State, h: Hyper, rows: Tensor) -> None:
        """The inverses of the rows whose first statistics have come, which are counted where they needed help."""
        if not bool(rows.any()):
            return
        fallbacks = torch.zeros(len(x.blocks), dtype=torch.int64, device=rows.device)
        for side in SIDES:
            if f"{side}_inverse" in s:
                factor, shift, _ = self.inputs(side, s, h)
                kept = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
                found = self.solve((factor[rows], shift[rows], kept[rows]), h)
                s[f"{side}_inverse"][rows] = found["inverse"]
                fallbacks[rows] += (found["fallbacks"] > 0).long()
        if bool(fallbacks.any()):
            x.tick("fallbacks", fallbacks.tolist())

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Average the statistics of this step, if there are any, and precondition the direction."""
        self.learn(x, s, h)
        if hold_uncaptured(x, s):
            return
        u = x.take().whole
        for side, left in zip(SIDES, (True, False)):
            if side in s and f"{side}_inverse" not in s:
                divisor = s[side] + self.shifts(s, h)[side][:, None]
                u.div_(over_side(torch.where(divisor > 0, divisor, torch.inf), left))
        sandwich(x, u, s.get("left_inverse"), s.get("right_inverse"), h[self.product])
        u.mul_(over(s["captures"] > 0, u))

    def shifts(self, s: State, h: Hyper) -> dict[str, Tensor]:
        """What is added to the diagonal of each side [B]: ``sqrt(lam) / pi`` and ``pi sqrt(lam)``."""
        bottom, top = (_mean(s[side]) for side in SIDES)
        known = (top > 0) & (bottom > 0)
        pi = torch.where(known, top / torch.where(known, bottom, 1.0), 1.0).sqrt().clamp(*PI)
        root = torch.as_tensor(self.strength(s, h), dtype=pi.dtype, device=pi.device).sqrt()
        return {"left": root / pi, "right": root * pi}

    # -- refreshes -----------------------------------------------------------------------------------------------------

    def tasks(self, block: Block) -> dict[str, Task]:
        """One for each side with a full factor: ``d^3 / 3`` for Cholesky and ``2 d^3 / 3`` for the inverse."""
        return {
            side: Task(float(d**3), {"inverse": Slot("factor", (d, d)), "fallbacks": Slot("factor", (), torch.int8)})
            for side, d in self.lengths(block).items()
            if self.dense(block, side)
        }

    def inputs(self, task: str, s: State, h: Hyper) -> tuple[Tensor, ...]:
        """The factor, what is added to its diagonal, and its last inverse."""
        return s[task], self.shifts(s, h)[task], s[f"{task}_inverse"]

    def drift(self, inputs: Sequence[Tensor], h: Hyper) -> Tensor:
        """``||(A + shift I) X - I||_F / sqrt(d)`` of the last inverse X."""
        factor, shift, inverse = inputs
        error = torch.baddbmm(inverse * over(shift, inverse), factor, inverse)
        error.diagonal(dim1=-2, dim2=-1).sub_(1)
        norm: Tensor = torch.linalg.matrix_norm(error).div_(factor.shape[-1] ** 0.5)
        return norm

    def solve(self, inputs: Sequence[Tensor], h: Hyper) -> Found:
        """``(A + shift I)^-1``; the last inverse where it cannot be had."""
        factor, shift, kept = inputs
        damped = torch.lerp(factor, factor.mT, 0.5)
        damped.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
        root, info = torch.linalg.cholesky_ex(damped)
        inverse = torch.cholesky_inverse(root)
        bad = (info != 0) | ~finite(inverse)
        fallbacks = torch.zeros(len(factor), dtype=torch.int8, device=factor.device)
        for row in bad.nonzero().flatten().tolist():
            inverse[row], fallbacks[row] = _by_eigenvalues(factor[row], shift[row], kept[row])
        return {"inverse": inverse, "fallbacks": fallbacks}

    def land(self, x: Batch, s: State, h: Hyper, task: str, found: Found) -> None:
        """Take the inverse."""
        s[f"{task}_inverse"].copy_(found["inverse"])

    def flops(self, block: Block) -> float:
        """One product with each inverse, ``2 (m^2 n + m n^2)``; the captured sums depend on the data."""
        m, n = block.shape
        dense = [side for side in self.lengths(block) if self.dense(block, side)]
        return 2.0 * (m * m * n * ("left" in dense) + m * n * n * ("right" in dense))

    def scratch(self, block: Block) -> int:
        """A matrix multiplied on one side, in float32."""
        return 4 * block.numel


def over_side(values: Tensor, left: bool) -> Tensor:
    """A vector for each block [B, d], shaped to divide the rows (left) or columns of [B, m, n]."""
    return values.unsqueeze(-1 if left else -2)


def _mean(factor: Tensor) -> Tensor:
    """The mean eigenvalue of each factor [B], which is full or diagonal."""
    return (factor if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1)).mean(-1)


def _by_eigenvalues(factor: Tensor, shift: Tensor, kept: Tensor) -> tuple[Tensor, int]:
    """The inverse of one matrix by its eigenvalues, clamped at 0; the last one where there is no information."""
    found = eigenbasis(factor)
    values = found.values.clamp(min=0) + shift
    if bool(found.failed) or not bool((values > 0).all()):
        return kept, FAILED
    inverse = (found.basis / values) @ found.basis.mT
    return (inverse, max(int(found.fallbacks), 1)) if bool(inverse.isfinite().all()) else (kept, FAILED)
