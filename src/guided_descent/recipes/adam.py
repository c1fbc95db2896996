"""The Adam family with decoupled decay: AdamW and NAdamW."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts import DECAYS, AdamMoments, Descend, NadamMoments, Parts
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.routing.roles import Block


@recipe("adamw", paper="Loshchilov and Hutter 2017, arXiv:1711.05101", family="adam")
@dataclass(frozen=True, kw_only=True)
class AdamW(Recipe):
    """Adam with decoupled weight decay, as in torch.

    ``p <- p (1 - lr wd)``; ``m, v`` are averages of ``g, g^2``; ``p <- p - lr (m / bc1) / (sqrt(v / bc2) + eps)``.
    """

    lr: float = hyper(1e-3, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, help="memory of the first and second moment")
    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")
    weight_decay: float = hyper(1e-2, ge=0, help="decay; lr * weight_decay is taken off in a step")
    amsgrad: bool = static(False, help="divide by the running maximum of the second moment")
    decay: str = decay_kind()

    def parts(self, block: Block) -> Parts:
        """Moments, decay, step."""
        return Parts(AdamMoments(amsgrad=self.amsgrad), DECAYS[self.decay], Descend())


@recipe("nadamw", paper="Dozat 2016; Loshchilov and Hutter 2017, arXiv:1711.05101", family="adam")
@dataclass(frozen=True, kw_only=True)
class NAdamW(Recipe):
    """Adam with Nesterov momentum and decoupled weight decay: the baseline to beat.

    Equal to ``torch.optim.NAdam(decoupled_weight_decay=True)``; the formula is in ``parts.NadamMoments``.
    """

    lr: float = hyper(2e-3, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, help="memory of the first and second moment")
    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")
    weight_decay: float = hyper(1e-2, ge=0, help="decay; lr * weight_decay is taken off in a step")
    momentum_decay: float = hyper(4e-3, ge=0, help="speed at which the momentum rises from half of beta1 to beta1")
    decay: str = decay_kind()

    def parts(self, block: Block) -> Parts:
        """Moments, decay, step."""
        return Parts(NadamMoments(), DECAYS[self.decay], Descend())
