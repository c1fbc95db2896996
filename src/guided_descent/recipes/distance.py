"""Methods that find the learning rate themselves: Prodigy, D-Adaptation, DoG and DoWG."""

from __future__ import annotations

import math
from dataclasses import dataclass

from guided_descent.parts import (
    ALL_DECAYS,
    L2,
    DAdaptDual,
    DAdaptMoments,
    Descend,
    Displace,
    DistanceByLayer,
    DistanceOverGradients,
    Part,
    Parts,
    ProdigyMoments,
    SlicedProdigy,
)
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.routing.roles import Block


@dataclass(frozen=True, kw_only=True)
class Adaptive(Recipe):
    """What the recipes with an estimate d share."""

    lr: float = hyper(1.0, ge=0, help="multiplier of the learning rate that is found; schedules act on it")
    d0: float = hyper(1e-6, gt=0, help="first estimate of the distance, far too small")
    growth_rate: float = hyper(math.inf, ge=1, help="most that the estimate grows by in a step, as a factor")


@recipe(
    "prodigy",
    paper="Mishchenko and Defazio 2023, arXiv:2306.06101",
    family="learning-rate-free",
    use="fine-tuning and first runs of which no rate is known",
    avoid="the last percent: a tuned AdamW is better",
    start="lr 1 with a cosine; d_coef 0.5 to 2 if it is off",
)
@dataclass(frozen=True, kw_only=True)
class Prodigy(Adaptive):
    """Adam that finds its learning rate from how far the way so far goes along the gradients.

    ``p <- p - d lr m / (sqrt(v) + d eps)`` with d, the estimate of the distance to the solution, one number for all
    groups: ``optimizer.param_groups[0]["extra"]["d"]``; the formula is in ``parts.ProdigyMoments``. Leave lr at 1 and
    let a schedule lower it; with a warmup set ``safeguard_warmup``. Groups with ``lr=0`` take no part.
    """

    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, help="memory of the first and second moment")
    beta3: float | None = hyper(None, ge=0, lt=1, optional=True, help="memory of the estimate; None is sqrt(betas[1])")
    eps: float = hyper(1e-8, ge=0, help="times d, added to the root of the second moment")
    weight_decay: float = hyper(0.0, ge=0, help="decay, of the kind that decay names")
    d_coef: float = hyper(1.0, gt=0, help="factor on the estimate: the first thing to change, 0.5 to 2")
    bias_correction: bool = static(False, help="correct the moments as Adam does, which acts as a short warmup")
    safeguard_warmup: bool = static(False, help="keep a warmup of lr from inflating the estimate")
    slice_p: int = static(1, help="estimate from every slice_p-th element, with 1/slice_p of the memory; 11 is usual")
    decay: str = decay_kind("decoupled", coupled=True, help="coupled: wd p joins the gradient")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.slice_p, bool) or self.slice_p < 1:
            raise ValueError(f"slice_p={self.slice_p!r} of prodigy must be >= 1")

    def parts(self, block: Block) -> Parts:
        """Decay, moments with the estimate, step."""
        moments: Part = ProdigyMoments(bias_correction=self.bias_correction, safeguard=self.safeguard_warmup)
        if self.slice_p > 1:
            moments = SlicedProdigy(
                bias_correction=self.bias_correction, safeguard=self.safeguard_warmup, every=self.slice_p
            )
        return Parts(ALL_DECAYS[self.decay], moments, Descend())


@recipe(
    "dadapt_adam",
    paper="Defazio and Mishchenko 2023, arXiv:2301.07733",
    family="learning-rate-free",
    use="a first rate for AdamW without a search",
    avoid="prodigy adapts faster",
    start="lr 1",
)
@dataclass(frozen=True, kw_only=True)
class DAdaptAdam(Adaptive):
    """Adam that finds its learning rate by D-Adaptation, the method before Prodigy; its estimate grows more slowly.

    ``p <- p - m / (sqrt(v) + eps)`` where ``m`` averages ``d lr g``; the formula is in ``parts.DAdaptMoments``, and d
    in ``optimizer.param_groups[0]["extra"]["d"]``.
    """

    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, help="memory of the first and second moment")
    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")
    weight_decay: float = hyper(0.0, ge=0, help="decay, of the kind that decay names")
    bias_correction: bool = static(False, help="correct the moments as Adam does, which acts as a short warmup")
    decay: str = decay_kind("decoupled", coupled=True, help="coupled: wd p joins the gradient")

    def parts(self, block: Block) -> Parts:
        """Decay, moments with the estimate, step."""
        return Parts(ALL_DECAYS[self.decay], DAdaptMoments(bias_correction=self.bias_correction), Displace())


@recipe(
    "dadapt_sgd",
    paper="Defazio and Mishchenko 2023, arXiv:2301.07733",
    family="learning-rate-free",
    use="a first rate for SGD without a search",
    avoid="transformers",
    start="lr 1",
)
@dataclass(frozen=True, kw_only=True)
class DAdaptSGD(Adaptive):
    """SGD that finds its learning rate by D-Adaptation, as dual averaging from the start p0.

    ``z = p0 - sum d lr g / ||g0||``; ``p <- mu p + (1 - mu) z``; the formula of d is in ``parts.DAdaptDual``, and d in
    ``optimizer.param_groups[0]["extra"]["d"]``.
    """

    momentum: float = hyper(0.9, ge=0, lt=1, help="mu, the share of the old parameters in the new ones")
    weight_decay: float = hyper(0.0, ge=0, help="decay, coupled: wd p joins the gradient")

    def parts(self, block: Block) -> Parts:
        """Decay, dual averaging with the estimate, step."""
        return Parts(L2(), DAdaptDual(), Displace())


@dataclass(frozen=True, kw_only=True)
class Measured(Recipe):
    """What the recipes with a measured distance share."""

    lr: float = hyper(1.0, ge=0, help="multiplier of the learning rate that is found; leave it at 1")
    r_eps: float = hyper(1e-6, gt=0, help="first distance, in units of 1 + ||p0||; 1e-4 with batch normalisation")
    eps: float = hyper(1e-8, ge=0, help="added to the sum of squares")
    weight_decay: float = hyper(0.0, ge=0, help="decay, coupled: wd p joins the gradient")


@recipe(
    "dog",
    paper="Ivgi, Hinder and Carmon 2023, arXiv:2302.12022",
    family="learning-rate-free",
    use="SGD without a rate, on fine-tuning above all",
    avoid="transformers from scratch",
    start="lr 1, with an average of the weights",
)
@dataclass(frozen=True, kw_only=True)
class DoG(Measured):
    """SGD whose learning rate is the distance from the start over the root of the squared gradients.

    ``r <- max(r, ||p - p0||)``; ``G <- G + ||g||^2``; ``p <- p - lr r / sqrt(G + eps) g``, norms over all parameters.
    Made for evaluation at an average of the weights: ``guided_descent.averaging.PolynomialAverage(model)``. r is in
    ``optimizer.param_groups[0]["extra"]["distance"]``.
    """

    def parts(self, block: Block) -> Parts:
        """Decay, distance, step."""
        return Parts(L2(), DistanceOverGradients(), Descend())


@recipe(
    "ldog",
    paper="Ivgi, Hinder and Carmon 2023, arXiv:2302.12022",
    family="learning-rate-free",
    use="dog, where layers differ in scale",
    avoid="networks with layers that begin at zero",
    start="lr 1, with an average of the weights",
)
@dataclass(frozen=True, kw_only=True)
class LDoG(Measured):
    """DoG with a distance and a learning rate for each tensor.

    ``r <- max(r, ||p - p0||)``; ``G <- G + ||g||^2``; ``p <- p - lr r / sqrt(G + eps) g``, norms over the tensor alone.
    Made for evaluation at an average of the weights: ``guided_descent.averaging.PolynomialAverage(model)``.
    """

    def parts(self, block: Block) -> Parts:
        """Decay, distance, step."""
        return Parts(L2(), DistanceByLayer(), Descend())


@recipe(
    "dowg",
    paper="Khaled, Mishchenko and Jin 2023, arXiv:2305.16284",
    family="learning-rate-free",
    use="dog that adapts faster on smooth problems",
    avoid="noisy late phases without an average",
    start="lr 1",
)
@dataclass(frozen=True, kw_only=True)
class DoWG(Measured):
    """DoG that weighs gradients by the distance at their time, so that its steps grow faster.

    ``r <- max(r, ||p - p0||)``; ``G <- G + r^2 ||g||^2``; ``p <- p - lr r^2 / (sqrt(G) + eps) g``, norms over all
    parameters. r is in ``optimizer.param_groups[0]["extra"]["distance"]``.
    """

    r_eps: float = hyper(1e-4, gt=0, help="first distance, in units of 1 + ||p0||")
    eps: float = hyper(1e-4, ge=0, help="added to the root of the sum")

    def parts(self, block: Block) -> Parts:
        """Decay, distance, step."""
        return Parts(L2(), DistanceOverGradients(weighted=True), Descend())
