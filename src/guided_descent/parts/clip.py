"""Clipping of updates by the length that a curvature gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, State
from guided_descent.parts.damping import inner
from guided_descent.parts.rows import Number
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class KlClip(Part):
    """Scale all layers by ``nu = min(1, sqrt(kappa / |sum lr^2 <Ghat, G>|))``.

    Ghat is the preconditioned gradient and G the gradient, so that the sum, over all layers, groups and ranks that have
    this part and in float64, is about twice the change that the step makes in KL divergence. With ``signed`` a sum that
    is not positive is left alone, which is the norm constraint of kfac-jax: it differs only where coupled decay turns
    Ghat against G. ``coupled`` names the key of a coupled decay, which then counts as a part of G. Source: Ba, Grosse
    and Martens 2017; kfac-pytorch; kfac-jax.
    """

    slot: ClassVar[str] = "scale"
    kappa: str = "kl_clip"
    lr: str = "lr"
    signed: bool = False
    coupled: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """Group keys it reads."""
        return (self.kappa, self.lr, *([self.coupled] if self.coupled else []))

    def idle(self, h: Hyper) -> bool:
        """Nothing to do without a bound."""
        return h[self.kappa] is None

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        """``lr^2 <Ghat, G>``."""
        rate: Number = h[self.lr] * x.lr_scale
        product = inner(x.u.list, x.g.list)
        if self.coupled:
            decay = h[self.coupled]
            scales = x.wd_scale if isinstance(x.wd_scale, list) else [x.wd_scale] * len(x.u)
            for u, p, scale in zip(x.u.list, x.p.list, scales):
                product = product + decay * scale * torch.sum(u * p, dtype=torch.float64)
        return {"kl": product * (rate * rate * x.factor)}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Shorten the direction."""
        kl = total["kl"] if self.signed else total["kl"].abs()
        ratio = h[self.kappa] / torch.where(kl > 0, kl, torch.inf)
        nu = torch.where(kl > 0, ratio.sqrt().clamp(max=1.0), 1.0)
        x.scale(float(nu))
        if float(nu) < 1:
            x.tick("clipped")

    def flops(self, block: Block) -> float:
        """Two per element."""
        return 2.0 * block.numel
