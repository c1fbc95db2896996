"""The strong Wolfe line search that L-BFGS and BFGS share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

C1, C2 = 1e-4, 0.9  # sufficient decrease; curvature
_MARGIN = 0.1  # of a bracket: trial points nearer to its ends are pushed inward
_LEAST_GROWTH, _MOST_GROWTH = 0.01, 10.0


@dataclass
class Trial:
    """A point ``x + t d``: loss ``f``, slope ``g.d`` and flat gradient ``g``."""

    t: float
    f: float
    slope: float
    g: Tensor


def cubic_minimiser(a: Trial, b: Trial, low: float, high: float) -> float:
    """Where the cubic through both points with their slopes has its minimum, clamped to ``[low, high]``.

    ``d1 = s_a + s_b - 3 (f_a - f_b)/(a - b)``, ``d2 = sqrt(d1² - s_a s_b)``; for ``a <= b`` it is
    ``b - (b - a)(s_b + d2 - d1)/(s_b - s_a + 2 d2)``. Without a minimum: the middle of ``[low, high]``.

    Source: Nocedal and Wright, Numerical Optimization, 2nd ed., equation 3.59.
    """
    if a.t > b.t:
        a, b = b, a
    if a.t == b.t:
        return (low + high) / 2
    d1 = a.slope + b.slope - 3 * (a.f - b.f) / (a.t - b.t)
    radicand = d1 * d1 - a.slope * b.slope
    if not radicand >= 0:
        return (low + high) / 2
    d2 = math.sqrt(radicand)
    below = b.slope - a.slope + 2 * d2
    t = b.t - (b.t - a.t) * ((b.slope + d2 - d1) / below) if below else math.nan
    return min(max(t, low), high) if math.isfinite(t) else (low + high) / 2


def strong_wolfe(
    at: Callable[[float], Trial], start: Trial, t: float, reach: float, *, tolerance: float, most: int
) -> Trial:
    """A step with ``f(t) <= f(0) + 1e-4 t s(0)`` and ``|s(t)| <= 0.9 |s(0)|``, s being the slope.

    First the step grows, to the minimum of a cubic within ``[t + (t - t_before)/100, 10 t]``, until it is good or until
    a bracket holds a good one; then the bracket shrinks by cubic interpolation. A trial point within a tenth of an end
    of the bracket, twice in a row or outside, is moved to a tenth. The same points as in ``torch.optim.LBFGS``. A step
    to a non-finite loss is halved first.

    Args:
        at: Evaluates a step; each call counts as one evaluation.
        start: The point at 0.
        t: The first step.
        reach: Largest absolute component of the direction.
        tolerance: The search ends when the bracket is so short that no component moves by more than this.
        most: Evaluations after the first.

    Returns:
        The best end of the bracket if no point is good enough; its ``t`` is 0 if nothing was better than the start.

    Source: Nocedal and Wright, algorithms 3.5 and 3.6; Schmidt's minFunc for the constants.
    """
    before, new, used = start, at(t), 0
    while not math.isfinite(new.f) and used < most:
        t, used = before.t + (t - before.t) / 2, used + 1
        new = at(t)
    if not math.isfinite(new.f):
        return start
    bracket: tuple[Trial, Trial] | None = None
    grown = 0
    while used < most:
        if _too_high(new, start) or (grown > 1 and new.f >= before.f) or not math.isfinite(new.f):
            bracket = before, new
            break
        if abs(new.slope) <= -C2 * start.slope:
            return new
        if new.slope >= 0:
            bracket = before, new
            break
        t = cubic_minimiser(before, new, new.t + _LEAST_GROWTH * (new.t - before.t), _MOST_GROWTH * new.t)
        before, new = new, at(t)
        used, grown = used + 1, grown + 1
    low, high = bracket if bracket is not None else (start, new)
    if high.f < low.f:
        low, high = high, low
    stuck = False
    while used < most and abs(high.t - low.t) * reach >= tolerance and high.t != low.t:
        left, right = sorted((low.t, high.t))
        t = cubic_minimiser(low, high, left, right)
        margin = _MARGIN * (right - left)
        if min(right - t, t - left) < margin:
            if stuck or t >= right or t <= left:
                t = right - margin if abs(t - right) < abs(t - left) else left + margin
                stuck = False
            else:
                stuck = True
        else:
            stuck = False
        new = at(t)
        used += 1
        if _too_high(new, start) or not new.f < low.f:
            high = new
            if high.f < low.f:
                low, high = high, low
            continue
        if abs(new.slope) <= -C2 * start.slope:
            return new
        if new.slope * (high.t - low.t) >= 0:
            high = low
        low = new
    return low


def _too_high(point: Trial, start: Trial) -> bool:
    return point.f > start.f + C1 * point.t * start.slope
