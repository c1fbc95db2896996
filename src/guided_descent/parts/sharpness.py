"""Sharpness-aware minimisation: gradients where the loss nearby is highest. For any recipe, with ``add=[...]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Needs, Part, State, key
from guided_descent.parts.numbers import hyper
from guided_descent.parts.rows import Rows
from guided_descent.parts.wrapper import Wrapper, wrapper
from guided_descent.routing.roles import Block

#: Added to the length of the gradient, so that none of 0 is divided by.
TINY = 1e-12


@dataclass(frozen=True)
class Ascent(Part):
    """SAM: the gradient is taken at ``p + rho g / (||g|| + 1e-12)``, the norm being that of the whole model.

    The parameters come back to the bit and everything else works on the new gradient. Two evaluations a step. Source:
    Foret et al. 2020, 2010.01412.
    """

    slot: ClassVar[str] = "clip"
    needs: ClassVar[Needs] = Needs(evaluations=2)
    rho: str = key("sam_rho")

    def stretch(self, x: Batch, h: Hyper) -> Rows:
        """``T g``, where T measures the neighbourhood: the identity here."""
        return x.g

    def climb(self, x: Batch, h: Hyper) -> None:
        """``T^2 g`` as the direction."""

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        """``||T g||^2``."""
        return {"square": self.stretch(x, h).norms().double().square().sum()}

    def probe(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """The way to the highest point of the neighbourhood, to first order."""
        self.climb(x, h)
        x.scale(h[self.rho] / (float(total["square"].sqrt()) + TINY))

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Nothing: the gradient is that of the probe."""

    def flops(self, block: Block) -> float:
        """About 5 per element, without the second evaluation."""
        return 5.0 * block.numel


@dataclass(frozen=True)
class ScaledAscent(Ascent):
    """ASAM: a neighbourhood in proportion to the weights, ``p + rho T^2 g / (||T g|| + 1e-12)``, ``T = |p| + eta``.

    So the point does not depend on how a rescaling spreads the weights over layers. Source: Kwon et al. 2021,
    2102.11600.
    """

    rho: str = key("asam_rho")
    eta: str = key("asam_eta")

    @property
    def reads_parameter(self) -> bool:
        """As the size of the neighbourhood."""
        return True

    def stretch(self, x: Batch, h: Hyper) -> Rows:
        """``T g``, in scratch."""
        return x.fresh().copy_(x.p).abs_().add_(h[self.eta]).mul_(x.g)

    def climb(self, x: Batch, h: Hyper) -> None:
        """``T (T g)``."""
        self.stretch(x, h).mul_(x.spare("scale").copy_(x.p).abs_().add_(h[self.eta]))


@wrapper(
    "sam",
    paper="Foret et al. 2020, arXiv:2010.01412",
    use="generalisation of vision models at twice the cost",
    avoid="large batches on one replica, and loops with a GradScaler",
)
@dataclass(frozen=True, kw_only=True)
class SAM(Wrapper):
    """Sharpness-aware minimisation of any recipe: the gradient of the worst point within rho, for flat minima.

    ``g <- grad L(p + rho g / ||g||)``, the norm being that of the whole model. A step evaluates twice:
    ``optimizer.step(closure)`` with a closure that clears the gradients, computes the loss, calls backward and returns
    the loss; a ``GradScaler`` cannot do that. Running statistics and other buffers count the first pass alone, where
    the optimizer was built from the model. Under ``DistributedDataParallel`` the first gradient is the mean of all
    ranks, and so is the point; with ``no_sync`` around the first pass it would be each rank's own, as in the paper.
    """

    rho: float = hyper(0.05, ge=0, help="distance to the point where the gradient is taken")

    def part(self) -> Part:
        """The ascent."""
        (rho,) = self.numbers()
        return Ascent(rho=rho)


@wrapper(
    "asam",
    paper="Kwon et al. 2021, arXiv:2102.11600",
    use="sam, where layers differ in scale",
    avoid="the reasons against sam hold",
)
@dataclass(frozen=True, kw_only=True)
class ASAM(Wrapper):
    """Adaptive SAM: the neighbourhood of each weight is in proportion to its size.

    ``g <- grad L(p + rho T^2 g / ||T g||)`` with ``T = |p| + eta``. Two evaluations a step, as for ``SAM``.
    """

    rho: float = hyper(0.5, ge=0, help="distance to the point where the gradient is taken, relative to the weights")
    eta: float = hyper(0.01, ge=0, help="added to the size of each weight")

    def part(self) -> Part:
        """The ascent."""
        rho, eta = self.numbers()
        return ScaledAscent(rho=rho, eta=eta)
