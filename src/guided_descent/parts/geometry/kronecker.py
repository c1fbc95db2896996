"""Kronecker geometry: statistics of both sides of a matrix, and methods that work in their eigenbases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.linalg.eigen import FAILED, eigenbasis, matching, off_diagonal, track_basis
from guided_descent.linalg.gram import add_gram
from guided_descent.parts.base import Batch, Found, Hyper, Part, Slot, State, Task, Unit, key
from guided_descent.parts.estimate import AdamMoments
from guided_descent.parts.rows import Number
from guided_descent.parts.slow import Slow
from guided_descent.routing.roles import Block

SIDES = ("left", "right")


#: How second moments kept in an eigenbasis follow it to the next one; see ``Eigenbasis``.
CARRIES = ("permute", "keep", "rank", "rotate")


@dataclass(frozen=True)
class Eigenbasis(Slow):
    """Run another part in the eigenbases of both sides: ``u <- Q_L f(Q_L^T G Q_R) Q_R^T``.

    The bases are those of ``L = EMA[G G^T]`` and ``R = EMA[G^T G]``. The first call sets L, R and their exact
    eigenbases and makes no update, so that no gradient is ever projected onto a basis made of it alone; the inner
    part's step counter leaves it out. A refresh takes one step of orthogonal iteration (``refresh_method`` ``qr``), or
    solves the bases anew (``eigh``). The inner part's ``vector`` slots are rotated along. Its ``square`` slots follow
    as ``second_moment`` says, with old basis Q and new basis Q':

    - ``permute``: columns are sorted by ``diag(Q^T A Q)`` and the slots with them (the paper's code);
    - ``keep``: each new column stays where the old one that it came from is, and nothing moves;
    - ``rank``: columns are sorted and the slots stay: a value belongs to the rank of an eigenvalue;
    - ``rotate``: the slots are mixed by ``(Q'^T Q)^2`` elementwise, the exact rule for independent coordinates.

    A side longer than ``max_dim`` keeps the identity, and so does the longer one where ``one_sided``. The factors'
    memory is ``beta``, or the second of ``betas`` where that is ``None``. State: ``left``, ``right`` and
    ``left_basis``, ``right_basis``, ``[m, m]`` and ``[n, n]``, at least float32. Counted: ``refreshes``,
    ``skipped_refreshes``, ``fallbacks``, ``repairs``. Source: Vyas et al. 2024, 2409.11321.
    """

    slot: ClassVar[str] = "geometry"
    unit: ClassVar[Unit] = "matrix"
    inner: Part = field(default_factory=lambda: AdamMoments(late_correction=True))
    beta: str = key("shampoo_beta")
    betas: str = key("betas")
    method: str = key("refresh_method")
    carry: str = key("second_moment")
    product: str = key("product_dtype")
    max_dim: int = 10_000
    one_sided: bool = False

    def sides(self, block: Block) -> dict[str, int]:
        """The preconditioned sides and their lengths."""
        return sides(block, self.max_dim, self.one_sided)

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

    def memory(self, h: Hyper) -> Number:
        """Memory of the factors."""
        return factor_memory(h, self.beta, self.betas)

    def gather(self, x: Batch, g: Tensor, s: State, h: Hyper) -> None:
        """Advance the factors with a gradient."""
        for side, a in transposes(g):
            if side in s:
                average(s[side], a, self.memory(h))

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the factors, then run the inner part between a rotation and its inverse."""
        g = x.take().whole
        self.gather(x, g, s, h)
        if x.first:
            start_bases(x, s)
            x.hold()
            return
        rotate(x, g, s, into=True, dtype=h[self.product])
        number = x.step
        x.step, x.first = number - 1, not isinstance(number, Tensor) and number == 2  # the first call does not count
        self.inner.update(x, s, h, total)
        x.step, x.first = number, False
        rotate(x, x.own().whole, s, into=False, dtype=h[self.product])

    # -- refreshes -------------------------------------------------------------------------------------------------

    def tasks(self, block: Block) -> dict[str, Task]:
        """One for each side, of about ``(6 + 8/3) d^3``."""
        lead = block.shape[:-2]
        return {
            side: Task((6 + 8 / 3) * d**3 * block.batch, basis_results(lead, d))
            for side, d in self.sides(block).items()
        }

    def inputs(self, task: str, s: State, h: Hyper) -> tuple[Tensor, ...]:
        """The factor and its last basis."""
        return s[task], s[f"{task}_basis"]

    def drift(self, inputs: Sequence[Tensor], h: Hyper) -> Tensor:
        """``||offdiag(Q^T A Q)||_F / ||Q^T A Q||_F``, the largest of a block."""
        return off_diagonal(*inputs).flatten(1).amax(1) if inputs[0].ndim > 3 else off_diagonal(*inputs)

    def solve(self, inputs: Sequence[Tensor], h: Hyper) -> Found:
        """The next basis, and which old column each new one follows."""
        return next_basis(*inputs, method=h[self.method], sort=h[self.carry] != "keep")

    def land(self, x: Batch, s: State, h: Hyper, task: str, found: Found) -> None:
        """Move to the new basis and carry the inner state along."""
        old, new = s[f"{task}_basis"], found["basis"]
        left = task == "left"
        stack = x.spare("direction")
        turn: Tensor | None = None
        for name, slot in self.inner.slots(x.blocks[0]).items():
            if slot.basis == "none" or (slot.basis == "square" and h[self.carry] in ("keep", "rank")):
                continue
            value = stack.copy_(s[name]).whole
            if slot.basis == "square" and h[self.carry] == "permute":
                order = found["order"].unsqueeze(-1 if left else -2).expand_as(value)
                value.copy_(value.gather(-2 if left else -1, order))
            else:
                turn = new.mT @ old if turn is None else turn
                by = turn if slot.basis == "vector" else turn.square()
                value.copy_(by @ value if left else value @ by.mT)
            s[name].copy_(stack)
        old.copy_(new)
        repair(x, s, task, [name for name, slot in self.inner.slots(x.blocks[0]).items() if slot.basis != "none"])

    def flops(self, block: Block) -> float:
        """Factors, rotation into the bases and back: ``6 (m^2 n + m n^2)``, and the inner part."""
        m, n = block.shape[-2:]
        sides = self.sides(block)
        products = 6.0 * (m * m * n * ("left" in sides) + m * n * n * ("right" in sides))
        return block.batch * products + self.inner.flops(block)

    def scratch(self, block: Block) -> int:
        """Two matrices and one product for each side, in float32."""
        m, n = block.shape[-2:]
        return 4 * block.batch * (2 * m * n + m * m + n * n)


# -- what the methods of this family share -----------------------------------------------------------------------------


def sides(block: Block, max_dim: int, one_sided: bool = False) -> dict[str, int]:
    """The sides of a block that are no longer than ``max_dim``, and their lengths; the shorter one of two alone."""
    m, n = block.shape[-2:]
    chosen = {side: d for side, d in zip(SIDES, (m, n)) if d <= max_dim}
    if one_sided and len(chosen) == 2:
        del chosen["left" if m > n else "right"]
    return chosen


def transposes(g: Tensor) -> tuple[tuple[str, Tensor], ...]:
    """Each side with the matrix A whose ``A A^T`` is its statistic."""
    return ("left", g), ("right", g.mT)


def factor_memory(h: Hyper, beta: str, betas: str) -> Number:
    """The memory of the factors: ``beta``, or the second of ``betas`` where that is ``None``."""
    memory: Number = h[betas][1] if h[beta] is None else h[beta]
    return memory


def average(factor: Tensor, a: Tensor, beta: Number, scale: float = 1.0) -> None:
    """``F <- beta F + (1 - beta) scale A A^T``, without a temporary where the weight is a plain number."""
    if isinstance(beta, Tensor):
        factor.lerp_((a @ a.mT).mul_(scale), (1 - beta).to(factor.dtype))
    else:
        add_gram(factor, a, beta=beta, alpha=(1 - beta) * scale)


def rotate(x: Batch, value: Tensor, s: State, *, into: bool, dtype: str = "float32") -> None:
    """``Q_L^T V Q_R`` into the bases ``left_basis``, ``right_basis``, or ``Q_L V Q_R^T`` out of them, in place."""
    left, right = s.get("left_basis"), s.get("right_basis")
    sandwich(
        x,
        value,
        left.mT if into and left is not None else left,
        right if into or right is None else right.mT,
        dtype,
    )


def sandwich(x: Batch, value: Tensor, left: Tensor | None, right: Tensor | None, dtype: str = "float32") -> None:
    """``L V R`` in place; ``None`` is the identity. ``dtype`` ``bfloat16`` rounds the factors and the product between.

    In bfloat16 the sums are those of the device, at least float32 wide. Values that are wider than float32 stay so.
    """
    if left is None and right is None:
        return
    if dtype == "bfloat16" and value.dtype != torch.float64:
        left, right = (_rounded(x, f"rotate.{side}", a) for side, a in zip(SIDES, (left, right)))
        first, second = (x.work.take(f"rotate.{i}", value.shape, torch.bfloat16, value.device) for i in range(2))
        first.copy_(value)
    else:
        first, second = value, x.work.take("rotate", value.shape, value.dtype, value.device)
    for factor, before in ((left, True), (right, False)):
        if factor is not None:
            a, b = (factor, first) if before else (first, factor)
            torch.bmm(stacked(a), stacked(b), out=stacked(second))  # matmul would copy a transposed factor
            first, second = second, first
    if first is not value:
        value.copy_(first)


def stacked(a: Tensor) -> Tensor:
    """Matrices [..., m, n] as one stack [B, m, n]."""
    return a.flatten(0, -3)


def _rounded(x: Batch, tag: str, factor: Tensor | None) -> Tensor | None:
    """A factor in bfloat16, laid out as it is."""
    if factor is None:
        return None
    turned = factor.stride(-2) < factor.stride(-1)
    source = factor.mT if turned else factor
    copy = x.work.take(tag, source.shape, torch.bfloat16, source.device).copy_(source)
    return copy.mT if turned else copy


def start_bases(x: Batch, s: State) -> None:
    """Exact eigenbases of the first factors; the identity where they cannot be found, which is counted."""
    fallbacks = torch.zeros(len(x.blocks), dtype=torch.long)
    for side in SIDES:
        if side not in s:
            continue
        found = eigenbasis(s[side])  # the identity where it failed
        s[f"{side}_basis"].copy_(found.basis)
        fallbacks += (found.fallbacks > 0).reshape(len(x.blocks), -1).sum(1).cpu()
    if bool(fallbacks.any()):
        x.tick("fallbacks", fallbacks.tolist())


def basis_results(lead: tuple[int, ...], d: int) -> dict[str, Slot]:
    """What ``next_basis`` finds for a factor ``[d, d]``."""
    return {
        "basis": Slot("factor", (*lead, d, d)),
        "order": Slot("factor", (*lead, d), torch.int64),
        "fallbacks": Slot("factor", lead, torch.int8),
    }


def next_basis(factor: Tensor, basis: Tensor, *, method: str, sort: bool) -> Found:
    """The basis after ``basis``: one step of orthogonal iteration (``qr``), or a full solve (``eigh``).

    ``order`` [..., d]: new column j follows old column ``order[j]``; the identity where not sorted. A factor that is
    zero, non-finite or refused by the solver keeps its basis.
    """
    if method == "qr":
        step = track_basis(factor, basis, sort=sort)
        broken = step.failed & (factor != 0).flatten(-2).any(-1)  # nothing is wrong with a factor that is zero
        return {"basis": step.basis, "order": step.order, "fallbacks": (broken * FAILED).to(torch.int8)}
    found = eigenbasis(factor)
    new, order = found.basis, matching(basis, found.basis)
    if not sort:
        new, order = reorder(new, order), torch.arange(new.shape[-1], device=new.device).expand_as(order)
    failed = found.failed[..., None]
    order = torch.where(failed, torch.arange(new.shape[-1], device=new.device), order)
    return {"basis": torch.where(failed[..., None], basis, new), "order": order, "fallbacks": found.fallbacks}


def reorder(basis: Tensor, order: Tensor) -> Tensor:
    """The columns of a basis at the places of the old columns that they follow."""
    return basis.gather(-1, order.argsort(-1).unsqueeze(-2).expand_as(basis))


def repair(x: Batch, s: State, factor: str, slots: Sequence[str] = ()) -> None:
    """Restart a factor that a huge gradient has made infinite, and bound what the inner part made of it; counted.

    The basis stays the last good one; the factor gathers from zero.
    """
    bad = ~s[factor].isfinite().flatten(1).all(1)
    if not bool(bad.any()):
        return
    s[factor][bad] = 0
    for name in slots:
        s[name].apply_(lambda row: row.nan_to_num_(nan=0.0))
    x.tick("repairs", bad.long().tolist())
