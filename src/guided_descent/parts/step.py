"""Weight decay and the step itself: the only parts that write parameters, through ``x.w``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, State
from guided_descent.parts.rows import Number, Rows
from guided_descent.routing.roles import Block


def writable(x: Batch) -> Rows:
    """The parameters that a part in a writing slot may change; an error anywhere else."""
    if x.w is None:
        raise RuntimeError("parameters can be written only in the slots decay_before, step and decay_after")
    return x.w


@dataclass(frozen=True)
class L2(Part):
    """Coupled decay: ``u <- u + wd p``, before any moment sees the gradient."""

    slot: ClassVar[str] = "decay_gradient"
    weight_decay: str = "weight_decay"

    @property
    def keys(self) -> tuple[str, ...]:
        """Group keys it reads."""
        return (self.weight_decay,)

    def idle(self, h: Hyper) -> bool:
        """Nothing to do at zero decay."""
        return not isinstance(h[self.weight_decay], Tensor) and h[self.weight_decay] == 0

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Add the decay to the gradient."""
        if x.wd_scale:
            x.take().add_(x.p, alpha=_times(h[self.weight_decay], x.wd_scale))


@dataclass(frozen=True)
class Decoupled(Part):
    """Decoupled decay: ``p <- p (1 - lr wd)``, with the learning rate of the group and no shape rule.

    With ``independent`` the factor is ``1 - (lr / lr_peak) wd``: the decay follows the schedule and not the size of the
    learning rate. ``lr_peak`` is ``initial_lr`` where a scheduler has set it, else the learning rate that the group was
    made with. Source: Loshchilov and Hutter 2017, 1711.05101 (the paper's form is the independent one).
    """

    slot: ClassVar[str] = "decay_before"
    weight_decay: str = "weight_decay"
    lr: str = "lr"
    independent: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """Group keys it reads."""
        return (self.weight_decay, self.lr)

    def idle(self, h: Hyper) -> bool:
        """Nothing to do at zero decay."""
        return not isinstance(h[self.weight_decay], Tensor) and h[self.weight_decay] == 0

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Shrink the parameters."""
        if not x.wd_scale:
            return
        rate: Number = h[self.lr]
        if self.independent:
            rate = _share(rate, h.get("initial_lr", h["peak_lr"]))
        decay = _times(rate * h[self.weight_decay], x.wd_scale)
        writable(x).mul_([1 - each for each in decay] if isinstance(decay, list) else 1 - decay)


def _times(number: Number, scale: float | list[float]) -> Number | list[Number]:
    return [number * each for each in scale] if isinstance(scale, list) else number * scale


def _share(rate: Number, peak: Number) -> Number:
    """The learning rate as a part of its peak; 0 where both are 0."""
    if isinstance(peak, Tensor):
        return rate / torch.where(peak == 0, torch.inf, peak)
    if peak == 0 and rate != 0:
        raise ValueError(
            f"decay='independent' is in units of the peak learning rate, which was 0 when the optimizer was built, and "
            f"lr is now {float(rate)}: build with the peak learning rate and let a scheduler warm it up"
        )
    return rate / peak if peak else 0.0


@dataclass(frozen=True)
class Descend(Part):
    """The additive step: ``p <- p - lr u``."""

    slot: ClassVar[str] = "step"
    lr: str = "lr"

    @property
    def keys(self) -> tuple[str, ...]:
        """Group keys it reads."""
        return (self.lr,)

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Subtract the direction, scaled."""
        writable(x).add_(x.u, alpha=-(h[self.lr] * x.lr_scale * x.factor))

    def flops(self, block: Block) -> float:
        """Two per element."""
        return 2.0 * block.numel


@dataclass(frozen=True)
class Displace(Part):
    """The step of a direction that holds its learning rate: ``p <- p - u``."""

    slot: ClassVar[str] = "step"

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Subtract the direction."""
        writable(x).add_(x.u, alpha=-x.factor)

    def flops(self, block: Block) -> float:
        """Two per element."""
        return 2.0 * block.numel
