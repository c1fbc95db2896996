"""Directions whose length is set tensor by tensor, or for the whole model, by norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, Slot, State, Unit, key
from guided_descent.parts.decay import L2
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class LarsRatio(Part):
    """LARS: coupled decay, and a learning rate for each tensor that is proportional to its norm.

    ``lam = eta ||p|| / (||u|| + wd ||p|| + eps)``, or 1 where ``||p||`` or ``||u||`` is 0; ``u <- lam (u + wd p)``.
    With ``clip`` it is ``min(lam / lr, 1)``, so that lr is the largest rate and no tensor exceeds it (LARC). Source:
    You, Gitman and Ginsburg 2017, 1708.03888.
    """

    unit: ClassVar[Unit] = "block"
    eta: str = key("trust_coefficient")
    weight_decay: str = key("weight_decay")
    eps: str = key("eps")
    lr: str = key("lr")
    clip: bool = False

    @property
    def reads_parameter(self) -> bool:
        """For its norm and the decay."""
        return True

    def lengths(self, x: Batch, s: State) -> Tensor:
        """The norm of each gradient [rows]."""
        return x.read().norms()

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Measure, add the decay, scale."""
        weight, gradient = x.p.norms(), self.lengths(x, s)
        scale = torch.tensor(x.wd_scale, dtype=weight.dtype, device=weight.device)
        ratio = h[self.eta] * weight / (gradient + h[self.weight_decay] * scale * weight + h[self.eps])
        if self.clip:
            ratio = (ratio / h[self.lr]).clamp(max=1.0)
        ratio = torch.where((weight > 0) & (gradient > 0), ratio, 1.0)
        L2(self.weight_decay).update(x, s, h, total)
        x.take().mul_(x.by_row(ratio))

    def flops(self, block: Block) -> float:
        """About 7 per element."""
        return 7.0 * block.numel


@dataclass(frozen=True)
class TrustRatio(Part):
    """LAMB's trust ratio: ``u <- ||p|| / ||u|| u`` for each tensor; where a norm is 0 the direction stays.

    ``clip`` bounds the ratio by 1. Source: You et al. 2019, 1904.00962.
    """

    slot: ClassVar[str] = "scale"
    unit: ClassVar[Unit] = "block"
    clip: bool = False

    @property
    def reads_parameter(self) -> bool:
        """For its norm."""
        return True

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Measure and scale."""
        u = x.take()
        weight, length = x.p.norms(), u.norms()
        ratio = torch.where((weight > 0) & (length > 0), weight / length, 1.0)
        u.mul_(x.by_row(ratio.clamp(max=1.0) if self.clip else ratio))

    def flops(self, block: Block) -> float:
        """About 5 per element."""
        return 5.0 * block.numel


@dataclass(frozen=True)
class NormMoments(Part):
    """NovoGrad's direction: the momentum of gradients over the average norm of their tensor, decay included.

    ``v <- b2 v + (1 - b2) ||u||^2``, the first v being the first square; ``m <- b1 m + u / (sqrt(v) + eps) + wd p``;
    ``u <- m``. State: ``exp_avg``, and ``norm_sq``, one number. Source: Ginsburg et al. 2019, 1905.11286.
    """

    unit: ClassVar[Unit] = "block"
    betas: str = key("betas")
    eps: str = key("eps")
    weight_decay: str = key("weight_decay")

    @property
    def reads_parameter(self) -> bool:
        """For the decay."""
        return True

    def slots(self, block: Block) -> dict[str, Slot]:
        """The momentum, and the averaged square of the norm."""
        return {"exp_avg": Slot(packs="signed"), "norm_sq": Slot("factor", ())}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the norm, divide, decay, accumulate."""
        beta1, beta2 = h[self.betas]
        square, average = x.read().norms().square(), s["norm_sq"]
        square = square.to(average.dtype)
        average.copy_(square if x.first else average.lerp(square, 1 - beta2))
        x.take().mul_(x.by_row(1 / (average.sqrt() + h[self.eps] * x.eps_scale)))
        L2(self.weight_decay).update(x, s, h, total)
        x.lend(s["exp_avg"].mul_(beta1).add_(x.u))

    def flops(self, block: Block) -> float:
        """About 7 per element."""
        return 7.0 * block.numel


@dataclass(frozen=True)
class Normalize(Part):
    """The direction over its length: ``u <- u / ||u||`` of the whole model, or tensor by tensor; 0 stays 0.

    The length of the model is summed over all groups and ranks that have this part. Source: Cutkosky and Mehta 2020,
    2002.03305.
    """

    slot: ClassVar[str] = "scale"
    unit: ClassVar[Unit] = "block"

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        """The squared length."""
        return {"square": x.u.norms().double().square().sum() * x.factor**2}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Divide by the length."""
        length = float(total["square"].sqrt())
        x.scale(1 / length if length > 0 else 0.0)

    def flops(self, block: Block) -> float:
        """About 2 per element."""
        return 2.0 * block.numel


@dataclass(frozen=True)
class NormalizeEach(Part):
    """The direction of each tensor over its own length: ``u <- u / ||u||``; 0 stays 0."""

    slot: ClassVar[str] = "scale"
    unit: ClassVar[Unit] = "block"

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Measure and divide."""
        u = x.take()
        length = u.norms()
        u.mul_(x.by_row(torch.where(length > 0, 1 / length, 0.0)))

    def flops(self, block: Block) -> float:
        """About 3 per element."""
        return 3.0 * block.numel
