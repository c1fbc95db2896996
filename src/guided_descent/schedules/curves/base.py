"""What all curves share: a factor by step, joining by ``>>``, scaling by ``*``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

Option: TypeAlias = float | str


class Curve(ABC):
    """A factor f(t) for the units t = 0, 1, ..., length - 1: optimizer steps or, with longer ones, tokens.

    Curves are joined by ``>>``: the right one starts, at its own 0, where the left one ends. A number in front scales:
    ``0.5 * curve``. To add a shape of your own, subclass and give ``length`` (None: no end) and ``factor``.

    Example:
        >>> from guided_descent.schedules.curves import linear, warmup
        >>> curve = warmup(2) >> linear(4)
        >>> curve.length, [curve(t) for t in range(6)]
        (6, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    """

    length: int | None

    @abstractmethod
    def factor(self, step: int) -> float:
        """Return f(step) for 0 <= step < length."""

    def covering(self, step: int, width: int) -> float:
        """Return the factor of an optimizer step over ``width`` units from ``step`` < length on: that of the first."""
        return self.factor(step)

    def lasting(self, length: int | None) -> Curve:
        """Return this curve with another length.

        Raises:
            ValueError: its shape is stretched over its length, so that another one would change what has been.
        """
        raise ValueError(f"{self!r} is stretched over its length, so it cannot go on for another one")

    def scaled(self, by: float) -> Curve:
        """Return this curve times a number, which is what ``by * curve`` does."""
        return Scaled(self, by)

    def __call__(self, step: int, width: int = 1) -> float:
        """Return f(step); from the end on, the last value f(length - 1) is held.

        Args:
            step: units that lie behind.
            width: units that the optimizer step covers, such as its tokens. Curves that rise are read at the last one,
                so that a warmup never starts on 0, all others at the first, so that a decay never ends on it.

        Raises:
            ValueError: ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"step={step}: a curve starts at step 0")
        return self.covering(step if self.length is None else min(step, self.length - 1), width)

    def __rshift__(self, other: Curve) -> Curve:
        if not isinstance(other, Curve):
            return NotImplemented
        return Chain((*links_of(self), *links_of(other)))

    def __mul__(self, by: float) -> Curve:
        if isinstance(by, bool) or not isinstance(by, int | float):
            return NotImplemented
        return self.scaled(float(by))

    __rmul__ = __mul__


@dataclass(frozen=True, repr=False)
class Segment(Curve):
    """One shape over a number of steps: f(t) = floor + (1 - floor) shape(p), p = (t + lead) / length.

    ``lead`` is 1 for a warmup, so that it ends on 1 and never starts on 0, and 0 for a decay, so that it starts on 1
    and its last step stays just above the floor. An endless segment is evaluated at p = 0. ``options`` are the shape's
    own numbers.
    """

    name: str
    shape: Callable[..., float]
    length: int | None
    floor: float = 0.0
    lead: int = 0
    options: tuple[tuple[str, Option], ...] = ()

    def __post_init__(self) -> None:
        if self.length is not None:
            check_steps("steps", self.length)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor}: must lie in [0, 1]; it is a share of the peak, not a learning rate")

    def factor(self, step: int) -> float:
        """Return floor + (1 - floor) shape((step + lead) / length)."""
        p = 0.0 if self.length is None else (step + self.lead) / self.length
        return self.floor + (1 - self.floor) * self.shape(p, *(value for _, value in self.options))

    def covering(self, step: int, width: int) -> float:
        """Return the factor at the last unit of the step for a warmup, at the first for all else."""
        last = step + (width - 1) * self.lead
        return self.factor(last if self.length is None else min(last, self.length - 1))

    def lasting(self, length: int | None) -> Curve:
        """Return a constant with another length; see ``Curve.lasting``."""
        return replace(self, length=length) if self.shape is flat else super().lasting(length)

    def __repr__(self) -> str:
        given = [] if self.length is None else [str(self.length)]
        given += [f"{name}={value!r}" for name, value in self.options]
        return f"{self.name}({', '.join([*given, *([f'floor={self.floor}'] if self.floor else [])])})"


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
        link, step = self._place(step)
        return link.factor(step)

    def covering(self, step: int, width: int) -> float:
        """Return the factor of the link in which the optimizer step begins."""
        link, step = self._place(step)
        return link.covering(step, width)

    def scaled(self, by: float) -> Curve:
        """Return the chain of the scaled links."""
        return Chain(tuple(link.scaled(by) for link in self.links))

    def _place(self, step: int) -> tuple[Curve, int]:
        for link in self.links[:-1]:
            assert link.length is not None
            if step < link.length:
                return link, step
            step -= link.length
        return self.links[-1], step

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.links))


@dataclass(frozen=True, repr=False)
class Scaled(Curve):
    """A curve times a number, made by ``*``."""

    curve: Curve
    by: float

    def __post_init__(self) -> None:
        if not 0 <= self.by < math.inf:
            raise ValueError(f"{self.by} * {self.curve!r}: the number must be 0 or more")

    @property
    def length(self) -> int | None:  # type: ignore[override]  # that of the curve
        """The length of the curve."""
        return self.curve.length

    def factor(self, step: int) -> float:
        """Return the number times the curve's factor."""
        return self.by * self.curve.factor(step)

    def covering(self, step: int, width: int) -> float:
        """Return the number times what the curve gives."""
        return self.by * self.curve.covering(step, width)

    def lasting(self, length: int | None) -> Curve:
        """Return the scaled curve with another length; see ``Curve.lasting``."""
        return Scaled(self.curve.lasting(length), self.by)

    def scaled(self, by: float) -> Curve:
        """Return the curve times both numbers."""
        return Scaled(self.curve, by * self.by)

    def __repr__(self) -> str:
        return f"{self.by!r} * {self.curve!r}"


def links_of(curve: Curve) -> tuple[Curve, ...]:
    """Return the links of a chain, or the curve as the only one."""
    return curve.links if isinstance(curve, Chain) else (curve,)


def flat(p: float) -> float:
    """Return 1: the shape of a constant."""
    return 1.0


def check_steps(name: str, value: int) -> int:
    """Return ``value`` if it is a positive number of steps.

    Raises:
        ValueError: it is not an integer, or below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: must be a positive integer, counted in optimizer steps or tokens")
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
