"""Parts that look at the signs of the gradient before the step: for any recipe, with ``add=[...]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, State, Unit
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class Cautious(Part):
    """Leave out the elements that would move against their gradient: ``u <- u c / max(mean(c), 1e-3)``.

    ``c = [u g > 0]``, its mean being that of a tensor, so that the step keeps its length on average. Works on every
    recipe: ``gd.AdamW(model, add=[gd.parts.Cautious()])``. Source: Liang et al. 2024, 2411.16085.
    """

    slot: ClassVar[str] = "mask"
    unit: ClassVar[Unit] = "block"
    floor: float = 1e-3

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Mask and scale, tensor by tensor."""
        mask = x.spare("mask").copy_(x.u).mul_(x.g).positive_()
        shares = torch.stack([row.mean() if row.numel() else row.new_ones(()) for row in mask.list])
        x.take().mul_(mask).mul_(x.by_row(1 / shares.clamp(min=self.floor)))

    def flops(self, block: Block) -> float:
        """About 5 per element."""
        return 5.0 * block.numel


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
