"""Parts that look at the signs of the gradient before the step: for any recipe, with ``add=[...]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, State, Unit, key
from guided_descent.parts.numbers import hyper
from guided_descent.parts.wrapper import Wrapper, wrapper
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class GradientMask(Part):
    """Leave out the elements that would move against their gradient: ``u <- u c / max(mean(c), floor)``.

    ``c = [u g > 0]``, its mean being that of a tensor, so that the step keeps its length on average. Source: Liang et
    al. 2024, 2411.16085.
    """

    slot: ClassVar[str] = "mask"
    unit: ClassVar[Unit] = "block"
    floor: str = key("cautious_floor")

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Mask and scale, tensor by tensor."""
        mask = x.spare("mask").copy_(x.u).mul_(x.g).positive_()
        shares = torch.stack([row.mean() if row.numel() else row.new_ones(()) for row in mask.list])
        x.take().mul_(mask).mul_(x.by_row(1 / shares.clamp(min=h[self.floor])))

    def flops(self, block: Block) -> float:
        """About 5 per element."""
        return 5.0 * block.numel


@wrapper(
    "cautious",
    paper="Liang et al. 2024, arXiv:2411.16085",
    use="a trial on any tuned recipe with momentum, at no memory",
    avoid="directions that already are signs of the gradient",
)
@dataclass(frozen=True, kw_only=True)
class Cautious(Wrapper):
    """Leave out the elements of a recipe's step that would move against their gradient.

    ``u <- u c / max(mean(c), floor)`` with ``c = [u g > 0]``, tensor by tensor, before any decay beside the step.
    """

    floor: float = hyper(1e-3, gt=0, le=1, help="least share of kept elements that the step is divided by")

    def part(self) -> Part:
        """The mask."""
        (floor,) = self.numbers()
        return GradientMask(floor=floor)


@dataclass(frozen=True)
class GradientSigns(Part):
    """Keep the sizes of a direction and give it the signs of the gradient: ``u <- |u| sign(g)``.

    Source: Cao, Li and Song 2024, 2412.17107.
    """

    slot: ClassVar[str] = "mask"

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Replace the signs."""
        x.take().abs_().mul_(x.spare("signs").copy_(x.g).sign_())

    def flops(self, block: Block) -> float:
        """About 3 per element."""
        return 3.0 * block.numel
