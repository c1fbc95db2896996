"""K-FAC: the Kronecker-factored Fisher matrix of a layer, from its inputs and output gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guided_descent.linalg.eigen import eigenbasis, off_diagonal
from guided_descent.parts.base import Batch, Found, Hyper, Policy, Slot, State, Task, key
from guided_descent.parts.damping import add_joint, cross_validated, dominant, factored, strength
from guided_descent.parts.geometry.kronecker import SIDES, basis_results, next_basis, rotate
from guided_descent.parts.geometry.reading import Reading, admit, estimate, finite, gather, hold_uncaptured, over
from guided_descent.parts.rows import Number
from guided_descent.parts.slow import Slow
from guided_descent.routing.roles import Block, Role

if TYPE_CHECKING:
    from guided_descent.capture import LayerIO

#: Which sides are preconditioned: the other one counts as the identity.
CHOICES = {"both": SIDES, "right": ("right",), "left": ("left",)}
#: How the damping enters; see ``Kfac``.
FORMS = ("eigenbasis", "pi")
#: Where the damping comes from; see ``Kfac``.
RULES = ("fixed", "lm", "gcv")


@dataclass(frozen=True)
class Kfac(Reading, Slow):
    """Precondition by the damped Kronecker-factored Fisher: ``u <- (B (x) A + lam I)^-1 u`` (row-major).

    For a layer y = W a with per-term output gradients d, ``A = mean a a^T`` [n, n] is the right factor and
    ``B = sum d d^T / T`` [m, m], over the T loss terms, the left one; a bias is the last column of W and a 1 in a. An
    embedding has the diagonal of its counts on the left and its gradients on the right; a table tied to the head has
    the sums of both. Positions (sequence, patches) count as data (``approx`` ``expand``) or are averaged in a and
    summed in d first (``reduce``). Under ``fisher`` ``empirical`` with k backward passes, B is multiplied by k^2, which
    undoes the 1/k of the losses. Factors are running averages that start as the first estimate and forget with
    ``rho = min(1 - 1/t, factor_decay)`` at their t-th capture, so that nothing is to be corrected. Layers are captured
    every ``factor_frequency`` steps.

    The eigenbases ``A = Q_A diag(l_A) Q_A^T`` and of B are exact at a block's first capture and then redone side by
    side as slow work: solved anew (``refresh_method`` ``eigh``), or followed by one step of orthogonal iteration
    (``qr``). A factor that cannot be solved keeps its last good basis; a capture that is not finite is left out and
    counted as a repair. A side longer than ``max_dim`` is diagonal. A block that no capture has reached yet makes no
    update (counted: ``uncaptured``).

    Damping, with ``lam = damping``:

    - ``form`` ``eigenbasis``: ``Q_B [(Q_B^T G Q_A) / (l_B l_A^T + lam)] Q_A^T``, the exact inverse;
    - ``form`` ``pi``: ``(l_B + sqrt(lam) / pi) (l_A + pi sqrt(lam))^T`` with
      ``pi^2 = (tr A / n) / (tr B / m)``, factored Tikhonov;
    - ``rule`` ``lm``: lam times the group's ``damping_factor``, which ``LevenbergMarquardt`` moves;
    - ``rule`` ``gcv``: lam of each block by generalised cross-validation at each capture, in the right eigenbasis with
      the batch's own inputs; see ``cross_validated``. Two-sided, lam is that of A times ``tr B / m``, exact for
      B = b I. It needs the gradients of the true labels, ``fisher`` ``empirical``.

    State: ``left``, ``right`` ([m, m], [n, n], or their diagonals), ``left_basis``, ``left_values``, ``right_basis``,
    ``right_values``, ``captures`` and, by rule, ``damping`` (of the block) or ``damping_factor`` (of the group).
    Source: Martens and Grosse 2015, 1503.05671; Grosse and Martens 2016, 1602.01407; Eschenhagen et al. 2023,
    2311.00636; right side alone: Benzing 2022, 2201.12250.
    """

    damping: str = key("damping")
    decay: str = key("factor_decay")
    every: str = key("factor_frequency")
    approx: str = key("approx")
    fisher: str = key("fisher")
    method: str = key("refresh_method")
    product: str = key("product_dtype")
    sides: str = "both"
    form: str = "eigenbasis"
    rule: str = "fixed"
    max_dim: int = 8192

    def policy(self, h: Hyper) -> Policy:
        """As the group says; steps with captures are left to the small factors."""
        return replace(super().policy(h), crowded=int(h[self.every]))

    def lengths(self, block: Block) -> dict[str, int]:
        """The preconditioned sides and their lengths."""
        return {side: block.shape[SIDES.index(side)] for side in CHOICES[self.sides]}

    def dense(self, block: Block, side: str) -> bool:
        """Whether a side has a full factor and not a diagonal one."""
        return block.shape[SIDES.index(side)] <= self.max_dim and not (side == "left" and block.role == Role.EMBEDDING)

    def slots(self, block: Block) -> dict[str, Slot]:
        """Factors, bases and eigenvalues of each side, and the number of captures."""
        slots = super().slots(block)
        for side, d in self.lengths(block).items():
            if self.dense(block, side):
                slots[side] = slots[f"{side}_basis"] = Slot("factor", (d, d))
                slots[f"{side}_values"] = Slot("factor", (d,))
            else:
                slots[side] = Slot("factor", (d,))
        if self.rule == "gcv":
            slots["damping"] = Slot("factor")
        elif self.rule == "lm":
            slots["damping_factor"] = Slot("group", (), torch.float64, fill=1.0)
        return slots

    # -- statistics --------------------------------------------------------------------------------------------------

    def observe(self, seen: dict[str, Tensor], io: LayerIO, s: State, block: Block, h: Hyper) -> None:
        """Add a layer's sums of a a^T and d d^T to ``<side>.inputs`` and ``<side>.gradients``, and their counts."""
        inputs, gradients = SIDES if io.kind == "embedding" else SIDES[::-1]
        wanted = SIDES if self.rule == "gcv" else CHOICES[self.sides]
        approx = h[self.approx]
        if inputs in wanted and io.fresh:
            dense = io.kind != "embedding" and self.dense(block, inputs)
            gram, count = io.gram_inputs(approx) if dense or io.kind == "embedding" else _input_squares(io, approx)
            gather(seen, f"{inputs}.inputs", _arranged(gram, block, inputs, self.dense(block, inputs), together=True))
            gather(seen, f"{inputs}.inputs.count", gram.new_tensor(float(count * io.groups)))
        if gradients in wanted and io.d is not None:
            dense = self.dense(block, gradients)
            gram, terms = io.gram_gradients(approx) if dense else _gradient_squares(io, approx)
            gather(seen, f"{gradients}.gradients", _arranged(gram, block, gradients, dense, together=False))
            gather(seen, f"{gradients}.gradients.count", gram.new_tensor(float(terms * io.fresh)))

    def learn(self, x: Batch, s: State, h: Hyper) -> Tensor | None:
        """Average what was seen into the factors; the weight of this capture by block [B], or ``None`` without one."""
        seen = x.seen
        if seen is None:
            return None
        found = {side: estimate(seen, side, self.empirical(h)) for side in SIDES if side in s}
        fresh = torch.stack([has for _, has in found.values()]).all(0)
        good = torch.stack([finite(value) for value, _ in found.values()]).all(0)
        fresh = admit(x, s, fresh, good)
        captures = s["captures"]
        weight: Tensor = (1 / captures.clamp(min=1).double()).clamp(min=1 - h[self.decay]) * fresh
        everywhere = bool(fresh.all())
        for side, (value, _) in found.items():
            factor = s[side]
            if not everywhere:
                value = torch.where(over(fresh, factor), value.to(factor.dtype), factor)
            factor.lerp_(value.to(factor.dtype), over(weight, factor).to(factor.dtype))
        self.start(x, s, h, fresh & (captures == 1))
        return weight

    def start(self, x: Batch, s: State, h: Hyper, rows: Tensor) -> None:
        """Exact eigenbases of the rows whose first statistics have come; the identity where that fails, counted."""
        if not bool(rows.any()):
            return
        fallbacks = torch.zeros(len(x.blocks), dtype=torch.int64, device=rows.device)
        for side in SIDES:
            if f"{side}_basis" in s:
                factor = s[side][rows]
                found = eigenbasis(factor)
                s[f"{side}_basis"][rows] = found.basis
                s[f"{side}_values"][rows] = quotients(factor, found.basis)
                fallbacks[rows] += (found.fallbacks > 0).long()
        if bool(fallbacks.any()):
            x.tick("fallbacks", fallbacks.tolist())

    # -- the update ----------------------------------------------------------------------------------------------------

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Average the statistics of this step, if there are any, and precondition the direction."""
        weight = self.learn(x, s, h)
        if weight is not None and self.rule == "gcv":
            self.validate(x, s, h, weight)
        if hold_uncaptured(x, s):
            return
        u = x.take().whole
        rotate(x, u, s, into=True, dtype=h[self.product])
        divisor = self.divisor(x.spare("divisor").whole, s, h)
        u.div_(torch.where(divisor > 0, divisor, torch.inf))
        rotate(x, u, s, into=False, dtype=h[self.product])
        u.mul_(over(s["captures"] > 0, u))

    def strength(self, s: State, h: Hyper) -> Number:
        """The damping lam: one number, or one for each block [B]."""
        return strength(s, h, self.damping, self.rule)

    def divisor(self, out: Tensor, s: State, h: Hyper) -> Tensor:
        """What the rotated gradient is divided by [B, m, n]."""
        left, right, lam = spectrum(s, "left"), spectrum(s, "right"), self.strength(s, h)
        return factored(out, left, right, lam) if self.form == "pi" else add_joint(out, left, right, lam)

    def validate(self, x: Batch, s: State, h: Hyper, weight: Tensor) -> None:
        """Choose the damping of each captured block anew and average it, as its logarithm, into the last one."""
        seen = x.seen
        assert seen is not None
        inner, outer = SIDES[::-1] if "right.inputs" in seen else SIDES
        g = x.spare("divisor").copy_(x.g).whole
        g = g if inner == "right" else g.mT
        rows = seen[f"{inner}.inputs.count"].double()
        terms = seen[f"{outer}.gradients.count"].double()
        a = seen[f"{inner}.inputs"] / over(rows.clamp(min=1), seen[f"{inner}.inputs"])
        basis = s.get(f"{inner}_basis")
        if basis is not None:
            g, values = g @ basis, quotients(a.to(basis.dtype), basis)
        else:
            values = a if a.ndim == 2 else a.diagonal(dim1=-2, dim2=-1)
        direction = dominant(g)
        gradients = seen[f"{outer}.gradients"].double()
        along = (
            (gradients * direction.double().square()).sum(-1)
            if gradients.ndim == 2
            else ((gradients @ direction.double()[..., None]).squeeze(-1) * direction.double()).sum(-1)
        )
        power = along * (seen["count"] / terms.clamp(min=1)).square() * rows
        projected = (direction[:, None, :] @ g).squeeze(1).double().square()
        lam = cross_validated(values.double(), projected, power, rows)
        both = spectrum(s, outer)
        if both is not None:
            lam = lam * both.double().mean(-1)
        kept = s["damping"]
        first = (s["captures"] == 1) | (kept == 0)
        mixed = torch.lerp(kept.double().clamp(min=1e-300).log(), lam.clamp(min=1e-300).log(), weight).exp()
        lam = torch.where(first, lam, mixed).to(kept.dtype)
        kept.copy_(torch.where((weight > 0) & lam.isfinite() & (lam > 0), lam, kept))
        kept.copy_(torch.where(kept > 0, kept, torch.as_tensor(h[self.damping], dtype=kept.dtype, device=kept.device)))

    # -- refreshes -----------------------------------------------------------------------------------------------------

    def tasks(self, block: Block) -> dict[str, Task]:
        """One for each side with a full factor, of about ``20 d^3``."""
        return {
            side: Task(20.0 * d**3, basis_results((), d) | {"values": Slot("factor", (d,))})
            for side, d in self.lengths(block).items()
            if self.dense(block, side)
        }

    def inputs(self, task: str, s: State, h: Hyper) -> tuple[Tensor, ...]:
        """The factor and its last basis."""
        return s[task], s[f"{task}_basis"]

    def drift(self, inputs: Sequence[Tensor], h: Hyper) -> Tensor:
        """``||offdiag(Q^T A Q)||_F / ||Q^T A Q||_F``."""
        return off_diagonal(*inputs)

    def solve(self, inputs: Sequence[Tensor], h: Hyper) -> Found:
        """The next basis, and the eigenvalues in it."""
        factor, basis = inputs
        found = next_basis(factor, basis, method=h[self.method], sort=self.sorts(h))
        return {**found, "values": quotients(factor, found["basis"])}

    def sorts(self, h: Hyper) -> bool:
        """Whether the columns of a basis are sorted, largest eigenvalue first."""
        return True

    def land(self, x: Batch, s: State, h: Hyper, task: str, found: Found) -> None:
        """Move to the new basis; a factor that was zero when it was read has none."""
        known = (found["values"] > 0).any(-1)
        basis, values = s[f"{task}_basis"], s[f"{task}_values"]
        self.carry(x, s, h, task, found, known)
        basis.copy_(torch.where(over(known, basis), found["basis"], basis))
        values.copy_(torch.where(over(known, values), found["values"], values))

    def carry(self, x: Batch, s: State, h: Hyper, task: str, found: Found, known: Tensor) -> None:
        """Carry along what is kept in the old basis: nothing here."""

    # -- cost ----------------------------------------------------------------------------------------------------------

    def flops(self, block: Block) -> float:
        """Rotation into the bases and back, ``4 (m^2 n + m n^2)``; the captured sums depend on the data."""
        m, n = block.shape
        dense = [side for side in self.lengths(block) if self.dense(block, side)]
        return 4.0 * (m * m * n * ("left" in dense) + m * n * n * ("right" in dense)) + 3.0 * m * n

    def scratch(self, block: Block) -> int:
        """The divisor and a half-rotated matrix, in float32."""
        return 8 * block.numel


# -- what the methods of this family share -----------------------------------------------------------------------------


def quotients(factor: Tensor, basis: Tensor) -> Tensor:
    """``diag(Q^T A Q)``, the eigenvalues in a basis, not below 0."""
    return (basis * (factor @ basis)).sum(-2).clamp(min=0)


def spectrum(s: State, side: str) -> Tensor | None:
    """The eigenvalues of one side by block [B, d]; ``None`` for the identity."""
    value: Tensor | None = s.get(f"{side}_values", s.get(side))
    return value


def fit(value: Tensor, size: int, dims: int) -> Tensor:
    """Cut the last ``dims`` axes to a length, or pad them with zeros at the end, where a bias's column is."""
    if value.shape[-1] == size:
        return value
    kept = min(size, value.shape[-1])
    made = value.new_zeros(*value.shape[:-dims], *[size] * dims)
    if dims == 1:
        made[..., :kept] = value[..., :kept]
    else:
        made[..., :kept, :kept] = value[..., :kept, :kept]
    return made


def _arranged(gram: Tensor, block: Block, side: str, dense: bool, *, together: bool) -> Tensor:
    """A sum as the factor of one side: groups of a convolution are data on the inputs and blocks on the gradients."""
    size = block.shape[SIDES.index(side)]
    diagonal = gram.ndim == 1
    if gram.ndim == 3:
        gram = gram.sum(0) if together else _block_diagonal(gram)
    gram = fit(gram, size, 1 if diagonal else 2)
    return gram.diag() if diagonal and dense else gram


def _block_diagonal(gram: Tensor) -> Tensor:
    groups, d = gram.shape[:2]
    made = gram.new_zeros(groups, d, groups, d)
    made.diagonal(dim1=0, dim2=2).copy_(gram.permute(1, 2, 0))
    return made.view(groups * d, groups * d)


def _squares(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32)).square().sum((0, 1))


def _input_squares(io: LayerIO, approx: str) -> tuple[Tensor, int]:
    """The diagonal of ``io.gram_inputs``, groups summed."""
    a = io.a if approx == "expand" else io.a.mean(1, keepdim=True)
    count = a.shape[0] * a.shape[1]
    sums = _squares(a).view(io.groups, -1).sum(0)
    return (torch.cat([sums, sums.new_tensor([float(count * io.groups)])]) if io.bias else sums), count


def _gradient_squares(io: LayerIO, approx: str) -> tuple[Tensor, int]:
    """The diagonal of ``io.gram_gradients``."""
    assert io.d is not None
    return _squares(io.d if approx == "expand" else io.d.sum(1, keepdim=True)), io.terms
