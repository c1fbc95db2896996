"""Methods that divide by an estimate of the curvature's diagonal: AdaHessian and Sophia."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from guided_descent.parts import DECAYS, ClippedNewton, Descend, HessianMoments, Parts
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.routing.roles import Block


@recipe(
    "adahessian",
    paper="Yao et al. 2020, arXiv:2006.00719",
    family="curvature",
    use="small models where curvature by element pays for a second backward",
    avoid="models whose attention kernels have no second derivative",
    start="lr 0.15",
)
@dataclass(frozen=True, kw_only=True)
class AdaHessian(Recipe):
    """Adam that divides by the root mean square of the Hessian's diagonal, at the price of a second backward pass.

    ``D = z * (H z)`` with random signs z, in convolutions the mean of ``|D|`` over a kernel; ``v`` averages ``D^2``;
    ``p <- p - lr (m / bc1) / ((v / bc2)^(k / 2) + eps)``. Call ``optimizer.hessian_pass(loss)`` before
    ``loss.backward()``, or ``step(objective)`` with an ``Objective`` of ``guided_descent.solvers``.
    """

    lr: float = hyper(0.15, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, help="memory of the gradient and of the diagonal")
    eps: float = hyper(1e-4, ge=0, help="added to the power of the second moment")
    weight_decay: float = hyper(0.0, ge=0, help="decay; lr * weight_decay is taken off in a step")
    hessian_frequency: int = hyper(1, ge=1, help="steps between two estimates")
    hessian_power: float = static(1.0, help="k, from 0 (momentum alone) to 1")
    spatial_averaging: bool = static(True, help="one diagonal element for each kernel of a convolution")
    decay: str = decay_kind()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.hessian_power <= 1:
            raise ValueError(f"hessian_power={self.hessian_power} of adahessian must be >= 0 and <= 1")

    def parts(self, block: Block) -> Parts:
        """Moments, decay, step."""
        moments = HessianMoments(power=float(self.hessian_power), spatial=self.spatial_averaging)
        return Parts(moments, DECAYS[self.decay], Descend())


@dataclass(frozen=True, kw_only=True)
class Sophia(Recipe):
    """What both forms of Sophia share."""

    lr: float = hyper(4e-4, ge=0, help="learning rate: the longest step of an element; about 0.8 of AdamW's")
    betas: tuple[float, float] = hyper((0.965, 0.99), ge=0, lt=1, help="memory of the gradient and of the diagonal")
    gamma: float = hyper(0.01, ge=0, help="factor on the diagonal; more clips fewer elements, 50 to 90 % is usual")
    eps: float = hyper(1e-12, gt=0, help="least divisor")
    weight_decay: float = hyper(0.2, ge=0, help="decay; lr * weight_decay is taken off in a step")
    hessian_frequency: int = hyper(10, ge=1, help="steps between two estimates")
    decay: str = decay_kind()


@recipe(
    "sophia_h",
    paper="Liu et al. 2023, arXiv:2305.14342",
    family="curvature",
    use="language models, by the diagonal of the Hessian every ten steps",
    avoid="losses whose second derivative is not defined in the kernels used",
    start="0.8 of AdamW's lr, betas (0.965, 0.99), decay 0.2",
)
@dataclass(frozen=True, kw_only=True)
class SophiaH(Sophia):
    """Momentum over the Hessian's diagonal, clipped element by element, with a product ``H z`` every tenth step.

    ``h`` averages ``z * (H z)``; ``p <- p - lr clip(m / max(gamma h, eps), 1)``. In the steps for which
    ``optimizer.due()`` holds call ``optimizer.hessian_pass(loss)`` before ``loss.backward()``, or always
    ``step(objective)`` with an ``Objective`` of ``guided_descent.solvers``. ``audit()`` counts ``clipped`` elements of
    ``measured`` ones.
    """

    probe: str = static("normal", of=("normal", "rademacher"), help="z: normal as in the paper, or +-1 with less noise")

    def parts(self, block: Block) -> Parts:
        """Clipped direction, decay, step."""
        return Parts(ClippedNewton(estimate=self.probe), DECAYS[self.decay], Descend())


@recipe(
    "sophia_g",
    paper="Liu et al. 2023, arXiv:2305.14342",
    family="curvature",
    use="classification and language models, by sampled labels every ten steps",
    avoid="losses that no label can be drawn from",
    start="0.8 of AdamW's lr, rho 0.04, decay 0.2",
)
@dataclass(frozen=True, kw_only=True)
class SophiaG(Sophia):
    """Momentum over the diagonal of the Gauss-Newton matrix, clipped element by element, with drawn labels.

    ``h`` averages ``g'^2``, the squared gradient at labels drawn from the model every tenth step, B of them;
    ``p <- p - lr clip(m / max(gamma B h, eps), 1)``. Built from a model with ``loss="cross_entropy"`` it draws by
    itself in the forward pass; otherwise call ``optimizer.curvature_pass(out, "cross_entropy")`` where
    ``optimizer.due()`` holds. ``audit()`` counts ``clipped`` elements of ``measured`` ones.
    """

    samples_labels: ClassVar[bool] = True
    gamma: float = hyper(0.04, ge=0, help="factor on the diagonal; more clips fewer elements, 50 to 90 % is usual")

    def parts(self, block: Block) -> Parts:
        """Clipped direction, decay, step."""
        return Parts(ClippedNewton(estimate="labels"), DECAYS[self.decay], Descend())
