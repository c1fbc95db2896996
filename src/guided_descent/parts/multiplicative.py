"""Multiplicative steps, in the place of ``Descend``: weights change by a share of themselves and keep their signs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, Slot, State, Unit, key
from guided_descent.parts.rows import Number, Rows
from guided_descent.parts.step import StepRule, writable
from guided_descent.routing.roles import Block

#: The one scratch beside the direction, by the same name for all parts of this file, so that it is held once.
BESIDE = "beside"


@dataclass(frozen=True)
class MAbs(StepRule):
    """M_ABS: ``p <- p - lr_out |p| tanh(lr_in u)``, with ``lr_out = lr lr_out_scale``.

    No weight changes by more than the share ``lr_out`` of itself; below 1 none changes its sign, and a weight of 0
    stays 0. A scalar factor of the direction, such as the bias correction of Adam's momentum, is outside tanh and
    multiplies ``lr_out``. Source: Kirtas, Passalis and Tefas 2023, 2307.07189.
    """

    inner: str = key("lr_in")
    outer: str = key("lr_out_scale")

    def squashed(self, x: Batch, h: Hyper) -> Rows:
        """``tanh(lr_in u)`` in the place of the direction."""
        return x.own().mul_(h[self.inner]).tanh_()

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Take off a share of each weight."""
        w = writable(x)
        sizes = x.spare(BESIDE).copy_(w).abs_()
        w.addcmul_(sizes, self.squashed(x, h), -(self.rate(x, h) * h[self.outer]))

    def flops(self, block: Block) -> float:
        """About 6 per element."""
        return 6.0 * block.numel


@dataclass(frozen=True)
class MSpow(MAbs):
    """M_SPOW: ``p <- p 2^(-sign(p) lr_out tanh(lr_in u))``, with ``lr_out = lr lr_out_scale``.

    Signs are kept at every rate, and a weight of 0 stays 0. Source: Kirtas, Passalis and Tefas 2023, 2307.07189.
    """

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Multiply by a power of 2."""
        _powers(writable(x), self.squashed(x, h), x, self.rate(x, h) * h[self.outer] * math.log(2))

    def flops(self, block: Block) -> float:
        """About 8 per element."""
        return 8.0 * block.numel


@dataclass(frozen=True)
class HAbs(MAbs):
    """H_ABS: ``p <- p - gamma lr_out |p| tanh(lr_in u) - (1 - gamma) lr u``, with ``lr_out = lr lr_out_scale``.

    A mixture of the multiplicative and the additive step: ``gamma`` 1 is M_ABS and 0 is ``Descend``, to the bit.
    Source: Kirtas, Passalis and Tefas 2023, 2307.07189.
    """

    gamma: str = key("gamma")

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Take off a share of each weight and a share of the direction."""
        gamma, w = h[self.gamma], writable(x)
        sizes = x.spare(BESIDE).copy_(w).abs_()
        x.add_to(w, -(self.rate(x, h) * (1 - gamma)))
        if isinstance(gamma, Tensor) or gamma > 0:
            w.addcmul_(sizes, self.squashed(x, h), -(self.rate(x, h) * h[self.outer] * gamma))

    def flops(self, block: Block) -> float:
        """About 8 per element."""
        return 8.0 * block.numel


#: The multiplicative step rules, by the names that recipes give them.
RULES: dict[str, StepRule] = {"m_abs": MAbs(), "m_spow": MSpow(), "h_abs": HAbs()}


@dataclass(frozen=True)
class BoundedRatio(Part):
    """Madam's direction: the gradient over the root of its mean square, ``u <- clip(u / sqrt(v / bc), +- g_bound)``.

    ``v <- beta v + (1 - beta) u^2``, ``bc = 1 - beta^t``; an element that has seen no gradient is 0. State:
    ``exp_avg_sq``. Source: Bernstein et al. 2020, 2006.14560.
    """

    beta: str = key("beta")
    bound: str = key("g_bound")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The mean square."""
        return {"exp_avg_sq": Slot()}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the mean square, divide, bound."""
        beta, g = h[self.beta], x.read()
        square = s["exp_avg_sq"].mul_(beta).addcmul_(g, g, 1 - beta)
        root = x.spare(BESIDE).copy_(square).div_(1 - beta**x.step).sqrt_()
        tiny = torch.finfo(root.list[0].dtype).tiny
        x.take().div_(root.clamp_(tiny)).clamp_(-h[self.bound], h[self.bound])

    def flops(self, block: Block) -> float:
        """About 8 per element."""
        return 8.0 * block.numel


@dataclass(frozen=True)
class Exponential(StepRule):
    """Madam's step: ``p <- p exp(-lr sign(p) u)``, then ``|p| <= p_scale r`` with r the tensor's first RMS.

    Signs are kept, and a weight of 0 stays 0. State: ``first_rms``, one number. Source: Bernstein et al. 2020,
    2006.14560.
    """

    unit: ClassVar[Unit] = "block"
    bound: str = key("p_scale")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The root mean square of the weights before the first update."""
        return {"first_rms": Slot("factor", ())}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Multiply and bound."""
        w, first = writable(x), s["first_rms"]
        if x.first:
            counts = torch.tensor([max(row.numel(), 1) for row in w.list], dtype=first.dtype, device=first.device)
            first.copy_(w.norms() / counts.sqrt())
        _powers(w, x.own(), x, self.rate(x, h))
        for row, limit in zip(w.list, (first * h[self.bound]).unbind()):
            row.clamp_(-limit, limit)

    def flops(self, block: Block) -> float:
        """About 8 per element."""
        return 8.0 * block.numel


def _powers(w: Rows, exponent: Rows, x: Batch, rate: Number) -> None:
    """``w <- w exp(-rate sign(w) exponent)``; without the rounding of a power close to 1."""
    exponent.mul_(x.spare(BESIDE).copy_(w).sign_()).mul_(-rate).expm1_()
    w.addcmul_(w, exponent)
