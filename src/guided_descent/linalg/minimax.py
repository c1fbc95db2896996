"""Best polynomial steps for a stated spectrum: Newton-Schulz schedules that are computed instead of listed.

A step p(x) = ax + bx³ + cx⁵ that maps the singular values [lo, hi] as close to 1 as its degree allows equioscillates:
it meets 1 - E and 1 + E in turn. Composing the best step for what the step before left over gives the best composite
of the same degrees (Amsel, Persson, Musco, Gower 2025, arXiv:2505.16932).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

Triple = tuple[float, float, float]

CUSHION = 0.016  # a step never fits a range wider than this, or it would press some interior value down to zero
MARGIN = 0.02  # rounding may push a singular value this far, relatively, above the range that the next step expects

# Cheapest first, in matrix products: (quintic steps, cubic steps). A cubic step saves the square of the Gram matrix.
_LADDER = tuple(sorted(((q, c) for q in range(2, 9) for c in range(3)), key=lambda s: 2.7 * s[0] + 1.9 * s[1]))


class Schedule(NamedTuple):
    """A composite of steps.

    Attributes:
        triples: (a, b, c) of each step; c is 0 in a cubic one.
        low: Where it sends the lower end of its domain: singular values end in [low, high].
        high: The largest value that it takes on its domain.
    """

    triples: tuple[Triple, ...]
    low: float
    high: float


def best_step(lo: float, hi: float, degree: int = 5) -> tuple[Triple, float]:
    """The odd polynomial closest to 1 on [lo, hi], and its error E = max |p(x) - 1|, by Remez exchange.

    Args:
        lo: Lower end, positive.
        hi: Upper end, above ``lo``.
        degree: 5, or 3 (then c = 0).

    Example:
        >>> (a, b, c), error = best_step(0.9, 1.1)
        >>> round(a + b + c, 3), error < 1e-3
        (1.0, True)
    """
    if not 0.0 < lo < hi or degree not in (3, 5):
        raise ValueError(f"best_step({lo}, {hi}, {degree}): needs 0 < lo < hi and a degree of 3 or 5")
    if hi / lo - 1.0 < 1e-4:  # the range is a point to rounding: Taylor's step, exact to third order
        x = math.sqrt(lo * hi)
        return ((15 / 8 / x, -10 / 8 / x**3, 3 / 8 / x**5) if degree == 5 else (1.5 / x, -0.5 / x**3, 0.0)), 0.0
    inner = (degree - 1) // 2
    nodes = [lo + (hi - lo) * i / (inner + 1) for i in range(inner + 2)]
    previous = math.inf
    for _ in range(100):
        triple, error = _interpolate(nodes)
        if abs(error - previous) <= 1e-14:
            break
        previous = error
        nodes[1:-1] = _extrema(triple)
    return triple, error


def schedule(lower: float, degrees: Sequence[int]) -> Schedule:
    """The best composite of steps of these degrees for singular values in [lower, 1].

    Args:
        lower: The smallest singular value that must end near 1, relative to the largest.
        degrees: 5 or 3 for each step, in order.

    Example:
        >>> s = schedule(1e-3, (5, 5, 5, 5, 5))
        >>> round(s.low, 2), round(s.high, 2)
        (0.86, 1.14)
    """
    lo, hi = lower, 1.0 + MARGIN
    triples: list[Triple] = []
    for degree in degrees:
        if triples:
            hi *= 1.0 + MARGIN
        (a, b, c), error = best_step(max(lo, CUSHION * hi), hi, degree)
        reached = lo * (a + lo * lo * (b + lo * lo * c))
        k = 2.0 / (reached + 1.0 + error)  # 1, unless the cushion left the lowest values below 1 - E: centre anew
        triples.append((k * a, k * b, k * c))
        lo, hi = k * reached, k * (1.0 + error)
    return Schedule(tuple(triples), lo, hi)


@lru_cache(maxsize=256)
def cheapest(lower: float, tolerance: float = 0.15) -> Schedule:
    """The fewest matrix products that send [lower, 1] into [1 - tolerance, 1 + tolerance].

    Raises:
        ValueError: ``lower`` or ``tolerance`` is out of range, or more than 8 quintic steps would be needed.

    Example:
        >>> [sum(c != 0 for _, _, c in cheapest(x).triples) for x in (0.001, 0.004, 0.02)]
        [5, 4, 3]
    """
    if not 0.0 < lower < 1.0:
        raise ValueError(f"lower={lower!r} must lie in (0, 1): the smallest singular value over the largest")
    if not 0.01 <= tolerance < 1.0:
        raise ValueError(f"tolerance={tolerance!r} must lie in [0.01, 1); below that use coefficients='exact'")
    for quintics, cubics in _LADDER:
        found = schedule(lower, (5,) * quintics + (3,) * cubics)
        if found.low >= 1.0 - tolerance:
            return found
    raise ValueError(f"lower={lower!r} needs more than 8 quintic steps; use coefficients='exact'")


def _interpolate(nodes: list[float]) -> tuple[Triple, float]:
    """The odd polynomial that takes 1 - E, 1 + E, 1 - E, ... at the nodes, and that E."""
    squares = [x * x for x in nodes]
    # Weights that annihilate every odd polynomial of this degree: they determine E without solving a system.
    weights = [1.0 / (x * math.prod(y - other for other in squares if other != y)) for x, y in zip(nodes, squares)]
    signs = [(-1.0) ** i for i in range(len(nodes))]
    error = sum(weights) / sum(w * s for w, s in zip(weights, signs))
    # p(x)/x is a polynomial in x²: Newton's divided differences through all nodes but the last.
    f = [(1.0 - s * error) / x for x, s in zip(nodes, signs)]
    y0, y1, y2 = squares[:3]
    d1 = (f[1] - f[0]) / (y1 - y0)
    if len(nodes) == 3:
        return (f[0] - d1 * y0, d1, 0.0), error
    d2 = ((f[2] - f[1]) / (y2 - y1) - d1) / (y2 - y0)
    return (f[0] - d1 * y0 + d2 * y0 * y1, d1 - d2 * (y0 + y1), d2), error


def _extrema(triple: Triple) -> list[float]:
    """Where p′ vanishes on the positive axis, ascending."""
    a, b, c = triple
    if c == 0.0:
        return [math.sqrt(-a / (3 * b))]
    root = math.sqrt(9 * b * b - 20 * a * c)
    return sorted(math.sqrt((-3 * b + s * root) / (10 * c)) for s in (-1.0, 1.0))
