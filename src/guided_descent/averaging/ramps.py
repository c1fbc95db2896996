"""Ramps: what the decay of an EMA is at most, early in a run, where a long memory would hold on to the start.

Each is a function of t, the accepted steps before the tick, and 0 at t = 0: the first tick copies the weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


class Ramp(ABC):
    """The largest decay at a tick. To add one, subclass and give ``largest``; ``repr`` is saved and compared."""

    @abstractmethod
    def largest(self, t: int) -> float:
        """Return the largest decay after t > 0 accepted steps, in [0, 1]."""

    def __call__(self, t: int) -> float:
        """Return the largest decay after t accepted steps: 0 at t = 0."""
        return self.largest(t) if t > 0 else 0.0


@dataclass(frozen=True, repr=False)
class Fraction(Ramp):
    """See ``fraction``."""

    offset: float

    def __post_init__(self) -> None:
        if not 1 <= self.offset < math.inf:
            raise ValueError(f"offset={self.offset!r}: must be 1 or more, such as 10")

    def largest(self, t: int) -> float:
        """Return (1 + t)/(offset + t)."""
        return (1 + t) / (self.offset + t)

    def __repr__(self) -> str:
        return f"fraction({self.offset!r})"


def fraction(offset: float = 10) -> Ramp:
    """d_t <= (1 + t)/(offset + t), as in TensorFlow and Diffusers.

    Args:
        offset: 1 or more; 10 by default.

    Raises:
        ValueError: ``offset`` is below 1.
    """
    return Fraction(offset)


@dataclass(frozen=True, repr=False)
class Power(Ramp):
    """See ``power``."""

    gamma: float
    exponent: float
    least: float

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf or not 0 < self.exponent < math.inf:
            raise ValueError(f"gamma={self.gamma!r}, exponent={self.exponent!r}: must be above 0")
        if not 0 <= self.least < 1:
            raise ValueError(f"least={self.least!r}: must lie in [0, 1)")

    def largest(self, t: int) -> float:
        """Return 1 - (1 + t/gamma)^-exponent, or the least."""
        return float(max(self.least, 1 - (1 + t / self.gamma) ** -self.exponent))

    def __repr__(self) -> str:
        return f"power({self.gamma!r}, {self.exponent!r}, {self.least!r})"


def power(gamma: float = 1.0, exponent: float = 2 / 3, least: float = 0.0) -> Ramp:
    """d_t <= max(least, 1 - (1 + t/gamma)^-exponent), as in timm: 0.999 after 31.6 thousand steps by default.

    Args:
        gamma: the time scale in steps; 1 by default.
        exponent: 2/3 by default, for long runs; 3/4 for shorter ones, with 0.999 after 10 thousand steps.
        least: lower end of the ramp, in [0, 1); 0 by default.

    Raises:
        ValueError: a number out of range.
    """
    return Power(gamma, exponent, least)


@dataclass(frozen=True, repr=False)
class Share(Ramp):
    """See ``share``."""

    of: float

    def __post_init__(self) -> None:
        if not 0 < self.of < math.inf:
            raise ValueError(f"share={self.of!r}: must be above 0, such as 0.05")

    def largest(self, t: int) -> float:
        """Return 0.5^(1/(share t))."""
        return float(0.5 ** (1 / (self.of * t)))

    def __repr__(self) -> str:
        return f"share({self.of!r})"


def share(of: float = 0.05) -> Ramp:
    """d_t <= 0.5^(1/(share t)): the half-life is at most this share of the steps so far.

    Args:
        of: the share, above 0; 0.05 by default, as in StyleGAN, and 0.09 in EDM2's traditional average.

    Raises:
        ValueError: the share is not above 0.

    Source: Karras et al. 2019, arXiv:1912.04958; 2023, arXiv:2312.02696.
    """
    return Share(of)
