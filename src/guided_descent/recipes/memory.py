"""Methods with a longer memory or less variance: ADOPT, AdEMAMix, Adan, MARS."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts import (
    ALL_DECAYS,
    DECAYS,
    AdamMoments,
    AdanMoments,
    AdoptMoments,
    CorrectedGradient,
    Descend,
    ExactCorrection,
    Part,
    Parts,
    PreviousPoint,
    ProximalDecay,
    TwoMomenta,
)
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.routing.roles import Block


@recipe(
    "adopt",
    paper="Taniguchi et al. 2024, arXiv:2411.02853",
    family="adam",
    use="small batches or a large second memory, where Adam can diverge",
    avoid="runs of a few hundred steps: its moment starts late",
    start="lr 1e-3, decay 0.1",
)
@dataclass(frozen=True, kw_only=True)
class ADOPT(Recipe):
    """Adam that divides by the moment of the steps before, so that it converges for any ``betas[1]``.

    With ``k = t - 1``: ``n = clip(g / max(sqrt(v), eps), k^(1/4))``; ``m`` averages ``n``; ``p <- p - lr m``; then
    ``v <- b2 v + (1 - b2) g^2``. The first update only sets ``v``.
    """

    lr: float = hyper(1e-3, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.9, 0.9999), ge=0, lt=1, help="memory of the first and second moment")
    eps: float = hyper(1e-6, ge=0, help="least divisor")
    weight_decay: float = hyper(0.0, ge=0, help="decay, of the kind that decay names")
    clip_exponent: float = hyper(0.25, ge=0, help="normalised gradients are clipped to (t - 1)^clip_exponent")
    decay: str = decay_kind("decoupled", coupled=True, help="coupled: wd p joins the gradient")

    def parts(self, block: Block) -> Parts:
        """Decay, moments, step."""
        return Parts(ALL_DECAYS[self.decay], AdoptMoments(), Descend())


@recipe(
    "ademamix",
    paper="Pagliardini, Ablin and Grangier 2024, arXiv:2409.03137",
    family="adam",
    use="long language-model runs, where gradients of ten thousand steps ago help",
    avoid="runs shorter than its slow memory",
    start="alpha 5 to 8, alpha_warmup the length of the run",
)
@dataclass(frozen=True, kw_only=True)
class AdEMAMix(Recipe):
    """Adam with a second, slow momentum beside the first: old gradients stay useful for ten thousand steps.

    ``p <- p - lr [(m1 / bc1 + alpha m2) / (sqrt(v / bc2) + eps) + wd p]``; the formula is in ``parts.TwoMomenta``. Set
    ``alpha_warmup`` to the length of the run. With ``alpha = 0`` it is AdamW.
    """

    lr: float = hyper(1e-3, ge=0, help="learning rate")
    betas: tuple[float, float, float] = hyper(
        (0.9, 0.999, 0.9999), ge=0, lt=1, help="memory of the fast momentum, the second moment, the slow momentum"
    )
    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")
    weight_decay: float = hyper(0.0, ge=0, help="decay; lr * weight_decay is taken off in a step")
    alpha: float = hyper(8.0, ge=0, help="weight of the slow momentum; the paper has 5 to 10")
    alpha_warmup: int = hyper(0, ge=0, help="updates over which alpha and betas[2] rise; the run's length, or 0")
    decay: str = decay_kind()

    def parts(self, block: Block) -> Parts:
        """Moments, decay, step."""
        return Parts(TwoMomenta(), DECAYS[self.decay], Descend())


@recipe(
    "adan",
    paper="Xie et al. 2022, arXiv:2208.06677",
    family="adam",
    use="vision transformers and large batches",
    avoid="short memory: four tensors for each parameter",
    start="lr 1e-3, decay 0.02",
)
@dataclass(frozen=True, kw_only=True)
class Adan(Recipe):
    """Adam with Nesterov momentum made of the differences of gradients.

    ``p <- (p - lr u) / (1 + lr wd)`` with the direction of ``parts.AdanMoments``; other kinds of decay come before the
    step.
    """

    lr: float = hyper(1e-3, ge=0, help="learning rate")
    betas: tuple[float, float, float] = hyper(
        (0.98, 0.92, 0.99), ge=0, lt=1, help="memory of the gradient, the difference, the second moment"
    )
    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")
    weight_decay: float = hyper(0.0, ge=0, help="decay, of the kind that decay names")
    decay: str = decay_kind("proximal", "proximal", help="proximal: p / (1 + lr wd) after the step")

    def parts(self, block: Block) -> Parts:
        """Moments, step, decay."""
        decay: Part = ProximalDecay() if self.decay == "proximal" else DECAYS[self.decay]
        return Parts(AdanMoments(), decay, Descend())


@recipe(
    "mars",
    paper="Yuan et al. 2024, arXiv:2411.10438",
    family="adam",
    use="language models at large batches, with lower variance at AdamW's cost",
    avoid="small memory: the last gradient is kept",
    start="lr 3e-3, betas (0.95, 0.99), gamma 0.025",
)
@dataclass(frozen=True, kw_only=True)
class MARS(Recipe):
    """AdamW on gradients with less variance, by the change since the last step.

    ``c = g + gamma b1 / (1 - b1) (g - g_before)``, of norm at most 1 in each tensor; then AdamW with ``c``. Vectors and
    scalars take AdamW with the gradient itself. ``g_before`` is the last step's gradient, of the last batch; with
    ``exact`` it is that of this batch at the last parameters, for which a step evaluates twice and takes a closure.
    """

    lr: float = hyper(3e-3, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.95, 0.99), ge=0, lt=1, help="memory of the first and second moment")
    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")
    weight_decay: float = hyper(0.0, ge=0, help="decay; lr * weight_decay is taken off in a step")
    gamma: float = hyper(0.025, ge=0, help="share of the correction")
    exact: bool = static(False, help="differences on one batch, by a second evaluation in each step")
    decay: str = decay_kind()

    def parts(self, block: Block) -> Parts:
        """Correction, moments, decay, step."""
        correction: tuple[Part, ...] = (ExactCorrection(),) if self.exact else (CorrectedGradient(),)
        if len(block.shape) <= 1:
            correction = (PreviousPoint(),) if self.exact else ()
        return Parts(*correction, AdamMoments(), DECAYS[self.decay], Descend())
