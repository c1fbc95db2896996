"""The Adam family: one class of quotients, and what each method has in the place of Adam's moments."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts import (
    ALL_DECAYS,
    DECAYS,
    AdamMoments,
    AngleMoments,
    BeliefMoments,
    Descend,
    GradientSigns,
    NadamMoments,
    Part,
    Parts,
    QuotientMomentum,
    YogiMoments,
)
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.routing.roles import Block


@recipe(
    "adamw",
    paper="Loshchilov and Hutter 2017, arXiv:1711.05101",
    family="adam",
    use="anything; the baseline of language models",
    avoid="small memory, or matrices where muon or soap need fewer steps",
    start="lr 3e-4 to 3e-3, betas (0.9, 0.95), decay 0.1, clip at 1 for language models",
)
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


@recipe(
    "nadamw",
    paper="Dozat 2016; Loshchilov and Hutter 2017, arXiv:1711.05101",
    family="adam",
    use="the baseline to beat: AdamW with Nesterov momentum, at no cost",
    avoid="cases where torch's fused kernel for AdamW matters",
    start="AdamW's numbers",
)
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


@dataclass(frozen=True, kw_only=True)
class Quotient(Recipe):
    """What the recipes below share: numbers, decay, and the place of the moments."""

    lr: float = hyper(1e-3, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, help="memory of the first and second moment")
    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")
    weight_decay: float = hyper(0.0, ge=0, help="decay, of the kind that decay names")
    decay: str = decay_kind("decoupled", coupled=True, help="coupled: wd p joins the gradient")

    def moments(self) -> tuple[Part, ...]:
        """What makes the direction."""
        raise TypeError(f"{type(self).__name__} does not define moments")

    def parts(self, block: Block) -> Parts:
        """Decay, moments, step."""
        return Parts(ALL_DECAYS[self.decay], *self.moments(), Descend())


@recipe(
    "adam",
    paper="Kingma and Ba 2014, arXiv:1412.6980",
    family="adam",
    use="parity with published runs that couple the decay to the gradient, and runs without decay",
    avoid="decay: use adamw",
    start="lr 3e-4 to 1e-3",
)
@dataclass(frozen=True, kw_only=True)
class Adam(Quotient):
    """Adam as in torch, its decay coupled to the gradient; for any decay worth having use adamw.

    ``g <- g + wd p``; ``m, v`` are averages of ``g, g^2``; ``p <- p - lr (m / bc1) / (sqrt(v / bc2) + eps)``.
    """

    amsgrad: bool = static(False, help="divide by the running maximum of the second moment")
    decay: str = decay_kind("coupled", coupled=True, help="coupled: wd p joins the gradient")

    def moments(self) -> tuple[Part, ...]:
        """Adam's."""
        return (AdamMoments(amsgrad=self.amsgrad),)


@recipe(
    "amsgrad",
    paper="Reddi, Kale and Kumar 2018, arXiv:1904.09237",
    family="adam",
    use="convex problems where Adam's second moment forgets rare large gradients",
    avoid="deep networks in general: it rarely gains anything there",
)
@dataclass(frozen=True, kw_only=True)
class AMSGrad(Quotient):
    """Adam that divides by the largest second moment so far, as in torch, so that no step grows when gradients fade.

    ``w <- max(w, v)`` of the moments before correction; ``p <- p - lr (m / bc1) / (sqrt(w / bc2) + eps)``.
    """

    decay: str = decay_kind("coupled", coupled=True, help="coupled: wd p joins the gradient")

    def moments(self) -> tuple[Part, ...]:
        """Adam's, with the maximum."""
        return (AdamMoments(amsgrad=True),)


@recipe(
    "nadam",
    paper="Dozat 2016",
    family="adam",
    use="parity with torch's NAdam with coupled decay",
    avoid="decay: use nadamw",
)
@dataclass(frozen=True, kw_only=True)
class NAdam(Quotient):
    """Adam with Nesterov momentum, as in torch, its decay coupled to the gradient.

    The formula is in ``parts.NadamMoments``; nadamw is the same with decoupled decay.
    """

    lr: float = hyper(2e-3, ge=0, help="learning rate")
    momentum_decay: float = hyper(4e-3, ge=0, help="speed at which the momentum rises from half of beta1 to beta1")
    decay: str = decay_kind("coupled", coupled=True, help="coupled: wd p joins the gradient")

    def moments(self) -> tuple[Part, ...]:
        """Dozat's."""
        return (NadamMoments(),)


@recipe(
    "adabelief",
    paper="Zhuang et al. 2020, arXiv:2010.07468",
    family="adam",
    use="GANs and small vision runs, where it was found to help",
    avoid="low precision: its second moment is a small difference",
    start="eps 1e-16 in float32, 1e-8 in transformers",
)
@dataclass(frozen=True, kw_only=True)
class AdaBelief(Quotient):
    """Adam that divides by how far gradients are from their average: long steps where they agree.

    ``v <- b2 v + (1 - b2) (g - m)^2 + eps``; ``p <- p - lr (m / bc1) / (sqrt(v / bc2) + eps)``.
    """

    eps: float = hyper(1e-16, ge=0, help="added to the moment in every step, and to its root")

    def moments(self) -> tuple[Part, ...]:
        """Distances in the place of squares."""
        return (BeliefMoments(),)


@recipe(
    "yogi",
    paper="Zaheer et al. 2018, NeurIPS",
    family="adam",
    use="gradients that come rarely: v grows and shrinks slowly",
    avoid="short runs",
    start="lr 1e-2, eps 1e-3",
)
@dataclass(frozen=True, kw_only=True)
class Yogi(Quotient):
    """Adam with a second moment that rises and falls slowly, so that a run of small gradients makes no large steps.

    ``v <- v - (1 - b2) sign(v - g^2) g^2``; ``p <- p - lr (m / bc1) / (sqrt(v / bc2) + eps)``.
    """

    lr: float = hyper(1e-2, ge=0, help="learning rate")
    eps: float = hyper(1e-3, ge=0, help="added to the root of the second moment")
    initial_accumulator: float = static(1e-6, help="what the second moment begins with")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.initial_accumulator < float("inf"):
            raise ValueError(f"initial_accumulator={self.initial_accumulator} of yogi must be finite and >= 0")

    def moments(self) -> tuple[Part, ...]:
        """Sign-driven squares."""
        return (YogiMoments(start=self.initial_accumulator),)


@recipe(
    "laprop",
    paper="Ziyin, Wang and Ueda 2020, arXiv:2002.04839",
    family="adam",
    use="betas far apart, such as a small second memory with a large first one",
    avoid="settings copied from Adam with bias towards its eps",
    start="AdamW's numbers",
)
@dataclass(frozen=True, kw_only=True)
class LaProp(Quotient):
    """Momentum of normalised gradients: no momentum, however long, can outgrow its divisor.

    ``m <- b1 m + (1 - b1) g / (sqrt(v / bc2) + eps)``; ``p <- p - lr m / bc1``. With ``betas[0] = 0`` it is Adam's.
    """

    lr: float = hyper(4e-4, ge=0, help="learning rate")
    eps: float = hyper(1e-15, ge=0, help="added to the root of the second moment")

    def moments(self) -> tuple[Part, ...]:
        """Divided, then averaged."""
        return (QuotientMomentum(),)


@recipe(
    "adam_atan2",
    paper="Everett et al. 2024, arXiv:2407.05872",
    family="adam",
    use="training without an eps to choose, invariant to the scale of the loss",
    avoid="parity with AdamW's runs: steps are a little shorter",
    start="AdamW's numbers",
)
@dataclass(frozen=True, kw_only=True)
class AdamAtan2(Recipe):
    """Adam with an angle in the place of the division: no eps, and the same steps at every scale of the gradient.

    ``p <- p - lr a atan2(m / bc1, b sqrt(v / bc2))``. At ``a = 4 / pi`` a steady gradient moves by ``lr``, as in Adam.
    """

    lr: float = hyper(1e-3, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, help="memory of the first and second moment")
    atan2_a: float = hyper(1.2732395447351628, gt=0, help="a, the length of a step; 4 / pi is Adam's")
    atan2_b: float = hyper(1.0, gt=0, help="b, the weight of the second moment")
    weight_decay: float = hyper(0.0, ge=0, help="decay; lr * weight_decay is taken off in a step")
    decay: str = decay_kind()

    def parts(self, block: Block) -> Parts:
        """Angle, decay, step."""
        return Parts(AngleMoments(), DECAYS[self.decay], Descend())


@recipe(
    "grams",
    paper="Cao, Li and Song 2024, arXiv:2412.17107",
    family="adam",
    use="a trial of sign-corrected momentum on a tuned AdamW",
    avoid="noisy small batches, whose signs are noise",
    start="AdamW's numbers",
)
@dataclass(frozen=True, kw_only=True)
class Grams(Quotient):
    """The sizes of Adam's steps with the signs of the gradient: the momentum decides how far, never which way.

    ``p <- p - lr |(m / bc1) / (sqrt(v / bc2) + eps)| sign(g)``.
    """

    def moments(self) -> tuple[Part, ...]:
        """Adam's, then signs."""
        return (AdamMoments(), GradientSigns())
