"""Diagonal methods around Adam, in torch's form: Adagrad, RMSProp, Adadelta, Adamax, RAdam."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts import (
    ALL_DECAYS,
    Descend,
    Displace,
    InverseTime,
    MaximumMoments,
    Momentum,
    Parts,
    RectifiedMoments,
    RootRatio,
    SquareAverage,
    SquareSum,
    Velocity,
)
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.routing.roles import Block

FORMS = ("torch", "tensorflow")


@recipe(
    "adagrad",
    paper="Duchi, Hazan and Singer 2011, JMLR 12",
    family="adaptive",
    use="sparse features and convex problems",
    avoid="long runs of deep networks: the step only shrinks",
    start="lr 0.01",
)
@dataclass(frozen=True, kw_only=True)
class Adagrad(Recipe):
    """Divide by the root of the sum of all squares, as in torch.

    ``g <- g + wd p``; ``G <- G + g^2``; ``p <- p - lr / (1 + (t - 1) lr_decay) g / (sqrt(G) + eps)``.
    """

    lr: float = hyper(1e-2, ge=0, help="learning rate")
    lr_decay: float = hyper(0.0, ge=0, help="the learning rate is divided by 1 + (t - 1) lr_decay")
    eps: float = hyper(1e-10, ge=0, help="added to the root of the sum")
    weight_decay: float = hyper(0.0, ge=0, help="decay, coupled unless decay says otherwise")
    initial_accumulator_value: float = static(0.0, help="what the sum of squares begins with")
    decay: str = decay_kind("coupled", coupled=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.initial_accumulator_value < float("inf"):
            raise ValueError(
                f"initial_accumulator_value={self.initial_accumulator_value} of adagrad must be finite and >= 0: it is "
                "a sum of squares"
            )

    def parts(self, block: Block) -> Parts:
        """Decay, quotient, shrinking rate, step."""
        return Parts(ALL_DECAYS[self.decay], SquareSum(start=self.initial_accumulator_value), InverseTime(), Descend())


@recipe(
    "rmsprop",
    paper="Tieleman and Hinton 2012; Graves 2013, arXiv:1308.0850",
    family="adaptive",
    use="recurrent networks and reinforcement learning, after published settings",
    avoid="new work: AdamW has its idea and a correction of the bias",
    start="lr 1e-3, alpha 0.99",
)
@dataclass(frozen=True, kw_only=True)
class RMSprop(Recipe):
    """Divide by the root of an average of the squares, then momentum, as in torch.

    ``g <- g + wd p``; ``v <- alpha v + (1 - alpha) g^2``; ``b <- mu b + g / (sqrt(v) + eps)``; ``p <- p - lr b``.
    ``form="tensorflow"``, for recipes in the style of EfficientNet, has eps inside the root, ``v`` from 1 and the
    learning rate inside the momentum: ``b <- mu b + lr g / sqrt(v + eps)``; ``p <- p - b``.
    """

    lr: float = hyper(1e-2, ge=0, help="learning rate")
    alpha: float = hyper(0.99, ge=0, lt=1, help="memory of the squares")
    eps: float = hyper(1e-8, ge=0, help="added to the root of the average, or inside it")
    weight_decay: float = hyper(0.0, ge=0, help="decay, coupled unless decay says otherwise")
    momentum: float = hyper(0.0, ge=0, lt=1, structural=True, help="momentum mu of the quotients")
    centered: bool = static(False, help="divide by the deviation and not by the root mean square")
    form: str = static("torch", of=FORMS, help="tensorflow: eps inside the root, v from 1, rate inside the momentum")
    decay: str = decay_kind("coupled", coupled=True)

    def parts(self, block: Block) -> Parts:
        """Decay, quotient, momentum, step."""
        inside = self.form == "tensorflow"
        average = SquareAverage(centered=self.centered, inside=inside, start=float(inside))
        if not self.momentum:
            return Parts(ALL_DECAYS[self.decay], average, Descend())
        if inside:
            return Parts(ALL_DECAYS[self.decay], average, Velocity(), Displace())
        return Parts(ALL_DECAYS[self.decay], average, Momentum(dampening="").at("momentum"), Descend())


@recipe(
    "adadelta",
    paper="Zeiler 2012, arXiv:1212.5701",
    family="adaptive",
    use="published settings that name it",
    avoid="new work: its first steps are set by eps and not by lr",
)
@dataclass(frozen=True, kw_only=True)
class Adadelta(Recipe):
    """Steps in units of the parameter, by the ratio of two root mean squares, as in torch.

    ``g <- g + wd p``; ``v`` averages ``g^2``; ``d = sqrt(D + eps) / sqrt(v + eps) g``; ``D`` averages ``d^2``;
    ``p <- p - lr d``.
    """

    lr: float = hyper(1.0, ge=0, help="multiplier of the method's own step")
    rho: float = hyper(0.9, ge=0, lt=1, help="memory of both averages")
    eps: float = hyper(1e-6, ge=0, help="inside both roots; sets the length of the first steps")
    weight_decay: float = hyper(0.0, ge=0, help="decay, coupled unless decay says otherwise")
    decay: str = decay_kind("coupled", coupled=True)

    def parts(self, block: Block) -> Parts:
        """Decay, ratio, step."""
        return Parts(ALL_DECAYS[self.decay], RootRatio(), Descend())


@recipe(
    "adamax",
    paper="Kingma and Ba 2014, arXiv:1412.6980",
    family="adaptive",
    use="embeddings with rare large gradients, after published settings",
    avoid="new work",
    start="lr 2e-3",
)
@dataclass(frozen=True, kw_only=True)
class Adamax(Recipe):
    """Adam with a fading maximum in the place of the second moment, as in torch.

    ``g <- g + wd p``; ``m`` averages ``g``; ``n <- max(b2 n, |g| + eps)``; ``p <- p - lr / (1 - b1^t) m / n``.
    """

    lr: float = hyper(2e-3, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, help="memory of the moment, fading of the maximum")
    eps: float = hyper(1e-8, ge=0, help="added to the size of the gradient, inside the maximum")
    weight_decay: float = hyper(0.0, ge=0, help="decay, coupled unless decay says otherwise")
    decay: str = decay_kind("coupled", coupled=True)

    def parts(self, block: Block) -> Parts:
        """Decay, quotient, step."""
        return Parts(ALL_DECAYS[self.decay], MaximumMoments(), Descend())


@recipe(
    "radam",
    paper="Liu et al. 2019, arXiv:1908.03265",
    family="adam",
    use="runs without a warmup",
    avoid="runs that have one: it is then AdamW",
    start="AdamW's numbers without warmup",
)
@dataclass(frozen=True, kw_only=True)
class RAdam(Recipe):
    """Adam that warms itself up: its step grows with what the second moment rests on, as in torch.

    ``g <- g + wd p``; the formula is in ``parts.RectifiedMoments``. ``warmup`` is what happens in the first steps (five
    at the default betas), where the second moment cannot be trusted: ``p <- p - lr m / bc1``, which is as long as the
    gradient, or no step.
    """

    lr: float = hyper(1e-3, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, help="memory of the first and second moment")
    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")
    weight_decay: float = hyper(0.0, ge=0, help="decay, coupled unless decay says otherwise")
    warmup: str = static("momentum", of=("momentum", "skip"), help="the first steps: along the momentum, or none")
    decay: str = decay_kind("coupled", coupled=True)

    def parts(self, block: Block) -> Parts:
        """Decay, moments, step."""
        return Parts(ALL_DECAYS[self.decay], RectifiedMoments(skip=self.warmup == "skip"), Descend())
