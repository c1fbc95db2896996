"""Weight decay: coupled to the gradient, or beside the direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, State, key
from guided_descent.parts.rows import Number
from guided_descent.parts.step import writable
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class L2(Part):
    """Coupled decay: ``u <- u + wd p``, before any moment sees the gradient."""

    slot: ClassVar[str] = "decay_gradient"
    weight_decay: str = key("weight_decay")

    @property
    def reads_parameter(self) -> bool:
        """As the decay."""
        return True

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
    made with. With ``corrected`` it is ``1 - (lr / lr_peak) lr wd``, under which the size of normalised weights stays
    the same along a schedule. Source: Loshchilov and Hutter 2017, 1711.05101 (the paper's form is the independent one);
    Defazio 2025, 2506.02285 (corrected). Where a part finds the learning rate itself, lr is lr times ``x.rate``, and
    the independent decay stays as it is.
    """

    slot: ClassVar[str] = "decay_before"
    weight_decay: str = key("weight_decay")
    lr: str = key("lr")
    independent: bool = False
    corrected: bool = False

    def idle(self, h: Hyper) -> bool:
        """Nothing to do at zero decay."""
        return not isinstance(h[self.weight_decay], Tensor) and h[self.weight_decay] == 0

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Shrink the parameters."""
        if x.wd_scale:
            decay = self.share(x, h)
            writable(x).mul_([1 - each for each in decay] if isinstance(decay, list) else 1 - decay)

    def share(self, x: Batch, h: Hyper) -> Number | list[Number]:
        """The share of the parameters that is taken off: one number, or one for each row."""
        rate: Number = h[self.lr]
        if self.independent or self.corrected:
            relative = _share(rate, h.get("initial_lr", h["peak_lr"]))
            rate = relative * rate * x.rate if self.corrected else relative
        else:
            rate = rate * x.rate
        return _times(rate * h[self.weight_decay], x.wd_scale)


@dataclass(frozen=True)
class CautiousDecay(Decoupled):
    """Decoupled decay of the elements that the step makes smaller anyway: ``p <- p - lr wd p [u p > 0]``.

    Source: Chen et al. 2025, 2510.12402.
    """

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Shrink them."""
        if not x.wd_scale:
            return
        decay, w = self.share(x, h), writable(x)
        shrinking = x.spare("decay").copy_(w).mul_(x.u).positive_()
        w.addcmul_(shrinking, w, [-each for each in decay] if isinstance(decay, list) else -decay)

    def flops(self, block: Block) -> float:
        """Four per element."""
        return 4.0 * block.numel


@dataclass(frozen=True)
class FrankWolfe(Part):
    """The share of the old point in a step of Frank and Wolfe, ``p <- (1 - lr) p``.

    With a step ``- lr rho lmo(u)`` after it, the new point is a mean of the old one and of one on the ball of radius
    rho: a ball that has been entered is never left, for ``lr`` in [0, 1].
    """

    slot: ClassVar[str] = "decay_before"
    lr: str = key("lr")

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Shrink the parameters."""
        writable(x).mul_(1 - h[self.lr])


#: The kinds of decay beside the direction, by the names that recipes give them.
DECAYS: dict[str, Part] = {
    "decoupled": Decoupled(),
    "independent": Decoupled(independent=True),
    "corrected": Decoupled(corrected=True),
    "cautious": CautiousDecay(),
}
#: The coupled kind too.
ALL_DECAYS: dict[str, Part] = {"coupled": L2(), **DECAYS}


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
