"""Curves: pure functions from an optimizer step to a factor; plain maths that knows nothing of optimizers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass


class Curve(ABC):
    """A factor f(t) for the steps t = 0, 1, ..., length - 1.

    Curves are joined by ``>>``: the right one starts, at its own step 0, where the left one ends. To add a shape of
    your own, subclass and give ``length`` (None: no end) and ``factor``.

    Example:
        >>> curve = warmup(2) >> linear(4)
        >>> curve.length, [curve(t) for t in range(6)]
        (6, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    """

    length: int | None

    @abstractmethod
    def factor(self, step: int) -> float:
        """Return f(step) for 0 <= step < length."""

    def __call__(self, step: int) -> float:
        """Return f(step); from the end on, the last value f(length - 1) is held.

        Raises:
            ValueError: ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"step={step}: a curve starts at step 0")
        return self.factor(step if self.length is None else min(step, self.length - 1))

    def __rshift__(self, other: Curve) -> Curve:
        if not isinstance(other, Curve):
            return NotImplemented
        return Chain((*_links(self), *_links(other)))


@dataclass(frozen=True, repr=False)
class Segment(Curve):
    """One shape over a number of steps: f(t) = floor + (1 - floor) shape(p), p = (t + lead) / length.

    ``lead`` is 1 for a rise, so that it ends on 1 and never starts on 0, and 0 for a decay, so that it starts on 1
    and its last step stays just above the floor. An endless segment is evaluated at p = 0.
    """

    name: str
    shape: Callable[[float], float]
    length: int | None
    floor: float = 0.0
    lead: int = 0

    def __post_init__(self) -> None:
        if self.length is not None:
            check_steps("steps", self.length)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor}: must lie in [0, 1]; it is a share of the peak, not a learning rate")

    def factor(self, step: int) -> float:
        """Return floor + (1 - floor) shape((step + lead) / length)."""
        p = 0.0 if self.length is None else (step + self.lead) / self.length
        return self.floor + (1 - self.floor) * self.shape(p)

    def __repr__(self) -> str:
        length = "" if self.length is None else str(self.length)
        return f"{self.name}({length}{f', floor={self.floor}' if self.floor else ''})"


@dataclass(frozen=True, repr=False)
class Chain(Curve):
    """Curves one after the other, made by ``>>``; only the last may be endless."""

    links: tuple[Curve, ...]

    def __post_init__(self) -> None:
        for link in self.links[:-1]:
            if link.length is None:
                raise ValueError(f"{link!r} has no end, so nothing can follow it; give it a number of steps")

    @property
    def length(self) -> int | None:  # type: ignore[override]  # derived, so it cannot disagree with the links
        """The sum of the lengths, or None when the last link has no end."""
        lengths = [link.length for link in self.links]
        return None if lengths[-1] is None else sum(n for n in lengths if n is not None)

    def factor(self, step: int) -> float:
        """Return the factor of the link that holds ``step``, at its own step."""
        for link in self.links[:-1]:
            assert link.length is not None
            if step < link.length:
                return link.factor(step)
            step -= link.length
        return self.links[-1].factor(step)

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.links))


def warmup(steps: int) -> Curve:
    """Rise linearly to the peak: f(t) = (t + 1) / steps, from 1/steps (never 0) to 1.

    Args:
        steps: number of optimizer steps, at least 1.

    Raises:
        ValueError: ``steps`` is not a positive integer.
    """
    return Segment("warmup", _rise, steps, lead=1)


def constant(steps: int | None = None) -> Curve:
    """Hold the peak: f(t) = 1, for ``steps`` optimizer steps or, with None (default), without end.

    Raises:
        ValueError: ``steps`` is not a positive integer.
    """
    return Segment("constant", _one, steps)


def linear(steps: int, *, floor: float = 0.0) -> Curve:
    """Decay linearly: f(t) = floor + (1 - floor) (1 - t/steps); the last step uses t = steps - 1, just above the floor.

    Args:
        steps: number of optimizer steps, at least 1.
        floor: what the decay tends to, as a share of the peak, in [0, 1]. Zero is the better choice at high
            tokens per parameter (Bergsma et al. 2025, arXiv:2502.15938; Defazio et al. 2023, arXiv:2310.07831).

    Raises:
        ValueError: ``steps`` is not a positive integer or ``floor`` lies outside [0, 1].
    """
    return Segment("linear", _linear, steps, floor)


def cosine(steps: int, *, floor: float = 0.0) -> Curve:
    """Decay on half a cosine: f(t) = floor + (1 - floor) (1 + cos(pi t/steps)) / 2.

    Args:
        steps: number of optimizer steps, at least 1.
        floor: what the decay tends to, as a share of the peak, in [0, 1]; 0.1 is common for language models.

    Raises:
        ValueError: ``steps`` is not a positive integer or ``floor`` lies outside [0, 1].

    Source: Loshchilov & Hutter 2016, arXiv:1608.03983 (without restarts).
    """
    return Segment("cosine", _cosine, steps, floor)


def one_minus_sqrt(steps: int, *, floor: float = 0.0) -> Curve:
    """Cool down as f(t) = floor + (1 - floor) (1 - sqrt(t/steps)): steepest at its start.

    Args:
        steps: number of optimizer steps, at least 1.
        floor: what the decay tends to, as a share of the peak, in [0, 1].

    Raises:
        ValueError: ``steps`` is not a positive integer or ``floor`` lies outside [0, 1].

    Source: Hägele et al. 2024, arXiv:2405.18392.
    """
    return Segment("one_minus_sqrt", _one_minus_sqrt, steps, floor)


@dataclass(frozen=True)
class Powers(Curve):
    """Powers of a ratio, see ``powers``; it has no end."""

    ratio: float
    every: int = 1
    patience: int = 0
    rising: bool = False

    length = None

    def __post_init__(self) -> None:
        check_steps("every", self.every)
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 0:
            raise ValueError(f"patience={self.patience!r}: must be a number of optimizer steps, 0 or more")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio!r}: must lie in [0, 1]")

    def factor(self, step: int) -> float:
        """Return the power of this step, or what comes before the first."""
        power = max(0, 1 + (step - self.patience) // self.every)
        return 1 - (1 - self.ratio) ** power if self.rising else self.ratio**power

    def __repr__(self) -> str:
        more = f"{f', patience={self.patience}' if self.patience else ''}{', rising=True' if self.rising else ''}"
        return f"powers({self.ratio:g}, every={self.every}{more})"


def powers(ratio: float, *, every: int = 1, patience: int = 0, rising: bool = False) -> Curve:
    """Fall as f(t) = ratio^k with k = 1 + (t - patience) // every, or rise as 1 - (1 - ratio)^k; k = 0 before patience.

    Args:
        ratio: in [0, 1].
        every: optimizer steps between two powers, such as those of an epoch.
        patience: optimizer steps before the first power, in which f is 1, or 0 where it rises.
        rising: rise to 1 and not fall from it.

    Raises:
        ValueError: a number out of range.

    Source: the schedules of gamma in Kirtas, Passalis and Tefas 2023, arXiv:2307.07189.

    Example:
        >>> [powers(0.5, every=2)(t) for t in range(5)], powers(0.5, patience=1, rising=True)(2)
        ([0.5, 0.5, 0.25, 0.25, 0.125], 0.75)
    """
    return Powers(ratio, every, patience, rising)


def check_steps(name: str, value: int) -> int:
    """Return ``value`` if it is a positive number of steps.

    Raises:
        ValueError: it is not an integer, or below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: must be a positive integer, counted in optimizer steps")
    return value


def steps_of(name: str, value: int | float, total: int | None) -> int:
    """Return a duration in steps: an int is steps already, a float below 1 a share of ``total`` (at least one step).

    Example:
        >>> steps_of("warmup", 0.02, 10_000), steps_of("warmup", 300, 10_000), steps_of("warmup", 0.001, 100)
        (200, 300, 1)

    Raises:
        ValueError: negative, a float of 1 or more, or a share without a total.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(f"{name}={value!r}: must be a number of steps (int) or a share of the run (float below 1)")
    if isinstance(value, int):
        return value
    if value >= 1:
        raise ValueError(f"{name}={value!r}: a float is a share of the run and must lie below 1; pass an int for steps")
    if total is None and value:
        raise ValueError(f"{name}={value!r}: a share of the run needs total_steps; pass total_steps or an int")
    return max(1, round(value * total)) if total and value else 0


def _links(curve: Curve) -> tuple[Curve, ...]:
    return curve.links if isinstance(curve, Chain) else (curve,)


# Shapes on p in [0, 1). Named functions, not lambdas, so that curves can be pickled.
def _one(p: float) -> float:
    return 1.0


def _rise(p: float) -> float:
    return p


def _linear(p: float) -> float:
    return 1 - p


def _cosine(p: float) -> float:
    return math.cos(math.pi / 2 * p) ** 2  # = (1 + cos(pi p)) / 2 without the cancellation near p = 1


def _one_minus_sqrt(p: float) -> float:
    return 1 - math.sqrt(p)
