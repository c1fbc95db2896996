"""Adaptive methods whose second moment takes next to no memory: Adafactor, CAME, SM3, Adam-mini."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts import (
    DECAYS,
    AdafactorRoot,
    AdamMoments,
    BoundUpdate,
    CameRoot,
    CellMoments,
    Confidence,
    CoverMaxima,
    Descend,
    Ema,
    Part,
    Parts,
    RelativeStep,
    SquareSum,
    cells,
)
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.routing.roles import Block


@dataclass(frozen=True, kw_only=True)
class Factoring(Recipe):
    """What the recipes with a moment of rank one share: which tensors are factored, and how."""

    min_dim_size_to_factor: int = static(128, help="a tensor with a shorter side among the two has a whole moment")
    factored_axes: str = static("largest", of=("largest", "last"), help="the axes of a factored tensor; last: as torch")

    def __post_init__(self) -> None:
        """Check the size."""
        super().__post_init__()
        if self.min_dim_size_to_factor < 1:
            raise ValueError(
                f"min_dim_size_to_factor={self.min_dim_size_to_factor} of {self.label} must be at least 1, which "
                "factors every tensor of two axes and more"
            )

    @property
    def last(self) -> bool:
        """Whether the last two axes are factored."""
        return self.factored_axes == "last"


@recipe(
    "adafactor",
    paper="Shazeer and Stern 2018, arXiv:1804.04235",
    family="factored",
    use="large models whose optimizer state must not cost memory",
    avoid="the best loss at equal steps, unless beta1 is on",
    start="external schedule: relative_step off, scale_parameter off, lr as AdamW",
)
@dataclass(frozen=True, kw_only=True)
class Adafactor(Factoring):
    """Adafactor: divide by a second moment of rank one, in steps relative to the size of the parameter.

    ``v_ij = R_i C_j / mean(R)``, R and C averages of the row and column means of ``g^2 + eps[0]`` that take up
    ``t^beta2_decay`` at step t; ``u = g / sqrt(v)``, ``u <- u / max(1, RMS(u) / d)``;
    ``p <- p (1 - lr wd) - max(eps[1], RMS(p)) min(lr, t^-1/2) u``. State of a factored ``[m, n]``: ``m + n`` numbers,
    and ``m n`` more with ``beta1``. With an external schedule: ``relative_step=False``, ``scale_parameter=False``,
    ``beta2_cap=0.999``. ``min_dim_size_to_factor=1`` and ``factored_axes="last"`` are torch's choice of what is
    factored; torch has no ``eps[0]`` in the average but bounds v and its mean, which differs for tiny gradients alone,
    and its state dicts load where its eps is a pair of numbers.
    """

    lr: float = hyper(1e-2, ge=0, help="largest relative step; the learning rate where relative_step is off")
    beta2_decay: float = hyper(-0.8, le=0, help="the average's memory is 1 - t^beta2_decay at step t")
    beta2_cap: float = hyper(1.0, gt=0, le=1, help="largest memory of the average")
    eps: tuple[float, float] = hyper((1e-30, 1e-3), gt=0, help="added to squares; least RMS of a parameter")
    d: float | None = hyper(1.0, gt=0, optional=True, help="largest RMS of a tensor's update; None bounds none")
    beta1: float = hyper(0.0, ge=0, lt=1, structural=True, help="memory of the momentum of scaled updates; 0 has none")
    weight_decay: float = hyper(0.0, ge=0, help="decay; lr * weight_decay is taken off in a step")
    relative_step: bool = static(True, help="steps of min(lr, 1 / sqrt(t)) in the place of lr")
    scale_parameter: bool = static(True, help="multiply the step by the RMS of the parameter")
    decay: str = decay_kind()

    def parts(self, block: Block) -> Parts:
        """Quotient, bound and size, rate, momentum, decay, step."""
        extra: list[Part] = [RelativeStep()] if self.relative_step else []
        extra += [Ema("beta1").at("momentum")] if self.beta1 else []
        return Parts(
            AdafactorRoot(least=self.min_dim_size_to_factor, last=self.last),
            BoundUpdate(floor="eps" if self.scale_parameter else ""),
            *extra,
            DECAYS[self.decay],
            Descend(),
        )


@recipe(
    "came",
    paper="Luo et al. 2023, arXiv:2307.02047",
    family="factored",
    use="fine-tuning large language models with less memory than Adam and its stability",
    avoid="memory as short as Adafactor's: it has a full first moment",
    start="lr 2e-4, no schedule trick needed",
)
@dataclass(frozen=True, kw_only=True)
class CAME(Factoring):
    """CAME: Adafactor's quotient, averaged, and divided by how much it has been straying from that average.

    ``u = g / sqrt(v)`` with v of rank one and memory ``b2``, ``u <- u / max(1, RMS(u) / d)``;
    ``m <- b1 m + (1 - b1) u``; S of rank one, the average with memory ``b3`` of ``(u - m)^2 + eps[1]``;
    ``p <- p (1 - lr wd) - lr m / sqrt(S)``. Nothing is corrected for bias, and S begins small: early steps are
    long. State of ``[m, n]``: ``m n + 2 (m + n)`` numbers. Vectors have a whole v and no S.
    """

    lr: float = hyper(2e-4, ge=0, help="learning rate")
    betas: tuple[float, float, float] = hyper(
        (0.9, 0.999, 0.9999), ge=0, lt=1, help="memory of the momentum, of the second moment and of S"
    )
    eps: tuple[float, float] = hyper((1e-30, 1e-16), gt=0, help="added to the squares, and to those of S")
    clip_threshold: float | None = hyper(1.0, gt=0, optional=True, help="largest RMS of a tensor's u; None bounds none")
    weight_decay: float = hyper(0.0, ge=0, help="decay; lr * weight_decay is taken off in a step")
    min_dim_size_to_factor: int = static(1, help="a tensor with a shorter side among the two has a whole v and no S")
    decay: str = decay_kind()

    def parts(self, block: Block) -> Parts:
        """Quotient, bound, momentum over confidence, decay, step."""
        least, last = self.min_dim_size_to_factor, self.last
        return Parts(
            CameRoot(least=least, last=last),
            BoundUpdate(limit="clip_threshold"),
            Confidence(least=least, last=last),
            DECAYS[self.decay],
            Descend(),
        )


@recipe(
    "sm3",
    paper="Anil et al. 2019, arXiv:1901.11150",
    family="factored",
    use="embeddings and sparse gradients with almost no state",
    avoid="long runs: like Adagrad its steps only shrink",
    start="lr 0.1 with a warmup",
)
@dataclass(frozen=True, kw_only=True)
class SM3(Recipe):
    """SM3: Adagrad with one number for each row and each column, which bounds the sums of squares from above.

    ``v_ij = min(r_i, c_j) + g_ij^2``; ``r_i = max_j v_ij``, ``c_j = max_i v_ij``; ``u = g / (sqrt(v) + eps)``;
    ``p <- p (1 - lr wd) - lr m``, m an average of u, or u itself. State of ``[m, n]``: ``m + n`` numbers, one for each
    slice across an axis, and ``m n`` more with momentum. On a vector it is Adagrad.
    """

    lr: float = hyper(0.1, ge=0, help="learning rate")
    momentum: float = hyper(0.0, ge=0, lt=1, structural=True, help="memory of the average of u; the paper's runs: 0.9")
    eps: float = hyper(1e-10, ge=0, help="added to the root of the bound")
    weight_decay: float = hyper(0.0, ge=0, help="decay; lr * weight_decay is taken off in a step")
    decay: str = decay_kind()

    def parts(self, block: Block) -> Parts:
        """Covers, or the sums themselves where there is one side; momentum, decay, step."""
        sides = sum(side > 1 for side in block.stored)
        covered = sides > 1 and block.numel > 0 and len(block.pieces) == 1
        quotient: Part = CoverMaxima() if covered else SquareSum()
        momentum = (Ema().at("momentum"),) if self.momentum else ()
        return Parts(quotient, *momentum, DECAYS[self.decay], Descend())


@recipe(
    "adam_mini",
    paper="Zhang et al. 2024, arXiv:2406.16793",
    family="factored",
    use="AdamW's runs at half of its state",
    avoid="models whose heads are unknown to the routing: rows are then the blocks",
    start="AdamW's numbers",
)
@dataclass(frozen=True, kw_only=True)
class AdamMini(Recipe):
    """Adam-mini: AdamW with one second moment for each row of a map, each head of queries and keys, each token.

    ``m`` is an average of g, ``v`` one of the mean of ``g^2`` over the row;
    ``p <- p (1 - lr wd) - lr (m / bc1) / (sqrt(v / bc2) + eps)``. State of ``[m, n]``: ``m n + m`` numbers. What shares
    a moment follows from the roles of blocks, see ``parts.cells``; give ``rule(..., heads=8)`` for heads. Vectors and
    tensors of unknown meaning take AdamW's steps.
    """

    lr: float = hyper(1e-3, ge=0, help="learning rate; as AdamW's")
    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, help="memory of the first and second moment")
    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")
    weight_decay: float = hyper(1e-2, ge=0, help="decay; lr * weight_decay is taken off in a step")
    decay: str = decay_kind()

    def parts(self, block: Block) -> Parts:
        """Moments, decay, step."""
        moments: Part = AdamMoments() if cells(block) is None else CellMoments()
        return Parts(moments, DECAYS[self.decay], Descend())
