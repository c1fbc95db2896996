"""Curves whose shape does not depend on how long they last: laws of the step, stairs and cycles."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .base import Curve, check_steps
from .shapes import cosine


class Endless(Curve):
    """A curve that may go on for ever, or be cut at any step without a change of what comes before."""

    def lasting(self, length: int | None) -> Curve:
        """Return this curve with another length."""
        return replace(self, length=length)  # type: ignore[type-var]  # every subclass is a dataclass


@dataclass(frozen=True, repr=False)
class PowerLaw(Endless):
    """A power of the step, see ``power`` and ``inverse_sqrt``."""

    timescale: float
    exponent: float
    offset: int
    length: int | None

    def __post_init__(self) -> None:
        if not 0 < self.timescale < math.inf:
            raise ValueError(f"timescale={self.timescale!r}: must be a positive number of steps")
        if not -math.inf < self.exponent < 0:
            raise ValueError(f"exponent={self.exponent!r}: must be below 0, such as -0.5")
        if isinstance(self.offset, bool) or not isinstance(self.offset, int) or self.offset < 0:
            raise ValueError(f"offset={self.offset!r}: must be a number of steps, 0 or more")
        _check_length(self.length)

    def factor(self, step: int) -> float:
        """Return the power at this step."""
        return float(min(1.0, ((step + 1 + self.offset) / self.timescale) ** self.exponent))

    def covering(self, step: int, width: int) -> float:
        """Return the factor at the last unit of the optimizer step: its own are counted."""
        return self.factor(step + width - 1)

    def __repr__(self) -> str:
        if self.exponent == -0.5 and self.offset == self.timescale:
            return f"inverse_sqrt({self.offset}{_last(self.length)})"
        more = f", offset={self.offset}" if self.offset else ""
        return f"power({self.timescale!r}, exponent={self.exponent!r}{more}{_last(self.length)})"


def inverse_sqrt(warmup: int, *, steps: int | None = None) -> Curve:
    """Decay, after a warmup, as f(t) = sqrt(warmup/(t + 1 + warmup)), t counted from the end of the warmup.

    With the warmup in front, ``warmup(n) >> inverse_sqrt(n)``, this is min((t + 1)/n, sqrt(n/(t + 1))). Times
    (d n)^-0.5 it is Noam's schedule for a model of width d.

    Args:
        warmup: steps (or tokens) of the warmup before, at least 1.
        steps: number of optimizer steps (or tokens); None (default): without end.

    Raises:
        ValueError: one of them is not a positive integer.

    Source: Vaswani et al. 2017, arXiv:1706.03762.

    Example:
        >>> inverse_sqrt(100)(299)
        0.5
    """
    return PowerLaw(check_steps("warmup", warmup), -0.5, warmup, steps)


def power(timescale: float, *, exponent: float = -0.51, offset: int = 0, steps: int | None = None) -> Curve:
    """Hold the peak, then follow a power law: f(t) = min(1, (n/timescale)^exponent), n = t + 1 + offset.

    In the form min(lr, batch a n^exponent) of the paper, timescale is (lr/(batch a))^(1/exponent), n counts tokens and
    batch sequences; ``schedules.power_timescale`` computes it.

    Args:
        timescale: where the law takes over from the peak, in steps (or tokens).
        exponent: below 0.
        offset: what comes before this curve, such as a warmup, in steps (or tokens).
        steps: number of optimizer steps (or tokens); None (default): without end.

    Raises:
        ValueError: a number out of range.

    Source: Shen et al. 2024, arXiv:2408.13359.

    Example:
        >>> [power(4, exponent=-0.5)(t) for t in (0, 3, 15)]
        [1.0, 1.0, 0.5]
    """
    return PowerLaw(timescale, exponent, offset, steps)


@dataclass(frozen=True, repr=False)
class Powers(Endless):
    """Powers of a ratio, see ``powers`` and ``step``."""

    ratio: float
    every: int = 1
    patience: int = 0
    rising: bool = False
    length: int | None = None

    def __post_init__(self) -> None:
        check_steps("every", self.every)
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 0:
            raise ValueError(f"patience={self.patience!r}: must be a number of optimizer steps, 0 or more")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio!r}: must lie in [0, 1]")
        _check_length(self.length)

    def factor(self, step: int) -> float:
        """Return the power of this step, or what comes before the first."""
        power = max(0, 1 + (step - self.patience) // self.every)
        return 1 - (1 - self.ratio) ** power if self.rising else self.ratio**power

    def __repr__(self) -> str:
        if self.patience == self.every and not self.rising:
            return f"step({self.ratio!r}, every={self.every}{_last(self.length)})"
        more = f"{f', patience={self.patience}' if self.patience else ''}{', rising=True' if self.rising else ''}"
        return f"powers({self.ratio!r}, every={self.every}{more}{_last(self.length)})"


def powers(ratio: float, *, every: int = 1, patience: int = 0, rising: bool = False, steps: int | None = None) -> Curve:
    """Fall as f(t) = ratio^k with k = 1 + (t - patience) // every, or rise as 1 - (1 - ratio)^k; k = 0 before patience.

    Args:
        ratio: in [0, 1].
        every: optimizer steps between two powers, such as those of an epoch.
        patience: optimizer steps before the first power, in which f is 1, or 0 where it rises.
        rising: rise to 1 and not fall from it.
        steps: number of optimizer steps; None (default): without end.

    Raises:
        ValueError: a number out of range.

    Source: the schedules of gamma in Kirtas, Passalis and Tefas 2023, arXiv:2307.07189.

    Example:
        >>> [powers(0.5, every=2)(t) for t in range(5)], powers(0.5, patience=1, rising=True)(2)
        ([0.5, 0.5, 0.25, 0.25, 0.125], 0.75)
    """
    return Powers(ratio, every, patience, rising, steps)


def step(ratio: float, *, every: int = 1, steps: int | None = None) -> Curve:
    """Go down by stairs: f(t) = ratio^(t // every).

    Args:
        ratio: in [0, 1].
        every: optimizer steps (or tokens) of a stair; 1 (default) is the exponential decay of every step.
        steps: number of optimizer steps (or tokens); None (default): without end.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> [step(0.1, every=2)(t) for t in range(4)]
        [1.0, 1.0, 0.1, 0.1]
    """
    return Powers(ratio, every, every, False, steps)


@dataclass(frozen=True, repr=False)
class Restarts(Endless):
    """Cosines one after the other, see ``restarts``."""

    period: int
    mult: int = 1
    floor: float = 0.0
    length: int | None = None

    def __post_init__(self) -> None:
        check_steps("period", self.period)
        check_steps("mult", self.mult)
        _check_length(self.length)
        cosine(1, floor=self.floor)  # checks the floor

    def factor(self, step: int) -> float:
        """Return the cosine of the cycle that holds this step."""
        period = self.period
        if self.mult == 1:
            step %= period
        while step >= period:
            step, period = step - period, period * self.mult
        return cosine(period, floor=self.floor).factor(step)

    def __repr__(self) -> str:
        more = f"{f', mult={self.mult}' if self.mult > 1 else ''}{f', floor={self.floor}' if self.floor else ''}"
        return f"restarts({self.period}{more}{_last(self.length)})"


def restarts(period: int, *, mult: int = 1, floor: float = 0.0, steps: int | None = None) -> Curve:
    """Fall on half a cosine and start again: f(t) = floor + (1 - floor)(1 + cos(pi s/S))/2, s steps into cycle i of S.

    Args:
        period: steps (or tokens) of the first cycle; cycle i has S = period mult^i.
        mult: how many times longer each cycle is than the one before; 1 by default.
        floor: what each cycle tends to, as a share of the peak, in [0, 1].
        steps: number of optimizer steps (or tokens); None (default): without end.

    Raises:
        ValueError: a number out of range.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983.

    Example:
        >>> [round(restarts(2, mult=2)(t), 3) for t in range(7)]
        [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]
    """
    return Restarts(period, mult, floor, steps)


def _check_length(length: int | None) -> None:
    if length is not None:
        check_steps("steps", length)


def _last(length: int | None) -> str:
    return "" if length is None else f", steps={length}"
