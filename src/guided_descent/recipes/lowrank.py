"""Methods that keep moments of a low-rank projection of the gradient: GaLore, Fira, APOLLO."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts import (
    DECAYS,
    Descend,
    FullRankSubspace,
    GrowthLimit,
    Part,
    Parts,
    ProjectedScale,
    Subspace,
)
from guided_descent.parts.geometry.lowrank import CARRIES, SIDES
from guided_descent.recipes.adam import AdamW
from guided_descent.recipes.base import Recipe, decay_kind, hyper, lag, recipe, schedule, static, tolerance
from guided_descent.routing.roles import Block


@dataclass(frozen=True, kw_only=True)
class LowRankRecipe(Recipe):
    """What the recipes of this file share: most numbers, and AdamW for what is no matrix."""

    matrix = True

    lr: float = hyper(0.01, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, help="memory of the first and second moment")
    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")
    weight_decay: float = hyper(0.0, ge=0, help="decay; lr * weight_decay is taken off in a step")
    scale: float = hyper(0.25, gt=0, help="factor of the update")
    update_proj_gap: int = hyper(200, ge=1, help="steps between two projections")
    rank: int = static(128, help="rows (or columns) of the projected gradient")
    proj_type: str = static("std", of=SIDES, help="the side that is projected; std: the shorter one")
    decay: str = decay_kind("decoupled", "after", help="after: decoupled, following the step, as in the authors' code")
    aux: Recipe | None = None

    def __post_init__(self) -> None:
        """Check the rank."""
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} of {self.label} must be at least 1")

    def default_aux(self) -> Recipe:
        """AdamW with the same numbers."""
        decay = self.decay if self.decay in DECAYS else "decoupled"
        return AdamW(lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, decay=decay)

    def route(self, block: Block) -> Recipe:
        """Matrices stay, the rest goes to the auxiliary recipe."""
        return self if block.is_matrix else self.spare()

    def finish(self, *parts: Part) -> Parts:
        """These parts, decay, step."""
        decay = DECAYS["decoupled"].at("decay_after") if self.decay == "after" else DECAYS[self.decay]
        return Parts(*parts, decay, Descend())


@recipe(
    "galore",
    paper="Zhao et al. 2024, arXiv:2403.03507",
    family="low_rank",
    use="pre-training with Adam's state on a subspace",
    avoid="layers with small sides, and few steps: subspaces change each 200",
    start="lr 0.01, scale 0.25, rank a quarter of the side",
)
@dataclass(frozen=True, kw_only=True)
class GaLore(LowRankRecipe):
    """GaLore: Adam in the subspace of the leading singular vectors of a recent gradient.

    ``P`` [m, k] of ``g = P S Q^T``, every 200 steps; Adam's ``u`` of ``R = P^T g`` [k, n];
    ``p <- p (1 - lr wd) - lr scale P u``. The shorter side is projected, so with ``m <= n`` the state is
    ``m k + 2 k n`` numbers. ``carry="rotate"`` turns the moments with the subspace, where the paper leaves them.
    """

    refresh_method: str = static("eigh", of=("eigh", "qr"), help="a full solve, or one step of orthogonal iteration")
    carry: str = static("keep", of=CARRIES, help="what becomes of the moments when the subspace changes")
    refresh_schedule: str = schedule()
    refresh_tolerance: float = tolerance()
    refresh_lag: int = lag()

    def parts(self, block: Block) -> Parts:
        """Adam in the subspace, decay, step."""
        return self.finish(Subspace(rank=self.rank, side=self.proj_type))


@recipe(
    "fira",
    paper="Chen et al. 2024, arXiv:2410.01623",
    family="low_rank",
    use="GaLore's memory with updates of full rank",
    avoid="the reasons against galore hold",
    start="GaLore's numbers",
)
@dataclass(frozen=True, kw_only=True)
class Fira(GaLore):
    """Fira: GaLore, and the part of the gradient outside the subspace at the lengths that Adam gives inside.

    ``R = P^T g``, Adam's ``u`` of R; ``phi_j = |u_j| / |R_j|`` by column;
    ``p <- p (1 - lr wd) - lr (scale P u + r)``, ``r = phi (g - P R)`` shortened to ``growth_limit`` times the length of
    the last one. At full rank r is 0 and it is GaLore. One number of state more than GaLore.
    """

    scale: float = hyper(1.0, gt=0, help="factor of the part inside the subspace")
    growth_limit: float | None = hyper(1.01, ge=1, optional=True, help="largest growth of r in a step")

    def parts(self, block: Block) -> Parts:
        """Adam in the subspace with the residual, decay, step."""
        return self.finish(FullRankSubspace(rank=self.rank, side=self.proj_type))


@recipe(
    "apollo",
    paper="Zhu et al. 2024, arXiv:2412.05270",
    family="low_rank",
    use="SGD-like memory near AdamW's loss on language models",
    avoid="matrices that are small: rank and projection do not pay",
    start="AdamW's lr times 10, rank a quarter of the side",
)
@dataclass(frozen=True, kw_only=True)
class APOLLO(LowRankRecipe):
    """APOLLO: SGD with a rate for each channel, as Adam would choose it by a random projection of the gradient.

    ``R = P g`` [k, n], ``P`` random normals of variance 1 / k, others every 200 steps; Adam's ``u`` of R;
    ``s_j = |u_j| / |R_j|`` by column; ``p <- p (1 - lr wd) - lr U``, ``U = sqrt(scale) s g`` shortened to
    ``growth_limit`` times the length of the last one. The shorter side is projected; P is drawn from the seed in every
    step and never stored, so that with ``m <= n`` the state is ``2 k n + 1`` numbers.
    """

    scale: float = hyper(1.0, gt=0, help="squared factor of the update")
    growth_limit: float | None = hyper(1.01, ge=1, optional=True, help="largest growth of U in a step")
    rank: int = static(256, help="rows (or columns) of the projected gradient; the paper's are a quarter of the side")
    granularity: str = static("channel", of=("channel", "tensor"), help="a ratio for each column or row, or just one")

    def parts(self, block: Block) -> Parts:
        """Ratios, bound of their growth, decay, step."""
        channel = self.granularity == "channel"
        return self.finish(ProjectedScale(rank=self.rank, side=self.proj_type, channel=channel), GrowthLimit())


@recipe(
    "apollo_mini",
    paper="Zhu et al. 2024, arXiv:2412.05270",
    family="low_rank",
    use="the least state that still scales gradients by channel",
    avoid="quality that must match apollo's",
    start="lr 0.01",
)
@dataclass(frozen=True, kw_only=True)
class APOLLOMini(APOLLO):
    """APOLLO of rank one with one rate for a matrix: next to no state, and steps like Adam's.

    ``R = P g`` [1, n]; Adam's ``u`` of R; ``U = sqrt(128) |u| / |R| g``; the rest as in APOLLO. State: ``2 n + 1``
    numbers for a matrix with ``m <= n``.
    """

    scale: float = hyper(128.0, gt=0, help="squared factor of the update")
    rank: int = static(1, help="rows (or columns) of the projected gradient")
    granularity: str = static("tensor", of=("channel", "tensor"), help="a ratio for each column or row, or just one")
