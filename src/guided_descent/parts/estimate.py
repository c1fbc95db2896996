"""Estimates: what a method remembers of past gradients, and the direction that it makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, Slot, State, key
from guided_descent.parts.rows import Number, Rows
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class Momentum(Part):
    """Heavy-ball or Nesterov momentum, in torch's form.

    ``b <- mu b + (1 - tau) u`` (the first ``b`` is ``u`` itself), then ``u <- b``, or ``u <- u + mu b`` with Nesterov.
    ``dampening=""`` is the form without ``tau``.
    State: ``momentum_buffer``, shaped like the parameter. Source: Polyak 1964; Sutskever et al. 2013.
    """

    momentum: str = key("momentum")
    dampening: str = key("dampening")
    nesterov: bool = False

    def slots(self, block: Block) -> dict[str, Slot]:
        """The momentum buffer."""
        return {"momentum_buffer": Slot(basis="vector", packs="signed")}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the buffer and make it, or the look-ahead, the direction."""
        mu, buffer = h[self.momentum], s["momentum_buffer"]
        if x.first:
            buffer.copy_(x.read())
        else:
            buffer.mul_(mu).add_(x.read(), alpha=1 - h[self.dampening] if self.dampening else 1.0)
        if self.nesterov:
            x.own().add_(buffer, alpha=mu)
        else:
            x.lend(buffer)

    def flops(self, block: Block) -> float:
        """About 4 per element."""
        return 4.0 * block.numel


@dataclass(frozen=True)
class Velocity(Part):
    """Momentum that holds the learning rate: ``b <- mu b + lr u``, ``u <- b``, to be applied by ``Displace``.

    It differs from ``Momentum`` where the learning rate changes: what is in the buffer keeps the rate of its day.
    State: ``momentum_buffer``, shaped like the parameter. Source: Sutskever et al. 2013.
    """

    slot: ClassVar[str] = "momentum"
    momentum: str = key("momentum")
    lr: str = key("lr")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The velocity."""
        return {"momentum_buffer": Slot(basis="vector", packs="signed")}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the velocity and make it the direction."""
        velocity = s["momentum_buffer"].mul_(h[self.momentum])
        x.lend(velocity.add_(x.u, alpha=h[self.lr] * x.lr_scale * x.factor))

    def flops(self, block: Block) -> float:
        """About 3 per element."""
        return 3.0 * block.numel


@dataclass(frozen=True)
class Ema(Part):
    """Exponential moving average of the direction, from 0.

    ``m <- beta m + (1 - beta) u``, then ``u <- m``, or ``u <- (1 - beta) u + beta m`` with Nesterov. With ``corrected``
    the weights of all gradients in the direction add up to 1: it is divided by ``1 - beta^t``, or ``1 - beta^(t + 1)``
    with Nesterov. State: ``momentum_buffer``, or what ``name`` says, shaped like the parameter.
    """

    beta: str = key("momentum")
    nesterov: bool = False
    corrected: bool = False
    name: str = "momentum_buffer"

    def slots(self, block: Block) -> dict[str, Slot]:
        """The average."""
        return {self.name: Slot(basis="vector", packs="signed")}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the average and make it, or the look-ahead, the direction."""
        beta, average = h[self.beta], s[self.name]
        average.lerp_(x.read(), 1 - beta)
        if self.nesterov:
            x.own().lerp_(average, beta)
        else:
            x.lend(average)
        if self.corrected:
            x.scale(1 / (1 - beta ** (x.step + self.nesterov)))

    def flops(self, block: Block) -> float:
        """About 3 per element, 6 with Nesterov."""
        return (6.0 if self.nesterov else 3.0) * block.numel


@dataclass(frozen=True)
class LionMomentum(Part):
    """Lion's mixture of gradient and momentum: ``u <- b1 m + (1 - b1) u`` with the old ``m``, then ``m`` advances.

    ``m <- b2 m + (1 - b2) u`` takes the direction as it came in. State: ``exp_avg``, shaped like the parameter. Source:
    Chen et al. 2023, 2302.06675.
    """

    betas: str = key("betas")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The momentum."""
        return {"exp_avg": Slot(basis="vector", packs="signed")}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Mix with the old momentum, then advance it."""
        beta1, beta2 = h[self.betas]
        g, average = x.read(), s["exp_avg"]
        mixed = x.spare("mixture").mix_(g, average, beta1)
        average.lerp_(g, 1 - beta2)
        x.become(mixed)

    def flops(self, block: Block) -> float:
        """About 6 per element."""
        return 6.0 * block.numel


@dataclass(frozen=True)
class Moments(Part):
    """The first moment over the root of the second, both bias-corrected: what the methods around Adam share.

    ``m <- b1 m + (1 - b1) u``, ``v <- b2 v + (1 - b2) u^2``, ``u <- (m / bc1) / (sqrt(v / bc2) + eps)`` with
    ``bc = 1 - b^t``. A method overrides ``advance``, how v moves, or ``divide``, what is made of both. State:
    ``exp_avg``, ``exp_avg_sq``, shaped like the parameter.
    """

    betas: str = key("betas")
    eps: str = key("eps")

    def slots(self, block: Block) -> dict[str, Slot]:
        """First and second moment."""
        return {"exp_avg": Slot(basis="vector", packs="signed"), "exp_avg_sq": Slot(basis="square", packs="unsigned")}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance both moments and divide."""
        beta1, beta2 = h[self.betas]
        g, first = x.read(), s["exp_avg"]
        first.lerp_(g, 1 - beta1)
        second = self.advance(x, g, s, h)
        self.divide(x, first, second, h, 1 - beta1**x.step, (1 - beta2**x.step) ** 0.5)

    def advance(self, x: Batch, g: Rows, s: State, h: Hyper) -> Rows:
        """Advance the second moment, after the first, and return what divides; g is not used again."""
        beta2 = h[self.betas][1]
        second: Rows = s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, 1 - beta2)
        return second

    def divide(self, x: Batch, first: Rows, second: Rows, h: Hyper, bc1: Number, root2: Number) -> None:
        """Make the quotient the direction; ``root2`` is ``sqrt(bc2)``."""
        x.fresh().root_of_(second).add_(root2 * h[self.eps] * x.eps_scale)
        x.over(first, times=root2)
        x.scale(1 / bc1)

    def flops(self, block: Block) -> float:
        """About 12 per element."""
        return 12.0 * block.numel


@dataclass(frozen=True)
class AdamMoments(Moments):
    """Adam's direction, ``u <- (m / bc1) / (sqrt(v / bc2) + eps)``; see ``Moments``.

    With ``late_correction`` the corrections multiply the finished quotient, ``u <- sqrt(bc2) / bc1 * m / (sqrt(v) +
    eps)``, the form of SOAP and of the paper's efficient version. ``amsgrad`` divides by the running maximum of ``v``.
    State: ``exp_avg``, ``exp_avg_sq`` (and ``max_exp_avg_sq``). Source: Kingma and Ba 2014, 1412.6980.
    """

    amsgrad: bool = False
    late_correction: bool = False

    def slots(self, block: Block) -> dict[str, Slot]:
        """Both moments, and the maximum."""
        slots = super().slots(block)
        return slots | {"max_exp_avg_sq": Slot(basis="square", packs="unsigned")} if self.amsgrad else slots

    def advance(self, x: Batch, g: Rows, s: State, h: Hyper) -> Rows:
        """Advance the second moment, and its maximum."""
        second = super().advance(x, g, s, h)
        if self.amsgrad:
            second = s["max_exp_avg_sq"].maximum_(second)
        return second

    def divide(self, x: Batch, first: Rows, second: Rows, h: Hyper, bc1: Number, root2: Number) -> None:
        """The quotient, corrected before or after."""
        if not self.late_correction:
            super().divide(x, first, second, h, bc1, root2)
            return
        x.fresh().root_of_(second).add_(h[self.eps] * x.eps_scale)
        x.over(first)
        x.scale(root2 / bc1)


@dataclass(frozen=True)
class NadamMoments(Part):
    """Adam's direction with Nesterov momentum and the momentum schedule of Dozat.

    ``mu_t = b1 (1 - 0.5 * 0.96^(t md))``, ``Pi_t = mu_1 ... mu_t``, moments as in Adam with ``b1``, then
    ``u <- [(1 - mu_t) / (1 - Pi_t) u + mu_{t+1} / (1 - Pi_t mu_{t+1}) m] / (sqrt(v / bc2) + eps)``.
    State: ``exp_avg``, ``exp_avg_sq``, and the product ``mu_product`` as a float64 scalar. Source: Dozat 2016.
    """

    betas: str = key("betas")
    eps: str = key("eps")
    momentum_decay: str = key("momentum_decay")

    def slots(self, block: Block) -> dict[str, Slot]:
        """Both moments and the product of the momenta."""
        return {
            "exp_avg": Slot(basis="vector", packs="signed"),
            "exp_avg_sq": Slot(basis="square", packs="unsigned"),
            "mu_product": Slot("factor", (), torch.float64, fill=1.0),
        }

    def begin(self, s: State, h: Hyper, step: int) -> None:
        """Multiply the product by this step's momentum."""
        s["mu_product"].mul_(self._momentum(h, step))

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the moments and mix the gradient with the momentum of the next step."""
        beta1, beta2 = h[self.betas]
        step, product = x.step, s["mu_product"]
        now, after = self._momentum(h, step), self._momentum(h, step + 1)
        g, first, second = x.read(), s["exp_avg"], s["exp_avg_sq"]
        first.lerp_(g, 1 - beta1)
        second.mul_(beta2).addcmul_(g, g, 1 - beta2)
        of_gradient, of_momentum = (1 - now) / (1 - product), after / (1 - product * after)
        mixed = x.spare("nadam").mix_(g, first, x.by_row(of_momentum / (of_gradient + of_momentum)))
        both = x.by_row(of_gradient + of_momentum)
        root2 = (1 - beta2**step) ** 0.5
        x.fresh().root_of_(second).add_(root2 * h[self.eps] * x.eps_scale)
        if not isinstance(both, float):
            mixed.mul_(both)
        x.over(mixed, times=root2 * both if isinstance(both, float) else root2)

    def _momentum(self, h: Hyper, step: Number) -> Number:
        beta1: Number = h[self.betas][0]
        fraction: Number = 0.96 ** (step * h[self.momentum_decay])
        return beta1 * (1 - 0.5 * fraction)

    def flops(self, block: Block) -> float:
        """About 15 per element."""
        return 15.0 * block.numel
