"""Shampoo's geometry: inverse roots of the statistics of both sides, of one, or corrected in their eigenbasis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.linalg.eigen import FAILED, eigenbasis
from guided_descent.linalg.gram import add_gram
from guided_descent.linalg.norms import power_iteration
from guided_descent.linalg.roots import inverse_root
from guided_descent.parts.base import Batch, Found, Hyper, Part, Slot, State, Task, Unit, key
from guided_descent.parts.geometry.kronecker import (
    SIDES,
    Eigenbasis,
    average,
    factor_memory,
    repair,
    rotate,
    sandwich,
    sides,
    start_bases,
    transposes,
)
from guided_descent.parts.graft import Graft, match_norms
from guided_descent.parts.rows import Rows
from guided_descent.parts.slow import Slow
from guided_descent.routing.roles import Block

#: How inverse roots are computed; see ``linalg.roots``.
ROOT_METHODS = ("eigh", "newton", "cans")


@dataclass(frozen=True)
class KroneckerRoots(Slow):
    """Multiply the filtered gradient by inverse roots of both sides' statistics: ``u <- L^(-1/p) m R^(-1/p)``.

    ``L`` is the average of ``G G^T`` and ``R`` that of ``G^T G``, in corrected form: ``L <- L + w (G G^T - L)`` with
    ``w = (1 - beta) / (1 - beta^t)``; where ``cumulative``, they are sums. ``m`` is the average of ``G`` with memory
    ``b1``, corrected. Roots are damped in proportion to the largest eigenvalue, ``(L + eps lambda I)^(-1/p)``, and
    found by eigenvalues or by products (``method``, see ``linalg.inverse_root``). The exponents:

    - ``root`` 4: Shampoo's. Of a single gradient of full rank it makes the polar factor ``U V^T``.
    - ``root`` 2 with ``trace``: ``L (x) R / tr L`` is the Kronecker factorisation of ``E[g g^T]``; each side's root is
      multiplied by ``tr^(1/4)``, and the traces of both sides are equal (Morwani et al. 2024, 2406.17748).
    - ``root`` 2 for a single side, whose fellow is longer than ``max_dim``, or left out by ``one_sided``.

    With ``graft`` each matrix takes the length of another method's step, and that method's direction before step
    ``start``. The first update solves its roots at once; a refresh sees the gradient of its own step, the next step
    uses it. A factor that is zero, non-finite or refused by the solver keeps its last root (at first the identity).

    State: ``exp_avg``; ``left``, ``right``, ``left_root``, ``right_root``, ``[m, m]`` and ``[n, n]``, at least float32;
    and the graft's. Counted: ``refreshes``, ``skipped_refreshes``, ``fallbacks``, ``repairs``. Source: Gupta et al.
    2018, 1802.09568; the order of effects is that of Shi et al. 2023, 2309.06497.
    """

    slot: ClassVar[str] = "geometry"
    unit: ClassVar[Unit] = "matrix"
    root: int = 4
    trace: bool = False
    cumulative: bool = False
    method: str = "eigh"
    graft: Graft | None = None
    max_dim: int = 10_000
    one_sided: bool = False
    beta: str = key("shampoo_beta")
    betas: str = key("betas")
    eps: str = key("eps")
    start: str = key("start_preconditioning_step")
    product: str = key("product_dtype")

    @property
    def keys(self) -> tuple[str, ...]:
        """Group keys it reads: when to start is for a graft alone."""
        return tuple(name for name in super().keys if self.graft or name != self.start)

    def sides(self, block: Block) -> dict[str, int]:
        """The preconditioned sides and their lengths."""
        return sides(block, self.max_dim, self.one_sided)

    def slots(self, block: Block) -> dict[str, Slot]:
        """The filtered gradient, factor and root of each side, and the state of the graft."""
        lead = block.shape[:-2]
        slots = {"exp_avg": Slot()}
        for side, d in self.sides(block).items():
            slots[side] = Slot("factor", (*lead, d, d))
            slots[f"{side}_root"] = Slot("factor", (*lead, d, d))
        return slots | (self.graft.slots(block) if self.graft else {})

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance factors and moments with the gradient, then precondition the filtered gradient and graft."""
        u = x.take()
        self._gather(x, u.whole, s, h)
        if x.first:
            self._start(x, s, h)
        beta1, m = h[self.betas][0], s["exp_avg"]
        if self.graft:
            self.graft.watch(u, s, h)
        m.lerp_(u, 1 - beta1)
        if self.graft is None:
            self._precondition(x, u.copy_(m), s, h)
        else:
            self._grafted(x, u, self.graft.direction(x, m, s, h), s, h)
        x.scale(1 / (1 - beta1**x.step))

    def _gather(self, x: Batch, g: Tensor, s: State, h: Hyper) -> None:
        beta = factor_memory(h, self.beta, self.betas)
        memory = 1 - (1 - beta) / (1 - beta**x.step)
        for side, a in transposes(g):
            if side not in s:
                continue
            if self.cumulative:
                add_gram(s[side], a)
            else:
                average(s[side], a, memory)

    def _start(self, x: Batch, s: State, h: Hyper) -> None:
        """The first roots; the identity where there is none, which is counted."""
        fallbacks = torch.zeros(len(x.blocks), dtype=torch.long)
        for side in SIDES:
            if side in s:
                root = s[f"{side}_root"]
                root.zero_().diagonal(dim1=-2, dim2=-1).fill_(1)
                found = self.solve((s[side], root), h)
                root.copy_(found["root"])
                fallbacks += (found["fallbacks"] > 0).reshape(len(x.blocks), -1).sum(1).cpu()
        if bool(fallbacks.any()):
            x.tick("fallbacks", fallbacks.tolist())

    def _grafted(self, x: Batch, u: Rows, other: Rows, s: State, h: Hyper) -> None:
        """The preconditioned direction with the other's length, or the other direction before the start."""
        step, start = x.step, h[self.start]
        if not isinstance(step, Tensor) and step < start:
            u.copy_(other)
            return
        self._precondition(x, u.copy_(s["exp_avg"]), s, h)
        match_norms(u.whole, other.whole)
        if isinstance(step, Tensor):  # compiled: no look at the step
            u.whole.copy_(torch.where(step < start, other.whole, u.whole))

    def _precondition(self, x: Batch, u: Rows, s: State, h: Hyper) -> None:
        """``L^(-1/p) u R^(-1/p)``, in place."""
        sandwich(x, u.whole, s.get("left_root"), s.get("right_root"), h[self.product])

    # -- refreshes -------------------------------------------------------------------------------------------------

    def tasks(self, block: Block) -> dict[str, Task]:
        """One for each side, of about ``20 d^3``."""
        lead = block.shape[:-2]
        return {
            side: Task(
                20.0 * d**3 * block.batch,
                {"root": Slot("factor", (*lead, d, d)), "fallbacks": Slot("factor", lead, torch.int8)},
            )
            for side, d in self.sides(block).items()
        }

    def inputs(self, task: str, s: State, h: Hyper) -> tuple[Tensor, ...]:
        """The factor and its last root."""
        return s[task], s[f"{task}_root"]

    def drift(self, inputs: Sequence[Tensor], h: Hyper) -> Tensor:
        """``||X^(p/2) (A + eps lambda I) X^(p/2) - I||_F / sqrt(d)`` of the last root X, the largest of a block."""
        a, x = (value.flatten(0, -3) for value in inputs)
        if self.trace:
            x = x / trace(a)[:, None, None] ** 0.25
        half = x if self.root == 2 else x @ x
        shift = h[self.eps] * power_iteration(a)
        return distance(half @ a @ half + shift[:, None, None] * (half @ half), a, len(inputs[0]))

    def solve(self, inputs: Sequence[Tensor], h: Hyper) -> Found:
        """The damped inverse root of a factor, with the trace where it belongs to the method."""
        factor, last = inputs
        found = inverse_root(factor, self.root, eps=float(h[self.eps]), method=self.method)
        root = found.root * trace(factor)[..., None, None] ** 0.25 if self.trace else found.root
        return kept(root, last, factor, found.fallbacks)

    def land(self, x: Batch, s: State, h: Hyper, task: str, found: Found) -> None:
        """Take the new root."""
        s[f"{task}_root"].copy_(found["root"])
        repair(x, s, task, ["exp_avg", *(self.graft.slots(x.blocks[0]) if self.graft else ())])

    def flops(self, block: Block) -> float:
        """Factors and roots: ``4 (m^2 n + m n^2)``, the filter, and the graft."""
        m, n = block.shape[-2:]
        chosen = self.sides(block)
        products = 4.0 * (m * m * n * ("left" in chosen) + m * n * n * ("right" in chosen))
        graft = self.graft.flops(block) if self.graft else 0.0
        return block.batch * products + 3.0 * block.numel + graft

    def scratch(self, block: Block) -> int:
        """A half-finished product, and the graft's direction, in float32."""
        return 4 * block.numel * (2 if self.graft else 1)


@dataclass(frozen=True)
class GramRoot(KroneckerRoots):
    """One-sided Shampoo: ``u <- (V^(1/2) + eps sqrt(lambda) I)^-1 m``, V the average or sum of the shorter side's Gram.

    ``lambda`` is the largest eigenvalue of V. Where the right side is the shorter one, ``u <- m (...)^-1``.

    Source: An et al. 2025, 2503.20762; Xie et al. 2025, 2503.10537.
    """

    root: int = 2
    one_sided: bool = True

    def drift(self, inputs: Sequence[Tensor], h: Hyper) -> Tensor:
        """``||X V X + 2 r X - r^2 X^2 - I||_F / sqrt(d)`` of the last root X, ``r = eps sqrt(lambda)``; 0 if right."""
        v, x = (value.flatten(0, -3) for value in inputs)
        r = h[self.eps] * power_iteration(v).sqrt()[:, None, None]
        return distance(x @ v @ x + r * (2 * x - r * (x @ x)), v, len(inputs[0]))

    def solve(self, inputs: Sequence[Tensor], h: Hyper) -> Found:
        """Root first, then damping, then the inverse: by eigendecomposition."""
        factor, last = inputs
        found = eigenbasis(factor)
        values = found.values.clamp(min=0).sqrt()
        inverse = 1 / (values + float(h[self.eps]) * values[..., :1])
        return kept((found.basis * inverse[..., None, :]) @ found.basis.mT, last, factor, found.fallbacks)


@dataclass(frozen=True)
class SecondMoment(Part):
    """``v <- b2 v + (1 - b2) u^2``; the direction stays. State: ``exp_avg_sq``."""

    betas: str = key("betas")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The second moment."""
        return {"exp_avg_sq": Slot(basis="square")}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Fold the direction in."""
        beta, u = h[self.betas][1], x.read()
        s["exp_avg_sq"].mul_(beta).addcmul_(u, u, 1 - beta)

    def flops(self, block: Block) -> float:
        """Three per element."""
        return 3.0 * block.numel


@dataclass(frozen=True)
class CorrectedEigenbasis(Eigenbasis):
    """Shampoo with corrected eigenvalues: ``u <- Q_L [(Q_L^T m Q_R) / (sqrt(D / bc2) + eps)] Q_R^T / bc1``.

    ``D`` is the average of ``(Q_L^T G Q_R)^2``, elementwise, of the gradient itself at every step, and takes the place
    of the product of the factors' eigenvalues; ``m`` is the average of ``G`` in the space of the parameter. Bases,
    first call and refreshes are those of ``Eigenbasis``, of which this is Adam up to where the momentum lives. State:
    ``exp_avg``, ``exp_avg_sq``, and each side's factor and basis. Source: Eschenhagen et al. 2025, 2506.03595.
    """

    inner: Part = field(default_factory=SecondMoment)
    eps: str = key("eps")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The filtered gradient beside factors, bases and second moment."""
        return {"exp_avg": Slot()} | super().slots(block)

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance factors and both moments, each in its own space, and divide in the eigenbases."""
        u = x.take()
        (beta1, beta2), m = h[self.betas], s["exp_avg"]
        self.gather(x, u.whole, s, h)
        if x.first:
            start_bases(x, s)
            x.hold()
            return
        count = x.step - 1  # the first call does not count
        m.lerp_(u, 1 - beta1)
        rotate(x, u.whole, s, into=True, dtype=h[self.product])
        self.inner.update(x, s, h, total)
        denominator = x.spare("denominator").copy_(s["exp_avg_sq"]).sqrt_()
        denominator.div_((1 - beta2**count) ** 0.5).add_(h[self.eps] * x.eps_scale)
        rotate(x, u.copy_(m).whole, s, into=True, dtype=h[self.product])
        u.div_(denominator)
        rotate(x, u.whole, s, into=False, dtype=h[self.product])
        x.scale(1 / (1 - beta1**count))

    def flops(self, block: Block) -> float:
        """Two rotations more than ``Eigenbasis`` in the place of one: ``8 (m^2 n + m n^2)``, and both moments."""
        m, n = block.shape[-2:]
        chosen = self.sides(block)
        products = 8.0 * (m * m * n * ("left" in chosen) + m * n * n * ("right" in chosen))
        return block.batch * products + 12.0 * block.numel


# -- what the classes share --------------------------------------------------------------------------------------------


def trace(factor: Tensor) -> Tensor:
    """Sum of the diagonal of each matrix."""
    return factor.diagonal(dim1=-2, dim2=-1).sum(-1)


def distance(found: Tensor, factor: Tensor, blocks: int) -> Tensor:
    """``||F - I||_F / sqrt(d)`` of matrices ``[blocks * ..., d, d]``, the largest of a block; 0 for a zero factor."""
    d = found.shape[-1]
    error = torch.linalg.matrix_norm(found - torch.eye(d, dtype=found.dtype, device=found.device)) / d**0.5
    error = torch.where(trace(factor) == 0, torch.zeros_like(error), error)
    return error.reshape(blocks, -1).amax(1)


def kept(root: Tensor, last: Tensor, factor: Tensor, fallbacks: Tensor) -> Found:
    """The results of a task: a root that was not found, or is not finite, leaves the last one in place.

    Nothing is wrong with a factor that is zero: it keeps its root without being counted.
    """
    good = (fallbacks != FAILED) & root.isfinite().flatten(-2).all(-1)
    zero = (factor == 0).flatten(-2).all(-1)
    codes = torch.where(good, fallbacks, torch.full_like(fallbacks, FAILED))
    return {
        "root": torch.where((good & ~zero)[..., None, None], root, last),
        "fallbacks": torch.where(zero, torch.zeros_like(codes), codes),
    }
