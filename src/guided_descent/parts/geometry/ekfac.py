"""EKFAC: K-FAC's eigenbases with the second moments of per-sample gradients in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Found, Hyper, Slot, State, key
from guided_descent.parts.damping import add_joint
from guided_descent.parts.geometry.kfac import Kfac, spectrum
from guided_descent.parts.geometry.reading import chunks, finite, gather, over
from guided_descent.routing.roles import Block

if TYPE_CHECKING:
    from guided_descent.capture import LayerIO


@dataclass(frozen=True)
class Ekfac(Kfac):
    """``u <- Q_B [(Q_B^T G Q_A) / (s + lam)] Q_A^T`` with ``s = E_n[(Q_B^T g_n Q_A)^2]``.

    ``g_n = sum_r d_r a_r^T`` is the gradient of sample n, summed over positions before it is squared, and the mean is
    over loss terms. s begins as K-FAC's ``l_B l_A^T`` at the first capture, which has no basis to project on yet, and
    is then averaged with the weights of the factors. It follows a new basis Q' as ``second_moment`` says: ``rotate`` by
    ``(Q'^T Q)^2`` elementwise, ``permute`` with the columns, or stays (``keep``, ``rank``). Diagonal sides keep the
    identity. For fixed statistics its distance to the Fisher block, in Frobenius norm, is never above K-FAC's.

    State: that of ``Kfac`` and ``scales`` [m, n]. Source: George et al. 2018, 1806.03884.
    """

    carries: str = key("second_moment")

    @property
    def observes_state(self) -> bool:
        """The basis in which it sees gradients."""
        return True

    def slots(self, block: Block) -> dict[str, Slot]:
        """Those of K-FAC and the scales."""
        return super().slots(block) | {"scales": Slot("factor", block.shape)}

    def observe(self, seen: dict[str, Tensor], io: LayerIO, s: State, block: Block, h: Hyper) -> None:
        """Add the squares of the projected per-sample gradients to K-FAC's sums."""
        super().observe(seen, io, s, block, h)
        if io.d is not None and int(s["captures"]) > 0:
            gather(seen, f"scales.{io.kind}", projected_squares(io, s, block))
            gather(seen, f"scales.{io.kind}.count", s["scales"].new_tensor(float(io.terms * io.fresh)))

    def learn(self, x: Batch, s: State, h: Hyper) -> Tensor | None:
        """Average the statistics, those of the scales in the basis that they were seen in."""
        weight = super().learn(x, s, h)
        if weight is None or x.seen is None:
            return weight
        scales = s["scales"]
        starts = (weight > 0) & (s["captures"] == 1)
        first = add_joint(torch.empty_like(scales), spectrum(s, "left"), spectrum(s, "right"), 0.0)
        scales.copy_(torch.where(over(starts, scales), first, scales))
        count, mean = torch.zeros_like(weight), torch.zeros_like(scales)
        for kind in ("linear", "embedding"):  # a tied table has both
            if f"scales.{kind}" in x.seen:
                terms = x.seen[f"scales.{kind}.count"]
                mean += x.seen[f"scales.{kind}"] / over(terms.clamp(min=1), scales)
                count += terms
        if h[self.fisher] == "empirical":
            mean *= over(x.seen["count"].square(), scales)
        good = (count > 0) & (weight > 0) & finite(mean)
        mean = torch.where(over(good, scales), mean, scales)
        scales.lerp_(mean, over(weight, scales).to(scales.dtype))
        return weight

    def divisor(self, out: Tensor, s: State, h: Hyper) -> Tensor:
        """``s + lam``."""
        lam = self.strength(s, h)
        return out.copy_(s["scales"]).add_(lam[:, None, None] if isinstance(lam, Tensor) and lam.ndim else lam)

    def carry(self, x: Batch, s: State, h: Hyper, task: str, found: Found, known: Tensor) -> None:
        """Let the scales follow to the new basis."""
        way = h[self.carries]
        if way in ("keep", "rank"):
            return
        scales, left = s["scales"], task == "left"
        if way == "permute":
            order = found["order"].unsqueeze(-1 if left else -2).expand_as(scales)
            moved = scales.gather(-2 if left else -1, order)
        else:
            turn = (found["basis"].mT @ s[f"{task}_basis"]).square()
            moved = turn @ scales if left else scales @ turn.mT
        scales.copy_(torch.where(over(known, scales), moved, scales))

    def sorts(self, h: Hyper) -> bool:
        """Unless the scales stay with the columns that they belong to."""
        return bool(h[self.carries] != "keep")


def projected_squares(io: LayerIO, s: State, block: Block) -> Tensor:
    """``sum_n (Q_B^T g_n Q_A)^2`` [m, n], with the bases of one block's state (the identity where there is none)."""
    left, right = s.get("left_basis"), s.get("right_basis")
    m, n = block.shape
    dtype = s["scales"].dtype
    total = torch.zeros(m, n, dtype=dtype, device=s["scales"].device)
    if io.kind == "linear" and io.groups == 1:
        for part in chunks(io, max(m * n, io.a.shape[1] * (m + n)) if io.a.shape[1] > 1 else m + n):
            a, d = part.a.to(dtype), part.d
            assert d is not None
            d = d.to(dtype)
            if io.bias and n == a.shape[-1] + 1:
                a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
            a = a if right is None else a @ right
            d = d if left is None else d @ left
            if a.shape[1] == 1:
                total += d[:, 0].square().mT @ a[:, 0].square()
            else:
                total += (d.mT @ a).square().sum(0)
        return total
    if io.kind == "embedding" and left is None:
        return total.index_add_(0, *lookups(io, right, dtype))
    for part in chunks(io, m * n):
        g = part.per_sample_gradients().to(dtype)
        if g.shape[-1] != n:  # the bias's column, of the layer or of the block alone
            g = g[..., :n] if g.shape[-1] > n else torch.cat([g, g.new_zeros(*g.shape[:-1], n - g.shape[-1])], -1)
        g = g if right is None else g @ right
        g = g if left is None else left.mT @ g
        total += g.square().sum(0)
    return total


def lookups(io: LayerIO, right: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For each row that a sample looked up: its number, and the square of the sample's projected gradient there."""
    assert io.d is not None
    keys = torch.arange(len(io.a), device=io.a.device)[:, None] * io.inputs + io.a.clamp(min=0)  # padding has d = 0
    found, place = torch.unique(keys, return_inverse=True)
    d = io.d.to(dtype).flatten(0, 1)
    d = d if right is None else d @ right
    return found % io.inputs, d.new_zeros(len(found), d.shape[1]).index_add_(0, place.flatten(), d).square()
