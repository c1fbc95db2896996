"""Directions divided by what each element's own gradients have been: the diagonal methods around Adam."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, Slot, State, key
from guided_descent.parts.estimate import Moments
from guided_descent.parts.rows import Number, Rows
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class SquareSum(Part):
    """Adagrad's direction: ``G <- G + u^2``, ``u <- u / (sqrt(G) + eps)``.

    State: ``sum``, shaped like the parameter, ``start`` at first. Source: Duchi, Hazan and Singer 2011.
    """

    eps: str = key("eps")
    start: float = 0.0

    def slots(self, block: Block) -> dict[str, Slot]:
        """The sum of squares."""
        return {"sum": Slot(fill=self.start, basis="square", packs="unsigned")}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Add the squares and divide."""
        g = x.read()
        total_square = s["sum"].addcmul_(g, g)
        x.over(g, x.spare("denominator").root_of_(total_square).add_(h[self.eps] * x.eps_scale))

    def flops(self, block: Block) -> float:
        """About 5 per element."""
        return 5.0 * block.numel


@dataclass(frozen=True)
class SquareAverage(Part):
    """RMSProp's direction: ``v <- alpha v + (1 - alpha) u^2``, ``u <- u / (sqrt(v) + eps)``, without bias correction.

    With ``centered`` the divisor is made of the variance, ``max(v - a^2, 0)`` with ``a <- alpha a + (1 - alpha) u``.
    With ``inside`` it is ``sqrt(v + eps)``. ``v`` begins at ``start``; from 0 the first steps are up to
    ``1 / sqrt(1 - alpha)`` long. State: ``square_avg`` (and ``grad_avg``). Source: Tieleman and Hinton 2012; Graves
    2013, 1308.0850 (centered).
    """

    alpha: str = key("alpha")
    eps: str = key("eps")
    centered: bool = False
    inside: bool = False
    start: float = 0.0

    def slots(self, block: Block) -> dict[str, Slot]:
        """The averages of squares and, for the variance, of gradients."""
        square = Slot(fill=self.start, basis="square", packs="unsigned")
        if not self.centered:
            return {"square_avg": square}
        return {"square_avg": replace(square, packs=""), "grad_avg": Slot(basis="vector")}  # a difference of both

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the averages and divide."""
        alpha, eps = h[self.alpha], h[self.eps] * x.eps_scale
        g, square = x.read(), s["square_avg"]
        square.mul_(alpha).addcmul_(g, g, 1 - alpha)
        root = x.spare("denominator")
        if self.centered:
            mean = s["grad_avg"].lerp_(g, 1 - alpha)
            square = root.copy_(square).addcmul_(mean, mean, -1.0).clamp_(0)  # rounding alone takes one below 0
        if self.inside:
            root.copy_(square).add_(eps).sqrt_()
        else:
            root.root_of_(square).add_(eps)
        x.over(g, root)

    def flops(self, block: Block) -> float:
        """About 6 per element, 12 where it is centered."""
        return (12.0 if self.centered else 6.0) * block.numel


@dataclass(frozen=True)
class RootRatio(Part):
    """Adadelta's direction, in units of the parameter: ``u <- sqrt(D + eps) / sqrt(v + eps) u``.

    ``v <- rho v + (1 - rho) u^2`` first, and ``D <- rho D + (1 - rho) u^2`` of the new direction last. ``eps`` sets the
    length of the first steps. State: ``square_avg``, ``acc_delta``. Source: Zeiler 2012, 1212.5701.
    """

    rho: str = key("rho")
    eps: str = key("eps")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The averages of squares, of gradients and of directions."""
        return dict.fromkeys(("square_avg", "acc_delta"), Slot(basis="square", packs="unsigned"))

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Divide by one root, multiply by the other."""
        rho, eps = h[self.rho], h[self.eps] * x.eps_scale
        g, square, moved = x.read(), s["square_avg"], s["acc_delta"]
        square.mul_(rho).addcmul_(g, g, 1 - rho)
        root, u = x.spare("denominator"), x.take()
        u.div_(root.copy_(square).add_(eps).sqrt_())
        u.mul_(root.copy_(moved).add_(eps).sqrt_())
        moved.mul_(rho).addcmul_(u, u, 1 - rho)

    def flops(self, block: Block) -> float:
        """About 14 per element."""
        return 14.0 * block.numel


@dataclass(frozen=True)
class MaximumMoments(Part):
    """Adamax's direction: the first moment over a maximum that fades, ``u <- (m / bc1) / n``.

    ``m <- b1 m + (1 - b1) u``, ``n <- max(b2 n, |u| + eps)``; only ``m`` is corrected, with ``bc1 = 1 - b1^t``. State:
    ``exp_avg``, ``exp_inf``. Source: Kingma and Ba 2014, 1412.6980, section 7.1.
    """

    betas: str = key("betas")
    eps: str = key("eps")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The first moment and the maximum, which no rotation carries along."""
        return {"exp_avg": Slot(basis="vector", packs="signed"), "exp_inf": Slot(packs="unsigned")}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance both and divide."""
        beta1, beta2 = h[self.betas]
        first = s["exp_avg"].lerp_(x.read(), 1 - beta1)
        size = x.take().abs_().add_(h[self.eps] * x.eps_scale)
        largest = s["exp_inf"].mul_(beta2).maximum_(size)
        x.fresh().copy_(largest)
        x.over(first)
        x.scale(1 / (1 - beta1**x.step))

    def flops(self, block: Block) -> float:
        """About 8 per element."""
        return 8.0 * block.numel


def rectification(step: Number, beta2: Number) -> tuple[Number, Number]:
    """``rho_t``, the number of squares that the average holds in effect, and ``r_t^2``, which shortens the step.

    ``rho_inf = 2 / (1 - b2) - 1``; ``rho_t = rho_inf - 2 t b2^t / (1 - b2^t)``; ``r_t^2 = (rho_t - 4) (rho_t - 2)
    rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t)``, which has a meaning only where ``rho_t > 4``.
    """
    limit = 2 / (1 - beta2) - 1
    power: Number = beta2**step
    rho = limit - 2 * step * power / (1 - power)
    above = (limit - 4) * (limit - 2) * rho
    if not isinstance(above, Tensor) and above == 0:
        return rho, 0.0
    return rho, (rho - 4) * (rho - 2) * limit / above


@dataclass(frozen=True)
class RectifiedMoments(Moments):
    """RAdam's direction: Adam's, shortened while the second moment rests on few squares, and without it at first.

    ``m <- b1 m + (1 - b1) u``, ``v <- b2 v + (1 - b2) u^2``; where ``rho_t > 5`` then
    ``u <- r_t (m / bc1) sqrt(bc2) / (sqrt(v) + eps)`` with ``bc = 1 - b^t``, else ``u <- m / bc1``, or 0 with ``skip``.
    See ``rectification`` for ``rho_t`` and ``r_t``. The bound is torch's; the paper's is 4. With ``b2 <= 2/3`` it is
    never reached. State: ``exp_avg``, ``exp_avg_sq``. Source: Liu et al. 2019, 1908.03265.
    """

    skip: bool = False
    bound: ClassVar[float] = 5.0

    def divide(self, x: Batch, first: Rows, second: Rows, h: Hyper, bc1: Number, root2: Number) -> None:
        """Divide where there are squares enough."""
        rho, square = rectification(x.step, h[self.betas][1])
        early: Number = (0.0 if self.skip else 1.0) / bc1
        late = root2 / bc1
        if isinstance(rho, Tensor):  # a graph for every step: both ways, and a choice
            enough = rho > self.bound
            root = x.fresh().root_of_(second).add_(h[self.eps] * x.eps_scale)
            root.apply_(lambda row: row.copy_(torch.where(enough, row, torch.ones_like(row)))).rdiv_(first)
            x.scale(torch.where(enough, square**0.5 * late, early))  # square < 0 is left out
        elif rho > self.bound:
            x.fresh().root_of_(second).add_(h[self.eps] * x.eps_scale)
            x.over(first)
            x.scale(square**0.5 * late)
        else:
            x.lend(first)
            x.scale(early)


@dataclass(frozen=True)
class SecondMoment(Moments):
    """The direction over the root of its second moment, bias-corrected: Adam's without a first moment.

    ``v <- b2 v + (1 - b2) u^2``, ``u <- u / (sqrt(v / bc2) + eps)``; with ``late`` only where ``rho_t > 4``, see
    ``rectification``, and ``u`` stays before. State: ``exp_avg_sq``, shaped like the parameter.
    """

    late: bool = False
    bound: ClassVar[float] = 4.0

    def slots(self, block: Block) -> dict[str, Slot]:
        """The second moment."""
        return {"exp_avg_sq": Slot(basis="square")}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the moment and divide."""
        g, beta2 = x.read(), h[self.betas][1]
        second = self.advance(x, g, s, h)
        rho = rectification(x.step, beta2)[0] if self.late else torch.inf
        if not isinstance(rho, Tensor) and rho <= self.bound:
            return
        root = x.beside().copy_(second).sqrt_().div_((1 - beta2**x.step) ** 0.5).add_(h[self.eps] * x.eps_scale)
        if isinstance(rho, Tensor):  # one graph for every step
            enough = rho > self.bound
            root.apply_(lambda row: row.copy_(torch.where(enough, row, torch.ones_like(row))))
        x.lend(root.rdiv_(g))

    def flops(self, block: Block) -> float:
        """About 8 per element."""
        return 8.0 * block.numel


@dataclass(frozen=True)
class BeliefMoments(Moments):
    """AdaBelief's direction: Adam's, with the distance of the gradient from its average in the place of the gradient.

    ``v <- b2 v + (1 - b2) (u - m)^2 + eps`` with the new ``m``; then as in ``Moments``. State: ``exp_avg``,
    ``exp_avg_sq``. Source: Zhuang et al. 2020, 2010.07468.
    """

    def advance(self, x: Batch, g: Rows, s: State, h: Hyper) -> Rows:
        """Average the squared distances; eps stays in the average."""
        beta2 = h[self.betas][1]
        away = x.take().add_(s["exp_avg"], alpha=-1.0)  # the gradient is used no more
        second: Rows = s["exp_avg_sq"].mul_(beta2).addcmul_(away, away, 1 - beta2)
        return second.add_(h[self.eps] * x.eps_scale)


@dataclass(frozen=True)
class YogiMoments(Moments):
    """Yogi's direction: Adam's, with a second moment that moves by at most ``(1 - b2) u^2`` in a step.

    ``v <- v - (1 - b2) sign(v - u^2) u^2``; then as in ``Moments``. ``v`` begins at ``start``. State:
    ``exp_avg``, ``exp_avg_sq``. Source: Zaheer et al. 2018, NeurIPS.
    """

    start: float = 1e-6

    def slots(self, block: Block) -> dict[str, Slot]:
        """Both moments."""
        second = Slot(fill=self.start, basis="square", packs="unsigned")
        return {"exp_avg": Slot(basis="vector", packs="signed"), "exp_avg_sq": second}

    def advance(self, x: Batch, g: Rows, s: State, h: Hyper) -> Rows:
        """Move towards the square, by a share of the square."""
        second: Rows = s["exp_avg_sq"]
        square = x.take()  # the gradient is used no more
        square.mul_(square)
        side = x.spare("side").copy_(second).add_(square, alpha=-1.0).sign_()
        return second.addcmul_(side, square, h[self.betas][1] - 1)


@dataclass(frozen=True)
class AngleMoments(Moments):
    """Adam-atan2's direction: no eps, no division, bounded and free of scale.

    ``u <- a atan2(m / bc1, b sqrt(v / bc2))``. At ``b = 1`` the largest step, ``a pi / 2`` times the learning rate, is
    where v is 0. State: ``exp_avg``, ``exp_avg_sq``. Source: Everett et al. 2024, 2407.05872.
    """

    eps: str = key("")
    a: str = key("atan2_a")
    b: str = key("atan2_b")

    def divide(self, x: Batch, first: Rows, second: Rows, h: Hyper, bc1: Number, root2: Number) -> None:
        """The angle between both moments."""
        x.fresh().root_of_(second).mul_(h[self.b] * bc1 / root2).apply_(_angle, first)
        x.scale(h[self.a])


def _angle(row: Tensor, over: Tensor) -> None:
    torch.atan2(over, row, out=row)


@dataclass(frozen=True)
class QuotientMomentum(Moments):
    """LaProp's direction: the momentum of normalised gradients, where Adam normalises the momentum.

    ``v <- b2 v + (1 - b2) u^2``, ``m <- b1 m + (1 - b1) u / (sqrt(v / bc2) + eps)``, ``u <- m / bc1``. State:
    ``exp_avg``, ``exp_avg_sq``. Source: Ziyin, Wang and Ueda 2020, 2002.04839.
    """

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Divide, then average."""
        beta1, beta2 = h[self.betas]
        g = x.read()
        second = s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, 1 - beta2)
        root2 = (1 - beta2**x.step) ** 0.5
        root = x.spare("denominator").root_of_(second).add_(root2 * h[self.eps] * x.eps_scale)
        x.lend(s["exp_avg"].mul_(beta1).addcdiv_(g, root, (1 - beta1) * root2))
        x.scale(1 / (1 - beta1**x.step))
