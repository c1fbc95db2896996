"""SGD, with Polyak or Nesterov momentum."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts import L2, Descend, Momentum, Part, Parts
from guided_descent.recipes.base import Recipe, hyper, recipe, static
from guided_descent.routing.roles import Block


@recipe(
    "sgd",
    paper="Robbins and Monro 1951; Polyak 1964; Sutskever et al. 2013",
    family="sgd",
    use="convolutional networks with normalisation, and where memory is short",
    avoid="transformers: embeddings and heads want a rate for each element",
    start="lr 0.1 with momentum 0.9, decay 5e-4, a cosine",
)
@dataclass(frozen=True, kw_only=True)
class SGD(Recipe):
    """Stochastic gradient descent with momentum, as in torch.

    ``g <- g + wd p``; ``b <- mu b + (1 - tau) g``; ``p <- p - lr b``, or ``p <- p - lr (g + mu b)`` with Nesterov.
    """

    lr: float = hyper(1e-3, ge=0, help="learning rate")
    momentum: float = hyper(0.0, ge=0, lt=1, structural=True, help="momentum mu; hold lr / (1 - mu) when tuning it")
    dampening: float = hyper(0.0, ge=0, le=1, help="tau; the first buffer is not damped")
    weight_decay: float = hyper(0.0, ge=0, help="coupled L2 decay")
    nesterov: bool = static(False, help="look-ahead form; needs momentum > 0 and dampening 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"nesterov=True of sgd needs momentum > 0 and dampening 0, got momentum={self.momentum} and "
                f"dampening={self.dampening}"
            )

    def parts(self, block: Block) -> Parts:
        """Decay, momentum, step."""
        momentum: tuple[Part, ...] = (Momentum(nesterov=self.nesterov),) if self.momentum else ()
        return Parts(L2(), *momentum, Descend())
