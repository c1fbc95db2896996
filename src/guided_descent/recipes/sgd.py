"""SGD, with the forms of momentum: heavy ball, Nesterov, average."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts import L2, Descend, Ema, Momentum, Part, Parts
from guided_descent.recipes.base import Recipe, hyper, recipe, static
from guided_descent.routing.roles import Block

#: Forms of momentum; see ``SGD``.
FORMS = ("sum", "average", "corrected")


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
    """Stochastic gradient descent with momentum; the default form is torch's.

    ``g <- g + wd p``; then with ``form``

    - ``sum``, Polyak's heavy ball: ``b <- mu b + (1 - tau) g``, the first b being g; ``p <- p - lr b``, or with
      ``nesterov`` ``p <- p - lr (g + mu b)``;
    - ``average``, the EMA form: ``m <- mu m + (1 - mu) g`` from 0; ``p <- p - lr m``, or with ``nesterov``
      ``p <- p - lr ((1 - mu) g + mu m)``. In every step ``m = (1 - mu) b`` of ``tau = 0``, so that it takes at the rate
      ``lr / (1 - mu)`` the steps of ``sum`` at ``lr``. Late steps are as long at any mu, the first ones short;
    - ``corrected``: the same over ``1 - mu^t`` (``1 - mu^(t + 1)`` with ``nesterov``), so that the weights of the
      gradients in a step always add up to 1.
    """

    lr: float = hyper(1e-3, ge=0, help="learning rate")
    momentum: float = hyper(0.0, ge=0, lt=1, structural=True, help="momentum mu; hold lr / (1 - mu) when tuning it")
    dampening: float = hyper(0.0, ge=0, le=1, help="tau; the first buffer is not damped")
    weight_decay: float = hyper(0.0, ge=0, help="coupled L2 decay")
    nesterov: bool = static(False, help="look-ahead form; needs momentum > 0 and dampening 0")
    form: str = static("sum", of=FORMS, was="sum", help="of the momentum: heavy ball, average, bias-corrected average")

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = "nesterov=True" if self.nesterov else f"form={self.form!r}" if self.form != "sum" else ""
        if asked and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"{asked} of sgd needs momentum > 0 and dampening 0, got momentum={self.momentum} and "
                f"dampening={self.dampening}"
            )

    def parts(self, block: Block) -> Parts:
        """Decay, momentum, step."""
        average = Ema(nesterov=self.nesterov, corrected=self.form == "corrected", name="exp_avg")
        momentum: Part = Momentum(nesterov=self.nesterov) if self.form == "sum" else average
        return Parts(L2(), *((momentum,) if self.momentum else ()), Descend())
