"""Dion and Dion2: orthogonal updates at a part of Muon's cost."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts import DECAYS, SCALES, Descend, MatrixScale, Part, Parts
from guided_descent.parts.geometry.dion import LowRankPolar, SelectedPolar
from guided_descent.recipes.base import Recipe, hyper, recipe, static
from guided_descent.recipes.spectral import Matrices, Orthogonal, sized
from guided_descent.routing.roles import Block


@dataclass(frozen=True, kw_only=True)
class Partial(Matrices):
    """What the recipes below share: numbers, and what stands around the direction."""

    lr: float = hyper(0.01, ge=0, help="learning rate of the matrices; not comparable across scales")
    momentum: float = hyper(0.95, ge=0, lt=1, help="mu: what the buffer keeps of a direction that has been used")
    weight_decay: float = hyper(0.01, ge=0, help="decay; lr * weight_decay is taken off in a step")
    scale: str = static("spectral", of=SCALES, help="length convention of the update")

    def default_aux(self) -> Recipe:
        """AdamW, at a rate of its own where the matrices' steps have another size."""
        return sized(super().default_aux(), self.scale)

    def direction(self) -> Part:
        """What holds the buffer and makes the direction."""
        raise TypeError(f"{type(self).__name__} does not define direction")

    def parts(self, block: Block) -> Parts:
        """Direction, scale, decay, step."""
        return Parts(self.direction(), MatrixScale(), DECAYS[self.decay], Descend())


@recipe(
    "dion",
    paper="Ahn et al. 2025, arXiv:2504.05295",
    family="spectral",
    use="muon's updates on sharded or very large matrices, by low rank",
    avoid="small matrices on one device: muon is simpler",
    start="lr 0.01, rank_fraction 0.25 to 1",
)
@dataclass(frozen=True, kw_only=True)
class Dion(Partial):
    """Dion: orthogonal updates of low rank from one power iteration a step, with error feedback; AdamW for the rest.

    ``M <- M + g``; ``P = orth(M Q)``; ``R = M^T P``; ``M <- M - (1 - mu) P R^T``; ``Q <- R`` with columns of norm 1;
    ``p <- p (1 - lr wd) - lr scale(m, n) P Q^T``, P [m, k], Q [n, k] and ``k = ceil(rank_fraction min(m, n))``; the
    transpose where ``m < n``. Even at full rank it is not Muon, since ``Q^T Q`` is not I.
    """

    eps: float | None = hyper(None, gt=0, optional=True, help="added to the norms of R's columns; None adds nothing")
    rank_fraction: float = static(0.25, gt=0, le=1, help="rank over the shorter side; the cost is in proportion")

    def direction(self) -> Part:
        """One power iteration."""
        return LowRankPolar(rank_fraction=self.rank_fraction)


@recipe(
    "dion2",
    paper="Ahn, Amsel and Langford 2025, arXiv:2512.16928",
    family="spectral",
    use="muon at a fraction of its cost, some rows at a time",
    avoid="matrices that are small",
    start="lr 0.01, fraction 0.25",
)
@dataclass(frozen=True, kw_only=True)
class Dion2(Partial, Orthogonal):
    """Dion2: Muon on the rows or columns that have gathered most, while the others keep all they have.

    ``M <- M + g``; S: the ``ceil(fraction min(m, n))`` slices of the shorter side with the largest sums ``|M_ij|``;
    ``O = UV^T`` of ``M_S``; ``M_S <- mu M_S``; ``p <- p (1 - lr wd)``, ``p_S <- p_S - lr scale(m, n) O``. With
    ``fraction=1`` it takes the steps of ``Muon(nesterov=False)`` at the same scale.
    """

    fraction: float = static(0.25, gt=0, le=1, help="share of the shorter side's slices that a step uses")

    def direction(self) -> Part:
        """The polar factor of some slices."""
        return SelectedPolar(fraction=self.fraction)
