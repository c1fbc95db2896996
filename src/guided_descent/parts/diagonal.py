"""Methods that divide by an estimate of the curvature's diagonal: AdaHessian and Sophia."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, Slot, State, Unit, key
from guided_descent.parts.rows import Rows
from guided_descent.routing.roles import Block, Role


class Curved(Part):
    """What they share: when an estimate is wanted. A subclass has the field ``every``, the key of the period."""

    every: str = key()

    def observes(self, h: Hyper, step: int) -> bool:
        """Every ``hessian_frequency`` steps, beginning with the first."""
        return (step - 1) % int(h[self.every]) == 0


@dataclass(frozen=True)
class HessianMoments(Curved):
    """AdaHessian's direction: Adam's with the Hessian's diagonal in the place of the gradient that is squared.

    ``D = z * (H z)`` with a random z of +-1; ``m <- b1 m + (1 - b1) u``, and in the steps with a new D
    ``v <- b2 v + (1 - b2) D^2``; ``u <- (m / bc1) / ((v / bc2)^(power / 2) + eps)`` with ``bc2 = 1 - b2^n`` after n
    estimates. With ``spatial`` the D of a convolution is the mean of ``|D|`` over each kernel. Before its first
    estimate a tensor does not move. State: ``exp_avg``, ``exp_hessian_sq`` and ``hessians``, the number n. Source: Yao
    et al. 2020, 2006.00719.
    """

    unit: ClassVar[Unit] = "block"
    betas: str = key("betas")
    eps: str = key("eps")
    every: str = key("hessian_frequency")
    power: float = 1.0
    spatial: bool = True

    @property
    def curvature(self) -> str:
        """Products with probes of +-1."""
        return "rademacher"

    def slots(self, block: Block) -> dict[str, Slot]:
        """Both moments, and the number of estimates."""
        return {"exp_avg": Slot(), "exp_hessian_sq": Slot(), "hessians": Slot("factor", (), torch.float64)}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance both moments and divide."""
        beta1, beta2 = h[self.betas]
        first, second, count = s["exp_avg"].lerp_(x.read(), 1 - beta1), s["exp_hessian_sq"], s["hessians"]
        if x.curvature is not None:
            d = self.averaged(x, x.curvature)
            second.mul_(beta2).addcmul_(d, d, 1 - beta2)
            count.add_(1)
        known = count > 0
        u = x.fresh().copy_(second).div_(x.by_row(torch.where(known, 1 - beta2**count, 1.0)))
        u.sqrt_() if self.power == 1 else u.apply_(lambda row: row.pow_(self.power / 2))
        u.add_(h[self.eps] * x.eps_scale).rdiv_(first).mul_(x.by_row(known.to(count.dtype) / (1 - beta1**x.step)))

    def averaged(self, x: Batch, d: Rows) -> Rows:
        """The means of ``|D|`` over the kernels of convolutions; other tensors as they are."""
        if not self.spatial:
            return d
        for row, block in zip(d.list, x.blocks):
            if block.role in (Role.CONV, Role.DEPTHWISE) or (block.role is Role.OTHER and row.ndim == 4):
                row.copy_(row.abs().mean(tuple(range(2, row.ndim)), keepdim=True).expand_as(row))
        return d

    def flops(self, block: Block) -> float:
        """About 14 per element, products with the Hessian excluded."""
        return 14.0 * block.numel


@dataclass(frozen=True)
class ClippedNewton(Curved):
    """Sophia's direction: momentum over the curvature's diagonal, no element longer than 1.

    ``m <- b1 m + (1 - b1) u``, in the steps with a new estimate ``h <- b2 h + (1 - b2) h'``, then
    ``u <- clip(m / max(gamma h, eps), 1)``: a sign where the curvature is small, negative or not yet known. The
    estimate is ``h' = z * (H z)`` with a normal z or one of +-1 (Sophia-H), or with ``labels`` the square of the
    gradient at B labels drawn from the model, and h times B in its use (Sophia-G). Steps with a new estimate count
    ``clipped`` elements and all ``measured`` ones in the audit. State: ``exp_avg``, ``hessian``; with labels B as
    ``labels``, one for all groups. Source: Liu et al. 2023, 2305.14342.
    """

    joint: ClassVar[bool] = True
    betas: str = key("betas")
    gamma: str = key("gamma")
    eps: str = key("eps")
    every: str = key("hessian_frequency")
    estimate: str = "normal"

    @property
    def curvature(self) -> str:
        """As ``estimate`` says."""
        return self.estimate

    def slots(self, block: Block) -> dict[str, Slot]:
        """The momentum, the diagonal, and the number of labels."""
        labels = {"labels": Slot("group", (), torch.float64)} if self.estimate == "labels" else {}
        return {"exp_avg": Slot(basis="vector"), "hessian": Slot(basis="square"), **labels}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance both averages, divide and clip."""
        beta1, beta2 = h[self.betas]
        first, curvature, found = s["exp_avg"].lerp_(x.read(), 1 - beta1), s["hessian"], x.curvature
        scale = h[self.gamma]
        if self.estimate == "labels":
            if found is not None:
                curvature.mul_(beta2).addcmul_(found, found, 1 - beta2)
                s["labels"].fill_(x.labels)
            scale = scale * (s["labels"] if isinstance(x.step, Tensor) else float(s["labels"]))
        elif found is not None:
            curvature.lerp_(found, 1 - beta2)
        u = x.fresh().copy_(curvature).mul_(scale).clamp_(h[self.eps] * x.eps_scale).rdiv_(first).clamp_(-1.0, 1.0)
        if found is not None:
            x.tick("clipped", torch.stack([(row.abs() == 1).sum() for row in u.list]).tolist())
            x.tick("measured", [row.numel() for row in u.list])

    def flops(self, block: Block) -> float:
        """About 8 per element, estimates excluded."""
        return 8.0 * block.numel
