"""Directions with a longer memory, or with the difference of gradients: ADOPT, AdEMAMix, Adan, MARS."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Needs, Part, Slot, State, Unit, key
from guided_descent.parts.decay import Decoupled
from guided_descent.parts.rows import Number, Rows
from guided_descent.parts.step import writable
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class AdoptMoments(Part):
    """ADOPT's direction: the momentum of gradients over the second moment of the steps before.

    The first update sets ``v <- u^2`` and leaves the parameters alone. Then, with ``k = t - 1``,
    ``n = u / max(sqrt(v), eps)`` clipped to ``+- k^clip``, ``m <- b1 m + (1 - b1) n``, ``u <- m``, and last
    ``v <- b2 v + (1 - b2) u^2`` of the gradient. No correction of the bias. State: ``exp_avg``, ``exp_avg_sq``. Source:
    Taniguchi et al. 2024, 2411.02853.
    """

    betas: str = key("betas")
    eps: str = key("eps")
    clip: str = key("clip_exponent")

    def slots(self, block: Block) -> dict[str, Slot]:
        """First and second moment."""
        return {"exp_avg": Slot(packs="signed"), "exp_avg_sq": Slot(packs="unsigned")}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Normalise by the old moment, average, then advance the moment."""
        beta1, beta2 = h[self.betas]
        g, second = x.read(), s["exp_avg_sq"]
        if x.first:
            second.addcmul_(g, g)
            x.hold()
            return
        quotient = x.spare("quotient").root_of_(second)
        least, bound = h[self.eps] * x.eps_scale, (x.step - 1) ** h[self.clip]
        quotient.clamp_(least).rdiv_(g).clamp_(-bound, bound)
        second.mul_(beta2).addcmul_(g, g, 1 - beta2)
        x.lend(s["exp_avg"].lerp_(quotient, 1 - beta1))

    def flops(self, block: Block) -> float:
        """About 10 per element."""
        return 10.0 * block.numel


def slow_memory(step: Number, start: Number, end: Number, over: Number) -> Number:
    """AdEMAMix's ``b3_t``: the half-life, in steps, rises in a straight line from that of ``start`` to ``end``'s.

    ``f(b) = ln 0.5 / ln(b + 1e-8) - 1``, ``b3_t = f^-1((1 - s) f(start) + s f(end))`` with ``s = min(step / over, 1)``
    and ``f^-1(x) = 0.5^(1 / (x + 1))``; ``end`` itself from ``s = 1`` on. ``over`` 0 is no warmup.

    Example:
        >>> [round(slow_memory(t, 0.9, 0.9999, 10_000), 7) for t in (1, 100, 1000, 5000)]
        [0.9090766, 0.990901, 0.999009, 0.9998002]
    """
    share = ramp(step, over)
    lives = [math.log(0.5) / _log(beta + 1e-8) - 1 for beta in (start, end)]
    between: Number = 0.5 ** (1 / ((1 - share) * lives[0] + share * lives[1] + 1))
    if isinstance(share, Tensor):
        return torch.where(share >= 1, end, between)
    return end if share >= 1 else between


def ramp(step: Number, over: Number) -> Number:
    """``min(step / over, 1)``; 1 where ``over`` is 0."""
    if isinstance(step, Tensor):
        return torch.where(torch.as_tensor(over) > 0, (step / over).clamp(max=1.0), 1.0)
    return min(step / over, 1.0) if over else 1.0


def _log(number: Number) -> Number:
    return number.log() if isinstance(number, Tensor) else math.log(number)


@dataclass(frozen=True)
class TwoMomenta(Part):
    """AdEMAMix's direction: a fast and a slow momentum over the second moment.

    ``m1 <- b1 m1 + (1 - b1) u``, ``m2 <- b3_t m2 + (1 - b3_t) u``, ``v <- b2 v + (1 - b2) u^2``,
    ``u <- (m1 / bc1 + alpha_t m2) / (sqrt(v / bc2) + eps)``; m2 is not corrected. Over the first ``warmup`` updates
    ``alpha_t = alpha t / warmup`` and ``b3_t`` rises, see ``slow_memory``; without it training diverges early. State:
    ``exp_avg``, ``exp_avg_slow``, ``exp_avg_sq``. Source: Pagliardini, Ablin and Grangier 2024, 2409.03137.
    """

    betas: str = key("betas")
    eps: str = key("eps")
    alpha: str = key("alpha")
    warmup: str = key("alpha_warmup")

    def slots(self, block: Block) -> dict[str, Slot]:
        """Both momenta and the second moment."""
        vector = Slot(basis="vector", packs="signed")
        return {"exp_avg": vector, "exp_avg_slow": vector, "exp_avg_sq": Slot(basis="square", packs="unsigned")}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the three averages, mix, divide."""
        beta1, beta2, beta3 = h[self.betas]
        g, fast, slow = x.read(), s["exp_avg"], s["exp_avg_slow"]
        fast.lerp_(g, 1 - beta1)
        slow.lerp_(g, 1 - slow_memory(x.step, beta1, beta3, h[self.warmup]))
        second = s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, 1 - beta2)
        alpha = h[self.alpha] * ramp(x.step, h[self.warmup])
        bc1, root2 = 1 - beta1**x.step, (1 - beta2**x.step) ** 0.5
        x.fresh().root_of_(second).add_(root2 * h[self.eps] * x.eps_scale)
        x.over(x.spare("mixture").copy_(fast).add_(slow, alpha=alpha * bc1))
        x.scale(root2 / bc1)

    def flops(self, block: Block) -> float:
        """About 17 per element."""
        return 17.0 * block.numel


def difference(x: Batch, s: State) -> Rows:
    """``u - u_before``, 0 at the first update, in scratch; what is remembered is a copy of this direction."""
    change, before = x.spare("difference"), s["previous_grad"]
    g = x.read()
    if x.first:
        change.zero_()
    else:
        change.copy_(g).add_(before, alpha=-1.0)
    before.copy_(g)
    return change


@dataclass(frozen=True)
class AdanMoments(Part):
    """Adan's direction: Nesterov momentum from the differences of gradients.

    ``d = u - u_before`` (0 at first), ``m <- b1 m + (1 - b1) u``, ``q <- b2 q + (1 - b2) d``,
    ``n <- b3 n + (1 - b3) (u + b2 d)^2``, ``u <- (m / bc1 + b2 q / bc2) / (sqrt(n / bc3) + eps)``. The betas are
    memories; the paper's are one minus them. State: ``exp_avg``, ``exp_avg_diff``, ``exp_avg_sq``, ``previous_grad``.
    Source: Xie et al. 2022, 2208.06677.
    """

    betas: str = key("betas")
    eps: str = key("eps")

    def slots(self, block: Block) -> dict[str, Slot]:
        """Three moments and the last gradient."""
        signed, square = Slot(packs="signed"), Slot(packs="unsigned")
        return {"exp_avg": signed, "exp_avg_diff": signed, "exp_avg_sq": square, "previous_grad": Slot()}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the moments, mix, divide."""
        beta1, beta2, beta3 = h[self.betas]
        change = difference(x, s)
        first, second = s["exp_avg"].lerp_(x.read(), 1 - beta1), s["exp_avg_diff"].lerp_(change, 1 - beta2)
        change.mul_(beta2).add_(x.read())
        third = s["exp_avg_sq"].mul_(beta3).addcmul_(change, change, 1 - beta3)
        bc1, bc2, root3 = 1 - beta1**x.step, 1 - beta2**x.step, (1 - beta3**x.step) ** 0.5
        mixture = x.fresh().copy_(first).add_(second, alpha=beta2 * bc1 / bc2)
        x.over(mixture, change.root_of_(third).add_(root3 * h[self.eps] * x.eps_scale))
        x.scale(root3 / bc1)

    def flops(self, block: Block) -> float:
        """About 22 per element."""
        return 22.0 * block.numel


@dataclass(frozen=True)
class ProximalDecay(Decoupled):
    """Decay as the proximal step of ``wd ||p||^2 / 2``, after the step: ``p <- p / (1 + lr wd)``."""

    slot: ClassVar[str] = "decay_after"

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Shrink the parameters."""
        if x.wd_scale:
            decay = self.share(x, h)
            writable(x).div_([1 + each for each in decay] if isinstance(decay, list) else 1 + decay)


@dataclass(frozen=True)
class CorrectedGradient(Part):
    """MARS's gradient with less variance: ``u <- u + gamma b1 / (1 - b1) (u - u_before)``, of length at most 1.

    ``u_before`` is the gradient of the last step, at the parameters and on the batch of that time; the difference is 0
    at first. The length is that of a tensor. State: ``previous_grad``, a copy. Source: Yuan et al. 2024, 2411.10438.
    """

    slot: ClassVar[str] = "clip"
    unit: ClassVar[Unit] = "block"
    betas: str = key("betas")
    gamma: str = key("gamma")

    def change(self, x: Batch, s: State) -> Rows:
        """The difference of gradients, in scratch."""
        return difference(x, s)

    def slots(self, block: Block) -> dict[str, Slot]:
        """The last gradient."""
        return {"previous_grad": Slot()}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Correct and clip."""
        beta1 = h[self.betas][0]
        change = self.change(x, s)
        u = x.take().add_(change, alpha=h[self.gamma] * beta1 / (1 - beta1))
        u.mul_(x.by_row(1 / u.norms().clamp(min=1.0)))

    def flops(self, block: Block) -> float:
        """About 6 per element."""
        return 6.0 * block.numel


@dataclass(frozen=True)
class PreviousPoint(Part):
    """One more gradient of each batch, at the parameters of the update before; at the first update at these.

    ``x.probed`` holds it. State: ``previous_param``, in the work dtype.
    """

    slot: ClassVar[str] = "clip"
    needs: ClassVar[Needs] = Needs(evaluations=2, apart=True)

    @property
    def reads_parameter(self) -> bool:
        """To remember it."""
        return True

    def slots(self, block: Block) -> dict[str, Slot]:
        """The last parameters."""
        return {"previous_param": Slot()}

    def probe(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """The way back."""
        if x.first:
            x.fresh().zero_()
        else:
            x.fresh().copy_(s["previous_param"]).add_(x.p, alpha=-1.0)

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Remember these parameters."""
        s["previous_param"].copy_(x.p)


@dataclass(frozen=True)
class ExactCorrection(PreviousPoint, CorrectedGradient):
    """The same as ``CorrectedGradient``, ``u_before`` being the gradient of this batch at the last parameters.

    See ``PreviousPoint``.
    """

    unit: ClassVar[Unit] = "block"

    def change(self, x: Batch, s: State) -> Rows:
        """What the way from the last parameters has changed."""
        assert x.probed is not None
        change = x.spare("difference")
        return change.zero_() if x.first else change.copy_(x.g).add_(x.probed, alpha=-1.0)

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Remember these parameters, correct and clip."""
        PreviousPoint.update(self, x, s, h, total)
        CorrectedGradient.update(self, x, s, h, total)
