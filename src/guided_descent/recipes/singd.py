"""SINGD: structured inverse-free natural gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

from guided_descent.parts import DECAYS, L2, Descend, Momentum, Parts
from guided_descent.parts.geometry.singd import STRUCTURES, InverseFree
from guided_descent.recipes.adam import AdamW
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.recipes.kfac import APPROXES
from guided_descent.routing.roles import Block


@recipe("singd", paper="Lin et al. 2023, arXiv:2302.09738; Lin et al. 2024, arXiv:2312.05705", family="curvature")
@dataclass(frozen=True, kw_only=True)
class SINGD(Recipe):
    """SINGD: roots K and C of the inverse Kronecker factors, moved by matrix products; no inverse is ever taken.

    ``b <- mu b + C C^T g K K^T + wd p``; ``p <- p - lr b``, with K and C in a structure that products preserve. With
    ``structure`` ``dense`` it is INGD, without ``adaptive`` IKFAC. Hidden matrices with biases are preconditioned.

    With ``factor_frequency`` above 1, ``factor_schedule="staggered"`` lets the layers take turns to be captured, so
    that no step is slow. Then every pass has hooks on some layer: a compiled model runs eagerly.
    """

    matrix = True
    reads_layers = True
    joins_bias = True

    lr: float = hyper(1e-2, ge=0, help="learning rate")
    momentum: float = hyper(0.9, ge=0, lt=1, help="momentum of the preconditioned gradient")
    dampening: float = hyper(0.0, ge=0, le=1, help="share of a new direction that the momentum leaves out")
    damping: float = hyper(1e-3, ge=0, help="lam")
    factor_lr: float = hyper(0.1, ge=0, lt=1, help="step of the roots, over max(1, ||m||_inf)")
    factor_momentum: float = hyper(0.5, ge=0, lt=1, help="memory of the roots' motion")
    factor_frequency: int = hyper(1, ge=1, help="steps between captures of the layers")
    factor_schedule: str = static(
        "every", of=("every", "staggered"), help="all layers on one step, or in turns: no step is slow, all have hooks"
    )
    weight_decay: float = hyper(0.0, ge=0, help="decay; its form is chosen by decay")
    fisher: str = static("empirical", of=("mc", "exact", "empirical"), help="sampled labels, all, or the true ones")
    approx: str = static("expand", of=APPROXES, help="positions as data, or averaged first")
    structure: str = static("dense", of=STRUCTURES, help="what the roots look like")
    structure_width: int = static(32, help="side of the blocks of block_diag and hierarchical")
    adaptive: bool = static(True, help="the traces of INGD; False is IKFAC")
    decay: str = decay_kind("direction", "direction", help="direction: added to the preconditioned gradient")
    aux: Recipe = field(default_factory=lambda: AdamW(lr=1e-3, betas=(0.9, 0.95)))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.structure_width < 1:
            raise ValueError(f"structure_width={self.structure_width} of {self.label} must be >= 1")

    def route(self, block: Block) -> Recipe:
        """Matrices stay; stacks and the rest go to the auxiliary recipe."""
        return self if block.is_matrix and len(block.shape) == 2 and min(block.shape) > 0 else self.aux

    def parts(self, block: Block) -> Parts:
        """Metric, decay, momentum, step."""
        decay = L2().at("decay_direction") if self.decay == "direction" else None
        return Parts(
            InverseFree(
                structure=self.structure,
                width=self.structure_width,
                adaptive=self.adaptive,
                staggered=self.factor_schedule == "staggered",
            ),
            decay or DECAYS[self.decay],
            Momentum().at("momentum"),
            Descend(),
        )
