"""Curves of a given length: rises, the constant, and the decays, each also the cooldown of a run."""

from __future__ import annotations

import math
from collections.abc import Callable

from .base import Curve, Segment, check_steps, flat

RISES = ("linear", "cosine")


def warmup(steps: int, *, floor: float = 0.0, shape: str = "linear") -> Curve:
    """Rise to the peak, which the last step has: f(t) = floor + (1 - floor) r(p) with p = (t + 1)/steps, never 0.

    Args:
        steps: number of optimizer steps (or tokens), at least 1.
        floor: where it comes from, as a share of the peak, in [0, 1].
        shape: ``linear``, r(p) = p, or ``cosine``, r(p) = (1 - cos(pi p))/2.

    Raises:
        ValueError: ``steps`` is not a positive integer, ``floor`` lies outside [0, 1], or the shape is unknown.
    """
    return Segment("warmup", _rise, steps, floor, 1, _rising(shape))


def rise(steps: int, *, floor: float = 0.0, shape: str = "linear") -> Curve:
    """Rise from exactly the floor to just below the peak: f(t) = floor + (1 - floor) r(p) with p = t/steps.

    It is a decay in reverse, as cycles need it; at the start of a run choose ``warmup``, which wastes no step on 0.

    Args:
        steps: number of optimizer steps (or tokens), at least 1.
        floor: where it starts, as a share of the peak, in [0, 1].
        shape: ``linear``, r(p) = p, or ``cosine``, r(p) = (1 - cos(pi p))/2.

    Raises:
        ValueError: as for ``warmup``.
    """
    return Segment("rise", _rise, steps, floor, 0, _rising(shape))


def constant(steps: int | None = None) -> Curve:
    """Hold the peak: f(t) = 1.

    Args:
        steps: number of optimizer steps (or tokens); None (default): without end.

    Raises:
        ValueError: ``steps`` is not a positive integer.
    """
    return Segment("constant", flat, steps)


def linear(steps: int, *, floor: float = 0.0) -> Curve:
    """Decay linearly: f(t) = floor + (1 - floor)(1 - p), p = t/steps; the last step stays just above the floor.

    Args:
        steps: number of optimizer steps (or tokens), at least 1.
        floor: what the decay tends to, as a share of the peak, in [0, 1]. Zero is the better choice at high
            tokens per parameter (Bergsma et al. 2025, arXiv:2502.15938).

    Raises:
        ValueError: ``steps`` is not a positive integer or ``floor`` lies outside [0, 1].

    Source: Defazio et al. 2023, arXiv:2310.07831.
    """
    return Segment("linear", _linear, steps, floor)


def cosine(steps: int, *, floor: float = 0.0) -> Curve:
    """Decay on half a cosine: f(t) = floor + (1 - floor)(1 + cos(pi p))/2.

    Args:
        steps: number of optimizer steps (or tokens), at least 1.
        floor: what the decay tends to, as a share of the peak, in [0, 1]; 0.1 is common for language models.

    Raises:
        ValueError: as for ``linear``.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983 (without restarts).
    """
    return Segment("cosine", _cosine, steps, floor)


def polynomial(steps: int, *, power: float = 2.0, floor: float = 0.0) -> Curve:
    """Decay as a power of what remains: f(t) = floor + (1 - floor)(1 - p)^power.

    Args:
        steps: number of optimizer steps (or tokens), at least 1.
        power: above 0; 1 is ``linear``.
        floor: what the decay tends to, as a share of the peak, in [0, 1].

    Raises:
        ValueError: as for ``linear``, or ``power`` is not above 0.
    """
    if not 0 < power < math.inf:
        raise ValueError(f"power={power!r}: must be above 0")
    return Segment("polynomial", _polynomial, steps, floor, 0, (("power", float(power)),))


def one_minus_sqrt(steps: int, *, floor: float = 0.0) -> Curve:
    """Cool down, steepest at the start: f(t) = floor + (1 - floor)(1 - sqrt(p)).

    Args:
        steps: number of optimizer steps (or tokens), at least 1.
        floor: what the decay tends to, as a share of the peak, in [0, 1].

    Raises:
        ValueError: as for ``linear``.

    Source: Hägele et al. 2024, arXiv:2405.18392.
    """
    return Segment("one_minus_sqrt", _one_minus_sqrt, steps, floor)


def one_minus_square(steps: int, *, floor: float = 0.0) -> Curve:
    """Cool down, steepest at the end: f(t) = floor + (1 - floor)(1 - p^2).

    Args:
        steps: number of optimizer steps (or tokens), at least 1.
        floor: what the decay tends to, as a share of the peak, in [0, 1].

    Raises:
        ValueError: as for ``linear``.

    Source: Hägele et al. 2024, arXiv:2405.18392.
    """
    return Segment("one_minus_square", _one_minus_square, steps, floor)


def mirror_cosine(steps: int, *, floor: float = 0.0) -> Curve:
    """Cool down on the cosine reflected at the line: f(t) = floor + (1 - floor)(2 (1 - p) - (1 + cos(pi p))/2).

    Args:
        steps: number of optimizer steps (or tokens), at least 1.
        floor: what the decay tends to, as a share of the peak, in [0, 1].

    Raises:
        ValueError: as for ``linear``.

    Source: Hägele et al. 2024, arXiv:2405.18392.
    """
    return Segment("mirror_cosine", _mirror_cosine, steps, floor)


def exponential(steps: int, *, end: float | None = None, half_life: float | None = None, floor: float = 0.0) -> Curve:
    """Decay exponentially: f(t) = floor + (1 - floor) end^p.

    Args:
        steps: number of optimizer steps (or tokens), at least 1.
        end: what the power tends to at the end, in (0, 1]; 0.01 if neither it nor ``half_life`` is given.
        half_life: steps in which it halves, in place of ``end``, which then is 0.5^(steps/half_life).
        floor: what is added, as a share of the peak, in [0, 1].

    Raises:
        ValueError: as for ``linear``, both of ``end`` and ``half_life``, or one of them out of range.

    Source: the cooldown of Hu et al. 2024, arXiv:2404.06395.
    """
    if end is not None and half_life is not None:
        raise ValueError(f"end={end}, half_life={half_life}: give at most one of them")
    if half_life is not None:
        if not 0 < half_life < math.inf:
            raise ValueError(f"half_life={half_life!r}: must be a positive number of steps")
        end = 0.5 ** (check_steps("steps", steps) / half_life)
    end = 0.01 if end is None else float(end)
    if not 0 < end <= 1:
        raise ValueError(f"end={end!r}: must lie in (0, 1]; a decay to zero needs another shape")
    return Segment("exponential", _exponential, steps, floor, 0, (("end", end),))


def rex(steps: int, *, floor: float = 0.0) -> Curve:
    """Decay late, as a reflected exponential: f(t) = floor + (1 - floor)(1 - p)/(1 - p/2).

    Args:
        steps: number of optimizer steps (or tokens), at least 1.
        floor: what the decay tends to, as a share of the peak, in [0, 1].

    Raises:
        ValueError: as for ``linear``.

    Source: Chen et al. 2021, arXiv:2107.04197.
    """
    return Segment("rex", _rex, steps, floor)


#: The decays that can end a run, by name: each takes the number of steps and a floor.
COOLDOWNS: dict[str, Callable[..., Curve]] = {
    make.__name__: make
    for make in (one_minus_sqrt, linear, cosine, mirror_cosine, one_minus_square, exponential, polynomial, rex)
}


def _rising(shape: str) -> tuple[tuple[str, str], ...]:
    if shape not in RISES:
        raise ValueError(f"shape={shape!r}: must be one of {', '.join(map(repr, RISES))}")
    return () if shape == "linear" else (("shape", shape),)


# Shapes on p in [0, 1]. Named functions, not lambdas, so that curves can be pickled.
def _rise(p: float, shape: str = "linear") -> float:
    return p if shape == "linear" else math.sin(math.pi / 2 * p) ** 2


def _linear(p: float) -> float:
    return 1 - p


def _cosine(p: float) -> float:
    return math.cos(math.pi / 2 * p) ** 2  # = (1 + cos(pi p)) / 2 without the cancellation near p = 1


def _polynomial(p: float, power: float) -> float:
    return float((1 - p) ** power)


def _one_minus_sqrt(p: float) -> float:
    return 1 - math.sqrt(p)


def _one_minus_square(p: float) -> float:
    return 1 - p * p


def _mirror_cosine(p: float) -> float:
    return 2 * (1 - p) - _cosine(p)


def _exponential(p: float, end: float) -> float:
    return float(end**p)


def _rex(p: float) -> float:
    return (1 - p) / (1 - p / 2)
