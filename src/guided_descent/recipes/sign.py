"""Sign methods: every element moves by the learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts import DECAYS, Descend, Ema, LionMomentum, Parts, Sign
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe
from guided_descent.routing.roles import Block


@recipe(
    "signsgd",
    paper="Bernstein et al. 2018, arXiv:1802.04434",
    family="sign",
    use="compressing gradients to one bit, and as a reference for sign methods",
    avoid="small batches, where the sign is mostly noise",
    start="a tenth of Adam's lr",
)
@dataclass(frozen=True, kw_only=True)
class SignSGD(Recipe):
    """Descent along the signs of the gradient.

    ``p <- p (1 - lr wd) - lr sign(g)``, with sign(0) = 0. Ranks average gradients before the sign; no votes are taken.
    """

    lr: float = hyper(1e-4, ge=0, help="length of every element's step")
    weight_decay: float = hyper(0.0, ge=0, help="decay; lr * weight_decay is taken off in a step")
    decay: str = decay_kind()

    def parts(self, block: Block) -> Parts:
        """Signs, decay, step."""
        return Parts(Sign(), DECAYS[self.decay], Descend())


@recipe(
    "signum",
    paper="Bernstein et al. 2018, arXiv:1802.04434",
    family="sign",
    use="half of Adam's memory at much of its effect on transformers",
    avoid="batches so small that the momentum is noise",
    start="a tenth to a third of AdamW's lr, its decay times as much",
)
@dataclass(frozen=True, kw_only=True)
class Signum(Recipe):
    """Descent along the signs of the momentum.

    ``b <- mu b + (1 - mu) g``; ``p <- p (1 - lr wd) - lr sign(b)``, with sign(0) = 0.
    """

    lr: float = hyper(1e-4, ge=0, help="length of every element's step")
    momentum: float = hyper(0.9, ge=0, lt=1, help="memory of the momentum")
    weight_decay: float = hyper(0.0, ge=0, help="decay; lr * weight_decay is taken off in a step")
    decay: str = decay_kind()

    def parts(self, block: Block) -> Parts:
        """Momentum, signs, decay, step."""
        return Parts(Ema(), Sign(), DECAYS[self.decay], Descend())


@recipe(
    "lion",
    paper="Chen et al. 2023, arXiv:2302.06675",
    family="sign",
    use="half of Adam's memory on large transformers and large batches",
    avoid="small batches, and fine-tuning with a rate tuned for AdamW",
    start="a third to a tenth of AdamW's lr, its decay times as much",
)
@dataclass(frozen=True, kw_only=True)
class Lion(Recipe):
    """Descent along the signs of a mixture of gradient and momentum.

    ``u = sign(b1 m + (1 - b1) g)`` with the old ``m``; ``p <- p (1 - lr wd) - lr u``; then ``m <- b2 m + (1 - b2) g``.
    Learning rates are 3 to 10 times below AdamW's and decays as much above, so that ``lr wd`` is the same; so it is at
    the defaults of both.
    """

    lr: float = hyper(1e-4, ge=0, help="length of every element's step")
    betas: tuple[float, float] = hyper((0.9, 0.99), ge=0, lt=1, help="share of the momentum in a step, and its memory")
    weight_decay: float = hyper(0.1, ge=0, help="decay; lr * weight_decay is taken off in a step")
    decay: str = decay_kind()

    def parts(self, block: Block) -> Parts:
        """Mixture, signs, decay, step."""
        return Parts(LionMomentum(), Sign(), DECAYS[self.decay], Descend())
