"""Methods that set the length of a step by norms: LARS, LAMB, NovoGrad, normalised SGD."""

from __future__ import annotations

from dataclasses import dataclass, field

from guided_descent.parts import (
    DECAYS,
    L2,
    AdamMoments,
    Descend,
    Ema,
    LarsRatio,
    Momentum,
    Normalize,
    NormalizeEach,
    NormMoments,
    Part,
    Parts,
    TrustRatio,
)
from guided_descent.parts.geometry.clars import ClarsRatio
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.routing.roles import Block, Role

#: Tensors whose rate follows their norm: those of two and more dimensions, or all of them.
ADAPTED = ("matrices", "all")


def check_nesterov(made: LARS | CLARS) -> None:
    """Nesterov's form is a look-ahead along a momentum.

    Raises:
        ValueError: There is none.
    """
    if made.nesterov and made.momentum == 0:
        raise ValueError(f"nesterov=True of {made.label} needs momentum > 0, got momentum=0")


def _adapts(block: Block, adapt: str) -> bool:
    return adapt == "all" or len(block.shape) > 1


@recipe(
    "lars",
    paper="You, Gitman and Ginsburg 2017, arXiv:1708.03888",
    family="layerwise",
    use="convolutional networks at batches of thousands",
    avoid="batches below a thousand, and transformers",
    start="trust_coefficient 1e-3, momentum 0.9, polynomial decay, a warmup",
)
@dataclass(frozen=True, kw_only=True)
class LARS(Recipe):
    """SGD with a rate for each tensor in proportion to its norm over that of its gradient, for large batches.

    ``lam = eta ||p|| / (||g|| + wd ||p|| + eps)``, 1 where a norm is 0; ``b <- mu b + lam (g + wd p)``;
    ``p <- p - lr b``. Biases and gains have ``lam = 1`` unless ``adapt="all"``. Needs a warmup at large batches.
    """

    lr: float = hyper(0.1, ge=0, help="learning rate; a tensor with a ratio moves by lr * eta of its norm")
    momentum: float = hyper(0.9, ge=0, lt=1, structural=True, help="momentum mu of the scaled gradients")
    weight_decay: float = hyper(0.0, ge=0, help="decay, coupled and part of the ratio")
    trust_coefficient: float = hyper(1e-3, gt=0, help="eta, the relative change of a tensor at lr 1")
    eps: float = hyper(0.0, ge=0, help="added to the divisor of the ratio")
    nesterov: bool = static(False, help="look-ahead form; needs momentum > 0")
    clip: bool = static(False, help="LARC: min(lam / lr, 1) in the place of lam")
    adapt: str = static("matrices", of=ADAPTED, help="tensors that have a rate of their own")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nesterov(self)

    def parts(self, block: Block) -> Parts:
        """Ratio with decay, momentum, step."""
        ratio: Part = LarsRatio(clip=self.clip) if _adapts(block, self.adapt) else L2()
        momentum = (Momentum(dampening="", nesterov=self.nesterov).at("momentum"),) if self.momentum else ()
        return Parts(ratio, *momentum, Descend())


@recipe(
    "clars",
    paper="Huo, Gu and Huang 2020, arXiv:2002.01576 (exact rule unverified)",
    family="layerwise",
    use="large batches without a warmup, and a look at how far samples agree",
    avoid="compiled models, and layers that cannot be read: its hooks run in every step",
    start="the large-batch lr of LARS, no warmup",
)
@dataclass(frozen=True, kw_only=True)
class CLARS(Recipe):
    """LARS that looks at the gradient of every sample, so that large batches need no warmup.

    ``lam = eta ||W|| / (mean_i ||g_i|| + wd ||W|| + eps)`` over the samples i; ``b <- mu b + lam (g + wd W)``;
    ``W <- W - lr b``. Layers that can be read have the ratio (linear, convolution, embedding), with the exact norms of
    their samples' gradients; LARS, for which biases and gains have the rate ``lr``, takes the rest. The exact rule of
    the paper is unverified; see ``ClarsRatio``.
    """

    matrix = True
    reads_layers = True

    lr: float = hyper(0.1, ge=0, help="learning rate; a layer moves by at most lr * eta of its norm, without momentum")
    momentum: float = hyper(0.9, ge=0, lt=1, structural=True, help="momentum mu of the scaled gradients")
    weight_decay: float = hyper(0.0, ge=0, help="decay, coupled and part of the ratio")
    trust_coefficient: float = hyper(1e-2, gt=0, help="eta, the relative change of a layer at lr 1 if samples agree")
    eps: float = hyper(0.0, ge=0, help="added to the divisor of the ratio")
    factor_frequency: int = hyper(1, ge=1, help="steps between looks at the samples")
    nesterov: bool = static(False, help="look-ahead form; needs momentum > 0")
    fisher: str = static("empirical", of=("empirical",), help="the passes of the true labels tell the samples' norms")
    aux: Recipe = field(default_factory=lambda: LARS(lr=0.1, trust_coefficient=1e-2))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nesterov(self)

    def route(self, block: Block) -> Recipe:
        """Matrices, tables and heads stay, the rest goes to the auxiliary recipe."""
        stays = block.is_matrix or block.role in (Role.EMBEDDING, Role.HEAD)
        return self if stays and len(block.shape) == 2 and min(block.shape) > 0 else self.aux

    def parts(self, block: Block) -> Parts:
        """Ratio with decay, momentum, step."""
        momentum = (Momentum(dampening="", nesterov=self.nesterov).at("momentum"),) if self.momentum else ()
        return Parts(ClarsRatio(), *momentum, Descend())


@recipe(
    "lamb",
    paper="You et al. 2019, arXiv:1904.00962",
    family="layerwise",
    use="transformers at batches of tens of thousands",
    avoid="ordinary batches: adamw is simpler",
    start="lr by the square root of the batch, a warmup",
)
@dataclass(frozen=True, kw_only=True)
class LAMB(Recipe):
    """Adam's direction with decay in it, at the length of the tensor that it moves, for large batches.

    ``u = (m / bc1) / (sqrt(v / bc2) + eps) + wd p``; ``p <- p - lr ||p|| / ||u|| u``, the ratio being 1 where a norm is
    0. Biases and gains have the ratio 1 unless ``adapt="all"``. With ``trust_ratio=False`` it is AdamW.
    """

    lr: float = hyper(1e-3, ge=0, help="learning rate: the relative change of a tensor in a step")
    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, help="memory of the first and second moment")
    eps: float = hyper(1e-6, ge=0, help="added to the root of the second moment")
    weight_decay: float = hyper(0.01, ge=0, help="decay, a part of the direction")
    trust_ratio: bool = static(True, help="False: steps of AdamW's length")
    trust_clip: bool = static(False, help="bound the ratio by 1")
    adapt: str = static("matrices", of=ADAPTED, help="tensors that have a ratio")

    def parts(self, block: Block) -> Parts:
        """Moments, decay, ratio, step."""
        ratio = (TrustRatio(clip=self.trust_clip),) if self.trust_ratio and _adapts(block, self.adapt) else ()
        return Parts(AdamMoments(), L2().at("decay_direction"), *ratio, Descend())


@recipe(
    "novograd",
    paper="Ginsburg et al. 2019, arXiv:1905.11286",
    family="layerwise",
    use="speech and vision with one number of second moment for each layer",
    avoid="embeddings, whose rows differ in scale",
    start="lr 0.01, betas (0.95, 0.98)",
)
@dataclass(frozen=True, kw_only=True)
class NovoGrad(Recipe):
    """Momentum of gradients over the averaged norm of their tensor: one number of second moment for each tensor.

    ``v <- b2 v + (1 - b2) ||g||^2``; ``m <- b1 m + g / (sqrt(v) + eps) + wd p``; ``p <- p - lr m``. Its steps are
    ``1 / (1 - b1)`` times as long as a single direction.
    """

    lr: float = hyper(1e-2, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.95, 0.98), ge=0, lt=1, help="momentum, and memory of the norm")
    eps: float = hyper(1e-8, ge=0, help="added to the root of the averaged square")
    weight_decay: float = hyper(0.0, ge=0, help="decay, added to the normalised gradient")

    def parts(self, block: Block) -> Parts:
        """Normalised momentum with decay, step."""
        return Parts(NormMoments(), Descend())


@recipe(
    "normalized_sgd",
    paper="Cutkosky and Mehta 2020, arXiv:2002.03305",
    family="sgd",
    use="steps of a length that you choose, under heavy-tailed noise",
    avoid="the end of training without a decaying schedule: the step never shrinks",
)
@dataclass(frozen=True, kw_only=True)
class NormalizedSGD(Recipe):
    """Steps of a fixed length along the momentum: ``p <- p (1 - lr wd) - lr m / ||m||``, ``m`` an average of ``g``.

    The norm is that of the whole model over all groups and ranks, so that lr is the length of a step; or that of each
    tensor.
    """

    lr: float = hyper(1e-2, ge=0, help="length of a step, of the model or of each tensor")
    momentum: float = hyper(0.9, ge=0, lt=1, structural=True, help="memory of the average")
    weight_decay: float = hyper(0.0, ge=0, help="decay; lr * weight_decay is taken off in a step")
    scope: str = static("model", of=("model", "tensor"), help="whose norm is 1")
    decay: str = decay_kind()

    def parts(self, block: Block) -> Parts:
        """Average, norm, decay, step."""
        norm: Part = Normalize() if self.scope == "model" else NormalizeEach()
        momentum = (Ema(),) if self.momentum else ()
        return Parts(*momentum, norm, DECAYS[self.decay], Descend())
