"""TONGA: natural gradient with a low-rank covariance of recent gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

from guided_descent.parts import DECAYS, Descend, Momentum, Parts
from guided_descent.parts.geometry.tonga import SPANS, LowRankNatural
from guided_descent.recipes.adam import AdamW
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.routing.roles import Block


@recipe("tonga", paper="Le Roux, Manzagol and Bengio 2007, NIPS 20", family="curvature")
@dataclass(frozen=True, kw_only=True)
class TONGA(Recipe):
    """TONGA: ``(C + lam I)^-1 g`` with a low-rank running covariance C of the batch gradients, block by neuron.

    ``C <- gamma C + g g^T``, kept as ``rank`` eigenvectors and the gradients since the last of every ``truncate_every``
    decompositions; ``p <- p - lr (C + lam I)^-1 g``. The step shrinks as 1 / |g|, as it does in the paper.
    """

    matrix = True

    lr: float = hyper(0.01, ge=0, help="learning rate")
    momentum: float = hyper(0.0, ge=0, lt=1, structural=True, help="momentum of the natural gradient")
    dampening: float = hyper(0.0, ge=0, le=1, help="share of a new direction that the momentum leaves out")
    damping: float = hyper(1e-4, gt=0, help="lam, in units of the squared gradient of one block")
    gamma: float = hyper(0.995, ge=0, le=1, help="memory of the covariance in a step")
    weight_decay: float = hyper(0.0, ge=0, help="decay; lr * weight_decay is taken off in a step")
    rank: int = static(5, help="directions kept by a decomposition")
    truncate_every: int = static(10, help="steps between decompositions")
    truncate_schedule: str = static(
        "staggered", of=("staggered", "every"), was="every", help="the covariances take turns, or all on one step"
    )
    span: str = static("neuron", of=SPANS, help="what one covariance covers")
    decay: str = decay_kind()
    aux: Recipe = field(default_factory=lambda: AdamW(lr=1e-3, betas=(0.9, 0.95)))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "truncate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of {self.label} must be >= 1")

    def route(self, block: Block) -> Recipe:
        """Matrices stay, the rest goes to the auxiliary recipe."""
        return self if block.is_matrix and min(block.shape) > 0 else self.aux

    def parts(self, block: Block) -> Parts:
        """Natural gradient, momentum, decay, step."""
        return Parts(
            LowRankNatural(
                span=self.span,
                rank=self.rank,
                every=self.truncate_every,
                staggered=self.truncate_schedule == "staggered",
            ),
            *([Momentum().at("momentum")] if self.momentum else []),
            DECAYS[self.decay],
            Descend(),
        )
