"""Averages of the parameters that are part of the method: Schedule-Free, primal averaging, Lookahead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.adaptive import SecondMoment, rectification
from guided_descent.parts.base import Batch, Hyper, Needs, Part, Slot, State, key
from guided_descent.parts.decay import Decoupled
from guided_descent.parts.memory import ramp
from guided_descent.parts.numbers import hyper
from guided_descent.parts.rows import Number
from guided_descent.parts.step import writable
from guided_descent.parts.wrapper import Wrapper, wrapper
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class PrimalAverage(Part):
    """Gradients at a point y between a sequence z, which takes the steps, and its average x, which is evaluated.

    With ``d`` the displacement that the parts before have made of the parameters, which hold y:
    ``z <- z + r d``, ``x <- (1 - c) x + c z``, ``p <- y = (1 - b) z + b x``. So the rule of the step, decay and
    all, is that of any recipe, taken at y. A ``decay`` given here shrinks z instead: ``z <- z + r (d - lr wd z)``. A
    subclass says what ``r`` and ``c`` are.

    Beside y only z is kept, since ``x = y + (1 - 1 / b) (z - y)``; so b may not be 0. It may change from step to step.
    State: ``z``, in the work dtype, the parameter at first; ``beta``, the b of this y; ``mix``, what y is made with.
    """

    slot: ClassVar[str] = "average"
    needs: ClassVar[Needs] = Needs(before=True)
    beta: str = key("betas")
    lr: str = key("lr")
    decay: Decoupled | None = None

    def slots(self, block: Block) -> dict[str, Slot]:
        """The sequence, its weight in y, and the numbers of a step."""
        one = Slot("factor", (), torch.float64, fill=1.0)
        return {"z": Slot(copies=True), "beta": one, "mix": Slot("factor", (4,), torch.float64)}

    def check(self, h: Hyper) -> None:
        """The average has a weight in y."""
        if not self.weight(h) > 0:
            raise ValueError(
                f"{self.beta}={h[self.beta]!r} makes the weight of the average {self.weight(h):g}, and it must be > 0: "
                "the average is found again by dividing by it; to do without an average use another recipe"
            )

    def weight(self, h: Hyper) -> float:
        """The ``b`` of this step."""
        return float(h[self.beta][0] if isinstance(h[self.beta], tuple | list) else h[self.beta])

    def weigh(self, s: State, h: Hyper, step: int) -> tuple[float, Number]:
        """The share ``r`` of the displacement that is taken, and the weight ``c`` of the new z, one for each block."""
        raise TypeError(f"{type(self).__name__} does not define weigh")

    def begin(self, s: State, h: Hyper, step: int) -> None:
        """What y becomes: ``y + pull (z - y) + r gain d`` with ``1 - pull = (1 - c) b / b_before``."""
        rate, weight = self.weigh(s, h, step)
        beta = torch.full_like(s["beta"], self.weight(h))
        before = s["beta"] if step > 1 else beta
        pull = 1 - (1 - weight) * (beta / before)
        gain = 1 - (1 - weight) * beta
        s["mix"].copy_(torch.stack([pull, torch.full_like(beta, rate), rate * gain, beta], -1))

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Move z by what the step has done, and y with it."""
        y, d, z = x.before, writable(x), s["z"]
        assert y is not None
        *numbers, beta = s["mix"].unbind(-1)
        pull, rate, gain = map(x.by_block, numbers)
        s["beta"].copy_(beta)  # here and not before: a part may have held the step
        d.add_(y, alpha=-1.0)
        if self.decay is not None and not self.decay.idle(h):
            share = self.decay.share(x, h)
            d.add_(z, alpha=[-each for each in share] if isinstance(share, list) else -share)
        y.lerp_(z, pull)
        z.add_(d, alpha=rate)
        d.mul_(gain).add_(y)

    def evaluate(self, x: Batch, s: State, h: Hyper) -> None:
        """From y to x."""
        writable(x).lerp_(s["z"], x.by_block(1 - 1 / s["beta"]))

    def flops(self, block: Block) -> float:
        """About 10 per element."""
        return 10.0 * block.numel

    def scratch(self, block: Block) -> int:
        """The parameters before the step."""
        return 8 * block.numel


@dataclass(frozen=True)
class UniformAverage(PrimalAverage):
    """Schedule-Free: the average of all z, so that no schedule has to end the run.

    ``r_t = min(t / warmup, 1)``; ``w_t = t^r max(lr_1 r_1 ... lr_t r_t)^power``, ``c_t = w_t / (w_1 + ... + w_t)``, 0
    where all are 0. At a constant learning rate and ``r = 0`` x is the plain mean of ``z_1 ... z_t``. See
    ``PrimalAverage``. State: ``weight_sum``, ``lr_max`` beside. Source: Defazio et al. 2024, 2405.15682.
    """

    warmup: str = key("warmup_steps")
    r: str = key("r")
    power: str = key("weight_lr_power")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The sum of the weights and the largest learning rate so far, too."""
        number = Slot("factor", (), torch.float64)
        return super().slots(block) | {"weight_sum": number, "lr_max": number}

    def weigh(self, s: State, h: Hyper, step: int) -> tuple[float, Number]:
        """Weights that follow the largest learning rate, so that a warmup counts little."""
        rate = self.rate(h, step)
        largest = s["lr_max"].clamp_(min=float(h[self.lr]) * rate)
        weight = step ** h[self.r] * largest ** h[self.power]
        total = s["weight_sum"].add_(weight)
        return rate, torch.where(total > 0, weight / total, 0.0)

    def rate(self, h: Hyper, step: int) -> float:
        """The linear warmup."""
        return float(ramp(step, h[self.warmup]))


@dataclass(frozen=True)
class RectifiedAverage(UniformAverage):
    """Schedule-Free with the rectification of RAdam for a warmup: ``r_t`` of ``rectification``, from ``rho_t > 4`` on.

    Before, while the second moment rests on few squares, it is 0, so that nothing moves and nothing is averaged, or 1
    where the part is not ``silent``.
    """

    betas: str = key("betas")
    silent: bool = True

    def rate(self, h: Hyper, step: int) -> float:
        """The warmup times the rectification."""
        rho, square = rectification(step, h[self.betas][1])
        return super().rate(h, step) * (float(square) ** 0.5 if rho > SecondMoment.bound else float(not self.silent))


@dataclass(frozen=True)
class FadingAverage(PrimalAverage):
    """Generalised primal averaging: an exponential average of z, ``x <- mu_x x + (1 - mu_x) z``; b is ``mu_y``.

    See ``PrimalAverage``. Source: Defazio et al. 2025, 2512.17131.
    """

    beta: str = key("mu_y")
    mu_x: str = key("mu_x")

    def weigh(self, s: State, h: Hyper, step: int) -> tuple[float, Number]:
        """All of the displacement, and a weight that does not change."""
        return 1.0, 1 - h[self.mu_x]


@dataclass(frozen=True)
class SlowWeights(Part):
    """Lookahead: every ``k`` updates slow weights go a share of the way, and the parameters return to them.

    ``q <- q + alpha (p - q)``, ``p <- q``; the slow weights begin as the parameters before the first update, and are
    what is evaluated. Momenta are kept. State: ``slow_weights``, in the work dtype. Source: Zhang et al. 2019,
    1907.08610.
    """

    slot: ClassVar[str] = "average"
    k: str = key("lookahead_k")
    alpha: str = key("lookahead_alpha")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The slow weights."""
        return {"slow_weights": Slot(copies=True)}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Meet, when it is time."""
        w, slow = writable(x), s["slow_weights"]
        if isinstance(x.step, Tensor):  # one graph for every step
            now = (x.step % h[self.k] == 0).to(x.step.dtype)
            slow.lerp_(w, now * h[self.alpha])
            w.lerp_(slow, now)
        elif x.step % h[self.k] == 0:
            slow.lerp_(w, float(h[self.alpha]))
            w.copy_(slow)

    def evaluate(self, x: Batch, s: State, h: Hyper) -> None:
        """The slow weights."""
        writable(x).copy_(s["slow_weights"])

    def flops(self, block: Block) -> float:
        """Three per element in each meeting, counted as if it were in every fifth update."""
        return 0.6 * block.numel


# -- for any recipe ----------------------------------------------------------------------------------------------------


@wrapper(
    "schedule_free",
    paper="Defazio et al. 2024, arXiv:2405.15682",
    use="runs that may stop at any step",
    avoid="recipes with momentum of their own, and BatchNorm without re-estimated statistics",
)
@dataclass(frozen=True, kw_only=True)
class ScheduleFree(Wrapper):
    """Schedule-Free averaging of any recipe's steps: no decay of the learning rate, evaluation at the average.

    ``z <- z + d``, ``x <- (1 - c) x + c z``, ``p <- (1 - beta) z + beta x``, where d is the step that the recipe makes
    at p. It takes the place of momentum: give a base without any. Evaluate in ``guided_descent.evaluating(model,
    optimizer)``, or between ``optimizer.eval()`` and ``train()``. The formula is in ``parts.UniformAverage``.
    """

    beta: float = hyper(0.9, gt=0, le=1, help="weight of the average in the point of the gradients")
    warmup_steps: int = hyper(0, ge=0, help="updates over which the steps grow to their length")
    r: float = hyper(0.0, ge=0, help="weight of the t-th z in the average: t^r")
    weight_lr_power: float = hyper(2.0, ge=0, help="and the largest learning rate so far to this power")

    def part(self) -> Part:
        """The average."""
        beta, warmup, r, power = self.numbers()
        return UniformAverage(beta=beta, warmup=warmup, r=r, power=power)


@wrapper(
    "gpa",
    paper="Defazio et al. 2025, arXiv:2512.17131",
    use="an average near which gradients are taken, with two constants apart",
    avoid="runs that have an EMA for evaluation already",
)
@dataclass(frozen=True, kw_only=True)
class GPA(Wrapper):
    """Generalised primal averaging of any recipe's steps: an exponential average that gradients are taken near.

    ``z <- z + d``, ``x <- mu_x x + (1 - mu_x) z``, ``p <- mu_y x + (1 - mu_y) z``, where d is the step that the recipe
    makes at p. Evaluate as with ``ScheduleFree``.
    """

    mu_x: float = hyper(0.9967, ge=0, lt=1, help="memory of the average")
    mu_y: float = hyper(0.7, gt=0, le=1, help="weight of the average in the point of the gradients")

    def part(self) -> Part:
        """The average."""
        mu_x, mu_y = self.numbers()
        return FadingAverage(beta=mu_y, mu_x=mu_x)


@wrapper(
    "lookahead",
    paper="Zhang et al. 2019, arXiv:1907.08610",
    use="steadier training of a fast inner optimizer",
    avoid="short memory: one more copy of the weights",
)
@dataclass(frozen=True, kw_only=True)
class Lookahead(Wrapper):
    """Lookahead: slow weights that follow the fast ones every k updates, and from which those start again.

    ``q <- q + alpha (p - q)``, ``p <- q``. With ``alpha = 1`` it is the recipe itself. The slow weights are what is
    evaluated, as with ``ScheduleFree``.
    """

    k: int = hyper(5, ge=1, help="updates between two meetings")
    alpha: float = hyper(0.5, ge=0, le=1, help="share of the way that the slow weights go")

    def part(self) -> Part:
        """The slow weights."""
        k, alpha = self.numbers()
        return SlowWeights(k=k, alpha=alpha)
